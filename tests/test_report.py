"""The report: what it shows is what was measured, it needs no other file, and a report that fails loses no plan."""

from __future__ import annotations

import re
import struct
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import small_search

from qpkv_planner import cli, demo, files, options, planner
from qpkv_planner import report as reports
from qpkv_planner.report import Report, check_report, html, write_report
from qpkv_runtime.errors import InputError
from qpkv_runtime.ledger import make_ledger
from qpkv_runtime.models import load_model

figures = pytest.importorskip("qpkv_planner.figures")

SMALL = replace(
    small_search.SMALL, search_contexts=2, validation_contexts=2, num_parts=2, rounds=options.QUICK.rounds,
    additivity_plans=3,
)  # fmt: skip
SETTINGS = {"name": "tiny", "quick": True, "quiet": True, "context_tokens": 320}


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (99.4, "99 s"), (99.6, "1 min 40 s"), (119.7, "2 min 0 s"), (3599.5, "60 min 0 s")],
)
def test_a_duration_has_no_60_seconds(seconds, words):
    assert reports.duration(seconds) == words


def test_the_demo_looks_where_it_writes_before_it_plans(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "load_model", lambda name: pytest.fail("a model is loaded"))
    assert demo.main(["--output", str(tmp_path / "nowhere" / "plan.yaml")]) == 2
    assert "--output must be a file in an existing directory" in capsys.readouterr().err


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny", dtype="float32")


@pytest.fixture(scope="module")
def searched(tiny, tmp_path_factory):
    """A plan, the text of the report that its search left, and what was drawn."""
    file, kept = tmp_path_factory.mktemp("report") / "report.html", []

    def write(path, report):
        kept.append(report)
        write_report(path, report)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(options, "QUICK", SMALL)
        patch.setattr(planner, "write_report", write)
        plan = planner.plan(*tiny, "1/8", report=file, **SETTINGS)
    (report,) = kept
    return plan, file.read_text(), report


class Page(HTMLParser):
    """Counts tags, keeps the words, and what a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.open, self.words, self.links = Counter(), Counter(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self.open[tag] += 1
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open[tag] -= 1

    def handle_endtag(self, tag):
        self.open[tag] -= 1

    def handle_data(self, data):
        self.words.append(data)


def test_every_section_is_there_with_the_plans_own_numbers(searched):
    plan, text, report = searched
    page = Page(text)
    words = "\n".join(page.words)
    for heading in (
        "Results", "Information plane", "Tokens and bits of every layer", "Sensitivity", "Additivity", "Search history",
        "Per task", "Byte ledger by layer", "Byte ledger", "Wall time", "How it was made",
    ):  # fmt: skip
        assert heading in page.words
    assert page.tags["svg"] == 8
    found = plan.calibration
    assert f"{plan.budget.planned_bytes:,}" in page.words
    for measure in (found.cross_entropy, found.kl):
        assert f"{measure.plan.mean:.3f}" in page.words and f"{measure.best_uniform.mean:.3f}" in page.words
    assert f"rank correlation {found.search['additivity']['rank_correlation']:.2f}" in page.words
    for kind, losses in found.by_kind["plan"].items():
        assert kind in page.words and f"{losses['cross_entropy']:.3f}" in page.words
    for layer, block in zip(plan.layers, make_ledger(plan).layers, strict=True):
        assert f"{block.stored_bytes:,}" in page.words
        assert " + ".join(f"{tier.tokens} {tier.format}" for tier in layer.tiers) in page.words
    assert found.winner in page.words and found.best_uniform in words and plan.policy_hash in page.words
    for stage in ("prefill search", "uniform grid", "elimination", "knapsack", "additivity", "search", "finalists"):
        assert stage in page.words and report.stage_seconds[stage] >= 0


def test_the_page_needs_no_other_file_and_closes_what_it_opens(searched):
    _, text, _ = searched
    page = Page(text)
    assert page.tags["script"] == page.tags["link"] == page.tags["img"] == 0
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert not re.search(r"url\((?!#)|@import", text)
    assert not [tag for tag in ("svg", "g", "figure", "table", "td", "div", "main", "text") if page.open[tag]]


def test_every_evaluation_is_drawn_and_the_plans_are_where_they_weigh_and_lose(searched):
    plan, _, report = searched
    stages = Counter(point.stage for points in report.points.values() for point in points)
    assert set(stages) == {"uniform grid", "elimination", "knapsack", "additivity", "search", "finalists"}
    share = plan.budget.planned_bytes / plan.budget.full_bytes
    validated = [point for point in report.points["validation"] if point.is_plan and point.share == share]
    assert validated, "the plan's own evaluation is among the points"
    assert validated[0].kl == pytest.approx(plan.calibration.kl.plan.mean, abs=1e-6)
    assert validated[0].cross_entropy == pytest.approx(plan.calibration.cross_entropy.plan.mean, abs=1e-6)
    grid = [point for point in report.points["search"] if point.stage == "uniform grid"]
    for row in plan.calibration.search["grid"]:
        weighs = row["bytes"] / plan.budget.full_bytes
        assert any(p.share == weighs and p.kl == pytest.approx(row["kl"], abs=1e-6) for p in grid), row["setting"]
    own = report.candidates(plan)
    assert all(0.9 < point.share * plan.budget.full_bytes / plan.budget.limit_bytes <= 1 for point in own)
    assert min(p.kl for p in own if p.is_whole) <= plan.calibration.search["optuna"]["best"] + 1e-6
    assert report.full["validation"] == pytest.approx(plan.calibration.cross_entropy.full.mean, abs=1e-6)


def test_the_png_has_every_panel_below_the_other(searched, tmp_path):
    _, _, report = searched
    path = tmp_path / "report.png"
    write_report(path, report)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", data[16:24])
    assert width == int(11.5 * figures.DPI)
    panels = [row for plan in report.plans for row in figures.of_plan(report, plan)]
    assert height > sum(max(panel.size[1] for panel in row) for row in panels) * figures.DPI


def test_several_budgets_share_the_plane_and_have_a_section_each(searched):
    plan, _, report = searched
    larger = plan.model_copy(update={"budget": plan.budget.model_copy(update={"limit_bytes": 2**19})})
    both = replace(report, plans=(larger, plan))
    page = Page(html(both))
    assert page.words.count("Information plane") == 1 and page.words.count("Sensitivity") == 2
    assert both.candidates(plan) == report.candidates(plan)
    assert not set(both.candidates(larger)) & set(both.candidates(plan))


def test_a_search_cut_short_and_a_lossless_plan_have_reports_too(searched, tiny):
    plan, _, report = searched
    cut = plan.calibration.model_copy(
        update={"stopped": "interrupted", "measured_on": "search", "search": {"grid": []}}
    )
    samples = {**cut.samples, "search": {"contexts": 3, "samples": 9, "unanswerable_share": 0.0}}
    stopped = plan.model_copy(update={"calibration": cut.model_copy(update={"samples": samples})})
    text = html(replace(report, plans=(stopped,), points={"search": report.points["search"]}))
    assert "cut short (interrupted)" in text and "9 samples of 3 contexts" in text
    lossless = planner.plan(*tiny, "64MiB", **SETTINGS)
    text = html(Report.of([lossless], {}, {"preparation": 1.0}))
    assert "Nothing was searched for" in text and f"{lossless.budget.planned_bytes:,}" in text


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("report.pdf", r"must be a file that ends in .html or .png, got"),
        ("no/such/folder/report.html", "must be a file in an existing directory"),
    ],
)
def test_a_report_that_cannot_be_is_refused_before_the_model_is_loaded(path, message, tmp_path, capsys):
    arguments = ["--model", "no-such-model", "--budget", "1/8", "--report", str(tmp_path / path)]
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err and "no-such-model" not in err


def test_a_report_needs_matplotlib_a_writable_folder_and_a_search(tmp_path, monkeypatch, capsys):
    arguments = ["--model", "tiny", "--budget", "1/8", "--report", str(tmp_path / "report.png")]
    assert cli.main([*arguments, "--uniform", "snapkv:kivi:4bit"]) == 2
    assert "--uniform makes none" in capsys.readouterr().err
    monkeypatch.setattr(reports, "find_spec", lambda name: None)
    assert cli.main(arguments) == 2
    assert "pip install 'qpkv[report]'" in capsys.readouterr().err
    monkeypatch.undo()

    def refuse(**settings):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
    with pytest.raises(InputError, match=r"can be written, got .*: Permission denied"):
        check_report(tmp_path / "report.png")


def test_a_report_that_cannot_be_written_leaves_nothing_behind_and_the_plan_is_still_there(
    tiny, tmp_path, monkeypatch, capsys
):
    def fail(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", fail)
    found = planner.plan(*tiny, "64MiB", report=tmp_path / "report.html", **SETTINGS)
    assert found.budget.planned_bytes
    assert "warning: no report: cannot write" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
