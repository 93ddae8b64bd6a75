"""A claim of a paper as a number that must be below zero (or near it), and what paired samples say about it.

The number is a sum of cells' losses with signs, taken sample by sample, so that what all cells share (an easy context,
a hard question) drops out. Its 95 % interval is the bootstrap over contexts that the planner uses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from benchmarks.paper.settings import Key
from qpkv_planner.measurement import Losses, interval
from qpkv_runtime.plan import Interval

Verdict = Literal["reproduced", "not", "reversed"]
Aspect = Literal["all", "questions", "text", "questions over text"]
Terms = tuple[tuple[float, Key], ...]


@dataclass(frozen=True)
class Claim:
    """says: what the paper claims, in words. terms: (sign, cell) pairs of the number. aspect: on which samples.

    least: the number must be below -least. within: instead, it must lie between -within and within. why: a sentence for
    each verdict.
    """

    says: str
    terms: Terms
    aspect: Aspect = "all"
    least: float = 0.0
    within: float | None = None
    why: Mapping[str, str] = field(default_factory=dict)


def mean_of(cells: Sequence[Key], sign: float = 1.0) -> Terms:
    return tuple((sign / len(cells), cell) for cell in cells)


def over(these: Sequence[Key], those: Sequence[Key]) -> Terms:
    """The mean loss of these cells less that of those."""
    return mean_of(these) + mean_of(those, -1.0)


def negative(terms: Terms) -> Terms:
    return tuple((-sign, cell) for sign, cell in terms)


def judge(claim: Claim, found: Interval) -> Verdict:
    """reproduced: the whole interval says so; reversed: the whole interval says the opposite; not: neither."""
    if claim.within is not None:
        if -claim.within <= found.low and found.high <= claim.within:
            return "reproduced"
        return "reversed" if found.low > claim.within or found.high < -claim.within else "not"
    if found.high < -claim.least:
        return "reproduced"
    return "reversed" if found.low > claim.least else "not"


def measured(claim: Claim, losses: Mapping[Key, Losses]) -> Interval | None:
    """The claim's number with its interval, in nats; None where a cell of it has not been measured."""
    if not claim.terms or any(cell not in losses for _, cell in claim.terms):
        return None
    first = losses[claim.terms[0][1]]
    assert all(losses[cell].contexts == first.contexts for _, cell in claim.terms), "a claim is about the same samples"
    values = np.sum([sign * losses[cell].ce for sign, cell in claim.terms], axis=0)
    kinds = np.array(first.kinds)
    weights = aspect_weights(claim.aspect, sorted(set(first.kinds)))
    chosen = np.flatnonzero([kind in weights for kind in first.kinds])
    if not len(chosen):
        return None
    scaled = np.array([values[i] * weights[kinds[i]] * len(weights) for i in chosen])  # interval averages over kinds
    part = replace(
        first, ce=scaled, kl=scaled, exact=first.exact[chosen], kinds=tuple(kinds[chosen].tolist()),
        contexts=tuple(np.array(first.contexts)[chosen].tolist()),
    )  # fmt: skip
    return interval(part, "ce")


def aspect_weights(aspect: Aspect, kinds: Sequence[str]) -> dict[str, float]:
    """How much each kind of sample counts; empty where the aspect has no samples."""
    questions = [kind for kind in kinds if kind != "text"]
    if aspect == "all":
        return {kind: 1 / len(kinds) for kind in kinds}
    asked = {kind: 1 / len(questions) for kind in questions}
    if aspect == "questions":
        return asked
    if "text" not in kinds or (aspect == "questions over text" and not questions):
        return {}
    return {"text": 1.0} if aspect == "text" else {**asked, "text": -1.0}
