"""The plan: the single contract between the planner and the runtime, one YAML file.

It says everything the runtime needs and nothing it must guess: for which model, which tokens each layer keeps, in
which formats, how decoding goes on, and what was measured. Values are frozen and checked when built; reading
refuses unknown and duplicate keys; the same plan always writes the same bytes.

A layer keeps its most important tokens in tiers: the first `tokens` of the importance order in the first tier's
format, the next in the second's, the rest evicted. Sinks and the window lead that order, so they fill the top tier.
Tokens are counted per KV head; heads may share them unevenly (`heads`), a layer's total stays.
A shorter prompt fills the tiers from the top and leaves the rest empty; a longer one keeps the same counts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from qpkv_runtime.errors import LedgerError, PlanError
from qpkv_runtime.heads import divide, least_tokens
from qpkv_runtime.ledger import Holdings, full_bytes, make_ledger, quantum_tokens
from qpkv_runtime.methods import QUANTIZERS, SCORERS, SHARINGS, Axis, ParameterValue, group_size, scorer_parameters
from qpkv_runtime.models.shape import ModelShape

SCHEMA_VERSION = 1
# More would stall the ledger or overflow the runtime's numbers.
MOST_LAYERS = MOST_HEADS = 1024
MOST_CHANNELS = 4096
MOST_TOKENS = 2**24  # that a head holds
MOST_DIVIDED_TOKENS = 2**22  # that adaptive heads share
MOST_CONTEXT_TOKENS = 2**31 - 1
MOST_BYTES = 2**63 - 1
_LEDGER_RULE = "bytes_of_the_ledger"  # pydantic's name for the one mistake that has an error class of its own


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class TensorFormat(_Value):
    """How one side (keys or values) of a kept token is written.

    group: values that share a scale. outliers: the share of each head's values that is kept apart, in 16 bit with
    their places; its bytes are taken whether or not they are used. threshold: only those larger than it are kept apart.
    """

    quantizer: str = Field(json_schema_extra={"enum": list(QUANTIZERS)})
    bits: Literal[16, 8, 4, 3, 2, 1]
    group: int | None = Field(default=None, ge=1, le=MOST_TOKENS)
    outliers: float | None = Field(default=None, gt=0, le=0.5)
    threshold: float | None = Field(default=None, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _fill_outliers(cls, given: Any) -> Any:
        """The quantizer's own share where the plan names none."""
        if isinstance(given, dict) and given.get("outliers") is None and isinstance(given.get("quantizer"), str):
            facts = QUANTIZERS.get(given["quantizer"])
            if facts is not None and facts.outliers:
                return {**given, "outliers": facts.outliers}
        return given

    @model_validator(mode="after")
    def _check(self) -> Self:
        facts = QUANTIZERS.get(self.quantizer)
        if facts is None:
            raise ValueError(f"quantizer must be one of {', '.join(QUANTIZERS)}, got {self.quantizer!r}")
        if self.bits not in facts.bits:
            raise ValueError(f"{self.quantizer} writes {', '.join(map(str, facts.bits))} bits, got {self.bits}")
        if facts.group is None and self.group is not None:
            raise ValueError(f"{self.quantizer} takes no group, got {self.group}")
        if facts.outliers is None and self.outliers is not None:
            able = ", ".join(name for name, facts in QUANTIZERS.items() if facts.outliers is not None)
            raise ValueError(f"{self.quantizer} keeps no outliers apart, got {self.outliers}; {able} can")
        if self.threshold is not None and self.outliers is None:
            raise ValueError(
                f"threshold = {self.threshold} needs outliers, the largest share of the values that may be above it"
            )
        return self

    def with_group(self, axis: Axis, head_size: int) -> TensorFormat:
        """The same, saying its group for this head size. Raises ValueError where its group does not divide it."""
        facts = QUANTIZERS[self.quantizer]
        if facts.group is None:
            return self
        if self.group is None:
            group = facts.group if axis == "channel" else group_size(self.quantizer, axis, None, 0, head_size)
            return self.model_copy(update={"group": group})
        if axis == "token" and head_size % self.group:
            divisors = [size for size in range(head_size, 7, -1) if head_size % size == 0]
            raise ValueError(
                f"group must divide the head size {head_size}, got {self.group}: "
                f"take {', '.join(map(str, divisors)) or head_size}"
            )
        return self


class Format(_Value):
    """How a kept token is written."""

    keys: TensorFormat
    values: TensorFormat

    @property
    def appends(self) -> bool:
        """Whether decode can append to it: no group may cross tokens, and no share of the outliers either."""
        return (
            QUANTIZERS[self.keys.quantizer].key_axis == "token"
            and QUANTIZERS[self.values.quantizer].value_axis == "token"
            and self.keys.outliers is None
            and self.values.outliers is None
        )

    def with_groups(self, head_size: int) -> Format:
        """The same, both sides saying their groups for this head size (`TensorFormat.with_group`)."""
        sides = {}
        for side, axis in (
            ("keys", QUANTIZERS[self.keys.quantizer].key_axis),
            ("values", QUANTIZERS[self.values.quantizer].value_axis),
        ):
            try:
                sides[side] = getattr(self, side).with_group(axis, head_size)
            except ValueError as error:
                raise ValueError(f"{side}.{error}") from None
        return Format(**sides)


class Model(_Value):
    """The model a plan is for. Hashes are of what was loaded; null where a plan was made without weights.

    storage_dtype: what "16 bit" means: the model's own 16-bit type; float16 (bfloat16 where float16 would overflow)
    for a model that runs in float32. sliding_windows: per layer, null where attention is global; null when all are.
    """

    id: str
    revision: str | None = None
    model_type: str
    num_layers: int = Field(ge=1, le=MOST_LAYERS)
    num_query_heads: int = Field(ge=1, le=MOST_HEADS)
    num_kv_heads: int = Field(ge=1, le=MOST_HEADS)
    head_size: int = Field(ge=2, le=MOST_CHANNELS)
    max_context_tokens: int = Field(ge=1, le=MOST_CONTEXT_TOKENS)
    sliding_windows: tuple[Annotated[int, Field(ge=1, le=MOST_CONTEXT_TOKENS)] | None, ...] | None = None
    dtype: Literal["float32", "float16", "bfloat16"]
    storage_dtype: Literal["float16", "bfloat16"]
    config_hash: str | None = None
    tokenizer_hash: str | None = None
    weights_hash: str | None = None

    @field_validator("sliding_windows", mode="before")
    @classmethod
    def _tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_query_heads % self.num_kv_heads:
            raise ValueError(
                "num_query_heads must be a multiple of num_kv_heads, "
                f"got {self.num_query_heads} and {self.num_kv_heads}"
            )
        if self.head_size % 2:
            raise ValueError(f"head_size must be even, got {self.head_size}")
        if self.sliding_windows is not None and len(self.sliding_windows) != self.num_layers:
            raise ValueError(f"sliding_windows must have {self.num_layers} entries, got {len(self.sliding_windows)}")
        return self

    @property
    def shape(self) -> ModelShape:
        return ModelShape(
            model_type=self.model_type,
            num_layers=self.num_layers,
            num_query_heads=self.num_query_heads,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            max_context_tokens=self.max_context_tokens,
            sliding_windows=self.sliding_windows or (None,) * self.num_layers,
        )


class Budget(_Value):
    """Bytes per sequence. full_bytes: 16 bit, all KV heads, all of context_tokens; limit_bytes: what was asked for
    of it; planned_bytes: what the plan's arena takes, by the ledger."""

    requested: str
    context_tokens: int = Field(ge=1, le=MOST_CONTEXT_TOKENS)
    full_bytes: int = Field(ge=1, le=MOST_BYTES)
    limit_bytes: int = Field(ge=1, le=MOST_BYTES)
    planned_bytes: int = Field(ge=1, le=MOST_BYTES)


class Scorer(_Value):
    """The token scorer; its parameters stand beside its name (`qpkv_runtime.methods` lists them)."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)
    name: str = Field(json_schema_extra={"enum": list(SCORERS)})

    @model_validator(mode="before")
    @classmethod
    def _check(cls, given: Any) -> Any:
        if not isinstance(given, dict) or not isinstance(given.get("name"), str):
            return given
        rest = {key: value for key, value in given.items() if key != "name"}
        try:
            return {"name": given["name"], **scorer_parameters(given["name"], rest)}
        except PlanError as error:
            raise ValueError(str(error)) from None

    @property
    def parameters(self) -> dict[str, ParameterValue]:
        return dict(self.model_extra or {})


def _as_pair(schema: dict[str, Any]) -> None:
    """Turn the schema of a value with two fields into that of the list it is in YAML."""
    title, text, fields = schema["title"], schema["description"], list(schema["properties"].values())
    schema.clear()
    schema.update(title=title, description=text, type="array", prefixItems=fields, items=False, minItems=2)


class Tier(_Value):
    """A run of the importance order: this many tokens per head, written in this format. In YAML: `[104, k4v2]`."""

    model_config = ConfigDict(json_schema_extra=_as_pair)

    tokens: int = Field(ge=1, le=MOST_TOKENS)
    format: str

    @model_validator(mode="before")
    @classmethod
    def _from_pair(cls, given: Any) -> Any:
        if isinstance(given, (dict, Tier)):
            return given
        if not isinstance(given, (list, tuple)) or len(given) != 2:
            raise ValueError(f"a tier is [tokens, format], got {given!r}")
        return {"tokens": given[0], "format": given[1]}


def _as_name_or_mapping(schema: dict[str, Any]) -> None:
    """Let a sharing without settings be written as its name alone."""
    mapping = dict(schema)
    schema.clear()
    names = [name for name, facts in SHARINGS.items() if facts.needs != "weights"]
    schema.update(title=mapping["title"], anyOf=[{"enum": names}, mapping])


class Heads(_Value):
    """How a layer's KV heads share its tokens (`qpkv_runtime.methods` lists the rules). In YAML a rule without
    settings is its name: `uniform`, `adaptive`.

    alpha: the part of an even share that every head has at least, beside sinks and window. weights: one per KV head.
    """

    model_config = ConfigDict(json_schema_extra=_as_name_or_mapping)

    share: str = Field(json_schema_extra={"enum": list(SHARINGS)})
    alpha: float | None = Field(default=None, ge=0, le=1)
    weights: tuple[Annotated[float, Field(ge=0)], ...] | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, given: Any) -> Any:
        if isinstance(given, str):
            given = {"share": given}
        if not isinstance(given, dict):
            return given
        if isinstance(given.get("weights"), list):
            given = {**given, "weights": tuple(given["weights"])}
        facts = SHARINGS.get(given["share"]) if isinstance(given.get("share"), str) else None
        return {**given, "alpha": facts.alpha} if facts is not None and given.get("alpha") is None else given

    @model_validator(mode="after")
    def _check(self) -> Self:
        facts = SHARINGS.get(self.share)
        if facts is None:
            raise ValueError(f"share must be one of {', '.join(SHARINGS)}, got {self.share!r}")
        if facts.alpha is None and self.alpha is not None:
            raise ValueError(f"{self.share} heads take no alpha, got {self.alpha}")
        needs_weights = facts.needs == "weights"
        if needs_weights != (self.weights is not None):
            rule = "need weights, one per KV head" if needs_weights else "take no weights"
            raise ValueError(f"{self.share} heads {rule}")
        if self.weights is not None and not any(self.weights):
            raise ValueError("weights must not all be zero")
        return self

    @model_serializer
    def _write(self) -> Any:
        given: dict[str, Any] = {"share": self.share, "alpha": self.alpha}
        if self.weights is not None:
            given["weights"] = list(self.weights)
        return self.share if self.share == "uniform" else given

    def share_out(self, tiers: Sequence[tuple[Format, int]], num_heads: int, forced: int, most_tokens: int) -> Holdings:
        """The tiers' tokens as far as the plan knows them: of every head, or of each where they differ by weight.

        forced: sinks and window; most_tokens: what a head may hold, where the tiers' tokens are not more.
        """
        if self.weights is None:
            return tuple(tiers)
        total = sum(tokens for _, tokens in tiers)
        quanta = tuple((tokens, quantum_tokens(format)) for format, tokens in tiers)
        least = least_tokens(total, forced, self.alpha or 0.0)
        divided = divide(quanta, self.weights, least, max(most_tokens, total))
        return tuple((format, each) for (format, _), each in zip(tiers, divided, strict=True))


UNIFORM = Heads(share="uniform")


class Layer(_Value):
    """One layer's tiers, most important tokens first, and how its heads share them where not as the plan's do."""

    tiers: tuple[Tier, ...] = Field(min_length=1)
    heads: Heads | None = None

    @field_validator("tiers", mode="before")
    @classmethod
    def _tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_serializer(mode="wrap")
    def _write(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = handler(self)
        if self.heads is None:
            del written["heads"]
        return written

    @property
    def tokens(self) -> int:
        return sum(tier.tokens for tier in self.tiers)


class Decode(_Value):
    """What happens to generated tokens. They are written to a reserve inside the arena; when it is full, `evict`
    overwrites the oldest appended token and `stop` ends with an error."""

    reserve_tokens: int = Field(ge=1, le=MOST_TOKENS)
    format: str
    then: Literal["evict", "stop"] = "evict"


class Interval(_Value):
    """A mean with its 95 % bootstrap interval over contexts."""

    mean: float
    low: float
    high: float

    @property
    def text(self) -> str:
        """`0.123 (0.100 to 0.150)`."""
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"


class Comparison(_Value):
    """One loss in nats on the validation split, for the full cache, the plan and the best uniform setting."""

    full: Interval
    plan: Interval
    best_uniform: Interval


class Calibration(_Value):
    """What was measured, on the validation split unless it says otherwise, and how the plan was found.

    context_tokens: the calibration contexts' length as it was asked for. lambda_: nats that one more MiB would save at
    the plan (yaml key `lambda_nats_per_mib`), beta: its inverse.
    data: where the samples came from (`qpkv_planner.calibration.Data`); measured_on: the split of the measurements;
    stopped: why the search ended early; loss_to_full: the cross-entropy minus the full cache's; worst_tenth: mean
    cross-entropy of the worst tenth of the samples. search: the stages' record, for readers and reports; the runtime
    does not look at it.
    """

    objective: Literal["kl", "ce"]
    seed: int
    context_tokens: int
    data: dict[str, Any] = {}
    measured_on: Literal["validation", "search"] = "validation"
    stopped: Literal["interrupted", "timeout"] | None = None
    hashes: dict[str, str]
    samples: dict[str, dict[str, int | float]]
    cross_entropy: Comparison
    kl: Comparison
    improvement_on_best_uniform: Interval
    loss_to_full: Interval | None = None
    worst_tenth: dict[str, float] = {}
    by_kind: dict[str, dict[str, dict[str, float]]]
    winner: str
    lambda_nats_per_mib: float | None
    beta: float | None
    best_uniform: str
    versions: dict[str, str]
    search: dict[str, Any]


class Plan(_Value):
    """A plan. Build one, or read one with `load_plan`; both check all of it, its bytes included."""

    version: Literal[1]
    model: Model
    budget: Budget
    calibrated: bool
    extrapolated: bool = False
    scorer: Scorer
    sinks: int = Field(ge=0, le=MOST_TOKENS)
    window: int = Field(ge=1, le=MOST_TOKENS)
    heads: Heads = UNIFORM
    formats: dict[str, Format]
    layers: tuple[Layer, ...]
    decode: Decode
    calibration: Calibration | None = None

    @field_validator("layers", mode="before")
    @classmethod
    def _tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.layers) != self.model.num_layers:
            raise ValueError(
                f"layers must have model.num_layers = {self.model.num_layers} entries, got {len(self.layers)}"
            )
        names = [(f"layers.{i}.tiers", t.format) for i, layer in enumerate(self.layers) for t in layer.tiers]
        for where, name in [*names, ("decode.format", self.decode.format)]:
            if name not in self.formats:
                raise ValueError(f"{where} must name one of formats ({', '.join(self.formats)}), got {name!r}")
        self._say_groups()
        if not self.formats[self.decode.format].appends:
            raise ValueError(
                f"decode.format must be a per-token format, got {self.decode.format!r} whose groups "
                "or outliers cross tokens"
            )
        forced = self.sinks + self.window
        for i, layer in enumerate(self.layers):
            if layer.tokens < forced:
                raise ValueError(f"layers.{i} keeps {layer.tokens} tokens, fewer than sinks + window = {forced}")
        self._check_heads()
        if self.calibrated != (self.calibration is not None):
            raise ValueError("calibrated must be true exactly when there is a calibration section")
        self._check_bytes()
        return self

    def _say_groups(self) -> None:
        """A plan in memory, and so in its file, always says its groups."""
        formats = {}
        for name, format in self.formats.items():
            try:
                formats[name] = format.with_groups(self.model.head_size)
            except ValueError as error:
                raise ValueError(f"formats.{name}.{error}") from None
        object.__setattr__(self, "formats", formats)  # frozen for everyone else

    def _check_bytes(self) -> None:
        budget = self.budget
        full, planned = full_bytes(self.model.shape, budget.context_tokens), make_ledger(self).stored_bytes
        for name, right in (("full_bytes", full), ("planned_bytes", planned)):
            if (recorded := getattr(budget, name)) != right:
                raise PydanticCustomError(
                    _LEDGER_RULE,
                    "budget.{name} must be {right} by the ledger, got {recorded}",
                    {"name": name, "right": right, "recorded": recorded},
                )
        if planned > budget.limit_bytes:
            raise ValueError(f"budget.planned_bytes = {planned} is over budget.limit_bytes = {budget.limit_bytes}")

    def _check_heads(self) -> None:
        for i, layer in enumerate(self.layers):
            heads = self.heads_of(i)
            if heads.weights is not None and len(heads.weights) != self.model.num_kv_heads:
                raise ValueError(
                    f"layers.{i}.heads.weights must have model.num_kv_heads = {self.model.num_kv_heads} entries, "
                    f"got {len(heads.weights)}"
                )
            for tier in layer.tiers:
                values = self.formats[tier.format].values.quantizer
                if heads.share != "uniform" and QUANTIZERS[values].value_axis == "strided":
                    raise ValueError(
                        f"layers.{i}.tiers: {values} groups span the heads of a layer, which must be uniform, "
                        f"got {heads.share} heads"
                    )
                divided = self.model.num_kv_heads * tier.tokens
                if heads.share == "adaptive" and divided > MOST_DIVIDED_TOKENS:
                    raise ValueError(
                        f"layers.{i}.tiers: adaptive heads divide at most {MOST_DIVIDED_TOKENS} tokens of a tier, all "
                        f"heads together, got {divided}"
                    )
                quantum = quantum_tokens(self.formats[tier.format])
                if heads.share != "uniform" and tier.tokens % quantum:
                    raise ValueError(
                        f"layers.{i}.tiers: {heads.share} heads divide tokens in steps of {quantum} in {tier.format}, "
                        f"so a tier's tokens must be a multiple of it, got {tier.tokens}"
                    )

    def heads_of(self, layer: int) -> Heads:
        """How the layer's heads share its tokens."""
        return self.layers[layer].heads or self.heads

    def holdings(self, layer: int) -> Holdings:
        """(format, tokens) of the layer's tiers, then of its reserve: what the ledger weighs."""
        tiers = tuple((self.formats[tier.format], tier.tokens) for tier in self.layers[layer].tiers)
        context_tokens = self.budget.context_tokens
        most_tokens = min(context_tokens, self.model.shape.sliding_windows[layer] or context_tokens)
        heads, forced = self.heads_of(layer), self.sinks + self.window
        return (
            *heads.share_out(tiers, self.model.num_kv_heads, forced, most_tokens),
            (self.formats[self.decode.format], self.decode.reserve_tokens),
        )

    @property
    def policy_hash(self) -> str:
        """Names what the runtime does under this plan: everything but budget and calibration."""
        policy = self.model_dump(mode="json", exclude={"budget", "calibration", "calibrated", "extrapolated"})
        return "sha256:" + hashlib.sha256(json.dumps(policy, sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """The plan's file: the same plan, the same bytes."""
        return _dump(self.model_dump(mode="json", exclude_none=False))


# --- reading -------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, and says where a value is not what it looks like or is tagged."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, AttributeError, TypeError):  # of 2020-13-45, !!bool maybe, !!timestamp x
            kind = node.tag.removeprefix("tag:yaml.org,2002:")
            raise PlanError(
                f"not readable as YAML: {_short(node.value)} is no {kind} on line {node.start_mark.line + 1}"
            ) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        if not isinstance(node, yaml.MappingNode):  # a scalar tagged as one
            return super().construct_mapping(node, deep)
        seen = set()
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise PlanError(f"a key must be text, got {key_node.id} on line {line}")
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise PlanError(f"a key may be given once, got {key!r} again on line {line}")
            seen.add(key)
        return super().construct_mapping(node, deep)


def parse_plan(text: str, source: str = "plan") -> Plan:
    """The plan in a YAML text. Raises PlanError in one line that begins with `source` and names the path."""
    try:
        data = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f" on line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise PlanError(f"{source}: not readable as YAML: {error.problem}{line}") from None
    except yaml.YAMLError as error:
        raise PlanError(f"{source}: not readable as YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise PlanError(f"{source}: not readable as YAML: nested too deeply") from None
    except PlanError as error:
        raise PlanError(f"{source}: {error}") from None
    if not isinstance(data, dict):
        raise PlanError(f"{source}: a plan is a YAML mapping, got {_short(data)}")
    version = data.get("version")
    if version != SCHEMA_VERSION or type(version) is not int:
        raise PlanError(
            f"{source}: version must be {SCHEMA_VERSION}, got {_short(version)}; make the plan anew with qpkv-plan"
        )
    try:
        return Plan.model_validate(data)
    except ValidationError as error:
        is_bytes = {found["type"] for found in error.errors()} == {_LEDGER_RULE}
        raise (LedgerError if is_bytes else PlanError)(f"{source}: {_first_error(error)}") from None


def load_plan(path: str | Path) -> Plan:
    """Read a plan file. Raises PlanError in one line that names the file and the path to what is wrong."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise PlanError(f"{path}: cannot be read as a plan: {error.strerror}") from None
    except UnicodeDecodeError:
        raise PlanError(f"{path}: cannot be read as a plan: it is not UTF-8 text") from None
    return parse_plan(text, str(path))


_RULES = {
    "extra_forbidden": "unknown key",
    "missing": "missing",
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be above {gt}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be {expected}",
    "too_short": "must not be empty",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "string_type": "must be text",
    "bool_type": "must be true or false",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
}


def _first_error(error: ValidationError) -> str:
    """`path: rule` or `path rule, got value` of the first thing that pydantic found, and how many more there are."""
    # A list whose only entry is bad is also called empty: that one says nothing new.
    first, *others = [e for e in error.errors(include_url=False) if not (e["type"] == "too_short" and e["input"])]
    where = ".".join(str(part) for part in first["loc"] if part != "[key]")
    if first["type"] in ("value_error", _LEDGER_RULE):
        message = first["msg"].removeprefix("Value error, ")
    else:
        message = _RULES.get(first["type"], first["msg"]).format_map(first.get("ctx", {}))
        if first["type"] not in ("missing", "extra_forbidden", "too_short"):
            message += f", got {_short(first['input'])}"
    if where and not message.startswith(where):
        message = f"{where} {message}" if message.startswith("must ") else f"{where}: {message}"
    return f"{message} (and {len(others)} more)" if others else message


def _short(value: object) -> str:
    """A value as an error shows it."""
    if isinstance(value, (dict, list, tuple)):
        return f"a {'mapping' if isinstance(value, dict) else 'list'}"
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def json_schema() -> dict[str, Any]:
    """The plan's JSON Schema, shipped as plan.schema.json so that editors complete plans."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Plan.model_json_schema()}


# --- writing -------------------------------------------------------------------------------------------------------


class _Flow(dict[str, Any]):
    """A mapping that is written on one line."""


class _FlowList(list[Any]):
    """A list that is written on one line."""


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(_Flow, lambda d, v: d.represent_mapping("tag:yaml.org,2002:map", v.items(), flow_style=True))
_Dumper.add_representer(_FlowList, lambda d, v: d.represent_sequence("tag:yaml.org,2002:seq", v, flow_style=True))


def _inline(value: Any) -> Any:
    """Mappings and lists of plain values on one line, what holds them in blocks."""
    if isinstance(value, dict):
        is_nested = any(isinstance(item, (dict, list)) for item in value.values())
        return {key: _inline(item) for key, item in value.items()} if is_nested else _Flow(value)
    if isinstance(value, list):
        return [_inline(item) for item in value] if any(isinstance(item, dict) for item in value) else _FlowList(value)
    return value


def _dump(data: dict[str, Any]) -> str:
    blocks = {key: _inline(value) for key, value in data.items()}
    blocks["model"] = data["model"]
    if data["model"]["sliding_windows"] is not None:
        blocks["model"] = {**data["model"], "sliding_windows": _FlowList(data["model"]["sliding_windows"])}
    blocks["budget"] = data["budget"]
    blocks["formats"] = {name: _Flow(_compact(format)) for name, format in data["formats"].items()}
    blocks["layers"] = [
        _Flow(
            tiers=_FlowList(_FlowList([tier["tokens"], tier["format"]]) for tier in layer["tiers"]),
            **({"heads": _inline(layer["heads"])} if "heads" in layer else {}),
        )
        for layer in data["layers"]
    ]
    if data["calibration"] is None:
        del blocks["calibration"]
    return yaml.dump(blocks, Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True)


def _compact(format: dict[str, Any]) -> dict[str, Any]:
    return {side: _Flow({k: v for k, v in written.items() if v is not None}) for side, written in format.items()}
