"""The drawings of a search's report, by matplotlib: panels for HTML (inline SVG) and, put together, one PNG.

Colours are those of Okabe and Ito, which stay apart for colour-blind eyes, with another marker for each stage. In
SVG, text stays text, and ink and lines take the page's colours, light or dark.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import CenteredNorm, LogNorm, Normalize
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from qpkv_planner.report import Point, Report, duration, title, uses, verdict
from qpkv_runtime.ledger import make_ledger
from qpkv_runtime.overview import tokens_of_heads
from qpkv_runtime.plan import Interval, Plan

INK, MUTED, GRID = "#1b1c1f", "#63686f", "#dfe2e7"
THEME = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)"}
ORANGE, SKY, GREEN, YELLOW = "#e69f00", "#56b4e9", "#009e73", "#f0e442"
BLUE, RED, PINK = "#0072b2", "#d55e00", "#cc79a7"
BITS_MAP, BITS_NORM, CHANGE_MAP = "viridis_r", LogNorm(1, 16), "RdBu_r"
STAGES = {  # a journalled stage: its legend, colour and marker
    "uniform grid": ("uniform settings", ORANGE, "s"),
    "elimination": ("elimination", SKY, "v"),
    "knapsack": ("knapsack", BLUE, "D"),
    "additivity": ("random plans", PINK, "P"),
    "search": ("Optuna's trials", GREEN, "o"),
}
OTHER = ("finalists", MUTED, "X")
CELL = "#ffffff66"  # between the cells of heat maps
UNIFORM: dict[str, Any] = {"color": ORANGE, "marker": "s", "markersize": 6.5}
PLAN: dict[str, Any] = {"color": RED, "marker": "*", "markersize": 13}
USES = {  # what bytes are for: others are grey
    "key_codes": BLUE,
    "key_scales": SKY,
    "value_codes": ORANGE,
    "value_scales": YELLOW,
    "shared_tiers": BLUE,
    "reserve": GREEN,
    "head_vectors": PINK,
    "table": RED,
}
MEASURES = {"cross_entropy": "cross-entropy, nats per token", "kl": "KL to the full cache, nats per token"}
RC: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "qpkv",
}
DPI = 110


@dataclass(frozen=True)
class Panel:
    """One drawing. size: inches; draw: onto an empty figure or a part of one."""

    title: str
    caption: str
    size: tuple[float, float]
    draw: Callable[[FigureBase], None]

    def svg(self) -> str:
        """The panel as an SVG element for an HTML page."""
        out = io.StringIO()
        with matplotlib.rc_context(RC):
            figure = Figure(self.size, layout="constrained")
            self.draw(figure)
            figure.savefig(out, format="svg", metadata={"Date": None})
        text = re.sub(r' id="[a-zA-Z0-9.]+_\d+"', "", out.getvalue()[out.getvalue().index("<svg") :])
        for colour, variable in THEME.items():
            text = text.replace(colour, variable)
        return text.replace("<svg ", '<svg role="img" ', 1)


def of_all(report: Report) -> list[list[Panel]]:
    """Rows of panels about all budgets together."""
    words = (
        "Stored bytes against loss. Above, the validation split, on which the plans were chosen: bars are 95 % "
        "intervals, the best uniform setting and the plan stand a little apart to be seen. Below, all that was "
        "measured on the search split; faint marks are of a part of the samples (corrected by the full cache's "
        "cross-entropy on them). The frontier is the lowest loss measured on all samples within as many bytes."
    )
    return [[Panel("Information plane", words, (11, 8), lambda figure: _plane(figure, report))]] * bool(report.points)


def of_run(report: Report) -> list[list[Panel]]:
    """Rows of panels about the run."""
    words = "Of this run, prefills included; what a study already held took no time."
    height = 0.8 + 0.26 * len(report.stage_seconds)
    return [[Panel("Wall time", words, (11, height), lambda figure: _wall_time(figure, report))]]


def of_plan(report: Report, plan: Plan) -> list[list[Panel]]:
    """Rows of panels about one budget."""
    ledger = Panel(
        "Byte ledger by layer",
        "What every stored byte is for; the layers add up to the plan's bytes.",
        (11, 3.4),
        lambda figure: _ledger(figure, plan),
    )
    layers = Panel(
        "Tokens and bits of every layer",
        "Tokens kept per KV head (colour: bits; dashes: each head's own), and the bits of keys and values; means over "
        "tokens where a layer has several tiers.",
        (11, 4.2),
        lambda figure: _layers(figure, plan),
    )
    if plan.calibration is None:
        return [[layers], [ledger]]
    sensitivity = Panel(
        "Sensitivity",
        "Change of the loss when one layer alone takes the smallest step, as the knapsack predicted it (blue: better, "
        "red: worse). Above, all steps of its last round; below, to fewer tokens in every round. Grey: not tried.",
        (11, 4.4),
        lambda figure: _sensitivity(figure, plan),
    )
    sums = Panel(
        "Additivity",
        "The sum of single layers' predicted changes against their measured joint change. On the line, the sum would "
        "be exact.",
        (5.4, 4.2),
        lambda figure: _additivity(figure, plan),
    )
    history = Panel(
        "Search history",
        "Allocations at this budget in the order of measurement, search split. Faint: trials that ended after a part "
        "of the samples.",
        (5.4, 4.2),
        lambda figure: _history(figure, report, plan),
    )
    tasks = Panel(
        "Per task",
        f"Mean over the samples of a kind, {plan.calibration.measured_on} split. Right: exact answers, "
        "full / best uniform / plan.",
        (11, 1.2 + 0.36 * len(plan.calibration.by_kind["plan"])),
        lambda figure: _tasks(figure, plan),
    )
    has_rounds = bool(plan.calibration.search.get("knapsack"))
    return [[layers], *([[sensitivity]] if has_rounds else []), [sums, history], [tasks], [ledger]]


def png(report: Report) -> bytes:
    """All panels below one another on white, each budget's under its verdict."""
    rows = [("", row) for row in of_all(report)]
    for plan in report.plans:
        words = "\n".join([title(plan), *textwrap.wrap(verdict(plan), 150)])
        rows += [(words if i == 0 else "", row) for i, row in enumerate(of_plan(report, plan))]
    rows += [("", row) for row in of_run(report)]
    heights = [0.4 + 0.2 * len(words.splitlines()) + max(panel.size[1] for panel in row) for words, row in rows]
    with matplotlib.rc_context({**RC, "figure.facecolor": "white"}):
        figure = Figure((11.5, sum(heights)), dpi=DPI, layout="constrained")
        strips = figure.subfigures(len(rows), 1, height_ratios=heights, squeeze=False)[:, 0]
        for strip, (words, row) in zip(strips, rows, strict=True):
            if words:
                strip.suptitle(words, x=0.01, ha="left")
            for part, panel in zip(strip.subfigures(1, len(row), squeeze=False)[0], row, strict=True):
                part.suptitle(panel.title, x=0.02, ha="left", weight="bold")
                panel.draw(part)
        return image(figure)


def image(figure: Figure) -> bytes:
    """A figure as a PNG."""
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


# --- the information plane -----------------------------------------------------------------------------------------


def _plane(figure: FigureBase, report: Report) -> None:
    splits = [split for split in ("validation", "search") if report.points.get(split)]
    axes = figure.subplots(len(splits), 2, sharex=True, squeeze=False)
    for row, split in zip(axes, splits, strict=True):
        for one, measure in zip(row, MEASURES, strict=True):
            _measured(one, report, split, measure)
        handles = {name: drawn for one in row for drawn, name in zip(*one.get_legend_handles_labels(), strict=True)}
        row[1].legend(handles.values(), handles, loc="center left", bbox_to_anchor=(1.01, 0.5))
    for one in axes[-1]:
        one.set_xlabel("stored bytes per sequence and their share of the full cache")


def _measured(axes: Axes, report: Report, split: str, measure: str) -> None:
    """All that was measured on a split, its frontier, the plans, and the intervals of those that were chosen on it."""
    points = report.points[split]
    chosen = [plan for plan in report.plans if plan.calibration is not None and plan.calibration.measured_on == split]
    for (name, colour, marker), own in _by_stage(points):
        part, whole = ([point for point in own if point.is_whole == is_whole] for is_whole in (False, True))
        axes.scatter(*_places(part, measure), s=7, color=colour, marker=marker, alpha=0.22, linewidths=0)
        axes.scatter(*_places(whole, measure), s=22, color=colour, marker=marker, alpha=0.9, linewidths=0, label=name)
    full = report.full[split] if measure == "cross_entropy" else 0.0
    pairs = sorted(zip(*_places([point for point in points if point.is_whole], measure), strict=True))
    losses = [loss for _, loss in pairs]
    shares = [*(share for share, _ in pairs), 1.0]
    axes.step(
        shares,
        [*accumulate(losses, min), min(losses) if measure == "kl" else min([*losses, full])],
        where="post",
        color=INK,
        linewidth=1,
        label="frontier",
        zorder=3,
    )
    tops = [full, float(np.percentile(losses, 90))]
    for name, who, look, aside in (
        ("best uniform setting", "best_uniform", UNIFORM, 1.03),
        ("plan", "plan", PLAN, 0.97),
    ):
        if chosen:
            found: list[Interval] = [getattr(getattr(plan.calibration, measure), who) for plan in chosen]
            means, low, high = (np.array([getattr(one, part) for one in found]) for part in ("mean", "low", "high"))
            at = [aside * plan.budget.planned_bytes / plan.budget.full_bytes for plan in chosen]
            axes.errorbar(at, means, (means - low, high - means), capsize=3, zorder=4, linestyle="", label=name, **look)
            tops += means.tolist()
    if not chosen:
        of_plans = [point for point in points if point.is_plan and point.is_whole]
        axes.plot(*_places(of_plans, measure), linestyle="", label="plan", **PLAN)
    heading = f"{split} split, {len(points):,} evaluations"
    if measure == "kl":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda nats, _: f"{nats:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        heading += " (full cache: 0)"
    else:
        axes.axhline(full, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.plot([1.0], [full], color=INK, marker="h", linestyle="", label="full cache")
        if num_above := sum(loss > 1.1 * max(tops) for loss in losses):
            axes.set_ylim(top=1.1 * max(tops))
            heading += f" ({num_above} of them above)"
    axes.set_title(heading)
    axes.set_ylabel(MEASURES[measure])
    _share_axis(axes, report)


def _by_stage(points: Sequence[Point]) -> list[tuple[tuple[str, str, str], list[Point]]]:
    """The points by what is drawn for their stage."""
    found: dict[tuple[str, str, str], list[Point]] = {look: [] for look in (*STAGES.values(), OTHER)}
    for point in points:
        found[STAGES.get(point.stage, OTHER)].append(point)
    return [(look, own) for look, own in found.items() if own]


def _places(points: Sequence[Point], measure: str) -> tuple[list[float], list[float]]:
    return [point.share for point in points], [getattr(point, measure) for point in points]


def _share_axis(axes: Axes, report: Report) -> None:
    """Shares of the full cache in powers of two, and what they are in bytes."""
    least = min(point.share for points in report.points.values() for point in points)
    powers, full_bytes = range(int(np.floor(np.log2(least))), 1), report.plans[0].budget.full_bytes
    axes.set_xscale("log", base=2)
    axes.set_xticks([2.0**power for power in powers], [_share_label(power, full_bytes) for power in powers])
    axes.set_xlim(least / 1.25, 1.25)


def _share_label(power: int, full_bytes: int) -> str:
    return f"{'1' if power == 0 else f'1/{2**-power}'}\n{_size(full_bytes * 2.0**power)}"


def _size(num_bytes: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.{3 if num_bytes >= 100 * size else 2}g} {unit}"
    return f"{num_bytes:.0f} B"


# --- layers --------------------------------------------------------------------------------------------------------


def _layers(figure: FigureBase, plan: Plan) -> None:
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    count = len(plan.layers)
    bits, bottoms, named = np.zeros((2, count)), np.zeros(count), set[str]()
    for number, layer in enumerate(plan.layers):
        for tier in layer.tiers:
            format = plan.formats[tier.format]
            both = np.array([format.keys.bits, format.values.bits])
            bits[:, number] += both * tier.tokens / layer.tokens
            label = tier.format if tier.format not in named else None
            named.add(tier.format)
            colour = colormaps[BITS_MAP](BITS_NORM(both.mean()))
            above.bar(number, tier.tokens, 0.85, bottoms[number], color=colour, label=label)
            bottoms[number] += tier.tokens
    heads = [(number, tokens) for number in range(count) for tokens in tokens_of_heads(plan, number)]
    if heads:
        above.scatter(*zip(*heads, strict=True), marker="_", s=40, color=INK, linewidth=1, label="each head")
    above.axhline(bottoms.mean(), color=INK, linewidth=0.9, linestyle=(0, (4, 3)), label=f"mean {bottoms.mean():.0f}")
    above.set_ylabel("tokens per KV head")
    above.grid(axis="x", visible=False)
    above.legend(ncols=6, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    _cells(below, bits[::-1], ["value bits", "key bits"], BITS_MAP, BITS_NORM)
    for (row, number), value in np.ndenumerate(bits[::-1]):
        colour = "white" if value > 3.5 else "black"
        size = 8 if count <= 40 else 5
        below.text(number, row, f"{value:.3g}", ha="center", va="center", fontsize=size, color=colour)
    _layer_axis(below, count)


def _ledger(figure: FigureBase, plan: Plan) -> None:
    axes = figure.subplots()
    blocks = [block.by_use() for block in make_ledger(plan).layers]
    bottoms = np.zeros(len(blocks))
    order = [*USES, *uses(plan)]
    for use in sorted(uses(plan), key=order.index):
        sizes = np.array([block.get(use, 0) for block in blocks]) / 2**10
        axes.bar(range(len(blocks)), sizes, 0.85, bottoms, label=use.replace("_", " "), color=USES.get(use, MUTED))
        bottoms += sizes
    axes.set_ylabel("stored, KiB per sequence")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)
    _layer_axis(axes, len(blocks))


def _sensitivity(figure: FigureBase, plan: Plan) -> None:
    assert plan.calibration is not None
    rounds: list[dict[str, Any]] = [one for one in plan.calibration.search["knapsack"] if one["sensitivities"]]
    last = rounds[-1]["sensitivities"]
    changes = ["more", "fewer", *sorted({name for layer in last for name in layer} - {"more", "fewer"})]
    whole = np.array([[layer.get(name, np.nan) for layer in last] for name in changes])
    fewer = np.array([[layer.get("fewer", np.nan) for layer in one["sensitivities"]] for one in rounds])
    known = np.abs(np.concatenate([whole, fewer]))
    norm = CenteredNorm(0, max(float(np.nanpercentile(known, 97)), 1e-6))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(len(changes) + 1, len(rounds) + 1))
    names = {"more": "more tokens", "fewer": "fewer tokens"}
    _cells(above, whole[::-1], [names.get(name, f"to {name}") for name in reversed(changes)], CHANGE_MAP, norm)
    taken = [f"round {i + 1}, {'taken' if one['accepted'] else 'refused'}" for i, one in enumerate(rounds)]
    mesh = _cells(below, fewer[::-1], taken[::-1], CHANGE_MAP, norm)
    above.set_title(f"all steps, round {len(rounds)}")
    below.set_title("fewer tokens, every round")
    _layer_axis(below, len(last))
    bar = figure.colorbar(mesh, ax=[above, below], extend="both", pad=0.01, aspect=30)
    bar.set_label(f"change of {plan.calibration.objective.upper()}, nats per token")
    bar.outline.set_visible(False)


def _cells(axes: Axes, values: Any, names: Sequence[str], colours: str, norm: Normalize) -> QuadMesh:
    """values: [rows, layers], first row lowest; NaN is left empty."""
    rows, layers = values.shape
    edges = np.arange(layers + 1) - 0.5, np.arange(rows + 1) - 0.5
    mesh = axes.pcolormesh(
        *edges, np.ma.masked_invalid(values), cmap=colours, norm=norm, edgecolors=CELL, linewidth=0.6
    )
    axes.set_yticks(range(rows), names)
    axes.set_facecolor(GRID)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return mesh


def _layer_axis(axes: Axes, count: int) -> None:
    axes.set_xticks(range(0, count, 1 if count <= 40 else 5))
    axes.set_xlim(-0.5, count - 0.5)
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("layer (0 is the first after the embedding)")


# --- how the search went -------------------------------------------------------------------------------------------


def _additivity(figure: FigureBase, plan: Plan) -> None:
    assert plan.calibration is not None
    search, axes = plan.calibration.search, figure.subplots()
    plans = search.get("additivity", {"predicted": [], "measured": [], "rank_correlation": None})
    rounds = search.get("knapsack", [])
    steps = [(one["predicted"] - one["before"], one["measured"] - one["before"]) for one in rounds]
    ends = [*plans["predicted"], *plans["measured"], *(x for step in steps for x in step), 0.0]
    low, high = min(ends), max(ends)
    axes.plot([low, high], [low, high], color=INK, linewidth=0.9, linestyle=(0, (4, 3)), label="predicted = measured")
    if plans["predicted"]:
        axes.scatter(
            plans["predicted"], plans["measured"], s=24, color=PINK, marker="P", linewidths=0,
            label=f"{len(plans['predicted'])} random plans near the result",
        )  # fmt: skip
    for accepted, name in ((True, "knapsack's rounds, taken"), (False, "refused")):
        own = [step for step, one in zip(steps, rounds, strict=True) if one["accepted"] == accepted]
        if own:
            face = BLUE if accepted else "none"
            at = [predicted for predicted, _ in own], [measured for _, measured in own]
            axes.scatter(*at, s=30, marker="D", facecolors=face, edgecolors=BLUE, label=name)
    correlation = plans["rank_correlation"]
    axes.set_title("no random plans were measured" if correlation is None else f"rank correlation {correlation:.2f}")
    axes.set_xlabel(f"sum of single changes of {plan.calibration.objective.upper()}, nats")
    axes.set_ylabel("measured together, nats")
    axes.legend(loc="upper left")


def _history(figure: FigureBase, report: Report, plan: Plan) -> None:
    assert plan.calibration is not None
    axes, measure = figure.subplots(), {"ce": "cross_entropy", "kl": "kl"}[plan.calibration.objective]
    kept = [point for point in report.candidates(plan) if point.is_whole or point.stage == "search"]
    order = {id(point): number for number, point in enumerate(kept, 1)}
    for (name, colour, marker), own in _by_stage(kept):
        for is_whole in (False, True):
            some = [point for point in own if point.is_whole == is_whole]
            axes.scatter(
                [order[id(point)] for point in some], [getattr(point, measure) for point in some],
                s=26 if is_whole else 12, color=colour, marker=marker, alpha=1.0 if is_whole else 0.3, linewidths=0,
                label=name if is_whole else None,
            )  # fmt: skip
    whole = [point for point in kept if point.is_whole]
    if whole:
        best = list(accumulate((getattr(point, measure) for point in whole), min))
        axes.step([order[id(p)] for p in whole], best, where="post", color=INK, linewidth=1, label="best so far")
        low, high = _without_outliers([getattr(point, measure) for point in kept])
        axes.set_ylim(low, high)
        if num_above := sum(getattr(point, measure) > high for point in kept):
            axes.set_title(f"{num_above} of {len(kept)} are above")
        axes.legend(loc="upper right")
    axes.set_xlabel("allocations measured at this budget")
    axes.set_ylabel(MEASURES[measure])


def _without_outliers(values: Sequence[float]) -> tuple[float, float]:
    """Limits of an axis that the worst settings do not squeeze: the top is three times the lower half's spread."""
    low, middle, high = np.percentile(values, [0, 50, 100])
    top = min(high, low + 3 * max(middle - low, 1e-3))
    return low - 0.06 * (top - low), top + 0.06 * (top - low)


def _tasks(figure: FigureBase, plan: Plan) -> None:
    assert plan.calibration is not None
    by_kind = plan.calibration.by_kind
    kinds = list(by_kind["plan"])
    looks = (("full", "full cache", INK, "h"), ("best_uniform", "best uniform setting", ORANGE, "s"),
             ("plan", "plan", RED, "*"))  # fmt: skip
    axes = figure.subplots(1, 2, sharey=True)
    for one, measure in zip(axes, MEASURES, strict=True):
        losses = {who: [by_kind[who][kind][measure] for kind in kinds] for who, *_ in looks}
        one.hlines(range(len(kinds)), losses["plan"], losses["best_uniform"], color=MUTED, linewidth=1.5)
        for who, name, colour, marker in looks:
            size = 90 if marker == "*" else 34
            one.scatter(losses[who], range(len(kinds)), s=size, color=colour, marker=marker, linewidths=0, label=name)
        one.set_xlabel(MEASURES[measure])
        one.set_xlim(left=0)
    axes[0].set_yticks(range(len(kinds)), kinds)
    axes[0].set_ylim(len(kinds) - 0.5, -0.5)
    axes[0].legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    axes[1].annotate("exact", (1.02, -0.75), xycoords=("axes fraction", "data"), fontsize=8.5, color=MUTED)
    for number, kind in enumerate(kinds):
        exact = " / ".join(f"{100 * by_kind[who][kind]['exact']:.0f}" for who, *_ in looks)
        words = "" if kind == "text" else f"{exact} %"
        axes[1].annotate(words, (1.02, number), xycoords=("axes fraction", "data"), va="center", fontsize=8.5)


def _wall_time(figure: FigureBase, report: Report) -> None:
    axes = figure.subplots()
    seconds = report.stage_seconds
    bars = axes.barh(range(len(seconds)), list(seconds.values()), 0.7, color=BLUE)
    axes.bar_label(bars, [duration(one) for one in seconds.values()], padding=4, fontsize=8.5)
    axes.set_yticks(range(len(seconds)), list(seconds))
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"seconds, {duration(sum(seconds.values()))} in all on {report.machine}")
