"""The runtime's promises (DESIGN.md), on random small models of every family."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator

import pytest
import torch
from conftest import FAMILIES, SLIDING, keep_all, lossless_space, make_model, make_space, prompts, random_plan
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from qpkv_planner.allocation import uniform
from qpkv_runtime.cache import PlannedCache, PlannedLayer
from qpkv_runtime.errors import BudgetError, CacheError, InputError, NumericsError, PlanError, UnsupportedModelError
from qpkv_runtime.ledger import make_ledger
from qpkv_runtime.methods import SCORERS
from qpkv_runtime.plan import Decode, Heads, Plan, Scorer
from qpkv_runtime.scorers import Prefill, _query_moments

GREEDY = {"do_sample": False, "max_new_tokens": 24}


class StoredDynamicCache(DynamicCache):
    """A DynamicCache that holds its keys and values in the stored 16-bit type: the prompt's from the end of prefill
    on, later tokens' from the start."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if self.get_seq_length(layer_idx) > 0:
            key_states, value_states = key_states.half().to(key_states), value_states.half().to(value_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def round(self) -> None:
        for layer in self.layers:
            layer.keys, layer.values = layer.keys.half().to(layer.keys), layer.values.half().to(layer.values)


def greedy_reference(model, ids, mask=None, tokens=24):
    """Greedy tokens with transformers' own eager attention and a DynamicCache, rounded after prefill."""
    model.set_attn_implementation("eager")
    cache = StoredDynamicCache(config=model.config)
    mask = torch.ones_like(ids) if mask is None else mask
    out = []
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        step = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        if model.dtype == torch.float32:
            cache.round()
        for _ in range(tokens):
            token = step.logits[:, -1:].argmax(-1)
            out.append(token)
            mask = torch.cat([mask, torch.ones_like(token)], 1)
            positions = mask.sum(-1, keepdim=True) - 1
            step = model(token, attention_mask=mask, position_ids=positions, past_key_values=cache)
    model.set_attn_implementation("qpkv")
    return torch.cat([ids, *out], 1)


@pytest.mark.parametrize("batch", [1, 3])
def test_keeping_everything_at_16_bit_gives_the_greedy_tokens_of_dynamic_cache(family, batch):
    model, ids = make_model(family), prompts(batch)
    cache = PlannedCache.from_plan(keep_all(lossless_space(model)), model)
    ours = model.generate(ids, past_key_values=cache, **GREEDY)
    assert torch.equal(ours, greedy_reference(model, ids))
    assert len(set(ours[:, ids.shape[1] :].flatten().tolist())) > 8, "the model repeats itself: the test shows nothing"
    assert cache.get_seq_length() == ours.shape[1] - 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lossless_plan_of_a_16_bit_model_equals_dynamic_cache(dtype):
    model, ids = make_model("llama", dtype), prompts(2)
    cache = PlannedCache.from_plan(keep_all(lossless_space(model)), model)
    ours = model.generate(ids, past_key_values=cache, **GREEDY)
    model.set_attn_implementation("sdpa")
    theirs = model.generate(ids, past_key_values=DynamicCache(config=model.config), **GREEDY)
    assert torch.equal(ours, theirs)


def test_left_padded_rows_get_what_they_get_alone(family):
    model = make_model(family)
    long, short = prompts(1, 70, seed=2), prompts(1, 43, seed=3)
    ids = torch.cat([long, torch.cat([torch.zeros(1, 27, dtype=torch.long), short], 1)])
    mask = torch.ones_like(ids)
    mask[1, :27] = 0
    first = 3 * list(FAMILIES).index(family)  # three scorers for each family, every one in several families
    for seed, scorer in enumerate([*SCORERS, *SCORERS][first % len(SCORERS) :][:3]):
        plan = random_plan(model, seed, "1/3", scorer=Scorer(name=scorer))
        caches = [PlannedCache.from_plan(plan, model) for _ in range(3)]
        both = model.generate(ids, attention_mask=mask, past_key_values=caches[0], **GREEDY)
        assert torch.equal(both[0], model.generate(long, past_key_values=caches[1], **GREEDY)[0])
        assert torch.equal(both[1, 27:], model.generate(short, past_key_values=caches[2], **GREEDY)[0])
        for layer in range(plan.model.num_layers):
            block = caches[0].arena.block(layer)
            different = (block[1] != caches[2].arena.block(layer)[0]).float().mean().item()
            assert different < 0.02, f"layer {layer}: {different:.1%} of the bytes differ from the row alone"


def test_right_padding_is_refused():
    model, ids = make_model("llama"), prompts(2)
    mask = torch.ones_like(ids)
    mask[0, -9:] = 0
    with pytest.raises(InputError, match="left"):
        model(ids, attention_mask=mask, past_key_values=PlannedCache.from_plan(random_plan(model, 0), model))


def test_padding_among_the_tokens_of_a_later_turn_is_refused():
    model, ids = make_model("llama"), prompts(2)
    cache = PlannedCache.from_plan(keep_all(lossless_space(model)), model)
    mask = torch.ones(2, 75, dtype=torch.long)
    mask[1, 70:73] = 0
    with torch.no_grad():
        model(ids, past_key_values=cache)
        with pytest.raises(InputError, match="padding among the 5 new ones"):
            model(prompts(2, 5), attention_mask=mask, past_key_values=copy.deepcopy(cache))
        model(prompts(2, 5), attention_mask=torch.ones_like(mask), past_key_values=cache)


def live_bytes_match(cache: PlannedCache, plan: Plan, rows: int) -> None:
    ledger = make_ledger(plan)
    assert cache.allocated_bytes == rows * ledger.stored_bytes == rows * plan.budget.planned_bytes
    assert plan.budget.planned_bytes <= plan.budget.limit_bytes
    # nothing else that lives in the cache holds a tensor
    tensors = [v for layer in cache.layers for v in vars(layer).values() if isinstance(v, torch.Tensor)]
    assert tensors == []


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 10**6), family=st.sampled_from(["llama", "gemma3", "llama_odd_heads"]), rows=st.integers(1, 3)
)
def test_live_bytes_equal_the_ledger_after_every_step_and_past_the_reserve(seed, family, rows):
    model = make_model(family)
    try:
        plan = random_plan(model, seed)
    except BudgetError:
        return
    cache = PlannedCache.from_plan(plan, model)
    with torch.no_grad():
        logits = model(prompts(rows, 60), past_key_values=cache).logits
        for _ in range(plan.decode.reserve_tokens + 3):
            live_bytes_match(cache, plan, rows)
            logits = model(logits[:, -1:].argmax(-1), past_key_values=cache).logits
            assert bool(logits.isfinite().all())
    live_bytes_match(cache, plan, rows)
    held = cache.tokens_held()
    for layer, counts in enumerate(held):
        assert counts[-1] == plan.decode.reserve_tokens
        visible = min(60, (plan.model.shape.sliding_windows[layer] or 61) - 1)
        if plan.heads.share != "weighted":  # some heads could hold more than so short a prompt has
            assert sum(counts[:-1]) == min(plan.layers[layer].tokens, visible)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("quantizer", ["16bit", "flexgen-k4v3", "kivi-k2v4", "rotated-k3v2", "rotated-k8v8"])
def test_overwriting_any_one_buffer_of_the_arena_changes_the_logits(family, quantizer):
    model = make_model(family)
    space = make_space(model, "80%", decode=Decode(reserve_tokens=4, format="rotated-k4v4"))
    plan = space.plan(uniform(space, quantizer))
    cache = PlannedCache.from_plan(plan, model)
    token = torch.tensor([[5]])
    with torch.no_grad():
        model(prompts(1, 60), past_key_values=cache)
        model(prompts(1, 2, seed=9), past_key_values=cache)
        before = model(token, past_key_values=copy.deepcopy(cache)).logits
        for layer in make_ledger(plan).layers:
            for name, buffer in layer.buffers():
                changed = copy.deepcopy(cache)
                part = changed.arena.block(layer.layer)[:, buffer.offset : buffer.offset + buffer.size_bytes]
                if name.endswith("positions"):
                    part.zero_()  # a token from long ago: outside the sliding window
                elif name == "table":
                    part.unflatten(1, (-1, 2, 4))[:, :, 1] = 0
                else:
                    part ^= 0x2A
                if "reserve.positions" in name:
                    continue  # the ring knows its positions; they are stored for kernels
                after = model(token, past_key_values=changed).logits
                assert not torch.equal(before, after), f"layer {layer.layer} {name} is not read"


@pytest.mark.parametrize("seed", range(6))
def test_teacher_forced_logits_agree_with_single_steps_across_an_eviction(family, seed):
    model = make_model(family)
    try:
        plan = random_plan(model, seed)
    except BudgetError:
        pytest.skip("this random plan does not fit")
    ids, continuation = prompts(2, 60), prompts(2, plan.decode.reserve_tokens + 5, seed=4)
    with torch.no_grad():
        cache = PlannedCache.from_plan(plan, model)
        model(ids, past_key_values=cache)
        at_once_cache = copy.deepcopy(cache)
        at_once = model(continuation, past_key_values=at_once_cache).logits
        steps = [model(token, past_key_values=cache).logits for token in continuation.split(1, 1)]
    steps = torch.cat(steps, 1)
    error = ((at_once - steps).abs().max() / at_once.std()).item()
    print(f"error relative to the logits' spread: {error:.1e}")
    assert error < 2e-2, "float32 sums in another order, through quantized new tokens"
    assert torch.equal(at_once.argmax(-1), steps.argmax(-1))


def test_a_full_reserve_stops_with_an_error_when_the_plan_says_so():
    model = make_model("llama")
    plan = random_plan(model, 1, "1/2", decode=Decode(reserve_tokens=4, format="16bit", then="stop"))
    cache = PlannedCache.from_plan(plan, model)
    with pytest.raises(CacheError, match="reserve holds 4"):
        model.generate(prompts(), past_key_values=cache, **GREEDY)
    assert (
        model.generate(prompts(), past_key_values=PlannedCache.from_plan(plan, model), max_new_tokens=5).shape[1] == 75
    )


def test_beams_reset_and_deepcopy_work():
    model, ids = make_model("llama"), prompts()
    lossless = keep_all(lossless_space(model))
    beams = model.generate(ids, past_key_values=PlannedCache.from_plan(lossless, model), num_beams=3, **GREEDY)
    model.set_attn_implementation("sdpa")
    assert torch.equal(beams, model.generate(ids, num_beams=3, **GREEDY))
    model.set_attn_implementation("qpkv")
    plan = random_plan(model, 3, scorer=Scorer(name="criticalkv"))
    cache = PlannedCache.from_plan(plan, model)
    first = model.generate(ids, past_key_values=cache, **GREEDY)
    cache.reset()
    assert torch.equal(first, model.generate(ids, past_key_values=cache, **GREEDY))
    cache.reset()
    cache.reorder_cache(torch.tensor([1, 0]))  # there is nothing to reorder yet
    cache.batch_repeat_interleave(2)
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache)
    copies = [copy.deepcopy(cache) for _ in range(2)]
    again = [model.generate(ids, past_key_values=one, **GREEDY) for one in copies]
    assert torch.equal(*again)
    weight = model.get_decoder().layers[0].self_attn.o_proj.weight
    assert copies[0].layers[0].parts.output_projection.data_ptr() == weight.data_ptr(), "a copy holds no weights"


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3"])
def test_the_rotary_embedding_of_each_layer_turns_its_queries_back(family, monkeypatch):
    """What expected attention takes as queries before RoPE are the model's own, in global and in sliding layers."""
    model = make_model(family, rope_scaling={"rope_type": "linear", "factor": 3.0} if family == "llama" else None)
    before, after = [], []
    for layer in model.get_decoder().layers:
        last = getattr(layer.self_attn, "q_norm", None) or layer.self_attn.q_proj
        last.register_forward_hook(lambda module, args, out: before.append(out))
    prefill = PlannedLayer.prefill

    def record(layer, query, key, *rest):
        counted = torch.ones(1, 1, 70, dtype=torch.bool)
        state = Prefill(0, query, key, [0], 1.0, None, None, 1, parts=layer.parts)
        after.append(_query_moments(state, counted))
        return prefill(layer, query, key, *rest)

    monkeypatch.setattr(PlannedLayer, "prefill", record)
    plan = random_plan(model, 0, scorer=Scorer(name="expected_attention"))
    with torch.no_grad():
        model(prompts(1, 70), past_key_values=PlannedCache.from_plan(plan, model))
    before = [x if x.shape[1] == 4 else x.reshape(1, 70, 4, -1).transpose(1, 2) for x in before]
    assert len(before) == len(after) == plan.model.num_layers
    for query, (mean, covariance) in zip(before, after, strict=True):
        assert torch.allclose(mean.float(), query.mean(2), atol=1e-5 * query.abs().max().item())
        centred = (query - query.mean(2, keepdim=True)).double()
        expected = centred.transpose(-1, -2) @ centred / 70
        assert (covariance - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_scorer_that_looks_at_weights_refuses_a_model_that_has_none_in_memory():
    model = make_model("llama")
    plan = random_plan(model, 0, scorer=Scorer(name="criticalkv"))
    model.get_decoder().layers[1].self_attn.o_proj = torch.nn.Identity()
    with pytest.raises(UnsupportedModelError, match="layer 1's output projection"):
        PlannedCache.from_plan(plan, model)


def test_torchs_default_type_is_not_that_of_a_packed_cache():
    """Heads of unlike numbers of tokens, in a format whose segments are read size by size."""
    model, ids = make_model("llama"), prompts()
    space = make_space(model, "1/4", heads=Heads(share="weighted", weights=(1.0, 3.0)))
    plan = space.plan(uniform(space, "kvquant-k4v4"))

    def logits():
        cache = PlannedCache.from_plan(plan, model)
        with torch.no_grad():
            model(ids, past_key_values=cache)
            return model(ids[:, :2], past_key_values=cache).logits

    before = logits()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(logits(), before)
    finally:
        torch.set_default_dtype(torch.float32)


def test_crop_other_attention_and_other_shapes_give_clear_errors():
    model, ids = make_model("llama"), prompts()
    plan = random_plan(model, 0)
    cache = PlannedCache.from_plan(plan, model)
    with pytest.raises(CacheError, match="rolled back"):
        cache.crop(1)
    model.set_attn_implementation("sdpa")
    with pytest.raises(CacheError, match="attn_implementation='qpkv'"):
        PlannedCache.from_plan(plan, model)
    with pytest.raises(CacheError, match="attn_implementation='qpkv'"):
        model(ids, past_key_values=cache)
    with pytest.raises(PlanError, match="num_kv_heads = 2, this one has 4"):
        PlannedCache.from_plan(plan, make_model("llama", num_key_value_heads=4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(("projection", "tensor"), [("k_proj", "key"), ("v_proj", "value")])
@pytest.mark.parametrize("is_prefilled", [False, True])
def test_nan_or_inf_in_the_model_names_layer_and_tensor(bad, projection, tensor, is_prefilled):
    """In the prompt, and in a token that decode appends. Under a scorer that reads neither."""
    model = make_model("llama")
    plan = random_plan(model, 0, scorer=Scorer(name="streamingllm"))
    cache = PlannedCache.from_plan(plan, model)
    with torch.no_grad():
        if is_prefilled:
            model(prompts(), past_key_values=cache)
        getattr(model.get_decoder().layers[1].self_attn, projection).weight[0, 0] = bad
        with pytest.raises(NumericsError, match=f"layer 1: {tensor} must be finite"):
            model(prompts(2, 1 if is_prefilled else 70), past_key_values=cache)


@pytest.mark.parametrize("family", SLIDING)
def test_sliding_layers_never_hold_more_than_the_window_reaches(family):
    model = make_model(family)
    plan = random_plan(model, 5, "1/2")
    cache = PlannedCache.from_plan(plan, model)
    model(prompts(1, 70), past_key_values=cache)
    for layer, counts in enumerate(cache.tokens_held()):
        window = plan.model.shape.sliding_windows[layer]
        if window is not None:
            assert sum(counts) <= window - 1


def test_without_a_cache_qpkv_attention_is_ordinary_attention(family):
    model, ids = make_model(family), prompts()
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    with torch.no_grad():
        ours = model(ids, attention_mask=mask, use_cache=False).logits
        model.set_attn_implementation("eager")
        theirs = model(ids, attention_mask=mask, use_cache=False).logits
    assert torch.allclose(ours[mask.bool()], theirs[mask.bool()], atol=2e-3)


@pytest.mark.parametrize("quantizer", ["16bit", "kivi-k2v4", "mikv-k4v4", "rotated-k4v2"])
def test_autocast_around_a_model_stops_at_the_packed_cache(quantizer):
    """As long as the prompt is scored and packed, and in the packed cache's attention: the blocks are of its types."""
    model, ids = make_model("qwen3"), prompts()
    space = make_space(model, "80%", decode=Decode(reserve_tokens=8, format="rotated-k4v4"))
    plan = space.plan(uniform(space, quantizer))

    def decoded() -> torch.Tensor:
        cache = PlannedCache.from_plan(plan, model)
        model(ids[:, :-1], past_key_values=cache)
        return model(ids[:, -1:], past_key_values=cache).logits.float()

    with torch.no_grad():
        plain = decoded()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = decoded()
    assert torch.corrcoef(torch.stack([plain.flatten(), out.flatten()]))[0, 1] > 0.9  # other tokens may be kept


def test_a_static_cache_under_qpkv_attention_gives_transformers_own_tokens(family):
    """Its prompt is shorter than the cache, and its masks are made by `generate`, before the model."""
    model, ids = make_model(family), prompts()
    for num_padding in (0, 11):
        mask = torch.ones_like(ids)
        mask[0, :num_padding] = 0
        ours = model.generate(ids, attention_mask=mask, cache_implementation="static", **GREEDY)
        model.set_attn_implementation("eager")
        theirs = model.generate(ids, attention_mask=mask, **GREEDY)
        model.set_attn_implementation("qpkv")
        assert torch.equal(ours, theirs)


def test_without_a_qpkv_cache_rows_may_be_padded_on_the_right(family):
    model, ids = make_model(family), prompts()
    mask = torch.ones_like(ids)
    mask[0, -11:], mask[1, :3] = 0, 0
    with torch.no_grad():
        ours = model(ids, attention_mask=mask).logits
        model.set_attn_implementation("eager")
        theirs = model(ids, attention_mask=mask).logits
    assert torch.allclose(ours[mask.bool()], theirs[mask.bool()], atol=2e-3)


@torch.no_grad()
def test_prompts_prefilled_alone_and_stacked_go_on_as_each_alone() -> None:
    model = make_model("llama")
    plan = random_plan(model, 3)
    alone = []
    for row, tokens in enumerate((60, 70)):
        alone.append(PlannedCache.from_plan(plan, model))
        model(prompts(1, tokens, seed=row), past_key_values=alone[-1])
    together = PlannedCache.stacked(alone, 2)
    fed = torch.tensor([[5], [9]])
    positions = torch.tensor([[60], [70]])
    batch = model(fed, position_ids=positions, past_key_values=together).logits
    for row, cache in enumerate(alone):
        own = model(fed[row : row + 1], position_ids=positions[row : row + 1], past_key_values=cache).logits
        torch.testing.assert_close(batch[row : row + 1], own, rtol=1e-4, atol=1e-4)
    with pytest.raises(CacheError, match="right after their prefill"):
        PlannedCache.stacked(alone, 2)


@torch.no_grad()
def test_stacking_holds_one_row_besides_the_batch() -> None:
    model = make_model("llama")
    plan = random_plan(model, 3)
    made: list[weakref.ref[PlannedCache]] = []

    def prefilled(count: int) -> Iterator[PlannedCache]:
        for row in range(count):
            assert all(one() is None for one in made), "an earlier prompt's cache is alive beside the batch's"
            cache = PlannedCache.from_plan(plan, model)
            model(prompts(1, 60 + row, seed=row), past_key_values=cache)
            made.append(weakref.ref(cache))
            yield cache
            del cache

    together = PlannedCache.stacked(prefilled(3), 3)
    assert together.allocated_bytes == 3 * plan.budget.planned_bytes and len(made) == 3
    for count, num_rows in ((1, 2), (3, 2), (0, 1)):
        made.clear()
        with pytest.raises(CacheError, match=f"stacked takes num_rows = {num_rows}"):
            PlannedCache.stacked(prefilled(count), num_rows)
