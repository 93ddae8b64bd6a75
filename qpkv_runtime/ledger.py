"""The byte ledger: the one place where bytes are counted. Integers only, no torch.

(plan) -> where every buffer of one sequence lies and how large it is. It is the search's constraint, the arena's
size, the plan's `planned_bytes` and the column that benchmarks print; anyone who needs a size asks here.

A sequence's extent is one block per layer, in layer order. A layer's block is

    table         int32 [H_kv, segments, 2]: (offset within the block, tokens held); written at compression
    head vectors  16-bit [H_kv, vectors, D]: key means and balancers, where a format needs them
    reserves      for every head: the segment that decode appends to, all of one size
    segments      for every head: one for each tier

and a segment is key codes, value codes, int32 positions (only in sliding-window layers, which must know when a
token leaves the window), key scales, value scales, and where a format keeps outliers apart their values and places,
for keys and for values. Codes are packed along tokens (`qpkv_kernels.layout`), so a segment grows by `quantum_tokens`:
1 token at 16 bit, 2 at 8, 4 at 4, 8 at 3, 2 and 1. Buffers start at multiples of 4 bytes and segments of 16; that
padding is counted like everything else.

Where heads keep different counts (`plan.Heads`), each head's segment is as large as its own count needs and nothing
is padded to the longest. The buffers inside a segment lie as for its capacity, and the capacity of (head, tier) is
- uniform and weighted: the plan's count for that head and tier, rounded up to the quantum, whatever the prompt;
- adaptive: the tokens held (the table's count), rounded up to the quantum. Segments follow one another, head by head
  and tier by tier, at offsets that differ from row to row: read them from the table.
Adaptive counts are divided in whole quanta and add up to H_kv times the plan's count in every tier, so the tokens are
known beforehand, but not quite the bytes: alignment and per-channel groups make one segment of 2n tokens a little
smaller than two of n. Their part of the block holds the worst division (`shared_bytes`), which for most per-token
formats is no more than the even one takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from qpkv_kernels import layout
from qpkv_runtime.methods import QUANTIZERS, Axis, group_size

if TYPE_CHECKING:
    from qpkv_runtime.models.shape import ModelShape
    from qpkv_runtime.plan import Format, Plan, TensorFormat

NUMBER_BYTES = 2  # a stored scale, zero, mean or balancer, and an element at 16 bit
POSITION_BYTES = 4
TABLE_ENTRY_BYTES = 8
BUFFER_ALIGNMENT = 4
SEGMENT_ALIGNMENT = 16


@dataclass(frozen=True)
class Buffer:
    """One array inside the arena. offset: bytes from the start of the layer's block."""

    name: str
    offset: int
    size_bytes: int


@dataclass(frozen=True)
class Part:
    """A stretch of a buffer whose lines grow with a segment's room. offset: bytes from the segment's start."""

    offset: int
    num_lines: int
    line_bytes: int


@dataclass(frozen=True)
class Segment:
    """The tokens of one head in one tier (or the reserve, the last tier index), and where their buffers lie; without
    buffers where a head has no tokens of a tier."""

    head: int
    tier: int
    format: Format
    capacity_tokens: int
    offset: int
    buffers: dict[str, Buffer]


@dataclass(frozen=True, eq=False)  # one object for one layout (`layer_ledger`), so it can be looked up by
class LayerLedger:
    """One layer's block."""

    layer: int
    stored_bytes: int
    table: Buffer
    head_vectors: Buffer | None
    vector_rows: dict[str, slice]  # quantizer -> its rows of the head vectors
    segments: tuple[Segment, ...]  # by head, then tier, then the head's reserve; not the order in the block
    num_segments_per_head: int
    is_sliding: bool
    tier_formats: tuple[Format, ...]
    shared: Buffer | None = None  # where the tiers' segments lie if heads share adaptively; `segments`: the reserves
    head_size: int = 0

    @property
    def formats(self) -> tuple[Format, ...]:
        """Of the tiers and the reserve."""
        return (*self.tier_formats, self.segments[-1].format)

    @property
    def num_heads(self) -> int:
        return len(self.segments) // (self.num_segments_per_head if self.shared is None else 1)

    def segment(self, head: int, tier: int) -> Segment:
        """The segment of `head` and `tier`, where it lies for every prompt; tier -1 is the reserve."""
        per_head = self.num_segments_per_head
        if self.shared is not None:
            assert tier % per_head == per_head - 1, "the tiers of an adaptive layer lie anew for every prompt"
            return self.segments[head]
        return self.segments[head * per_head + tier % per_head]

    def capacity_tokens(self, head: int, tier: int, num_held: int) -> int:
        """Tokens that the segment of `head` and `tier` has room for when it holds `num_held`."""
        if self.shared is None or tier % self.num_segments_per_head == self.num_segments_per_head - 1:
            return self.segment(head, tier).capacity_tokens
        return align(num_held, quantum_tokens(self.tier_formats[tier]))

    def format_of(self, tier: int) -> Format:
        """A tier's, or with -1 the reserve's."""
        return self.formats[tier]

    def segment_at(self, tier: int, capacity_tokens: int) -> Segment:
        """A segment of this tier (-1: the reserve) and capacity, its buffers at offsets from its own start."""
        return _segment_alone(tier, self.format_of(tier), capacity_tokens, self.head_size, self.is_sliding)

    def parts(self, name: str, tier: int, capacity_tokens: int) -> tuple[Part, ...]:
        """What the buffer `name` of such a segment is made of."""
        return _parts(name, self.segment_at(tier, capacity_tokens), self.head_size)

    def place(self, counts: Sequence[Sequence[int]]) -> list[list[Segment]]:
        """Every head's tier segments for one row. counts: tokens held, [H_kv][tiers]."""
        num_tiers = len(self.tier_formats)
        if self.shared is None:
            return [[self.segment(head, tier) for tier in range(num_tiers)] for head in range(len(counts))]
        placed: list[list[Segment]] = []
        position = self.shared.offset
        for head, held in enumerate(counts):
            placed.append([])
            for tier, (format, tokens) in enumerate(zip(self.tier_formats, held, strict=True)):
                segment, position = _place(head, tier, format, tokens, position, self.head_size, self.is_sliding)
                placed[-1].append(segment)
        assert position <= self.shared.offset + self.shared.size_bytes, "a division of heads outgrew its worst case"
        return placed

    def buffers(self) -> Iterator[tuple[str, Buffer]]:
        """Every buffer of the block under a readable name."""
        yield "table", self.table
        if self.head_vectors is not None:
            yield "head_vectors", self.head_vectors
        if self.shared is not None:
            yield "shared_tiers", self.shared
        for segment in self.segments:
            tier = "reserve" if segment.tier == self.num_segments_per_head - 1 else f"tier{segment.tier}"
            for name, buffer in segment.buffers.items():
                yield f"head{segment.head}.{tier}.{name}", buffer

    @property
    def read_bytes(self) -> int:
        """Bytes that one decode step reads when everything is full: all buffers, without the padding."""
        return sum(buffer.size_bytes for _, buffer in self.buffers())

    def by_use(self) -> dict[str, int]:
        """The stored bytes by what they are: key_codes, value_scales, ..., the whole reserve, padding."""
        uses: dict[str, int] = {}
        for name, buffer in self.buffers():
            use = "reserve" if ".reserve." in name else name.rpartition(".")[2]
            uses[use] = uses.get(use, 0) + buffer.size_bytes
        return {**uses, "padding": self.stored_bytes - self.read_bytes}


@dataclass(frozen=True)
class Ledger:
    """The layout of one sequence under a plan."""

    layers: tuple[LayerLedger, ...]

    @property
    def stored_bytes(self) -> int:
        return sum(layer.stored_bytes for layer in self.layers)

    @property
    def read_bytes(self) -> int:
        return sum(layer.read_bytes for layer in self.layers)


def align(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def full_bytes(shape: ModelShape, context_tokens: int) -> int:
    """The reference: K and V at 16 bit, every KV head once, the sum over layers of min(context, sliding window)."""
    tokens = sum(min(context_tokens, window or context_tokens) for window in shape.sliding_windows)
    return 2 * NUMBER_BYTES * shape.num_kv_heads * shape.head_size * tokens


def quantum_tokens(format: Format) -> int:
    """The number of tokens by which a segment of this format grows."""
    return max(layout.quantum_tokens(format.keys.bits), layout.quantum_tokens(format.values.bits))


def codes_bytes(bits: int, tokens: int, head_size: int) -> int:
    """`tokens` must be a multiple of the format's quantum."""
    return NUMBER_BYTES * tokens * head_size if bits == 16 else bits * tokens * head_size // 8


def axis_of(format: TensorFormat, side: str) -> Axis:
    """Along what the groups of a side, "keys" or "values", run."""
    facts = QUANTIZERS[format.quantizer]
    return facts.key_axis if side == "keys" else facts.value_axis


def num_groups(format: TensorFormat, side: str, tokens: int, head_size: int) -> int:
    """Groups of one head's tensor [tokens, head_size]; the last group along the axis may be partial."""
    facts = QUANTIZERS[format.quantizer]
    if facts.numbers_per_group == 0:
        return 0
    axis = axis_of(format, side)
    group = group_size(format.quantizer, axis, format.group, tokens, head_size)
    if axis == "strided":
        return -(-tokens * head_size // group)
    return tokens * -(-head_size // group) if axis == "token" else head_size * -(-tokens // group)


def num_outliers(format: TensorFormat, tokens: int, head_size: int) -> int:
    """Places for outliers in one head's tensor [tokens, head_size]."""
    return math.ceil((format.outliers or 0.0) * (tokens * head_size))


def place_bytes(tokens: int, head_size: int) -> int:
    """Bytes of an outlier's place, a number up to tokens * head_size (which says that the slot is not used)."""
    return 2 if tokens * head_size < 2**16 else 4


def _scales_bytes(format: TensorFormat, side: str, tokens: int, head_size: int) -> int:
    return NUMBER_BYTES * QUANTIZERS[format.quantizer].numbers_per_group * num_groups(format, side, tokens, head_size)


@lru_cache(maxsize=65536)
def _segment_layout(format: Format, tokens: int, head_size: int, is_sliding: bool) -> tuple[int, tuple[Buffer, ...]]:
    """(size, buffers at offsets from the segment's start) of a segment that holds up to `tokens` tokens."""
    stored = align(tokens, quantum_tokens(format))
    sizes = {
        "key_codes": codes_bytes(format.keys.bits, stored, head_size),
        "value_codes": codes_bytes(format.values.bits, stored, head_size),
        "positions": POSITION_BYTES * stored if is_sliding else 0,
        "key_scales": _scales_bytes(format.keys, "keys", stored, head_size),
        "value_scales": _scales_bytes(format.values, "values", stored, head_size),
    }
    for side, written in (("key", format.keys), ("value", format.values)):
        places = num_outliers(written, stored, head_size)
        sizes[f"{side}_outliers"] = NUMBER_BYTES * places
        sizes[f"{side}_places"] = place_bytes(stored, head_size) * places
    offset, buffers = 0, []
    for name, size in sizes.items():
        if size:
            buffers.append(Buffer(name, offset, size))
            offset = align(offset + size, BUFFER_ALIGNMENT)
    return align(offset, SEGMENT_ALIGNMENT), tuple(buffers)


@lru_cache(maxsize=65536)
def _segment_alone(tier: int, format: Format, tokens: int, head_size: int, is_sliding: bool) -> Segment:
    return _place(0, tier, format, tokens, 0, head_size, is_sliding)[0]


def _parts(name: str, segment: Segment, head_size: int) -> tuple[Part, ...]:
    """One plane of the codes after the other; of the numbers of channels a line for each channel; else all in one."""
    buffer, written = segment.buffers[name], segment.format.keys if name.startswith("key") else segment.format.values
    if name.endswith("codes") and written.bits in layout.PLANES:
        sizes = [codes_bytes(plane, segment.capacity_tokens, head_size) for plane in layout.PLANES[written.bits]]
        return tuple(Part(buffer.offset + sum(sizes[:i]), 1, size) for i, size in enumerate(sizes))
    num_lines = head_size if name == "key_scales" and axis_of(written, "keys") == "channel" else 1
    return (Part(buffer.offset, num_lines, buffer.size_bytes // num_lines),)


def buffer_offsets(format: Format, tokens: int, head_size: int, is_sliding: bool) -> dict[str, int]:
    """Where the buffers of a segment with room for `tokens` tokens begin, in bytes from its start."""
    return {buffer.name: buffer.offset for buffer in _segment_layout(format, tokens, head_size, is_sliding)[1]}


def vector_rows(formats: Iterable[Format]) -> dict[str, slice]:
    """Which rows of a head's vectors [vectors, D] belong to each quantizer that has some, in a layer of these formats:
    all its tiers and the reserve share one set."""
    used, rows, start = {format.keys.quantizer for format in formats}, {}, 0
    for name, facts in QUANTIZERS.items():
        if name in used and facts.head_vectors:
            rows[name] = slice(start, start + facts.head_vectors)
            start += facts.head_vectors
    return rows


def _block_header(formats: list[Format], num_heads: int, head_size: int) -> tuple[int, int, int]:
    """(offset of the head vectors, their size, offset of the first segment)."""
    vectors_offset = align(TABLE_ENTRY_BYTES * num_heads * len(formats), SEGMENT_ALIGNMENT)
    num_vectors = max((rows.stop for rows in vector_rows(formats).values()), default=0)
    vectors_bytes = NUMBER_BYTES * num_heads * num_vectors * head_size
    return vectors_offset, vectors_bytes, align(vectors_offset + vectors_bytes, SEGMENT_ALIGNMENT)


def _place(
    head: int, tier: int, format: Format, tokens: int, position: int, head_size: int, is_sliding: bool
) -> tuple[Segment, int]:
    """The segment at `position` of the block, and where it ends."""
    size, buffers = _segment_layout(format, tokens, head_size, is_sliding)
    placed = {b.name: Buffer(b.name, position + b.offset, b.size_bytes) for b in buffers}
    return Segment(head, tier, format, align(tokens, quantum_tokens(format)), position, placed), position + size


@lru_cache(maxsize=65536)
def shared_bytes(format: Format, tokens: int, num_heads: int, head_size: int, is_sliding: bool) -> int:
    """Room for any division of num_heads * `tokens` tokens among heads in whole quanta.

    With M quanta in all, s(m) the size of a segment of m quanta and e the most by which any s(m) is above
    s(M) * m / M, the segments of any division sum to at most s(M) + num_heads * e.
    """
    quantum = quantum_tokens(format)
    total = num_heads * align(tokens, quantum) // quantum

    def size(quanta: int) -> int:
        return _segment_layout(format, quanta * quantum, head_size, is_sliding)[0]

    whole = size(total)
    if num_heads == 1:
        return whole
    excess = max(size(m) * total - whole * m for m in range(1, total + 1))
    return align(whole - (-excess * num_heads // total), SEGMENT_ALIGNMENT)


Holdings = tuple[tuple["Format", int | tuple[int, ...]], ...]
"""A layer's (format, tokens): its tiers, then its reserve. tokens: of every head, or of each."""


def _tier_bytes(format: Format, tokens: int | tuple[int, ...], num_heads: int, head_size: int, is_sliding: bool) -> int:
    each = (tokens,) * num_heads if isinstance(tokens, int) else tokens
    return sum(_segment_layout(format, count, head_size, is_sliding)[0] for count in each)


def layer_bytes(holdings: Holdings, num_heads: int, head_size: int, is_sliding: bool, is_adaptive: bool = False) -> int:
    """The size of a layer's block without laying it out, for searches that ask often."""
    *_, size = _block_header([format for format, _ in holdings], num_heads, head_size)
    *tiers, reserve = holdings
    size += _tier_bytes(*reserve, num_heads, head_size, is_sliding)
    if is_adaptive:
        return size + sum(shared_bytes(f, _even(tokens), num_heads, head_size, is_sliding) for f, tokens in tiers)
    return size + sum(_tier_bytes(f, tokens, num_heads, head_size, is_sliding) for f, tokens in tiers)


def _even(tokens: int | tuple[int, ...]) -> int:
    assert isinstance(tokens, int), "heads that share adaptively have one count in the plan"
    return tokens


@lru_cache(maxsize=4096)
def layer_ledger(layer: int, holdings: Holdings, shape: ModelShape, is_adaptive: bool = False) -> LayerLedger:
    """Lay out one layer's block."""
    num_heads, head_size = shape.num_kv_heads, shape.head_size
    is_sliding = shape.sliding_windows[layer] is not None
    vectors_offset, vectors_bytes, position = _block_header([f for f, _ in holdings], num_heads, head_size)
    *tiers, (reserve_format, reserve_tokens) = holdings
    reserves, segments = [], []
    for head in range(num_heads):
        reserve, position = _place(
            head, len(tiers), reserve_format, _even(reserve_tokens), position, head_size, is_sliding
        )
        reserves.append(reserve)
    shared = None
    if is_adaptive:
        room = sum(shared_bytes(f, _even(tokens), num_heads, head_size, is_sliding) for f, tokens in tiers)
        shared, segments, position = Buffer("shared_tiers", position, room), reserves, position + room
    else:
        for head in range(num_heads):
            for tier, (format, tokens) in enumerate(tiers):
                count = tokens if isinstance(tokens, int) else tokens[head]
                segment, position = _place(head, tier, format, count, position, head_size, is_sliding)
                segments.append(segment)
            segments.append(reserves[head])
    return LayerLedger(
        layer=layer,
        stored_bytes=position,
        table=Buffer("table", 0, TABLE_ENTRY_BYTES * num_heads * len(holdings)),
        head_vectors=Buffer("head_vectors", vectors_offset, vectors_bytes) if vectors_bytes else None,
        vector_rows=vector_rows(format for format, _ in holdings),
        segments=tuple(segments),
        num_segments_per_head=len(holdings),
        is_sliding=is_sliding,
        tier_formats=tuple(format for format, _ in tiers),
        shared=shared,
        head_size=head_size,
    )


def make_ledger(plan: Plan) -> Ledger:
    """Lay out one sequence under `plan`."""
    shape = plan.model.shape
    return Ledger(
        tuple(
            layer_ledger(layer, plan.holdings(layer), shape, plan.heads_of(layer).share == "adaptive")
            for layer in range(shape.num_layers)
        )
    )
