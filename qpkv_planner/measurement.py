"""What an allocation costs: cross-entropy and KL of a plan on prepared samples, in one batched forward.

Every evaluation runs the runtime's own cache: blocks made by its compression code, continuations written through its
append path. A layer's block is made once per (scoring, choice, part of the samples) and kept packed.

Loss: mean over a sample's tokens, mean over the samples of a kind, mean over kinds; nats.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations, pairwise
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from qpkv_planner.allocation import Allocation, Space
from qpkv_planner.bootstrap import cluster_means
from qpkv_planner.journal import Entry, Journal
from qpkv_planner.one_row import Watch, one_row
from qpkv_planner.prefill import Prepared, output_logits
from qpkv_planner.side_by_side import side_by_side
from qpkv_planner.workers import Workers, can_fork
from qpkv_runtime.cache import PlannedCache, layer_devices, runs_on
from qpkv_runtime.compression import CodedValues, Scoring, Selection, compress, keep
from qpkv_runtime.errors import NumericsError
from qpkv_runtime.ledger import LayerLedger
from qpkv_runtime.plan import Comparison, Interval, Plan, TensorFormat
from qpkv_runtime.quantizers import stands_alone

Objective = Literal["kl", "ce"]
NUM_RESAMPLES = 2000
LEAST_SHARE = 4  # samples of each part that are worth a worker

Work = Callable[..., Mapping[str, NDArray[Any]]]
"""(evaluator, space, allocation, parts, and what else is given) -> arrays whose first dimension is the samples."""


@dataclass(frozen=True)
class Losses:
    """Per sample: mean cross-entropy and KL to the full cache in nats per token, and whether every token of the
    continuation is the most likely one. kinds, contexts: as in Prepared, of these samples."""

    ce: NDArray[np.float64]
    kl: NDArray[np.float64]
    exact: NDArray[np.bool_]
    kinds: tuple[str, ...]
    contexts: tuple[int, ...]

    @classmethod
    def of(cls, values: Mapping[str, Sequence[float]], kinds: Sequence[str], contexts: Sequence[int]) -> Losses:
        """values: ce, kl and exact, the share of a continuation's tokens that are the most likely ones."""
        exact = np.array(values["exact"]) == 1.0
        return cls(np.array(values["ce"]), np.array(values["kl"]), exact, tuple(kinds), tuple(contexts))

    @property
    def values(self) -> dict[str, list[float]]:
        """What `of` takes."""
        return {"ce": self.ce.tolist(), "kl": self.kl.tolist(), "exact": self.exact.astype(float).tolist()}

    def of_contexts(self, contexts: Iterable[int]) -> Losses:
        """Those of the samples that belong to these contexts."""
        wanted = set(contexts)
        return self._of([row for row, context in enumerate(self.contexts) if context in wanted])

    def of_kinds(self, kinds: Iterable[str]) -> Losses:
        """Those of the samples that are of these kinds."""
        wanted = set(kinds)
        return self._of([row for row, kind in enumerate(self.kinds) if kind in wanted])

    def counted(self, measure: str) -> Losses:
        """Those of the samples that `measure` is about: texts have no exact answer."""
        return self.of_kinds(set(self.kinds) - {"text"}) if measure == "exact" else self

    def _of(self, rows: list[int]) -> Losses:
        kinds, contexts = tuple(self.kinds[row] for row in rows), tuple(self.contexts[row] for row in rows)
        return Losses(self.ce[rows], self.kl[rows], self.exact[rows], kinds, contexts)

    def mean(self, measure: str) -> float:
        """The loss `ce` or `kl`, or the share of `exact` answers: mean over kinds of means."""
        counted = self.counted(measure)
        kinds = np.array(counted.kinds)
        values = np.asarray(getattr(counted, measure), dtype=np.float64)
        names = sorted(set(counted.kinds))
        return float(np.mean([values[kinds == kind].mean() for kind in names])) if names else float("nan")

    def tail(self, measure: str) -> float:
        """The mean of the worst tenth of the samples (at least one)."""
        values = np.sort(np.asarray(getattr(self, measure)))
        return float(values[-max(1, len(values) // 10) :].mean())

    def by_kind(self) -> dict[str, dict[str, float]]:
        kinds = np.array(self.kinds)
        measures = (("cross_entropy", self.ce), ("kl", self.kl), ("exact", self.exact))
        return {
            kind: {name: round(float(np.asarray(values)[kinds == kind].mean()), 4) for name, values in measures}
            for kind in sorted(set(self.kinds))
        }


class Change(NamedTuple):
    """Of a loss, in nats: the mean over kinds of the samples' means, and its standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, changes: NDArray[np.float64], kinds: Sequence[str]) -> Change:
        """Of the samples' changes. A kind of one sample is taken to vary as all do."""
        names = np.array(kinds)
        groups = [changes[names == kind] for kind in sorted(set(kinds))]
        variances = [(group if len(group) > 1 else changes).var() / len(group) for group in groups]
        return cls(float(np.mean([group.mean() for group in groups])), float(np.sqrt(sum(variances))) / len(groups))

    def cautious(self, num_errors: float = 1.0) -> float:
        """So many standard errors worse than its mean: a search that picks the best of many noisy changes picks noise,
        and then only changes that the samples agree on look good."""
        return self.mean + num_errors * self.error


def interval(losses: Losses, measure: str, minus: Losses | None = None, seed: int = 0) -> Interval:
    """`Losses.mean` of a measure, or of its paired difference to `minus` on the same samples: a 95 % bootstrap over
    contexts."""
    losses, minus = losses.counted(measure), minus and minus.counted(measure)
    values = np.asarray(getattr(losses, measure), dtype=np.float64)
    if minus is not None:
        values = values - np.asarray(getattr(minus, measure), dtype=np.float64)
    contexts = np.unique(losses.contexts)
    kinds = sorted(set(losses.kinds))
    sums, counts = np.zeros((2, len(contexts), len(kinds)))
    place = {context: i for i, context in enumerate(contexts)}
    for value, kind, context in zip(values, losses.kinds, losses.contexts, strict=True):
        sums[place[context], kinds.index(kind)] += value
        counts[place[context], kinds.index(kind)] += 1
    means = np.nanmean(cluster_means(sums, counts, NUM_RESAMPLES, seed), axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    mean = float(np.mean(sums.sum(0) / counts.sum(0)))
    return Interval(mean=round(mean, 6), low=round(float(low), 6), high=round(float(high), 6))


def compare(measure: str, full: Losses, plan: Losses, best_uniform: Losses) -> Comparison:
    """Each one's mean of a measure, with its interval."""
    return Comparison(
        full=interval(full, measure), plan=interval(plan, measure), best_uniform=interval(best_uniform, measure)
    )


def worst_tenth(full: Losses, plan: Losses, best_uniform: Losses) -> dict[str, float]:
    """Each one's mean cross-entropy of the worst tenth of the samples."""
    losses = {"full": full, "plan": plan, "best_uniform": best_uniform}
    return {name: round(one.tail("ce"), 6) for name, one in losses.items()}


class OutOfTime(Exception):  # noqa: N818 (a reason to stop, not an error)
    """An evaluator's deadline has passed."""


@dataclass
class Evaluator:
    """Evaluates allocations on one prepared split. Whatever `journal` holds is not measured again. On a CPU the samples
    are divided among as many processes as torch uses threads.

    spent: evaluations asked for so far, in units of one forward of all samples through all layers; deadline: the
    `time.monotonic()` after which nothing is measured any more and OutOfTime raised.
    """

    model: PreTrainedModel
    prepared: Prepared
    journal: Journal = field(default_factory=Journal)
    memo_bytes: int = 2 * 2**30
    spent: float = 0.0
    deadline: float | None = None
    _blocks: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)
    _coded: dict[tuple[Any, ...], CodedValues] = field(default_factory=dict)
    _num_coded: dict[tuple[Any, ...], int] = field(default_factory=dict)  # where all are not: how many have been
    _held_bytes: int = 0
    _workers: Workers | None = None

    def __post_init__(self) -> None:
        self._part_rows = [range(start, end) for start, end in pairwise(self.prepared.part_starts)]
        self._decoder = cast(Any, self.model.get_decoder())
        self._devices = layer_devices(self.model)
        self._full_probabilities = self.prepared.full_logprobs.exp()
        self._full_entropy = -(self._full_probabilities * self.prepared.full_logprobs).sum(-1)

    # --- what the searches call ---

    @property
    def parts(self) -> tuple[int, ...]:
        """All parts of the samples."""
        return tuple(range(len(self._part_rows)))

    def evaluate(self, space: Space, allocation: Allocation, parts: Sequence[int] | None = None) -> Losses:
        """The losses of an allocation on these parts of the samples (all)."""
        parts = tuple(parts or self.parts)
        rows = self.rows(parts)

        def measure() -> dict[str, list[float]]:
            return _values(self.divided(_allocation_losses, space, allocation, parts))

        return self._of_rows(self.recalled({}, space, allocation, parts, 1.0, measure), rows)

    def recalled(
        self, about: Mapping[str, Any], space: Space, allocation: Allocation, parts: Sequence[int], forwards: float,
        measure: Callable[[], Mapping[str, list[float]]],
    ) -> Mapping[str, list[float]]:  # fmt: skip
        """What the journal holds of an allocation on these parts, else what `measure` gives and it is then to hold.

        about: what it is, besides a measurement of losses; forwards: what it takes, counted either way. Raises
        OutOfTime for what would have to be measured after the deadline.
        """
        rows = self.rows(parts)
        self.spent += forwards * len(rows) / len(self.prepared)
        samples = {"split": self.prepared.hash, "samples": list(_row_key(rows))}
        what = {**about, **samples, **space.key(allocation)}
        entry = self.journal.get(what)
        if entry is not None:
            return entry.values
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise OutOfTime
        values = measure()
        self.journal.put(what, values)
        return values

    @torch.no_grad()
    def evaluate_plan(self, plan: Plan) -> Losses:
        """The losses of any plan on all samples, whatever its tiers; keeps no blocks for later."""
        scoring, rows = Scoring.of(plan.scorer, plan.sinks, plan.window), self.rows(self.parts)
        cache = PlannedCache(plan, self._devices)
        for layout in cache.ledger.layers:
            blocks = [self._compress(plan, scoring, layout, part) for part in self.parts]
            cast(Any, cache.layers[layout.layer]).load(torch.cat(blocks), self.prepared.prompt_tokens)
        return self._of_rows(_values(self.sample_losses(self.forward(cache, rows), rows)), rows)

    def full(self) -> Losses:
        """The full cache's own losses."""
        rows = list(range(len(self.prepared)))
        return self._of_rows(_values(self.sample_losses_of(self.prepared.full_logprobs, rows)), rows)

    def journalled(self) -> Iterator[tuple[Entry, Losses]]:
        """Every measurement of losses on this split that the journal holds, oldest first; one of a part of the samples
        has fewer losses."""
        subsets = (parts for count in self.parts for parts in combinations(self.parts, count + 1))
        rows_of = {_row_key(rows): rows for rows in map(self.rows, subsets)}
        for entry in self.journal.entries.values():
            if entry.what["split"] == self.prepared.hash and "ce" in entry.values:
                yield entry, self._of_rows(entry.values, rows_of[tuple(entry.what["samples"])])

    def forget(self) -> None:
        """Drop the blocks that were made: another budget has few of them."""
        if self._workers is None:
            self._forget()
        else:
            self._workers.run(Evaluator._forget)

    # --- what they are made of ---

    def divided(
        self, work: Work, space: Space, allocation: Allocation, parts: Sequence[int], *more: Any
    ) -> dict[str, NDArray[Any]]:
        """work(self, space, allocation, parts, *more), done by the workers on a share of every part each where there
        are some. work: a function of a module, and nothing that it is given is a tensor."""
        if self._workers is None:
            number = self._num_workers
            if number == 1:
                return dict(work(self, space, allocation, parts, *more))
            self._workers = Workers(number, partial(self._become, number))
            weakref.finalize(self, self._workers.close)
        number = len(self._workers)
        answers = self._workers.run(work, space, allocation, parts, *more)
        rows = [row for worker in range(number) for part in parts for row in self._share(part, worker, number)]
        places = {row: place for place, row in enumerate(rows)}
        order = [places[row] for row in self.rows(parts)]
        return {name: np.concatenate([answer[name] for answer in answers])[order] for name in answers[0]}

    @property
    def _num_workers(self) -> int:
        """Of which each has something of every part."""
        if runs_on(self.model).type != "cpu" or not can_fork():
            return 1
        return max(1, min(torch.get_num_threads(), min(map(len, self._part_rows)) // LEAST_SHARE))

    def _share(self, part: int, worker: int, number: int) -> range:
        """A worker's rows of a part."""
        rows = self._part_rows[part]
        return rows[len(rows) * worker // number : len(rows) * (worker + 1) // number]

    def _become(self, number: int, worker: int) -> Evaluator:
        """Makes this evaluator, a copy in a process of its own, one of so many workers."""
        self._part_rows = [self._share(part, worker, number) for part in self.parts]
        self.memo_bytes //= number
        self._blocks, self._coded, self._num_coded, self._held_bytes = {}, {}, {}, 0
        return self

    def _forget(self) -> None:
        self._blocks.clear()
        self._held_bytes = sum(held.nbytes for held in self._coded.values())

    def forward(self, cache: PlannedCache, rows: list[int], watch: Watch | None = None) -> Tensor:
        """The inputs of these samples over their compressed prompts, all in one row -> [1, inputs, hidden].

        Raises NumericsError, naming the first layer and the plan, where that is not finite.
        """
        inputs, device = [self.prepared.inputs[row] for row in rows], runs_on(self.model)
        ids = torch.tensor([[token for sample in inputs for token in sample]], device=device)
        starts = [self.prepared.prompt_tokens[row] for row in rows]
        positions = torch.cat([start + torch.arange(len(sample)) for start, sample in zip(starts, inputs, strict=True)])
        batch = one_row(cache, [len(sample) for sample in inputs], watch)
        is_finite: list[Tensor] = []

        def look(module: nn.Module, given: Any, out: Any) -> None:
            is_finite.append((out[0] if isinstance(out, tuple) else out).isfinite().all())

        hooks = [layer.register_forward_hook(look) for layer in self._decoder.layers]
        try:
            hidden: Tensor = self._decoder(
                ids, position_ids=positions[None].to(device), past_key_values=batch
            ).last_hidden_state
        except NumericsError as error:  # what a layer was given could not be appended
            fault = str(error) if all(is_finite) else ""
            raise NumericsError(_first_fault([bool(one) for one in is_finite], cache.plan, fault)) from None
        finally:
            for hook in hooks:
                hook.remove()
        if not bool(hidden.isfinite().all()):
            raise NumericsError(_first_fault([bool(one) for one in is_finite], cache.plan))
        return hidden

    def rows(self, parts: Sequence[int]) -> list[int]:
        """The samples of these parts."""
        return [row for part in parts for row in self._part_rows[part]]

    def cache(self, space: Space, allocation: Allocation, parts: Sequence[int]) -> PlannedCache:
        """The runtime's cache as if these samples had just been prefilled."""
        plan = space.probe(allocation)
        cache = PlannedCache(plan, self._devices)
        prompt_tokens = [self.prepared.prompt_tokens[row] for row in self.rows(parts)]
        blocks = self.blocks(space, plan, allocation, cache.ledger.layers, parts)
        for layer, block in zip(cache.layers, blocks, strict=True):
            cast(Any, layer).load(block, prompt_tokens)
        return cache

    def blocks(
        self, space: Space, plan: Plan, allocation: Allocation, layouts: Sequence[LayerLedger], parts: Sequence[int]
    ) -> list[Tensor]:
        """These layers' packed blocks of these parts' samples; what has not been made before, side by side.

        plan: the probe of the allocation, which the layouts are of.
        """
        scoring = Scoring.of(space.scorer, space.sinks, space.window)
        keys = {
            (layout.layer, part): (
                scoring, plan.heads_of(layout.layer), space.decode.format, space.decode.reserve_tokens,
                layout.layer, allocation[layout.layer], part,
            )
            for layout in layouts
            for part in parts
        }  # fmt: skip
        made = {place: self._blocks[key] for place, key in keys.items() if key in self._blocks}
        missing = [(layout, part) for layout in layouts for part in parts if (layout.layer, part) not in made]
        new = side_by_side(lambda one: self._compress(plan, scoring, *one), missing, runs_on(self.model))
        for (layout, part), block in zip(missing, new, strict=True):
            made[layout.layer, part] = block
            self._remember(keys[layout.layer, part], block)
        return [torch.cat([made[layout.layer, part] for part in parts]) for layout in layouts]

    def _remember(self, key: tuple[Any, ...], block: Tensor) -> None:
        self._held_bytes += block.nbytes
        while self._held_bytes > self.memo_bytes and self._blocks:
            self._held_bytes -= self._blocks.pop(next(iter(self._blocks))).nbytes
        self._blocks[key] = block

    def _compress(self, plan: Plan, scoring: Scoring, layout: LayerLedger, part: int) -> Tensor:
        """From wherever the prefill is to the device that the layer runs on."""
        prepared, layer = self.prepared, self.prepared.layers[layout.layer]
        rows = slice(self._part_rows[part].start, self._part_rows[part].stop)
        device = self._devices[layout.layer]
        scored, token_rows = layer.scored[scoring], prepared.token_rows[rows]
        selections = keep(plan, layout.layer, scored.ranking.of_rows(rows).to(device))
        num_rows, num_tokens = token_rows.shape
        padding = [num_tokens - tokens for tokens in prepared.prompt_tokens[rows]]
        # a part holds whole contexts: what its samples look at lies together
        first = min(int(row[skipped]) for row, skipped in zip(token_rows, padding, strict=True))
        keys, values = (x[first : int(token_rows.max()) + 1].to(device) for x in (layer.keys, layer.values))
        token_rows = (token_rows - first).clamp(min=0)
        keys, values = (x.transpose(0, 1).expand(num_rows, -1, -1, -1) for x in (keys, values))
        coded = self._coded_values(layout, part, values[0], selections)
        block = torch.zeros(num_rows, layout.stored_bytes, dtype=torch.uint8, device=device)
        compress(
            block, layout, plan.model.storage_dtype, keys, values, selections, padding,
            scored.query_stats[rows].to(device), token_rows.to(device), coded,
        )  # fmt: skip
        return block

    def _coded_values(
        self, layout: LayerLedger, part: int, values: Tensor, selections: Sequence[Selection]
    ) -> dict[TensorFormat, CodedValues]:
        """On a CPU all of a part's values [H_kv, N, D], coded once for every allocation: what a value is written as
        does not depend on what else is kept. That is done once as many have been coded one by one, while there is room.

        selections: what is to be coded now.
        """
        found: dict[TensorFormat, CodedValues] = {}
        if values.device.type != "cpu":
            return found
        for format in {format.values for format in layout.tier_formats}:
            key = (layout.layer, part, format)
            if key not in self._coded and stands_alone(format):
                num_kept = sum(int(selection.counts.sum()) for selection in selections)
                self._num_coded[key] = self._num_coded.get(key, 0) + num_kept
                if self._num_coded[key] > math.prod(values.shape[:2]) and self._has_room(values):
                    self._coded[key] = CodedValues.of(values, format)
                    self._held_bytes += self._coded[key].nbytes
            if key in self._coded:
                found[format] = self._coded[key]
        return found

    def _has_room(self, values: Tensor) -> bool:
        """Whether these values, a byte each when coded, fit the half of the memo that coded ones may take."""
        return sum(held.nbytes for held in self._coded.values()) + values.numel() <= self.memo_bytes // 2

    def sample_losses(self, hidden: Tensor, rows: list[int]) -> dict[str, Tensor]:
        """hidden: [1, inputs, hidden], after the final norm -> what `Losses.of` takes, [samples] each; `ce` and `kl`
        can be differentiated. Only the tokens that are measured get logits."""
        ends = np.cumsum([len(self.prepared.inputs[row]) for row in rows])
        lengths = [len(self.prepared.targets[row]) for row in rows]
        measured = torch.cat([hidden[0, end - length : end] for end, length in zip(ends, lengths, strict=True)])
        return self.sample_losses_of(output_logits(self.model, measured).to(self.prepared.full_logprobs.device), rows)

    def sample_losses_of(self, logits: Tensor, rows: list[int]) -> dict[str, Tensor]:
        """logits: [sum of these rows' targets, V]. Raises NumericsError where they are not finite.

        KL(p || q) = sum p log p - sum p logits + log sum exp logits: one product with what the full cache gave, and no
        log-probabilities of the size of the vocabulary.
        """
        prepared = self.prepared
        normalizer = logits.logsumexp(-1)
        if not bool(normalizer.isfinite().all()):
            raise NumericsError("the logits must be finite, got NaN or Inf from the output head: every layer's are")
        targets = torch.tensor([token for row in rows for token in prepared.targets[row]], device=logits.device)
        ce = normalizer - logits.gather(1, targets[:, None])[:, 0]
        starts = np.concatenate([[0], np.cumsum([len(target) for target in prepared.targets])])
        expected, at = [], 0
        for first, last in _runs(rows):
            of_full = slice(int(starts[first]), int(starts[last]))
            here = slice(at, at + of_full.stop - of_full.start)
            at = here.stop
            products = torch.bmm(self._full_probabilities[of_full, None], logits[here, :, None])[:, 0, 0]
            expected.append(products + self._full_entropy[of_full])
        kl = (normalizer - torch.cat(expected)).clamp(min=0)
        hit = logits.argmax(-1) == targets
        lengths = [len(prepared.targets[row]) for row in rows]
        measures = (("ce", ce), ("kl", kl), ("exact", hit))
        return {name: torch.stack([part.double().mean() for part in x.split(lengths)]) for name, x in measures}

    def _of_rows(self, values: Mapping[str, Sequence[float]], rows: list[int]) -> Losses:
        prepared = self.prepared
        return Losses.of(values, [prepared.kinds[row] for row in rows], [prepared.contexts[row] for row in rows])


@torch.no_grad()
def _allocation_losses(
    evaluator: Evaluator, space: Space, allocation: Allocation, parts: Sequence[int]
) -> dict[str, NDArray[Any]]:
    """As `Losses.of` takes them."""
    rows = evaluator.rows(parts)
    losses = evaluator.sample_losses(evaluator.forward(evaluator.cache(space, allocation, parts), rows), rows)
    return {name: of_samples.numpy(force=True) for name, of_samples in losses.items()}


def _values(losses: Mapping[str, Tensor | NDArray[Any]]) -> dict[str, list[float]]:
    return {name: of_samples.tolist() for name, of_samples in losses.items()}


def _row_key(rows: list[int]) -> tuple[int, ...]:
    """What the journal calls the samples of some parts: of each stretch of them the first and the last + 1."""
    return tuple(end for stretch in _runs(rows) for end in stretch)


def _first_fault(is_finite: list[bool], plan: Plan, fault: str = "") -> str:
    """is_finite: of each layer's output, none of a later stage's; fault: what went wrong where they all are."""
    if all(is_finite):
        return f"{fault or 'the final norm must give finite numbers, got NaN or Inf'} (under plan {plan.policy_hash})"
    layer = is_finite.index(False)
    tiers = " + ".join(f"{tier.tokens} tokens in {tier.format}" for tier in plan.layers[layer].tiers)
    return (
        f"layer {layer} must give finite numbers, got NaN or Inf under plan {plan.policy_hash} ({plan.scorer.name}; "
        f"this layer {tiers}): load the model in float32 or bfloat16"
    )


def _runs(rows: list[int]) -> Iterator[tuple[int, int]]:
    """Ascending stretches of consecutive rows, as (first, last + 1)."""
    first = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] != rows[i - 1] + 1:
            yield rows[first], rows[i - 1] + 1
            first = i
