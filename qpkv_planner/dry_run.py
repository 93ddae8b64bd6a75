"""What `qpkv-plan` would do, without doing it and without weights: budgets in bytes, contexts, steps, time, memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from qpkv_planner.allocation import Space, model_section
from qpkv_planner.calibration_cache import choose_places
from qpkv_planner.estimate import AUTO_BUDGETS, estimate
from qpkv_planner.fit import Fit, weights_bytes
from qpkv_planner.grid import QUICK_FORMATS
from qpkv_planner.machine import operations_per_second
from qpkv_planner.options import Options, check_holds, check_lengths
from qpkv_runtime.models.aliases import KnownModel
from qpkv_runtime.plan import Decode, Scorer


def outline(
    name: str, known: KnownModel, budgets: Sequence[str], options: Options, dtype: torch.dtype, device: torch.device,
    divided: Fit | None,
) -> dict[str, Any]:  # fmt: skip
    """As YAML can say it. budgets: as asked, none for `auto`; dtype, device: to load the model in and on; divided: what
    the budget was derived from.

    Raises BudgetError for a budget that cannot hold sinks, window and reserve, InputError for lengths that the model
    does not have.
    """
    lengths = check_lengths(options, known.shape)
    expected = estimate(known, options, lengths, len(budgets) or AUTO_BUDGETS)
    context_tokens = lengths.context
    number_type = str(dtype).removeprefix("torch.")
    section = model_section(name, known.shape, number_type, "bfloat16")
    asked = []
    for budget in budgets:
        space = Space(
            model=section, requested=budget, context_tokens=context_tokens, scorer=Scorer(name="snapkv"),
            sinks=options.sinks, window=options.window, decode=Decode(reserve_tokens=1, format=QUICK_FORMATS[0]),
        )  # fmt: skip
        check_holds(space, lengths, options.max_new_tokens)
        asked.append(
            {
                "requested": budget,
                "context_tokens": context_tokens,
                "full_bytes": space.full_bytes,
                "limit_bytes": space.limit_bytes,
            }
        )
    places = choose_places(expected.prefill_bytes, device, options.prefill_memory)
    return {
        "model": {
            "id": name,
            "parameters": known.num_parameters,
            "dtype": number_type,
            "device": str(device),
            "weights_bytes": weights_bytes(known.num_parameters, number_type),
        },
        **({} if divided is None else {"fit": divided.record()}),
        "budgets": asked or "auto",
        "search": expected.record(operations_per_second(device, dtype), places),
    }
