"""The journal: every finished evaluation, so that nothing is measured twice and a killed search goes on where it was.

A search is deterministic given the losses it sees, so resuming is running it again over its journal: each evaluation
that is found there is not made. With a path the journal is a file of JSON lines, each written as its evaluation ends;
a last line that a kill tore is cut off. The first line says what the losses belong to (model, data, settings).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpkv_runtime.errors import InputError

FORMAT = 2  # of the lines; what another wrote is refused


@dataclass(frozen=True)
class Entry:
    """One evaluation. what: the split and what was evaluated; values: per sample, by measure."""

    stage: str
    what: Mapping[str, Any]
    values: Mapping[str, list[float]]


class Journal:
    """Entries by what was evaluated. stage: written beside the next entries.

    path None: in memory only. header: what every loss depends on besides the plan and the samples. Raises InputError
    when `path` holds the journal of something else, naming the first difference.
    """

    def __init__(self, path: Path | None = None, header: Mapping[str, Any] | None = None) -> None:
        self.stage = ""
        self.entries: dict[str, Entry] = {}
        self._file = None
        if path is None:
            return
        header = json.loads(json.dumps({"journal_format": FORMAT, **(header or {})}))
        lines = _whole_lines(path)
        if lines:
            _check_header(path, lines[0], header)
            for line in lines[1:]:
                try:
                    entry = Entry(line["stage"], line["what"], line["values"])
                except KeyError:
                    raise _not_ours(path) from None
                self.entries[_key(entry.what)] = entry
        self._path = path
        try:
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from None
        if not lines:
            self._write(header)

    def get(self, what: Mapping[str, Any]) -> Entry | None:
        return self.entries.get(_key(what))

    def put(self, what: Mapping[str, Any], values: Mapping[str, list[float]]) -> None:
        entry = Entry(self.stage, what, values)
        self.entries[_key(what)] = entry
        if self._file is not None:
            self._write({"stage": entry.stage, "what": what, "values": values})

    def _write(self, line: Mapping[str, Any]) -> None:
        assert self._file is not None
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise InputError(f"cannot write {self._path}: {error.strerror}: --resume goes on from there") from None

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _key(what: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The file's lines, after cutting off what follows the last newline; none where there is no file."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    try:
        lines = [json.loads(line) for line in whole.splitlines()]
    except ValueError:
        raise _not_ours(path) from None
    if not all(isinstance(line, dict) for line in lines):
        raise _not_ours(path)
    return lines


def _not_ours(path: Path) -> InputError:
    return InputError(f"{path} is not a journal that qpkv-plan wrote: choose another --study")


def _check_header(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for name in sorted({*found, *expected}):
        if found.get(name) != expected.get(name):
            raise InputError(
                f"{path} was begun with {name} = {found.get(name)!r}, this run has {expected.get(name)!r}: "
                "run the same command as then, or choose another --study"
            )
