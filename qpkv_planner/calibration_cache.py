"""Where prefills of calibration splits live, and how they are kept.

On the model's device while they fit there, else in main memory, else on disk: keys and values then are a safetensors
file that is filled as contexts come and stays mapped, so that memory holds what is being read. Kept ones are files in a
folder, named by all that their content depends on, written whole or not at all and read mapped.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from qpkv_planner.calibration import Split
from qpkv_planner.machine import free_bytes
from qpkv_planner.prefill import Allocate, Prepared, PreparedLayer, Scored, in_memory, prepare
from qpkv_runtime.cache import layer_devices, runs_on
from qpkv_runtime.compression import Ranking, Scoring
from qpkv_runtime.errors import InputError
from qpkv_runtime.plan import Model

Place = Literal["device", "host", "disk"]
_LOCK = "being-written.lock"
_DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16"}
_RANKING = tuple(field.name for field in fields(Ranking))
_LISTS = ("name", "hash", "num_contexts", "num_unanswerable", "prompt_tokens", "inputs", "targets", "kinds", "contexts")


def load_or_prepare(
    model: PreTrainedModel, section: Model, split: Split, scorings: Sequence[Scoring], num_parts: int,
    progress: Callable[[], None], folder: Path | None, place: Place = "device",
) -> Prepared:  # fmt: skip
    """`prepare`, or what an earlier run left in `folder` of the same model, split and scorings. place: of the result.

    A model whose weights have no hash (made in memory) is not looked up and not kept; what goes to disk then, or
    without a folder, is in a temporary file that is gone with the process.
    """
    is_kept = folder is not None and section.weights_hash is not None
    path = (folder or Path()) / f"{split.name}-{_key(section, split, scorings, num_parts)}.safetensors"
    if is_kept and path.exists():
        return _load(path, scorings, model, place)
    try:
        beside = _swept(path.parent if is_kept else Path(tempfile.gettempdir()))
        with tempfile.TemporaryDirectory(prefix="qpkv-", dir=beside) as aside, (Path(aside) / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            banks = Path(aside) / "keys-and-values.safetensors"
            prepared = prepare(
                model,
                section.shape,
                section.storage_dtype,
                split,
                scorings,
                num_parts,
                progress,
                _allocate(place, banks, section.num_layers),
            )
            if is_kept:
                partial = Path(aside) / path.name
                tensors, lists = _content(prepared, scorings, place != "disk")
                save_file(tensors, partial, lists)
                if place == "disk":
                    os.replace(banks, _banks_of(path))
                os.replace(partial, path)
    except OSError as error:
        where = f"to {folder}" if is_kept else f"to {tempfile.gettempdir()} (TMPDIR)"
        raise InputError(f"cannot write calibration prefills {where}: {error.strerror}") from None
    return prepared  # mapped files that are gone by name stay while they are mapped


def choose_places(sizes: Mapping[str, int], device: torch.device, limit: int | None) -> dict[str, Place]:
    """Where prefills of these sizes in bytes go, the first ones first: the device, while half of what is free there
    holds them (the rest is for evaluations), else main memory, likewise, else disk. limit: in place of that half."""
    rooms: dict[Place, int] = {"device": free_bytes(device) // 2 if limit is None else limit}
    if device.type != "cpu":
        rooms["host"] = free_bytes(torch.device("cpu")) // 2 if limit is None else limit
    places: dict[str, Place] = {}
    for name, size in sizes.items():
        places[name] = next((place for place, room in rooms.items() if size <= room), "disk")
        if places[name] != "disk":
            rooms[places[name]] -= size
    return places


def _allocate(place: Place, path: Path, num_layers: int) -> Allocate:
    """The room for keys and values; on disk one safetensors file of all layers, made when the first is asked for."""
    mapped: dict[str, Tensor] = {}

    def room(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        if place == "device":
            return in_memory(name, shape, dtype, device)
        if place == "host":
            return in_memory(name, shape, dtype, torch.device("cpu"))
        if not mapped:
            names = [f"{layer}.{side}" for layer in range(num_layers) for side in ("keys", "values")]
            mapped.update(_mapped_file(path, names, shape, dtype))
        return mapped[name]

    return room


def _mapped_file(path: Path, names: Sequence[str], shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """A new safetensors file of equal tensors, mapped to be written; unwritten pages take no disk."""
    size = math.prod(shape) * dtype.itemsize
    header = {
        name: {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [i * size, (i + 1) * size]}
        for i, name in enumerate(names)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size * len(names))
    data = torch.from_numpy(np.memmap(path, np.uint8, "r+", offset=8 + len(text)))
    return {name: data[i * size : (i + 1) * size].view(dtype).view(shape) for i, name in enumerate(names)}


def _banks_of(path: Path) -> Path:
    """The file of keys and values beside a file of all the rest."""
    return path.with_suffix(".kv.safetensors")


def _swept(folder: Path) -> Path:
    """The folder, made if need be, without what searches were writing there when they were killed: a lock that can be
    had is of no process any more."""
    folder.mkdir(parents=True, exist_ok=True)
    for held in folder.glob(f"qpkv-*/{_LOCK}"):
        with suppress(OSError), held.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(held.parent, ignore_errors=True)
    return folder


def _key(section: Model, split: Split, scorings: Sequence[Scoring], num_parts: int) -> str:
    depends = {
        "model": {**section.model_dump(), "id": None},
        "split": split.hash,
        "scorings": [asdict(scoring) for scoring in scorings],
        "parts": num_parts,
        "versions": [version(package) for package in ("qpkv", "torch", "transformers")],
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:20]


def _content(
    prepared: Prepared, scorings: Sequence[Scoring], has_banks: bool
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and lists by name; has_banks: with keys and values."""
    tensors = {"token_rows": prepared.token_rows, "full_logprobs": prepared.full_logprobs}
    for index, layer in enumerate(prepared.layers):
        if has_banks:
            tensors[f"{index}.keys"], tensors[f"{index}.values"] = layer.keys, layer.values
        for place, scoring in enumerate(scorings):
            scored = layer.scored[scoring]
            tensors |= {f"{index}.{place}.{name}": getattr(scored.ranking, name) for name in _RANKING}
            tensors[f"{index}.{place}.query_stats"] = scored.query_stats
    lists = {name: getattr(prepared, name) for name in (*_LISTS, "part_starts")}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, {"lists": json.dumps(lists)}


def _load(path: Path, scorings: Sequence[Scoring], model: PreTrainedModel, place: Place) -> Prepared:
    devices, host = layer_devices(model), torch.device("cpu")
    banks = _banks_of(path) if _banks_of(path).exists() else path
    try:
        with safe_open(path, framework="pt") as file, safe_open(banks, framework="pt") as keys_and_values:
            lists: dict[str, Any] = json.loads(file.metadata()["lists"])
            layers = []
            for index, own in enumerate(devices):
                home = own if place == "device" else host
                scored = {
                    scoring: Scored(
                        Ranking(*(file.get_tensor(f"{index}.{number}.{name}") for name in _RANKING)).to(home),
                        file.get_tensor(f"{index}.{number}.query_stats").to(home),
                    )
                    for number, scoring in enumerate(scorings)
                }
                keys, values = (keys_and_values.get_tensor(f"{index}.{side}").to(home) for side in ("keys", "values"))
                layers.append(PreparedLayer(keys, values, scored))
            token_rows, full_logprobs = file.get_tensor("token_rows"), file.get_tensor("full_logprobs")
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read as calibration prefills ({error}): delete it") from None
    for name in ("inputs", "targets"):
        lists[name] = [tuple(tokens) for tokens in lists[name]]
    return Prepared(
        **{**lists, "part_starts": tuple(lists["part_starts"])},
        layers=tuple(layers),
        token_rows=token_rows,
        full_logprobs=full_logprobs.to(runs_on(model)),
    )
