"""The packed cache as a Hugging Face `Cache`.

    cache = PlannedCache.from_plan(plan, model)
    model.generate(**inputs, past_key_values=cache)

The first forward is the prefill: each layer attends densely to the prompt, is compressed inside its own attention
call, and its dense keys and values die with that call, so at most one layer's are alive. Everything later is appended
to the reserve in the arena. `get_seq_length` is the logical length (RoPE positions), not what is stored. A cache
serves one batch; `reset()` readies it for the next, a deepcopy reuses a prefilled prompt.

Not here: chunked prefill (a chunk after the first is appended, like generated tokens), rolling back (`crop`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import partial
from inspect import signature
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from qpkv_kernels.attention import causal_attention
from qpkv_runtime.arena import Arena
from qpkv_runtime.attention import HOW_TO_LOAD, NAME, Handle
from qpkv_runtime.backend import use_kernels
from qpkv_runtime.compression import Scoring, compress, keep, observe, rank
from qpkv_runtime.decode_step import Counters, DecodeStep
from qpkv_runtime.errors import CacheError, PlanError, UnsupportedModelError
from qpkv_runtime.ledger import LayerLedger, Ledger, make_ledger
from qpkv_runtime.models.shape import ModelShape
from qpkv_runtime.packed import PackedLayer
from qpkv_runtime.plan import Plan
from qpkv_runtime.scorers import LayerParts, Prefill

NO_CROP = "a packed cache cannot be rolled back (crop), so assisted generation is not available"


class _Step(Handle):
    """The new tokens of one forward in one layer, on their way to the attention function."""

    def __init__(self, layer: PlannedLayer, key: Tensor, value: Tensor) -> None:
        self.layer, self.key, self.value = layer, key, value
        self.knows_padding = layer.is_compressed

    def attend(self, query: Tensor, num_padding: list[int] | None, scaling: float, softcap: float | None) -> Tensor:
        attend = self.layer.decode if self.layer.is_compressed else self.layer.prefill
        return attend(query, self.key, self.value, num_padding, scaling, softcap)


class _Rows:
    """What a cache's layers share: the arena, made when the batch size is known, where it lies, and what is counted on
    each device."""

    def __init__(self, ledger: Ledger, layer_devices: list[torch.device]) -> None:
        self.ledger, self.layer_devices = ledger, layer_devices
        self.arena: Arena | None = None
        self.counters: dict[torch.device, Counters] = {}
        self.prompt_tokens: list[int] = []
        self.begun: set[int] = set()  # the layers that hold these prompts

    def block(self, layer: int, num_rows: int) -> Tensor:
        if self.arena is None or self.arena.num_rows != num_rows:
            self.arena = Arena(self.ledger, num_rows, self.layer_devices)
        return self.arena.block(layer)

    def begin(self, layer: int, prompt_tokens: list[int]) -> None:
        """A layer holds these prompts. With the first that says so counting begins anew, in place while the number of
        rows stays."""
        if layer not in self.begun and prompt_tokens == self.prompt_tokens:
            self.begun.add(layer)
            return
        for device in dict.fromkeys(self.layer_devices):
            if len(prompt_tokens) != len(self.prompt_tokens):
                self.counters[device] = Counters.of(prompt_tokens, 0, len(self.layer_devices), device)
            else:
                self.counters[device].restart(prompt_tokens)
        self.prompt_tokens, self.begun = list(prompt_tokens), {layer}

    def select(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] was."""
        assert self.arena is not None
        self.arena.select_rows(rows)
        self.prompt_tokens = [self.prompt_tokens[row] for row in rows.tolist()]
        for device, counters in self.counters.items():
            chosen = counters.prompt.index_select(0, rows.to(device))
            if len(chosen) == len(counters.prompt):
                counters.prompt.copy_(chosen)
            else:
                counters.prompt = chosen

    def is_last_of_device(self, layer: int) -> bool:
        """Whether a step that has passed this layer has passed all of its device."""
        return self.layer_devices[layer] not in self.layer_devices[layer + 1 :]


def _without_autocast(x: Tensor) -> torch.autocast:
    """Where x is, without the types that an autocast around the model would choose: ours are written down."""
    return torch.autocast(x.device.type, enabled=False)


class PlannedLayer(CacheLayerMixin):
    """One layer of a PlannedCache. prompt_tokens: each row's prompt length without padding, once compressed."""

    supports_early_init = False

    def __init__(self, plan: Plan, layout: LayerLedger, rows: _Rows, parts: LayerParts | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.plan, self.layout, self.rows, self.parts = plan, layout, rows, parts
        self.scoring = Scoring.of(plan.scorer, plan.sinks, plan.window)
        self.sliding_window = plan.model.shape.sliding_windows[layout.layer]
        self.is_sliding = self.sliding_window is not None
        self.reset()

    def reset(self) -> None:
        self.num_seen, self.num_appended = 0, 0
        self.prompt_tokens: list[int] = []
        self.step: DecodeStep | None = None  # how the kernels decode this layer; None: by the reference path

    def begin(self, prompt_tokens: list[int]) -> None:
        """The block holds these prompts; what comes next is decoding."""
        layer = self.layout.layer
        device = self.rows.layer_devices[layer]
        self.prompt_tokens = prompt_tokens
        self.rows.begin(layer, prompt_tokens)
        self.step = DecodeStep.of(self.plan, layer, device) if use_kernels(device) else None
        self.is_last_of_device = self.rows.is_last_of_device(layer)

    @property
    def is_compressed(self) -> bool:
        return bool(self.prompt_tokens)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.is_initialized = True
        num_new = key_states.shape[2]
        if self.is_compressed and self.plan.decode.then == "stop":
            self.room(num_new, whole=True)
        self.num_seen += num_new
        step = _Step(self, key_states, value_states)
        return step, step

    def room(self, num_tokens: int, whole: bool = False) -> int:
        """How many of so many tokens can be appended, all of them where `whole`; raises CacheError rather than none."""
        decode = self.plan.decode
        left = decode.reserve_tokens - self.num_appended if decode.then == "stop" else num_tokens
        if left < (num_tokens if whole else 1):
            raise CacheError(
                f"the plan's reserve holds {decode.reserve_tokens} generated tokens and says `then: stop`: "
                "generate fewer, or plan with more --max-new-tokens or --then evict"
            )
        return min(num_tokens, left)

    def packed(self) -> PackedLayer:
        """The layer's part of the arena."""
        return PackedLayer(self.plan, self.layout, self.rows.block(self.layout.layer, len(self.prompt_tokens)))

    def prefill(
        self, query: Tensor, key: Tensor, value: Tensor,
        num_padding: list[int] | None, scaling: float, softcap: float | None,
    ) -> Tensor:  # fmt: skip
        """Dense attention to the prompt, then its compression. As `Handle.attend`; key, value [B, H_kv, T, D]."""
        layer, num_rows, num_tokens = self.layout.layer, key.shape[0], key.shape[2]
        num_padding = num_padding or [0] * num_rows
        out = causal_attention(query, key, value, num_padding, scaling, self.sliding_window, softcap)
        with torch.no_grad(), _without_autocast(query):
            observation = observe(
                self.scoring,
                Prefill(
                    layer, query, key, num_padding, scaling, softcap, self.sliding_window,
                    self.scoring.window, self.scoring.sinks, value, self.parts,
                ),
            )  # fmt: skip
            selections = keep(self.plan, layer, rank(observation.importance))
            block, storage_dtype = self.rows.block(layer, num_rows), self.plan.model.storage_dtype
            compress(block, self.layout, storage_dtype, key, value, selections, num_padding, observation.query_stats)
        self.begin([num_tokens - padding for padding in num_padding])
        if layer == 0 and max(self.prompt_tokens) > self.plan.budget.context_tokens:
            warnings.warn(
                f"the prompt has {max(self.prompt_tokens)} tokens, more than the "
                f"{self.plan.budget.context_tokens} the plan was made for: it keeps the same bytes, a smaller share",
                stacklevel=2,
            )
        return out

    def decode(
        self, query: Tensor, key: Tensor, value: Tensor,
        num_padding: list[int] | None, scaling: float, softcap: float | None,
    ) -> Tensor:  # fmt: skip
        """Attention over the packed cache; appends the new tokens."""
        counters = self.rows.counters[self.rows.layer_devices[self.layout.layer]]
        if self.step is None:
            with _without_autocast(query):
                out = self.packed().attend(query, key, value, self.num_appended, self.prompt_tokens, scaling, softcap)
        else:
            assert self.rows.arena is not None
            with torch.no_grad():
                arena, start = self.rows.arena.extent(self.layout.layer)
                out = self.step(query, key, value, arena, start, counters, scaling, softcap)
        self.num_appended += key.shape[2]
        if self.is_last_of_device:
            counters.appended.add_(key.shape[2])
        return out

    def load(self, block: Tensor, prompt_tokens: list[int]) -> None:
        """Take over a block that `compress` wrote (uint8 [B, stored_bytes]), as if it had been prefilled here."""
        self.rows.block(self.layout.layer, len(prompt_tokens)).copy_(block)
        self.hold(prompt_tokens)

    def hold(self, prompt_tokens: list[int]) -> None:
        """As if the prompts of these lengths, whose blocks the arena has, had been prefilled here."""
        self.num_seen, self.num_appended = max(prompt_tokens), 0
        self.begin(list(prompt_tokens))
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self.num_seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.num_seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> NoReturn:
        raise CacheError(NO_CROP)

    def offload(self) -> NoReturn:
        raise CacheError("a packed cache stays on its device: offloading is not available")


class PlannedCache(Cache):
    """A batch of sequences under a plan. Build it with `from_plan`.

    parts: each layer's, for a scorer that looks at them; None where nothing will be prefilled.
    """

    def __init__(self, plan: Plan, layer_devices: list[torch.device], parts: list[LayerParts] | None = None) -> None:
        self.plan, self.ledger = plan, make_ledger(plan)
        self.rows = _Rows(self.ledger, layer_devices)
        super().__init__(
            layers=[
                PlannedLayer(plan, layout, self.rows, parts[layout.layer] if parts else None)
                for layout in self.ledger.layers
            ]
        )

    @classmethod
    def from_plan(cls, plan: Plan, model: PreTrainedModel) -> PlannedCache:
        """A cache for `model` under `plan`.

        Raises PlanError when the plan is for another shape, CacheError when the model does not run qpkv attention.
        """
        from qpkv_runtime.models import model_shape

        check_shape(plan, model_shape(model))
        if model.config._attn_implementation != NAME:
            raise CacheError(f"the model runs {model.config._attn_implementation} attention; {HOW_TO_LOAD}")
        needs_parts = Scoring.of(plan.scorer, plan.sinks, plan.window).needs_parts
        return cls(plan, layer_devices(model), layer_parts(model) if needs_parts else None)

    @classmethod
    def stacked(cls, caches: Iterable[PlannedCache], num_rows: int) -> PlannedCache:
        """One batch of `num_rows` prompts that were prefilled each in its own cache of one plan. Goes on like a batch
        padded on the left.

        caches: one row each. From a generator that prefills one when it is asked for it, each is copied and let go
        before the next: memory then holds the batch's arena, one row more, and one prompt's prefill. Raises CacheError
        where something was appended, or more or fewer come.
        """
        out: PlannedCache | None = None
        prompt_tokens: list[int] = []
        for cache in caches:
            if any(cast(PlannedLayer, layer).num_appended for layer in cache.layers):
                raise CacheError("caches are stacked right after their prefill, and one has appended tokens")
            row, num_own = len(prompt_tokens), len(cache.rows.prompt_tokens)
            if num_own != 1 or row == num_rows:
                raise CacheError(
                    f"stacked takes num_rows = {num_rows} prefilled caches of one row each, and number {row + 1} has "
                    f"{num_own}"
                )
            prompt_tokens += cache.rows.prompt_tokens
            out = out or cls(cache.plan, cache.rows.layer_devices)
            for index in range(len(cache.layers)):
                out.rows.block(index, num_rows)[row].copy_(cache.rows.block(index, 1)[0])
            del cache  # or the next one would be made beside it
        if out is None or len(prompt_tokens) < num_rows:
            raise CacheError(f"stacked takes num_rows = {num_rows} caches, at least 1, and got {len(prompt_tokens)}")
        for layer in out.layers:
            cast(PlannedLayer, layer).hold(prompt_tokens)
        return out

    @property
    def arena(self) -> Arena | None:
        """The arena; None before the first forward."""
        return self.rows.arena

    @property
    def allocated_bytes(self) -> int:
        """What the arena takes, all sequences together; 0 before the first forward."""
        return self.rows.arena.allocated_bytes if self.rows.arena is not None else 0

    def tokens_held(self) -> list[list[int]]:
        """Per layer, how many tokens the first row holds per head: in each tier, then in the reserve. The mean of its
        heads, whole: where they differ, the plan divides a whole number."""
        tables = [
            layer.packed().table()[0, :, :, 1] if layer.is_compressed else None
            for layer in cast("list[PlannedLayer]", self.layers)
        ]
        return [[] if table is None else (table.sum(0) // len(table)).tolist() for table in tables]

    def room(self, num_tokens: int) -> int:
        """How many of so many tokens can be appended. Raises CacheError where `then: stop` leaves no room at all."""
        return cast(PlannedLayer, self.layers[0]).room(num_tokens)

    def advance(self, num_tokens: int) -> None:
        """Count tokens that a captured step has appended: the device has counted them already."""
        for layer in cast("list[PlannedLayer]", self.layers):
            layer.num_seen += num_tokens
            layer.num_appended += num_tokens

    def reset(self) -> None:
        """Ready for another prompt; the arena stays allocated while the batch size stays."""
        for layer in self.layers:
            layer.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.rows.arena is not None:
            self.batch_select_indices(torch.arange(self.rows.arena.num_rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.rows.arena is None or not cast(PlannedLayer, self.layers[0]).is_compressed:
            return
        self.rows.select(indices)
        for layer in self.layers:
            layer = cast(PlannedLayer, layer)
            layer.prompt_tokens = [layer.prompt_tokens[row] for row in indices.tolist()]

    def crop(self, tokens_to_remove: int) -> NoReturn:
        raise CacheError(NO_CROP)


def layer_devices(model: PreTrainedModel) -> list[torch.device]:
    """The device that each decoder layer computes on."""
    return [runs_on(layer) for layer in cast(Any, model.get_decoder()).layers]


def runs_on(module: nn.Module) -> torch.device:
    """Where a module computes: where its parameters are or, where accelerate keeps them elsewhere (a device map, main
    memory, disk), where it brings them."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return next(module.parameters()).device if device is None else torch.device(device)


def layer_parts(model: PreTrainedModel) -> list[LayerParts]:
    """What scorers may look at of each decoder layer. Raises UnsupportedModelError where it is not plain weights."""
    decoder = cast(Any, model.get_decoder())
    layer_types = getattr(model.config.get_text_config(decoder=True), "layer_types", None)
    by_type = layer_types if "layer_type" in signature(decoder.rotary_emb.forward).parameters else None
    parts = []
    for index, layer in enumerate(decoder.layers):
        weight = getattr(getattr(layer.self_attn, "o_proj", None), "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.is_meta:
            raise UnsupportedModelError(
                f"this plan's scorer looks at layer {index}'s output projection, which must be a plain weight in "
                "memory: load the model unquantized and not offloaded, or plan with another scorer"
            )
        rotary = partial(decoder.rotary_emb, weight.new_empty(0, dtype=torch.float32))
        parts.append(LayerParts(weight.detach(), partial(rotary, layer_type=by_type[index]) if by_type else rotary))
    return parts


def check_shape(plan: Plan, shape: ModelShape) -> None:
    """Raise PlanError, naming the first difference, unless the plan is for a model of this shape."""
    for name in ("num_layers", "num_query_heads", "num_kv_heads", "head_size", "sliding_windows"):
        planned, actual = getattr(plan.model.shape, name), getattr(shape, name)
        if planned != actual:
            raise PlanError(
                f"the plan is for a model with {name} = {_short(planned)}, this one has {_short(actual)}: "
                "make a plan for it with qpkv-plan"
            )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
