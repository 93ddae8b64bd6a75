"""Needles and RULER for plans, their best uniform rivals and the full cache, on the same samples.

    python -m benchmarks.tasks --plans plans/smollm2__*.yaml --study tasks
    python -m benchmarks.tasks --plans plans/tiny__1-8.yaml --suites niah --samples 1 --study tasks-tiny    (quick)

Every answer is kept in --study as it comes; the same command goes on where it was stopped. Writes a row for each
contestant, suite, task and length to benchmarks/results/tasks_<model>.csv, with hardware and commit, and prints them.
The intervals are 95 % bootstraps over documents (the depths of a needle in one haystack are drawn together), the
differences paired.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.where import RESULTS, where, write_rows
from qpkv_planner.allocation import Space
from qpkv_planner.evaluation import niah, ruler
from qpkv_planner.evaluation.answering import Runner
from qpkv_planner.evaluation.comparison import bootstrap, cluster_of, compare, groups, load_run
from qpkv_planner.evaluation.run import evaluate
from qpkv_planner.evaluation.samples import Encoder, Options
from qpkv_planner.grid import setting_named
from qpkv_runtime.errors import InputError, run_command
from qpkv_runtime.models import load_model
from qpkv_runtime.overview import table
from qpkv_runtime.plan import Plan, load_plan

SUITES = {"niah": niah.make_samples, "ruler": ruler.make_samples}


def main(argv: list[str] | None = None) -> int:
    return run_command("tasks", lambda: _main(argv))


def _main(argv: list[str] | None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--plans", nargs="+", required=True, help="calibrated plans of one model")
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--length", type=int, help="tokens, answer included (default: the plans' context length)")
    parser.add_argument("--samples", type=int, default=2, help="per task, and per depth of niah (default 2)")
    parser.add_argument("--max-new-tokens", type=int, default=40, help="cut answers (default 40)")
    parser.add_argument("--study", type=Path, required=True, help="folder for the answers so far")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/tasks_<model>.csv")
    args = parser.parse_args(argv)
    plans = [load_plan(file) for file in args.plans]
    first = plans[0]
    if len({(plan.model.id, plan.model.dtype) for plan in plans}) > 1 or any(p.calibration is None for p in plans):
        raise InputError("--plans must be calibrated plans of one model")
    model, tokenizer = load_model(first.model.id, first.model.dtype)
    options = Options(
        lengths=(args.length or first.budget.context_tokens,),
        num_samples=args.samples,
        max_new_tokens=args.max_new_tokens,
    )
    encoder = Encoder(tokenizer)
    samples = [sample for suite in args.suites for sample in SUITES[suite](encoder, options)]
    args.study.mkdir(parents=True, exist_ok=True)

    def answered(name: str, plan: Plan | None) -> dict[str, Any]:
        file = args.study / f"{name.replace('/', '-').replace(' ', '_')}.json"
        if file.exists():
            run = load_run(str(file))
            if {row["hash"] for row in run["rows"]} != {sample.hash for sample in samples}:
                raise InputError(f"{file} has other samples' answers: choose another --study")
            return run
        print(f"{name}: {len(samples)} answers", file=sys.stderr, flush=True)
        return evaluate(Runner(model, tokenizer, plan), samples, ("aware",), name=first.model.id, output=file)

    full = answered("full cache", None)
    rows = _rows("full cache", "1", full, full)
    for plan in plans:
        assert plan.calibration is not None
        setting = setting_named(Space.of_plan(plan), plan.calibration.best_uniform)
        uniform = answered(f"{plan.budget.requested} uniform", setting.space.plan(setting.allocation))
        own = answered(f"{plan.budget.requested} plan", plan)
        rows += _rows(f"best uniform ({setting.name})", plan.budget.requested, uniform, uniform)
        rows += _rows("plan", plan.budget.requested, own, uniform)
    made = {"model": first.model.id, "seed": options.seed, "max_new_tokens": args.max_new_tokens, **where()}
    output = args.output or RESULTS / f"tasks_{first.model.id}.csv"
    write_rows(output, [{**row, **made} for row in rows])
    print("\n".join(table([list(rows[0]), *([str(cell) for cell in row.values()] for row in rows)], left={0, 1, 2, 3})))
    return 0


def _rows(name: str, budget: str, run: dict[str, Any], uniform: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each group of the run's samples; the change is that of the cross-entropy from `uniform`."""
    changes = {one.group: one.change for one in compare(uniform, run, ("uniform", name)) if one.measure != "score"}
    found = []
    for group, own in groups(run["rows"]).items():
        suite, task, length, _ = group
        clusters = [cluster_of(row) for row in own]
        score = bootstrap([row["score"] for row in own], clusters)
        loss = bootstrap([row["cross_entropy"] for row in own], clusters)
        change = changes[group]
        found.append(
            {
                "budget": budget,
                "cache": name,
                "suite": suite,
                "task": task,
                "length": length,
                "samples": len(own),
                "score": f"{score.mean:.3f}",
                "score_low": f"{score.low:.3f}",
                "score_high": f"{score.high:.3f}",
                "cross_entropy": f"{loss.mean:.3f}",
                "low": f"{loss.low:.3f}",
                "high": f"{loss.high:.3f}",
                "over_uniform": "" if run is uniform else f"{change.mean:+.3f}",
                "over_uniform_low": "" if run is uniform else f"{change.low:+.3f}",
                "over_uniform_high": "" if run is uniform else f"{change.high:+.3f}",
            }
        )
    return found


if __name__ == "__main__":
    sys.exit(main())
