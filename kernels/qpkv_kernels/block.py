"""Where a layer's packed block holds what, in integers: what the kernels are told of a plan.

A `BlockLayout` is a value: it travels into custom operators as text, and what is derived from it is made once. The one
table that kernels read beside the block, `places`, lies on its device. No triton here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache, wraps
from typing import Concatenate, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor

from qpkv_kernels.layout import quantum_tokens

HEAD_SIZES = (16, 32, 64, 80, 96, 128, 256)
LEAST_GROUP = 16  # channels that share a scale: the least depth of a matrix product
Scales = Literal["none", "channel", "token", "rotated"]


Rest = ParamSpec("Rest")
Result = TypeVar("Result")


class UnsupportedByKernelsError(Exception):
    """What the kernels do not cover; the text says the rule and what arrived."""


def on_its_device(launch: Callable[Concatenate[Tensor, Rest], Result]) -> Callable[Concatenate[Tensor, Rest], Result]:
    """Launch on the first argument's device: Triton takes the current one, whatever its tensors are on."""

    @wraps(launch)
    def there(x: Tensor, /, *args: Rest.args, **kwargs: Rest.kwargs) -> Result:
        if not x.is_cuda:
            return launch(x, *args, **kwargs)
        with torch.cuda.device(x.device):
            return launch(x, *args, **kwargs)

    return there


@dataclass(frozen=True)
class Side:
    """What a code of a segment's keys or values stands for.

    scales "none": 16 bit as they are. "channel": code * scale + zero, one pair for `group` tokens of a channel, stored
    [D, groups, 2]. "token": the same, one pair for `group` channels of a token, stored [S, groups, 2]. "rotated":
    (code + 1/2 - 2**(bits - 1)) * scale, one scale for a token, of Hadamard-transformed values. vectors: which of the
    head's vectors the keys were written through, before the transform: (b,) for k * b, (mean, b) for (k - mean) * b.
    """

    bits: int
    scales: Scales
    group: int = 0
    vectors: tuple[int, ...] = ()

    @property
    def is_transformed(self) -> bool:
        return bool(self.vectors) or self.scales == "rotated"


@dataclass(frozen=True)
class Segment:
    """One tier, or the reserve, of every head.

    capacity: the most tokens that any head has room for; by_count: heads are divided anew for each prompt, so that
    where the buffers lie follows from how many tokens a head holds.
    """

    keys: Side
    values: Side
    capacity: int
    by_count: bool = False

    @property
    def quantum(self) -> int:
        """The number of tokens by which its room grows."""
        return max(quantum_tokens(self.keys.bits), quantum_tokens(self.values.bits))


SIDES = ("keys", "values")
# Columns of the table `places`: byte offsets from a segment's start (-1 where not stored), and its room in tokens.
PLACES = ("key_codes", "value_codes", "positions", "key_scales", "value_scales", "capacity")


@dataclass(frozen=True)
class BlockLayout:
    """A layer's block: uint8 [B, bytes], which begins with its table, int32 [H_kv, segments, 2]: (byte offset of the
    segment, tokens held). The last segment is the reserve, a ring of `reserve_tokens`.

    Beside it goes `places`, int32 [rows, 6] with columns `PLACES`: row head * segments + segment, or, for a segment
    `by_count`, n rows after the one that this row names in its first column, with n quanta of tokens held. vectors:
    byte offset of the head vectors, [H_kv, num_vectors, D]; window: the sliding window in tokens, None for all; number:
    the stored 16-bit type, "float16" or "bfloat16".

    Raises UnsupportedByKernelsError for a head size or a format that the kernels do not cover.
    """

    segments: tuple[Segment, ...]
    num_heads: int
    head_size: int
    reserve_tokens: int
    vectors: int
    num_vectors: int
    window: int | None
    number: str

    def __post_init__(self) -> None:
        if self.head_size not in HEAD_SIZES:
            known = ", ".join(map(str, HEAD_SIZES))
            raise UnsupportedByKernelsError(f"the kernels take head sizes {known}, got {self.head_size}")
        for side in (side for segment in self.segments for side in (segment.keys, segment.values)):
            if side.scales == "token" and side.group < self.head_size and side.group % LEAST_GROUP:
                raise UnsupportedByKernelsError(
                    f"the kernels take channel groups that are multiples of {LEAST_GROUP}, got {side.group}"
                )
        if len({(s.keys.vectors, s.keys.scales == "rotated") for s in self.segments if s.keys.is_transformed}) > 1:
            raise UnsupportedByKernelsError("the kernels take one transform of the keys in a layer, got several")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float16 if self.number == "float16" else torch.bfloat16

    @property
    def key_transform(self) -> Side | None:
        """A side that says how this layer's transformed keys are transformed; None where none are."""
        return next((s.keys for s in self.segments if s.keys.is_transformed), None)

    @cached_property
    def text(self) -> str:
        """This value as an argument of a custom operator, which takes no objects; `of_text` reads it."""
        return json.dumps(asdict(self))

    @staticmethod
    @lru_cache(maxsize=4096)
    def of_text(text: str) -> BlockLayout:
        written = json.loads(text)
        segments = []
        for segment in written.pop("segments"):
            keys, values = (Side(**{**side, "vectors": tuple(side["vectors"])}) for side in map(segment.pop, SIDES))
            segments.append(Segment(keys, values, **segment))
        return BlockLayout(segments=tuple(segments), **written)

    def place(self, places: Tensor, head: int, index: int, count: int) -> dict[str, int]:
        """Where the buffers of a segment lie that holds `count` tokens of `head`; places: the table, on any device."""
        segment = self.segments[index]
        row = head * len(self.segments) + index
        if segment.by_count:
            row = int(places[row, 0]) - -count // segment.quantum
        return dict(zip(PLACES, places[row].tolist(), strict=True))
