"""From one layer's prefill to its packed block: score, select, quantize, pack. The one compression code.

The runtime calls these on the prompt it just attended to, the planner on prefills it has stored; the same tensors
give bitwise the same kept tokens and codes. Keys and values are rounded to the plan's 16-bit type before anything is
computed from them but scores, so a stored 16-bit prefill is as good as the live one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qpkv_kernels import packing
from qpkv_runtime import scorers
from qpkv_runtime.errors import NumericsError
from qpkv_runtime.ledger import LayerLedger, place_bytes
from qpkv_runtime.methods import SCORERS, ParameterValue
from qpkv_runtime.plan import Format, Scorer, TensorFormat
from qpkv_runtime.quantizers import KEY_QUANTIZERS, VALUE_QUANTIZERS, Encoded
from qpkv_runtime.scorers import Prefill

STORAGE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
LARGEST_STORED = 2.0**60  # of a bfloat16: the squares of larger ones, which scales are searched by, overflow float32
HeadVectors = Mapping[str, Tensor]  # quantizer -> the vectors it stores of every head, 16-bit [B, H_kv, vectors, D]
USE_BFLOAT16 = "; plan with storage_dtype bfloat16"


@dataclass(frozen=True)
class Scoring:
    """How a plan orders tokens: a scorer with its parameters (sorted pairs), and the sinks and window that lead."""

    scorer: str
    parameters: tuple[tuple[str, ParameterValue], ...]
    sinks: int
    window: int

    @classmethod
    def of(cls, scorer: Scorer, sinks: int, window: int) -> Scoring:
        return cls(scorer.name, tuple(sorted(scorer.parameters.items())), sinks, window)

    @property
    def needs_parts(self) -> bool:
        """Whether the scorer looks at the layer's module (`LayerParts`)."""
        return not {"rotary_embedding", "output_projection"}.isdisjoint(SCORERS[self.scorer].needs)


@dataclass(frozen=True)
class Observation:
    """What is remembered of a layer's prefill besides keys and values.

    importance: float32 [B, H_kv, T], +inf must stay, -inf must go; query_stats: float32 [B, H_kv, 2, D], over the GQA
    group: E q**2 of the window's queries and max |q| of all.
    """

    importance: Tensor
    query_stats: Tensor


@dataclass(frozen=True)
class Ranking:
    """The importance order. order: int [B, H_kv, T], most important first; num_allowed: [B, H_kv], how many of them
    may be kept at all (the first ones)."""

    order: Tensor
    num_allowed: Tensor

    def of_rows(self, rows: slice) -> Ranking:
        return Ranking(self.order[rows], self.num_allowed[rows])


@dataclass(frozen=True)
class Selection:
    """The tokens of one tier. rows: int64 [B, H_kv, S], indices along T in ascending order; counts: int64 [B, H_kv],
    how many of them are real (the first ones)."""

    rows: Tensor
    counts: Tensor

    @property
    def valid(self) -> Tensor:
        """bool [B, H_kv, S]."""
        return torch.arange(self.rows.shape[-1], device=self.rows.device) < self.counts[..., None]


@dataclass(frozen=True)
class TierTensors:
    """What one tier holds: keys and values in the 16-bit type [B, H_kv, S, D], zero where not valid; positions int32
    [B, H_kv, S], counted from each row's first token; valid bool [B, H_kv, S]."""

    keys: Tensor
    values: Tensor
    positions: Tensor
    valid: Tensor


def observe(scoring: Scoring, prefill: Prefill) -> Observation:
    """Score a layer's tokens and mark those that must stay (sinks, window) and go (padding, out of the window).

    prefill: everything; the scorer is shown what it needs. Its window and sinks are the scoring's.
    """
    prefill = replace(prefill, window=scoring.window, sinks=scoring.sinks)
    shown = prefill.shown(SCORERS[scoring.scorer].needs)
    importance = scorers.SCORERS[scoring.scorer].score(shown, dict(scoring.parameters))
    importance = importance.masked_fill(prefill.must_stay, float("inf")).masked_fill(prefill.must_go, float("-inf"))
    window_queries, num_heads = prefill.query[:, :, -scoring.window :], prefill.key.shape[1]
    is_query = prefill.is_token[..., -window_queries.shape[2] :]  # [B, 1, window]
    squares = (window_queries.double() ** 2).unflatten(1, (num_heads, -1)) * is_query[:, :, None, :, None]
    num_queries = is_query.sum(-1).clamp(min=1)[..., None] * squares.shape[2]
    moment = (squares.sum((2, 3)) / num_queries).float()
    sizes = prefill.query.abs().masked_fill(~prefill.is_token[..., None], 0).amax(2)
    peak = sizes.unflatten(1, (num_heads, -1)).amax(2).float()
    return Observation(importance, torch.stack([moment, peak], 2))


def rank(importance: Tensor) -> Ranking:
    """Order each head's tokens by importance [B, H_kv, T]; among equals the older comes first."""
    order = importance.sort(dim=-1, descending=True, stable=True).indices
    return Ranking(order, (importance > float("-inf")).sum(-1))


def select(ranking: Ranking, tier_tokens: Sequence[int]) -> list[Selection]:
    """Hand out the importance order to the tiers. A prompt shorter than the tiers fills them from the top."""
    num_tokens = ranking.order.shape[-1]
    selections, start = [], 0
    for size in tier_tokens:
        counts = (ranking.num_allowed - start).clamp(0, size)
        rows = ranking.order[..., start : start + size].long()
        rows = torch.nn.functional.pad(rows, (0, size - rows.shape[-1]))
        is_empty = torch.arange(size, device=rows.device) >= counts[..., None]
        rows = rows.masked_fill(is_empty, num_tokens).sort(-1).values.masked_fill(is_empty, 0)
        selections.append(Selection(rows, counts))
        start += size
    return selections


def gather(selection: Selection, keys: Tensor, values: Tensor, num_padding: Sequence[int]) -> TierTensors:
    """keys, values: [B, H_kv, T, D] in any type that the result shall have."""
    index = selection.rows[..., None].expand(-1, -1, -1, keys.shape[-1])
    valid = selection.valid
    padding = torch.tensor(num_padding, device=keys.device)[:, None, None]
    return TierTensors(
        keys.gather(2, index).masked_fill(~valid[..., None], 0),
        values.gather(2, index).masked_fill(~valid[..., None], 0),
        (selection.rows - padding).to(torch.int32),
        valid,
    )


def to_storage(storage_dtype: str, layer: int, name: str, x: Tensor) -> Tensor:
    """x in the plan's 16-bit type. Raises NumericsError naming layer and tensor when it cannot be stored there."""
    stored = x.to(STORAGE_DTYPES[storage_dtype])
    if not bool((stored.abs() <= min(LARGEST_STORED, torch.finfo(stored.dtype).max)).all()):
        problem = f"overflows {storage_dtype}" if bool(x.isfinite().all()) else "has NaN or Inf"
        advice = USE_BFLOAT16 if storage_dtype == "float16" and "overflows" in problem else ""
        raise NumericsError(f"layer {layer}: {name} must be finite to be stored, but {problem}{advice}")
    return stored


def write_block(block: Tensor, layout: LayerLedger, tiers: Sequence[TierTensors], query_stats: Tensor) -> None:
    """Quantize and pack one layer's tiers into `block` (uint8 [B, layout.stored_bytes]), table included."""
    num_rows, num_heads = tiers[0].keys.shape[:2]
    table = torch.zeros(num_rows, num_heads, layout.num_segments_per_head, 2, dtype=torch.int32, device=block.device)
    for segment in layout.segments:
        table[:, segment.head, segment.tier, 0] = segment.offset
    vectors: HeadVectors = {}
    if layout.head_vectors is not None:
        keys, valid = torch.cat([t.keys for t in tiers], 2), torch.cat([t.valid for t in tiers], 2)
        vectors = {name: KEY_QUANTIZERS[name].head_vectors(keys, valid, query_stats) for name in layout.vector_rows}
        _put(block, layout.head_vectors.offset, torch.cat(list(vectors.values()), 2).flatten(1))
    for tier, held in enumerate(tiers):
        table[:, :, tier, 1] = held.valid.sum(-1)
        segments = [layout.segment(head, tier) for head in range(num_heads)]
        format, capacity = segments[0].format, segments[0].capacity_tokens
        missing = capacity - held.keys.shape[2]
        valid = torch.nn.functional.pad(held.valid, (0, missing))
        content = {"positions": torch.nn.functional.pad(held.positions, (0, missing))} if layout.is_sliding else {}
        for side, x in (("key", held.keys), ("value", held.values)):
            x = torch.nn.functional.pad(x, (0, 0, 0, missing))
            encoded = encode(layout.layer, format, side, x, valid, vectors)
            bits = side_format(format, side).bits
            content[f"{side}_codes"] = encoded.codes.flatten(2) if bits == 16 else packing.pack(encoded.codes, bits)
            if encoded.scales.shape[-1]:
                content[f"{side}_scales"] = encoded.scales
            if encoded.outliers is not None and encoded.places is not None:
                content[f"{side}_outliers"] = encoded.outliers
                content[f"{side}_places"] = encoded.places.to(place_dtype(capacity, held.keys.shape[-1]))
        for head, segment in enumerate(segments):
            for name, buffer in segment.buffers.items():
                _put(block, buffer.offset, content[name][:, head])
    _put(block, layout.table.offset, table.flatten(1))


def _put(block: Tensor, offset: int, content: Tensor) -> None:
    """content: [B, N] of any type, written at `offset` bytes of every row."""
    as_bytes = content.contiguous().view(torch.uint8)
    block[:, offset : offset + as_bytes.shape[1]] = as_bytes


def side_format(format: Format, side: str) -> TensorFormat:
    """How a format writes one side, "key" or "value"."""
    return format.keys if side == "key" else format.values


def encode(layer: int, format: Format, side: str, x: Tensor, valid: Tensor, vectors: HeadVectors) -> Encoded:
    """side: "key" or "value"; x in the 16-bit type [B, H_kv, S, D]; vectors: the layer's head vectors.

    Raises NumericsError naming layer and tensor when a scale overflows the 16-bit type, as that of a sum can.
    """
    written = side_format(format, side)
    quantizer = (KEY_QUANTIZERS if side == "key" else VALUE_QUANTIZERS)[written.quantizer]
    encoded = quantizer.encode(x, valid, written, vectors.get(written.quantizer) if side == "key" else None)
    if not bool(encoded.scales.isfinite().all()):
        advice = USE_BFLOAT16 if x.dtype == torch.float16 else ""
        raise NumericsError(f"layer {layer}: {side} must have finite scales, but one overflows {x.dtype}{advice}")
    return encoded


def decode(format: Format, side: str, encoded: Encoded, vectors: HeadVectors) -> Tensor:
    """-> float32 [B, H_kv, S, D]."""
    written = side_format(format, side)
    quantizer = (KEY_QUANTIZERS if side == "key" else VALUE_QUANTIZERS)[written.quantizer]
    return quantizer.decode(encoded, written, vectors.get(written.quantizer) if side == "key" else None)


def read_vectors(block: Tensor, layout: LayerLedger, num_heads: int, head_size: int, dtype: torch.dtype) -> HeadVectors:
    """The vectors of the plan's 16-bit type that `write_block` stored."""
    if layout.head_vectors is None:
        return {}
    start, size = layout.head_vectors.offset, layout.head_vectors.size_bytes
    vectors = block[:, start : start + size].contiguous().view(dtype)
    vectors = vectors.reshape(len(block), num_heads, -1, head_size)
    return {name: vectors[:, :, rows] for name, rows in layout.vector_rows.items()}


def place_dtype(num_tokens: int, head_size: int) -> torch.dtype:
    """The type of the places of outliers in a segment that holds up to `num_tokens` tokens."""
    return torch.uint16 if place_bytes(num_tokens, head_size) == 2 else torch.int32
