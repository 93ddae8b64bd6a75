"""Appending by the kernel, in Triton's interpreter where there is no GPU, against the runtime's own append: every byte
of the block is the same after every token, whatever stood in it before."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_decode_kernel import DEVICE, counters, fmt, make_block
from test_ledger import make_shape

from qpkv_kernels import append
from qpkv_runtime.compression import read_vectors
from qpkv_runtime.decode_step import Counters
from qpkv_runtime.errors import NumericsError
from qpkv_runtime.ledger import layer_ledger
from qpkv_runtime.packed import PackedLayer
from qpkv_runtime.plan import Decode
from qpkv_runtime.quantizers import CLIPS

RING = 5
TIER = (fmt("16bit"), 4)


def tokens(count: int, heads: int, head_size: int, dtype: torch.dtype) -> torch.Tensor:
    """[count, 2, 1, heads, D]: nothing, a constant, halves of steps, the tiny, then anything from small to large."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(count, 2, 1, heads, head_size, generator=generator)
    x *= 4.0 ** torch.randint(-3, 4, (count, 1, 1, 1, 1), generator=generator)
    steps = torch.randint(0, 31, x.shape[1:], generator=generator) / 2
    for i, special in enumerate((torch.zeros_like(x[0]), torch.full_like(x[0], 3.0), steps, 2.0**-20 * x[3])):
        x[i + 2] = special
    return x.to(DEVICE, dtype)


def append_both(name: str, heads: int, head_size: int, dtype: torch.dtype, window: int | None, count: int) -> None:
    formats = name.split("+")
    reserve = fmt(*formats)
    holdings = ((TIER[0] if "rotated" not in name and "mikv" not in name else reserve, 4), (reserve, RING))
    block, layout, places = make_block(holdings, heads, 2, head_size, dtype, window=window, batch=1)
    ledger = layer_ledger(0, holdings, make_shape(heads, head_size, (window,), 2))
    for head in range(heads):
        for buffer in ledger.segment(head, -1).buffers.values():  # what other tokens' fields held must stay
            garbage = torch.randint(0, 256, (buffer.size_bytes,), generator=torch.Generator().manual_seed(head))
            block[:, buffer.offset : buffer.offset + buffer.size_bytes] = garbage.to(torch.uint8)
    model = SimpleNamespace(num_kv_heads=heads, head_size=head_size, storage_dtype=layout.number)
    plan: Any = SimpleNamespace(
        formats={"reserve": reserve}, decode=Decode(reserve_tokens=RING, format="reserve"), model=model
    )
    expected = block.clone()
    reference = PackedLayer(plan, ledger, expected)
    vectors = read_vectors(expected, ledger, heads, head_size, dtype)
    problems = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    for i, (key, value) in enumerate(tokens(count, heads, head_size, dtype)):
        encoded = (reference._encode_new(s, x[:, :, None], vectors) for s, x in (("key", key), ("value", value)))
        reference._append(*encoded, i, [30])
        append.append(key, value, block, layout, places, *counters(1, 30, i), problems, 2.0**60, CLIPS)
        different = (block != expected).nonzero()[:, 1].tolist()
        assert not different, f"token {i}: bytes {different[:8]} of {dict(ledger.buffers())}"
    assert not bool(problems.any())


@pytest.mark.parametrize(
    "name",
    [
        "16bit", "flexgen8/64", "flexgen4/32", "flexgen3/64", "flexgen2/64", "flexgen1/64", "mikv4/64+flexgen4/64",
        "rotated8", "rotated4", "rotated3", "rotated2", "rotated1", "rotated4+16bit",
    ],
)  # fmt: skip
def test_every_format_of_a_reserve_is_written_bit_for_bit(name: str):
    append_both(name, 1, 64, torch.float16, None, RING + 2)


@pytest.mark.parametrize("name", ["16bit", "flexgen4/64", "rotated4"])
def test_bfloat16_is_rounded_to_nearest(name: str):
    append_both(name, 1, 64, torch.bfloat16, None, RING + 2)


@pytest.mark.parametrize(
    ("name", "head_size"), [("flexgen3/16", 80), ("rotated3", 80), ("rotated4", 96), ("rotated2", 256)]
)
def test_head_sizes_and_sliding_windows(name: str, head_size: int):
    append_both(name, 2, head_size, torch.float16, 9, 7)


@pytest.mark.slow
@pytest.mark.parametrize("head_size", [16, 32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize("quantizer", ["flexgen", "rotated", "mikv"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_width_and_head_size(quantizer: str, bits: int, head_size: int, dtype: torch.dtype):
    group = "" if quantizer == "rotated" else "/16"
    name = f"{quantizer}{bits}{group}"
    append_both(name if quantizer != "mikv" else f"{name}+flexgen{bits}/16", 2, head_size, dtype, None, 12)


@pytest.mark.parametrize(
    ("side", "wrong", "message"),
    [
        (0, float("nan"), "layer 1: key must be finite"),
        (1, float("inf"), "layer 1: value must be finite"),
        (1, 7e4, "layer 1: value must be finite.*overflows float16.*bfloat16"),
    ],
)
def test_what_cannot_be_stored_is_an_error_that_names_layer_and_tensor(side: int, wrong: float, message: str):
    block, layout, places = make_block((TIER, (fmt("flexgen4/64"), RING)), 1, 2, 64, torch.float16, batch=1)
    sides = torch.randn(2, 1, 1, 64, device=DEVICE)
    sides[side, 0, 0, 5] = wrong
    counted = Counters.of([30], 0, 3, DEVICE)
    append.append(*sides, block, layout, places, counted.prompt, counted.appended, counted.problems[1], 65504.0, CLIPS)
    with pytest.raises(NumericsError, match=message):
        counted.check("float16")
