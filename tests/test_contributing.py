"""CONTRIBUTING's steps, followed with toy methods: a row, a class, the registry, and all else knows the method."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_space, prompts

from qpkv_planner import allocation
from qpkv_planner.allocation import uniform
from qpkv_runtime import methods, overview, quantizers, scorers
from qpkv_runtime.cache import PlannedCache
from qpkv_runtime.ledger import make_ledger
from qpkv_runtime.methods import Parameter, QuantizerFacts, ScorerFacts
from qpkv_runtime.plan import Decode, Scorer, parse_plan
from qpkv_runtime.quantizers import GroupQuantizer, min_max

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("method", ["scorer", "quantizer"])
def test_a_method_takes_at_most_six_steps_in_places_that_exist(method):
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.split(f"## Add a {method}\n")[1].split("\n## ")[0]
    steps = re.findall(r"^(\d)\. ", section, flags=re.M)
    assert steps == [str(i + 1) for i in range(len(steps))] and 3 <= len(steps) <= 6
    for file in re.findall(r"`((?:qpkv_runtime|tests)/[\w./]+)`", section):
        assert (ROOT / file).exists(), file
    for name in set(re.findall(r"`([A-Z][A-Z_]+)`", section)):
        assert any(hasattr(module, name) for module in (methods, scorers, quantizers)), name


def test_the_presets_that_are_shown_are_the_planners():
    assert list(methods.PRESETS) == list(allocation.PRESETS)
    for name, facts in methods.PRESETS.items():
        settings = list(inspect.signature(allocation.PRESETS[name]).parameters.values())[2:]  # after space and format
        assert {one.name: one.default for one in settings} == {k: p.default for k, p in facts.parameters.items()}


class EveryNth:
    """A toy scorer: every n-th token, the older the better."""

    def score(self, prefill, parameters):
        positions = prefill.positions
        scores = -positions.float() - 1e6 * (positions % int(parameters["n"]) != 0)
        return scores.expand(-1, prefill.key.shape[1], -1)


def test_a_toy_scorer_is_known_everywhere_after_its_row_class_and_registration(monkeypatch):
    facts = ScorerFacts("a toy", ("positions",), {"n": Parameter(3, minimum=1)})
    monkeypatch.setitem(methods.SCORERS, "every_nth", facts)
    monkeypatch.setitem(scorers.SCORERS, "every_nth", EveryNth())
    model = make_model("llama")
    space = make_space(model, "1/4", scorer=Scorer(name="every_nth"), sinks=0, window=1)
    plan = space.plan(uniform(space, "16bit"))
    plan = parse_plan(plan.to_yaml())
    assert plan.scorer.parameters == {"n": 3}
    cache = PlannedCache.from_plan(plan, model)
    with torch.no_grad():
        model(prompts(1, 90), past_key_values=cache)
        assert bool(model(prompts(1, 1), past_key_values=cache).logits.isfinite().all())
    assert cache.allocated_bytes == plan.budget.planned_bytes
    assert re.search(r"every_nth +positions +n 3 +a toy", overview.methods_text())


class HalfRange(GroupQuantizer):
    """A toy quantizer: min-max of the group with its range halved around the middle."""

    @staticmethod
    def fit(groups, member, bits, number):
        scale, zero = min_max(groups, member, bits, number).float().unbind(-1)
        zero = zero + scale * (2**bits - 1) / 4
        return torch.stack([scale / 2, zero], -1).to(number)


def test_a_toy_quantizer_is_weighed_stored_and_shown_after_its_row_class_and_registration(monkeypatch):
    facts = QuantizerFacts("a toy", (4, 2), "channel", numbers_per_group=2, group=32)
    monkeypatch.setitem(methods.QUANTIZERS, "half", facts)
    monkeypatch.setitem(quantizers.KEY_QUANTIZERS, "half", HalfRange("channel"))
    monkeypatch.setitem(quantizers.VALUE_QUANTIZERS, "half", HalfRange("token"))
    model = make_model("llama")
    space = make_space(model, "1/4", decode=Decode(reserve_tokens=8, format="flexgen-k4v4"))
    plan = parse_plan(space.plan(uniform(space, "half-k4v2")).to_yaml())
    assert plan.formats["half-k4v2"].keys.group == 32
    cache = PlannedCache.from_plan(plan, model)
    with torch.no_grad():
        model(prompts(1, 90), past_key_values=cache)
        assert bool(model(prompts(1, 1), past_key_values=cache).logits.isfinite().all())
    assert cache.allocated_bytes == make_ledger(plan).stored_bytes
    packed = cache.layers[0].packed()
    keys, *_ = packed.read(0, packed.table()[:, :, 0], {})
    assert keys.unique().numel() > 4
    assert re.search(
        r"half +4, 2 +nothing +keys channel, values token +group 32 +keys 1, values 1", overview.methods_text()
    )
