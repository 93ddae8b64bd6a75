"""The decode side of a packed layer: read segments, attend over them, append; `backend.py` says by which code.

Every read goes by the block's own table (row, head, segment) -> (offset, tokens held). Dequantized tokens are scratch
of one layer's attention call and die with it. Token order inside a layer does not matter to attention, so tiers are
read one after the other and the reserve is a ring.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qpkv_kernels import packing
from qpkv_kernels.attention import attend
from qpkv_runtime.backend import block_layout, unsupported, use_kernels
from qpkv_runtime.compression import (
    STORAGE_DTYPES,
    HeadVectors,
    batch_shape,
    decode,
    encode,
    place_dtype,
    read_vectors,
    side_format,
    to_storage,
)
from qpkv_runtime.ledger import LayerLedger, Segment
from qpkv_runtime.plan import Format, Plan
from qpkv_runtime.quantizers import Encoded


class PackedLayer:
    """One layer's block, uint8 [B, layout.stored_bytes], read and written in place. Holds no data of its own."""

    def __init__(self, plan: Plan, layout: LayerLedger, block: Tensor) -> None:
        self.plan, self.layout, self.block = plan, layout, block
        self.num_heads, self.head_size = plan.model.num_kv_heads, plan.model.head_size
        self.storage_dtype = STORAGE_DTYPES[plan.model.storage_dtype]

    def table(self) -> Tensor:
        """int32 [B, H_kv, segments, 2]: offset in the block and tokens held, as a copy on the host."""
        return self._table().clone().cpu()

    def read(self, tier: int, entries: Tensor, vectors: HeadVectors) -> tuple[Tensor, Tensor, Tensor | None]:
        """Dequantize a tier of every head: float32 keys and values [B, H_kv, S, D], int32 positions or None.

        entries: int32 [B, H_kv, 2], the tier's part of the table. S is the most tokens that any head holds.
        """
        num_rows, num_heads = entries.shape[:2]
        most = int(entries[..., 1].max())
        members: dict[int, list[tuple[int, int, int]]] = {}
        for row, heads in enumerate(entries.tolist()):
            for head, (offset, count) in enumerate(heads):
                capacity = self.layout.capacity_tokens(head, tier, count)
                if capacity:
                    members.setdefault(capacity, []).append((row, head, offset))
        if len(members) == 1 and len(*members.values()) == num_rows * num_heads:
            ((capacity, places),) = members.items()
            keys, values, positions = self._read(tier, capacity, places, vectors)
            return keys[:, :, :most], values[:, :, :most], None if positions is None else positions[..., :most]
        keys, values = torch.zeros(2, num_rows, num_heads, most, self.head_size, device=self.block.device)
        positions = torch.zeros(num_rows, num_heads, most, dtype=torch.int32, device=self.block.device)
        for capacity, places in members.items():
            at = tuple(torch.tensor([place[i] for place in places], device=self.block.device) for i in (0, 1))
            read = self._read(tier, capacity, places, vectors)
            for whole, part in zip((keys, values, positions), read, strict=True):
                if part is not None:
                    whole[at[0], at[1], : part.shape[2]] = part[:, 0, :most]
        return keys, values, positions if self.layout.is_sliding else None

    def _read(
        self, tier: int, capacity: int, places: list[tuple[int, int, int]], vectors: HeadVectors
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `read`, of the segments at K places (row, head, offset) that have this capacity, arranged by
        `batch_shape`: [B, H_kv, capacity, D] where they are all, else [K, 1, capacity, D]."""
        segment = self.layout.segment_at(tier, capacity)
        rows, heads = (torch.tensor([place[i] for place in places], device=self.block.device) for i in (0, 1))
        shape = batch_shape(len(places), len(self.block), self.num_heads)
        own = {name: vector[rows, heads].unflatten(0, shape) for name, vector in vectors.items()}
        sides = []
        for side in ("key", "value"):
            bits = side_format(segment.format, side).bits
            if bits == 16:
                codes = self._buffer(f"{side}_codes", segment, places, self.storage_dtype)
                codes = codes.unflatten(-1, (-1, self.head_size))
            else:
                packed = self._buffer(f"{side}_codes", segment, places, torch.uint8)
                codes = packing.unpack(packed, bits, self.head_size)
            scales = self._buffer(f"{side}_scales", segment, places, self.storage_dtype)
            outliers = outlier_places = None
            if f"{side}_outliers" in segment.buffers:
                outliers = self._buffer(f"{side}_outliers", segment, places, self.storage_dtype)
                written_as = place_dtype(capacity, self.head_size)
                outlier_places = self._buffer(f"{side}_places", segment, places, written_as).long()
            sides.append(decode(segment.format, side, Encoded(codes, scales, outliers, outlier_places), own))
        positions = self._buffer("positions", segment, places, torch.int32) if self.layout.is_sliding else None
        return sides[0], sides[1], positions

    def _buffer(self, name: str, segment: Segment, places: list[tuple[int, int, int]], dtype: torch.dtype) -> Tensor:
        """One buffer of K segments laid out like `segment`, as `batch_shape` arranges them; empty if not stored."""
        shape = batch_shape(len(places), len(self.block), self.num_heads)
        if name not in segment.buffers:
            return self.block.new_empty(*shape, 0, dtype=dtype)
        start, size = segment.buffers[name].offset, segment.buffers[name].size_bytes
        pieces = [self.block[row, offset + start : offset + start + size] for row, _, offset in places]
        return torch.stack(pieces).view(dtype).view(*shape, -1)

    @torch.no_grad()
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
        """
        if use_kernels(query.device):
            return self._attend_with_kernels(query, key, value, num_appended, prompt_tokens, scaling, softcap)
        layout, device, num_new = self.layout, query.device, query.shape[2]
        window = self.plan.model.shape.sliding_windows[layout.layer]
        reserve_tokens = self.plan.decode.reserve_tokens
        vectors = read_vectors(self.block, layout, self.num_heads, self.head_size, self.storage_dtype)
        table = self.table()
        prompt = torch.tensor(list(prompt_tokens), device=device)[:, None, None, None]
        new_index = num_appended + torch.arange(num_new, device=device)
        query_index = new_index[:, None]  # [T, 1]
        query_position = prompt + query_index  # [B, 1, T, 1]

        parts: list[tuple[Tensor, Tensor, Tensor]] = []  # keys, values [B, H_kv, S, D]; visible, over [B, H_kv, T, S]
        for tier in range(layout.num_segments_per_head - 1):
            entries = table[:, :, tier]
            keys, values, positions = self.read(tier, entries, vectors)
            counts = entries[..., 1].to(device)[:, :, None, None]
            visible = torch.arange(keys.shape[2], device=device) < counts
            if positions is not None and window is not None:
                visible = visible & (positions[:, :, None] > query_position - window)
            parts.append((keys, values, visible))

        keys, values, _ = self.read(-1, table[:, :, -1], vectors)
        slots = torch.arange(keys.shape[2], device=device)
        index = num_appended - 1 - (num_appended - 1 - slots) % reserve_tokens  # what each slot of the ring holds
        new_keys, new_values = (self._encode_new(side, x, vectors) for side, x in (("key", key), ("value", value)))
        new = (self._decode_new("key", new_keys, vectors), self._decode_new("value", new_values, vectors))
        for held, appended in ((index, (keys, values)), (new_index, new)):
            visible = (held <= query_index) & (held > query_index - reserve_tokens)
            if window is not None:
                visible = visible & (held > query_index - window)
            parts.append((*appended, visible[None, None]))

        shape = torch.broadcast_shapes(*(visible.shape[:3] for *_, visible in parts))
        mask = torch.cat([visible.expand(*shape, -1) for *_, visible in parts], -1)
        out = attend(
            query,
            torch.cat([keys for keys, *_ in parts], 2).to(query.dtype),
            torch.cat([values for _, values, _ in parts], 2).to(query.dtype),
            None if bool(mask.all()) else mask,
            scaling,
            softcap,
        )
        self._append(new_keys, new_values, num_appended, prompt_tokens)
        return out

    def _attend_with_kernels(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        num_appended: int,
        prompt_tokens: Sequence[int],
        scaling: float,
        softcap: float | None,
    ) -> Tensor:
        """`attend`, token by token: each is appended and then attends to all that is held, itself included."""
        from qpkv_kernels import decode as kernels

        layer, model = self.layout.layer, self.plan.model
        layout = block_layout(layer, self.plan.holdings(layer), model.shape, self.storage_dtype, self.block.device)
        vectors = read_vectors(self.block, self.layout, self.num_heads, self.head_size, self.storage_dtype)
        prompt, out = torch.tensor(list(prompt_tokens), dtype=torch.int32, device=query.device), []
        for i in range(query.shape[2]):
            new_key = self._encode_new("key", key[:, :, i : i + 1], vectors)
            new_value = self._encode_new("value", value[:, :, i : i + 1], vectors)
            self._append(new_key, new_value, num_appended + i, prompt_tokens)
            step = query[:, :, i].contiguous()
            try:
                out.append(kernels.attend(step, self.block, layout, prompt + (num_appended + i), scaling, softcap))
            except kernels.UnsupportedByKernelsError as error:
                raise unsupported(layer, self.plan.holdings(layer), error) from None
        return torch.stack(out, 2)

    def _encode_new(self, side: str, x: Tensor, vectors: HeadVectors) -> Encoded:
        valid = torch.ones(x.shape[:3], dtype=torch.bool, device=x.device)
        stored = to_storage(self.plan.model.storage_dtype, self.layout.layer, side, x)
        return encode(self.layout.layer, self._reserve_format, side, stored, valid, vectors)

    def _decode_new(self, side: str, encoded: Encoded, vectors: HeadVectors) -> Tensor:
        return decode(self._reserve_format, side, encoded, vectors)

    @property
    def _reserve_format(self) -> Format:
        return self.plan.formats[self.plan.decode.format]

    def _append(self, keys: Encoded, values: Encoded, num_appended: int, prompt_tokens: Sequence[int]) -> None:
        """Write the last tokens of `keys` and `values` into the ring, each over the oldest one once it is full."""
        num_new, reserve_tokens = keys.codes.shape[2], self.plan.decode.reserve_tokens
        first = max(0, num_new - reserve_tokens)
        index = num_appended + torch.arange(first, num_new, device=self.block.device)
        slots = index % reserve_tokens
        for side, encoded in (("key", keys), ("value", values)):
            bits = side_format(self._reserve_format, side).bits
            buffer = self._reserve(f"{side}_codes")
            if bits == 16:
                held = buffer.view(self.storage_dtype).unflatten(-1, (-1, self.head_size))
                held[:, :, slots] = encoded.codes[:, :, first:]
            else:
                held = packing.unpack(buffer, bits, self.head_size)
                held[:, :, slots] = encoded.codes[:, :, first:]
                buffer.copy_(packing.pack(held, bits))
            if encoded.scales.shape[-1]:
                numbers = encoded.scales.unflatten(-1, (num_new, -1))[:, :, first:]
                scales = self._reserve(f"{side}_scales").view(self.storage_dtype)
                scales.unflatten(-1, (-1, numbers.shape[-1]))[:, :, slots] = numbers
        if self.layout.is_sliding:
            prompt = torch.tensor(list(prompt_tokens), device=self.block.device)
            positions = self._reserve("positions").view(torch.int32)
            positions[:, :, slots] = (prompt[:, None, None] + index).to(torch.int32)
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
