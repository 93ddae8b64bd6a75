"""What a trial costs: a naive one (prefill each prompt under the plan, then measure), the planner's, and one
alternative of one layer by prediction; and what Optuna itself takes.

    python -m benchmarks.trial_cost --model smollm2 --context-length 2048 --contexts 3

All on the same samples and plan, one after the other in one run. Writes benchmarks/results/trial_cost_<model>.csv.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch

from benchmarks.where import RESULTS, where, write_rows
from qpkv_planner.allocation import Allocation, Space
from qpkv_planner.calibration import Split, make_split
from qpkv_planner.grid import make_setting
from qpkv_planner.knapsack import FIRST_RADIUS, alternatives, tokens_and_bits
from qpkv_planner.linearization import predicted_changes
from qpkv_planner.measurement import Evaluator
from qpkv_planner.options import SCORERS
from qpkv_planner.prefill import prepare
from qpkv_planner.session import describe
from qpkv_runtime.cache import PlannedCache
from qpkv_runtime.compression import Scoring
from qpkv_runtime.models import load_model
from qpkv_runtime.plan import Decode

FORMAT = "rotated-k4v2"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--budget", default="1/64")
    parser.add_argument("--context-length", type=int, default=2048)
    parser.add_argument("--contexts", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="of what takes seconds; the naive trial runs once")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/trial_cost_<model>.csv")
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model)
    split = make_split(tokenizer, "search", arguments.contexts, arguments.context_length, seed=0)
    section = describe(model, tokenizer, arguments.model, split.contexts[0])
    space = Space(
        section, arguments.budget, arguments.context_length, SCORERS[0], 4, 4,
        Decode(reserve_tokens=1, format="rotated-k4v4"),
    )  # fmt: skip
    setting = make_setting(space, "uniform", FORMAT, None)
    assert setting is not None
    space, allocation = setting.space, setting.allocation
    scoring = Scoring.of(space.scorer, space.sinks, space.window)
    (prefill,), prepared = _timed(
        lambda: prepare(model, section.shape, section.storage_dtype, split, [scoring], 1, lambda: None), 1
    )
    (naive,), _ = _timed(lambda: _naive(model, space, allocation, split), 1)

    evaluators = [Evaluator(model, prepared) for _ in range(arguments.repeats)]
    fresh = [_timed(lambda e=e: e.evaluate(space, allocation), 1) for e in evaluators]  # type: ignore[misc]
    again = [_timed(lambda e=e: _measured_again(e, space, allocation), 1)[0][0] for e in evaluators]  # type: ignore[misc]
    wished = [
        alternatives(space, layer, mine, tokens_and_bits(mine, "rotated", FIRST_RADIUS), 0)
        for layer, mine in enumerate(allocation)
    ]
    (table,), _ = _timed(lambda: predicted_changes(evaluators[0], space, allocation, wished, "kl"), 1)
    one_trial = float(np.median([seconds[0] for seconds, _ in fresh]))
    one_layer, optuna_seconds = table / sum(map(len, wished)), _optuna_seconds()
    rows = [
        ("prefill of all samples, once", prefill),
        ("naive trial: prefill each prompt under the plan", naive),
        ("trial with new choices in every layer", one_trial),
        ("trial whose choices are known", float(np.median(again))),
        ("one alternative of one layer, predicted", one_layer),
        ("Optuna's own time for a trial", optuna_seconds),
    ]
    about = {"model": arguments.model, "budget": arguments.budget, "context_tokens": arguments.context_length,
             "samples": len(prepared), **where()}  # fmt: skip
    path = arguments.output or RESULTS / f"trial_cost_{arguments.model}.csv"
    write_rows(
        path,
        [
            {"what": what, "seconds": f"{seconds:.4f}", "naive_trials": f"{seconds / naive:.4f}",
             "of_a_trial": f"{seconds / one_trial:.4f}", **about}
            for what, seconds in rows
        ],
    )  # fmt: skip
    for what, seconds in rows:
        print(f"{what:<48} {seconds:9.3f} s   1/{naive / seconds:.0f} of a naive trial")
    return 0


def _timed(call: Callable[[], Any], repeats: int) -> tuple[list[float], Any]:
    seconds, result = [], None
    for _ in range(repeats):
        started = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - started)
    return seconds, result


@torch.no_grad()
def _naive(model: Any, space: Space, allocation: Allocation, split: Split) -> list[float]:
    """Every sample by itself: prefill its prompt into a PlannedCache, then its continuation -> cross-entropies."""
    plan, losses = space.plan(allocation), list[float]()
    for context in split.contexts:
        for sample in context.samples:
            cache = PlannedCache.from_plan(plan, model)
            prompt = torch.tensor([context.tokens + sample.prompt], device=model.device)
            model(prompt[:, :-1], past_key_values=cache, logits_to_keep=1)
            fed = torch.tensor([[sample.prompt[-1], *sample.continuation[:-1]]], device=model.device)
            logits = model(fed, past_key_values=cache).logits[0].float()
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(sample.continuation)).item())
    return losses


def _measured_again(evaluator: Evaluator, space: Space, allocation: Allocation) -> None:
    evaluator.journal.entries.clear()
    evaluator.evaluate(space, allocation)


def _optuna_seconds(num_trials: int = 24) -> float:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0, multivariate=True))
    started = time.perf_counter()
    study.optimize(lambda trial: sum(trial.suggest_float(f"x{i}", 0, 1) for i in range(5)), n_trials=num_trials)
    return (time.perf_counter() - started) / num_trials


if __name__ == "__main__":
    sys.exit(main())
