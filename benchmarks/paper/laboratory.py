"""Measures cells on the test split, each once: a folder keeps prefills and a journal per model and length, over which
a killed or timed-out run goes on."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.paper import lines
from benchmarks.paper.settings import Cell, Key, Line, bits, make, scorings
from qpkv_planner.calibration import make_split
from qpkv_planner.calibration_cache import load_or_prepare
from qpkv_planner.heads import measure_heads
from qpkv_planner.journal import Journal
from qpkv_planner.measurement import Evaluator, Losses, OutOfTime
from qpkv_planner.progress import Progress
from qpkv_planner.session import describe
from qpkv_runtime.ledger import full_bytes
from qpkv_runtime.models import load_model
from qpkv_runtime.plan import Heads, Model

PREFILL_WORK = 12  # of a context, in evaluations of a cell
MEMO_BYTES = 2**28  # few cells share a layer's block
HEAD_CONTEXTS = 4  # of the search split, for the weights of heads


@dataclass(frozen=True)
class Measured:
    """A cell's losses. tokens: kept, mean over layers; num_bytes: the plan's, by the ledger; nominal, exact: shares of
    the full cache's bytes, counted the papers' way and by the ledger."""

    losses: Losses
    tokens: float
    num_bytes: int
    nominal: float
    exact: float


@dataclass
class Place:
    """The prepared samples of one model and length."""

    section: Model
    evaluator: Evaluator
    weighted: tuple[Heads, ...] | None


@dataclass
class Laboratory:
    """study: the folder; contexts: of the test split at every place; commit: written beside what is measured now;
    asked: every cell that any run over this study measures, so that one prefill knows what all of them need;
    deadline: `time.monotonic()` after which only what the study holds is used.

    measured, unfit: what is known of the cells so far; full, unanswerable: of the full cache at each place.
    """

    study: Path
    contexts: int
    commit: str
    asked: tuple[Key, ...]
    progress: Progress
    deadline: float | None = None
    measured: dict[Key, Measured] = field(default_factory=dict)
    full: dict[tuple[str, int], Losses] = field(default_factory=dict)
    unfit: set[Key] = field(default_factory=set)
    unanswerable: dict[tuple[str, int], dict[str, int]] = field(default_factory=dict)
    _models: dict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]] = field(default_factory=dict)
    _sections: dict[str, Model] = field(default_factory=dict)
    _places: dict[tuple[str, int], Place] = field(default_factory=dict)
    _unprepared: set[tuple[str, int]] = field(default_factory=set)
    _journals: dict[str, Journal] = field(default_factory=dict)

    def measure(self, cell: Key) -> bool:
        """Measure a cell, unless it is known. False: there is no time left for it."""
        if cell in self.measured or cell in self.unfit:
            return True
        try:
            found = self._line(cell) if isinstance(cell, Line) else self._cell(cell)
        except OutOfTime:
            return False
        if found is None:
            self.unfit.add(cell)
        else:
            self.measured[cell] = found
        self.progress.step(cell.work)
        return True

    def model(self, name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        if name not in self._models:
            self._models[name] = load_model(name)
        return self._models[name]

    @property
    def commits(self) -> list[str]:
        """Those that measured what is used."""
        entries = [entry for journal in self._journals.values() for entry in journal.entries.values()]
        return sorted({entry.stage for entry in entries})

    def _cell(self, cell: Cell) -> Measured | None:
        if cell.place not in self._places:
            if cell.place in self._unprepared:
                raise OutOfTime
            self._unprepared.add(cell.place)  # until it is: a prefill that runs out of time is not begun again
            self._places[cell.place] = self._prepare(cell.place)
        place = self._places[cell.place]
        made = make(cell, place.section, place.weighted)
        if made is None:
            return None
        space, allocation = made
        losses = place.evaluator.evaluate(space, allocation)
        width = [choice.tokens * float(bits(choice.format)) for choice in allocation]
        return Measured(
            losses,
            sum(choice.tokens for choice in allocation) / len(allocation),
            space.bytes(allocation),
            sum(width) / (16 * cell.length * len(allocation)),
            space.bytes(allocation) / space.full_bytes,
        )

    def _line(self, line: Line) -> Measured | None:
        section = self._section(line.model, line.length)
        journal = self._journal(f"lines-{Path(line.model).stem}", {"model": section.model_dump()})
        what = {"line": [line.length, line.contexts, line.when, line.setting, line.budget]}
        entry = journal.get(what)
        if entry is None:
            self._check_time()
            found = lines.measure(line, *self.model(line.model), section)
            values, num_bytes, tokens = found or ({}, 0, 0)
            journal.put(what, {**values, "size": [float(num_bytes), float(tokens)]})
            entry = journal.get(what)
            assert entry is not None
        if "ce" not in entry.values:
            return None
        num_bytes, tokens = map(int, entry.values["size"])
        share = num_bytes / full_bytes(section.shape, line.length)
        return Measured(lines.losses(line, entry.values), tokens, num_bytes, share, share)

    def _prepare(self, place: tuple[str, int]) -> Place:
        name, length = place
        own = [cell for cell in self.asked if isinstance(cell, Cell) and cell.place == place]
        section = self._section(name, length)
        model, tokenizer = self.model(name)
        split = make_split(tokenizer, "test", self.contexts, length, seed=0)
        journal = self._journal(
            f"{Path(name).stem}-{length}x{self.contexts}", {"model": section.model_dump(), "split": split.hash}
        )
        folder = self.study / "prefills"
        if not journal.entries:
            self._check_time()
        self.progress.stage(f"{name} {length}")
        prepared = load_or_prepare(model, section, split, scorings(own, section), 1, self._context_done, folder)
        weighted = self._weights(place, journal) if any(cell.needs_weights for cell in own) else None
        evaluator = Evaluator(model, prepared, journal, memo_bytes=MEMO_BYTES, deadline=self.deadline)
        self.full[place], self.unanswerable[place] = evaluator.full(), prepared.num_unanswerable
        return Place(section, evaluator, weighted)

    def _weights(self, place: tuple[str, int], journal: Journal) -> tuple[Heads, ...]:
        """The weights of heads, measured on the search split's needles."""
        what = {"heads": HEAD_CONTEXTS}
        entry = journal.get(what)
        if entry is None:
            model, tokenizer = self.model(place[0])
            split = make_split(tokenizer, "search", HEAD_CONTEXTS, place[1], seed=0)
            measured = measure_heads(model, self._section(*place).shape, split)
            journal.put(what, {f"{i:03d}": list(heads.weights or ()) for i, heads in enumerate(measured)})
            entry = journal.get(what)
            assert entry is not None
        rows = (values for _, values in sorted(entry.values.items()))
        return tuple(Heads.model_validate({"share": "weighted", "weights": weights}) for weights in rows)

    def _section(self, name: str, length: int) -> Model:
        if name not in self._sections:
            model, tokenizer = self.model(name)
            split = make_split(tokenizer, "search", 1, length, seed=0)
            self._sections[name] = describe(model, tokenizer, name, split.contexts[0])
        return self._sections[name]

    def _journal(self, name: str, header: dict[str, Any]) -> Journal:
        if name not in self._journals:
            self.study.mkdir(parents=True, exist_ok=True)
            versions = {package: version(package) for package in ("qpkv", "torch", "transformers")}
            self._journals[name] = Journal(self.study / f"{name}.jsonl", {**header, "versions": versions})
            self._journals[name].stage = self.commit
        return self._journals[name]

    def _context_done(self) -> None:
        self.progress.step(PREFILL_WORK)
        self._check_time()

    def _check_time(self) -> None:
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise OutOfTime
