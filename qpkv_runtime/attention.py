"""The attention function "qpkv" and its mask, registered with transformers when this module is imported.

A qpkv cache's `update()` returns a handle in place of keys and values. No model of the supported families touches
them between `update` and the attention call, so the handle arrives here and knows how to attend: over the live
prefill (then compressing it) or over the packed cache. Without a qpkv cache this is ordinary causal attention.

The geometry of attention (causal, sliding window, which tokens are kept) is each layer's own; the mask function
passes on only what it cannot know: padding as [B, N], or the full 4D mask when transformers overlays something on
the causal pattern.
"""

from __future__ import annotations

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
    """What a qpkv cache layer gives the attention function in place of keys and values."""

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


def qpkv_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | Handle,
    value: Tensor | Handle,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [B, H, T, D] -> ([B, T, H, D], None)."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(key, Handle):
        out = key.attend(query, _left_padding(attention_mask), scaling, softcap)
    else:
        value = cast(Tensor, value)
        if attention_mask is not None and attention_mask.ndim == 4:
            visible = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
            out = attend(query, key, value, visible[..., : key.shape[2]], scaling, softcap)
        else:
            padding = _left_padding(attention_mask)
            out = causal_attention(query, key, value, padding, scaling, sliding_window, softcap)
    return out.transpose(1, 2).contiguous(), None


def _left_padding(mask: Tensor | None) -> list[int] | None:
    """The number of padding tokens at the left of each row of a [B, N] mask; None without a mask.

    Raises InputError for a mask that is not left padding.
    """
    if mask is None:
        return None
    if mask.ndim != 2:
        raise InputError("a qpkv cache takes causal prompts, padded on the left; got a custom 4D attention mask")
    num_tokens = mask.sum(-1)
    if not bool((mask.long().argmax(-1) == mask.shape[1] - num_tokens).all()) or not bool((num_tokens > 0).all()):
        raise InputError("prompts of different lengths must be padded on the left: set tokenizer.padding_side = 'left'")
    return cast("list[int]", (mask.shape[1] - num_tokens).tolist())


def qpkv_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """None, or the padding mask [B, N] (bool, true at tokens), or a 4D mask for what is not causal plus padding."""
    if not allow_is_causal_skip:
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            **kwargs,
        )
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return attention_mask[:, -kv_length:].bool()


AttentionInterface.register(NAME, qpkv_attention)
AttentionMaskInterface.register(NAME, qpkv_mask)
