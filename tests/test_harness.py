"""The lm-evaluation-harness on a plan, with the real harness and a task file of our own (no hub)."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import keep_all, make_space

from qpkv_planner.evaluation import niah
from qpkv_planner.evaluation.samples import Encoder, Options
from qpkv_runtime.models import load_model
from qpkv_runtime.plan import Decode, Scorer

pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'qpkv[eval]')", exc_type=ImportError)

ROOT = Path(__file__).resolve().parents[1]
TASKS = {
    "needle_generate": {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"max_gen_toks": 12, "until": ["."], "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "filter_list": [{"name": "trimmed", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
    },
    "needle_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{choices.index(answer)}}",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
}


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny", dtype="float32")


@pytest.fixture(scope="module")
def tasks(tiny, tmp_path_factory):
    """Six needles with three wrong answers each, as the harness's local task files."""
    folder = tmp_path_factory.mktemp("tasks")
    chance = random.Random(0)
    rows = []
    for sample in niah.make_samples(Encoder(tiny[1]), Options(lengths=(256, 320), depths=(0, 50, 90))):
        wrong = [str(chance.randrange(10**6, 10**7)) for _ in range(3)]
        choices = sorted([*wrong, sample.answers[0]])
        prompt = tiny[1].decode([*sample.context[1:], *sample.question])
        rows.append({"prompt": prompt, "answer": sample.answers[0], "choices": choices})
    (folder / "needles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        data = {"data_files": {"test": str(folder / "needles.jsonl")}}
        whole = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test", **task}
        (folder / f"{name}.yaml").write_text(json.dumps(whole))
    return folder


def scores(tasks, model, **settings):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    import qpkv_planner.harness  # noqa: F401  (registers the model)

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    run = simple_evaluate(
        model=model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, log_samples=True, **settings
    )
    answers = {name: [doc["filtered_resps"] for doc in docs] for name, docs in run["samples"].items()}
    metrics = {
        name: {key: value for key, value in result.items() if key.split(",")[0] in ("exact_match", "acc")}
        for name, result in run["results"].items()
    }
    return metrics, answers


@pytest.fixture(scope="module", autouse=True)
def no_hub(tmp_path_factory):
    """The harness reads these when it is imported, so this comes first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


def write(plan, folder) -> str:
    path = folder / "plan.yaml"
    path.write_text(plan.to_yaml())
    return str(path)


@pytest.fixture(scope="module")
def right(tiny, tasks, no_hub):
    """What the harness's own `hf` model scores with the full cache."""
    from qpkv_runtime.models.resolve import resolve

    arguments = f"pretrained={resolve('tiny').path_or_id},dtype=float32"
    return scores(tasks, "hf", model_args=arguments, device="cpu", batch_size=2)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_plan_that_keeps_everything_scores_as_the_harness_own_hf_model(tiny, tasks, right, tmp_path, batch_size):
    plan = keep_all(make_space(tiny[0], "64MiB", context_tokens=384, decode=Decode(reserve_tokens=64, format="16bit")))
    arguments = f"plan={write(plan, tmp_path)},model=tiny"
    metrics, answers = scores(tasks, "qpkv", model_args=arguments, device="cpu", batch_size=batch_size)
    assert metrics == right[0]
    assert answers["needle_generate"] == right[1]["needle_generate"]
    for ours, theirs in zip(answers["needle_choice"], right[1]["needle_choice"], strict=True):
        for (our_loss, our_greedy), (their_loss, their_greedy) in zip(ours, theirs, strict=True):
            assert float(our_loss) == pytest.approx(float(their_loss), abs=0.02)  # keys and values in 16 bit
            assert our_greedy == their_greedy
    assert right[0]["needle_choice"]["acc,none"] == 1


def test_a_plan_that_lost_the_needle_scores_worse(tiny, tasks, right, tmp_path):
    space = make_space(
        tiny[0], "1/3", context_tokens=384, decode=Decode(reserve_tokens=64, format="16bit"),
        scorer=Scorer(name="streamingllm"),
    )  # fmt: skip
    plan = space.plan(space.project([1] * 8, ["16bit"] * 8))
    arguments = f"plan={write(plan, tmp_path)},model=tiny"
    metrics, _ = scores(tasks, "qpkv", model_args=arguments, device="cpu", batch_size=1)
    assert metrics["needle_generate"]["exact_match,trimmed"] < right[0]["needle_generate"]["exact_match,trimmed"]


def test_the_command_is_the_harness_own_with_our_model(tiny, tasks, tmp_path):
    plan = keep_all(make_space(tiny[0], "64MiB", context_tokens=384, decode=Decode(reserve_tokens=64, format="16bit")))
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [
        sys.executable, "-m", "qpkv_planner.harness_cli", "run", "--model", "qpkv", "--model_args",
        f"plan={write(plan, tmp_path)},model=tiny", "--tasks", "needle_choice", "--include_path", str(tasks),
        "--device", "cpu", "--limit", "2",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "needle_choice" in done.stdout and "acc" in done.stdout
    command[command.index("--model_args") + 1] = "plan=missing.yaml"
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("qpkv-lm-eval: error: missing.yaml: cannot be read as a plan")
