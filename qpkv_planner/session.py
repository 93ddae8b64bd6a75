"""What the searches of one run share: the splits, their prefills, the journal, the spaces of plans."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qpkv_planner.allocation import (
    DEFAULT_RESERVE_TOKENS,
    SEARCHED,
    Allocation,
    Choice,
    Space,
    model_section,
)
from qpkv_planner.calibration import Context, Split, make_splits
from qpkv_planner.calibration_cache import choose_places, load_or_prepare
from qpkv_planner.estimate import duration, estimate, prefills_bytes
from qpkv_planner.files import make_folder
from qpkv_planner.fit import readable
from qpkv_planner.grid import Setting, make_grid
from qpkv_planner.heads import measure_heads
from qpkv_planner.journal import Journal
from qpkv_planner.machine import operations_per_second
from qpkv_planner.measurement import Evaluator
from qpkv_planner.options import Options, check_holds, check_lengths
from qpkv_planner.prefill import Prepared, largest_number
from qpkv_planner.progress import Progress
from qpkv_planner.provenance import versions
from qpkv_planner.search import open_storage
from qpkv_runtime.cache import runs_on
from qpkv_runtime.compression import Scoring
from qpkv_runtime.models import known_model, model_identity, model_shape
from qpkv_runtime.plan import UNIFORM, Decode, Heads, Model, Plan

FLOAT16_ROOM = 2.0**15  # a larger key or value in calibration and float16 could overflow on other text


def describe(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, context: Context, revision: str | None = None
) -> Model:
    """A plan's `model` section; revision: the model's on the hub. `context` is run to see whether float16 can hold the
    keys and values."""
    shape, identity = model_shape(model), model_identity(model, tokenizer)
    dtype = str(model.dtype).removeprefix("torch.")
    storage_dtype = dtype
    if dtype == "float32":
        storage_dtype = "float16" if largest_number(model, shape, context) < FLOAT16_ROOM else "bfloat16"
    return model_section(name, shape, dtype, storage_dtype, revision=revision, **asdict(identity))


@dataclass(frozen=True)
class LastFound:
    """What the last budget's knapsack found, from the uniform setting in `format`: where the next one starts."""

    format: str
    heads: Heads | tuple[Heads, ...]
    allocation: Allocation


class Session:
    """What the budgets of one run share: the splits, their prefills, the journal, the last plan's allocation."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: Options, name: str | None,
        study: Path | None, calibration_cache: Path | None, progress: Progress, num_budgets: int,
    ) -> None:  # fmt: skip
        self.num_budgets = num_budgets
        self.model, self.options, self.progress = model, options, progress
        self.stopped: Literal["interrupted", "timeout"] | None = None
        shape = model_shape(model)
        self.effort, self.lengths = options.effort(shape), check_lengths(options, shape)
        counts = {"search": self.effort.search_contexts, "validation": self.effort.validation_contexts}
        self.splits = make_splits(
            tokenizer, counts, self.lengths.calibration, options.seed, options.data, self.lengths.search
        )
        if options.data.file is not None and self.splits["search"].documents is None:
            progress.warn(
                f"warning: {options.data.file} has fewer than {2 * len(counts)} documents that begin unlike: the "
                "search sees some of what validation measures, and its intervals are too narrow"
            )
        open_storage(options.storage)  # what cannot be opened says so now, not after the knapsack
        self.section = describe(
            model, tokenizer, name or model.config._name_or_path, self.splits["search"].contexts[0], options.revision
        )
        self.by_head = options.heads == SEARCHED and shape.num_kv_heads > 1
        self.heads: Heads | tuple[Heads, ...] = (
            measure_heads(model, shape, self.splits["search"])
            if options.heads == "weighted"
            else UNIFORM
            if options.heads == SEARCHED
            else Heads(share=options.heads)
        )
        self.cache_folder = calibration_cache or (study / "calibration" if study else None)
        self.journal = self._open(study)
        self.deadline = time.monotonic() + options.timeout_seconds if options.timeout_seconds else None
        self.evaluators: dict[str, Evaluator] = {}
        self.announced: list[Scoring] = []
        self.reserve_tokens = options.max_new_tokens or self._question_tokens()
        self.plans: list[Plan] = []
        self.last: LastFound | None = None
        self.samples: dict[str, dict[str, int | float]] = {}
        self.prefill_bytes: dict[str, int] = {}

    def _question_tokens(self) -> int | None:
        """Where contexts are compressed before the question is known, it goes through the reserve, which must hold it
        and the answer; else None, for the default."""
        if self.options.data.regime == "aware":
            return None
        samples = (one for split in self.splits.values() for context in split.contexts for one in context.samples)
        return max(len(sample.prompt) + len(sample.continuation) for sample in samples)

    def _open(self, study: Path | None) -> Journal:
        """The study's journal, or one in memory."""
        if study is None:
            return Journal()
        make_folder("--study", study)
        return Journal(study / "journal.jsonl", self.depends_on)

    @property
    def depends_on(self) -> dict[str, Any]:
        """All that a loss depends on besides what is measured."""
        return {
            "model": self.section.model_dump(),
            "data": {name: split.hash for name, split in self.splits.items()},
            "versions": versions(),
        }

    def say_estimate(self) -> None:
        """What is about to be done, and what it will take."""
        samples = {name: sum(len(one.samples) for one in split.contexts) for name, split in self.splits.items()}
        expected = estimate(known_model(self.model), self.options, self.lengths, self.num_budgets, samples)
        speed = operations_per_second(runs_on(self.model), self.model.dtype)
        self.progress.say(
            f"about {duration(expected.seconds(speed))} for {expected.prefills} and {expected.steps} steps of search; "
            "prefills take "
            f"{readable(sum(expected.prefill_bytes.values()))}"
        )

    # --- one budget ---

    def space(self, budget: str) -> Space:
        """The space of plans for `budget`."""
        options = self.options
        return Space(
            model=self.section,
            requested=budget,
            context_tokens=self.lengths.context,
            scorer=self.effort.scorers[0],
            sinks=options.sinks,
            window=options.window,
            decode=Decode.model_validate({"reserve_tokens": 1, "format": "rotated-k4v4", "then": options.then}),
            heads=self.heads,
        )

    def check_holds(self, budget: str) -> None:
        """Raise BudgetError, naming the smallest possible, unless some plan fits."""
        check_holds(self.space(budget), self.lengths, self.reserve_tokens)

    def announce(self, budget: str) -> None:
        """Prefill, when it comes to it, for this budget too."""
        shipped = self.space(budget)
        if self.lossless(shipped, quiet=True) is None:
            for tokens in {self.lengths.search: None, self.lengths.calibration: None}:
                self.announced += scorings_of(self.grid(shipped.at_length(tokens)))

    def grid(self, space: Space) -> list[Setting]:
        """The uniform settings of a space."""
        return make_grid(space, self.effort.scorers, self.effort.formats, self.reserve_tokens)

    def lossless(self, space: Space, quiet: bool = False) -> Plan | None:
        """The plan that keeps everything at 16 bit, where the budget holds that and a reserve."""
        tokens = self.options.max_new_tokens or DEFAULT_RESERVE_TOKENS
        whole = replace(space, decode=Decode(reserve_tokens=tokens, format="16bit", then=space.decode.then))
        allocation = [Choice(whole.most_tokens(layer), "16bit") for layer in range(space.shape.num_layers)]
        if whole.bytes(allocation) > space.limit_bytes:
            return None
        if not quiet:
            self.progress.say(
                f"warning: {space.requested} = {space.limit_bytes:,} bytes holds {self.lengths.context} tokens and the "
                "reserve at 16 bit: nothing needs compressing, and the plan keeps everything"
            )
        return whole.plan(allocation)

    # --- data ---

    def evaluator(self, split: str, scorings: Sequence[Scoring], is_timed: bool = True) -> Evaluator:
        """The evaluator of a split, prefilled under these scorings at least; is_timed: until the session's deadline."""
        scorings = [*scorings, *self.announced]
        held = self.evaluators.get(split)
        if held is None or not set(scorings) <= held.prepared.scorings:
            known, spent = (held.prepared.scorings, held.spent) if held else (frozenset(), 0.0)
            prepared = self._prepare(self.splits[split], list(dict.fromkeys([*known, *scorings])))
            held = self.evaluators[split] = Evaluator(self.model, prepared, self.journal, spent=spent)
        held.deadline = self.deadline if is_timed else None
        return held

    def _prepare(self, split: Split, scorings: list[Scoring]) -> Prepared:
        self.progress.stage(f"prefill {split.name}")
        samples = sum(len(context.samples) for context in split.contexts)
        needed = prefills_bytes(
            known_model(self.model), len(split.contexts), samples, self.lengths.of_split(split.name), len(scorings)
        )
        limit = self.options.prefill_memory
        # the other split's are part of a limit, and no longer of what is free
        sizes = {split.name: needed} if limit is None else self.prefill_bytes | {split.name: needed}
        place, self.prefill_bytes = choose_places(sizes, runs_on(self.model), limit)[split.name], sizes
        self.progress.say(f"{split.name}: prefills of about {readable(needed)} go to {place}")
        prepared = load_or_prepare(
            self.model, self.section, split, scorings, self.effort.num_parts, self.progress.step,
            self.cache_folder, place,
        )  # fmt: skip
        left_out = sum(prepared.num_unanswerable.values())
        self.samples[split.name] = {
            "contexts": prepared.num_contexts,
            "samples": len(prepared),
            "unanswerable_share": round(left_out / (left_out + len(prepared)), 4),
        }
        self.progress.say(
            f"{split.name}: {len(prepared)} samples of {prepared.num_contexts} contexts "
            f"({left_out} questions left out, which the full cache cannot answer)"
        )
        return prepared


def scorings_of(grid: Sequence[Setting]) -> list[Scoring]:
    return list(dict.fromkeys(Scoring.of(s.space.scorer, s.space.sinks, s.space.window) for s in grid))
