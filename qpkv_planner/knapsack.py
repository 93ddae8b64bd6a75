"""Trust-region knapsack: small measured changes to every layer, combined exactly under the budget.

At the current allocation each layer's loss is measured with more and with fewer tokens (by a factor, the radius) and
with a step of key bits and of value bits at equal bytes, each change one standard error worse than its mean: the best
of many noisy numbers is mostly noise. The changes that sum to the lowest predicted loss within the
budget are a multiple-choice knapsack, solved exactly (`scipy.optimize.milp`). The sum is only a prediction: the step is
taken if the true loss falls, else the radius is halved. Sensitivities measured at the full cache mislead, since other
layers make up for the one that is cut; these are measured where they are used.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.stats import spearmanr

from qpkv_planner.allocation import Allocation, Choice, Space, format_name, format_named
from qpkv_planner.measurement import Evaluator, Incumbent, Objective, cautious_change

BITS = (2, 3, 4, 8)
FIRST_RADIUS = 1.5
WORTH_OTHER_BITS = 1.5  # times the least tokens: smaller layers keep their bits


@dataclass(frozen=True)
class Round:
    """One round, on the search split: losses before, as the knapsack predicted and as measured; sensitivities: per
    layer, the measured change of each alternative, by what it is ("more", "fewer", "k3v4", ...)."""

    radius: float
    before: float
    predicted: float
    measured: float
    sensitivities: tuple[dict[str, float], ...]

    @property
    def is_accepted(self) -> bool:
        return self.measured < self.before


@dataclass(frozen=True)
class Neighbourhood:
    """The last round's incumbent and the measured change of each layer's alternatives."""

    incumbent: Incumbent
    options: tuple[dict[Choice, float], ...]

    @property
    def sensitivities(self) -> list[float]:
        """Per layer, what fewer tokens add or more tokens save, whichever is larger."""
        pairs = zip(self.incumbent.allocation, self.options, strict=True)
        return [max(abs(c) for other, c in changes.items() if other.format == mine.format) for mine, changes in pairs]


def improve(
    evaluator: Evaluator, space: Space, start: Allocation, quantizer: str, num_rounds: int, parts_per_round: int,
    objective: Objective, floor: int, progress: Callable[[], None],
    accept: Callable[[Allocation], None] = lambda allocation: None,
) -> tuple[Allocation, list[Round], Neighbourhood]:  # fmt: skip
    """The improved allocation, the rounds and the last one's neighbourhood. Calls `accept` with each step taken.

    A round measures changes on `parts_per_round` parts of the samples, other ones than the last, and its outcome on
    all. No layer goes below `floor` tokens.
    """
    allocation, radius, rounds = start, FIRST_RADIUS, list[Round]()
    loss = evaluator.evaluate(space, start).mean(objective)
    for index in range(num_rounds):
        parts = sorted({evaluator.parts[(index + i) % len(evaluator.parts)] for i in range(parts_per_round)})
        incumbent = evaluator.incumbent(space, allocation, parts)
        options: list[dict[Choice, float]] = []
        for layer, choice in enumerate(allocation):
            changes = {choice: 0.0}
            tries_bits = choice.tokens > WORTH_OTHER_BITS * max(floor, space.least_tokens(layer, choice.format))
            for other in _alternatives(space, layer, choice, quantizer if tries_bits else None, radius, floor):
                if other not in changes:
                    losses = evaluator.vary(space, incumbent, layer, other)
                    changes[other] = cautious_change(losses, incumbent.losses, objective)
                    progress()
            options.append(changes)
        neighbourhood = Neighbourhood(incumbent, tuple(options))
        chosen, predicted_change = _solve(space, options)
        candidate = space.fill(chosen)
        measured = evaluator.evaluate(space, candidate).mean(objective)
        rounds.append(Round(radius, loss, loss + predicted_change, measured, _named(neighbourhood)))
        if rounds[-1].is_accepted:
            allocation, loss = candidate, measured
            accept(allocation)
        else:
            radius = 1 + (radius - 1) / 2
    return allocation, rounds, neighbourhood


def _named(around: Neighbourhood) -> tuple[dict[str, float], ...]:
    """Each layer's measured changes by what they are."""
    named = []
    for mine, changes in zip(around.incumbent.allocation, around.options, strict=True):
        of_layer = {}
        for other, change in changes.items():
            if other != mine:
                tokens = "more" if other.tokens > mine.tokens else "fewer"
                of_layer[tokens if other.format == mine.format else other.format.rpartition("-")[2]] = change
        named.append(of_layer)
    return tuple(named)


def additivity(
    evaluator: Evaluator, space: Space, around: Neighbourhood, objective: Objective, num_plans: int, seed: int,
    progress: Callable[[], None],
) -> dict[str, Any]:  # fmt: skip
    """How well the sum of single changes predicts their joint one, on random feasible plans of measured changes.

    -> {"rank_correlation": Spearman's, "predicted": nats, "measured": nats}.
    """
    chance = random.Random(seed)
    mine = around.incumbent.allocation
    predicted, measured = list[float](), list[float]()
    for _ in range(50 * num_plans):
        if len(predicted) == num_plans:
            break
        share = chance.uniform(0.1, 0.6)
        chosen = [
            chance.choice(list(changes.items())) if chance.random() < share else (choice, 0.0)
            for choice, changes in zip(mine, around.options, strict=True)
        ]
        allocation = tuple(choice for choice, _ in chosen)
        if allocation == mine or space.bytes(allocation) > space.limit_bytes:
            continue
        losses = evaluator.evaluate(space, allocation, around.incumbent.parts)
        predicted.append(sum(change for _, change in chosen))
        measured.append(losses.mean(objective) - around.incumbent.losses.mean(objective))
        progress()
    if len(predicted) < 3:
        return {"rank_correlation": None, "predicted": predicted, "measured": measured}
    return {
        "rank_correlation": float(spearmanr(predicted, measured).statistic),
        "predicted": predicted,
        "measured": measured,
    }


def _alternatives(
    space: Space, layer: int, choice: Choice, quantizer: str | None, radius: float, floor: int
) -> list[Choice]:
    """More and fewer tokens, then (in this quantizer, if any) a step of bits on one side for about the same bytes."""
    wishes = [(choice.tokens * radius, choice.format), (choice.tokens / radius, choice.format)]
    format = format_named(choice.format)
    keys, values = format.keys.bits, format.values.bits
    if quantizer is not None:
        stepped = [bits for s in (-1, 1) for bits in ((next_bits(keys, s), values), (keys, next_bits(values, s)))]
        wishes += [(choice.tokens * (keys + values) / sum(bits), format_name(quantizer, *bits)) for bits in stepped]
    floor = min(floor, choice.tokens)
    return [Choice(space.legal_tokens(layer, max(floor, tokens), name), name) for tokens, name in wishes]


def next_bits(bits: int, step: int) -> int:
    """The next width up or down; 16 bit is not a step of a quantizer, so 8 is the top."""
    place = BITS.index(bits) if bits in BITS else len(BITS)
    return BITS[min(max(place + step, 0), len(BITS) - 1)]


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
