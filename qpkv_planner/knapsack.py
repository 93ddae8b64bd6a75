"""Trust-region knapsack: small changes to every layer, weighed one by one and combined exactly under the budget.

At the current allocation each layer's loss is predicted (`linearization.py`) with more and with fewer tokens (by a
factor, the radius, its square and its root) and with a step of key bits and of value bits. The changes that sum to the
lowest loss within the budget are a multiple-choice knapsack, solved exactly (`scipy.optimize.milp`). The sum is only a
prediction: the step is taken if the true loss falls, else the radius becomes its square root. Sensitivities at the full
cache mislead, since other layers make up for the one that is cut; these are taken where they are used.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.stats import spearmanr

from qpkv_planner.allocation import Allocation, Choice, Space, format_name, format_named
from qpkv_planner.linearization import FORWARDS, predicted_changes
from qpkv_planner.measurement import Evaluator, Objective

BITS = (2, 3, 4, 8)
FIRST_RADIUS = 2.0
LAST_RADIUS = 1.1  # below it a step changes next to nothing
POWERS = (-2.0, -1.0, -0.5, 0.5, 1.0, 2.0)  # of the radius, by which a layer's tokens change


@dataclass(frozen=True)
class Round:
    """One round, on the search split: losses before, as the knapsack predicted and as measured; sensitivities: per
    layer, the predicted changes of the smallest steps, by what they are (`Neighbourhood.named`)."""

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
    """An allocation and the predicted change of the loss with each layer's alternatives, itself among them."""

    allocation: Allocation
    options: tuple[dict[Choice, float], ...]

    @property
    def sensitivities(self) -> list[float]:
        """Per layer, what a step to fewer tokens adds or one to more saves, whichever is larger."""
        return [
            max((abs(of_layer[name]) for name in ("fewer", "more") if name in of_layer), default=0.0)
            for of_layer in self.named
        ]

    @property
    def named(self) -> tuple[dict[str, float], ...]:
        """Per layer, the changes of the smallest steps: to fewer and more tokens, and to other bits ("k3v4") for about
        the same bytes."""
        found = []
        for mine, changes in zip(self.allocation, self.options, strict=True):
            by_format: dict[str, list[Choice]] = {}
            for other in sorted((one for one in changes if one != mine), key=lambda one: one.tokens):
                by_format.setdefault(other.format, []).append(other)
            alike = by_format.pop(mine.format, [])
            near = {"fewer": [one for one in alike if one.tokens < mine.tokens][-1:]}
            near["more"] = [one for one in alike if one.tokens > mine.tokens][:1]
            for format, others in by_format.items():
                near[format.rpartition("-")[2]] = [others[len(others) // 2]]
            found.append({name: changes[one] for name, ones in near.items() for one in ones})
        return tuple(found)


def improve(
    evaluator: Evaluator, space: Space, start: Allocation, quantizer: str, num_rounds: int, objective: Objective,
    floor: int, progress: Callable[[int], None], accept: Callable[[Allocation], None] = lambda allocation: None,
    wishes: Wishes | None = None,
) -> tuple[Allocation, list[Round], Neighbourhood]:  # fmt: skip
    """The improved allocation, the rounds and the last one's neighbourhood. Calls `accept` with each step taken.

    No layer goes below `floor` tokens. wishes: what a layer may change to, `tokens_and_bits` unless given.
    """
    wishes = wishes or tokens_and_bits
    allocation, radius, rounds = start, FIRST_RADIUS, list[Round]()
    loss = evaluator.evaluate(space, start).mean(objective)
    while True:
        wished = [
            alternatives(space, i, mine, wishes(mine, quantizer, radius), floor) for i, mine in enumerate(allocation)
        ]
        changes = predicted_changes(evaluator, space, allocation, wished, objective)
        options = tuple({mine: 0.0, **others} for mine, others in zip(allocation, changes, strict=True))
        around = Neighbourhood(allocation, options)
        progress(FORWARDS)
        chosen, predicted_change = _solve(space, options)
        candidate = space.fill(chosen)
        measured = evaluator.evaluate(space, candidate).mean(objective)
        progress(1)
        rounds.append(Round(radius, loss, loss + predicted_change, measured, around.named))
        if rounds[-1].is_accepted:
            allocation, loss = candidate, measured
            accept(allocation)
        else:
            radius = math.sqrt(radius)
        if len(rounds) == num_rounds or radius < LAST_RADIUS:
            return allocation, rounds, around


def additivity(
    evaluator: Evaluator, space: Space, around: Neighbourhood, objective: Objective, num_plans: int, seed: int,
    progress: Callable[[int], None],
) -> dict[str, Any]:  # fmt: skip
    """How well the sum of predicted single changes tells their measured joint one, on random feasible plans.

    -> {"rank_correlation": Spearman's, "predicted": nats, "measured": nats}.
    """
    chance = random.Random(seed)
    mine, parts = around.allocation, evaluator.parts[:1]
    before = evaluator.evaluate(space, mine, parts).mean(objective)
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
        predicted.append(sum(change for _, change in chosen))
        measured.append(evaluator.evaluate(space, allocation, parts).mean(objective) - before)
        progress(1)
    correlation = float(spearmanr(predicted, measured).statistic) if len(predicted) > 2 else None
    return {"rank_correlation": correlation, "predicted": predicted, "measured": measured}


Wishes = Callable[[Choice, str, float], list[tuple[float, str]]]
"""What a layer may change to: (its choice, quantizer, radius) -> tokens, as far as they are legal, and formats."""


def tokens_and_bits(mine: Choice, quantizer: str, radius: float) -> list[tuple[float, str]]:
    """Other counts in the same format; and a step of bits on one side, for about the same bytes, more and fewer."""
    format = format_named(mine.format)
    keys, values = format.keys.bits, format.values.bits
    wishes = [(mine.tokens * radius**power, mine.format) for power in POWERS]
    for bits in [(next_bits(keys, s), values) for s in (-1, 1)] + [(keys, next_bits(values, s)) for s in (-1, 1)]:
        as_many = mine.tokens * (keys + values) / sum(bits)
        wishes += [(as_many * radius**power, format_name(quantizer, *bits)) for power in (-1.0, 0.0, 1.0)]
    return wishes


def alternatives(
    space: Space, layer: int, mine: Choice, wishes: Sequence[tuple[float, str]], floor: int
) -> list[Choice]:
    """What is wished for as it can be had: legal counts of at least `floor` tokens, each once and without `mine`."""
    floor = min(floor, mine.tokens)
    found = (Choice(space.legal_tokens(layer, max(floor, tokens), name), name) for tokens, name in wishes)
    return list(dict.fromkeys(choice for choice in found if choice != mine))


def next_bits(bits: int, step: int) -> int:
    """The next width up or down; 16 bit is not a step of a quantizer, so 8 is the top."""
    place = BITS.index(bits) if bits in BITS else len(BITS)
    return BITS[min(max(place + step, 0), len(BITS) - 1)]


def _solve(space: Space, options: Sequence[dict[Choice, float]]) -> tuple[Allocation, float]:
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
