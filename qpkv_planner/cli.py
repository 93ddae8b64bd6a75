"""The command qpkv-plan: a model and a budget in, a plan's YAML out on stdout."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from qpkv_runtime.cli import CommandParser
from qpkv_runtime.errors import InputError, run_command
from qpkv_runtime.methods import SHARINGS

DESCRIPTION = """\
Search for the plan of a model under a memory budget: how many tokens of its KV cache each layer keeps, and with how
many bits. The plan goes to stdout as YAML; progress and results on the way go to stderr."""

EXAMPLES = """\
  qpkv-plan --model smollm2 --budget 1/64 > plan.yaml
  qpkv-plan --model smollm2 --budget 1/32 --context-length 1024 --quick --output plan.yaml
  qpkv-plan --model ./my-model --budget 512MiB --context-length 32768 --calibration-length 4096
  qpkv-plan --model mistral-7b --budget 1/64 --uniform snapkv:kivi:4bit   (by arithmetic alone: no weights, no search)

budgets, per sequence: 1/64, 0.0156 or 1.6% of the full cache (16 bit, all KV heads, --context-length tokens), or bytes:
512MiB, 2GB."""


def parser() -> CommandParser:
    out = CommandParser("qpkv-plan", DESCRIPTION, EXAMPLES)
    out.add_argument("--model", required=True, help="smollm2, tiny, an alias, a directory, a .gguf file or a hub id")
    out.add_argument("--budget", required=True, help="1/64, 0.0156, 1.6%%, 512MiB or 2GB, per sequence")
    out.add_argument(
        "--context-length",
        type=int,
        metavar="TOKENS",
        help="the length a ratio refers to (default 2048, with --quick 1024, or the model's if that is smaller)",
    )
    out.add_argument(
        "--calibration-length",
        type=int,
        metavar="TOKENS",
        help="the length of the calibration contexts (default: the context length)",
    )
    out.add_argument("--quick", action="store_true", help="a first look: fewer contexts, formats and trials")
    out.add_argument("--objective", choices=("kl", "ce"), default="kl", help="what the search minimises (default kl)")
    out.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="TOKENS",
        help="room for generated tokens inside the budget (default 64, or what a quarter of the budget holds)",
    )
    out.add_argument(
        "--then",
        choices=("evict", "stop"),
        default="evict",
        help="when that room is full: evict the oldest generated token, or stop with an error (default evict)",
    )
    out.add_argument("--sinks", type=int, default=4, help="first tokens that every layer keeps (default 4)")
    out.add_argument("--window", type=int, default=16, help="last tokens that every layer keeps (default 16)")
    out.add_argument(
        "--heads", choices=tuple(SHARINGS), default="uniform",
        help="how KV heads share a layer's tokens (default uniform; weighted: by measured importance)",
    )  # fmt: skip
    out.add_argument("--trials", type=int, help="Optuna trials (default 24, with --quick 10)")
    out.add_argument("--seed", type=int, default=0, help="of the calibration data and the search (default 0)")
    out.add_argument(
        "--dtype", default="auto", help="float32, float16 or bfloat16 (default: what the machine does best)"
    )
    out.add_argument("--device", default="auto", help="cpu, cuda or cuda:N (default: cuda when there is one)")
    out.add_argument(
        "--uniform",
        metavar="SCORER:QUANTIZER:BITS",
        help="no search: every layer alike, such as snapkv:kivi:4bit, snapkv:rotated:k4v2 or (fewer tokens with depth) "
        "pyramidkv:kivi:4bit; marked calibrated: false",
    )
    out.add_argument("--output", "-o", type=Path, metavar="FILE", help="write the plan here instead of to stdout")
    out.add_argument("--quiet", action="store_true", help="nothing on stderr but errors")
    return out


def main(argv: list[str] | None = None) -> int:
    """Entry point of qpkv-plan; returns the exit status."""
    return run_command("qpkv-plan", lambda: _main(argv))


def _main(argv: list[str] | None) -> int:
    arguments = parser().parse_args(argv)
    for name, least in (("sinks", 0), ("window", 1), ("trials", 1), ("max_new_tokens", 1), ("context_length", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if arguments.output is not None and not arguments.output.parent.is_dir():
        raise InputError(f"--output must be in an existing directory, got {arguments.output}")
    text = _uniform(arguments) if arguments.uniform else _search(arguments)
    if arguments.output is None:
        sys.stdout.write(text)
    else:
        write_whole(arguments.output, text)
    return 0


def _search(arguments: argparse.Namespace) -> str:
    from qpkv_planner.planner import plan
    from qpkv_runtime.models import load_model

    model, tokenizer = load_model(arguments.model, dtype=arguments.dtype, device=arguments.device)
    found = plan(
        model,
        tokenizer,
        arguments.budget,
        name=arguments.model,
        context_tokens=arguments.context_length,
        calibration_tokens=arguments.calibration_length,
        quick=arguments.quick,
        objective=arguments.objective,
        max_new_tokens=arguments.max_new_tokens,
        then=arguments.then,
        sinks=arguments.sinks,
        window=arguments.window,
        heads=arguments.heads,
        trials=arguments.trials,
        seed=arguments.seed,
        quiet=arguments.quiet,
    )
    return found.to_yaml()


def _uniform(arguments: argparse.Namespace) -> str:
    from qpkv_planner.uniform import uniform_plan

    return uniform_plan(
        arguments.model,
        arguments.budget,
        arguments.uniform,
        context_tokens=arguments.context_length,
        max_new_tokens=arguments.max_new_tokens,
        then=arguments.then,
        sinks=arguments.sinks,
        window=arguments.window,
        heads=arguments.heads,
    ).to_yaml()


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises InputError when it cannot be written."""
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            file.write(text)
        os.replace(file.name, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None
