"""The papers' tables: verdicts can go all three ways, cells weigh what they say, and the command resumes."""

from __future__ import annotations

import csv
from fractions import Fraction

import numpy as np
import pytest

from benchmarks.paper import __main__ as command
from benchmarks.paper.settings import PRUNERS, Cell, at, bits, layer_ranges, make
from benchmarks.paper.speed import COLUMNS, RECORDED, speed_table
from benchmarks.paper.tables import Scope, tables
from benchmarks.paper.verdicts import Claim, judge, measured, negative, over
from qpkv_planner.allocation import model_section
from qpkv_planner.measurement import Losses
from qpkv_runtime.models.aliases import KNOWN_MODELS
from qpkv_runtime.plan import Heads, Interval

SMALL = ["--model", "tiny", "--length", "320", "--contexts", "2", "--line-contexts", "2", "--other-models"]


def losses(shift: float, noise: float = 0.0, text_shift: float = 0.0, seed: int = 0) -> Losses:
    """Eight contexts of a number, a word and a text each: hard and easy contexts, then `shift` on all."""
    chance = np.random.default_rng(seed)
    kinds, contexts = ("number", "word", "text") * 8, tuple(i // 3 for i in range(24))
    base = np.repeat(np.linspace(0.5, 4.0, 8), 3)  # far more than any shift: only pairing sees through it
    is_text = np.array([kind == "text" for kind in kinds])
    ce = base + shift + noise * chance.standard_normal(24) + text_shift * is_text
    return Losses(ce, np.zeros(24), np.zeros(24, bool), kinds, contexts)


def cell(name: str) -> Cell:
    return Cell(name, 0, "snapkv", "16bit", 0)


def verdict(claim: Claim, **known: Losses) -> str:
    found = measured(claim, {cell(name): one for name, one in known.items()})
    assert found is not None
    return judge(claim, found)


LESS = Claim("a loses less than b", over([cell("a")], [cell("b")]))
ALIKE = Claim("a and b are alike", over([cell("a")], [cell("b")]), within=0.1)


@pytest.mark.parametrize(
    ("shift", "noise", "expected"),
    [(-0.2, 0.05, "reproduced"), (0.2, 0.05, "reversed"), (0.0, 0.2, "not"), (-0.2, 2.0, "not")],
)
def test_a_difference_is_reproduced_reversed_or_neither_by_its_paired_interval(shift, noise, expected):
    assert verdict(LESS, a=losses(shift, noise), b=losses(0.0)) == expected


@pytest.mark.parametrize(
    ("shift", "noise", "expected"),
    [(0.02, 0.02, "reproduced"), (0.3, 0.02, "reversed"), (-0.3, 0.02, "reversed"), (0.0, 1.0, "not")],
)
def test_alike_needs_the_whole_interval_within_the_margin(shift, noise, expected):
    assert verdict(ALIKE, a=losses(shift, noise), b=losses(0.0)) == expected


def test_a_claim_of_a_size_needs_that_size():
    claim = Claim("a loses less by 0.3", LESS.terms, least=0.3)
    assert judge(claim, Interval(mean=-0.4, low=-0.5, high=-0.31)) == "reproduced"
    assert judge(claim, Interval(mean=-0.2, low=-0.25, high=-0.15)) == "not"
    assert judge(claim, Interval(mean=0.4, low=0.31, high=0.5)) == "reversed"


def test_aspects_look_at_their_own_kinds():
    known = {"a": losses(-0.5, 0.01, text_shift=0.5), "b": losses(0.0)}  # better on questions, the same on text
    for aspect, expected in (("questions", "reproduced"), ("questions over text", "reproduced"), ("text", "not")):
        assert verdict(Claim("", LESS.terms, aspect), **known) == expected, aspect
    assert verdict(Claim("", negative(LESS.terms), "questions over text"), **known) == "reversed"
    assert verdict(Claim("", LESS.terms, "text"), a=losses(-0.5, 0.01), b=losses(0.0)) == "reproduced"


def test_a_claim_is_not_judged_before_all_its_cells_are_measured():
    assert measured(LESS, {cell("a"): losses(0.0)}) is None


@pytest.fixture(scope="module")
def section():
    return model_section("smollm2", KNOWN_MODELS["smollm2"].shape, "float32", "float16")


def test_every_cell_of_every_table_is_a_plan_of_the_size_it_says(section):
    """Nominal cells keep their count in the mean over layers; exact ones fit their budget and could not grow by 2 %."""
    weighted = (Heads.model_validate({"share": "weighted", "weights": [0.5, 0.3, 0.2]}),) * section.num_layers
    scope = Scope("smollm2", section.num_layers)
    cells = {one for table in tables(scope) for one in table.cells if isinstance(one, Cell)}
    assert {one.pruner for one in cells} == set(PRUNERS)
    for one in sorted(cells, key=repr)[::15]:
        made = make(one, section, weighted)
        assert made is not None, one
        space, allocation = made
        space.probe(allocation)  # refuses what no runtime could execute
        if isinstance(one.size, str):
            assert space.bytes(allocation) <= space.limit_bytes, one
            is_full = all(choice.tokens == one.length for choice in allocation)
            assert is_full or space.bytes(allocation) > 0.98 * space.limit_bytes, one
        else:
            nominal = sum(choice.tokens * bits(choice.format) for choice in allocation) / len(allocation)
            least = space.sinks + space.window
            assert nominal == pytest.approx(float(max(one.size, least) * bits(one.format)), rel=0.05), one


def test_equal_nominal_bytes_trade_bits_for_tokens():
    sizes = [at("nominal", Fraction(1, 16), 1024, format) for format in ("16bit", "kivi-k8v8", "kivi-k4v4")]
    assert sizes == [64, 128, 256]
    assert at("exact", Fraction(1, 16), 1024, "kivi-k4v4") == "1/16"


def test_layer_ranges_cover_a_model_as_the_papers_do():
    assert layer_ranges(32) == [(0, 4), (4, 8), (8, 16), (16, 24), (24, 28), (28, 32)]
    assert [first for first, _ in layer_ranges(30)][1:] == [last for _, last in layer_ranges(30)][:-1]
    assert layer_ranges(30)[-1][1] == 30


def test_the_command_writes_page_pictures_and_rows_and_resumes(tmp_path, capsys):
    arguments = [*SMALL, "--tables", "figure-10", "--study", str(tmp_path / "study"), "--hardware", "a test"]
    assert command.main([*arguments, "--output", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert "KIVI is ahead of FlexGen" in text
    assert any(f"**{word}**" in text for word in ("reproduced", "not", "reversed"))
    assert "a test" in text
    assert (tmp_path / "out" / "figure-10.png").stat().st_size > 1000
    rows = list(csv.DictReader((tmp_path / "out" / "rows.csv").open()))
    assert len(rows) == 18
    assert {row["table"] for row in rows} == {"figure-10"}
    assert all(float(row["cross_entropy"]) > 0 and int(row["bytes"]) > 0 for row in rows)

    again = tmp_path / "again"  # no time at all: everything must come from the study
    assert command.main([*arguments, "--timeout", "0", "--output", str(again)]) == 0
    assert (again / "README.md").read_text() == text
    nothing = [*SMALL, "--tables", "table-3", "--study", str(tmp_path / "none"), "--timeout", "0"]
    assert command.main([*nothing, "--output", str(tmp_path / "empty")]) == 0
    assert "not run" in (tmp_path / "empty" / "README.md").read_text()


def test_wrong_use_is_one_line(tmp_path, capsys):
    for wrong in (["--tables", "table-9"], ["--contexts", "0"], ["--model", "nosuch"]):
        assert command.main([*wrong, "--output", str(tmp_path)]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and wrong[1] in message, message


def test_speed_is_never_a_cpu_s(tmp_path):
    assert "**not run**" in speed_table(tmp_path)
    lines = [",".join(COLUMNS), "none (CPU),m,2,1/16 4bit,eager,7,123,abc", "NVIDIA H100,m,64,1/16 4bit,graph,7,,abc"]
    (tmp_path / RECORDED).write_text("\n".join(lines) + "\n")
    assert "**not run**" in speed_table(tmp_path)
    lines.append("NVIDIA H100,m,64,1/64 4bit,graph,7,900,abc")
    (tmp_path / RECORDED).write_text("\n".join(lines) + "\n")
    assert "900" in speed_table(tmp_path) and "123" not in speed_table(tmp_path)
