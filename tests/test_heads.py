"""Heads that share a layer's tokens: exact totals in whole quanta, stored as the sum of their counts, read back as each
head alone, and within the planned bytes whatever the prompt divides."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache

import pytest
import torch
from conftest import make_model, make_space, prompts
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ledger import formats as all_formats
from test_ledger import holdings_of_a_layer, make_shape, shapes

from qpkv_planner.allocation import Choice, Space, format_named, uniform
from qpkv_planner.uniform import uniform_plan
from qpkv_runtime.cache import PlannedCache
from qpkv_runtime.compression import TierTensors, adaptive_tokens, decode, encode, rank, read_vectors, write_block
from qpkv_runtime.errors import InputError
from qpkv_runtime.heads import divide, least_tokens
from qpkv_runtime.ledger import layer_bytes, layer_ledger, make_ledger, quantum_tokens, shared_bytes
from qpkv_runtime.methods import QUANTIZERS
from qpkv_runtime.packed import PackedLayer
from qpkv_runtime.plan import Decode, Heads, Layer, Plan, Scorer, Tier, parse_plan

INF = float("inf")
ADAPTIVE = Heads(share="adaptive")
WEIGHTED = Heads(share="weighted", weights=(10.0, 1.0), alpha=0.0)

formats = all_formats.filter(  # groups that span heads go with uniform heads alone
    lambda format: QUANTIZERS[format.values.quantizer].value_axis != "strided"
)
tiers_and_quanta = st.lists(
    st.tuples(st.integers(1, 5), st.sampled_from([1, 2, 4, 8])).map(lambda t: (t[0] * t[1], t[1])),
    min_size=1,
    max_size=3,
)


# --- by weight -----------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    tiers=tiers_and_quanta,
    weights=st.lists(st.sampled_from([0.0, 0.1, 1.0, 10.0]), min_size=1, max_size=6).filter(any),
    share=st.floats(0, 1),
    room=st.integers(0, 60),
)
def test_weights_divide_exactly_in_whole_quanta_between_floor_and_ceiling(tiers, weights, share, room):
    total = sum(tokens for tokens, _ in tiers)
    least, most = least_tokens(total, 0, share), total + room
    divided = divide(tuple(tiers), tuple(weights), least, most)
    held = [sum(tier[head] for tier in divided) for head in range(len(weights))]
    for (tokens, quantum), each in zip(tiers, divided, strict=True):
        assert sum(each) == len(weights) * tokens and all(count % quantum == 0 for count in each)
    largest = max(quantum for _, quantum in tiers)
    if len({quantum for _, quantum in tiers}) == 1:
        assert min(held) >= least and max(held) <= most
    for one, weight in zip(held, weights, strict=True):
        for other, lighter in zip(held, weights, strict=True):
            if lighter <= weight and one + largest <= most:
                assert one >= other - largest, "a heavier head holds no less, to a quantum"


def test_heads_ten_times_apart_hold_ten_times_the_tokens():
    ((one, other),) = divide(((220, 4),), (10.0, 1.0), 0, 10**6)
    assert (one, other) == (400, 40)
    ((one, other),) = divide(((220, 4),), (10.0, 1.0), 20, 10**6)
    assert one + other == 440 and abs((one - 20) / (other - 20) - 10) < 2
    assert divide(((220, 4),), (10.0, 1.0), 0, 300) == [(300, 140)], "what a head cannot hold goes to the others"
    assert divide(((8, 4), (8, 8)), (1.0, 0.0), 8, 100) == [(8, 8), (16, 0)]


# --- by importance -------------------------------------------------------------------------------------------------


def naive_adaptive(importance: list[list[float]], tokens: int, alpha: float) -> list[int]:
    """Ada-KV, one token at a time: every head's best `least`, then the best of all heads together."""
    forced = sum(x == INF for x in importance[0])
    least = forced + int(alpha * max(0, tokens - forced))
    heads = [sorted(head, reverse=True) for head in importance]
    pool = sorted(((x, -j, -h) for h, head in enumerate(heads) for j, x in enumerate(head) if j >= least), reverse=True)
    rest = [-h for *_, h in pool[: len(heads) * (tokens - least)]]
    return [least + rest.count(h) for h in range(len(heads))]


@settings(max_examples=100, deadline=None)
@given(
    tokens=st.integers(3, 20), alpha=st.sampled_from([0.0, 0.05, 0.2, 1.0]), heads=st.integers(1, 4),
    seed=st.integers(0, 10**6),
)  # fmt: skip
def test_with_a_quantum_of_one_token_heads_keep_what_ada_kv_keeps(tokens, alpha, heads, seed):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(1, heads, 1, generator=generator) * 3
    importance = torch.rand(1, heads, 24, generator=generator) * scale
    importance[..., :1], importance[..., -2:] = INF, INF
    (counts,) = adaptive_tokens(rank(importance), [(tokens, 1)], alpha)
    assert counts[0].tolist() == naive_adaptive(importance[0].tolist(), tokens, alpha)


@settings(max_examples=150, deadline=None)
@given(
    tiers=tiers_and_quanta, alpha=st.sampled_from([0.0, 0.2, 1.0]), heads=st.integers(1, 4), tokens=st.integers(1, 90),
    ties=st.booleans(), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_adaptive_totals_are_exact_whole_quanta_with_a_floor_for_every_head(tiers, alpha, heads, tokens, ties, seed):
    """Rows of different lengths; where all is kept, every head keeps all of its own."""
    generator = torch.Generator().manual_seed(seed)
    importance = torch.rand(2, heads, tokens, generator=generator) * torch.rand(2, heads, 1, generator=generator) * 9
    importance = importance.round() if ties else importance
    importance[1, :, : tokens // 3] = -INF
    importance[..., -1:] = INF
    ranking, total = rank(importance), sum(size for size, _ in tiers)
    divided = adaptive_tokens(ranking, tiers, alpha)
    held = torch.stack(divided).sum(0)
    for (size, quantum), counts in zip(tiers, divided, strict=True):
        assert counts.sum(-1).tolist() == [heads * size] * 2
        assert bool((counts == size).all()) or bool((counts % quantum == 0).all())
    for row in range(2):
        allowed = int(ranking.num_allowed[row, 0])
        if allowed <= total:
            assert held[row].tolist() == [total] * heads
        else:
            assert int(held[row].min()) >= least_tokens(total, 1, alpha) and int(held[row].max()) <= allowed


def test_a_row_divides_as_it_does_alone():
    importance = (
        torch.rand(2, 3, 60, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 2.0, 4.0])[:, None]
    )
    importance[1, :, :13] = -INF
    tiers = [(8, 8), (12, 4)]
    together = adaptive_tokens(rank(importance), tiers, 0.2)
    alone = adaptive_tokens(rank(importance[1:, :, 13:]), tiers, 0.2)
    assert [counts[1].tolist() for counts in together] == [counts[0].tolist() for counts in alone]
    assert together[0][1].tolist() == [8, 8, 8], "every head's least comes first"
    assert len(set(together[1][1].tolist())) > 1


# --- the ledger ----------------------------------------------------------------------------------------------------


def division(chance: random.Random, heads: int, quanta: int) -> list[int]:
    """Some division of so many quanta among heads."""
    cuts = sorted(chance.randint(0, quanta) for _ in range(heads - 1))
    return [b - a for a, b in zip([0, *cuts], [*cuts, quanta], strict=True)]


@settings(max_examples=150, deadline=None)
@given(shape=shapes, holdings=holdings_of_a_layer, seed=st.integers(0, 10**6))
def test_any_division_lies_inside_the_planned_bytes_aligned_and_apart(shape, holdings, seed):
    chance, heads = random.Random(seed), shape.num_kv_heads
    tiers = [(format, -(-tokens // quantum_tokens(format)) * quantum_tokens(format)) for format, tokens in holdings]
    holdings = (*tiers, (format_named("rotated-k4v4"), 4))
    for layer, window in enumerate(shape.sliding_windows):
        layout = layer_ledger(layer, holdings, shape, True)
        assert layout.stored_bytes == layer_bytes(holdings, heads, shape.head_size, window is not None, True)
        divided = [
            [
                count * quantum_tokens(format)
                for count in division(chance, heads, heads * size // quantum_tokens(format))
            ]
            for format, size in tiers
        ]
        placed = layout.place([[tier[head] for tier in divided] for head in range(heads)])
        buffers = [b for head in placed for segment in head for b in segment.buffers.values()]
        buffers += [layout.table, *([layout.head_vectors] if layout.head_vectors else [])]
        buffers += [b for head in range(heads) for b in layout.segment(head, -1).buffers.values()]
        end = 0
        for buffer in sorted(buffers, key=lambda b: b.offset):
            assert end <= buffer.offset and buffer.offset % 4 == 0
            end = buffer.offset + buffer.size_bytes
        assert end <= layout.stored_bytes
        for head, segments in enumerate(placed):
            for tier, segment in enumerate(segments):
                assert segment.capacity_tokens == divided[tier][head] and segment.offset % 16 == 0


@settings(max_examples=60, deadline=None)
@given(format=formats, quanta=st.integers(1, 6), heads=st.integers(1, 3), size=st.sampled_from([6, 64]))
def test_room_for_any_division_is_close_to_what_the_worst_one_takes(format, quanta, heads, size):
    """Against all divisions: never less, and more by less than a quantum of each head."""

    def weighs(count: int) -> int:
        shape = make_shape(1, size, (None,))
        layout = layer_ledger(0, ((format, count * quantum_tokens(format)), (format_named("16bit"), 1)), shape)
        first, *_, last = [*layout.segments[0].buffers.values()] or [layout.table, layout.table]
        return -(-(last.offset + last.size_bytes - first.offset) // 16) * 16 if count else 0

    sizes = [weighs(count) for count in range(heads * quanta + 1)]
    worst = [0, *[-1] * (heads * quanta)]
    for _ in range(heads):
        worst = [max(worst[m - k] + sizes[k] for k in range(m + 1) if worst[m - k] >= 0) for m in range(len(worst))]
    room = shared_bytes(format, quanta * quantum_tokens(format), heads, size, False)
    assert worst[-1] <= room <= worst[-1] + heads * sizes[1]


@pytest.mark.parametrize("name", ["rotated-k4v3", "rotated-k4v4", "flexgen-k4v4", "16bit", "rotated-k2v2"])
@pytest.mark.parametrize("head_size", [64, 128])
def test_adaptive_heads_of_common_formats_take_not_one_byte_more(name, head_size):
    holdings = ((format_named(name), 48), (format_named("rotated-k4v4"), 8))
    assert layer_bytes(holdings, 8, head_size, False, True) == layer_bytes(holdings, 8, head_size, False)


@pytest.mark.parametrize("name", ["rotated-k4v3", "kivi-k4v4", "kivi-k2v2", "flexgen-k3v3", "16bit"])
def test_heads_ten_times_apart_are_stored_as_the_sum_of_their_counts(name):
    """By arithmetic: each head as a layer of its own; nothing is padded to the longest."""
    format, reserve = format_named(name), (format_named("16bit"), 1)
    apart, even, empty = (layer_bytes(((format, n), reserve), 2, 64, False) for n in ((400, 40), 400, 0))
    alone = [layer_bytes(((format, n), reserve), 1, 64, False) for n in (400, 40, 0)]
    assert apart - empty == alone[0] + alone[1] - 2 * alone[2]
    assert (apart - empty) / (even - empty) < 0.56, "padded to the longest it would be 1"


# --- written and read back -----------------------------------------------------------------------------------------


def random_tiers(chance: random.Random, heads: int, divided: list[list[int]]) -> list[TierTensors]:
    """Tiers of two rows in which each head holds its own count."""
    tiers, generator = [], torch.Generator().manual_seed(chance.randrange(10**6))
    for counts in divided:
        most = max(*counts, 1)
        valid = (torch.arange(most) < torch.tensor(counts)[:, None]).expand(2, -1, -1)
        keys, values = (
            (torch.randn(2, heads, most, 64, generator=generator) * 3).half().masked_fill(~valid[..., None], 0)
            for _ in range(2)
        )
        positions = torch.arange(most, dtype=torch.int32).expand(2, heads, -1)
        tiers.append(TierTensors(keys, values, positions, valid))
    return tiers


@pytest.mark.parametrize("is_adaptive", [True, False])
@settings(max_examples=25, deadline=None)
@given(formats_of_tiers=st.lists(formats, min_size=1, max_size=3), seed=st.integers(0, 10**6))
def test_heads_of_different_counts_are_read_back_as_each_alone(is_adaptive, formats_of_tiers, seed):
    """Bit for bit what the quantizer gives that head's tokens by themselves, per-channel keys too."""
    chance, heads = random.Random(seed), 3
    divided = [
        [count * quantum_tokens(format) for count in division(chance, heads, heads * chance.randint(1, 5))]
        for format in formats_of_tiers
    ]
    reserve = (format_named("rotated-k4v4"), 4)
    held = [(f, sum(n) // heads if is_adaptive else tuple(n)) for f, n in zip(formats_of_tiers, divided, strict=True)]
    layout = layer_ledger(0, (*held, reserve), make_shape(heads, 64, (24,)), is_adaptive)
    tiers, stats = random_tiers(chance, heads, divided), torch.rand(2, heads, 2, 64) + 0.1
    block = torch.randint(0, 255, (2, layout.stored_bytes), dtype=torch.uint8)
    write_block(block, layout, tiers, stats)
    packed = PackedLayer.__new__(PackedLayer)
    packed.layout, packed.block, packed.num_heads, packed.head_size = layout, block, heads, 64
    packed.storage_dtype = torch.float16
    vectors = read_vectors(block, layout, heads, 64, torch.float16)
    table = packed.table()
    for tier, (format, counts) in enumerate(zip(formats_of_tiers, divided, strict=True)):
        assert table[:, :, tier, 1].tolist() == [counts, counts]
        keys, values, positions = packed.read(tier, table[:, :, tier], vectors)
        assert keys.shape[2] == max(counts) and positions is not None
        for head, count in enumerate(counts):
            own = {name: v[:, head : head + 1] for name, v in vectors.items()}
            assert positions[:, head, :count].tolist() == [list(range(count))] * 2
            for side, read, x in (("key", keys, tiers[tier].keys), ("value", values, tiers[tier].values)):
                x = x[:, head : head + 1, :count]
                if count:
                    valid = torch.ones(2, 1, count, dtype=torch.bool)
                    expected = decode(format, side, encode(0, format, side, x, valid, own), own)
                    assert torch.equal(read[:, head, :count], expected[:, 0]), (side, head)


# --- in the cache --------------------------------------------------------------------------------------------------

TIERS = ((8, "16bit"), (16, "kivi-k4v4"), (8, "rotated-k2v2"))


@cache
def plan_of(family: str, share: str, tiers: tuple[tuple[int, str], ...] = TIERS) -> Plan:
    model = make_model(family)
    base = make_space(model, "100%", decode=Decode(reserve_tokens=5, format="flexgen-k4v4"))
    plan = base.plan(uniform(base, "16bit") or ())
    heads = model.config.num_key_value_heads
    chosen = {"adaptive": ADAPTIVE, "uniform": Heads(share="uniform")}.get(share)
    chosen = chosen or Heads(share="weighted", weights=tuple(4.0**i for i in range(heads)), alpha=0.1)
    layer = Layer(tiers=tuple(Tier(tokens=n, format=name) for n, name in tiers), heads=chosen)
    names = dict.fromkeys([name for _, name in tiers] + [plan.decode.format])
    changed = plan.model_copy(
        update={"formats": {n: format_named(n) for n in names}, "layers": (layer,) * plan.model.num_layers}
    )
    weight = make_ledger(changed).stored_bytes
    budget = plan.budget.model_copy(update={"requested": f"{weight}B", "limit_bytes": weight, "planned_bytes": weight})
    return parse_plan(changed.model_copy(update={"budget": budget}).to_yaml())


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("share", ["adaptive", "weighted"])
@pytest.mark.parametrize("tokens", [1, 30, 80])
def test_shared_heads_and_tiers_live_in_exactly_the_planned_bytes(family, share, tokens):
    """Totals are those of the plan (less where the prompt is shorter), heads differ, decoding goes on."""
    model, plan = make_model(family), plan_of(family, share)
    packed = PlannedCache.from_plan(plan, model)
    heads = plan.model.num_kv_heads
    with torch.no_grad():
        model(prompts(2, tokens), past_key_values=packed)
        for layer, window in enumerate(plan.model.shape.sliding_windows):
            counts = packed.layers[layer].packed().table()[..., :-1, 1]  # [B, H_kv, tiers]
            visible = min(tokens, (window or 10**6) - 1)
            assert int(counts.sum(-1).max()) <= visible
            if visible > 32 + 8 and share == "adaptive":
                assert counts.sum(1).tolist() == [[heads * size for size, _ in TIERS]] * 2
            elif share == "adaptive":
                assert counts.sum((1, 2)).tolist() == [heads * min(visible, 32)] * 2
            elif window is None and tokens == 80:
                assert counts.sum(1).tolist() == [[heads * size for size, _ in TIERS]] * 2
                each = counts.sum(-1)[0].tolist()
                assert each == sorted(set(each)), "heavier heads hold more"
        for step in range(7):
            assert bool(model(prompts(2, 1, seed=step), past_key_values=packed).logits.isfinite().all())
    assert packed.allocated_bytes == 2 * plan.budget.planned_bytes == 2 * make_ledger(plan).stored_bytes


@pytest.mark.parametrize("share", ["adaptive", "weighted"])
def test_attention_over_shared_heads_is_attention_over_each_heads_own_tokens(share):
    """16 bit, one layer fed by hand: the naive softmax over the tokens that Ada-KV's or the weights' rule keeps."""
    plan = plan_of("llama", share, ((24, "16bit"),))
    cached = PlannedCache(plan, [torch.device("cpu")] * plan.model.num_layers).layers[0]
    generator = torch.Generator().manual_seed(3)
    query, key, value, new_q, new_k, new_v = (
        torch.randn(1, heads, tokens, 32, generator=generator).half().float()
        for heads, tokens in ((4, 80), (2, 80), (2, 80), (4, 1), (2, 1), (2, 1))
    )
    key[:, 1] *= 2
    cached.plan = plan = plan.model_copy(update={"scorer": Scorer(name="knorm")})
    cached.scoring = replace(cached.scoring, scorer="knorm", parameters=())
    cached.prefill(query, key, value, None, 0.3, None)
    out = cached.decode(new_q, new_k, new_v, None, 0.3, None)
    forced = [*range(plan.sinks), *range(80 - plan.window, 80)]
    importance = [[INF if j in forced else -float(key[0, h, j].norm()) for j in range(80)] for h in range(2)]
    heads = plan.heads_of(0)
    counts = (
        naive_adaptive(importance, 24, heads.alpha)
        if share == "adaptive"
        else list(divide(((24, 1),), heads.weights, least_tokens(24, len(forced), heads.alpha), 96)[0])
    )
    assert sum(counts) == 48 and counts[0] != counts[1]
    appended = [cached.packed().read(-1, cached.packed().table()[:, :, -1], {})[side][0, :, 0] for side in (0, 1)]
    for head in range(4):
        own = head // 2
        kept = sorted(range(80), key=lambda j: (-importance[own][j], j))[: counts[own]]
        keys, values = (
            torch.cat([x[0, own, kept], held[own : own + 1]]) for x, held in zip((key, value), appended, strict=True)
        )
        expected = ((keys @ new_q[0, head, 0]) * 0.3).softmax(0) @ values
        assert torch.allclose(out[0, head, 0], expected, atol=1e-5)


def test_a_ragged_batch_divides_and_answers_as_its_rows_alone():
    model, plan = make_model("llama"), plan_of("llama", "adaptive")
    long, short = prompts(1, 70, seed=2), prompts(1, 51, seed=3)
    ids = torch.cat([long, torch.cat([torch.zeros(1, 19, dtype=torch.long), short], 1)])
    mask = torch.ones_like(ids)
    mask[1, :19] = 0
    caches = [PlannedCache.from_plan(plan, model) for _ in range(3)]
    tokens = [
        model.generate(i, attention_mask=m, past_key_values=c, do_sample=False, max_new_tokens=8)[:, -8:]
        for i, m, c in zip((ids, long, short), (mask, None, None), caches, strict=True)
    ]
    assert torch.equal(tokens[0], torch.cat(tokens[1:]))
    for layer in range(plan.model.num_layers):
        tables = [c.layers[layer].packed().table()[..., 1] for c in caches]
        assert torch.equal(tables[0], torch.cat(tables[1:]))


# --- in the planner's space ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rotated-k4v3", "kivi-k4v4", "16bit"])
@pytest.mark.parametrize("heads", [ADAPTIVE, WEIGHTED, (WEIGHTED, ADAPTIVE, Heads(share="uniform"))], ids=str)
def test_a_space_with_shared_heads_projects_onto_the_exact_budget_and_back(name, heads):
    space = make_space(make_model("llama"), "1/4", heads=heads)
    allocation = uniform(space, name)
    plan = space.plan(allocation)
    assert plan.budget.planned_bytes == space.bytes(allocation) <= space.limit_bytes
    for layer, choice in enumerate(allocation):
        more = space.one_more(layer, choice)
        if more is not None:
            heavier = (*allocation[:layer], more, *allocation[layer + 1 :])
            assert space.bytes(heavier) > space.limit_bytes or space.bytes(heavier) <= space.bytes(allocation)
    assert Space.of_plan(plan) == space
    assert parse_plan(plan.to_yaml()) == plan


def test_a_layer_never_divides_more_than_the_context_to_one_head():
    heads = Heads(share="weighted", weights=(1.0, 0.0), alpha=0.0)
    space = make_space(make_model("llama"), "3/4", heads=heads)
    plan = space.plan([Choice(60, "16bit")] * 3)
    assert plan.holdings(0)[0][1] == (96, 24)


def test_a_layers_sharing_stands_in_its_line():
    plan = plan_of("llama", "weighted")
    lines = [line for line in plan.to_yaml().splitlines() if line.startswith("- {tiers: ")]
    assert len(lines) == plan.model.num_layers
    assert all("heads: {share: weighted, alpha: 0.1, weights: [1.0," in line for line in lines)


def test_a_uniform_plan_takes_adaptive_heads_and_refuses_weights_that_nobody_measured():
    plan = uniform_plan("smollm2", "1/32", "snapkv:kivi:4bit", heads="adaptive")
    assert plan.heads == ADAPTIVE and plan.budget.planned_bytes <= plan.budget.limit_bytes
    with pytest.raises(InputError, match="--heads weighted goes without --uniform"):
        uniform_plan("smollm2", "1/32", "snapkv:kivi:4bit", heads="weighted")
