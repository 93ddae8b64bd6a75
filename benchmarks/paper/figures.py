"""The figures as PNGs: cross-entropy along budgets, lengths, layers or formats."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path

from benchmarks.paper.laboratory import Measured
from benchmarks.paper.tables import Plot, Table
from qpkv_planner.evaluation.report import load_pyplot
from qpkv_runtime.errors import InputError

COLUMNS = 2


def draw(table: Table, measured: Mapping[Hashable, Measured], full: Mapping[Hashable, float], file: Path) -> bool:
    """Draw the table's plots, those with something measured, side by side. full: cross-entropy of the full cache at each
    place. Returns whether there was anything to draw."""
    plots = [p for p in table.plots if any(cell in measured for series in p.series.values() for cell in series)]
    if not plots:
        return False
    pyplot = load_pyplot("a figure")
    rows, columns = -(-len(plots) // COLUMNS), min(COLUMNS, len(plots))
    figure, grid = pyplot.subplots(rows, columns, figsize=(5.2 * columns, 3.4 * rows), squeeze=False, sharey=True)
    for axes, plot in zip(grid.flat, plots, strict=False):
        _lines(axes, plot, measured, full)
    for axes in grid.flat[len(plots) :]:
        axes.set_visible(False)
    figure.suptitle(table.title, fontsize=10)
    figure.tight_layout()
    try:
        figure.savefig(file, dpi=100, format="png")
    except OSError as error:
        raise InputError(f"cannot write {file}: {error.strerror}") from None
    finally:
        pyplot.close(figure)
    return True


def _lines(axes: object, plot: Plot, measured: Mapping[Hashable, Measured], full: Mapping[Hashable, float]) -> None:
    places = set()
    for name, series in plot.series.items():
        found = [(i, measured[cell]) for i, cell in enumerate(series) if cell in measured]
        places |= {cell.place for cell in series if cell in measured}  # type: ignore[attr-defined]
        if isinstance(plot.x, tuple):
            x = [float(i) for i, _ in found]
        else:
            x = [one.nominal if plot.x == "nominal" else one.exact for _, one in found]
        axes.plot(x, [one.losses.mean("ce") for _, one in found], marker="o", markersize=4, label=name)  # type: ignore[attr-defined]
    _finish(axes, plot, next(iter(places)) if len(places) == 1 else None, full)


def _finish(axes, plot: Plot, place: Hashable | None, full: Mapping[Hashable, float]) -> None:  # type: ignore[no-untyped-def]
    if place in full:
        axes.axhline(full[place], color="gray", linewidth=1, linestyle=":", label="full cache")
    if isinstance(plot.x, tuple):
        axes.set_xticks(range(len(plot.x)), plot.x, fontsize=7)
    else:
        axes.set_xscale("log", base=2)
        ticks = [2.0**-n for n in range(8)]
        low, high = axes.get_xlim()
        shown = [tick for tick in ticks if low <= tick <= high]
        axes.set_xticks(shown, [f"1/{round(1 / tick)}" for tick in shown], fontsize=8)
        axes.set_xlabel("share of the full cache", fontsize=8)
    axes.set_ylabel("cross-entropy, nats", fontsize=8)
    axes.set_title(plot.title, fontsize=9)
    axes.legend(fontsize=7)
