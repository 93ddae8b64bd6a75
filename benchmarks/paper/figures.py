"""The figures as PNGs: cross-entropy along budgets, lengths, layers or formats."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.paper.laboratory import Measured
from benchmarks.paper.settings import Key
from benchmarks.paper.tables import Plot, Table
from qpkv_planner.evaluation.report import load_pyplot, save_png

COLUMNS = 2


def draw(table: Table, measured: Mapping[Key, Measured], full: Mapping[tuple[str, int], float], file: Path) -> bool:
    """Draw the table's plots, those half of which is measured, side by side.

    full: cross-entropy of the full cache at each place. Returns whether there was anything to draw.
    """
    plots = [plot for plot in table.plots if _is_worth_it(plot, measured)]
    if not plots:
        return False
    pyplot = load_pyplot("a figure")
    rows, columns = -(-len(plots) // COLUMNS), min(COLUMNS, len(plots))
    figure, grid = pyplot.subplots(rows, columns, figsize=(5.2 * columns, 3.4 * rows), squeeze=False, sharey=True)
    for axes, plot in zip(grid.flat, plots, strict=False):
        _plot(axes, plot, measured, full)
    for axes in grid.flat[len(plots) :]:
        axes.set_visible(False)
    figure.suptitle(table.title, fontsize=10)
    save_png(figure, file, 100)
    return True


def _is_worth_it(plot: Plot, measured: Mapping[Key, Measured]) -> bool:
    cells = [cell for series in plot.series.values() for cell in series]
    return 2 * sum(cell in measured for cell in cells) >= len(cells)


def _plot(axes: Any, plot: Plot, measured: Mapping[Key, Measured], full: Mapping[tuple[str, int], float]) -> None:
    """One pair of axes: a line for each series."""
    places = set()
    for name, series in plot.series.items():
        found = [(i, cell, measured[cell]) for i, cell in enumerate(series) if cell in measured]
        places |= {cell.place for _, cell, _ in found}
        if isinstance(plot.x, tuple):
            x = [float(i) for i, _, _ in found]
        else:
            x = [one.nominal if plot.x == "nominal" else one.exact for _, _, one in found]
        axes.plot(x, [one.losses.mean("ce") for _, _, one in found], marker="o", markersize=4, label=name)
    if len(places) == 1 and (place := places.pop()) in full:
        axes.axhline(full[place], color="gray", linewidth=1, linestyle=":", label="full cache")
    if isinstance(plot.x, tuple):
        axes.set_xticks(range(len(plot.x)), plot.x, fontsize=7)
    else:
        axes.set_xscale("log", base=2)
        low, high = axes.get_xlim()
        ticks = [2.0**-n for n in range(9) if low <= 2.0**-n <= high]
        axes.set_xticks(ticks, [f"1/{round(1 / tick)}" for tick in ticks], fontsize=8)
        axes.set_xlabel("share of the full cache", fontsize=8)
    axes.set_ylabel("cross-entropy, nats", fontsize=8)
    axes.set_title(plot.title, fontsize=9)
    axes.legend(fontsize=7)
