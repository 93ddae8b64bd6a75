"""Plans by arithmetic alone: the papers' settings for their models, as they are checked in."""

from __future__ import annotations

from pathlib import Path

import pytest

from qpkv_planner.uniform import uniform_plan
from qpkv_runtime.models.aliases import KNOWN_MODELS
from qpkv_runtime.plan import load_plan

PLANS = sorted((Path(__file__).parents[1] / "plans" / "paper").glob("*.yaml"))


def test_every_model_of_the_paper_has_its_plans():
    names = {tuple(path.stem.split("__")) for path in PLANS}
    models = ("llama-3.2-1b", "llama-3.2-3b", "llama-3-8b", "llama-3-70b", "mistral-7b")
    assert names == {(m, b, s) for m in models for b in ("1-16", "1-64") for s in ("snapkv", "pyramidkv")}


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_a_paper_plan_is_what_its_command_makes(path):
    model, budget, scorer = path.stem.split("__")
    plan = load_plan(path)
    assert not plan.calibrated and plan.calibration is None
    assert plan.model.shape == KNOWN_MODELS[model].shape
    again = uniform_plan(
        model,
        budget.replace("-", "/"),
        f"{scorer}:kivi:4bit",
        context_tokens=plan.budget.context_tokens,
        sinks=0,
        window=plan.window,
    )
    assert again.to_yaml() == path.read_text(encoding="utf-8")
    tokens = [layer.tokens for layer in plan.layers]
    assert plan.scorer.name == "snapkv"
    if scorer == "pyramidkv":
        assert tokens == sorted(tokens, reverse=True) and tokens[0] > 4 * tokens[-1]
    else:
        assert max(tokens) - min(tokens) <= 8
