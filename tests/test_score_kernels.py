"""The kernel that window scorers rank by, in Triton's interpreter where there is no GPU, against float64.

Errors are relative to the largest share of attention in a row: 1e-5 in float32, 2e-3 for 16-bit operands.
"""

from __future__ import annotations

import pytest
import torch
from test_decode_kernel import DEVICE
from torch import Tensor

from qpkv_kernels import score
from qpkv_kernels.decode import is_interpreted
from qpkv_runtime import scorers
from qpkv_runtime.compression import Scoring, observe, rank
from qpkv_runtime.errors import BackendError
from qpkv_runtime.plan import Scorer
from qpkv_runtime.scorers import Prefill

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-3}


def make_prefill(
    tokens: int = 150, queries: int = 8, heads: int = 1, gqa: int = 2, head_size: int = 64, dtype=torch.float32,
    padding: tuple[int, ...] = (0,), softcap=None, sliding=None, seed: int = 0,
) -> Prefill:  # fmt: skip
    """On the strides that a model's projections leave: [B, T, H, D] turned round."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(len(padding), queries, heads * gqa, head_size, generator=generator)
    key = torch.randn(len(padding), tokens, heads, head_size, generator=generator)
    query, key = (x.to(DEVICE, dtype).transpose(1, 2) for x in (query, key))
    return Prefill(0, query, key, list(padding), 3 * head_size**-0.5, softcap, sliding, window=queries)


def expected_of(prefill: Prefill) -> Tensor:
    """Naive, row by row, in float64."""
    out = torch.zeros(prefill.key.shape[:3], dtype=torch.float64)
    num_heads, num_queries, num_tokens = prefill.key.shape[1], prefill.query.shape[2], prefill.key.shape[2]
    gqa = prefill.query.shape[1] // num_heads
    query, key = prefill.query.double().cpu(), prefill.key.double().cpu()
    for row, padding in enumerate(prefill.num_padding):
        for head in range(num_heads * gqa):
            for i in range(num_queries):
                end = num_tokens - num_queries + i + 1
                begin = max(padding, end - prefill.sliding_window if prefill.sliding_window else 0)
                if begin >= end:
                    continue
                logits = key[row, head // gqa, begin:end] @ query[row, head, i] * prefill.scaling
                if prefill.softcap is not None:
                    logits = torch.tanh(logits / prefill.softcap) * prefill.softcap
                out[row, head // gqa, begin:end] += logits.softmax(0)
    return out / (num_queries * gqa)


def check(prefill: Prefill, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QPKV_BACKEND", "triton")
    torch.use_deterministic_algorithms(True)  # fills what is allocated with NaN
    try:
        got = scorers.received_attention(prefill).double().cpu()
    finally:
        torch.use_deterministic_algorithms(False)
    expected = expected_of(prefill)
    error = ((got - expected).abs().amax(-1) / expected.amax(-1)).max().item()
    print(f"{error:.1e}")
    assert error < TOLERANCE[prefill.key.dtype]
    if prefill.key.dtype == torch.float32:
        monkeypatch.setenv("QPKV_BACKEND", "reference")
        assert torch.allclose(got.float(), scorers.received_attention(prefill).cpu(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_tokens_receive_what_float64_attention_gives_them(dtype, monkeypatch):
    check(make_prefill(dtype=dtype), monkeypatch)


@pytest.mark.parametrize("head_size", [80, 96, 128, 256])
def test_head_sizes(head_size, monkeypatch):
    check(make_prefill(70, head_size=head_size), monkeypatch)


@pytest.mark.parametrize(("gqa", "queries"), [(1, 1), (3, 5), (7, 16), (16, 3)])
def test_query_heads_and_queries_in_any_number(gqa, queries, monkeypatch):
    check(make_prefill(80, queries, gqa=gqa), monkeypatch)


@pytest.mark.parametrize("tokens", [1, 2, 64, 65])
def test_prompts_no_longer_than_the_window_and_ragged_tiles(tokens, monkeypatch):
    check(make_prefill(tokens, min(tokens, 8)), monkeypatch)


@pytest.mark.parametrize(("softcap", "sliding"), [(2.0, None), (None, 40), (3.0, 30)])
def test_softcapped_logits_and_sliding_windows(softcap, sliding, monkeypatch):
    check(make_prefill(100, softcap=softcap, sliding=sliding), monkeypatch)


def test_a_padded_row_gets_what_it_gets_alone(monkeypatch):
    """Padding queries and several runs of tokens too. Bit for bit but for the interpreter, whose products are numpy's:
    on some machines those of fewer rows are rounded otherwise."""
    monkeypatch.setattr(score, "RUN", 64)
    batch = make_prefill(150, 8, heads=2, padding=(0, 37, 146))
    check(batch, monkeypatch)
    monkeypatch.setenv("QPKV_BACKEND", "triton")
    together = scorers.received_attention(batch)
    for row, padding in enumerate(batch.num_padding):
        alone = Prefill(
            0, batch.query[row : row + 1, :, -min(8, 150 - padding) :], batch.key[row : row + 1, :, padding:], [0],
            batch.scaling, None, None, window=8,
        )  # fmt: skip
        share = alone.query.shape[2] / 8  # the mean is over padding queries too
        by_itself = scorers.received_attention(alone)[0] * share
        tolerance = 1e-6 if is_interpreted() else 0.0
        assert torch.allclose(together[row, :, padding:], by_itself, rtol=tolerance, atol=0)
        assert not together[row, :, :padding].any()


@pytest.mark.parametrize("scorer", ["snapkv", "tova"])
def test_scorers_rank_by_the_kernel_as_by_the_reference(scorer, monkeypatch):
    prefill = make_prefill(120, 120, heads=2, padding=(0, 9))
    scoring = Scoring.of(Scorer(name=scorer), sinks=2, window=8)
    orders, stats = [], []
    for backend in ("reference", "triton"):
        monkeypatch.setenv("QPKV_BACKEND", backend)
        observation = observe(scoring, prefill)
        orders.append(rank(observation.importance).order)
        stats.append(observation.query_stats)
    assert torch.equal(*orders)
    assert torch.equal(*stats)


def test_what_the_kernel_does_not_cover_is_named_with_layer_and_shape(monkeypatch):
    monkeypatch.setenv("QPKV_BACKEND", "triton")
    with pytest.raises(BackendError, match=r"layer 0, scoring \(1, 1, 20, 48\).*head sizes .*got 48.*=reference"):
        scorers.received_attention(make_prefill(20, head_size=48))


@pytest.mark.slow
@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("gqa", [1, 3, 4, 7])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_shape(dtype, gqa, head_size, monkeypatch):
    for queries, sliding in ((1, None), (16, 50), (33, None)):
        check(make_prefill(1100, queries, 2, gqa, head_size, dtype, (0, 5), None, sliding), monkeypatch)
