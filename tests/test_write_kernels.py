"""The kernels that write a prompt's kept tokens, in Triton's interpreter where there is no GPU, against the PyTorch
reference: the same bytes of the whole block, poisoned before.

Head vectors have sums in float64 whose order differs; they are compared like the rest.
"""

from __future__ import annotations

import pytest
import torch
from test_decode_kernel import DEVICE, RESERVE, fmt
from test_ledger import make_shape
from torch import Tensor

from qpkv_kernels import quantize
from qpkv_runtime.backend import writes_with_kernels
from qpkv_runtime.compression import Selection, compress
from qpkv_runtime.errors import BackendError, NumericsError
from qpkv_runtime.ledger import Holdings, layer_ledger
from qpkv_runtime.plan import Format

STORAGE = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


def random_prompt(batch: int, heads: int, tokens: int, head_size: int, seed: int, source: torch.dtype) -> list[Tensor]:
    """Keys with offsets and sizes per channel, as real ones, values with a few large ones; on a prompt's strides."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, batch, tokens, heads, head_size, generator=generator)
    sizes = torch.logspace(-2, 1, head_size)[torch.randperm(head_size, generator=generator)]
    keys = keys * sizes + torch.randn(heads, head_size, generator=generator) * 3
    values[torch.rand(values.shape, generator=generator) < 0.01] *= 20
    return [x.to(DEVICE, source).transpose(1, 2) for x in (keys, values)]


def random_selections(
    holdings: Holdings, batch: int, heads: int, tokens: int, missing: int, seed: int
) -> list[Selection]:
    """Any rows in ascending order; up to `missing` fewer than a tier has room for, in some heads."""
    generator, selections = torch.Generator().manual_seed(seed), []
    for _, held in holdings[:-1]:
        sizes = torch.as_tensor(held).expand(batch, heads)
        most = int(sizes.max())
        counts = (sizes - torch.randint(0, missing + 1, (batch, heads), generator=generator)).clamp(min=0)
        rows = torch.rand(batch, heads, tokens, generator=generator).argsort(-1)[..., :most].sort(-1).values
        rows = rows.masked_fill(torch.arange(most) >= counts[..., None], 0)
        selections.append(Selection(rows.to(DEVICE), counts.to(DEVICE)))
    return selections


def blocks_of(
    holdings: Holdings, monkeypatch: pytest.MonkeyPatch, heads: int = 2, head_size: int = 64, batch: int = 1,
    tokens: int = 150, missing: int = 0, source: torch.dtype = torch.float16, storage: torch.dtype = torch.float16,
    window: int | None = None, seed: int = 0, padding: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(by the reference, by the kernels): one block, written over the same poison. The reference writes it twice, over
    different ones, to show how much of it is written at all."""
    ledger = layer_ledger(0, holdings, make_shape(heads, head_size, (window,)))
    keys, values = random_prompt(batch, heads, tokens, head_size, seed, source)
    selections = random_selections(holdings, batch, heads, tokens, missing, seed)
    stats = torch.rand(batch, heads, 2, head_size, generator=torch.Generator().manual_seed(seed)).to(DEVICE) + 0.1
    written = []
    for backend, poison in (("reference", 0xAA), ("reference", 0x55), ("triton", 0x55)):
        monkeypatch.setenv("QPKV_BACKEND", backend)
        assert writes_with_kernels(ledger, DEVICE) == (backend == "triton")
        block = torch.full((batch, ledger.stored_bytes), poison, dtype=torch.uint8, device=DEVICE)
        compress(block, ledger, STORAGE[storage], keys, values, selections, [padding] * batch, stats)
        written.append(block)
    assert int((written[0] == written[1]).sum()) > 100, "the reference wrote little"
    return written[1], written[2]


def assert_same_bytes(holdings: Holdings, monkeypatch: pytest.MonkeyPatch, **settings) -> None:
    reference, kernels = blocks_of(holdings, monkeypatch, **settings)
    different = (reference != kernels).nonzero()
    assert len(different) == 0, f"{len(different)} of {reference.numel()} bytes differ, from {different[0].tolist()} on"


FORMATS: dict[str, Format] = {
    "16bit": fmt("16bit"),
    "flexgen8": fmt("flexgen8/64", "flexgen4/32"),
    "flexgen3": fmt("flexgen3/64", "flexgen1/16"),
    "flexgen2": fmt("flexgen2/32"),
    "kivi8": fmt("kivi8/30", "kivi8/64"),
    "kivi4": fmt("kivi4/64"),
    "kivi3": fmt("kivi3/48"),
    "kivi2": fmt("kivi2/32"),
    "kivi1": fmt("kivi1/64", "16bit"),
    "mikv4": fmt("mikv4/64", "mikv2/64"),
    "rotated8": fmt("rotated8", "rotated1"),
    "rotated4": fmt("rotated4", "rotated2"),
    "rotated3": fmt("rotated3", "kivi4/64"),
    "rotated2": fmt("rotated2", "flexgen4/64"),
}


def reserve_of(format: Format) -> tuple[Format, int]:
    return (fmt("16bit"), 7) if format.keys.quantizer == "mikv" else RESERVE


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_written_byte_for_byte(name: str, storage: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    source = torch.float32 if name.endswith(("4", "1")) else storage
    holdings = ((FORMATS[name], 75), reserve_of(FORMATS[name]))
    assert_same_bytes(holdings, monkeypatch, heads=1, missing=9, source=source, storage=storage)


@pytest.mark.parametrize("head_size", [80, 96, 128, 256])
@pytest.mark.parametrize("keys", ["kivi2", "rotated4"])
def test_head_sizes(keys: str, head_size: int, monkeypatch: pytest.MonkeyPatch):
    group = {80: 16, 96: 48}.get(head_size, 64)
    side = f"{keys}/32" if keys == "kivi2" else keys
    assert_same_bytes(((fmt(side, f"flexgen4/{group}"), 33), RESERVE), monkeypatch, heads=1, head_size=head_size)


@pytest.mark.parametrize(("tokens", "missing"), [(1, 0), (1, 1), (63, 0), (65, 3), (40, 40)])
def test_one_token_partial_groups_and_heads_that_hold_nothing(tokens, missing, monkeypatch):
    holdings = ((fmt("kivi4/48"), tokens), (fmt("rotated2"), tokens), RESERVE)
    assert_same_bytes(holdings, monkeypatch, missing=missing, seed=3)


def test_heads_of_their_own_counts_and_empty_tiers(monkeypatch):
    holdings = ((fmt("16bit"), (4, 0, 8)), (fmt("rotated3"), (0, 40, 8)), (fmt("kivi2/16"), (24, 8, 0)), RESERVE)
    assert_same_bytes(holdings, monkeypatch, heads=3, batch=2)


def test_sliding_layers_store_positions(monkeypatch):
    for format in (fmt("flexgen4/64"), fmt("kivi4/32")):
        assert_same_bytes(((format, 40), RESERVE), monkeypatch, window=200, missing=7, padding=5)


@pytest.mark.parametrize("size", [2.0**-22, 2.0**11])
def test_scales_at_the_ends_of_float16(size: float, monkeypatch: pytest.MonkeyPatch):
    """Where scales are subnormal or zero, and where the sums of a Hadamard transform come near overflow."""
    original = random_prompt
    monkeypatch.setitem(globals(), "random_prompt", lambda *a: [x * size for x in original(*a)])
    for format in (fmt("rotated3"), fmt("kivi2/32", "flexgen4/64")):
        assert_same_bytes(((format, 24), RESERVE), monkeypatch, heads=1, source=torch.float32, storage=torch.bfloat16)
        if size < 1:
            assert_same_bytes(((format, 24), RESERVE), monkeypatch, heads=1, source=torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("values", ["16bit", "flexgen8/16", "rotated4", "flexgen3/16", "rotated2", "rotated1"])
@pytest.mark.parametrize("keys", ["16bit", "kivi8/32", "kivi4/64", "rotated3", "kivi2/32", "flexgen1/16", "mikv2/16"])
def test_every_pair_of_formats(keys: str, values: str, head_size: int, monkeypatch: pytest.MonkeyPatch):
    format = fmt(keys, values)
    for seed, storage in enumerate(STORAGE):
        holdings = ((format, 141), reserve_of(format))
        settings = {"head_size": head_size, "missing": 30, "tokens": 200, "storage": storage, "seed": seed}
        assert_same_bytes(holdings, monkeypatch, source=torch.float32, **settings)


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(
    ("side", "value", "message"),
    [
        (0, float("nan"), "key must be finite to be stored, but has NaN or Inf$"),
        (1, float("inf"), "value must be finite to be stored, but has NaN or Inf$"),
        (1, 7e4, "value must be finite to be stored, but overflows float16; plan with storage_dtype bfloat16"),
    ],
)
def test_a_kept_number_that_cannot_be_stored_is_named_alike(backend, side, value, message, monkeypatch):
    monkeypatch.setenv("QPKV_BACKEND", backend)
    ledger = layer_ledger(0, ((fmt("kivi4/64"), 8), RESERVE), make_shape(1, 64, (None,)))
    sides = random_prompt(1, 1, 20, 64, 0, torch.float32)
    sides[side][0, 0, 9, 3] = value
    block = torch.zeros(1, ledger.stored_bytes, dtype=torch.uint8, device=DEVICE)
    rows, counts = torch.arange(2, 10, device=DEVICE)[None, None], torch.full((1, 1), 8, device=DEVICE)
    stats = torch.ones(1, 1, 2, 64, device=DEVICE)
    with pytest.raises(NumericsError, match=f"^layer 0: {message}"):
        compress(block, ledger, "float16", *sides, [Selection(rows, counts)], [0], stats)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_scale_that_overflows_is_named_alike_by_both_backends(backend, monkeypatch):
    monkeypatch.setenv("QPKV_BACKEND", backend)
    ledger = layer_ledger(0, ((fmt("rotated1"), 8), RESERVE), make_shape(1, 64, (None,)))
    sides = [torch.full((1, 1, 8, 64), 6e4, device=DEVICE) for _ in range(2)]
    block = torch.zeros(1, ledger.stored_bytes, dtype=torch.uint8, device=DEVICE)
    rows, counts = torch.arange(8, device=DEVICE)[None, None], torch.full((1, 1), 8, device=DEVICE)
    stats = torch.ones(1, 1, 2, 64, device=DEVICE)
    with pytest.raises(NumericsError, match=r"layer 0: value must have finite scales.*float16"):
        compress(block, ledger, "float16", *sides, [Selection(rows, counts)], [0], stats)


def test_a_kernel_that_fails_is_named_with_layer_shape_and_format(monkeypatch):
    monkeypatch.setenv("QPKV_BACKEND", "triton")

    def fail(*arguments, **settings):
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(quantize, "write_tier", fail)
    ledger = layer_ledger(3, ((fmt("kivi4/64"), 8), RESERVE), make_shape(1, 64, (None,) * 4))
    block = torch.zeros(1, ledger.stored_bytes, dtype=torch.uint8, device=DEVICE)
    selection = Selection(
        torch.zeros(1, 1, 8, dtype=torch.int64, device=DEVICE), torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    )
    expected = r"layer 3.*\(1, 1, 20, 64\).*kivi 4 bit group 64.*RuntimeError: out of resource.*QPKV_BACKEND=reference"
    sides = random_prompt(1, 1, 20, 64, 0, torch.float16)
    with pytest.raises(BackendError, match=expected):
        compress(block, ledger, "float16", *sides, [selection], [0], torch.ones(1, 1, 2, 64, device=DEVICE))


@pytest.mark.parametrize(
    ("format", "message"),
    [
        (fmt("kivi2/12", "rotated2"), "whole words, which hold 8 tokens at 2 bit, got groups of 12"),
        (fmt("kvquant4"), "kvquant 4 bit"),
        (fmt("paper_hqq4/64"), "groups that run across heads"),
    ],
)
def test_what_the_kernels_do_not_write_is_named_with_the_way_out(format, message, monkeypatch):
    with pytest.raises(BackendError, match=rf"layer 0.*{message}.*QPKV_BACKEND=reference"):
        blocks_of(((format, 40), RESERVE), monkeypatch, heads=1)


def test_hqq_is_fitted_in_pytorch(monkeypatch):
    monkeypatch.setenv("QPKV_BACKEND", "triton")
    ledger = layer_ledger(0, ((fmt("rotated4"), 8), (fmt("hqq4/64"), 8), RESERVE), make_shape(1, 64, (None,)))
    assert not writes_with_kernels(ledger, DEVICE)
