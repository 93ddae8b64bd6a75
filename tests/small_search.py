"""A search small enough for tests, and the planner's command in a process of its own, which a test may kill."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from qpkv_planner import cli, measurement, options
from qpkv_planner.calibration import Data
from qpkv_planner.mix import parse_mix
from qpkv_planner.options import Effort

SMALL = replace(
    options.QUICK,
    search_contexts=3,
    validation_contexts=3,
    formats=("rotated-k4v4", "rotated-k3v3"),
    scorers=options.QUICK.scorers[:1],
    times_budget=1.5,
    roomy_rounds=1,
    rounds=1,
    trials=3,
    additivity_plans=2,
)
# where the stages between the grid and the finalists are not what is tested
SMALLEST = replace(SMALL, formats=("rotated-k4v4",), times_budget=1.2, roomy_rounds=0, trials=0, additivity_plans=0)
MIX = "number=1,word=1,prose=1"
FEW = Data(mix=parse_mix(MIX))  # two questions and a text a context

# forked from a server that imports everything once: torch and transformers take seconds to import
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["qpkv_planner.cli"])


class Command:
    """`qpkv-plan` with `arguments`, its quick search the given effort, running from now on; with several threads, and
    so as many workers, however few the samples are."""

    def __init__(
        self, folder: Path, arguments: Sequence[str | Path], effort: Effort = SMALL, num_threads: int = 1
    ) -> None:
        folder.mkdir(exist_ok=True)
        self._outputs = folder / "stdout", folder / "stderr"
        settings = (*self._outputs, effort, num_threads, [str(argument) for argument in arguments])
        self.process: BaseProcess = _PROCESSES.Process(target=_run, args=settings, daemon=num_threads == 1)
        self.process.start()

    @property
    def is_running(self) -> bool:
        return self.process.is_alive()

    def send(self, signal_number: int) -> None:
        if self.process.pid is not None and self.process.is_alive():
            os.kill(self.process.pid, signal_number)

    def wait(self, timeout_seconds: float = 500) -> tuple[int | None, str, str]:
        """(exit status, standard output, standard error) when it has ended."""
        self.process.join(timeout_seconds)
        out, err = (path.read_text() if path.exists() else "" for path in self._outputs)
        return self.process.exitcode, out, err


def _run(out: Path, err: Path, effort: Effort, num_threads: int, arguments: list[str]) -> None:
    torch.set_num_threads(num_threads)
    measurement.LEAST_SHARE = 1
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background inherits that it is ignored
    options.QUICK = effort
    with out.open("w") as sys.stdout, err.open("w") as sys.stderr:
        status = cli.main(arguments)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    sys.exit(status)
