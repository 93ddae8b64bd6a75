"""What this machine has and does, by looking: free memory, speed, and what a prefill takes on a loaded model.

A prefill's peak is that of CUDA's allocator; elsewhere the sum of what the allocator gave and took back, as torch's
profiler saw it.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from qpkv_planner.allocation import Space, model_section, uniform
from qpkv_runtime.cache import PlannedCache, runs_on
from qpkv_runtime.models import model_shape
from qpkv_runtime.plan import Decode, Scorer

FORMAT = "rotated-k4v4"
CONTROL_GROUP = Path("/sys/fs/cgroup")
SHARE = "1/8"  # of the cache, for the plan that is measured under


def this_process() -> list[str]:
    """What names it: the machine, what its numbers are of (a container has its own), and its number."""
    try:
        numbers = os.readlink("/proc/self/ns/pid")
    except OSError:
        numbers = ""
    return [platform.node(), numbers, str(os.getpid())]


def is_gone(process: Sequence[str]) -> bool:
    """Whether a process that named itself by `this_process` is known to have ended."""
    if os.name != "posix" or list(process[:-1]) != this_process()[:-1]:
        return False
    try:
        os.kill(int(process[-1]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's, which runs
        pass
    return False


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device; of main memory, what the system can give and the control group allows."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # no Linux: half of all that there is
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    try:
        limit, used = ((CONTROL_GROUP / name).read_text() for name in ("memory.max", "memory.current"))
        return min(free, int(limit) - int(used))
    except (OSError, ValueError):  # none, or "max"
        return free


def operations_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Of a matrix product, multiplications and additions: the best of three, a tenth of a second on a slow CPU."""
    size = 4096 if device.type == "cuda" else 1024
    x = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):  # the first one is a warm-up
        started = time.perf_counter()
        y = x @ x
        float(y[0, 0])  # waits for it
        best = min(best, time.perf_counter() - started)
    return 2 * float(size) ** 3 / best


@torch.no_grad()
def measured_prefill_bytes(model: PreTrainedModel, num_tokens: int) -> int:
    """The peak of one prefill of so many tokens under a uniform plan, less what was allocated before and its arena."""
    shape, dtype = model_shape(model), str(model.dtype).removeprefix("torch.")
    space = Space(
        model=model_section("measured", shape, dtype, "bfloat16"),
        requested=SHARE,
        context_tokens=num_tokens,
        scorer=Scorer(name="snapkv"),
        sinks=4,
        window=16,
        decode=Decode(reserve_tokens=8, format=FORMAT),
    )
    allocation = uniform(space, FORMAT)
    assert allocation is not None, f"{num_tokens} tokens are too few to measure a prefill with"
    cache = PlannedCache.from_plan(space.plan(allocation), model)
    device = runs_on(model)
    ids = torch.arange(num_tokens, device=device)[None] % model.config.get_text_config(decoder=True).vocab_size

    def forward() -> None:
        model(ids, past_key_values=cache, logits_to_keep=1)

    peak = _cuda_peak(device, forward) if device.type == "cuda" else _peak(forward)
    return peak - cache.allocated_bytes


def _cuda_peak(device: torch.device, forward: Callable[[], None]) -> int:
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    forward()
    return torch.cuda.max_memory_allocated(device) - before


def _peak(forward: Callable[[], None]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        forward()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [one for one in profiler.profiler.kineto_results.events() if one.name() == "[memory]"]
    return max(accumulate(int(one.nbytes()) for one in sorted(events, key=lambda one: one.start_ns())))
