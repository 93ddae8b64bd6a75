"""The information-bottleneck Lagrangian of a plan, in what can be measured. Pure numbers: no torch, no model.

    J = D + lambda * R                       (nats per token; what a search at a fixed lambda would minimize)

R, the rate, is a sequence's stored bytes: the map from KV to KV_c is deterministic, so that I(KV; KV_c) = H(KV_c) is at
most 8 R bits (arXiv 2412.12706, eq. 6). D, what relevance is lost, is the mean KL from the full cache's next-token
distribution to the plan's: I(KV; Y) - I(KV_c; Y) is at most its sum over Y's tokens, since Y - KV - KV_c is Markov; or
the cross-entropy, which differs by a constant for text that the full cache wrote itself. Minimizing J is maximizing
I(KV_c; Y) - I(KV; KV_c) / beta up to those bounds, with beta = 1 / lambda.

At a fixed budget lambda is not chosen but read off: the slope of the operational rate-distortion curve at the plan,
lambda = -dD/dR, in nats that another MiB would save.
"""

from __future__ import annotations

MIB = 2**20


def lagrangian(loss_nats: float, stored_bytes: int, lambda_nats_per_mib: float) -> float:
    """J in nats per token."""
    return loss_nats + lambda_nats_per_mib * stored_bytes / MIB


def slope(loss_nats: float, stored_bytes: int, other_loss_nats: float, other_bytes: int) -> float:
    """lambda in nats per MiB between two points of the curve; 0 between points of the same bytes."""
    if stored_bytes == other_bytes:
        return 0.0
    return (loss_nats - other_loss_nats) * MIB / (other_bytes - stored_bytes)


def beta(lambda_nats_per_mib: float) -> float | None:
    """MiB per nat; None where more bytes save nothing (the curve is flat, or noise tilts it)."""
    return 1 / lambda_nats_per_mib if lambda_nats_per_mib > 0 else None
