"""Which code compresses and decodes a layer, and what the Triton kernels are told about it.

The tensor's device decides: Triton on CUDA, the PyTorch reference path elsewhere. `QPKV_BACKEND=reference` or `triton`
forces one; Triton on a CPU means its interpreter (TRITON_INTERPRET=1), for tests. Nothing falls back in silence: what
the kernels do not cover, or a kernel that fails, ends in a BackendError that names layer, shape, format and way out.

On a GPU kernels do: appending and decode attention (`append.py`, `decode.py`), the attention that snapkv, criticalkv
and tova score by (`score.py`), and the writing of the kept tokens (`quantize.py`). PyTorch operations on the same
device do, by design: the other scorers, pooling, the sort of the importances, and the whole writing of a layer with
`hqq` in a tier, whose fit is iterative, or with heads that each prompt divides anew.
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
from qpkv_runtime.ledger import Holdings, LayerLedger, align, buffer_offsets, layer_ledger, quantum_tokens
from qpkv_runtime.methods import QUANTIZERS, group_size

if TYPE_CHECKING:
    from qpkv_kernels.block import BlockLayout, Side
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
    from qpkv_kernels.block import UnsupportedByKernelsError

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
    return use_kernels(device) and not is_fitted and ledger.shared is None


@lru_cache(maxsize=4096)
def write_layout(ledger: LayerLedger, storage_dtype: str, device: torch.device) -> tuple[BlockLayout, Tensor, Tensor]:
    """(the layout, its table `places`, the segments' offsets int32 [H_kv, segments]) that the kernels write a layer's
    block by; as `block_layout`, but for sliding window and ring, which writing does not look at."""
    capacities = _capacities(ledger)
    layout = _layout_of(ledger, capacities, None, storage_dtype, capacities[-1][0])
    places = _places(ledger.formats, capacities, ledger.num_heads, ledger.head_size, ledger.is_sliding, False, device)
    offsets = torch.tensor([segment.offset for segment in ledger.segments], dtype=torch.int32, device=device)
    return layout, places, offsets.view(layout.num_heads, -1)


@lru_cache(maxsize=4096)
def block_layout(
    layer: int, holdings: Holdings, shape: ModelShape, storage_dtype: str, is_adaptive: bool = False
) -> BlockLayout:
    """A layer's layout as the kernels read it; `block_places` makes the table that goes with it.

    Raises BackendError naming the layer and the format that the kernels do not cover.
    """
    ledger = layer_ledger(layer, holdings, shape, is_adaptive)
    reserve_format, reserve_tokens = holdings[-1]
    assert isinstance(reserve_tokens, int)
    if reserve_format.values.quantizer == "hqq":
        raise BackendError(f"layer {layer}: the kernels cannot append in hqq, whose fit is iterative: {WAY_OUT}")
    capacities = _capacities(ledger, holdings)
    return _layout_of(ledger, capacities, shape.sliding_windows[layer], storage_dtype, reserve_tokens)


def _layout_of(
    ledger: LayerLedger, capacities: Capacities, window: int | None, storage_dtype: str, reserve_tokens: int
) -> BlockLayout:
    from qpkv_kernels.block import BlockLayout, Segment

    segments, formats = [], ledger.formats
    for tier, (format, rooms) in enumerate(zip(formats, capacities, strict=True)):
        keys = _side("keys", format.keys, ledger, max(rooms), ledger.head_size)
        values = _side("values", format.values, ledger, max(rooms), ledger.head_size)
        by_count = ledger.shared is not None and tier < len(formats) - 1
        segments.append(Segment(keys, values, max(rooms), by_count))
    with kernels_at(f"layer {ledger.layer}", formats):
        return BlockLayout(
            segments=tuple(segments),
            num_heads=ledger.num_heads,
            head_size=ledger.head_size,
            reserve_tokens=reserve_tokens,
            vectors=ledger.head_vectors.offset if ledger.head_vectors is not None else 0,
            num_vectors=max((rows.stop for rows in ledger.vector_rows.values()), default=0),
            window=window,
            number=storage_dtype,
        )


def block_places(layer: int, holdings: Holdings, shape: ModelShape, is_adaptive: bool, device: torch.device) -> Tensor:
    """The table `places` of a layer's layout, int32 on `device`: made once, the same for layers that are alike.

    Where each prompt divides heads anew it has a row for every number of quanta that a head can hold. It is scratch of
    the device: 24 bytes a row, shared by all layers of the same formats.
    """
    ledger = layer_ledger(layer, holdings, shape, is_adaptive)
    capacities = _capacities(ledger, holdings)
    if is_adaptive:  # room for the next power of two, so that layers share one
        capacities = (*(((1 << (most - 1).bit_length()),) for most, *_ in capacities[:-1]), capacities[-1])
    return _places(
        ledger.formats, capacities, ledger.num_heads, ledger.head_size, ledger.is_sliding, is_adaptive, device
    )


Capacities = tuple[tuple[int, ...], ...]
"""Tokens that each head has room for, of every tier and the reserve; of a tier that heads divide anew, the most that
one of them could get."""


def _capacities(ledger: LayerLedger, holdings: Holdings | None = None) -> Capacities:
    """holdings: needed where heads are divided anew."""
    capacities: list[tuple[int, ...]] = []
    for tier, format in enumerate(ledger.formats):
        if ledger.shared is not None and tier < len(ledger.tier_formats):
            assert holdings is not None
            tokens = holdings[tier][1]
            assert isinstance(tokens, int)
            capacities.append((align(ledger.num_heads * tokens, quantum_tokens(format)),))
        else:
            capacities.append(tuple(ledger.segment(head, tier).capacity_tokens for head in range(ledger.num_heads)))
    return tuple(capacities)


@lru_cache(maxsize=1024)
def _places(
    formats: tuple[Format, ...], capacities: Capacities, num_heads: int, head_size: int,
    is_sliding: bool, is_adaptive: bool, device: torch.device,
) -> Tensor:  # fmt: skip
    from qpkv_kernels.block import PLACES

    def row(format: Format, capacity: int) -> list[int]:
        offsets = buffer_offsets(format, capacity, head_size, is_sliding)
        return [*(offsets.get(name, -1) for name in PLACES[:-1]), capacity]

    fixed: list[list[list[int]]] = []
    by_count: list[list[int]] = []
    for index, (format, rooms) in enumerate(zip(formats, capacities, strict=True)):
        if is_adaptive and index < len(formats) - 1:
            fixed.append([[num_heads * len(formats) + len(by_count)] + [-1] * 5] * num_heads)
            quantum = quantum_tokens(format)
            by_count += [row(format, tokens) for tokens in range(0, rooms[0] + quantum, quantum)]
        else:
            fixed.append([row(format, capacity) for capacity in rooms])
    own = [rows[head] for head in range(num_heads) for rows in fixed]
    return torch.tensor(own + by_count, dtype=torch.int32, device=device)


def _side(name: str, written: TensorFormat, ledger: LayerLedger, capacity: int, head_size: int) -> Side:
    from qpkv_kernels.block import Side

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
