"""From a model and budgets to plans: calibration, uniform grid, elimination, knapsack, Optuna, validation.

Every stage works on the search split and hands the next one its allocation; the stages' results meet on the
validation split and the lowest objective there ships, with the paired interval of its cross-entropy against the best
uniform setting. What each stage predicted and measured goes into the plan's `calibration.search`. Several budgets share
the prefill and the journal, and a smaller one's elimination goes on from where the larger one's plan ended.

A study (a folder) makes a run crash-safe: prefills are kept there and evaluations journalled, and the same command goes
on over them. Interrupted or out of time, a search ships the best it has and says so in the plan.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qpkv_planner import lagrangian, search
from qpkv_planner.allocation import (
    DEFAULT_CONTEXT_TOKENS,
    DEFAULT_RESERVE_TOKENS,
    Allocation,
    Choice,
    Space,
    format_named,
    model_section,
)
from qpkv_planner.calibration import BUILT_IN, DOCUMENTS, Context, Data, Split, make_splits
from qpkv_planner.calibration_cache import choose_places, load_or_prepare
from qpkv_planner.elimination import eliminate, roomy
from qpkv_planner.estimate import Estimate, duration, prefills_bytes
from qpkv_planner.fit import readable
from qpkv_planner.grid import FORMATS, QUICK_FORMATS, Setting, make_grid, with_format
from qpkv_planner.heads import measure_heads
from qpkv_planner.journal import Journal
from qpkv_planner.knapsack import additivity, improve
from qpkv_planner.linearization import FORWARDS
from qpkv_planner.machine import operations_per_second
from qpkv_planner.measurement import Evaluator, Losses, Objective, OutOfTime, interval
from qpkv_planner.prefill import Prepared, largest_number
from qpkv_planner.progress import Progress
from qpkv_planner.report import Report, check_report, write_report
from qpkv_runtime.attention import NAME
from qpkv_runtime.budget import limit_bytes
from qpkv_runtime.cache import runs_on
from qpkv_runtime.compression import Scoring
from qpkv_runtime.errors import BudgetError, InputError, UnsupportedModelError
from qpkv_runtime.ledger import full_bytes
from qpkv_runtime.methods import SHARINGS
from qpkv_runtime.models import known_model, model_identity, model_shape
from qpkv_runtime.models.aliases import KnownModel
from qpkv_runtime.models.shape import ModelShape
from qpkv_runtime.plan import Calibration, Comparison, Decode, Heads, Model, Plan, Scorer

QUICK_CONTEXT_TOKENS = 1024
FLOAT16_ROOM = 2.0**15  # a larger key or value in calibration and float16 could overflow on other text
LEAST_SHARE = 4  # no layer goes below this part of the uniform setting's tokens: few contexts overfit

SHORT = {"name": "snapkv", "queries": 16, "kernel": 9, "lead": 4, "pooling": "average"}
LONG = {"name": "snapkv", "queries": 16, "kernel": 15, "lead": 7, "pooling": "average"}
SCORERS = (Scorer.model_validate(SHORT), Scorer.model_validate(LONG))


@dataclass(frozen=True)
class Effort:
    """How much a search does. times_budget: where elimination starts."""

    search_contexts: int
    validation_contexts: int
    num_parts: int
    formats: tuple[str, ...]
    scorers: tuple[Scorer, ...]
    times_budget: float
    rounds: int
    trials: int
    additivity_plans: int


QUICK = Effort(12, 9, 3, QUICK_FORMATS, SCORERS, 2.5, 2, 8, 0)
THOROUGH = Effort(18, 24, 3, FORMATS, SCORERS, 4.0, 5, 16, 24)


@dataclass(frozen=True)
class Options:
    """Everything a search depends on besides the model and the budget.

    context_tokens: the length a ratio refers to, None for 2048 (quick: 1024) or the model's if that is smaller;
    calibration_tokens: the length of the calibration contexts, the same unless given: then the search runs at the same
    ratio of that length and its kept shares are stretched; data: where the contexts come from; max_new_tokens: the
    reserve's size; heads: how KV heads share a layer's tokens (uniform, adaptive, or weighted, measured on the search
    contexts); revision: the model's on the hub, to be loaded by; timeout_seconds: the search's, validation comes on
    top; sampler, storage: Optuna's; prefill_memory: bytes of memory that prefills may take, None for what is free: what
    is more goes to disk.
    """

    context_tokens: int | None = None
    calibration_tokens: int | None = None
    quick: bool = False
    objective: Objective = "kl"
    data: Data = BUILT_IN
    max_new_tokens: int | None = None
    then: str = "evict"
    sinks: int = 4
    window: int = 4
    heads: str = "uniform"
    trials: int | None = None
    sampler: str = "tpe"
    storage: str | None = None
    revision: str | None = None
    prefill_memory: int | None = None
    timeout_seconds: float | None = None
    seed: int = 0

    @property
    def effort(self) -> Effort:
        effort = QUICK if self.quick else THOROUGH
        return effort if self.trials is None else replace(effort, trials=self.trials)


@dataclass(frozen=True)
class Candidate:
    """A finalist: the stage that made it (or the uniform setting's name), and what makes it a plan."""

    stage: str
    space: Space
    allocation: Allocation


def plan(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, budget: str, *, name: str | None = None,
    study: Path | None = None, calibration_cache: Path | None = None, report: Path | None = None, quiet: bool = False,
    **options: Any,
) -> Plan:  # fmt: skip
    """Search for the plan of `model` under `budget` (`1/64`, `1.6%`, `512MiB`, per sequence).

    model: loaded with attn_implementation="qpkv" (`qpkv_runtime.load_model` does). name: recorded as model.id, for
    `qpkv-run` to load it by. study: a folder for the journal and the prefills, over which a killed run goes on;
    calibration_cache: a folder for the prefills alone, which other searches reuse. report: an .html or .png file that
    the search is drawn into. options: of `Options`. The same arguments, model and machine give the same plan, byte for
    byte.

    Raises BudgetError when the budget cannot hold sinks, window and reserve; NumericsError when the model gives NaN.
    """
    with _session(model, tokenizer, Options(**options), name, study, calibration_cache, report, quiet, 1) as session:
        return session.plan(budget)


def frontier(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, budgets: Sequence[str], *, name: str | None = None,
    study: Path | None = None, calibration_cache: Path | None = None, report: Path | None = None, quiet: bool = False,
    **options: Any,
) -> Iterator[Plan]:  # fmt: skip
    """The plans of several budgets, as `plan`, largest budget first: one prefill, each search starting from the last
    plan. Ends early, after the plan it was at, when interrupted."""
    count = len(budgets)
    with _session(
        model, tokenizer, Options(**options), name, study, calibration_cache, report, quiet, count
    ) as session:
        full = full_bytes(model_shape(model), session.context_tokens)
        ordered = sorted(budgets, key=lambda one: -limit_bytes(one, full))
        for budget in ordered:
            session.check_holds(budget)
            session.announce(budget)
        for budget in ordered:
            yield session.plan(budget)
            if session.stopped:
                return


def smallest(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_loss: float, *, name: str | None = None,
    study: Path | None = None, calibration_cache: Path | None = None, report: Path | None = None, quiet: bool = False,
    **options: Any,
) -> Plan:  # fmt: skip
    """The plan of the smallest budget found whose cross-entropy on validation exceeds the full cache's by no more than
    `max_loss` nats at the upper end of its 95 % interval: halving from 1/2, then twice between the last two.

    Raises BudgetError when even half of the cache loses more.
    """
    with _session(model, tokenizer, Options(**options), name, study, calibration_cache, report, quiet, 6) as session:
        good: Plan | None = None
        good_share, bad_share = 1.0, 0.0
        for _ in range(8):
            share = good_share / 2 if bad_share == 0.0 else math.sqrt(good_share * bad_share)
            if bad_share and good_share / bad_share < 1.2:
                break
            try:
                found = session.plan(f"{share:.4g}")
            except BudgetError:
                bad_share = share
                continue
            assert found.calibration is not None and found.calibration.loss_to_full is not None
            high = found.calibration.loss_to_full.high
            session.progress.say(
                f"budget {share:.4g}: at most {high:+.3f} nats over the full cache, {max_loss} allowed"
            )
            if high <= max_loss:
                good, good_share = found, share
            else:
                bad_share = share
                if good is None and share < 0.5:
                    break
            if session.stopped:
                break
        if good is None:
            raise BudgetError(
                f"no budget up to 1/2 stays within --max-loss {max_loss} nats of the full cache on validation (upper "
                "end of the 95 % interval): allow more, or calibrate on more contexts"
            )
        session.plans = [good]
        return good


@contextmanager
def _session(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: Options, name: str | None,
    study: Path | None, calibration_cache: Path | None, report: Path | None, quiet: bool, num_budgets: int,
) -> Iterator[_Session]:  # fmt: skip
    if report is not None:
        check_report(report)
    if model.config._attn_implementation != NAME:
        raise UnsupportedModelError(f"planning needs qpkv attention: call model.set_attn_implementation('{NAME}')")
    progress = Progress(_estimated_steps(options.effort, model_shape(model).num_layers, num_budgets), quiet)
    session = _Session(model, tokenizer, options, name, study, calibration_cache, progress, num_budgets)
    try:
        yield session
        if report is not None:
            try:
                write_report(report, Report.of(session.plans, session._evaluators, progress.stage_seconds))
            except InputError as error:  # the plan must not be lost with it
                progress.warn(f"warning: no report: {error}")
    finally:
        session.journal.close()
        progress.close()


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


def estimate(
    known: KnownModel, options: Options, context_tokens: int, num_budgets: int, samples: Mapping[str, int] | None = None
) -> Estimate:
    """What a search takes. samples: of each split, where they are made; else as many as the mix gives."""
    effort = options.effort
    contexts = {"search": effort.search_contexts, "validation": effort.validation_contexts}
    in_context = 1 + sum(count for kind, count in options.data.mix if kind not in DOCUMENTS)
    return Estimate(
        model=known,
        contexts=contexts,
        samples=samples or {name: count * in_context for name, count in contexts.items()},
        calibration_tokens=options.calibration_tokens or context_tokens,
        num_scorings=len(effort.scorers) + 1,
        steps=_estimated_steps(effort, known.shape.num_layers, num_budgets) - sum(contexts.values()),
    )


def check_lengths(options: Options, shape: ModelShape) -> tuple[int, int]:
    """The context and the calibration length. Raises InputError where they are not the model's."""
    default_tokens = QUICK_CONTEXT_TOKENS if options.quick else DEFAULT_CONTEXT_TOKENS
    context_tokens = options.context_tokens or min(default_tokens, shape.max_context_tokens)
    calibration_tokens = options.calibration_tokens or context_tokens
    for what, tokens in (("context length", context_tokens), ("calibration length", calibration_tokens)):
        if not 0 < tokens <= shape.max_context_tokens:
            raise InputError(f"the {what} must be 1 to the model's {shape.max_context_tokens} tokens, got {tokens}")
    if calibration_tokens > context_tokens:
        raise InputError(
            f"the calibration length must be at most the context length {context_tokens}, got {calibration_tokens}"
        )
    return context_tokens, calibration_tokens


def _estimated_steps(effort: Effort, num_layers: int, num_budgets: int) -> int:
    """Steps of progress: forwards of all samples; a context's prefill counts as one."""
    contexts = effort.search_contexts + effort.validation_contexts
    elimination = 5 * math.log2(effort.times_budget) * (1 + FORWARDS // effort.num_parts)
    one_budget = len(effort.formats) + 9 + elimination + effort.rounds * (1 + FORWARDS) + effort.trials + 12
    return int(contexts + num_budgets * (one_budget + effort.additivity_plans))


class _Session:
    """What the budgets of one run share: the splits, their prefills, the journal, the last plan's allocation."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: Options, name: str | None,
        study: Path | None, calibration_cache: Path | None, progress: Progress, num_budgets: int,
    ) -> None:  # fmt: skip
        self.num_budgets = num_budgets
        self.model, self.options, self.effort, self.progress = model, options, options.effort, progress
        self.stopped: Literal["interrupted", "timeout"] | None = None
        shape = model_shape(model)
        self.context_tokens, self.calibration_tokens = check_lengths(options, shape)
        counts = {"search": self.effort.search_contexts, "validation": self.effort.validation_contexts}
        self.splits = make_splits(tokenizer, counts, self.calibration_tokens, options.seed, options.data)
        self.section = describe(
            model, tokenizer, name or model.config._name_or_path, self.splits["search"].contexts[0], options.revision
        )
        if options.heads not in SHARINGS:
            raise InputError(f"heads must be one of {', '.join(SHARINGS)}, got {options.heads!r}")
        self.heads: Heads | tuple[Heads, ...] = (
            measure_heads(model, shape, self.splits["search"])
            if options.heads == "weighted"
            else Heads(share=options.heads)
        )
        self.cache_folder = calibration_cache or (study / "calibration" if study else None)
        self.journal = self._open(study)
        self.deadline = time.monotonic() + options.timeout_seconds if options.timeout_seconds else None
        self._evaluators: dict[str, Evaluator] = {}
        self.announced: list[Scoring] = []
        self.reserve_tokens = options.max_new_tokens or self._question_tokens()
        self.plans: list[Plan] = []
        self._last: tuple[str, Allocation] | None = None  # the last budget's format and plan, for the next to start at
        self.samples: dict[str, dict[str, int | float]] = {}

    def _question_tokens(self) -> int | None:
        """Where contexts are compressed before the question is known, it goes through the reserve, which must hold it
        and the answer; else None, for the default."""
        if self.options.data.regime == "aware":
            return None
        samples = (one for split in self.splits.values() for context in split.contexts for one in context.samples)
        return max(len(sample.prompt) + len(sample.continuation) for sample in samples)

    def _open(self, study: Path | None) -> Journal:
        """The study's journal, or one in memory. Its header is all that a loss depends on."""
        if study is None:
            return Journal()
        study.mkdir(parents=True, exist_ok=True)
        header = {
            "model": self.section.model_dump(),
            "data": {name: split.hash for name, split in self.splits.items()},
            "versions": _versions(),
        }
        return Journal(study / "journal.jsonl", header)

    def say_estimate(self) -> None:
        """What is about to be done, and what it will take."""
        samples = {name: sum(len(one.samples) for one in split.contexts) for name, split in self.splits.items()}
        expected = estimate(known_model(self.model), self.options, self.context_tokens, self.num_budgets, samples)
        speed = operations_per_second(runs_on(self.model), self.model.dtype)
        self.progress.say(
            f"about {duration(expected.seconds(speed))} for {sum(expected.contexts.values())} prefills of "
            f"{self.calibration_tokens} tokens and {expected.steps} steps of search; prefills take "
            f"{readable(sum(expected.prefill_bytes.values()))}"
        )

    # --- one budget ---

    def space(self, budget: str, tokens: int) -> Space:
        """The space of plans for `budget` of `tokens` tokens."""
        options = self.options
        return Space(
            model=self.section,
            requested=budget,
            context_tokens=tokens,
            scorer=self.effort.scorers[0],
            sinks=options.sinks,
            window=options.window,
            decode=Decode.model_validate({"reserve_tokens": 1, "format": "rotated-k4v4", "then": options.then}),
            heads=self.heads,
        )

    def check_holds(self, budget: str) -> None:
        """Raise BudgetError, naming the smallest possible, unless some plan fits."""
        space = with_format(self.space(budget, self.context_tokens), QUICK_FORMATS[-1], self.reserve_tokens)
        space.check_holds(QUICK_FORMATS)

    def plan(self, budget: str) -> Plan:
        """The stages for one budget; the plan is also the last of `plans`."""
        self.plans.append(self._plan(budget))
        return self.plans[-1]

    def _plan(self, budget: str) -> Plan:
        shipped = self.space(budget, self.context_tokens)
        lossless = self._lossless(shipped)
        if lossless is not None:
            return lossless
        self.check_holds(budget)
        if not self.plans:
            self.say_estimate()
        space, grid = self._grid(shipped)
        self.progress.say(
            f"budget {budget} of {self.context_tokens} tokens: {shipped.limit_bytes:,} of {shipped.full_bytes:,} bytes"
        )
        return _Search(self, shipped, space, grid).run()

    def announce(self, budget: str) -> None:
        """Prefill, when it comes to it, for this budget too."""
        shipped = self.space(budget, self.context_tokens)
        if self._lossless(shipped, quiet=True) is None:
            self.announced += _scorings(self._grid(shipped)[1])

    def _grid(self, shipped: Space) -> tuple[Space, list[Setting]]:
        """The space of the search for a plan in `shipped`, and its uniform settings."""
        space = shipped
        if self.calibration_tokens < self.context_tokens:  # the same share of what the calibration contexts would take
            share = Fraction(shipped.limit_bytes, shipped.full_bytes)
            full = full_bytes(space.shape, self.calibration_tokens)
            space = self.space(f"{int(full * share)}B", self.calibration_tokens)
        return space, make_grid(space, self.effort.scorers, self.effort.formats, self.reserve_tokens)

    def _lossless(self, space: Space, quiet: bool = False) -> Plan | None:
        """The plan that keeps everything at 16 bit, where the budget holds that and a reserve."""
        tokens = self.options.max_new_tokens or DEFAULT_RESERVE_TOKENS
        whole = replace(space, decode=Decode(reserve_tokens=tokens, format="16bit", then=space.decode.then))
        allocation = [Choice(whole.most_tokens(layer), "16bit") for layer in range(space.shape.num_layers)]
        if whole.bytes(allocation) > space.limit_bytes:
            return None
        if not quiet:
            self.progress.say(
                f"warning: {space.requested} = {space.limit_bytes:,} bytes holds {self.context_tokens} tokens and the "
                "reserve at 16 bit: nothing needs compressing, and the plan keeps everything"
            )
        return whole.plan(allocation)

    # --- data ---

    def evaluator(self, split: str, scorings: Sequence[Scoring]) -> Evaluator:
        """The evaluator of a split, prefilled under these scorings at least."""
        scorings = [*scorings, *self.announced]
        held = self._evaluators.get(split)
        if held is None or not set(scorings) <= held.prepared.scorings:
            known = held.prepared.scorings if held else frozenset()
            prepared = self._prepare(self.splits[split], list(dict.fromkeys([*known, *scorings])))
            held = self._evaluators[split] = Evaluator(self.model, prepared, self.journal)
        held.deadline = self.deadline
        return held

    def _prepare(self, split: Split, scorings: list[Scoring]) -> Prepared:
        self.progress.stage(f"prefill {split.name}")
        samples = sum(len(context.samples) for context in split.contexts)
        needed = prefills_bytes(
            known_model(self.model), len(split.contexts), samples, self.calibration_tokens, len(scorings)
        )
        place = choose_places({split.name: needed}, runs_on(self.model), self.options.prefill_memory)[split.name]
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


class _Search:
    """The stages for one budget. shipped: the space of the plan; space: that of the search, which is another one where
    calibration contexts are shorter."""

    def __init__(self, session: _Session, shipped: Space, space: Space, grid: list[Setting]) -> None:
        self.session, self.shipped, self.space, self.grid = session, shipped, space, grid
        self.effort, self.options, self.progress = session.effort, session.options, session.progress
        self.objective = session.options.objective
        self.record: dict[str, Any] = {}
        self.best_uniform: Candidate | None = None
        self.candidates: list[Candidate] = []
        self.slope = 0.0
        self.scorings = _scorings(grid)

    def run(self) -> Plan:
        split = "validation"
        try:
            self._stages(self.session.evaluator("search", self.scorings))
        except (KeyboardInterrupt, OutOfTime) as stop:
            if self.best_uniform is None or not self.candidates:
                if isinstance(stop, OutOfTime):
                    raise InputError(
                        f"{self.options.timeout_seconds:g} seconds must be enough to measure the uniform settings, "
                        "and are not: raise --timeout, or add --quick"
                    ) from None
                raise
            self.session.stopped = "timeout" if isinstance(stop, OutOfTime) else "interrupted"
            if self.session.stopped == "interrupted":
                split = "search"  # the user is waiting
            self.progress.say(f"{self.session.stopped}: shipping the best plan so far, measured on the {split} split")
        self.session.deadline = None
        return self._ship(split)

    def _stage(self, name: str) -> None:
        self.progress.stage(name)
        self.session.journal.stage = name

    def _stages(self, evaluator: Evaluator) -> None:
        """The stages on the search split, their results in `candidates` (two of them also pulled half way back to
        uniform: few contexts overfit), and lambda at the knapsack's."""
        start = self._grid(evaluator)
        space, quantizer = start.space, format_named(start.format).keys.quantizer
        self.candidates = [Candidate("uniform", space, start.allocation)]
        floor = min(choice.tokens for choice in start.allocation) // LEAST_SHARE

        self._stage("elimination")
        last = self.session._last
        reuses = last is not None and last[0] == start.format and space.bytes(last[1]) > space.limit_bytes
        begin = last[1] if last is not None and reuses else roomy(space, start.format, self.effort.times_budget)
        eliminated, passes = eliminate(evaluator, space, begin, self.objective, floor, self.progress.step)
        self.record["elimination"] = [asdict(one) for one in passes]
        self.candidates.append(Candidate("elimination", space, eliminated))
        eliminated_loss = self._say("elimination", evaluator.evaluate(space, eliminated)).mean(self.objective)

        self._stage("knapsack")
        start_loss = evaluator.evaluate(space, start.allocation).mean(self.objective)
        improved, rounds, around = improve(
            evaluator, space, eliminated if eliminated_loss < start_loss else start.allocation, quantizer,
            self.effort.rounds, self.objective, floor, self.progress.step,
            lambda allocation: self._keep(Candidate("knapsack", space, allocation)),
        )  # fmt: skip
        self.record["knapsack"] = [{**asdict(one), "accepted": one.is_accepted} for one in rounds]
        self._keep(Candidate("knapsack", space, improved))
        improved_losses = self._say("knapsack", evaluator.evaluate(space, improved))
        self.session._last = (start.format, improved)

        if self.effort.additivity_plans:
            self._stage("additivity")
            self.record["additivity"] = additivity(
                evaluator, space, around, self.objective, self.effort.additivity_plans, self.options.seed,
                self.progress.step,
            )  # fmt: skip

        self._stage("search")
        found = search.refine(
            evaluator, search.Family(space, improved, around.sensitivities, quantizer), self.effort.trials,
            self.objective, self.options.seed, self._trial,
            sampler=self.options.sampler, storage=self.options.storage, name=f"{self.space.requested} {start.format}",
        )  # fmt: skip
        self.record["optuna"] = {"trials": self.effort.trials, "finished": len(found)}
        if found:
            best = found[0]
            self._keep(Candidate("search", space, best.allocation))
            gain = improved_losses.mean(self.objective) - best.loss
            self.record["optuna"].update(best=best.loss, parameters=best.parameters, gain_on_knapsack=gain)
            self.progress.say(f"search          {self.objective} {best.loss:.3f} of {len(found)} finished trials")
            if len(found) > 2:
                self.candidates += _geometric_mean("mean of trials", [(space, one.allocation) for one in found[:3]])
        even = (space, start.allocation)
        for stage, allocation in (("half elimination", eliminated), ("half knapsack", improved)):
            self.candidates += _geometric_mean(stage, [(space, allocation), even])
        self.slope = self._slope(evaluator, space, improved, improved_losses)

    def _trial(self, number: int) -> None:
        """A trial begins."""
        self.progress.label(f"trial {number + 1}/{self.effort.trials}")
        self.progress.step()

    def _keep(self, candidate: Candidate) -> None:
        """A stage's latest result."""
        self.candidates = [one for one in self.candidates if one.stage != candidate.stage] + [candidate]

    def _ship(self, split: str) -> Plan:
        """The finalists on a split; the plan of the lowest objective there."""
        session, progress = self.session, self.progress
        evaluator = session.evaluator(split, self.scorings)
        self._stage("finalists")
        assert self.best_uniform is not None
        finals = []
        for candidate in (self.best_uniform, *self.candidates):
            losses = evaluator.evaluate(candidate.space, candidate.allocation)
            finals.append((candidate, losses))
            self._say(f"  {candidate.stage}", losses)
            progress.step()
        full, uniform = evaluator.full(), finals[0][1]
        winner, losses = min(finals, key=lambda final: final[1].mean(self.objective))
        self.record["finalists"] = [{"stage": c.stage, **_means(loss)} for c, loss in finals]
        search_evaluator = session.evaluator("search", self.scorings)
        self.record["search_evaluations"] = search_evaluator.spent
        on_search = search_evaluator.evaluate(winner.space, winner.allocation)
        self.record["optimism"] = losses.mean(self.objective) - on_search.mean(self.objective)
        gain = interval(losses, "ce", minus=uniform)
        progress.say(
            f"{winner.stage} ships: cross-entropy {losses.mean('ce'):.3f} (full {full.mean('ce'):.3f}, "
            f"best uniform {uniform.mean('ce'):.3f}; difference {gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}])"
        )
        calibration = Calibration(
            objective=self.objective,
            seed=self.options.seed,
            context_tokens=session.calibration_tokens,
            data=self.options.data.record(),
            measured_on="search" if split == "search" else "validation",
            stopped=session.stopped,
            hashes={name: split.hash for name, split in session.splits.items()},
            samples=dict(session.samples),
            cross_entropy=_compare("ce", full, losses, uniform),
            kl=_compare("kl", full, losses, uniform),
            improvement_on_best_uniform=gain,
            loss_to_full=interval(losses, "ce", minus=full),
            worst_tenth={
                name: round(one.tail("ce"), 6)
                for name, one in (("full", full), ("plan", losses), ("best_uniform", uniform))
            },
            by_kind={"full": full.by_kind(), "plan": losses.by_kind(), "best_uniform": uniform.by_kind()},
            winner=winner.stage,
            lambda_nats_per_mib=_rounded(self.slope),
            beta=_rounded(lagrangian.beta(self.slope)),
            best_uniform=self.best_uniform.stage,
            versions=_versions(),
            search=_rounded(self.record),
        )
        return self._stretched(winner, calibration)

    def _stretched(self, winner: Candidate, calibration: Calibration) -> Plan:
        """The plan of what was found, at the length it is for: each layer keeps the same share of it."""
        if self.shipped is self.space:
            return winner.space.plan(winner.allocation, calibration)
        at = replace(winner.space, requested=self.shipped.requested, context_tokens=self.shipped.context_tokens)
        at = with_format(at, winner.allocation[0].format, self.session.reserve_tokens)
        allocation = at.project([float(c.tokens) for c in winner.allocation], [c.format for c in winner.allocation])
        assert allocation is not None, "what fits a short context fits the same share of a long one"
        measured = [[choice.tokens, choice.format] for choice in winner.allocation]
        search = {
            **calibration.search,
            "measured_allocation": measured,
            "measured_reserve_tokens": winner.space.decode.reserve_tokens,
        }
        stretched = at.plan(allocation, calibration.model_copy(update={"search": search}))
        return stretched.model_copy(update={"extrapolated": True})

    def _grid(self, evaluator: Evaluator) -> Setting:
        """Measure the uniform settings. The one of lowest cross-entropy is what the plan must beat; the search starts
        there too, or at the next one that is below 16 bit with the search's window and gives every layer as much."""
        self._stage("uniform grid")
        rows = []
        for setting in self.grid:
            rows.append((setting, evaluator.evaluate(setting.space, setting.allocation)))
            self.progress.step()
        self._say("full cache", evaluator.full())
        best, best_losses = min(rows, key=lambda row: row[1].mean("ce"))
        self.best_uniform = Candidate(best.name, best.space, best.allocation)
        self._say(f"best uniform    {best.name}", best_losses)
        self.record["grid"] = [
            {
                "setting": setting.name,
                "tokens": setting.allocation[-1].tokens,
                "bytes": setting.space.bytes(setting.allocation),
                **_means(losses),
            }
            for setting, losses in rows
        ]
        window = self.space.window
        whole = [row for row in rows if row[0].format != "16bit" and row[0].space.window == window and _is_even(row[0])]
        return min(whole, key=lambda row: row[1].mean("ce"))[0]

    def _slope(self, evaluator: Evaluator, space: Space, allocation: Allocation, losses: Losses) -> float:
        """lambda = -dD/dR: nats that a tenth more budget saves, per MiB, all layers growing alike.

        losses: the allocation's own, on the same samples.
        """
        larger_space = replace(space, requested=f"{int(space.limit_bytes * 1.1)}B")
        weights = [float(choice.tokens) for choice in allocation]
        larger = larger_space.project(weights, [choice.format for choice in allocation])
        assert larger is not None
        loss = evaluator.evaluate(larger_space, larger).mean(self.objective)
        return lagrangian.slope(losses.mean(self.objective), space.bytes(allocation), loss, space.bytes(larger))

    def _say(self, what: str, losses: Losses) -> Losses:
        if what != "full cache":
            self.progress.best(self.objective, losses.mean(self.objective))
        self.progress.say(
            f"{what:<15} cross-entropy {losses.mean('ce'):.3f}  kl {losses.mean('kl'):.3f}  "
            f"exact answers {100 * losses.mean('exact'):.0f} %"
        )
        return losses


def _scorings(grid: Sequence[Setting]) -> list[Scoring]:
    return list(dict.fromkeys(Scoring.of(s.space.scorer, s.space.sinks, s.space.window) for s in grid))


def _is_even(setting: Setting) -> bool:
    """Whether it gives every layer as much: the pyramid does not."""
    return " uniform " in setting.name


def _versions() -> dict[str, str]:
    return {package: version(package) for package in ("qpkv", "torch", "transformers", "optuna")}


def _geometric_mean(stage: str, members: Sequence[tuple[Space, Allocation]]) -> list[Candidate]:
    """The members' tokens' geometric mean in the first one's space and formats, if it fits."""
    space, first = members[0]
    columns = zip(*([choice.tokens for choice in allocation] for _, allocation in members), strict=True)
    weights = [math.exp(sum(map(math.log, tokens)) / len(tokens)) for tokens in columns]
    allocation = space.project(weights, [choice.format for choice in first])
    return [] if allocation is None else [Candidate(stage, space, allocation)]


def _means(losses: Losses) -> dict[str, float]:
    return {"cross_entropy": losses.mean("ce"), "kl": losses.mean("kl"), "exact": losses.mean("exact")}


def _compare(measure: str, full: Losses, plan: Losses, uniform: Losses) -> Comparison:
    return Comparison(
        full=interval(full, measure), plan=interval(plan, measure), best_uniform=interval(uniform, measure)
    )


def _rounded(value: Any) -> Any:
    """Floats with six decimals: what a reader can use, the same on every run."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value
