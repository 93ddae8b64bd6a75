"""Independent pieces of work on a CPU, each on one core, instead of every small operation on all of them.

An operation of less than a millisecond gains next to nothing from a second core: torch's threads spend their time
waiting for each other. Layers, which do not depend on each other, gain nearly all of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from threading import Barrier
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")
ENOUGH_TO_DIVIDE = 2**17  # elements: a thread's first such operation settles how many threads it uses


def side_by_side(function: Callable[[Item], Result], items: Iterable[Item], device: torch.device) -> list[Result]:
    """[function(item) for item in items], without gradients; on a CPU in as many threads as torch uses."""
    alone = torch.no_grad()(function)
    num_threads = torch.get_num_threads() if device.type == "cpu" else 1
    if num_threads == 1:
        return [alone(item) for item in items]
    return list(_threads(num_threads, os.getpid()).map(alone, items))


@lru_cache(maxsize=1)
def _threads(number: int, process: int) -> ThreadPoolExecutor:
    """A pool whose threads compute each by itself; a forked process, which inherits no threads, gets its own.

    What torch.set_num_threads says is for the thread that calls it and for those that have not computed anything yet.
    """
    all_here = Barrier(number + 1)

    def settle() -> None:
        torch.set_num_threads(1)
        torch.ones(ENOUGH_TO_DIVIDE).add_(1)
        all_here.wait()

    pool = ThreadPoolExecutor(number, "qpkv", initializer=settle)
    for _ in range(number):
        pool.submit(int)
    all_here.wait()
    torch.set_num_threads(number)
    return pool
