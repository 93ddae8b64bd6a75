"""A pytest plugin: `pytest --qpkv-plans plans/` adds one test per plan (`qpkv-check` on it), from its folders too.

Registered by the entry point `pytest11`, so it is imported in every pytest run of an environment that has qpkv: no
torch, no transformers and no pydantic before a plan is really checked. Plans without measurements, and plans of models
whose weights are not on this machine, are skipped with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from qpkv_planner.regression import Checker


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("qpkv", "KV cache plans")
    group.addoption(
        "--qpkv-plans",
        metavar="PATH",
        action="append",
        default=[],
        help="check this plan, or the *.yaml and *.yml of this folder and of those in it",
    )
    group.addoption("--qpkv-max-regression", metavar="NATS", type=float, default=0.01, help="as qpkv-check's (0.01)")


def pytest_configure(config: pytest.Config) -> None:
    paths = [Path(path) for path in config.getoption("--qpkv-plans")]
    if missing := [str(path) for path in paths if not path.exists()]:
        raise pytest.UsageError(f"--qpkv-plans must be a plan or a folder of plans, and there is no {missing[0]}")
    if paths:
        skipped = config.getini("norecursedirs")
        plans = {path: [path] if path.is_file() else _plans_in(path, skipped) for path in paths}
        if empty := [str(path) for path, files in plans.items() if not files]:
            raise pytest.UsageError(f"--qpkv-plans must hold plans (*.yaml, *.yml), and there is none in {empty[0]}")
        config.args += [str(path) for path in paths if str(path) not in config.args]  # xdist's workers have them
        config.stash[_PLANS] = sorted({str(file.resolve()) for files in plans.values() for file in files})


def _plans_in(folder: Path, skipped: Sequence[str]) -> list[Path]:
    """Those of its folders too, but for the ones that pytest skips (`norecursedirs`, hidden ones among them)."""
    return [
        file
        for file in folder.rglob("*")
        if file.suffix in (".yaml", ".yml")
        and file.is_file()
        and not any(fnmatch(part, name) for part in file.relative_to(folder).parts[:-1] for name in skipped)
    ]


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if str(file_path.resolve()) not in parent.config.stash.get(_PLANS, ()):
        return None
    return PlanFile.from_parent(parent, path=file_path)


class PlanFile(pytest.File):
    """A plan as pytest collects it."""

    def collect(self) -> Iterable[pytest.Item]:
        yield PlanTest.from_parent(self, name="qpkv-check")


class PlanTest(pytest.Item):
    """The check of one plan."""

    def runtest(self) -> None:
        from qpkv_runtime.errors import ModelNotFoundError

        try:
            result = _checker(self.config).result(str(self.path.resolve()))
        except ModelNotFoundError as error:
            pytest.skip(str(error))
        if result.status == "skipped":
            pytest.skip("; ".join(result.reasons))
        if result.status == "failed":
            raise GotWorseError("\n".join(result.reasons))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """A user's mistake or a regression is its text; anything else keeps its traceback."""
        from qpkv_runtime.errors import QpkvError

        if isinstance(excinfo.value, (GotWorseError, QpkvError)):
            return f"{self.path}: {excinfo.value}"
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, f"qpkv-check {self.path.name}"


class GotWorseError(Exception):
    """A plan got worse than recorded."""


def _checker(config: pytest.Config) -> Checker:
    """One for the whole run, so that plans of one model share its prefills."""
    if _CHECKER not in config.stash:
        from qpkv_planner.regression import Checker

        config.stash[_CHECKER] = Checker(config.stash[_PLANS], max_regression=config.getoption("--qpkv-max-regression"))
    return config.stash[_CHECKER]


_PLANS: pytest.StashKey[Sequence[str]] = pytest.StashKey()
_CHECKER: pytest.StashKey[Checker] = pytest.StashKey()
