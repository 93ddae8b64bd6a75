"""What an allocation costs: cross-entropy and KL of a plan on prepared samples, in one batched forward.

Every evaluation runs the runtime's own cache: blocks made by its compression code, continuations written through its
append path. A layer's block is made once per (scoring, choice, part of the samples) and kept packed. When one layer
changes, the forward starts there, from the incumbent's hidden states.

Loss: mean over a sample's tokens, mean over the samples of a kind, mean over kinds; nats.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from qpkv_planner.allocation import Allocation, Choice, Space
from qpkv_planner.journal import Journal
from qpkv_planner.prefill import Prepared
from qpkv_runtime.attention import Handle
from qpkv_runtime.cache import PlannedCache, PlannedLayer, layer_devices, runs_on
from qpkv_runtime.compression import Scoring, TierTensors, keep, write_block
from qpkv_runtime.errors import NumericsError
from qpkv_runtime.ledger import LayerLedger
from qpkv_runtime.plan import Interval, Plan

Objective = Literal["kl", "ce"]
NUM_RESAMPLES = 2000


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

    def mean(self, measure: str) -> float:
        """The loss `ce` or `kl`, or the share of `exact` answers (texts apart): mean over kinds of means."""
        kinds = np.array(self.kinds)
        values = np.asarray(getattr(self, measure), dtype=np.float64)
        names = [kind for kind in sorted(set(self.kinds)) if measure != "exact" or kind != "text"]
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


def cautious_change(losses: Losses, base: Losses, measure: str) -> float:
    """The change of a loss from `base` on the same samples, plus its standard error.

    A search that picks the best of many noisy changes picks noise; one standard error more, and only changes that the
    samples agree on look good.
    """
    difference = np.asarray(getattr(losses, measure)) - np.asarray(getattr(base, measure))
    kinds = np.array(losses.kinds)
    groups = [difference[kinds == kind] for kind in sorted(set(losses.kinds))]
    variance = sum(group.var() / len(group) for group in groups) / len(groups) ** 2
    return float(np.mean([group.mean() for group in groups]) + np.sqrt(variance))


def interval(losses: Losses, measure: str, minus: Losses | None = None, seed: int = 0) -> Interval:
    """The loss, or its paired difference to `minus` on the same samples, with a 95 % bootstrap over contexts."""
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
    drawn = np.random.default_rng(seed).integers(0, len(contexts), (NUM_RESAMPLES, len(contexts)))
    with np.errstate(invalid="ignore"):
        means = np.nanmean(sums[drawn].sum(1) / counts[drawn].sum(1), axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    mean = float(np.mean(sums.sum(0) / counts.sum(0)))
    return Interval(mean=round(mean, 6), low=round(float(low), 6), high=round(float(high), 6))


class OutOfTime(Exception):  # noqa: N818 (a reason to stop, not an error)
    """An evaluator's deadline has passed."""


@dataclass
class Incumbent:
    """An allocation and its losses on these parts of the samples. layer_inputs: what went into every layer while it was
    measured; empty until a variant has to be measured."""

    allocation: Allocation
    parts: tuple[int, ...]
    losses: Losses
    layer_inputs: list[tuple[Tensor, dict[str, Any]]] = field(default_factory=list)


@dataclass
class Evaluator:
    """Evaluates allocations on one prepared split. Whatever `journal` holds is not measured again.

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
    _held_bytes: int = 0

    def __post_init__(self) -> None:
        self._decoder = cast(Any, self.model.get_decoder())
        self._devices = layer_devices(self.model)
        self._full_probabilities = self.prepared.full_logprobs.exp()
        self._full_entropy = -(self._full_probabilities * self.prepared.full_logprobs).sum(-1)

    # --- what the searches call ---

    @property
    def parts(self) -> tuple[int, ...]:
        """All parts of the samples."""
        return tuple(range(len(self.prepared.part_starts) - 1))

    def evaluate(self, space: Space, allocation: Allocation, parts: Sequence[int] | None = None) -> Losses:
        """The losses of an allocation on these parts of the samples (all)."""
        parts = tuple(parts or self.parts)
        return self._recalled(space, allocation, parts, 1.0, lambda: self._evaluate(space, allocation, parts, []))

    def incumbent(self, space: Space, allocation: Allocation, parts: Sequence[int] | None = None) -> Incumbent:
        """Evaluate an allocation for `vary` to start from."""
        parts = tuple(parts or self.parts)
        inputs: list[tuple[Tensor, dict[str, Any]]] = []
        losses = self._recalled(space, allocation, parts, 1.0, lambda: self._evaluate(space, allocation, parts, inputs))
        return Incumbent(allocation, parts, losses, inputs)

    def vary(self, space: Space, incumbent: Incumbent, layer: int, choice: Choice) -> Losses:
        """The losses with one layer changed, on the incumbent's samples: the forward starts at that layer."""
        allocation = (*incumbent.allocation[:layer], choice, *incumbent.allocation[layer + 1 :])
        share = (len(allocation) - layer) / len(allocation)
        return self._recalled(
            space, allocation, incumbent.parts, share, lambda: self._vary(space, incumbent, layer, allocation)
        )

    @torch.no_grad()
    def evaluate_plan(self, plan: Plan) -> Losses:
        """The losses of any plan on all samples, whatever its tiers; keeps no blocks for later."""
        scoring, rows = Scoring.of(plan.scorer, plan.sinks, plan.window), self._rows(self.parts)
        cache = PlannedCache(plan, self._devices)
        for layout in cache.ledger.layers:
            blocks = [self._compress(plan, scoring, layout, part) for part in self.parts]
            cast(Any, cache.layers[layout.layer]).load(torch.cat(blocks), self.prepared.prompt_tokens)
        return self._losses(self._forward(cache, rows), rows)

    def full(self) -> Losses:
        """The full cache's own losses."""
        rows = list(range(len(self.prepared)))
        return self._losses_of(self.prepared.full_logprobs, rows)

    # --- inside ---

    def _recalled(
        self, space: Space, allocation: Allocation, parts: tuple[int, ...], share: float, measure: Callable[[], Losses]
    ) -> Losses:
        """What the journal holds of these parts, else what `measure` gives; share: of the layers that it runs."""
        rows = self._rows(parts)
        self.spent += share * len(rows) / len(self.prepared)
        what = {"split": self.prepared.hash, "samples": [rows[0], rows[-1] + 1, len(rows)], **space.key(allocation)}
        entry = self.journal.get(what)
        if entry is None:
            if self.deadline is not None and time.monotonic() > self.deadline:
                raise OutOfTime
            losses = measure()
            self.journal.put(what, losses.values)
            return losses
        return self._of_rows(entry.values, rows)

    @torch.no_grad()
    def _evaluate(
        self, space: Space, allocation: Allocation, parts: Sequence[int], inputs: list[tuple[Tensor, dict[str, Any]]]
    ) -> Losses:
        """Appends what goes into every layer to `inputs`."""

        def remember(module: nn.Module, args: tuple[Any, ...], settings: dict[str, Any]) -> None:
            inputs.append((args[0], settings))

        rows = self._rows(parts)
        hooks = [layer.register_forward_pre_hook(remember, with_kwargs=True) for layer in self._decoder.layers]
        try:
            hidden = self._forward(self._cache(space, allocation, parts), rows)
        finally:
            for hook in hooks:
                hook.remove()
        return self._losses(hidden, rows)

    @torch.no_grad()
    def _vary(self, space: Space, incumbent: Incumbent, layer: int, allocation: Allocation) -> Losses:
        if not incumbent.layer_inputs:  # its losses came from the journal
            self._evaluate(space, incumbent.allocation, incumbent.parts, incumbent.layer_inputs)
        rows = self._rows(incumbent.parts)
        cache = self._batch(self._cache(space, allocation, incumbent.parts, first_layer=layer), rows)
        hidden = incumbent.layer_inputs[layer][0]
        for index in range(layer, len(allocation)):
            settings = {**incumbent.layer_inputs[index][1], "past_key_values": cache}
            out = self._decoder.layers[index](hidden, **settings)
            hidden = out[0] if isinstance(out, tuple) else out
        return self._losses(self._decoder.norm(hidden), rows)

    def _forward(self, cache: PlannedCache, rows: list[int]) -> Tensor:
        """The inputs of these samples over their compressed prompts, all in one row -> [1, inputs, hidden]."""
        inputs, device = [self.prepared.inputs[row] for row in rows], runs_on(self.model)
        ids = torch.tensor([[token for sample in inputs for token in sample]], device=device)
        starts = [self.prepared.prompt_tokens[row] for row in rows]
        positions = torch.cat([start + torch.arange(len(sample)) for start, sample in zip(starts, inputs, strict=True)])
        batch = self._batch(cache, rows)
        hidden: Tensor = self._decoder(
            ids, position_ids=positions[None].to(device), past_key_values=batch
        ).last_hidden_state
        return hidden

    def _batch(self, cache: PlannedCache, rows: list[int]) -> Cache:
        """The cache for inputs that stand one after the other instead of padded."""
        lengths = [len(self.prepared.inputs[row]) for row in rows]
        longest = max(lengths)
        slots = torch.cat([row * longest + torch.arange(length) for row, length in enumerate(lengths)])
        return Cache(layers=[_OneRow(layer, slots, len(rows), longest) for layer in cast(Any, cache.layers)])

    def _rows(self, parts: Sequence[int]) -> list[int]:
        starts = self.prepared.part_starts
        return [row for part in parts for row in range(starts[part], starts[part + 1])]

    def _cache(self, space: Space, allocation: Allocation, parts: Sequence[int], first_layer: int = 0) -> PlannedCache:
        """The runtime's cache as if these samples had just been prefilled."""
        plan = space.probe(allocation)
        cache = PlannedCache(plan, self._devices)
        prompt_tokens = [self.prepared.prompt_tokens[row] for row in self._rows(parts)]
        scoring = Scoring.of(space.scorer, space.sinks, space.window)
        for layer in range(first_layer, len(allocation)):
            layout = cache.ledger.layers[layer]
            blocks = [self._block(space, plan, scoring, layout, allocation[layer], part) for part in parts]
            cast(Any, cache.layers[layer]).load(torch.cat(blocks), prompt_tokens)
        return cache

    def _block(
        self, space: Space, plan: Plan, scoring: Scoring, layout: LayerLedger, choice: Choice, part: int
    ) -> Tensor:
        """One layer's packed block of one part's samples, made once."""
        heads = plan.heads_of(layout.layer)
        key = (scoring, heads, space.decode.format, space.decode.reserve_tokens, layout.layer, choice, part)
        if key not in self._blocks:
            block = self._compress(plan, scoring, layout, part)
            self._held_bytes += block.nbytes
            while self._held_bytes > self.memo_bytes and self._blocks:
                self._held_bytes -= self._blocks.pop(next(iter(self._blocks))).nbytes
            self._blocks[key] = block
        return self._blocks[key]

    def _compress(self, plan: Plan, scoring: Scoring, layout: LayerLedger, part: int) -> Tensor:
        prepared, layer = self.prepared, self.prepared.layers[layout.layer]
        rows = slice(prepared.part_starts[part], prepared.part_starts[part + 1])
        scored = layer.scored[scoring]
        tiers = []
        for selection in keep(plan, layout.layer, scored.importance[rows]):
            valid = selection.valid
            token_rows = prepared.token_rows[rows, None].expand(-1, valid.shape[1], -1).gather(2, selection.rows)
            heads = torch.arange(valid.shape[1], device=valid.device)[:, None]
            padding = prepared.token_rows.shape[1] - torch.tensor(prepared.prompt_tokens[rows], device=valid.device)
            tiers.append(
                TierTensors(
                    layer.keys[token_rows, heads].masked_fill_(~valid[..., None], 0),
                    layer.values[token_rows, heads].masked_fill_(~valid[..., None], 0),
                    (selection.rows - padding[:, None, None]).to(torch.int32),
                    valid,
                )
            )
        num_rows = prepared.part_starts[part + 1] - prepared.part_starts[part]
        block = torch.zeros(num_rows, layout.stored_bytes, dtype=torch.uint8, device=layer.keys.device)
        write_block(block, layout, tiers, scored.query_stats[rows])
        return block

    def _losses(self, hidden: Tensor, rows: list[int]) -> Losses:
        """hidden: [1, inputs, hidden], after the final norm. Only the tokens that are measured get logits."""
        ends = np.cumsum([len(self.prepared.inputs[row]) for row in rows])
        lengths = [len(self.prepared.targets[row]) for row in rows]
        measured = torch.cat([hidden[0, end - length : end] for end, length in zip(ends, lengths, strict=True)])
        logits = cast(nn.Module, self.model.get_output_embeddings())(measured).float()
        logits = logits.to(self.prepared.full_logprobs.device)
        softcap = getattr(self.model.config.get_text_config(decoder=True), "final_logit_softcapping", None)
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        return self._losses_of(logits, rows)

    def _losses_of(self, logits: Tensor, rows: list[int]) -> Losses:
        """logits: [sum of these rows' targets, V]. Raises NumericsError where they are not finite.

        KL(p || q) = sum p log p - sum p logits + log sum exp logits: one product with what the full cache gave, and no
        log-probabilities of the size of the vocabulary.
        """
        prepared = self.prepared
        lengths = [len(prepared.targets[row]) for row in rows]
        normalizer = logits.logsumexp(-1)
        if not bool(normalizer.isfinite().all()):
            raise NumericsError("the model's output under a plan must be finite, got NaN or Inf")
        targets = torch.tensor([token for row in rows for token in prepared.targets[row]], device=logits.device)
        ce = normalizer - logits.gather(1, targets[:, None])[:, 0]
        starts = np.concatenate([[0], np.cumsum([len(target) for target in prepared.targets])])
        expected, at = torch.empty_like(normalizer), 0
        for first, last in _runs(rows):
            of_full = slice(int(starts[first]), int(starts[last]))
            here = slice(at, at + of_full.stop - of_full.start)
            at = here.stop
            products = torch.bmm(self._full_probabilities[of_full, None], logits[here, :, None])[:, 0, 0]
            expected[here] = products + self._full_entropy[of_full]
        kl = (normalizer - expected).clamp(min=0)
        hit = logits.argmax(-1) == targets
        means = [[part.double().mean().item() for part in x.split(lengths)] for x in (ce, kl, hit)]
        return self._of_rows(dict(zip(("ce", "kl", "exact"), means, strict=True)), rows)

    def _of_rows(self, values: Mapping[str, Sequence[float]], rows: list[int]) -> Losses:
        prepared = self.prepared
        return Losses.of(values, [prepared.kinds[row] for row in rows], [prepared.contexts[row] for row in rows])


def _runs(rows: list[int]) -> Iterator[tuple[int, int]]:
    """Ascending stretches of consecutive rows, as (first, last + 1)."""
    first = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] != rows[i - 1] + 1:
            yield rows[first], rows[i - 1] + 1
            first = i


class _OneRow(CacheLayerMixin):
    """A layer of a batched cache for inputs of different lengths that stand one after the other in a single row: the
    model's matrix products see no padding, the cache's attention sees the padded batch."""

    supports_early_init = False

    def __init__(self, layer: PlannedLayer, slots: Tensor, num_rows: int, num_columns: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layer, self.slots, self.size = layer, slots, (num_rows, num_columns)
        self.is_sliding = layer.is_sliding

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        step, _ = self.layer.update(self.padded(key_states), self.padded(value_states))
        return (_OneRowStep(self, step),) * 2

    def padded(self, x: Tensor) -> Tensor:
        """[1, H, inputs, D] -> [B, H, longest, D]."""
        out = x.new_zeros(self.size[0] * self.size[1], x.shape[1], x.shape[3])
        out[self.slots] = x[0].transpose(0, 1)
        batch: Tensor = out.unflatten(0, self.size).transpose(1, 2)
        return batch

    def in_a_row(self, x: Tensor) -> Tensor:
        """[B, H, longest, D] -> [1, H, inputs, D]."""
        row: Tensor = x.transpose(1, 2).flatten(0, 1)[self.slots].transpose(0, 1)[None]
        return row

    def get_seq_length(self) -> int:
        return self.layer.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.layer.get_mask_sizes(query_length)

    def get_max_length(self) -> int:
        return -1


class _OneRowStep(Handle):
    def __init__(self, layer: _OneRow, step: Handle) -> None:
        self.layer, self.step = layer, step

    def attend(self, query: Tensor, num_padding: list[int] | None, scaling: float, softcap: float | None) -> Tensor:
        return self.layer.in_a_row(self.step.attend(self.layer.padded(query), None, scaling, softcap))
