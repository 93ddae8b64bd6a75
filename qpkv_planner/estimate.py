"""What a search will take, before it begins: contexts, prefills in bytes, evaluations, seconds. Pure arithmetic.

Seconds are rough. A context's prefill is its operations at the speed of a matrix product, which this machine's models
reach about 0.7 of (SmolLM2 at 1,024 tokens, float32, one core of an EPYC: 5.3 s of 3.9 at full speed); a step of the
search, a forward of all its samples, takes a tenth of the search split's prefills (there 0.08, tiny 0.14). The bar's
time left is better after the first stages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from qpkv_planner.calibration import CONTINUATION_TOKENS
from qpkv_planner.fit import FLOAT32_BYTES
from qpkv_planner.linearization import FORWARDS
from qpkv_planner.mix import FACT_KINDS
from qpkv_planner.options import Lengths, Options
from qpkv_runtime.ledger import full_bytes
from qpkv_runtime.models.aliases import KnownModel
from qpkv_runtime.models.shape import ModelShape

SHARE_OF_SPEED = 0.7
STEP_SHARE = 1 / 10
AUTO_BUDGETS = 6  # about as many does `--budget auto` try


@dataclass(frozen=True)
class Estimate:
    """contexts, samples, prefill_bytes: by split; lengths: of the contexts; steps: of the searches, a prefill apart."""

    model: KnownModel
    contexts: Mapping[str, int]
    samples: Mapping[str, int]
    lengths: Lengths
    num_scorings: int
    steps: int

    @property
    def prefill_bytes(self) -> dict[str, int]:
        return {
            name: prefills_bytes(self.model, count, self.samples[name], self.lengths.of_split(name), self.num_scorings)
            for name, count in self.contexts.items()
        }

    def seconds(self, operations_per_second: float) -> float:
        shape = self.model.shape

        def operations(split: str) -> float:
            """Of all its prefills."""
            tokens = self.lengths.of_split(split)
            attention = shape.num_layers * shape.num_query_heads * shape.head_size * tokens
            return 2.0 * self.contexts[split] * tokens * (self.model.num_parameters + attention)

        total = sum(map(operations, self.contexts)) + self.steps * STEP_SHARE * operations("search")
        return total / (SHARE_OF_SPEED * operations_per_second)

    @property
    def prefills(self) -> str:
        """For a reader: `24 prefills of 1024 and 24 of 2048 tokens`."""
        counts: dict[int, int] = {}
        for split, count in self.contexts.items():
            tokens = self.lengths.of_split(split)
            counts[tokens] = counts.get(tokens, 0) + count
        (first, count), *others = counts.items()
        return f"{count} prefills of {first}" + "".join(f" and {n} of {tokens}" for tokens, n in others) + " tokens"

    def record(self, operations_per_second: float, places: Mapping[str, str]) -> dict[str, Any]:
        """For a reader. places: where each split's prefills will be."""
        return {
            "calibration_tokens": self.lengths.calibration,
            "search_tokens": self.lengths.search,
            "steps": self.steps,
            "seconds_about": round(self.seconds(operations_per_second)),
            "prefills": {
                name: {"contexts": count, "samples": self.samples[name], "bytes": self.prefill_bytes[name],
                       "place": places[name]}
                for name, count in self.contexts.items()
            },
        }  # fmt: skip


def estimate(
    known: KnownModel, options: Options, lengths: Lengths, num_budgets: int, samples: Mapping[str, int] | None = None
) -> Estimate:
    """What a search takes. samples: of each split, where they are made; else as many as the mix gives."""
    effort = options.effort(known.shape)
    contexts = {"search": effort.search_contexts, "validation": effort.validation_contexts}
    in_context = 1 + sum(count for kind, count in options.data.mix_of(lengths.calibration) if kind in FACT_KINDS)
    return Estimate(
        model=known,
        contexts=contexts,
        samples=samples or {name: count * in_context for name, count in contexts.items()},
        lengths=lengths,
        num_scorings=len(effort.scorers) + 1,
        steps=estimated_steps(options, lengths, known.shape, num_budgets) - sum(contexts.values()),
    )


def estimated_steps(options: Options, lengths: Lengths, shape: ModelShape, num_budgets: int) -> int:
    """Steps of progress: forwards of all samples; a context's prefill counts as one."""
    effort = options.effort(shape)
    contexts = effort.search_contexts + effort.validation_contexts
    elimination = 5 * math.log2(effort.times_budget) * (1 + FORWARDS // effort.num_parts)
    elimination += effort.roomy_rounds * (1 + FORWARDS)
    grid = (len(effort.formats) + 9) * (1 if lengths.search == lengths.calibration else 2)
    one_budget = grid + elimination + effort.rounds * (1 + FORWARDS) + effort.trials + 12
    return int(contexts + num_budgets * (one_budget + effort.additivity_plans))


def prefills_bytes(
    model: KnownModel, num_contexts: int, num_samples: int, context_tokens: int, num_scorings: int
) -> int:
    """What a split's prefills take: keys and values of all its tokens at 16 bit, the place and the importance of every
    token of every sample under each scoring, and the full cache's probabilities twice (logarithms too)."""
    shape = replace(model.shape, sliding_windows=(None,) * model.shape.num_layers)  # prefills keep what slides out too
    rankings = 2 * FLOAT32_BYTES * shape.num_layers * shape.num_kv_heads * context_tokens * num_samples * num_scorings
    probabilities = 2 * FLOAT32_BYTES * num_samples * CONTINUATION_TOKENS * model.vocab_size
    return full_bytes(shape, num_contexts * context_tokens) + rankings + probabilities


def duration(seconds: float) -> str:
    """For a reader: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
