"""A new token's keys and values straight into the reserve of a packed block: encode, pack, position, count, one launch.

A program takes one side of one (sequence, KV head): it owns that head's reserve, so a word that holds several tokens of
a channel is read, changed in one field and written back. Which slot of the ring is the token's follows from a counter
on the device: a launch is the same at every step and needs nothing of the host. Formats of the reserve are per token.

What cannot be stored (NaN, Inf, or what overflows the 16-bit type) cannot be raised from here: it sets the bits of
`quantize.py` in `problems`, which whoever waits for the device anyway reads. Bytes are those that the runtime's own
append writes (`packed.py`), for the reasons that `quantize.py` gives, whose functions make the codes. Checked in
Triton's interpreter; not run on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from qpkv_kernels.block import BlockLayout, Side, UnsupportedByKernelsError, on_its_device
from qpkv_kernels.decode import TRITON_DTYPES, hadamard, widest_run
from qpkv_kernels.layout import quantum_tokens
from qpkv_kernels.quantize import (
    affine_codes,
    load_numbers,
    midpoint_codes,
    min_max,
    number,
    overflows,
    report,
    search_scale,
    store_pairs,
)

Clips = Mapping[int, tuple[float, ...]]


@triton.jit
def _put_codes(CODES, codes, d, mask, slot, room, D: tl.constexpr, BITS: tl.constexpr, FIELDS: tl.constexpr):
    """int32 codes [D] of one token into their fields of the words at CODES; the words' other fields stay."""
    field = slot % FIELDS
    at = slot // FIELDS * D + d
    if BITS == 1:
        held = tl.load(CODES + at, mask=mask, other=0).to(tl.int32)
        tl.store(CODES + at, ((held & ~(1 << field)) | (codes << field)).to(tl.uint8), mask=mask)
    else:
        LOW: tl.constexpr = 2 if BITS == 3 else BITS
        words = CODES.to(tl.pointer_type(tl.uint16)) + at
        shift = field * LOW
        held = tl.load(words, mask=mask, other=0).to(tl.int32)
        low = codes & ((1 << LOW) - 1)
        tl.store(words, ((held & ~(((1 << LOW) - 1) << shift)) | (low << shift)).to(tl.uint16), mask=mask)
        if BITS == 3:
            plane = CODES + room * (D // 4) + at
            held = tl.load(plane, mask=mask, other=0).to(tl.int32)
            tl.store(plane, ((held & ~(1 << field)) | ((codes >> 2) << field)).to(tl.uint8), mask=mask)


@triton.jit
def _append_side(
    X, SEGMENT, VECTORS, codes_at, scales_at, room, slot, PROBLEM, limit,
    SIDE: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, D_BLOCK: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    """One side of one head: X [D], VECTORS the head's own [vectors, D] as bits. SIDE: see `_side`."""
    BITS: tl.constexpr = SIDE[0]
    SCALES: tl.constexpr = SIDE[1]
    GROUP: tl.constexpr = SIDE[2]
    FIELDS: tl.constexpr = SIDE[3]
    OWN_VECTORS: tl.constexpr = SIDE[4]
    CLIPS: tl.constexpr = SIDE[5]
    d = tl.arange(0, D_PADDED)
    is_channel = d < D
    bits, problem = load_numbers(X, d, is_channel, limit, NUMBER)
    found = tl.max(problem, 0)
    if BITS == 16:
        tl.store((SEGMENT + codes_at).to(tl.pointer_type(tl.uint16)) + slot * D + d, bits, mask=is_channel)
    else:
        x = number(bits, NUMBER)
        if len(OWN_VECTORS) > 0:
            if len(OWN_VECTORS) == 2:
                x = x - number(tl.load(VECTORS + OWN_VECTORS[0] * D + d, mask=is_channel, other=0), NUMBER)
            x = x * number(tl.load(VECTORS + OWN_VECTORS[-1] * D + d, mask=is_channel, other=0), NUMBER)
        x = tl.reshape(x, [1, D_PADDED])
        codes = tl.zeros([1, D_PADDED], tl.int32)
        if SCALES == "rotated":
            x = hadamard(x, 1, D_PADDED, D_BLOCK)
            scale = search_scale(x, is_channel, 1, CLIPS, BITS, NUMBER)
            codes = midpoint_codes(x, scale, BITS, NUMBER)
            tl.store((SEGMENT + scales_at).to(tl.pointer_type(tl.uint16)) + slot + tl.arange(0, 1), scale)
            found = found | tl.max(overflows(scale, NUMBER), 0)
        else:
            GROUPS: tl.constexpr = (D + GROUP - 1) // GROUP
            for g in tl.static_range(GROUPS):
                member = (is_channel & (d // GROUP == g))[None, :]
                low = tl.min(tl.where(member, x, float("inf")), 1)
                high = tl.max(tl.where(member, x, float("-inf")), 1)
                scale, zero = min_max(low, high, BITS, NUMBER)
                in_group = affine_codes(x, number(scale, NUMBER)[:, None], number(zero, NUMBER)[:, None], BITS)
                codes = tl.where(member, in_group, codes)
                pair_at = slot * GROUPS + g + tl.arange(0, 1)
                store_pairs(SEGMENT + scales_at, pair_at, scale, zero, pair_at >= 0)
                found = found | tl.max(overflows(scale, NUMBER) | overflows(zero, NUMBER), 0)
        _put_codes(SEGMENT + codes_at, tl.reshape(codes, [D_PADDED]), d, is_channel, slot, room, D, BITS, FIELDS)
    report(PROBLEM, found)


@triton.jit(do_not_specialize=["offset"])
def _append(
    KEY, VALUE, BLOCK, PLACES, PROMPT, APPENDED, PROBLEMS, key_row, key_head, value_row, value_head, block_stride,
    vectors, offset, limit,
    KEYS: tl.constexpr, VALUES: tl.constexpr, RESERVE: tl.constexpr, SEGMENTS: tl.constexpr, HEADS: tl.constexpr,
    VECTORS: tl.constexpr, WINDOW: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, D_BLOCK: tl.constexpr,
    NUMBER: tl.constexpr,
):  # fmt: skip
    """Grid (B * H_kv, 2): keys, then values. KEY, VALUE [B, H_kv, D], rows and heads of any stride; PROMPT int32 [B];
    APPENDED int32 [1]: with `offset` the tokens appended before; PROBLEMS int32 [2]. RESERVE: tokens of the ring."""
    sequence = (tl.program_id(0) // HEADS).to(tl.int64)
    head = tl.program_id(0) % HEADS
    before = tl.load(APPENDED) + offset
    slot = before % RESERVE
    entry = head * SEGMENTS + SEGMENTS - 1
    block = BLOCK + sequence * block_stride
    table = block.to(tl.pointer_type(tl.int32)) + entry * 2
    segment = block + tl.load(table)
    place = PLACES + entry * 6
    room = tl.load(place + 5)
    own = (block + vectors).to(tl.pointer_type(tl.uint16)) + head * (VECTORS * D)
    if tl.program_id(1) == 0:
        tl.store(table + 1, tl.minimum(before + 1, RESERVE))
        if WINDOW:
            position = (segment + tl.load(place + 2)).to(tl.pointer_type(tl.int32)) + slot
            tl.store(position, tl.load(PROMPT + sequence) + before)
        _append_side(
            KEY + sequence * key_row + head * key_head, segment, own, tl.load(place), tl.load(place + 3), room, slot,
            PROBLEMS, limit, KEYS, D, D_PADDED, D_BLOCK, NUMBER,
        )  # fmt: skip
    else:
        _append_side(
            VALUE + sequence * value_row + head * value_head, segment, own, tl.load(place + 1), tl.load(place + 4),
            room, slot, PROBLEMS + 1, limit, VALUES, D, D_PADDED, D_BLOCK, NUMBER,
        )  # fmt: skip


def constants(layout: BlockLayout, clips: Clips) -> dict[str, Any]:
    """The compile-time arguments of `_append` for a layer."""
    reserve, head_size = layout.segments[-1], layout.head_size
    return {
        "KEYS": _side(reserve.keys, head_size, clips),
        "VALUES": _side(reserve.values, head_size, clips),
        "RESERVE": layout.reserve_tokens,
        "SEGMENTS": len(layout.segments),
        "HEADS": layout.num_heads,
        "VECTORS": layout.num_vectors,
        "WINDOW": layout.window is not None,
        "D": head_size,
        "D_PADDED": triton.next_power_of_2(head_size),
        "D_BLOCK": widest_run(head_size),
        "NUMBER": TRITON_DTYPES[layout.dtype],
    }


def _side(side: Side, head_size: int, clips: Clips) -> tuple[Any, ...]:
    """(bits, scales, channels of a group, tokens of a word, the vectors that keys are written through, clips)."""
    if side.scales == "channel":
        raise UnsupportedByKernelsError("the kernels append to per-token formats, got one with token groups")
    group = min(side.group, head_size) if side.scales == "token" else head_size
    return side.bits, side.scales, group, quantum_tokens(side.bits), side.vectors, clips.get(side.bits, (1.0,))


@on_its_device
def append(
    key: Tensor, value: Tensor, block: Tensor, layout: BlockLayout, places: Tensor, prompt: Tensor, appended: Tensor,
    problems: Tensor, limit: float, clips: Clips, offset: int = 0,
) -> None:  # fmt: skip
    """Write one token of every sequence into its ring of the last `layout.reserve_tokens` tokens, in place.

    key, value: [B, H_kv, D] in the model's type, channels next to each other; block uint8 [B, bytes], rows of any
    stride; the token is number appended (int32 [1]) + offset of the generated ones, at position prompt (int32 [B]) +
    that; problems int32 [2], of keys and of values, gets the bits of `quantize.write_tier`, as its limit and clips.
    One launch, no synchronization with the host. Raises UnsupportedByKernelsError.
    """
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    _append[(len(key) * layout.num_heads, 2)](
        key, value, block, places, prompt, appended, problems, key.stride(0), key.stride(1), value.stride(0),
        value.stride(1), block.stride(0), layout.vectors, offset, limit, **constants(layout, clips), num_warps=1,
        enable_fp_fusion=False,
    )  # fmt: skip
