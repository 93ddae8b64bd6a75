"""How important each KV head is to finding a fact and answering with it, measured on calibration needles.

HeadKV's retrieval-reasoning score (arXiv 2410.19258): while the answer is written, the attention that a head pays to
the tokens of the needle, as far as they are among the head's k most attended tokens, k the needle's length; mean over
the answer's tokens, over needles, and over the GQA group. Differs from the paper: needles are the facts of our
calibration contexts, of which only those count that the full cache answers; and weights are compared within a layer,
for the allocation decides what each layer gets.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qpkv_planner.calibration import Split
from qpkv_planner.prefill import ANSWERABLE_NATS, ContextRun
from qpkv_runtime.errors import InputError
from qpkv_runtime.heads import normalized
from qpkv_runtime.models.shape import ModelShape
from qpkv_runtime.plan import Heads
from qpkv_runtime.scorers import kv_heads


def measure_heads(
    model: PreTrainedModel, shape: ModelShape, split: Split, progress: Callable[[], None] = lambda: None
) -> tuple[Heads, ...]:
    """Weighted heads for every layer of a plan. Calls `progress` after each context.

    Raises InputError when the model can answer none of the split's questions.
    """
    scores = torch.zeros(shape.num_layers, shape.num_kv_heads, dtype=torch.float64)
    num_needles = 0
    for context in split.contexts:
        run = ContextRun(model, shape, context)
        for row, sample in enumerate(context.samples):
            answer = torch.tensor(sample.continuation, device=run.logprobs[row].device)
            loss = -run.logprobs[row].gather(1, answer[:, None]).mean()
            if sample.needle is None or not float(loss) <= ANSWERABLE_NATS:
                continue
            num_needles += 1
            for layer in range(shape.num_layers):
                attention = torch.cat(list(run.answer(layer, row).attention()), 3)
                scores[layer] += needle_scores(attention, sample.needle).cpu()
        progress()
    if not num_needles:
        raise InputError("head weights need questions that the model can answer in calibration, and it answers none")
    return tuple(Heads(share="weighted", weights=normalized(layer)) for layer in scores.tolist())


def needle_scores(attention: Tensor, needle: tuple[int, int]) -> Tensor:
    """attention: probabilities [1, H_kv, G, queries, T]; needle: (start, end) along T -> float64 [H_kv]."""
    start, end = needle
    top = attention.topk(min(end - start, attention.shape[-1]), dim=-1)
    is_found = (top.indices >= start) & (top.indices < end)
    mass = (top.values.double() * is_found).sum(-1)  # [1, H_kv, G, queries]
    return kv_heads(mass)[0].mean(-1)
