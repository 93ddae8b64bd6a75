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
        if target.exists() and not target.is_file():
            target.write_bytes(data)
            return
        temporary.write_bytes(data)
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error.strerror}") from None


def check_writable(option: str, path: Path) -> None:
    """Raise InputError where `write_whole` could not write `path`, which the option names."""
    if not path.parent.is_dir() or path.is_dir():
        raise InputError(f"{option} must be a file in an existing directory, got {path}")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise InputError(f"{option} must be in a directory that can be written, got {path}: {error.strerror}") from None


def make_folder(option: str, path: Path) -> None:
    """Make the folder that the option names, where there is none yet. Raises InputError where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{option} must be a folder, there or to be made, got {path}: {error.strerror}") from None
