"""Planning: search for the plan of a model under a byte budget.

model, tokenizer = qpkv_runtime.load_model("smollm2")
plan = qpkv_planner.plan(model, tokenizer, budget="1/64")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qpkv_planner.planner import plan

__all__ = ["plan"]


def __getattr__(name: str) -> Any:
    if name != "plan":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from qpkv_planner.planner import plan

    return plan
