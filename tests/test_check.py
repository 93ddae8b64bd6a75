"""The regression check: it passes on what was recorded, catches what was planted, and says so where CI looks."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from conftest import make_model
from tokenizers import normalizers

from qpkv_planner import check, regression
from qpkv_planner.allocation import Space, allocation_of
from qpkv_planner.calibration import make_split
from qpkv_planner.provenance import made_with
from qpkv_planner.regression import Checker, measured_space, record_anew, recorded_split
from qpkv_planner.session import describe
from qpkv_runtime import quantizers
from qpkv_runtime.models import load_model, load_tokenizer
from qpkv_runtime.plan import Calibration, Comparison, Decode, Interval, Scorer, load_plan

ROOT = Path(__file__).resolve().parents[1]
TOKENS, CONTEXTS = 320, 2
NOT_MEASURED = Interval(mean=0, low=0, high=0)


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny", dtype="float32")


@pytest.fixture(scope="module")
def recorded(tiny):
    """A plan of tiny with its measurements; layer 1, where tiny looks things up, keeps most of the tokens."""
    split = make_split(tiny[1], "validation", CONTEXTS, TOKENS, seed=3)
    space = Space(
        model=describe(*tiny, "tiny", split.contexts[0]),
        requested="1/8",
        context_tokens=TOKENS + 64,
        scorer=Scorer(name="snapkv"),
        sinks=4,
        window=16,
        decode=Decode(reserve_tokens=8, format="rotated-k4v4"),
    )
    allocation = space.project([4, 16, 1, 1, 1, 1, 1, 1], ["rotated-k4v4"] * 8)
    empty = Comparison(full=NOT_MEASURED, plan=NOT_MEASURED, best_uniform=NOT_MEASURED)
    calibration = Calibration(
        objective="kl",
        seed=3,
        context_tokens=TOKENS,
        hashes={"validation": "sha256:not-yet"},
        samples={"validation": {"contexts": CONTEXTS, "samples": 0, "unanswerable_share": 0.0}},
        cross_entropy=empty,
        kl=empty,
        improvement_on_best_uniform=NOT_MEASURED,
        by_kind={},
        winner="search",
        lambda_nats_per_mib=None,
        beta=None,
        best_uniform="snapkv uniform rotated-k4v4 window 16",
        versions={"torch": "0"},
        search={},
    )
    return record_anew(space.plan(allocation, calibration), tiny, split)


@pytest.fixture
def file(recorded, tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(recorded.to_yaml(), encoding="utf-8")
    return path


@pytest.fixture
def one_load(tiny, monkeypatch):
    """The model of these tests for every checker: what they plant is not the loading."""
    monkeypatch.setattr("qpkv_planner.regression.load_model", lambda *names, **options: tiny)


def checked(path: Path, **options):
    return Checker([str(path)], **options).result(str(path))


def test_a_recorded_plan_passes_and_every_sample_is_reported(file, recorded, one_load):
    result = checked(file)
    assert result.status == "passed", result.reasons
    for name in ("cross_entropy", "kl"):
        assert result.losses[name]["measured"] == pytest.approx(result.losses[name]["recorded"], abs=1e-4)
    assert len(result.samples) == recorded.calibration.samples["validation"]["samples"]
    assert {row["context"] for row in result.samples} == set(range(CONTEXTS))
    kinds = sorted({row["kind"] for row in result.samples})
    by_kind = [[row["kl"] for row in result.samples if row["kind"] == kind] for kind in kinds]
    mean = sum(sum(losses) / len(losses) for losses in by_kind) / len(by_kind)
    assert mean == pytest.approx(result.losses["kl"]["measured"], abs=1e-9)


def test_it_measures_the_samples_of_the_record(recorded, tiny):
    split = recorded_split(recorded, tiny[1])
    assert split.hash == recorded.calibration.hashes["validation"]
    assert len(split.contexts) == CONTEXTS


# --- planted regressions -------------------------------------------------------------------------------------------


def test_it_catches_a_corrupted_scale(file, one_load, monkeypatch):
    encode = quantizers.ROTATED.encode

    def corrupted(*args):
        encoded = encode(*args)
        return replace(encoded, scales=encoded.scales * 1.25)

    monkeypatch.setattr(type(quantizers.ROTATED), "encode", lambda self, *args: corrupted(*args))
    result = checked(file)
    assert result.status == "failed"
    assert any("more than 0.01" in reason for reason in result.reasons)


def test_it_catches_a_swapped_tier(file, recorded, one_load):
    """Two layers' tiers exchanged: the same bytes, the ledger sees nothing."""
    layers = list(recorded.layers)
    layers[1], layers[5] = layers[5], layers[1]
    swapped = recorded.model_copy(update={"layers": tuple(layers)})
    assert swapped.budget.planned_bytes == recorded.budget.planned_bytes
    file.write_text(swapped.to_yaml(), encoding="utf-8")
    load_plan(file)
    result = checked(file)
    assert result.status == "failed"
    assert any("more than 0.01" in reason for reason in result.reasons)


def test_it_catches_a_changed_tokenizer(file, tiny, monkeypatch):
    other = load_tokenizer("tiny")
    other.backend_tokenizer.normalizer = normalizers.Lowercase()
    monkeypatch.setattr("qpkv_planner.regression.load_model", lambda *names, **options: (tiny[0], other))
    result = checked(file)
    assert result.status == "failed"
    assert any(reason.startswith("the tokenizer changed") for reason in result.reasons)
    assert any(reason.startswith("the validation samples are not the recorded ones") for reason in result.reasons)


def test_it_catches_changed_weights(file, tiny, monkeypatch):
    other, _ = load_model("tiny", dtype="float32")
    with torch.no_grad():
        other.model.layers[1].self_attn.k_proj.weight[0, 0] += 1
    monkeypatch.setattr("qpkv_planner.regression.load_model", lambda *names, **options: (other, tiny[1]))
    assert any(reason.startswith("the model's weights changed") for reason in checked(file).reasons)


def test_weights_rounded_to_float16_are_not_taken_for_other_weights(recorded, tiny, monkeypatch):
    half = load_model("tiny", dtype="float16")
    assert recorded.model.weights_hash is not None
    assert regression.identity_changes(recorded, *half) == []
    anew = replace(regression.model_identity(*half), config_hash="sha256:another")
    monkeypatch.setattr(regression, "model_identity", lambda *_: anew)
    split = recorded_split(recorded, tiny[1])
    section = record_anew(recorded, tiny, split).model
    assert section.weights_hash == recorded.model.weights_hash and section.config_hash == "sha256:another"


def test_it_catches_bytes_that_are_not_the_ledgers(file, recorded, capsys):
    planned = recorded.budget.planned_bytes
    file.write_text(file.read_text().replace(f"planned_bytes: {planned}", f"planned_bytes: {planned - 4}"))
    assert check.main([str(file), "--quiet"]) == 1
    assert f"planned_bytes must be {planned} by the ledger, got {planned - 4}" in capsys.readouterr().out


def test_it_catches_an_arena_that_is_not_the_ledgers(file, one_load, monkeypatch):
    monkeypatch.setattr("qpkv_runtime.cache.PlannedCache.allocated_bytes", property(lambda cache: 12345))
    assert any("its arena takes 12345 bytes" in reason for reason in checked(file).reasons)


def test_it_catches_losses_that_are_not_numbers(file, one_load, monkeypatch):
    monkeypatch.setattr(
        "qpkv_planner.measurement.Evaluator.evaluate_plan",
        lambda self, plan: replace(self.full(), kl=self.full().kl * float("nan")),
    )
    assert checked(file).status == "failed"


# --- the command ---------------------------------------------------------------------------------------------------


def worse(path: Path) -> None:
    """Record a KL that today's cannot reach."""
    plan = load_plan(path)
    kl = plan.calibration.kl.model_copy(update={"plan": Interval(mean=-1, low=-1, high=-1)})
    calibration = plan.calibration.model_copy(update={"kl": kl})
    path.write_text(plan.model_copy(update={"calibration": calibration}).to_yaml(), encoding="utf-8")


def test_the_reports_say_what_failed_and_where(file, one_load, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    worse(file)
    assert check.main([str(file), "--json", "--junit", str(tmp_path / "check.xml")]) == 1
    out, err = capsys.readouterr()
    report = json.loads(out)["plans"][0]
    assert report["status"] == "failed" and report["losses"]["kl"]["recorded"] == -1 and report["samples"]
    assert f"::error file={file},title=qpkv-check::kl" in err
    suite = ElementTree.parse(tmp_path / "check.xml").getroot()[0]
    assert (suite.get("tests"), suite.get("failures")) == ("1", "1")
    assert suite[0].get("name") == str(file) and suite[0][0].tag == "failure"


def test_update_records_what_is_measured_now(file, recorded, one_load):
    worse(file)
    assert check.main([str(file), "--update", "--quiet"]) == 0
    found = load_plan(file).calibration
    assert found == recorded.calibration
    assert found.loss_to_full.mean == pytest.approx(found.cross_entropy.plan.mean - found.cross_entropy.full.mean)
    assert found.worst_tenth["plan"] >= found.cross_entropy.plan.mean
    assert check.main([str(file), "--quiet"]) == 0


def test_a_stretched_plan_is_recorded_beside_a_uniform_setting_of_its_calibration_length(recorded, tiny):
    search = {
        "measured_allocation": [[choice.tokens, choice.format] for choice in allocation_of(recorded)],
        "measured_reserve_tokens": recorded.decode.reserve_tokens,
    }
    calibration = recorded.calibration.model_copy(update={"search": search})
    space = replace(Space.of_plan(recorded), context_tokens=4 * recorded.budget.context_tokens)
    long = space.plan([replace(c, tokens=4 * c.tokens - 16) for c in allocation_of(recorded)], calibration)
    assert measured_space(long).limit_bytes * 4 * (TOKENS + 64) <= space.limit_bytes * TOKENS
    found = record_anew(long, tiny, recorded_split(recorded, tiny[1])).calibration
    assert found.cross_entropy.plan == recorded.calibration.cross_entropy.plan
    # as many bytes a token as recorded, which was for a context of 64 tokens more
    assert found.cross_entropy.best_uniform.mean == pytest.approx(
        recorded.calibration.cross_entropy.best_uniform.mean, abs=0.1
    )


def test_other_samples_name_the_python_they_came_from(recorded):
    calibration = recorded.calibration.model_copy(update={"versions": {**made_with(), "python": "3.9.1"}})
    told = regression._other_samples(recorded.model_copy(update={"calibration": calibration}))
    assert told.endswith(f"; python {platform.python_version()}, recorded with 3.9.1")


def test_plans_without_measurements_are_skipped_and_a_check_of_nothing_is_no_pass(file, recorded, one_load, capsys):
    bare = file.with_name("bare.yaml")
    bare.write_text(recorded.model_copy(update={"calibrated": False, "calibration": None}).to_yaml())
    assert check.main([str(file), str(bare), "--quiet"]) == 0
    assert "bare.yaml: skipped: it has no measurements" in capsys.readouterr().out
    assert check.main([str(bare), "--quiet"]) == 2
    assert "nothing was checked" in capsys.readouterr().err


def test_plans_of_the_same_samples_share_the_full_caches_work(file, one_load, monkeypatch):
    copy = file.with_name("copy.yaml")
    copy.write_text(file.read_text())
    prefills = []
    from qpkv_planner import regression

    monkeypatch.setattr(regression, "prepare", lambda *args, real=regression.prepare: prefills.append(1) or real(*args))
    checker = Checker([str(file), str(copy)])
    assert [checker.result(str(path)).status for path in (copy, file)] == ["passed", "passed"]
    assert len(prefills) == CONTEXTS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: PLAN"),
        (["{file}", "--max-regression", "-1"], "--max-regression must be at least 0 nats, got -1.0"),
        (["{file}", "--max-regression", "nan"], "--max-regression must be at least 0 nats, got nan"),
        (["{file}", "--junit", "nowhere/check.xml"], "--junit must be a file in an existing directory"),
        (["{file}", "--update", "--json"], "--update writes plans"),
    ],
)
def test_bad_use_is_one_line_and_exit_2(file, arguments, message, capsys):
    assert check.main([argument.format(file=file) for argument in arguments] + ["--quiet"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.startswith("qpkv-check: error: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.yaml"], "1 of 1 plans could not be checked: missing.yaml: cannot be read as a plan"),
        (["{file}", "--model", "no-such"], "1 of 1 plans could not be checked: a model is one of"),
    ],
)
def test_a_plan_that_cannot_be_checked_is_an_error_and_exits_2(file, arguments, message, capsys):
    assert check.main([argument.format(file=file) for argument in arguments] + ["--quiet"]) == 2
    out, err = capsys.readouterr()
    assert ": error: " in out and message in err and err.count("\n") == 1


def test_a_bad_plan_does_not_keep_the_others_from_being_checked(file, one_load, tmp_path, capsys):
    bad = tmp_path / "bad.yaml"
    bad.write_text("version: 1\nlayers: [")
    assert check.main([str(bad), str(file), "--json", "--junit", str(tmp_path / "check.xml"), "--quiet"]) == 2
    out, err = capsys.readouterr()
    first, second = json.loads(out)["plans"]
    assert (first["status"], second["status"]) == ("error", "passed") and second["samples"]
    assert first["reasons"][0].startswith("not readable as YAML")
    assert err.startswith(f"qpkv-check: error: 1 of 2 plans could not be checked: {bad}: not readable as YAML")
    suite = ElementTree.parse(tmp_path / "check.xml").getroot()[0]
    assert [len(case) for case in suite] == [1, 0] and suite[0][0].tag == "error"
    assert (suite.get("errors"), suite.get("failures")) == ("1", "0")


def odd(recorded, **changes):
    return recorded.model_copy(update={"calibration": recorded.calibration.model_copy(update=changes)})


MIXED = {"regime": "aware", "target": "gold"}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"samples": {}}, "calibration.samples.validation: missing"),
        ({"samples": {"validation": {"contexts": 2}}}, "calibration.samples.validation.samples: missing"),
        ({"samples": {"validation": {"samples": 9}}}, "calibration.samples.validation.contexts must be at least 1"),
        (
            {"samples": {"validation": {"contexts": 2, "samples": 9}, "hay": {}}},
            "calibration.samples must be of search",
        ),
        ({"hashes": {}}, "calibration.hashes.validation: missing"),
        ({"data": MIXED}, "calibration.data.mix must be what --calibration-mix takes, got None"),
        ({"data": {**MIXED, "mix": {"nosuch": 3}}}, "calibration.data.mix must be what --calibration-mix takes"),
        ({"data": {"mix": {"prose": 1}}}, "calibration.data.regime must be one of aware, agnostic, got None"),
        ({"data": {**MIXED, "file": "x.jsonl"}}, "calibration.data.file_hash: missing"),
        ({"search": {"measured_allocation": [[8, "16bit"]] * 8}}, "calibration.search's measured_allocation"),
        ({"search": {"measured_allocation": [[8, "none"]] * 8, "measured_reserve_tokens": 8}}, "calibration.search's"),
    ],
)
def test_an_odd_record_is_one_line_that_names_the_field(file, recorded, changes, field, capsys):
    file.write_text(odd(recorded, **changes).to_yaml())
    assert check.main([str(file), "--quiet"]) == 2
    assert f"{file}: {field}" in capsys.readouterr().err


@pytest.mark.parametrize("setting", ["whatever", "nosuch uniform rotated-k4v2 window 4", "snapkv none 16bit window 4"])
def test_update_refuses_an_odd_rival(file, recorded, setting, capsys):
    file.write_text(odd(recorded, best_uniform=setting).to_yaml())
    assert check.main([str(file), "--update", "--quiet"]) == 2
    assert f"{file}: calibration.best_uniform must be a setting like" in capsys.readouterr().err


def test_a_junit_report_is_xml_whatever_a_reason_holds():
    result = regression.Result("a\x1b[1m\udcff.yaml", "failed", ("no \x00 such \ufffe plan é",), ("\x07 note",))
    case = ElementTree.fromstring(check.junit([result]).encode())[0][0]
    assert case.get("name") == "a\ufffd[1m\ufffd.yaml" and case[0].text == "no \ufffd such \ufffd plan é"


def test_plans_of_other_revisions_are_not_measured_on_the_first_ones_weights(recorded):
    other = {"revision": "v2"}, {"weights_hash": "sha256:other"}
    plans = [recorded.model_copy(update={"model": recorded.model.model_copy(update=one)}) for one in other]
    assert len({regression._samples_of(plan) for plan in (recorded, *plans)}) == 3


def test_a_plan_for_another_model_says_what_differs(file, tiny, monkeypatch, capsys):
    monkeypatch.setattr("qpkv_planner.regression.load_model", lambda *names, **options: (make_model("llama"), tiny[1]))
    assert check.main([str(file), "--quiet"]) == 2
    assert "the plan is for a model with num_layers = 8, this one has 3" in capsys.readouterr().err


# --- the pytest plugin ---------------------------------------------------------------------------------------------


def pytest_on(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "qpkv_planner.pytest_plugin", "-p", "no:cacheprovider", "-rsf",
         "--qpkv-plans", "plans", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )  # fmt: skip


def test_the_plugin_makes_one_test_of_each_plan_and_skips_with_the_reason(file, recorded, tmp_path):
    plans = tmp_path / "run" / "plans"
    plans.mkdir(parents=True)
    (plans / "good.yaml").write_text(file.read_text())
    worse(file)
    (plans / "worse.yaml").write_text(file.read_text())
    (plans / "bare.yaml").write_text(recorded.model_copy(update={"calibrated": False, "calibration": None}).to_yaml())
    elsewhere = recorded.model_copy(update={"model": recorded.model.model_copy(update={"id": "no-such-model"})})
    (plans / "elsewhere.yaml").write_text(elsewhere.to_yaml())
    done = pytest_on(plans.parent)
    assert "1 failed, 1 passed, 2 skipped" in done.stdout, done.stdout + done.stderr
    assert "kl 0." in done.stdout and "Traceback" not in done.stdout
    assert "it has no measurements (calibrated: false)" in done.stdout
    assert "no-such-model" in done.stdout


def test_the_plugin_looks_into_folders_and_a_folder_without_plans_is_no_pass(recorded, tmp_path):
    bare = recorded.model_copy(update={"calibrated": False, "calibration": None}).to_yaml()
    (tmp_path / "test_other.py").write_text("def test_other(): pass")
    for name in ("plans/one.yaml", "plans/more/two.yml", "plans/.git/three.yaml", "none/four.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(bare)
    assert "1 passed, 2 skipped" in pytest_on(tmp_path).stdout
    done = pytest_on(tmp_path, "--qpkv-plans", "none")
    assert done.returncode == 4
    assert "--qpkv-plans must hold plans (*.yaml, *.yml), and there is none in none" in done.stderr


def test_the_plugin_needs_its_folder(tmp_path):
    done = pytest_on(tmp_path)
    assert done.returncode == 4
    assert "--qpkv-plans must be a plan or a folder of plans, and there is no plans" in done.stderr


# --- the plans we ship ---------------------------------------------------------------------------------------------


SHIPPED = sorted(str(path) for path in (ROOT / "plans").glob("tiny__*.yaml"))


@pytest.fixture(scope="module")
def shipped():
    return Checker(SHIPPED, max_regression=0.02)  # they may have been recorded on another kind of CPU (LOG.md)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: Path(path).stem)
def test_a_shipped_plan_of_tiny_has_not_got_worse(path, shipped):
    result = shipped.result(path)
    assert result.status == "passed", result.reasons
