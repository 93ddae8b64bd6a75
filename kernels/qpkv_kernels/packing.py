"""Codes of 8, 4, 3, 2 and 1 bits, packed along tokens.

A plane of b bits is little-endian words of 16 bits; word i of a channel holds tokens i*s .. i*s + s - 1, s = 16 / b,
token i*s + j in bits b*j .. b*j + b - 1 (`layout.py` has the planes of each width). Words are packed along tokens,
not channels, so that a decode kernel's tile keeps D whole and unpacks a word into s token rows (KERNELS.md,
technique 1); token order inside a tile does not matter to attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qpkv_kernels.layout import PLANES, word_bytes


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes: uint8 [..., S, D] below 2**bits, S a multiple of the width's quantum -> uint8 [..., S*D*bits/8]."""
    packed, shift = [], 0
    for plane in PLANES[bits]:
        fields = (codes >> shift) & (2**plane - 1)
        fields = fields.unflatten(-2, (-1, word_bytes(plane), 8 // plane))  # [..., words, byte, field, D]
        word = torch.zeros_like(fields[..., 0, :])
        for field in range(8 // plane):
            word |= fields[..., field, :] << (plane * field)
        packed.append(word.transpose(-1, -2).flatten(-3))  # [..., words, D, byte]
        shift += plane
    return torch.cat(packed, -1)


def unpack(packed: Tensor, bits: int, head_size: int) -> Tensor:
    """The inverse of `pack`: uint8 [..., S*D*bits/8] -> uint8 [..., S, D], D = head_size."""
    num_values = packed.shape[-1] * 8 // bits
    codes, shift, start = None, 0, 0
    for plane in PLANES[bits]:
        end = start + num_values * plane // 8
        word = packed[..., start:end].unflatten(-1, (-1, head_size, word_bytes(plane))).transpose(-1, -2)
        fields = torch.stack([(word >> (plane * field)) & (2**plane - 1) for field in range(8 // plane)], -2)
        plane_codes = fields.flatten(-4, -2) << shift  # [..., words, byte, field, D] -> [..., S, D]
        codes = plane_codes if codes is None else codes | plane_codes
        shift, start = shift + plane, end
    assert codes is not None
    return codes
