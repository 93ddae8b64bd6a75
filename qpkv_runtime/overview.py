"""A plan, and the methods a plan can name, as people read them and as JSON. No torch.

Every number of bytes is the ledger's; nothing here is worked out twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qpkv_runtime.ledger import layer_ledger, make_ledger
from qpkv_runtime.methods import PRESETS, QUANTIZERS, SCORERS, SHARINGS, Parameter
from qpkv_runtime.models.shape import ModelShape
from qpkv_runtime.plan import Format, Heads, Interval, Plan, TensorFormat

BAR_WIDTH = 24
METHODS_HEAD_SIZE = 64  # for which `methods_overview` weighs the quantizers' metadata


def plan_overview(plan: Plan, file: str) -> dict[str, Any]:
    """Everything `qpkv-show` prints, as JSON values: the plan's policy, bytes per layer, and what was measured."""
    ledger = make_ledger(plan)
    data = plan.model_dump(mode="json", exclude={"version", "formats", "calibration"})
    data["budget"]["share_of_full"] = plan.budget.planned_bytes / plan.budget.full_bytes
    data["layers"] = [
        {
            "layer": i,
            "tokens": layer.tokens,
            "heads": plan.heads_of(i).model_dump(mode="json"),
            "tiers": [
                {"tokens": tier.tokens, "format": tier.format, **plan.formats[tier.format].model_dump(mode="json")}
                for tier in layer.tiers
            ],
            "bytes": block.stored_bytes,
            "share": block.stored_bytes / ledger.stored_bytes,
        }
        for i, (layer, block) in enumerate(zip(plan.layers, ledger.layers, strict=True))
    ]
    data["total"] = {"tokens": sum(layer.tokens for layer in plan.layers), "bytes": ledger.stored_bytes}
    measured = plan.calibration
    data["calibration"] = None if measured is None else measured.model_dump(mode="json", exclude={"search"})
    return {"file": file, "policy_hash": plan.policy_hash, **data}


def plan_text(plan: Plan, file: str) -> str:
    """The plan in lines: what it is for and does, a table of its layers, and what was measured."""
    model, budget, decode = plan.model, plan.budget, plan.decode
    planned = f"{budget.planned_bytes:,} ({100 * budget.planned_bytes / budget.full_bytes:.2f} %)"
    parameters = ", ".join(f"{name} {value}" for name, value in plan.scorer.parameters.items())
    header = {
        "plan": file,
        "model": f"{model.id} ({model.model_type}, {model.num_layers} layers, {model.num_query_heads} query and "
        f"{model.num_kv_heads} KV heads of {model.head_size}, {model.dtype}, 16 bit is {model.storage_dtype})",
        "budget": f"{budget.requested} of {budget.context_tokens:,} tokens",
        "bytes": f"full {budget.full_bytes:,}, limit {budget.limit_bytes:,}, planned {planned}",
        "scorer": plan.scorer.name + (f" ({parameters})" if parameters else ""),
        "always kept": f"{plan.sinks} sinks, {plan.window} window",
        "heads": ", ".join(dict.fromkeys(_sharing(plan.heads_of(i)) for i in range(model.num_layers))),
        "decode": f"reserve of {decode.reserve_tokens} tokens in {decode.format}, then {decode.then}",
        "calibrated": _calibrated(plan),
        "extrapolated": "yes, to a length it was not calibrated for" if plan.extrapolated else "no",
    }
    width = max(map(len, header))
    lines = [f"{name:<{width}}  {value}" for name, value in header.items()]
    return "\n".join([*lines, "", *_layer_table(plan), *_measured(plan)])


def _sharing(heads: Heads) -> str:
    return heads.share + (f" (alpha {heads.alpha:g})" if heads.alpha is not None else "")


def _calibrated(plan: Plan) -> str:
    measured = plan.calibration
    if measured is None:
        return "no"
    return f"yes, by {measured.objective} on contexts of {measured.context_tokens:,} tokens, seed {measured.seed}"


def _layer_table(plan: Plan) -> list[str]:
    ledger = make_ledger(plan)
    most_tokens = max(layer.tokens for layer in plan.layers)
    rows = [["layer", "tokens", "keys", "values", "quantizer", "heads", "bytes", "share", "tokens"]]
    for i, (layer, block) in enumerate(zip(plan.layers, ledger.layers, strict=True)):
        formats = [plan.formats[tier.format] for tier in layer.tiers]
        rows.append(
            [
                str(i),
                " + ".join(str(tier.tokens) for tier in layer.tiers),
                " + ".join(str(format.keys.bits) for format in formats),
                " + ".join(str(format.values.bits) for format in formats),
                _quantizers(formats),
                _head_tokens(plan, i),
                f"{block.stored_bytes:,}",
                f"{100 * block.stored_bytes / ledger.stored_bytes:.1f} %",
                "#" * max(1, round(BAR_WIDTH * layer.tokens / most_tokens)),
            ]
        )
    total_tokens = sum(layer.tokens for layer in plan.layers)
    rows.append(["total", str(total_tokens), "", "", "", "", f"{ledger.stored_bytes:,}", "100.0 %", ""])
    if all(plan.heads_of(i).share == "uniform" for i in range(len(plan.layers))):
        return table([[*row[:5], *row[6:]] for row in rows], left={4, 7})
    return table(rows, left={4, 5, 8})


def _head_tokens(plan: Plan, layer: int) -> str:
    """How the layer's heads share its tokens: by weight, how many each of them keeps."""
    heads = plan.heads_of(layer)
    return heads.share if heads.weights is None else "/".join(map(str, tokens_of_heads(plan, layer)))


def tokens_of_heads(plan: Plan, layer: int) -> list[int]:
    """How many tokens each head of a layer keeps in all, where the plan says it by weights; else nothing."""
    tiers = [tokens for _, tokens in plan.holdings(layer)[:-1] if not isinstance(tokens, int)]
    return [sum(of_head) for of_head in zip(*tiers, strict=True)]


def _quantizers(formats: Sequence[Format]) -> str:
    return " + ".join(dict.fromkeys(side.quantizer for format in formats for side in (format.keys, format.values)))


def _measured(plan: Plan) -> list[str]:
    if (measured := plan.calibration) is None:
        return []
    rows = [["nats on validation (95 %)", "full", "plan", "best uniform"]]
    for name, losses in (("cross-entropy", measured.cross_entropy), ("KL to the full cache", measured.kl)):
        rows.append([name, *(_interval(loss) for loss in (losses.full, losses.plan, losses.best_uniform))])
    return [
        "",
        *table(rows, left={0}),
        f"best plan: {measured.winner}; best uniform: {measured.best_uniform}; "
        f"improvement on it: {_interval(measured.improvement_on_best_uniform)}",
    ]


def _interval(value: Interval) -> str:
    return f"{value.mean:.3f} ({value.low:.3f} to {value.high:.3f})"


def methods_overview() -> dict[str, Any]:
    """All scorers, head sharings, presets and quantizers, as JSON values."""

    def defaults(parameters: Mapping[str, Parameter]) -> dict[str, Any]:
        return {key: parameter.default for key, parameter in parameters.items()}

    return {
        "scorers": {
            name: {"paper": facts.paper, "needs": list(facts.needs), "parameters": defaults(facts.parameters)}
            for name, facts in SCORERS.items()
        },
        "heads": {
            name: {
                "paper": facts.paper,
                "rule": facts.rule,
                "needs": facts.needs,
                "parameters": {} if facts.alpha is None else {"alpha": facts.alpha},
            }
            for name, facts in SHARINGS.items()
        },
        "presets": {
            name: {"paper": facts.paper, "rule": facts.rule, "parameters": defaults(facts.parameters)}
            for name, facts in PRESETS.items()
        },
        "quantizers": {name: _quantizer(name) for name in QUANTIZERS},
    }


def _quantizer(name: str) -> dict[str, Any]:
    facts = QUANTIZERS[name]
    parameters = {"group": facts.group, "outliers": facts.outliers}
    return {
        "paper": facts.paper,
        "needs": ["query_statistics"] if facts.head_vectors else [],
        "parameters": {key: value for key, value in parameters.items() if value is not None},
        "bits": list(facts.bits),
        "key_axis": facts.key_axis,
        "value_axis": facts.value_axis,
        "group": facts.group,
        "head_size": METHODS_HEAD_SIZE,
        **_metadata(name),
    }


def _metadata(quantizer: str) -> dict[str, float]:
    """What the ledger counts beside the codes, for one head whose tokens fill their groups."""
    tokens, size = 1024, METHODS_HEAD_SIZE
    side = TensorFormat.model_validate({"quantizer": quantizer, "bits": QUANTIZERS[quantizer].bits[-1]})
    shape = ModelShape("", 1, 1, 1, size, tokens, (None,))
    format = Format(keys=side, values=side).with_groups(size)
    block = layer_ledger(0, ((format, tokens), (format, 1)), shape)
    bits = {}
    for side_name in ("key", "value"):
        parts = [b for name, b in block.segment(0, 0).buffers.items() if name.startswith(f"{side_name}_")]
        beside = sum(b.size_bytes for b in parts if b.name != f"{side_name}_codes")
        bits[f"{side_name}_metadata_bits_per_element"] = 8 * beside / (tokens * size)
    return {**bits, "head_vectors_bytes": block.head_vectors.size_bytes if block.head_vectors else 0}


def methods_text() -> str:
    """Tables of the scorers, the head sharings, the presets, and the quantizers with their metadata."""
    scorers = [["scorer", "needs", "parameters", "paper"]]
    for name, scorer in SCORERS.items():
        needs = ", ".join(scorer.needs).replace("_", " ")
        scorers.append([name, needs, _parameters(scorer.parameters), scorer.paper])
    heads = [["heads", "needs", "parameters", "rule", "paper"]]
    for name, sharing in SHARINGS.items():
        alpha = "none" if sharing.alpha is None else f"alpha {sharing.alpha:g}"
        heads.append([name, sharing.needs, alpha, sharing.rule, sharing.paper or "none"])
    presets = [["preset", "needs", "parameters", "rule", "paper"]]
    for name, preset in PRESETS.items():
        presets.append([name, "nothing", _parameters(preset.parameters), preset.rule, preset.paper or "none"])
    quantizers = [
        ["quantizer", "bits", "needs", "a group runs along", "parameters", "metadata bits", "per head", "paper"]
    ]
    for name in QUANTIZERS:
        facts = _quantizer(name)
        key, value = facts["key_metadata_bits_per_element"], facts["value_metadata_bits_per_element"]
        has_groups = bool(key or value)
        parameters = {"group": "all", **facts["parameters"]} if has_groups else {}
        quantizers.append(
            [
                name,
                ", ".join(map(str, facts["bits"])),
                ", ".join(facts["needs"]).replace("_", " ") or "nothing",
                f"keys {facts['key_axis']}, values {facts['value_axis']}" if has_groups else "none",
                ", ".join(f"{key} {value}" for key, value in parameters.items()) or "none",
                f"keys {key:.3g}, values {value:.3g}",
                f"{facts['head_vectors_bytes']} bytes",
                facts["paper"],
            ]
        )
    tables = (table(rows, left=set(range(len(rows[0])))) for rows in (scorers, heads, presets, quantizers))
    return "\n".join(
        [
            *(line for lines in tables for line in (*lines, "")),
            f"Metadata bits are per stored element, in full groups of the default size at a head size of "
            f"{METHODS_HEAD_SIZE}, outliers with their places included; bytes per head are stored once a layer.",
        ]
    )


def _parameters(parameters: Mapping[str, Parameter]) -> str:
    return ", ".join(_parameter(name, parameter) for name, parameter in parameters.items()) or "none"


def _parameter(name: str, parameter: Parameter) -> str:
    allowed = f" ({' or '.join(map(str, parameter.choices))})" if parameter.choices else ""
    return f"{name} {parameter.default}{allowed}"


def table(rows: Sequence[Sequence[str]], left: set[int]) -> list[str]:
    """Rows of equal length in aligned columns; those in `left` to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
