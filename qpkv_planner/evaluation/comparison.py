"""Means with intervals, and two runs on the same samples: paired differences, bootstrapped over samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qpkv_runtime.errors import InputError
from qpkv_runtime.plan import Interval

NUM_RESAMPLES = 10_000
MEASURES = ("score", "cross_entropy")

Row = dict[str, Any]
Group = tuple[str, str, str, str]  # suite, task or (category) or (all), length or all, regime


@dataclass(frozen=True)
class Difference:
    """One measure of one group in two runs, and b minus a."""

    group: Group
    measure: str
    num_samples: int
    a: float
    b: float
    change: Interval


def bootstrap(values: Sequence[float], seed: int = 0) -> Interval:
    """The mean with its 95 % interval over samples."""
    array: NDArray[np.float64] = np.asarray(values, dtype=np.float64)
    chance = np.random.default_rng(seed)
    drawn = (chance.integers(0, len(array), (NUM_RESAMPLES // 10, len(array))) for _ in range(10))  # a tenth at a time
    low, high = np.percentile([array[rows].mean(1) for rows in drawn], [2.5, 97.5])
    return Interval(mean=float(array.mean()), low=float(low), high=float(high))


def groups(rows: Sequence[Row]) -> dict[Group, list[Row]]:
    """Rows by suite, task, length and regime; then those of each category and of the suite, where they are more."""
    found: dict[Group, list[Row]] = {}
    for suite, regime in dict.fromkeys((row["suite"], row["regime"]) for row in rows):
        own = [row for row in rows if (row["suite"], row["regime"]) == (suite, regime)]
        wider: dict[Group, list[Row]] = {}
        for row in own:
            found.setdefault((suite, row["task"], str(row["length"]), regime), []).append(row)
            if row["category"]:
                wider.setdefault((suite, f"({row['category']})", "all", regime), []).append(row)
        for group, together in {**wider, (suite, "(all)", "all", regime): own}.items():
            if together not in found.values():
                found[group] = together
    return found


def load_run(file: str) -> dict[str, Any]:
    """A run's JSON file. Raises InputError for another file."""
    try:
        run = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file}: cannot be read as a run of qpkv-eval: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{file}: cannot be read as a run of qpkv-eval: {error}") from None
    if not isinstance(run, dict) or not isinstance(run.get("rows"), list) or run.get("version") != 1:
        raise InputError(f"{file}: is not a run of qpkv-eval (--json writes one)")
    return run


def compare(a: dict[str, Any], b: dict[str, Any], names: tuple[str, str]) -> list[Difference]:
    """Every group's differences, b minus a. Raises InputError unless both runs are of the very same samples."""
    own, other = ({(row["id"], row["regime"]): row for row in run["rows"]} for run in (a, b))
    for rows, others, name, other_name in ((own, other, names[0], names[1]), (other, own, names[1], names[0])):
        if missing := [key for key in rows if key not in others or others[key]["hash"] != rows[key]["hash"]]:
            raise InputError(
                f"only runs of the same samples can be compared, but {len(missing)} of {name} are not in {other_name} "
                f"({missing[0][0]}, {missing[0][1]}): use the same suites, lengths, seed and tokenizer"
            )
    found = []
    for group, together in groups(a["rows"]).items():
        for measure in MEASURES:
            pairs = [(row[measure], other[row["id"], row["regime"]][measure]) for row in together]
            pairs = [pair for pair in pairs if None not in pair]
            if pairs:
                left, right = (float(np.mean(side)) for side in zip(*pairs, strict=True))
                change = bootstrap([y - x for x, y in pairs])
                found.append(Difference(group, measure, len(pairs), left, right, change))
    return found
