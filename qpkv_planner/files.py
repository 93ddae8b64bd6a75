"""Files a command writes: whole or not at all, and known to be writable before hours of work go into them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

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
