"""Whether Optuna's search pays: the same searches from several seeds, their stages' results on the test split.

    python -m benchmarks.seeds --model smollm2 --study runs/seeds        (goes on where it was)

A seed draws other calibration contexts, other bootstraps and other trials; the test samples are the same for all. The
searches are `--quick` unless --thorough. A row for each seed and budget: cross-entropy of the full cache, the best
uniform setting and what each stage handed on, search minus knapsack paired by samples, and how optimistic the search
split was of what shipped. Writes benchmarks/results/seeds_<model>.csv.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.where import RESULTS, where, write_rows
from qpkv_planner.calibration import make_split
from qpkv_planner.calibration_cache import load_or_prepare
from qpkv_planner.estimate import estimated_steps
from qpkv_planner.measurement import Evaluator, Losses, interval
from qpkv_planner.options import Options, check_lengths
from qpkv_planner.progress import Progress
from qpkv_planner.session import Session, scorings_of
from qpkv_planner.stages import Search
from qpkv_runtime.models import load_model, model_shape
from qpkv_runtime.overview import table


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--budgets", nargs="+", default=["1/32", "1/64", "1/128"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--context-length", type=int, default=1024)
    parser.add_argument("--contexts", type=int, default=24, help="of the test split (default 24)")
    parser.add_argument("--thorough", action="store_true", help="searches with qpkv-plan's defaults")
    parser.add_argument("--study", type=Path, required=True, help="where evaluations and prefills are kept")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/seeds_<model>.csv")
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model)
    shape = model_shape(model)
    test_split = make_split(tokenizer, "test", arguments.contexts, arguments.context_length, seed=0)
    test: Evaluator | None = None
    rows: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        options = Options(context_tokens=arguments.context_length, quick=not arguments.thorough, seed=seed)
        steps = estimated_steps(options, check_lengths(options, shape), shape, len(arguments.budgets))
        progress = Progress(steps, quiet=False)
        study = arguments.study / f"seed-{seed}"
        session = Session(
            model, tokenizer, options, arguments.model, study, None, progress, num_budgets=len(arguments.budgets)
        )
        for budget in arguments.budgets:
            session.announce(budget)
        for budget in arguments.budgets:
            space = session.space(budget)
            search = Search(session, space)
            plan = search.run()
            session.plans.append(plan)
            if test is None:
                prepared = load_or_prepare(
                    model, session.section, test_split, scorings_of(search.grid), 3, lambda: None, arguments.study
                )
                test = Evaluator(model, prepared)
            assert plan.calibration is not None
            assert search.best_uniform is not None
            uniform = search.best_uniform
            losses = {one.stage: test.evaluate(one.space, one.allocation) for one in search.candidates}
            losses["full cache"] = test.full()
            losses["best uniform"] = test.evaluate(uniform.space, uniform.allocation)
            rows.append(_row(seed, budget, plan.calibration.winner, plan.calibration.search["optimism"], losses))
            rows[-1] |= {"samples": len(test.prepared), "model": arguments.model, **where()}
            print(f"seed {seed}, {budget}: {rows[-1]}", file=sys.stderr, flush=True)
        session.journal.close()
        progress.close()
    write_rows(arguments.output or RESULTS / f"seeds_{arguments.model}.csv", rows)
    print(
        "\n".join(table([list(rows[0])[:14], *([str(cell) for cell in row.values()][:14] for row in rows)], left={1}))
    )
    print(f"search minus knapsack, mean: {np.mean([float(row['search_minus_knapsack']) for row in rows]):+.4f}")
    return 0


def _row(seed: int, budget: str, winner: str | None, optimism: float, losses: dict[str, Losses]) -> dict[str, Any]:
    """winner: the stage that shipped; optimism: its KL on validation less that on the search split."""
    losses = {"search": losses["knapsack"], **losses}  # where no trial finished
    change = interval(losses["search"], "ce", minus=losses["knapsack"])
    shipped = losses.get(winner or "", losses["best uniform"])
    names = ("full cache", "best uniform", "elimination", "knapsack", "search")
    return {
        "seed": seed,
        "budget": budget,
        **{name.replace(" ", "_"): f"{losses[name].mean('ce'):.4f}" for name in names},
        "shipped": f"{shipped.mean('ce'):.4f}",
        "winner": winner,
        "search_minus_knapsack": f"{change.mean:+.4f}",
        "low": f"{change.low:+.4f}",
        "high": f"{change.high:+.4f}",
        "shipped_exact": f"{shipped.mean('exact'):.3f}",
        "validation_kl_over_search": f"{optimism:+.4f}",
    }


if __name__ == "__main__":
    sys.exit(main())
