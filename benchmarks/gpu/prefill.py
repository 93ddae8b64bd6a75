"""Prefill with and without compression: time and peak memory at 8k and 32k tokens, Mistral-7B's shape.

    python benchmarks/gpu/prefill.py --out benchmarks/results            (run by benchmarks/gpu.sh)

Random bfloat16 weights, one row. "full" is transformers' DynamicCache with SDPA; the others are plans of 1/16 and 1/64
of the prompt's own cache. Time ends when the last logits are there; peak memory is CUDA's, above the weights.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from end_to_end import random_model
from measure import Rows, finish, machine, percentiles
from transformers import DynamicCache, PreTrainedModel

from qpkv_planner.uniform import uniform_plan
from qpkv_runtime import PlannedCache
from qpkv_runtime.plan import Plan

SETTINGS = [("1/16", "snapkv:kivi:4bit"), ("1/64", "snapkv:kivi:4bit"), ("1/64", "snapkv:rotated:k4v2")]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--smoke", action="store_true", help="small, on any device")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    rows = Rows("prefill", arguments.out, machine(device))
    model = random_model("mistral-7b", device, arguments.smoke)
    repeats = 1 if arguments.smoke else arguments.repeats
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        for tokens in (512,) if arguments.smoke else (8192, 32768):
            rows.attempt({"tokens": tokens, "what": "full"}, partial(prefill, model, None, tokens, repeats))
            for budget, setting in SETTINGS:
                plan = uniform_plan(folder, budget, setting, context_tokens=tokens)
                what = f"{budget} {setting}"
                rows.attempt({"tokens": tokens, "what": what}, partial(prefill, model, plan, tokens, repeats))
    return finish(rows)


@torch.no_grad()
def prefill(model: PreTrainedModel, plan: Plan | None, tokens: int, repeats: int) -> dict[str, Any]:
    model.set_attn_implementation("sdpa" if plan is None else "qpkv")
    is_cuda, times = model.device.type == "cuda", []
    for turn in range(repeats + 1):
        ids = torch.randint(0, model.config.vocab_size, (1, tokens), device=model.device)
        if is_cuda:
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        cache = DynamicCache(config=model.config) if plan is None else PlannedCache.from_plan(plan, model)
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        if is_cuda:
            torch.cuda.synchronize()
        if turn:  # the first warms up
            times.append(1e3 * (time.perf_counter() - started))
        peak = (torch.cuda.max_memory_allocated() - before) / 1e9 if is_cuda else None
        del cache
    p20, p50, p80 = percentiles(times)
    planned = None if plan is None else plan.budget.planned_bytes
    return {"ms_p20": p20, "ms_p50": p50, "ms_p80": p80, "peak_gb": peak, "planned_bytes": planned}


if __name__ == "__main__":
    sys.exit(main())
