"""`make demo`: plan a real model at 1/32 of 1,024 tokens, run the plan, and compare it at equal exact bytes.

The questions are the test split's: other documents, facts, names and wordings than the search or the validation saw.
Answers are greedy and written over the compressed cache from their first token on.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from qpkv_planner.allocation import Space, allocation_of
from qpkv_planner.calibration import Context, Sample, Split, make_split
from qpkv_planner.files import check_writable, write_whole
from qpkv_planner.grid import setting_named
from qpkv_planner.measurement import Evaluator, Losses, interval
from qpkv_planner.planner import plan as make_plan
from qpkv_planner.prefill import prepare
from qpkv_planner.progress import Progress
from qpkv_runtime.cache import PlannedCache, runs_on
from qpkv_runtime.compression import Scoring
from qpkv_runtime.errors import run_command
from qpkv_runtime.models import load_model
from qpkv_runtime.overview import plan_text, table
from qpkv_runtime.plan import Plan

BUDGET, CONTEXT_TOKENS = "1/32", 1024
TEST_CONTEXTS = 4
NUM_QUESTIONS = 3
PRUNING = "snapkv uniform 16bit window 16"


@dataclass(frozen=True)
class Contestant:
    """One way to hold the cache, measured on the test split. plan None: the full cache."""

    name: str
    plan: Plan | None
    losses: Losses


def main(argv: list[str] | None = None) -> int:
    return run_command("qpkv demo", lambda: _main(argv))


def _main(argv: list[str] | None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--output", type=Path, default=Path("demo-plan.yaml"), help="where the plan is written")
    arguments = parser.parse_args(argv)
    check_writable("--output", arguments.output)
    started = time.monotonic()

    _heading(f"Planning {arguments.model} at {BUDGET} of {CONTEXT_TOKENS} tokens (qpkv-plan --quick)")
    model, tokenizer = load_model(arguments.model)
    plan = make_plan(model, tokenizer, BUDGET, name=arguments.model, context_tokens=CONTEXT_TOKENS, quick=True)
    write_whole(arguments.output, plan.to_yaml())

    _heading("The plan (qpkv-show)")
    print(plan_text(plan, str(arguments.output)))

    _heading("Test: documents, facts and wordings that the search never saw")
    progress = Progress(TEST_CONTEXTS + 4)
    contexts = make_split(tokenizer, "test", TEST_CONTEXTS, CONTEXT_TOKENS, seed=0)
    contestants = _measure(model, plan, contexts, progress)
    rows = [["", "cross-entropy", "KL", "exact answers", "arena bytes", "of the budget"]]
    context = contexts.contexts[0]
    for contestant in contestants:
        rows.append([contestant.name, *_row(contestant, model, context)])
    progress.close()
    print("\n".join(table(rows, left={0})))
    mine, uniform = contestants[1], contestants[2]
    gain = interval(mine.losses, "ce", minus=uniform.losses)
    print(
        f"\nplan minus best uniform: {gain.mean:+.3f} nats, 95 % interval {gain.low:+.3f} to {gain.high:+.3f} "
        f"({len(mine.losses.kinds)} samples of {TEST_CONTEXTS} documents)"
    )

    _heading(f"Answers over a document of {len(context.tokens)} tokens")
    print(textwrap.fill(f"... {_text(tokenizer, context.tokens[-150:])}", 110), end="\n\n")
    for sample in context.samples[:NUM_QUESTIONS]:
        _answers(model, tokenizer, context, sample, contestants)
    print(f"The plan is in {arguments.output}; the demo took {time.monotonic() - started:.0f} s.")
    print(f"Next: qpkv-run --plan {arguments.output} --stats --compare-full")
    return 0


def _heading(text: str) -> None:
    print(f"\n=== {text}\n", flush=True)


def _measure(model: PreTrainedModel, plan: Plan, split: Split, progress: Progress) -> list[Contestant]:
    """The full cache, the plan, the best uniform setting and 16-bit pruning, on every sample of the split."""
    assert plan.calibration is not None
    space = Space.of_plan(plan)
    plans = {"plan": plan}
    for name, setting in (("best uniform", plan.calibration.best_uniform), ("16-bit pruning", PRUNING)):
        made = setting_named(space, setting)
        plans[f"{name} ({made.name})"] = made.space.plan(made.allocation)
    scorings = [Scoring.of(p.scorer, p.sinks, p.window) for p in plans.values()]
    progress.stage("prefill")
    prepared = prepare(
        model, space.shape, plan.model.storage_dtype, split, list(dict.fromkeys(scorings)), 1, progress.step
    )
    evaluator = Evaluator(model, prepared)
    contestants = [Contestant("full cache", None, evaluator.full())]
    for name, contestant in plans.items():
        losses = evaluator.evaluate(Space.of_plan(contestant), allocation_of(contestant))
        contestants.append(Contestant(name, contestant, losses))
        progress.step()
    return contestants


def _row(contestant: Contestant, model: PreTrainedModel, context: Context) -> list[str]:
    losses, plan = contestant.losses, contestant.plan
    cells = [f"{losses.mean('ce'):.3f}", f"{losses.mean('kl'):.3f}", f"{100 * losses.mean('exact'):.0f} %"]
    if plan is None:
        return [*cells, "", ""]
    cache = PlannedCache.from_plan(plan, model)
    with torch.no_grad():
        model(torch.tensor([context.tokens], device=runs_on(model)), past_key_values=cache, logits_to_keep=1)
    return [*cells, f"{cache.allocated_bytes:,}", f"{100 * cache.allocated_bytes / plan.budget.limit_bytes:.2f} %"]


@torch.no_grad()
def _answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: Context, sample: Sample,
    contestants: Sequence[Contestant],
) -> None:  # fmt: skip
    """Print the right answer and each contestant's, greedy, its last prompt token fed over the compressed cache."""
    prompt = torch.tensor([context.tokens + sample.prompt], device=runs_on(model))
    print(f"{_text(tokenizer, sample.prompt)} ...")
    print(f"  {'right':<16}{_text(tokenizer, sample.continuation)}")
    for contestant in contestants:
        cache: Cache = DynamicCache() if contestant.plan is None else PlannedCache.from_plan(contestant.plan, model)
        model(prompt[:, :-1], past_key_values=cache, logits_to_keep=1)
        out = cast(Any, model).generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            do_sample=False,
            max_new_tokens=len(sample.continuation),
            pad_token_id=0,
        )
        answer = _text(tokenizer, out[0, prompt.shape[1] :].tolist())
        print(f"  {contestant.name.partition(' (')[0]:<16}{answer}", flush=True)
    print()


def _text(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Tokens as a line of text."""
    return " ".join(str(tokenizer.decode(list(tokens), skip_special_tokens=True)).split())


if __name__ == "__main__":
    sys.exit(main())
