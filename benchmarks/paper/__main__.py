"""The command: measure the papers' tables and figures again, on any model; resumable."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import AutoConfig

from benchmarks.paper.figures import draw
from benchmarks.paper.laboratory import PREFILL_WORK, Laboratory
from benchmarks.paper.page import page, rows
from benchmarks.paper.settings import Cell
from benchmarks.paper.speed import speed_table
from benchmarks.paper.tables import Scope, Table, tables
from benchmarks.where import RESULTS, commit, cpu, where, write_rows
from qpkv_planner.progress import Progress
from qpkv_runtime.cli import CommandParser
from qpkv_runtime.errors import InputError, run_command
from qpkv_runtime.models import model_shape
from qpkv_runtime.models.resolve import resolve

DESCRIPTION = """\
Measure the tables and figures of "More Tokens, Lower Precision" and MiKV again, on the test split's samples, at the
papers' nominal bytes and at exact ones. Writes benchmarks/results/paper/<model>/: README.md with tables, claims and
verdicts, the figures as PNG, and rows.csv. The same command goes on where an interrupted one stopped."""
EXAMPLES = """\
  python -m benchmarks.paper                                 smollm2 at 512, 1024 and 2048 tokens (up to two hours)
  python -m benchmarks.paper --quick                         tiny, fewer samples (minutes)
  python -m benchmarks.paper --tables table-1 figure-2       only these
  python -m benchmarks.paper --other-models tiny gemma.gguf  Figures 4 and 5 with more models
  python -m benchmarks.paper --timeout 0                     the page again, of what the study holds"""
SECONDS_BETWEEN_LINES = 60


def main(argv: list[str] | None = None) -> int:
    return run_command("benchmarks.paper", lambda: _main(argv))


def parser() -> CommandParser:
    out = CommandParser("benchmarks.paper", DESCRIPTION, EXAMPLES)
    out.add_argument("--model", default="smollm2", help="name, folder or GGUF file (default %(default)s)")
    out.add_argument("--other-models", nargs="*", metavar="NAME", help="of Figures 4 and 5 (default tiny)")
    out.add_argument("--length", type=int, default=1024, metavar="N", help="tokens of a context (default %(default)s)")
    out.add_argument("--lengths", type=int, nargs="+", metavar="N", help="of Figure 3 (default half, once, twice)")
    out.add_argument("--contexts", type=int, metavar="N", help="documents at each length (default 8; quick: 4)")
    out.add_argument("--line-contexts", type=int, metavar="N", help="prompts of key-value lines (default 8; quick: 3)")
    out.add_argument("--tables", nargs="+", metavar="NAME", help="only these")
    out.add_argument("--quick", action="store_true", help="tiny, fewer samples")
    out.add_argument(
        "--study", type=Path, default=Path("runs/paper"), help="prefills and journals (default runs/paper)"
    )
    out.add_argument("--output", type=Path, help="folder (default benchmarks/results/paper/<model>)")
    out.add_argument("--hardware", metavar="TEXT", help="what is recorded of it (default: what this machine says)")
    out.add_argument("--timeout", type=float, metavar="MINUTES", help="measure no longer than this")
    return out


def _main(argv: list[str] | None) -> int:
    arguments = parser().parse_args(argv)
    if arguments.quick:
        arguments.model = "tiny"
    for name in ("length", "contexts", "line_contexts"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    everything = tables(_scope(arguments))
    known = [table.name for table in everything]
    if unknown := [name for name in arguments.tables or () if name not in known]:
        raise InputError(f"--tables are of {', '.join(known)}, got {unknown[0]!r}")
    wanted = [table for table in everything if not arguments.tables or table.name in arguments.tables]
    started = time.monotonic()
    cells = list(dict.fromkeys(cell for table in wanted for cell in table.cells))
    contexts = arguments.contexts or (4 if arguments.quick else 8)
    num_places = len({cell.place for cell in cells if isinstance(cell, Cell)})
    laboratory = Laboratory(
        study=arguments.study,
        contexts=contexts,
        commit=commit(),
        asked=tuple(dict.fromkeys(cell for table in everything for cell in table.cells)),
        progress=Progress(sum(cell.work for cell in cells) + num_places * contexts * PREFILL_WORK),
        deadline=None if arguments.timeout is None else started + 60 * arguments.timeout,
    )
    in_time = _measure(laboratory, wanted, len(cells), started)
    output = arguments.output or RESULTS / "paper" / Path(arguments.model).stem
    output.mkdir(parents=True, exist_ok=True)
    _write(output, wanted, laboratory, arguments.hardware or cpu(), in_time)
    print(f"{output}: {len(laboratory.measured)} settings in {time.monotonic() - started:.0f} s", file=sys.stderr)
    return 0


def _scope(arguments: argparse.Namespace) -> Scope:
    config = AutoConfig.from_pretrained(resolve(arguments.model).path_or_id)
    length = arguments.length
    return Scope(
        model=arguments.model,
        num_layers=model_shape(config).num_layers,
        length=length,
        lengths=tuple(arguments.lengths or (length // 2, length, 2 * length)),
        other_models=tuple(arguments.other_models or () if arguments.quick else arguments.other_models or ("tiny",)),
        line_contexts=arguments.line_contexts or (3 if arguments.quick else 8),
    )


def _measure(laboratory: Laboratory, wanted: Sequence[Table], num_cells: int, started: float) -> bool:
    """Measure what the tables need. False: interrupted or out of time."""
    progress, in_time, said = laboratory.progress, True, started

    def say(name: str) -> None:
        done = len(laboratory.measured) + len(laboratory.unfit)
        left = (time.monotonic() - started) / max(1, done) * (num_cells - done)
        progress.say(f"{name:<14} {done} of {num_cells} settings, about {left / 60:.0f} minutes left")

    try:
        for table in wanted:
            progress.stage(table.name)
            for cell in table.cells:
                in_time &= laboratory.measure(cell)
                if time.monotonic() - said > SECONDS_BETWEEN_LINES:
                    said = time.monotonic()
                    say(table.name)
            say(table.name)
    except KeyboardInterrupt:
        progress.say("interrupted: the page shows what is measured; the same command goes on")
        in_time = False
    progress.close()
    return in_time


def _write(output: Path, wanted: Sequence[Table], laboratory: Laboratory, hardware: str, in_time: bool) -> None:
    """The page, its pictures and the rows."""
    full = {place: losses.mean("ce") for place, losses in laboratory.full.items()}
    pictures = [f"{table.name}.png" for table in wanted]
    drawn = [
        name
        for table, name in zip(wanted, pictures, strict=True)
        if draw(table, laboratory.measured, full, output / name)
    ]
    columns = {**where(), "cpu": hardware, "commit": " ".join(laboratory.commits)}
    text = page(wanted, laboratory, _about(laboratory, columns, in_time), speed_table(RESULTS), drawn)
    (output / "README.md").write_text(text, encoding="utf-8")
    if measured := rows(wanted, laboratory, columns):
        write_rows(output / "rows.csv", measured)
    print(text)


def _about(laboratory: Laboratory, columns: Mapping[str, str], in_time: bool) -> list[str]:
    """Lines on samples and machine."""
    lines = []
    for (model, length), full in laboratory.full.items():
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(full.kinds).items()))
        left_out = sum(laboratory.unanswerable[model, length].values())
        lines.append(
            f"- {model}, {length} tokens: {len(full.kinds)} samples of {len(set(full.contexts))} documents ({kinds}; "
            f"{left_out} questions left out that the full cache cannot answer); full cache {full.mean('ce'):.2f} nats, "
            f"{100 * full.mean('exact'):.0f} % exact."
        )
    lines.append("- {cpu}; torch {torch}, {threads} thread(s); commit {commit}.".format(**columns))
    if not in_time:
        lines.append("- The run was cut short: what says `not run` was not reached.")
    return lines


if __name__ == "__main__":
    sys.exit(main())
