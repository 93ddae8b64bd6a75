"""Against kvpress 0.5.5: the same scores, the same kept sets, or the reason beside the test.

Its numbers, in tests/data/kvpress.json, are of a small fixed model and were written by
`benchmarks/peers/kvpress_presses.py` in an environment of its own.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from benchmarks.peers.kvpress_model import NUM_TOKENS, make_model, make_prompt
from qpkv_planner.allocation import Choice, Space, model_section, pyramidkv
from qpkv_planner.prefill import _RecordingLayer
from qpkv_runtime.cache import layer_parts
from qpkv_runtime.compression import adaptive_tokens, rank, select
from qpkv_runtime.methods import SCORERS as FACTS
from qpkv_runtime.methods import scorer_parameters
from qpkv_runtime.models.shape import ModelShape
from qpkv_runtime.plan import Decode, Scorer
from qpkv_runtime.scorers import SCORERS, Prefill

PEER = json.loads((Path(__file__).parent / "data" / "kvpress.json").read_text(encoding="utf-8"))
NUM_KEPT = int(NUM_TOKENS * (1 - PEER["ratio"]))
SAME = {  # kvpress's press -> (our scorer, its parameters, sinks and window that the press keeps anyway)
    "streamingllm": ("streamingllm", {}, 4, 0),
    "snapkv": ("snapkv", {"kernel": 5, "pooling": "average"}, 0, 64),
    "knorm": ("knorm", {}, 0, 0),
    "tova": ("tova", {}, 0, 1),
    "keydiff": ("keydiff", {}, 0, 0),
    "expected_attention": ("expected_attention", {"future_tokens": 512}, 4, 0),
    "observed_attention": ("h2o", {}, 0, 0),
}


@cache
def prefills(sinks: int, window: int) -> list[Prefill]:
    """What our attention function sees of the same prompt in the same model, per layer."""
    model = make_model("qpkv")
    layers = [_RecordingLayer(None) for _ in range(model.config.num_hidden_layers)]
    with torch.no_grad():
        model(make_prompt(), past_key_values=Cache(layers=list(layers)))
    return [
        Prefill(i, *layer.last[:2], [0], layer.scaling, None, None, window, sinks, layer.last[2], parts)
        for i, (layer, parts) in enumerate(zip(layers, layer_parts(model), strict=True))
    ]


def scores_of(press: str, window: int | None = None) -> list[Tensor]:
    """Our scores [H_kv, T] of every layer. The observed attention of kvpress is a mean: the sum that h2o is, over the
    number of queries that see the token."""
    name, parameters, sinks, own_window = SAME[press]
    scored = []
    for prefill in prefills(sinks, own_window if window is None else window):
        scores = SCORERS[name].score(prefill.shown(FACTS[name].needs), scorer_parameters(name, parameters))[0]
        scored.append(scores / torch.arange(NUM_TOKENS, 0, -1) if press == "observed_attention" else scores)
    return scored


def importance(scores: Tensor, sinks: int, window: int) -> Tensor:
    forced = (torch.arange(NUM_TOKENS) < sinks) | (torch.arange(NUM_TOKENS) >= NUM_TOKENS - window)
    return scores.masked_fill(forced, float("inf"))[None]


@pytest.mark.parametrize("press", SAME)
def test_the_same_tokens_are_kept(press):
    *_, sinks, window = SAME[press]
    assert list(PEER["presses"]) == list(SAME) and len(PEER["presses"][press]["kept"]) == 2
    for scores, expected in zip(scores_of(press), PEER["presses"][press]["kept"], strict=True):
        (selection,) = select(rank(importance(scores, sinks, window)), [NUM_KEPT])
        assert selection.rows[0].tolist() == expected


@pytest.mark.parametrize("press", [press for press in SAME if press != "streamingllm"])
def test_the_scores_are_the_same(press):
    """Where the press does not overwrite them: it marks what it keeps anyway with the largest score. That of
    streamingllm scores 0 and 1 only."""
    *_, sinks, window = SAME[press]
    ours = scores_of(press)[-1][:, sinks : NUM_TOKENS - window]
    theirs = torch.tensor(PEER["presses"][press]["scores_of_the_last_layer"])[:, sinks : NUM_TOKENS - window]
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    print(f"relative error {error:.1e}")
    assert error < 2e-5  # float32, and activations of two versions of transformers


def test_h2o_as_a_sum_differs_from_the_mean_that_kvpress_takes():
    """Why `observed_attention` above is compared after dividing: a sum prefers old tokens, which more queries saw, and
    that is H2O's own score (arXiv 2306.14048)."""
    for prefill, expected in zip(prefills(0, 0), PEER["presses"]["observed_attention"]["kept"], strict=True):
        (selection,) = select(rank(SCORERS["h2o"].score(prefill, {})), [NUM_KEPT])
        assert selection.rows[0].tolist() != expected
        assert selection.rows[0].float().mean() < torch.tensor(expected).float().mean()


@pytest.mark.parametrize("press", PEER["adakv"])
def test_adaptive_heads_keep_what_adakv_does_not_mask(press):
    """kvpress's safeguard is a share of all that a head keeps, ours of what is not kept anyway: the alpha that gives
    the same floor."""
    expected, window = PEER["adakv"][press], {"snapkv": 16}.get(press, 0)
    sinks = SAME[press][2]
    least = max(1, int(NUM_KEPT * expected["alpha"]))
    alpha = max(0.0, (least - sinks - window + 0.5) / (NUM_KEPT - sinks - window))
    differing = 0
    for scores, kept in zip(scores_of(press, window), expected["kept"], strict=True):
        ranking = rank(importance(scores, sinks, window))
        counts = adaptive_tokens(ranking, [(NUM_KEPT, 1)], alpha)
        (selection,) = select(ranking, counts)
        held = [rows[:count].tolist() for rows, count in zip(selection.rows[0], counts[0][0].tolist(), strict=True)]
        assert held == kept
        differing += len(held[0]) != len(held[1])
    assert differing, "heads that all keep the same number show nothing"


@pytest.mark.parametrize(
    "case", PEER["pyramidkv"], ids=lambda case: f"{case['layers']}-{case['tokens']}-{case['ratio']}"
)
def test_pyramidkv_gives_every_layer_the_budget_that_kvpress_gives_it(case: dict[str, Any]):
    """To a token of its rounding and one of ours (the last layer's is a floor, what is left over goes to the first).

    kvpress counts the window inside the pyramid, so ours is asked for the same pyramid beside it. And where its last
    layer would get less than the window it falls back to even layers; ours keeps the pyramid, as the paper does.
    """
    mean, layers, window = round(case["tokens"] * (1 - case["ratio"])), case["layers"], case["window"]
    shape = ModelShape("llama", layers, 1, 1, 64, 2 * case["tokens"], (None,) * layers)
    space = Space(
        model=model_section("random", shape, "float16", "float16"), requested="1", context_tokens=case["tokens"],
        scorer=Scorer(name="snapkv"), sinks=0, window=window, decode=Decode(reserve_tokens=1, format="16bit"),
    )  # fmt: skip
    size = space.bytes([Choice(mean + window, "16bit")] * layers)
    space = Space(
        **{**{f: getattr(space, f) for f in space.__dataclass_fields__ if f[0] != "_"}, "requested": f"{size}B"}
    )
    ours = [choice.tokens - window for choice in pyramidkv(space, "16bit", case["beta"])]
    assert space.bytes(pyramidkv(space, "16bit", case["beta"])) == size, "theirs adds up to the budget only nearly"
    theirs = case["budgets"]
    if len(set(theirs)) == 1:
        assert mean / case["beta"] < window and theirs[0] == mean
        assert ours[0] > 1.8 * mean and ours[-1] < 0.1 * mean
    else:
        assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= 2
