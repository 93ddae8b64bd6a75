"""Prefills of calibration splits kept in a folder: one safetensors file each, named by all that its content depends on.

Files are written whole or not at all and read memory-mapped, so a split larger than memory still loads.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from qpkv_planner.calibration import Split
from qpkv_planner.prefill import Prepared, PreparedLayer, Scored, prepare
from qpkv_runtime.cache import runs_on
from qpkv_runtime.compression import Scoring
from qpkv_runtime.errors import InputError
from qpkv_runtime.plan import Model

_LISTS = ("name", "hash", "num_contexts", "num_unanswerable", "prompt_tokens", "inputs", "targets", "kinds", "contexts")


def load_or_prepare(
    model: PreTrainedModel, section: Model, split: Split, scorings: Sequence[Scoring], num_parts: int,
    progress: Callable[[], None], folder: Path | None,
) -> Prepared:  # fmt: skip
    """`prepare`, or what an earlier run left in `folder` of the same model, split and scorings.

    A model whose weights have no hash (made in memory) is not looked up and not kept.
    """

    def fresh() -> Prepared:
        return prepare(model, section.shape, section.storage_dtype, split, scorings, num_parts, progress)

    if folder is None or section.weights_hash is None:
        return fresh()
    path = folder / f"{split.name}-{_key(section, split, scorings, num_parts)}.safetensors"
    if path.exists():
        return _load(path, scorings, runs_on(model))
    prepared = fresh()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.part")
        tensors, lists = _content(prepared, scorings)
        save_file(tensors, partial, lists)
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"cannot write calibration prefills to {folder}: {error.strerror}") from None
    return prepared


def _key(section: Model, split: Split, scorings: Sequence[Scoring], num_parts: int) -> str:
    depends = {
        "model": {**section.model_dump(), "id": None},
        "split": split.hash,
        "scorings": [asdict(scoring) for scoring in scorings],
        "parts": num_parts,
        "versions": [version(package) for package in ("qpkv", "torch", "transformers")],
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:20]


def _content(prepared: Prepared, scorings: Sequence[Scoring]) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors = {"token_rows": prepared.token_rows, "full_logprobs": prepared.full_logprobs}
    for index, layer in enumerate(prepared.layers):
        tensors[f"{index}.keys"], tensors[f"{index}.values"] = layer.keys, layer.values
        for place, scoring in enumerate(scorings):
            tensors[f"{index}.{place}.importance"] = layer.scored[scoring].importance
            tensors[f"{index}.{place}.query_stats"] = layer.scored[scoring].query_stats
    lists = {name: getattr(prepared, name) for name in (*_LISTS, "part_starts")}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, {"lists": json.dumps(lists)}


def _load(path: Path, scorings: Sequence[Scoring], device: torch.device) -> Prepared:
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            lists: dict[str, Any] = json.loads(file.metadata()["lists"])
            names, get = list(file.keys()), file.get_tensor
            layers = tuple(
                PreparedLayer(
                    get(f"{index}.keys"),
                    get(f"{index}.values"),
                    {
                        scoring: Scored(get(f"{index}.{place}.importance"), get(f"{index}.{place}.query_stats"))
                        for place, scoring in enumerate(scorings)
                    },
                )
                for index in range(sum(name.endswith(".keys") for name in names))
            )
            token_rows, full_logprobs = get("token_rows"), get("full_logprobs")
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read as calibration prefills ({error}): delete it") from None
    for name in ("inputs", "targets"):
        lists[name] = [tuple(tokens) for tokens in lists[name]]
    return Prepared(
        **{**lists, "part_starts": tuple(lists["part_starts"])},
        layers=layers,
        token_rows=token_rows,
        full_logprobs=full_logprobs,
    )
