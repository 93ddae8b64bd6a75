"""The token scorers: how important each token of a prompt is to each KV head.

Higher score is kept; token zero is the oldest; scores are finite float32 [B, H_kv, T]. A scorer is shown exactly what
its `needs` in `methods.py` says: the window's queries, or all of them. What must stay (sinks, the window) and what
must not (padding, tokens outside a sliding window) is decided for all scorers alike in `compression.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from qpkv_kernels.attention import causal_mask
from qpkv_runtime.methods import ParameterValue

QUERY_CHUNK = 128


@dataclass(frozen=True)
class Prefill:
    """One layer's prefill, as scorers see it.

    query: [B, H, T_q, D], the last T_q tokens' queries (T_q = window, or T for a scorer that needs all);
    key: [B, H_kv, T, D], after RoPE; num_padding: left padding of each row; scaling, softcap, sliding_window: the
    layer's attention; window: the number of most recent tokens that are kept anyway.
    """

    layer: int
    query: Tensor
    key: Tensor
    num_padding: list[int]
    scaling: float
    softcap: float | None
    sliding_window: int | None
    window: int

    @property
    def is_token(self) -> Tensor:
        """bool [B, 1, T]: not padding."""
        padding = torch.tensor(self.num_padding, device=self.key.device)
        return (torch.arange(self.key.shape[2], device=self.key.device) >= padding[:, None])[:, None]

    @property
    def positions(self) -> Tensor:
        """int64 [B, 1, T]: the token's position in its own row, negative at padding."""
        padding = torch.tensor(self.num_padding, device=self.key.device)
        return (torch.arange(self.key.shape[2], device=self.key.device) - padding[:, None])[:, None]

    def attention(self) -> Iterator[Tensor]:
        """Causal attention probabilities of the queries, in chunks: float32 [B, H_kv, G, queries, T]. Rows of
        padding queries are zero."""
        num_heads, num_tokens = self.key.shape[1], self.key.shape[2]
        first = num_tokens - self.query.shape[2]
        is_token = self.is_token[:, :, None]  # [B, 1, 1, T]
        for start in range(0, self.query.shape[2], QUERY_CHUNK):
            query = self.query[:, :, start : start + QUERY_CHUNK].unflatten(1, (num_heads, -1))
            logits = torch.einsum("bhgqd,bhtd->bhgqt", query, self.key).float() * self.scaling
            if self.softcap is not None:
                logits = torch.tanh(logits / self.softcap) * self.softcap
            begin, count = first + start, query.shape[3]
            visible = causal_mask(begin, count, 0, num_tokens, self.sliding_window, self.key.device) & is_token
            yield logits.masked_fill(~visible[:, :, None], float("-inf")).softmax(-1).nan_to_num(0.0)


class Scorer(Protocol):
    """What every scorer does."""

    def score(self, prefill: Prefill, parameters: Mapping[str, ParameterValue]) -> Tensor:
        """-> float32 [B, H_kv, T]."""
        ...


def _per_head(prefill: Prefill, scores: Tensor) -> Tensor:
    return scores.float().expand(-1, prefill.key.shape[1], -1)


class StreamingLLM:
    """The most recent tokens (arXiv 2309.17453); the sinks are every plan's."""

    def score(self, prefill: Prefill, parameters: Mapping[str, ParameterValue]) -> Tensor:
        return _per_head(prefill, prefill.positions)


class H2O:
    """Attention received from all queries so far (arXiv 2306.14048), truly causal: the paper's evaluation code is
    causal only inside the window. Column sums in chunks of queries, never [H, T, T]; mean over the GQA group."""

    def score(self, prefill: Prefill, parameters: Mapping[str, ParameterValue]) -> Tensor:
        total = torch.zeros_like(prefill.key[..., 0], dtype=torch.float32)
        for probabilities in prefill.attention():
            total += probabilities.sum(3).mean(2)
        return total


class SnapKV:
    """Attention received from the window's queries, pooled over neighbours (arXiv 2404.14469).

    Mean over the window and the GQA group; pooled over the tokens before the window, "same" padding.
    """

    def score(self, prefill: Prefill, parameters: Mapping[str, ParameterValue]) -> Tensor:
        kernel = int(parameters["kernel"])
        received = torch.cat(list(prefill.attention()), 3).mean((2, 3))  # [B, H_kv, T]
        num_before = max(0, received.shape[-1] - prefill.window)
        before, window = received[..., :num_before], received[..., num_before:]
        if num_before and parameters["pooling"] == "max":
            before = before.masked_fill(~prefill.is_token[..., :num_before], float("-inf"))
            before = F.max_pool1d(before, kernel, stride=1, padding=kernel // 2)
        elif num_before:
            before = F.avg_pool1d(before, kernel, stride=1, padding=kernel // 2)
        return torch.cat([before[..., :num_before], window], -1).nan_to_num(neginf=0.0)


class KNorm:
    """Keys of small norm are attended to most (arXiv 2406.11430)."""

    def score(self, prefill: Prefill, parameters: Mapping[str, ParameterValue]) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(prefill.key.float(), dim=-1)
        return -norm


class Random:
    """The control: a fixed pseudo-random number for each (seed, layer, head, position)."""

    def score(self, prefill: Prefill, parameters: Mapping[str, ParameterValue]) -> Tensor:
        heads = torch.arange(prefill.key.shape[1], device=prefill.key.device)[:, None]
        mixed = prefill.positions * 0x9E3779B1 + heads * 0x85EBCA77 + prefill.layer * 0xC2B2AE3D
        mixed = (mixed + (int(parameters["seed"]) * 0x27D4EB2F & 0xFFFFFFFF)) & 0xFFFFFFFF
        for multiplier in (0x85EBCA6B, 0xC2B2AE35):  # murmur3's finalizer: every bit depends on every bit
            mixed = ((mixed ^ (mixed >> 16)) * multiplier) & 0xFFFFFFFF
        return (mixed ^ (mixed >> 16)).float() / 2**32


SCORERS: dict[str, Scorer] = {
    "streamingllm": StreamingLLM(),
    "h2o": H2O(),
    "snapkv": SnapKV(),
    "knorm": KNorm(),
    "random": Random(),
}
