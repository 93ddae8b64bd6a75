"""Decode attention of one layer, side by side: our formats, our own 16 bit, SDPA, QuantizedCache, unfused, bandwidth.

    python benchmarks/gpu/layer.py --out benchmarks/results            (run by benchmarks/gpu.sh)

The shape of a 7-8B model: 8 KV heads, 32 query heads, head size 128, bfloat16. Every call goes once over the caches of
many layers (32 where they fit, never less than eight times the L2 cache); times are per layer. Bytes are the ledger's
for the block without its reserve, those of the tensors for dense caches.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import Call, Rows, bandwidths, few_layers, finish, machine, make_plan, random_block, timed, total_bytes
from torch.nn.attention import SDPBackend, sdpa_kernel

from qpkv_runtime.backend import use_kernels
from qpkv_runtime.ledger import full_bytes, layer_bytes, make_ledger
from qpkv_runtime.models.aliases import KNOWN_MODELS
from qpkv_runtime.packed import PackedLayer

FULL_TOKENS = 16384
CASES = [  # batch, tokens, format, spread of the heads' counts
    (128, 128, "16bit", 1), (128, 256, "kivi-k8g64v8g64", 1), (128, 512, "kivi-k4g64v4g64", 1),
    (128, 455, "kivi-k4g64v4g64", 1), (128, 1024, "kivi-k2g64v2g64", 1), (64, 2048, "kivi-k4g64v4g64", 1),
    (1, 512, "kivi-k4g64v4g64", 1), (1, 8192, "kivi-k4g64v4g64", 1), (128, 512, "rotated-k4v4", 1),
    (128, 512, "rotated-k4v2", 1), (128, 512, "rotated-k4v4", 10), (256, 8192, "kivi-k4g64v4g64", 1),
]  # fmt: skip
UNFUSED, QUANTIZED_CACHE = "unfused dequantize + sdpa", "transformers QuantizedCache 4 bit"
EAGER = (UNFUSED, QUANTIZED_CACHE)  # may ask the host, or not find the memory while a graph is captured
SMOKE_CASES = [(2, 64, "16bit", 1), (2, 64, "kivi-k4g64v4g64", 1), (2, 64, "rotated-k4v2", 10)]
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--smoke", action="store_true", help="small, on any device")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    rows = Rows("layer", arguments.out, machine(device))
    repeats = 2 if arguments.smoke else arguments.repeats
    limits = bandwidths(device, 2**24 if arguments.smoke else 2**32, repeats)
    for name, value in limits.items():
        rows.add(what=f"{name} bandwidth", gb_per_s=value, copy_share=value / limits["copy"])
    for case in SMOKE_CASES if arguments.smoke else CASES:
        measure(rows, case, limits["copy"], device, repeats, arguments.smoke)
    return finish(rows)


def measure(
    rows: Rows, case: tuple[int, int, str, int], copy: float, device: torch.device, repeats: int, is_smoke: bool
) -> None:
    batch, tokens, format, spread = case
    shape = KNOWN_MODELS["mistral-7b"].shape
    ours = make_plan(few_layers(shape, 1), tokens, format, "bfloat16", "adaptive" if spread > 1 else "uniform")
    num_bytes = tier_bytes(ours)
    alike = max(1, num_bytes // full_bytes(few_layers(shape, 1), 1))
    full = 256 if is_smoke else FULL_TOKENS
    unlike = f" heads {spread}x" if spread > 1 else ""
    alike_bytes: dict[str, Any] = {
        f"ours {format}{unlike}": partial(packed, tokens, format, spread),
        "ours 16bit, same bytes": partial(packed, alike, "16bit", 1),
    }
    if spread == 1:
        alike_bytes[UNFUSED] = partial(unfused, tokens, format)
    backends = tuple(BACKENDS) if device.type == "cuda" else ("math",)
    alike_bytes |= {f"sdpa {name}, same bytes": partial(dense, alike, name) for name in backends}
    groups = [alike_bytes, *({f"sdpa {name}, full cache of {full}": partial(dense, full, name)} for name in backends)]
    groups.append({QUANTIZED_CACHE: partial(quantized_cache, tokens)})
    where = {"batch": batch, "tokens": tokens, "case": format, "spread": spread}
    for group in groups:  # those of a group are timed in turns, and share the memory
        made: dict[str, Made] = {}
        for name, make in group.items():
            wanted = 2 if is_smoke else 32
            rows.attempt({**where, "what": name}, partial(build, made, name, make, batch, device, wanted, len(group)))
        try:
            times = timed({name: each.call for name, each in made.items()}, device, repeats, EAGER)
        except torch.cuda.OutOfMemoryError:
            for name in made:
                rows.add(**where, what=name, note="does not fit beside the others")
            continue
        for name, each in made.items():
            num_layers, taken = each.num_layers, times[name]
            for key in ("p20_us", "p50_us", "p80_us"):
                taken[key] /= num_layers
            speed = each.row_bytes * batch / taken["p50_us"] / 1e3
            rows.add(
                **where, what=name, layers=num_layers, bytes=each.row_bytes * batch, **taken, gb_per_s=speed,
                copy_share=speed / copy,
            )  # fmt: skip


@dataclass(frozen=True)
class Made:
    """What is timed: attention over one layer's cache after the other, each of so many bytes a sequence."""

    call: Call
    row_bytes: int
    num_layers: int


def build(
    made: dict[str, Made], name: str, make: Any, batch: int, device: torch.device, wanted: int, sharing: int
) -> dict[str, Any] | None:
    """Make a call and try it once. A row for what cannot be timed, else None."""
    one = make(batch, device, wanted, sharing)
    if isinstance(one, str):
        return {"note": one}
    one.call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    made[name] = one
    return None


def tier_bytes(plan: Any) -> int:
    """A layer's bytes of one sequence without its reserve: what attention has to read."""
    shape = plan.model.shape
    reserve_format, _ = plan.holdings(0)[-1]
    whole = layer_bytes(plan.holdings(0), shape.num_kv_heads, shape.head_size, False)
    return whole - layer_bytes(((reserve_format, 4),), shape.num_kv_heads, shape.head_size, False)


def how_many_layers(bytes_a_layer: int, device: torch.device, wanted: int, sharing: int) -> int:
    """`wanted`, or as many more as hold eight times the L2 cache, as far as they fit in a part of two thirds of the
    memory. Raises what says that not one does."""
    if device.type == "cuda":
        wanted = max(wanted, -(-8 * torch.cuda.get_device_properties(device).L2_cache_size // max(1, bytes_a_layer)))
    fitting = total_bytes(device) * 2 // 3 // sharing // max(1, bytes_a_layer)
    if fitting < 1:
        raise torch.cuda.OutOfMemoryError(f"a layer takes {bytes_a_layer} bytes")
    return min(wanted, fitting)


def packed(tokens: int, format: str, spread: int, batch: int, device: torch.device, wanted: int, sharing: int) -> Made:
    """Our decode attention over one layer's cache after the other: the kernels, or on a CPU the reference path."""
    shape = KNOWN_MODELS["mistral-7b"].shape
    one = make_plan(few_layers(shape, 1), tokens, format, "bfloat16", "adaptive" if spread > 1 else "uniform")
    layout = make_ledger(one).layers[0]
    num_layers = how_many_layers(batch * layout.stored_bytes, device, wanted, sharing)
    block = random_block(one, layout, batch, device, spread)
    blocks = [block, *(block.clone() for _ in range(num_layers - 1))]
    queries = torch.randn(num_layers, batch, shape.num_query_heads, 1, shape.head_size, device=device).bfloat16()
    scaling = shape.head_size**-0.5
    if not use_kernels(device):
        new = torch.randn(2, batch, shape.num_kv_heads, 1, shape.head_size, device=device).bfloat16()
        layers = [PackedLayer(one, layout, block) for block in blocks]
        prompt = [tokens] * batch

        def call() -> None:
            for query, layer in zip(queries, layers, strict=True):
                layer.attend(query, *new, 0, prompt, scaling, None)

    else:
        from qpkv_kernels import ops
        from qpkv_runtime.decode_step import Counters, DecodeStep

        step, counters = DecodeStep.of(one, 0, device), Counters.of([tokens] * batch, 0, 1, device)

        def call() -> None:
            for query, block in zip(queries, blocks, strict=True):
                ops.attend(
                    query[:, :, 0], block, step.places, counters.prompt, counters.appended, step.layout, 0, scaling,
                    None, 0,
                )  # fmt: skip

    return Made(call, tier_bytes(one), num_layers)


def unfused(tokens: int, format: str, batch: int, device: torch.device, wanted: int, sharing: int) -> Made:
    """Dequantize a layer to bfloat16 in PyTorch, then SDPA over it."""
    shape = KNOWN_MODELS["mistral-7b"].shape
    one = make_plan(few_layers(shape, 1), tokens, format, "bfloat16")
    layout = make_ledger(one).layers[0]
    num_layers = how_many_layers(batch * layout.stored_bytes, device, min(wanted, 8), sharing)
    block = random_block(one, layout, batch, device)
    layers = [PackedLayer(one, layout, block.clone()) for _ in range(num_layers)]
    entries, query = layers[0].table()[:, :, 0], _query(batch, device)
    from qpkv_runtime.compression import read_vectors

    def call() -> None:
        for layer in layers:
            vectors = read_vectors(layer.block, layout, shape.num_kv_heads, shape.head_size, torch.bfloat16)
            keys, values, _ = layer.read(0, entries, vectors)
            F.scaled_dot_product_attention(query, keys.bfloat16(), values.bfloat16(), enable_gqa=True)

    return Made(call, tier_bytes(one), num_layers)


def dense(tokens: int, backend: str, batch: int, device: torch.device, wanted: int, sharing: int) -> Made | str:
    """SDPA by one of its backends over dense bfloat16 caches."""
    shape = KNOWN_MODELS["mistral-7b"].shape
    size = (batch, shape.num_kv_heads, tokens, shape.head_size)
    row_bytes = 4 * shape.num_kv_heads * tokens * shape.head_size
    num_layers, query = how_many_layers(batch * row_bytes, device, wanted, sharing), _query(batch, device)
    caches = [[torch.randn(size, device=device, dtype=torch.bfloat16) for _ in "kv"] for _ in range(num_layers)]

    def call() -> None:
        with sdpa_kernel(BACKENDS[backend]):
            for keys, values in caches:
                F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    try:
        call()
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return f"not for these shapes: {str(error).splitlines()[0]}"
    return Made(call, row_bytes, num_layers)


def quantized_cache(tokens: int, batch: int, device: torch.device, wanted: int, sharing: int) -> Made | str:
    """transformers' QuantizedCache at 4 bit, groups of 64 in KIVI's directions: an update, which dequantizes all of a
    layer, and SDPA."""
    if importlib.util.find_spec("optimum") is None or importlib.util.find_spec("optimum.quanto") is None:
        return "not installed: optimum-quanto"
    from transformers import MistralConfig, QuantizedCache

    shape = KNOWN_MODELS["mistral-7b"].shape
    values = shape.num_kv_heads * (tokens - tokens % 64) * shape.head_size
    row_bytes = 2 * (values // 2 + values // 64 * 4)
    num_layers = how_many_layers(batch * row_bytes, device, min(wanted, 4), sharing)
    config = MistralConfig(
        num_hidden_layers=num_layers, num_attention_heads=shape.num_query_heads,
        num_key_value_heads=shape.num_kv_heads, head_dim=shape.head_size, sliding_window=None,
    )  # fmt: skip
    cache = QuantizedCache("quanto", config, nbits=4, axis_key=-1, axis_value=0, q_group_size=64, residual_length=10**9)
    size = (batch, shape.num_kv_heads, tokens - tokens % 64, shape.head_size)
    for layer in range(num_layers):
        cache.update(*(torch.randn(size, device=device, dtype=torch.bfloat16) for _ in "kv"), layer)
    new, query = [torch.randn(*size[:2], 1, size[3], device=device).bfloat16() for _ in "kv"], _query(batch, device)

    def call() -> None:
        for layer in range(num_layers):
            keys, values = cache.update(*new, layer)
            F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    return Made(call, row_bytes, num_layers)


def _query(batch: int, device: torch.device) -> torch.Tensor:
    shape = KNOWN_MODELS["mistral-7b"].shape
    return torch.randn(batch, shape.num_query_heads, 1, shape.head_size, device=device).bfloat16()


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
