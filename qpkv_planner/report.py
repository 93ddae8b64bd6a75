"""The report of a search: one HTML file that needs no other, or one PNG, drawn from the plans and the journal.

What stands in it is measured: every evaluation that the journal holds, and the plans' own records; bytes are the
ledger's. Wall times are of this run, so a resumed one has only what it still had to do. The drawings are in
`figures.py`, which needs matplotlib; this file does not.
"""

from __future__ import annotations

import platform
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from qpkv_planner.allocation import Space, allocation_of
from qpkv_planner.files import check_writable, write_whole
from qpkv_runtime.errors import InputError
from qpkv_runtime.ledger import make_ledger
from qpkv_runtime.plan import Calibration, Interval, Plan

if TYPE_CHECKING:
    import torch

    from qpkv_planner.figures import Panel
    from qpkv_planner.measurement import Evaluator

SUFFIXES = (".html", ".png")
LEAST_FILLED = 0.9  # of a budget: what a search for it tries fills it but for some quanta


@dataclass(frozen=True)
class Point:
    """One evaluation. share: what the allocation weighs, of the full cache; losses in nats, means as the search took
    them. is_whole: on all samples of the split; else cross_entropy is corrected by what the full cache's is on all
    samples above what it is on these. is_plan: of an allocation that became a plan."""

    stage: str
    share: float
    cross_entropy: float
    kl: float
    is_whole: bool
    is_plan: bool


@dataclass(frozen=True)
class Report:
    """What is drawn. points: of each split, as they were measured; full: the full cache's cross-entropy there;
    stage_seconds: wall time; machine: what it ran on."""

    plans: tuple[Plan, ...]
    points: Mapping[str, tuple[Point, ...]]
    full: Mapping[str, float]
    stage_seconds: Mapping[str, float]
    machine: str

    @classmethod
    def of(
        cls, plans: Sequence[Plan], evaluators: Mapping[str, Evaluator], stage_seconds: Mapping[str, float]
    ) -> Report:
        """The report of plans that were found with these evaluators, one for each split."""
        points = {split: tuple(_points(evaluator, plans)) for split, evaluator in evaluators.items()}
        full = {split: evaluator.full().mean("ce") for split, evaluator in evaluators.items()}
        devices = [evaluator.model.device for evaluator in evaluators.values()]
        return cls(tuple(plans), points, full, dict(stage_seconds), _machine(devices))

    def candidates(self, plan: Plan) -> list[Point]:
        """What was measured on the search split for this plan's budget, in order."""
        limits = sorted(limit_share(one) for one in self.plans)
        mine = limit_share(plan)
        return [
            point
            for point in self.points.get("search", ())
            if LEAST_FILLED * mine < point.share <= mine and mine == min(s for s in limits if point.share <= s)
        ]


def _points(evaluator: Evaluator, plans: Sequence[Plan]) -> Iterator[Point]:
    full = evaluator.full()
    keys = [Space.of_plan(plan).key(allocation_of(plan)) for plan in plans]
    found = next(plan.calibration for plan in plans if plan.calibration is not None)
    tokens = found.context_tokens
    if evaluator.prepared.name == "search":
        tokens = found.search.get("context_tokens", tokens)
    for entry, losses in evaluator.journalled():
        space, allocation = Space.of_key(entry.what, plans[0].model, tokens)
        above = full.mean("ce") - full.of_contexts(losses.contexts).mean("ce")
        yield Point(
            stage=entry.stage,
            share=space.bytes(allocation) / space.full_bytes,
            cross_entropy=losses.mean("ce") + above,
            kl=losses.mean("kl"),
            is_whole=len(losses.ce) == len(full.ce),
            is_plan=space.key(allocation) in keys,
        )


def limit_share(plan: Plan) -> float:
    """The budget as a share of the full cache."""
    return plan.budget.limit_bytes / plan.budget.full_bytes


def _machine(devices: Sequence[torch.device]) -> str:
    """What the first of these devices is, or else the processor."""
    import torch

    if devices and devices[0].type == "cuda":
        return torch.cuda.get_device_name(devices[0])
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    threads = torch.get_num_threads()
    return f"{names[0] if names else platform.machine()}, {threads} thread{'s' * (threads > 1)}"


# --- before and after the search -----------------------------------------------------------------------------------


def need_matplotlib(what: str) -> None:
    """Raise InputError unless it is installed. what: what is to be drawn."""
    if find_spec("matplotlib") is None:
        raise InputError(f"{what} needs matplotlib: pip install 'qpkv[report]'")


def check_report(path: Path) -> None:
    """Raise InputError, before the search, where no report could be written to `path` after it."""
    if path.suffix not in SUFFIXES:
        raise InputError(f"--report must be a file that ends in {' or '.join(SUFFIXES)}, got {path}")
    need_matplotlib("--report")
    check_writable("--report", path)


def write_report(path: Path, report: Report) -> None:
    """Draw the report and write it, whole or not at all; the suffix says as what. Raises InputError where it cannot
    be written."""
    from qpkv_planner import figures

    write_whole(path, figures.png(report) if path.suffix == ".png" else html(report))


# --- words ---------------------------------------------------------------------------------------------------------


def title(plan: Plan) -> str:
    return f"{plan.model.id} at {plan.budget.requested} of {plan.budget.context_tokens:,} tokens"


def verdict(plan: Plan) -> str:
    """What the plan is worth, in a few sentences."""
    found, budget = plan.calibration, plan.budget
    if found is None:
        return f"Nothing was searched for: {budget.limit_bytes:,} bytes hold the whole cache and the reserve at 16 bit."
    loss, gain = found.cross_entropy, found.improvement_on_best_uniform
    words = [
        f"In {budget.planned_bytes:,} of {budget.full_bytes:,} bytes the plan has a cross-entropy of "
        f"{loss.plan.mean:.3f} nats; the full cache has {loss.full.mean:.3f}, the best uniform setting "
        f"{loss.best_uniform.mean:.3f} at the same bytes.",
        f"Plan minus best uniform: {_signed(gain)}, the 95 % interval in brackets; {found.measured_on} split, "
        f"{_samples(found)}.",
    ]
    gap = loss.best_uniform.mean - loss.full.mean
    closed = (loss.best_uniform.mean - loss.plan.mean) / gap if gap > 0 else 0.0
    if 0 < closed <= 1:
        words.append(f"That closes {100 * closed:.0f} % of the gap to the full cache.")
    words.append(f"KL to the full cache: {found.kl.plan.mean:.3f}, best uniform {found.kl.best_uniform.mean:.3f}.")
    if plan.extrapolated:
        words.append(f"Measured on contexts of {found.context_tokens:,} tokens and stretched from there.")
    if found.stopped is not None:
        words.append(f"The search was cut short ({found.stopped}); this is the best it had found.")
    return " ".join(words)


def _samples(found: Calibration) -> str:
    counts = found.samples[found.measured_on]
    return f"{counts['samples']} samples of {counts['contexts']} contexts"


def _signed(value: Interval) -> str:
    return f"{value.mean:+.3f} ({value.low:+.3f} to {value.high:+.3f})"


def duration(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole} s" if whole < 100 else f"{whole // 60} min {whole % 60} s"


# --- HTML ----------------------------------------------------------------------------------------------------------

PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
<main>
{body}
</main>
</html>
"""

STYLE = """
:root { color-scheme: light dark; --ink: #1b1c1f; --muted: #63686f; --grid: #dfe2e7; --paper: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e9ec; --muted: #a2a8b1; --grid: #3b4048; --paper: #17191c; }
}
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .5rem; } h2 { font-size: 1.35rem; margin: 3rem 0 .5rem; } h3 { margin: 0; }
h3 { font-size: 1.05rem; } p { max-width: 75ch; } figcaption, .note { color: var(--muted); font-size: .87rem; }
.row { display: grid; gap: 1.5rem 2rem; margin: 1.5rem 0; }
@media (min-width: 900px) { .two { grid-template-columns: 1fr 1fr; } }
figure { margin: 0; min-width: 0; } svg { width: 100%; height: auto; display: block; margin: .5rem 0; }
svg text { font-family: system-ui, sans-serif !important; }
.scroll { overflow-x: auto; margin: 1rem 0; } table { border-collapse: collapse; font-size: .87rem; }
table { font-variant-numeric: tabular-nums; } th { font-weight: 600; }
th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--grid); text-align: right; white-space: nowrap; }
.left { text-align: left; }
summary { cursor: pointer; color: var(--muted); font-size: .87rem; } a { color: inherit; }
"""


def html(report: Report) -> str:
    """The report as one HTML file, its drawings inline as SVG; light or dark as its reader's system."""
    from qpkv_planner import figures

    plans = report.plans
    name = title(plans[0]) if len(plans) == 1 else f"{plans[0].model.id} at {len(plans)} budgets"
    body = [f"<h1>{escape(name)}</h1>", *(f"<p>{escape(verdict(plan))}</p>" for plan in plans if len(plans) == 1)]
    body += [_results(plans)] if any(plan.calibration for plan in plans) else []
    body += [_row(row) for row in figures.of_all(report)]
    for plan in plans:
        body.append(f"<h2>{escape(title(plan))}</h2>" if len(plans) > 1 else "")
        body.append(f"<p>{escape(verdict(plan))}</p>" if len(plans) > 1 else "")
        body += [_row(row) for row in figures.of_plan(report, plan)]
        body += [_by_kind(plan), _ledger(plan)]
    body += [_row(row) for row in figures.of_run(report)]
    body.append(_made(report))
    return PAGE.format(title=escape(f"qpkv: {name}"), style=STYLE, body="\n".join(body))


def _row(panels: Sequence[Panel]) -> str:
    drawn = (
        f"<figure><h3>{escape(panel.title)}</h3>{panel.svg()}<figcaption>{escape(panel.caption)}</figcaption></figure>"
        for panel in panels
    )
    return f'<div class="row{" two" * (len(panels) > 1)}">' + "\n".join(drawn) + "</div>"


def _table(
    heading: str, header: Sequence[str], rows: Sequence[Sequence[str]], note: str = "", left: Container[int] = (0,)
) -> str:
    """left: the columns of words, which stand to the left."""

    def line(tag: str, cells: Sequence[str]) -> str:
        sides = [' class="left"' if i in left else "" for i in range(len(cells))]
        return "<tr>" + "".join(f"<{tag}{side}>{escape(cell)}</{tag}>" for cell, side in zip(cells, sides, strict=True))

    note = f'<p class="note">{escape(note)}</p>' if note else ""
    return (
        f'<h3>{escape(heading)}</h3>{note}<div class="scroll"><table><thead>{line("th", header)}</thead>'
        f"<tbody>{''.join(line('td', row) for row in rows)}</tbody></table></div>"
    )


def _results(plans: Sequence[Plan]) -> str:
    rows = []
    for plan in plans:
        if (found := plan.calibration) is None:
            continue
        loss, kl, slope = found.cross_entropy, found.kl, found.lambda_nats_per_mib
        rows.append(
            [
                plan.budget.requested, f"{plan.budget.planned_bytes:,}",
                *(f"{one.mean:.3f}" for one in (loss.full, loss.best_uniform, loss.plan)),
                _signed(found.improvement_on_best_uniform), f"{kl.best_uniform.mean:.3f}", f"{kl.plan.mean:.3f}",
                "" if slope is None else f"{slope:.3g}", found.winner,
            ]
        )  # fmt: skip
    header = [
        "budget", "bytes", "CE full", "CE best uniform", "CE plan", "plan - best uniform", "KL best uniform", "KL plan",
        "λ, nats/MiB", "found by",
    ]  # fmt: skip
    note = (
        "CE: cross-entropy, KL: divergence from the full cache, both in nats per token, means over tasks; in brackets "
        "95 % by bootstrap over contexts. λ: what one more MiB would save."
    )
    return _table("Results", header, rows, note, left={0, 9})


def _by_kind(plan: Plan) -> str:
    if (found := plan.calibration) is None:
        return ""
    columns = [found.by_kind[who] for who in ("full", "best_uniform", "plan")]
    rows = []
    for kind in columns[0]:
        cells = [f"{column[kind][measure]:.3f}" for measure in ("cross_entropy", "kl") for column in columns]
        exact = [f"{100 * column[kind]['exact']:.0f} %" if kind != "text" else "" for column in columns]
        rows.append([kind, *cells[:3], *cells[4:], *exact])
    header = ["task", "CE full", "CE best uniform", "CE plan", "KL best uniform", "KL plan"]
    header += ["exact full", "exact best uniform", "exact plan"]
    note = f"Means over the samples of a kind, {found.measured_on} split. Best uniform: {found.best_uniform}."
    return _table("Per task", header, rows, note)


def _ledger(plan: Plan) -> str:
    ledger, budget = make_ledger(plan), plan.budget
    rows = [
        [use.replace("_", " "), f"{size:,}", f"{100 * size / ledger.stored_bytes:.1f} %"]
        for use, size in uses(plan).items()
    ]
    rows.append(["planned", f"{ledger.stored_bytes:,}", "100.0 %"])
    rows.append(["limit", f"{budget.limit_bytes:,}", f"{100 * budget.limit_bytes / ledger.stored_bytes:.1f} %"])
    layers = [
        [str(i), " + ".join(f"{tier.tokens} {tier.format}" for tier in layer.tiers), f"{block.stored_bytes:,}"]
        for i, (layer, block) in enumerate(zip(plan.layers, ledger.layers, strict=True))
    ]
    every = _table("", ["layer", "tokens per head", "bytes"], layers, left=(0, 1))
    total = _table("Byte ledger", ["what", "bytes", "share"], rows, "Per sequence, everything that is stored.")
    return f"{total}<details><summary>Every layer</summary>{every}</details>"


def uses(plan: Plan) -> dict[str, int]:
    """Stored bytes of all layers by what they are for."""
    total: dict[str, int] = {}
    for block in make_ledger(plan).layers:
        for use, size in block.by_use().items():
            total[use] = total.get(use, 0) + size
    return {use: size for use, size in total.items() if size}


def _made(report: Report) -> str:
    """Where and of what the plans were made."""
    total = sum(report.stage_seconds.values())
    rows = [["wall time of this run", f"{duration(total)} on {report.machine}"]]
    rows += [[f"  {stage}", duration(seconds)] for stage, seconds in report.stage_seconds.items()]
    for found in [plan.calibration for plan in report.plans if plan.calibration is not None][:1]:
        rows.append(
            ["evaluations of the search, in whole forwards", f"{found.search.get('search_evaluations', 0):.0f}"]
        )
        for split, counts in found.samples.items():
            left_out = f"{100 * counts['unanswerable_share']:.0f} % of the questions left out"
            rows.append([f"{split} split", f"{counts['samples']} samples of {counts['contexts']} contexts, {left_out}"])
        rows += [[f"hash of {split}", value] for split, value in found.hashes.items()]
        rows += [["objective", found.objective], ["seed", str(found.seed)]]
        rows += [[package, number] for package, number in found.versions.items()]
    rows += [["policy " + plan.budget.requested, plan.policy_hash] for plan in report.plans]
    return _table("How it was made", ["", ""], rows, left=(0, 1))
