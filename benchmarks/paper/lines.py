"""MiKV's key-value lines: the ladder of `benchmarks/precisions.py`, prompt by prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.paper.settings import Line
from benchmarks.precisions import answer, key_value_lines, ladder_setting
from qpkv_planner.measurement import Losses
from qpkv_runtime.plan import Model


def measure(
    line: Line, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, section: Model
) -> tuple[dict[str, list[float]], int, int] | None:
    """(values of `Losses`, exact bytes, kept tokens); None where the setting does not fit."""
    made = ladder_setting(section, line.budget, line.length, line.setting)
    if made is None:
        return None
    space, allocation = made
    prompts = [key_value_lines(tokenizer, seed, line.length, line.when) for seed in range(line.contexts)]
    nats, exact = answer(model, space, allocation, prompts)
    values = {"ce": nats, "kl": [0.0] * len(nats), "exact": [float(hit) for hit in exact]}
    return values, space.bytes(allocation), sum(count for count, _ in allocation[0].tiers)


def losses(line: Line, values: Mapping[str, Sequence[float]]) -> Losses:
    """Every prompt is a context of its own."""
    return Losses.of(values, ("line",) * line.contexts, range(line.contexts))
