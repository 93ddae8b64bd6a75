"""Decode attention over a packed block in plain PyTorch, float32: the reference of `decode.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from qpkv_kernels import packing
from qpkv_kernels.block import BlockLayout
from qpkv_kernels.hadamard import hadamard_product


def attend_reference(
    query: Tensor, block: Tensor, layout: BlockLayout, places: Tensor, prompt: Tensor, appended: Tensor,
    scaling: float, softcap: float | None = None, offset: int = 0,
) -> Tensor:  # fmt: skip
    """Attention of one query per head to every token held that its sliding window reaches.

    query [B, H, D]; block uint8 [B, bytes]; places: the layout's table; the query's position in its sequence is prompt
    (int [B]) + appended (int [1]) + offset -> float32 [B, H, D], or float64 for such a query.
    """
    num_heads, num_segments = layout.num_heads, len(layout.segments)
    queries = query.to(torch.promote_types(query.dtype, torch.float32)).unflatten(1, (num_heads, -1))
    out = torch.empty_like(queries)
    position = prompt + appended + offset
    for row in range(len(query)):
        table = block[row, : 8 * num_heads * num_segments].view(torch.int32).view(num_heads, num_segments, 2).tolist()
        for head in range(num_heads):
            held = [_read(block[row], layout, places, head, i, *table[head][i]) for i in range(num_segments)]
            keys, values, positions = (torch.cat(parts) for parts in zip(*held, strict=True))
            keys, values = keys.to(queries.dtype), values.to(queries.dtype)
            logits = queries[row, head] @ keys.T * scaling
            if softcap is not None:
                logits = torch.tanh(logits / softcap) * softcap
            if layout.window is not None:
                logits = logits.masked_fill(positions <= position[row] - layout.window, float("-inf"))
            out[row, head] = logits.softmax(-1) @ values
    return out.flatten(1, 2)


def _read(
    block: Tensor, layout: BlockLayout, places: Tensor, head: int, index: int, offset: int, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """float32 keys and values [count, D] and int32 positions [count] of one head's segment."""
    segment, head_size = layout.segments[index], layout.head_size
    place = layout.place(places, head, index, count)
    room = place["capacity"]

    def buffer(name: str, dtype: torch.dtype, numbers: int) -> Tensor:
        start = offset + place[name]
        return block[start : start + numbers * dtype.itemsize].view(dtype)

    read = []
    for name, side in (("key", segment.keys), ("value", segment.values)):
        if side.bits == 16:
            x = buffer(f"{name}_codes", layout.dtype, room * head_size).view(room, head_size).float()
        else:
            x = packing.unpack(
                buffer(f"{name}_codes", torch.uint8, room * head_size * side.bits // 8), side.bits, head_size
            )
            x = x.float()
        if side.scales == "channel":
            pairs = buffer(f"{name}_scales", layout.dtype, 2 * head_size * -(-room // side.group))
            scale, zero = pairs.float().view(head_size, -1, 2).repeat_interleave(side.group, 1)[:, :room].unbind(-1)
            x = x * scale.T + zero.T
        elif side.scales == "token":
            pairs = buffer(f"{name}_scales", layout.dtype, 2 * room * -(-head_size // side.group))
            scale, zero = pairs.float().view(room, -1, 2).repeat_interleave(side.group, 1)[:, :head_size].unbind(-1)
            x = x * scale + zero
        elif side.scales == "rotated":
            scale = buffer(f"{name}_scales", layout.dtype, room).float()
            x = hadamard_product((x + 0.5 - 2 ** (side.bits - 1)) * scale[:, None])
        if side.vectors:
            start = layout.vectors + head * layout.num_vectors * head_size * 2
            vectors = block[start : start + layout.num_vectors * head_size * 2].view(layout.dtype).float()
            *mean, balancer = vectors.view(-1, head_size)[list(side.vectors)]
            x = x / balancer + (mean[0] if mean else 0)
        read.append(x[:count])
    stored = place["positions"] >= 0
    positions = (
        buffer("positions", torch.int32, room) if stored else torch.zeros(room, dtype=torch.int32).to(block.device)
    )
    return read[0], read[1], positions[:count]
