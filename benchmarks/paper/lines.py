"""MiKV's key-value lines as cells: the ladder of `benchmarks/precisions.py`, prompt by prompt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.precisions import LADDER, WHENS, answer, key_value_lines, ladder_setting
from qpkv_planner.measurement import Losses
from qpkv_runtime.plan import Model

__all__ = ["BUDGETS", "EVICTION", "NO_BALANCER", "ONE_WIDTH", "SETTINGS", "TWO_TIERS", "WHENS", "Line", "measure"]
BUDGETS = ("1/3", "1/6")
EVICTION, ONE_WIDTH = "h2o eviction", "one width flexgen-k2v2"
TWO_TIERS, NO_BALANCER = "16bit + mikv-k2v2", "16bit + flexgen-k2v2"
SETTINGS = (
    EVICTION,
    "snapkv eviction",
    "one width flexgen-k4v4",
    ONE_WIDTH,
    "16bit + mikv-k4v4",
    TWO_TIERS,
    NO_BALANCER,
)
assert set(SETTINGS) <= set(LADDER)


@dataclass(frozen=True)
class Line:
    """One setting on `contexts` prompts of key-value lines. when: the question's place; setting: of SETTINGS."""

    model: str
    length: int
    contexts: int
    when: str
    setting: str
    budget: str

    @property
    def work(self) -> int:
        """Beside a cell, about: every setting prefills all prompts again."""
        return 4 * self.contexts


def measure(
    line: Line, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, section: Model
) -> tuple[dict[str, list[float]], int, float] | None:
    """(values of `Losses`, exact bytes, kept tokens); None where the setting does not fit."""
    made = ladder_setting(section, line.budget, line.length, line.setting)
    if made is None:
        return None
    prompts = [key_value_lines(tokenizer, seed, line.length, line.when) for seed in range(line.contexts)]
    nats, exact = answer(model, *made, prompts)
    values = {"ce": nats, "kl": [0.0] * len(nats), "exact": [float(hit) for hit in exact]}
    return values, made[0].bytes(made[1]), float(sum(count for count, _ in made[1][0].tiers))


def losses(line: Line, values: dict[str, list[float]]) -> Losses:
    return Losses(
        np.array(values["ce"]), np.array(values["kl"]), np.array(values["exact"]) == 1.0,
        ("line",) * line.contexts, tuple(range(line.contexts)),
    )  # fmt: skip
