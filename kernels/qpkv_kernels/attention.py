"""Attention in plain PyTorch: over dense prefill tensors, and over dequantized kept tokens.

No mask of T x N elements is ever built: prefill is causal by construction (each row's left padding is sliced away),
and sliding windows and softcapped logits go in chunks of queries against only the keys they can see.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

QUERY_CHUNK = 256


def attend(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, scaling: float, softcap: float | None = None
) -> Tensor:
    """Attention under an explicit mask.

    query [B, H, T, D], key and value [B, H_kv, S, D], visible bool broadcastable to [B, H_kv, T, S] or None (all)
    -> [B, H, T, D]. Every query must see a key.
    """
    num_groups = query.shape[1] // key.shape[1]
    if query.shape[2] == 1 and softcap is None:  # the query heads of a KV head as rows: each key is read once
        rows = query.view(len(query), key.shape[1], num_groups, -1)
        return F.scaled_dot_product_attention(rows, key, value, attn_mask=visible, scale=scaling).view(query.shape)
    if visible is not None and visible.shape[1] > 1:
        visible = visible.repeat_interleave(num_groups, 1)
    if softcap is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=visible, scale=scaling, enable_gqa=num_groups > 1
        )
    key, value = key.repeat_interleave(num_groups, 1), value.repeat_interleave(num_groups, 1)
    logits = torch.tanh((query @ key.transpose(-1, -2)) * (scaling / softcap)) * softcap
    if visible is not None:
        logits = logits.masked_fill(~visible, float("-inf"))
    return logits.softmax(-1, dtype=torch.float32).to(value.dtype) @ value


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_padding: list[int] | None,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention of the last T of N tokens.

    query [B, H, T, D], key and value [B, H_kv, N, D], N >= T; num_padding: left padding of each row, None for none;
    sliding_window: a query at position i sees keys above i - sliding_window -> [B, H, T, D], zero at padding.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    if num_padding is not None and any(num_padding):
        out = torch.zeros_like(query)
        for row, padding in enumerate(num_padding):
            first = max(0, padding - (num_keys - num_queries))  # the first query that is not padding
            out[row : row + 1, :, first:] = causal_attention(
                query[row : row + 1, :, first:],
                key[row : row + 1, :, padding:],
                value[row : row + 1, :, padding:],
                None,
                scaling,
                sliding_window,
                softcap,
            )
        return out
    if softcap is None and (sliding_window is None or sliding_window >= num_keys):
        bias = causal_lower_right(num_queries, num_keys)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
    chunks = []
    for start in range(0, num_queries, QUERY_CHUNK):
        chunk = query[:, :, start : start + QUERY_CHUNK]
        first_position = num_keys - num_queries + start
        begin = max(0, first_position - sliding_window + 1) if sliding_window else 0
        end = first_position + chunk.shape[2]
        visible = causal_mask(first_position, chunk.shape[2], begin, end, sliding_window, query.device)
        chunks.append(attend(chunk, key[:, :, begin:end], value[:, :, begin:end], visible, scaling, softcap))
    return torch.cat(chunks, 2)


def causal_mask(
    first_query: int, num_queries: int, first_key: int, end_key: int, sliding_window: int | None, device: torch.device
) -> Tensor:
    """bool [1, 1, num_queries, end_key - first_key]: which keys (by position) each query position may see."""
    i = torch.arange(first_query, first_query + num_queries, device=device)[:, None]
    j = torch.arange(first_key, end_key, device=device)
    visible = j <= i
    if sliding_window is not None:
        visible &= j > i - sliding_window
    return visible[None, None]
