"""qpkv's runtime: run a model inside the KV cache bytes that a plan grants it.

    model, tokenizer = qpkv_runtime.load_model("smollm2")
    plan = qpkv_runtime.load_plan("plan.yaml")
    cache = qpkv_runtime.PlannedCache.from_plan(plan, model)
    inputs = tokenizer("...", return_tensors="pt")
    model.generate(**inputs, past_key_values=cache)

or, with the answer's text and statistics, `qpkv_runtime.generate(model, tokenizer, plan, inputs.input_ids)`.

Every name is imported on first use: reading a plan or counting its bytes loads no torch.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qpkv_runtime.cache import PlannedCache
    from qpkv_runtime.errors import (
        BudgetError,
        CacheError,
        InputError,
        ModelNotFoundError,
        NumericsError,
        PlanError,
        QpkvError,
        UnsupportedModelError,
    )
    from qpkv_runtime.generation import Answer, Sampling, Stats, generate
    from qpkv_runtime.models import load_model, load_tokenizer, model_shape
    from qpkv_runtime.plan import Plan, load_plan

    __version__: str

__all__ = [
    "Answer",
    "BudgetError",
    "CacheError",
    "InputError",
    "ModelNotFoundError",
    "NumericsError",
    "Plan",
    "PlanError",
    "PlannedCache",
    "QpkvError",
    "Sampling",
    "Stats",
    "UnsupportedModelError",
    "__version__",
    "generate",
    "load_model",
    "load_plan",
    "load_tokenizer",
    "model_shape",
]

_ON_FIRST_USE = {
    "cache": ("PlannedCache",),
    "errors": (
        "BudgetError",
        "CacheError",
        "InputError",
        "ModelNotFoundError",
        "NumericsError",
        "PlanError",
        "QpkvError",
        "UnsupportedModelError",
    ),
    "generation": ("Answer", "Sampling", "Stats", "generate"),
    "models": ("load_model", "load_tokenizer", "model_shape"),
    "plan": ("Plan", "load_plan"),
}
_MODULE_OF = {name: module for module, names in _ON_FIRST_USE.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        try:
            return metadata.version("qpkv")
        except metadata.PackageNotFoundError:
            return "0+unknown"  # a checkout that is on the path without being installed
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
