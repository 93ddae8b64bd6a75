"""The orthonormal Walsh-Hadamard transform over channels.

`hadamard` is butterflies of additions and one final scaling: each output is a fixed sequence of roundings, the same
for any batch shape and any backend, so codes made from it can be compared bit for bit. `hadamard_product` is the same
transform as a matrix product, several times faster and equal to rounding only: for reading codes back.
A head size that is not a power of two is transformed in blocks of its largest power-of-two divisor. Both are symmetric
and orthonormal, so they are their own inverses.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@torch.no_grad()
def hadamard(x: Tensor) -> Tensor:
    """x: float [..., D] -> a new tensor of the same shape."""
    head_size = x.shape[-1]
    block = _block(head_size)
    # channels first: every step is then long runs of memory; a copy in any case
    y = x.reshape(-1, head_size).t().clone(memory_format=torch.contiguous_format)
    other = torch.empty_like(y)
    step = 1
    while step < block:
        low, high = y.view(-1, 2, step, y.shape[1]).unbind(1)
        total, difference = other.view(-1, 2, step, y.shape[1]).unbind(1)
        torch.add(low, high, out=total)
        torch.sub(low, high, out=difference)
        y, other = other, y
        step *= 2
    return y.mul_(block**-0.5).t().contiguous().view(x.shape)


def hadamard_product(x: Tensor) -> Tensor:
    """x: float [..., D] -> a new tensor of the same shape."""
    with torch.autocast(x.device.type, enabled=False):  # in x's own type, whatever the model runs in
        return x @ _matrix(x.shape[-1], x.dtype, x.device)


def _block(head_size: int) -> int:
    return head_size & -head_size


@lru_cache(maxsize=16)
def _matrix(head_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return hadamard(torch.eye(head_size, dtype=dtype, device=device))
