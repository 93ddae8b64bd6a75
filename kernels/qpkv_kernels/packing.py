"""Codes of 8, 4, 3, 2 and 1 bits, packed along tokens.

A plane of b bits is little-endian words of 16 bits; word i of a channel holds tokens i*s .. i*s + s - 1, s = 16 / b,
token i*s + j in bits b*j .. b*j + b - 1 (`layout.py` has the planes of each width). Words are packed along tokens,
not channels, so that a decode kernel's tile keeps D whole and unpacks a word into s token rows (KERNELS.md,
technique 1); token order inside a tile does not matter to attention.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from qpkv_kernels.layout import PLANES, word_bytes, word_tokens

WORDS = {plane: torch.int16 if word_bytes(plane) == 2 else torch.uint8 for plane in (8, 4, 2, 1)}


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes: uint8 [..., S, D] below 2**bits, S a multiple of the width's quantum -> uint8 [..., S*D*bits/8]."""
    packed, shift = [], 0
    for plane in PLANES[bits]:
        fields = codes if len(PLANES[bits]) == 1 else (codes >> shift) & (2**plane - 1)
        fields = fields.unflatten(-2, (-1, word_tokens(plane)))  # [..., words, field, D]
        words = fields[..., 0, :].to(WORDS[plane], copy=True, memory_format=torch.contiguous_format)
        for field in range(1, word_tokens(plane)):
            words |= fields[..., field, :].to(WORDS[plane]) << (plane * field)
        packed.append(words.view(torch.uint8).flatten(-2))  # [..., words, D] of the words' bytes
        shift += plane
    return torch.cat(packed, -1) if len(packed) > 1 else packed[0]


def unpack(packed: Tensor, bits: int, head_size: int) -> Tensor:
    """The inverse of `pack`: uint8 [..., S*D*bits/8] -> uint8 [..., S, D], D = head_size."""
    num_values = packed.shape[-1] * 8 // bits
    codes: Tensor | None = None
    shift, start = 0, 0
    for plane in PLANES[bits]:
        end = start + num_values * plane // 8
        words = packed[..., start:end].view(WORDS[plane]).unflatten(-1, (-1, 1, head_size))
        fields = ((words >> _shifts(plane, packed.device)) & (2**plane - 1)).to(torch.uint8)  # [..., words, field, D]
        plane_codes = fields.flatten(-3, -2) << shift if shift else fields.flatten(-3, -2)
        codes = plane_codes if codes is None else codes | plane_codes
        shift, start = shift + plane, end
    assert codes is not None
    return codes


@lru_cache(maxsize=16)
def _shifts(plane: int, device: torch.device) -> Tensor:
    """Where the fields of a word begin: [fields, 1]."""
    return torch.arange(0, 8 * word_bytes(plane), plane, dtype=WORDS[plane], device=device)[:, None]
