"""The attention function "qpkv" and its mask, registered with transformers when this module is imported.

A qpkv cache's `update()` returns a handle in place of keys and values. No model of the supported families touches
them between `update` and the attention call, so the handle arrives here and knows how to attend: over the live
prefill (then compressing it) or over the packed cache. Without a qpkv cache this is ordinary causal attention.

The geometry of attention (causal, sliding window, which tokens are kept) is each layer's own; the mask function
passes on only what it cannot know: padding, or the full 4D mask when transformers overlays something on the causal
pattern or its cache has slots that no token fills yet.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from qpkv_kernels.attention import attend, causal_attention
from qpkv_runtime.errors import CacheError, InputError

NAME = "qpkv"
HOW_TO_LOAD = f"load the model with attn_implementation='{NAME}', or call model.set_attn_implementation('{NAME}')"


class Handle:
    """What a qpkv cache layer gives the attention function in place of keys and values. knows_padding: it has seen the
    prompt, and is not told again how that was padded."""

    knows_padding = False

    def attend(self, query: Tensor, num_padding: list[int] | None, scaling: float, softcap: float | None) -> Tensor:
        """query [B, H, T, D], num_padding: left padding of each row, None when unknown or none -> [B, H, T, D]."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise CacheError(f"a qpkv cache needs qpkv attention (something asked it for .{name}): {HOW_TO_LOAD}")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise CacheError(f"a qpkv cache needs qpkv attention (it was given to {func.__name__}): {HOW_TO_LOAD}")


class Padding:
    """The padding of a batch, as the mask function passes it to the attention function. mask: [B, N], true at tokens;
    make_whole: the same as transformers' 4D mask, causal and of the layer's window.

    It is looked at when someone asks, once for all layers: looking waits for the device, and decoding over a packed
    cache has no need to.
    """

    ndim = 4  # what `generate`, which makes the masks of a static cache itself, expects beside `contiguous`

    def __init__(self, mask: Tensor, make_whole: Callable[[], Tensor]) -> None:
        self.mask, self.make_whole = mask, make_whole

    def contiguous(self) -> Padding:
        return self

    @cached_property
    def is_none(self) -> bool:
        """Whether there is none."""
        return bool(self.mask.all())

    @cached_property
    def is_left(self) -> bool:
        """Whether all padding is at the left, and no row is nothing else."""
        mask = self.mask.long()
        num_tokens = mask.sum(-1)
        return self.is_none or bool(((mask.argmax(-1) == mask.shape[1] - num_tokens) & (num_tokens > 0)).all())

    @cached_property
    def tokens(self) -> list[int] | None:
        """The number of padding tokens at the left of each row; None where there are none.

        Raises InputError for a mask that is not left padding.
        """
        if self.is_none:
            return None
        if not self.is_left:
            raise InputError(
                "prompts of different lengths must be padded on the left: set tokenizer.padding_side = 'left'"
            )
        return cast("list[int]", (self.mask.shape[1] - self.mask.long().sum(-1)).tolist())

    @cached_property
    def num_full_columns(self) -> int:
        """How many of the last columns are tokens in every row."""
        return int(self.mask.bool().all(0).flip(0).long().cumprod(0).sum())

    @cached_property
    def whole(self) -> Tensor:
        """bool [B, 1, T, N]."""
        return self.make_whole()


def qpkv_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | Handle,
    value: Tensor | Handle,
    attention_mask: Tensor | Padding | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [B, H, T, D] -> ([B, T, H, D], None)."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(key, Handle):
        if isinstance(attention_mask, Tensor):
            raise InputError("a qpkv cache takes causal prompts, padded on the left; got a custom 4D attention mask")
        padding, num_new = None, query.shape[2]
        if attention_mask is not None and not key.knows_padding:
            padding = attention_mask.tokens
        elif attention_mask is not None and num_new > 1 and attention_mask.num_full_columns < num_new:
            raise InputError(
                "after the prompt all rows must go on by equally many tokens, and the mask has padding among the "
                f"{num_new} new ones: give rows that go on by fewer a cache of their own"
            )
        out = key.attend(query, padding, scaling, softcap)
    else:
        value = cast(Tensor, value)
        if isinstance(attention_mask, Padding) and not attention_mask.is_left:
            attention_mask = attention_mask.whole
        if isinstance(attention_mask, Tensor):
            visible = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
            visible = visible[..., : key.shape[2]]
            visible = visible | ~visible.any(-1, keepdim=True)  # padding that sees nothing would become NaN
            out = attend(query, key, value, visible, scaling, softcap)
        else:
            padding = None if attention_mask is None else attention_mask.tokens
            out = causal_attention(query, key, value, padding, scaling, sliding_window, softcap)
    return out.transpose(1, 2).contiguous(), None


def qpkv_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    attention_mask: Tensor | Padding | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | Padding | None:
    """None, or the padding of [B, N] tokens, or a 4D mask for what is not causal plus padding."""
    if isinstance(attention_mask, Padding):  # `generate` made it already
        return attention_mask
    make_whole: Callable[[], Tensor] = partial(
        cast(Any, sdpa_mask),  # its annotations know no static cache, whose offsets are tensors
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        **kwargs,
    )
    # Where the last query may not stand at the last key, causal is not the lower right corner: in a static cache, whose
    # offset is a tensor that grows with it.
    is_static = isinstance(q_offset, Tensor)
    if not allow_is_causal_skip or is_static or q_offset + q_length != kv_offset + kv_length:
        return make_whole()
    return None if attention_mask is None else Padding(attention_mask[:, -kv_length:], make_whole)


AttentionInterface.register(NAME, qpkv_attention)
AttentionMaskInterface.register(NAME, qpkv_mask)
