"""Is one more token worth more than one more bit, and where does that turn? Per layer, at several plans.

    python -m benchmarks.marginal --plans plans/smollm2__1-16.yaml plans/smollm2__1-32.yaml plans/smollm2__1-64.yaml

For every layer of a plan: what half as many tokens more, another step of key bits and another step of value bits would
each save, in nats per KiB that it takes, by the planner's own first-order prediction
(`qpkv_planner/linearization.py`) on the validation split. Writes benchmarks/results/marginal_<model>.csv and .png.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib
import numpy as np

from benchmarks.where import RESULTS, where, write_rows
from qpkv_planner.allocation import Choice, Space, allocation_of, format_name, format_named
from qpkv_planner.calibration import make_split
from qpkv_planner.calibration_cache import load_or_prepare
from qpkv_planner.knapsack import next_bits
from qpkv_planner.linearization import sample_changes
from qpkv_planner.measurement import Evaluator
from qpkv_runtime.compression import Scoring
from qpkv_runtime.models import load_model
from qpkv_runtime.plan import Plan, load_plan

MORE_TOKENS = 1.5
KINDS = ("tokens", "key bits", "value bits")
COLORS = {"tokens": "#0072b2", "key bits": "#d55e00", "value bits": "#009e73"}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--plans", nargs="+", type=Path, required=True, help="of one model")
    parser.add_argument("--contexts", type=int, default=24)
    parser.add_argument("--calibration-cache", type=Path, help="where prefills are kept")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/marginal_<model>.csv")
    arguments = parser.parse_args()
    plans = [load_plan(path) for path in arguments.plans]
    name = plans[0].model.id
    model, tokenizer = load_model(name)
    split = make_split(tokenizer, "validation", arguments.contexts, plans[0].budget.context_tokens, seed=0)
    scorings = list(dict.fromkeys(Scoring.of(plan.scorer, plan.sinks, plan.window) for plan in plans))
    prepared = load_or_prepare(model, plans[0].model, split, scorings, 3, lambda: None, arguments.calibration_cache)
    evaluator, rows = Evaluator(model, prepared), []
    for plan in plans:
        rows += _rows(evaluator, plan)
        print(plan.budget.requested, _sums(rows, plan.budget.requested), file=sys.stderr, flush=True)
    path = arguments.output or RESULTS / f"marginal_{name}.csv"
    write_rows(path, [{**row, **where()} for row in rows])
    _draw(rows, [plan.budget.requested for plan in plans], path.with_suffix(".png"))
    print(f"{path} and {path.with_suffix('.png')}")
    return 0


def _rows(evaluator: Evaluator, plan: Plan) -> list[dict[str, object]]:
    space, allocation = Space.of_plan(plan), allocation_of(plan)
    alternatives = [_steps(space, layer, mine) for layer, mine in enumerate(allocation)]
    kinds = np.array(evaluator.prepared.kinds)
    found = sample_changes(
        evaluator, space, allocation, [list(steps.values()) for steps in alternatives], "kl", evaluator.parts
    )
    rows: list[dict[str, object]] = []
    for layer, (mine, steps, changes) in enumerate(zip(allocation, alternatives, found, strict=True)):
        for (kind, other), change in zip(steps.items(), changes, strict=True):
            whole = change.sum(1)
            nats = float(np.mean([whole[kinds == name].mean() for name in sorted(set(kinds))]))
            kib = (space.layer_bytes(layer, other) - space.layer_bytes(layer, mine)) / 1024
            rows.append(
                {
                    "budget": plan.budget.requested,
                    "layer": layer,
                    "tokens": mine.tokens,
                    "format": mine.format,
                    "more": kind,
                    "kib": f"{kib:.3f}",
                    "nats_saved": f"{-nats:.6f}",
                    "nats_saved_per_kib": f"{-nats / kib:.6f}",
                }
            )
    return rows


def _steps(space: Space, layer: int, mine: Choice) -> dict[str, Choice]:
    """What a layer could have more of, at the price of bytes."""
    format = format_named(mine.format)
    keys, values = format.keys.bits, format.values.bits
    wishes = {
        "tokens": (MORE_TOKENS * mine.tokens, mine.format),
        "key bits": (mine.tokens, format_name(format.keys.quantizer, next_bits(keys, 1), values)),
        "value bits": (mine.tokens, format_name(format.keys.quantizer, keys, next_bits(values, 1))),
    }
    steps = {kind: Choice(space.legal_tokens(layer, tokens, name), name) for kind, (tokens, name) in wishes.items()}
    now = space.layer_bytes(layer, mine)
    return {kind: step for kind, step in steps.items() if space.layer_bytes(layer, step) > now}


def _sums(rows: list[dict[str, object]], budget: str) -> dict[str, float]:
    """Median over layers of what a KiB more saves, by kind."""
    mine = [row for row in rows if row["budget"] == budget]
    saved = {kind: [float(str(row["nats_saved_per_kib"])) for row in mine if row["more"] == kind] for kind in KINDS}
    return {kind: round(float(np.median(values)), 6) for kind, values in saved.items()}


def _draw(rows: list[dict[str, object]], budgets: list[str], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(budgets), 1, figsize=(9, 2.4 * len(budgets)), sharex=True, squeeze=False)
    for axis, budget in zip(axes[:, 0], budgets, strict=True):
        for place, kind in enumerate(KINDS):
            mine = [row for row in rows if row["budget"] == budget and row["more"] == kind]
            at = [int(str(row["layer"])) + 0.27 * (place - 1) for row in mine]
            saved = [1000 * float(str(row["nats_saved_per_kib"])) for row in mine]
            axis.bar(at, saved, 0.27, color=COLORS[kind], label=f"more {kind}")
        axis.set_title(f"at {budget}", loc="left", fontsize=10)
        axis.set_ylabel("millinats / KiB")
        axis.axhline(0, color="black", linewidth=0.6)
    axes[0, 0].legend(ncols=3, frameon=False, fontsize=9)
    axes[-1, 0].set_xlabel("layer")
    figure.suptitle("What another KiB would save in KL, by what it buys", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
