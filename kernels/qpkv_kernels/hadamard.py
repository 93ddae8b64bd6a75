"""The orthonormal Walsh-Hadamard transform over channels.

Butterflies of additions and one final scaling, never a matrix product: each output is then a fixed sequence of
roundings, the same for any batch shape and any backend, so codes made from it can be compared bit for bit.
A head size that is not a power of two is transformed in blocks of its largest power-of-two divisor.
"""

from __future__ import annotations

from torch import Tensor


def hadamard(x: Tensor) -> Tensor:
    """x: float [..., D] -> the same shape. Symmetric and orthonormal, so it is its own inverse."""
    head_size = x.shape[-1]
    block = head_size & -head_size
    y = x.reshape(-1, head_size // block, block)
    step = 1
    while step < block:
        pairs = y.unflatten(-1, (-1, 2, step))
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        y = _interleave(low + high, low - high)
        step *= 2
    return (y * block**-0.5).reshape(x.shape)


def _interleave(first: Tensor, second: Tensor) -> Tensor:
    """[..., pairs, step] twice -> [..., pairs * 2 * step]."""
    out = first.new_empty(*first.shape[:-1], 2, first.shape[-1])
    out[..., 0, :] = first
    out[..., 1, :] = second
    return out.flatten(-3)
