"""The journal: every finished evaluation, so that nothing is measured twice and a killed search goes on where it was.

A search is deterministic given the losses it sees, so resuming is running it again over its journal: each evaluation
that is found there is not made. With a path the journal is a file of JSON lines, each written as its evaluation ends;
a last line that a kill tore is cut off. The first line says what the losses belong to (model, data, settings).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpkv_planner.files import append_line, open_lines, whole_lines
from qpkv_runtime.errors import InputError

NOT_OURS = "is not a journal that qpkv-plan wrote: choose another --study"
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
        lines = whole_lines(path, NOT_OURS)
        if lines:
            _check_header(path, lines[0], header)
            for line in lines[1:]:
                try:
                    entry = Entry(line["stage"], line["what"], line["values"])
                except KeyError:
                    raise InputError(f"{path} {NOT_OURS}") from None
                self.entries[_key(entry.what)] = entry
        self._file = open_lines(path)
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
        append_line(self._file, line, "--resume goes on from there")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _key(what: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _check_header(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for name in sorted({*found, *expected}):
        if found.get(name) != expected.get(name):
            raise InputError(
                f"{path} was begun with {name} = {found.get(name)!r}, this run has {expected.get(name)!r}: "
                "run the same command as then, or choose another --study"
            )
