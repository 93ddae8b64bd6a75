"""Which code compresses and decodes a layer, and what the Triton kernels are told about it.

The tensor's device decides: Triton on CUDA, the PyTorch reference path elsewhere. `QPKV_BACKEND=reference` or `triton`
forces one; Triton on a CPU means its interpreter (TRITON_INTERPRET=1), for tests. Nothing falls back in silence: what
the kernels do not cover, or a kernel that fails, ends in a BackendError that names layer, shape, format and way out.

On a GPU kernels do: decode attention (`decode.py`) and the writing of the kept tokens (`quantize.py`). PyTorch
operations on the same device do, by design: the scorers, the sort of the importances, and the whole writing of a layer
with `hqq` in a tier, whose fit is iterative.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qpkv_runtime.errors import BackendError, QpkvError
from qpkv_runtime.ledger import Holdings, LayerLedger, layer_ledger
from qpkv_runtime.methods import QUANTIZERS, group_size

if TYPE_CHECKING:
    from qpkv_kernels.decode import BlockLayout, Side
    from qpkv_runtime.models.shape import ModelShape
    from qpkv_runtime.plan import Format, TensorFormat

BACKENDS = ("reference", "triton")
VARIABLE = "QPKV_BACKEND"
LEAST_CAPABILITY = (8, 0)
WAY_OUT = f"set {VARIABLE}=reference to run it in PyTorch"


def use_kernels(device: torch.device) -> bool:
    """Whether decoding on `device` goes through Triton. Raises BackendError where it should and cannot."""
    forced = os.environ.get(VARIABLE, "")
    if forced not in ("", *BACKENDS):
        raise BackendError(f"{VARIABLE} must be one of {', '.join(BACKENDS)}, got {forced!r}")
    if (forced or ("triton" if device.type == "cuda" else "reference")) == "reference":
        return False
    _check(device)
    return True


@lru_cache(maxsize=16)
def _check(device: torch.device) -> None:
    try:
        from qpkv_kernels import decode
    except ImportError as error:
        raise BackendError(f"the kernels need Triton, which does not load ({error}): {WAY_OUT}") from None
    if decode.is_interpreted():
        return
    if device.type != "cuda":
        raise BackendError(
            f"the kernels run on a CUDA device (or anywhere under TRITON_INTERPRET=1), got {device}: {WAY_OUT}"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        least, got = ("{}.{}".format(*pair) for pair in (LEAST_CAPABILITY, capability))
        name = torch.cuda.get_device_name(device)
        raise BackendError(
            f"the kernels need a GPU of compute capability {least} or above, got {got} ({name}): {WAY_OUT}"
        )


@contextmanager
def kernels_at(what: str, formats: Sequence[Format] = ()) -> Iterator[None]:
    """Around kernel launches: what they do not cover, and what fails in them, becomes a BackendError that says `what`
    (layer and shape) and the formats."""
    from qpkv_kernels.decode import UnsupportedByKernelsError

    sides = [(w.quantizer, w.bits, w.group) for f in formats for w in (f.keys, f.values)]
    names = dict.fromkeys(f"{name} {bits} bit" + (f" group {group}" if group else "") for name, bits, group in sides)
    where = f"{what} ({', '.join(names)})" if names else what
    try:
        yield
    except UnsupportedByKernelsError as error:
        raise BackendError(f"{where}: {error}; {WAY_OUT}") from None
    except Exception as error:
        if isinstance(error, QpkvError):
            raise
        raise BackendError(f"{where}: the kernel failed with {type(error).__name__}: {error}; {WAY_OUT}") from error


def writes_with_kernels(ledger: LayerLedger, device: torch.device) -> bool:
    """Whether a prompt is written into a layer's block by Triton. Raises BackendError as `use_kernels`."""
    is_fitted = any(side.quantizer == "hqq" for f in ledger.tier_formats for side in (f.keys, f.values))
    return use_kernels(device) and not is_fitted


@lru_cache(maxsize=4096)
def write_layout(ledger: LayerLedger, dtype: torch.dtype, device: torch.device) -> tuple[BlockLayout, Tensor]:
    """(the layout, the segments' offsets int32 [H_kv, segments]) that the kernels write a layer's block by; as
    `block_layout`, but for the sliding window, which writing does not look at."""
    layout = _layout_of(ledger, None, dtype, device)
    offsets = torch.tensor([segment.offset for segment in ledger.segments], dtype=torch.int32, device=device)
    return layout, offsets.view(layout.num_heads, -1)


@lru_cache(maxsize=4096)
def block_layout(
    layer: int, holdings: Holdings, shape: ModelShape, dtype: torch.dtype, device: torch.device
) -> BlockLayout:
    """A layer's layout as the kernels read it; its small tables are on `device`, made once.

    Raises BackendError naming the layer and the format that the kernels do not cover.
    """
    return _layout_of(layer_ledger(layer, holdings, shape), shape.sliding_windows[layer], dtype, device)


def _layout_of(ledger: LayerLedger, window: int | None, dtype: torch.dtype, device: torch.device) -> BlockLayout:
    from qpkv_kernels.decode import PLACES, BlockLayout, Segment

    layer, num_heads, formats = ledger.layer, ledger.num_heads, ledger.formats
    if ledger.shared is not None:
        raise BackendError(f"layer {layer}: the kernels cannot read heads that each prompt divides anew: {WAY_OUT}")
    *buffers, _ = PLACES
    places = [
        [s.buffers[name].offset - s.offset if name in s.buffers else -1 for name in buffers] + [s.capacity_tokens]
        for s in ledger.segments
    ]
    segments = []
    for tier, format in enumerate(formats):
        capacity = max(ledger.segment(head, tier).capacity_tokens for head in range(num_heads))
        keys = _side("keys", format.keys, ledger, capacity, ledger.head_size)
        segments.append(Segment(keys, _side("values", format.values, ledger, capacity, ledger.head_size), capacity))
    with kernels_at(f"layer {layer}", formats):
        return BlockLayout(
            segments=tuple(segments),
            num_heads=num_heads,
            head_size=ledger.head_size,
            places=torch.tensor(places, dtype=torch.int32, device=device).view(num_heads, len(formats), -1),
            vectors=ledger.head_vectors.offset if ledger.head_vectors is not None else 0,
            num_vectors=max((rows.stop for rows in ledger.vector_rows.values()), default=0),
            window=window,
            dtype=dtype,
        )


def _side(name: str, written: TensorFormat, ledger: LayerLedger, capacity: int, head_size: int) -> Side:
    from qpkv_kernels.decode import Side

    facts = QUANTIZERS[written.quantizer]
    axis = facts.key_axis if name == "keys" else facts.value_axis
    problem = None
    if written.outliers:
        problem = "outliers that are kept apart"
    elif axis == "strided":
        problem = "groups that run across heads"
    elif axis == "channel" and name == "values":
        problem = "values in token groups"
    if problem is not None:
        raise BackendError(
            f"layer {ledger.layer}: the kernels cannot read {problem} "
            f"({name}: {written.quantizer} {written.bits} bit): {WAY_OUT}"
        )
    assert axis != "strided"
    if facts.numbers_per_group == 0:
        return Side(written.bits, "none")
    rows = ledger.vector_rows.get(written.quantizer, slice(0, 0)) if name == "keys" else slice(0, 0)
    vectors = tuple(range(rows.start, rows.stop))
    if facts.numbers_per_group == 1:
        return Side(written.bits, "rotated", vectors=vectors)
    group = group_size(written.quantizer, axis, written.group, capacity, head_size)
    return Side(written.bits, axis, group, vectors)
