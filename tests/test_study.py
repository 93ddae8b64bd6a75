"""Studies: a killed search goes on where it was and ends with the same plan; an interrupted one ships what it has."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
from small_search import FEW, MIX, SMALLEST, Command

from qpkv_planner import cli, measurement, options, planner, regression, search, session
from qpkv_planner.allocation import Space
from qpkv_planner.calibration import Data, make_splits
from qpkv_planner.grid import make_grid
from qpkv_planner.journal import Journal
from qpkv_planner.mix import FACT_KINDS, LONG_MIX, LONG_TOKENS, SHORT_MIX, parse_mix
from qpkv_planner.prefill import prepare
from qpkv_planner.stages import TooLittleTimeError
from qpkv_runtime.errors import BudgetError, InputError
from qpkv_runtime.models import load_model, load_tokenizer, model_shape
from qpkv_runtime.plan import UNIFORM, load_plan, parse_plan

ARGUMENTS = ["--model", "tiny", "--dtype", "float32", "--budget", "1/8", "--context-length", "320", "--quick"]
ARGUMENTS += ["--calibration-mix", MIX]
SETTINGS = {"quick": True, "context_tokens": 320, "name": "tiny", "quiet": True, "data": FEW}
STAGES = ("prefill", "uniform grid", "elimination", "knapsack", "additivity", "search", "finalists")


@pytest.fixture(autouse=True)
def smallest(monkeypatch):
    monkeypatch.setattr(options, "QUICK", SMALLEST)


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny", dtype="float32")


def journal_lines(study: Path) -> list[dict[str, object]]:
    path = study / "journal.jsonl"
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line) for line in whole.splitlines()[1:]]


def stage_reached(study: Path) -> str:
    lines = journal_lines(study)
    return str(lines[-1]["stage"]) if lines else "prefill" if study.exists() else ""


@pytest.mark.parametrize("num_threads", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_search_killed_in_every_stage_ends_with_the_plan_of_one_that_was_not(tmp_path, num_threads):
    command = Command(tmp_path / "a", [*ARGUMENTS, "--study", tmp_path / "whole"], num_threads=num_threads)
    status, expected, errors = command.wait()
    assert status == 0, errors
    study, killed_in = tmp_path / "killed", []
    for stage in STAGES:
        resume = ["--resume"] if (study / "journal.jsonl").exists() else []
        command = Command(tmp_path / stage, [*ARGUMENTS, "--study", study, *resume], num_threads=num_threads)
        while command.is_running and STAGES.index(stage_reached(study) or "prefill") < STAGES.index(stage):
            time.sleep(0.01)
        if command.is_running:
            command.send(signal.SIGKILL)
            killed_in.append(stage_reached(study))
        command.wait()
    with (study / "journal.jsonl").open("a") as file:
        file.write('{"stage": "torn')
    command = Command(tmp_path / "b", [*ARGUMENTS, "--study", study, "--resume"], num_threads=num_threads)
    status, found, errors = command.wait()
    assert status == 0, errors
    assert found == expected
    assert len(set(killed_in)) >= 4, killed_in  # a stage may be over before it is seen
    evaluations = Counter(json.dumps(line["what"], sort_keys=True) for line in journal_lines(study))
    assert set(evaluations.values()) == {1}
    assert len(evaluations) == len(journal_lines(tmp_path / "whole"))


@pytest.mark.parametrize("num_threads", [1, 2])
def test_an_interrupt_writes_the_best_plan_so_far_and_says_so(tmp_path, num_threads):
    study = tmp_path / "study"
    command = Command(tmp_path / "out", [*ARGUMENTS, "--study", study], num_threads=num_threads)
    while command.is_running and stage_reached(study) not in STAGES[3:]:
        time.sleep(0.01)
    command.send(signal.SIGINT)
    status, out, errors = command.wait()
    assert status == 130, errors
    plan = parse_plan(out)
    assert plan.calibration.stopped == "interrupted" and plan.calibration.measured_on == "search"
    assert plan.budget.planned_bytes <= plan.budget.limit_bytes
    assert "best plan so far" in errors


@pytest.fixture
def interrupted_in_validation(monkeypatch):
    """How many more times the validation split may be asked for before that is interrupted."""
    left, evaluator = [0], session.Session.evaluator

    def stopping(self, split, *args, **kwargs):
        if split == "validation":
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        return evaluator(self, split, *args, **kwargs)

    monkeypatch.setattr(session.Session, "evaluator", stopping)
    return left


def test_an_interrupt_during_validation_ships_the_best_plan_so_far(tiny, interrupted_in_validation):
    found = planner.plan(*tiny, "1/8", **SETTINGS)
    assert found.calibration.stopped == "interrupted" and found.calibration.measured_on == "search"


def test_an_interrupted_search_for_the_smallest_budget_ships_what_was_proved(tiny, interrupted_in_validation):
    interrupted_in_validation[0] = 1
    found = planner.smallest(*tiny, 10.0, **SETTINGS)
    assert found.budget.requested == "0.5"
    assert found.calibration.stopped == "interrupted" and found.calibration.measured_on == "validation"
    interrupted_in_validation[0] = 0
    found = planner.smallest(*tiny, 1e-9, **SETTINGS)
    assert found.calibration.stopped == "interrupted" and found.calibration.measured_on == "search"


def test_a_timeout_goes_for_every_budget_of_a_frontier(tiny, tmp_path, capsys):
    report = tmp_path / "report.html"
    plans = planner.frontier(*tiny, ["1/4", "1/8"], **SETTINGS, timeout_seconds=3600, report=report)
    assert next(plans).calibration.stopped is None
    plans.gi_frame.f_locals["session"].deadline = 0.0
    assert list(plans) == []
    assert "timeout: no plan of 1/8" in capsys.readouterr().err
    assert report.exists(), "of the plan that there is"


def test_a_command_that_leaves_a_budget_without_a_plan_says_so_by_its_status(tiny, tmp_path, monkeypatch):
    whole = planner.plan_budget

    def first_alone(session, budget):
        if session.plans:
            raise TooLittleTimeError("no time")
        return whole(session, budget)

    monkeypatch.setattr(planner, "plan_budget", first_alone)
    arguments = [*ARGUMENTS[:4], "--budget", "1/4,1/8", *ARGUMENTS[6:], "--out-dir", str(tmp_path)]
    assert cli.main([*arguments, "--timeout", "3600"]) == 1
    assert [path.name for path in tmp_path.glob("*.yaml")] == ["tiny__1-4.yaml"]


@pytest.mark.parametrize("trouble", [KeyboardInterrupt(), ValueError("too large")])
def test_a_plan_outlives_its_report(tiny, tmp_path, monkeypatch, capsys, trouble):
    def write_report(*_):
        raise trouble

    monkeypatch.setattr(planner, "write_report", write_report)
    plan = planner.plan(*tiny, "1/8", **SETTINGS, report=tmp_path / "report.html")
    assert plan.calibration.stopped is None
    said = capsys.readouterr().err
    assert "warning: no report: " in said and (str(trouble) or "interrupted") in said


def test_a_timeout_ships_a_validated_plan_that_says_so(tiny, monkeypatch):
    class Clock:
        """Stands still until the tenth evaluation, then an hour has passed."""

        calls = 0

        @classmethod
        def monotonic(cls) -> float:
            cls.calls += 1
            return time.monotonic() + (3600 if cls.calls > 10 else 0)

    monkeypatch.setattr(measurement, "time", Clock)
    found = planner.plan(*tiny, "1/8", **SETTINGS, timeout_seconds=1800)
    assert found.calibration.stopped == "timeout" and found.calibration.measured_on == "validation"
    assert Clock.calls == 11


def test_a_study_of_something_else_is_refused(tmp_path):
    path = tmp_path / "journal.jsonl"
    Journal(path, {"model": "a", "data": "x"}).close()
    with pytest.raises(InputError, match=r"was begun with data = 'x', this run has 'y'"):
        Journal(path, {"model": "a", "data": "y"})
    header = path.read_text().strip()
    for line in ("not json", "5", "[1]", header + '\n{"a": 1}'):
        path.write_text(line + "\n")
        with pytest.raises(InputError, match="not a journal"):
            Journal(path, {"model": "a", "data": "x"})


def test_a_frontier_is_one_file_for_each_budget_largest_first(tmp_path, capsys):
    arguments = [*ARGUMENTS[:4], "--budget", "1/16,1/4", *ARGUMENTS[6:], "--out-dir", str(tmp_path / "plans")]
    assert cli.main([*arguments, "--calibration-cache", str(tmp_path / "cache")]) == 0
    points = json.loads((tmp_path / "plans" / "frontier.json").read_text())
    assert [point["requested"] for point in points] == ["1/4", "1/16"]
    for point in points:
        plan = load_plan(tmp_path / "plans" / point["file"])
        assert plan.budget.planned_bytes == point["planned_bytes"]
        search = plan.calibration.search
        before = search["knapsack"][0]["before"]
        even = [row["kl"] for row in search["grid"] if " uniform rotated-k4v4 window 4" in row["setting"]]
        assert min(abs(before - kl) for kl in even) < 1e-5 or (
            plan.budget.requested == "1/16" and before < min(even)
        ), "the knapsack starts at a uniform setting, or at what elimination leaves of a larger budget's plan"
    errors = capsys.readouterr().err
    assert all(len(re.findall(rf"{split}: \d+ samples", errors)) == 1 for split in ("search", "validation"))
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2


def test_the_smallest_budget_within_a_loss_keeps_to_it(tiny, tmp_path, monkeypatch):
    settings = SETTINGS | {"study": tmp_path}  # the second search replays what the first measured
    found = planner.smallest(*tiny, 0.5, **settings)
    assert found.calibration.loss_to_full.high <= 0.5
    assert found.budget.limit_bytes < found.budget.full_bytes // 4
    tried, plan_budget = [], planner.plan_budget
    monkeypatch.setattr(planner, "plan_budget", lambda *given: tried.append(given[1]) or plan_budget(*given))
    with pytest.raises(BudgetError, match="no budget up to 1/2 stays within"):
        planner.smallest(*tiny, 1e-9, **settings)
    assert tried == ["0.5"]


def test_a_budget_that_holds_everything_gives_the_lossless_plan_with_a_warning(tiny, capsys):
    found = planner.plan(*tiny, "64MiB", quick=True, context_tokens=320, name="tiny")
    assert {tier.format for layer in found.layers for tier in layer.tiers} == {"16bit"}
    assert all(layer.tokens == 320 for layer in found.layers)
    assert "nothing needs compressing" in capsys.readouterr().err


def test_a_plan_for_a_longer_context_keeps_the_same_shares_and_says_it_extrapolates(tiny):
    settings = SETTINGS | {"context_tokens": 1280, "calibration_tokens": 320}
    found = planner.plan(*tiny, "1/8", **settings)
    assert found.extrapolated and found.calibration.context_tokens == 320
    measured = found.calibration.search["measured_allocation"]
    assert found.budget.planned_bytes <= found.budget.limit_bytes == found.budget.full_bytes // 8
    for layer, (tokens, _) in zip(found.layers, measured, strict=True):
        assert layer.tokens > 2 * tokens


def test_a_search_of_shorter_contexts_is_judged_at_the_plans_own_length(tiny):
    settings = SETTINGS | {"context_tokens": 640, "search_tokens": 320}
    found = planner.plan(*tiny, "1/8", **settings)
    record = found.calibration
    assert not found.extrapolated and record.context_tokens == 640 and record.search["context_tokens"] == 320
    assert "optimism" not in record.search
    own = replace(Space.of_plan(found), scorer=options.SCORERS[0], window=4, sinks=4, heads=UNIFORM)
    grid = make_grid(own, options.SCORERS, SMALLEST.formats, None)
    rivals = [setting.space.plan(setting.allocation) for setting in grid]
    measured = regression.measure(tiny[0], regression.recorded_split(found, tiny[1]), [found, *rivals])
    plan, *uniform = [losses.mean("ce") for losses in measured.plans]
    assert plan == pytest.approx(record.cross_entropy.plan.mean, abs=1e-4)
    assert min(uniform) == pytest.approx(record.cross_entropy.best_uniform.mean, abs=1e-4)
    assert grid[uniform.index(min(uniform))].name == record.best_uniform


def test_lengths_that_do_not_fit_into_each_other_are_refused(tiny, tmp_path):
    with pytest.raises(InputError, match="search length must be at most the calibration length 320, got 640"):
        planner.plan(*tiny, "1/8", **SETTINGS | {"search_tokens": 640})
    with pytest.raises(InputError, match="calibration length must be 1 to"):
        planner.plan(*tiny, "1/8", **SETTINGS | {"calibration_tokens": 0})
    with pytest.raises(BudgetError, match="--search-length 160 is too short for 1/32 of 2048 tokens"):
        planner.plan(*tiny, "1/32", **SETTINGS | {"context_tokens": 2048, "search_tokens": 160, "max_new_tokens": 64})
    data = Data(file=samples(tmp_path / "mine.jsonl", [{"prompt": PROMPT, "continuation": " it"}]))
    with pytest.raises(InputError, match="leave it out with --calibration"):
        planner.plan(*tiny, "1/8", **SETTINGS | {"search_tokens": 160, "data": data})


# --- a user's own samples ---


def samples(path: Path, rows: list[object]) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


PROMPT = "The old town has a river, and on its bank stood a mill that nobody had used for years until "


def test_a_users_samples_take_the_place_of_the_built_in_ones(tiny, tmp_path):
    rows = [
        {"prompt": f"{PROMPT * 4} case {i} came", "continuation": f" the {i} miller", "kind": "mill"} for i in range(12)
    ]
    data = Data(file=samples(tmp_path / "mine.jsonl", rows))
    found = planner.plan(*tiny, "1/4", **SETTINGS | {"data": data})
    assert set(found.calibration.by_kind["plan"]) == {"mill"}
    assert found.calibration.data["file"] == "mine.jsonl"
    assert Data.of_record(found.calibration.data, data.file) == data
    with pytest.raises(InputError, match="name that file"):
        Data.of_record(found.calibration.data)
    samples(tmp_path / "mine.jsonl", rows[:-1])
    with pytest.raises(InputError, match="its hash differs"):
        Data.of_record(found.calibration.data, data.file)


def test_what_is_asked_of_one_document_is_in_one_split_and_drawn_as_one(tiny, tmp_path):
    documents = [f"{animal} {PROMPT * 4}" for animal in ("Fox", "Owl", "Elk", "Hen", "Bat")]
    rows = [
        {"prompt": f"{document} What, asked number {i}, came to the mill?", "continuation": f" {document[:3]}"}
        for i in range(3)
        for document in documents
    ]
    data = Data(file=samples(tmp_path / "mine.jsonl", rows))
    splits = make_splits(tiny[1], {"search": 9, "validation": 7}, 320, 0, data)
    asked_of = [{tiny[1].decode(one.samples[0].continuation) for one in split.contexts} for split in splits.values()]
    assert not asked_of[0] & asked_of[1]
    assert [len(split.contexts) for split in splits.values()] == [6, 7]
    of_split = splits["validation"]
    names = [tiny[1].decode(context.samples[0].continuation) for context in of_split.contexts]
    assert len(set(names[:3])) == 3, "the first ones are of as many documents as there are"
    assert len(set(zip(names, of_split.documents, strict=True))) == len(set(names)) == len(set(of_split.documents)) == 3
    prepared = prepare(tiny[0], model_shape(tiny[0]), "float16", of_split, [], 9, lambda: None)
    assert len(prepared.part_starts) == 4, "a part holds whole documents"
    for start, end in itertools.pairwise(prepared.part_starts):
        assert len(set(prepared.contexts[start:end])) == 1


def test_a_search_on_too_few_documents_says_so(tiny, tmp_path, capsys):
    rows = [{"prompt": f"{PROMPT * 4} case {i} came", "continuation": f" the {i} miller"} for i in range(6)]
    data = Data(file=samples(tmp_path / "mine.jsonl", rows))
    planner.plan(*tiny, "1/4", **SETTINGS | {"data": data})
    assert "mine.jsonl has fewer than 4 documents that begin unlike" in capsys.readouterr().err


@pytest.mark.parametrize("num_contexts", [4, 5])
def test_a_few_windows_are_enough_for_a_search(tiny, tmp_path, num_contexts):
    """Of fewer contexts than the search makes parts."""
    path = tmp_path / "mine.txt"
    tokens = load_tokenizer("tiny")(" ".join(f"{PROMPT}number {i}." for i in range(240))).input_ids
    path.write_text(load_tokenizer("tiny").decode(tokens[: 320 * num_contexts + 9]))
    found = planner.plan(*tiny, "1/4", **SETTINGS | {"data": Data(file=path)})
    assert found.calibration.samples["search"]["contexts"] == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": PROMPT * 3, "continuation": " a"}, "not json"], r"mine.jsonl:2 must be a JSON object"),
        ([{"prompt": PROMPT * 3}], r"mine.jsonl:1 must be a JSON object"),
        ([{"prompt": PROMPT * 99, "continuation": " a"}], r"mine.jsonl:1 must have at most 320 tokens, got"),
        ([{"prompt": "Why?", "continuation": " a"}], r"mine.jsonl:1 must have a prompt of at least 32 tokens, got"),
        ([{"prompt": PROMPT * 3, "continuation": " a"}], r"at least 4 contexts"),
    ],
)
def test_bad_samples_are_named_by_their_line(tmp_path, rows, message):
    data = Data(file=samples(tmp_path / "mine.jsonl", rows))
    with pytest.raises(InputError, match=message):
        make_splits(load_tokenizer("tiny"), {"search": 2, "validation": 2}, 320, 0, data)


def test_a_line_of_json_ends_at_a_line_feed_alone(tmp_path):
    rows = [
        json.dumps({"prompt": f"{PROMPT * 2}{i}\u2028\u0085", "continuation": " it"}, ensure_ascii=False)
        for i in range(4)
    ]
    data = Data(file=samples(tmp_path / "mine.jsonl", rows))
    splits = make_splits(load_tokenizer("tiny"), {"search": 2, "validation": 2}, 320, 0, data)
    assert [len(split.contexts) for split in splits.values()] == [2, 2]


def test_windows_of_plain_text_begin_as_the_model_is_used_to(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text(" ".join(f"{PROMPT}number {i}." for i in range(120)))
    tokenizer = load_tokenizer("tiny")
    counts = {"search": 3, "validation": 3}
    plain = make_splits(tokenizer, counts, 128, 0, Data(file=path))

    class WithBos:
        """tiny's tokenizer, as one that puts its first token before a text."""

        bos_token_id = 1

        def __call__(self, text, add_special_tokens=True):
            found = tokenizer(text, add_special_tokens=False)
            return SimpleNamespace(input_ids=[1] * add_special_tokens + list(found.input_ids))

    begun = make_splits(WithBos(), counts, 128, 0, Data(file=path))
    for name in counts:
        assert all(context.tokens[0] == 1 for context in begun[name].contexts)
        assert {len(context.tokens) for context in begun[name].contexts} == {
            len(context.tokens) for context in plain[name].contexts
        }


def test_a_users_text_has_no_exact_answers_and_says_nothing_of_them(tiny, tmp_path, capsys):
    path = tmp_path / "mine.txt"
    path.write_text(" ".join(f"{PROMPT}number {i}." for i in range(240)))
    planner.plan(*tiny, "1/4", **SETTINGS | {"data": Data(file=path), "quiet": False})
    said = capsys.readouterr().err
    assert "cross-entropy" in said and "exact answers" not in said


def test_plain_text_is_cut_into_windows_that_no_split_shares(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text(" ".join(f"{PROMPT}number {i}." for i in range(120)))
    splits = make_splits(load_tokenizer("tiny"), {"search": 3, "validation": 3}, 128, 0, Data(file=path))
    contexts = [context.tokens for split in splits.values() for context in split.contexts]
    assert len(set(contexts)) == 6


def test_the_mix_says_what_a_context_holds():
    data = Data(mix=parse_mix("number=1,chain=2,code=1"))
    split = make_splits(load_tokenizer("tiny"), {"search": 2}, 512, 0, data)["search"]
    assert [sample.kind for sample in split.contexts[0].samples] == ["number", "chain", "chain", "text"]
    for bad in ("number", "riddle=1,prose=1", "number=1", "number=20,prose=1"):
        with pytest.raises(InputError, match="--calibration-mix"):
            parse_mix(bad)


@pytest.mark.parametrize(("tokens", "mix"), [(LONG_TOKENS - 1, SHORT_MIX), (LONG_TOKENS, LONG_MIX)])
def test_the_default_mix_is_that_of_the_length(tokens, mix):
    kinds = [kind for kind, count in parse_mix(mix) for _ in range(count) if kind in FACT_KINDS]
    # a search on shorter contexts asks what the plan's own length is asked
    splits = make_splits(load_tokenizer("tiny"), {"search": 1, "validation": 1}, tokens, 0, Data(), search_tokens=512)
    for split in splits.values():
        assert sorted(sample.kind for sample in split.contexts[0].samples) == sorted([*kinds, "text"])
    assert Data().record(tokens)["mix"] == dict(parse_mix(mix))
    assert Data(mix=parse_mix(MIX)).record(tokens)["mix"] == dict(parse_mix(MIX))


def test_question_agnostic_contexts_are_compressed_before_the_question(tiny):
    data = replace(FEW, regime="agnostic")
    found = planner.plan(*tiny, "1/4", **SETTINGS | {"data": data})
    longest = max(
        len(sample.prompt) + len(sample.continuation)
        for context in make_splits(tiny[1], {"search": 3}, 320, 0, data)["search"].contexts
        for sample in context.samples
    )
    assert found.decode.reserve_tokens >= longest
    assert found.calibration.data["regime"] == "agnostic"


def test_self_generated_targets_are_what_the_full_cache_writes(tiny):
    data = replace(FEW, target="self")
    found = planner.plan(*tiny, "1/4", **SETTINGS | {"data": data})
    assert all(kind["exact"] == 1.0 for kind in found.calibration.by_kind["full"].values())
    assert found.calibration.samples["search"]["unanswerable_share"] == 0.0


def test_two_processes_with_one_storage_share_the_trials(tiny, tmp_path):
    storage = str(tmp_path / "optuna.log")
    settings = SETTINGS | {"storage": storage, "trials": 3}
    first = planner.plan(*tiny, "1/8", **settings)
    second = planner.plan(*tiny, "1/8", **settings)  # joins a study that has its trials already
    assert first.calibration.search["optuna"] == second.calibration.search["optuna"]
    backend = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(storage))  # as its dashboard
    (name,) = optuna.study.get_all_study_names(backend)
    study = optuna.load_study(study_name=name, storage=backend)
    assert len(study.trials) == 3
    assert study.best_value == pytest.approx(first.calibration.search["optuna"]["best"], abs=1e-6)
    planner.plan(*tiny, "1/8", **settings | {"seed": 1})  # on other samples
    assert len(optuna.study.get_all_study_names(backend)) == 2, "losses of other samples are no trials of this search"


@pytest.mark.parametrize("sampler", options.SAMPLERS)
def test_a_process_that_joins_runs_no_trial_again(tmp_path, sampler):
    """It joins while the first one is at its third trial."""
    ran: list[tuple[float, ...]] = []

    def evaluate(space, candidate, parts=None):
        if parts is None:
            ran.append(candidate)
        return SimpleNamespace(mean=lambda objective: 1.0 + candidate[0] / 10)

    family = SimpleNamespace(
        space=None, name=lambda objective, belongs_to: "one", member=lambda parameters: tuple(parameters.values())
    )
    evaluator, storage = SimpleNamespace(parts=[0], evaluate=evaluate), str(tmp_path / "trials.log")

    def refine(progress):
        return search.refine(evaluator, family, 8, "kl", 0, progress, sampler=sampler, storage=storage)

    found = refine(lambda number: refine(lambda number: None) if number == 2 else None)
    assert len(ran) == len(set(ran)) == len(found) == 9  # the first one finishes what it was at


def test_a_trial_that_a_killed_process_was_at_is_run_again(tmp_path):
    """And what comes of it is what would have."""
    family = SimpleNamespace(space=None, name=lambda objective, belongs_to: "one", member=lambda given: given)

    def evaluate(space, candidate, parts=None):
        return SimpleNamespace(mean=lambda objective: 1.0 + candidate["tau"] / 10)

    evaluator = SimpleNamespace(parts=[0], evaluate=evaluate)

    def refine(storage, progress=lambda number: None):
        return search.refine(evaluator, family, 6, "kl", 0, progress, storage=str(storage))

    whole = refine(tmp_path / "whole.log")
    for killed_at in (0, 3):
        storage = tmp_path / f"killed at {killed_at}.log"
        if (child := os.fork()) == 0:
            try:
                refine(storage, lambda number, last=killed_at: os._exit(0) if number == last else None)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0, "killed where it was to be"
        assert refine(storage) == whole
    assert whole[0].parameters != search.THE_KNAPSACKS in [one.parameters for one in whole]


def test_a_storage_that_cannot_be_opened_is_refused_before_the_search(tiny, tmp_path):
    with pytest.raises(InputError, match="--storage must be a database url or a file"):
        planner.plan(*tiny, "1/8", **SETTINGS | {"storage": str(tmp_path / "nowhere" / "trials.log")})
