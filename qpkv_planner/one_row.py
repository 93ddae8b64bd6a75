"""Samples of different lengths one after the other in a single row, over a cache that holds each in a row of its own.

The model's matrix products see no padding; the cache's attention sees the padded batch. A watch can see what every
layer attends with, and change what comes out: how the planner takes gradients without knowing a model's modules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from qpkv_runtime.attention import Handle
from qpkv_runtime.cache import PlannedCache, PlannedLayer


@dataclass(frozen=True)
class Attended:
    """What one layer's attention was given in a forward, padded: query [B, H, T, D], key and value of the same new
    tokens [B, H_kv, T, D]."""

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    softcap: float | None


Watch = Callable[[Attended, Tensor], Tensor]
"""Shown what a layer attends with and its output [B, H, T, D]; returns what the output shall be."""


def one_row(cache: PlannedCache, lengths: Sequence[int], watch: Watch | None = None) -> Cache:
    """`cache` for inputs of these lengths, one for each of its rows, that stand one after the other."""
    longest = max(lengths)
    slots = torch.cat([row * longest + torch.arange(length) for row, length in enumerate(lengths)])
    size = len(lengths), longest
    return Cache(layers=[_OneRow(layer, slots, size, watch) for layer in cast(Any, cache.layers)])


class _OneRow(CacheLayerMixin):
    supports_early_init = False

    def __init__(self, layer: PlannedLayer, slots: Tensor, size: tuple[int, int], watch: Watch | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layer, self.slots, self.size, self.watch = layer, slots, size, watch
        self.is_sliding = layer.is_sliding

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        step = _OneRowStep(self, self.padded(key_states), self.padded(value_states))
        return step, step

    def padded(self, x: Tensor) -> Tensor:
        """[1, H, inputs, D] -> [B, H, longest, D]."""
        out = x.new_zeros(self.size[0] * self.size[1], x.shape[1], x.shape[3])
        out.index_copy_(0, self.slots, x[0].transpose(0, 1))
        batch: Tensor = out.unflatten(0, self.size).transpose(1, 2)
        return batch

    def in_a_row(self, x: Tensor) -> Tensor:
        """[B, H, longest, D] -> [1, H, inputs, D]."""
        row: Tensor = x.transpose(1, 2).flatten(0, 1).index_select(0, self.slots).transpose(0, 1)[None]
        return row

    def get_seq_length(self) -> int:
        return self.layer.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.layer.get_mask_sizes(query_length)

    def get_max_length(self) -> int:
        return -1


class _OneRowStep(Handle):
    def __init__(self, layer: _OneRow, key: Tensor, value: Tensor) -> None:
        self.layer, self.key, self.value = layer, key, value
        self.step, _ = layer.layer.update(key, value)

    def attend(self, query: Tensor, num_padding: list[int] | None, scaling: float, softcap: float | None) -> Tensor:
        query = self.layer.padded(query)
        out: Tensor = self.step.attend(query, None, scaling, softcap)
        if self.layer.watch is not None:
            out = self.layer.watch(Attended(query, self.key, self.value, scaling, softcap), out)
        return self.layer.in_a_row(out)
