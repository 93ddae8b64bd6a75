"""Models by name: what is known of them without weights, where their weights are, loading, and who they are.

`aliases`, `shape` and `resolve` import no torch. What does is imported on first use, so that reading a plan or
counting bytes stays instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qpkv_runtime.models.aliases import KNOWN_MODELS, KnownModel
from qpkv_runtime.models.shape import ModelShape

if TYPE_CHECKING:
    from qpkv_runtime.models.identity import ModelIdentity, known_model, model_identity, model_shape, weights_warning
    from qpkv_runtime.models.load import choose_dtype, hub_commit, load_model, load_tokenizer

__all__ = [
    "KNOWN_MODELS",
    "KnownModel",
    "ModelIdentity",
    "ModelShape",
    "choose_dtype",
    "hub_commit",
    "known_model",
    "load_model",
    "load_tokenizer",
    "model_identity",
    "model_shape",
    "weights_warning",
]

_ON_FIRST_USE = {
    "ModelIdentity": "identity",
    "known_model": "identity",
    "model_identity": "identity",
    "model_shape": "identity",
    "weights_warning": "identity",
    "choose_dtype": "load",
    "hub_commit": "load",
    "load_model": "load",
    "load_tokenizer": "load",
}


def __getattr__(name: str) -> Any:
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ON_FIRST_USE[name]}"), name)
