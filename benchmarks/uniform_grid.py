"""The uniform grid, and plans, on held-out samples at equal exact bytes: cross-entropy, KL and exact answers by kind.

    python -m benchmarks.uniform_grid --budgets 1/16 1/64 --plans plans/smollm2__1-16.yaml plans/smollm2__1-64.yaml
    python -m benchmarks.uniform_grid --split test --budgets --plans plans/smollm2__*.yaml     (plans alone)
    python -m benchmarks.uniform_grid --quick          (tiny, 1/32, a few samples)

Writes a row per setting and budget to benchmarks/results/<name>.csv, with hardware and commit, and prints the table.
The samples are the validation split's, which uniform settings have not seen, or the test split's, which no search has
seen. Beside each plan stand the uniform setting that its search found best and the papers' recommendation (4x the
tokens at 4 bit) with SnapKV and PyramidKV. A plan's row has how much less cross-entropy than that best uniform setting
(ce_less) and how many more exact answers (exact_more) it has, paired, and the share of the gap between that setting and
the full cache that it closes in either (ce_closed, exact_closed); the last row has the shares for all plans together.
Intervals are 95 % bootstraps over contexts. exact_more and exact_closed are about the kinds that the full cache can do:
it answers at least a quarter of them.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.where import RESULTS, where, write_rows
from qpkv_planner.allocation import Space, allocation_of
from qpkv_planner.calibration import BUILT_IN, Data, make_split
from qpkv_planner.calibration_cache import load_or_prepare
from qpkv_planner.grid import FORMATS, QUICK_FORMATS, make_grid, scorer_name, scorer_named, setting_named
from qpkv_planner.measurement import Evaluator, Losses, interval
from qpkv_planner.mix import parse_mix
from qpkv_planner.options import SCORERS
from qpkv_planner.session import describe
from qpkv_runtime.compression import Scoring
from qpkv_runtime.models import load_model
from qpkv_runtime.overview import table
from qpkv_runtime.plan import Decode, Interval, load_plan

KINDS = ("number", "word", "place", "line", "chain", "text")
CAN_DO = 0.25
COMPARISONS = ("ce_less", "ce_closed", "exact_more", "exact_closed")
PAPER = ("snapkv uniform kivi-k4v4 window 16", "snapkv pyramidkv kivi-k4v4 window 16")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--context-length", type=int, default=1024)
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument(
        "--budgets", nargs="*", default=["1/16", "1/64"], help="of the uniform grid; none with no value"
    )
    parser.add_argument("--contexts", type=int, default=24)
    parser.add_argument("--calibration-mix", metavar="MIX", help="as qpkv-plan's (default: that of the first plan)")
    parser.add_argument("--plans", nargs="*", type=Path, default=[], help="plans for the same model to add as rows")
    parser.add_argument(
        "--scorers",
        nargs="+",
        default=[*map(scorer_name, SCORERS), "snapkv(queries=16)", "knorm", "streamingllm"],
        help="with their parameters; h2o takes long",
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/uniform_grid_<model>.csv")
    parser.add_argument("--calibration-cache", type=Path, help="where prefills are kept")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.model, arguments.budgets, arguments.contexts = "tiny", ["1/32"], 6
    started = time.monotonic()
    model, tokenizer = load_model(arguments.model)
    plans = [load_plan(path) for path in arguments.plans]
    if arguments.calibration_mix:
        data = Data(mix=parse_mix(arguments.calibration_mix))
    else:
        data = next((Data.of_record(plan.calibration.data) for plan in plans if plan.calibration), BUILT_IN)
    split = make_split(tokenizer, arguments.split, arguments.contexts, arguments.context_length, seed=0, data=data)
    section = describe(model, tokenizer, arguments.model, split.contexts[0])
    scorers = [scorer_named(name) for name in arguments.scorers[: 1 if arguments.quick else None]]
    formats = QUICK_FORMATS if arguments.quick else FORMATS
    settings = []
    for budget in arguments.budgets:
        space = Space(
            section, budget, arguments.context_length, scorers[0], 4, 4,
            Decode(reserve_tokens=1, format="rotated-k4v4"),
        )  # fmt: skip
        grid = make_grid(space, scorers, formats, None)
        settings += [(budget, setting.name, setting.space, setting.allocation) for setting in grid]
    for plan in plans:
        assert plan.calibration is not None
        space = Space.of_plan(plan)
        settings.append((plan.budget.requested, "plan", space, allocation_of(plan)))
        found = [setting_named(space, name) for name in (plan.calibration.best_uniform, *PAPER)]
        settings += [
            (plan.budget.requested, f"{label}{one.name}", one.space, one.allocation)
            for label, one in zip(("best uniform: ", "paper: ", "paper: "), found, strict=True)
        ]
    scorings = list(dict.fromkeys(Scoring.of(s.scorer, s.sinks, s.window) for *_, s, _ in settings))
    prepared = load_or_prepare(model, section, split, scorings, 3, lambda: None, arguments.calibration_cache)
    evaluator = Evaluator(model, prepared)
    full = evaluator.full()
    rows = [_row("1", "full cache", "", 0, full, full)]
    measured = []
    for budget, name, space, allocation in settings:
        losses = evaluator.evaluate(space, allocation)
        measured.append((budget, name, losses))
        tokens = sum(choice.tokens for choice in allocation) / len(allocation)
        rows.append(_row(budget, name, f"{tokens:.1f}", space.bytes(allocation), losses, full))
        print(f"{budget:>6}  {name:<40} {losses.mean('ce'):.3f}", file=sys.stderr, flush=True)
    pairs = {
        budget: (losses, next(l for b, n, l in measured if b == budget and n.startswith("best uniform: ")))
        for budget, name, losses in measured
        if name == "plan"
    }
    for row in rows:
        if row["setting"] == "plan":
            own, uniform = pairs[row["budget"]]
            row["ce_less"] = interval(uniform, "ce", minus=own).text
            row["exact_more"] = interval(_able(own, full), "exact", minus=_able(uniform, full)).text
            row |= _closed([(own, uniform)], full)
    if len(pairs) > 1:
        rows.append({**dict.fromkeys(rows[0], ""), "setting": "all plans", **_closed(list(pairs.values()), full)})
    about = {
        "model": arguments.model,
        "split": arguments.split,
        "context_tokens": str(arguments.context_length),
        "samples": str(len(prepared)),
        **{f"samples_{kind}": str(prepared.kinds.count(kind)) for kind in KINDS},
        **where(),
        "seconds": f"{time.monotonic() - started:.0f}",
    }
    path = arguments.output or RESULTS / f"uniform_grid_{arguments.model}.csv"
    write_rows(path, [{**row, **about} for row in rows])
    shown = [
        "budget",
        "setting",
        "tokens",
        "bytes",
        "cross_entropy",
        "kl",
        "exact",
        *COMPARISONS,
        *(f"ce_{kind}" for kind in KINDS),
    ]
    print("\n".join(table([shown, *([str(row[key]) for key in shown] for row in rows)], left={0, 1})))
    print(f"\n{path}: " + ", ".join(f"{key} {value}" for key, value in about.items()))
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
        **dict.fromkeys(COMPARISONS, ""),
        **{f"ce_{kind}": f"{kinds[kind]['cross_entropy']:.3f}" if kind in kinds else "" for kind in KINDS},
        **{f"kl_{kind}": f"{kinds[kind]['kl']:.3f}" if kind in kinds else "" for kind in KINDS},
        **{f"exact_{kind}": f"{kinds[kind]['exact']:.2f}" if kind in kinds else "" for kind in KINDS[:-1]},
    }


def _able(losses: Losses, full: Losses) -> Losses:
    """Those of the kinds that the full cache can do."""
    able = [kind for kind, means in full.by_kind().items() if means["exact"] >= CAN_DO]
    return losses.of_kinds(able).counted("exact")


def _closed(pairs: list[tuple[Losses, Losses]], full: Losses) -> dict[str, str]:
    """sum(best uniform - plan) / sum(best uniform - full) over (plan, best uniform) pairs, with its interval over
    contexts: of cross-entropy, and of exact answers. Empty where there is no gap."""
    able = [(_able(plan, full), _able(uniform, full)) for plan, uniform in pairs]
    return {
        "ce_closed": _share_closed(pairs, full, "ce"),
        "exact_closed": _share_closed(able, _able(full, full), "exact"),
    }


def _share_closed(pairs: list[tuple[Losses, Losses]], full: Losses, measure: str) -> str:
    contexts, kinds = np.array(full.contexts), np.array(full.kinds)
    of_kinds = [kinds == kind for kind in sorted(set(full.kinds))]

    def gains(weights: NDArray[np.float64]) -> tuple[float, float]:
        """What the plans gain on the uniform settings, and what the full cache does."""

        def good(losses: Losses) -> float:
            values = getattr(losses, measure) * weights
            mean = float(np.mean([values[own].sum() / weights[own].sum() for own in of_kinds]))
            return mean if measure == "exact" else -mean

        uniforms = [good(uniform) for _, uniform in pairs]
        return sum(good(plan) for plan, _ in pairs) - sum(uniforms), len(pairs) * good(full) - sum(uniforms)

    plans, gap = gains(np.ones(len(contexts)))
    if gap <= 0:
        return ""
    chance, known = np.random.default_rng(0), np.unique(contexts)
    drawn = [np.bincount(chance.integers(0, len(known), len(known)), minlength=len(known)) for _ in range(1000)]
    place = np.searchsorted(known, contexts)
    with np.errstate(invalid="ignore", divide="ignore"):  # left out: a draw without a sample of some kind, or a gap
        shares = np.array([np.divide(*gains(counts[place].astype(np.float64))) for counts in drawn])
    low, high = np.percentile(shares[np.isfinite(shares)], [2.5, 97.5])
    return Interval(mean=plans / gap, low=float(low), high=float(high)).text


if __name__ == "__main__":
    sys.exit(main())
