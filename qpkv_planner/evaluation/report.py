"""Runs as people read them: tables for a terminal, and the needle's heat map."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from qpkv_planner.evaluation.comparison import Difference, Row, bootstrap, cluster_of, groups
from qpkv_planner.report import need_matplotlib
from qpkv_runtime.errors import InputError
from qpkv_runtime.overview import table

POSITION_BINS = (0, 4, 16, 64)  # of a continuation's tokens


def summary(rows: Sequence[Row]) -> str:
    """Means with 95 % intervals (where there is more than one cluster) for every suite, task and length, the needle's
    grid, and text by position."""
    lines = [["suite", "task", "length", "regime", "samples", "score", "cross-entropy"]]
    for (suite, task, length, regime), own in groups(rows).items():
        cells = []
        for measure in ("score", "cross_entropy"):
            values = [row[measure] for row in own if row[measure] is not None]
            clusters = [cluster_of(row) for row in own if row[measure] is not None]
            mean = bootstrap(values, clusters) if values else None
            cells.append("" if mean is None else mean.text if len(set(clusters)) > 1 else f"{mean.mean:.3f}")
        lines.append([suite, task, length, regime, str(len(own)), *cells])
    parts = ["\n".join(table(lines, left={0, 1, 3}))]
    for regime in dict.fromkeys(row["regime"] for row in rows):
        own = [row for row in rows if row["regime"] == regime]
        parts += [part for part in (_grid(own, regime), _by_position(own, regime)) if part]
    return "\n\n".join(parts)


def _grid(rows: Sequence[Row], regime: str) -> str:
    lengths, depths, means = needle_grid(rows)
    if not lengths:
        return ""
    header = [f"needle's depth, {regime}", *map(str, lengths)]
    cells = [[f"{depth} %", *(f"{mean:.2f}" for mean in line)] for depth, line in zip(depths, means, strict=True)]
    return "\n".join(table([header, *cells], left={0}))


def _by_position(rows: Sequence[Row], regime: str) -> str:
    texts = [row for row in rows if row["suite"] == "text"]
    if not texts:
        return ""
    lines = [[f"cross-entropy of text, {regime}", "tokens", "mean"]]
    for length in dict.fromkeys(row["length"] for row in texts):
        own = [row["by_position"] for row in texts if row["length"] == length]
        for low, high in pairwise(POSITION_BINS):
            if values := [loss for losses in own for loss in losses[low:high]]:
                lines.append(
                    [f"after {length - max(map(len, own))} tokens", f"{low} to {high}", f"{np.mean(values):.3f}"]
                )
    return "\n".join(table(lines, left={0}))


def needle_grid(rows: Sequence[Row]) -> tuple[list[int], list[int], list[list[float]]]:
    """Lengths, depths (per cent), and the mean score of each [depth][length] of the suite niah."""
    cells: dict[tuple[int, int], list[float]] = {}
    for row in rows:
        if row["suite"] == "niah":
            cells.setdefault((row["depth"], row["length"]), []).append(row["score"])
    lengths = sorted({length for _, length in cells})
    depths = sorted({depth for depth, _ in cells})
    means = [[float(np.mean(cells.get((depth, length), [np.nan]))) for length in lengths] for depth in depths]
    return lengths, depths, means


def heat_map(rows: Sequence[Row], title: str, file: Path) -> None:
    """Draw the needle's grid as a PNG: lengths to the right, depths down, red where nothing came back, green where
    all did. Raises InputError without matplotlib or without rows of niah."""
    lengths, depths, means = needle_grid(rows)
    if not lengths:
        raise InputError("a heat map needs rows of the suite niah")
    pyplot = load_pyplot("a heat map")
    from matplotlib.colors import LinearSegmentedColormap

    colors = LinearSegmentedColormap.from_list("needle", ["#f0496e", "#ebb839", "#0cd79f"])
    figure, axes = pyplot.subplots(figsize=(max(5, 0.8 * len(lengths) + 3), max(3, 0.45 * len(depths) + 2)))
    image = axes.imshow(means, cmap=colors, vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45)
    axes.set_yticks(range(len(depths)), [f"{depth} %" for depth in depths])
    axes.set_xlabel("prompt and answer, tokens")
    axes.set_ylabel("needle's depth")
    axes.set_title(title, fontsize=10)
    for y, line in enumerate(means):
        for x, mean in enumerate(line):
            axes.text(x, y, f"{mean:.2f}", ha="center", va="center", fontsize=8)
    figure.colorbar(image, label="score")
    save_png(figure, file, 150)


def save_png(figure: Any, file: Path, dots_per_inch: int) -> None:
    """Write a figure and close it. Raises InputError where it cannot be written."""
    figure.tight_layout()
    try:
        figure.savefig(file, dpi=dots_per_inch, format="png")
    except OSError as error:
        raise InputError(f"cannot write {file}: {error.strerror}") from None
    finally:
        load_pyplot("a figure").close(figure)


def load_pyplot(what: str) -> Any:
    """Matplotlib without a screen. Raises InputError that `what` needs it."""
    need_matplotlib(what)
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def comparison(differences: Sequence[Difference], names: tuple[str, str]) -> str:
    """A table of paired differences, with an interval where there is more than one cluster; a star where that leaves
    out zero."""
    lines = [["suite", "task", "length", "regime", "measure", "samples", *names, "second - first (95 %)", ""]]
    for one in differences:
        has_interval = one.num_clusters > 1
        is_clear = has_interval and (one.change.low > 0 or one.change.high < 0)
        change = f"{one.change.mean:+.3f}"
        change += f" ({one.change.low:+.3f} to {one.change.high:+.3f})" if has_interval else ""
        lines.append(
            [*one.group, one.measure.replace("_", "-"), str(one.num_samples), f"{one.a:.3f}", f"{one.b:.3f}", change,
             "*" * is_clear]
        )  # fmt: skip
    return "\n".join(table(lines, left={0, 1, 3, 4}))
