"""Files a command writes: whole or not at all, or a line at a time, and known to be writable before hours of work go
into them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from qpkv_runtime.errors import InputError


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all; what is there and is no file (a pipe, /dev/stdout) is written to as it is.
    Raises InputError when it cannot be written."""
    target, data = path.resolve(), content.encode() if isinstance(content, str) else content
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        if _is_stream(path):
            path.write_bytes(data)
            return
        temporary.write_bytes(data)
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error.strerror}") from None


def check_writable(option: str, path: Path) -> None:
    """Raise InputError where `write_whole` could not write `path`, which the option names."""
    if _is_stream(path):
        return
    folder = path.resolve().parent
    if not folder.is_dir() or path.is_dir():
        raise InputError(f"{option} must be a file in an existing directory, got {path}")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"{option} must be in a directory that can be written, got {path}: {error.strerror}") from None


def check_readable(option: str, path: Path) -> None:
    """Raise InputError where the file that the option names cannot be read."""
    try:
        path.open("rb").close()
    except OSError as error:
        raise InputError(f"{option} must be a file that can be read, got {path}: {error.strerror}") from None


def _is_stream(path: Path) -> bool:
    return path.exists() and not path.is_file() and not path.is_dir()


def make_folder(option: str, path: Path) -> None:
    """Make the folder that the option names, where there is none yet. Raises InputError where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{option} must be a folder, there or to be made, got {path}: {error.strerror}") from None


def whole_lines(path: Path, refusal: str) -> list[dict[str, Any]]:
    """The JSON objects of a file that `append_line` wrote, after cutting off a last line that a kill tore; none where
    there is no file. Raises InputError, with the refusal after the path, for another file."""
    if not path.exists():
        return []
    try:
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        lines = [json.loads(line) for line in whole.splitlines()]
        if len(whole) < len(content):
            os.truncate(path, len(whole))
    except (OSError, ValueError):
        raise InputError(f"{path} {refusal}") from None
    if not all(isinstance(line, dict) for line in lines):
        raise InputError(f"{path} {refusal}")
    return lines


def open_lines(path: Path) -> TextIO:
    """A file to `append_line` to. Raises InputError when it cannot be written."""
    try:
        return path.open("a", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None


def append_line(file: TextIO, line: Mapping[str, Any], advice: str) -> None:
    """Write a JSON object that a kill does not lose. Raises InputError, with the advice, when it cannot be written."""
    try:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        raise InputError(f"cannot write {file.name}: {error.strerror}: {advice}") from None
