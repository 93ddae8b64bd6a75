"""How codes become bytes: the planes of each width and the words of each plane. Integers only, no torch.

A plane of b bits is words of 16 bits that hold 16 / b tokens of one channel; the one-bit plane of 1-bit and 3-bit codes
is bytes of 8 tokens. `packing.py` moves the bits, the runtime's ledger counts the bytes; both read this.
"""

PLANES = {8: (8,), 4: (4,), 3: (2, 1), 2: (2,), 1: (1,)}  # code width -> widths of its planes, low bits first


def word_bytes(plane_bits: int) -> int:
    """Bytes of one word of a plane."""
    return 1 if plane_bits == 1 else 2


def word_tokens(plane_bits: int) -> int:
    """Tokens of one channel in one word of a plane."""
    return 8 * word_bytes(plane_bits) // plane_bits


def quantum_tokens(bits: int) -> int:
    """The number of tokens by which packed codes of this width grow; 1 at 16 bit."""
    return max((word_tokens(plane) for plane in PLANES.get(bits, ())), default=1)
