"""From a device's memory to a budget: what weights and work leave for the cache of each of a batch of sequences.

    memory = weights + working set + spare + caches * KV per sequence

Of a batch each prompt is prefilled in a cache of its own and copied into the batch's, the next one's then in its place
(`PlannedCache.stacked`): there is one cache more than sequences. The working set is the prefill of one prompt, the
largest of its moments, and one decode step of the whole batch. It is measured where the model is loaded
(`machine.py`), else computed from the model's sizes. Pure arithmetic.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from qpkv_runtime.budget import limit_bytes
from qpkv_runtime.errors import BudgetError, InputError
from qpkv_runtime.ledger import NUMBER_BYTES
from qpkv_runtime.models.aliases import KnownModel

SPARE_SHARE = Fraction(1, 10)  # of the memory, for the driver's context and the allocator's fragments; not measured
FLOAT32_BYTES = 4
NO_CACHE_BYTES = 2**60  # what a ratio would refer to: a device's memory is written in bytes


@dataclass(frozen=True)
class Fit:
    """How a device's memory is divided. working_set: whether the prefill was "measured" or "computed"."""

    memory_bytes: int
    batch: int
    context_tokens: int
    weights_bytes: int
    prefill_bytes: int
    decode_bytes: int
    working_set: str

    @property
    def spare_bytes(self) -> int:
        return int(self.memory_bytes * SPARE_SHARE)

    @property
    def num_caches(self) -> int:
        return self.batch + 1 if self.batch > 1 else 1

    @property
    def sequence_bytes(self) -> int:
        """What is left for the cache of one sequence."""
        taken = self.weights_bytes + self.prefill_bytes + self.decode_bytes + self.spare_bytes
        return (self.memory_bytes - taken) // self.num_caches

    @property
    def budget(self) -> str:
        """The budget of one sequence as `limit_bytes` reads it. Raises BudgetError, naming what to lower."""
        if self.sequence_bytes > 0:
            return f"{self.sequence_bytes}B"
        parts = {
            "weights": (self.weights_bytes, "choose a smaller model, or float16 or bfloat16 where it is float32"),
            "prefill": (self.prefill_bytes, "lower --context-length"),
            "decode": (self.decode_bytes, "lower --batch"),
        }
        _, advice = max(parts.values(), key=lambda part: part[0])
        named = " + ".join(f"{readable(taken)} of {name}" for name, (taken, _) in parts.items())
        raise BudgetError(
            f"--fit {readable(self.memory_bytes)} must hold more than {named} + {readable(self.spare_bytes)} spare, "
            f"which leave nothing for the cache of {self.batch} sequences of {self.context_tokens} tokens: {advice}, "
            "or give it more memory"
        )

    def record(self) -> dict[str, Any]:
        """For a reader, in bytes."""
        return {
            "memory_bytes": self.memory_bytes,
            "weights_bytes": self.weights_bytes,
            "working_set": self.working_set,
            "prefill_bytes": self.prefill_bytes,
            "decode_bytes": self.decode_bytes,
            "spare_bytes": self.spare_bytes,
            "cache_bytes": self.sequence_bytes * self.num_caches,
            "batch": self.batch,
            "caches": self.num_caches,
            "cache_bytes_per_sequence": self.sequence_bytes,
        }

    def line(self) -> str:
        """In one sentence."""
        return (
            f"{readable(self.memory_bytes)} less {readable(self.weights_bytes)} of weights, "
            f"{readable(self.prefill_bytes)} of prefill ({self.working_set}), {readable(self.decode_bytes)} of decode "
            f"and {readable(self.spare_bytes)} spare leave {readable(self.sequence_bytes * self.num_caches)} of cache: "
            f"{self.sequence_bytes:,} bytes for each of {self.batch} sequences"
            + (" and the prompt that is being prefilled" if self.batch > 1 else "")
        )


def readable(num_bytes: int) -> str:
    """`2.5 GiB`, `640 MiB`, `12 KiB`."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes / 2**10:.3g} KiB"


def memory_bytes(text: str, option: str) -> int:
    """`24GiB` -> bytes. Raises InputError for what is not a size."""
    if not re.fullmatch(r"\s*\d+(\.\d+)?\s*[KMG]?i?B\s*", text, re.IGNORECASE):
        raise InputError(f"{option} is a size such as 24GiB or 512MiB, got {text!r}")
    return limit_bytes(text, NO_CACHE_BYTES)


def weights_bytes(num_parameters: int, dtype: str) -> int:
    """dtype: float32, or any other for 16 bit."""
    return num_parameters * (FLOAT32_BYTES if dtype == "float32" else NUMBER_BYTES)


def prefill_bytes(model: KnownModel, num_tokens: int, dtype: str) -> int:
    """The largest moment of one prompt's prefill beside the weights.

    In numbers a token. MLP: four of the hidden size (what goes into layer, MLP and norm, and what comes out) and three
    of the intermediate size (gate, up, their product). Attention: those four, queries, keys and values, the rotated
    copies of queries and keys, and the three pieces of one that make it. Norm: float32, of which three are alive.
    Logits of the last token apart. Whichever of the three is largest; two copies of the layer's keys and values at 16
    bit, while it is compressed, are never that. Measured on small models (`machine.measured_prefill_bytes`, float32 and
    bfloat16, on a CPU, whose attention has workspace of its own) the peak is 0.8 to 1.2 times this.
    """
    shape, hidden = model.shape, model.hidden_size
    number = weights_bytes(1, dtype)
    query, key = shape.num_query_heads * shape.head_size, shape.num_kv_heads * shape.head_size
    mlp = (4 * hidden + 3 * model.intermediate_size) * number
    attention = (4 * hidden + 5 * query + 3 * key) * number
    norm = hidden * (number + 3 * FLOAT32_BYTES)
    return num_tokens * max(mlp, attention, norm) + model.vocab_size * (number + FLOAT32_BYTES)


def fit(
    model: KnownModel, memory: int, batch: int, context_tokens: int, dtype: str, measured_prefill: int | None = None
) -> Fit:
    """The division of `memory` bytes. dtype: float32, else 16 bit; measured_prefill: bytes, where it was measured."""
    return Fit(
        memory, batch, context_tokens, weights_bytes(model.num_parameters, dtype),
        prefill_bytes(model, context_tokens, dtype) if measured_prefill is None else measured_prefill,
        decode_bytes(model, batch, dtype), "computed" if measured_prefill is None else "measured",
    )  # fmt: skip


def decode_bytes(model: KnownModel, batch: int, dtype: str) -> int:
    """One decode step of the batch by the kernels, which read the packed cache as it is: a token's prefill, and its
    logits in float32."""
    return batch * prefill_bytes(model, 1, dtype)
