"""From one layer's prefill to its packed block: score, select, quantize, pack. The one compression code.

The runtime calls these on the prompt it just attended to, the planner on prefills it has stored; the same tensors
give bitwise the same kept tokens and codes. Keys and values are rounded to the plan's 16-bit type before anything is
computed from them but scores, so a stored 16-bit prefill is as good as the live one. `backend.py` says which code does
what.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from qpkv_kernels import packing
from qpkv_runtime import scorers
from qpkv_runtime.backend import kernels_at, write_layout, writes_with_kernels
from qpkv_runtime.errors import NumericsError
from qpkv_runtime.ledger import LayerLedger, place_bytes, quantum_tokens
from qpkv_runtime.methods import SCORERS, ParameterValue
from qpkv_runtime.plan import Format, Plan, Scorer, TensorFormat
from qpkv_runtime.quantizers import CLIPS, KEY_QUANTIZERS, ROTATED, VALUE_QUANTIZERS, Encoded, KeyMoments, zero_unless
from qpkv_runtime.scorers import Prefill
from qpkv_runtime.segments import Segments

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
    def num_queries(self) -> int:
        """The last queries that are looked at."""
        return int(dict(self.parameters).get("queries", 0)) or self.window

    @property
    def needs_parts(self) -> bool:
        """Whether the scorer looks at the layer's module (`LayerParts`)."""
        return not {"rotary_embedding", "output_projection"}.isdisjoint(SCORERS[self.scorer].needs)


@dataclass(frozen=True)
class Observation:
    """What is remembered of a layer's prefill besides keys and values.

    importance: float32 [B, H_kv, T], +inf must stay, -inf must go; query_stats: float32 [B, H_kv, 2, D], over the GQA
    group: E q**2 of the last queries and max |q| of all.
    """

    importance: Tensor
    query_stats: Tensor


@dataclass(frozen=True)
class Ranking:
    """The importance order. order: int32 [B, H_kv, T], most important first; importance: float32 [B, H_kv, T], in that
    order; num_allowed: [B, H_kv], how many of them may be kept at all (the first ones)."""

    order: Tensor
    importance: Tensor
    num_allowed: Tensor

    def of_rows(self, rows: slice) -> Ranking:
        return Ranking(self.order[rows], self.importance[rows], self.num_allowed[rows])

    def to(self, device: torch.device) -> Ranking:
        return Ranking(self.order.to(device), self.importance.to(device), self.num_allowed.to(device))


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
class CodedValues:
    """Values as a format that `stands_alone` writes them, of every token, before it is known which are kept.

    codes: uint8 [H_kv, N + 1, D]; scales: 16-bit [H_kv, N + 1, numbers]; the last is what an empty slot gets.
    """

    codes: Tensor
    scales: Tensor

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    @classmethod
    def of(cls, values: Tensor, format: TensorFormat) -> CodedValues:
        """values: 16-bit [H_kv, N, D]."""
        values = torch.nn.functional.pad(values, (0, 0, 0, 1))[None]
        valid = torch.ones(values.shape[:3], dtype=torch.bool, device=values.device)
        valid[:, :, -1] = False
        encoded = VALUE_QUANTIZERS[format.quantizer].encode(values, valid, format, None)
        return cls(encoded.codes[0], encoded.scales[0].unflatten(1, (values.shape[2], -1)))

    def at(self, rows: Tensor, valid: Tensor) -> CodedValues:
        """[B, H_kv, S + 1, ...]: of tokens int64 [B, H_kv, S]; empty slots where not `valid`, and one at the end."""
        last = self.codes.shape[1] - 1
        rows = torch.nn.functional.pad(rows.masked_fill(~valid, last), (0, 1), value=last)
        return CodedValues(*(tokens_at(x.expand(len(rows), *x.shape), rows) for x in (self.codes, self.scales)))

    def of_segments(self, segments: Segments, num_tokens: int) -> CodedValues:
        """As `TierTensors.of`."""

        def taken(x: Tensor) -> Tensor:
            x = segments.pick(x)
            missing = num_tokens - x.shape[2]
            return torch.cat([x, x[:, :, -1:].expand(-1, -1, missing, -1)], 2) if missing > 0 else x[:, :, :num_tokens]

        return CodedValues(taken(self.codes), taken(self.scales))


@dataclass(frozen=True)
class TierTensors:
    """What one tier holds: keys and values in the 16-bit type [B, H_kv, S, D], zero where not valid; positions int32
    [B, H_kv, S], counted from each row's first token; valid bool [B, H_kv, S]. coded: the values, where they are coded
    already; `values` then is not looked at."""

    keys: Tensor
    values: Tensor
    positions: Tensor
    valid: Tensor
    coded: CodedValues | None = None

    def of(self, segments: Segments) -> TierTensors:
        """What belongs to these segments, filled up or cut to the tokens that the widest has room for."""
        num_tokens = segments.widest.capacity_tokens

        def taken(x: Tensor) -> Tensor:
            x = segments.pick(x)[:, :, :num_tokens]
            missing = num_tokens - x.shape[2]
            return torch.nn.functional.pad(x, (0, 0) * (x.ndim - 3) + (0, missing)) if missing else x

        coded = None if self.coded is None else self.coded.of_segments(segments, num_tokens)
        return TierTensors(taken(self.keys), taken(self.values), taken(self.positions), taken(self.valid), coded)


def observe(scoring: Scoring, prefill: Prefill) -> Observation:
    """Score a layer's tokens and mark those that must stay (sinks, window) and go (padding, out of the window).

    prefill: everything; the scorer is shown what it needs. Its window and sinks are the scoring's.
    """
    prefill = replace(prefill, window=scoring.window, sinks=scoring.sinks, num_queries=scoring.num_queries)
    shown = prefill.shown(SCORERS[scoring.scorer].needs)
    importance = scorers.SCORERS[scoring.scorer].score(shown, dict(scoring.parameters))
    importance = importance.masked_fill(prefill.must_stay, float("inf")).masked_fill(prefill.must_go, float("-inf"))
    measure = partial(_query_stats, prefill, scoring.num_queries)
    return Observation(importance, prefill.in_common("query statistics", scoring.num_queries, measure))


def _query_stats(prefill: Prefill, num_queries: int) -> Tensor:
    """As of an Observation."""
    queries, num_heads = prefill.query[:, :, -num_queries:], prefill.key.shape[1]
    is_query = prefill.is_token[..., -queries.shape[2] :]  # [B, 1, window]
    squares = (queries.double() ** 2).unflatten(1, (num_heads, -1)) * is_query[:, :, None, :, None]
    moment = (squares.sum((2, 3)) / (is_query.sum(-1).clamp(min=1)[..., None] * squares.shape[2])).float()
    return torch.stack([moment, prefill.query_peaks.unflatten(1, (num_heads, -1)).amax(2)], 2)


def rank(importance: Tensor) -> Ranking:
    """Order each head's tokens by importance [B, H_kv, T]; among equals the older comes first."""
    ordered = importance.sort(dim=-1, descending=True, stable=True)
    return Ranking(ordered.indices.int(), ordered.values, (importance > float("-inf")).sum(-1))


def keep(plan: Plan, layer: int, ranking: Ranking) -> list[Selection]:
    """The tokens of each of a layer's tiers, by importance."""
    heads, tiers = plan.heads_of(layer), plan.holdings(layer)[:-1]
    if heads.share != "adaptive":
        return select(ranking, [tokens for _, tokens in tiers])
    quanta = [(tier.tokens, quantum_tokens(plan.formats[tier.format])) for tier in plan.layers[layer].tiers]
    return select(ranking, adaptive_tokens(ranking, quanta, heads.alpha or 0.0))


def select(ranking: Ranking, tier_tokens: Sequence[int | Sequence[int] | Tensor]) -> list[Selection]:
    """Hand out the importance order to the tiers, each of so many tokens of every head ([H_kv] or [B, H_kv] where they
    differ). A prompt shorter than the tiers fills them from the top."""
    num_tokens, device = ranking.order.shape[-1], ranking.order.device
    selections = []
    start = torch.zeros_like(ranking.num_allowed)
    for tokens in tier_tokens:
        sizes = torch.as_tensor(tokens, device=device)
        counts = (ranking.num_allowed - start).clamp(min=0).minimum(sizes)
        slots = torch.arange(int(sizes.max()), device=device)
        rows = ranking.order.gather(-1, (start[..., None] + slots).clamp(max=num_tokens - 1)).long()
        is_empty = slots >= counts[..., None]
        rows = rows.masked_fill(is_empty, num_tokens).sort(-1).values.masked_fill(is_empty, 0)
        selections.append(Selection(rows, counts))
        start = start + sizes
    return selections


def adaptive_tokens(ranking: Ranking, tiers: Sequence[tuple[int, int]], alpha: float) -> list[Tensor]:
    """Ada-KV's division of a layer's tokens (arXiv 2407.11550) in quanta: for each tier of (tokens per head, quantum)
    the tokens of every head, int64 [B, H_kv], whose sum over heads is what the plan says.

    The layer's quanta go to the runs of `quantum` tokens of highest mean importance in all heads together, after
    those that hold what every head has at least (`heads.least_tokens`), which are served in turn. With a quantum of
    one token that is the paper's top-k over all heads. A prompt with hardly more tokens than are kept is divided
    evenly.
    """
    num_heads, num_tokens = ranking.order.shape[1:]
    device, total = ranking.order.device, sum(tokens for tokens, _ in tiers)
    forced = (ranking.importance == float("inf")).sum(-1)  # [B, H_kv], the same in every head
    least = forced + (alpha * (total - forced).clamp(min=0)).long()
    is_short = ranking.num_allowed < total + max(quantum for _, quantum in tiers)
    start = torch.zeros_like(ranking.num_allowed)
    divided = []
    for tokens, quantum in tiers:
        num_runs = -(-num_tokens // quantum)
        first = start[..., None] + torch.arange(num_runs, device=device) * quantum  # [B, H_kv, runs]
        slots = first[..., None] + torch.arange(quantum, device=device)
        claims = ranking.importance.gather(-1, slots.flatten(2).clamp(max=num_tokens - 1)).unflatten(2, (-1, quantum))
        claims = claims.double().mean(-1).masked_fill(slots[..., -1] >= ranking.num_allowed[..., None], float("-inf"))
        claims = claims.masked_fill(first < least[..., None], float("inf"))
        in_turn = claims.transpose(1, 2).flatten(1)  # equal claims: first runs before second ones, then by head
        served = in_turn.sort(dim=-1, descending=True, stable=True).indices[:, : num_heads * tokens // quantum]
        counts = torch.zeros_like(start).scatter_add_(1, served % num_heads, torch.full_like(served, quantum))
        divided.append(torch.where(is_short, torch.full_like(counts, tokens), counts))
        start = start + divided[-1]
    return divided


def gather(
    selection: Selection, keys: Tensor, values: Tensor, num_padding: Sequence[int], token_rows: Tensor | None = None,
    coded: CodedValues | None = None,
) -> TierTensors:  # fmt: skip
    """A tier's tokens in the type of `keys` and `values`; arguments as of `compress`."""
    valid, rows = selection.valid, _source_rows(selection, token_rows)
    return TierTensors(
        zero_unless(valid, tokens_at(keys, rows)),
        zero_unless(valid, tokens_at(values, rows)) if coded is None else values.new_empty(*valid.shape, 0),
        _positions(selection, num_padding),
        valid,
        None if coded is None else coded.at(rows, valid),
    )


def tokens_at(x: Tensor, rows: Tensor) -> Tensor:
    """x[b, h, rows[b, h, s]] for x [B, H, N, D], expanded or however it lies, and rows int64 [B, H, S] -> [B, H, S, D].

    By whole rows of the memory behind x: indexing copies number by number and takes twenty times as long on a CPU.
    """
    width = x.shape[-1]
    if x.stride(-1) != 1 or any(stride % width for stride in x.stride()[:-1]):
        x = x.contiguous()
    batch, heads = (torch.arange(size, device=x.device) for size in x.shape[:2])
    steps = [stride // width for stride in x.stride()[:-1]]  # in lines of the memory, from one to the next
    lines = batch[:, None, None] * steps[0] + heads[:, None] * steps[1] + rows * steps[2]
    num_lines = 1 + sum(step * (size - 1) for step, size in zip(steps, x.shape[:-1], strict=True))
    return x.as_strided((num_lines, width), (width, 1)).index_select(0, lines.flatten()).view(*rows.shape, width)


def _source_rows(selection: Selection, token_rows: Tensor | None) -> Tensor:
    """int64 [B, H_kv, S]: where keys and values hold the selected tokens."""
    if token_rows is None:
        return selection.rows
    return token_rows[:, None].expand(-1, selection.rows.shape[1], -1).gather(2, selection.rows)


def _positions(selection: Selection, num_padding: Sequence[int]) -> Tensor:
    """int32 [B, H_kv, S]: the tokens' positions in their own rows; zero where there is none."""
    padding = torch.tensor(num_padding, device=selection.rows.device)[:, None, None]
    return (selection.rows - padding).masked_fill(~selection.valid, 0).to(torch.int32)


def to_storage(storage_dtype: str, layer: int, name: str, x: Tensor) -> Tensor:
    """x in the plan's 16-bit type. Raises NumericsError naming layer and tensor when it cannot be stored there."""
    stored = x.to(STORAGE_DTYPES[storage_dtype])
    if not stored.numel():
        return stored
    low, high = torch.aminmax(stored)  # NaN where there is one
    if not bool(torch.maximum(high, -low) <= largest_stored(stored.dtype)):
        raise _not_storable(storage_dtype, layer, name, overflows=bool(x.isfinite().all()))
    return stored


def largest_stored(number: torch.dtype) -> float:
    """The largest magnitude of a key or value in this 16-bit type."""
    return min(LARGEST_STORED, torch.finfo(number).max)


def _not_storable(storage_dtype: str, layer: int, name: str, overflows: bool) -> NumericsError:
    problem = f"overflows {storage_dtype}" if overflows else "has NaN or Inf"
    advice = USE_BFLOAT16 if storage_dtype == "float16" and overflows else ""
    return NumericsError(f"layer {layer}: {name} must be finite to be stored, but {problem}{advice}")


def _scale_overflows(layer: int, name: str, number: torch.dtype) -> NumericsError:
    advice = USE_BFLOAT16 if number == torch.float16 else ""
    return NumericsError(f"layer {layer}: {name} must have finite scales, but one overflows {number}{advice}")


def compress(
    block: Tensor,
    layout: LayerLedger,
    storage_dtype: str,
    keys: Tensor,
    values: Tensor,
    selections: Sequence[Selection],
    num_padding: Sequence[int],
    query_stats: Tensor,
    token_rows: Tensor | None = None,
    coded: Mapping[TensorFormat, CodedValues] | None = None,
) -> None:
    """Write the selected tokens into `block` (uint8 [B, layout.stored_bytes]), quantized and packed, table included.

    keys, values: [B, H_kv, N, D] in any float type; num_padding: left padding of each row; token_rows: int64 [B, T],
    where along N the tokens of a row lie, None for in their order; coded: values of all N in these formats, where they
    are at hand (and `values` the same for every row). Both backends write the same bytes.

    Raises NumericsError naming layer and tensor when a kept token, or a scale of some, cannot be stored; BackendError
    where the kernels do not cover a format.
    """
    if writes_with_kernels(layout, block.device):
        _compress_with_kernels(
            block, layout, storage_dtype, keys, values, selections, num_padding, query_stats, token_rows
        )
        return
    at_hand = [(coded or {}).get(layout.format_of(tier).values) for tier in range(len(selections))]
    tiers = [
        gather(selection, keys, values, num_padding, token_rows, own)
        for selection, own in zip(selections, at_hand, strict=True)
    ]
    tiers = [
        replace(
            held,
            keys=to_storage(storage_dtype, layout.layer, "key", held.keys),
            values=to_storage(storage_dtype, layout.layer, "value", held.values),
        )
        for held in tiers
    ]
    write_block(block, layout, tiers, query_stats)


def _compress_with_kernels(
    block: Tensor, layout: LayerLedger, storage_dtype: str, keys: Tensor, values: Tensor,
    selections: Sequence[Selection], num_padding: Sequence[int], query_stats: Tensor, token_rows: Tensor | None,
) -> None:  # fmt: skip
    from qpkv_kernels import quantize

    number, device = STORAGE_DTYPES[storage_dtype], block.device
    with kernels_at(f"layer {layout.layer}, compressing {tuple(keys.shape)} {keys.dtype} keys", layout.formats):
        to, places, offsets = write_layout(layout, storage_dtype, device)
        prompt = quantize.Prompt(keys, values)
        kept = [
            quantize.Kept(
                _source_rows(selection, token_rows),
                selection.counts,
                _positions(selection, num_padding) if layout.is_sliding else None,
            )
            for selection in selections
        ]
        if layout.head_vectors is not None:
            moments = quantize.key_moments(keys, kept, number).unbind(2)
            count = torch.stack([selection.counts for selection in selections]).sum(0)
            _write_vectors(block, layout, KeyMoments(count, *moments), query_stats, number)
        problems = torch.zeros(2, dtype=torch.int32, device=device)
        for tier, held in enumerate(kept):
            quantize.write_tier(block, to, places, offsets, tier, prompt, held, problems, largest_stored(number), CLIPS)
        found = problems.tolist()
    check_problems(layout.layer, found, number)


def check_problems(layer: int, problems: Sequence[int], number: torch.dtype) -> None:
    """Raise NumericsError for what the kernels marked of a layer's keys and values (`quantize.OVERFLOWS` and so on)."""
    from qpkv_kernels import quantize

    for name, problem in zip(("key", "value"), problems, strict=True):
        if problem & (quantize.OVERFLOWS | quantize.NOT_FINITE):
            storage_dtype = str(number).removeprefix("torch.")
            raise _not_storable(storage_dtype, layer, name, overflows=not problem & quantize.NOT_FINITE)
        if problem & quantize.SCALE_OVERFLOWS:
            raise _scale_overflows(layer, name, number)


def write_block(block: Tensor, layout: LayerLedger, tiers: Sequence[TierTensors], query_stats: Tensor) -> None:
    """The reference of `compress`: quantize and pack one layer's gathered tiers into `block`, in PyTorch."""
    num_rows, num_heads = tiers[0].keys.shape[:2]
    table = torch.zeros(num_rows, num_heads, layout.num_segments_per_head, 2, dtype=torch.int32, device=block.device)
    for segment in layout.segments:
        table[:, segment.head, segment.tier, 0] = segment.offset
    vectors: HeadVectors = {}
    if layout.head_vectors is not None:
        keys, valid = torch.cat([t.keys for t in tiers], 2), torch.cat([t.valid for t in tiers], 2)
        vectors = _write_vectors(block, layout, KeyMoments.of(keys, valid), query_stats, keys.dtype)
    counts = torch.stack([held.valid.sum(-1) for held in tiers], -1)  # [B, H_kv, tiers]
    for row, held_tokens in enumerate(counts.tolist()):
        for head, placed in enumerate(layout.place(held_tokens)):
            for tier, segment in enumerate(placed):
                table[row, head, tier, 0] = segment.offset
    table[:, :, :-1, 1] = counts
    entries = table.cpu().numpy().astype(np.int64)
    for tier, tensors in enumerate(tiers):
        for segments in Segments.arrange(block, layout, tier, entries[:, :, tier, 0], entries[:, :, tier, 1]):
            held, format = tensors.of(segments), layout.format_of(tier)
            own = {name: segments.pick(vector) for name, vector in vectors.items()}
            if layout.is_sliding:
                segments.write("positions", held.positions)
            for side, x in (("key", held.keys), ("value", held.values)):
                if side == "value" and held.coded is not None:
                    encoded = Encoded(held.coded.codes, held.coded.scales.flatten(2))
                    _check_scales(layout.layer, side, encoded)
                else:
                    encoded = encode(layout.layer, format, side, x, held.valid, own)
                bits = side_format(format, side).bits
                codes = encoded.codes.flatten(2) if bits == 16 else packing.pack(encoded.codes, bits)
                segments.write(f"{side}_codes", codes)
                if encoded.scales.shape[-1]:
                    segments.write(f"{side}_scales", encoded.scales)
                if encoded.outliers is not None and encoded.places is not None:
                    segments.write(f"{side}_outliers", encoded.outliers)
                    places = encoded.places.to(place_dtype(held.keys.shape[2], held.keys.shape[3]))
                    segments.write(f"{side}_places", places)
    _put(block, layout.table.offset, table.flatten(1))


def _write_vectors(
    block: Tensor, layout: LayerLedger, moments: KeyMoments, query_stats: Tensor, number: torch.dtype
) -> HeadVectors:
    assert layout.head_vectors is not None
    vectors = {name: KEY_QUANTIZERS[name].head_vectors(moments, query_stats, number) for name in layout.vector_rows}
    _put(block, layout.head_vectors.offset, torch.cat(list(vectors.values()), 2).flatten(1))
    return vectors


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
    _check_scales(layer, side, encoded)
    return encoded


def _check_scales(layer: int, side: str, encoded: Encoded) -> None:
    if not bool(encoded.scales.isfinite().all()):
        raise _scale_overflows(layer, side, encoded.scales.dtype)


def decode(format: Format, side: str, encoded: Encoded, vectors: HeadVectors, is_rotated: bool = False) -> Tensor:
    """-> float32 [B, H_kv, S, D]; is_rotated: as `ROTATED.into` maps it, which for its own codes saves the way back."""
    written = side_format(format, side)
    own = vectors if side == "key" else {}
    if is_rotated and written.quantizer == "rotated":
        return ROTATED.midpoints(encoded, written)
    quantizer = (KEY_QUANTIZERS if side == "key" else VALUE_QUANTIZERS)[written.quantizer]
    x = quantizer.decode(encoded, written, own.get(written.quantizer))
    return ROTATED.into(x, own.get("rotated"), None) if is_rotated else x


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
