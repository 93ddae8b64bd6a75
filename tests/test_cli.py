"""`qpkv-run` and `qpkv-show`: every option, what goes where, and how they end."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import keep_all, make_model, make_space, prompts
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

import qpkv_runtime
from qpkv_planner.allocation import Space, uniform
from qpkv_runtime import cli, generation, models
from qpkv_runtime.cache import PlannedCache
from qpkv_runtime.errors import CacheError, InputError, NumericsError, PlanError
from qpkv_runtime.generation import Sampling, Stats, generate
from qpkv_runtime.ledger import full_bytes, make_ledger
from qpkv_runtime.methods import PRESETS, QUANTIZERS, SCORERS, SHARINGS
from qpkv_runtime.models import KNOWN_MODELS, model_identity
from qpkv_runtime.plan import Decode, Format, Heads, Layer, Plan, TensorFormat, Tier

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    "TERM": "dumb",
    "OMP_NUM_THREADS": "1",
}
PROMPT = "The library opened in 1921. " * 12 + "The library opened in"
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and m.content == 'refuse' %}{{ raise_exception('no') }}{% endif %}"
    "{% if m.content == 'divide' %}{{ 1 / 0 }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
_load_model = cache(models.load_model)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """On cores that others use too, threads wait for each other longer than they work on a model as small as tiny."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Ended:
    """A command's exit status and what it wrote."""

    status: int
    out: str
    err: str


Command = Callable[..., Ended]


def tiny() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return _load_model("tiny", "auto", "auto")


def num_tokens(text: str) -> int:
    return len(tiny()[1](text, add_special_tokens=False).input_ids)


def tiny_space(**changes: Any) -> Space:
    """Plans for tiny; 256 tokens, a reserve of 8."""
    space = make_space(tiny()[0], "1/4", context_tokens=256)
    return replace(space, **{"model": space.model.model_copy(update={"id": "tiny"}), **changes})


def tiny_plan(**changes: Any) -> Plan:
    space = tiny_space(**changes)
    allocation = uniform(space, "rotated-k4v2")
    assert allocation is not None
    return space.plan(allocation)


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """A plan file for tiny."""
    return written(tiny_plan(), tmp_path)


def written(plan: Plan, folder: Path) -> Path:
    file = folder / "plan.yaml"
    file.write_text(plan.to_yaml(), encoding="utf-8")
    return file


@pytest.fixture
def qpkv_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command in this process, each model loaded once."""
    monkeypatch.setattr(
        models, "load_model", lambda name, dtype="auto", device="auto", **options: _load_model(name, dtype, device)
    )

    def call(*argv: object, stdin: str = "") -> Ended:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        return Ended(cli.run(list(map(str, argv))), *capsys.readouterr())

    return call


@pytest.fixture
def qpkv_show(capsys: pytest.CaptureFixture[str]) -> Command:
    return lambda *argv: Ended(cli.show(list(map(str, argv))), *capsys.readouterr())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `generate` was asked, call by call; it answers as always."""
    asked: list[dict[str, Any]] = []

    def spy(model: Any, tokenizer: Any, plan: Any, input_ids: Any, **options: Any) -> Any:
        asked.append({"plan": plan, "prompt": tokenizer.decode(input_ids[0], skip_special_tokens=True), **options})
        return generate(model, tokenizer, plan, input_ids, **options)

    monkeypatch.setattr(generation, "generate", spy)
    return asked


def chat_model(folder: Path) -> Path:
    """A copy of tiny elsewhere that has a chat template."""
    copy = folder / "chatty"
    copy.mkdir()
    for file in (ROOT / "models" / "tiny").iterdir():
        (copy / file.name).symlink_to(file)
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").unlink()
    (copy / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    return copy


# --- prompts and answers -------------------------------------------------------------------------------------------


def test_the_answer_is_what_model_generate_gives_under_the_plan(qpkv_run: Command, plan: Path) -> None:
    """The README's lines, and the command."""
    model, tokenizer = tiny()
    inputs = tokenizer(PROMPT, return_tensors="pt")
    cache = qpkv_runtime.PlannedCache.from_plan(qpkv_runtime.load_plan(plan), model)
    tokens = model.generate(**inputs, past_key_values=cache, max_new_tokens=6, do_sample=False)
    expected = tokenizer.decode(tokens[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    ended = qpkv_run("--plan", plan, "--prompt", PROMPT, "--max-new-tokens", 6)
    assert ended == Ended(0, expected + "\n", ended.err)
    assert ended.err == "qpkv-run: tiny has no chat template, so it continues the prompt as it is (--raw)\n"


def test_a_prompt_comes_from_an_option_a_file_or_standard_input(
    qpkv_run: Command, plan: Path, tmp_path: Path, calls: list[dict[str, Any]]
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT + "\n")
    given = [
        qpkv_run("--raw", "--plan", plan, "--max-new-tokens", 2, "--prompt", PROMPT, stdin="not this"),
        qpkv_run("--raw", "--plan", plan, "--max-new-tokens", 2, "--prompt-file", file, stdin="not this"),
        qpkv_run("--raw", "--plan", plan, "--max-new-tokens", 2, "--prompt-file", "-", stdin=PROMPT + "\n"),
        qpkv_run("--raw", "--plan", plan, "--max-new-tokens", 2, stdin=PROMPT + "\n"),
    ]
    assert [call["prompt"] for call in calls] == [PROMPT] * 4
    assert given == [Ended(0, given[0].out, "")] * 4


def test_the_answer_is_written_as_it_is_formed(qpkv_run: Command, plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Recorder(io.StringIO):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def flush(self) -> None:
            if self.seen[-1:] != [self.getvalue()]:
                self.seen.append(self.getvalue())

    out = Recorder()
    monkeypatch.setattr(sys, "stdout", out)
    qpkv_run("--plan", plan, "--prompt", PROMPT, "--max-new-tokens", 12)
    assert len(out.seen) > 3, out.seen


@pytest.mark.parametrize(
    ("options", "sampling"),
    [
        ((), Sampling()),
        (("--do-sample",), Sampling(do_sample=True)),
        (("--temperature", "0.7"), Sampling(do_sample=True, temperature=0.7)),
        (("--top-k", "5"), Sampling(do_sample=True, top_k=5)),
        (("--top-p", "0.9", "--seed", "3"), Sampling(do_sample=True, top_p=0.9, seed=3)),
        (("--repetition-penalty", "1.5"), Sampling(repetition_penalty=1.5)),
    ],
)
def test_sampling_is_as_transformers_names_it(
    qpkv_run: Command, plan: Path, calls: list[dict[str, Any]], options: tuple[str, ...], sampling: Sampling
) -> None:
    assert qpkv_run("--plan", plan, "--prompt", PROMPT, "--max-new-tokens", 2, *options).status == 0
    assert [call["sampling"] for call in calls] == [sampling]


def test_a_seed_repeats_a_sampled_answer_and_another_gives_another(qpkv_run: Command, plan: Path) -> None:
    hot = ("--plan", plan, "--prompt", PROMPT, "--max-new-tokens", 8, "--temperature", 4, "--top-k", 50, "--top-p", 0.9)
    answers = [qpkv_run(*hot, "--seed", seed).out for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_a_greedy_answer_ignores_the_models_own_sampling_settings(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = make_model("llama")
    plan = keep_all(make_space(model, "64MiB"))
    greedy = generate(model, tiny()[1], plan, prompts(1), max_new_tokens=8)
    for name, value in (("do_sample", True), ("temperature", 5.0), ("top_p", 0.5), ("top_k", 3)):
        monkeypatch.setattr(model.generation_config, name, value)
    assert generate(model, tiny()[1], plan, prompts(1), max_new_tokens=8).tokens == greedy.tokens
    assert not caplog.records


def test_a_prompt_is_put_into_the_chat_template_unless_raw(
    qpkv_run: Command, plan: Path, tmp_path: Path, calls: list[dict[str, Any]]
) -> None:
    common = ("--plan", plan, "--model", chat_model(tmp_path), "--max-new-tokens", 2, "--prompt", "Hello there")
    ended = [qpkv_run(*common), qpkv_run(*common, "--system", "Be brief"), qpkv_run(*common, "--raw")]
    assert [call["prompt"] for call in calls] == [
        "<user>Hello there\n<assistant>",
        "<system>Be brief\n<user>Hello there\n<assistant>",
        "Hello there",
    ]
    assert [(e.status, e.err) for e in ended] == [(0, "")] * 3


def test_without_a_prompt_the_bundled_questions_are_asked_one_by_one(
    qpkv_run: Command, plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[dict[str, Any]]
) -> None:
    text, _, questions = cli.SAMPLE_PROMPT.read_text(encoding="utf-8").partition(cli.QUESTIONS_MARKER)
    assert len(text.split()) > 600
    assert len(questions.splitlines()) == 3
    assert len(tiny()[1](text).input_ids) < KNOWN_MODELS["tiny"].shape.max_context_tokens - 512

    short = tmp_path / "sample.txt"
    short.write_text(f"Anna has 3 cats.{cli.QUESTIONS_MARKER}Who has cats?\nHow many?\n")
    monkeypatch.setattr(cli, "SAMPLE_PROMPT", short)
    ended = qpkv_run("--plan", plan, "--max-new-tokens", 2)
    assert [call["prompt"] for call in calls] == [
        "Anna has 3 cats.\n\nQuestion: Who has cats?\nAnswer:",
        "Anna has 3 cats.\n\nQuestion: How many?\nAnswer:",
    ]
    assert re.fullmatch(r"question: Who has cats\?\n.*\n\nquestion: How many\?\n.*\n", ended.out, re.DOTALL)
    assert "no prompt was given" in ended.err


# --- comparing and statistics --------------------------------------------------------------------------------------


def test_a_plan_that_keeps_everything_answers_like_the_full_cache(qpkv_run: Command, tmp_path: Path) -> None:
    space = tiny_space(requested="64MiB", decode=Decode(reserve_tokens=64, format="16bit"))
    plan = keep_all(space)
    file = written(plan, tmp_path)
    ended = qpkv_run("--raw", "--plan", file, "--prompt", PROMPT, "--max-new-tokens", 6, "--compare-full")
    match = re.fullmatch(
        r"plan:\n(.*)\n\nfull cache:\n(.*)\n\nequal tokens: 6 of 6 \(100\.0 %\)\nbytes: (\S+) .* plan; (\S+) for .*\n",
        ended.out,
        re.DOTALL,
    )
    assert match, ended.out
    assert match[1] == match[2]
    assert match[3] == f"{plan.budget.planned_bytes:,}"
    assert match[4] == f"{full_bytes(space.shape, len(tiny()[1](PROMPT).input_ids)):,}"


def test_the_comparison_counts_equal_tokens_place_by_place(
    qpkv_run: Command, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stats = Stats(10, 4, 1000, 300, ((9, 3),), 1.0, 1.0, 0, "process")
    planned = generation.Answer((1, 2, 3, 4), "", stats)
    full = generation.Answer((1, 9, 3), "", replace(stats, allocated_bytes=2000))
    monkeypatch.setattr(generation, "generate", lambda *args, **options: full if args[2] is None else planned)
    out = qpkv_run("--plan", plan, "--prompt", "x", "--compare-full").out
    assert "equal tokens: 2 of 4 (50.0 %), the first difference is token 2\nbytes: 300 under the plan; 1,000 for" in out


def test_both_sampled_answers_of_a_comparison_have_one_seed(
    qpkv_run: Command, plan: Path, calls: list[dict[str, Any]]
) -> None:
    qpkv_run("--plan", plan, "--prompt", "x", "--max-new-tokens", 1, "--do-sample", "--compare-full")
    assert calls[0]["sampling"] == calls[1]["sampling"]
    assert calls[0]["sampling"].seed is not None
    assert [call["plan"] is None for call in calls] == [False, True]


def test_the_stats_are_the_ledgers_numbers_and_go_to_stderr(qpkv_run: Command, plan: Path) -> None:
    planned, num_tokens = qpkv_runtime.load_plan(plan), len(tiny()[1](PROMPT).input_ids)
    ended = qpkv_run("--raw", "--plan", plan, "--prompt", PROMPT, "--max-new-tokens", 5, "--stats")
    full, arena = full_bytes(planned.model.shape, num_tokens), make_ledger(planned).stored_bytes
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in ended.err.splitlines())
    assert lines["bytes"] == (
        f"full {full:,} (this prompt at 16 bit), budget {planned.budget.limit_bytes:,}, "
        f"planned {arena:,}, allocated {arena:,}"
    )
    assert lines["prompt"] == f"{num_tokens} tokens"
    assert lines["kept"].endswith("; and 4 of 8 in the reserve")
    kept = {}
    for tokens, first, last in re.findall(r"(\d+) in layers? (\d+)(?:-(\d+))?", lines["kept"]):
        kept.update(dict.fromkeys(range(int(first), int(last or first) + 1), int(tokens)))
    assert kept == {i: min(layer.tokens, num_tokens) for i, layer in enumerate(planned.layers)}
    assert re.fullmatch(r"\d+\.\d\d s, \d+\.\d tokens/s", lines["prefill"])
    assert re.fullmatch(r"\d+\.\d tokens/s \(4 in \d+\.\d\d s\)", lines["decode"])
    assert re.fullmatch(r"[\d,]+ bytes .* by the end of the prefill", lines["peak memory"])
    assert "bytes" not in ended.out


def test_tiers_and_runs_of_layers_are_told_apart_in_the_stats() -> None:
    stats = Stats(99, 1, 1000, 300, ((8, 20, 3), (8, 20, 3), (28, 0, 3)), 1.0, 0.0, 0, "process")
    lines = "\n".join(cli._stats_lines(generation.Answer((1,), "", stats), tiny_plan()))
    assert "8+20 in layers 0-1, 28+0 in layer 2; and 3 of 8 in the reserve" in lines
    assert "one token: no speed to tell" in lines


def test_the_full_caches_statistics_are_its_tensors() -> None:
    model, tokenizer = tiny()
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    stats = generate(model, tokenizer, None, ids, max_new_tokens=3).stats
    held, size = ids.shape[1] + 2, 4 if model.dtype == torch.float32 else 2
    assert stats.tokens_held == ((held,),) * 8
    assert stats.allocated_bytes == 8 * 2 * 4 * 64 * held * size
    assert stats.full_bytes == 8 * 2 * 4 * 64 * ids.shape[1] * 2


@pytest.mark.parametrize("family", ["mistral_sliding", "gemma3", "gemma2"])
def test_the_full_cache_answers_like_transformers_own(family: str) -> None:
    model, ids = make_model(family), prompts(1)
    ours = generate(model, tiny()[1], None, ids, max_new_tokens=12).tokens
    model.set_attn_implementation("eager")
    theirs = model.generate(ids, past_key_values=DynamicCache(), max_new_tokens=12, do_sample=False)
    assert ours == tuple(theirs[0, ids.shape[1] :].tolist())


# --- models --------------------------------------------------------------------------------------------------------


def test_dtype_and_device_reach_the_model(qpkv_run: Command, plan: Path, calls: list[dict[str, Any]]) -> None:
    ended = qpkv_run(
        "--plan", plan, "--prompt", PROMPT, "--dtype", "bfloat16", "--device", "cpu", "--max-new-tokens", 2,
        "--compare-full",
    )  # fmt: skip
    assert ended.status == 0
    assert ended.out.endswith("as bfloat16\n")


def test_other_weights_than_the_plans_are_warned_of_once(qpkv_run: Command, tmp_path: Path) -> None:
    right = model_identity(*tiny()).weights_hash
    for weights_hash, num_warnings in ((right, 0), ("sha256:" + "0" * 64, 1)):
        model = tiny_space().model.model_copy(update={"weights_hash": weights_hash})
        file = written(tiny_plan(model=model), tmp_path)
        ended = qpkv_run("--raw", "--plan", file, "--prompt", PROMPT, "--max-new-tokens", 1)
        assert (ended.status, ended.err.count("warning: the plan was made on other weights")) == (0, num_warnings)
        assert len(ended.err.splitlines()) == num_warnings


def test_a_prompt_longer_than_the_plans_context_is_warned_of_in_one_line(qpkv_run: Command, tmp_path: Path) -> None:
    file = written(tiny_plan(context_tokens=64), tmp_path)
    ended = qpkv_run("--raw", "--plan", file, "--prompt", PROMPT, "--max-new-tokens", 1)
    assert re.fullmatch(r"qpkv-run: warning: the prompt has \d+ tokens, more than the 64 [^\n]*\n", ended.err)


def test_a_plan_for_another_shape_is_refused(qpkv_run: Command, plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load_model", lambda *args, **settings: (make_model("llama"), tiny()[1]))
    ended = qpkv_run("--plan", plan, "--prompt", "x")
    assert ended.status == 2
    assert ended.out == ""
    assert ended.err.startswith("qpkv-run: error: the plan is for a model with num_layers = 8, this one has 3")


# --- generate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting",
    [
        {"num_beams": 2},
        {"num_return_sequences": 2, "do_sample": True},
        {"use_cache": False},
        {"return_dict_in_generate": True},
        {"cache_implementation": "static"},
        {"stop_strings": ["about"]},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_a_models_generation_config_cannot_ask_for_what_is_not_one_answer(
    setting: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny()
    ids = tokenizer("The library opened in 1921. The library", return_tensors="pt").input_ids
    plain = generate(model, tokenizer, tiny_plan(), ids, max_new_tokens=12)
    for name, value in setting.items():
        monkeypatch.setattr(model.generation_config, name, value)
    answer = generate(model, tokenizer, tiny_plan(), ids, max_new_tokens=12)
    if "stop_strings" in setting:
        assert answer.text == plain.text[: plain.text.index("about") + len("about")]
    else:
        assert answer.tokens == plain.tokens


def test_an_answer_ends_where_the_models_context_does() -> None:
    model = make_model("llama")  # 512 tokens of context
    plan = keep_all(make_space(model, "64MiB", context_tokens=512))
    answer = generate(model, tiny()[1], plan, prompts(1, 505), max_new_tokens=64)
    assert len(answer.tokens) == answer.stats.new_tokens == 7


def test_a_prompt_that_does_not_fit_names_both_numbers() -> None:
    model = make_model("llama")
    plan = keep_all(make_space(model, "64MiB"))
    for num_tokens in (512, 600):
        with pytest.raises(InputError, match=f"context of 512 tokens, and the prompt has {num_tokens}"):
            generate(model, tiny()[1], plan, prompts(1, num_tokens))
    with pytest.raises(InputError, match="at least one token, got none"):
        generate(model, tiny()[1], plan, prompts(1, 0))
    with pytest.raises(InputError, match=r"shape \[1, T\], got \[2, 70\]"):
        generate(model, tiny()[1], plan, prompts(2))
    with pytest.raises(InputError, match="max_new_tokens must be at least 1, got 0"):
        generate(model, tiny()[1], plan, prompts(1), max_new_tokens=0)


@pytest.mark.parametrize(
    "logits",
    [[0.0, float("nan")], [0.0, float("inf")], [float("-inf")] * 2],
    ids=["one NaN", "one Inf", "nothing but -Inf"],
)
def test_logits_that_are_no_numbers_end_the_answer(logits: list[float]) -> None:
    class Broken(torch.nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return torch.tensor(logits).repeat(*hidden.shape[:-1], 64)

    model = make_model("llama")
    model.lm_head = Broken()
    for plan in (keep_all(make_space(model, "64MiB")), None):
        with pytest.raises(NumericsError, match="logits have NaN or Inf"):
            generate(model, tiny()[1], plan, prompts(1))


def test_a_token_that_is_ruled_out_is_no_error() -> None:
    model = make_model("llama")
    assert model.generation_config is not None
    model.generation_config.suppress_tokens = [5, 6, 7]
    plan = keep_all(make_space(model, "64MiB"))
    assert not {5, 6, 7} & set(generate(model, tiny()[1], plan, prompts(1), max_new_tokens=12).tokens)


def test_a_plan_that_stops_ends_with_its_error() -> None:
    model = make_model("llama")
    plan = keep_all(make_space(model, "64MiB", decode=Decode(reserve_tokens=3, format="16bit", then="stop")))
    assert len(generate(model, tiny()[1], plan, prompts(1), max_new_tokens=4).tokens) == 4
    with pytest.raises(CacheError, match="reserve holds 3 generated tokens"):
        generate(model, tiny()[1], plan, prompts(1), max_new_tokens=5)


def test_a_plan_for_another_model_is_refused_by_generate_too() -> None:
    with pytest.raises(PlanError, match="num_layers = 8"):
        generate(make_model("llama"), tiny()[1], tiny_plan(), prompts(1))


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"temperature": 0.0}, "temperature must be at least 1e-06, got 0.0"),
        ({"temperature": 1e-38}, "temperature must be at least 1e-06, got 1e-38"),
        ({"temperature": float("nan")}, "temperature must be at least 1e-06, got nan"),
        ({"repetition_penalty": -1.0}, "repetition_penalty must be at least 1e-06, got -1.0"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
        ({"seed": -1}, "seed must be between 0 and"),
    ],
)
def test_sampling_refuses_numbers_that_mean_nothing(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError) as caught:
        Sampling(do_sample=True, **settings)
    assert str(caught.value).startswith(line)


# --- a conversation on a terminal ----------------------------------------------------------------------------------


class Terminal:
    """The command on a pseudo-terminal of its own."""

    def __init__(self, *argv: object) -> None:
        self.text = ""
        self.process, self.screen = pty.fork()
        if self.process == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests run in the background inherit that it is ignored
            code = "import sys; from qpkv_runtime.cli import run; sys.exit(run())"
            os.execve(sys.executable, [sys.executable, "-c", code, *map(str, argv)], ENVIRONMENT)

    def read_until(self, pattern: str, seconds: float = 120) -> str:
        """What appears up to the end of `pattern`."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self.text)):
            assert select.select([self.screen], [], [], max(0.0, end - time.monotonic()))[0], f"after {self.text!r}"
            self.text += os.read(self.screen, 4096).decode(errors="replace").replace("\r", "")
        seen, self.text = self.text[: match.end()], self.text[match.end() :]
        return seen

    def type(self, text: str) -> None:
        os.write(self.screen, text.encode())

    def status(self) -> int:
        """The exit status, once the command has ended."""
        try:
            while os.read(self.screen, 4096):
                pass
        except OSError:
            pass  # Linux says EIO when the other end has gone
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])

    def close(self) -> None:
        os.close(self.screen)
        try:
            os.kill(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)
        except (ProcessLookupError, ChildProcessError):
            pass  # it ended and was waited for


def test_a_conversation_goes_on_over_turns(plan: Path, tmp_path: Path) -> None:
    terminal = Terminal("--plan", plan, "--model", chat_model(tmp_path), "--max-new-tokens", 3, "--seed", 1)
    try:
        assert "Ctrl-C stops an answer" in terminal.read_until(r"\n> ")
        terminal.type("/stats\n")
        assert "no answer yet" in terminal.read_until(r"\n> ")
        terminal.type("The library opened in 1921.\n")
        terminal.read_until(r"\n> ")
        terminal.type("/stats\n")
        first = int(re.findall(r"prompt +(\d+) tokens", terminal.read_until(r"\n> "))[0])
        terminal.type("\n")  # nothing
        terminal.read_until(r"> ")
        terminal.type("And when did it close?\n")
        terminal.read_until(r"\n> ")
        terminal.type("/stats\n")
        second = int(re.findall(r"prompt +(\d+) tokens", terminal.read_until(r"\n> "))[0])
        assert first == num_tokens("<user>The library opened in 1921.\n<assistant>")
        assert second >= first + num_tokens("And when did it close?\n<assistant>"), "the first turn is forgotten"
        terminal.type("/exit\n")
        assert terminal.status() == 0
    finally:
        terminal.close()


def test_an_interrupt_stops_the_answer_and_not_the_conversation(plan: Path) -> None:
    terminal = Terminal("--raw", "--plan", plan, "--max-new-tokens", 3000, "--temperature", 2, "--seed", 1)
    try:
        terminal.read_until(r"\n> ")
        terminal.type("The library opened in 1921. The\n")
        terminal.read_until(r"1921\. The\n[^>]")  # the echo of what was typed, and the answer begins
        terminal.type("\x03")
        terminal.read_until(r"\n> ")
        terminal.type("/stats\n")
        assert "the last answer did not come to its end" in terminal.read_until(r"\n> ")
        time.sleep(1)  # the prompt is written just before it is read, and an interrupt in between can be lost
        terminal.type("\x03")  # at the prompt it only starts a new line
        terminal.read_until(r"\n> ")
        terminal.type("\x04")
        assert terminal.status() == 0
    finally:
        terminal.close()


def test_a_line_that_is_no_text_does_not_end_a_conversation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether reading it fails or, as in the POSIX locale, gives surrogates."""
    lines = iter([b"caf\xe9", b"caf\xe9", b"caf\xc3\xa9", b"/exit"])
    errors = iter(["strict", "surrogateescape", "strict", "strict"])
    monkeypatch.setattr(cli, "_read_line", lambda: next(lines).decode(errors=next(errors)))
    answered: list[Any] = []
    session = SimpleNamespace(
        name="tiny",
        plan=tiny_plan(),
        opening=lambda prompt: [{"role": "user", "content": prompt}],
        answer=lambda messages: answered.append(messages[-1]["content"]) or "",
    )
    cli._converse(session)
    assert answered == ["café"]
    assert capsys.readouterr().err.count("error: a prompt must be UTF-8 text, and this line is not\n") == 2


# --- how the commands end ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ([], "the following arguments are required: --plan (see qpkv-run --help)"),
        (["--plan", "PLAN", "--surprise"], "unrecognized arguments: --surprise (see qpkv-run --help)"),
        (["--plan", "PLAN", "--promp", "x"], "unrecognized arguments: --promp x (see qpkv-run --help)"),
        (["--plan", "missing.yaml"], "missing.yaml: cannot be read as a plan: No such file or directory"),
        (["--plan", "PLAN", "--prompt", "x", "--prompt-file", "y"], "argument --prompt-file: not allowed with"),
        (["--plan", "PLAN", "--prompt", "  \n"], "a prompt must not be empty, and --prompt is"),
        (["--plan", "PLAN", "--prompt", "\udcff"], "a prompt must be UTF-8 text, and --prompt is not"),
        (["--plan", "PLAN", "--prompt-file", "-"], "a prompt must not be empty, and standard input is"),
        (["--plan", "PLAN", "--prompt-file", "missing.txt"], "cannot read a prompt from missing.txt: No such file"),
        (["--plan", "PLAN", "--prompt-file", "BINARY"], "a prompt must be UTF-8 text, and "),
        (["--plan", "PLAN", "--prompt", "x", "--max-new-tokens", "0"], "max_new_tokens must be at least 1, got 0"),
        (["--plan", "PLAN", "--prompt", "x", "--max-new-tokens", "many"], "argument --max-new-tokens: invalid int"),
        (["--plan", "PLAN", "--prompt", "x", "--temperature", "0"], "temperature must be at least 1e-06, got 0.0"),
        (["--plan", "PLAN", "--prompt", "x", "--dtype", "int4"], "dtype must be one of auto, float32"),
        (["--plan", "PLAN", "--prompt", "x", "--device", "toaster"], "device must be auto, cpu, cuda"),
        (["--plan", "PLAN", "--prompt", "x", "--model", "no-such-model"], "a model is one of tiny, smollm2"),
        (["--plan", "PLAN", "--prompt", "x", "--raw", "--system", "y"], "--system needs a chat template, and --raw"),
        (["--plan", "PLAN", "--prompt", "x", "--system", "y"], "--system needs a chat template, and tiny has none"),
        (["--plan", "PLAN", "--prompt", "x", "--model", "CHATTY", "--system", "refuse"], "the chat template of "),
        (["--plan", "PLAN", "--prompt", "x", "--model", "CHATTY", "--system", "divide"], "the chat template of "),
        (["--plan", "PLAN", "--raw", "--prompt", "LONG"], "prompt and answer must fit the model's context of 4096"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_mistake_is_one_line_and_status_2(
    qpkv_run: Command, plan: Path, tmp_path: Path, argv: list[str], line: str
) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    stands_for = {"PLAN": plan, "BINARY": tmp_path / "binary", "LONG": "word " * 5000}
    if "CHATTY" in argv:
        stands_for["CHATTY"] = chat_model(tmp_path)
    ended = qpkv_run(*(stands_for.get(argument, argument) for argument in argv))
    assert (ended.status, ended.out) == (2, "")
    last = ended.err.splitlines()[-1]
    assert last.startswith(f"qpkv-run: error: {line}"), ended.err
    assert len([said for said in ended.err.splitlines() if "no chat template, so" not in said]) == 1


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ([], "give a plan file, or --methods (see qpkv-show --help)"),
        (["missing.yaml"], "missing.yaml: cannot be read as a plan: No such file or directory"),
        (["PLAN", "missing.yaml"], "missing.yaml: cannot be read as a plan: No such file or directory"),
        (["--surprise"], "unrecognized arguments: --surprise (see qpkv-show --help)"),
    ],
)
def test_a_mistake_with_show_is_one_line_and_status_2(
    qpkv_show: Command, plan: Path, argv: list[str], line: str
) -> None:
    ended = qpkv_show(*(plan if argument == "PLAN" else argument for argument in argv))
    assert ended == Ended(2, "", f"qpkv-show: error: {line}\n")


@pytest.mark.parametrize("command", [cli.run, cli.show])
@pytest.mark.parametrize(("option", "content"), [("--help", "examples:\n  qpkv-"), ("--version", "qpkv-")])
def test_help_has_examples_and_version_a_number(
    command: Callable[[list[str]], int], option: str, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command([option])
    assert ended.value.code == 0
    assert content in capsys.readouterr().out


def test_the_process_exits_with_the_commands_status(plan: Path) -> None:
    code = "import sys; from qpkv_runtime.cli import run; sys.exit(run())"
    common = {"env": ENVIRONMENT, "capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    wrong = subprocess.run([sys.executable, "-c", code, "--plan", "missing.yaml"], **common)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    argv = [sys.executable, "-c", code, "--plan", str(plan), "--prompt", PROMPT, "--max-new-tokens", "2"]
    right = subprocess.run(argv, **common)
    assert right.returncode == 0, right.stderr
    assert right.stderr.count("\n") == 1, "transformers has something to say"
    assert right.stdout.strip()


# --- qpkv-show -----------------------------------------------------------------------------------------------------


def tiered() -> Plan:
    """A plan whose first layer has two tiers, the first of them with 16-bit keys."""
    plan = tiny_plan()
    mixed = Format(
        keys=TensorFormat(quantizer="16bit", bits=16),
        values=TensorFormat.model_validate({"quantizer": "kivi", "bits": 4}),
    )
    first = Layer(tiers=(Tier(tokens=8, format="mixed"), Tier(tokens=16, format="rotated-k4v2")))
    changed = plan.model_copy(update={"formats": {**plan.formats, "mixed": mixed}, "layers": (first, *plan.layers[1:])})
    planned = make_ledger(changed).stored_bytes
    return Plan(**{**dict(changed), "budget": plan.budget.model_copy(update={"planned_bytes": planned})})


def calibrated() -> Plan:
    def interval(mean: float) -> dict[str, float]:
        return {"mean": mean, "low": mean - 0.125, "high": mean + 0.125}

    def losses(full: float) -> dict[str, Any]:
        return {"full": interval(full), "plan": interval(full + 0.25), "best_uniform": interval(full + 0.5)}

    measured = {
        "objective": "kl", "seed": 7, "context_tokens": 256, "hashes": {}, "samples": {}, "by_kind": {},
        "cross_entropy": losses(0.875), "kl": losses(0.0), "improvement_on_best_uniform": interval(0.25),
        "winner": "knapsack", "best_uniform": "rotated-k4v3", "lambda_nats_per_mib": 0.5, "beta": 2.0,
        "versions": {}, "search": {"rounds": [1, 2, 3]},
    }  # fmt: skip
    return Plan.model_validate({**dict(tiny_plan()), "calibrated": True, "calibration": measured, "extrapolated": True})


def test_show_has_the_policy_and_a_row_for_every_layer(qpkv_show: Command, plan: Path) -> None:
    ended, read = qpkv_show(plan), qpkv_runtime.load_plan(plan)
    budget, ledger = read.budget, make_ledger(read)
    assert (ended.status, ended.err) == (0, "")
    header, table = ended.out.split("\n\n")
    values = dict(re.split(r"  +", line, maxsplit=1) for line in header.splitlines())
    assert values["model"].startswith("tiny (qwen3, 8 layers, 8 query and 4 KV heads of 64")
    assert values["budget"] == "1/4 of 256 tokens"
    share = f"{100 * budget.planned_bytes / budget.full_bytes:.2f} %"
    assert values["bytes"] == (
        f"full {budget.full_bytes:,}, limit {budget.limit_bytes:,}, planned {budget.planned_bytes:,} ({share})"
    )
    assert values["scorer"] == "snapkv (queries 0, kernel 7, lead 0, pooling max)"
    assert values["always kept"] == "2 sinks, 6 window"
    assert values["decode"] == "reserve of 8 tokens in rotated-k4v4, then evict"
    assert (values["calibrated"], values["extrapolated"]) == ("no", "no")

    _, *rows, total = [re.split(r"  +", line.strip()) for line in table.splitlines()]
    assert len(rows) == 8
    for i, (row, layer, block) in enumerate(zip(rows, read.layers, ledger.layers, strict=True)):
        assert row[:6] == [str(i), str(layer.tokens), "4", "2", "rotated", f"{block.stored_bytes:,}"]
        assert row[6] == f"{100 * block.stored_bytes / ledger.stored_bytes:.1f} %"
        assert set(row[7]) == {"#"}
    assert total == ["total", str(sum(layer.tokens for layer in read.layers)), f"{ledger.stored_bytes:,}", "100.0 %"]
    assert "\x1b" not in ended.out


def test_show_has_the_heads_of_a_layer_where_they_share(qpkv_show: Command, tmp_path: Path) -> None:
    heads = Heads(share="weighted", weights=(4.0, 2.0, 1.0, 1.0))
    plan = with_heads(tiny_plan(), heads)
    header, table = qpkv_show(written(plan, tmp_path)).out.split("\n\n")
    assert re.search(r"heads +weighted \(alpha 0.2\)", header)
    counts = [int(count) for count in re.split(r"  +", table.splitlines()[1].strip())[5].split("/")]
    assert sum(counts) == 4 * 64
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[3]
    data = json.loads(qpkv_show(written(plan, tmp_path), "--json").out)
    assert data["layers"][0]["heads"] == {"share": "weighted", "alpha": 0.2, "weights": [4.0, 2.0, 1.0, 1.0]}


def with_heads(plan: Plan, heads: Heads) -> Plan:
    """64 tokens in every layer, shared like this."""
    layers = tuple(Layer(tiers=(Tier(tokens=64, format=layer.tiers[0].format),)) for layer in plan.layers)
    changed = plan.model_copy(update={"heads": heads, "layers": layers})
    weight = make_ledger(changed).stored_bytes
    budget = plan.budget.model_copy(update={"limit_bytes": weight, "planned_bytes": weight})
    return Plan.model_validate(changed.model_copy(update={"budget": budget}).model_dump())


def test_show_has_every_tier_of_a_layer(qpkv_show: Command, tmp_path: Path) -> None:
    table = qpkv_show(written(tiered(), tmp_path)).out.split("\n\n")[1]
    first = re.split(r"  +", table.splitlines()[1].strip())
    assert first[:5] == ["0", "8 + 16", "16 + 4", "4 + 2", "16bit + kivi + rotated"]


def test_show_has_what_was_measured_and_who_won(qpkv_show: Command, tmp_path: Path) -> None:
    header, _, measured = qpkv_show(written(calibrated(), tmp_path)).out.split("\n\n")
    assert "calibrated    yes, by kl on contexts of 256 tokens, seed 7" in header
    assert "extrapolated  yes" in header
    names, entropy, kl, won = [re.split(r"  +", line.strip()) for line in measured.splitlines()]
    assert names[1:] == ["full", "plan", "best uniform"]
    assert entropy[1:] == ["0.875 (0.750 to 1.000)", "1.125 (1.000 to 1.250)", "1.375 (1.250 to 1.500)"]
    assert kl[1:] == ["0.000 (-0.125 to 0.125)", "0.250 (0.125 to 0.375)", "0.500 (0.375 to 0.625)"]
    assert won == ["best plan: knapsack; best uniform: rotated-k4v3; improvement on it: 0.250 (0.125 to 0.375)"]


def test_show_prints_one_json_object_a_line(qpkv_show: Command, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    plans = [tiered(), calibrated()]
    files = [written(plans[0], tmp_path), written(plans[1], tmp_path / "other")]
    lines = qpkv_show("--json", *files).out.splitlines()
    assert len(lines) == 2
    for line, plan, file in zip(lines, plans, files, strict=True):
        data, ledger = json.loads(line), make_ledger(plan)
        assert (data["file"], data["policy_hash"]) == (str(file), plan.policy_hash)
        assert [layer["bytes"] for layer in data["layers"]] == [block.stored_bytes for block in ledger.layers]
        assert sum(layer["share"] for layer in data["layers"]) == pytest.approx(1)
        assert data["total"] == {"tokens": sum(layer.tokens for layer in plan.layers), "bytes": ledger.stored_bytes}
        assert data["budget"]["planned_bytes"] == ledger.stored_bytes
    tiers = json.loads(lines[0])["layers"][0]["tiers"]
    assert [(t["tokens"], t["keys"]["bits"], t["values"]["quantizer"]) for t in tiers] == [
        (8, 16, "kivi"),
        (16, 4, "rotated"),
    ]
    assert json.loads(lines[0])["calibration"] is None
    assert json.loads(lines[1])["calibration"]["winner"] == "knapsack"


def test_show_lists_every_method_with_its_metadata(qpkv_show: Command) -> None:
    ended = qpkv_show("--methods")
    listed = [line.split("  ")[0] for line in ended.out.splitlines()]
    assert set(SCORERS) | set(SHARINGS) | set(PRESETS) | set(QUANTIZERS) <= set(listed)
    assert re.search(r"adaptive +scores +alpha 0.2 .+ arXiv 2407.11550", ended.out)
    assert re.search(r"pyramidkv +nothing +beta 20 .+ arXiv 2406.02069", ended.out)
    assert re.search(r"kvquant .+ outliers 0.01 .+ arXiv 2401.18079", ended.out)
    assert re.search(
        r"snapkv +keys, window queries +queries 0, kernel 7, lead 0, pooling max \(max or average\) +arXiv 2404.14469",
        ended.out,
    )
    data = json.loads(qpkv_show("--methods", "--json").out)
    assert data["scorers"]["random"]["parameters"] == {"seed": 0}
    bits = {name: facts["key_metadata_bits_per_element"] for name, facts in data["quantizers"].items()}
    assert bits["16bit"] == 0
    assert bits["flexgen"] == bits["kivi"] == 2 * 16 / 64
    assert bits["rotated"] == 16 / 64


# --- importing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "import qpkv_runtime as q; q.Plan, q.load_plan, q.QpkvError, q.__version__",
        "from qpkv_runtime.cli import show; assert show(['PLAN', '--methods']) == 0",
        "from qpkv_runtime.cli import run; assert run(['--plan', 'PLAN', '--prompt', '']) == 2",
    ],
)
def test_what_needs_no_torch_imports_none(code: str, plan: Path) -> None:
    code = code.replace("PLAN", str(plan)) + "; import sys; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there() -> None:
    for name in qpkv_runtime.__all__:
        assert getattr(qpkv_runtime, name) is not None
    assert set(qpkv_runtime.__all__) <= set(dir(qpkv_runtime))
    assert qpkv_runtime.PlannedCache is PlannedCache
    with pytest.raises(AttributeError, match="no attribute 'surprise'"):
        qpkv_runtime.surprise  # noqa: B018
