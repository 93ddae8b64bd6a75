"""Prefill's last step, in Triton: gather the kept tokens of a tier, quantize and pack them, straight into a block.

One launch writes one side (keys or values) of one tier of every head; keys that are stored through head vectors have
one launch before it, `key_moments`, for what those vectors are made of. Nothing is gathered to memory: a program reads
its tokens from the prompt's own keys or values, through the rows that were selected, and writes words, scales and (with
the keys) positions and table. A block is `block.BlockLayout`, in integers; this file knows no plan and no model.

The reference is the runtime's PyTorch (`quantizers.py`, `compression.write_block`), and the two write the same bytes.
Why they must, on a GPU too:

- Every formula is float32 additions and products, each rounded once, in the reference's order. Launches set
  `enable_fp_fusion=False`, so that no product and sum become one fused rounding; divisions are `tl.div_rn`, never the
  approximate `/`; constants are the reference's doubles rounded to float32. `hadamard` has a fixed order of additions.
- Rounding half to even is an addition and a subtraction of 1.5 * 2**23, after clamping to where that is exact. Rounding
  to bfloat16 is integer arithmetic (also what Triton's interpreter needs, which holds bfloat16 as bare bits).
- Minima and maxima have no order. Sums do, so they run in float64 over float32 terms: exact unless terms are some 2**21
  apart, and then wrong by 2**-53. The least squared error of a few clips, and numbers of sixteen bits, do not depend on
  that except in a tie to fifteen digits. This one argument is statistical; the others are not.

Checked here: the bytes in Triton's interpreter, and that the compiled code has no fused operation. Not run on a GPU.

Not here: hqq's fit, which is iterative, outliers, and groups that run across heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qpkv_kernels.block import BlockLayout, UnsupportedByKernelsError, on_its_device
from qpkv_kernels.decode import TRITON_DTYPES, hadamard, is_interpreted
from qpkv_kernels.layout import quantum_tokens

OVERFLOWS, NOT_FINITE, SCALE_OVERFLOWS = 1, 2, 4  # bits of `problems`
NUM_WARPS = 4
ELEMENTS = 2048  # of a tile of tokens: 16 a thread
CHANNELS, TILE = 32, 64  # of a tile of channels
MOMENT_TOKENS = 256  # of one partial sum


# --- numbers -------------------------------------------------------------------------------------------------------


@triton.jit
def number_bits(x, NUMBER: tl.constexpr):
    """float32 -> the bits of the nearest 16-bit number, ties to even, as uint16."""
    if tl.bfloat16 == NUMBER:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, nearest, 0x7FC0).to(tl.uint16)
    else:
        return x.to(tl.float16).to(tl.uint16, bitcast=True)


@triton.jit
def number(bits, NUMBER: tl.constexpr):
    """The float32 that these bits (uint16) of a 16-bit number stand for."""
    if tl.bfloat16 == NUMBER:
        return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def load_numbers(SOURCE, at, mask, limit, NUMBER: tl.constexpr):
    """(the 16-bit type's bits of the values at `at`, zero where masked; bits of `problems`)."""
    TYPE: tl.constexpr = SOURCE.dtype.element_ty
    if tl.float32 == TYPE:
        x = tl.load(SOURCE + at, mask=mask, other=0.0)
        bits = number_bits(x, NUMBER)
    else:
        bits = tl.load(SOURCE.to(tl.pointer_type(tl.uint16)) + at, mask=mask, other=0)
        x = number(bits, TYPE)
        if TYPE != NUMBER:
            bits = number_bits(x, NUMBER)
    is_finite = tl.abs(x) <= 3.4028234663852886e38
    fits = tl.abs(number(bits, NUMBER)) <= limit
    return bits, tl.where(is_finite, tl.where(fits, 0, 1), 2)


@triton.jit
def _rounded(x):
    """Half to even, of float32 below 2**22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _write_table(block, OFFSETS, head, offset, count, TIER: tl.constexpr, SEGMENTS: tl.constexpr):
    """This tier's entry of a head in the block's table, and with the first tier that of the reserve, still empty."""
    table = block.to(tl.pointer_type(tl.int32)) + head * (2 * SEGMENTS)
    tl.store(table + 2 * TIER, offset)
    tl.store(table + 2 * TIER + 1, count)
    if TIER == 0:
        tl.store(table + 2 * (SEGMENTS - 1), tl.load(OFFSETS + head * SEGMENTS + SEGMENTS - 1))
        tl.store(table + 2 * (SEGMENTS - 1) + 1, 0)


@triton.jit
def report(PROBLEMS, found):
    if found > 0:
        tl.atomic_or(PROBLEMS, found)


# --- codes ---------------------------------------------------------------------------------------------------------


@triton.jit
def _store_codes(
    CODES, codes, first, end, room, channel, is_channel,
    BITS: tl.constexpr, FIELDS: tl.constexpr, TILE: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Pack codes int32 [TILE, C] of tokens `first` on, up to `end`, along tokens (`packing.pack`). `first` and `end`
    are whole words, of FIELDS tokens each."""
    word = tl.arange(0, TILE // FIELDS)
    at = (first // FIELDS + word)[:, None] * D + channel[None, :]
    mask = (first + word * FIELDS < end)[:, None] & is_channel[None, :]
    fields = tl.reshape(codes, [TILE // FIELDS, FIELDS, C])
    field = tl.arange(0, FIELDS)[None, :, None]
    if BITS == 3:
        low = tl.sum((fields & 3) << (2 * field), 1)
        high = tl.sum((fields >> 2) << field, 1)
        tl.store(CODES.to(tl.pointer_type(tl.uint16)) + at, low.to(tl.uint16), mask=mask)
        tl.store(CODES + room * (D // 4) + at, high.to(tl.uint8), mask=mask)
    elif BITS == 1:
        tl.store(CODES + at, tl.sum(fields << field, 1).to(tl.uint8), mask=mask)
    else:
        tl.store(
            CODES.to(tl.pointer_type(tl.uint16)) + at, tl.sum(fields << (BITS * field), 1).to(tl.uint16), mask=mask
        )


@triton.jit
def min_max(low, high, BITS: tl.constexpr, NUMBER: tl.constexpr):
    """(scale, zero) as bits of the 16-bit type, of groups whose values lie from `low` to `high`; zero without any.

    Which zero is the least of both is up to who compares: the positive one is stored.
    """
    is_empty = low > high
    zero = number_bits(tl.where(is_empty | (low == 0), 0.0, low), NUMBER)
    return number_bits(tl.where(is_empty, 0.0, high - low) * (1 / ((1 << BITS) - 1)), NUMBER), zero


@triton.jit
def affine_codes(x, scale, zero, BITS: tl.constexpr):
    """round((x - zero) / scale), 0 where the scale is: int32."""
    steps = tl.div_rn(x - zero, tl.where(scale == 0, float("inf"), scale))
    return _rounded(tl.minimum(tl.maximum(steps, 0.0), (1 << BITS) - 1.0)).to(tl.int32)


@triton.jit
def store_pairs(SCALES, at, scale, zero, mask):
    """(scale, zero) as one word each."""
    pair = scale.to(tl.uint32) | (zero.to(tl.uint32) << 16)
    tl.store(SCALES.to(tl.pointer_type(tl.uint32)) + at, pair, mask=mask)


@triton.jit
def overflows(scale, NUMBER: tl.constexpr):
    return tl.where(tl.abs(number(scale, NUMBER)) <= 3.4028234663852886e38, 0, 4)


@triton.jit
def _steps(x, scale):
    """x in steps of `scale` from the midpoint above zero."""
    return x * tl.div_rn(1.0, tl.where(scale == 0, float("inf"), scale)) - 0.5


@triton.jit
def search_scale(
    x, is_channel, TILE: tl.constexpr, CLIPS: tl.constexpr, BITS: tl.constexpr, NUMBER: tl.constexpr
):  # fmt: skip
    """The bits of the scale of each token of x [TILE, C] whose midpoint codes have the least squared error."""
    HALF: tl.constexpr = 1 << (BITS - 1)
    largest = tl.max(tl.abs(x), 1)
    scale_bits = number_bits(largest * (CLIPS[0] / HALF), NUMBER)
    if len(CLIPS) > 1:
        energy = tl.sum((x * x).to(tl.float64), 1)
        least = tl.full([TILE], float("inf"), tl.float64)
        for i in tl.range(len(CLIPS)):  # not unrolled, which would take seven times as long to compile
            clip = tl.full([], CLIPS[0] / HALF, tl.float32)
            for j in tl.static_range(1, len(CLIPS)):
                clip = tl.where(i == j, CLIPS[j] / HALF, clip)
            bits_here = number_bits(largest * clip, NUMBER)
            scale = number(bits_here, NUMBER)
            steps = _steps(x, scale[:, None])
            # beyond the codes nothing is rounded, so clamping before it is the same
            error = _rounded(tl.minimum(tl.maximum(steps, -1.0 * HALF), HALF - 1.0)) - steps
            error = tl.where(is_channel[None, :], error * error, 0.0)
            wide = scale.to(tl.float64)
            cost = tl.where(scale == 0, energy, tl.sum(error.to(tl.float64), 1) * (wide * wide))
            is_better = cost < least
            scale_bits = tl.where(is_better, bits_here, scale_bits)
            least = tl.where(is_better, cost, least)
    return scale_bits


@triton.jit
def midpoint_codes(x, scale_bits, BITS: tl.constexpr, NUMBER: tl.constexpr):
    """int32 codes of x [TILE, C] under the scales with these bits."""
    HALF: tl.constexpr = 1 << (BITS - 1)
    steps = _steps(x, number(scale_bits, NUMBER)[:, None])
    return _rounded(tl.minimum(tl.maximum(steps, -1.0 * HALF), HALF - 1.0)).to(tl.int32) + HALF


# --- kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def _write_tokens(
    SOURCE, ROWS, COUNTS, POSITIONS, OFFSETS, PLACES, BLOCK, PROBLEMS,
    row_stride, head_stride, token_stride, block_stride, num_slots, vectors, limit,
    SIDE: tl.constexpr, TIER: tl.constexpr, SEGMENTS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    BITS: tl.constexpr, FIELDS: tl.constexpr, SCALES: tl.constexpr, GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr,
    GROUPS: tl.constexpr, GROUPS_PADDED: tl.constexpr, VECTORS: tl.constexpr, STORED_VECTORS: tl.constexpr,
    CLIPS: tl.constexpr, D_BLOCK: tl.constexpr, POSITIONED: tl.constexpr, TILE: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    """Grid (B * H_kv, tiles of TILE tokens): one side of a tier whose groups are of one token each, or that has none.

    Channel c of a tile is c % GROUP_PADDED of group c // GROUP_PADDED: a group of 40 channels takes 64 places."""
    C: tl.constexpr = GROUPS_PADDED * GROUP_PADDED
    pair = tl.program_id(0).to(tl.int64)  # (sequence, head)
    first = tl.program_id(1) * TILE
    sequence = pair // HEADS
    head = pair % HEADS
    entry = head * SEGMENTS + TIER
    offset = tl.load(OFFSETS + entry)
    count = tl.load(COUNTS + pair).to(tl.int32)
    block = BLOCK + sequence * block_stride
    segment = block + offset
    place = PLACES + entry * 6
    room = tl.load(place + 5)
    codes_at = segment + tl.load(place + SIDE)
    scales_at = segment + tl.load(place + 3 + SIDE)
    if SIDE == 0 and first == 0:
        _write_table(block, OFFSETS, head, offset, count, TIER, SEGMENTS)
    token = first + tl.arange(0, TILE)
    is_room = token < room
    held = token < count
    if POSITIONED:
        position = tl.load(POSITIONS + pair * num_slots + token, mask=held, other=0)
        tl.store((segment + tl.load(place + 2)).to(tl.pointer_type(tl.int32)) + token, position, mask=is_room)
    c = tl.arange(0, C)
    channel = c // GROUP_PADDED * GROUP + c % GROUP_PADDED
    is_channel = (c % GROUP_PADDED < GROUP) & (channel < D)
    row = tl.load(ROWS + pair * num_slots + token, mask=held, other=0)
    at = sequence * row_stride + head * head_stride + row[:, None] * token_stride + channel[None, :]
    mask = held[:, None] & is_channel[None, :]
    bits, problem = load_numbers(SOURCE, at, mask, limit, NUMBER)
    found = tl.max(tl.max(problem, 1), 0)
    if BITS == 16:
        code_at = token[:, None] * D + channel[None, :]
        is_stored = is_room[:, None] & is_channel[None, :]
        tl.store(codes_at.to(tl.pointer_type(tl.uint16)) + code_at, bits, mask=is_stored)
    else:
        x = number(bits, NUMBER)
        if len(VECTORS) > 0:
            stored = (block + vectors).to(tl.pointer_type(tl.uint16)) + head * (STORED_VECTORS * D) + channel
            balancer = number(tl.load(stored + VECTORS[-1] * D, mask=is_channel, other=0), NUMBER)
            if len(VECTORS) == 2:
                x = x - number(tl.load(stored + VECTORS[0] * D, mask=is_channel, other=0), NUMBER)[None, :]
            x = tl.where(mask, x * balancer[None, :], 0.0)
        if SCALES == "rotated":
            x = hadamard(x, TILE, C, D_BLOCK)
            scale_bits = search_scale(x, is_channel, TILE, CLIPS, BITS, NUMBER)
            codes = midpoint_codes(x, scale_bits, BITS, NUMBER)
            tl.store(scales_at.to(tl.pointer_type(tl.uint16)) + token, scale_bits, mask=is_room)
            found = found | tl.max(overflows(scale_bits, NUMBER), 0)
        else:
            groups = tl.reshape(x, [TILE, GROUPS_PADDED, GROUP_PADDED])
            member = tl.reshape(mask, [TILE, GROUPS_PADDED, GROUP_PADDED])
            low = tl.min(tl.where(member, groups, float("inf")), 2)
            high = tl.max(tl.where(member, groups, float("-inf")), 2)
            scale, zero = min_max(low, high, BITS, NUMBER)
            codes = affine_codes(groups, number(scale, NUMBER)[:, :, None], number(zero, NUMBER)[:, :, None], BITS)
            codes = tl.reshape(tl.where(member, codes, 0), [TILE, C])
            g = tl.arange(0, GROUPS_PADDED)
            is_stored = is_room[:, None] & (g < GROUPS)[None, :]
            store_pairs(scales_at, token[:, None] * GROUPS + g[None, :], scale, zero, is_stored)
            overflow = tl.where(is_stored, overflows(scale, NUMBER) | overflows(zero, NUMBER), 0)
            found = found | tl.max(tl.max(overflow, 1), 0)
        _store_codes(codes_at, codes, first, room, room, channel, is_channel, BITS, FIELDS, TILE, C, D)
    report(PROBLEMS + SIDE, found)


@triton.jit
def _write_channels(
    SOURCE, ROWS, COUNTS, POSITIONS, OFFSETS, PLACES, BLOCK, PROBLEMS,
    row_stride, head_stride, token_stride, block_stride, num_slots, limit,
    TIER: tl.constexpr, SEGMENTS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr,
    FIELDS: tl.constexpr, GROUP: tl.constexpr, CHANNELS: tl.constexpr, POSITIONED: tl.constexpr, TILE: tl.constexpr,
    NUMBER: tl.constexpr,
):  # fmt: skip
    """Grid (B * H_kv, groups of GROUP tokens, runs of CHANNELS channels): the keys of a tier whose groups run along
    tokens. A group is read twice, for its range and for its codes; the second time from the cache."""
    pair = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    sequence = pair // HEADS
    head = pair % HEADS
    entry = head * SEGMENTS + TIER
    offset = tl.load(OFFSETS + entry)
    count = tl.load(COUNTS + pair).to(tl.int32)
    block = BLOCK + sequence * block_stride
    segment = block + offset
    place = PLACES + entry * 6
    room = tl.load(place + 5)
    codes_at = segment + tl.load(place)
    scales_at = segment + tl.load(place + 3)
    if group == 0 and tl.program_id(2) == 0:
        _write_table(block, OFFSETS, head, offset, count, TIER, SEGMENTS)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < D
    source = sequence * row_stride + head * head_stride + channel[None, :]
    begin = group * GROUP
    end = tl.minimum(begin + GROUP, room)
    low = tl.full([CHANNELS], float("inf"), tl.float32)
    high = tl.full([CHANNELS], float("-inf"), tl.float32)
    found = 0
    for first in range(begin, end, TILE):
        token = first + tl.arange(0, TILE)
        held = token < tl.minimum(count, end)
        row = tl.load(ROWS + pair * num_slots + token, mask=held, other=0)
        mask = held[:, None] & is_channel[None, :]
        bits, problem = load_numbers(SOURCE, source + row[:, None] * token_stride, mask, limit, NUMBER)
        x = number(bits, NUMBER)
        low = tl.minimum(low, tl.min(tl.where(mask, x, float("inf")), 0))
        high = tl.maximum(high, tl.max(tl.where(mask, x, float("-inf")), 0))
        found = found | tl.max(tl.max(problem, 1), 0)
        if POSITIONED:
            if tl.program_id(2) == 0:
                position = tl.load(POSITIONS + pair * num_slots + token, mask=held, other=0)
                places = (segment + tl.load(place + 2)).to(tl.pointer_type(tl.int32))
                tl.store(places + token, position, mask=token < end)
    scale, zero = min_max(low, high, BITS, NUMBER)
    if begin < room:
        num_groups = (room + GROUP - 1) // GROUP
        store_pairs(scales_at, channel * num_groups + group, scale, zero, is_channel)
    found = found | tl.max(tl.where(is_channel, overflows(scale, NUMBER) | overflows(zero, NUMBER), 0), 0)
    for first in range(begin, end, TILE):
        token = first + tl.arange(0, TILE)
        held = token < tl.minimum(count, end)
        row = tl.load(ROWS + pair * num_slots + token, mask=held, other=0)
        mask = held[:, None] & is_channel[None, :]
        bits, problem = load_numbers(SOURCE, source + row[:, None] * token_stride, mask, limit, NUMBER)
        x = number(bits, NUMBER)
        codes = affine_codes(x, number(scale, NUMBER)[None, :], number(zero, NUMBER)[None, :], BITS)
        codes = tl.where(mask, codes, 0)
        _store_codes(codes_at, codes, first, end, room, channel, is_channel, BITS, FIELDS, TILE, CHANNELS, D)
    report(PROBLEMS, found)


@triton.jit
def _key_moments(
    SOURCE, ROWS, COUNTS, PARTIAL, row_stride, head_stride, token_stride, num_slots, num_runs, first_run,
    HEADS: tl.constexpr, D: tl.constexpr, CHANNELS: tl.constexpr, RUN: tl.constexpr, TILE: tl.constexpr,
    NUMBER: tl.constexpr,
):  # fmt: skip
    """Grid (B * H_kv, runs of RUN tokens, runs of CHANNELS channels): PARTIAL float64 [B * H_kv, num_runs, 3, D], of
    the kept keys as stored: the sum, the sum of squares and the largest magnitude."""
    pair = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * RUN
    count = tl.load(COUNTS + pair).to(tl.int32)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < D
    source = pair // HEADS * row_stride + pair % HEADS * head_stride + channel[None, :]
    total = tl.zeros([CHANNELS], tl.float64)
    squares = tl.zeros([CHANNELS], tl.float64)
    largest = tl.zeros([CHANNELS], tl.float64)
    for first in range(begin, tl.minimum(begin + RUN, count), TILE):
        token = first + tl.arange(0, TILE)
        held = token < count
        row = tl.load(ROWS + pair * num_slots + token, mask=held, other=0)
        mask = held[:, None] & is_channel[None, :]
        bits, _problem = load_numbers(SOURCE, source + row[:, None] * token_stride, mask, 0.0, NUMBER)
        x = number(bits, NUMBER).to(tl.float64)
        total += tl.sum(x, 0)
        squares += tl.sum(x * x, 0)
        largest = tl.maximum(largest, tl.max(tl.abs(x), 0))
    out = PARTIAL + ((pair * num_runs + first_run + tl.program_id(1)) * 3) * D + channel
    tl.store(out, total, mask=is_channel)
    tl.store(out + D, squares, mask=is_channel)
    tl.store(out + 2 * D, largest, mask=is_channel)


# --- launch --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """One layer's keys and values: [B, H_kv, N, D], float32, float16 or bfloat16, any strides but 1 along D."""

    keys: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        for x in (self.keys, self.values):
            if x.dtype not in (torch.float32, *TRITON_DTYPES):
                raise UnsupportedByKernelsError(f"the kernels write float32, float16 or bfloat16, got {x.dtype}")
            if x.stride(-1) != 1:
                raise UnsupportedByKernelsError(f"the kernels take whole tokens, got strides {x.stride()}")


@dataclass(frozen=True)
class Kept:
    """The tokens of one tier. rows: int64 [B, H_kv, S], where in the prompt they lie; counts: int64 [B, H_kv], how many
    of those are real (the first ones); positions: int32 [B, H_kv, S], or None where the block stores none."""

    rows: Tensor
    counts: Tensor
    positions: Tensor | None


@on_its_device
def write_tier(
    block: Tensor, layout: BlockLayout, places: Tensor, offsets: Tensor, tier: int, prompt: Prompt, kept: Kept,
    problems: Tensor, limit: float, clips: Mapping[int, tuple[float, ...]],
) -> None:  # fmt: skip
    """Write a tier's tokens, and its part of the table, into `block` (uint8 [B, bytes], 16-byte aligned rows).

    places: the layout's table; offsets: int32 [H_kv, segments], where in a block the segments lie; problems: int32 [2],
    for keys and values, gets the bits OVERFLOWS (a kept number is above `limit`), NOT_FINITE and SCALE_OVERFLOWS set;
    clips: for each width, what the search for a rotated token's scale tries. Head vectors must stand in the block.

    Raises UnsupportedByKernelsError.
    """
    segment, (num_rows, num_heads) = layout.segments[tier], kept.counts.shape
    rows, counts = kept.rows.contiguous(), kept.counts.contiguous()
    positions = rows if kept.positions is None else kept.positions.contiguous()
    for index, (x, side) in enumerate(((prompt.keys, segment.keys), (prompt.values, segment.values))):
        grid, constants = write_launch(layout, tier, index, clips, is_interpreted())
        kernel = _write_channels if side.scales == "channel" else _write_tokens
        vectors = {} if side.scales == "channel" else {"vectors": layout.vectors}
        kernel[(num_rows * num_heads, *grid)](
            x, rows, counts, positions, offsets, places, block, problems,
            row_stride=x.stride(0), head_stride=x.stride(1), token_stride=x.stride(2), block_stride=block.stride(0),
            num_slots=rows.shape[2], limit=limit, **vectors,
            POSITIONED=kept.positions is not None and index == 0, **constants,
            num_warps=NUM_WARPS, enable_fp_fusion=False,
        )  # fmt: skip


def write_launch(
    layout: BlockLayout, tier: int, index: int, clips: Mapping[int, tuple[float, ...]], is_interpreted: bool
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """(the grid beside B * H_kv, the compile-time arguments) that write one side, 0 (keys) or 1 (values), of a tier."""
    segment, head_size = layout.segments[tier], layout.head_size
    side = (segment.keys, segment.values)[index]
    constants: dict[str, Any] = {
        "TIER": tier, "SEGMENTS": len(layout.segments), "HEADS": layout.num_heads, "D": head_size, "BITS": side.bits,
        "FIELDS": quantum_tokens(side.bits), "NUMBER": TRITON_DTYPES[layout.dtype],
    }  # fmt: skip
    if side.scales == "channel":
        if index == 1:
            raise UnsupportedByKernelsError("the kernels write no values in token groups")
        if side.group % quantum_tokens(side.bits) and side.group < segment.capacity:
            raise UnsupportedByKernelsError(
                f"the kernels write token groups of whole words, which hold {quantum_tokens(side.bits)} tokens "
                f"at {side.bits} bit, got groups of {side.group}"
            )
        groups, runs = -(-segment.capacity // side.group), -(-head_size // CHANNELS)
        return (max(1, groups), runs), {**constants, "GROUP": side.group, "CHANNELS": CHANNELS, "TILE": TILE}
    group = min(side.group, head_size) if side.scales == "token" else head_size
    groups = -(-head_size // group)
    padded = triton.next_power_of_2(group), triton.next_power_of_2(groups)
    tile = TILE if is_interpreted else max(8, ELEMENTS // (padded[0] * padded[1]))
    return (max(1, -(-segment.capacity // tile)),), {
        **constants, "SIDE": index, "SCALES": side.scales, "GROUP": group, "GROUP_PADDED": padded[0], "GROUPS": groups,
        "GROUPS_PADDED": padded[1], "VECTORS": side.vectors, "STORED_VECTORS": layout.num_vectors,
        "CLIPS": clips.get(side.bits, (1.0,)), "D_BLOCK": head_size & -head_size, "TILE": tile,
    }  # fmt: skip


@on_its_device
def key_moments(keys: Tensor, kept: Sequence[Kept], dtype: torch.dtype) -> Tensor:
    """float64 [B, H_kv, 3, D]: sum, sum of squares and largest magnitude of a head's kept keys in all tiers, as stored
    in the 16-bit type `dtype`. keys: as in `Prompt`."""
    num_rows, num_heads, _, head_size = keys.shape
    runs = [-(-tier.rows.shape[2] // MOMENT_TOKENS) for tier in kept]
    partial = torch.empty(num_rows * num_heads, sum(runs), 3, head_size, dtype=torch.float64, device=keys.device)
    for tier, num_runs, first in zip(kept, runs, accumulate(runs, initial=0), strict=False):
        if num_runs:
            _key_moments[(num_rows * num_heads, num_runs, -(-head_size // CHANNELS))](
                keys, tier.rows.contiguous(), tier.counts.contiguous(), partial,
                keys.stride(0), keys.stride(1), keys.stride(2), tier.rows.shape[2], sum(runs), first,
                HEADS=num_heads, D=head_size, CHANNELS=CHANNELS, RUN=MOMENT_TOKENS, TILE=TILE,
                NUMBER=TRITON_DTYPES[dtype], num_warps=NUM_WARPS, enable_fp_fusion=False,
            )  # fmt: skip
    sums, largest = partial[:, :, :2].sum(1), partial[:, :, 2:].amax(1)
    return torch.cat([sums, largest], 1).unflatten(0, (num_rows, num_heads))
