"""Codes become bytes and come back; the Hadamard transform is orthonormal, its own inverse and the same in any batch.

The bit layout is checked against a second implementation that sets one bit at a time, from the words of `packing.py`.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qpkv_kernels import layout, packing
from qpkv_kernels.hadamard import hadamard, hadamard_product
from qpkv_runtime.ledger import codes_bytes

BITS = (8, 4, 3, 2, 1)
QUANTUM = {16: 1, 8: 2, 4: 4, 3: 8, 2: 8, 1: 8}
HEAD_SIZES = (64, 80, 96, 128, 256)
BLOCKS = {2: 2, 6: 2, 64: 64, 80: 16, 96: 32, 128: 128, 256: 256}


def random_codes(bits: int, *shape: int) -> Tensor:
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))


def naive_pack(codes: Tensor, bits: int) -> bytes:
    """codes [S, D] packed one bit at a time, as the docstrings of `packing` and `layout` say: per plane (low bits
    first) little-endian words, ordered by word, then channel."""
    num_tokens, head_size = codes.shape
    packed, shift = b"", 0
    for plane in {8: (8,), 4: (4,), 3: (2, 1), 2: (2,), 1: (1,)}[bits]:
        word_bits = 8 if plane == 1 else 16
        per_word = word_bits // plane  # s
        for i in range(num_tokens // per_word):
            for channel in range(head_size):
                word = 0
                for j in range(per_word):
                    field = (int(codes[i * per_word + j, channel]) >> shift) & (2**plane - 1)
                    word |= field << (plane * j)  # token i*s + j in bits b*j .. b*j + b - 1
                packed += word.to_bytes(word_bits // 8, "little")
        shift += plane
    return packed


# --- packing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head_size", [2, 6, 64, 80, 128])
@pytest.mark.parametrize("quanta", [1, 2, 3, 9])
def test_unpack_gives_back_what_pack_was_given(bits, head_size, quanta):
    codes = random_codes(bits, 2, 3, quanta * QUANTUM[bits], head_size)
    packed = packing.pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert torch.equal(packing.unpack(packed, bits, head_size), codes)


@pytest.mark.parametrize("bits", BITS)
def test_pack_gives_back_what_unpack_was_given(bits):
    """Every byte pattern is a valid packing: no bit of a buffer is unused."""
    packed = random_codes(8, 2, codes_bytes(bits, 3 * QUANTUM[bits], 10))
    assert torch.equal(packing.pack(packing.unpack(packed, bits, 10), bits), packed)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("quanta", "head_size"), [(1, 2), (3, 6), (2, 20)])
def test_bits_lie_where_the_layout_says(bits, quanta, head_size):
    codes = random_codes(bits, quanta * QUANTUM[bits], head_size)
    assert bytes(packing.pack(codes, bits).tolist()) == naive_pack(codes, bits)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_token_j_of_word_i_is_field_j_of_a_little_endian_uint16(bits):
    head_size, per_word = 4, 16 // bits
    codes = random_codes(bits, 3 * per_word, head_size)
    words = packing.pack(codes, bits).view(torch.uint16).reshape(3, head_size).to(torch.int64)
    for token in range(3 * per_word):
        i, j = divmod(token, per_word)
        assert torch.equal((words[i] >> (bits * j)) & (2**bits - 1), codes[token].to(torch.int64))


def test_three_bit_codes_are_their_low_two_bits_then_their_high_bit():
    codes = random_codes(3, 16, 6)
    packed = packing.pack(codes, 3)
    low, high = packed[: 16 * 6 * 2 // 8], packed[16 * 6 * 2 // 8 :]
    assert torch.equal(low, packing.pack(codes & 3, 2))
    assert torch.equal(packing.unpack(low, 2, 6), codes & 3)
    for token in range(16):
        byte = high.reshape(2, 6)[token // 8]
        assert torch.equal((byte >> (token % 8)) & 1, codes[token] >> 2)


@pytest.mark.parametrize("bits", BITS)
def test_packed_codes_take_the_bytes_the_ledger_counts(bits):
    for quanta in (1, 2, 5):
        for head_size in (2, 64, 80):
            tokens = quanta * QUANTUM[bits]
            packed = packing.pack(random_codes(bits, 1, 2, tokens, head_size), bits)
            assert packed.shape == (1, 2, codes_bytes(bits, tokens, head_size))
            assert packed.shape[-1] * 8 == tokens * head_size * bits


def test_the_quantum_is_the_fewest_tokens_that_fill_whole_words():
    assert {bits: layout.quantum_tokens(bits) for bits in QUANTUM} == QUANTUM


@pytest.mark.parametrize("bits", BITS)
def test_a_code_moves_no_bit_of_another(bits):
    """All codes zero but one, at its largest: exactly `bits` bits are set, and they are that code's."""
    for token, channel in ((0, 0), (QUANTUM[bits] - 1, 3), (2 * QUANTUM[bits] - 1, 1)):
        codes = torch.zeros(2 * QUANTUM[bits], 4, dtype=torch.uint8)
        codes[token, channel] = 2**bits - 1
        packed = packing.pack(codes, bits)
        assert sum(byte.bit_count() for byte in packed.tolist()) == bits
        assert torch.equal(packing.unpack(packed, bits, 4), codes)


@pytest.mark.parametrize("bits", BITS)
def test_packing_reads_strided_codes_and_does_not_depend_on_the_batch(bits):
    """Keys arrive transposed from a per-channel quantizer, heads as slices of a larger batch."""
    codes = random_codes(bits, 3, 2, 16, 6)
    packed = packing.pack(codes, bits)
    assert torch.equal(packing.pack(codes.transpose(-1, -2).contiguous().transpose(-1, -2), bits), packed)
    assert torch.equal(packing.pack(codes[1:2, 1:], bits), packed[1:2, 1:])
    assert torch.equal(packing.unpack(packed[:, :1], bits, 6), codes[:, :1])


# --- the Hadamard transform ----------------------------------------------------------------------------------------


def sylvester(size: int) -> Tensor:
    """The Walsh-Hadamard matrix by its recursion, float64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)


@pytest.mark.parametrize("head_size", BLOCKS)
def test_hadamard_is_the_walsh_hadamard_matrix_in_blocks_of_the_largest_power_of_two(head_size):
    block = BLOCKS[head_size]
    matrix = torch.block_diag(*[sylvester(block)] * (head_size // block))
    got = hadamard(torch.eye(head_size, dtype=torch.float64))
    error = (got - matrix).abs().max().item()
    print(f"largest difference: {error:.1e}")
    assert error < 1e-15 * math.sqrt(block)  # sums of +-1 are exact, the scaling rounds once


@pytest.mark.parametrize("transform", [hadamard, hadamard_product])
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_hadamard_keeps_norms_and_is_its_own_inverse(transform, head_size):
    x = torch.randn(2, 3, 5, head_size, generator=torch.Generator().manual_seed(0))
    y, back = transform(x), transform(transform(x))
    assert y.dtype == x.dtype and y.shape == x.shape
    norm_error = (y.norm(dim=-1) / x.norm(dim=-1) - 1).abs().max().item()
    error = ((back - x).norm() / x.norm()).item()
    print(f"norms off by {norm_error:.1e}, there and back by {error:.1e}")
    # float32: log2(block) <= 8 additions (or a sum of D terms) and a scaling, each way, 2**-24 each
    assert norm_error < 2**-20 and error < 2**-20


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_hadamard_product_equals_hadamard_to_rounding(head_size):
    x = torch.randn(2, 3, 7, head_size, generator=torch.Generator().manual_seed(1)) * 30
    error = ((hadamard_product(x) - hadamard(x)).norm() / x.norm()).item()
    print(f"relative error {error:.1e}")
    assert error < 2**-20  # two float32 orders of at most D = 256 additions


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_hadamard_is_bitwise_the_same_in_any_batch(head_size):
    """Codes are made from it: a token alone, in a batch, transposed or sliced gives the same bits."""
    x = torch.randn(2, 3, 7, head_size, generator=torch.Generator().manual_seed(2))
    whole = hadamard(x)
    for row in range(2):
        for head in range(3):
            assert torch.equal(hadamard(x[row, head]), whole[row, head])
            assert torch.equal(hadamard(x[row, head, 4]), whole[row, head, 4])
    assert torch.equal(hadamard(x[:, :, 2:5]), whole[:, :, 2:5])
    assert torch.equal(hadamard(x.flip(2)), whole.flip(2))
    assert torch.equal(hadamard(x.transpose(0, 2)), whole.transpose(0, 2))  # not contiguous
    assert torch.equal(hadamard(x[:1].expand(4, -1, -1, -1)), whole[:1].expand(4, -1, -1, -1))  # overlapping memory


@pytest.mark.parametrize("transform", [hadamard, hadamard_product])
@pytest.mark.parametrize("layout", ["one token", "channels first", "a batch"])
def test_hadamard_leaves_its_input_alone(transform, layout):
    """One token and channels-first memory are where a layout change copies nothing."""
    generator = torch.Generator().manual_seed(3)
    x = {
        "one token": torch.randn(80, generator=generator),
        "channels first": torch.randn(80, 3, generator=generator).t(),
        "a batch": torch.randn(2, 3, 80, generator=generator),
    }[layout]
    before = x.clone()
    y = transform(x)
    assert torch.equal(x, before) and y.data_ptr() != x.data_ptr()


def test_hadamard_leaves_the_channels_after_the_last_block_in_their_own_block():
    """D = 80 is five blocks of 16: a channel never leaks into another block."""
    x = torch.zeros(80)
    x[17] = 1.0
    y = hadamard(x)
    assert y[16:32].abs().min() > 0 and y[:16].abs().max() == 0 and y[32:].abs().max() == 0


def test_hadamard_takes_tensors_that_require_a_gradient():
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(4))
    assert torch.equal(hadamard(x.clone().requires_grad_()).detach(), hadamard(x))
