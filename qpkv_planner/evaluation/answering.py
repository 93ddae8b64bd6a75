"""Answer one sample inside a plan's bytes, or with the full cache, and score the answer.

`aware` compresses the prompt, question included, but for its last token; `agnostic` compresses it up to the
document's end, and the question goes through the plan's reserve like generated tokens. Either way every token of the
answer is predicted from the compressed cache. Greedy; the loop is transformers' own generate.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from qpkv_planner.evaluation import longbench
from qpkv_planner.evaluation.metrics import METRICS
from qpkv_planner.evaluation.samples import Sample
from qpkv_runtime.cache import PlannedCache, runs_on
from qpkv_runtime.errors import InputError, NumericsError
from qpkv_runtime.models import ModelIdentity, model_identity
from qpkv_runtime.plan import Plan

Regime = Literal["aware", "agnostic"]
REGIMES: tuple[Regime, ...] = ("aware", "agnostic")


@dataclass(frozen=True)
class Runner:
    """A model and what its cache may hold. plan None: the full cache."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    plan: Plan | None

    @cached_property
    def identity(self) -> ModelIdentity:
        """The model's hashes, for which every weight is read, once."""
        return model_identity(self.model, self.tokenizer)

    @torch.no_grad()
    def row(self, sample: Sample, regime: Regime) -> dict[str, Any]:
        """What became of a sample, as JSON values: `score` (0 to 1) and `cross_entropy` (nats per token of the target),
        each None where the sample has none, and `by_position`, each target token's."""
        ids = sample.context + sample.question
        num_fed = len(sample.question) if regime == "agnostic" and sample.question else 1
        longest = len(ids) + max(sample.max_new_tokens, len(sample.target))
        if longest > self.model.config.get_text_config(decoder=True).max_position_embeddings:
            raise InputError(f"{sample.id} needs {longest} tokens, more than the model's context: lower --lengths")
        prompt = torch.tensor([ids], device=runs_on(self.model))
        cache = self._cache()
        self.model(prompt[:, :-num_fed], past_key_values=cache, logits_to_keep=1)
        room = self._room(num_fed)
        losses = self._losses(prompt[:, -num_fed:], sample.target[:room], copy.deepcopy(cache))
        answer = self._answer(prompt, cache, min(sample.max_new_tokens, room))
        return {
            "id": sample.id,
            "suite": sample.suite,
            "task": sample.task,
            "category": sample.category,
            "length": sample.length,
            "depth": sample.depth,
            "regime": regime,
            "hash": sample.hash,
            "cluster": sample.cluster,
            "prompt_tokens": len(ids),
            "answer": answer,
            "answers": list(sample.answers),
            "score": None if answer is None else _score(sample, answer),
            "cross_entropy": sum(losses) / len(losses) if losses else None,
            "by_position": losses,
        }

    def _cache(self) -> Cache:
        if self.plan is None:
            return DynamicCache(config=self.model.config)
        return PlannedCache.from_plan(self.plan, self.model)

    def _room(self, num_fed: int) -> int:
        """How many tokens can be predicted after feeding so many: all, unless the plan says `then: stop`."""
        if self.plan is None or self.plan.decode.then == "evict":
            return 2**31
        room = self.plan.decode.reserve_tokens - num_fed + 1
        if room < 1:
            raise InputError(
                f"the plan's reserve holds {self.plan.decode.reserve_tokens} tokens and says `then: stop`, and the "
                f"question alone has {num_fed}: evaluate question-aware, or plan with more --max-new-tokens"
            )
        return room

    def _losses(self, fed: torch.Tensor, target: tuple[int, ...], cache: Cache) -> list[float]:
        """Nats of each target token after the tokens fed, int64 [1, F]."""
        if not target:
            return []
        wanted = torch.tensor([target], device=fed.device)
        ids = torch.cat([fed, wanted[:, :-1]], 1)
        logits = self.model(ids, past_key_values=cache, logits_to_keep=len(target)).logits.float()
        if not bool(logits.isfinite().all()):
            raise NumericsError("the model's logits have NaN or Inf; load it in float32 or bfloat16")
        return [round(x, 6) for x in torch.nn.functional.cross_entropy(logits[0], wanted[0], reduction="none").tolist()]

    def _answer(self, prompt: torch.Tensor, cache: Cache, new_tokens: int) -> str | None:
        if new_tokens < 1:
            return None
        config = self.model.generation_config
        assert config is not None
        stop = config.eos_token_id
        padding = config.pad_token_id if config.pad_token_id is not None else (stop if isinstance(stop, int) else 0)
        out = cast(Any, self.model).generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            max_new_tokens=new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=padding,
        )
        return str(self.tokenizer.decode(out[0, prompt.shape[1] :].tolist(), skip_special_tokens=True))


def _score(sample: Sample, answer: str) -> float:
    assert sample.metric is not None
    counted = longbench.counted(sample.task, answer) if sample.suite == "longbench" else answer
    return METRICS[sample.metric](counted, sample.answers, sample.classes)
