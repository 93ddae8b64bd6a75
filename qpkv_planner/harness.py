"""EleutherAI's lm-evaluation-harness on a plan: the harness's model class `qpkv`.

    qpkv-lm-eval --model qpkv --model_args plan=plan.yaml --tasks ruler,longbench ...

takes exactly what `lm_eval` takes; in Python, importing this module registers the class. (The harness 0.4 finds models
by import and knows no plugins, so its own command cannot see ours.) What the harness calls context is compressed, but
for its last token: every token that it scores or generates is predicted from the plan's cache. Needs the extra `eval`.

Not here: rolling log-likelihoods (a document without a context to compress; `qpkv-eval --suites text` measures that).
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from qpkv_runtime.cache import PlannedCache, check_shape
from qpkv_runtime.errors import InputError
from qpkv_runtime.models import load_model, model_shape
from qpkv_runtime.plan import load_plan

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ModuleNotFoundError as error:
    raise InputError(f"the harness needs the extra eval: pip install 'qpkv[eval]' ({error})") from None


@register_model("qpkv")
class PlannedLM(HFLM):  # type: ignore[misc]
    """The harness's `hf` model with every cache inside a plan's bytes.

    plan: a plan's file; model: load this model instead of the plan's; dtype, device: as load_model takes them (dtype:
    the plan's own). Everything else is HFLM's, where it makes sense for a loaded model.
    """

    def __init__(
        self, plan: str, model: str | None = None, dtype: str | None = None, device: str | None = None, **rest: Any
    ) -> None:
        self.plan = load_plan(plan)
        loaded, tokenizer = load_model(
            model or self.plan.model.id, dtype=dtype or self.plan.model.dtype, device=device or "auto"
        )
        check_shape(self.plan, model_shape(loaded))
        super().__init__(pretrained=loaded, tokenizer=tokenizer, backend="causal", **rest)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        raise InputError(
            "a plan compresses a context, and rolling log-likelihoods have none: choose other tasks, or measure text "
            "with qpkv-eval --suites text"
        )

    @torch.no_grad()
    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """(request, context tokens, continuation tokens) -> summed log-probability, and whether greedy says the same.

        One request at a time; those that follow each other on the same context share its prefill.
        """
        found: list[tuple[float, bool]] = []
        prefilled: tuple[list[int], Cache, Tensor] | None = None
        for request, context, continuation in requests:
            kept = max(1, self.max_length + 1 - len(continuation))  # too long: cut from the left, as HFLM does
            context = context[-kept:]
            if prefilled is None or prefilled[0] != context:
                prefilled = (context, *self._prefill(torch.tensor([context[:-1] or context], device=self.device)))
            cache, last = copy.deepcopy(prefilled[1]), prefilled[2]
            fed = [*context[len(context[:-1] or context) :], *continuation[:-1]]
            logits = last[:, : len(continuation) - len(fed)]  # none, unless the context is a single token
            if fed:
                more = self.model(torch.tensor([fed], device=self.device), past_key_values=cache).logits
                logits = torch.cat([logits, more], 1)
            logprobs = logits[0].float().log_softmax(-1)
            wanted = torch.tensor(continuation, device=self.device)
            answer = (
                float(logprobs.gather(1, wanted[:, None]).sum()),
                bool((logprobs.argmax(-1) == wanted).all()),
            )
            found.append(answer)
            if request is not None:
                self.cache_hook.add_partial("loglikelihood", request, answer)
        return found

    def _prefill(self, ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Cache, Tensor]:
        """Compress prompts, int64 [B, T] -> the cache, and the logits after the last token, [B, 1, V]."""
        cache = PlannedCache.from_plan(self.plan, self.model)
        settings: dict[str, Any] = {}
        if attention_mask is not None:
            positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
            settings = {"attention_mask": attention_mask, "position_ids": positions}
        logits = self.model(ids, past_key_values=cache, logits_to_keep=1, **settings).logits
        return cache, logits

    @torch.no_grad()
    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **settings: Any) -> Tensor:
        """HFLM's, with the context but for its last token already in the plan's cache."""
        mask = settings.get("attention_mask")
        if context.shape[1] > 1:
            cache, _ = self._prefill(context[:, :-1], None if mask is None else mask[:, :-1])
        else:
            cache = PlannedCache.from_plan(self.plan, self.model)
        return cast(Tensor, super()._model_generate(context, max_length, stop, past_key_values=cache, **settings))
