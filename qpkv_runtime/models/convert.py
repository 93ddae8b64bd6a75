"""A GGUF file -> a Hugging Face folder (bf16 safetensors) that loads in about a second.

transformers reads GGUF, but takes half a minute every time. We convert once, into a cache folder named after the
file's hash. It is written beside its place and moved there whole, so an interrupted conversion leaves nothing that
looks finished, and of two processes that convert at once the later one uses the earlier one's. No torch until
something is converted.
"""

from __future__ import annotations

import hashlib
import os
import sys
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

from qpkv_runtime.errors import InputError, UnsupportedModelError, is_out_of_memory


def cache_folder() -> Path:
    """$QPKV_CACHE, else $XDG_CACHE_HOME/qpkv, else ~/.cache/qpkv. It may not exist yet."""
    if own := os.environ.get("QPKV_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "qpkv"


def converted_folder(gguf: Path) -> Path:
    """The folder that holds `gguf` (an existing file) as bf16 safetensors with its tokenizer; made on first use.

    Raises UnsupportedModelError when transformers cannot read the file, InputError when the cache cannot be written.
    """
    with gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UnsupportedModelError(f"a GGUF file begins with the letters GGUF, and {gguf} does not")
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = cache_folder() / "models" / f"{gguf.stem}-bf16-{digest[:16]}"
    if not folder.is_dir():
        _convert(gguf, folder)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        workplace = TemporaryDirectory(prefix=".converting-", dir=folder.parent)
    except OSError as error:
        raise InputError(
            f"cannot write to the cache folder {folder.parent} ({error.strerror}); point QPKV_CACHE at another"
        ) from None
    print(f"converting {gguf.name}, once, into {folder} (about half a minute)", file=sys.stderr)
    with workplace:
        fresh = Path(workplace.name) / folder.name
        _write_as_safetensors(gguf, fresh)
        try:
            os.replace(fresh, folder)
        except OSError:
            if not folder.is_dir():
                raise


def _write_as_safetensors(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from qpkv_runtime.models.quiet import quiet_transformers

    with quiet_transformers(), redirect_stderr(StringIO()):  # one bar there is switched off by nothing else
        try:
            # Unless told to unpack, transformers keeps the weights packed on machines that have the package `kernels`.
            unpacked = GgufConfig(dequantize=True)
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=unpacked
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        except Exception as error:  # a damaged file ends in any of them
            if is_out_of_memory(error):
                raise
            raise UnsupportedModelError(f"transformers cannot read {gguf}: {type(error).__name__}: {error}") from error
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
