"""Decode attention on a CPU: a token over the packed cache (the reference path) against SDPA over the full cache.

    python -m benchmarks.cpu_decode                    (about ten minutes and 4 GB)
    python -m benchmarks.cpu_decode --quick            (small, to see that it runs)

A step is one new token through every layer's `PackedLayer.attend` (encode, read, attend, append), or through every
layer's `scaled_dot_product_attention` over a dense cache, which does not even append. Each layer has its own cache, so
that nothing stays in a processor's cache by repetition; steps alternate between all of them; keys and values are
random.
Writes benchmarks/results/cpu_decode.csv: milliseconds of CPU time a step on one thread (p20, p50, p80; CPU time is
hardly moved by what else the machine does) and how many times faster than the full cache's median in float32.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.where import RESULTS, where, write_rows
from qpkv_planner.allocation import Space, model_section
from qpkv_planner.grid import make_setting
from qpkv_runtime.compression import gather, keep, rank, write_block
from qpkv_runtime.ledger import make_ledger
from qpkv_runtime.models.aliases import KNOWN_MODELS
from qpkv_runtime.models.shape import ModelShape
from qpkv_runtime.overview import table
from qpkv_runtime.packed import PackedLayer
from qpkv_runtime.plan import Decode, Heads, Plan, Scorer

SETTINGS = [
    (budget, format, share)
    for budget in ("1/16", "1/64")
    for format, share in (("rotated-k4v2", "uniform"), ("rotated-k4v2", "adaptive"), ("kivi-k4v4", "uniform"))
]


def shape_named(name: str, context_tokens: int) -> ModelShape:
    """smollm2's own, or a few layers of mistral-7b's (8 KV heads, 32 query heads, head size 128)."""
    shape = KNOWN_MODELS[name].shape
    layers = shape.num_layers if name == "smollm2" else 4
    return replace(
        shape, num_layers=layers, sliding_windows=(None,) * layers, max_context_tokens=max(context_tokens, 32768)
    )


def make_plan(shape: ModelShape, context_tokens: int, budget: str, format: str, share: str) -> Plan:
    space = Space(
        model_section("random", shape, "float32", "bfloat16"), budget, context_tokens, Scorer(name="snapkv"), 4, 16,
        Decode(reserve_tokens=64, format=format), heads=Heads(share=share),
    )  # fmt: skip
    setting = make_setting(space, "uniform", format, None)
    assert setting is not None
    return setting.space.plan(setting.allocation)


def packed_step(plan: Plan, context_tokens: int, seed: int) -> Callable[[], None]:
    """One new token through all layers of a cache that a random prompt of so many tokens has filled."""
    shape, chance = plan.model.shape, torch.Generator().manual_seed(seed)
    size = (1, shape.num_kv_heads, context_tokens, shape.head_size)
    keys, values = (torch.randn(size, generator=chance).bfloat16() for _ in range(2))
    layers = []
    for layout in make_ledger(plan).layers:
        # heads want unlike shares, as real ones do
        taste = torch.rand(1, shape.num_kv_heads, 1, generator=chance)
        tiers = keep(plan, layout.layer, rank(torch.rand(size[:3], generator=chance) ** (0.5 + taste)))
        block = torch.zeros(1, layout.stored_bytes, dtype=torch.uint8)
        stats = torch.rand(1, shape.num_kv_heads, 2, shape.head_size, generator=chance) + 0.5
        write_block(block, layout, [gather(tier, keys, values, [0]) for tier in tiers], stats)
        layers.append(PackedLayer(plan, layout, block))
    query = torch.randn(1, shape.num_query_heads, 1, shape.head_size, generator=chance)
    key, value = (torch.randn(1, shape.num_kv_heads, 1, shape.head_size, generator=chance) for _ in range(2))
    num_appended = 0

    def step() -> None:
        nonlocal num_appended
        for layer in layers:
            layer.attend(query, key, value, num_appended, [context_tokens], shape.head_size**-0.5, None)
        num_appended += 1

    return step


def full_step(shape: ModelShape, context_tokens: int, dtype: torch.dtype) -> Callable[[], None]:
    size = (1, shape.num_kv_heads, context_tokens, shape.head_size)
    layers = [(torch.randn(size).to(dtype), torch.randn(size).to(dtype)) for _ in range(shape.num_layers)]
    query = torch.randn(1, shape.num_query_heads, 1, shape.head_size).to(dtype)

    def step() -> None:
        for keys, values in layers:
            F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    return step


def milliseconds(steps: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Each step's times, in turns: forwards and backwards, so that none always follows the same other."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name in list(steps) if turn % 2 else reversed(steps):
            started = time.process_time()
            steps[name]()
            if turn:  # the first warms up
                times[name].append(1e3 * (time.process_time() - started))
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--models", nargs="+", default=["smollm2", "mistral-7b"])
    parser.add_argument("--context-lengths", nargs="+", type=int, default=[8192, 32768])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu_decode.csv")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.models, arguments.context_lengths, arguments.repeats = ["smollm2"], [2048], 3
    torch.set_num_threads(arguments.threads)
    rows: list[dict[str, str]] = []
    about = where()
    for context in arguments.context_lengths:
        for model in arguments.models:
            with torch.inference_mode():
                rows += measure(model, context, arguments.repeats)
            write_rows(arguments.output, [{**row, **about} for row in rows])
    print("\n".join(table([list(rows[0]), *(list(row.values()) for row in rows)], left={0, 2, 3, 4})))
    print(f"\n{arguments.output}: " + ", ".join(f"{key} {value}" for key, value in about.items()))
    return 0


def measure(model: str, context_tokens: int, repeats: int) -> list[dict[str, str]]:
    """The rows of one shape and context length."""
    shape = shape_named(model, context_tokens)
    steps: dict[str, Callable[[], None]] = {
        str(dtype).removeprefix("torch."): full_step(shape, context_tokens, dtype)
        for dtype in (torch.float32, torch.bfloat16)
    }
    plans = {}
    for seed, (budget, format, share) in enumerate(SETTINGS):
        name = f"{budget} {format} {share}"
        plans[name] = make_plan(shape, context_tokens, budget, format, share)
        steps[name] = packed_step(plans[name], context_tokens, seed)
    times = milliseconds(steps, repeats)
    full, rows = statistics.median(times["float32"]), []
    for name, taken in times.items():
        p20, p50, p80 = (statistics.quantiles(taken, n=10, method="inclusive")[i] for i in (1, 4, 7))
        plan = plans.get(name)
        budget, format, share = name.split(" ") if plan else ("1", f"sdpa {name}", "")
        tokens = plan.layers[0].tiers[0].tokens if plan else context_tokens
        rows.append(
            {
                "model": model, "context_tokens": str(context_tokens), "budget": budget, "format": format,
                "heads": share, "layers": str(shape.num_layers), "tokens": str(tokens),
                "bytes": str(plan.budget.planned_bytes if plan else ""),
                "ms_p20": f"{p20:.2f}", "ms_p50": f"{p50:.2f}", "ms_p80": f"{p80:.2f}", "speedup": f"{full / p50:.2f}",
            }
        )  # fmt: skip
        print(f"{model} {context_tokens} {name}: {p50:.2f} ms", file=sys.stderr, flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(main())
