"""Imports point one way: planner -> runtime -> kernels, and what counts bytes or reads plans needs no torch."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "qpkv_kernels": ROOT / "kernels" / "qpkv_kernels",
    "qpkv_runtime": ROOT / "qpkv_runtime",
    "qpkv_planner": ROOT / "qpkv_planner",
}


def imported(file: Path) -> set[str]:
    """The top-level packages that `file` imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


def importers(packages: list[str], of: set[str]) -> list[str]:
    """The files of `packages` that import one of `of`."""
    files = [file for package in packages for file in sorted(PACKAGES[package].rglob("*.py"))]
    assert files, f"no Python files found in {packages}"
    return [str(file.relative_to(ROOT)) for file in files if imported(file) & of]


def test_kernels_know_no_plan_and_no_model() -> None:
    assert importers(["qpkv_kernels"], {"qpkv_runtime", "qpkv_planner", "transformers"}) == []


def test_the_runtime_never_imports_the_planner() -> None:
    assert importers(["qpkv_runtime"], {"qpkv_planner"}) == []


def test_only_the_search_imports_optuna() -> None:
    assert set(importers(list(PACKAGES), {"optuna"})) <= {"qpkv_planner/search.py"}


def test_nothing_regular_is_importable_as_kernels() -> None:
    """transformers imports whatever package is called `kernels`, so ours must not be one."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "kernels.py").exists()


@pytest.mark.parametrize(
    "module",
    [
        "qpkv_planner.pytest_plugin",
        "qpkv_runtime.errors",
        "qpkv_runtime.ledger",
        "qpkv_runtime.methods",
        "qpkv_runtime.models.aliases",
        "qpkv_runtime.models.resolve",
        "qpkv_runtime.plan",
    ],
)
def test_reading_plans_and_counting_bytes_needs_no_torch(module: str) -> None:
    check = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", check], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr or f"{module} imports torch"
