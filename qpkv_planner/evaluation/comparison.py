"""Means with intervals, and two runs on the same samples: paired differences. The bootstrap draws clusters of samples:
those of one document, at whatever length and depth, are no more independent than their document is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qpkv_planner.bootstrap import cluster_means
from qpkv_runtime.errors import InputError
from qpkv_runtime.plan import Interval

NUM_RESAMPLES = 10_000
MEASURES = ("score", "cross_entropy")
ROW_KEYS = {"id", "suite", "task", "category", "length", "regime", "hash", *MEASURES}  # that a comparison reads

Row = dict[str, Any]
Group = tuple[str, str, str, str]  # suite, task or (category) or (all), length or all, regime


@dataclass(frozen=True)
class Difference:
    """One measure of one group in two runs, and b minus a, whose interval says nothing where there is one cluster."""

    group: Group
    measure: str
    num_samples: int
    num_clusters: int
    a: float
    b: float
    change: Interval


def cluster_of(row: Mapping[str, Any]) -> str:
    """The key of the rows that are drawn together; rows from before there was one stand alone."""
    return str(row.get("cluster", row["hash"]))


def bootstrap(values: Sequence[float], clusters: Sequence[str], seed: int = 0) -> Interval:
    """The mean with its 95 % interval over clusters; clusters: of each value. One cluster has no spread."""
    array: NDArray[np.float64] = np.asarray(values, dtype=np.float64)
    _, places = np.unique(clusters, return_inverse=True)
    sums, counts = np.bincount(places, array), np.bincount(places)
    low, high = np.percentile(cluster_means(sums, counts, NUM_RESAMPLES, seed), [2.5, 97.5])
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
    sections = [("the run", run, {"model", "plan"}), *(("a row", row, ROW_KEYS) for row in run["rows"])]
    if run.get("plan") is not None:
        sections.append(("plan", run["plan"], {"file", "planned_bytes"}))
    for what, section, keys in sections:
        if not isinstance(section, dict) or keys - section.keys():
            lacks = f"lacks {min(keys - section.keys())}" if isinstance(section, dict) else "is not a mapping"
            raise InputError(f"{file}: is not a run of qpkv-eval (--json writes one): {what} {lacks}")
    if not run["rows"]:
        raise InputError(f"{file}: has no row, so there is nothing to compare")
    return run


def compare(a: dict[str, Any], b: dict[str, Any], names: tuple[str, str]) -> list[Difference]:
    """Every group's differences, b minus a. Raises InputError unless both runs are of the very same samples."""
    own, other = ({(row["hash"], row["regime"]): row for row in run["rows"]} for run in (a, b))
    for rows, others, name, other_name in ((own, other, names[0], names[1]), (other, own, names[1], names[0])):
        if missing := [row for key, row in rows.items() if key not in others]:
            raise InputError(
                f"only runs of the same samples can be compared, but {len(missing)} of {name} are not in {other_name} "
                f"({missing[0]['id']}, {missing[0]['regime']}): use the same suites, lengths, seed and tokenizer"
            )
    found = []
    for group, together in groups(a["rows"]).items():
        for measure in MEASURES:
            pairs = [(row, other[row["hash"], row["regime"]]) for row in together]
            pairs = [pair for pair in pairs if None not in (pair[0][measure], pair[1][measure])]
            if pairs:
                left, right = (float(np.mean([row[measure] for row in side])) for side in zip(*pairs, strict=True))
                clusters = [cluster_of({**y, **x}) for x, y in pairs]  # either run may be from before there were any
                change = bootstrap([y[measure] - x[measure] for x, y in pairs], clusters)
                found.append(Difference(group, measure, len(pairs), len(set(clusters)), left, right, change))
    return found
