"""The methods at a glance: scorers, head sharings, presets and quantizers, as facts that need no torch.

A plan names methods and the ledger weighs them; both work from this table alone, so reading a plan costs no
torch import. The arithmetic lives in `scorers.py` and `quantizers.py` under the same names, and a test holds
the two in step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from qpkv_runtime.errors import PlanError

Need = Literal[
    "positions",
    "keys",
    "values",
    "last_query",
    "window_queries",
    "all_queries",
    "rotary_embedding",
    "output_projection",
]
Axis = Literal["token", "channel", "strided"]
ParameterValue = int | float | str | bool


@dataclass(frozen=True)
class Parameter:
    """A setting of a method: its default, and either the values it may take or its least and largest value."""

    default: ParameterValue
    choices: tuple[ParameterValue, ...] = ()
    minimum: int | float | None = None
    maximum: int | float | None = None

    def check(self, where: str, value: object) -> None:
        """Raise PlanError unless `value` is of the default's type and allowed."""
        wanted = type(self.default)
        if type(value) is not wanted and not (wanted is float and type(value) is int):
            raise PlanError(f"{where} must be of type {wanted.__name__}, got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise PlanError(f"{where} must be a finite number, got {value!r}")
        if self.choices and value not in self.choices:
            raise PlanError(f"{where} must be one of {', '.join(map(str, self.choices))}, got {value!r}")
        if self.minimum is not None and isinstance(value, (int, float)) and value < self.minimum:
            raise PlanError(f"{where} must be at least {self.minimum}, got {value!r}")
        if self.maximum is not None and isinstance(value, (int, float)) and value > self.maximum:
            raise PlanError(f"{where} must be at most {self.maximum}, got {value!r}")


@dataclass(frozen=True)
class ScorerFacts:
    """What a token scorer is and what it must be shown. Higher score is kept; token zero is the oldest.

    needs: beside the positions, which are free. A scorer is given what stands here and nothing else; none needs hidden
    states or an extra pass over the prompt.
    """

    paper: str
    needs: tuple[Need, ...]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)


@dataclass(frozen=True)
class QuantizerFacts:
    """How a quantizer lays out a tensor [S, D] of one head.

    bits: the widths it can write. key_axis / value_axis: what one group of values that share a scale runs along
    ("token": `group` channels of one token; "channel": `group` consecutive kept tokens of one channel; "strided": every
    n-th value of all heads of a layer). numbers_per_group: 16-bit numbers stored for a group (2: scale and zero, of a
    code read as code * scale + zero; 1: scale, of one read as (code + 1/2 - 2**(bits - 1)) * scale).
    head_vectors: 16-bit vectors of D numbers stored once per layer and head for the keys (means, balancers).
    group: values per scale when a plan does not say; None: the whole axis is one group and a plan may not say.
    outliers: the share of values kept apart when a plan does not say; None: none, and a plan may not ask for any.
    """

    paper: str
    bits: tuple[int, ...]
    key_axis: Axis = "token"
    value_axis: Axis = "token"
    numbers_per_group: int = 0
    head_vectors: int = 0
    group: int | None = None
    outliers: float | None = None


_WINDOW_ATTENTION = {
    "queries": Parameter(0, minimum=0, maximum=2**20),  # the last that are looked at; 0: as many as the window keeps
    "kernel": Parameter(7, minimum=1, maximum=1024),
    "lead": Parameter(0, minimum=0, maximum=1024),  # tokens by which pooling reaches further back and less far ahead
    "pooling": Parameter("max", choices=("max", "average")),
}

SCORERS: dict[str, ScorerFacts] = {
    "streamingllm": ScorerFacts("arXiv 2309.17453", ("positions",)),
    "h2o": ScorerFacts("arXiv 2306.14048", ("keys", "all_queries")),
    "snapkv": ScorerFacts("arXiv 2404.14469", ("keys", "window_queries"), _WINDOW_ATTENTION),
    "knorm": ScorerFacts("arXiv 2406.11430", ("keys",)),
    "tova": ScorerFacts("arXiv 2401.06104", ("keys", "last_query")),
    "keydiff": ScorerFacts("arXiv 2504.15364", ("keys",)),
    "criticalkv": ScorerFacts(
        "arXiv 2502.03805",
        ("keys", "values", "window_queries", "output_projection"),
        {
            **_WINDOW_ATTENTION,
            "epsilon": Parameter(1e-4, minimum=0.0),
            "first_stage": Parameter(0.5, minimum=0.0, maximum=1.0),
        },
    ),
    "expected_attention": ScorerFacts(
        "arXiv 2510.00636",
        ("keys", "values", "all_queries", "rotary_embedding"),
        {"future_tokens": Parameter(512, minimum=1, maximum=2**16), "epsilon": Parameter(0.0, minimum=0.0)},
    ),
    "random": ScorerFacts("control", ("positions",), {"seed": Parameter(0, minimum=0)}),
}


@dataclass(frozen=True)
class SharingFacts:
    """How a layer's kept tokens are divided among its KV heads; combines with every scorer and quantizer.

    needs: what divides: nothing, the prompt's scores, or a weight per head in the plan. alpha: the share of its even
    part (what it keeps anyway apart) that a head has at least, or None.
    """

    paper: str
    rule: str
    needs: Literal["nothing", "scores", "weights"] = "nothing"
    alpha: float | None = None


SHARINGS: dict[str, SharingFacts] = {
    "uniform": SharingFacts("", "every head the same number of tokens"),
    "adaptive": SharingFacts(
        "arXiv 2407.11550 (Ada-KV)", "the layer's best tokens over all heads, anew for every prompt", "scores", 0.2
    ),
    "weighted": SharingFacts("arXiv 2410.19258 (HeadKV)", "in proportion to measured weights", "weights", 0.2),
}


@dataclass(frozen=True)
class PresetFacts:
    """A way to fill in the layers of a plan by arithmetic (`qpkv_planner.allocation` has it under the same name)."""

    paper: str
    rule: str
    parameters: Mapping[str, Parameter] = field(default_factory=dict)


PRESETS: dict[str, PresetFacts] = {
    "uniform": PresetFacts("", "every layer the same number of tokens"),
    "pyramidkv": PresetFacts(
        "arXiv 2406.02069", "falls linearly from the first layer to the last", {"beta": Parameter(20, minimum=1)}
    ),
}

LOW_BITS = (8, 4, 3, 2, 1)
QUANTIZERS: dict[str, QuantizerFacts] = {
    "16bit": QuantizerFacts("the model's own 16-bit type", (16,)),
    "flexgen": QuantizerFacts("arXiv 2303.06865", LOW_BITS, numbers_per_group=2, group=64, outliers=0.0),
    "kivi": QuantizerFacts("arXiv 2402.02750", LOW_BITS, "channel", numbers_per_group=2, group=64, outliers=0.0),
    "kvquant": QuantizerFacts("arXiv 2401.18079", LOW_BITS, "channel", numbers_per_group=2, outliers=0.01),
    "hqq": QuantizerFacts("mobiusml.github.io/hqq_blog", LOW_BITS, "channel", numbers_per_group=2, group=64),
    "paper_hqq": QuantizerFacts(
        "arXiv 2412.12706 (its code)", LOW_BITS, value_axis="strided", numbers_per_group=2, group=64
    ),
    "mikv": QuantizerFacts("arXiv 2402.18096", LOW_BITS, numbers_per_group=2, head_vectors=1, group=64),
    "rotated": QuantizerFacts(
        "arXiv 2404.00456 (Hadamard), 2402.18096 (balance)", LOW_BITS, numbers_per_group=1, head_vectors=2
    ),
}


SMALLEST_DEFAULT_GROUP = 16


def group_size(quantizer: str, axis: Axis, group: int | None, num_tokens: int, head_size: int) -> int:
    """How many values share a scale in a tensor [num_tokens, head_size] where a plan says `group`, or says nothing.

    Without a word from the plan, groups along channels are equal: the largest divisor of the head size that is not
    above the quantizer's group, or the whole token where that would be very small.
    """
    whole = num_tokens if axis == "channel" else head_size
    wanted = group or QUANTIZERS[quantizer].group or whole
    if axis == "token" and group is None:
        fitting = max(size for size in range(1, min(wanted, head_size) + 1) if head_size % size == 0)
        wanted = fitting if fitting >= SMALLEST_DEFAULT_GROUP else head_size
    return wanted if axis == "strided" else max(1, min(wanted, whole))


def scorer_parameters(name: str, given: Mapping[str, object]) -> dict[str, ParameterValue]:
    """The full parameters of scorer `name`: what is `given`, checked, and the defaults. Raises PlanError."""
    if name not in SCORERS:
        raise PlanError(f"scorer.name must be one of {', '.join(SCORERS)}, got {name!r}")
    known = SCORERS[name].parameters
    for key, value in given.items():
        if key not in known:
            raise PlanError(f"scorer.{key} is not a parameter of {name}, which has: {', '.join(known) or 'none'}")
        known[key].check(f"scorer.{key}", value)
    return {key: given.get(key, parameter.default) for key, parameter in known.items()}  # type: ignore[misc]
