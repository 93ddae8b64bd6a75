"""The decode kernels as operators that torch can trace: `torch.compile` sees one graph, without a look inside.

An operator takes the arena and where a layer's block lies in it, not a view, so that writing to it needs no copy in a
functionalized graph; the layout comes as text (`BlockLayout.text`), and the clips as JSON, since an operator takes no
objects. What one would want to know of a failing launch, its shapes and layout, is noted on the error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial

import torch
from torch import Tensor

from qpkv_kernels import append as append_kernel
from qpkv_kernels import decode as decode_kernel
from qpkv_kernels import tuning
from qpkv_kernels.block import BlockLayout


@torch.library.custom_op("qpkv::append", mutates_args=("arena", "problems"))
def append(
    key: Tensor, value: Tensor, arena: Tensor, places: Tensor, prompt: Tensor, appended: Tensor, problems: Tensor,
    layout: str, layer: int, start: int, limit: float, clips: str, offset: int,
) -> None:  # fmt: skip
    """`append.append` to the block that begins at byte `start` of every row of the arena, uint8 [B, extent]; its
    bits are row `layer` of problems, int32 [layers, 2]."""
    with _noted("append", key, layout):
        append_kernel.append(
            key, value, arena[:, start:], BlockLayout.of_text(layout), places, prompt, appended, problems[layer], limit,
            _clips(clips), offset,
        )  # fmt: skip


@torch.library.custom_op("qpkv::attend", mutates_args=())
def attend(
    query: Tensor, arena: Tensor, places: Tensor, prompt: Tensor, appended: Tensor, layout: str, start: int,
    scaling: float, softcap: float | None, offset: int,
) -> Tensor:  # fmt: skip
    """`decode.attend` to the block that begins at byte `start` of every row of the arena -> [B, H, D]."""
    with _noted("attend", query, layout):
        query, known = query.contiguous(), BlockLayout.of_text(layout)
        call = partial(
            decode_kernel.attend, query, arena[:, start:], known, places, prompt, appended, scaling, softcap, offset
        )
        gqa = query.shape[1] // known.num_heads
        launch = tuning.choose(
            known, len(query), gqa, query.dtype, query.device,
            lambda launch: tuning.milliseconds(partial(call, launch=launch), query.device),
        )  # fmt: skip
        return call(launch=launch)


@attend.register_fake
def _(
    query: Tensor, arena: Tensor, places: Tensor, prompt: Tensor, appended: Tensor, layout: str, start: int,
    scaling: float, softcap: float | None, offset: int,
) -> Tensor:  # fmt: skip
    return torch.empty_like(query, memory_format=torch.contiguous_format)


@lru_cache(maxsize=16)
def _clips(text: str) -> dict[int, tuple[float, ...]]:
    return {int(bits): tuple(clips) for bits, clips in json.loads(text).items()}


@contextmanager
def _noted(name: str, x: Tensor, layout: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(f"in qpkv::{name} of {list(x.shape)} {x.dtype} on {x.device}, block layout {layout}")
        raise
