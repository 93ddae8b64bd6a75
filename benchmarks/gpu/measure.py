"""What the GPU tables share: timing, the machine's own bandwidth, caches full of random tokens, and rows on disk."""

from __future__ import annotations

import csv
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qpkv_kernels.tuning import captured
from qpkv_planner.allocation import Choice, Space, model_section
from qpkv_runtime.compression import STORAGE_DTYPES, TierTensors, write_block
from qpkv_runtime.ledger import LayerLedger
from qpkv_runtime.models.shape import ModelShape
from qpkv_runtime.plan import Decode, Heads, Plan, Scorer

Call = Callable[[], object]


@dataclass
class Rows:
    """A table that is written to `folder`/gpu_<name>.csv and .json after every row, so that what was measured stays.

    A row of something that failed says so, and makes `status` 1; later rows go on.
    """

    name: str
    folder: Path
    machine: dict[str, str]
    rows: list[dict[str, Any]] = field(default_factory=list)
    status: int = 0

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        print("  ".join(f"{key} {_shown(value)}" for key, value in row.items()), flush=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        whole = [{**row, **self.machine} for row in self.rows]
        (self.folder / f"gpu_{self.name}.json").write_text(json.dumps(whole, indent=1) + "\n")
        with (self.folder / f"gpu_{self.name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in whole for key in row)), restval="")
            writer.writeheader()
            writer.writerows(whole)

    def attempt(self, what: dict[str, Any], measure: Callable[[], dict[str, Any] | None]) -> None:
        """Add the row that `measure` gives, if any; or that it does not fit, or failed."""
        try:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # what the last row held
            row = measure()
            if row is not None:
                self.add(**what, **row)
        except torch.cuda.OutOfMemoryError:
            self.add(**what, note="does not fit")
        except Exception as error:
            self.status = 1
            self.add(**what, note=f"FAILED: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def machine(device: torch.device) -> dict[str, str]:
    """The row's last columns: hardware, its clocks after a second of work, versions and commit."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "triton")}
    found = {"gpu": "none (CPU)", "driver": "", "sm_mhz": "", "memory_mhz": "", "max_sm_mhz": ""}
    if device.type == "cuda":
        query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm"
        _work(device, 1.0)
        asked = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", f"--id={device.index or 0}"]
        try:
            done = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=30)
            found = dict(zip(found, (part.strip() for part in done.stdout.split(",")), strict=True))
        except (OSError, ValueError, subprocess.TimeoutExpired):
            found["gpu"] = torch.cuda.get_device_name(device)
    return {**found, **versions, "commit": os.environ.get("QPKV_COMMIT", "unknown")}


def _work(device: torch.device, seconds: float) -> None:
    """Matrix products, so that the clocks leave idling."""
    x, started = torch.ones(4096, 4096, device=device, dtype=torch.bfloat16), time.perf_counter()
    while time.perf_counter() - started < seconds:
        torch.mm(x, x)
        torch.cuda.synchronize(device)


def timed(
    calls: dict[str, Call], device: torch.device, repeats: int, eager: Collection[str] = ()
) -> dict[str, dict[str, float]]:
    """Microseconds p20, p50, p80 of each call, in turns, forwards and backwards.

    On CUDA a call is captured and replayed, so that no launch is waited for; those named in `eager`, which may ask the
    host, are timed by events as they are, and their `graph` is 0.
    """
    graphs = {name: float(device.type == "cuda" and name not in eager) for name in calls}
    replays = {name: captured(call, device) if graphs[name] else call for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name in list(replays) if turn % 2 else reversed(replays):
            seconds = _seconds(replays[name], device)
            if turn:  # the first warms up
                times[name].append(1e6 * seconds)
    return {
        name: {**dict(zip(("p20_us", "p50_us", "p80_us"), percentiles(each), strict=True)), "graph": graphs[name]}
        for name, each in times.items()
    }


def _seconds(call: Call, device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def percentiles(values: list[float]) -> list[float]:
    if len(values) == 1:
        return values * 3
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return [deciles[1], deciles[4], deciles[7]]


def bandwidths(device: torch.device, num_bytes: int, repeats: int) -> dict[str, float]:
    """GB/s of a device-to-device copy (bytes read plus written) and of reading alone (a sum)."""
    source = torch.randint(0, 2**31 - 1, (num_bytes // 8,), device=device, dtype=torch.int64).view(torch.int32)
    target = torch.empty_like(source)
    times = timed({"copy": lambda: target.copy_(source), "read": lambda: source.amax()}, device, repeats)
    gigabytes = source.numel() * 4 / 1e9
    return {name: moved * gigabytes / (times[name]["p50_us"] / 1e6) for name, moved in (("copy", 2), ("read", 1))}


# --- plans and caches of random tokens -----------------------------------------------------------------------------


def make_plan(shape: ModelShape, tokens: int, format: str, dtype: str, share: str = "uniform") -> Plan:
    """So many tokens of every head in every layer, and a reserve of 4."""
    reserve = "16bit" if format == "16bit" else "flexgen-k4v4"
    space = Space(
        model_section("random", shape, dtype, dtype), "64GiB", max(tokens, 32), Scorer(name="snapkv"), 4, 4,
        Decode(reserve_tokens=4, format=reserve), heads=Heads(share=share),
    )  # fmt: skip
    return space.plan([Choice(tokens, format)] * shape.num_layers)


def few_layers(shape: ModelShape, num_layers: int) -> ModelShape:
    return replace(shape, num_layers=num_layers, sliding_windows=shape.sliding_windows[:1] * num_layers)


def random_block(plan: Plan, layout: LayerLedger, num_rows: int, device: torch.device, spread: float = 1.0) -> Tensor:
    """A layer's block uint8 [B, bytes] with every tier full of random tokens. spread: how many times more tokens the
    last head holds than the first, where the plan lets heads differ. Eight rows are quantized and repeated."""
    shape, number = plan.model.shape, STORAGE_DTYPES[plan.model.storage_dtype]
    num_heads, rows = shape.num_kv_heads, min(num_rows, 8)
    tiers = []
    for tier in plan.layers[layout.layer].tiers:
        counts = torch.full((num_heads,), tier.tokens)
        if spread > 1:
            quantum = 8
            weights = torch.linspace(1, spread, num_heads)
            counts = (weights / weights.sum() * num_heads * tier.tokens / quantum).long() * quantum
            counts[-1] += num_heads * tier.tokens - counts.sum()
        size = (rows, num_heads, int(counts.max()), shape.head_size)
        valid = (torch.arange(size[2]) < counts[:, None]).expand(rows, -1, -1).to(device)
        keys, values = (torch.randn(size, device=device, dtype=torch.float32).to(number) for _ in range(2))
        keys, values = (x.masked_fill_(~valid[..., None], 0) for x in (keys, values))
        positions = torch.arange(size[2], dtype=torch.int32, device=device).expand(size[:3])
        tiers.append(TierTensors(keys, values, positions, valid))
    block = torch.zeros(rows, layout.stored_bytes, dtype=torch.uint8, device=device)
    stats = torch.rand(rows, num_heads, 2, shape.head_size, device=device) + 0.5
    write_block(block, layout, tiers, stats)
    return block.repeat(-(-num_rows // rows), 1)[:num_rows].contiguous()


def free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 2 * 2**30


def total_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 2**30


def finish(rows: Rows) -> int:
    failed = sum("FAILED" in str(row.get("note", "")) for row in rows.rows)
    print(f"{rows.name}: {len(rows.rows)} rows, {failed} failed", file=sys.stderr)
    return rows.status
