"""What every scorer promises, over the registry, against a naive O(T^2) float64 reference; then what is decided for all
of them alike: what must stay, what must go, the order, the tiers.

The reference is written from METHODS.md, one query head at a time, and shares no code with the scorers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qpkv_runtime.compression import Scoring, gather, observe, rank, select
from qpkv_runtime.errors import PlanError
from qpkv_runtime.methods import SCORERS as FACTS
from qpkv_runtime.methods import scorer_parameters
from qpkv_runtime.plan import Scorer
from qpkv_runtime.scorers import QUERY_CHUNK, SCORERS, LayerParts, Prefill

WINDOW = 5
INF = float("inf")


@dataclass(frozen=True)
class Case:
    """The attention of one layer: 4 query heads over `kv_heads`, and what bends it."""

    kv_heads: int = 2
    softcap: float | None = None
    sliding_window: int | None = None
    scaling: float = 0.35


CASES = {
    "gqa": Case(),
    "mqa": Case(kv_heads=1),
    "mha": Case(kv_heads=4),
    "softcap": Case(softcap=2.0),
    "sliding": Case(sliding_window=9),
    "sliding-softcap": Case(sliding_window=3, softcap=4.0),
}
over_scorers = pytest.mark.parametrize("name", SCORERS)
over_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def make_prefill(
    case: Case, tokens: int, num_padding: list[int] | None = None, seed: int = 0, **changes: Any
) -> Prefill:
    """Sharp random queries, keys and values, D = 8; padding holds as large numbers as tokens do."""
    generator, rows = torch.Generator().manual_seed(seed), len(num_padding or [0])
    query = torch.randn(rows, 4, tokens, 8, generator=generator) * 2
    key = torch.randn(rows, case.kv_heads, tokens, 8, generator=generator) * 2
    prefill = Prefill(
        1, query, key, num_padding or [0], case.scaling, case.softcap, case.sliding_window, window=WINDOW, sinks=2,
        value=torch.randn(rows, case.kv_heads, tokens, 8, generator=generator),
        parts=LayerParts(torch.randn(12, 32, generator=generator), rotary_embedding),
    )  # fmt: skip
    return replace(prefill, **changes)


FREQUENCIES = [0.9, 0.3, 0.1, 0.03]  # of each of the D / 2 pairs of channels


def rotary_embedding(positions: Tensor) -> tuple[Tensor, Tensor]:
    angles = positions[..., None].double() * torch.tensor([*FREQUENCIES, *FREQUENCIES], dtype=torch.float64)
    return angles.cos(), angles.sin()


def score(name: str, prefill: Prefill, **parameters: Any) -> Tensor:
    return SCORERS[name].score(prefill.shown(FACTS[name].needs), scorer_parameters(name, parameters))


def row_alone(prefill: Prefill, row: int) -> Prefill:
    """One row of a batch without its padding."""
    n = prefill.num_padding[row]
    query, key, value = (x[row : row + 1, :, n:] for x in (prefill.query, prefill.key, prefill.value))
    return replace(prefill, query=query, key=key, value=value, num_padding=[0])


# --- the reference -------------------------------------------------------------------------------------------------


def naive_probabilities(prefill: Prefill, row: int, head: int) -> list[list[float]]:
    """Causal attention of one query head in float64: [T, T], a row per query; zero at padding, both ways."""
    num_tokens, padding = prefill.key.shape[2], prefill.num_padding[row]
    queries = prefill.query[row, head].double()
    keys = prefill.key[row, head // (prefill.query.shape[1] // prefill.key.shape[1])].double()
    table = []
    for i in range(num_tokens):
        logits = {}
        for j in range(padding, i + 1):
            if prefill.sliding_window is not None and j <= i - prefill.sliding_window:
                continue
            logit = float(queries[i] @ keys[j]) * prefill.scaling
            if prefill.softcap is not None:
                logit = prefill.softcap * math.tanh(logit / prefill.softcap)
            logits[j] = logit
        total = sum(math.exp(logit) for logit in logits.values())
        table.append([math.exp(logits[j]) / total if j in logits else 0.0 for j in range(num_tokens)])
    return table


def naive_pool(x: list[float], num_outside: int, kernel: int, pooling: str, lead: int) -> list[float]:
    """Same padding; the outside, and the first `num_outside`, absent from a maximum and zero in an average."""
    back = kernel // 2 + lead
    around = [x[max(num_outside, i - back) : max(0, i - back + kernel)] for i in range(len(x))]
    return [max(part, default=0.0) if pooling == "max" else sum(part) / kernel for part in around]


def naive_score(name: str, prefill: Prefill, row: int, kv_head: int, parameters: dict[str, Any]) -> list[float]:
    """One row and KV head in float64; only at tokens, padding is None of its business."""
    num_tokens, padding = prefill.key.shape[2], prefill.num_padding[row]
    if name == "streamingllm":
        return [float(j - padding) for j in range(num_tokens)]
    if name == "knorm":
        return [-float(prefill.key[row, kv_head, j].double().norm()) for j in range(num_tokens)]
    if name == "keydiff":
        keys = [prefill.key[row, kv_head, j].double() for j in range(num_tokens)]
        mean = sum(key / key.norm() for key in keys[padding:]) / (num_tokens - padding)
        return [-float(key @ mean / (key.norm() * mean.norm())) for key in keys]
    if name == "expected_attention":
        return naive_expected_attention(prefill, row, kv_head, parameters)
    if name == "criticalkv":
        return naive_criticalkv(prefill, row, kv_head, parameters)
    if name == "tova":
        heads = [naive_probabilities(prefill, row, head)[-1] for head in range(prefill.query.shape[1])]
        return [sum(p[j] for p in heads) / len(heads) for j in range(num_tokens)]
    groups = prefill.query.shape[1] // prefill.key.shape[1]
    heads = [naive_probabilities(prefill, row, kv_head * groups + g) for g in range(groups)]
    window = min(prefill.window, num_tokens)
    if name == "h2o":
        return [sum(p[i][j] for p in heads for i in range(num_tokens)) / groups for j in range(num_tokens)]
    assert name == "snapkv"
    queries = range(num_tokens - window, num_tokens)
    received = [sum(p[i][j] for p in heads for i in queries) / (groups * window) for j in range(num_tokens)]
    before = received[padding : max(padding, num_tokens - prefill.window)]
    pooled = naive_pool(before, prefill.sinks, parameters["kernel"], parameters["pooling"], parameters["lead"])
    return [*([0.0] * padding), *pooled, *received[padding + len(pooled) :]]


def naive_criticalkv(prefill: Prefill, row: int, kv_head: int, parameters: dict[str, Any]) -> list[float]:
    """snapkv's score, and that times the norm of W_o v; tokens in the order of their better place in the two lists."""
    num_tokens, padding = prefill.key.shape[2], prefill.num_padding[row]
    first = naive_score("snapkv", prefill, row, kv_head, parameters)
    groups, size = prefill.query.shape[1] // prefill.key.shape[1], prefill.key.shape[-1]
    second = []
    for j in range(num_tokens):
        norms = []
        for head in range(kv_head * groups, (kv_head + 1) * groups):
            weight = prefill.parts.output_projection[:, head * size : (head + 1) * size].double()
            norms.append(float((weight @ prefill.value[row, kv_head, j].double()).abs().sum()))
        second.append((first[j] + parameters["epsilon"]) * sum(norms) / groups)
    oldest = max(padding, num_tokens + 1 - (prefill.sliding_window or num_tokens + 1))
    forced = [j for j in range(oldest, num_tokens) if j - padding < prefill.sinks or j >= num_tokens - prefill.window]
    free = [j for j in range(oldest, num_tokens) if j not in forced]
    best = {}
    for scores, pace in ((first, parameters["first_stage"]), (second, 1 - parameters["first_stage"])):
        for place, j in enumerate(sorted(free, key=lambda j: (-scores[j], j)), len(forced) + 1):
            best[j] = min(best.get(j, INF), place / pace)
    products, scores = sorted((second[j] for j in free), reverse=True), list(second)
    for product, j in zip(products, sorted(free, key=lambda j: (best[j], j)), strict=True):
        scores[j] = product
    return scores


def turned(x: Tensor, position: int) -> Tensor:
    """RoPE of one vector at one position, pair by pair."""
    out, half = x.clone(), len(FREQUENCIES)
    for i, frequency in enumerate(FREQUENCIES):
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        out[i], out[half + i] = x[i] * cos - x[half + i] * sin, x[half + i] * cos + x[i] * sin
    return out


@cache
def naive_mean_rotation(length: int, future_tokens: int) -> Tensor:
    basis, future = torch.eye(8, dtype=torch.float64), range(length, length + future_tokens)
    return sum(torch.stack([turned(e, position) for e in basis], 1) for position in future) / len(future)


def naive_expected_attention(prefill: Prefill, row: int, kv_head: int, parameters: dict[str, Any]) -> list[float]:
    num_tokens, padding = prefill.key.shape[2], prefill.num_padding[row]
    groups = prefill.query.shape[1] // prefill.key.shape[1]
    counted = list(range(padding + prefill.sinks, num_tokens)) or list(range(padding, num_tokens))
    rotation = naive_mean_rotation(num_tokens - padding, parameters["future_tokens"])
    expected = [0.0] * num_tokens
    for head in range(kv_head * groups, (kv_head + 1) * groups):
        queries = torch.stack([turned(prefill.query[row, head, j].double(), -(j - padding)) for j in counted])
        mean = rotation @ queries.mean(0)
        covariance = rotation @ torch.cov(queries.T, correction=0).reshape(8, 8) @ rotation.T
        logits = {}
        for j in counted:
            key = prefill.key[row, kv_head, j].double() * prefill.scaling
            logits[j] = float(mean @ key + key @ covariance @ key / 2)
        top = max(logits.values())
        total = sum(math.exp(logit - top) for logit in logits.values())
        for j in counted:
            expected[j] += math.exp(logits[j] - top) / total / groups
    norms = [float(prefill.value[row, kv_head, j].double().norm()) for j in range(num_tokens)]
    return [(p + parameters["epsilon"]) * norm for p, norm in zip(expected, norms, strict=True)]


def relative_error(got: Tensor, prefill: Prefill, name: str, **parameters: Any) -> float:
    """Largest difference from the reference at tokens, relative to the largest score."""
    parameters, worst, largest = scorer_parameters(name, parameters), 0.0, 0.0
    for row, padding in enumerate(prefill.num_padding):
        for head in range(prefill.key.shape[1]):
            expected = torch.tensor(naive_score(name, prefill, row, head, parameters), dtype=torch.float64)[padding:]
            worst = max(worst, (got[row, head, padding:].double() - expected).abs().max().item())
            largest = max(largest, expected.abs().max().item())
    return worst / largest if largest else worst


# --- the contract --------------------------------------------------------------------------------------------------


def test_the_registry_holds_exactly_the_methods_of_the_table():
    assert set(SCORERS) == set(FACTS)


@over_scorers
@over_cases
@pytest.mark.parametrize("tokens", [1, 4, 5, 23])
def test_scores_are_finite_float32_of_every_token_and_head(name, case, tokens):
    for padding in ([0], [0, tokens - 1]):
        got = score(name, make_prefill(case, tokens, padding))
        assert got.shape == (len(padding), case.kv_heads, tokens)
        assert got.dtype == torch.float32 and bool(got.isfinite().all())


@over_scorers
@over_cases
def test_scores_are_the_same_every_time_and_inputs_stay_as_they_were(name, case):
    prefill = make_prefill(case, 23, [0, 6])
    query, key = prefill.query.clone(), prefill.key.clone()
    assert torch.equal(score(name, prefill), score(name, prefill))
    assert torch.equal(prefill.query, query) and torch.equal(prefill.key, key)


@pytest.mark.parametrize("name", [name for name in SCORERS if name != "random"])
@over_cases
@pytest.mark.parametrize("tokens", [1, 4, 23])
def test_scores_equal_the_naive_float64_reference(name, case, tokens):
    prefill = make_prefill(case, tokens, [0, tokens // 3])
    error = relative_error(score(name, prefill), prefill, name)
    print(f"relative error {error:.1e}")
    assert error < 2e-6  # float32 logits of up to ~20: 20 * 2**-24 in the exponent, and sums of 23


@pytest.mark.parametrize("name", [name for name in SCORERS if name != "random"])
@over_cases
def test_kept_sets_equal_the_naive_references(name, case):
    """Among equals the older token, in both."""
    prefill = make_prefill(case, 23, [0, 7])
    order = rank(score(name, prefill).masked_fill(~prefill.is_token, -INF)).order
    for row, padding in enumerate(prefill.num_padding):
        for head in range(case.kv_heads):
            expected = naive_score(name, prefill, row, head, scorer_parameters(name, {}))
            by_importance = sorted(range(padding, 23), key=lambda j: (-expected[j], j))
            for kept in (1, 6, 15):
                assert set(order[row, head, :kept].tolist()) == set(by_importance[:kept])


@over_scorers
@over_cases
def test_rows_of_a_left_padded_batch_score_as_alone(name, case):
    """Rows of at least the window: a shorter one is kept whole, and snapkv's mean there counts padding queries too."""
    prefill = make_prefill(case, 23, [0, 11, 3, 18])
    got = score(name, prefill)
    for row, padding in enumerate(prefill.num_padding):
        alone = score(name, row_alone(prefill, row))
        difference = (got[row : row + 1, :, padding:] - alone).abs().max().item()
        assert difference <= 1e-6 * alone.abs().max().item()  # float32 sums over a longer, zero-padded row
        if not {"last_query", "window_queries", "all_queries"} & set(FACTS[name].needs):
            assert difference == 0


@over_scorers
def test_heads_and_rows_do_not_see_each_other(name):
    """Another head's keys and queries, or another row's, change nothing; tova's heads vote together."""
    prefill = make_prefill(CASES["gqa"], 23, [0, 4])
    before = score(name, prefill)
    query, key = prefill.query.clone(), prefill.key.clone()
    query[0], key[0], query[1, :2], key[1, 0] = 9, -9, 5, 5
    after = score(name, replace(prefill, query=query, key=key))
    if name != "tova":
        assert torch.equal(before[1, 1], after[1, 1])
    query[1], key[1] = prefill.query[1], prefill.key[1]
    assert torch.equal(before[1], score(name, replace(prefill, query=query, key=key))[1])


@over_scorers
def test_a_scorer_is_shown_what_it_says_it_needs_and_nothing_else(name):
    prefill, needs = make_prefill(CASES["gqa"], 23, [0, 4]), set(FACTS[name].needs)
    shown = prefill.shown(FACTS[name].needs)
    queries = {"last_query": 1, "window_queries": WINDOW, "all_queries": 23}
    num_shown = [queries[need] for need in needs if need in queries] or [0]
    assert num_shown == [shown.query.shape[2]]
    assert torch.equal(shown.query, prefill.query[:, :, 23 - num_shown[0] :])
    assert shown.key.shape[-1] == (8 if "keys" in needs else 0)
    assert (shown.value is not None) == ("values" in needs)
    assert (shown.parts is not None) == bool(needs & {"rotary_embedding", "output_projection"})
    assert needs <= {*queries, "positions", "keys", "values", "rotary_embedding", "output_projection"}


@over_scorers
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_queries_and_keys_give_float32_scores_of_their_own_precision(name, dtype):
    """The logits of a 16-bit model are rounded to its type, so a probability is off by the largest logit's half ulp."""
    prefill = make_prefill(CASES["gqa"], 23, [0, 6])
    prefill = replace(prefill, query=prefill.query.to(dtype), key=prefill.key.to(dtype))
    got = score(name, prefill)
    assert got.dtype == torch.float32
    if name == "random":
        return
    largest = (prefill.query.float().norm(dim=-1).max() * prefill.key.float().norm(dim=-1).max()).item()
    half_ulp = torch.finfo(dtype).eps / 2
    error = relative_error(got, prefill, name)
    print(f"relative error {error:.1e}")
    assert error < 2 * largest * prefill.scaling * half_ulp


@pytest.mark.parametrize("name", ["snapkv", "h2o", "tova", "criticalkv"])
def test_products_that_overflow_float16_before_their_scaling_score_as_in_float32(name):
    prefill = make_prefill(CASES["gqa"], 23)
    prefill = replace(prefill, query=(prefill.query * 100).half(), key=(prefill.key * 100).half(), scaling=0.35 / 1e4)
    whole = replace(prefill, query=prefill.query.float(), key=prefill.key.float())
    assert torch.equal(score(name, prefill), score(name, whole))


# --- one scorer's own promises -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kernel", "lead", "tokens"), [(1, 4, 7), (3, 4, 9), (7, 30, 12), (7, 30, 60)])
def test_pooling_may_reach_further_back_than_a_prompt_goes(kernel, lead, tokens):
    """Not ahead at all where the lead is more than half of the kernel."""
    prefill = make_prefill(CASES["gqa"], tokens)
    assert (
        relative_error(score("snapkv", prefill, kernel=kernel, lead=lead), prefill, "snapkv", kernel=kernel, lead=lead)
        < 1e-4
    )


def test_streamingllm_prefers_the_most_recent():
    got = score("streamingllm", make_prefill(Case(), 23, [0, 7]))
    assert torch.equal(rank(got).order[:, :, 0], torch.full((2, 2), 22))
    assert bool((got.diff(dim=-1) == 1).all())
    assert torch.equal(got[0, :, 0], torch.zeros(2)) and torch.equal(got[1, :, 7], torch.zeros(2))


def test_knorm_prefers_small_keys():
    prefill = make_prefill(Case(), 23)
    prefill.key[0, 1, 8] *= 1e-3
    assert rank(score("knorm", prefill)).order[0, 1, 0] == 8


@over_cases
def test_h2o_of_a_prefix_is_what_its_queries_give_in_a_longer_prompt(case):
    """Truly causal: tokens to come do not change what earlier queries gave, they only add what they give themselves."""
    long = make_prefill(case, 23)
    for tokens in (1, 7, 22):
        prefix = replace(long, query=long.query[:, :, :tokens], key=long.key[:, :, :tokens])
        later = replace(long, query=long.query[:, :, tokens:])
        given_later = SCORERS["h2o"].score(later, {})
        difference = score("h2o", long) - given_later
        assert difference[..., tokens:].abs().max().item() < 1e-5
        assert (difference[..., :tokens] - score("h2o", prefix)).abs().max().item() < 1e-5


def test_h2o_of_the_past_is_unchanged_when_future_tokens_change():
    """Future queries that look only at themselves, whatever they are: what they change is their own score."""
    now, totals = 15, []
    for seed in (1, 2):
        prefill = make_prefill(CASES["mha"], 23)
        future = torch.randn(1, 4, 23 - now, 8, generator=torch.Generator().manual_seed(seed)) * 30
        prefill.query[:, :, now:], prefill.key[:, :, now:] = future, future
        totals.append(score("h2o", prefill))
    prefix = make_prefill(CASES["mha"], 23)
    alone = score("h2o", replace(prefix, query=prefix.query[:, :, :now], key=prefix.key[:, :, :now]))
    assert not torch.allclose(totals[0][..., now:], totals[1][..., now:])
    for total in totals:
        assert (total[..., :now] - alone).abs().max().item() < 1e-5


def test_h2o_gives_out_one_of_probability_per_query():
    prefill = make_prefill(CASES["sliding"], 23, [0, 6])
    totals = score("h2o", prefill).sum(-1)
    assert torch.allclose(totals, torch.tensor([[23.0], [17.0]]).expand(2, 2), atol=1e-4)


@pytest.mark.parametrize("tokens", [QUERY_CHUNK - 1, QUERY_CHUNK, QUERY_CHUNK + 1, 2 * QUERY_CHUNK + 3])
def test_h2o_in_chunks_of_queries_is_h2o_at_once(tokens):
    prefill = make_prefill(CASES["sliding"], tokens, [0, QUERY_CHUNK // 2 + 3])
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril() & ~torch.ones(tokens, tokens, dtype=torch.bool).tril(
        -9
    )
    logits = prefill.query.double() @ prefill.key.double().repeat_interleave(2, 1).transpose(-1, -2) * prefill.scaling
    visible = causal & (torch.arange(tokens) >= torch.tensor(prefill.num_padding)[:, None])[:, None, None]
    probabilities = logits.masked_fill(~visible, -INF).softmax(-1).nan_to_num(0)
    expected = probabilities.sum(2).unflatten(1, (2, 2)).mean(2)
    assert (score("h2o", prefill) - expected).abs().max().item() < 1e-5 * expected.max().item()


@pytest.mark.parametrize("pooling", ["max", "average"])
@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 7, 31, 200])
@over_cases
def test_snapkv_pools_with_any_kernel(pooling, kernel, case):
    """Even kernels, and kernels wider than the prompt; padded rows too. An even kernel reaches one token further back
    than forward, a lead so many more."""
    prefill = make_prefill(case, 19, [0, 4])
    for lead in (0, 1, 5):
        parameters = {"kernel": kernel, "pooling": pooling, "lead": lead}
        assert relative_error(score("snapkv", prefill, **parameters), prefill, "snapkv", **parameters) < 2e-6


@pytest.mark.parametrize("tokens", [1, 3, WINDOW, WINDOW + 1, WINDOW + 2])
@pytest.mark.parametrize("pooling", ["max", "average"])
def test_snapkv_with_a_window_as_long_as_the_prompt_pools_nothing(tokens, pooling):
    prefill = make_prefill(Case(), tokens)
    got = score("snapkv", prefill, pooling=pooling)
    received = score("h2o", replace(prefill, query=prefill.query[:, :, -WINDOW:])) / min(tokens, WINDOW)
    num_before = max(0, tokens - WINDOW)
    assert torch.allclose(got[..., num_before:], received[..., num_before:], atol=1e-6)
    assert relative_error(got, prefill, "snapkv", pooling=pooling) < 2e-6


def test_snapkv_pooling_takes_nothing_from_the_window():
    """The window's queries look hardest at the window itself: the token before it must not profit."""
    prefill = make_prefill(CASES["mha"], 20)
    prefill.query[:, :, 15:] = prefill.query[:, :, 15:16]
    prefill.key[:, :, 15] = prefill.query[:, :, 15] * 5
    got = score("snapkv", prefill, kernel=7)
    assert got[..., 15].min() > 0.9 and got[..., :15].max() < 0.1


def test_snapkv_lead_favours_what_follows_an_attended_token():
    prefill = make_prefill(CASES["mha"], 30)
    prefill.query[:, :, 25:] = prefill.query[:, :, 25:26]
    prefill.key[:, :, 12] = prefill.query[:, :, 25] * 5
    got = score("snapkv", prefill, kernel=5, lead=2, pooling="average")
    assert got[..., 12:17].min() > 10 * got[..., [11, 17]].max()


@pytest.mark.parametrize("pooling", ["max", "average"])
def test_snapkv_pooling_takes_nothing_from_the_sinks(pooling):
    """They draw most attention and stay anyway: the tokens beside them must not profit."""
    prefill = replace(make_prefill(CASES["mha"], 30), sinks=2)
    prefill.query[:, :, 25:] = prefill.query[:, :, 25:26]
    prefill.key[:, :, 1] = prefill.query[:, :, 25] * 5
    got = score("snapkv", prefill, kernel=7, pooling=pooling)
    assert got[..., 2:25].max() < 0.1


def test_snapkv_is_shown_only_the_windows_queries():
    prefill = make_prefill(Case(), 23)
    changed = replace(prefill, query=prefill.query.clone())
    changed.query[:, :, : 23 - WINDOW] = 7
    assert torch.equal(score("snapkv", prefill), score("snapkv", changed))
    observations = [
        observe(Scoring("snapkv", tuple(scorer_parameters("snapkv", {}).items()), 1, WINDOW), p)
        for p in (prefill, changed)
    ]
    assert torch.equal(observations[0].importance, observations[1].importance)
    moments = [observation.query_stats[:, :, 0] for observation in observations]  # the peaks are over all queries
    assert torch.equal(*moments)


def test_tova_is_the_last_querys_attention_and_the_same_in_all_heads():
    prefill = make_prefill(CASES["gqa"], 23)
    prefill.key[:, :, 9] = prefill.query[:, ::2, -1] * 5
    got = score("tova", prefill)
    assert torch.equal(got[:, 0], got[:, 1]) and rank(got).order[0, 0, 0] == 9
    assert torch.allclose(got.sum(-1), torch.ones(1, 2), atol=1e-6)


def test_keydiff_keeps_the_key_that_is_unlike_the_others():
    prefill = make_prefill(Case(), 23)
    prefill.key[:] += 6
    prefill.key[0, 1, 8] = -prefill.key[0, 1, 8]
    assert rank(score("keydiff", prefill)).order[0, 1, 0] == 8


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_criticalkv_keeps_the_first_stages_share_by_score_alone_whatever_the_budget(share):
    """At any n the n best hold the share * n best of snapkv; with all of it they are snapkv's, with none the
    products'."""
    prefill = make_prefill(CASES["mha"], 40, window=1, sinks=0)
    orders = [
        [[j for j in head if j != 39] for head in rank(scores).order[0].tolist()]  # the window's token stays anyway
        for scores in (score("snapkv", prefill, kernel=1), score("criticalkv", prefill, kernel=1, first_stage=share))
    ]
    for by_score, merged in zip(*orders, strict=True):
        for n in range(1, 40):
            assert set(by_score[: int(share * n)]) <= set(merged[:n])
        if share == 1:
            assert merged == by_score


def test_criticalkv_prefers_the_value_that_weighs_more_in_the_output():
    prefill = make_prefill(CASES["mha"], 23)
    prefill.value[:, :, 7:9] *= 1e3
    prefill.parts.output_projection[:, :8] = 0  # what head 0 writes nobody reads
    got = rank(score("criticalkv", prefill, first_stage=0.0)).order
    assert set(got[0, 3, :2].tolist()) == {7, 8}
    assert bool((score("criticalkv", prefill)[0, 0] == 0).all())


def test_expected_attention_finds_the_key_that_future_queries_will_look_at():
    """Queries that are one direction before RoPE: the key of that direction, turned to where the future is."""
    prefill = make_prefill(CASES["mha"], 23)
    direction = torch.zeros(8)
    direction[3] = 6.0  # of the slowest frequency: the mean over 16 positions still points the same way
    prefill.query[:] = torch.stack([turned(direction, j) for j in range(23)])
    prefill.key[0, 2, 11] = turned(direction, 31)
    prefill.value[:] = torch.nn.functional.normalize(prefill.value, dim=-1)
    assert rank(score("expected_attention", prefill, future_tokens=16)).order[0, 2, 0] == 11


def test_random_depends_on_seed_layer_head_and_position_alone():
    def of(layer: int = 1, seed: int = 0, **changes: Any) -> Tensor:
        return score("random", make_prefill(Case(), 400, layer=layer, **changes), seed=seed)

    base = of()
    assert torch.equal(base, score("random", make_prefill(Case(), 400, seed=9), seed=0)), (
        "keys and queries do not matter"
    )
    assert base.min() >= 0 and base.max() <= 1 and abs(base.mean() - 0.5) < 0.06  # 800 numbers: four deviations
    for other in (of(seed=1), of(layer=2), of(seed=2**32 - 1)):
        assert abs(torch.corrcoef(torch.stack([base.flatten(), other.flatten()]))[0, 1]) < 0.15
    assert abs(torch.corrcoef(base[0])[0, 1]) < 0.2
    assert torch.equal(of()[..., :100], score("random", make_prefill(Case(), 100)))


def test_random_takes_every_seed_that_a_plan_may_name():
    assert bool(score("random", make_prefill(Case(), 5), seed=2**40).isfinite().all())


def test_parameters_are_checked_by_name_type_and_range():
    assert scorer_parameters("snapkv", {}) == {"queries": 0, "kernel": 7, "lead": 0, "pooling": "max"}
    for name, values, message in (
        ("snapkv", {"kernel": 0}, "at least 1"),
        ("snapkv", {"kernel": True}, "type int"),
        ("snapkv", {"pooling": "mean"}, "max, average"),
        ("h2o", {"kernel": 7}, "not a parameter"),
        ("random", {"seed": -1}, "at least 0"),
        ("snap", {}, "one of streamingllm"),
        ("criticalkv", {"first_stage": 1.5}, "at most 1.0"),
        ("criticalkv", {"epsilon": float("nan")}, "finite"),
    ):
        with pytest.raises(PlanError, match=message):
            scorer_parameters(name, values)


# --- observe: what must stay and what must go ----------------------------------------------------------------------


def observed(name: str, prefill: Prefill, sinks: int, window: int) -> Tensor:
    scoring = Scoring.of(Scorer(name=name), sinks, window)
    return observe(scoring, replace(prefill, window=window)).importance


@over_scorers
@over_cases
@pytest.mark.parametrize(("sinks", "window"), [(0, 1), (2, 5), (4, 30)])
def test_sinks_and_window_stay_padding_and_what_left_the_window_go(name, case, sinks, window):
    tokens, num_padding = 23, [0, 8, 22]
    prefill = make_prefill(case, tokens, num_padding)
    importance = observed(name, prefill, sinks, window)
    assert importance.shape == (3, case.kv_heads, tokens) and not bool(importance.isnan().any())
    for row, padding in enumerate(num_padding):
        for j in range(tokens):
            is_lost = case.sliding_window is not None and j <= tokens - case.sliding_window  # to the query at `tokens`
            is_forced = j - padding < sinks or j >= tokens - window
            expected = -INF if j < padding or is_lost else INF if is_forced else None
            got = set(importance[row, :, j].tolist())
            assert got == {expected} if expected is not None else not got & {INF, -INF}, (row, j)


@over_scorers
@over_cases
def test_rows_of_a_left_padded_batch_are_observed_as_alone(name, case):
    """Also rows shorter than the window, and their query moments."""
    prefill = make_prefill(case, 23, [0, 11, 20, 22])
    scoring = Scoring.of(Scorer(name=name), 2, WINDOW)
    together = observe(scoring, prefill)
    for row, padding in enumerate(prefill.num_padding):
        alone = observe(scoring, row_alone(prefill, row))
        got, expected = together.importance[row : row + 1, :, padding:], alone.importance
        assert torch.equal(got.isinf(), expected.isinf()) and torch.equal(got[got.isinf()], expected[expected.isinf()])
        scale = expected[expected.isfinite()].abs().max().item() if bool(expected.isfinite().any()) else 0.0
        assert bool(((got - expected)[expected.isfinite()].abs() <= 1e-6 * scale).all())
        assert torch.allclose(together.query_stats[row], alone.query_stats[0], rtol=1e-6)


@over_cases
def test_scorings_that_share_what_they_have_in_common_see_what_each_sees_alone(case):
    """Other windows, other numbers of queries and other scorers, in either order."""
    prefill = make_prefill(case, 23, [0, 8])
    scorers = [Scorer(name="snapkv", queries=5), Scorer(name="snapkv", queries=9, kernel=3), Scorer(name="tova")]
    scorings = [Scoring.of(scorer, 2, window) for scorer in scorers for window in (1, 5)]
    alone = [observe(scoring, prefill) for scoring in scorings]
    for order in (1, -1):
        together = replace(prefill, shared={})
        for scoring, expected in [*zip(scorings, alone, strict=True)][::order]:
            got = observe(scoring, together)
            assert torch.equal(got.importance, expected.importance)
            assert torch.equal(got.query_stats, expected.query_stats)


@pytest.mark.parametrize("window", [1, 4, 40])
def test_the_query_moment_is_the_mean_square_of_the_windows_queries(window):
    prefill = make_prefill(Case(), 23, [0, 21])
    moment = observe(Scoring.of(Scorer(name="knorm"), 0, window), replace(prefill, window=window)).query_stats[:, :, 0]
    assert moment.shape == (2, 2, 8) and moment.dtype == torch.float32
    for row, padding in enumerate(prefill.num_padding):
        queries = prefill.query[row, :, max(padding, 23 - window) :].double().unflatten(0, (2, 2))
        assert torch.allclose(moment[row].double(), queries.square().mean((1, 2)), rtol=1e-6)


# --- rank and select -----------------------------------------------------------------------------------------------


def test_among_equals_the_older_comes_first():
    ranking = rank(torch.tensor([[[1.0, 3.0, 1.0, INF, 3.0, -INF, INF, 1.0]]]))
    assert ranking.order.tolist() == [[[3, 6, 1, 4, 0, 2, 7, 5]]]
    assert ranking.num_allowed.tolist() == [[7]]


def naive_tiers(importance: list[float], tier_tokens: list[int]) -> list[list[int]]:
    """Sort by importance, older first among equals, and hand out; each tier in ascending order."""
    order = sorted((j for j, x in enumerate(importance) if x > -INF), key=lambda j: (-importance[j], j))
    tiers, start = [], 0
    for size in tier_tokens:
        tiers.append(sorted(order[start : start + size]))
        start += size
    return tiers


@settings(max_examples=200, deadline=None)
@given(
    tokens=st.integers(1, 30),
    tier_tokens=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    levels=st.sampled_from([1, 3, 1000]),
    seed=st.integers(0, 10**6),
)
def test_tiers_are_the_importance_order_cut_where_the_plan_says(tokens, tier_tokens, levels, seed):
    """Exact counts, a short prompt fills from the top, tiers are disjoint and sorted by position; many ties."""
    generator = torch.Generator().manual_seed(seed)
    importance = torch.randint(0, levels, (2, 3, tokens), generator=generator).float()
    drawn = torch.randint(0, 4, (2, 3, tokens), generator=generator)
    importance = importance.masked_fill(drawn == 0, -INF).masked_fill(drawn == 1, INF)
    selections = select(rank(importance), tier_tokens)
    assert len(selections) == len(tier_tokens)
    for row in range(2):
        for head in range(3):
            expected = naive_tiers(importance[row, head].tolist(), tier_tokens)
            for selection, size, held in zip(selections, tier_tokens, expected, strict=True):
                assert selection.rows.shape == selection.valid.shape == (2, 3, size)
                count = int(selection.counts[row, head])
                assert selection.rows[row, head, :count].tolist() == held
                assert selection.valid[row, head].tolist() == [True] * count + [False] * (size - count)
                assert int(selection.rows.min()) >= 0 and int(selection.rows.max()) < tokens, "a row must be readable"


def test_sinks_and_window_lead_the_order_in_every_head():
    prefill = make_prefill(Case(), 23)
    top, rest = select(rank(observed("snapkv", prefill, 2, WINDOW)), [7, 10])
    for head in range(2):
        assert top.rows[0, head].tolist() == [0, 1, 18, 19, 20, 21, 22]
        assert not set(top.rows[0, head].tolist()) & set(rest.rows[0, head].tolist())


@over_scorers
def test_a_ragged_batch_selects_and_gathers_what_each_row_does_alone(name):
    """Same tokens, same positions; what is not held is zero."""
    prefill = make_prefill(Case(), 23, [0, 11, 21])
    values = torch.randn(3, 2, 23, 8, generator=torch.Generator().manual_seed(5))
    scoring = Scoring.of(Scorer(name=name), 1, 4)
    together = select(rank(observe(scoring, prefill).importance), [6, 9])
    for row, padding in enumerate(prefill.num_padding):
        alone_prefill = row_alone(prefill, row)
        alone = select(rank(observe(scoring, alone_prefill).importance), [6, 9])
        for one, other in zip(together, alone, strict=True):
            held = gather(one, prefill.key, values, prefill.num_padding)
            held_alone = gather(other, alone_prefill.key, values[row : row + 1, :, padding:], [0])
            valid = held_alone.valid
            assert torch.equal(held.valid[row : row + 1], valid)
            assert torch.equal(held.keys[row : row + 1], held_alone.keys)
            assert torch.equal(held.values[row : row + 1], held_alone.values)
            assert torch.equal(held.positions[row : row + 1][valid], held_alone.positions[valid])
            assert not bool(held_alone.keys[~valid].any()) and not bool(held_alone.values[~valid].any())
            assert bool((held.positions[held.valid] >= 0).all()) and held.positions.dtype == torch.int32
