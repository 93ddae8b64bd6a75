"""One run: samples answered one by one, every finished row kept, so that a run that was interrupted goes on.

Rows are appended to FILE.partial beside the run's JSON file as they come. The same command continues there; the file
is written whole at the end, and the partial one goes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qpkv_planner.evaluation.answering import Regime, Runner
from qpkv_planner.evaluation.comparison import Row
from qpkv_planner.evaluation.samples import Sample
from qpkv_planner.files import append_line, open_lines, whole_lines, write_whole
from qpkv_planner.progress import Progress
from qpkv_runtime.errors import InputError


def evaluate(
    runner: Runner,
    samples: Sequence[Sample],
    regimes: Sequence[Regime],
    *,
    name: str,
    plan_file: str | None = None,
    output: Path | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Answer every sample in every regime. Returns the run, and writes it to `output` where one is given.

    name: the model's, recorded. Raises InputError when `output` has the beginnings of another run beside it.
    """
    plan = runner.plan
    run: dict[str, Any] = {
        "version": 1,
        "model": name,
        "model_hashes": vars(runner.identity),
        "dtype": str(runner.model.dtype).removeprefix("torch."),
        "plan": None
        if plan is None
        else {
            "file": plan_file,
            "policy_hash": plan.policy_hash,
            "requested": plan.budget.requested,
            "planned_bytes": plan.budget.planned_bytes,
        },
        "versions": {package: version(package) for package in ("torch", "transformers")},
    }
    todo = [(sample, regime) for sample in samples for regime in regimes]
    journal = _Journal(output, run, [(sample.hash, regime) for sample, regime in todo])
    progress = Progress(len(todo), quiet)
    if journal.rows:
        progress.say(f"{len(journal.rows)} of {len(todo)} samples were answered before")
    rows: list[Row] = []
    stage = ("", "")
    try:
        for sample, regime in todo:
            if (sample.suite, sample.task) != stage:
                stage = (sample.suite, sample.task)
                progress.stage(sample.suite)
                progress.say(f"{' '.join(stage)}: {sum((s.suite, s.task) == stage for s, _ in todo)} answers")
            row = journal.rows.get((sample.id, sample.hash, regime))
            if row is None:
                if rows and rows[-1]["hash"] == sample.hash and (plan is None or not sample.question):
                    row = {**rows[-1], "regime": regime}  # the regimes are one
                else:
                    row = runner.row(sample, regime)
                journal.append(row)
            rows.append({**row, "cluster": sample.cluster})  # which rows that were begun before lack
            progress.step()
    finally:
        progress.close()
        journal.close()
    run["rows"] = rows
    if output is not None:
        write_whole(output, json.dumps(run) + "\n")
        journal.remove()
    return run


class _Journal:
    """The finished rows of a run, one line each, under a line that names the run. Without a file: nothing is kept."""

    def __init__(self, output: Path | None, run: dict[str, Any], todo: Sequence[tuple[str, str]]) -> None:
        self.path = None if output is None else output.with_name(output.name + ".partial")
        self.rows: dict[tuple[str, str, str], Row] = {}
        self._file = None
        if self.path is None:
            return
        named = {**run, "plan": run["plan"] and run["plan"]["policy_hash"]}
        name = hashlib.sha256(json.dumps([named, list(todo)], sort_keys=True).encode()).hexdigest()
        whole = whole_lines(self.path, "cannot be read: delete it to begin anew")
        if whole and whole[0] != {"run": name}:
            raise InputError(f"{self.path} has the beginnings of another run: delete it, or choose another --json")
        self.rows = {(row["id"], row["hash"], row["regime"]): row for row in whole[1:]}
        self._file = open_lines(self.path)
        if not whole:
            self.append({"run": name})

    def append(self, row: Row) -> None:
        if self._file is not None:
            append_line(self._file, row, "run again to go on from there")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)
