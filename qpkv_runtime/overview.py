"""A plan, and the methods a plan can name, as people read them and as JSON. No torch.

Every number of bytes is the ledger's; nothing here is worked out twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qpkv_runtime.ledger import layer_ledger, make_ledger
from qpkv_runtime.methods import QUANTIZERS, SCORERS, Parameter
from qpkv_runtime.models.shape import ModelShape
from qpkv_runtime.plan import Format, Interval, Plan, TensorFormat

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
        "decode": f"reserve of {decode.reserve_tokens} tokens in {decode.format}, then {decode.then}",
        "calibrated": _calibrated(plan),
        "extrapolated": "yes, to a length it was not calibrated for" if plan.extrapolated else "no",
    }
    width = max(map(len, header))
    lines = [f"{name:<{width}}  {value}" for name, value in header.items()]
    return "\n".join([*lines, "", *_layer_table(plan), *_measured(plan)])


def _calibrated(plan: Plan) -> str:
    measured = plan.calibration
    if measured is None:
        return "no"
    return f"yes, by {measured.objective} on contexts of {measured.context_tokens:,} tokens, seed {measured.seed}"


def _layer_table(plan: Plan) -> list[str]:
    ledger = make_ledger(plan)
    most_tokens = max(layer.tokens for layer in plan.layers)
    rows = [["layer", "tokens", "keys", "values", "quantizer", "bytes", "share", "tokens"]]
    for i, (layer, block) in enumerate(zip(plan.layers, ledger.layers, strict=True)):
        formats = [plan.formats[tier.format] for tier in layer.tiers]
        rows.append(
            [
                str(i),
                " + ".join(str(tier.tokens) for tier in layer.tiers),
                " + ".join(str(format.keys.bits) for format in formats),
                " + ".join(str(format.values.bits) for format in formats),
                _quantizers(formats),
                f"{block.stored_bytes:,}",
                f"{100 * block.stored_bytes / ledger.stored_bytes:.1f} %",
                "#" * max(1, round(BAR_WIDTH * layer.tokens / most_tokens)),
            ]
        )
    total_tokens = sum(layer.tokens for layer in plan.layers)
    rows.append(["total", str(total_tokens), "", "", "", f"{ledger.stored_bytes:,}", "100.0 %", ""])
    return table(rows, left={4, 7})


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
    """All scorers and quantizers, as JSON values."""
    scorers = {
        name: {
            "paper": facts.paper,
            "needs": list(facts.needs),
            "parameters": {key: parameter.default for key, parameter in facts.parameters.items()},
        }
        for name, facts in SCORERS.items()
    }
    return {"scorers": scorers, "quantizers": {name: _quantizer(name) for name in QUANTIZERS}}


def _quantizer(name: str) -> dict[str, Any]:
    facts = QUANTIZERS[name]
    metadata = _metadata(name)
    return {
        "paper": facts.paper,
        "bits": list(facts.bits),
        "key_axis": facts.key_axis,
        "value_axis": facts.value_axis,
        "group": facts.group,
        "head_size": METHODS_HEAD_SIZE,
        **metadata,
    }


def _metadata(quantizer: str) -> dict[str, float]:
    """What the ledger counts beside the codes, for one head whose tokens fill their groups."""
    tokens, size = 1024, METHODS_HEAD_SIZE
    side = TensorFormat.model_validate({"quantizer": quantizer, "bits": QUANTIZERS[quantizer].bits[-1]})
    shape = ModelShape("", 1, 1, 1, size, tokens, (None,))
    block = layer_ledger(0, ((Format(keys=side, values=side), tokens),), shape)
    buffers = block.segment(0, 0).buffers
    bits = {
        f"{name}_metadata_bits_per_element": 8 * buffers[f"{name}_scales"].size_bytes / (tokens * size)
        if f"{name}_scales" in buffers
        else 0.0
        for name in ("key", "value")
    }
    return {**bits, "head_vectors_bytes": block.head_vectors.size_bytes if block.head_vectors else 0}


def methods_text() -> str:
    """Two tables: the scorers, and the quantizers with their metadata."""
    scorers = [["scorer", "needs", "parameters", "paper"]]
    for name, scorer in SCORERS.items():
        parameters = ", ".join(_parameter(key, value) for key, value in scorer.parameters.items())
        scorers.append([name, ", ".join(scorer.needs).replace("_", " "), parameters or "none", scorer.paper])
    quantizers = [["quantizer", "bits", "a group runs along", "group", "metadata bits", "per head", "paper"]]
    for name in QUANTIZERS:
        facts = _quantizer(name)
        key, value = facts["key_metadata_bits_per_element"], facts["value_metadata_bits_per_element"]
        has_groups = bool(key or value)
        quantizers.append(
            [
                name,
                ", ".join(map(str, facts["bits"])),
                f"keys {facts['key_axis']}, values {facts['value_axis']}" if has_groups else "none",
                str(facts["group"] or ("all" if has_groups else "none")),
                f"keys {key:g}, values {value:g}",
                f"{facts['head_vectors_bytes']} bytes",
                facts["paper"],
            ]
        )
    return "\n".join(
        [
            *table(scorers, left=set(range(4))),
            "",
            *table(quantizers, left=set(range(7)) - {3}),
            "",
            f"Metadata bits are per stored element, at the default group and a head size of {METHODS_HEAD_SIZE}; "
            "bytes per head are stored once a layer.",
        ]
    )


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
