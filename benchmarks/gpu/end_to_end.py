"""Whole models: the same tokens as the reference backend on real weights, then the paper's Table 4 with honest bytes.

    python benchmarks/gpu/end_to_end.py --model smollm2 --out benchmarks/results        (run by benchmarks/gpu.sh)

First a model with its own weights (`--model`: as for qpkv-run): a prompt under a plan, by both backends. Then the
shapes of Mistral-7B and Llama-3-8B with random bfloat16 weights: the full cache of 16k tokens, and 1/16 and 1/64 of its
bytes at 16, 8, 4 and 2 bit (`qpkv_planner.uniform`), at several batch sizes, as a captured graph and with every step
launched anew (eager). Each model has its share of the time, graphs of all batch sizes first. Caches are filled with
random tokens, without a prefill. tokens/s are of decoding, all rows together; peak memory is CUDA's, weights included.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from measure import Rows, finish, free_bytes, machine, percentiles, random_block
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    StaticCache,
)

import qpkv_runtime.attention
from qpkv_kernels.tuning import captured
from qpkv_planner.uniform import uniform_plan
from qpkv_runtime import PlannedCache, load_model
from qpkv_runtime.backend import VARIABLE, use_kernels
from qpkv_runtime.graph import DecodeLoop
from qpkv_runtime.ledger import full_bytes
from qpkv_runtime.models.aliases import KNOWN_MODELS
from qpkv_runtime.models.identity import model_shape

BATCHES = (128, 64, 1, 8, 96)  # where the time ends, the last ones are not reached
FULL_TOKENS = 16384
SHARES = (16, 64)
SETTINGS = ("snapkv:kivi:16bit", "snapkv:kivi:8bit", "snapkv:kivi:4bit", "snapkv:kivi:2bit")
CONFIGS: dict[str, Any] = {"mistral-7b": MistralConfig, "llama-3-8b": LlamaConfig}
INTERMEDIATE_SIZE = 14336  # of both
STEPS = 16
WHOLE_CACHE = "whole_cache_sdpa"
LEAST_SAME = 16  # greedy tokens that two backends must share; a near tie may go either way, and all after it


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--smoke", action="store_true", help="small, on any device")
    parser.add_argument("--model", default="smollm2", help="weights for the first part, as for qpkv-run")
    parser.add_argument("--seconds", type=float, default=240, help="nothing more is begun after so long")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    rows = Rows("end_to_end", arguments.out, machine(device))
    name = "tiny" if arguments.smoke else arguments.model
    rows.attempt({"model": name, "what": "same tokens as the reference backend"}, partial(same_tokens, name, device))
    names = ("mistral-7b",) if arguments.smoke else tuple(CONFIGS)
    for done, name in enumerate(names):
        now = time.monotonic()
        table_4(rows, name, device, now + (deadline - now) / (len(names) - done), arguments.smoke)
    return finish(rows)


def same_tokens(name: str, device: torch.device) -> dict[str, Any]:
    """Plan a model by arithmetic, answer a prompt by both backends, greedily: how many tokens are the same from the
    first on. On a CPU both are the reference."""
    model, tokenizer = load_model(name, "auto", str(device))
    plan = uniform_plan(name, "1/16", "snapkv:rotated:4bit", context_tokens=2048, max_new_tokens=64)
    text = (Path(qpkv_runtime.__file__).parent / "sample_prompt.txt").read_text()
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :2000].to(device)
    answers, seconds = {}, {}
    backends = ("triton", "reference") if use_kernels(device) else ("reference", "reference again")
    before = os.environ.get(VARIABLE)
    for backend in backends:
        os.environ[VARIABLE] = backend.split()[0]
        cache = PlannedCache.from_plan(plan, model)
        loop = DecodeLoop(model, cache)
        for _ in range(2):  # the first compiles and captures
            cache.reset()
            first = _first_token(model, cache, ids)
            started = time.perf_counter()
            answers[backend] = loop.run(first, 64).tolist()
            seconds[backend] = time.perf_counter() - started
    os.environ.pop(VARIABLE) if before is None else os.environ.update({VARIABLE: before})
    one, other = (answers[backend][0] for backend in backends)
    same = next((i for i, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), len(one))
    assert same >= LEAST_SAME, f"the backends agree on the first {same} of {len(one)} tokens"
    speeds = {f"tokens_per_s {backend}": len(one) / seconds[backend] for backend in backends}
    return {"tokens": len(one), "same_tokens": same, "prompt_tokens": ids.shape[1], **speeds}


@torch.no_grad()
def _first_token(model: PreTrainedModel, cache: PlannedCache, ids: torch.Tensor) -> torch.Tensor:
    token: torch.Tensor = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
    return token


def table_4(rows: Rows, name: str, device: torch.device, deadline: float, is_smoke: bool) -> None:
    """Every cell of one model; those that the time does not reach say so."""
    try:
        model = random_model(name, device, is_smoke)
    except torch.cuda.OutOfMemoryError:
        rows.add(model=name, what="weights", note="does not fit")
        return
    full_tokens, steps = (4096, 2) if is_smoke else (FULL_TOKENS, STEPS)
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        budget = full_bytes(model_shape(model), full_tokens)
        cells: list[tuple[str, int, Callable[[int, int, bool], dict[str, Any]]]] = [
            ("full cache", budget, partial(full_cache, model, full_tokens))
        ]
        for share in SHARES:
            for setting in SETTINGS:
                plan = uniform_plan(
                    folder, f"{budget // share}B", setting, context_tokens=full_tokens, max_new_tokens=64,
                    window=16, sinks=4,
                )  # fmt: skip
                what = f"1/{share} {setting.rpartition(':')[2]}, {plan.layers[0].tokens} tokens"
                cells.append((what, plan.budget.planned_bytes, partial(planned, model, plan)))
    for mode, batch in product(("graph", "eager"), (2,) if is_smoke else BATCHES):
        for what, num_bytes, measure in cells:
            where = {"model": name, "batch": batch, "what": what, "mode": mode, "bytes_per_row": num_bytes}
            if time.monotonic() > deadline:
                rows.add(**where, note="not reached in the time")
            elif mode == "graph" and device.type != "cuda":
                rows.add(**where, note="needs CUDA")
            else:
                rows.attempt(where, partial(measure, batch, steps, mode == "graph"))


def random_model(name: str, device: torch.device, is_smoke: bool) -> PreTrainedModel:
    """The named shape with random bfloat16 weights; a small one for a smoke run."""
    known = KNOWN_MODELS[name]
    shape = known.shape
    config = CONFIGS[name](
        vocab_size=512 if is_smoke else known.vocab_size,
        hidden_size=256 if is_smoke else known.hidden_size,
        intermediate_size=256 if is_smoke else INTERMEDIATE_SIZE,
        num_hidden_layers=2 if is_smoke else shape.num_layers,
        num_attention_heads=4 if is_smoke else shape.num_query_heads,
        num_key_value_heads=2 if is_smoke else shape.num_kv_heads,
        head_dim=64 if is_smoke else shape.head_size,
        max_position_embeddings=2 * FULL_TOKENS,
        tie_word_embeddings=False,
        **({"sliding_window": None} if name.startswith("mistral") else {}),
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="qpkv")
    return model.eval()


def planned(model: PreTrainedModel, plan: Any, batch: int, steps: int, use_graph: bool) -> dict[str, Any]:
    """Decoding under a plan whose cache is full."""
    model.set_attn_implementation("qpkv")
    _check_room(plan.budget.planned_bytes * batch, model.device)
    cache = PlannedCache.from_plan(plan, model)
    blocks: dict[Any, torch.Tensor] = {}
    for layer in cache.layers:
        key = plan.holdings(layer.layout.layer)
        if key not in blocks:
            blocks[key] = random_block(plan, layer.layout, 1, model.device)
        layer.load(blocks[key].expand(batch, -1), [plan.budget.context_tokens] * batch)
    loop = DecodeLoop(model, cache, use_graph=use_graph)
    token = torch.randint(0, model.config.vocab_size, (batch, 1), device=model.device)
    return _speed(lambda n: loop.run(token, n + 1), batch, steps, model.device)


@torch.no_grad()
def full_cache(model: PreTrainedModel, tokens: int, batch: int, steps: int, use_graph: bool) -> dict[str, Any]:
    """Decoding over transformers' StaticCache with SDPA, which reads it once a step: nothing is allocated or copied but
    the new token."""
    model.set_attn_implementation(WHOLE_CACHE)
    shape, room = model_shape(model), tokens + 6 * steps
    _check_room(full_bytes(shape, room) * batch, model.device)
    cache = StaticCache(config=model.config, max_cache_len=room)
    token = torch.randint(0, model.config.vocab_size, (batch, 1), device=model.device)
    position = torch.full((batch, 1), tokens, device=model.device)

    def step() -> None:
        logits = model(token, position_ids=position, past_key_values=cache, use_cache=True).logits
        token.copy_(logits[:, -1].argmax(-1, keepdim=True))
        position.add_(1)

    step()  # allocates
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(tokens)
    position.fill_(tokens)
    call = captured(step, model.device) if use_graph else step

    def run(n: int) -> None:
        for _ in range(n):
            call()

    return _speed(run, batch, steps, model.device)


def whole_cache(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """SDPA of one new token to all that the cache has room for. transformers' own gives it a mask over a StaticCache
    and, with one, keys and values repeated for every query head: nine times the bytes, and no flash kernel. Without
    one the room for new tokens is read, too: less than a hundredth of the cache."""
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(WHOLE_CACHE, whole_cache)


def _check_room(num_bytes: int, device: torch.device) -> None:
    if num_bytes > free_bytes(device):
        raise torch.cuda.OutOfMemoryError(f"the cache takes {num_bytes} bytes")


def _speed(run: Callable[[int], object], batch: int, steps: int, device: torch.device) -> dict[str, Any]:
    """Four runs of so many steps after one that warms up (and captures)."""
    is_cuda, times = device.type == "cuda", []
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    for turn in range(5):
        if is_cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        run(steps)
        if is_cuda:
            torch.cuda.synchronize()
        if turn:
            times.append(1e3 * (time.perf_counter() - started) / steps)
    p20, p50, p80 = percentiles(times)
    peak = torch.cuda.max_memory_allocated() / 1e9 if is_cuda else None
    return {"ms_p20": p20, "ms_p50": p50, "ms_p80": p80, "tokens_per_s": 1e3 * batch / p50, "peak_gb": peak}


if __name__ == "__main__":
    sys.exit(main())
