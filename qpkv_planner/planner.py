"""From a model and a budget to a plan: calibration, uniform grid, elimination, knapsack, Optuna, validation.

Every stage works on the search split and hands the next one its allocation; the stages' results meet on the
validation split and the lowest objective there ships, with the paired interval of its cross-entropy against the best
uniform setting. What each stage predicted and measured goes into the plan's `calibration.search`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qpkv_planner import search
from qpkv_planner.allocation import DEFAULT_CONTEXT_TOKENS, Allocation, Space, format_named, model_section
from qpkv_planner.calibration import Context, Split, make_split
from qpkv_planner.elimination import eliminate
from qpkv_planner.grid import FORMATS, QUICK_FORMATS, Setting, make_grid, with_format
from qpkv_planner.heads import measure_heads
from qpkv_planner.knapsack import improve
from qpkv_planner.measurement import Evaluator, Losses, Objective, interval
from qpkv_planner.prefill import largest_number, prepare
from qpkv_planner.progress import Progress
from qpkv_runtime.attention import NAME
from qpkv_runtime.compression import Scoring
from qpkv_runtime.errors import InputError, UnsupportedModelError
from qpkv_runtime.methods import SHARINGS
from qpkv_runtime.models import model_identity, model_shape
from qpkv_runtime.plan import Calibration, Comparison, Decode, Heads, Model, Plan, Scorer

QUICK_CONTEXT_TOKENS = 1024
FLOAT16_ROOM = 2.0**15  # a larger key or value in calibration and float16 could overflow on other text


@dataclass(frozen=True)
class Effort:
    """How much a search does. times_budget: where elimination starts."""

    search_contexts: int
    validation_contexts: int
    num_parts: int
    formats: tuple[str, ...]
    scorers: tuple[str, ...]
    windows: tuple[int, ...]
    times_budget: float
    rounds: int
    parts_per_round: int
    trials: int


QUICK = Effort(12, 9, 3, QUICK_FORMATS, ("snapkv",), (16,), 2.5, 1, 2, 10)
THOROUGH = Effort(18, 24, 3, FORMATS, ("snapkv", "knorm", "streamingllm"), (16, 8, 32), 4.0, 4, 2, 24)


@dataclass(frozen=True)
class Candidate:
    """A finalist: the stage that made it (or the uniform setting's name), and what makes it a plan."""

    stage: str
    space: Space
    allocation: Allocation


def plan(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    budget: str,
    *,
    name: str | None = None,
    context_tokens: int | None = None,
    calibration_tokens: int | None = None,
    quick: bool = False,
    objective: Objective = "kl",
    max_new_tokens: int | None = None,
    then: str = "evict",
    sinks: int = 4,
    window: int = 16,
    heads: str = "uniform",
    trials: int | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> Plan:
    """Search for the plan of `model` under `budget` (`1/64`, `1.6%`, `512MiB`, per sequence).

    model: loaded with attn_implementation="qpkv" (`qpkv_runtime.load_model` does). name: recorded as model.id, for
    `qpkv-run` to load it by. context_tokens: the length a ratio refers to, 2048 (quick: 1024) or the model's if that
    is smaller; calibration_tokens: the length of the calibration contexts, the same unless given. max_new_tokens: the
    reserve's size. heads: how KV heads share a layer's tokens (uniform, adaptive, or weighted, measured on the search
    contexts). The same arguments, model and machine give the same plan, byte for byte.

    Raises BudgetError when the budget cannot hold sinks, window and reserve; NumericsError when the model gives NaN.
    """
    effort = QUICK if quick else THOROUGH
    if trials is not None:
        effort = replace(effort, trials=trials)
    if model.config._attn_implementation != NAME:
        raise UnsupportedModelError(f"planning needs qpkv attention: call model.set_attn_implementation('{NAME}')")
    shape = model_shape(model)
    default_tokens = QUICK_CONTEXT_TOKENS if quick else DEFAULT_CONTEXT_TOKENS
    context_tokens = context_tokens or min(default_tokens, shape.max_context_tokens)
    calibration_tokens = calibration_tokens or context_tokens
    for what, tokens in (("context length", context_tokens), ("calibration length", calibration_tokens)):
        if not 0 < tokens <= shape.max_context_tokens:
            raise InputError(f"the {what} must be 1 to the model's {shape.max_context_tokens} tokens, got {tokens}")
    splits = {
        split: make_split(tokenizer, split, contexts, calibration_tokens, seed)
        for split, contexts in (("search", effort.search_contexts), ("validation", effort.validation_contexts))
    }
    section = describe(model, tokenizer, name or model.config._name_or_path, splits["search"].contexts[0])
    space = Space(
        model=section,
        requested=budget,
        context_tokens=context_tokens,
        scorer=Scorer(name=effort.scorers[0]),
        sinks=sinks,
        window=window,
        decode=Decode.model_validate({"reserve_tokens": 1, "format": "rotated-k4v4", "then": then}),
    )
    if heads not in SHARINGS:
        raise InputError(f"heads must be one of {', '.join(SHARINGS)}, got {heads!r}")
    shared = measure_heads(model, shape, splits["search"]) if heads == "weighted" else Heads(share=heads)
    space = replace(space, heads=shared)
    low_bit = [format for format in effort.formats if format != "16bit"]
    with_format(space, low_bit[0], max_new_tokens).check_holds(low_bit)
    grid = make_grid(space, effort.scorers, effort.formats, max_new_tokens)
    progress = Progress(_estimated_steps(effort, shape.num_layers), quiet)
    try:
        return _Search(model, space, grid, effort, objective, seed, progress).run(splits)
    finally:
        progress.close()


def describe(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, context: Context) -> Model:
    """The plan's `model` section. `context` is run to see whether float16 can hold the keys and values."""
    shape, identity = model_shape(model), model_identity(model, tokenizer)
    dtype = str(model.dtype).removeprefix("torch.")
    storage_dtype = dtype
    if dtype == "float32":
        storage_dtype = "float16" if largest_number(model, shape, context) < FLOAT16_ROOM else "bfloat16"
    revision = getattr(model.config, "_commit_hash", None)
    return model_section(name, shape, dtype, storage_dtype, revision=revision, **asdict(identity))


def _estimated_steps(effort: Effort, num_layers: int) -> int:
    """Steps of progress: evaluations of about half a forward; a context's prefill counts as four."""
    contexts = 4 * (effort.search_contexts + effort.validation_contexts)
    passes = 3 * math.log2(effort.times_budget) * num_layers
    return int(contexts + 2 * len(effort.formats) + passes + 5 * effort.rounds * num_layers + 2 * effort.trials + 12)


class _Search:
    """One run of the stages."""

    def __init__(
        self, model: PreTrainedModel, space: Space, grid: list[Setting], effort: Effort, objective: Objective,
        seed: int, progress: Progress,
    ) -> None:  # fmt: skip
        self.model, self.space, self.grid, self.effort = model, space, grid, effort
        self.objective, self.seed, self.progress = objective, seed, progress
        self.record: dict[str, Any] = {}

    def run(self, splits: dict[str, Split]) -> Plan:
        space = self.space
        self.progress.say(
            f"budget {space.requested} of {space.context_tokens} tokens: "
            f"{space.limit_bytes:,} of {space.full_bytes:,} bytes"
        )
        best_uniform, candidates, slope = self._search(splits["search"])
        return self._ship(splits, best_uniform, candidates, slope)

    def _search(self, split: Split) -> tuple[Candidate, list[Candidate], float]:
        """The stages on the search split: the best uniform setting, the finalists (two of them pulled half way
        back to uniform: few contexts overfit), and lambda at the knapsack's."""
        evaluator, progress = self._prepare(split), self.progress
        best_uniform, start = self._grid(evaluator)
        space, quantizer = start.space, format_named(start.format).keys.quantizer

        progress.stage("elimination")
        eliminated, passes = eliminate(
            evaluator, space, start.format, self.effort.times_budget, self.objective, progress.step
        )
        self.record["elimination"] = [asdict(one) for one in passes]
        eliminated_losses = evaluator.evaluate(space, eliminated)
        self._say("elimination", eliminated_losses)

        progress.stage("knapsack")
        start_loss = evaluator.evaluate(space, start.allocation).mean(self.objective)
        first = eliminated if eliminated_losses.mean(self.objective) < start_loss else start.allocation
        improved, rounds, sensitivities = improve(
            evaluator,
            space,
            first,
            quantizer,
            self.effort.rounds,
            self.effort.parts_per_round,
            self.objective,
            progress.step,
        )
        self.record["knapsack"] = [{**asdict(one), "accepted": one.is_accepted} for one in rounds]
        improved_losses = evaluator.evaluate(space, improved)
        self._say("knapsack", improved_losses)

        progress.stage("search")
        found = search.refine(
            evaluator, space, improved, sensitivities, quantizer, self.effort.windows, self.effort.trials,
            self.objective, self.seed, lambda: progress.step(2),
        )  # fmt: skip
        candidates = [Candidate("elimination", space, eliminated), Candidate("knapsack", space, improved)]
        self.record["optuna"] = {"trials": self.effort.trials, "finished": len(found)}
        if found:
            best = found[0]
            candidates.append(Candidate("search", best.space, best.allocation))
            gain = improved_losses.mean(self.objective) - best.loss
            self.record["optuna"].update(best=best.loss, parameters=best.parameters, gain_on_knapsack=gain)
            progress.say(f"search          {self.objective} {best.loss:.3f} after {len(found)} finished trials")
        even = Candidate("uniform", space, start.allocation)
        candidates += [mean for one in candidates[:2] for mean in _geometric_mean(even, one)]
        self.record["search_evaluations"] = evaluator.spent
        return best_uniform, candidates, self._slope(evaluator, candidates[1], improved_losses)

    def _ship(
        self, splits: dict[str, Split], best_uniform: Candidate, candidates: list[Candidate], slope: float
    ) -> Plan:
        """The finalists on the validation split; the plan of the lowest objective there."""
        evaluator, progress = self._prepare(splits["validation"]), self.progress
        progress.stage("finalists")
        finals = []
        for candidate in (best_uniform, *candidates):
            losses = evaluator.evaluate(candidate.space, candidate.allocation)
            finals.append((candidate, losses))
            self._say(f"  {candidate.stage}", losses)
            progress.step(2)
        full, uniform = evaluator.full(), finals[0][1]
        winner, losses = min(finals, key=lambda final: final[1].mean(self.objective))
        self.record["finalists"] = [{"stage": c.stage, **_means(loss)} for c, loss in finals]
        gain = interval(losses, "ce", minus=uniform)
        progress.say(
            f"{winner.stage} ships: cross-entropy {losses.mean('ce'):.3f} (full {full.mean('ce'):.3f}, "
            f"best uniform {uniform.mean('ce'):.3f}; difference {gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}])"
        )
        calibration = Calibration(
            objective=self.objective,
            seed=self.seed,
            context_tokens=splits["validation"].context_tokens,
            hashes={name: split.hash for name, split in splits.items()},
            samples=self.record.pop("samples"),
            cross_entropy=_compare("ce", full, losses, uniform),
            kl=_compare("kl", full, losses, uniform),
            improvement_on_best_uniform=gain,
            by_kind={"full": full.by_kind(), "plan": losses.by_kind(), "best_uniform": uniform.by_kind()},
            winner=winner.stage,
            lambda_nats_per_mib=_rounded(slope),
            beta=_rounded(1 / slope) if slope > 0 else None,
            best_uniform=best_uniform.stage,
            versions={package: version(package) for package in ("qpkv", "torch", "transformers", "optuna")},
            search=_rounded(self.record),
        )
        return winner.space.plan(winner.allocation, calibration)

    def _prepare(self, split: Split) -> Evaluator:
        """Prefill a split under every scoring that may be asked for."""
        self.progress.stage(f"prefill {split.name}"[:13])
        scorings = [Scoring.of(s.space.scorer, s.space.sinks, s.space.window) for s in self.grid]
        for scorer in self.effort.scorers:  # the search may start from any of them and try any window
            scorings += [Scoring.of(Scorer(name=scorer), self.space.sinks, window) for window in self.effort.windows]
        prepared = prepare(
            self.model,
            self.space.shape,
            self.space.model.storage_dtype,
            split,
            list(dict.fromkeys(scorings)),
            self.effort.num_parts,
            lambda: self.progress.step(4),
        )
        left_out = sum(prepared.num_unanswerable.values())
        self.record.setdefault("samples", {})[split.name] = {
            "contexts": prepared.num_contexts,
            "samples": len(prepared),
            "unanswerable_share": round(left_out / (left_out + len(prepared)), 4),
        }
        self.progress.say(
            f"{split.name}: {len(prepared)} samples of {prepared.num_contexts} contexts "
            f"({left_out} questions left out, which the full cache cannot answer)"
        )
        return Evaluator(self.model, prepared)

    def _grid(self, evaluator: Evaluator) -> tuple[Candidate, Setting]:
        """Measure the uniform settings. The one of lowest cross-entropy is what the plan must beat; the one of lowest
        objective below 16 bit is where the search starts."""
        self.progress.stage("uniform grid")
        rows = []
        for setting in self.grid:
            rows.append((setting, evaluator.evaluate(setting.space, setting.allocation)))
            self.progress.step(2)
        self._say("full cache", evaluator.full())
        best, best_losses = min(rows, key=lambda row: row[1].mean("ce"))
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
        whole = [row for row in rows if row[0].format != "16bit" and row[0].space.window == self.space.window]
        start = min(whole, key=lambda row: row[1].mean(self.objective))[0]
        return Candidate(best.name, best.space, best.allocation), start

    def _slope(self, evaluator: Evaluator, candidate: Candidate, losses: Losses) -> float:
        """lambda = -dD/dR: nats that a tenth more budget saves, per MiB, all layers growing alike.

        losses: the candidate's own, on the same samples.
        """
        here = losses.mean(self.objective)
        roomier = replace(candidate.space, requested=f"{int(candidate.space.limit_bytes * 1.1)}B")
        weights = [float(choice.tokens) for choice in candidate.allocation]
        larger = roomier.project(weights, [choice.format for choice in candidate.allocation])
        assert larger is not None
        more = roomier.bytes(larger) - candidate.space.bytes(candidate.allocation)
        return (here - evaluator.evaluate(roomier, larger).mean(self.objective)) / max(more, 1) * 2**20

    def _say(self, what: str, losses: Losses) -> None:
        self.progress.say(
            f"{what:<15} cross-entropy {losses.mean('ce'):.3f}  kl {losses.mean('kl'):.3f}  "
            f"exact answers {100 * losses.mean('exact'):.0f} %"
        )


def _geometric_mean(one: Candidate, two: Candidate) -> list[Candidate]:
    """Half way from one to two: their tokens' geometric mean in the second one's formats, if it fits."""
    weights = [math.sqrt(a.tokens * b.tokens) for a, b in zip(one.allocation, two.allocation, strict=True)]
    allocation = two.space.project(weights, [choice.format for choice in two.allocation])
    return [] if allocation is None else [Candidate(f"half {two.stage}", two.space, allocation)]


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
