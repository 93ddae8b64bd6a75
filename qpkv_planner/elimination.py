"""Backward elimination: start with several times the budget and halve the layers that cost least per byte.

Several layers at once, each cost measured at the current allocation, until it fits. Layers that only work together
survive this; a forward greedy misses them. Every pass looks at another part of the contexts: cheaper, and harder to
overfit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from qpkv_planner.allocation import Allocation, Choice, Space
from qpkv_planner.measurement import Evaluator, Objective, cautious_change

SHARE_PER_PASS = 1 / 3  # of the layers that can still give, how many are halved before costs are measured anew


@dataclass(frozen=True)
class Pass:
    """One pass: the loss on its part of the samples and the bytes it began with, relative to the limit."""

    loss: float
    share_of_limit: float
    halved_layers: tuple[int, ...]


def eliminate(
    evaluator: Evaluator, space: Space, format: str, times_budget: float, objective: Objective,
    progress: Callable[[], None],
) -> tuple[Allocation, list[Pass]]:  # fmt: skip
    """From `times_budget` times the uniform allocation in `format` down to the budget, filled up exactly."""
    roomy = replace(space, requested=f"{int(space.limit_bytes * times_budget)}B")
    num_layers = space.shape.num_layers
    allocation = roomy.project([1.0] * num_layers, [format] * num_layers)
    assert allocation is not None
    passes: list[Pass] = []
    while space.bytes(allocation) > space.limit_bytes:
        part = evaluator.parts[len(passes) % len(evaluator.parts)]
        incumbent = evaluator.incumbent(space, allocation, [part])
        costs = []
        for layer, choice in enumerate(allocation):
            less = Choice(space.legal_tokens(layer, choice.tokens / 2, format), format)
            saved = space.layer_bytes(layer, choice) - space.layer_bytes(layer, less)
            if saved > 0:
                losses = evaluator.vary(space, incumbent, layer, less)
                costs.append((cautious_change(losses, incumbent.losses, objective) / saved, layer, less))
                progress()
        costs.sort(key=lambda cost: cost[:2])
        share_before = space.bytes(allocation) / space.limit_bytes
        halved = []
        for _, layer, less in costs[: max(1, int(len(costs) * SHARE_PER_PASS))]:
            allocation = (*allocation[:layer], less, *allocation[layer + 1 :])
            halved.append(layer)
            if space.bytes(allocation) <= space.limit_bytes:
                break
        passes.append(Pass(incumbent.losses.mean(objective), share_before, tuple(halved)))
    return space.fill(allocation), passes
