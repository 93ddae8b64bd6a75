"""The planner: its data, its measurements, its search on a small scale, and the command."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_search import SMALL, Command

import qpkv_planner
from qpkv_planner import cli, options
from qpkv_planner.allocation import Choice, Space, allocation_of, uniform
from qpkv_planner.calibration import CONTINUATION_TOKENS, FACTS, WORDS, Data, make_split, make_splits
from qpkv_planner.files import check_writable, write_whole
from qpkv_planner.grid import FORMATS, make_grid, make_setting, setting_named, with_format
from qpkv_planner.heads import measure_heads
from qpkv_planner.knapsack import Option, _solve
from qpkv_planner.linearization import SCALES, _gradients, _outputs, predicted_changes, sample_changes
from qpkv_planner.measurement import Change, Evaluator, Losses, interval
from qpkv_planner.one_row import Attended
from qpkv_planner.prefill import ANSWERABLE_NATS, ContextRun, prepare
from qpkv_planner.session import describe
from qpkv_planner.stages import Candidate, _winner
from qpkv_planner.texts import SPLITS, references, speeches
from qpkv_runtime.cache import PlannedCache, layer_parts
from qpkv_runtime.compression import Scoring
from qpkv_runtime.errors import InputError, NumericsError
from qpkv_runtime.ledger import make_ledger
from qpkv_runtime.models import load_model, load_tokenizer, model_shape
from qpkv_runtime.plan import UNIFORM, Decode, Heads, Scorer, load_plan, parse_plan

TOKENS = 384
SCORERS = ("snapkv", "h2o", "criticalkv", "expected_attention")


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny", dtype="float32")


@pytest.fixture(scope="module")
def search_split(tiny):
    return make_split(tiny[1], "search", 3, TOKENS, seed=0)


@pytest.fixture(scope="module")
def space(tiny, search_split):
    return Space(
        model=describe(*tiny, "tiny", search_split.contexts[0]),
        requested="1/8",
        context_tokens=TOKENS,
        scorer=Scorer(name="snapkv"),
        sinks=4,
        window=16,
        decode=Decode(reserve_tokens=4, format="rotated-k4v4"),
    )


@pytest.fixture(scope="module")
def prepared(tiny, search_split):
    scorings = [Scoring.of(Scorer(name=name), 4, 16) for name in SCORERS]
    return prepare(tiny[0], model_shape(tiny[0]), "float16", search_split, scorings, 3, lambda: None)


# --- calibration ---


def test_splits_share_no_text_no_name_no_value_and_no_wording():
    for kind in (speeches, references):
        parts = [set(kind(split)) for split in SPLITS]
        assert all(parts)
        assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    for one, other in (("search", "validation"), ("search", "test"), ("validation", "test")):
        for words in WORDS[one]:
            assert not set(WORDS[one][words].split()) & set(WORDS[other].get(words, "").split())
        assert not {f.statement for f in FACTS[one]} & {f.statement for f in FACTS[other]}


@pytest.mark.parametrize("model", ["tiny", pytest.param("smollm2", marks=pytest.mark.smollm2)])
def test_calibration_is_deterministic_fits_the_length_and_holds_its_facts(model):
    tokenizer = load_tokenizer(model)
    split = make_split(tokenizer, "validation", 3, 512, seed=1)
    assert split.hash == make_split(tokenizer, "validation", 3, 512, seed=1).hash
    assert split.hash != make_split(tokenizer, "validation", 3, 512, seed=2).hash
    for context in split.contexts:
        document = tokenizer.decode(list(context.tokens))
        for sample in context.samples:
            assert len(context.tokens) + len(sample.prompt) + len(sample.continuation) <= 512 + CONTINUATION_TOKENS
            if sample.kind != "text":
                assert tokenizer.decode(list(sample.continuation)).strip() in document


def test_a_context_too_short_for_its_questions_is_refused():
    with pytest.raises(InputError, match="room for text"):
        make_split(load_tokenizer("tiny"), "search", 1, 150, seed=0)


# --- measurement ---


def test_cached_prefill_gives_bitwise_the_kept_tokens_and_codes_of_a_fresh_one(tiny, space, search_split, prepared):
    """The runtime's own prefill and compression, on the very tensors that the planner stored."""
    model = tiny[0]
    formats = [
        "16bit",
        "rotated-k4v2",
        "kivi-k4v4",
        "flexgen-k3v2",
        "rotated-k3v3",
        "rotated-k8v8",
        "kivi-k2v3",
        "16bit",
    ]
    allocation = tuple(Choice(space.legal_tokens(i, 60 + 10 * i, format), format) for i, format in enumerate(formats))
    parts = layer_parts(model)
    weighted = Heads(share="weighted", weights=(4.0, 1.0, 2.0, 1.0))
    for scorer, heads in zip(SCORERS, (Heads(share="uniform"), Heads(share="adaptive"), weighted) * 2, strict=False):
        scored = replace(space, scorer=Scorer(name=scorer), heads=heads)
        plan = scored.probe(allocation)
        evaluator = Evaluator(model, prepared)
        row = 0
        for index in (0, 1, 2):  # parts of one context each, in this order
            run = ContextRun(model, space.shape, search_split.contexts[index], parts)
            for sample in range(len(search_split.contexts[index].samples)):
                expected = prepared.targets[min(row, len(prepared) - 1)]
                if search_split.contexts[index].samples[sample].continuation != expected:
                    continue  # left out: the full cache cannot answer it
                fresh = PlannedCache(plan, [torch.device("cpu")] * space.shape.num_layers, parts)
                blocks = evaluator.blocks(scored, plan, allocation, fresh.ledger.layers, [index])
                for layer, (cached, block) in enumerate(zip(fresh.layers, blocks, strict=True)):
                    prefill = run.prefill(layer, sample)
                    cached.prefill(prefill.query, prefill.key, prefill.value, None, prefill.scaling, None)
                    in_part = row - prepared.part_starts[index]
                    assert torch.equal(fresh.arena.block(layer)[0], block[in_part]), (scorer, layer)
                row += 1
        assert row == len(prepared)


def test_head_weights_are_the_attention_that_finds_the_needle(tiny, search_split):
    """Against transformers' own eager attention over prompt and answer in one forward, head by head in float64."""
    model, shape = tiny[0], model_shape(tiny[0])
    split = replace(search_split, contexts=search_split.contexts[:1])
    found = measure_heads(model, shape, split)
    assert found == measure_heads(model, shape, split)
    (context,), run = split.contexts, ContextRun(model, shape, split.contexts[0])
    scores = np.zeros((shape.num_layers, shape.num_query_heads))
    model.set_attn_implementation("eager")
    num_needles = 0
    for sample, logprobs in zip(context.samples, run.logprobs, strict=True):
        answer = torch.tensor(sample.continuation)
        if sample.needle is None or -logprobs.gather(1, answer[:, None]).mean() > ANSWERABLE_NATS:
            continue
        start, end = sample.needle
        statement = tiny[1].decode(list(context.tokens[start:end]))
        assert tiny[1].decode(list(sample.continuation)).strip() in statement and statement.endswith(".")
        tokens = context.tokens + sample.prompt + sample.continuation[:-1]
        with torch.no_grad():
            layers = model(torch.tensor([tokens]), output_attentions=True).attentions
        num_needles += 1
        for layer, attention in enumerate(layers):
            for head in range(shape.num_query_heads):
                for query in attention[0, head, -len(answer) :].double().numpy():
                    top = np.argsort(-query, kind="stable")[: end - start]
                    scores[layer, head] += sum(query[j] for j in top if start <= j < end) / len(answer)
    model.set_attn_implementation("qpkv")
    assert num_needles >= 2
    for heads, per_query_head in zip(found, scores, strict=True):
        per_head = per_query_head.reshape(shape.num_kv_heads, -1).mean(1)
        assert np.allclose(heads.weights, per_head / per_head.sum(), atol=2e-4)
    assert max(max(heads.weights) for heads in found) > 0.4, "some heads find needles and others do not"


def test_the_gradient_tells_what_a_push_to_a_layers_output_does(tiny, space, prepared):
    """Of the last layer, behind which nothing is rounded: exactly; the samples of one part, one by one."""
    evaluator, allocation, rows = Evaluator(tiny[0], prepared), uniform(space, "rotated-k3v3"), [0]
    attended, gradients = _gradients(evaluator, space, allocation, "ce", rows)
    assert len(attended) == len(gradients) == 8
    push = 0.03 * torch.randn(gradients[-1].shape, generator=torch.Generator().manual_seed(0))

    def losses(sign: int) -> torch.Tensor:
        calls = []

        def watch(what: Attended, out: torch.Tensor) -> torch.Tensor:
            calls.append(what)
            return out + sign * push if len(calls) == len(allocation) else out

        cache = evaluator.cache(space, allocation, rows)
        return evaluator.sample_losses(evaluator.forward(cache, evaluator.rows(rows), watch), evaluator.rows(rows))[
            "ce"
        ]

    with torch.no_grad():
        change = (losses(1) - losses(-1)) / 2
    predicted = (push * gradients[-1]).sum((1, 2, 3)).double()
    assert (change - predicted).abs().max() < 0.1 * change.abs().max()


def test_predicted_changes_tell_the_layers_that_matter(tiny, space, prepared):
    """Halving each layer, predicted without a forward and measured with one."""
    evaluator, allocation = Evaluator(tiny[0], prepared), uniform(space, "rotated-k3v3")
    halves = [
        Choice(space.legal_tokens(i, mine.tokens / 2, mine.format), mine.format) for i, mine in enumerate(allocation)
    ]
    predicted = predicted_changes(evaluator, space, allocation, [[half] for half in halves], "kl")
    before, measured = evaluator.evaluate(space, allocation), []
    for layer, half in enumerate(halves):
        after = evaluator.evaluate(space, (*allocation[:layer], half, *allocation[layer + 1 :]))
        measured.append(Change.of(after.kl - before.kl, after.kinds).mean)
    found = [changes[half][0].mean for changes, half in zip(predicted, halves, strict=True)]
    assert np.corrcoef(found, measured)[0, 1] > 0.9


def test_a_head_is_predicted_to_change_what_it_changes_alone(tiny, space, prepared):
    """The second head of a layer at 32 tokens of 48: as part of the layer's, and with the others left at 48."""
    evaluator, parts, layer = Evaluator(tiny[0], prepared), (0, 1, 2), 3
    even = tuple(Choice(48, "rotated-k4v4") for _ in range(space.shape.num_layers))
    fewer = [[Choice(32, "rotated-k4v4")]] * len(even)
    by_head = sample_changes(evaluator, space, even, fewer, "kl", parts)[layer][0]
    alone = Heads(share="weighted", alpha=0.0, weights=(28.0, 12.0, 28.0, 28.0))
    other = replace(space, heads=tuple(alone if i == layer else UNIFORM for i in range(len(even))))
    assert other.tokens_of_heads(layer, Choice(44, "rotated-k4v4")) == (48, 32, 48, 48)
    changed = (*even[:layer], Choice(44, "rotated-k4v4"), *even[layer + 1 :])
    attended, gradients = _gradients(evaluator, space, even, "kl", parts)
    for scale in SCALES[1:]:
        gradients[layer] += _gradients(evaluator, space, space.scaled(even, scale), "kl", parts)[1][layer]
    before = _outputs(evaluator, space, even, [layer], attended, parts)[layer]
    after = _outputs(evaluator, other, changed, [layer], attended, parts)[layer]
    expected = ((after - before) * gradients[layer]).sum((1, 2, 3)) / len(SCALES)
    assert np.allclose(by_head[:, 1], expected.double().numpy(), rtol=1e-3, atol=1e-7)
    assert np.abs(by_head[:, 1]).max() > 1e-4


def test_what_a_layer_keeps_already_is_predicted_to_change_nothing_and_nothing_is_predicted_twice(
    tiny, space, prepared, monkeypatch
):
    evaluator, allocation = Evaluator(tiny[0], prepared), uniform(space, "rotated-k3v3")
    alternatives = [[mine] for mine in allocation]
    first = predicted_changes(evaluator, space, allocation, alternatives, "kl")
    assert all(change == ((0, 0),) for changes in first for change in changes.values())
    spent = evaluator.spent
    monkeypatch.setattr(Evaluator, "forward", None)
    assert predicted_changes(evaluator, space, allocation, alternatives, "kl") == first
    assert evaluator.spent == 2 * spent, "a resumed search counts what it asks for"


@pytest.mark.parametrize("share", ["uniform", "weighted", "adaptive"])
@pytest.mark.parametrize("tokens", [40, 350])
@pytest.mark.parametrize(
    "format", ["rotated-k4v2", "rotated-k3v3", "kivi-k4v4", "flexgen-k3v2", "mikv-k4v8", "hqq-k4v4"]
)
def test_values_coded_before_it_is_known_which_are_kept_give_the_same_blocks(
    tiny, space, prepared, format, tokens, share
):
    weights = (4.0, 1.0, 2.0, 1.0) if share == "weighted" else None
    space = replace(space, requested="1/2", heads=Heads(share=share, weights=weights))
    plan = space.probe(tuple(Choice(space.legal_tokens(i, tokens, format), format) for i in range(8)))
    scoring, layers = Scoring.of(space.scorer, space.sinks, space.window), make_ledger(plan).layers
    one_by_one, at_once = Evaluator(tiny[0], prepared, memo_bytes=0), Evaluator(tiny[0], prepared)
    at_once._num_coded = {(own.layer, 1, f.values): 2**40 for own in layers for f in own.tier_formats}
    for layout in layers:
        blocks = [evaluator._compress(plan, scoring, layout, 1) for evaluator in (one_by_one, at_once)]
        assert torch.equal(*blocks)
    assert not one_by_one._coded and len(at_once._coded) == (0 if format == "hqq-k4v4" else len(layers))


def test_values_are_coded_at_once_when_that_pays_and_while_they_fit(tiny, space, prepared):
    space = replace(space, requested="1/20")
    plan = space.probe(uniform(space, "rotated-k3v3"))
    scoring, layout = Scoring.of(space.scorer, space.sinks, space.window), make_ledger(plan).layers[0]
    evaluator, without_room = Evaluator(tiny[0], prepared), Evaluator(tiny[0], prepared, memo_bytes=0)
    times = 0
    while not evaluator._coded:
        for one in (evaluator, without_room):
            one._compress(plan, scoring, layout, 0)
        times += 1
    (num_coded,), (coded,) = evaluator._num_coded.values(), evaluator._coded.values()
    num_values = coded.codes.shape[0] * (coded.codes.shape[1] - 1)
    assert times > 1 and num_coded > num_values >= num_coded - num_coded / times
    assert not without_room._coded


def test_what_is_measured_is_what_the_runtime_does(tiny, space, search_split, prepared):
    """Cross-entropy of one sample by the planner, and by prefill and forward through a PlannedCache."""
    model = tiny[0]
    allocation = uniform(space, "rotated-k4v4")
    plan = space.plan(allocation)
    losses = Evaluator(model, prepared).evaluate(space, allocation)
    for row, context in ((0, 0), (len(prepared) - 1, 2)):
        sample = search_split.contexts[context].samples[0 if row == 0 else -1]
        prompt = torch.tensor([search_split.contexts[context].tokens + sample.prompt])
        cache = PlannedCache.from_plan(plan, model)
        with torch.no_grad():
            model(prompt[:, :-1], past_key_values=cache)
            ids = torch.tensor([(sample.prompt[-1], *sample.continuation[:-1])])
            logits = model(ids, past_key_values=cache).logits[0]
        ce = torch.nn.functional.cross_entropy(logits, torch.tensor(sample.continuation)).item()
        assert ce == pytest.approx(losses.ce[row], rel=0.02, abs=2e-3), "the prefill is split in two in the planner"


def test_keeping_everything_costs_nothing(tiny, space, prepared):
    everything = [Choice(TOKENS, "16bit")] * space.shape.num_layers
    roomy = replace(space, decode=Decode(reserve_tokens=16, format="16bit"))
    losses = Evaluator(tiny[0], prepared).evaluate(roomy, tuple(everything))
    assert losses.kl.max() < 1e-3
    assert losses.mean("ce") == pytest.approx(Evaluator(tiny[0], prepared).full().mean("ce"), abs=1e-3)


def test_nan_in_the_model_ends_the_measurement(search_split):
    model, _ = load_model("tiny", dtype="float32")
    with torch.no_grad():
        model.get_decoder().norm.weight[0] = float("nan")
    with pytest.raises(NumericsError, match=r"its loss on a .* sample is NaN"):
        prepare(model, model_shape(model), "float16", search_split, [], 3, lambda: None)


def test_nan_under_a_plan_names_the_layer_and_the_plan(space, search_split, prepared):
    model, _ = load_model("tiny", dtype="float32")
    with torch.no_grad():
        model.get_decoder().layers[5].mlp.down_proj.weight[0] = float("nan")
    allocation = uniform(space, "rotated-k4v4")
    plan = space.probe(allocation)
    line = rf"layer 5 must give finite .* {plan.policy_hash} \(snapkv; this layer \d+ tokens in rotated-k4v4\)"
    with pytest.raises(NumericsError, match=line):
        Evaluator(model, prepared).evaluate(space, allocation)


def test_a_calibration_file_that_is_no_text_names_the_line(tmp_path):
    (tmp_path / "notes.txt").write_bytes(b"one\ntwo\nthree \xff\n")
    with pytest.raises(InputError, match=r"notes.txt:3 must be UTF-8 text, got byte 0xff"):
        make_splits(load_tokenizer("tiny"), {"search": 1}, 256, 0, Data(file=tmp_path / "notes.txt"))


@pytest.mark.parametrize(("projection", "tensor"), [("k_proj", "key"), ("v_proj", "value")])
def test_nan_in_what_is_to_be_quantized_names_layer_and_tensor(search_split, projection, tensor):
    model, _ = load_model("tiny", dtype="float32")
    with torch.no_grad():
        getattr(model.get_decoder().layers[2].self_attn, projection).weight[0, 0] = float("nan")
    with pytest.raises(NumericsError, match=f"layer 2: {tensor} must be finite to be stored, but has NaN or Inf"):
        prepare(model, model_shape(model), "float16", search_split, [], 3, lambda: None)


def test_intervals_are_over_contexts_and_paired():
    kinds, contexts = ("a", "b") * 20, tuple(i // 4 for i in range(40))
    noise = np.random.default_rng(0).normal(size=40) + np.repeat(np.arange(10), 4)
    one = Losses(noise + 0.3, noise, noise > 0, kinds, contexts)
    other = Losses(noise, noise, noise > 0, kinds, contexts)
    alone, paired = interval(one, "ce"), interval(one, "ce", minus=other)
    assert alone.high - alone.low > 1
    assert paired.mean == pytest.approx(0.3) and paired.high - paired.low < 1e-6
    assert alone.mean == pytest.approx(one.mean("ce"), abs=1e-6)


def test_texts_have_no_exact_answer():
    kinds, contexts = ("line", "text") * 20, tuple(i // 4 for i in range(40))
    hits, misses = np.arange(40) % 2 == 0, np.zeros(40, dtype=bool)
    one, other = (Losses(np.ones(40), np.ones(40), exact, kinds, contexts) for exact in (hits, misses))
    assert one.mean("exact") == 1.0
    gain = interval(one, "exact", minus=other)
    assert (gain.low, gain.mean, gain.high) == (1.0, 1.0, 1.0)


def test_a_kind_of_one_sample_is_no_certainty():
    changes = np.array([5.0, -3.0, -3.0, 2.0])
    alone = Change.of(changes, ["a", "b", "c", "d"])
    assert alone.mean == 0.25 and alone.error == pytest.approx(changes.std() / 2)


# --- search ---


@pytest.mark.parametrize("num_units", [1, 2])
def test_the_knapsack_is_solved_exactly(space, num_units):
    """Against brute force: in each layer a format, and for each of its units a count in that format."""
    chance = np.random.default_rng(3)
    num_layers = space.shape.num_layers if num_units == 1 else 4
    legal = [Choice(tokens, format) for format in ("rotated-k4v4", "rotated-k3v3") for tokens in (24, 64)]
    layers = [
        [Option(one, (one.tokens,) * num_units, tuple(chance.normal(size=num_units).tolist())) for one in legal]
        for _ in range(num_layers)
    ]
    small = replace(space, requested=f"{int(num_layers * space.layer_bytes(0, legal[1]) * 0.7)}B")
    formats, tokens, change = _solve(small, layers)

    def ways(options: list[Option]) -> list[tuple[float, float]]:
        """(bytes, change) of everything a layer could have."""
        found = []
        for format in ("rotated-k4v4", "rotated-k3v3"):
            alike = [option for option in options if option.choice.format == format]
            for picks in itertools.product(alike, repeat=num_units):
                weight = sum(small.layer_bytes(0, option.choice) for option in picks) / num_units
                found.append((weight, sum(option.changes[unit] for unit, option in enumerate(picks))))
        return found

    best = min(
        sum(change for _, change in picks)
        for picks in itertools.product(*map(ways, layers))
        if sum(weight for weight, _ in picks) <= small.limit_bytes
    )
    assert change == pytest.approx(best)
    weights = [
        sum(small.layer_bytes(0, Choice(count, format)) for count in of_layer) / num_units
        for format, of_layer in zip(formats, tokens, strict=True)
    ]
    assert sum(weights) <= small.limit_bytes


def test_heads_get_the_counts_that_were_wished_for(space):
    """In whole quanta, whatever the ratio between them, and in the plan."""
    even = uniform(space, "rotated-k4v4")
    forced, spare = space.sinks + space.window, min(choice.tokens for choice in even) - space.sinks - space.window
    assert space.shape.num_kv_heads == 4 and spare >= 12
    wish = [forced, forced + 4 * (spare // 12), forced + 4 * (spare // 8), forced + 4 * (spare // 4)]
    wish[0] += -sum(wish) % 16  # whole quanta of the mean
    found_space, found = space.divided([wish] * len(even), [choice.format for choice in even])
    assert found_space.bytes(found) <= space.limit_bytes
    held = found_space.tokens_of_heads(len(even) - 1, Choice(sum(wish) // 4, "rotated-k4v4"))
    assert list(held) == wish
    plan = found_space.plan(found)
    assert parse_plan(plan.to_yaml()) == plan
    assert plan.holdings(0)[0][1] == found_space.tokens_of_heads(0, found[0])


def test_a_setting_that_cannot_hold_its_window_gets_a_smaller_one_by_name(space):
    small = replace(space, requested="1/20")
    made = make_setting(small, "uniform", "16bit", None)
    assert "window 8" in made.name and made.space.window == 8
    assert made.space.bytes(made.allocation) <= made.space.limit_bytes


@pytest.mark.parametrize("budget", ["1/4", "1/16"])
def test_a_settings_name_makes_it_again(space, budget):
    """From the space of a plan of another format, whose reserve is of that."""
    small = with_format(replace(space, requested=budget, window=4), "rotated-k4v2", None)
    names = []
    for made in make_grid(small, options.SCORERS, FORMATS, None):
        again = setting_named(small, made.name)
        assert (again.space, again.allocation) == (made.space, made.allocation), made.name
        names.append(made.name)
    assert ("sinks 2" in " ".join(names)) == (budget == "1/16")
    with pytest.raises(InputError, match="a uniform setting is named like"):
        setting_named(small, "the best one")


@pytest.fixture(scope="module")
def planned(tiny):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(options, "QUICK", SMALL)
        return qpkv_planner.plan(*tiny, "1/16", name="tiny", context_tokens=TOKENS, quick=True, quiet=True)


def test_the_plan_fits_is_calibrated_and_round_trips(planned):
    budget = planned.budget
    assert budget.limit_bytes == budget.full_bytes // 16
    assert budget.planned_bytes <= budget.limit_bytes
    assert parse_plan(planned.to_yaml()) == planned
    measured = planned.calibration
    assert planned.calibrated and measured is not None
    for loss in (measured.cross_entropy, measured.kl):
        for one in (loss.full, loss.plan, loss.best_uniform):
            assert one.low <= one.mean <= one.high
    finalists = {final["stage"]: final["kl"] + final["cross_entropy"] for final in measured.search["finalists"]}
    shipped = measured.kl.plan.mean + measured.cross_entropy.plan.mean
    assert shipped == pytest.approx(finalists[measured.winner], abs=1e-5)
    assert shipped <= measured.kl.best_uniform.mean + measured.cross_entropy.best_uniform.mean
    assert {row["setting"] for row in measured.search["grid"]} >= {measured.best_uniform}
    limit = budget.limit_bytes
    assert all(row["bytes"] <= limit for row in measured.search["grid"])


@pytest.mark.parametrize(
    ("losses", "winner"),
    [
        # a sample each of four contexts; the last is of a search that was stopped early
        ({"a setting": [9, 9, 9, 9], "knapsack": [1, 2, 3, 4], "search": [2, 3, 4, 5]}, "knapsack"),  # better
        ({"a setting": [9, 9, 9, 9], "knapsack": [5, 1, 1, 5], "search": [2, 3, 4, 5]}, "search"),  # or luckier
        ({"a setting": [5, 1, 1, 5], "knapsack": [9, 9, 9, 9], "search": [2, 3, 4, 5]}, "a setting"),
        ({"a setting": [2, 3, 4, 5], "knapsack": [9, 9, 9, 9], "search": [2, 3, 4, 5]}, "search"),
        ({"a setting": [9, 9, 9, 9], "half knapsack": [1, 1, 1, 1], "knapsack": [2, 2, 2, 2]}, "half knapsack"),
        ({"a setting": [9, 9, 9, 9], "mean of trials": [2, 2, 2, 3], "search": [1, 4, 1, 2]}, "mean of trials"),
        ({"a setting": [5, 1, 1, 5], "elimination": [5, 1, 1, 4], "uniform": [9, 9, 9, 9]}, "elimination"),
    ],
)  # fmt: skip
def test_the_search_ships_unless_others_are_better_by_more_than_chance(space, losses, winner):
    def final(stage, values):
        values = np.array(values, dtype=float)
        measured = Losses(values, values, values > 0, ("text",) * len(values), tuple(range(len(values))))
        return Candidate(stage, space, ()), measured

    assert _winner([final(*one) for one in losses.items()])[0].stage == winner


def test_no_layer_of_the_plan_can_take_one_more_quantum(planned):
    space = Space.of_plan(planned)
    allocation = allocation_of(planned)
    spent = space.bytes(allocation)
    for layer, choice in enumerate(allocation):
        more = space.one_more(layer, choice)
        if more is not None:
            cost = space.layer_bytes(layer, more) - space.layer_bytes(layer, choice)
            assert spent + cost > planned.budget.limit_bytes


def test_the_command_gives_the_same_yaml_as_the_function_byte_for_byte(planned, tmp_path):
    arguments = ["--model", "tiny", "--dtype", "float32", "--budget", "1/16", "--quick"]
    status, out, errors = Command(tmp_path, [*arguments, "--context-length", str(TOKENS)]).wait()
    assert status == 0 and out == planned.to_yaml()
    assert "best uniform" in errors


# --- the command ---


def run(*arguments: str) -> int:
    return cli.main(list(arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no-such-model", "--budget", "1/64"], "no-such-model"),
        (["--model", "tiny", "--budget", "half"], "a budget is written as"),
        (["--model", "tiny", "--budget", "1/4000"], "at least"),
        (["--model", "tiny", "--budget", "1/8", "--context-length", "100000"], "4096"),
        (["--model", "tiny", "--budget", "1/8", "--window", "0"], "--window"),
        (["--model", "tiny", "--budget", "1/8", "--output", "no/such/directory/plan.yaml"], "existing directory"),
        (["--model", "tiny", "--budget", "1/8", "--output", "/"], "--output must be a file in an existing directory"),
        (["--model", "tiny", "--budget", "1/8", "--seed", "-1"], "seed must be 0 to 4294967295, got -1"),
        (["--model", "tiny", "--budget", "1/8", "--study", __file__], "--study must be a folder"),
        (["--model", "tiny", "--budget", "1/8,1/16", "--out-dir", __file__], "--out-dir must be a folder"),
        (["--model", "tiny", "--budget", "1/8", "--search-length", "0"], "search length must be 1 to"),
        (["--model", "mistral-7b", "--budget", "1/64", "--uniform", "snapkv:kiwi:4bit"], "quantizer must be one of"),
        (["--model", "mistral-7b", "--budget", "1/64", "--uniform", "snapkv:kivi:5bit"], "kivi writes"),
    ],
)
def test_bad_input_gives_one_line_status_2_and_nothing_on_stdout(arguments, message, capsys):
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err and err.count("\n") == 1 and err.startswith("qpkv-plan: error: ")


def test_what_is_there_and_is_no_file_is_written_to(tmp_path):
    plan, link, pipe = tmp_path / "plan.yaml", tmp_path / "link.yaml", tmp_path / "pipe"
    link.symlink_to(plan)
    write_whole(link, "one")
    assert link.is_symlink() and plan.read_text() == "one"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as reader:
        read = reader.submit(pipe.read_text)
        check_writable("--output", pipe)
        write_whole(pipe, "two")
        assert read.result(10) == "two" and pipe.is_fifo()
    out, into = os.pipe()
    stream = Path(f"/dev/fd/{into}")
    check_writable("--output", stream)
    write_whole(stream, "three")
    assert os.read(out, 99) == b"three"


@pytest.mark.parametrize("option", [["--trials", "3"], ["--quick"], ["--timeout", "9"], ["--report", "a.html"]])
def test_a_uniform_setting_has_no_use_for_a_searchs_options(option, capsys):
    assert run("--model", "mistral-7b", "--budget", "1/64", "--uniform", "snapkv:kivi:4bit", *option) == 2
    assert f"{option[0]} is of a search" in capsys.readouterr().err


def test_uniform_plans_of_known_models_need_no_weights(capsys, tmp_path):
    arguments = ["--model", "mistral-7b", "--budget", "1/64", "--uniform", "snapkv:kivi:4bit"]
    assert run(*arguments, "--output", str(tmp_path / "plan.yaml")) == 0
    plan = load_plan(tmp_path / "plan.yaml")
    assert not plan.calibrated
    assert plan.budget.full_bytes == 2048 * 32 * 2 * 8 * 128 * 2
    assert plan.budget.limit_bytes == plan.budget.full_bytes // 64
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("budget", [["--budget", "1/64"], ["--fit", "24GiB"]])
def test_uniform_plans_wait_for_no_torch(budget):
    arguments = ["--model", "mistral-7b", *budget, "--uniform", "snapkv:kivi:4bit"]
    program = f"import sys; from qpkv_planner import cli; status = cli.main({arguments}); "
    program += "sys.exit(status or int('torch' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_module_run_by_python_is_the_command(capsys):
    arguments = ["--model", "mistral-7b", "--budget", "1/64", "--uniform", "snapkv:kivi:4bit"]
    done = subprocess.run([sys.executable, "-m", "qpkv_planner", *arguments], capture_output=True, text=True)
    assert run(*arguments) == done.returncode == 0
    assert done.stdout == capsys.readouterr().out != ""


def test_json_of_the_search_record_is_plain(planned):
    json.dumps(planned.model_dump(mode="json"))
