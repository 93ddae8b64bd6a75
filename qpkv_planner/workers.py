"""An evaluator's samples divided among processes, a core each.

A search is made of operations of less than a millisecond, after each of which one of Python's threads waits for the
interpreter: two threads do 1.4 times the work of one, two processes twice. A worker is forked off with everything that
the evaluator holds, shares its memory as long as neither writes to it, and keeps the blocks of its own samples; what
goes to and fro are plans and losses.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def can_fork() -> bool:
    """Whether a forked process can compute: glibc's and PyTorch's CPU code then can, with one thread. CUDA's cannot,
    and a backward there may want CUDA's threads even for a model that is not on it; and a daemon has no children."""
    is_linux = sys.platform.startswith("linux")
    return is_linux and not torch.cuda.is_available() and not multiprocessing.current_process().daemon


class Workers:
    """Forked processes that do the same work, each on what its `become` made of it."""

    def __init__(self, number: int, become: Callable[[int], Any]) -> None:
        """become: called in each new process with its number, returns what the work's first argument is to be."""
        context = multiprocessing.get_context("fork")
        self._links, self._processes, self._asked = [], [], 0
        for worker in range(number):
            link, its_link = context.Pipe()
            process = context.Process(target=_serve, args=(its_link, become, worker, os.getpid()), daemon=True)
            process.start()
            its_link.close()
            self._links.append(link)
            self._processes.append(process)

    def __len__(self) -> int:
        return len(self._processes)

    def run(self, work: Callable[..., Result], *given: Any) -> list[Result]:
        """work(its own, *given) of every worker, in their order. Raises what the first that failed raised; MemoryError
        where one is gone, as the kernel ends processes when memory runs out."""
        self._asked += 1
        try:
            for link in self._links:
                link.send((self._asked, work, given))
            return [self._answer(link) for link in self._links]
        except (EOFError, ConnectionError):
            raise MemoryError("a worker process of the search is gone") from None

    def _answer(self, link: Any) -> Any:
        asked = 0
        while asked != self._asked:  # an interrupted run's answers are still to come
            asked, answer = link.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()


def _serve(link: Any, become: Callable[[int], Any], worker: int, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who asks
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    its_own = become(worker)
    while True:
        number, work, given = link.recv()
        try:
            answer = work(its_own, *given)
        except Exception as error:
            error.add_note(traceback.format_exc())
            answer = error
        link.send((number, answer))
