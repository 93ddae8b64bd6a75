"""How much attention each token of a prompt receives from the last queries, in Triton: what window scorers rank by.

Softmax runs over the tokens and the mean over the queries, so keys are read twice: `_statistics` leaves the largest
logit and the sum of weights of every query in runs of tokens, `_received` merges those, makes the logits again and sums
them over the queries. What is kept between the two is a hundredth of the keys or less; logits are never stored.

Runs and tiles are counted from a row's first token and sums have fixed places, so a row's result does not depend on its
padding or on what else is in the batch, to the last bit. It equals the reference (the runtime's `scorers.py`) to
rounding: products of 16-bit operands are summed in float32, where PyTorch rounds a 16-bit model's logits to its type.
Tokens whose scores differ by less than that may be ranked the other way round.

Tested in Triton's interpreter and compiled without a GPU; not run on one. Pooling and ranking are the caller's.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qpkv_kernels.block import HEAD_SIZES, UnsupportedByKernelsError, on_its_device
from qpkv_kernels.decode import LOG2_E_, TRITON_DTYPES, is_interpreted

RUN, MOST_ROWS = 1024, 64
TILE_BYTES = 16384  # of keys
NUM_STAGES = 2
RUNS_PER_STEP = 16


@triton.jit
def _logits(
    QUERY, keys, token, row, num_rows, num_queries, num_tokens, padding, query_head_stride, query_token_stride,
    scaling, softcap, window,
    D: tl.constexpr, D_PADDED: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Logits in base 2, [rows, tokens], -inf where a query does not see a token. Row m is query m % num_queries of the
    query head m // num_queries; keys: [D_PADDED, tokens]."""
    d = tl.arange(0, D_PADDED)
    index = row % num_queries
    at = (row // num_queries)[:, None] * query_head_stride + index[:, None] * query_token_stride + d[None, :]
    query = tl.load(QUERY + at, mask=(row < num_rows)[:, None] & (d < D)[None, :], other=0.0).to(OPERAND)
    x = tl.dot(query, keys, input_precision="tf32x3") * scaling  # of float32: three products, float32's precision
    if SOFTCAP:
        x = (softcap * LOG2_E_) * (1 - 2 / (tl.exp2(x * (2 * LOG2_E_ / softcap)) + 1))
    else:
        x = x * LOG2_E_
    position = (num_tokens - num_queries + index)[:, None]
    sees = (token[None, :] <= position) & (token >= padding)[None, :] & (row < num_rows)[:, None]
    if WINDOW:
        sees = sees & (token[None, :] > position - window)
    return tl.where(sees, x, float("-inf"))


@triton.jit
def _load_keys(KEY, token, num_tokens, token_stride, D: tl.constexpr, D_PADDED: tl.constexpr, OPERAND: tl.constexpr):
    d = tl.arange(0, D_PADDED)
    mask = (d < D)[:, None] & (token < num_tokens)[None, :]
    return tl.load(KEY + token.to(tl.int64)[None, :] * token_stride + d[:, None], mask=mask, other=0.0).to(OPERAND)


@triton.jit
def _statistics(
    QUERY, KEY, PADDING, STATE, query_row_stride, query_head_stride, query_token_stride, key_row_stride,
    key_head_stride, key_token_stride, num_queries, num_tokens, num_runs, scaling, softcap, window,
    HEADS: tl.constexpr, GQA: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, OPERAND: tl.constexpr, ROWS: tl.constexpr, RUN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Grid (B * H_kv, runs of RUN tokens, runs of ROWS rows): STATE float32 [B * H_kv, num_runs, GQA * num_queries, 2],
    the largest logit in base 2 and the sum of weights."""
    pair = tl.program_id(0).to(tl.int64)
    sequence = pair // HEADS
    head = pair % HEADS
    padding = tl.load(PADDING + sequence)
    num_rows = GQA * num_queries
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    query = QUERY + sequence * query_row_stride + head * GQA * query_head_stride
    key = KEY + sequence * key_row_stride + head * key_head_stride
    begin = padding + tl.program_id(1) * RUN
    peak = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for first in range(begin, tl.minimum(begin + RUN, num_tokens), TILE):
        token = first + tl.arange(0, TILE)
        keys = _load_keys(key, token, num_tokens, key_token_stride, D, D_PADDED, OPERAND)
        x = _logits(
            query, keys, token, row, num_rows, num_queries, num_tokens, padding, query_head_stride,
            query_token_stride, scaling, softcap, window, D, D_PADDED, WINDOW, SOFTCAP, OPERAND,
        )  # fmt: skip
        new_peak = tl.maximum(peak, tl.max(x, 1))
        total = total * tl.exp2(peak - new_peak) + tl.sum(tl.exp2(x - new_peak[:, None]), 1)
        peak = new_peak
    at = ((pair * num_runs + tl.program_id(1)) * num_rows + row) * 2
    tl.store(STATE + at, peak, mask=row < num_rows)
    tl.store(STATE + at + 1, total, mask=row < num_rows)


@triton.jit
def _received(
    QUERY, KEY, PADDING, STATE, OUT, query_row_stride, query_head_stride, query_token_stride, key_row_stride,
    key_head_stride, key_token_stride, num_queries, num_tokens, num_runs, scaling, softcap, window,
    HEADS: tl.constexpr, GQA: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, OPERAND: tl.constexpr, ROWS: tl.constexpr, RUNS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Grid (B * H_kv, tiles of TILE tokens): OUT float32 [B * H_kv, T], mean over GQA * num_queries rows."""
    pair = tl.program_id(0).to(tl.int64)
    sequence = pair // HEADS
    head = pair % HEADS
    padding = tl.load(PADDING + sequence)
    num_rows = GQA * num_queries
    query = QUERY + sequence * query_row_stride + head * GQA * query_head_stride
    key = KEY + sequence * key_row_stride + head * key_head_stride
    token = padding + tl.program_id(1) * TILE + tl.arange(0, TILE)
    keys = _load_keys(key, token, num_tokens, key_token_stride, D, D_PADDED, OPERAND)
    received = tl.zeros([TILE], tl.float32)
    for first_row in range(0, num_rows, ROWS):
        row = first_row + tl.arange(0, ROWS)
        peak = tl.full([ROWS], -1e30, tl.float32)
        for first_run in range(0, num_runs, RUNS):
            run = first_run + tl.arange(0, RUNS)
            mask = (run < num_runs)[:, None] & (row < num_rows)[None, :]
            at = ((pair * num_runs + run)[:, None] * num_rows + row[None, :]) * 2
            peak = tl.maximum(peak, tl.max(tl.load(STATE + at, mask=mask, other=-1e30), 0))
        total = tl.zeros([ROWS], tl.float32)
        for first_run in range(0, num_runs, RUNS):
            run = first_run + tl.arange(0, RUNS)
            mask = (run < num_runs)[:, None] & (row < num_rows)[None, :]
            at = ((pair * num_runs + run)[:, None] * num_rows + row[None, :]) * 2
            weight = tl.exp2(tl.load(STATE + at, mask=mask, other=-1e30) - peak[None, :])
            total += tl.sum(weight * tl.load(STATE + at + 1, mask=mask, other=0.0), 0)
        x = _logits(
            query, keys, token, row, num_rows, num_queries, num_tokens, padding, query_head_stride,
            query_token_stride, scaling, softcap, window, D, D_PADDED, WINDOW, SOFTCAP, OPERAND,
        )  # fmt: skip
        share = tl.where(total > 0, 1 / tl.maximum(total, 1e-30), 0.0)  # a padding query sees nothing
        received += tl.sum(tl.exp2(x - peak[:, None]) * share[:, None], 0)
    tl.store(OUT + pair * num_tokens + token, received / num_rows, mask=token < num_tokens)


@on_its_device
def received_attention(
    query: Tensor,
    key: Tensor,
    num_padding: list[int],
    scaling: float,
    softcap: float | None,
    sliding_window: int | None,
) -> Tensor:
    """Causal attention of the last queries that each token receives, mean over them and the GQA group.

    query [B, H, T_q, D], of the last T_q tokens, and key [B, H_kv, T, D], one type (float32, float16 or bfloat16), any
    strides but 1 along D; num_padding: left padding of each row -> float32 [B, H_kv, T], zero at padding.

    Two launches. Raises UnsupportedByKernelsError.
    """
    num_rows, num_heads, num_tokens, head_size = key.shape
    num_queries, device = query.shape[2], key.device
    if head_size not in HEAD_SIZES:
        raise UnsupportedByKernelsError(
            f"the kernels take head sizes {', '.join(map(str, HEAD_SIZES))}, got {head_size}"
        )
    if query.dtype != key.dtype or key.dtype not in (torch.float32, *TRITON_DTYPES):
        raise UnsupportedByKernelsError(
            f"the kernels take queries and keys of float32, float16 or bfloat16, got {query.dtype} and {key.dtype}"
        )
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    settings = constants(num_heads, query.shape[1] // num_heads, num_queries, head_size, key.dtype, is_interpreted())
    settings |= {"WINDOW": sliding_window is not None, "SOFTCAP": softcap is not None}
    rows, num_runs = settings["GQA"] * num_queries, -(-num_tokens // RUN)
    padding = torch.tensor(num_padding, dtype=torch.int32, device=device)
    state = torch.empty(num_rows * num_heads, num_runs, rows, 2, dtype=torch.float32, device=device)
    out = torch.zeros(num_rows, num_heads, num_tokens, dtype=torch.float32, device=device)
    numbers = (*query.stride()[:3], *key.stride()[:3], num_queries, num_tokens, num_runs)
    attention = (scaling, softcap or 0.0, sliding_window or 0)
    options = {"num_warps": num_warps(key.dtype), "num_stages": NUM_STAGES}
    _statistics[(num_rows * num_heads, num_runs, triton.cdiv(rows, settings["ROWS"]))](
        query, key, padding, state, *numbers, *attention, **settings, RUN=RUN, **options,
    )  # fmt: skip
    _received[(num_rows * num_heads, triton.cdiv(num_tokens, settings["TILE"]))](
        query, key, padding, state, out, *numbers, *attention, **settings, RUNS=RUNS_PER_STEP, **options,
    )  # fmt: skip
    return out


def constants(
    num_heads: int, gqa: int, num_queries: int, head_size: int, dtype: torch.dtype, is_interpreted: bool
) -> dict[str, Any]:
    """The compile-time arguments of both kernels that follow from shapes and types."""
    wide = dtype == torch.float32 or (is_interpreted and dtype == torch.bfloat16)
    channels = triton.next_power_of_2(head_size)
    most_rows = MOST_ROWS if dtype.itemsize == 2 else MOST_ROWS // (2 if channels <= 64 else 4)  # registers
    rows = min(most_rows, max(16, triton.next_power_of_2(gqa * num_queries)))
    return {
        "HEADS": num_heads, "GQA": gqa, "D": head_size, "D_PADDED": channels,
        "OPERAND": tl.float32 if wide else TRITON_DTYPES[dtype], "ROWS": rows,
        "TILE": min(64, TILE_BYTES // (channels * dtype.itemsize)),
    }  # fmt: skip


def num_warps(dtype: torch.dtype) -> int:
    """float32 has no tensor cores here and keeps its operands in registers; 256 channels of it spill even so."""
    return 4 if dtype.itemsize == 2 else 8
