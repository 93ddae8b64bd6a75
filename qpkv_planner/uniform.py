"""A fixed setting's plan by arithmetic alone: a known model's shape and a budget, no weights, no calibration."""

from __future__ import annotations

import re

from qpkv_planner.allocation import DEFAULT_CONTEXT_TOKENS, PRESETS, Space, format_name, model_section
from qpkv_planner.grid import make_setting
from qpkv_runtime.errors import BudgetError, InputError
from qpkv_runtime.methods import QUANTIZERS, SCORERS, SHARINGS
from qpkv_runtime.models.aliases import KNOWN_MODELS, KnownModel
from qpkv_runtime.plan import Decode, Heads, Plan, Scorer


def uniform_plan(
    model: str,
    budget: str,
    setting: str,
    *,
    context_tokens: int | None = None,
    max_new_tokens: int | None = None,
    then: str = "evict",
    sinks: int = 4,
    window: int = 16,
    heads: str = "uniform",
) -> Plan:
    """Every layer alike (pyramidkv: fewer tokens with depth) under the exact budget, marked `calibrated: false`.

    model: an alias, or a directory with a config.json. setting: SCORER:QUANTIZER:BITS, bits as `4bit` or `k4v2`; for a
    scorer may stand pyramidkv, an allocation over snapkv's scores.
    Raises InputError for a setting that is not that, BudgetError where it cannot fit.
    """
    scorer, preset, format = _parse(setting)
    shape = known(model).shape
    tokens = context_tokens or min(DEFAULT_CONTEXT_TOKENS, shape.max_context_tokens)
    if tokens > shape.max_context_tokens:
        raise InputError(f"the context length must be at most the model's {shape.max_context_tokens}, got {tokens}")
    if heads not in SHARINGS or SHARINGS[heads].needs == "weights":
        raise InputError(f"a plan by arithmetic has no measured heads: --heads {heads} goes without --uniform")
    space = Space(
        model=model_section(model, shape, "bfloat16", "bfloat16"),
        requested=budget,
        context_tokens=tokens,
        scorer=Scorer(name=scorer),
        sinks=sinks,
        window=window,
        heads=Heads(share=heads),
        decode=Decode.model_validate({"reserve_tokens": 1, "format": format, "then": then}),
    )
    made = make_setting(space, preset, format, max_new_tokens)
    if made is None or made.space.window != window:
        raise BudgetError(
            f"a budget must hold sinks + window ({sinks} + {window} tokens per layer) and the reserve in {format}, "
            f"got {budget} = {space.limit_bytes}B: raise it, or lower --window, --sinks or --max-new-tokens"
        )
    return made.space.plan(made.allocation)


def _parse(setting: str) -> tuple[str, str, str]:
    """-> scorer, preset, format."""
    match = re.fullmatch(r"([a-z0-9_]+):([a-z0-9_]+):(?:(\d+)bit|k(\d+)v(\d+))", setting)
    if match is None:
        raise InputError(f"--uniform is SCORER:QUANTIZER:BITS, such as snapkv:kivi:4bit, got {setting!r}")
    scorer, quantizer = match[1], match[2]
    preset = scorer if scorer in PRESETS and scorer != "uniform" else "uniform"
    scorer = "snapkv" if preset == "pyramidkv" else scorer
    for what, name, known in (("scorer", scorer, SCORERS), ("quantizer", quantizer, QUANTIZERS)):
        if name not in known:
            raise InputError(f"{what} must be one of {', '.join(known)}, got {name!r}")
    keys, values = int(match[3] or match[4]), int(match[3] or match[5])
    allowed = sorted({16, *QUANTIZERS[quantizer].bits}, reverse=True)
    if keys not in allowed or values not in allowed:
        raise InputError(f"{quantizer} writes {', '.join(map(str, allowed))} bits, got {setting!r}")
    return scorer, preset, format_name(quantizer, keys, values)


def known(model: str) -> KnownModel:
    """What is known of an alias, or of a directory or hub model by its config.json; reads no weights."""
    if model in KNOWN_MODELS:
        return KNOWN_MODELS[model]
    from qpkv_runtime.models import known_model
    from qpkv_runtime.models.load import load_config

    return known_model(load_config(model))
