"""The promises on real weights (tiny and smollm2), and the plans we ship."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import keep_all, lossless_space, random_plan
from transformers import DynamicCache

from qpkv_planner.allocation import Space, allocation_of
from qpkv_runtime.cache import PlannedCache
from qpkv_runtime.models import load_model, model_identity
from qpkv_runtime.plan import Plan, load_plan

FOLDER = Path(__file__).parents[1] / "plans"
PLANS = sorted([*FOLDER.glob("*.yaml"), *FOLDER.glob("2048/*.yaml")])
TEXT = (Path(__file__).parents[1] / "qpkv_runtime" / "sample_prompt.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module", params=["tiny", pytest.param("smollm2", marks=pytest.mark.smollm2)])
def loaded(request):
    return load_model(request.param, dtype="float32")


def prompt(tokenizer, tokens: int) -> torch.Tensor:
    return tokenizer(TEXT, return_tensors="pt").input_ids[:, :tokens]


def test_keeping_everything_gives_the_greedy_tokens_of_dynamic_cache(loaded):
    model, tokenizer = loaded
    ids = prompt(tokenizer, 90)
    greedy = {"do_sample": False, "max_new_tokens": 12, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    ours = model.generate(ids, past_key_values=PlannedCache.from_plan(keep_all(lossless_space(model)), model), **greedy)
    assert torch.equal(ours, model.generate(ids, past_key_values=DynamicCache(config=model.config), **greedy))


@pytest.mark.parametrize("seed", [0, 1])
def test_random_plans_stay_inside_their_bytes_past_the_reserve(loaded, seed):
    model, tokenizer = loaded
    plan = random_plan(model, seed, "1/2")
    cache = PlannedCache.from_plan(plan, model)
    with torch.no_grad():
        logits = model(prompt(tokenizer, 96), past_key_values=cache).logits
        for _ in range(plan.decode.reserve_tokens + 2):
            assert cache.allocated_bytes == plan.budget.planned_bytes <= plan.budget.limit_bytes
            logits = model(logits[:, -1:].argmax(-1), past_key_values=cache).logits
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("path", PLANS, ids=lambda path: str(path.relative_to(FOLDER)))
def test_a_shipped_plan_round_trips_and_weighs_exactly_what_it_claims(path):
    plan = load_plan(path)
    assert plan.to_yaml() == path.read_text(encoding="utf-8")
    assert plan.calibrated
    spent, space = plan.budget.planned_bytes, Space.of_plan(plan)
    for layer, choice in enumerate(allocation_of(plan)):
        more = space.one_more(layer, choice)
        if more is not None:
            cost = space.layer_bytes(layer, more) - space.layer_bytes(layer, choice)
            assert spent + cost > plan.budget.limit_bytes, f"layer {layer} could take one more quantum"


@pytest.mark.smollm2
def test_the_shipped_plans_are_for_these_weights_and_run():
    model, tokenizer = load_model("smollm2", dtype="float32")
    weights = model_identity(model, tokenizer).weights_hash
    plans: list[Plan] = [plan for plan in map(load_plan, PLANS) if plan.model.id == "smollm2"]
    assert plans
    for plan in plans:
        assert plan.model.weights_hash == weights
        cache = PlannedCache.from_plan(plan, model)
        with torch.no_grad():
            model(prompt(tokenizer, 400), past_key_values=cache)
            logits = model(prompt(tokenizer, 1), past_key_values=cache).logits
        assert cache.allocated_bytes == plan.budget.planned_bytes
        assert bool(logits.isfinite().all())
