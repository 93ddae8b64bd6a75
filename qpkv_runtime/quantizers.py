"""The quantizers: how a kept token's keys and values become codes and scales, and back.

Each turns one side's tensor x [B, H_kv, S, D], in the plan's 16-bit type, into codes (uint8, or that type itself) and
scales, zeros, means and balancers, also in that type, and decodes them to float32. Encoding uses the scales as stored,
so decode(encode(x)) is what attention sees. Slots that hold no token (`valid` false) never move a scale. Facts (widths,
axes, groups) are in `methods.py`.

The min-max code (eq. 4-5 of arXiv 2412.12706): zero = min, scale = (max - min) / (2**bits - 1),
code = round((x - zero) / scale).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qpkv_kernels.hadamard import hadamard, hadamard_product
from qpkv_runtime.plan import TensorFormat


@dataclass(frozen=True)
class Encoded:
    """codes: uint8 (or 16-bit) [B, H_kv, S, D]; scales: 16-bit [B, H_kv, numbers], empty at 16 bit."""

    codes: Tensor
    scales: Tensor


class Quantizer(Protocol):
    """What every quantizer does. `vectors` is [B, H_kv, head_vectors, D] 16-bit, for keys of those that need it."""

    def encode(self, x: Tensor, valid: Tensor, format: TensorFormat, vectors: Tensor | None) -> Encoded:
        """x: 16-bit [B, H_kv, S, D], zero where not `valid` (bool [B, H_kv, S])."""
        ...

    def decode(self, encoded: Encoded, format: TensorFormat, vectors: Tensor | None) -> Tensor:
        """-> float32 [B, H_kv, S, D]."""
        ...


def _affine_encode(groups: Tensor, member: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """groups: 16-bit [..., G], member: bool, the same shape -> codes [..., G], (scale, zero) [..., 2] in that type.

    A constant group has scale 0 and is exact; a group without members is all zero.
    """
    number, groups = groups.dtype, groups.float()
    low = groups.masked_fill(~member, float("inf")).amin(-1)
    high = groups.masked_fill(~member, float("-inf")).amax(-1)
    is_empty = low > high
    zero = low.masked_fill(is_empty, 0).to(number)
    scale = ((high - low).masked_fill(is_empty, 0) / (2**bits - 1)).to(number)
    divisor = scale.float().masked_fill(scale == 0, 1)[..., None]
    codes = ((groups - zero.float()[..., None]) / divisor).round_().clamp_(0, 2**bits - 1)
    codes = codes.masked_fill_((scale == 0)[..., None] | ~member, 0)
    return codes.to(torch.uint8), torch.stack([scale, zero], -1)


def _affine_decode(codes: Tensor, numbers: Tensor) -> Tensor:
    """codes [..., G], numbers [..., 2] -> float32 [..., G]."""
    scale, zero = numbers.float().unbind(-1)
    return codes.float() * scale[..., None] + zero[..., None]


def _in_groups(x: Tensor, group: int) -> Tensor:
    """[..., N] -> [..., ceil(N / group), group], the last group filled up with zeros (or False)."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % group))
    return padded.reshape(*x.shape[:-1], -1, group)


class Flexgen:
    """Min-max codes per token, groups of `group` channels (arXiv 2303.06865). Scales are [S, D / group, 2]."""

    def encode(self, x: Tensor, valid: Tensor, format: TensorFormat, vectors: Tensor | None) -> Encoded:
        group = min(format.group or x.shape[-1], x.shape[-1])
        member = _in_groups(valid[..., None].expand(x.shape), group)
        codes, numbers = _affine_encode(_in_groups(x, group), member, format.bits)
        return Encoded(codes.flatten(-2)[..., : x.shape[-1]], numbers.flatten(2))

    def decode(self, encoded: Encoded, format: TensorFormat, vectors: Tensor | None) -> Tensor:
        *_, num_tokens, head_size = encoded.codes.shape
        group = min(format.group or head_size, head_size)
        numbers = encoded.scales.unflatten(-1, (num_tokens, -1, 2))
        return _affine_decode(_in_groups(encoded.codes, group), numbers).flatten(-2)[..., :head_size]


class KiviKeys:
    """Min-max codes per channel, groups of `group` consecutive kept tokens, keys after RoPE (arXiv 2402.02750).

    The last group may be partial and has its own scale. Differs from the paper: no 16-bit residual, which a small
    budget cannot pay; appended tokens go to the reserve's per-token format. Scales are [D, S / group, 2].
    """

    def encode(self, x: Tensor, valid: Tensor, format: TensorFormat, vectors: Tensor | None) -> Encoded:
        group, num_tokens = format.group or x.shape[-2], x.shape[-2]
        channels = _in_groups(x.transpose(-1, -2), group)  # [B, H_kv, D, S / G, G]
        member = _in_groups(valid[..., None, :].expand(*x.shape[:2], x.shape[-1], num_tokens), group)
        codes, numbers = _affine_encode(channels, member, format.bits)
        return Encoded(codes.flatten(-2)[..., :num_tokens].transpose(-1, -2).contiguous(), numbers.flatten(2))

    def decode(self, encoded: Encoded, format: TensorFormat, vectors: Tensor | None) -> Tensor:
        *_, num_tokens, head_size = encoded.codes.shape
        group = format.group or num_tokens
        numbers = encoded.scales.unflatten(-1, (head_size, -1, 2))
        x = _affine_decode(_in_groups(encoded.codes.transpose(-1, -2), group), numbers)
        return x.flatten(-2)[..., :num_tokens].transpose(-1, -2)


def _in_steps(x: Tensor, scale: Tensor) -> Tensor:
    """x in steps of `scale` from the midpoint above zero; zero where the scale is."""
    inverse = 1 / scale.float().masked_fill(scale == 0, float("inf"))
    return (x * inverse).sub_(0.5)


CLIPS = {8: (1.0,), 4: (1.0, 0.9, 0.8, 0.7), 3: (1.0, 0.9, 0.8, 0.7, 0.6), 2: (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.42)}


class Rotated:
    """Hadamard-rotated symmetric codes with one searched scale per token (after QuaRot, arXiv 2404.00456).

    Keys, after RoPE, are centred and balanced first: x = H(gamma * (k - mu)), mu the mean of the head's kept keys and
    gamma = (E q**2 / E (k - mu)**2) ** (1/4) per channel with the window's queries (after MiKV, arXiv 2402.18096);
    both are stored. Values are only rotated. Codes stand for the midpoints (code + 1/2 - 2**(bits - 1)) * scale; of a
    few clipping factors the one with the least squared error is taken per token. Scales are [S].
    """

    def head_vectors(self, keys: Tensor, valid: Tensor, query_moment: Tensor) -> Tensor:
        """keys [B, H_kv, S, D] (all tiers), query_moment: E q**2 [B, H_kv, D] -> (mu, gamma) 16-bit [B, H_kv, 2, D].

        Sums run in float64, so that the result does not depend on how a batch is laid out.
        """
        count = valid.sum(-1)[..., None].clamp(min=1)
        mean = (keys.sum(-2, dtype=torch.float64) / count).to(keys.dtype)
        centred = (keys.float() - mean.float()[..., None, :]).masked_fill(~valid[..., None], 0)
        key_moment = centred.square_().sum(-2, dtype=torch.float64) / count
        gamma = ((query_moment.double() + 1e-6) / (key_moment + 1e-6)).pow(0.25)
        gamma = gamma / gamma.log().mean(-1, keepdim=True).exp()
        return torch.stack([mean, gamma.clamp(2**-10, 2**10).to(keys.dtype)], -2)

    def encode(self, x: Tensor, valid: Tensor, format: TensorFormat, vectors: Tensor | None) -> Encoded:
        number, x = x.dtype, x.float()
        if vectors is not None:
            mean, gamma = vectors.float()[..., None, :, :].unbind(-2)
            x = ((x - mean) * gamma).masked_fill(~valid[..., None], 0)
        x = hadamard(x)
        half = 2 ** (format.bits - 1)
        largest, energy = x.abs().amax(-1, keepdim=True), x.square().sum(-1, keepdim=True)
        best_scale = best_error = None
        for clip in CLIPS[format.bits]:
            scale = (largest * (clip / half)).to(number)
            exact = _in_steps(x, scale)
            error = (exact.round().clamp_(-half, half - 1) - exact).square_().sum(-1, keepdim=True)
            error = torch.where(scale == 0, energy, error * scale.float().square())
            if best_scale is None or best_error is None:
                best_scale, best_error = scale, error
            else:
                best_scale = torch.where(error < best_error, scale, best_scale)
                best_error = torch.minimum(error, best_error)
        assert best_scale is not None
        codes = _in_steps(x, best_scale).round_().clamp_(-half, half - 1)
        return Encoded(codes.add_(half).to(torch.uint8), best_scale.flatten(2))

    def decode(self, encoded: Encoded, format: TensorFormat, vectors: Tensor | None) -> Tensor:
        midpoints = encoded.codes.float().add_(0.5 - 2 ** (format.bits - 1)).mul_(encoded.scales.float()[..., None])
        x = hadamard_product(midpoints)
        if vectors is not None:
            mean, gamma = vectors.float()[..., None, :, :].unbind(-2)
            x.div_(gamma).add_(mean)
        return x


class SixteenBit:
    """The token as it is, in the plan's 16-bit type; no scales."""

    def encode(self, x: Tensor, valid: Tensor, format: TensorFormat, vectors: Tensor | None) -> Encoded:
        return Encoded(x, x.new_empty(*x.shape[:2], 0))

    def decode(self, encoded: Encoded, format: TensorFormat, vectors: Tensor | None) -> Tensor:
        return encoded.codes.float()


_SIXTEEN_BIT, _FLEXGEN, ROTATED = SixteenBit(), Flexgen(), Rotated()
KEY_QUANTIZERS: dict[str, Quantizer] = {
    "16bit": _SIXTEEN_BIT,
    "flexgen": _FLEXGEN,
    "kivi": KiviKeys(),
    "rotated": ROTATED,
}
VALUE_QUANTIZERS: dict[str, Quantizer] = {
    "16bit": _SIXTEEN_BIT,
    "flexgen": _FLEXGEN,
    "kivi": _FLEXGEN,
    "rotated": ROTATED,
}
