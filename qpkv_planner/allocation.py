"""Allocations: how many tokens each layer keeps, in which format, and making them weigh exactly the budget.

An allocation is one `Choice` per layer. `Space` knows what every choice weighs (it asks the ledger) and projects any
wish onto the budget: the result fits, and no layer could take one more storage quantum. Presets (uniform, pyramidkv)
are ways to make a wish. Integers only; nothing here has seen data.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

from pydantic import ValidationError

from qpkv_runtime.budget import limit_bytes
from qpkv_runtime.errors import BudgetError, InputError
from qpkv_runtime.heads import normalized
from qpkv_runtime.ledger import Holdings, align, full_bytes, layer_bytes, quantum_tokens
from qpkv_runtime.methods import SHARINGS
from qpkv_runtime.models.shape import ModelShape
from qpkv_runtime.plan import (
    MOST_DIVIDED_TOKENS,
    MOST_TOKENS,
    UNIFORM,
    Budget,
    Calibration,
    Decode,
    Format,
    Heads,
    Layer,
    Model,
    Plan,
    Scorer,
    TensorFormat,
    Tier,
)

DEFAULT_RESERVE_TOKENS = 64
SEARCHED = "searched"  # how heads may share a layer's tokens, besides the plan's rules: each its own count, as found
HEADS = (SEARCHED, *SHARINGS)
DEFAULT_CONTEXT_TOKENS = 2048  # what a ratio refers to, where neither the user nor a shorter model says otherwise


@dataclass(frozen=True)
class Choice:
    """What one layer keeps: `tokens` per head in the format of this name (`format_named`).

    above: tiers of more important tokens before them, (tokens, format) each, which no projection changes: a precision
    ladder, with two tiers and nothing evicted MiKV.
    """

    tokens: int
    format: str
    above: tuple[tuple[int, str], ...] = ()

    @property
    def tiers(self) -> tuple[tuple[int, str], ...]:
        """All tiers, most important first."""
        return (*self.above, (self.tokens, self.format))

    @property
    def key(self) -> list[Any]:
        """As a journal names it."""
        mine = [self.tokens, self.format]
        return [*self.above, mine] if self.above else mine


Allocation = tuple[Choice, ...]


def format_name(quantizer: str, key_bits: int, value_bits: int) -> str:
    """rotated, 4, 2 -> "rotated-k4v2"; 16 bits on both sides -> "16bit"."""
    return "16bit" if key_bits == value_bits == 16 else f"{quantizer}-k{key_bits}v{value_bits}"


@lru_cache(maxsize=1024)
def format_named(name: str) -> Format:
    """The format of a name that `format_name` makes, with groups (`g32`) and a share of outliers (`o0.01`) where they
    are not the quantizer's own. Raises InputError for another."""
    if name == "16bit":
        return Format(keys=TensorFormat(quantizer="16bit", bits=16), values=TensorFormat(quantizer="16bit", bits=16))
    match = re.fullmatch(r"([a-z_]+)-k(\d+)(?:g(\d+))?v(\d+)(?:g(\d+))?(?:o(0\.\d+))?", name)
    if match is None:
        raise InputError(f"a format is 16bit or like rotated-k4v2 or kivi-k4g32v2g32o0.01, got {name!r}")
    keys, values = (
        {"quantizer": match[1], "bits": int(bits), "group": group and int(group), "outliers": share and float(share)}
        if int(bits) < 16
        else {"quantizer": "16bit", "bits": 16}
        for bits, group, share in ((match[2], match[3], match[6]), (match[4], match[5], match[6]))
    )
    try:
        return Format(keys=TensorFormat.model_validate(keys), values=TensorFormat.model_validate(values))
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise InputError(f"no such format as {name!r}: {message}") from None


@dataclass(frozen=True)
class Space:
    """Everything about a plan but its allocation.

    requested: the budget as asked; context_tokens: what a ratio refers to; decode: the reserve, part of the budget;
    heads: how a layer's heads share its tokens, of all layers alike or of each.
    """

    model: Model
    requested: str
    context_tokens: int
    scorer: Scorer
    sinks: int
    window: int
    decode: Decode
    heads: Heads | tuple[Heads, ...] = UNIFORM
    _bytes: dict[tuple[int, Choice], int] = field(default_factory=dict, init=False, compare=False, repr=False)

    @classmethod
    def of_plan(cls, plan: Plan) -> Space:
        """The space a plan was chosen from."""
        budget = plan.budget
        own = tuple(plan.heads_of(layer) for layer in range(plan.model.num_layers))
        return cls(
            plan.model, budget.requested, budget.context_tokens, plan.scorer, plan.sinks, plan.window, plan.decode,
            own[0] if len(set(own)) == 1 else own,
        )  # fmt: skip

    def at_length(self, tokens: int) -> Space:
        """The space whose plans take the same share of a context of `tokens` tokens."""
        if tokens == self.context_tokens:
            return self
        num_bytes = full_bytes(self.shape, tokens) * self.limit_bytes // self.full_bytes
        return replace(self, requested=f"{num_bytes}B", context_tokens=tokens)

    def heads_of(self, layer: int) -> Heads:
        """How the layer's heads share its tokens."""
        return self.heads if isinstance(self.heads, Heads) else self.heads[layer]

    @cached_property
    def shape(self) -> ModelShape:
        return self.model.shape

    @cached_property
    def full_bytes(self) -> int:
        return full_bytes(self.shape, self.context_tokens)

    @cached_property
    def limit_bytes(self) -> int:
        return limit_bytes(self.requested, self.full_bytes)

    def layer_bytes(self, layer: int, choice: Choice) -> int:
        """What a layer weighs under a choice, its reserve included."""
        key = (layer, choice)
        if key not in self._bytes:
            shape, heads, held = self.shape, self.heads_of(layer), self._held(layer, choice)
            reserve = (format_named(self.decode.format), self.decode.reserve_tokens)
            is_sliding = shape.sliding_windows[layer] is not None
            self._bytes[key] = layer_bytes(
                (*held, reserve), shape.num_kv_heads, shape.head_size, is_sliding, heads.share == "adaptive"
            )
        return self._bytes[key]

    def tokens_of_heads(self, layer: int, choice: Choice) -> tuple[int, ...]:
        """How many tokens each head keeps in the last tier; as many each where it is the prompt that divides them."""
        _, tokens = self._held(layer, choice)[-1]
        return (tokens,) * self.shape.num_kv_heads if isinstance(tokens, int) else tuple(tokens)

    def _held(self, layer: int, choice: Choice) -> Holdings:
        return self.heads_of(layer).share_out(
            tuple((format_named(format), tokens) for tokens, format in choice.tiers),
            self.shape.num_kv_heads,
            self.sinks + self.window,
            self.most_tokens(layer),
        )

    def bytes(self, allocation: Sequence[Choice]) -> int:
        return sum(self.layer_bytes(layer, choice) for layer, choice in enumerate(allocation))

    def most_tokens(self, layer: int) -> int:
        """A layer never keeps more than the context, or than its sliding window, or than a plan can say."""
        share = self.heads_of(layer).share
        writable = MOST_DIVIDED_TOKENS // self.shape.num_kv_heads if share == "adaptive" else MOST_TOKENS
        return min(self.context_tokens, self.shape.sliding_windows[layer] or self.context_tokens, writable)

    def least_tokens(self, layer: int, format: str) -> int:
        """Sinks and window, rounded up to the storage quantum: the rest of it is free."""
        forced = align(self.sinks + self.window, quantum_tokens(format_named(format)))
        return max(self.sinks + self.window, min(forced, self._full_tokens(layer, format)))

    def _full_tokens(self, layer: int, format: str) -> int:
        """`most_tokens`, in whole quanta where heads divide them."""
        most, is_divided = self.most_tokens(layer), self.heads_of(layer).share != "uniform"
        return align(most, quantum_tokens(format_named(format))) if is_divided else most

    def legal_tokens(self, layer: int, tokens: float, format: str) -> int:
        """The largest legal count not above `tokens` (or the least there is)."""
        quantum = quantum_tokens(format_named(format))
        most = self._full_tokens(layer, format)
        if tokens >= most:
            return max(most, self.least_tokens(layer, format))
        return max(int(tokens) // quantum * quantum, self.least_tokens(layer, format))

    def one_more(self, layer: int, choice: Choice) -> Choice | None:
        """The choice with one more storage quantum, or None where the layer holds all it can."""
        quantum = quantum_tokens(format_named(choice.format))
        most = self._full_tokens(layer, choice.format) - sum(tokens for tokens, _ in choice.above)
        more = min(choice.tokens + quantum, most)
        return replace(choice, tokens=more) if more > choice.tokens else None

    def scaled(self, allocation: Sequence[Choice], factor: float) -> Allocation:
        """Every layer's last tier with about `factor` times the tokens, whatever that weighs."""
        return tuple(
            replace(choice, tokens=self.legal_tokens(layer, factor * choice.tokens, choice.format))
            for layer, choice in enumerate(allocation)
        )

    def least_bytes(self, formats: Sequence[str]) -> int:
        """The smallest plan in any of these formats."""
        return min(
            self.bytes([Choice(self.least_tokens(layer, f), f) for layer in range(self.shape.num_layers)])
            for f in formats
        )

    def check_holds(self, formats: Sequence[str]) -> None:
        """Raise BudgetError, naming the smallest possible, unless some plan in these formats fits."""
        least = self.least_bytes(formats)
        if least > self.limit_bytes:
            share = (
                f" (1/{self.full_bytes // least} of {self.context_tokens} tokens)" if least <= self.full_bytes else ""
            )
            raise BudgetError(
                f"a budget must hold sinks + window ({self.sinks} + {self.window} tokens per layer) and the reserve "
                f"({self.decode.reserve_tokens} tokens): at least {least}B{share}, "
                f"got {self.requested} = {self.limit_bytes}B"
            )

    def fill(self, allocation: Sequence[Choice]) -> Allocation:
        """Spend what is left: a quantum at a time, layers in turn, most tokens first, until none can take one more."""
        choices, spent = list(allocation), self.bytes(allocation)
        order = sorted(range(len(choices)), key=lambda layer: (-choices[layer].tokens, layer))
        open_layers = list(order)
        while open_layers:
            still_open = []
            for layer in open_layers:
                more = self.one_more(layer, choices[layer])
                if more is None:
                    continue
                cost = self.layer_bytes(layer, more) - self.layer_bytes(layer, choices[layer])
                if spent + cost <= self.limit_bytes:
                    choices[layer], spent = more, spent + cost
                    still_open.append(layer)
            open_layers = still_open
        return tuple(choices)

    def project(self, weights: Sequence[float], formats: Sequence[str], floor: float = 0) -> Allocation | None:
        """The allocation with floor + c * weights[l] tokens in each layer, c the largest that fits, then filled.

        None where even the least of these formats does not fit.
        """

        def at(scale: float) -> list[Choice]:
            wish = zip(weights, formats, strict=True)
            return [Choice(self.legal_tokens(i, floor + scale * weight, f), f) for i, (weight, f) in enumerate(wish)]

        if self.bytes(at(0.0)) > self.limit_bytes:
            if floor:
                return self.project(weights, formats)
            return None
        low, high = 0.0, self.context_tokens / max(min((w for w in weights if w > 0), default=1.0), 1e-9)
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.bytes(at(middle)) <= self.limit_bytes else (low, middle)
        return self.fill(at(low))

    def divided(self, tokens: Sequence[Sequence[float]], formats: Sequence[str]) -> tuple[Space, Allocation] | None:
        """Heads with their own counts, about tokens[layer][head], on the exact budget: the space in which they share by
        such weights, and the allocation. None where even the least of these formats does not fit."""
        forced = self.sinks + self.window
        beyond = [[max(0.0, of_head - forced) for of_head in of_layer] for of_layer in tokens]
        heads = [
            UNIFORM if len(set(weights)) == 1 else Heads(share="weighted", alpha=0.0, weights=normalized(weights))
            for weights in beyond
        ]
        space = replace(self, heads=tuple(heads))
        means = [sum(of_layer) / len(of_layer) for of_layer in tokens]
        wishes = zip(means, formats, strict=True)
        wish = [Choice(space.legal_tokens(layer, mean, f), f) for layer, (mean, f) in enumerate(wishes)]
        if space.bytes(wish) <= space.limit_bytes:
            return space, space.fill(wish)
        allocation = space.project(means, formats)
        return None if allocation is None else (space, allocation)

    def key(self, allocation: Sequence[Choice]) -> dict[str, Any]:
        """What an evaluation of this allocation depends on, the samples and the model apart."""
        return {
            "scorer": self.scorer.model_dump(),
            "kept": [self.sinks, self.window],
            "heads": [self.heads_of(layer).model_dump() for layer in range(len(allocation))]
            if isinstance(self.heads, tuple)
            else self.heads.model_dump(),
            "decode": [self.decode.format, self.decode.reserve_tokens],
            "layers": [choice.key for choice in allocation],
        }

    @classmethod
    def of_key(cls, key: Mapping[str, Any], model: Model, context_tokens: int) -> tuple[Space, Allocation]:
        """The space and the allocation that `key` is of, but for the budget: what they weigh is the limit."""
        allocation = []
        for layer in key["layers"]:
            *above, (tokens, format) = layer if isinstance(layer[0], (list, tuple)) else [layer]
            allocation.append(Choice(tokens, format, tuple((tokens, format) for tokens, format in above)))
        heads, (sinks, window), (format, reserve_tokens) = key["heads"], key["kept"], key["decode"]
        space = cls(
            model, "1B", context_tokens, Scorer.model_validate(key["scorer"]), sinks, window,
            Decode(reserve_tokens=reserve_tokens, format=format),
            tuple(map(Heads.model_validate, heads)) if isinstance(heads, list) else Heads.model_validate(heads),
        )  # fmt: skip
        return replace(space, requested=f"{space.bytes(allocation)}B"), tuple(allocation)

    def plan(self, allocation: Sequence[Choice], calibration: Calibration | None = None) -> Plan:
        """The plan of an allocation."""
        names = dict.fromkeys([*(name for choice in allocation for _, name in choice.tiers), self.decode.format])
        return Plan(
            version=1,
            model=self.model,
            budget=Budget(
                requested=self.requested,
                context_tokens=self.context_tokens,
                full_bytes=self.full_bytes,
                limit_bytes=self.limit_bytes,
                planned_bytes=self.bytes(allocation),
            ),
            calibrated=calibration is not None,
            scorer=self.scorer,
            sinks=self.sinks,
            window=self.window,
            formats={name: format_named(name) for name in names},
            heads=self.heads if isinstance(self.heads, Heads) else UNIFORM,
            layers=tuple(
                Layer(
                    tiers=tuple(Tier(tokens=tokens, format=format) for tokens, format in choice.tiers),
                    heads=None if isinstance(self.heads, Heads) else self.heads[layer],
                )
                for layer, choice in enumerate(allocation)
            ),
            decode=self.decode,
            calibration=calibration,
        )

    def probe(self, allocation: Sequence[Choice]) -> Plan:
        """The plan of an allocation that need not fit, for measuring: its budget is what it weighs."""
        return replace(self, requested=f"{self.bytes(allocation)}B").plan(allocation)


def allocation_of(plan: Plan) -> Allocation:
    """The allocation of a plan."""
    tiers = [[(tier.tokens, tier.format) for tier in layer.tiers] for layer in plan.layers]
    return tuple(Choice(*layer[-1], tuple(layer[:-1])) for layer in tiers)


def model_section(name: str, shape: ModelShape, dtype: str, storage_dtype: str, **rest: str | None) -> Model:
    """A plan's `model` section; rest: its revision and hashes, where they are known."""
    values = {**asdict(shape), "sliding_windows": shape.sliding_windows if any(shape.sliding_windows) else None}
    return Model.model_validate({"id": name, "dtype": dtype, "storage_dtype": storage_dtype, **values, **rest})


def default_reserve(shape: ModelShape, limit: int, format: str, wanted_tokens: int = DEFAULT_RESERVE_TOKENS) -> int:
    """Tokens of reserve: `wanted_tokens`, or what a quarter of the budget holds where that is less; at least one
    storage quantum."""
    quantum, written = quantum_tokens(format_named(format)), format_named(format)

    def weighs(tokens: int) -> int:
        def block(layer: int, count: int) -> int:
            is_sliding = shape.sliding_windows[layer] is not None
            return layer_bytes(((written, count),), shape.num_kv_heads, shape.head_size, is_sliding)

        return sum(block(layer, tokens) - block(layer, 0) for layer in range(shape.num_layers))

    tokens = align(wanted_tokens, quantum)
    while tokens > quantum and weighs(tokens) > limit / 4:
        tokens -= quantum
    return tokens


# --- presets: ways to fill in the layers ---------------------------------------------------------------------------


def uniform(space: Space, format: str) -> Allocation | None:
    """Every layer the same count and format (to a quantum: what is left over goes to the first layers)."""
    num_layers = space.shape.num_layers
    return space.project([1.0] * num_layers, [format] * num_layers)


def pyramidkv(space: Space, format: str, beta: int = 20) -> Allocation | None:
    """Budgets that fall linearly with depth (arXiv 2406.02069): mean b tokens, last layer b // beta, first layer twice
    the mean less that; flatter where the first layer would hold more than the context. Differs from the paper: lands
    on the exact budget, which its floor division overshoots."""
    even = uniform(space, format)
    if even is None:
        return None
    num_layers = space.shape.num_layers
    mean = sum(choice.tokens for choice in even) / num_layers - space.window
    first = min(2 * mean - mean // beta, space.context_tokens - space.window)
    last, steps = 2 * mean - first, max(1, num_layers - 1)
    weights = [first + (last - first) * layer / steps for layer in range(num_layers)]
    return space.project(weights, [format] * num_layers, floor=space.window)


PRESETS = {"uniform": uniform, "pyramidkv": pyramidkv}
