"""Allocations weigh exactly the budget: they fit, and no layer could take one more storage quantum.

Weights are taken anew from the ledger, not from the allocation's own sums.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from qpkv_planner.allocation import (
    PRESETS,
    Allocation,
    Choice,
    Space,
    allocation_of,
    default_reserve,
    format_name,
    format_named,
    pyramidkv,
    uniform,
)
from qpkv_runtime.errors import BudgetError, InputError
from qpkv_runtime.ledger import full_bytes, layer_bytes, make_ledger, quantum_tokens
from qpkv_runtime.methods import QUANTIZERS
from qpkv_runtime.plan import Decode, Format, Heads, Model, Scorer, parse_plan

LOW_BIT = (8, 4, 3, 2)
NAMES = [
    "16bit",
    *(
        format_name(quantizer, keys, values)
        for quantizer in ("flexgen", "kivi", "rotated")  # per token, across tokens, with head vectors
        for keys in (16, *LOW_BIT)
        for values in (16, *LOW_BIT)
        if not keys == values == 16
    ),
]
PER_TOKEN = [name for name in NAMES if format_named(name).appends]

names, reserve_names = st.sampled_from(NAMES), st.sampled_from(PER_TOKEN)


def make_model(heads: int, head_size: int, windows: tuple[int | None, ...]) -> Model:
    return Model(
        id="none",
        model_type="llama",
        num_layers=len(windows),
        num_query_heads=heads,
        num_kv_heads=heads,
        head_size=head_size,
        max_context_tokens=4096,
        sliding_windows=windows if any(windows) else None,
        dtype="bfloat16",
        storage_dtype="bfloat16",
    )


@st.composite
def spaces(draw: st.DrawFn, min_context: int = 1) -> Space:
    windows = draw(st.lists(st.sampled_from([None, None, 5, 48]), min_size=1, max_size=5))
    ratio = draw(st.fractions(Fraction(1, 40), 1))
    return Space(
        model=make_model(draw(st.integers(1, 4)), draw(st.sampled_from([16, 64, 80])), tuple(windows)),
        requested=f"{ratio.numerator}/{ratio.denominator}",
        context_tokens=draw(st.integers(min_context, 400)),
        scorer=Scorer(name="knorm"),
        sinks=draw(st.integers(0, 4)),
        window=draw(st.integers(1, 20)),
        decode=Decode(reserve_tokens=draw(st.integers(1, 20)), format=draw(reserve_names)),
    )


def weigh(space: Space, layer: int, choice: Choice) -> int:
    """A layer's bytes by the ledger, without the space's memory."""
    held = (
        (format_named(choice.format), choice.tokens),
        (format_named(space.decode.format), space.decode.reserve_tokens),
    )
    shape = space.model.shape
    return layer_bytes(held, shape.num_kv_heads, shape.head_size, shape.sliding_windows[layer] is not None)


def total(space: Space, allocation: Allocation) -> int:
    return sum(weigh(space, layer, choice) for layer, choice in enumerate(allocation))


def most_tokens(space: Space, layer: int) -> int:
    return min(space.context_tokens, space.model.shape.sliding_windows[layer] or space.context_tokens)


def assert_exact(space: Space, allocation: Allocation) -> None:
    """It fits; every layer holds sinks and window, not more than there is, and could not take one more quantum."""
    spent, forced = total(space, allocation), space.sinks + space.window
    assert spent <= space.limit_bytes
    assert len(allocation) == space.model.num_layers
    for layer, choice in enumerate(allocation):
        most, quantum = most_tokens(space, layer), quantum_tokens(format_named(choice.format))
        assert forced <= choice.tokens <= max(most, forced)
        assert choice.tokens % quantum == 0 or choice.tokens in (most, forced), "a quantum is never half used"
        if choice.tokens < most:
            more = replace(choice, tokens=min(choice.tokens + quantum, most))
            assert spent - weigh(space, layer, choice) + weigh(space, layer, more) > space.limit_bytes, f"layer {layer}"


# --- projection ----------------------------------------------------------------------------------------------------


@settings(max_examples=90, deadline=None)
@given(space=spaces(), data=st.data(), floor=st.sampled_from([0, 3, 60]))
def test_a_projection_fits_and_no_layer_can_take_one_more_quantum(space: Space, data: st.DataObject, floor: float):
    layers = space.model.num_layers
    weights = data.draw(st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 100)), min_size=layers, max_size=layers))
    formats = data.draw(st.lists(names, min_size=layers, max_size=layers))
    allocation = space.project(weights, formats, floor)
    least = [Choice(space.sinks + space.window, name) for name in formats]
    if allocation is None:
        assert total(space, tuple(least)) > space.limit_bytes, "sinks and window alone would have fitted"
    else:
        assert total(space, tuple(least)) <= space.limit_bytes
        assert [choice.format for choice in allocation] == formats
        assert_exact(space, allocation)


@settings(max_examples=60, deadline=None)
@given(space=spaces(), name=names, preset=st.sampled_from(sorted(PRESETS)))
def test_a_preset_fits_and_no_layer_can_take_one_more_quantum(space: Space, name: str, preset: str):
    allocation = PRESETS[preset](space, name)
    least = tuple(Choice(space.sinks + space.window, name) for _ in range(space.model.num_layers))
    assert (allocation is None) == (total(space, least) > space.limit_bytes)
    if allocation is not None:
        assert_exact(space, allocation)


@settings(max_examples=40, deadline=None)
@given(space=spaces(min_context=50), name=names)
def test_uniform_is_uniform_to_two_quanta(space: Space, name: str):
    """Layers of one kind: a sliding layer's positions make its quantum dearer, so kinds may part by more. Two, since a
    quantum that opens a group of keys, or an alignment unit of scales, is dearer than the next: a layer that paid for
    it may go on once where the last ones could not."""
    one_kind = replace(space, model=make_model(2, 64, (None,) * 4))
    allocation = uniform(one_kind, name)
    assume(allocation is not None)
    counts = [choice.tokens for choice in allocation or ()]
    assert max(counts) - min(counts) <= 2 * quantum_tokens(format_named(name))
    assert counts == sorted(counts, reverse=True), "what is left over goes to the first layers"


@settings(max_examples=40, deadline=None)
@given(space=spaces(min_context=100), name=names, beta=st.integers(2, 40))
def test_pyramidkv_falls_with_depth_and_weighs_what_uniform_weighs(space: Space, name: str, beta: int):
    deep = replace(space, model=make_model(2, 64, (None,) * 6))
    allocation, even = pyramidkv(deep, name, beta), uniform(deep, name)
    assume(allocation is not None and even is not None)
    assert allocation is not None and even is not None
    quantum = quantum_tokens(format_named(name))
    counts = [choice.tokens for choice in allocation]
    assert all(above >= below - quantum for above, below in pairwise(counts))
    # both within the layers' next quanta of the limit
    slack = sum(weigh(deep, i, deep.one_more(i, c) or c) - weigh(deep, i, c) for i, c in enumerate(allocation))
    if max(counts) < deep.context_tokens:
        assert deep.limit_bytes - total(deep, allocation) < max(1, slack)


@pytest.mark.parametrize("beta", [20, 2])
def test_pyramidkv_has_the_papers_slope_on_the_exact_budget(beta):
    """32 layers, 16 bit, 1/8 of 2048: mean b beyond the window, the last layer b // beta, the first 2 b - b // beta."""
    space = Space(
        model=make_model(8, 128, (None,) * 32), requested="1/8", context_tokens=2048, scorer=Scorer(name="knorm"),
        sinks=0, window=8, decode=Decode(reserve_tokens=1, format="16bit"),
    )  # fmt: skip
    allocation, even = pyramidkv(space, "16bit", beta), uniform(space, "16bit")
    assert allocation is not None and even is not None
    assert_exact(space, allocation)
    mean = sum(choice.tokens for choice in even) / 32 - 8
    last = mean // beta
    counts = [choice.tokens - 8 for choice in allocation]
    expected = [2 * mean - last + (last - (2 * mean - last)) * layer / 31 for layer in range(32)]
    assert max(abs(got - wanted) for got, wanted in zip(counts, expected, strict=True)) <= 2  # rounding, then filling
    assert sum(counts) == 32 * mean, "all of what the floor division of the paper overshoots or loses"


def test_pyramidkv_flattens_where_its_first_layer_would_hold_more_than_the_context():
    space = Space(
        model=make_model(8, 128, (None,) * 32), requested="3/4", context_tokens=2048, scorer=Scorer(name="knorm"),
        sinks=0, window=8, decode=Decode(reserve_tokens=1, format="16bit"),
    )  # fmt: skip
    allocation, even = pyramidkv(space, "16bit"), uniform(space, "16bit")
    assert allocation is not None and even is not None
    mean = sum(choice.tokens for choice in even) / 32 - 8
    assert allocation[0].tokens == 2048
    assert abs(allocation[-1].tokens - 8 - (2 * mean - 2040)) <= 3


@settings(max_examples=40, deadline=None)
@given(space=spaces(min_context=50), data=st.data())
def test_filling_only_adds(space: Space, data: st.DataObject):
    formats = data.draw(st.lists(names, min_size=space.model.num_layers, max_size=space.model.num_layers))
    start = tuple(Choice(space.least_tokens(i, f), f) for i, f in enumerate(formats))
    assume(total(space, start) <= space.limit_bytes)
    filled = space.fill(start)
    assert_exact(space, filled)
    assert all(after.tokens >= before.tokens for before, after in zip(start, filled, strict=True))
    assert space.fill(filled) == filled


@settings(max_examples=40, deadline=None)
@given(space=spaces(min_context=50), name=names, scale=st.floats(1e-3, 1e3))
def test_only_the_ratios_of_weights_matter(space: Space, name: str, scale: float):
    layers = space.model.num_layers
    weights = [1.0 + layer for layer in range(layers)]
    one, other = (space.project([w * s for w in weights], [name] * layers) for s in (1.0, scale))
    assert (one is None) == (other is None)
    if one is not None and other is not None:
        # the largest c differs by rounding, which may move a quantum
        assert all(
            abs(a.tokens - b.tokens) <= quantum_tokens(format_named(name)) for a, b in zip(one, other, strict=True)
        )


def test_a_budget_with_room_for_everything_keeps_everything():
    space = Space(
        model=make_model(2, 64, (None, 48, None)), requested="1GB", context_tokens=301, scorer=Scorer(name="knorm"),
        sinks=4, window=16, decode=Decode(reserve_tokens=8, format="16bit"),
    )  # fmt: skip
    for name in NAMES:
        for preset in PRESETS.values():
            assert [choice.tokens for choice in preset(space, name) or ()] == [301, 48, 301]


# --- counts --------------------------------------------------------------------------------------------------------


@settings(max_examples=120, deadline=None)
@given(space=spaces(), name=names, wish=st.floats(0, 600), data=st.data())
def test_a_legal_count_is_never_above_the_wish_unless_it_is_the_least(space, name, wish, data):
    layer = data.draw(st.integers(0, space.model.num_layers - 1))
    quantum, forced, most = quantum_tokens(format_named(name)), space.sinks + space.window, most_tokens(space, layer)
    legal, least = space.legal_tokens(layer, wish, name), space.least_tokens(layer, name)
    assert forced <= least <= max(forced, min(forced + quantum - 1, most))
    assert weigh(space, layer, Choice(least, name)) == weigh(space, layer, Choice(forced, name)), "the rest is free"
    assert legal == least or legal <= wish
    assert least <= legal <= max(least, most)
    if legal < most:
        assert legal % quantum == 0 and legal + quantum > wish, "the largest such count"
    assert space.legal_tokens(layer, legal, name) == legal


@settings(max_examples=60, deadline=None)
@given(space=spaces(), name=names, data=st.data())
def test_one_more_is_the_next_quantum_until_the_layer_holds_all(space, name, data):
    layer = data.draw(st.integers(0, space.model.num_layers - 1))
    choice, most = Choice(space.least_tokens(layer, name), name), most_tokens(space, layer)
    quantum = quantum_tokens(format_named(name))
    while (more := space.one_more(layer, choice)) is not None:
        assert more.format == name and choice.tokens < more.tokens <= most
        assert more.tokens == choice.tokens + quantum or more.tokens == most
        assert weigh(space, layer, more) > weigh(space, layer, choice)
        choice = more
    assert choice.tokens >= most


@settings(max_examples=40, deadline=None)
@given(space=spaces(), data=st.data())
def test_a_space_weighs_what_the_ledger_weighs(space: Space, data: st.DataObject):
    layers = space.model.num_layers
    choices = data.draw(st.lists(st.builds(Choice, st.integers(1, 300), names), min_size=layers, max_size=layers))
    assert space.bytes(choices) == total(space, tuple(choices))
    assert space.full_bytes == full_bytes(space.model.shape, space.context_tokens)
    assert space.limit_bytes == math.floor(space.full_bytes * Fraction(space.requested))


# --- budgets that are too small ------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(space=spaces(), some=st.lists(names, min_size=1, max_size=4, unique=True), short=st.integers(0, 1))
def test_the_smallest_budget_that_an_error_names_works_and_one_byte_less_does_not(space, some, short):
    least = space.least_bytes(some)
    tight = replace(space, requested=f"{least - short}B")
    if short:
        with pytest.raises(BudgetError, match=rf"at least {least}B\b.*got {least - 1}B = {least - 1}B"):
            tight.check_holds(some)
        assert all(uniform(tight, name) is None for name in some)
    else:
        tight.check_holds(some)
        allocation = next(a for name in some if (a := uniform(tight, name)) is not None)
        assert_exact(tight, allocation)
        plan = tight.plan(allocation)
        assert plan.budget.limit_bytes == least >= plan.budget.planned_bytes


@settings(max_examples=40, deadline=None)
@given(space=spaces(min_context=200), name=names)
def test_the_ratio_that_an_error_names_works(space: Space, name: str):
    least = space.least_bytes([name])
    assume(least <= space.full_bytes)
    with pytest.raises(BudgetError) as raised:
        replace(space, requested="1B").check_holds([name])
    ratio = str(raised.value).split("(1/")[1].split(" ")[0]
    replace(space, requested=f"1/{ratio}").check_holds([name])


def test_an_error_names_no_ratio_where_even_the_full_cache_would_be_too_small():
    space = Space(
        model=make_model(2, 64, (None,) * 3), requested="1/2", context_tokens=4, scorer=Scorer(name="knorm"),
        sinks=4, window=16, decode=Decode(reserve_tokens=8, format="16bit"),
    )  # fmt: skip
    with pytest.raises(BudgetError) as raised:
        space.check_holds(["rotated-k2v2"])
    assert "1/0" not in str(raised.value)


def test_a_budget_below_sinks_window_and_reserve_is_none_for_every_preset():
    space = Space(
        model=make_model(3, 64, (None,) * 30), requested="1/64", context_tokens=1024, scorer=Scorer(name="knorm"),
        sinks=4, window=16, decode=Decode(reserve_tokens=8, format="16bit"),
    )  # fmt: skip
    assert [preset(space, "16bit") for preset in PRESETS.values()] == [None] * len(PRESETS)
    with pytest.raises(BudgetError, match=r"sinks \+ window \(4 \+ 16 tokens per layer\) and the reserve \(8 tokens\)"):
        space.check_holds(["16bit"])


# --- plans of allocations ------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(space=spaces(min_context=30), name=names)
def test_a_plan_says_what_its_allocation_weighs(space: Space, name: str):
    allocation = uniform(space, name)
    assume(allocation is not None)
    assert allocation is not None
    plan = space.plan(allocation)
    budget = plan.budget
    assert budget.planned_bytes == make_ledger(plan).stored_bytes == total(space, allocation)
    assert budget.limit_bytes == space.limit_bytes and budget.full_bytes == space.full_bytes
    assert budget.requested == space.requested and budget.context_tokens == space.context_tokens
    assert [(layer.tokens, layer.tiers[0].format) for layer in plan.layers] == [
        (c.tokens, c.format) for c in allocation
    ]
    assert set(plan.formats) == {name, space.decode.format}
    assert not plan.calibrated
    assert Space.of_plan(plan) == space
    assert parse_plan(plan.to_yaml()) == plan


@settings(max_examples=40, deadline=None)
@given(space=spaces(min_context=30), data=st.data())
def test_a_probe_of_an_allocation_over_the_budget_is_a_plan_of_its_own_weight(space: Space, data: st.DataObject):
    tight = replace(space, requested="1B")
    layers, forced = space.model.num_layers, space.sinks + space.window
    choices = data.draw(
        st.lists(st.builds(Choice, st.integers(forced, forced + 200), names), min_size=layers, max_size=layers)
    )
    plan = tight.probe(choices)
    weight = total(space, tuple(choices))
    assert plan.budget.planned_bytes == plan.budget.limit_bytes == weight
    assert plan.budget.requested == f"{weight}B" and plan.budget.full_bytes == space.full_bytes
    assert [layer.tokens for layer in plan.layers] == [choice.tokens for choice in choices]
    with pytest.raises(ValidationError, match=r"over budget\.limit_bytes = 1"):
        tight.plan(choices)
    assert tight.requested == "1B", "probing changes nothing about the space"


# --- the reserve ---------------------------------------------------------------------------------------------------


@settings(max_examples=90, deadline=None)
@given(space=spaces(), name=reserve_names, wanted=st.integers(1, 300))
def test_the_reserve_takes_at_most_a_quarter_of_the_budget(space: Space, name: str, wanted: int):
    """Unless it is a single quantum; and it is as many tokens as were wanted where those fit."""
    shape, quantum = space.model.shape, quantum_tokens(format_named(name))

    def reserve_bytes(tokens: int) -> int:
        spaces_of = [replace(space, decode=Decode(reserve_tokens=n, format=name)) for n in (tokens, tokens + quantum)]
        held = [Choice(space.sinks + space.window, "16bit")] * shape.num_layers
        with_reserve = sum(weigh(spaces_of[0], layer, choice) for layer, choice in enumerate(held))
        nothing = sum(
            layer_bytes(
                ((format_named("16bit"), c.tokens), (format_named(name), 0)),
                shape.num_kv_heads,
                shape.head_size,
                window is not None,
            )
            for c, window in zip(held, shape.sliding_windows, strict=True)
        )
        return with_reserve - nothing

    tokens, wish = default_reserve(shape, space.limit_bytes, name, wanted), -(-wanted // quantum) * quantum
    assert quantum <= tokens <= wish and tokens % quantum == 0
    assert tokens == quantum or reserve_bytes(tokens) <= space.limit_bytes / 4
    assert tokens == wish or reserve_bytes(tokens + quantum) > space.limit_bytes / 4, "the most that fits"


def test_the_reserve_is_64_tokens_where_the_budget_is_large():
    assert default_reserve(make_model(3, 64, (None,) * 30).shape, 10**9, "rotated-k4v4") == 64
    assert default_reserve(make_model(3, 64, (None,) * 30).shape, 10**9, "rotated-k4v4", 1) == 4
    assert default_reserve(make_model(3, 64, (None,) * 30).shape, 1, "rotated-k4v4") == 4


# --- tiers ---------------------------------------------------------------------------------------------------------


def test_a_choice_with_tiers_above_weighs_and_reads_back_as_its_plan():
    """MiKV's two tiers with nothing evicted, and three: what is projected is the last."""
    decode = Decode(reserve_tokens=8, format="flexgen-k4v4")
    space = Space(make_model(2, 64, (None, None)), "1/16", 512, Scorer(name="knorm"), 2, 6, decode)
    mikv = Choice(432, "mikv-k2v2", ((80, "16bit"),))
    three = Choice(40, "rotated-k1v1", ((8, "16bit"), (16, "kivi-k4v3")))
    plan = space.probe([mikv, three])
    assert [layer.tokens for layer in plan.layers] == [512, 64]
    assert make_ledger(plan).stored_bytes == space.bytes([mikv, three]) == plan.budget.planned_bytes
    assert allocation_of(parse_plan(plan.to_yaml())) == (mikv, three)
    for heads in (Heads(share="uniform"), (Heads(share="adaptive"), Heads(share="weighted", weights=(1.0, 3.0)))):
        shared = replace(space, heads=heads)
        key = json.loads(json.dumps(shared.key([three, three])))  # as a journal's file has it
        again, allocation = Space.of_key(key, space.model, space.context_tokens)
        assert allocation == (three, three)
        assert again.key(allocation) == shared.key(allocation)
        assert again.limit_bytes == again.bytes(allocation) == shared.bytes(allocation)
    assert space.one_more(0, mikv) is None, "nothing is left to keep"
    filled = space.fill([replace(three, tokens=8)] * 2)
    assert all(choice.above == three.above for choice in filled)
    one_more = [space.one_more(0, filled[0]), filled[1]]
    assert space.bytes(filled) <= space.limit_bytes < space.bytes(one_more)


# --- names of formats ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantizer", [name for name in QUANTIZERS if name != "16bit"])
def test_a_format_goes_by_its_name(quantizer):
    for keys in (16, *LOW_BIT):
        for values in (16, *LOW_BIT):
            format = format_named(format_name(quantizer, keys, values))
            assert (format.keys.bits, format.values.bits) == (keys, values)
            assert format.keys.quantizer == (quantizer if keys < 16 else "16bit")
            assert format.values.quantizer == (quantizer if values < 16 else "16bit")
            assert format.keys.group is None, "the quantizer's own, for the plan's head size"


def test_groups_and_outliers_stand_in_a_name_where_they_are_not_the_quantizers_own():
    format = format_named("kivi-k2g32v3g16o0.01")
    assert (format.keys.bits, format.keys.group, format.keys.outliers) == (2, 32, 0.01)
    assert (format.values.bits, format.values.group, format.values.outliers) == (3, 16, 0.01)
    assert format_named("kvquant-k4v4").keys.outliers == 0.01
    with pytest.raises(InputError, match="hqq keeps no outliers apart"):
        format_named("hqq-k4v4o0.01")
    with pytest.raises(InputError, match="rotated takes no group"):
        format_named("rotated-k4g32v4")


def test_names_are_of_one_format_each():
    named = {name: format_named(name) for name in NAMES}
    assert len(set(named.values())) == len(NAMES) == 1 + 3 * 24
    assert all(isinstance(format, Format) for format in named.values())
    assert format_name("kivi", 16, 16) == format_name("rotated", 16, 16) == "16bit"


@pytest.mark.parametrize(
    "name", ["", "16", "rotated", "rotated-k4", "rotated-4-2", "16bit-k4v4", "Rotated-k4v4", "x k4v4"]
)
def test_what_is_no_name_is_an_input_error(name):
    with pytest.raises(InputError, match="rotated-k4v2"):
        format_named(name)


@pytest.mark.parametrize("name", ["kiwi-k4v4", "rotated-k5v4", "kivi-k4v7"])
def test_an_unknown_quantizer_or_width_in_a_name_is_an_input_error(name):
    with pytest.raises(InputError):
        format_named(name)
