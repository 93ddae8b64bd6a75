"""Trust-region knapsack: small changes to every layer, or to every KV head, weighed one by one and combined exactly.

At the current allocation each layer's loss is predicted (`linearization.py`) with more and with fewer tokens (by powers
of a factor, the radius) and with a step of key bits and of value bits. The changes that sum to the lowest loss within
the budget are a multiple-choice knapsack, solved exactly (`scipy.optimize.milp`): one format a layer, and so many
tokens for the layer or, searched by head, for each of its KV heads. The sum is only a prediction: the step is taken if
the true loss falls, else a step of more certain changes is tried, and after that the radius becomes its square root.
Every prediction leaves out another part of the samples, which is cheaper and harder to overfit; the true loss is that
of all. Sensitivities at the full cache mislead, since
other layers make up for the one that is cut; these are taken where they are used.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_array
from scipy.stats import spearmanr

from qpkv_planner.allocation import Allocation, Choice, Space, format_name, format_named
from qpkv_planner.linearization import FORWARDS, predicted_changes
from qpkv_planner.measurement import Change, Evaluator, Objective
from qpkv_runtime.plan import UNIFORM

BITS = (2, 3, 4, 8)
FIRST_RADIUS = 2.0
LAST_RADIUS = 1.1  # below it a step changes next to nothing
NUM_ERRORS = (1.0, 2.0, 4.0)  # standard errors by which a step's changes are taken for worse, one step after another
POWERS = (-1.5, -0.5, 0.5, 1.5)  # of the radius, by which a layer's tokens change


@dataclass(frozen=True)
class Round:
    """One step, on the search split: losses before, as the knapsack predicted and as measured; num_errors: the standard
    errors that were added; sensitivities: with a prediction's first step, of each layer the predicted changes of the
    smallest steps, by what they are (`Neighbourhood.named`)."""

    radius: float
    num_errors: float
    before: float
    predicted: float
    measured: float
    sensitivities: tuple[dict[str, float], ...]

    @property
    def is_accepted(self) -> bool:
        return self.measured < self.before


@dataclass(frozen=True)
class Option:
    """What a layer may have. tokens, changes: what each of its units (the layer whole, or each KV head) then keeps, and
    the change of the loss predicted of that unit alone, in nats."""

    choice: Choice
    tokens: tuple[int, ...]
    changes: tuple[float, ...]

    @property
    def change(self) -> float:
        return sum(self.changes)


@dataclass(frozen=True)
class Neighbourhood:
    """An allocation of a space and each layer's options, what it has among them."""

    space: Space
    allocation: Allocation
    options: tuple[tuple[Option, ...], ...]

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
        for mine, options in zip(self.allocation, self.options, strict=True):
            changes = {option.choice: option.change for option in options}
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
    floor: int, progress: Callable[[int], None],
    accept: Callable[[Space, Allocation], None] = lambda space, allocation: None,
    wishes: Wishes | None = None, by_head: bool = False,
) -> tuple[Space, Allocation, list[Round], Neighbourhood]:  # fmt: skip
    """The improved allocation and its space, the rounds and the last one's neighbourhood. Calls `accept` with each step
    taken.

    No layer goes below `floor` tokens a head. wishes: what a layer may change to, `tokens_and_bits` unless given.
    by_head: every KV head gets its own count; the space then is `space` with heads shared by weight.
    """
    wishes = wishes or tokens_and_bits
    allocation, radius, rounds, num_predictions = start, FIRST_RADIUS, list[Round](), 0
    loss = evaluator.evaluate(space, start).mean(objective)
    while True:
        wished = [
            alternatives(space, i, mine, wishes(mine, quantizer, radius), floor) for i, mine in enumerate(allocation)
        ]
        left_out = evaluator.parts[num_predictions % len(evaluator.parts)]
        parts = [part for part in evaluator.parts if part != left_out] or evaluator.parts
        changes = predicted_changes(evaluator, space, allocation, wished, objective, parts, by_head)
        num_predictions += 1
        progress(FORWARDS)
        seen = [_neighbourhood(space, allocation, changes, by_head, num_errors) for num_errors in NUM_ERRORS]
        around = seen[0]
        for num_errors, tried in zip(NUM_ERRORS, seen, strict=True):
            new_space, candidate, predicted_change = _best(space, tried.options, by_head)
            measured = evaluator.evaluate(new_space, candidate).mean(objective)
            named = around.named if tried is around else ()
            rounds.append(Round(radius, num_errors, loss, loss + predicted_change, measured, named))
            if rounds[-1].is_accepted:
                space, allocation, loss = new_space, candidate, measured
                accept(space, allocation)
                break
        else:
            radius = math.sqrt(radius)
        progress(1)
        if num_predictions == num_rounds or radius < LAST_RADIUS:
            return space, allocation, rounds, around


def additivity(
    evaluator: Evaluator, around: Neighbourhood, objective: Objective, num_plans: int, seed: int,
    progress: Callable[[int], None],
) -> dict[str, Any]:  # fmt: skip
    """How well the sum of predicted single changes tells their measured joint one, on random feasible plans.

    -> {"rank_correlation": Spearman's, "predicted": nats, "measured": nats}.
    """
    chance = random.Random(seed)
    space, mine, parts = around.space, around.allocation, evaluator.parts[:1]
    before = evaluator.evaluate(space, mine, parts).mean(objective)
    predicted, measured = list[float](), list[float]()
    for _ in range(50 * num_plans):
        if len(predicted) == num_plans:
            break
        share = chance.uniform(0.1, 0.6)
        chosen = [chance.choice(options) if chance.random() < share else options[0] for options in around.options]
        allocation = tuple(option.choice for option in chosen)
        if allocation == mine or space.bytes(allocation) > space.limit_bytes:
            continue
        predicted.append(sum(option.change for option in chosen))
        measured.append(evaluator.evaluate(space, allocation, parts).mean(objective) - before)
        progress(1)
    correlation = float(spearmanr(predicted, measured).statistic) if len(predicted) > 2 else None
    return {"rank_correlation": correlation, "predicted": predicted, "measured": measured}


Wishes = Callable[[Choice, str, float], list[tuple[float, str]]]
"""What a layer may change to: (its choice, quantizer, radius) -> tokens, as far as they are legal, and formats."""


def tokens_and_bits(mine: Choice, quantizer: str, radius: float) -> list[tuple[float, str]]:
    """Other counts in the same format; and a step of bits on one side, for about the same bytes."""
    format = format_named(mine.format)
    keys, values = format.keys.bits, format.values.bits
    wishes = [(mine.tokens * radius**power, mine.format) for power in POWERS]
    for bits in [(next_bits(keys, s), values) for s in (-1, 1)] + [(keys, next_bits(values, s)) for s in (-1, 1)]:
        wishes.append((mine.tokens * (keys + values) / sum(bits), format_name(quantizer, *bits)))
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


def _neighbourhood(
    space: Space, allocation: Allocation, changes: Sequence[Mapping[Choice, tuple[Change, ...]]], by_head: bool,
    num_errors: float,
) -> Neighbourhood:  # fmt: skip
    """What every layer has, which changes nothing, and its alternatives, so many standard errors worse."""

    def option(layer: int, choice: Choice, of_units: tuple[Change, ...] | None = None) -> Option:
        tokens = space.tokens_of_heads(layer, choice) if by_head else (choice.tokens,)
        cautious = tuple(change.cautious(num_errors) for change in of_units or ())
        return Option(choice, tokens, cautious or (0.0,) * len(tokens))

    options = tuple(
        (option(layer, mine), *(option(layer, choice, of_units) for choice, of_units in others.items()))
        for layer, (mine, others) in enumerate(zip(allocation, changes, strict=True))
    )
    return Neighbourhood(space, allocation, options)


def _best(space: Space, options: Sequence[Sequence[Option]], by_head: bool) -> tuple[Space, Allocation, float]:
    """The allocation that the knapsack finds, filled up, its space, and the sum of its changes."""
    formats, tokens, change = _solve(space, options)
    if not by_head:
        choices = [Choice(count, format) for (count,), format in zip(tokens, formats, strict=True)]
        return space, space.fill(choices), change
    divided = space.divided(tokens, formats)
    assert divided is not None, "the formats were chosen so that the least of them fits"
    return *divided, change


def _solve(space: Space, options: Sequence[Sequence[Option]]) -> tuple[list[str], list[tuple[int, ...]], float]:
    """Of each layer a format and its units' tokens, with the lowest sum of changes within the limit; and that sum.

    Binary variables: y[layer, format], one of a layer's; x[layer, format, unit, tokens], for each unit one if that is
    the layer's format. What a unit weighs is its part of a layer whose heads all keep as many.
    """
    num_units = len(options[0][0].tokens)
    weighing = space if num_units == 1 else replace(space, heads=UNIFORM)
    known = [list(dict.fromkeys(option.choice.format for option in of_layer)) for of_layer in options]
    pairs = [(layer, format) for layer, formats in enumerate(known) for format in formats]
    x = [
        (pair, unit, option.tokens[unit], option.changes[unit])
        for pair, (layer, format) in enumerate(pairs)
        for unit in range(num_units)
        for option in options[layer]
        if option.choice.format == format
    ]
    weights = [
        weighing.layer_bytes(pairs[pair][0], Choice(tokens, pairs[pair][1])) / num_units for pair, _, tokens, _ in x
    ]
    one_format = lil_array((len(options), len(pairs) + len(x)))
    one_count = lil_array((len(pairs) * num_units, len(pairs) + len(x)))
    for pair, (layer, _) in enumerate(pairs):
        one_format[layer, pair] = 1
        for unit in range(num_units):
            one_count[pair * num_units + unit, pair] = -1
    for column, (pair, unit, *_) in enumerate(x, len(pairs)):
        one_count[pair * num_units + unit, column] = 1
    nothing = [0.0] * len(pairs)
    solution = milp(
        np.array([*nothing, *(change for *_, change in x)]),
        constraints=[
            LinearConstraint(one_format.tocsr(), 1, 1),
            LinearConstraint(one_count.tocsr(), 0, 0),
            LinearConstraint(np.array([[*nothing, *weights]]), 0, space.limit_bytes),
        ],
        integrality=np.ones(len(pairs) + len(x), dtype=int),
        bounds=Bounds(0, 1),
    )
    assert solution.x is not None, "the current allocation is always a solution"
    chosen = [one for one, value in zip(x, solution.x[len(pairs) :], strict=True) if value > 0.5]
    chosen_formats, counts = [""] * len(options), [[0] * num_units for _ in options]
    for pair, unit, count, _ in chosen:
        layer, format = pairs[pair]
        chosen_formats[layer], counts[layer][unit] = format, count
    return chosen_formats, [tuple(of_layer) for of_layer in counts], float(sum(change for *_, change in chosen))
