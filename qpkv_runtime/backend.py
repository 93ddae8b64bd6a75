"""Which code decodes a packed layer, and what the Triton kernels are told about it.

The tensor's device decides: Triton on CUDA, the PyTorch reference path elsewhere. `QPKV_BACKEND=reference` or `triton`
forces one; Triton on a CPU means its interpreter (TRITON_INTERPRET=1), for tests. Nothing falls back in silence: what
the kernels do not cover ends in a BackendError that names layer, format and the way out.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from qpkv_runtime.errors import BackendError
from qpkv_runtime.ledger import Holdings, LayerLedger, layer_ledger
from qpkv_runtime.methods import QUANTIZERS, group_size

if TYPE_CHECKING:
    from qpkv_kernels.decode import BlockLayout, Side
    from qpkv_runtime.models.shape import ModelShape
    from qpkv_runtime.plan import TensorFormat

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


@lru_cache(maxsize=4096)
def block_layout(
    layer: int, holdings: Holdings, shape: ModelShape, dtype: torch.dtype, device: torch.device
) -> BlockLayout:
    """A layer's layout as the kernels read it; its small tables are on `device`, made once.

    Raises BackendError naming the layer and the format that the kernels do not cover.
    """
    from qpkv_kernels.decode import PLACES, BlockLayout, Segment, UnsupportedByKernelsError

    ledger = layer_ledger(layer, holdings, shape)
    if ledger.shared is not None:
        raise BackendError(f"layer {layer}: the kernels cannot read heads that each prompt divides anew: {WAY_OUT}")
    *buffers, _ = PLACES
    places = [
        [s.buffers[name].offset - s.offset if name in s.buffers else -1 for name in buffers] + [s.capacity_tokens]
        for s in ledger.segments
    ]
    segments = []
    for tier, (format, _) in enumerate(holdings):
        capacity = max(ledger.segment(head, tier).capacity_tokens for head in range(shape.num_kv_heads))
        keys = _side("keys", format.keys, ledger, capacity, shape.head_size)
        segments.append(Segment(keys, _side("values", format.values, ledger, capacity, shape.head_size), capacity))
    try:
        return BlockLayout(
            segments=tuple(segments),
            num_heads=shape.num_kv_heads,
            head_size=shape.head_size,
            places=torch.tensor(places, dtype=torch.int32, device=device).view(shape.num_kv_heads, len(holdings), -1),
            vectors=ledger.head_vectors.offset if ledger.head_vectors is not None else 0,
            num_vectors=max((rows.stop for rows in ledger.vector_rows.values()), default=0),
            window=shape.sliding_windows[layer],
            dtype=dtype,
        )
    except UnsupportedByKernelsError as error:
        raise unsupported(layer, holdings, error) from None


def unsupported(layer: int, holdings: Holdings, error: Exception) -> BackendError:
    """The error of a layer that the kernels do not cover, with what they said."""
    sides = [(w.quantizer, w.bits, w.group) for f, _ in holdings for w in (f.keys, f.values)]
    names = dict.fromkeys(f"{name} {bits} bit" + (f" group {group}" if group else "") for name, bits, group in sides)
    return BackendError(f"layer {layer} ({', '.join(names)}): {error}; {WAY_OUT}")


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
