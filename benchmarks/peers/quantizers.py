"""What HQQ and quanto make of a small fixed tensor, as numbers that our tests compare with.

    python -m venv env && env/bin/pip install torch --index-url <a CPU index>
    env/bin/pip install -r benchmarks/peers/quantizers-requirements.txt
    env/bin/python benchmarks/peers/quantizers.py > tests/fixtures/peer_quantizers.json

Their packages are needed here only, never by the tests. x is [1, 2, 64, 64] in float16 (heads, tokens, channels):
heavy-tailed values, channels of different size and offset. For HQQ its mean and its root mean square error, for the
groups that our quantizers have (rows of a matrix) and for the two reshapes of transformers' HQQ cache. For quanto the
values that are read back, of head 0's first 16 tokens and 32 channels.
"""

from __future__ import annotations

import json
import sys
from importlib import metadata

import torch
from hqq.core.quantize import Quantizer
from optimum.quanto import MaxOptimizer, qint2, qint4, quantize_weight

GROUP = 64


def make_input() -> torch.Tensor:
    """float16 [1, 2, 64, 64]; `tests/test_quantizer_peers.py` makes the same."""
    x = torch.randn(1, 2, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    x = x * x.abs()
    return (x * torch.logspace(-1, 0.5, 64) + torch.linspace(-2, 2, 64)).half()


def hqq(x: torch.Tensor, bits: int, axis: int, number: torch.dtype) -> torch.Tensor:
    """x as the library groups it itself: axis 1 takes 64 values in a row, axis 0 is `x.reshape(64, -1)`'s columns.

    number: the type in which scale and zero are kept, as the cache does with the model's type.
    """
    codes, meta = Quantizer.quantize(
        x, nbits=bits, group_size=GROUP, axis=axis, bitpack=False, device="cpu", compute_dtype=torch.float32
    )
    meta.update({name: meta[name].to(number).float() for name in ("scale", "zero")})
    return Quantizer.dequantize(codes, meta).float()


def quanto(x: torch.Tensor, bits: int, axis: int) -> torch.Tensor:
    """As transformers' QuantoQuantizedLayer does it."""
    qtype = {2: qint2, 4: qint4}[bits]
    scale, shift = MaxOptimizer()(x, qtype, axis, GROUP)
    return quantize_weight(x, qtype, axis, scale, shift, GROUP).dequantize().float()


def main() -> int:
    x = make_input()
    exact = x.float()
    layouts = {
        "token": (exact, 1),  # 64 channels of one token; transformers' axis_key=1
        "channel": (exact.transpose(-1, -2).contiguous(), 1),  # 64 tokens of one channel: KIVI's keys
        "strided": (exact, 0),  # transformers' axis_value=0
    }
    errors = {}
    for name, (tensor, axis) in layouts.items():
        for bits in (8, 4, 3, 2, 1):
            for number in (torch.float32, torch.float16):
                error = hqq(tensor, bits, axis, number) - tensor
                errors[f"{name}-{bits}-{str(number).removeprefix('torch.')}"] = {
                    "mean": error.abs().mean().item(),
                    "root_mean_square": error.square().mean().sqrt().item(),
                }
    read = {
        f"{side}-{bits}": quanto(exact, bits, axis)[0, 0, :16, :32].flatten().tolist()
        for side, axis in (("key", -1), ("value", 0))
        for bits in (4, 2)
    }
    versions = {name: metadata.version(name) for name in ("hqq", "optimum-quanto", "torch")}
    result = {"versions": versions, "input_sum": exact.double().sum().item(), "hqq": errors, "quanto": read}
    rounded = json.loads(json.dumps(result), parse_float=lambda text: float(f"{float(text):.7g}"))
    json.dump(rounded, sys.stdout, indent=1, sort_keys=True)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
