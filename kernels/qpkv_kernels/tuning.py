"""Which launch of the decode kernel is fastest on this GPU: a short fixed list, timed once and remembered in a file.

What is timed is the call that is about to be made, over its own block, as a replayed graph with a cold L2: launching it
from Python takes longer than it runs. The answer holds for all layers of one format, shape, batch and size to a power
of two, on one kind of GPU under the same versions; that is its key in `decode-launches.json`, in the folder that
$QPKV_CACHE, or $XDG_CACHE_HOME/qpkv, or ~/.cache/qpkv names. Nothing is ever timed while a CUDA graph is captured, nor
under QPKV_AUTOTUNE=0: what is not known then runs in the default launch.

The list has not been timed on a GPU by us.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import triton
from triton.testing import do_bench

from qpkv_kernels.block import BlockLayout, UnsupportedByKernelsError
from qpkv_kernels.decode import Launch, arch_of, constants, default_launch, is_interpreted

VARIABLE = "QPKV_AUTOTUNE"
Timer = Callable[[Launch], float]  # -> milliseconds of one call
_known: dict[str, Launch] = {}


def candidates(layout: BlockLayout, gqa: int, query_dtype: torch.dtype, arch: int) -> list[Launch]:
    """The default first; then wider tiles, another depth of the pipeline, more and fewer splits: those of them that the
    kernel has for this layout."""
    default = default_launch(layout, arch)
    wide = [replace(default, words=words, num_warps=warps) for words, warps in ((32, 2), (64, 2), (64, 4))]
    deep = [replace(default, num_stages=stages) for stages in (2, 4)]
    split = [replace(default, programs=programs) for programs in (4, 8, 32)]
    return [default, *(launch for launch in (*wide, *deep, *split) if _exists(layout, gqa, query_dtype, launch))]


def _exists(layout: BlockLayout, gqa: int, query_dtype: torch.dtype, launch: Launch) -> bool:
    try:
        constants(layout, query_dtype, gqa, launch, is_interpreted())
    except UnsupportedByKernelsError:  # a wide tile spans more token groups than the kernel has rows for
        return False
    return True


def choose(
    layout: BlockLayout, num_rows: int, gqa: int, query_dtype: torch.dtype, device: torch.device, time: Timer
) -> Launch:
    """The launch for this call: known, or timed and written down now. num_rows: sequences."""
    arch = arch_of(device)
    if device.type != "cuda" or os.environ.get(VARIABLE) == "0":
        return default_launch(layout, arch)
    name = key(layout, num_rows, gqa, query_dtype, torch.cuda.get_device_name(device))
    if name not in _known:
        if torch.cuda.is_current_stream_capturing():
            return default_launch(layout, arch)
        _known[name] = remembered(name) or fastest(name, candidates(layout, gqa, query_dtype, arch), time)
    return _known[name]


@lru_cache(maxsize=4096)  # every layer asks at every step that is not replayed
def key(layout: BlockLayout, num_rows: int, gqa: int, query_dtype: torch.dtype, gpu: str) -> str:
    """What a measurement is good for, as text."""
    segments = tuple(replace(segment, capacity=triton.next_power_of_2(segment.capacity)) for segment in layout.segments)
    shape = replace(layout, segments=segments, vectors=0, reserve_tokens=0, window=0 if layout.window else None)
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    return f"{gpu}, {versions}, batch {num_rows}, gqa {gqa}, {query_dtype}: {shape.text}"


def captured(call: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """A replay of the call as a CUDA graph, after one run that compiles and allocates. Only for calls that never wait
    for the host: a capture that fails leaves torch's allocator unusable (before 2.12, pytorch 180395)."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            call()
    return graph.replay


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """The median of a call's time on a CUDA device."""
    replay = captured(call, device)
    with torch.cuda.device(device):
        median: float = do_bench(replay, return_mode="median")
    return median


def fastest(name: str, launches: list[Launch], time: Timer) -> Launch:
    """Time the launches and write the fastest down. One that this GPU does not run is left out, unless it is the first:
    that is what the call is made with where nothing else is known. The first, unwritten, where memory runs out."""
    try:
        best, least = launches[0], time(launches[0])
    except torch.cuda.OutOfMemoryError:  # no room for the buffer that do_bench clears the L2 with
        return launches[0]
    for launch in launches[1:]:
        try:
            taken = time(launch)
        except Exception:  # a mere candidate: too large for the GPU, or not compiled by this Triton
            continue
        if taken < least:
            best, least = launch, taken
    _write(name, {**asdict(best), "milliseconds": least})
    return best


def remembered(name: str) -> Launch | None:
    """The launch that the file has under this key; None where it has none that this version could use."""
    entry = _read().get(name)
    try:
        return Launch(**{field: value for field, value in entry.items() if field != "milliseconds"}) if entry else None
    except (AttributeError, TypeError):
        return None


def file() -> Path:
    folder = os.environ.get("QPKV_CACHE")
    if not folder:
        folder = str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "qpkv")
    return Path(folder) / "decode-launches.json"


def _read() -> dict[str, dict[str, Any]]:
    try:
        content = json.loads(file().read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not written yet, or torn: it is only measured again
        return {}
    return content if isinstance(content, dict) else {}


def _write(name: str, entry: dict[str, float]) -> None:
    """Add an entry; a folder that cannot be written only costs another measurement next time."""
    path, content = file(), {**_read(), name: entry}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}")
        beside.write_text(json.dumps(content, indent=1), encoding="utf-8")
        beside.replace(path)
    except OSError:
        return
