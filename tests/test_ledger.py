"""The ledger counts what is really there: buffers that do not overlap, exactly as many bytes as torch allocates and as
every quantizer writes, for random shapes, formats, tiers and sliding windows.

Numbers without a derivation beside them are worked out by hand from METHODS.md's ledger section.
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from conftest import make_model, make_space, prompts
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from qpkv_kernels import packing
from qpkv_planner.allocation import Choice, format_named, uniform
from qpkv_runtime.arena import Arena
from qpkv_runtime.cache import PlannedCache
from qpkv_runtime.compression import TierTensors, encode, read_vectors, write_block
from qpkv_runtime.errors import PlanError
from qpkv_runtime.ledger import (
    BUFFER_ALIGNMENT,
    SEGMENT_ALIGNMENT,
    Holdings,
    Ledger,
    full_bytes,
    layer_bytes,
    layer_ledger,
    make_ledger,
    quantum_tokens,
)
from qpkv_runtime.methods import QUANTIZERS
from qpkv_runtime.models import KNOWN_MODELS
from qpkv_runtime.models.shape import ModelShape
from qpkv_runtime.packed import PackedLayer
from qpkv_runtime.plan import Decode, Format, Layer, Plan, TensorFormat, Tier, parse_plan
from qpkv_runtime.quantizers import KEY_QUANTIZERS, KeyMoments

NUMBER = 2  # bytes of a scale, a zero, a mean, a 16-bit element
GROUPS = (None, 1, 3, 16, 64, 128, 1000)
QUANTUM = {16: 1, 8: 2, 4: 4, 3: 8, 2: 8, 1: 8}


def make_shape(heads: int, head_size: int, windows: tuple[int | None, ...], groups: int = 1) -> ModelShape:
    return ModelShape("llama", len(windows), heads * groups, heads, head_size, 4096, windows)


def tensor_format(quantizer: str, bits: int, group: int | None = None, outliers: float | None = None) -> TensorFormat:
    """Group and outliers where the quantizer takes them."""
    facts, given = QUANTIZERS[quantizer], {"quantizer": quantizer, "bits": bits}
    given |= {"group": group} if facts.group is not None else {}
    given |= {"outliers": outliers} if facts.outliers is not None else {}
    return TensorFormat.model_validate(given)


shares = st.sampled_from([None, 0.001, 0.01, 0.3])
tensor_formats = st.one_of(
    [
        st.builds(tensor_format, st.just(name), st.sampled_from(facts.bits), st.sampled_from(GROUPS), shares)
        for name, facts in QUANTIZERS.items()
    ]
)
formats = st.builds(lambda keys, values: Format(keys=keys, values=values), tensor_formats, tensor_formats)
holdings_of_a_layer = st.lists(st.tuples(formats, st.integers(1, 150)), min_size=1, max_size=4).map(tuple)
shapes = st.builds(
    make_shape,
    heads=st.integers(1, 5),
    head_size=st.sampled_from([2, 6, 16, 64, 80, 128]),
    windows=st.lists(st.sampled_from([None, 1, 24]), min_size=1, max_size=3).map(tuple),
)


def intervals(layout: Any) -> list[tuple[int, int, str]]:
    return sorted((b.offset, b.offset + b.size_bytes, name) for name, b in layout.buffers())


# --- layout --------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(shape=shapes, holdings=holdings_of_a_layer)
def test_buffers_lie_inside_the_block_aligned_and_apart(shape: ModelShape, holdings: Holdings):
    for layer in range(shape.num_layers):
        layout = layer_ledger(layer, holdings, shape)
        end_of_previous = 0
        for start, end, name in intervals(layout):
            assert end_of_previous <= start < end <= layout.stored_bytes, name
            assert start % BUFFER_ALIGNMENT == 0, name
            end_of_previous = end
        assert sum(layout.by_use().values()) == layout.stored_bytes
        assert len({name for name, _ in layout.buffers()}) == len(list(layout.buffers()))
        assert layout.stored_bytes % SEGMENT_ALIGNMENT == 0
        assert all(segment.offset % SEGMENT_ALIGNMENT == 0 for segment in layout.segments)
        assert layout.table.size_bytes == 8 * shape.num_kv_heads * len(holdings) and layout.table.offset == 0


@settings(max_examples=150, deadline=None)
@given(shape=shapes, holdings=holdings_of_a_layer)
def test_padding_is_less_than_an_alignment_per_buffer(shape: ModelShape, holdings: Holdings):
    """Nothing is counted that no buffer needs: buffers start where the last one ended, to the next multiple of 4
    inside a segment, of 16 before one. So read bytes are all but alignment, and never more than is stored."""
    for layer in range(shape.num_layers):
        layout = layer_ledger(layer, holdings, shape)
        assert 0 < layout.read_bytes <= layout.stored_bytes
        first_in_segment = {segment.offset for segment in layout.segments} | {layout.stored_bytes}
        if layout.head_vectors is not None:
            first_in_segment.add(layout.head_vectors.offset)
        placed, end = intervals(layout), layout.stored_bytes
        for (_, end_of_one, name), (start, *_) in zip(placed, [*placed[1:], (end, end, "end")], strict=True):
            assert start - end_of_one == -end_of_one % (16 if start in first_in_segment else 4), name


@settings(max_examples=150, deadline=None)
@given(shape=shapes, holdings=holdings_of_a_layer)
def test_the_weight_without_a_layout_is_the_weight_of_the_layout(shape: ModelShape, holdings: Holdings):
    for layer, window in enumerate(shape.sliding_windows):
        quick = layer_bytes(holdings, shape.num_kv_heads, shape.head_size, window is not None)
        assert quick == layer_ledger(layer, holdings, shape).stored_bytes


@settings(max_examples=60, deadline=None)
@given(shape=shapes, data=st.data(), rows=st.integers(1, 3))
def test_torch_allocates_exactly_what_the_ledger_says(shape: ModelShape, data: st.DataObject, rows: int):
    """And each layer's block is its own part of each row."""
    layers = tuple(layer_ledger(i, data.draw(holdings_of_a_layer), shape) for i in range(shape.num_layers))
    ledger = Ledger(layers)
    arena = Arena(ledger, rows, [torch.device("cpu")] * shape.num_layers)
    assert arena.allocated_bytes == rows * ledger.stored_bytes == rows * sum(layer.stored_bytes for layer in layers)
    assert ledger.read_bytes == sum(layer.read_bytes for layer in layers)
    for layer, layout in enumerate(layers):
        block = arena.block(layer)
        assert block.shape == (rows, layout.stored_bytes)
        block += layer + 1
    (buffer,) = arena.buffers.values()
    expected = torch.cat([torch.full((layout.stored_bytes,), i + 1) for i, layout in enumerate(layers)])
    assert torch.equal(buffer, expected.to(torch.uint8).expand(rows, -1)), "every byte belongs to one layer"


@settings(max_examples=100, deadline=None)
@given(shape=shapes, format=formats, tokens=st.integers(1, 150))
def test_a_layer_grows_by_whole_quanta_and_never_shrinks(shape: ModelShape, format: Format, tokens: int):
    quantum = quantum_tokens(format)
    assert quantum == max(QUANTUM[format.keys.bits], QUANTUM[format.values.bits])
    for window in (None, 24):

        def weigh(count: int, is_sliding: bool = window is not None) -> int:
            return layer_bytes(((format, count),), shape.num_kv_heads, shape.head_size, is_sliding)

        full = -(-tokens // quantum) * quantum
        assert weigh(tokens) == weigh(full), "the rest of a quantum is free"
        assert weigh(full) <= weigh(full + 1)
        if shape.head_size >= 16:  # below, alignment may hold one more quantum
            assert weigh(full) < weigh(full + 1)


def test_the_table_points_at_every_segment_after_a_prompt_and_counts_its_tokens():
    model = make_model("gemma3")
    plan = tiered_plan(model)
    packed = PlannedCache.from_plan(plan, model)
    with torch.no_grad():
        model(prompts(2, 40), past_key_values=packed)
    for layer, layout in enumerate(make_ledger(plan).layers):
        table = packed.layers[layer].packed().table()
        assert table.shape == (2, plan.model.num_kv_heads, layout.num_segments_per_head, 2)
        for head in range(plan.model.num_kv_heads):
            for tier in range(layout.num_segments_per_head):
                assert table[:, head, tier, 0].tolist() == [layout.segment(head, tier).offset] * 2
        assert table[:, :, -1, 1].tolist() == [[0] * plan.model.num_kv_heads] * 2, "nothing is appended yet"


# --- sizes by hand -------------------------------------------------------------------------------------------------


def test_the_full_cache_of_smollm2_at_1024_tokens_is_23_592_960_bytes():
    assert full_bytes(KNOWN_MODELS["smollm2"].shape, 1024) == 23_592_960
    # 30 layers, 3 KV heads (of 9 query heads), K and V, 64 channels, 2 bytes
    assert full_bytes(KNOWN_MODELS["smollm2"].shape, 1024) == 1024 * 30 * 3 * 2 * 64 * 2


def test_the_full_cache_of_a_sliding_model_counts_each_layer_up_to_its_window():
    """Gemma 3 1B: 26 layers, every sixth of them global, window 512, one KV head of 256."""
    windows = tuple(None if (layer + 1) % 6 == 0 else 512 for layer in range(26))
    shape = make_shape(1, 256, windows, groups=4)
    assert windows.count(None) == 4
    assert full_bytes(shape, 1024) == (22 * 512 + 4 * 1024) * 2 * 256 * 2 == 15_728_640
    assert full_bytes(shape, 512) == 26 * 512 * 1024 and full_bytes(shape, 100) == 26 * 100 * 1024


def test_key_value_heads_are_counted_once_each():
    assert full_bytes(make_shape(2, 64, (None,), groups=4), 10) == full_bytes(make_shape(2, 64, (None,)), 10)


def metadata_bits_per_element(side: str, quantizer: str, bits: int, tokens: int, head_size: int) -> float:
    """Bits of scales per key or value in a layer of one head."""
    format = Format(keys=tensor_format(quantizer, bits), values=tensor_format(quantizer, bits))
    layout = layer_ledger(0, ((format, tokens),), make_shape(1, head_size, (None,)))
    return layout.segments[0].buffers[f"{side}_scales"].size_bytes * 8 / (tokens * head_size)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_metadata_per_element_is_what_the_methods_say(bits):
    for side in ("key", "value"):
        for head_size in (64, 128):
            assert metadata_bits_per_element(side, "flexgen", bits, 128, head_size) == 0.5  # (16 + 16) / 64
            assert metadata_bits_per_element(side, "kivi", bits, 128, head_size) == 0.5
        assert metadata_bits_per_element(side, "rotated", bits, 128, 128) == 0.125  # 16 / 128
        assert metadata_bits_per_element(side, "rotated", bits, 128, 64) == 0.25
    # partial groups have their own numbers: 80 channels are two groups, 72 tokens are two groups
    assert metadata_bits_per_element("value", "kivi", bits, 128, 80) == 2 * 32 / 80
    assert metadata_bits_per_element("key", "kivi", bits, 72, 128) == 2 * 32 / 72


def test_the_tokens_of_equal_bytes_are_those_of_the_methods():
    """METHODS.md: what 128 tokens weigh at 16 bit holds 240 at 8, 455 at 4, 819 at 2 (g = 64); here to a quantum, and
    with the table and alignment of a block beside it."""
    shape = make_shape(8, 128, (None,))
    limit = layer_bytes(((format_named("16bit"), 128),), 8, 128, False)
    for name, tokens in (("flexgen-k8v8", 240), ("flexgen-k4v4", 455), ("flexgen-k2v2", 819)):
        quantum = quantum_tokens(format_named(name))
        most = max(
            n
            for n in range(quantum, 1000, quantum)
            if layer_bytes(((format_named(name), n),), shape.num_kv_heads, 128, False) <= limit
        )
        assert most == tokens // quantum * quantum


def test_a_block_by_hand():
    """Two heads of 64 channels, sliding; 10 tokens of flexgen at 3 and 2 bit, a reserve of 5 rotated at 4."""
    tier = Format(keys=tensor_format("flexgen", 3), values=tensor_format("flexgen", 2, 32))
    layout = layer_ledger(0, ((tier, 10), (format_named("rotated-k4v4"), 5)), make_shape(2, 64, (24,)))
    table = 8 * 2 * 2
    vectors = 2 * 2 * 64 * 2  # mean and balancer of both heads, for the reserve
    held = 16 * 64 * 3 // 8 + 16 * 64 * 2 // 8 + 16 * 4 + 16 * 4 + 16 * 2 * 4  # 16 slots of 8-token quanta
    reserve = 2 * (8 * 64 * 4 // 8) + 8 * 4 + 2 * (8 * 2)
    assert layout.stored_bytes == table + vectors + 2 * (held + reserve)
    assert layout.read_bytes == layout.stored_bytes, "all of it happens to be aligned"
    assert [buffer.offset for buffer in layout.segment(1, -1).buffers.values()] == [
        table + vectors + reserve + offset for offset in (0, 256, 512, 544, 560)
    ]


def test_positions_are_stored_only_where_a_window_slides_and_vectors_only_for_rotated_keys():
    for windows, is_sliding in (((None,), False), ((24,), True)):
        for name, needs_vectors in (("flexgen-k4v4", False), ("rotated-k4v4", True), ("rotated-k16v4", False)):
            layout = layer_ledger(0, ((format_named(name), 10),), make_shape(2, 64, windows))
            assert ("positions" in layout.segments[0].buffers) == is_sliding
            assert (layout.head_vectors is not None) == needs_vectors
    both = ((format_named("16bit"), 10), (format_named("rotated-k4v4"), 4))
    assert layer_ledger(0, both, make_shape(2, 64, (None,))).head_vectors is not None, "the reserve needs them too"


# --- what quantizers really write ----------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(
    format=formats,
    tokens=st.integers(1, 70),
    head_size=st.sampled_from([6, 64, 80]),
    heads=st.integers(1, 2),
    window=st.sampled_from([None, 24]),
)
def test_every_quantizer_writes_exactly_the_bytes_the_ledger_gives_it(format, tokens, head_size, heads, window):
    layout = layer_ledger(0, ((format, tokens),), make_shape(heads, head_size, (window,)))
    segment = layout.segments[0]
    capacity = segment.capacity_tokens
    assert tokens <= capacity < tokens + quantum_tokens(format)
    x = torch.randn(1, heads, capacity, head_size).half()
    valid = torch.ones(1, heads, capacity, dtype=torch.bool)
    vectors = {}
    if layout.head_vectors is not None:
        moments, stats = KeyMoments.of(x, valid), torch.ones(1, heads, 2, head_size)
        vectors = {n: KEY_QUANTIZERS[n].head_vectors(moments, stats, x.dtype) for n in layout.vector_rows}
        assert sum(v.numel() * v.element_size() for v in vectors.values()) == layout.head_vectors.size_bytes
    written = {"positions": 4 * capacity} if window else {}
    for side, bits in (("key", format.keys.bits), ("value", format.values.bits)):
        encoded = encode(0, format, side, x, valid, vectors)
        assert encoded.scales.element_size() == NUMBER
        codes = encoded.codes if bits == 16 else packing.pack(encoded.codes, bits)
        written[f"{side}_codes"] = codes[0, 0].numel() * codes.element_size()
        written[f"{side}_scales"] = encoded.scales.shape[-1] * NUMBER
        if encoded.outliers is not None:
            written[f"{side}_outliers"] = encoded.outliers.shape[-1] * NUMBER
            assert int(encoded.places.max()) <= capacity * head_size
            written[f"{side}_places"] = encoded.places.shape[-1] * (2 if capacity * head_size < 2**16 else 4)
    assert {name: buffer.size_bytes for name, buffer in segment.buffers.items()} == {
        k: v for k, v in written.items() if v
    }


@settings(max_examples=40, deadline=None)
@given(holdings=holdings_of_a_layer, head_size=st.sampled_from([6, 64]), window=st.sampled_from([None, 24]))
def test_a_written_block_touches_no_byte_outside_its_buffers(holdings, head_size, window):
    """And all of every buffer but the reserve, whatever lay there before."""
    tiers = holdings[:-1] or holdings
    holdings = (*tiers, (format_named("rotated-k4v4"), 4))
    layout = layer_ledger(0, holdings, make_shape(2, head_size, (window,)))
    held = []
    for _, tokens in tiers:
        x = torch.randn(1, 2, tokens, head_size).half()
        valid = torch.ones(1, 2, tokens, dtype=torch.bool)
        held.append(TierTensors(x, x + 1, torch.arange(tokens, dtype=torch.int32).expand(1, 2, -1), valid))
    blocks = [torch.full((1, layout.stored_bytes), poison, dtype=torch.uint8) for poison in (0x5A, 0xA5)]
    for block in blocks:
        write_block(block, layout, held, torch.ones(1, 2, 2, head_size))
    is_written = blocks[0][0] == blocks[1][0]
    expected = torch.zeros(layout.stored_bytes, dtype=torch.bool)
    for name, buffer in layout.buffers():
        expected[buffer.offset : buffer.offset + buffer.size_bytes] = ".reserve." not in name
    assert torch.equal(is_written, expected)


# --- tiers ---------------------------------------------------------------------------------------------------------

TIERS = ((8, "16bit"), (21, "kivi-k4v4"), (30, "rotated-k2v2"))  # 21 and 30 are not whole quanta


@cache
def tiered_plan_of(family: str, tiers: tuple[tuple[int, str], ...], reserve: str) -> Plan:
    model = make_model(family)
    space = make_space(model, "100%", decode=Decode(reserve_tokens=5, format=reserve))
    base = space.plan(uniform(space, "16bit") or ())
    return with_tiers(base, tiers)


def with_tiers(base: Plan, tiers: tuple[tuple[int, str], ...]) -> Plan:
    """The same plan with these tiers in every layer, its bytes weighed anew, checked in full."""
    names = dict.fromkeys([name for _, name in tiers] + [base.decode.format])
    layer = Layer(tiers=tuple(Tier(tokens=tokens, format=name) for tokens, name in tiers))
    formats = {name: format_named(name) for name in names}
    changed = base.model_copy(update={"formats": formats, "layers": (layer,) * base.model.num_layers})
    weight = make_ledger(changed).stored_bytes
    budget = base.budget.model_copy(update={"requested": f"{weight}B", "limit_bytes": weight, "planned_bytes": weight})
    return Plan.model_validate(changed.model_copy(update={"budget": budget}).model_dump())


def tiered_plan(model: PreTrainedModel) -> Plan:
    return tiered_plan_of(model.config.model_type.replace("_text", ""), TIERS, "flexgen-k4v4")


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(200, [8, 21, 30]), (59, [8, 21, 30]), (58, [8, 21, 29]), (29, [8, 21, 0]), (20, [8, 12, 0]), (1, [1, 0, 0])],
)
def test_tiers_hold_the_counts_they_say_and_short_prompts_fill_them_from_the_top(family, tokens, expected):
    """In a sliding layer (window 24) of at most the 23 tokens that the next query can see."""
    model = make_model(family)
    plan = tiered_plan(model)
    packed = PlannedCache.from_plan(plan, model)
    with torch.no_grad():
        if tokens > plan.budget.context_tokens:
            with pytest.warns(UserWarning, match="more than the 96"):
                model(prompts(2, tokens), past_key_values=packed)
        else:
            model(prompts(2, tokens), past_key_values=packed)
        for appended in range(8):
            for layer, window in enumerate(plan.model.shape.sliding_windows):
                visible = min(tokens, (window or 10**6) - 1)
                held = expected if window is None else [min(8, visible), min(21, max(0, visible - 8)), 0]
                assert packed.tokens_held()[layer] == [*held, min(appended, 5)]
            logits = model(prompts(2, 1, seed=appended), past_key_values=packed).logits
            assert bool(logits.isfinite().all())
    assert packed.allocated_bytes == 2 * plan.budget.planned_bytes == 2 * make_ledger(plan).stored_bytes


def test_tiered_plans_read_back_as_written():
    plan = tiered_plan(make_model("llama"))
    assert parse_plan(plan.to_yaml()) == plan


def test_a_tier_of_16_bit_is_exact_and_the_most_important_tokens_are_in_it():
    """Sinks (2) and window (6) fill the first tier of 8 exactly: their keys are stored as they are."""
    model = make_model("llama")
    plan, ids = tiered_plan(model), prompts(1, 60)
    packed, lossless = (
        PlannedCache.from_plan(plan, model),
        PlannedCache.from_plan(with_tiers(plan, ((60, "16bit"),)), model),
    )
    with torch.no_grad():
        model(ids, past_key_values=packed)
        model(ids, past_key_values=lossless)
    for layer in range(plan.model.num_layers):
        tier, everything = (read_tier(c.layers[layer].packed(), 0) for c in (packed, lossless))
        kept = [0, 1, 54, 55, 56, 57, 58, 59]
        for side in range(2):
            assert torch.equal(tier[side], everything[side][:, :, kept])


def test_one_tier_cut_into_two_of_the_same_format_holds_the_same_tokens():
    """flexgen and 16 bit write tokens one by one: where they lie does not change what is read. The order of tiers is
    the order of importance, so the set is the same."""
    model = make_model("llama")
    for name in ("16bit", "flexgen-k4v3"):
        sets = []
        for tiers in (((24, name),), ((8, name), (16, name))):
            plan = with_tiers(tiered_plan(model), tiers)
            packed = PlannedCache.from_plan(plan, model)
            with torch.no_grad():
                model(prompts(1, 60), past_key_values=packed)
            parts = [read_tier(packed.layers[1].packed(), tier) for tier in range(len(tiers))]
            keys = torch.cat([keys for keys, _ in parts], 2)[0]
            sets.append([sorted(map(tuple, head.tolist())) for head in keys])
        assert sets[0] == sets[1]


def test_mikv_keeps_every_token_and_its_important_ones_exactly():
    """Two tiers as large as the context: nothing is evicted, and sinks and window are read back as they were."""
    model = make_model("llama")
    plan = with_tiers(tiered_plan(model), ((8, "16bit"), (52, "mikv-k2v2")))
    lossless = with_tiers(plan, ((60, "16bit"),))
    caches = [PlannedCache.from_plan(one, model) for one in (plan, lossless)]
    with torch.no_grad():
        for packed in caches:
            model(prompts(1, 60), past_key_values=packed)
    assert caches[0].tokens_held() == [[8, 52, 0]] * plan.model.num_layers
    packed = caches[0].layers[0].packed()
    vectors = read_vectors(packed.block, packed.layout, plan.model.num_kv_heads, plan.model.head_size, torch.float16)
    important, rest = (packed.read(tier, packed.table()[:, :, tier], vectors) for tier in (0, 1))
    exact = read_tier(caches[1].layers[0].packed(), 0)
    kept = [0, 1, 54, 55, 56, 57, 58, 59]
    for side in range(2):
        assert torch.equal(important[side], exact[side][:, :, kept])
        others = exact[side][:, :, 2:54]
        noise = ((rest[side] - others).square().sum() / others.square().sum()).item()
        assert 0.001 < noise < 0.5, "2 bit, of the same tokens in the same order"


def read_tier(packed: PackedLayer, tier: int) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values, _ = packed.read(tier, packed.table()[:, :, tier], {})
    return keys, values


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_random_tiers_live_in_exactly_the_planned_bytes(seed: int):
    chance = random.Random(seed)
    low_bit = [name for name in QUANTIZERS if name != "16bit"]
    names = [f"{q}-k{k}v{v}" for q in low_bit for k, v in ((8, 3), (4, 1), (1, 4), (2, 16), (16, 2))]
    names += ["kivi-k2g32v2g16o0.01", "flexgen-k4g8v3o0.05", "hqq-k3g128v2"]
    tiers = tuple((chance.randint(1, 20), chance.choice(["16bit", *names])) for _ in range(chance.randint(1, 4)))
    tiers = ((8, "16bit"), *tiers)
    model = model_of_one_layer()
    plan = with_tiers(base_of_one_layer(), tiers)
    packed = PlannedCache.from_plan(plan, model)
    tokens = chance.randint(1, 90)
    with torch.no_grad():
        model(prompts(2, tokens), past_key_values=packed)
        assert bool(model(prompts(2, 1), past_key_values=packed).logits.isfinite().all())
    assert packed.allocated_bytes == 2 * plan.budget.planned_bytes
    counts, left = [], tokens
    for size, _ in tiers:
        counts.append(min(size, left))
        left -= counts[-1]
    assert packed.tokens_held() == [[*counts, 1]]


@cache
def model_of_one_layer() -> PreTrainedModel:
    return make_model("llama", num_hidden_layers=1)


@cache
def base_of_one_layer() -> Plan:
    space = make_space(model_of_one_layer(), "90%")
    return space.plan([Choice(8, "16bit")])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"planned_bytes": 1}, "planned_bytes must be"),
        ({"full_bytes": 1}, "full_bytes must be"),
        ({"limit_bytes": 100}, "over budget.limit_bytes"),
    ],
)
def test_a_plan_whose_numbers_are_not_the_ledgers_is_refused(change, message):
    plan = base_of_one_layer()
    data = plan.model_dump()
    data["budget"] |= change
    with pytest.raises(ValueError, match=message):
        Plan.model_validate(data)
    text = plan.model_copy(update={"budget": plan.budget.model_copy(update=change)}).to_yaml()
    with pytest.raises(PlanError, match=message):
        parse_plan(text)


def test_the_same_holdings_in_another_layer_get_that_layers_layout():
    """Layouts are remembered by what they are of: a sliding layer's is not a global one's."""
    holdings = ((format_named("rotated-k4v4"), 20), (format_named("16bit"), 4))
    shape = make_shape(2, 64, (None, 24))
    layouts = [layer_ledger(layer, holdings, shape) for layer in (0, 1)]
    assert [layout.layer for layout in layouts] == [0, 1] and [layout.is_sliding for layout in layouts] == [False, True]
    assert layouts[1].stored_bytes == layouts[0].stored_bytes + 2 * (20 + 4) * 4
    other = layer_ledger(0, holdings, replace(shape, num_kv_heads=1, num_query_heads=1))
    assert other.stored_bytes < layouts[0].stored_bytes
