"""One layer's decode step by the kernels: append, then attend, driven by counters on the device.

The host takes no part: nothing is copied from or to the device, and what is launched is the same at every step, so a
step can be captured in a CUDA graph or compiled as one. What the host would have refused at once (keys or values that
cannot be stored) leaves bits that `Counters.check` reads, whenever someone waits for the device anyway.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qpkv_runtime.backend import block_layout, block_places, kernels_at
from qpkv_runtime.compression import STORAGE_DTYPES, check_problems, largest_stored
from qpkv_runtime.plan import Plan
from qpkv_runtime.quantizers import CLIPS

CLIPS_TEXT = json.dumps(CLIPS)  # as operators take them


@dataclass
class Counters:
    """What decoding counts, where it decodes. prompt: int32 [B], tokens of each row's prompt; appended: int32 [1],
    tokens generated since; problems: int32 [layers, 2], the kernels' bits for keys and values."""

    prompt: Tensor
    appended: Tensor
    problems: Tensor

    @classmethod
    def of(cls, prompt_tokens: Sequence[int], num_appended: int, num_layers: int, device: torch.device) -> Counters:
        prompt = torch.tensor(list(prompt_tokens), dtype=torch.int32, device=device)
        appended = torch.tensor([num_appended], dtype=torch.int32, device=device)
        return cls(prompt, appended, torch.zeros(num_layers, 2, dtype=torch.int32, device=device))

    def restart(self, prompt_tokens: Sequence[int]) -> None:
        """Count from these prompts on, in place: what was captured over these tensors stays good."""
        self.prompt.copy_(torch.tensor(list(prompt_tokens), dtype=torch.int32))
        self.appended.zero_()
        self.problems.zero_()

    def check(self, storage_dtype: str) -> None:
        """Wait for the device; raise NumericsError naming the first layer and tensor that could not be stored."""
        for layer, problems in enumerate(self.problems.tolist()):
            check_problems(layer, problems, STORAGE_DTYPES[storage_dtype])


@dataclass(frozen=True)
class DecodeStep:
    """A layer as the kernels see it: what they are told at every step. places: int32 table on the layer's device."""

    layer: int
    layout: str
    places: Tensor
    limit: float

    @classmethod
    def of(cls, plan: Plan, layer: int, device: torch.device) -> DecodeStep:
        """Raises BackendError for what the kernels do not cover."""
        from qpkv_kernels import append, decode

        holdings, shape, storage = plan.holdings(layer), plan.model.shape, plan.model.storage_dtype
        is_adaptive = plan.heads_of(layer).share == "adaptive"
        layout = block_layout(layer, holdings, shape, storage, is_adaptive)
        with kernels_at(f"layer {layer}", [format for format, _ in holdings]):
            append.constants(layout, CLIPS)
            launch = decode.default_launch(layout, decode.arch_of(device))
            gqa = shape.num_query_heads // shape.num_kv_heads
            decode.constants(layout, layout.dtype, gqa, launch, decode.is_interpreted())
        places = block_places(layer, holdings, shape, is_adaptive, device)
        return cls(layer, layout.text, places, largest_stored(STORAGE_DTYPES[storage]))

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, arena: Tensor, start: int, counters: Counters,
        scaling: float, softcap: float | None,
    ) -> Tensor:  # fmt: skip
        """Append T tokens and attend from each to all that is then held, itself included.

        query [B, H, T, D], key and value [B, H_kv, T, D]; arena: uint8 [B, extent], with this layer's block at byte
        `start` of each row; counters: not advanced here, other layers of the step read them too -> [B, H, T, D].
        """
        from qpkv_kernels import ops

        out, known = [], (self.places, counters.prompt, counters.appended)
        for i in range(query.shape[2]):
            ops.append(
                key[:, :, i], value[:, :, i], arena, *known, counters.problems, self.layout, self.layer, start,
                self.limit, CLIPS_TEXT, i,
            )  # fmt: skip
            out.append(ops.attend(query[:, :, i], arena, *known, self.layout, start, scaling, softcap, i))
        return torch.stack(out, 2)
