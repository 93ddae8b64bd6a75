"""What an allocation costs: cross-entropy and KL of a plan on prepared samples, in one batched forward.

Every evaluation runs the runtime's own cache: blocks made by its compression code, continuations written through its
append path. A layer's block is made once per (scoring, choice, part of the samples) and kept packed. When one layer
changes, the forward starts there, from the incumbent's hidden states.

Loss: mean over a sample's tokens, mean over the samples of a kind, mean over kinds; nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from qpkv_planner.allocation import Allocation, Choice, Space
from qpkv_planner.prefill import Prepared
from qpkv_runtime.cache import PlannedCache, layer_devices
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

    def mean(self, measure: str) -> float:
        """The loss `ce` or `kl`, or the share of `exact` answers (texts apart): mean over kinds of means."""
        kinds = np.array(self.kinds)
        values = np.asarray(getattr(self, measure), dtype=np.float64)
        names = [kind for kind in sorted(set(self.kinds)) if measure != "exact" or kind != "text"]
        return float(np.mean([values[kinds == kind].mean() for kind in names])) if names else float("nan")

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


@dataclass(frozen=True)
class Incumbent:
    """An allocation, its losses on these parts of the samples, and the inputs of every layer while it was measured."""

    allocation: Allocation
    parts: tuple[int, ...]
    losses: Losses
    layer_inputs: list[tuple[Tensor, dict[str, Any]]]


@dataclass
class Evaluator:
    """Evaluates allocations of one space on one prepared split. spent: evaluations so far, in units of one forward of
    all samples through all layers."""

    model: PreTrainedModel
    prepared: Prepared
    memo_bytes: int = 2 * 2**30
    spent: float = 0.0
    _blocks: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)
    _held_bytes: int = 0

    def __post_init__(self) -> None:
        self._decoder = cast(Any, self.model.get_decoder())
        self._devices = layer_devices(self.model)

    # --- what the searches call ---

    @property
    def parts(self) -> tuple[int, ...]:
        """All parts of the samples."""
        return tuple(range(len(self.prepared.part_starts) - 1))

    def evaluate(self, space: Space, allocation: Allocation, parts: Sequence[int] | None = None) -> Losses:
        """The losses of an allocation on these parts of the samples (all)."""
        return self._evaluate(space, allocation, parts or self.parts, [])

    def incumbent(self, space: Space, allocation: Allocation, parts: Sequence[int] | None = None) -> Incumbent:
        """Evaluate and remember every layer's input, for `vary`."""
        inputs: list[tuple[Tensor, dict[str, Any]]] = []

        def remember(module: nn.Module, args: tuple[Any, ...], settings: dict[str, Any]) -> None:
            inputs.append((args[0], settings))

        hooks = [layer.register_forward_pre_hook(remember, with_kwargs=True) for layer in self._decoder.layers]
        losses = self._evaluate(space, allocation, parts or self.parts, hooks)
        return Incumbent(allocation, tuple(parts or self.parts), losses, inputs)

    @torch.no_grad()
    def vary(self, space: Space, incumbent: Incumbent, layer: int, choice: Choice) -> Losses:
        """The losses with one layer changed, on the incumbent's samples: the forward starts at that layer."""
        allocation = (*incumbent.allocation[:layer], choice, *incumbent.allocation[layer + 1 :])
        rows = self._rows(incumbent.parts)
        cache = self._cache(space, allocation, incumbent.parts, first_layer=layer)
        hidden = incumbent.layer_inputs[layer][0]
        for index in range(layer, len(allocation)):
            settings = {**incumbent.layer_inputs[index][1], "past_key_values": cache}
            out = self._decoder.layers[index](hidden, **settings)
            hidden = out[0] if isinstance(out, tuple) else out
        self.spent += len(rows) / len(self.prepared) * (len(allocation) - layer) / len(allocation)
        return self._losses(self._decoder.norm(hidden), rows)

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

    @torch.no_grad()
    def _evaluate(self, space: Space, allocation: Allocation, parts: Sequence[int], hooks: Sequence[Any]) -> Losses:
        """Removes `hooks` afterwards, whatever happens."""
        try:
            rows = self._rows(parts)
            hidden = self._forward(self._cache(space, allocation, parts), rows)
        finally:
            for hook in hooks:
                hook.remove()
        return self._losses(hidden, rows)

    def _forward(self, cache: PlannedCache, rows: list[int]) -> Tensor:
        """The continuations of these samples over their compressed prompts -> [N, C, hidden]."""
        prompt_tokens = torch.tensor([self.prepared.prompt_tokens[row] for row in rows])
        ids = self.prepared.input_ids[rows]
        positions = (prompt_tokens[:, None] + torch.arange(ids.shape[1])).to(ids.device)
        self.spent += len(rows) / len(self.prepared)
        hidden: Tensor = self._decoder(ids, position_ids=positions, past_key_values=cache).last_hidden_state
        return hidden

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
        """hidden: [N, C, hidden], after the final norm. Only the tokens that are measured get logits."""
        measured = torch.cat([hidden[i, : self.prepared.lengths[row]] for i, row in enumerate(rows)])
        logits = cast(nn.Module, self.model.get_output_embeddings())(measured).float()
        softcap = getattr(self.model.config.get_text_config(decoder=True), "final_logit_softcapping", None)
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        if not bool(logits.isfinite().all()):
            raise NumericsError("the model's output under a plan must be finite, got NaN or Inf")
        return self._losses_of(logits.log_softmax(-1), rows)

    def _losses_of(self, logprobs: Tensor, rows: list[int]) -> Losses:
        """logprobs: [sum of these rows' lengths, V]."""
        prepared = self.prepared
        lengths = [prepared.lengths[row] for row in rows]
        starts = np.concatenate([[0], np.cumsum(prepared.lengths)])
        taken = torch.cat([torch.arange(starts[row], starts[row + 1]) for row in rows])
        full = prepared.full_logprobs if len(taken) == starts[-1] else prepared.full_logprobs[taken]
        targets = torch.cat([prepared.targets[row, : prepared.lengths[row]] for row in rows])
        ce = -logprobs.gather(1, targets[:, None])[:, 0]
        kl = torch.nn.functional.kl_div(logprobs, full, log_target=True, reduction="none").sum(-1)
        hit = logprobs.argmax(-1) == targets
        split = [[part.double().mean().item() for part in x.split(lengths)] for x in (ce, kl, hit)]
        return Losses(
            np.array(split[0]),
            np.array(split[1]),
            np.array(split[2]) == 1.0,
            tuple(prepared.kinds[row] for row in rows),
            tuple(prepared.contexts[row] for row in rows),
        )
