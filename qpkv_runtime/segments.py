"""Moving one buffer of many segments between a layer's block and a tensor, all of them at once.

Segments of one size at regular offsets, as even heads have, are a strided view of the block: nothing is copied to read
them. Others are gathered and scattered by the index of their words, in a tensor as wide as the widest needs;
what a narrower one has behind its own end repeats its last word.
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
        word = self._word(name)
        parts = [self._words(word)[self._index(name, part, word)[0]].flatten(2) for part in self._parts(name)]
        return torch.cat(parts, -1).view(dtype)

    def write(self, name: str, content: Tensor) -> None:
        """content: [R, K, numbers] of any type, as the widest has them."""
        content = content.contiguous().view(torch.uint8)
        if self._strides is not None:
            self._view(name).copy_(content)
            return
        word, start = self._word(name), 0
        words = content.view(word)
        for part in self._parts(name):
            index, is_own = self._index(name, part, word)
            size = index[0, 0].numel()
            self._words(word)[index[is_own]] = words[..., start : start + size].unflatten(-1, index.shape[2:])[is_own]
            start += size

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

    def _words(self, word: torch.dtype) -> Tensor:
        """The whole block as words, a view."""
        size = (len(self.block) - 1) * self.block.stride(0) + self.block.shape[1]
        return self.block.as_strided((size,), (1,)).view(word)

    def _word(self, name: str) -> torch.dtype:
        """Outliers may be an odd number of 16-bit values."""
        return torch.int32 if self.widest.buffers[name].size_bytes % 4 == 0 else torch.int16

    def _parts(self, name: str) -> range:
        return range(len(self.layout.parts(name, self.tier, self.widest.capacity_tokens)))

    def _index(self, name: str, part: int, word: torch.dtype) -> tuple[Tensor, Tensor]:
        """(index into `_words`, whether it is a segment's own), [R, K, lines, words] of a part of the buffer."""
        widest, is_empty = int(self.capacities.argmax()), self.capacities == 0
        starts = np.where(is_empty, self._starts.flat[widest], self._starts)
        sizes, of = np.unique(np.where(is_empty, self.capacities.flat[widest], self.capacities), return_inverse=True)
        parts = [self.layout.parts(name, self.tier, size)[part] for size in sizes.tolist()]
        assert not any(p.offset % word.itemsize or p.line_bytes % word.itemsize for p in parts)
        of = of.reshape(starts.shape)
        first = (starts + np.array([p.offset for p in parts])[of]) // word.itemsize
        length = np.array([p.line_bytes for p in parts])[of] // word.itemsize
        device = self.block.device
        starts_at, ends, is_written = (
            torch.from_numpy(x).to(device)[..., None, None] for x in (first, length, ~is_empty)
        )
        lines = torch.arange(parts[0].num_lines, device=device)[:, None]
        words = torch.arange(int(length.max()), device=device).expand(len(lines), -1)
        return starts_at + lines * ends + torch.minimum(words, ends - 1), (words < ends) & is_written
