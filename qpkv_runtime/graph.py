"""Greedy generation by the runtime's own loop: steps that never wait for the host, on CUDA one captured graph.

A decode step by the kernels reads what it must know (how many tokens there are, which one comes next) from the device,
so it is the same launches over the same memory every time. The first steps run as they are, on the stream that capture
will use, which warms up what is made on first use; then one step is captured and replayed. Appending is per token, so
every step is alike: there is no second graph for a flush.

The host looks at the tokens every few steps, for an end of sequence, for logits that are no numbers and for keys or
values that could not be stored: what was decoded beyond is thrown away. What a `then: stop` reserve has room for it
knows from its own counters.

Elsewhere, and over layers on several devices, the same loop launches every step. Capture has not been run on a GPU by
us; on a CPU the loop is tested over both backends. Not here: sampling and logits processors (transformers' `generate`
works on the same cache and kernels, and waits for the device at every step).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qpkv_runtime.backend import use_kernels
from qpkv_runtime.cache import PlannedCache
from qpkv_runtime.errors import CacheError, NumericsError

POLL_STEPS = 16
WARM_UP_STEPS = 2
NOT_FINITE = "the model's logits have NaN or Inf; load it in float32 or bfloat16"


def finite(logits: Tensor) -> Tensor:
    """bool []: whether logits [B, V] mean anything. A single -inf is a token that some setting of the model rules out;
    nothing but -inf is not."""
    return (logits < float("inf")).all() & (logits.amax(-1) > float("-inf")).all()


def can_capture(model: PreTrainedModel, cache: PlannedCache) -> bool:
    """Whether a decode step over this cache can be a CUDA graph: by the kernels, on one CUDA device, by a model whose
    forward does not wait for the host."""
    devices = set(cache.rows.layer_devices)
    is_on_one = len(devices) == 1 and next(iter(devices)).type == "cuda" and use_kernels(next(iter(devices)))
    return is_on_one and not waits_for_host(model)


def waits_for_host(model: PreTrainedModel) -> bool:
    """Whether a forward brings weights from main memory or disk (accelerate's hooks), or looks at positions to choose
    its rotary frequencies: neither may be while a graph is captured, and a capture that fails leaves CUDA's allocator
    unusable."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        if any(getattr(one, "offload", False) for one in getattr(hook, "hooks", [hook])):
            return True
        rope = getattr(module, "rope_type", "")
        if any("dynamic" in one or one == "longrope" for one in (rope.values() if isinstance(rope, dict) else [rope])):
            return True
    return False


class DecodeLoop:
    """Generates with `model` over a cache that has been prefilled: `model(ids, past_key_values=cache)`.

    use_graph: capture a step as a CUDA graph; None: where `can_capture`. A loop may serve one prompt after another, of
    one batch size: reset the cache, prefill it, run again; the graph is captured once. Raises CacheError for a graph
    that cannot be.
    """

    def __init__(self, model: PreTrainedModel, cache: PlannedCache, *, use_graph: bool | None = None) -> None:
        if use_graph and not can_capture(model, cache):
            devices = ", ".join(map(str, dict.fromkeys(cache.rows.layer_devices)))
            raise CacheError(
                "a CUDA graph needs a model on one CUDA device, decoded by the kernels, nothing offloaded and no "
                f"rotary frequencies that depend on the length, got layers on {devices}: leave use_graph out"
            )
        self.model, self.cache = model, cache
        self.use_graph = can_capture(model, cache) if use_graph is None else use_graph
        self.token = torch.empty(0, 1, dtype=torch.int64, device=model.device)
        self.is_sound = torch.ones((), dtype=torch.bool, device=model.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream: torch.cuda.Stream | None = None  # of warm-up and capture
        self._captured: tuple[int, ...] = ()
        self._num_launched = 0

    @torch.no_grad()
    def run(
        self,
        token: Tensor,
        max_new_tokens: int,
        eos_token_ids: Collection[int] = (),
        *,
        pad_token_id: int = 0,
        poll_steps: int = POLL_STEPS,
        on_tokens: Callable[[Tensor], object] | None = None,
    ) -> Tensor:
        """Greedy tokens, int64 [B, N] on the model's device, N at most max_new_tokens, `token` among them.

        token: int64 [B, 1], the first new token, which the prefill's logits gave. It ends when every row has ended;
        a row that has is padded. on_tokens: given each newly polled piece, int64 [B, n] on the host.

        Raises CacheError (a full reserve under `then: stop`) and NumericsError.
        """
        if self.token.shape != token.shape:
            self.token, self._graph = token.clone(), None
        self.token.copy_(token)
        self.is_sound.fill_(True)
        tokens = torch.full((len(token), max_new_tokens), pad_token_id, dtype=torch.int64, device=self.token.device)
        tokens[:, :1] = self.token
        has_ended = torch.zeros(len(token), dtype=torch.bool)
        num_polled, num_done = 0, 1
        while True:
            piece = self._polled(tokens[:, num_polled:num_done], has_ended, eos_token_ids, pad_token_id)
            tokens[:, num_polled : num_polled + piece.shape[1]] = piece
            num_polled += piece.shape[1]
            if on_tokens is not None:
                on_tokens(piece)
            if num_polled < num_done or num_done == max_new_tokens or bool(has_ended.all()):
                return tokens[:, :num_polled]
            for _ in range(self.cache.room(min(poll_steps, max_new_tokens - num_done))):
                self._launch()
                tokens[:, num_done] = self.token[:, 0]
                num_done += 1

    def _polled(self, tokens: Tensor, has_ended: Tensor, eos_token_ids: Collection[int], pad_token_id: int) -> Tensor:
        """Wait for these tokens [B, n]; on the host, padded after each row's end, and no longer than the last end."""
        piece, is_sound = tokens.cpu(), bool(self.is_sound)
        for counters in self.cache.rows.counters.values():
            counters.check(self.cache.plan.model.storage_dtype)
        if not is_sound:
            raise NumericsError(NOT_FINITE)
        for i in range(piece.shape[1]):
            piece[:, i].masked_fill_(has_ended, pad_token_id)
            has_ended |= torch.isin(piece[:, i], torch.tensor(list(eos_token_ids), dtype=torch.int64))
            if bool(has_ended.all()):
                return piece[:, : i + 1]
        return piece

    def _launch(self) -> None:
        """One step: by the graph once there is one for the tensors as they lie now."""
        if not self.use_graph:
            self._step()
            return
        addresses = self._addresses()
        if self._captured != addresses:
            self._graph, self._captured, self._num_launched = None, addresses, 0
        if self._graph is not None:
            self._graph.replay()
            self.cache.advance(1)
            return
        current = torch.cuda.current_stream(self.token.device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.token.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._step()
        current.wait_stream(self._stream)
        self._num_launched += 1
        if self._num_launched == WARM_UP_STEPS:
            graph = torch.cuda.CUDAGraph()
            self.cache.advance(-1)  # what is captured is counted, but not run
            with torch.cuda.graph(graph, stream=self._stream):
                self._step()
            self._graph = graph

    def _step(self) -> None:
        """Append the token, decode the next one into its place."""
        counters = self.cache.rows.counters[self.cache.rows.layer_devices[0]]
        positions = (counters.prompt + counters.appended)[:, None].long().to(self.token.device)
        model = cast(Any, self.model)
        logits = model(self.token, position_ids=positions, past_key_values=self.cache, use_cache=True).logits
        logits = logits[:, -1].float()
        self.is_sound.logical_and_(finite(logits))
        self.token.copy_(logits.argmax(-1, keepdim=True))

    def _addresses(self) -> tuple[int, ...]:
        """Where everything lies that a captured step has been told of."""
        rows = self.cache.rows
        assert rows.arena is not None
        held = [*rows.arena.buffers.values(), *(c.appended for c in rows.counters.values()), self.token]
        return tuple(tensor.data_ptr() for tensor in held)
