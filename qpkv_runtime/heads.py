"""How a layer's tokens are divided among its KV heads: the arithmetic that needs no prompt. No torch.

Whatever the rule, a tier of n tokens per head holds num_heads * n in all, divided in whole storage quanta, so that no
head pays for slots it does not use. Every head first gets what is always kept (sinks and window) and `alpha` of the
rest of an even part; what is left goes where the rule says. `compression.py` divides by importance (adaptive), this
module by weights that the plan holds (weighted).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from functools import lru_cache


def least_tokens(tokens: int, forced: int, alpha: float) -> int:
    """What every head keeps of an even part of `tokens`, of which `forced` stay anyway: forced + alpha of the rest."""
    return forced + int(alpha * max(0, tokens - forced))


@lru_cache(maxsize=4096)
def divide(
    tiers: tuple[tuple[int, int], ...], weights: tuple[float, ...], least: int, most: int
) -> list[tuple[int, ...]]:
    """Divide tiers of (tokens per head, quantum) by weight: for each tier, the tokens of every head.

    least: tokens that every head gets before weights count; most: what a head may hold in all (at least the tiers' sum
    of tokens; tiers of different quanta may leave no other way than a little more). Quanta go one by one to the head
    whose weight is largest for its tokens beyond `least` (Webster's method); equal claims are served in turn.
    """

    def claim(head: int, start: int, quantum: int) -> tuple[float, int, int]:
        """The smallest is served first: (urgency of the quantum from token `start` on, tokens held, head)."""
        if start < least:
            return float("-inf"), start, head
        share = (start - least) / quantum + 0.5
        return float("inf") if start + quantum > most else -weights[head] / share, start, head

    held = [0] * len(weights)
    divided = []
    for tokens, quantum in tiers:
        before = list(held)
        claims = [claim(head, start, quantum) for head, start in enumerate(held)]
        heapq.heapify(claims)
        for _ in range(len(weights) * tokens // quantum):
            head = claims[0][2]
            held[head] += quantum
            heapq.heapreplace(claims, claim(head, held[head], quantum))
        divided.append(tuple(now - then for now, then in zip(held, before, strict=True)))
    return divided


def normalized(weights: Sequence[float]) -> tuple[float, ...]:
    """Weights as a plan holds them: of sum 1, four decimals; alike where all are zero."""
    total = sum(weights)
    return tuple(round(weight / total if total else 1 / len(weights), 4) for weight in weights)
