"""The uniform grid, and a plan, on held-out samples at equal exact bytes: cross-entropy, KL and exact answers by kind.

    python benchmarks/uniform_grid.py --model smollm2 --budgets 1/16 1/64 --plans plans/smollm2__1-16.yaml ...
    python benchmarks/uniform_grid.py --quick          (tiny, 1/32, a few samples)

Writes a row per setting and budget to benchmarks/results/<name>.csv, with hardware and commit, and prints the table.
The samples are the validation split's, which uniform settings have not seen.
"""

from __future__ import annotations

import argparse
import csv
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

from qpkv_planner.allocation import Space, allocation_of
from qpkv_planner.calibration import make_split
from qpkv_planner.grid import FORMATS, QUICK_FORMATS, make_grid, scorer_named
from qpkv_planner.measurement import Evaluator, Losses, interval
from qpkv_planner.planner import describe
from qpkv_planner.prefill import prepare
from qpkv_runtime.compression import Scoring
from qpkv_runtime.models import load_model
from qpkv_runtime.overview import table
from qpkv_runtime.plan import Decode, load_plan

KINDS = ("number", "word", "place", "line", "chain", "text")
RESULTS = Path(__file__).parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--context-length", type=int, default=1024)
    parser.add_argument("--budgets", nargs="+", default=["1/16", "1/64"])
    parser.add_argument("--contexts", type=int, default=24)
    parser.add_argument("--plans", nargs="*", type=Path, default=[], help="plans for the same model to add as rows")
    parser.add_argument(
        "--scorers",
        nargs="+",
        default=["snapkv(queries=16)", "snapkv(kernel=5,pooling=average,queries=16)", "knorm", "streamingllm"],
        help="with their parameters; h2o takes long",
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/uniform_grid_<model>.csv")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.model, arguments.budgets, arguments.contexts = "tiny", ["1/32"], 6
    started = time.monotonic()
    model, tokenizer = load_model(arguments.model)
    split = make_split(tokenizer, "validation", arguments.contexts, arguments.context_length, seed=0)
    section = describe(model, tokenizer, arguments.model, split.contexts[0])
    scorers = [scorer_named(name) for name in arguments.scorers[: 1 if arguments.quick else None]]
    formats = QUICK_FORMATS if arguments.quick else FORMATS
    plans = [load_plan(path) for path in arguments.plans]
    settings = []
    for budget in arguments.budgets:
        space = Space(
            section, budget, arguments.context_length, scorers[0], 4, 4,
            Decode(reserve_tokens=1, format="rotated-k4v4"),
        )  # fmt: skip
        grid = make_grid(space, scorers, formats, None)
        settings += [(budget, setting.name, setting.space, setting.allocation) for setting in grid]
    settings += [(plan.budget.requested, "plan", Space.of_plan(plan), allocation_of(plan)) for plan in plans]
    scorings = dict.fromkeys(Scoring.of(s.scorer, s.sinks, s.window) for *_, s, _ in settings)
    prepared = prepare(model, section.shape, section.storage_dtype, split, list(scorings), 3, lambda: None)
    evaluator = Evaluator(model, prepared)
    full = evaluator.full()
    rows = [_row("1", "full cache", "", 0, full, full)]
    for budget, name, space, allocation in settings:
        losses = evaluator.evaluate(space, allocation)
        tokens = sum(choice.tokens for choice in allocation) / len(allocation)
        rows.append(_row(budget, name, f"{tokens:.1f}", space.bytes(allocation), losses, full))
        print(f"{budget:>6}  {name:<40} {losses.mean('ce'):.3f}", file=sys.stderr, flush=True)
    where = {
        "model": arguments.model,
        "context_tokens": str(arguments.context_length),
        "samples": str(len(prepared)),
        "cpu": platform.processor() or platform.machine(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "commit": _commit(),
        "seconds": f"{time.monotonic() - started:.0f}",
    }
    path = arguments.output or RESULTS / f"uniform_grid_{arguments.model}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*rows[0], *where])
        writer.writeheader()
        writer.writerows({**row, **where} for row in rows)
    shown = ["budget", "setting", "tokens", "bytes", "cross_entropy", "kl", "exact", *(f"ce_{kind}" for kind in KINDS)]
    print("\n".join(table([shown, *([str(row[key]) for key in shown] for row in rows)], left={0, 1})))
    print(f"\n{path}: " + ", ".join(f"{key} {value}" for key, value in where.items()))
    return 0


def _row(budget: str, name: str, tokens: str, num_bytes: int, losses: Losses, full: Losses) -> dict[str, str]:
    gap = interval(losses, "ce", minus=full)
    kinds = losses.by_kind()
    return {
        "budget": budget,
        "setting": name,
        "tokens": tokens,
        "bytes": str(num_bytes),
        "cross_entropy": f"{losses.mean('ce'):.4f}",
        "over_full_low": f"{gap.low:.4f}",
        "over_full_high": f"{gap.high:.4f}",
        "kl": f"{losses.mean('kl'):.4f}",
        "exact": f"{losses.mean('exact'):.3f}",
        **{f"ce_{kind}": f"{kinds[kind]['cross_entropy']:.3f}" if kind in kinds else "" for kind in KINDS},
        **{f"kl_{kind}": f"{kinds[kind]['kl']:.3f}" if kind in kinds else "" for kind in KINDS},
        **{f"exact_{kind}": f"{kinds[kind]['exact']:.2f}" if kind in kinds else "" for kind in KINDS[:-1]},
    }


def _commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
