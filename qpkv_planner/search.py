"""Optuna's refinement around the knapsack's allocation: a few parameters that all layers share.

Layer l gets floor + c * n_l**tau * s_l**sigma tokens, n_l the knapsack's count and s_l the layer's measured
sensitivity, in the knapsack's format with key and value bits moved by a step for all layers; the observation window
may change too. c is whatever lands on the exact budget (`Space.project`), so every trial is feasible. A trial is first
run on a part of the samples and dropped if it is clearly behind there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import optuna

from qpkv_planner.allocation import Allocation, Space, format_name, format_named
from qpkv_planner.knapsack import next_bits
from qpkv_planner.measurement import Evaluator, Objective

CLEARLY_BEHIND = 1.2  # a first part's loss above this multiple of the best trial's there ends the trial


@dataclass(frozen=True)
class Found:
    """A finished trial on the search split."""

    loss: float
    space: Space
    allocation: Allocation
    parameters: dict[str, float | int]


def refine(
    evaluator: Evaluator, space: Space, allocation: Allocation, sensitivities: Sequence[float], quantizer: str,
    windows: Sequence[int], num_trials: int, objective: Objective, seed: int, progress: Callable[[], None],
) -> list[Found]:  # fmt: skip
    """Run the trials; all that finished, best first. The first trial is the knapsack's allocation."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            seed=seed, multivariate=True, n_startup_trials=min(8, num_trials), n_ei_candidates=24, constant_liar=False
        )
    study = optuna.create_study(sampler=sampler, direction="minimize")
    study.enqueue_trial({"tau": 1.0, "sigma": 0.0, "floor": 0, "key_step": 0, "value_step": 0, "window": space.window})
    found: list[Found] = []
    best_first_part = float("inf")

    def run(trial: optuna.Trial) -> float:
        nonlocal best_first_part
        window = trial.suggest_categorical("window", list(windows)) if len(windows) > 1 else space.window
        tau, sigma = trial.suggest_float("tau", 0.3, 1.7), trial.suggest_float("sigma", 0.0, 0.8)
        floor = trial.suggest_int("floor", 0, 3 * (space.sinks + space.window), step=4)
        steps = trial.suggest_int("key_step", -1, 1), trial.suggest_int("value_step", -1, 1)
        trial_space = replace(space, window=window)
        largest = max(max(sensitivities), 1e-9)
        weights = [
            choice.tokens**tau * max(s / largest, 1e-3) ** sigma
            for choice, s in zip(allocation, sensitivities, strict=True)
        ]
        formats = [_moved(choice.format, quantizer, *steps) for choice in allocation]
        candidate = trial_space.project(weights, formats, floor)
        progress()
        if candidate is None:
            raise optuna.TrialPruned
        first = evaluator.evaluate(trial_space, candidate, evaluator.parts[:1]).mean(objective)
        if first > CLEARLY_BEHIND * best_first_part:
            raise optuna.TrialPruned
        loss = evaluator.evaluate(trial_space, candidate).mean(objective)
        if all(loss < other.loss for other in found):
            best_first_part = first
        found.append(Found(loss, trial_space, candidate, dict(trial.params)))
        return loss

    study.optimize(run, n_trials=num_trials)
    return sorted(found, key=lambda trial: trial.loss)


def _moved(format: str, quantizer: str, key_step: int, value_step: int) -> str:
    """The format with its bits a step up or down."""
    written = format_named(format)
    keys = next_bits(written.keys.bits, key_step) if key_step else written.keys.bits
    values = next_bits(written.values.bits, value_step) if value_step else written.values.bits
    return format_name(quantizer, keys, values)
