"""Measure the paper's tables and figures again, on any model: one command, resumable.

    python -m benchmarks.paper                     smollm2 at 512, 1024 and 2048 tokens (up to two hours on two cores)
    python -m benchmarks.paper --quick             tiny, fewer samples (minutes)
    python -m benchmarks.paper --tables table-1 figure-2      only these
    python -m benchmarks.paper --timeout 0         the page again, of what the study already holds

Writes benchmarks/results/paper/<model>/: README.md with tables, claims and verdicts, the figures as PNG, and rows.csv.
The samples are the test split's. The same command goes on where an interrupted one stopped (--study).
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from benchmarks.paper.figures import draw
from benchmarks.paper.laboratory import PREFILL_WORK, Laboratory
from benchmarks.paper.page import page, write_rows
from benchmarks.paper.settings import Cell
from benchmarks.paper.speed import speed_table
from benchmarks.paper.tables import Scope, Table, tables
from qpkv_planner.progress import Progress
from qpkv_runtime.cli import CommandParser
from qpkv_runtime.errors import InputError, run_command
from qpkv_runtime.models import model_shape

RESULTS = Path(__file__).parents[1] / "results"


def main(argv: list[str] | None = None) -> int:
    return run_command("benchmarks.paper", lambda: _main(argv))


def parser() -> CommandParser:
    description, _, examples = (__doc__ or "").partition("\n\n")
    out = CommandParser("benchmarks.paper", description, examples)
    out.add_argument("--model", default="smollm2", help="name, folder or GGUF file (default %(default)s)")
    out.add_argument("--other-models", nargs="*", metavar="NAME", help="of Figures 4 and 5 (default tiny)")
    out.add_argument("--length", type=int, default=1024, help="of the contexts (default %(default)s)")
    out.add_argument("--lengths", type=int, nargs="+", metavar="N", help="of Figure 3 (default half, once, twice)")
    out.add_argument("--contexts", type=int, metavar="N", help="documents at each length (default 8; quick: 4)")
    out.add_argument("--line-contexts", type=int, metavar="N", help="prompts of key-value lines (default 8; quick: 3)")
    out.add_argument("--tables", nargs="+", metavar="NAME", help="only these")
    out.add_argument("--quick", action="store_true", help="tiny, few samples")
    out.add_argument("--study", type=Path, help="where prefills and the journal are (default runs/paper)")
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
    started = time.monotonic()
    progress = Progress(1)
    laboratory = Laboratory(
        study=arguments.study or Path("runs/paper"),
        contexts=arguments.contexts or (4 if arguments.quick else 8),
        commit=_commit(),
        progress=progress,
        deadline=None if arguments.timeout is None else started + 60 * arguments.timeout,
    )
    wanted, everything = _tables(arguments, laboratory)
    all_cells = list(dict.fromkeys(cell for table in everything for cell in table.cells))
    to_measure = list(dict.fromkeys(cell for table in wanted for cell in table.cells))
    places = {cell.place for cell in to_measure if isinstance(cell, Cell)}
    prefills = len(places) * laboratory.contexts * PREFILL_WORK
    progress.total_steps = sum(cell.work for cell in to_measure) + prefills  # type: ignore[attr-defined]
    progress.close()
    laboratory.progress = progress = Progress(progress.total_steps)
    in_time = True
    try:
        for table in wanted:
            progress.stage(table.name)
            in_time &= laboratory.measure(table.cells, all_cells)
            done = sum(cell in laboratory.measured or cell in laboratory.unfit for cell in to_measure)
            progress.say(f"{table.name}: {done} of {len(to_measure)} settings, {_left(started, done, len(to_measure))}")
    except KeyboardInterrupt:
        progress.say("interrupted: the page shows what is measured; the same command goes on")
        in_time = False
    progress.close()
    output = arguments.output or RESULTS / "paper" / Path(arguments.model).stem
    output.mkdir(parents=True, exist_ok=True)
    full = {place: losses.mean("ce") for place, losses in laboratory.full.items()}
    figures = [
        f"{t.name}.png" for t in wanted if draw(t, laboratory.measured, full, output / f"{t.name}.png")
    ]  # fmt: skip
    seconds = time.monotonic() - started
    where = {
        "hardware": arguments.hardware or _hardware(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "commit": " ".join(laboratory.commits),
    }
    about = _about(arguments, laboratory, where, seconds, in_time)
    text = page(wanted, laboratory, about, speed_table(RESULTS), figures)
    (output / "README.md").write_text(text, encoding="utf-8")
    write_rows(output / "rows.csv", wanted, laboratory, where)
    print(text)
    print(f"{output / 'README.md'}: {len(laboratory.measured)} settings in {seconds:.0f} s", file=sys.stderr)
    return 0


def _tables(arguments: argparse.Namespace, laboratory: Laboratory) -> tuple[list[Table], list[Table]]:
    """(the tables asked for, all tables)."""
    model, _ = laboratory.model(arguments.model)
    others = () if arguments.quick else ("tiny",)
    length = arguments.length
    scope = Scope(
        model=arguments.model,
        num_layers=model_shape(model).num_layers,
        length=length,
        lengths=tuple(arguments.lengths or (length // 2, length, 2 * length)),
        other_models=tuple(arguments.other_models) if arguments.other_models is not None else others,
        line_contexts=arguments.line_contexts or (3 if arguments.quick else 8),
    )
    everything = tables(scope)
    known = [table.name for table in everything]
    if unknown := [name for name in arguments.tables or () if name not in known]:
        raise InputError(f"--tables are of {', '.join(known)}, got {unknown[0]!r}")
    return [t for t in everything if not arguments.tables or t.name in arguments.tables], everything


def _about(
    arguments: argparse.Namespace, laboratory: Laboratory, where: dict[str, str], seconds: float, in_time: bool
) -> list[str]:
    lines = []
    for (model, length), full in laboratory.full.items():
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(full.kinds).items()))
        left_out = sum(laboratory.unanswerable[model, length].values())
        lines.append(
            f"- {model}, {length} tokens: {len(full.kinds)} samples of {len(set(full.contexts))} documents ({kinds}; "
            f"{left_out} questions left out that the full cache cannot answer); full cache {full.mean('ce'):.2f} nats, "
            f"{100 * full.mean('exact'):.0f} % exact."
        )
    lines.append(
        f"- {where['hardware']}; torch {where['torch']}, {where['threads']} thread(s); commit {where['commit']}."
    )
    if not in_time:
        lines.append("- The run was cut short: what says `not run` was not reached.")
    return lines


def _left(started: float, done: int, total: int) -> str:
    if done in (0, total):
        return "done" if done else "none measured"
    left = (time.monotonic() - started) / done * (total - done)
    return f"about {left / 60:.0f} minutes left"


def _hardware() -> str:
    """Cores and kind of processor, and the GPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{os.cpu_count()}-core {names[0] if names else platform.machine()}, {gpu}"


def _commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
