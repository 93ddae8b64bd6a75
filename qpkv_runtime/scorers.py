"""The token scorers: how important each token of a prompt is to each KV head.

Higher score is kept; token zero is the oldest; scores are finite float32 [B, H_kv, T]. A scorer is shown exactly what
its `needs` in `methods.py` say (`Prefill.shown`). What must stay (sinks, the window) and what must not (padding, tokens
outside a sliding window) is decided for all scorers alike: `Prefill` says what it is, `compression.py` enforces it.
Query heads become KV heads in one place, `kv_heads`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from qpkv_kernels.attention import causal_mask
from qpkv_runtime.backend import kernels_at, use_kernels
from qpkv_runtime.methods import Need, ParameterValue

QUERY_CHUNK = 128
TOKEN_CHUNK = 1024


@dataclass(frozen=True, eq=False)
class LayerParts:
    """The pieces of a model's layer that some scorers look at: references, never copies.

    output_projection: the weight of W_o, [hidden, H * D]; rotary_embedding: positions int64 [B, N] -> (cos, sin)
    [B, N, D], both halves of D alike.
    """

    output_projection: Tensor
    rotary_embedding: Callable[[Tensor], tuple[Tensor, Tensor]]

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerParts:
        return self  # a copied cache still belongs to the same model


@dataclass(frozen=True)
class Prefill:
    """One layer's prefill, as scorers see it.

    query: [B, H, T_q, D], the last T_q tokens' queries; key: [B, H_kv, T, D], after RoPE; num_padding: left padding of
    each row; scaling, softcap, sliding_window: the layer's attention; window, sinks: the numbers of most recent and of
    first tokens that are kept anyway; value: [B, H_kv, T, D]; parts: of the layer's module; num_queries: what
    "window_queries" are, 0 for as many as the window; shared: where several scorings of these very tensors keep what
    they have in common, by its name and the number of last queries it is of; None for one scoring alone.
    """

    layer: int
    query: Tensor
    key: Tensor
    num_padding: list[int]
    scaling: float
    softcap: float | None
    sliding_window: int | None
    window: int
    sinks: int = 0
    value: Tensor | None = None
    parts: LayerParts | None = None
    num_queries: int = 0
    shared: dict[tuple[str, int], Tensor] | None = None

    def shown(self, needs: Sequence[Need]) -> Prefill:
        """This prefill (with all queries) without what `needs` do not name."""
        counts = {
            "last_query": 1,
            "window_queries": self.num_queries or self.window,
            "all_queries": self.query.shape[2],
        }
        num_queries = max(counts.get(need, 0) for need in needs)
        needs_parts = "rotary_embedding" in needs or "output_projection" in needs
        return replace(
            self,
            query=self.query[:, :, -num_queries:] if num_queries else self.query[:, :, :0],
            key=self.key if "keys" in needs else self.key[..., :0],
            value=self.value if "values" in needs else None,
            parts=self.parts if needs_parts else None,
        )

    def in_common(self, name: str, num_queries: int, measure: Callable[[], Tensor]) -> Tensor:
        """What `shared` holds under this name, else what `measure` gives and it is then to hold."""
        held = {} if self.shared is None else self.shared
        if (name, num_queries) not in held:
            held[name, num_queries] = measure()
        return held[name, num_queries]

    @property
    def must_stay(self) -> Tensor:
        """bool [B, 1, T]: sinks and window, padding among them where a row is shorter."""
        positions = self.positions
        return (positions < self.sinks) | (positions > positions[..., -1:] - self.window)

    @property
    def must_go(self) -> Tensor:
        """bool [B, 1, T]: padding, and what the next query cannot see; stronger than `must_stay`."""
        if self.sliding_window is None:
            return ~self.is_token
        positions = self.positions
        return ~self.is_token | (positions <= positions[..., -1:] + 1 - self.sliding_window)

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

    @property
    def query_peaks(self) -> Tensor:
        """max |q| over all queries: float32 [B, H, D]. Copies no queries, which are several times the keys; and no
        `aminmax`, which along a dimension takes ten times as long as both apart on a CPU."""
        first = self.key.shape[2] - self.query.shape[2]
        starts = [max(0, padding - first) for padding in self.num_padding]
        if not any(starts):
            return torch.maximum(self.query.amax(2), -self.query.amin(2)).float()
        rows = [query[:, start:] for query, start in zip(self.query, starts, strict=True)]
        return torch.stack([torch.maximum(row.amax(1), -row.amin(1)) for row in rows]).float()

    def attention(self) -> Iterator[Tensor]:
        """Causal attention probabilities of the queries, in chunks: float32 [B, H_kv, G, queries, T]. Rows of
        padding queries are zero."""
        num_heads, num_tokens = self.key.shape[1], self.key.shape[2]
        first = num_tokens - self.query.shape[2]
        is_token = self.is_token[:, :, None]  # [B, 1, 1, T]
        query, key = self.query, self.key
        if key.dtype == torch.float16:  # which q . k overflows before it is scaled
            query, key = query.float(), key.float()
        for start in range(0, self.query.shape[2], QUERY_CHUNK):
            chunk = query[:, :, start : start + QUERY_CHUNK].unflatten(1, (num_heads, -1))
            logits = torch.einsum("bhgqd,bhtd->bhgqt", chunk, key).float() * self.scaling
            if self.softcap is not None:
                logits = torch.tanh(logits / self.softcap) * self.softcap
            begin, count = first + start, chunk.shape[3]
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


def kv_heads(scores: Tensor) -> Tensor:
    """Of query heads [B, H_kv, G, T] to KV heads [B, H_kv, T]: the mean over the group that shares a KV head."""
    return scores.mean(2)


class H2O:
    """Attention received from all queries so far (arXiv 2306.14048), truly causal: the paper's evaluation code is
    causal only inside the window. Column sums in chunks of queries, never [H, T, T]; mean over the GQA group."""

    def score(self, prefill: Prefill, parameters: Mapping[str, ParameterValue]) -> Tensor:
        total = torch.zeros_like(prefill.key[..., 0], dtype=torch.float32)
        for probabilities in prefill.attention():
            total += kv_heads(probabilities.sum(3))
        return total


def received_attention(prefill: Prefill) -> Tensor:
    """float32 [B, H_kv, T]: the attention that each token receives from the queries, their mean and the GQA group's."""
    query, key = prefill.query, prefill.key

    def measure() -> Tensor:
        if not use_kernels(key.device):
            return kv_heads(torch.cat(list(prefill.attention()), 3).mean(3))
        from qpkv_kernels import score

        with kernels_at(f"layer {prefill.layer}, scoring {tuple(key.shape)} {key.dtype} keys"):
            return score.received_attention(
                query, key, prefill.num_padding, prefill.scaling, prefill.softcap, prefill.sliding_window
            )

    return prefill.in_common("received attention", query.shape[2], measure)


class SnapKV:
    """Attention received from the window's queries, pooled over neighbours (arXiv 2404.14469).

    Differs from the paper where `queries` is not 0: then that many of the last queries are looked at while the window
    that is kept may be smaller; under small budgets its tokens are the larger part of what a layer holds. And where
    `lead` is not 0: then pooling reaches that much further back and less far ahead, so that attention to a token also
    speaks for those that follow it. A question looks at the name that it shares with a fact; the value, which the
    answer will need, stands behind the name.
    Mean over the window and the GQA group; pooled over the tokens between the sinks and the window, which stay anyway
    and would lend their attention to whatever stands beside them; "same" padding.
    """

    def score(self, prefill: Prefill, parameters: Mapping[str, ParameterValue]) -> Tensor:
        kernel = int(parameters["kernel"])
        back = kernel // 2 + int(parameters["lead"])
        received = received_attention(prefill)
        num_before = max(0, received.shape[-1] - prefill.window)
        before, window = received[..., :num_before], received[..., num_before:]
        if num_before:
            pool, outside = (F.max_pool1d, float("-inf")) if parameters["pooling"] == "max" else (F.avg_pool1d, 0.0)
            before = before.masked_fill(prefill.positions[..., :num_before] < prefill.sinks, outside)
            before = F.pad(before, (back, max(0, kernel - 1 - back)), value=outside)[..., : num_before + kernel - 1]
            before = pool(before, kernel, stride=1)
        return torch.cat([before, window], -1).nan_to_num(neginf=0.0)


class KNorm:
    """Keys of small norm are attended to most (arXiv 2406.11430)."""

    def score(self, prefill: Prefill, parameters: Mapping[str, ParameterValue]) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(prefill.key.float(), dim=-1)
        return -norm


class Tova:
    """The last query's attention, mean over all heads of the layer, so that its heads keep the same tokens (arXiv
    2401.06104)."""

    def score(self, prefill: Prefill, parameters: Mapping[str, ParameterValue]) -> Tensor:
        return _per_head(prefill, received_attention(prefill).mean(1, keepdim=True))


class KeyDiff:
    """Keys unlike the others are kept: minus the cosine to the mean of the head's normalized keys (arXiv 2504.15364).

    In float64, so that the mean does not depend on how a batch is laid out.
    """

    def score(self, prefill: Prefill, parameters: Mapping[str, ParameterValue]) -> Tensor:
        directions = F.normalize(prefill.key.double(), dim=-1).masked_fill(~prefill.is_token[..., None], 0)
        mean = F.normalize(directions.sum(2, keepdim=True), dim=-1)
        cosine: Tensor = (directions * mean).sum(-1)
        return -cosine.float()


class CriticalKV:
    """A share of the budget by snapkv's score, the rest by score x L1 norm of W_o v, both largest first (arXiv
    2502.03805).

    Differs from the paper, whose first stage takes half of a budget that a score does not know: tokens are ordered by
    the better of their two places, counted at the pace of `first_stage` to the rest. The first n tokens of that order
    hold the first_stage * n best of the first stage whatever n is. The score of the token at place r is the r-th
    largest product, so heads compare by what their tokens weigh. The norm is the mean over the GQA group, as in the
    authors' code; tokens that stay or go anyway take no place.
    """

    def score(self, prefill: Prefill, parameters: Mapping[str, ParameterValue]) -> Tensor:
        first = SNAPKV.score(prefill, parameters)
        second = (first + float(parameters["epsilon"])) * kv_heads(_projected_norms(prefill))
        lowest, highest = prefill.must_go.expand_as(first), prefill.must_stay & ~prefill.must_go
        share, best = float(parameters["first_stage"]), []
        for stage, pace in ((first, share), (second, 1 - share)):
            order = stage.masked_fill(highest, float("inf")).masked_fill(lowest, float("-inf"))
            places = order.sort(dim=-1, descending=True, stable=True).indices.argsort(-1).double() + 1
            best.append(places / pace if pace else torch.full_like(places, float("inf")))
        merged = torch.minimum(*best).sort(dim=-1, stable=True).indices
        is_candidate = ~(lowest | highest)
        products = second.masked_fill(highest, float("inf")).masked_fill(lowest, float("-inf"))
        placed = torch.zeros_like(second).scatter_(-1, merged, products.sort(dim=-1, descending=True).values)
        return torch.where(is_candidate, placed, second)


def _projected_norms(prefill: Prefill) -> Tensor:
    """L1 norm of what each token's value adds to the layer's output through each query head: float32
    [B, H_kv, G, T]. Never [H, T, hidden]: one head and TOKEN_CHUNK tokens at a time."""
    assert prefill.value is not None and prefill.parts is not None
    value, num_heads, head_size = prefill.value, prefill.value.shape[1], prefill.value.shape[-1]
    weights = prefill.parts.output_projection.unflatten(1, (num_heads, -1, head_size))  # [hidden, H_kv, G, D]
    heads = [
        torch.cat([(x @ weights[:, head, g].T).float().abs().sum(-1) for x in value[:, head].split(TOKEN_CHUNK, 1)], 1)
        for head in range(num_heads)
        for g in range(weights.shape[2])
    ]
    norms: Tensor = torch.stack(heads, 1).unflatten(1, (num_heads, -1))
    return norms


class ExpectedAttention:
    """The attention that the next `future_tokens` queries are expected to pay, times the norm of the value (arXiv
    2510.00636).

    Queries before RoPE are taken as Gaussian with the prompt's mean and covariance; RoPE is averaged over the future
    positions; E exp(q.k) = exp(mu.k + k.Sigma.k / 2), softmax over the tokens, mean over the GQA group. Sinks, whose
    queries and keys are outliers, count neither in the moments nor in the softmax (a prompt of nothing else: all do).
    Queries before RoPE come from those after it, turned back. Softcap and sliding window are left aside, as in the
    authors' code. Moments in float64, so that they do not depend on how a batch is laid out.
    """

    def score(self, prefill: Prefill, parameters: Mapping[str, ParameterValue]) -> Tensor:
        assert prefill.value is not None and prefill.parts is not None
        counted = prefill.is_token & (prefill.positions >= prefill.sinks)
        counted = torch.where(counted.any(-1, keepdim=True), counted, prefill.is_token)  # [B, 1, T]
        mean, covariance = _query_moments(prefill, counted)  # [B, H, D], [B, H, D, D]
        rotate = _mean_rotation(prefill, int(parameters["future_tokens"]))
        mean, covariance = rotate(mean), rotate(rotate(covariance).transpose(-1, -2))
        num_heads = prefill.key.shape[1]
        mean = mean.unflatten(1, (num_heads, -1)) * prefill.scaling  # [B, H_kv, G, D]
        covariance = covariance.unflatten(1, (num_heads, -1)) * (prefill.scaling**2 / 2)
        logits = []
        for key in prefill.key.double().split(TOKEN_CHUNK, 2):  # [B, H_kv, t, D]
            key = key[:, :, None]
            logits.append((mean[..., None, :] * key).sum(-1) + ((key @ covariance) * key).sum(-1))
        expected = torch.cat(logits, -1).masked_fill(~counted[:, :, None], float("-inf")).softmax(-1)
        norms = torch.linalg.vector_norm(prefill.value.double(), dim=-1)
        scores: Tensor = (kv_heads(expected) + float(parameters["epsilon"])) * norms
        return scores.float()


def _query_moments(prefill: Prefill, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [B, H, D] and covariance [B, H, D, D] of the counted tokens' queries before RoPE, float64."""
    assert prefill.parts is not None
    number = counted.sum(-1, keepdim=True)[..., None].double()  # [B, 1, 1, 1]
    total: Tensor | float = 0.0
    squares: Tensor | float = 0.0
    for start in range(0, prefill.key.shape[2], TOKEN_CHUNK):
        tokens = slice(start, start + TOKEN_CHUNK)
        cos, sin = prefill.parts.rotary_embedding(prefill.positions[:, 0, tokens].clamp(min=0))
        cos, sin = cos.double()[:, None], sin.double()[:, None]  # [B, 1, t, D]
        query = prefill.query[:, :, tokens].double()
        query = (query * cos - _half_turn(query) * sin) / (cos.square() + sin.square())
        query = query.masked_fill(~counted[..., tokens, None], 0)
        total = total + query.sum(2)
        squares = squares + query.transpose(-1, -2) @ query
    mean = total / number[..., 0]
    return mean, squares / number - mean[..., :, None] * mean[..., None, :]


def _mean_rotation(prefill: Prefill, num_tokens: int) -> Callable[[Tensor], Tensor]:
    """The mean of RoPE over the next `num_tokens` positions of each row: a linear map of the last axis of
    [B, H, ..., D]."""
    assert prefill.parts is not None
    after = prefill.positions[:, 0, -1:] + 1 + torch.arange(num_tokens, device=prefill.key.device)
    cos, sin = (x.double().mean(1) for x in prefill.parts.rotary_embedding(after))  # [B, D]

    def rotate(x: Tensor) -> Tensor:
        shape = (x.shape[0], *[1] * (x.ndim - 2), x.shape[-1])
        return x * cos.reshape(shape) + _half_turn(x) * sin.reshape(shape)

    return rotate


def _half_turn(x: Tensor) -> Tensor:
    """RoPE's partner of each channel: (x1, x2) -> (-x2, x1), halves of the last axis."""
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


class Random:
    """The control: a fixed pseudo-random number for each (seed, layer, head, position)."""

    def score(self, prefill: Prefill, parameters: Mapping[str, ParameterValue]) -> Tensor:
        heads = torch.arange(prefill.key.shape[1], device=prefill.key.device)[:, None]
        mixed = prefill.positions * 0x9E3779B1 + heads * 0x85EBCA77 + prefill.layer * 0xC2B2AE3D
        mixed = (mixed + (int(parameters["seed"]) * 0x27D4EB2F & 0xFFFFFFFF)) & 0xFFFFFFFF
        for multiplier in (0x85EBCA6B, 0xC2B2AE35):  # murmur3's finalizer: every bit depends on every bit
            mixed = ((mixed ^ (mixed >> 16)) * multiplier) & 0xFFFFFFFF
        return (mixed ^ (mixed >> 16)).float() / 2**32


SNAPKV = SnapKV()
SCORERS: dict[str, Scorer] = {
    "streamingllm": StreamingLLM(),
    "h2o": H2O(),
    "snapkv": SNAPKV,
    "knorm": KNorm(),
    "tova": Tova(),
    "keydiff": KeyDiff(),
    "criticalkv": CriticalKV(),
    "expected_attention": ExpectedAttention(),
    "random": Random(),
}
