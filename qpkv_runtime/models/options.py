"""The options with which every command loads its model, said once. No torch."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qpkv_runtime.errors import InputError

if TYPE_CHECKING:
    from qpkv_runtime.plan import Plan

DEVICE_MAPS = ("auto", "balanced", "sequential")


def add_loading_options(parser: argparse.ArgumentParser, dtype: str = "what the machine does best") -> None:
    """Give a command's parser what `loading_options` reads; dtype: what its default means."""
    group = parser.add_argument_group("loading the model")
    group.add_argument("--dtype", default="auto", help=f"float32, float16 or bfloat16 (default: {dtype})")
    group.add_argument("--device", default="auto", help="cpu, cuda or cuda:N (default: cuda when there is one)")
    group.add_argument(
        "--device-map",
        choices=DEVICE_MAPS,
        help="spread the weights over all GPUs, then main memory, then disk (transformers' device_map); not with "
        "--device",
    )
    group.add_argument(
        "--revision", metavar="REV", help="branch, tag or commit on the hub (default: the plan's, or main)"
    )
    group.add_argument("--trust-remote-code", action="store_true", help="run Python files that come with the model")
    group.add_argument("--allow-pickle", action="store_true", help="take .bin weights where there are no safetensors")


def loading_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `load_model`. Raises InputError for options that contradict each other."""
    if arguments.device_map is not None and arguments.device != "auto":
        raise InputError(
            f"--device-map chooses devices itself, got --device {arguments.device} too: leave one of them away"
        )
    names = ("dtype", "device", "device_map", "revision", "trust_remote_code", "allow_pickle")
    return {name: getattr(arguments, name) for name in names}


def as_planned(options: Mapping[str, Any], plan: Plan, name: str) -> dict[str, Any]:
    """The options for measuring `plan` on the model `name`. What they leave open is as the plan was made: its number
    type and, for its own model, its revision."""
    dtype, revision = options.get("dtype", "auto"), options.get("revision")
    return {
        **options,
        "dtype": plan.model.dtype if dtype == "auto" else dtype,
        "revision": revision or (plan.model.revision if name == plan.model.id else None),
    }
