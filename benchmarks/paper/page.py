"""The reproduction as a page of markdown, and as rows for other programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.paper.laboratory import Laboratory, Measured
from benchmarks.paper.settings import Cell, Key
from benchmarks.paper.tables import Grid, Table
from benchmarks.paper.verdicts import Claim, judge, measured
from qpkv_planner.measurement import Losses, interval
from qpkv_runtime.plan import Interval

NO_REASON = {
    "reproduced": "",
    "not": "The interval holds zero: these samples cannot tell.",
    "reversed": "It goes the other way here; we know no reason.",
}
READING = """\
Cells are cross-entropy of answers / of the text going on, in nats per token, and the share of answers that are
exact. *Nominal* counts bits x tokens as the papers do; *exact* is the ledger's bytes: scales, zeros, tables and the
reserve for generated tokens come out of the same budget. A claim is a difference of cross-entropies on the same samples
with its 95 % bootstrap interval over contexts: **reproduced** where the whole interval says so, **reversed** where all
of it says the opposite, else **not**."""


def page(
    tables: Sequence[Table], laboratory: Laboratory, about: Sequence[str], speed: str, figures: Sequence[str]
) -> str:
    """The whole page. about: lines on model, samples and machine; figures: names of the pictures that were drawn."""
    losses = {cell: one.losses for cell, one in laboratory.measured.items()}
    parts = ["# The paper's tables and figures, measured again", "\n".join(about), READING, _summary(tables, losses)]
    for table in tables:
        parts.append(f"## {table.title}")
        parts.append(f"**The paper:** {table.paper}")
        if table.note:
            parts.append(f"**Here:** {table.note}")
        if f"{table.name}.png" in figures:
            parts.append(f"![{table.title}]({table.name}.png)")
        parts += [_grid(grid, laboratory) for grid in table.grids]
        parts.append(_claims(table.claims, losses))
    parts.append(speed)
    return "\n\n".join(parts) + "\n"


def _summary(tables: Sequence[Table], losses: Mapping[Key, Losses]) -> str:
    rows = ["| | reproduced | not | reversed | not run |", "|---|---|---|---|---|"]
    for table in tables:
        counts = dict.fromkeys(("reproduced", "not", "reversed", "not run"), 0)
        for claim in table.claims:
            counts[_verdict(claim, losses)[0]] += 1
        rows.append(f"| {table.title} | " + " | ".join(str(count or "") for count in counts.values()) + " |")
    return "\n".join(rows)


def _verdict(claim: Claim, losses: Mapping[Key, Losses]) -> tuple[str, Interval | None]:
    found = measured(claim, losses)
    return ("not run", None) if found is None else (judge(claim, found), found)


def _claims(claims: Sequence[Claim], losses: Mapping[Key, Losses]) -> str:
    rows = ["| claim | verdict | nats | why |", "|---|---|---|---|"]
    for claim in claims:
        verdict, found = _verdict(claim, losses)
        if found is None:
            rows.append(f"| {claim.says} | not run | | |")
            continue
        number = f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f})"
        rows.append(f"| {claim.says} | **{verdict}** | {number} | {claim.why.get(verdict, NO_REASON[verdict])} |")
    return "\n".join(rows)


def _grid(grid: Grid, laboratory: Laboratory) -> str:
    if grid.columns:
        head, shown = list(grid.columns), {name: [_cell(c, laboratory) for c in row] for name, row in grid.rows.items()}
    else:
        rows = {name: _found(row[0], laboratory) for name, row in grid.rows.items()}
        head = sorted({kind for one in rows.values() if one for kind in one.losses.kinds})
        shown = {name: _by_kind(one, head) for name, one in rows.items()}
    lines = [f"*{grid.title}*", "", "| | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(cells) + " |" for name, cells in shown.items()]
    return "\n".join(lines)


def _found(cell: Key | None, laboratory: Laboratory) -> Measured | None:
    return None if cell is None else laboratory.measured.get(cell)


def _by_kind(one: Measured | None, kinds: Sequence[str]) -> list[str]:
    if one is None:
        return ["not run"] * len(kinds)
    found = one.losses.by_kind()
    return [f"{found[kind]['cross_entropy']:.2f}" if kind in found else "" for kind in kinds]


def _cell(cell: Key | None, laboratory: Laboratory) -> str:
    if cell is None or cell in laboratory.unfit:
        return "" if cell is None else "does not fit"
    one = laboratory.measured.get(cell)
    if one is None:
        return "not run"
    questions, text = answers_and_text(one.losses)
    both = f"{questions:.2f}" + ("" if text is None else f" / {text:.2f}")
    return f"{both}, {100 * one.losses.mean('exact'):.0f} %"


def answers_and_text(losses: Losses) -> tuple[float, float | None]:
    """Cross-entropy, mean over kinds of questions, and of the text going on."""
    kinds = losses.by_kind()
    asked = [kinds[kind]["cross_entropy"] for kind in kinds if kind != "text"]
    text = kinds["text"]["cross_entropy"] if "text" in kinds else None
    return sum(asked) / max(1, len(asked)), text


def rows(tables: Sequence[Table], laboratory: Laboratory, columns: Mapping[str, str]) -> list[dict[str, str]]:
    """A row for each measured cell under the first table that has it; columns: where and how it was measured."""
    first = {cell: table.name for table in reversed(tables) for cell in table.cells}
    measured = {cell: one for cell, one in laboratory.measured.items() if cell in first}
    kinds = sorted({kind for one in measured.values() for kind in one.losses.kinds})
    return [{**_row(first[cell], cell, one, laboratory, kinds), **columns} for cell, one in measured.items()]


def _row(table: str, cell: Key, one: Measured, laboratory: Laboratory, kinds: Sequence[str]) -> dict[str, str]:
    losses, by_kind = one.losses, one.losses.by_kind()
    if isinstance(cell, Cell):
        moved = "" if cell.moved is None else "layers {}-{} {}".format(*cell.moved)
        name = {"pruner": cell.pruner, "format": cell.format, "size": str(cell.size), "moved": moved}
        over = interval(losses, "ce", minus=laboratory.full[cell.place])
    else:
        name = {"pruner": cell.setting, "format": "", "size": cell.budget, "moved": f"asked {cell.when}"}
        over = None
    return {
        "table": table,
        "model": cell.model,
        "length": str(cell.length),
        **name,
        "tokens": f"{one.tokens:.1f}",
        "bytes": str(one.num_bytes),
        "nominal_share": f"{one.nominal:.5f}",
        "exact_share": f"{one.exact:.5f}",
        "samples": str(len(losses.kinds)),
        "cross_entropy": f"{losses.mean('ce'):.4f}",
        "over_full_low": "" if over is None else f"{over.low:.4f}",
        "over_full_high": "" if over is None else f"{over.high:.4f}",
        "kl": "" if over is None else f"{losses.mean('kl'):.4f}",
        "exact": f"{losses.mean('exact'):.3f}",
        **{f"ce_{kind}": f"{by_kind[kind]['cross_entropy']:.3f}" if kind in by_kind else "" for kind in kinds},
    }
