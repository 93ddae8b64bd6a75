"""The runtime's own loop: the tokens of transformers' `generate`, and a step that needs nothing of the host.

Without a GPU the loop runs over the reference path and over Triton's interpreter; capture itself is marked `gpu`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import make_model, make_space, prompts, random_plan
from test_decode_kernel import RESERVE, counters, fmt, make_block
from transformers import PreTrainedModel

from qpkv_kernels import append, decode
from qpkv_planner.allocation import Choice
from qpkv_runtime.cache import PlannedCache
from qpkv_runtime.errors import CacheError, NumericsError
from qpkv_runtime.graph import DecodeLoop, waits_for_host
from qpkv_runtime.plan import Decode, Heads, Plan
from qpkv_runtime.quantizers import CLIPS

PROMPT_TOKENS = 40


def prefill(model: PreTrainedModel, plan: Plan, batch: int = 1, padding: int = 0) -> tuple[PlannedCache, torch.Tensor]:
    """(the cache, the first new token [B, 1]). padding: of the last row, on its left."""
    ids = prompts(batch, PROMPT_TOKENS)
    mask = torch.ones_like(ids)
    mask[-1, :padding] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = PlannedCache.from_plan(plan, model)
    given = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
    with torch.no_grad():
        logits = model(ids.to(model.device), use_cache=True, **{k: _to(v, model) for k, v in given.items()}).logits
    return cache, logits[:, -1].argmax(-1, keepdim=True)


def _to(x: Any, model: PreTrainedModel) -> Any:
    return x.to(model.device) if isinstance(x, torch.Tensor) else x


def of_transformers(model: PreTrainedModel, plan: Plan, num_tokens: int, batch: int, padding: int) -> torch.Tensor:
    ids = prompts(batch, PROMPT_TOKENS)
    mask = torch.ones_like(ids)
    mask[-1, :padding] = 0
    cache = PlannedCache.from_plan(plan, model)
    options: dict[str, Any] = {"attention_mask": mask, "do_sample": False, "max_new_tokens": num_tokens}
    return model.generate(ids, past_key_values=cache, **options)[:, PROMPT_TOKENS:]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_loop_gives_transformers_tokens_and_counts_as_it_does(family: str):
    model = make_model(family)
    plan = random_plan(model, 3)
    expected = of_transformers(model, plan, 20, 2, 9)
    cache, first = prefill(model, plan, 2, 9)
    pieces: list[torch.Tensor] = []
    tokens = DecodeLoop(model, cache).run(first, 20, poll_steps=6, on_tokens=pieces.append)
    assert torch.equal(tokens, expected)
    assert [piece.shape[1] for piece in pieces] == [1, 6, 6, 6, 1] and torch.equal(torch.cat(pieces, 1), expected)
    counted = cache.rows.counters[torch.device("cpu")]
    assert counted.prompt.tolist() == [40, 31] and counted.appended.tolist() == [19]
    assert cache.get_seq_length() == PROMPT_TOKENS + 19


def test_rows_that_have_ended_are_padded_and_the_last_end_is_the_end():
    model = make_model("llama")
    plan = random_plan(model, 3)
    cache, first = prefill(model, plan, 2)
    free = DecodeLoop(model, cache).run(first, 20)
    ends = [int(free[0, 3]), int(free[1, 8])]
    at = [next(i for i, token in enumerate(row.tolist()) if token in ends) for row in free]
    cache, first = prefill(model, plan, 2)
    tokens = DecodeLoop(model, cache).run(first, 20, ends, pad_token_id=99)
    assert tokens.shape[1] == max(at) + 1
    for row, end in enumerate(at):
        assert torch.equal(tokens[row, : end + 1], free[row, : end + 1]), "up to and with the end"
        assert bool((tokens[row, end + 1 :] == 99).all())


def test_a_loop_serves_the_next_prompt_of_the_same_cache():
    model = make_model("llama")
    plan = random_plan(model, 3)
    cache, first = prefill(model, plan)
    loop = DecodeLoop(model, cache)
    tokens, addresses = loop.run(first, 9), loop._addresses()
    cache.reset()
    with torch.no_grad():
        model(prompts(1, PROMPT_TOKENS), past_key_values=cache, use_cache=True)
    assert torch.equal(loop.run(first, 9), tokens)
    assert loop._addresses() == addresses, "a captured graph would read what is no longer there"


def test_a_full_reserve_under_stop_ends_with_its_error_and_not_before():
    model = make_model("llama")
    plan = random_plan(model, 3, decode=Decode(reserve_tokens=5, format="16bit", then="stop"))
    cache, first = prefill(model, plan)
    assert DecodeLoop(model, cache).run(first, 6).shape == (1, 6)  # the sixth is never appended
    pieces: list[torch.Tensor] = []
    cache, first = prefill(model, plan)
    with pytest.raises(CacheError, match="reserve holds 5 generated tokens and says `then: stop`"):
        DecodeLoop(model, cache).run(first, 7, on_tokens=pieces.append)
    assert torch.cat(pieces, 1).shape == (1, 6)


def test_logits_that_are_no_numbers_end_the_answer():
    model = make_model("llama")
    cache, first = prefill(model, random_plan(model, 3))
    with torch.no_grad():
        model.lm_head.weight[:] = float("nan")
    with pytest.raises(NumericsError, match="logits have NaN or Inf"):
        DecodeLoop(model, cache).run(first, 4)


def test_a_graph_is_refused_where_it_cannot_be():
    model = make_model("llama")
    cache = PlannedCache.from_plan(random_plan(model, 3), model)
    if not torch.cuda.is_available():
        with pytest.raises(CacheError, match=r"on one CUDA device.*got layers on cpu"):
            DecodeLoop(model, cache, use_graph=True)


@pytest.mark.parametrize(
    "rope", ["dynamic", "longrope", {"full_attention": "default", "sliding_attention": "longrope"}]
)
def test_a_forward_that_waits_for_the_host_is_not_captured(rope: str | dict[str, str]):
    model = make_model("llama")
    assert not waits_for_host(model)
    model.get_decoder().rotary_emb.rope_type = rope
    assert waits_for_host(model)


# --- by the kernels ------------------------------------------------------------------------------------------------


def adaptive_plan(model: PreTrainedModel) -> Plan:
    """Heads divided anew for each prompt; keys in token groups no longer than what a head holds."""
    reserve = Decode(reserve_tokens=3, format="rotated-k3v2")
    space = make_space(model, "1/2", heads=Heads(share="adaptive"), decode=reserve)
    return space.plan([Choice(16, "kivi-k4v4"), Choice(16, "flexgen-k4v4")])


def test_the_loop_over_the_kernels_gives_the_tokens_of_the_reference_with_heads_divided_anew(
    monkeypatch: pytest.MonkeyPatch,
):
    model = make_model("llama", num_hidden_layers=2)
    plan = adaptive_plan(model)
    answers, held, blocks = {}, {}, {}
    for backend in ("reference", "triton"):
        monkeypatch.setenv("QPKV_BACKEND", backend)
        cache, first = prefill(model, plan, 2, 5)
        answers[backend] = DecodeLoop(model, cache).run(first, 6)
        layers = [layer.packed() for layer in cache.layers]
        held[backend] = torch.stack([layer.table()[..., 1] for layer in layers])
        blocks[backend] = layers[0].block.clone()
    assert torch.equal(answers["triton"], answers["reference"])
    assert len(set(answers["triton"].flatten().tolist())) > 6, "the model repeats itself: the test shows nothing"
    assert torch.equal(held["triton"], held["reference"])
    assert int(held["triton"][..., 0].float().std(-1).max()) > 0, "all heads hold the same: the test shows nothing"
    assert torch.equal(blocks["triton"], blocks["reference"]), "the first layer's bytes, appended ones included"


def test_a_compiled_decode_step_is_one_graph_with_the_tokens_of_the_loop(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("QPKV_BACKEND", "triton")
    from torch._dynamo.backends.debugging import aot_eager

    model = make_model("llama", num_hidden_layers=2)
    plan, graphs = adaptive_plan(model), []
    cache, first = prefill(model, plan)
    expected = DecodeLoop(model, cache).run(first, 5)

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        called = (str(node.target).removesuffix(".default") for node in graph.graph.nodes)
        graphs.append([name for name in called if "qpkv" in name])
        return aot_eager(graph, inputs)

    step = torch.compile(model, fullgraph=True, backend=backend)  # anything that waits for the device would break it
    cache, token = prefill(model, plan)
    counted, tokens = cache.rows.counters[cache.rows.layer_devices[0]], [token]
    for _ in range(4):
        positions = (counted.prompt + counted.appended)[:, None].long()
        with torch.no_grad():
            logits = step(tokens[-1], position_ids=positions, past_key_values=cache, use_cache=True).logits
        tokens.append(logits[:, -1].argmax(-1, keepdim=True))
    assert torch.equal(torch.cat(tokens, 1), expected)
    assert graphs == [["qpkv.append", "qpkv.attend"] * 2] * 2, "one graph for the first step, one for all others"


class Recorder:
    """In place of a kernel: remembers its launches."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **settings: self.grids.append(grid)


def test_launching_reads_no_tensor_and_is_the_same_at_every_step(monkeypatch: pytest.MonkeyPatch):
    """On tensors without data, as a read would raise."""
    kernels = {name: Recorder() for name in ("_decode", "_merge", "_transform_query")}
    for name, recorder in kernels.items():
        monkeypatch.setattr(decode, name, recorder)
    monkeypatch.setattr(append, "_append", Recorder())
    monkeypatch.setattr(decode, "is_interpreted", lambda: False)
    block, layout, places = make_block(((fmt("rotated4"), 75), RESERVE), 2, 3, 64, torch.float16, window=40)
    block, places, prompt, appended = (x.to("meta") for x in (block, places, *counters(2, 80, 1)))
    x = torch.empty(2, 8, 64, dtype=torch.float16, device="meta")
    problems = torch.zeros(2, dtype=torch.int32, device="meta")
    for _ in range(2):
        append.append(x[:, :2], x[:, :2], block, layout, places, prompt, appended, problems, 1.0, CLIPS)
        decode.attend(x[:, :6].contiguous(), block, layout, places, prompt, appended, 0.125)
    for recorder in (*kernels.values(), append._append):
        first, second = recorder.grids
        assert first == second


# --- on a GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_captured_step_gives_the_tokens_of_the_eager_loop_and_never_waits(family: str):
    model = make_model(family, torch.float16).cuda()
    plan = random_plan(model, 3)
    cache, first = prefill(model, plan, 2)
    expected = DecodeLoop(model, cache, use_graph=False).run(first, 40)
    cache, first = prefill(model, plan, 2)
    loop = DecodeLoop(model, cache)
    assert torch.equal(loop.run(first, 40), expected)
    assert loop._graph is not None and cache.get_seq_length() == PROMPT_TOKENS + 39
    cache.reset()
    prefill_again = prompts(2, PROMPT_TOKENS).cuda()
    with torch.no_grad():
        model(prefill_again, past_key_values=cache, use_cache=True)
    graph = loop._graph
    assert torch.equal(loop.run(first, 40), expected) and loop._graph is graph
    eager = DecodeLoop(model, cache, use_graph=False)
    eager.token = first.clone()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loop._launch()
        eager._step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
