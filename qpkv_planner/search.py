"""Optuna's refinement around the knapsack's allocation: a few parameters that all layers share.

Layer l gets floor * mean + c * n_l**tau * s_l**sigma tokens, n_l the knapsack's count, mean that of all layers and s_l
the layer's sensitivity, in the knapsack's format with key and value bits moved by a step for all layers. c is whatever
lands on the exact budget (`Space.project`), so every trial is feasible. A trial is first run on a part of the samples
and dropped if it is clearly behind there.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from qpkv_planner.allocation import Allocation, Space, format_name, format_named
from qpkv_planner.knapsack import next_bits
from qpkv_planner.machine import is_gone, this_process
from qpkv_planner.measurement import Evaluator, Objective
from qpkv_runtime.errors import InputError

CLEARLY_BEHIND = 1.2  # a first part's loss above this multiple of the best trial's there ends the trial
HEARTBEAT_SECONDS = 60  # of a database storage: a trial silent for longer belongs to a process that is gone
PROCESS = "process"  # of a trial: what runs it
STARTUP_SHARE = 3  # one trial in so many is drawn before a sampler models those that are done
SHARES = {"tau": (0.6, 1.2), "sigma": (0.0, 0.3), "floor": (0.0, 0.4)}
STEPS = {"key_step": (-1, 1), "value_step": (-1, 1)}
THE_KNAPSACKS = {"tau": 1.0, "sigma": 0.0, "floor": 0.0, "key_step": 0, "value_step": 0}


@dataclass(frozen=True)
class Found:
    """A finished trial on the search split."""

    loss: float
    allocation: Allocation
    parameters: dict[str, float | int]


@dataclass(frozen=True)
class Family:
    """The allocations that the parameters span, around one allocation and its layers' sensitivities."""

    space: Space
    allocation: Allocation
    sensitivities: Sequence[float]
    quantizer: str

    def name(self, objective: Objective, belongs_to: Mapping[str, Any] | None) -> str:
        """Of the study of these trials: their losses compare with no others."""
        depends = [objective, belongs_to, self.space.limit_bytes, [asdict(choice) for choice in self.allocation]]
        digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:12]
        return f"{self.space.model.id} {self.space.requested} of {self.space.context_tokens} tokens, {digest}"

    def member(self, parameters: Mapping[str, Any]) -> Allocation | None:
        """The allocation of these parameters; None where not even the least of it fits the budget."""
        largest = max(max(self.sensitivities), 1e-9)
        weights = [
            choice.tokens ** parameters["tau"] * max(s / largest, 1e-3) ** parameters["sigma"]
            for choice, s in zip(self.allocation, self.sensitivities, strict=True)
        ]
        steps = parameters["key_step"], parameters["value_step"]
        formats = [_moved(choice.format, self.quantizer, *steps) for choice in self.allocation]
        mean = sum(choice.tokens for choice in self.allocation) / len(self.allocation)
        return self.space.project(weights, formats, parameters["floor"] * mean)


def refine(
    evaluator: Evaluator, family: Family, num_trials: int, objective: Objective, seed: int,
    progress: Callable[[int], None], *, sampler: str = "tpe", storage: str | None = None,
    belongs_to: Mapping[str, Any] | None = None,
) -> list[Found]:  # fmt: skip
    """Run the trials, `progress` being called with each one's number; all that finished, best first. The first trial
    is the knapsack's allocation.

    storage: an RDB url, or a file for Optuna's journal; every process that names the same one and searches around the
    same allocation joins one study and stops when it has `num_trials` in all. belongs_to: what else the losses depend
    on.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = family.space
    study = optuna.create_study(
        direction="minimize",
        storage=open_storage(storage),
        study_name=family.name(objective, belongs_to) if storage else None,
        load_if_exists=True,
    )
    _fail_lost(study)
    # waiting in the study, each is run by one process; who joins later does not propose what others have proposed
    held = [trial.system_attrs.get("fixed_params", trial.params) for trial in _not_failed(study)]
    for parameters in _first_trials(num_trials if sampler == "random" else num_trials // STARTUP_SHARE, seed):
        if parameters not in held:
            study.enqueue_trial(parameters)

    def renew_sampler(*_: Any) -> None:
        """One for each trial, so that a search that was killed proposes what it would have."""
        study.sampler = _sampler(sampler, seed + len(_not_failed(study)), is_shared=storage is not None)

    def run(trial: optuna.Trial) -> float:
        trial.set_user_attr(PROCESS, this_process())
        for name, (low, high) in SHARES.items():
            trial.suggest_float(name, low, high)
        for name, steps in STEPS.items():
            trial.suggest_int(name, *steps)
        candidate = family.member(trial.params)
        progress(trial.number)
        if candidate is None:
            raise optuna.TrialPruned
        part = evaluator.evaluate(space, candidate, evaluator.parts[:1]).mean(objective)
        trial.set_user_attr("first_part", part)
        done = [t for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) if t.value is not None]
        best = min(done, key=lambda t: t.value or 0.0, default=None)
        if best is not None and part > CLEARLY_BEHIND * best.user_attrs["first_part"]:
            raise optuna.TrialPruned
        return evaluator.evaluate(space, candidate).mean(objective)

    ended = (TrialState.COMPLETE, TrialState.PRUNED)
    if len(study.get_trials(deepcopy=False, states=ended)) < num_trials:
        renew_sampler()
        stop = optuna.study.MaxTrialsCallback(num_trials, states=ended)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # heartbeats are, at every trial
            study.optimize(run, callbacks=[stop, renew_sampler])
    found = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        candidate = family.member(trial.params)
        if candidate is not None and trial.value is not None:
            found.append(Found(trial.value, candidate, dict(trial.params)))
    return sorted(found, key=lambda one: one.loss)


def _fail_lost(study: optuna.Study) -> None:
    """End the trials that a process of this machine was at when it was killed; of other machines' a database knows by
    their heartbeats."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if PROCESS in trial.user_attrs and is_gone(trial.user_attrs[PROCESS]):
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)


def _not_failed(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state != TrialState.FAIL]


def _first_trials(count: int, seed: int) -> list[dict[str, float | int]]:
    """The knapsack's parameters, then random ones, `count` in all and one at least."""
    chance = np.random.default_rng(seed)
    drawn: list[dict[str, float | int]] = [
        {name: chance.uniform(low, high) for name, (low, high) in SHARES.items()}
        | {name: int(chance.integers(low, high + 1)) for name, (low, high) in STEPS.items()}
        for _ in range(count - 1)
    ]
    return [THE_KNAPSACKS, *drawn]


def _sampler(name: str, seed: int, is_shared: bool) -> optuna.samplers.BaseSampler:
    """By one of the names of `options.SAMPLERS`. is_shared: whether other processes have trials that are running."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name == "tpe":
            return optuna.samplers.TPESampler(
                seed=seed, multivariate=True, n_startup_trials=1, n_ei_candidates=24, constant_liar=is_shared
            )
        if name == "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=1)
        return optuna.samplers.RandomSampler(seed=seed)


def open_storage(name: str | None) -> optuna.storages.BaseStorage | None:
    """Of an url or a file, None of None. Raises InputError where it cannot be opened."""
    if name is None:
        return None
    try:
        if "://" in name:
            with warnings.catch_warnings():
                for category in (optuna.exceptions.ExperimentalWarning, FutureWarning):  # heartbeats; their new name
                    warnings.simplefilter("ignore", category)
                return optuna.storages.RDBStorage(
                    name,
                    heartbeat_interval=HEARTBEAT_SECONDS,
                    failed_trial_callback=optuna.storages.RetryFailedTrialCallback(),
                )
        return optuna.storages.JournalStorage(JournalFileBackend(name))
    except Exception as error:  # drivers and urls fail in as many ways as there are databases
        raise InputError(
            f"--storage must be a database url or a file that can be written, got {name}: {error}"
        ) from None


def _moved(format: str, quantizer: str, key_step: int, value_step: int) -> str:
    """The format with its bits a step up or down."""
    written = format_named(format)
    keys = next_bits(written.keys.bits, key_step) if key_step else written.keys.bits
    values = next_bits(written.values.bits, value_step) if value_step else written.values.bits
    return format_name(quantizer, keys, values)
