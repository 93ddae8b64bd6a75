"""One answer to one prompt under a plan, with what it took: bytes, kept tokens, seconds, the prefill's peak memory.

The loop is transformers' own `generate`; this adds the cache, a watch on the logits, and the numbers. Where the kernels
decode on CUDA, a greedy answer comes from the runtime's own loop instead (`graph.py`), with the same tokens. Without a
plan the same call answers with the full cache, which is what a plan is compared with.

Not here: batches (call `model.generate` with a `PlannedCache`), templates and files (`cli.py`).
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer
from transformers.generation.streamers import BaseStreamer

from qpkv_runtime.cache import PlannedCache, runs_on
from qpkv_runtime.errors import InputError, NumericsError
from qpkv_runtime.graph import NOT_FINITE, POLL_STEPS, DecodeLoop, can_capture, finite
from qpkv_runtime.ledger import full_bytes
from qpkv_runtime.models import model_shape
from qpkv_runtime.plan import Plan

LEAST_DIVISOR = 1e-6  # of logits, which a smaller one could make infinite
STREAM_STEPS = 8  # between two looks at the tokens when somebody reads along


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, in transformers' words; greedy unless told otherwise.

    None leaves a setting to the model's own generation config. seed: set before the answer begins, None to go on with
    torch's generator as it is. Raises InputError for a number that transformers could not use.
    """

    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "repetition_penalty"):
            if (value := getattr(self, name)) is not None and not LEAST_DIVISOR <= value < float("inf"):
                raise InputError(f"{name} must be at least {LEAST_DIVISOR}, got {value}")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise InputError(f"seed must be between 0 and 2**63 - 1, got {self.seed}")

    def options(self) -> dict[str, Any]:
        """Keyword arguments for `model.generate`."""
        names = ("temperature", "top_k", "top_p")
        if not self.do_sample:
            chosen: dict[str, Any] = dict.fromkeys(names)  # unset: those of the model's generation config would warn
        else:
            chosen = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.repetition_penalty is not None:
            chosen["repetition_penalty"] = self.repetition_penalty
        return {"do_sample": self.do_sample, **chosen}


@dataclass(frozen=True)
class Stats:
    """What an answer took.

    full_bytes: this prompt's keys and values at 16 bit, by the ledger; allocated_bytes: what the cache's tensors really
    take. tokens_held: per layer, tokens in each tier, then appended ones (one number without a plan). decode_seconds:
    for all tokens but the first, which is the prefill's. peak_memory_bytes: by the end of the prefill, on `cuda` the
    most that torch had allocated, weights included; in the `process` the growth of its peak resident memory, which is
    0 where loading the model took more.
    """

    prompt_tokens: int
    new_tokens: int
    full_bytes: int
    allocated_bytes: int
    tokens_held: tuple[tuple[int, ...], ...]
    prefill_seconds: float
    decode_seconds: float
    peak_memory_bytes: int
    peak_memory_of: str

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.prefill_seconds

    @property
    def decode_tokens_per_second(self) -> float | None:
        """None for an answer of one token."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 else None


@dataclass(frozen=True)
class Answer:
    """tokens: the generated ids, a final end-of-sequence token included; text: without special tokens."""

    tokens: tuple[int, ...]
    text: str
    stats: Stats


class TextStream(TextStreamer):
    """Gives the answer's text to `write`, word by word as they are formed."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.write(text)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan | None,
    input_ids: Tensor,
    *,
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
    streamer: BaseStreamer | None = None,
    eager: bool = False,
) -> Answer:
    """Answer one prompt inside the bytes of `plan`; with the full cache when plan is None.

    input_ids: int64 [1, T] on any device. max_new_tokens: at most so many, and no more than the model's context has
    room for. streamer: is given the prompt and every token as it comes, as transformers' streamers are; by the
    runtime's own loop some tokens at a time. eager: transformers' loop everywhere, every step launched anew.

    Raises InputError (a prompt that is empty, or leaves no room in the model's context), PlanError (a plan for
    another shape), CacheError (a full reserve under `then: stop`) and NumericsError (logits that are not numbers).
    """
    sampling, shape = sampling or Sampling(), model_shape(model)
    if input_ids.ndim != 2 or input_ids.shape[0] != 1:
        raise InputError(f"input_ids must be of shape [1, T], got {list(input_ids.shape)}")
    prompt_tokens, context_tokens = input_ids.shape[1], shape.max_context_tokens
    if prompt_tokens == 0:
        raise InputError("a prompt must have at least one token, got none")
    if prompt_tokens >= context_tokens:
        raise InputError(
            f"prompt and answer must fit the model's context of {context_tokens} tokens, "
            f"and the prompt has {prompt_tokens}"
        )
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, got {max_new_tokens}")

    cache = DynamicCache(config=model.config) if plan is None else PlannedCache.from_plan(plan, model)
    device = runs_on(model)
    ids, watch = input_ids.to(device), _Watch(device)
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    max_new_tokens = min(max_new_tokens, context_tokens - prompt_tokens)
    if isinstance(cache, PlannedCache) and not eager and _is_for_own_loop(model, cache, sampling):
        tokens = _by_own_loop(model, cache, ids, max_new_tokens, watch, streamer)
    else:
        sequence = cast(Any, model).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            logits_processor=[watch],
            streamer=streamer,
            tokenizer=tokenizer,  # for the model's stop strings
            **_ONE_ANSWER,
            **_padding(model),
            **sampling.options(),
        )
        tokens = sequence[0, prompt_tokens:].tolist()
    end = perf_counter()
    stats = Stats(
        prompt_tokens=prompt_tokens,
        new_tokens=len(tokens),
        full_bytes=full_bytes(shape, prompt_tokens),
        allocated_bytes=_allocated_bytes(cache),
        tokens_held=_tokens_held(cache),
        prefill_seconds=watch.prefill_end - watch.start,
        decode_seconds=end - watch.prefill_end,
        peak_memory_bytes=watch.peak_memory_bytes,
        peak_memory_of=watch.memory.of,
    )
    return Answer(tuple(tokens), cast(str, tokenizer.decode(tokens, skip_special_tokens=True)), stats)


# What a model's generation config is not asked about: one answer, as ids, in the cache that is given.
_ONE_ANSWER: dict[str, Any] = {
    "num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False, "use_cache": True,
    "cache_implementation": None,
}  # fmt: skip

# What it can ask for besides a plain argmax, and the values that ask for nothing.
_PROCESSORS: dict[str, tuple[object, ...]] = {
    "repetition_penalty": (None, 1.0), "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0), "min_length": (None, 0),
    "min_new_tokens": (None,), "bad_words_ids": (None,), "sequence_bias": (None,), "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,), "suppress_tokens": (None, []), "begin_suppress_tokens": (None, []),
    "exponential_decay_length_penalty": (None,), "guidance_scale": (None, 1.0), "watermarking_config": (None,),
    "remove_invalid_values": (None, False), "renormalize_logits": (None, False), "stop_strings": (None,),
    "max_time": (None,),
}  # fmt: skip


def _is_for_own_loop(model: PreTrainedModel, cache: PlannedCache, sampling: Sampling) -> bool:
    """Whether the answer is a plain argmax of what kernels decode on one CUDA device."""
    config = model.generation_config
    is_plain = all(getattr(config, name, None) in nothing for name, nothing in _PROCESSORS.items())
    is_greedy = not sampling.do_sample and sampling.repetition_penalty in (None, 1.0)
    return is_plain and is_greedy and can_capture(model, cache)


def _by_own_loop(
    model: PreTrainedModel, cache: PlannedCache, ids: Tensor, max_new_tokens: int, watch: _Watch,
    streamer: BaseStreamer | None,
) -> list[int]:  # fmt: skip
    """The tokens of a greedy answer, a final end-of-sequence token included."""
    with torch.no_grad():
        logits = cast(Any, model)(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].float()
    token = watch(ids, logits).argmax(-1, keepdim=True)
    if streamer is not None:
        streamer.put(ids.cpu())

    def stream(tokens: Tensor) -> None:
        for token in tokens.unbind(1):
            if streamer is not None:
                streamer.put(token)

    eos = model.generation_config.eos_token_id if model.generation_config is not None else None
    eos_token_ids = [] if eos is None else [eos] if isinstance(eos, int) else eos
    steps = POLL_STEPS if streamer is None else STREAM_STEPS
    loop = DecodeLoop(model, cache)
    tokens = loop.run(token, max_new_tokens, eos_token_ids, poll_steps=steps, on_tokens=stream)
    if streamer is not None:
        streamer.end()
    return cast("list[int]", tokens[0].tolist())


def _padding(model: PreTrainedModel) -> dict[str, int]:
    """The padding token where the model names none: its first end-of-sequence token. It is never seen in one row, but
    transformers would say in a warning that it chooses just this."""
    config = model.generation_config
    assert config is not None
    if config.pad_token_id is not None or config.eos_token_id is None:
        return {}
    eos = config.eos_token_id
    return {"pad_token_id": eos if isinstance(eos, int) else eos[0]}


class _Watch(LogitsProcessor):
    """Refuses logits that are not numbers; its first call, on the prefill's logits, notes the time and the memory."""

    def __init__(self, device: torch.device) -> None:
        self.memory = _PeakMemory(device)
        self.start = perf_counter()
        self.prefill_end, self.peak_memory_bytes = 0.0, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not bool(finite(scores)):
            raise NumericsError(NOT_FINITE)
        if not self.prefill_end:
            self.prefill_end, self.peak_memory_bytes = perf_counter(), self.memory.peak_bytes()
        return scores


class _PeakMemory:
    """The peak since this was made, of what can be measured: CUDA's allocator, else the process's resident memory."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.of = device, "cuda" if device.type == "cuda" else "process"
        if self.of == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.before_bytes = _peak_resident_bytes()

    def peak_bytes(self) -> int:
        if self.of == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _peak_resident_bytes() - self.before_bytes


def _peak_resident_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _allocated_bytes(cache: DynamicCache | PlannedCache) -> int:
    if isinstance(cache, PlannedCache):
        return cache.allocated_bytes
    layers = cast(Any, cache.layers)
    return sum(tensor.untyped_storage().nbytes() for layer in layers for tensor in (layer.keys, layer.values))


def _tokens_held(cache: DynamicCache | PlannedCache) -> tuple[tuple[int, ...], ...]:
    if isinstance(cache, PlannedCache):
        return tuple(tuple(layer) for layer in cache.tokens_held())
    return tuple((layer.keys.shape[2],) for layer in cast(Any, cache.layers))
