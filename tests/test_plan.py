"""The plan file: it reads as it was written, its schema is the shipped one, and what is wrong is told in one line.

After a change to `qpkv_runtime/plan.py` write the shipped schema anew:

    python -c 'import json, qpkv_runtime.plan as p; print(json.dumps(p.json_schema(), indent=2))' \
        > qpkv_runtime/plan.schema.json
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from conftest import FAMILIES, make_model, random_plan

from qpkv_planner.allocation import Choice, Space
from qpkv_runtime import methods, quantizers, scorers
from qpkv_runtime.errors import PlanError
from qpkv_runtime.ledger import make_ledger
from qpkv_runtime.models import KNOWN_MODELS
from qpkv_runtime.plan import Calibration, Decode, Layer, Model, Plan, Scorer, Tier, json_schema, load_plan, parse_plan

SHIPPED_SCHEMA = Path(methods.__file__).with_name("plan.schema.json")

INTERVAL = {"mean": 0.5, "low": 0.25, "high": 1e-05}
COMPARISON = {"full": INTERVAL, "plan": INTERVAL, "best_uniform": INTERVAL}
CALIBRATION = Calibration.model_validate(
    {
        "objective": "kl",
        "seed": 0,
        "context_tokens": 96,
        "hashes": {"search": "sha256:00"},
        "samples": {"search": {"contexts": 2, "left_out": 0.25}},
        "cross_entropy": COMPARISON,
        "kl": COMPARISON,
        "improvement_on_best_uniform": INTERVAL,
        "by_kind": {"number": {"plan": {"kl": 0.5}}},
        "winner": "knapsack",
        "lambda_nats_per_mib": 0.125,
        "beta": None,
        "best_uniform": "rotated-k4v3",
        "versions": {"torch": "2.13.0"},
        "search": {"rounds": [{"predicted": -0.5, "measured": [1, 2.5, None, "über"]}]},
    }
)


@cache
def plan_of(family: str, seed: int) -> Plan:
    return random_plan(make_model(family), seed)


def with_layers(plan: Plan, layers: tuple[Layer, ...]) -> Plan:
    """The same plan with other layers, its bytes weighed anew and its limit as high as they need."""
    changed = plan.model_copy(update={"layers": layers})
    planned = make_ledger(changed).stored_bytes
    budget = plan.budget.model_copy(update={"planned_bytes": planned, "limit_bytes": planned})
    return Plan(**{**dict(changed), "budget": budget})


def tiered() -> Plan:
    """A plan with three tiers in every layer."""
    plan = plan_of("llama", 0)
    top, *others = plan.formats
    tiers = tuple(Tier(tokens=tokens, format=name) for tokens, name in ((8, top), (5, others[0]), (40, top)))
    return with_layers(plan, (Layer(tiers=tiers),) * plan.model.num_layers)


def calibrated() -> Plan:
    return Plan(**{**dict(plan_of("qwen3", 1)), "calibrated": True, "calibration": CALIBRATION})


PLANS: dict[str, Callable[[], Plan]] = {
    **{f"{family}-{seed}": partial(plan_of, family, seed) for family in FAMILIES for seed in range(4)},
    "tiered": tiered,
    "calibrated": calibrated,
}


@pytest.fixture(params=PLANS)
def plan(request: pytest.FixtureRequest) -> Plan:
    return PLANS[request.param]()


# --- writing and reading back --------------------------------------------------------------------------------------


def test_a_plan_reads_as_it_was_written(plan: Plan, tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(plan.to_yaml(), encoding="utf-8")
    read = load_plan(file)
    assert read == plan
    assert read.to_yaml() == plan.to_yaml()
    assert read.policy_hash == plan.policy_hash


def test_a_layer_is_one_line_of_the_file(plan: Plan) -> None:
    lines = [line for line in plan.to_yaml().splitlines() if line.startswith("- {tiers: ")]
    assert len(lines) == plan.model.num_layers


def test_a_policys_hash_changes_with_the_policy_and_not_with_what_was_measured() -> None:
    plain, measured = plan_of("qwen3", 1), calibrated()
    assert measured.policy_hash == plain.policy_hash
    assert plain.model_copy(update={"sinks": plain.sinks + 1}).policy_hash != plain.policy_hash


# --- the schema ----------------------------------------------------------------------------------------------------


def test_the_shipped_schema_is_the_current_one() -> None:
    assert json.loads(SHIPPED_SCHEMA.read_text(encoding="utf-8")) == json_schema(), "see this file's docstring"


def test_the_schema_accepts_what_we_write(plan: Plan) -> None:
    jsonschema.validate(yaml.safe_load(plan.to_yaml()), json_schema())


@pytest.mark.parametrize("tier", [[8], [8, "16bit", 1], {"tokens": 8, "format": "16bit"}, ["8", "16bit"], [0, "16bit"]])
def test_the_schema_knows_a_tier_as_a_pair(tier: object) -> None:
    data = yaml.safe_load(plan_of("llama", 0).to_yaml())
    data["layers"][0]["tiers"][0] = tier
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data, json_schema())


def test_the_schema_knows_the_methods_by_name() -> None:
    definitions = json_schema()["$defs"]
    assert definitions["Scorer"]["properties"]["name"]["enum"] == list(methods.SCORERS)
    assert definitions["TensorFormat"]["properties"]["quantizer"]["enum"] == list(methods.QUANTIZERS)


def test_every_method_that_a_plan_can_name_is_implemented() -> None:
    assert methods.SCORERS.keys() == scorers.SCORERS.keys()
    assert methods.QUANTIZERS.keys() == quantizers.KEY_QUANTIZERS.keys() == quantizers.VALUE_QUANTIZERS.keys()


# --- what is refused -----------------------------------------------------------------------------------------------

TINY = KNOWN_MODELS["tiny"].shape
SPACE = Space(
    model=Model(
        id="tiny",
        model_type=TINY.model_type,
        num_layers=TINY.num_layers,
        num_query_heads=TINY.num_query_heads,
        num_kv_heads=TINY.num_kv_heads,
        head_size=TINY.head_size,
        max_context_tokens=TINY.max_context_tokens,
        dtype="float32",
        storage_dtype="float16",
    ),
    requested="1/8",
    context_tokens=1024,
    scorer=Scorer(name="snapkv"),
    sinks=4,
    window=16,
    decode=Decode(reserve_tokens=32, format="rotated-k4v4"),
)
BASE = SPACE.plan([Choice(96, "rotated-k4v2")] * TINY.num_layers)  # changed in one place by each case below
KIVI = {"keys": {"quantizer": "kivi", "bits": 4}, "values": {"quantizer": "kivi", "bits": 4}}
DELETE = "<left out>"  # not a value that any case sets

CASES: list[tuple[str, object, str]] = [
    ("surprise", 1, "surprise: unknown key"),
    ("model.surprise", 1, "model.surprise: unknown key"),
    ("layers.2.surprise", 1, "layers.2.surprise: unknown key"),
    ("scorer.surprise", 1, "scorer.surprise is not a parameter of snapkv, which has: queries, kernel, lead, pooling"),
    ("budget", DELETE, "budget: missing"),
    ("budget.requested", DELETE, "budget.requested: missing"),
    ("scorer.name", DELETE, "scorer.name: missing"),
    ("version", DELETE, "version must be 1, got null; make the plan anew with qpkv-plan"),
    ("version", 2, "version must be 1, got 2; make the plan anew with qpkv-plan"),
    ("version", True, "version must be 1, got True; make the plan anew with qpkv-plan"),
    ("version", [1], "version must be 1, got a list; make the plan anew with qpkv-plan"),
    ("model.id", 5, "model.id must be text, got 5"),
    ("model.dtype", "float64", "model.dtype must be 'float32', 'float16' or 'bfloat16', got 'float64'"),
    ("model.num_kv_heads", 3, "model: num_query_heads must be a multiple of num_kv_heads, got 8 and 3"),
    ("model.head_size", 33, "model: head_size must be even, got 33"),
    ("model.sliding_windows", [8], "model: sliding_windows must have 8 entries, got 1"),
    ("model.sliding_windows", [8, 0] + [None] * 6, "model.sliding_windows.1 must be at least 1, got 0"),
    ("model.num_layers", 9, "layers must have model.num_layers = 9 entries, got 8"),
    ("sinks", "2", "sinks must be a whole number, got '2'"),
    ("sinks", True, "sinks must be a whole number, got True"),
    ("sinks", -1, "sinks must be at least 0, got -1"),
    ("window", 10**6, "layers.0 keeps 96 tokens, fewer than sinks + window = 1000004"),
    ("calibrated", "yes", "calibrated must be true or false, got 'yes'"),
    ("calibrated", True, "calibrated must be true exactly when there is a calibration section"),
    ("calibration", {}, "calibration.objective: missing (and 14 more)"),
    ("calibration", 5, "calibration must be a mapping, got 5"),
    ("scorer", "snapkv", "scorer must be a mapping, got 'snapkv'"),
    ("scorer.name", "best", f"scorer.name must be one of {', '.join(methods.SCORERS)}, got 'best'"),
    ("scorer.name", ["snapkv"], "scorer.name must be text, got a list"),
    ("layers", 5, "layers must be a list, got 5"),
    ("layers.1", 5, "layers.1 must be a mapping, got 5"),
    ("layers.1.tiers", [], "layers.1.tiers must not be empty"),
    ("layers.1.tiers.0", 5, "layers.1.tiers.0: a tier is [tokens, format], got 5"),
    ("layers.1.tiers.0", [8], "layers.1.tiers.0: a tier is [tokens, format], got [8]"),
    ("layers.1.tiers.0.0", 0, "layers.1.tiers.0.tokens must be at least 1, got 0"),
    ("layers.1.tiers.0.0", 10**400, "layers.1.tiers.0.tokens must be at most 16777216, got 1000"),
    ("decode.reserve_tokens", 10**400, "decode.reserve_tokens must be at most 16777216, got 1000"),
    ("model.head_size", 1000000006, "model.head_size must be at most 4096, got 1000000006"),
    ("model.num_layers", 10**9, "model.num_layers must be at most 1024, got 1000000000"),
    ("model.num_query_heads", 10**6, "model.num_query_heads must be at most 1024, got 1000000"),
    ("scorer.kernel", 10**12, "scorer.kernel must be at most 1024, got 1000000000000"),
    ("layers.1.tiers.0.0", 8.5, "layers.1.tiers.0.tokens must be a whole number, got 8.5"),
    ("layers.1.tiers.0.1", 4, "layers.1.tiers.0.format must be text, got 4"),
    ("layers.1.tiers.0.1", "best", "layers.1.tiers must name one of formats (rotated-k4v2, rotated-k4v4), got 'best'"),
    ("decode.format", "best", "decode.format must name one of formats (rotated-k4v2, rotated-k4v4), got 'best'"),
    ("decode.then", "wrap", "decode.then must be 'evict' or 'stop', got 'wrap'"),
    ("decode.reserve_tokens", 0, "decode.reserve_tokens must be at least 1, got 0"),
    ("heads", "best", "heads: share must be one of uniform, adaptive, weighted, got 'best'"),
    ("heads", 5, "heads must be a mapping, got 5"),
    ("heads", {}, "heads.share: missing"),
    ("layers.1", {"heads": "adaptive", "tiers": [[2**20 + 8, "rotated-k4v2"]]},
     "layers.1.tiers: adaptive heads divide at most 4194304 tokens of a tier, all heads together, got 4194336"),
    ("heads", {"share": "adaptive", "alpha": 1.5}, "heads.alpha must be at most 1.0, got 1.5"),
    ("heads", {"share": "uniform", "alpha": 0.5}, "heads: uniform heads take no alpha, got 0.5"),
    ("heads", {"share": "adaptive", "weights": [1.0, 2.0]}, "heads: adaptive heads take no weights"),
    ("heads", "weighted", "heads: weighted heads need weights, one per KV head"),
    ("heads", {"share": "weighted", "weights": [0.0, 0.0]}, "heads: weights must not all be zero"),
    ("heads", {"share": "weighted", "weights": [-1.0, 0.0]}, "heads.weights.0 must be at least 0.0, got -1.0"),
    ("layers.1.heads", {"share": "weighted", "weights": [1.0]}, "layers.1.heads.weights must have model.num_kv"),
    ("formats", [], "formats must be a mapping, got a list"),
    ("formats.rotated-k4v4", KIVI, "decode.format must be a per-token format, got 'rotated-k4v4' whose groups"),
    ("formats.rotated-k4v2.keys.bits", 5, "formats.rotated-k4v2.keys.bits must be 16, 8, 4, 3, 2 or 1, got 5"),
    ("formats.rotated-k4v2.keys.quantizer", "best", "formats.rotated-k4v2.keys: quantizer must be one of 16bit"),
    ("formats.rotated-k4v2.keys.group", 64, "formats.rotated-k4v2.keys: rotated takes no group, got 64"),
    ("formats.rotated-k4v2.keys.outliers", 0.1, "formats.rotated-k4v2.keys: rotated keeps no outliers apart, got 0.1; "
     "flexgen, kivi, kvquant can"),
    ("formats.rotated-k4v2.values", {"quantizer": "kivi", "bits": 2, "threshold": 6.0},
     "formats.rotated-k4v2.values: threshold = 6.0 needs outliers"),
    ("formats.rotated-k4v2.values", {"quantizer": "kivi", "bits": 2, "outliers": 0.7},
     "formats.rotated-k4v2.values.outliers must be at most 0.5, got 0.7"),
    ("formats.rotated-k4v2.values", {"quantizer": "flexgen", "bits": 2, "group": 48},
     "formats.rotated-k4v2.values.group must divide the head size 64, got 48: take 64, 32, 16, 8"),
    ("formats.rotated-k4v4.values", {"quantizer": "kivi", "bits": 4, "outliers": 0.01},
     "decode.format must be a per-token format, got 'rotated-k4v4' whose groups or outliers cross tokens"),
    ("formats.rotated-k4v2.keys.quantizer", {}, "formats.rotated-k4v2.keys.quantizer must be text, got a mapping"),
    ("budget.full_bytes", 17, f"budget.full_bytes must be {BASE.budget.full_bytes} by the ledger, got 17"),
    ("budget.planned_bytes", 17, f"budget.planned_bytes must be {BASE.budget.planned_bytes} by the ledger, got 17"),
    ("budget.planned_bytes", float("nan"), "budget.planned_bytes must be a whole number, got nan"),
    ("budget.limit_bytes", 17, f"budget.planned_bytes = {BASE.budget.planned_bytes} is over budget.limit_bytes = 17"),
]  # fmt: skip


def changed(path: str, value: object) -> str:
    """The base plan's YAML with the value at `path` replaced or deleted."""
    data = yaml.safe_load(BASE.to_yaml())
    place: Any = data
    *folders, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for folder in folders:
        place = place[folder]
    if value is DELETE:
        del place[last]
    else:
        place[last] = value
    return yaml.safe_dump(data)


def refusal(read: Callable[[], Plan]) -> str:
    """The error's text, after checking that it is one line."""
    with pytest.raises(PlanError) as caught:
        read()
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(("path", "value", "line"), CASES, ids=[f"{path}={value!r}" for path, value, _ in CASES])
def test_what_breaks_a_rule_is_named_by_its_path(path: str, value: object, line: str) -> None:
    text = refusal(lambda: parse_plan(changed(path, value), "my.yaml"))
    assert text.startswith(f"my.yaml: {line}"), text


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "a plan is a YAML mapping, got null"),
        ("- 1", "a plan is a YAML mapping, got a list"),
        ("just words", "a plan is a YAML mapping, got 'just words'"),
        ("version: 1\nversion: 1", "a key may be given once, got 'version' again on line 2"),
        ("model:\n  id: a\n  id: b", "a key may be given once, got 'id' again on line 3"),
        ("[a]: 1", "a key must be text, got sequence on line 1"),
        ("version: 1\nmodel: [", "not readable as YAML: expected the node content, but found '<stream end>' on line 2"),
        ("version: \x00", "not readable as YAML: unacceptable character #x0000"),
        ("a: " + "[" * 5000, "not readable as YAML: nested too deeply"),
        ("a: !!python/object/apply:os.getcwd []", "not readable as YAML: could not determine a constructor"),
        ("sinks: 2020-13-45", "not readable as YAML: '2020-13-45' is no timestamp on line 1"),
        ("version: 1\nsinks: " + "9" * 5000, "not readable as YAML: '999"),
        ("sinks: !!int abc", "not readable as YAML: 'abc' is no int on line 1"),
        ("sinks: !!float x", "not readable as YAML: 'x' is no float on line 1"),
        ("sinks: !!bool maybe", "not readable as YAML: 'maybe' is no bool on line 1"),
        ("sinks: !!timestamp x", "not readable as YAML: 'x' is no timestamp on line 1"),
        ("sinks: !!map x", "not readable as YAML: expected a mapping node, but found scalar on line 1"),
        (BASE.to_yaml() * 2, "a key may be given once, got 'version' again on line "),
    ],
    ids=lambda value: value[:24],
)
def test_what_is_no_plan_is_refused(text: str, line: str) -> None:
    assert refusal(lambda: parse_plan(text, "my.yaml")).startswith(f"my.yaml: {line}")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    missing, binary = tmp_path / "missing.yaml", tmp_path / "binary.yaml"
    binary.write_bytes(b"\x7fELF\xff\xfe\x00")
    assert refusal(lambda: load_plan(missing)) == f"{missing}: cannot be read as a plan: No such file or directory"
    assert refusal(lambda: load_plan(tmp_path)) == f"{tmp_path}: cannot be read as a plan: Is a directory"
    assert refusal(lambda: load_plan(binary)) == f"{binary}: cannot be read as a plan: it is not UTF-8 text"
