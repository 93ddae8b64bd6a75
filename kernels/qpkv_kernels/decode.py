"""Decode attention of one token per sequence, straight over a packed block: split-K flash-decoding in Triton.

A block (the runtime's `ledger.py`) holds, for every KV head, segments in different formats: tiers, then the reserve.
One launch covers them all: a program takes one (sequence, KV head, work item), a run of tokens of one segment, with the
query heads of that KV head as rows. A second launch merges the runs by log-sum-exp. Where keys are rotated or balanced,
one before them transforms the query. Nothing is dequantized to memory:

- A word holds s tokens of a channel. With R the larger s of the two sides, tokens R*i + r of a tile form stream r: one
  field of its words, one product for the logits, one for the output. D stays whole; K and V may differ in bits.
- A field is masked out of its word and read as the bits of a float16: v * 2**k is then the subnormal v * 2**(k - 24),
  exactly, which the matrix units take at full speed. One instruction unpacks two values, and no bias has to come off.
- Scales stay out of the inner product. Affine per channel: q.(s*c + z) = (q*s).c + q.z, a scaled query per token group;
  where a tile spans J groups, each has its own rows (M is padded to 16 anyway) that see only its tokens. Affine per
  token: the scale multiplies the logit, and the weight of a value. Rotated: the query is transformed once before and
  the output once after.
- Weights times scales are divided by the tile's largest scale, so that they stay clear of float16's subnormals.

Operands are float16 and sums float32, whatever the model runs in; bfloat16 only for 16-bit tokens stored so, float32
throughout for a float32 query. `decode_reference.py` is the same in plain float32. Errors are the caller's to name:
this file knows no plan and no model, a `BlockLayout` says in integers where everything is. How many tokens there are is
read on the device alone, from the block's table and two counters, so that a launch is the same at every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qpkv_kernels.block import BlockLayout, Side, UnsupportedByKernelsError, on_its_device
from qpkv_kernels.layout import quantum_tokens

MOST_ROWS = 64
WHOLE = 1 << 20  # tokens: more than any segment has
LOG2_E_ = tl.constexpr(1.4426950408889634)


# --- kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def hadamard(x, ROWS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """`hadamard.hadamard` of x [ROWS, D]: the same additions in the same order. BLOCK: the power of two that divides
    the head size."""
    for i in tl.static_range(0, 9):
        if (1 << i) < BLOCK:
            y = tl.permute(tl.reshape(x, [ROWS, D // (2 << i), 2, 1 << i]), (0, 1, 3, 2))
            low, high = tl.split(y)
            x = tl.reshape(tl.permute(tl.join(low + high, low - high), (0, 1, 3, 2)), [ROWS, D])
    return x * (BLOCK**-0.5)


@triton.jit
def _load_words(CODES, row, channel, mask, room, D: tl.constexpr, BITS: tl.constexpr, NUMBER: tl.constexpr):
    """(words, the one-bit plane's bytes for 3 bit) at word row `row`, broadcast against `channel`."""
    at = row * D + channel
    if BITS == 16:
        words = tl.load(CODES.to(tl.pointer_type(NUMBER)) + at, mask=mask, other=0.0)
        return words, words
    elif BITS == 1:
        words = tl.load(CODES + at, mask=mask, other=0).to(tl.uint16)
        return words, words
    else:
        words = tl.load(CODES.to(tl.pointer_type(tl.uint16)) + at, mask=mask, other=0)
        high = words
        if BITS == 3:
            high = tl.load(CODES + room * (D // 4) + at, mask=mask, other=0).to(tl.uint16)
        return words, high


@triton.constexpr_function
def _shift(field: int, bits: int) -> int:
    """How far a word moves before a field of it is masked out: a float16 has ten bits of mantissa."""
    return field * bits // 8 * 8


@triton.constexpr_function
def _exponent(field: int, bits: int) -> int:
    """k of `_field`: where a field's lowest bit lies."""
    return 0 if bits in (3, 16) else field * bits % 8


@triton.constexpr_function
def _scale_down(field: int, bits: int) -> float:
    return 2.0 ** -_exponent(field, bits)


@triton.constexpr_function
def _most_exponent(bits: int) -> int:
    return {1: 7, 2: 6, 4: 4}.get(bits, 0)


@triton.constexpr_function
def _part(segments: tuple[Any, ...], index: int, part: int) -> Any:
    return segments[index][part]


@triton.constexpr_function
def _mask(field: int, bits: int) -> int:
    return ((1 << bits) - 1) << (field * bits % 8)


@triton.constexpr_function
def _asm(field: int, bits: int) -> str:
    """One PTX statement for two words: `lop3` of both, after a shift of both where the field lies high."""
    mask = f"0x{_mask(field, bits) * 0x10001:08x}"
    if _shift(field, bits) == 0:
        return f"and.b32 $0, $1, {mask};"
    return f"{{ .reg .b32 high; shr.b32 high, $1, 8; and.b32 $0, high, {mask}; }}"


@triton.jit
def _field(words, high, FIELD: tl.constexpr, BITS: tl.constexpr, OPERAND: tl.constexpr, USE_ASM: tl.constexpr):
    """Field FIELD of every word as a matrix operand: v * 2**k, and times 2**-24 in float16 (see the module), k by
    `_exponent`. USE_ASM: two values an instruction; the portable branch gives the same bits."""
    if BITS == 16:
        return words.to(OPERAND)
    elif USE_ASM and BITS != 3 and tl.float16 == OPERAND:
        return tl.inline_asm_elementwise(_asm(FIELD, BITS), "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
    else:
        if BITS == 3:
            bits = ((words >> (2 * FIELD)) & 3) | (((high >> FIELD) & 1) << 2)
        else:
            bits = (words >> _shift(FIELD, BITS)) & _mask(FIELD, BITS)
        if tl.float16 == OPERAND:
            return bits.to(tl.uint16).to(tl.float16, bitcast=True)
        else:
            return bits.to(OPERAND)


@triton.jit
def _load_pair(SCALES, at, mask, NUMBER: tl.constexpr):
    """(scale, zero) in float32 of the pairs at indices `at`; zero where masked."""
    pair = tl.load(SCALES.to(tl.pointer_type(tl.uint32)) + at, mask=mask, other=0)
    if tl.bfloat16 == NUMBER:
        return (pair << 16).to(tl.float32, bitcast=True), (pair & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        scale = (pair & 0xFFFF).to(tl.uint16).to(NUMBER, bitcast=True).to(tl.float32)
        return scale, (pair >> 16).to(tl.uint16).to(NUMBER, bitcast=True).to(tl.float32)


@triton.jit
def _attend_run(
    QUERY, BIAS, SEGMENT, PLACE, ACC, STATE, query_row, first, end, count, least_position, scaling, softcap,
    KEYS: tl.constexpr, VALUES: tl.constexpr, STREAMS: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    GQA: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, NUMBER: tl.constexpr,
    USE_ASM: tl.constexpr,
):  # fmt: skip
    """One run of tokens, `first` to `end` of the `count` that a segment holds; writes [ROWS, D] at ACC and [ROWS, 2]
    at STATE. KEYS, VALUES, STREAMS: see `constants`. Row m is query head m % GQA for token group m // GQA."""
    K_BITS: tl.constexpr = KEYS[0]
    K_SCALES: tl.constexpr = KEYS[1]
    K_GROUP: tl.constexpr = KEYS[2]
    K_SLICE: tl.constexpr = KEYS[3]
    K_OPERAND: tl.constexpr = KEYS[4]
    K_FIELDS: tl.constexpr = KEYS[5]
    TILE_GROUPS: tl.constexpr = KEYS[6]
    V_BITS: tl.constexpr = VALUES[0]
    V_SCALES: tl.constexpr = VALUES[1]
    V_GROUP: tl.constexpr = VALUES[2]
    V_SLICE: tl.constexpr = VALUES[3]
    V_OPERAND: tl.constexpr = VALUES[4]
    V_FIELDS: tl.constexpr = VALUES[5]
    W: tl.constexpr = TILE // STREAMS
    K_SHARE: tl.constexpr = STREAMS // K_FIELDS  # words of a channel that a row of the tile spans
    V_SHARE: tl.constexpr = STREAMS // V_FIELDS
    K_SLICES: tl.constexpr = D // K_SLICE
    V_SLICES: tl.constexpr = D // V_SLICE
    K_GROUPS: tl.constexpr = (D + K_GROUP - 1) // K_GROUP  # tl.cdiv is a tensor in Triton 3.6
    V_GROUPS: tl.constexpr = (D + V_GROUP - 1) // V_GROUP
    K_UNIT: tl.constexpr = 16777216.0 if K_BITS != 16 and tl.float16 == K_OPERAND else 1.0
    V_UNIT: tl.constexpr = 16777216.0 if V_BITS != 16 and tl.float16 == V_OPERAND else 1.0
    V_TOP: tl.constexpr = 1.0 * (1 << _most_exponent(V_BITS))

    key_codes = SEGMENT + tl.multiple_of(tl.load(PLACE), 16)
    value_codes = SEGMENT + tl.multiple_of(tl.load(PLACE + 1), 16)
    positions = (SEGMENT + tl.load(PLACE + 2)).to(tl.pointer_type(tl.int32))
    key_scales = SEGMENT + tl.load(PLACE + 3)
    value_scales = SEGMENT + tl.load(PLACE + 4)
    room = tl.load(PLACE + 5)

    m = tl.arange(0, ROWS)
    tile_group = m // GQA
    is_row = m < GQA * TILE_GROUPS
    w = tl.arange(0, W)
    k_channel = tl.arange(0, K_SLICE)
    v_channel = tl.arange(0, V_SLICE)

    # The query, divided by the power of two above its largest element: exact, and within float16 times any scale.
    queries = ()
    largest = tl.full([ROWS], 1e-30, tl.float32)
    for s in tl.static_range(K_SLICES):
        query_at = query_row[:, None] * D + s * K_SLICE + k_channel[None, :]
        queries = queries + (tl.load(QUERY + query_at, mask=is_row[:, None], other=0.0).to(tl.float32),)
        largest = tl.maximum(largest, tl.max(tl.abs(queries[s]), 1))
    unit = tl.exp2(tl.ceil(tl.log2(largest)))
    factor = unit * scaling
    bias = tl.zeros([ROWS], tl.float32)
    if KEYS[7]:
        bias = tl.load(BIAS + query_row, mask=is_row, other=0.0) * scaling
    plain_operands = ()
    query_sums = ()
    for s in tl.static_range(K_SLICES):
        scaled = (queries[s] / unit[:, None]).to(K_OPERAND)
        plain_operands = plain_operands + (scaled,)
        query_sums = query_sums + (tl.sum(scaled.to(tl.float32), 1),)

    peak = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    outputs = ()
    for s in tl.static_range(V_SLICES):
        outputs = outputs + (tl.zeros([ROWS, V_SLICE], tl.float32),)
    offsets = ()  # of the codes' zeros, the same for all channels of a group
    for g in tl.static_range(V_GROUPS):
        offsets = offsets + (tl.zeros([ROWS], tl.float32),)

    for tile in tl.range(first, end, TILE):
        start = tl.multiple_of(tile, TILE)
        # --- logits, one [ROWS, W] for each stream
        zero_logits = tl.zeros([ROWS], tl.float32)
        operands = plain_operands
        if K_SCALES == "channel":
            operands = ()
            groups_before = start // K_GROUP
            num_groups = (room + K_GROUP - 1) // K_GROUP
            for s in tl.static_range(K_SLICES):
                channel = s * K_SLICE + k_channel
                if TILE_GROUPS == 1:
                    scale, zero = _load_pair(key_scales, channel * num_groups + groups_before, channel >= 0, NUMBER)
                    scale, zero = scale[None, :], zero[None, :]
                else:
                    group = groups_before + tile_group
                    at = channel[None, :] * num_groups + group[:, None]
                    scale, zero = _load_pair(key_scales, at, (is_row & (group < num_groups))[:, None], NUMBER)
                query = plain_operands[s].to(tl.float32)
                zero_logits += tl.sum(query * zero, 1)
                operands = operands + ((query * scale).to(K_OPERAND),)
            zero_logits *= factor
        logits = ()
        highest = tl.full([ROWS, W], -1e30, tl.float32)
        for r in tl.static_range(STREAMS):
            token = start + w * STREAMS + r
            held = token < count
            if r % K_FIELDS == 0:
                words = ()
                highs = ()
                for s in tl.static_range(K_SLICES):
                    word_row = (start // K_FIELDS + w * K_SHARE + r // K_FIELDS)[None, :]
                    channel = (s * K_SLICE + k_channel)[:, None]
                    low, high = _load_words(key_codes, word_row, channel, held[None, :], room, D, K_BITS, NUMBER)
                    words = words + (low,)
                    highs = highs + (high,)
            k_factor = K_UNIT * _scale_down(r % K_FIELDS, K_BITS)
            if K_SCALES == "token":
                x = tl.zeros([ROWS, W], tl.float32)
                for g in tl.static_range(K_GROUPS):
                    part = tl.zeros([ROWS, W], tl.float32)
                    query_sum = tl.zeros([ROWS], tl.float32)
                    for s in tl.static_range(K_SLICES):
                        if s * K_SLICE // K_GROUP == g:
                            codes = _field(words[s], highs[s], r % K_FIELDS, K_BITS, K_OPERAND, USE_ASM)
                            part = tl.dot(operands[s], codes, part, input_precision="ieee")
                            query_sum += query_sums[s]
                    scale, zero = _load_pair(key_scales, token * K_GROUPS + g, held, NUMBER)
                    x += part * (scale * k_factor)[None, :] + query_sum[:, None] * zero[None, :]
                x = x * factor[:, None] + bias[:, None]
            else:
                x = tl.zeros([ROWS, W], tl.float32)
                for s in tl.static_range(K_SLICES):
                    codes = _field(words[s], highs[s], r % K_FIELDS, K_BITS, K_OPERAND, USE_ASM)
                    x = tl.dot(operands[s], codes, x, input_precision="ieee")
                if K_SCALES == "rotated":
                    scale = tl.load(key_scales.to(tl.pointer_type(NUMBER)) + token, mask=held, other=0.0).to(tl.float32)
                    query_sum = tl.zeros([ROWS], tl.float32)
                    for s in tl.static_range(K_SLICES):
                        query_sum += query_sums[s]
                    x = (x * k_factor + (0.5 - (1 << (K_BITS - 1))) * query_sum[:, None]) * scale[None, :]
                    x = x * factor[:, None] + bias[:, None]
                else:
                    x = x * (factor * k_factor)[:, None] + zero_logits[:, None]
            if SOFTCAP:
                x = (softcap * LOG2_E_) * (1 - 2 / (tl.exp2(x * (2 * LOG2_E_ / softcap)) + 1))
            visible = held
            if WINDOW:
                position = tl.load(positions + token, mask=held, other=0)
                visible = held & (position > least_position)
            visible = is_row[:, None] & visible[None, :]
            if TILE_GROUPS > 1:
                visible = visible & (token[None, :] // K_GROUP - groups_before == tile_group[:, None])
            x = tl.where(visible, x, float("-inf"))
            highest = tl.maximum(highest, x)
            logits = logits + (x,)

        # --- online softmax
        new_peak = tl.maximum(peak, tl.max(highest, 1))
        shrink = tl.exp2(peak - new_peak)
        peak = new_peak
        weight_sum = tl.zeros([ROWS, W], tl.float32)
        weights = ()
        for r in tl.static_range(STREAMS):
            weights = weights + (tl.exp2(logits[r] - peak[:, None]),)
            weight_sum += weights[r]
        total = total * shrink + tl.sum(weight_sum, 1)

        # --- values
        scales = ()  # [W] for each stream and group of channels
        zeros = ()
        largest_scale = 1.0
        if V_SCALES != "none":
            top = tl.zeros([W], tl.float32)
            for r in tl.static_range(STREAMS):
                token = start + w * STREAMS + r
                for g in tl.static_range(V_GROUPS):
                    if V_SCALES == "rotated":
                        at = value_scales.to(tl.pointer_type(NUMBER)) + token
                        scale = tl.load(at, mask=token < count, other=0.0).to(tl.float32)
                        zero = scale
                    else:
                        scale, zero = _load_pair(value_scales, token * V_GROUPS + g, token < count, NUMBER)
                    scales = scales + (scale,)
                    zeros = zeros + (zero,)
                    top = tl.maximum(top, scale)
            largest_scale = tl.maximum(tl.max(top, 0), 1e-30)
        added = ()
        for s in tl.static_range(V_SLICES):
            added = added + (tl.zeros([ROWS, V_SLICE], tl.float32),)
        zero_sums = ()
        for g in tl.static_range(V_GROUPS):
            zero_sums = zero_sums + (tl.zeros([ROWS, W], tl.float32),)
        for r in tl.static_range(STREAMS):
            if r % V_FIELDS == 0:
                words = ()
                highs = ()
                for s in tl.static_range(V_SLICES):
                    held = start + w * STREAMS + r < count
                    word_row = (start // V_FIELDS + w * V_SHARE + r // V_FIELDS)[:, None]
                    channel = (s * V_SLICE + v_channel)[None, :]
                    low, high = _load_words(value_codes, word_row, channel, held[:, None], room, D, V_BITS, NUMBER)
                    words = words + (low,)
                    highs = highs + (high,)
            v_factor = V_TOP * _scale_down(r % V_FIELDS, V_BITS)
            new_added = ()
            new_zero_sums = ()
            for g in tl.static_range(V_GROUPS):
                if V_SCALES == "none":
                    operand = weights[r].to(V_OPERAND)
                    new_zero_sums = new_zero_sums + (zero_sums[g],)
                else:
                    share = scales[r * V_GROUPS + g] * (v_factor / largest_scale)
                    operand = (weights[r] * share[None, :]).to(V_OPERAND)
                    if V_SCALES == "rotated":
                        zero_sum = zero_sums[g] + operand.to(tl.float32) * (1.0 / v_factor)
                    else:
                        zero_sum = zero_sums[g] + weights[r] * zeros[r * V_GROUPS + g][None, :]
                    new_zero_sums = new_zero_sums + (zero_sum,)
                for s in tl.static_range(V_SLICES):
                    if s * V_SLICE // V_GROUP == g:
                        codes = _field(words[s], highs[s], r % V_FIELDS, V_BITS, V_OPERAND, USE_ASM)
                        new_added = new_added + (tl.dot(operand, codes, added[s], input_precision="ieee"),)
            added = new_added
            zero_sums = new_zero_sums
        new_offsets = ()
        for g in tl.static_range(V_GROUPS):
            zero_sum = tl.sum(zero_sums[g], 1)
            if V_SCALES == "rotated":
                zero_sum = zero_sum * (largest_scale * (0.5 - (1 << (V_BITS - 1))))
            new_offsets = new_offsets + (offsets[g] * shrink + zero_sum,)
        offsets = new_offsets
        new_outputs = ()
        for s in tl.static_range(V_SLICES):
            amount = added[s] * (largest_scale * (V_UNIT / V_TOP))
            new_outputs = new_outputs + (outputs[s] * shrink[:, None] + amount,)
        outputs = new_outputs

    for s in tl.static_range(V_SLICES):
        out_at = m[:, None] * D + (s * V_SLICE + v_channel)[None, :]
        tl.store(ACC + out_at, outputs[s] + offsets[s * V_SLICE // V_GROUP][:, None], mask=is_row[:, None])
    tl.store(STATE + m * 2, peak)
    tl.store(STATE + m * 2 + 1, total)


@triton.jit(do_not_specialize=["offset"])
def _decode(
    QUERY, TRANSFORMED, BIAS, BLOCK, PLACES, WORK, PROMPT, APPENDED, ACC, STATE, block_stride, num_runs, scaling,
    softcap, window, offset,
    SEGMENTS: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, GQA: tl.constexpr, D: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, NUMBER: tl.constexpr, USE_ASM: tl.constexpr,
):  # fmt: skip
    """Grid (B * H_kv, runs). QUERY [B, H, D]; TRANSFORMED float32 [B, H, D]; BIAS float32 [B, H]; WORK int32 [runs, 3]:
    (segment, first token, end); PROMPT int32 [B], APPENDED int32 [1]: with `offset` the queries' positions; ACC float32
    [B * H_kv, runs, ROWS, D]; STATE float32 [.., ROWS, 2]: (largest logit in base 2, sum of weights)."""
    sequence = (tl.program_id(0) // HEADS).to(tl.int64)
    head = tl.program_id(0) % HEADS
    run = tl.program_id(1)
    index = tl.load(WORK + run * 3)
    first = tl.load(WORK + run * 3 + 1)
    end = tl.load(WORK + run * 3 + 2)
    entry = head * len(SEGMENTS) + index
    block = BLOCK + sequence * block_stride
    table = block.to(tl.pointer_type(tl.int32)) + entry * 2
    segment = block + tl.multiple_of(tl.load(table), 16)
    count = tl.load(table + 1)
    end = tl.minimum(end, count)
    query_row = (sequence * HEADS + head) * GQA + tl.arange(0, ROWS) % GQA
    at = tl.program_id(0).to(tl.int64) * num_runs + run
    acc = ACC + at * (ROWS * D)
    state = STATE + at * (ROWS * 2)
    least_position = 0
    if WINDOW:
        least_position = tl.load(PROMPT + sequence) + tl.load(APPENDED) + offset - window
    if first >= end:
        m = tl.arange(0, ROWS)
        tl.store(state + m * 2, tl.full([ROWS], -1e30, tl.float32))
        tl.store(state + m * 2 + 1, tl.zeros([ROWS], tl.float32))
    else:
        for i in tl.static_range(len(SEGMENTS)):
            if index == i:
                place = PLACES + entry * 6
                if _part(SEGMENTS, i, 4):
                    place = PLACES + (tl.load(place) + tl.cdiv(count, _part(SEGMENTS, i, 4))) * 6
                _attend_run(
                    TRANSFORMED if _part(SEGMENTS, i, 0)[7] else QUERY, BIAS, segment, place,
                    acc, state, query_row, first, end, count, least_position, scaling, softcap,
                    _part(SEGMENTS, i, 0), _part(SEGMENTS, i, 1), _part(SEGMENTS, i, 2), _part(SEGMENTS, i, 3),
                    ROWS, GQA, D, WINDOW, SOFTCAP, NUMBER, USE_ASM,
                )  # fmt: skip


@triton.jit
def _merge(
    ACC, STATE, WORK, OUT, num_runs,
    ROTATED: tl.constexpr, TILE_GROUPS: tl.constexpr, ROWS: tl.constexpr, GQA: tl.constexpr, D: tl.constexpr,
    D_PADDED: tl.constexpr, D_BLOCK: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """Grid (B * H): the runs of one query head by log-sum-exp -> OUT [B, H, D]. ROTATED: bit i is set where segment i
    has rotated values; their sum is transformed back once. RUNS: how many runs a step takes."""
    query_row = tl.program_id(0).to(tl.int64)
    base = query_row // GQA * num_runs
    d = tl.arange(0, D_PADDED)
    is_channel = d < D
    steps = tl.arange(0, RUNS)
    peak = tl.full([RUNS], -1e30, tl.float32)
    for first in range(0, num_runs, RUNS):
        for j in tl.static_range(TILE_GROUPS):
            run = first + steps
            at = (base + run) * ROWS + j * GQA + query_row % GQA
            peak = tl.maximum(peak, tl.load(STATE + at * 2, mask=run < num_runs, other=-1e30))
    highest = tl.max(peak, 0)
    total = tl.zeros([RUNS], tl.float32)
    plain = tl.zeros([D_PADDED], tl.float32)
    rotated = tl.zeros([D_PADDED], tl.float32)
    for first in range(0, num_runs, RUNS):
        run = first + steps
        is_rotated = ((ROTATED >> tl.load(WORK + run * 3, mask=run < num_runs, other=0)) & 1) != 0
        for j in tl.static_range(TILE_GROUPS):
            at = (base + run) * ROWS + j * GQA + query_row % GQA
            weight = tl.exp2(tl.load(STATE + at * 2, mask=run < num_runs, other=-1e30) - highest)
            amount = tl.load(STATE + at * 2 + 1, mask=run < num_runs, other=0.0)
            total += weight * amount
            # a run that saw nothing has not written its sums
            mask = (amount > 0)[:, None] & is_channel[None, :]
            acc = tl.load(ACC + at[:, None] * D + d[None, :], mask=mask, other=0.0) * weight[:, None]
            if ROTATED == 0:
                plain += tl.sum(acc, 0)
            else:
                rotated += tl.sum(tl.where(is_rotated[:, None], acc, 0.0), 0)
                plain += tl.sum(tl.where(is_rotated[:, None], 0.0, acc), 0)
    out = plain
    if ROTATED != 0:
        out += tl.reshape(hadamard(tl.reshape(rotated, [1, D_PADDED]), 1, D_PADDED, D_BLOCK), [D_PADDED])
    out = out / tl.sum(total, 0)
    tl.store(OUT + query_row * D + d, out.to(OUT.dtype.element_ty), mask=is_channel)


@triton.jit
def _transform_query(
    QUERY, BLOCK, TRANSFORMED, BIAS, block_stride, vectors,
    VECTORS: tl.constexpr, STORED_VECTORS: tl.constexpr, ROTATED: tl.constexpr, HEADS: tl.constexpr,
    GQA: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, D_BLOCK: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    """Grid (B * H): TRANSFORMED = H(q / balancer), BIAS = q . mean, so that their sum over a stored key is q . k."""
    query_row = tl.program_id(0).to(tl.int64)
    head = query_row // GQA % HEADS
    sequence = query_row // (GQA * HEADS)
    d = tl.arange(0, D_PADDED)
    mask = d < D
    q = tl.load(QUERY + query_row * D + d, mask=mask, other=0.0).to(tl.float32)
    bias = 0.0
    if len(VECTORS) > 0:
        stored = (
            (BLOCK + sequence * block_stride + vectors).to(tl.pointer_type(NUMBER)) + head * (STORED_VECTORS * D) + d
        )
        if len(VECTORS) == 2:
            bias = tl.sum(q * tl.load(stored + VECTORS[0] * D, mask=mask, other=0.0).to(tl.float32), 0)
        q = q / tl.load(stored + VECTORS[-1] * D, mask=mask, other=1.0).to(tl.float32)
    if ROTATED:
        q = tl.reshape(hadamard(tl.reshape(q, [1, D_PADDED]), 1, D_PADDED, D_BLOCK), [D_PADDED])
    tl.store(TRANSFORMED + query_row * D + d, q, mask=mask)
    tl.store(BIAS + query_row, bias)


# --- launch --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """What may be tuned (`tuning.py`). words: rows of words in a tile, so words * R tokens, and no fewer than
    `least_tokens`; programs: for each processor, about two waves of one-warp programs by default."""

    words: int = 16
    least_tokens: int = 64
    num_warps: int = 1
    num_stages: int = 3
    programs: int = 16


def default_launch(layout: BlockLayout, arch: int) -> Launch:
    """By registers, found by compiling (`resources.py`) and not yet timed: one warp where it holds a tile, since more
    repeat each other's work on the few rows. arch: 90 for sm_90."""
    streams = [segment.quantum for segment in layout.segments]
    has_channel_scales = any(segment.keys.scales == "channel" for segment in layout.segments)
    sides = [side for segment in layout.segments for side in (segment.keys, segment.values)]
    spills_in_two = arch < 90 and layout.head_size <= 64 and not has_channel_scales and any(s.bits == 3 for s in sides)
    is_wide = (max(streams) > 4 and not spills_in_two) or 1 in streams or (has_channel_scales and arch >= 100)
    return Launch(num_warps=(2 if is_wide else 1) * (2 if layout.head_size > 128 else 1))


def arch_of(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return 10 * major + minor


def widest_run(size: int) -> int:
    """The largest power of two that divides `size`: the widest run of channels that matrix products can take whole."""
    return size & -size


def constants(
    layout: BlockLayout, query_dtype: torch.dtype, gqa: int, launch: Launch, is_interpreted: bool
) -> dict[str, Any]:
    """The compile-time arguments of `_decode` for a layer; everything else is data."""
    head_size, number = layout.head_size, TRITON_DTYPES[layout.dtype]

    def operand(side: Side) -> tl.dtype:
        wide = query_dtype == torch.float32 or (is_interpreted and side.bits == 16 and number == tl.bfloat16)
        return tl.float32 if wide else number if side.bits == 16 else tl.float16

    def side_constants(side: Side, room: int, tile: int) -> tuple[Any, ...]:
        group, tile_groups = head_size, 1
        if side.scales == "token":
            group = min(side.group, head_size)
        elif side.scales == "channel":
            group = side.group if side.group < room else WHOLE  # one kernel for all rooms of a single group
            if group < room and group % tile:
                tile_groups = tile // group if tile % group == 0 else (tile - 1) // group + 2
        width = widest_run(head_size) if side.scales != "token" else min(widest_run(head_size), widest_run(group))
        fields = quantum_tokens(side.bits)
        return (side.bits, side.scales, group, width, operand(side), fields, tile_groups, side.is_transformed)

    segments = []
    for segment in layout.segments:
        streams = segment.quantum
        tile = max(launch.words * streams, launch.least_tokens)
        sides = (side_constants(side, segment.capacity, tile) for side in (segment.keys, segment.values))
        segments.append((*sides, streams, tile, segment.quantum if segment.by_count else 0))
    rows = max(16, triton.next_power_of_2(gqa * max(keys[6] for keys, *_ in segments)))
    if rows > MOST_ROWS:
        least = min(segment.keys.group for segment in layout.segments if segment.keys.scales == "channel")
        raise UnsupportedByKernelsError(
            f"the kernels take token groups of keys of at least a quarter of a tile, got {least} with {gqa} query heads"
        )
    return {
        "SEGMENTS": tuple(segments),
        "ROWS": rows,
        "HEADS": layout.num_heads,
        "GQA": gqa,
        "D": head_size,
        "WINDOW": layout.window is not None,
        "NUMBER": number,
        "USE_ASM": not is_interpreted,
    }


TRITON_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
RUNS_PER_STEP = 16


def is_interpreted() -> bool:
    """Whether this module was imported under TRITON_INTERPRET=1, so that its kernels run in Python on the CPU."""
    return not isinstance(_decode, triton.JITFunction)


@lru_cache(maxsize=4096)
def make_runs(layout: BlockLayout, tiles: tuple[int, ...], rows: int, programs: int, device: torch.device) -> Tensor:
    """int32 [runs, 3]: (segment, first token, end). Runs of equal length, so that heads which hold little end at once
    and the others still balance; a whole number of tiles, as many as fill the device with `rows` (B * H_kv) beside.
    Made once: decode copies nothing to the device."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    wanted = max(1, programs * processors // rows)
    held = sum(s.capacity // (layout.num_heads if s.by_count else 1) for s in layout.segments)
    length = max(1, -(-held // wanted))
    runs = []
    for index, (segment, tile) in enumerate(zip(layout.segments, tiles, strict=True)):
        step = -(-length // tile) * tile
        runs += [(index, first, min(first + step, segment.capacity)) for first in range(0, segment.capacity, step)]
    return torch.tensor(runs, dtype=torch.int32, device=device)


@on_its_device
def attend(
    query: Tensor, block: Tensor, layout: BlockLayout, places: Tensor, prompt: Tensor, appended: Tensor,
    scaling: float, softcap: float | None = None, offset: int = 0, launch: Launch | None = None,
) -> Tensor:  # fmt: skip
    """`attend_reference` in Triton: query [B, H, D], contiguous, float16, bfloat16 or float32 -> [B, H, D], its dtype;
    block uint8 [B, bytes], rows of any stride; places, prompt, appended int32.

    Two launches, three where keys are transformed; no synchronization with the host, and no memory but torch's for the
    output and for scratch of one layer. Raises UnsupportedByKernelsError.
    """
    num_rows, num_query_heads, head_size = query.shape
    gqa, device = num_query_heads // layout.num_heads, query.device
    launch = launch or default_launch(layout, arch_of(device))
    compiled = constants(layout, query.dtype, gqa, launch, is_interpreted())
    rows, segments = compiled["ROWS"], compiled["SEGMENTS"]
    runs = make_runs(
        layout, tuple(tile for *_, tile, _ in segments), num_rows * layout.num_heads, launch.programs, device
    )
    padded, divisor = triton.next_power_of_2(head_size), widest_run(head_size)
    out = torch.empty_like(query)
    acc = torch.empty(num_rows * layout.num_heads, len(runs), rows, head_size, dtype=torch.float32, device=device)
    state = torch.empty(num_rows * layout.num_heads, len(runs), rows, 2, dtype=torch.float32, device=device)
    transformed, bias, transform = query, state, layout.key_transform
    if transform is not None:
        transformed = torch.empty(query.shape, dtype=torch.float32, device=device)
        bias = torch.empty(query.shape[:2], dtype=torch.float32, device=device)
        _transform_query[(num_rows * num_query_heads,)](
            query, block, transformed, bias, block.stride(0), layout.vectors,
            VECTORS=transform.vectors, STORED_VECTORS=layout.num_vectors,
            ROTATED=transform.scales == "rotated", HEADS=layout.num_heads, GQA=gqa, D=head_size, D_PADDED=padded,
            D_BLOCK=divisor, NUMBER=compiled["NUMBER"], num_warps=1,
        )  # fmt: skip
    _decode[(num_rows * layout.num_heads, len(runs))](
        query, transformed, bias, block, places, runs, prompt, appended, acc, state, block.stride(0), len(runs),
        scaling if softcap is not None else scaling * LOG2_E_.value, softcap or 0.0, layout.window or 0, offset,
        SOFTCAP=softcap is not None, **compiled, num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    rotated = sum(1 << i for i, segment in enumerate(layout.segments) if segment.values.scales == "rotated")
    _merge[(num_rows * num_query_heads,)](
        acc, state, runs, out, len(runs), ROTATED=rotated, TILE_GROUPS=max(keys[6] for keys, *_ in segments),
        ROWS=rows, GQA=gqa, D=head_size, D_PADDED=padded, D_BLOCK=divisor, RUNS=RUNS_PER_STEP, num_warps=1,
    )  # fmt: skip
    return out
