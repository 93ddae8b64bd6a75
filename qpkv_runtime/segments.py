"""Moving one buffer of many segments between a layer's block and a tensor, all of them at once.

Segments of one size at regular offsets, as even heads have, are a strided view of the block: nothing is copied to read
them. Others are copied, a head at a time, from and to a tensor as wide as the widest needs, which is zero where a
narrower one has nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qpkv_runtime.ledger import LayerLedger, Segment
from qpkv_runtime.quantizers import sees_room

Places = NDArray[np.int64]


@dataclass(frozen=True)
class Segments:
    """Segments of one tier (-1: the reserve) of a layer's `block`, uint8 [B, bytes], arranged in R rows of K.

    rows, heads, offsets, capacities: int64 [R, K]: each one's row and head, where in its row of the block it starts,
    and the tokens that it has room for. Where that is 0 nothing is written, what is read means nothing, but is finite.
    """

    block: Tensor
    layout: LayerLedger
    tier: int
    rows: Places
    heads: Places
    offsets: Places
    capacities: Places

    @classmethod
    def arrange(
        cls, block: Tensor, layout: LayerLedger, tier: int, offsets: Places, counts: Places
    ) -> Iterator[Segments]:
        """The segments that hold `counts` tokens at `offsets` (both [B, H_kv]), all as they are, [B, H_kv]; or those of
        each capacity by themselves, [K, 1], for formats that look at more of a segment than its tokens."""
        (num_rows, num_heads), format = counts.shape, layout.format_of(tier)
        capacities = np.array(
            [[layout.capacity_tokens(head, tier, held) for head, held in enumerate(row)] for row in counts.tolist()],
            dtype=np.int64,
        ).reshape(counts.shape)
        rows, heads = np.indices((num_rows, num_heads))
        sizes = set(capacities.flat) - {0}
        if (len(sizes) == 1 and capacities.all()) or (sizes and not sees_room(format)):
            yield cls(block, layout, tier, rows, heads, offsets, capacities)
            return
        for size in sizes:
            at = capacities == size
            yield cls(block, layout, tier, *(x[at][:, None] for x in (rows, heads, offsets, capacities)))

    def pick(self, x: Tensor) -> Tensor:
        """[B, H_kv, ...] -> [R, K, ...], what belongs to each."""
        if self.rows.shape == x.shape[:2]:
            return x
        rows, heads = (torch.from_numpy(at).to(x.device) for at in (self.rows, self.heads))
        return x[rows, heads]

    @cached_property
    def widest(self) -> Segment:
        """The layout of those with most room, at offsets from its own start."""
        return self.layout.segment_at(self.tier, int(self.capacities.max()))

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """[R, K, numbers]: a view of the block where they lie regularly, else a copy; empty if not stored."""
        if name not in self.widest.buffers:
            return self.block.new_empty(*self.rows.shape, 0, dtype=dtype)
        if self._strides is not None:
            return self._view(name).view(dtype)
        content = self.block.new_zeros(*self.rows.shape, self.widest.buffers[name].size_bytes)
        for held, own in self._pieces(name, content):
            own.copy_(held)
        return content.view(dtype)

    def write(self, name: str, content: Tensor) -> None:
        """content: [R, K, numbers] of any type, as the widest has them."""
        content = content.contiguous().view(torch.uint8)
        if self._strides is not None:
            self._view(name).copy_(content)
            return
        for held, own in self._pieces(name, content):
            held.copy_(own)

    @cached_property
    def _starts(self) -> Places:
        """Of every segment, in bytes from the block's first."""
        starts: Places = self.rows * self.block.stride(0) + self.offsets
        return starts

    @cached_property
    def _strides(self) -> tuple[int, int] | None:
        """Bytes from one row to the next and from one segment to the next, if all are alike and lie regularly."""
        starts, (num_rows, num_columns) = self._starts, self.rows.shape
        down = int(starts[1, 0] - starts[0, 0]) if num_rows > 1 else 0
        along = int(starts[0, 1] - starts[0, 0]) if num_columns > 1 else 0
        regular = starts[0, 0] + down * np.arange(num_rows)[:, None] + along * np.arange(num_columns)
        is_regular = (self.capacities == self.capacities[0, 0]).all() and (starts == regular).all()
        return (down, along) if is_regular and min(down, along) >= 0 else None

    def _view(self, name: str) -> Tensor:
        assert self._strides is not None
        buffer = self.widest.buffers[name]
        start = self.block.storage_offset() + int(self._starts[0, 0]) + buffer.offset
        return self.block.as_strided((*self.rows.shape, buffer.size_bytes), (*self._strides, 1), start)

    def _pieces(self, name: str, content: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(where the block holds them, where `content` [R, K, bytes of the widest] has them), uint8
        [rows, lines, bytes], of the buffer's parts, run by run."""
        base, first = self.widest.buffers[name].offset, self.block.storage_offset()
        wide = self.layout.parts(name, self.tier, self.widest.capacity_tokens)
        for rows, column, start, down, capacity in self._runs:
            for part, of_widest in zip(self.layout.parts(name, self.tier, capacity), wide, strict=True):
                size = (rows.stop - rows.start, part.num_lines, part.line_bytes)
                held = self.block.as_strided(size, (down, part.line_bytes, 1), first + start + part.offset)
                begin, length = of_widest.offset - base, of_widest.num_lines * of_widest.line_bytes
                lines = content[rows, column, begin : begin + length].unflatten(-1, (part.num_lines, -1))
                yield held, lines[..., : part.line_bytes]

    @cached_property
    def _runs(self) -> list[tuple[slice, int, int, int, int]]:
        """(rows, column, where the first one starts, bytes from one to the next, capacity): a column's
        segments where they are of one size and lie regularly, as they do unless prompts divide heads unlike; else each
        by itself. Those that hold nothing are left out."""
        runs = []
        starts, (num_rows, num_columns) = self._starts, self.rows.shape
        for column in range(num_columns):
            sizes, steps = self.capacities[:, column], np.diff(starts[:, column])
            is_run = (sizes == sizes[0]).all() and (steps == steps[:1]).all() and (steps >= 0).all()
            for rows in [slice(0, num_rows)] if is_run else [slice(row, row + 1) for row in range(num_rows)]:
                if sizes[rows.start]:
                    down = int(steps[0]) if is_run and num_rows > 1 else 0
                    runs.append((rows, column, int(starts[rows.start, column]), down, int(sizes[rows.start])))
        return runs
