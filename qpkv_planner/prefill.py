"""Prefill of the calibration contexts, once: everything that evaluations need, for any plan.

A context runs through the model once, densely; then all its samples, as one batch over its cache, give their prompts'
keys, values and window queries and the full cache's log-probabilities of the continuation. Tokens' importances are
computed here, by the runtime's code, for every `Scoring` that a search may ask for; queries are then dropped.

A sample's last prompt token is the first that is fed over the compressed cache, so that every measured token,
the first of an answer too, is predicted from compressed keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from qpkv_kernels.attention import causal_attention
from qpkv_planner.calibration import CONTINUATION_TOKENS, Context, Regime, Sample, Split, Target
from qpkv_planner.fit import FLOAT32_BYTES
from qpkv_planner.machine import free_bytes
from qpkv_planner.side_by_side import side_by_side
from qpkv_runtime.attention import Handle
from qpkv_runtime.cache import layer_parts, runs_on
from qpkv_runtime.compression import Observation, Ranking, Scoring, observe, rank, to_storage
from qpkv_runtime.errors import InputError, NumericsError
from qpkv_runtime.models.shape import ModelShape
from qpkv_runtime.scorers import LayerParts, Prefill

ANSWERABLE_NATS = 1.0  # a question on which the full cache does worse than this says nothing about compression


@dataclass(frozen=True)
class Scored:
    """One layer under one scoring, of all samples: the order of their tokens, left-padded with what is never kept, and
    query statistics [N, H_kv, 2, D]."""

    ranking: Ranking
    query_stats: Tensor


@dataclass(frozen=True)
class PreparedLayer:
    """One layer of a split. keys, values: the 16-bit tokens of all contexts and prompts in a row, [M, H_kv, D], on any
    device or mapped from a file."""

    keys: Tensor
    values: Tensor
    scored: dict[Scoring, Scored]


@dataclass(frozen=True)
class Prepared:
    """A split after prefill: N samples, sorted by part.

    token_rows: int64 [N, T], where each sample's (left-padded) prompt tokens are in a layer's keys and values;
    prompt_tokens: their number; inputs: what is fed over the compressed cache, the last prompt token
    (question-agnostic: the whole question) and the continuation but its last; targets: each continuation, predicted by
    as many of the last inputs;
    full_logprobs: float32 [all targets, V], under the full cache; kinds, contexts: each sample's kind and the number
    of its context, the same for those of one document. part_starts: the samples of part p are part_starts[p] to
    part_starts[p + 1]; a part holds whole documents.
    """

    name: str
    hash: str
    num_contexts: int
    num_unanswerable: dict[str, int]
    layers: tuple[PreparedLayer, ...]
    token_rows: Tensor
    prompt_tokens: list[int]
    inputs: list[tuple[int, ...]]
    targets: list[tuple[int, ...]]
    full_logprobs: Tensor
    kinds: list[str]
    contexts: list[int]
    part_starts: tuple[int, ...]

    @property
    def scorings(self) -> frozenset[Scoring]:
        """What tokens' importances are known under."""
        return frozenset(self.layers[0].scored)

    def __len__(self) -> int:
        return len(self.prompt_tokens)


class _RecordingStep(Handle):
    def __init__(self, layer: _RecordingLayer, key: Tensor, value: Tensor) -> None:
        self.layer, self.key, self.value = layer, key, value

    def attend(self, query: Tensor, num_padding: list[int] | None, scaling: float, softcap: float | None) -> Tensor:
        return self.layer.attend(query, self.key, self.value, scaling, softcap)


class _RecordingLayer(CacheLayerMixin):
    """A dense cache layer that remembers the last forward's queries, keys and values, and how it attended.

    `commit` makes them the past; until then the next forward starts from the same past.
    """

    supports_early_init = False

    def __init__(self, sliding_window: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sliding_window, self.is_sliding = sliding_window, sliding_window is not None
        self.past: tuple[Tensor, Tensor, Tensor] | None = None
        self.last: tuple[Tensor, Tensor, Tensor] | None = None
        self.scaling, self.softcap = 1.0, cast("float | None", None)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        step = _RecordingStep(self, key_states, value_states)
        return step, step

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None) -> Tensor:
        self.last, self.scaling, self.softcap = (query, key, value), scaling, softcap
        if self.past is not None:
            key, value = (
                torch.cat([past.expand(new.shape[0], -1, -1, -1), new], 2)
                for past, new in ((self.past[1], key), (self.past[2], value))
            )
        return causal_attention(query, key, value, None, scaling, self.sliding_window, softcap)

    def commit(self) -> None:
        self.past, self.last = self.last, None

    def get_seq_length(self) -> int:
        return 0 if self.past is None else self.past[1].shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


def output_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The output head's logits [N, V], float32, of hidden states [N, hidden] after the final norm."""
    logits = cast(nn.Module, model.get_output_embeddings())(hidden).float()
    softcap = getattr(model.config.get_text_config(decoder=True), "final_logit_softcapping", None)
    return cast(Tensor, logits if softcap is None else torch.tanh(logits / softcap) * softcap)


class ContextRun:
    """The prefill of one context and of its samples, as flat tensors per layer. parts: each layer's, where a scorer
    looks at them; samples: the context's, with the full cache's own continuations where those are the target."""

    @torch.no_grad()
    def __init__(
        self, model: PreTrainedModel, shape: ModelShape, context: Context, parts: list[LayerParts] | None = None,
        regime: Regime = "aware", target: Target = "gold",
    ) -> None:  # fmt: skip
        self.parts, self.regime = parts, regime
        layers = [_RecordingLayer(window) for window in shape.sliding_windows]
        cache = Cache(layers=list(layers))
        self.layers, self.context = layers, context
        device = runs_on(model)
        cast(Any, model.get_decoder())(torch.tensor([context.tokens], device=device), past_key_values=cache)
        for layer in layers:
            layer.commit()
        self.samples = context.samples
        if target == "self":
            written = self._greedy(model, cache, CONTINUATION_TOKENS)
            self.samples = tuple(
                replace(sample, continuation=own) for sample, own in zip(context.samples, written, strict=True)
            )
        rows = [sample.prompt + sample.continuation[:-1] for sample in self.samples]
        logits = self._branch(model, cache, rows, [len(sample.continuation) for sample in self.samples])
        self.logprobs = [of_sample.log_softmax(-1) for of_sample in logits]

    def _branch(
        self, model: PreTrainedModel, cache: Cache, rows: list[tuple[int, ...]], counts: Sequence[int]
    ) -> tuple[Tensor, ...]:
        """Logits [count, V] at the last `counts` tokens of rows that follow the context; nothing is committed."""
        longest = max(map(len, rows))
        ids = torch.tensor([row + (0,) * (longest - len(row)) for row in rows], device=runs_on(model))
        hidden = cast(Any, model.get_decoder())(ids, past_key_values=cache).last_hidden_state
        wanted = [of_row[len(row) - count : len(row)] for of_row, row, count in zip(hidden, rows, counts, strict=True)]
        logits: tuple[Tensor, ...] = output_logits(model, torch.cat(wanted)).split(list(counts))
        return logits

    def _greedy(self, model: PreTrainedModel, cache: Cache, num_tokens: int) -> list[tuple[int, ...]]:
        """What the full cache continues each sample's prompt with."""
        rows = [sample.prompt for sample in self.context.samples]
        for _ in range(num_tokens):
            logits = self._branch(model, cache, rows, [1] * len(rows))
            rows = [(*row, int(of_row.argmax())) for row, of_row in zip(rows, logits, strict=True)]
        return [row[-num_tokens:] for row in rows]

    def prefill(self, layer: int, row: int) -> Prefill:
        """What the runtime would see of this sample's prompt in one prefill; a window is a scoring's to say."""
        recorded = self.layers[layer]
        query, key, value = self._tokens(layer, row, self.num_prompt_tokens(row))
        return Prefill(
            layer, query, key, [0], recorded.scaling, recorded.softcap, recorded.sliding_window,
            window=0, value=value, parts=self.parts[layer] if self.parts else None, shared={},
        )  # fmt: skip

    def answer(self, layer: int, row: int) -> Prefill:
        """The tokens that predict this sample's continuation, as queries, over all that comes before them."""
        recorded, num_queries = self.layers[layer], len(self.context.samples[row].continuation)
        query, key, value = self._tokens(layer, row, self.num_prompt_tokens(row) + num_queries)
        return Prefill(
            layer, query[:, :, -num_queries:], key, [0], recorded.scaling, recorded.softcap, recorded.sliding_window,
            num_queries, value=value,
        )  # fmt: skip

    def _tokens(self, layer: int, row: int, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """The first tokens of a sample: query [1, H, T, D], key and value [1, H_kv, T, D]."""
        recorded = self.layers[layer]
        assert recorded.past is not None and recorded.last is not None
        query, key, value = (
            torch.cat([past, new[row : row + 1, :, : num_tokens - past.shape[2]]], 2)
            for past, new in zip(recorded.past, recorded.last, strict=True)
        )
        return query, key, value

    def check_finite(self, storage_dtype: str) -> None:
        """Raise NumericsError for the first layer and tensor of the context that cannot be stored."""
        for layer, recorded in enumerate(self.layers):
            assert recorded.past is not None
            for name, x in (("key", recorded.past[1]), ("value", recorded.past[2])):
                to_storage(storage_dtype, layer, name, x)

    def num_prompt_tokens(self, row: int) -> int:
        """What is compressed: the prompt without its last token; the context alone where no question is known."""
        own = len(self.samples[row].prompt) - 1 if self.regime == "aware" else 0
        return len(self.context.tokens) + own


def largest_number(model: PreTrainedModel, shape: ModelShape, context: Context) -> float:
    """The largest magnitude among a context's keys and values."""
    pasts = [layer.past for layer in ContextRun(model, shape, context).layers]
    return max(float(x.abs().max()) for past in pasts if past is not None for x in past[1:])


Allocate = Callable[[str, tuple[int, ...], torch.dtype, torch.device], Tensor]
"""(name, shape, dtype, the layer's device) -> a tensor to be filled."""


def in_memory(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Room where the layer runs."""
    return torch.empty(shape, dtype=dtype, device=device)


def prepare(
    model: PreTrainedModel,
    shape: ModelShape,
    storage_dtype: str,
    split: Split,
    scorings: Sequence[Scoring],
    num_parts: int,
    progress: Callable[[], None],
    allocate: Allocate = in_memory,
) -> Prepared:
    """Prefill a split. Calls `progress` after each context.

    allocate: makes the room for each layer's keys and values, once the first context shows where the layer runs; what
    else is remembered of the layer goes to the same device.

    num_parts: fewer where there are fewer documents. Questions that the full cache cannot answer are left out. Raises
    NumericsError when the model gives NaN.
    """
    parts = layer_parts(model) if any(scoring.needs_parts for scoring in scorings) else None
    documents = [split.document_of(index) for index in range(len(split.contexts))]
    num_parts = min(num_parts, len(set(documents)))
    part_of = [document % num_parts for document in documents]
    order = sorted(range(len(documents)), key=lambda index: (part_of[index], index))
    room = sum(len(context.tokens) + sum(len(s.prompt) for s in context.samples) for context in split.contexts)
    banks: dict[tuple[int, str], Tensor] = {}  # the room: questions that are left out would fit too
    observed: list[dict[Scoring, list[tuple[Tensor, Tensor]]]] = [
        {scoring: [] for scoring in scorings} for _ in range(shape.num_layers)
    ]
    samples: list[tuple[int, Sample]] = []
    token_rows: list[Tensor] = []
    logprobs: list[Tensor] = []
    part_starts, unanswerable, num_stored = [0], dict[str, int](), 0
    see = partial(_see, model, shape, storage_dtype, split, scorings, parts)
    found = _each(see, order, shape, split, runs_on(model))
    for position, (index, seen) in enumerate(zip(order, found, strict=True)):
        if position and part_of[index] != part_of[order[position - 1]]:
            part_starts.append(len(samples))
        base, num_context = num_stored, len(split.contexts[index].tokens)
        num_stored += num_context
        for own in seen.own_tokens:
            rows = torch.cat([torch.arange(base, base + num_context), torch.arange(num_stored, num_stored + own)])
            token_rows.append(rows)
            num_stored += own
        samples += [(index, sample) for sample in seen.samples]
        logprobs += seen.logprobs
        for kind in seen.unanswerable:
            unanswerable[kind] = unanswerable.get(kind, 0) + 1
        for layer, (sides, observations) in enumerate(seen.layers):
            for name, stored in sides.items():
                if (layer, name) not in banks:
                    sizes = (room, *stored.shape[1:])
                    banks[layer, name] = allocate(f"{layer}.{name}s", sizes, stored.dtype, stored.device)
                banks[layer, name][base:num_stored] = stored
            home = banks[layer, "key"].device
            for scoring, of_samples in observations.items():
                for one in of_samples:
                    observed[layer][scoring].append((one.importance[0].to(home), one.query_stats[0].to(home)))
        progress()
    if not samples:
        raise InputError(
            f"the {split.name} split must hold something that the full cache can answer, but its loss is above "
            f"{ANSWERABLE_NATS} nat on all {sum(unanswerable.values())} samples: give other --calibration data"
        )
    part_starts = sorted({*part_starts, len(samples)})  # a part of which nothing is left is none
    return Prepared(
        name=split.name,
        hash=split.hash,
        num_contexts=len(split.contexts),
        num_unanswerable=unanswerable,
        layers=tuple(
            PreparedLayer(
                banks[layer, "key"],
                banks[layer, "value"],
                {scoring: _stack(observed[layer][scoring]) for scoring in scorings},
            )
            for layer in range(shape.num_layers)
        ),
        token_rows=_left_pad(token_rows, 0),
        prompt_tokens=[len(rows) for rows in token_rows],
        inputs=[
            (*sample.prompt[-1 if split.regime == "aware" else 0 :], *sample.continuation[:-1]) for _, sample in samples
        ],
        targets=[sample.continuation for _, sample in samples],
        full_logprobs=torch.cat(logprobs),
        kinds=[sample.kind for _, sample in samples],
        contexts=[documents[context] for context, _ in samples],
        part_starts=tuple(part_starts),
    )


@dataclass(frozen=True)
class _Seen:
    """What the run of one context leaves: its samples that the full cache can answer, the tokens that their prompts
    have beyond the context, their log-probabilities; the kinds of those it cannot; each layer as of `_remember`."""

    samples: list[Sample]
    own_tokens: list[int]
    logprobs: list[Tensor]
    unanswerable: list[str]
    layers: list[tuple[dict[str, Tensor], dict[Scoring, list[Observation]]]]


def _see(
    model: PreTrainedModel, shape: ModelShape, storage_dtype: str, split: Split, scorings: Sequence[Scoring],
    parts: list[LayerParts] | None, index: int,
) -> _Seen:  # fmt: skip
    """Of one of the split's contexts."""
    run = ContextRun(model, shape, split.contexts[index], parts, split.regime, split.target)
    kept, unanswerable = [], []
    for row, sample in enumerate(run.samples):
        expected = torch.tensor(sample.continuation, device=run.logprobs[row].device)[:, None]
        loss = -run.logprobs[row].gather(1, expected).mean()
        if not bool(loss.isfinite()):
            run.check_finite(storage_dtype)
            raise NumericsError(f"the model's output must be finite, but its loss on a {sample.kind} sample is NaN")
        if sample.needle is not None and split.target == "gold" and float(loss) > ANSWERABLE_NATS:
            unanswerable.append(sample.kind)
        else:
            kept.append(row)
    remember = partial(_remember, run, kept, storage_dtype, scorings)
    return _Seen(
        [run.samples[row] for row in kept],
        [run.num_prompt_tokens(row) - len(run.context.tokens) for row in kept],
        [run.logprobs[row] for row in kept],
        unanswerable,
        side_by_side(remember, range(shape.num_layers), runs_on(model)),
    )


def _each(
    see: Callable[[int], _Seen], order: Sequence[int], shape: ModelShape, split: Split, device: torch.device
) -> Iterator[_Seen]:
    """`see` of each context. On a CPU as many at once, a thread each, as torch uses threads, if that takes no more than
    a quarter of the memory that is free; else one by one, which leaves threads waiting for each other."""
    num_threads = torch.get_num_threads() if device.type == "cpu" else 1
    longest = max(len(context.tokens) for context in split.contexts)
    heads = shape.num_query_heads + 2 * shape.num_kv_heads
    held_bytes = 2 * FLOAT32_BYTES * shape.num_layers * heads * shape.head_size * longest  # by a run, and as much again
    if num_threads * held_bytes > free_bytes(device) // 4:
        num_threads = 1
    for start in range(0, len(order), num_threads):
        group = order[start : start + num_threads]
        yield from map(see, group) if num_threads == 1 else side_by_side(see, group, device)


def _remember(
    run: ContextRun, kept: Sequence[int], storage_dtype: str, scorings: Sequence[Scoring], layer: int
) -> tuple[dict[str, Tensor], dict[Scoring, list[Observation]]]:
    """Of one layer: the keys and values, 16-bit [M, H_kv, D], of the context and then of each of these samples' own
    prompts; and what every scoring sees of each sample."""
    recorded, num_context = run.layers[layer], len(run.context.tokens)
    assert recorded.past is not None and recorded.last is not None
    sides = {}
    for name, side in (("key", 1), ("value", 2)):
        own = (recorded.last[side][row, :, : run.num_prompt_tokens(row) - num_context] for row in kept)
        together = torch.cat([recorded.past[side][0], *own], 1)
        sides[name] = to_storage(storage_dtype, layer, name, together).transpose(0, 1)
    observations: dict[Scoring, list[Observation]] = {scoring: [] for scoring in scorings}
    for row in kept:
        prefill = run.prefill(layer, row)
        for scoring in scorings:
            observations[scoring].append(observe(scoring, prefill))
    return sides, observations


def _stack(observed: list[tuple[Tensor, Tensor]]) -> Scored:
    """Importances [H_kv, T] and query statistics of every sample, left-padded to one length."""
    importance = _left_pad([importance for importance, _ in observed], float("-inf"))
    return Scored(rank(importance), torch.stack([stats for _, stats in observed]))


def _left_pad(rows: list[Tensor], fill: float) -> Tensor:
    """Tensors [..., T_i] -> [N, ..., max T]."""
    longest = max(row.shape[-1] for row in rows)
    return torch.stack([torch.nn.functional.pad(row, (longest - row.shape[-1], 0), value=fill) for row in rows])
