"""What is measured: cells, and the plan of each, by arithmetic alone.

A cell is one setting on one set of samples. Its size is either a count of kept tokens, the papers' way (nominal bytes:
bits x tokens; metadata and answers are not counted, and answers stay at 16 bit), or a budget at exact bytes, in which
scales, zeros, tables and the reserve for generated tokens are paid for out of the same budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import Literal

from qpkv_planner.allocation import PRESETS, Allocation, Choice, Space, format_name, format_named
from qpkv_planner.grid import make_setting
from qpkv_runtime.compression import Scoring
from qpkv_runtime.plan import UNIFORM, Decode, Heads, Model, Scorer

SINKS, WINDOW, QUERIES = 4, 4, 16  # the planner's own
NOMINAL_DECODE = Decode(reserve_tokens=8, format="16bit")
LAYER_RANGES = 6  # of the papers' layer study: two at either end, two in the middle
Cost = Literal["nominal", "exact"]


@dataclass(frozen=True)
class Pruner:
    """One of Table 1's six: a scorer, how it fills the layers, and how heads share. quantizer: what the paper used."""

    scorer: Scorer
    preset: str = "uniform"
    heads: str = "uniform"
    quantizer: str = "kivi"


SNAPKV = Scorer.model_validate({"name": "snapkv", "queries": QUERIES})
PRUNERS = {
    "streamingllm": Pruner(Scorer(name="streamingllm")),
    "h2o": Pruner(Scorer(name="h2o")),
    "snapkv": Pruner(SNAPKV),
    "pyramidkv": Pruner(SNAPKV, preset="pyramidkv"),
    "adakv": Pruner(SNAPKV, heads="adaptive", quantizer="flexgen"),
    "headkv": Pruner(SNAPKV, heads="weighted", quantizer="flexgen"),
}


@dataclass(frozen=True)
class Cell:
    """A setting on the samples of one model and length.

    size: kept tokens per head and layer, or a budget at exact bytes ("1/16"). moved: (first, last + 1, format), layers
    that trade tokens for bits: as many nominal bits as the others, in this format.
    """

    model: str
    length: int
    pruner: str
    format: str
    size: int | str
    moved: tuple[int, int, str] | None = None

    @property
    def place(self) -> tuple[str, int]:
        """Whose samples these are."""
        return self.model, self.length

    @property
    def needs_weights(self) -> bool:
        return PRUNERS[self.pruner].heads == "weighted"

    @property
    def work(self) -> int:
        """About how long it takes, beside other cells of its place: heads of different counts are read one by one."""
        return 1 if PRUNERS[self.pruner].heads == "uniform" else 3


@dataclass(frozen=True)
class Line:
    """A setting of `benchmarks.precisions.LADDER` on so many prompts of key-value lines. when: where the question is,
    of its WHENS."""

    model: str
    length: int
    contexts: int
    when: str
    setting: str
    budget: str

    @property
    def place(self) -> tuple[str, int]:
        return self.model, self.length

    @property
    def work(self) -> int:
        """Beside a cell, about: every setting prefills all prompts again."""
        return 4 * self.contexts


Key = Cell | Line


def bits(format: str) -> Fraction:
    """The mean of key and value bits, metadata not counted."""
    written = format_named(format)
    return Fraction(written.keys.bits + written.values.bits, 2)


def at(cost: Cost, share: Fraction, length: int, format: str) -> int | str:
    """The size of a cell that takes `share` of a full cache of `length` tokens, nominally or exactly."""
    return str(share) if cost == "exact" else min(length, int(share * length * 16 / bits(format)))


def layer_ranges(num_layers: int) -> list[tuple[int, int]]:
    """The papers' ranges for 32 layers (four layers at both ends, eight in the middle), scaled to a model's depth."""
    bounds = [0, 4, 8, 16, 24, 28, 32]
    scaled = [round(bound * num_layers / bounds[-1]) for bound in bounds]
    return list(pairwise(scaled))


def make(cell: Cell, section: Model, weighted: tuple[Heads, ...] | None) -> tuple[Space, Allocation] | None:
    """The plan of a cell; None where the budget holds not even sinks and window.

    weighted: the model's measured heads, where the cell needs them.
    """
    pruner = PRUNERS[cell.pruner]
    heads: Heads | tuple[Heads, ...] = UNIFORM if pruner.heads == "uniform" else Heads(share="adaptive")
    if cell.needs_weights:
        assert weighted is not None, "head weights are measured before the cells that need them"
        heads = weighted
    space = Space(section, "100%", cell.length, pruner.scorer, SINKS, WINDOW, NOMINAL_DECODE, heads)
    formats = [cell.format] * section.num_layers
    if cell.moved is not None:
        first, last, other = cell.moved
        formats[first:last] = [other] * (last - first)
    tokens_at_equal_bits = [float(bits(cell.format) / bits(format)) for format in formats]
    if isinstance(cell.size, str):
        made = make_setting(replace(space, requested=cell.size), pruner.preset, cell.format, None)
        if made is None:
            return None
        if cell.moved is None:
            return made.space, made.allocation
        moved = made.space.project(tokens_at_equal_bits, formats)
        return None if moved is None else (made.space, moved)
    even = [Choice(space.legal_tokens(i, cell.size, cell.format), cell.format) for i in range(section.num_layers)]
    if pruner.preset != "uniform":
        return space, _shaped(space, pruner.preset, even)
    wished = zip(tokens_at_equal_bits, formats, strict=True)
    return space, tuple(
        Choice(space.legal_tokens(layer, cell.size * share, format), format)
        for layer, (share, format) in enumerate(wished)
    )


def _shaped(space: Space, preset: str, even: list[Choice]) -> Allocation:
    """As many tokens in all, divided among the layers as the preset says.

    The presets divide bytes: here those of a format whose metadata belongs to tokens, so that no partial group counts.
    """
    written = format_named(even[0].format)
    per_token = format_name("flexgen", written.keys.bits, written.values.bits)
    alike = [replace(choice, format=per_token) for choice in even]
    shaped = PRESETS[preset](replace(space, requested=f"{space.bytes(alike)}B"), per_token)
    assert shaped is not None
    return tuple(replace(choice, format=even[0].format) for choice in shaped)


def scorings(cells: Sequence[Cell], section: Model) -> list[Scoring]:
    """Every way in which these cells score tokens; a tight budget halves sinks and window."""
    found = {Scoring.of(PRUNERS[cell.pruner].scorer, SINKS, WINDOW): None for cell in cells}
    even = (Heads.model_validate({"share": "weighted", "weights": [1.0] * section.num_kv_heads}),) * section.num_layers
    for cell in cells:
        made = make(cell, section, even) if isinstance(cell.size, str) and cell.moved is None else None
        if made is not None:
            found[Scoring.of(made[0].scorer, made[0].sinks, made[0].window)] = None
    return list(found)
