"""The decode side of a packed layer: read segments, attend over them, append; `backend.py` says by which code.

Every read goes by the block's own table (row, head, segment) -> (offset, tokens held). Dequantized tokens are scratch
of one layer's attention call and die with it. Token order inside a layer does not matter to attention, so tiers are
read one after the other and the reserve is a ring.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from qpkv_kernels import packing
from qpkv_kernels.attention import attend
from qpkv_kernels.hadamard import hadamard_product
from qpkv_runtime.backend import use_kernels
from qpkv_runtime.compression import (
    STORAGE_DTYPES,
    HeadVectors,
    decode,
    encode,
    place_dtype,
    read_vectors,
    side_format,
    to_storage,
)
from qpkv_runtime.decode_step import Counters, DecodeStep
from qpkv_runtime.ledger import LayerLedger
from qpkv_runtime.plan import Format, Plan
from qpkv_runtime.quantizers import ROTATED, Encoded
from qpkv_runtime.segments import Segments


class PackedLayer:
    """One layer's block, uint8 [B, layout.stored_bytes], read and written in place. Holds no data of its own."""

    def __init__(self, plan: Plan, layout: LayerLedger, block: Tensor) -> None:
        self.plan, self.layout, self.block = plan, layout, block
        self.num_heads, self.head_size = plan.model.num_kv_heads, plan.model.head_size
        self.storage_dtype = STORAGE_DTYPES[plan.model.storage_dtype]

    def table(self) -> Tensor:
        """int32 [B, H_kv, segments, 2]: offset in the block and tokens held, as a copy on the host."""
        return self._table().clone().cpu()

    def read(
        self, tier: int, entries: Tensor, vectors: HeadVectors, rotated: Collection[str] = ()
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Dequantize a tier of every head: float32 keys and values [B, H_kv, S, D], int32 positions or None.

        entries: int32 [B, H_kv, 2], the tier's part of the table; rotated: the sides, "key" and "value", to give as
        `ROTATED.into` maps them. S is the most tokens that any head holds; what a head has behind its own is finite.
        """
        offsets, counts = entries.numpy().astype(np.int64).transpose(2, 0, 1)
        most = int(counts.max())
        parts = [
            (segments, [x if x is None else x[:, :, :most] for x in self._read(segments, vectors, rotated)])
            for segments in Segments.arrange(self.block, self.layout, tier, offsets, counts)
        ]
        if len(parts) == 1 and parts[0][0].rows.shape == counts.shape:
            ((_, (keys, values, positions)),) = parts
            assert keys is not None and values is not None
            return keys, values, positions
        keys, values = torch.zeros(
            2, *counts.shape, most, self.head_size, dtype=torch.float32, device=self.block.device
        )
        positions = torch.zeros(*counts.shape, most, dtype=torch.int32, device=self.block.device)
        for segments, read in parts:
            rows, heads = (torch.from_numpy(at[:, 0]).to(self.block.device) for at in (segments.rows, segments.heads))
            for whole, part in zip((keys, values, positions), read, strict=True):
                if part is not None:
                    whole[rows, heads, : part.shape[2]] = part[:, 0]
        return keys, values, positions if self.layout.is_sliding else None

    def _read(
        self, segments: Segments, vectors: HeadVectors, rotated: Collection[str]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `read`, of all that these have room for: [R, K, capacity, D]."""
        format, own = segments.widest.format, {name: segments.pick(vector) for name, vector in vectors.items()}
        sides = []
        for side in ("key", "value"):
            bits = side_format(format, side).bits
            codes = segments.read(f"{side}_codes", self.storage_dtype if bits == 16 else torch.uint8)
            codes = (
                codes.unflatten(-1, (-1, self.head_size)) if bits == 16 else packing.unpack(codes, bits, self.head_size)
            )
            outliers = places = None
            if side_format(format, side).outliers:
                outliers = segments.read(f"{side}_outliers", self.storage_dtype)
                places = segments.read(f"{side}_places", place_dtype(segments.widest.capacity_tokens, self.head_size))
                places = places.long()
            encoded = Encoded(codes, segments.read(f"{side}_scales", self.storage_dtype), outliers, places)
            sides.append(decode(format, side, encoded, own, side in rotated))
        return sides[0], sides[1], segments.read("positions", torch.int32) if self.layout.is_sliding else None

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        num_appended: int,
        prompt_tokens: Sequence[int],
        scaling: float,
        softcap: float | None,
    ) -> Tensor:
        """Attend from T new tokens to everything held and causally to each other, then append them to the reserve.

        query [B, H, T, D], key and value [B, H_kv, T, D]; num_appended: tokens appended so far; prompt_tokens: each
        row's prompt length -> [B, H, T, D]. A new token is attended to as it is stored, so T tokens at once see what
        T single steps would: with a reserve of R, the query of appended token i sees appended tokens above i - R.

        The output can be differentiated by the query, on the reference path; new keys and values count as constants.
        """
        key, value = key.detach(), value.detach()
        if not query.requires_grad and use_kernels(query.device):
            counters = Counters.of(prompt_tokens, num_appended, self.layout.layer + 1, query.device)
            step = DecodeStep.of(self.plan, self.layout.layer, query.device)
            out = step(query, key, value, self.block, 0, counters, scaling, softcap)
            counters.check(self.plan.model.storage_dtype)
            return out
        layout, device, num_new = self.layout, query.device, query.shape[2]
        window = self.plan.model.shape.sliding_windows[layout.layer]
        reserve_tokens = self.plan.decode.reserve_tokens
        vectors = read_vectors(self.block, layout, self.num_heads, self.head_size, self.storage_dtype)
        rotated = self._rotated_sides(softcap)
        table = self.table()
        prompt = torch.tensor(list(prompt_tokens), device=device)[:, None, None, None]
        new_index = num_appended + torch.arange(num_new, device=device)
        query_index = new_index[:, None]  # [T, 1]
        query_position = prompt + query_index  # [B, 1, T, 1]

        # keys, values [B, H_kv, S, D]; visible, over [B, H_kv, T, S], None for all
        parts: list[tuple[Tensor, Tensor, Tensor | None]] = []
        for tier in range(layout.num_segments_per_head - 1):
            entries = table[:, :, tier]
            keys, values, positions = self.read(tier, entries, vectors, rotated)
            visible = None
            if (positions is not None and window is not None) or int(entries[..., 1].min()) < keys.shape[2]:
                counts = entries[..., 1].to(device)[:, :, None, None]
                visible = torch.arange(keys.shape[2], device=device) < counts
                if positions is not None and window is not None:
                    visible = visible & (positions[:, :, None] > query_position - window)
            parts.append((keys, values, visible))

        keys, values, _ = self.read(-1, table[:, :, -1], vectors, rotated)
        slots = torch.arange(keys.shape[2], device=device)
        index = num_appended - 1 - (num_appended - 1 - slots) % reserve_tokens  # what each slot of the ring holds
        new_keys, new_values = (self._encode_new(side, x, vectors) for side, x in (("key", key), ("value", value)))
        new = [
            decode(self._reserve_format, side, x, vectors, side in rotated)
            for side, x in (("key", new_keys), ("value", new_values))
        ]
        for held, appended in ((index, (keys, values)), (new_index, (new[0], new[1]))):
            visible = None
            if num_new > 1 or num_appended + num_new > min(reserve_tokens, window or reserve_tokens):
                visible = (held <= query_index) & (held > query_index - reserve_tokens)
                if window is not None:
                    visible = visible & (held > query_index - window)
                visible = visible[None, None]
            parts.append((*appended, visible))
        queries = query.float() if rotated else query
        if "key" in rotated:
            by_head = queries.unflatten(1, (self.num_heads, -1))
            queries = ROTATED.query(by_head.flatten(2, 3), vectors["rotated"]).view(queries.shape)
        out = attend(
            queries,
            torch.cat([keys for keys, *_ in parts], 2).to(queries.dtype),
            torch.cat([values for _, values, _ in parts], 2).to(queries.dtype),
            _whole_mask(parts),
            scaling,
            softcap,
        )
        self._append(new_keys, new_values, num_appended, prompt_tokens)
        return (hadamard_product(out) if "value" in rotated else out).to(query.dtype)

    def _encode_new(self, side: str, x: Tensor, vectors: HeadVectors) -> Encoded:
        valid = torch.ones(x.shape[:3], dtype=torch.bool, device=x.device)
        stored = to_storage(self.plan.model.storage_dtype, self.layout.layer, side, x)
        return encode(self.layout.layer, self._reserve_format, side, stored, valid, vectors)

    def _rotated_sides(self, softcap: float | None) -> tuple[str, ...]:
        """The sides that attention sees rotated, where most of what is held is: the query is then transformed instead
        of every key, and the output instead of every value. Capped logits need all of q . k."""
        held = [
            (format, tokens if isinstance(tokens, int) else sum(tokens) / len(tokens))
            for format, tokens in self.plan.holdings(self.layout.layer)
        ]
        total = sum(tokens for _, tokens in held)
        return tuple(
            side
            for side in (("key", "value") if softcap is None else ("value",))
            if 2 * sum(n for format, n in held if side_format(format, side).quantizer == "rotated") > total
        )

    @property
    def _reserve_format(self) -> Format:
        return self.plan.formats[self.plan.decode.format]

    def _append(self, keys: Encoded, values: Encoded, num_appended: int, prompt_tokens: Sequence[int]) -> None:
        """Write the last tokens of `keys` and `values` into the ring, each over the oldest one once it is full."""
        num_new, reserve_tokens = keys.codes.shape[2], self.plan.decode.reserve_tokens
        first = max(0, num_new - reserve_tokens)
        slot = (num_appended + first) % reserve_tokens
        before_wrap = min(num_new, first + reserve_tokens - slot)
        runs = [(slice(first, before_wrap), slice(slot, slot + before_wrap - first))]
        if before_wrap < num_new:
            runs.append((slice(before_wrap, num_new), slice(0, num_new - before_wrap)))
        for side, encoded in (("key", keys), ("value", values)):
            bits = side_format(self._reserve_format, side).bits
            buffer = self._reserve(f"{side}_codes")
            if bits == 16:
                held = buffer.view(self.storage_dtype).unflatten(-1, (-1, self.head_size))
            else:
                held = packing.unpack(buffer, bits, self.head_size)
            for new, slots in runs:
                held[:, :, slots] = encoded.codes[:, :, new]
            if bits < 16:
                buffer.copy_(packing.pack(held, bits))
            if encoded.scales.shape[-1]:
                numbers = encoded.scales.unflatten(-1, (num_new, -1))
                scales = self._reserve(f"{side}_scales").view(self.storage_dtype).unflatten(-1, (-1, numbers.shape[-1]))
                for new, slots in runs:
                    scales[:, :, slots] = numbers[:, :, new]
        if self.layout.is_sliding:
            prompt = torch.tensor(list(prompt_tokens), device=self.block.device)[:, None, None]
            index = num_appended + torch.arange(num_new, device=self.block.device)
            positions = self._reserve("positions").view(torch.int32)
            for new, slots in runs:
                positions[:, :, slots] = (prompt + index[new]).to(torch.int32)
        self._table()[:, :, -1, 1] = min(num_appended + num_new, reserve_tokens)

    def _table(self) -> Tensor:
        """The table in the block, a view to write through."""
        start, size = self.layout.table.offset, self.layout.table.size_bytes
        entries = self.block[:, start : start + size].view(torch.int32)
        return entries.view(len(entries), self.num_heads, -1, 2)

    def _reserve(self, name: str) -> Tensor:
        """A buffer of the reserve, all rows and heads: uint8 [B, H_kv, size], a view to write through."""
        first = self.layout.segment(0, -1)
        buffer = first.buffers[name]
        between_heads = self.layout.segment(1, -1).offset - first.offset if self.num_heads > 1 else 0
        row_stride = self.block.stride(0)
        start = self.block.storage_offset() + buffer.offset
        return self.block.as_strided(
            (self.block.shape[0], self.num_heads, buffer.size_bytes), (row_stride, between_heads, 1), start
        )


def _whole_mask(parts: Sequence[tuple[Tensor, Tensor, Tensor | None]]) -> Tensor | None:
    """The parts' masks side by side, bool [B or 1, H_kv or 1, T or 1, S]; None where everything is visible."""
    given = [visible for *_, visible in parts if visible is not None]
    if not given:
        return None
    shape = [max(visible.shape[i] for visible in given) for i in range(3)]
    masks = [
        torch.ones(*shape, keys.shape[2], dtype=torch.bool, device=keys.device)
        if visible is None
        else visible.expand(*shape, -1)
        for keys, _, visible in parts
    ]
    return torch.cat(masks, -1)
