"""Backward elimination: start with more than the budget and halve the layers that cost least per byte.

Several layers at once, each cost predicted at the current allocation, until it fits. Layers that only work together
survive this; a forward greedy misses them. Every pass looks at another part of the contexts: cheaper, and harder to
overfit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from qpkv_planner.allocation import Allocation, Choice, Space, uniform
from qpkv_planner.linearization import FORWARDS, predicted_changes
from qpkv_planner.measurement import Evaluator, Objective

SHARE_PER_PASS = 1 / 3  # of the layers that can still give, how many are halved before costs are measured anew


@dataclass(frozen=True)
class Pass:
    """One pass: the loss on its part of the samples and the bytes it began with, relative to the limit."""

    loss: float
    share_of_limit: float
    halved_layers: tuple[int, ...]


def eliminate(
    evaluator: Evaluator, space: Space, start: Allocation, objective: Objective, floor: int,
    progress: Callable[[int], None],
) -> tuple[Allocation, list[Pass]]:  # fmt: skip
    """From `start`, which is over the budget, down to it, filled up exactly. No layer goes below `floor` tokens."""
    allocation = start
    passes: list[Pass] = []
    while space.bytes(allocation) > space.limit_bytes:
        parts = [evaluator.parts[len(passes) % len(evaluator.parts)]]
        halves: list[list[Choice]] = []
        for layer, mine in enumerate(allocation):
            fewer = space.legal_tokens(layer, max(mine.tokens / 2, min(floor, mine.tokens)), mine.format)
            less = Choice(fewer, mine.format)
            halves.append([less] if space.layer_bytes(layer, less) < space.layer_bytes(layer, mine) else [])
        if not any(halves):
            return shrunk(space, allocation), passes
        loss = evaluator.evaluate(space, allocation, parts).mean(objective)
        changes = predicted_changes(evaluator, space, allocation, halves, objective, parts)
        progress(FORWARDS // len(evaluator.parts))
        costs = []
        for layer, (mine, of_layer) in enumerate(zip(allocation, changes, strict=True)):
            for less, (change,) in of_layer.items():
                saved = space.layer_bytes(layer, mine) - space.layer_bytes(layer, less)
                costs.append((change.cautious() / saved, layer, less))
        costs.sort(key=lambda cost: cost[:2])
        share_before = space.bytes(allocation) / space.limit_bytes
        halved = []
        for _, layer, less in costs[: math.ceil(len(costs) * SHARE_PER_PASS)]:
            allocation = (*allocation[:layer], less, *allocation[layer + 1 :])
            halved.append(layer)
            if space.bytes(allocation) <= space.limit_bytes:
                break
        passes.append(Pass(loss, share_before, tuple(halved)))
    return space.fill(allocation), passes


def larger(space: Space, times_budget: float) -> Space:
    """The space at this multiple of the budget."""
    return replace(space, requested=f"{int(space.limit_bytes * times_budget)}B")


def roomy(space: Space, format: str, times_budget: float) -> Allocation:
    """Where elimination starts without anything better: every layer alike at this multiple of the budget."""
    allocation = uniform(larger(space, times_budget), format)
    assert allocation is not None
    return allocation


def shrunk(space: Space, allocation: Allocation) -> Allocation:
    """The allocation in proportion on the budget: where all layers are at the floor and it is still too much."""
    smaller = space.project([float(choice.tokens) for choice in allocation], [choice.format for choice in allocation])
    assert smaller is not None, "the formats were chosen so that the least of them fits"
    return smaller
