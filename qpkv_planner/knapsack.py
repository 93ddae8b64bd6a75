"""Trust-region knapsack: small measured changes to every layer, combined exactly under the budget.

At the current allocation each layer's loss is measured with more and with fewer tokens (by a factor, the radius) and
with a step of key bits and of value bits at equal bytes. The changes that sum to the lowest predicted loss within the
budget are a multiple-choice knapsack, solved exactly (`scipy.optimize.milp`). The sum is only a prediction: the step is
taken if the true loss falls, else the radius is halved. Sensitivities measured at the full cache mislead, since other
layers make up for the one that is cut; these are measured where they are used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from qpkv_planner.allocation import Allocation, Choice, Space, format_name, format_named
from qpkv_planner.measurement import Evaluator, Objective

BITS = (2, 3, 4, 8, 16)
FIRST_RADIUS = 1.5


@dataclass(frozen=True)
class Round:
    """One round, on the search split: losses before, as the knapsack predicted and as measured."""

    radius: float
    before: float
    predicted: float
    measured: float

    @property
    def is_accepted(self) -> bool:
        return self.measured < self.before


def improve(
    evaluator: Evaluator, space: Space, start: Allocation, quantizer: str, num_rounds: int, objective: Objective,
    progress: Callable[[], None],
) -> tuple[Allocation, list[Round], list[float]]:  # fmt: skip
    """The improved allocation, the rounds, and each layer's sensitivity at the end: the loss that fewer tokens add or
    that more tokens save, whichever is larger."""
    allocation, radius, rounds = start, FIRST_RADIUS, list[Round]()
    sensitivities = [1.0] * space.shape.num_layers
    for index in range(num_rounds):
        left_out = evaluator.parts[index % len(evaluator.parts)]  # another two thirds in every round
        parts = [part for part in evaluator.parts if part != left_out]
        incumbent = evaluator.incumbent(space, allocation, parts)
        base = incumbent.losses.mean(objective)
        before = evaluator.evaluate(space, allocation).mean(objective)
        options: list[dict[Choice, float]] = []
        for layer, choice in enumerate(allocation):
            changes = {choice: 0.0}
            for other in _alternatives(space, layer, choice, quantizer, radius):
                if other not in changes:
                    changes[other] = evaluator.vary(space, incumbent, layer, other).mean(objective) - base
                    progress()
            options.append(changes)
        sensitivities = [
            max(abs(change) for other, change in changes.items() if other.format == choice.format)
            for choice, changes in zip(allocation, options, strict=True)
        ]
        chosen, predicted_change = _solve(space, options)
        candidate = space.fill(chosen)
        measured = evaluator.evaluate(space, candidate).mean(objective)
        rounds.append(Round(radius, before, before + predicted_change, measured))
        if rounds[-1].is_accepted:
            allocation = candidate
        else:
            radius = 1 + (radius - 1) / 2
    return allocation, rounds, sensitivities


def _alternatives(space: Space, layer: int, choice: Choice, quantizer: str, radius: float) -> list[Choice]:
    """More and fewer tokens, then a step of bits on one side with tokens for about the same bytes."""
    wishes = [(choice.tokens * radius, choice.format), (choice.tokens / radius, choice.format)]
    format = format_named(choice.format)
    keys, values = format.keys.bits, format.values.bits
    for step in (-1, 1):
        for key_bits, value_bits in ((_step(keys, step), values), (keys, _step(values, step))):
            name = format_name(quantizer, key_bits, value_bits)
            wishes.append((choice.tokens * (keys + values) / (key_bits + value_bits), name))
    return [Choice(space.legal_tokens(layer, tokens, name), name) for tokens, name in wishes]


def _step(bits: int, step: int) -> int:
    """The next width up or down; K and V at 16 bit together is a format of its own, so 8 is the top here."""
    widths = BITS[:-1]
    if bits not in widths:
        return widths[-1]
    return widths[min(max(widths.index(bits) + step, 0), len(widths) - 1)]


def _solve(space: Space, options: list[dict[Choice, float]]) -> tuple[Allocation, float]:
    """One choice per layer with the lowest sum of changes within the limit, and that sum."""
    flat = [(layer, choice, change) for layer, changes in enumerate(options) for choice, change in changes.items()]
    one_per_layer = np.zeros((len(options), len(flat)))
    for column, (layer, *_) in enumerate(flat):
        one_per_layer[layer, column] = 1
    weights = np.array([[space.layer_bytes(layer, choice) for layer, choice, _ in flat]], dtype=float)
    solution = milp(
        np.array([change for *_, change in flat]),
        constraints=[LinearConstraint(one_per_layer, 1, 1), LinearConstraint(weights, 0, space.limit_bytes)],
        integrality=np.ones(len(flat), dtype=int),
        bounds=Bounds(0, 1),
    )
    assert solution.x is not None, "the current allocation is always a solution"
    chosen = [(choice, change) for (_, choice, change), x in zip(flat, solution.x, strict=True) if x > 0.5]
    return tuple(choice for choice, _ in chosen), float(sum(change for _, change in chosen))
