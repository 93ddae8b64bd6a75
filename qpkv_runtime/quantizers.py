"""The quantizers: how a kept token's keys and values become codes and scales, and back.

Each turns one side's tensor x [B, H_kv, S, D], in the plan's 16-bit type, into codes (uint8, or that type itself) and
scales, zeros, means and balancers, also in that type, and decodes them to float32. Encoding uses the scales as stored,
so decode(encode(x)) is what attention sees. Slots that hold no token (`valid` false) never move a scale. Facts (widths,
axes, groups) are in `methods.py`.

A quantizer is a choice on four axes that know nothing of each other, so that a class says only where it differs:

    outliers   the largest values leave first, to be stored as they are       (`salience`: which are the largest)
    transform  a reversible map with the head's stored vectors                (`into`, `back`)
    groups     which values share a scale: of a token, a channel, all heads   (`axis`)
    code       scale and zero of a group, then code = round((x - zero) / scale), read as code * scale + zero  (`fit`)

The min-max code (eq. 4-5 of arXiv 2412.12706): zero = min, scale = (max - min) / (2**bits - 1). `rotated` alone has a
symmetric code, with a scale only.

These are the reference of the kernels that write a prompt (`qpkv_kernels/quantize.py`), which give the same bits. So a
formula here is single float32 operations, each rounded once, minima and maxima; sums, which have no order of their own,
run in float64, where the order does not show.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qpkv_kernels.hadamard import hadamard, hadamard_product
from qpkv_runtime.methods import QUANTIZERS, Axis, group_size
from qpkv_runtime.plan import Format, TensorFormat


@dataclass(frozen=True)
class Encoded:
    """codes: uint8 (or 16-bit) [B, H_kv, S, D]; scales: 16-bit [B, H_kv, numbers], empty at 16 bit.

    outliers: 16-bit [B, H_kv, N], the values kept apart; places: int64 [B, H_kv, N], where each belongs, token * D +
    channel, and S * D for a slot that is not used. Both None where the format keeps none apart.
    """

    codes: Tensor
    scales: Tensor
    outliers: Tensor | None = None
    places: Tensor | None = None


@dataclass(frozen=True)
class KeyMoments:
    """What head vectors are made of: of a head's kept keys k, per channel, the sums of k and of k**2 and the largest
    |k|, float64 [B, H_kv, D]; count [B, H_kv], how many keys."""

    count: Tensor
    total: Tensor
    squares: Tensor
    largest: Tensor

    @classmethod
    def of(cls, keys: Tensor, valid: Tensor) -> KeyMoments:
        """keys: 16-bit [B, H_kv, S, D], zero where not `valid` [B, H_kv, S]."""
        wide = keys.double()
        return cls(valid.sum(-1), wide.sum(-2), wide.square().sum(-2), wide.abs().amax(-2))


def zero_unless(valid: Tensor, x: Tensor) -> Tensor:
    """x, contiguous [..., D], in place, zero where not `valid` [...]. By whole lines: a mask of D equal numbers a line
    takes ten times as long on a CPU."""
    x.view(-1, x.shape[-1]).index_fill_(0, (~valid).flatten().nonzero()[:, 0], 0)
    return x


class Quantizer(Protocol):
    """What every quantizer does. `vectors` is 16-bit [B, H_kv, head_vectors, D], for keys of those that store some."""

    def encode(self, x: Tensor, valid: Tensor, format: TensorFormat, vectors: Tensor | None) -> Encoded:
        """x: 16-bit [B, H_kv, S, D], zero where not `valid` (bool [B, H_kv, S])."""
        ...

    def decode(self, encoded: Encoded, format: TensorFormat, vectors: Tensor | None) -> Tensor:
        """-> float32 [B, H_kv, S, D]."""
        ...

    def codes(self, x: Tensor, scales: Tensor, format: TensorFormat, vectors: Tensor | None) -> Tensor:
        """The codes of x (float32, [B, H_kv, S, D]) under scales that are already stored. Applied to what `decode`
        gave it returns the codes that were read."""
        ...

    def head_vectors(self, moments: KeyMoments, query_stats: Tensor, number: torch.dtype) -> Tensor:
        """What is stored of a head beside its tokens, for those quantizers whose facts say so.

        moments: of the kept keys of all tiers; query_stats [B, H_kv, 2, D]: E q**2 over the window's queries and
        max |q| over all -> [B, H_kv, head_vectors, D] of the 16-bit type `number`.
        """
        ...


class SixteenBit:
    """The token as it is, in the plan's 16-bit type; no scales."""

    def encode(self, x: Tensor, valid: Tensor, format: TensorFormat, vectors: Tensor | None) -> Encoded:
        return Encoded(x, x.new_empty(*x.shape[:2], 0))

    def decode(self, encoded: Encoded, format: TensorFormat, vectors: Tensor | None) -> Tensor:
        return encoded.codes.float()

    def codes(self, x: Tensor, scales: Tensor, format: TensorFormat, vectors: Tensor | None) -> Tensor:
        return x.to(scales.dtype)

    def head_vectors(self, moments: KeyMoments, query_stats: Tensor, number: torch.dtype) -> Tensor:
        raise NotImplementedError


# --- groups: which values share a scale ----------------------------------------------------------------------------


def _in_groups(x: Tensor, axis: Axis, group: int) -> Tensor:
    """[B, H_kv, S, D] -> [B, H_kv, groups of a head, group]; a partial group is filled up with zeros (or False)."""
    if axis == "channel":
        x = x.transpose(-1, -2)
    if axis == "strided":
        per_head = -(-math.prod(x.shape[2:]) // group)
        flat = x.flatten(1)
        flat = torch.nn.functional.pad(flat, (0, x.shape[1] * per_head * group - flat.shape[1]))
        return flat.view(x.shape[0], group, -1).transpose(1, 2).reshape(x.shape[0], x.shape[1], per_head, group)
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % group))
    return padded.reshape(*x.shape[:2], -1, group)


def _out_of_groups(groups: Tensor, axis: Axis, num_tokens: int, head_size: int) -> Tensor:
    """The inverse of `_in_groups`: [B, H_kv, groups of a head, group] -> [B, H_kv, S, D]."""
    num_heads = groups.shape[1]
    if axis == "strided":
        flat = groups.flatten(1, 2).transpose(1, 2).flatten(1)[:, : num_heads * num_tokens * head_size]
        return flat.reshape(-1, num_heads, num_tokens, head_size)
    rows, length = (head_size, num_tokens) if axis == "channel" else (num_tokens, head_size)
    x = groups.reshape(*groups.shape[:2], rows, -1)[..., :length]
    return x.transpose(-1, -2).contiguous() if axis == "channel" else x


# --- fits: the scale and zero of a group ---------------------------------------------------------------------------

Fit = Callable[[Tensor, Tensor, int, torch.dtype], Tensor]


def min_max(groups: Tensor, member: Tensor, bits: int, number: torch.dtype) -> Tensor:
    """groups: float32 [..., G], member: bool, the same shape -> (scale, zero) [..., 2] of the 16-bit type `number`.

    A constant group has scale 0 and is exact; a group without members is all zero. A zero has no sign: which one is
    the least of both depends on the processor.
    """
    low = groups.masked_fill(~member, float("inf")).amin(-1)
    high = groups.masked_fill(~member, float("-inf")).amax(-1)
    is_empty = low > high
    zero = low.masked_fill(is_empty | (low == 0), 0).to(number)
    # times the reciprocal, which is how CUDA divides by a constant: the same bits on every device
    scale = ((high - low).masked_fill(is_empty, 0) * (1 / (2**bits - 1))).to(number)
    return torch.stack([scale, zero], -1)


LP_NORM, BETA, NUM_STEPS = 0.7, 10.0, 20


def half_quadratic(groups: Tensor, member: Tensor, bits: int, number: torch.dtype) -> Tensor:
    """HQQ's zero (https://mobiusml.github.io/hqq_blog): min-max's scale, and a zero moved to where the sum over the
    group of |error| ** 0.7 is small, by alternating a shrinkage of the errors with their mean. As `min_max`. As in
    hqq 0.2.8 the shrinkage keeps its strength: its `kappa` is read and not used.

    Differs from the released code: each group stops at its own best step, not all of them when their mean error
    stops falling, so that a group's codes do not depend on what else is quantized beside it; and the zero is in the
    unit of the values, not of the codes. Rounded to `number` at the end only: on the coarse grid of 16-bit zeros the
    steps go nowhere at 8 bit (mean errors 1.6 to 2.9 % larger).
    """
    scale, zero = min_max(groups, member, bits, torch.float32).unbind(-1)
    count = member.sum(-1).clamp(min=1)

    def errors(scale: Tensor, zero: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        error = (groups - codes * scale[..., None] - zero[..., None]).masked_fill_(~member, 0)
        return error, (error.abs().sum(-1, dtype=torch.float64) / count).float()

    best_zero, best_error = zero, torch.full_like(zero, float("inf"))
    for _ in range(NUM_STEPS + 1):  # the last is only measured
        codes = _round(groups, scale, zero, bits)
        error, mean_error = errors(scale, zero, codes)
        best_zero = torch.where(mean_error < best_error, zero, best_zero)
        best_error = torch.minimum(mean_error, best_error)
        size = error.abs()
        shrunk = error.sign().mul_(size.sub_(size.pow(LP_NORM - 1).div_(BETA)).clamp_(min=0))
        # the mean of the values less their codes, were the large errors not there
        moved = (groups - shrunk - codes * scale[..., None]).masked_fill_(~member, 0)
        zero = (moved.sum(-1, dtype=torch.float64) / count).float()
    # as they are stored, the zero that was found may be behind the one of min-max
    first = min_max(groups, member, bits, number)
    found = torch.stack([first[..., 0], best_zero.to(number)], -1)
    stored = []
    for numbers in (first, found):
        scale, zero = numbers.float().unbind(-1)
        stored.append(errors(scale, zero, _round(groups, scale, zero, bits))[1])
    return torch.where((stored[1] < stored[0])[..., None], found, first)


def _round(groups: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """float32 codes [..., G] of groups [..., G] under scale and zero [...]; 0 where the scale is."""
    divisor = scale.masked_fill(scale == 0, float("inf"))[..., None]
    return ((groups - zero[..., None]) / divisor).round_().clamp_(0, 2**bits - 1)


def _balancer(factors: Tensor, number: torch.dtype) -> Tensor:
    """Factors of the channels [..., D], divided by their geometric mean, in the 16-bit type they are stored in."""
    return (factors / factors.log().mean(-1, keepdim=True).exp()).clamp(2**-10, 2**10).float().to(number)


# --- the quantizers ------------------------------------------------------------------------------------------------


class GroupQuantizer:
    """Min-max codes in groups along `axis`; what the others are made of."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis

    fit: Fit = staticmethod(min_max)

    def into(self, x: Tensor, vectors: Tensor | None) -> Tensor:
        """float32 [B, H_kv, S, D] -> what is written."""
        return x

    def back(self, x: Tensor, vectors: Tensor | None) -> Tensor:
        return x

    def salience(self, x: Tensor, member: Tensor, format: TensorFormat) -> Tensor:
        """float32 [B, H_kv, S, D], the larger the sooner a value is kept apart."""
        return x.abs()

    def head_vectors(self, moments: KeyMoments, query_stats: Tensor, number: torch.dtype) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} stores no head vectors")

    def encode(self, x: Tensor, valid: Tensor, format: TensorFormat, vectors: Tensor | None) -> Encoded:
        member, outliers, places = valid[..., None].expand(x.shape), None, None
        if format.outliers:
            places, is_outlier = self._keep_apart(x.float(), member, format)
            outliers = torch.nn.functional.pad(x.flatten(2), (0, 1)).gather(2, places)
            member = member & ~is_outlier
        group = self._group(format, x)
        groups = _in_groups(self.into(x.float(), vectors), self.axis, group)
        in_group = _in_groups(member, self.axis, group)
        numbers = self.fit(groups, in_group, format.bits, x.dtype)
        scale, zero = numbers.float().unbind(-1)
        codes = _round(groups, scale, zero, format.bits).masked_fill_(~in_group, 0).to(torch.uint8)
        return Encoded(_out_of_groups(codes, self.axis, *x.shape[2:]), numbers.flatten(2), outliers, places)

    def codes(self, x: Tensor, scales: Tensor, format: TensorFormat, vectors: Tensor | None) -> Tensor:
        groups = _in_groups(self.into(x.float(), vectors), self.axis, self._group(format, x))
        scale, zero = scales.float().unflatten(-1, (-1, 2)).unbind(-1)
        codes = _round(groups, scale, zero, format.bits).to(torch.uint8)
        return _out_of_groups(codes, self.axis, *x.shape[2:])

    def decode(self, encoded: Encoded, format: TensorFormat, vectors: Tensor | None) -> Tensor:
        codes = encoded.codes
        scale, zero = encoded.scales.float().unflatten(-1, (-1, 2)).unbind(-1)
        groups = _in_groups(codes, self.axis, self._group(format, codes)).float()
        x = _out_of_groups(groups * scale[..., None] + zero[..., None], self.axis, *codes.shape[2:])
        x = self.back(x, vectors)
        if encoded.outliers is None or encoded.places is None:
            return x
        flat = torch.nn.functional.pad(x.flatten(2), (0, 1))  # unused slots write into the last place
        return flat.scatter(2, encoded.places, encoded.outliers.float())[..., :-1].view(codes.shape)

    def _group(self, format: TensorFormat, x: Tensor) -> int:
        return group_size(format.quantizer, self.axis, format.group, *x.shape[2:])

    def _keep_apart(self, x: Tensor, member: Tensor, format: TensorFormat) -> tuple[Tensor, Tensor]:
        """(places int64 [B, H_kv, N], is_outlier bool [B, H_kv, S, D]): the share of the values that a head really
        holds which stands out most, of those above the threshold where there is one; among equals the first."""
        num_values, share = math.prod(x.shape[2:]), format.outliers or 0.0
        salience = self.salience(x, member, format).masked_fill(~member, -1)
        order = (
            salience.flatten(2).sort(dim=-1, descending=True, stable=True).indices[..., : math.ceil(share * num_values)]
        )
        num_kept = (share * member.flatten(2).sum(-1, dtype=torch.float64)).ceil()
        is_kept = torch.arange(order.shape[-1], device=x.device) < num_kept[..., None]
        if format.threshold is not None:
            is_kept = is_kept & (x.flatten(2).abs().gather(2, order) > format.threshold)
        places = order.masked_fill(~is_kept, num_values)
        marks = torch.zeros(*x.shape[:2], num_values + 1, dtype=torch.bool, device=x.device)
        return places, marks.scatter_(2, places, True)[..., :-1].view(x.shape)


class Flexgen(GroupQuantizer):
    """Min-max codes per token, groups of `group` channels (arXiv 2303.06865). Scales are [S, D / group, 2]."""


class Kivi(GroupQuantizer):
    """Min-max codes, keys per channel over `group` consecutive kept tokens and after RoPE, values per token (arXiv
    2402.02750).

    The last group of tokens may be partial and has its own scale. Differs from the paper: no 16-bit residual, which a
    small budget cannot pay; appended tokens go to the reserve's per-token format. Key scales are [D, S / group, 2].
    """


class Kvquant(GroupQuantizer):
    """One group for a whole vector, a channel of the keys or a token of the values, without its outliers (arXiv
    2401.18079). Outliers are those that lie farthest from their own vector's mean, in its standard deviations, so that
    a channel with a large offset does not take all places.

    Differs from the paper: uniform codes (its non-uniform ones come from a calibration of the model), keys after RoPE
    as they are cached, and the share is of a head's values together, not of each vector.
    """

    def salience(self, x: Tensor, member: Tensor, format: TensorFormat) -> Tensor:
        group = self._group(format, x)
        groups, in_group = (_in_groups(y, self.axis, group) for y in (x, member))
        count = in_group.sum(-1, keepdim=True).clamp(min=1)
        mean = groups.masked_fill(~in_group, 0).sum(-1, keepdim=True, dtype=torch.float64) / count
        centred = (groups - mean).masked_fill_(~in_group, 0)
        deviation = (centred.square().sum(-1, keepdim=True) / count).sqrt_()
        return _out_of_groups(centred.abs_().div_(deviation + 1e-12).float(), self.axis, *x.shape[2:])


class Hqq(GroupQuantizer):
    """`half_quadratic` codes in the groups of flexgen or kivi. Tokens are encoded once and never again, as every code
    here is."""

    fit = staticmethod(half_quadratic)


class PaperHqq(Hqq):
    """What the token-precision paper's released code does under the name of KIVI: transformers' HQQ cache with
    axis_key=1, axis_value=0. Keys: groups of 64 channels of one token. Values: group i holds every n-th value of the
    layer from the i-th on, n = H_kv * S * D / group, so that it spans heads and tokens of one channel. For comparison
    only: that is why 2 bit collapses in the paper's tables. A group knows one sequence, whatever the batch.
    """


class Mikv(GroupQuantizer):
    """Min-max codes per token of balanced keys: K * b is stored, b per head and channel, so that channels which the
    queries read loudly get finer steps (arXiv 2402.18096). Where MiKV would use q / b, decode divides the keys by b.

    b = (max |q| / max |k|) ** (1/2) over the prompt's queries and the kept keys, divided by its geometric mean over the
    channels, which changes no code and stays in range. Values are plain.
    """

    def head_vectors(self, moments: KeyMoments, query_stats: Tensor, number: torch.dtype) -> Tensor:
        balance = ((query_stats[..., 1, :].double() + 1e-6) / (moments.largest + 1e-6)).sqrt()
        return _balancer(balance, number)[..., None, :]

    def into(self, x: Tensor, vectors: Tensor | None) -> Tensor:
        return x if vectors is None else x * vectors.float()

    def back(self, x: Tensor, vectors: Tensor | None) -> Tensor:
        return x if vectors is None else x / vectors.float()


def _in_steps(x: Tensor, scale: Tensor) -> Tensor:
    """x in steps of `scale` from the midpoint above zero; zero where the scale is."""
    inverse = 1 / scale.float().masked_fill(scale == 0, float("inf"))
    return (x * inverse).sub_(0.5)


CLIPS = {
    8: (1.0,),
    4: (1.0, 0.9, 0.8, 0.7),
    3: (1.0, 0.9, 0.8, 0.7, 0.6),
    2: (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.42),
    1: (1.0, 0.9, 0.8, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4),
}


NEARLY_EQUAL = 1 + 2**-12  # more than what the order of a float32 sum over a head's channels makes
VALUES_AT_ONCE = 2**16  # whose scales are searched: with all clips side by side, about a core's cache


class Rotated:
    """Hadamard-rotated symmetric codes with one searched scale per token (after QuaRot, arXiv 2404.00456).

    Keys, after RoPE, are centred and balanced first: x = H(gamma * (k - mu)), mu the mean of the head's kept keys and
    gamma = (E q**2 / E (k - mu)**2) ** (1/4) per channel with the window's queries (after MiKV, arXiv 2402.18096);
    both are stored. Values are only rotated. Codes stand for the midpoints (code + 1/2 - 2**(bits - 1)) * scale; of a
    few clipping factors the one with the least squared error is taken per token. Scales are [S].
    """

    def head_vectors(self, moments: KeyMoments, query_stats: Tensor, number: torch.dtype) -> Tensor:
        """(mu, gamma). mu is the mean as stored, and E (k - mu)**2 is taken around that."""
        count = moments.count.clamp(min=1)[..., None]
        stored_mean = (moments.total / count).float().to(number)
        mean = stored_mean.double()
        key_moment = ((moments.squares - 2 * mean * moments.total) / count + mean.square()).clamp(min=0)
        gamma = ((query_stats[..., 0, :].double() + 1e-6) / (key_moment + 1e-6)).sqrt().sqrt()
        return torch.stack([stored_mean, _balancer(gamma, number)], -2)

    def encode(self, x: Tensor, valid: Tensor, format: TensorFormat, vectors: Tensor | None) -> Encoded:
        number, x = x.dtype, self.into(x.float(), vectors, valid)
        tokens = x.view(-1, x.shape[-1])
        scale, at_once = x.new_empty(*x.shape[:-1], 1, dtype=number), max(1, VALUES_AT_ONCE // x.shape[-1])
        for part, found in zip(tokens.split(at_once), scale.view(-1, 1).split(at_once), strict=True):
            found.copy_(self._best_scale(part, format.bits, number))
        return Encoded(self._midpoint_codes(x, scale, 2 ** (format.bits - 1)), scale.flatten(2))

    def _best_scale(self, x: Tensor, bits: int, number: torch.dtype) -> Tensor:
        """x: float32 [N, D] -> [N, 1] of the type `number`: of the CLIPS' scales the first with the least error.

        Errors are summed in float32, and in float64 where two are so close that the order of the sum would tell.
        """
        half = 2 ** (bits - 1)
        shares = x.new_tensor([clip / half for clip in CLIPS[bits]])
        scales = (x.abs().amax(-1, keepdim=True) * shares).to(number)
        if scales.shape[1] == 1:
            return scales
        exact = _in_steps(x[:, None], scales[..., None])  # [N, clips, D]
        errors = exact.round().clamp_(-half, half - 1).sub_(exact).square_()
        steps = scales.double().square()
        squares = errors.sum(-1).double() * steps
        close = (squares < squares.amin(1, keepdim=True) * NEARLY_EQUAL).sum(1) > 1
        close |= (scales[:, -1] == 0) & (scales[:, 0] > 0)  # a scale that rounds to zero loses all
        at = close.nonzero()[:, 0]
        if len(at):
            lost = x[at].square().double().sum(-1, keepdim=True)
            squares[at] = torch.where(scales[at] == 0, lost, errors[at].double().sum(-1) * steps[at])
        return scales.gather(1, squares.argmin(1, keepdim=True))

    def codes(self, x: Tensor, scales: Tensor, format: TensorFormat, vectors: Tensor | None) -> Tensor:
        return self._midpoint_codes(self.into(x.float(), vectors, None), scales[..., None], 2 ** (format.bits - 1))

    def into(self, x: Tensor, vectors: Tensor | None, valid: Tensor | None) -> Tensor:
        """float32 [B, H_kv, S, D] -> what is written; zero where not valid."""
        if vectors is not None:
            mean, gamma = vectors.float()[..., None, :, :].unbind(-2)
            x = (x - mean) * gamma
            x = x if valid is None else zero_unless(valid, x.contiguous())
        return hadamard(x)

    def _midpoint_codes(self, x: Tensor, scale: Tensor, half: int) -> Tensor:
        return _in_steps(x, scale).round_().clamp_(-half, half - 1).add_(half).to(torch.uint8)

    def midpoints(self, encoded: Encoded, format: TensorFormat) -> Tensor:
        """What `into` gave, as far as the codes tell: `decode` without the way back."""
        return encoded.codes.float().add_(0.5 - 2 ** (format.bits - 1)).mul_(encoded.scales.float()[..., None])

    def query(self, query: Tensor, vectors: Tensor) -> Tensor:
        """float32 [B, H_kv, N, D] -> queries for keys that went `into`, whose logits are less by q . mu, which is the
        same for every token of a head."""
        return hadamard_product(query / vectors.float()[..., 1:, :])

    def decode(self, encoded: Encoded, format: TensorFormat, vectors: Tensor | None) -> Tensor:
        x = hadamard_product(self.midpoints(encoded, format))
        if vectors is not None:
            mean, gamma = vectors.float()[..., None, :, :].unbind(-2)
            x.div_(gamma).add_(mean)
        return x


_SIXTEEN_BIT, ROTATED = SixteenBit(), Rotated()
_IN_GROUPS = {"flexgen": Flexgen, "kivi": Kivi, "kvquant": Kvquant, "hqq": Hqq, "paper_hqq": PaperHqq, "mikv": Mikv}
KEY_QUANTIZERS: dict[str, Quantizer] = {
    "16bit": _SIXTEEN_BIT,
    **{name: make(QUANTIZERS[name].key_axis) for name, make in _IN_GROUPS.items()},
    "rotated": ROTATED,
}
VALUE_QUANTIZERS: dict[str, Quantizer] = {
    "16bit": _SIXTEEN_BIT,
    **{name: make(QUANTIZERS[name].value_axis) for name, make in _IN_GROUPS.items()},
    "rotated": ROTATED,
}


def stands_alone(format: TensorFormat) -> bool:
    """Whether what is written of a token's values depends on nothing but them, to the last bit: not on the other
    tokens, nor on how many there are."""
    is_per_token = format.quantizer == "rotated" or QUANTIZERS[format.quantizer].value_axis == "token"
    is_coded = format.bits != 16 and not isinstance(VALUE_QUANTIZERS[format.quantizer], Hqq)
    return is_coded and is_per_token and not format.outliers


def sees_room(format: Format) -> bool:
    """Whether codes depend on the empty slots behind a head's tokens, by the number of outliers, by groups that span
    heads, or by the order of a sum's roundings: such a format is written and read segment by segment."""
    sides = (format.keys, format.values)
    return any(side.outliers or isinstance(KEY_QUANTIZERS[side.quantizer], Hqq) for side in sides)
