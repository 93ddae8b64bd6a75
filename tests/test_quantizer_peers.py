"""Our quantizers against the numbers that HQQ and quanto gave for the same tensor, groups and bits.

`benchmarks/peers/quantizers.py` ran the libraries and wrote the fixture.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qpkv_runtime.plan import TensorFormat
from qpkv_runtime.quantizers import KEY_QUANTIZERS, VALUE_QUANTIZERS, Quantizer

PEERS = json.loads((Path(__file__).parent / "fixtures" / "peer_quantizers.json").read_text(encoding="utf-8"))
GROUP = 64
HQQ = {  # layout of the groups -> which of ours has it
    "token": (KEY_QUANTIZERS["paper_hqq"], "paper_hqq"),
    "channel": (KEY_QUANTIZERS["hqq"], "hqq"),
    "strided": (VALUE_QUANTIZERS["paper_hqq"], "paper_hqq"),
}


def make_input() -> Tensor:
    """As in the script."""
    x = torch.randn(1, 2, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    x = x * x.abs()
    return (x * torch.logspace(-1, 0.5, 64) + torch.linspace(-2, 2, 64)).half()


def read_back(quantizer: Quantizer, name: str, bits: int, x: Tensor) -> Tensor:
    """x written and read. Scales are of x's type: float32 shows the algorithm alone, float16 what a plan stores."""
    format = TensorFormat.model_validate({"quantizer": name, "bits": bits, "group": GROUP})
    return quantizer.decode(quantizer.encode(x, torch.ones(1, 2, 64, dtype=torch.bool), format, None), format, None)


def test_the_input_is_the_one_the_peers_were_given():
    assert make_input().double().sum().item() == pytest.approx(PEERS["input_sum"], rel=1e-6)


@pytest.mark.parametrize("layout", HQQ)
@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize("measure", ["mean", "root_mean_square"])
def test_our_hqq_errs_as_much_as_hqq_does(layout, bits, measure):
    """Within 2 %, with scales and zeros in float32 and in float16."""
    quantizer, name = HQQ[layout]
    for number in (torch.float32, torch.float16):
        x = make_input().to(number)
        error = read_back(quantizer, name, bits, x) - x.float()
        got = (error.abs().mean() if measure == "mean" else error.square().mean().sqrt()).item()
        theirs = PEERS["hqq"][f"{layout}-{bits}-{str(number).removeprefix('torch.')}"][measure]
        print(f"{number}: ours {got:.5f}, theirs {theirs:.5f}, {got / theirs - 1:+.2%}")
        assert abs(got / theirs - 1) <= 0.02


@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize("bits", [4, 2])
def test_kivi_reads_back_what_quanto_does(side, bits):
    """KIVI's layout is quanto's axis_key=-1, axis_value=0: the same values, to float32's rounding."""
    quantizer = (KEY_QUANTIZERS if side == "key" else VALUE_QUANTIZERS)["kivi"]
    got = read_back(quantizer, "kivi", bits, make_input().float())[0, 0, :16, :32].flatten()
    assert torch.allclose(got, torch.tensor(PEERS["quanto"][f"{side}-{bits}"]), rtol=1e-5, atol=1e-5)
