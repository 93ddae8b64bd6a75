"""Work on one core each, and the memory that it reuses."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

from qpkv_planner.side_by_side import side_by_side
from qpkv_runtime.errors import NumericsError

CPU = torch.device("cpu")


@pytest.fixture(params=[1, 2])
def num_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_come_in_order_without_gradients_and_leave_torchs_threads_alone(num_threads):
    x = torch.ones(3, requires_grad=True)
    results = side_by_side(lambda i: x * i, range(20), CPU)
    assert [int(one[0]) for one in results] == list(range(20))
    assert not any(one.requires_grad for one in results) and torch.is_grad_enabled()
    assert torch.get_num_threads() == num_threads


def test_every_thread_computes_by_itself(num_threads):
    def threads_used(_: int) -> int:
        torch.ones(2**20).add_(1)
        time.sleep(0.01)  # so that no thread takes all of it
        return torch.get_num_threads()

    assert set(side_by_side(threads_used, range(8), CPU)) == {1}


def test_what_one_raises_is_raised(num_threads):
    def fail(item: int) -> int:
        if item == 3:
            raise NumericsError("layer 3")
        return item

    with pytest.raises(NumericsError, match="layer 3"):
        side_by_side(fail, range(8), CPU)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_blocks_that_are_freed_are_used_again():
    """Page faults of twenty tensors of 64 MB: without it every page of every one is faulted in anew."""
    script = """
import resource, sys, torch
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    from qpkv_runtime.host_memory import keep_freed_blocks
    keep_freed_blocks()
for _ in range(20):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""
    faults = {
        how: int(subprocess.run([sys.executable, "-c", script, how], capture_output=True, text=True, check=True).stdout)
        for how in ("keep", "leave")
    }
    assert faults["keep"] < faults["leave"]
