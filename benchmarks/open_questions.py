"""What the papers leave open, measured for a plan and its best uniform rival at equal exact bytes.

    python -m benchmarks.open_questions --plan plans/smollm2__1-64.yaml
    python -m benchmarks.open_questions --plan plans/tiny__1-8.yaml --contexts 1      (quick)

1. Other texts than the plan was calibrated on: facts in prose, facts in code, and a chat of four turns whose last asks
   for a detail of the first. Documents, facts and wordings are of the test split or of this file.
2. Does compression make a model overconfident? The expected calibration error of the answers' tokens.
3. A plan calibrated with the question in sight, used on a context that is compressed before the question is known.

Every number is over the samples that the full cache can answer (1 nat); intervals are bootstraps over contexts.
Prints the tables and writes them to benchmarks/results/open_questions_<plan>.md, with hardware and commit.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.where import RESULTS, commit, cpu
from qpkv_planner import texts
from qpkv_planner.allocation import Space
from qpkv_planner.calibration import CONTINUATION_TOKENS, WORDS, Context, Data, Sample, Split, make_split
from qpkv_planner.grid import setting_named
from qpkv_planner.measurement import Evaluator, Losses, interval
from qpkv_planner.prefill import prepare
from qpkv_planner.regression import joined
from qpkv_runtime.compression import Scoring
from qpkv_runtime.models import load_model, model_shape
from qpkv_runtime.plan import Plan, load_plan

FACTS = {"number": 2, "word": 1, "place": 1, "line": 1, "chain": 1}
NAMES = ("full cache", "best uniform", "plan")
NUM_BINS = 10

DETAILS = (  # what someone says of themselves in turn one, the question in turn four, how the answer begins
    ("number", "My customer number is {number}.", "What was my customer number?", "Your customer number is"),
    ("number", "Our budget is {number} dollars.", "How large did I say our budget is?", "You said your budget is"),
    ("place", "We are moving to {place} in the spring.", "Where did I say we are moving to?", "You are moving to"),
    ("name", "My sister {name} will read this too.", "What is the name of my sister?", "The name of your sister is"),
    ("word", "Please call the project {word}.", "How should the project be called?", "The project should be called"),
)


class ConfidenceEvaluator(Evaluator):
    """Keeps, of every answer token it measures, the probability of the most likely token and whether it was right."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.seen: list[tuple[float, bool]] = []

    def sample_losses_of(self, logits: torch.Tensor, rows: list[int]) -> dict[str, torch.Tensor]:
        targets = torch.tensor([token for row in rows for token in self.prepared.targets[row]])
        is_answer = torch.tensor(
            [self.prepared.kinds[row] != "text" for row in rows for _ in self.prepared.targets[row]]
        )
        confidence, best = logits.float().softmax(-1).max(-1)
        right = best == targets
        self.seen += list(zip(confidence[is_answer].tolist(), right[is_answer].tolist(), strict=True))
        return super().sample_losses_of(logits, rows)


@dataclass(frozen=True)
class Measured:
    """A split's losses by contestant, and (confidence, right) of each answer token."""

    losses: dict[str, Losses]
    tokens: dict[str, list[tuple[float, bool]]]

    @property
    def answers(self) -> dict[str, Losses]:
        """The losses without the texts' continuations."""
        kept = np.array([kind != "text" for kind in self.losses["plan"].kinds])
        return {name: _only(losses, kept) for name, losses in self.losses.items()}


def _only(losses: Losses, kept: NDArray[np.bool_]) -> Losses:
    rows = np.flatnonzero(kept)
    kinds, contexts = ([column[row] for row in rows] for column in (losses.kinds, losses.contexts))
    return Losses(losses.ce[rows], losses.kl[rows], losses.exact[rows], tuple(kinds), tuple(contexts))


def measure(model: PreTrainedModel, split: Split, plans: dict[str, Plan]) -> Measured:
    """Context by context, so that one is in memory at a time."""
    scorings = list(dict.fromkeys(Scoring.of(plan.scorer, plan.sinks, plan.window) for plan in plans.values()))
    storage_dtype = next(iter(plans.values())).model.storage_dtype
    parts: dict[str, list[Losses]] = {name: [] for name in NAMES}
    tokens: dict[str, list[tuple[float, bool]]] = {name: [] for name in NAMES}
    for index, context in enumerate(split.contexts):
        alone = replace(split, contexts=(context,))
        prepared = prepare(model, model_shape(model), storage_dtype, alone, scorings, 1, lambda: None)
        evaluator = ConfidenceEvaluator(model, prepared)
        for name in NAMES:
            evaluator.seen = []
            losses = evaluator.full() if name == "full cache" else evaluator.evaluate_plan(plans[name])
            parts[name].append(replace(losses, contexts=(index,) * len(losses.kinds)))
            tokens[name] += evaluator.seen
        done = f"{split.name}, {split.regime}: context {index + 1} of {len(split.contexts)}"
        print(done, file=sys.stderr, flush=True)
    return Measured({name: joined(own) for name, own in parts.items()}, tokens)


# --- samples -------------------------------------------------------------------------------------------------------


def documents(tokenizer: PreTrainedTokenizerBase, kind: str, num_contexts: int, size: int, seed: int) -> Split:
    """Facts in documents of one kind, and how those go on."""
    data = Data(mix=tuple(sorted({**FACTS, kind: 1}.items())))
    return replace(make_split(tokenizer, "test", num_contexts, size, seed, data), name=kind)


def chats(tokenizer: PreTrainedTokenizerBase, num_contexts: int, size: int, seed: int) -> Split:
    """Three turns about passages of prose, the first with a few details; each sample asks for one in the fourth."""
    chance = random.Random(f"chat-{seed}")
    return Split("chat", tuple(_chat(tokenizer, size, chance) for _ in range(num_contexts)))


def _chat(tokenizer: PreTrainedTokenizerBase, size: int, chance: random.Random) -> Context:
    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    words = {key: value.split() for key, value in WORDS["test"].items()}
    details = [
        (kind, said, question, lead, {
            "number": str(chance.randrange(1000, 100000)), "place": chance.choice(words["places"]),
            "name": chance.choice(words["first"]), "word": chance.choice(words["words"]),
        }[kind])
        for kind, said, question, lead in DETAILS
    ]  # fmt: skip
    said = " ".join(text.format(**{kind: value}) for kind, text, _, _, value in details)
    prose = _passages(chance)
    turns = [
        (f"Hello! {said} Here is a passage to begin with: ", "Thank you, I have read it. What is next?"),
        ("This is the second passage: ", "I have read the second passage too."),
        ("And this is the third one: ", "All three passages are noted. Do you have a question?"),
    ]
    room = size - 200 - len(encode(said))  # for the questions, the template and the assistant's words
    history: list[dict[str, str]] = []
    for opening, reply in turns:
        passage, left = "", room // len(turns)
        while (sentence := next(prose)) and (left := left - len(encode(f" {sentence}"))) > 0:
            passage += f" {sentence}"
        history += [{"role": "user", "content": opening + passage}, {"role": "assistant", "content": reply}]
    start = len(encode(_rendered(tokenizer, history[:1], "")[0].partition(said)[0]))
    needle = (start, start + len(encode(said)))
    samples = []
    for kind, _, question, lead, value in details:
        before, after = _rendered(tokenizer, history, question)
        answer = tuple(encode(f" {value}")[:CONTINUATION_TOKENS])
        samples.append(Sample(kind, tuple(encode(after + lead)), answer, needle=needle))
    return Context(tuple(encode(before)), tuple(samples))


def _passages(chance: random.Random) -> Iterator[str]:
    sources = texts.speeches("test") or texts.references("test")
    while True:
        sentences = texts.sentences(chance.choice(sources))
        yield from sentences[chance.randrange(max(1, len(sentences) - 60)) :]


def _rendered(tokenizer: PreTrainedTokenizerBase, history: list[dict[str, str]], question: str) -> tuple[str, str]:
    """The conversation so far, and the turn that asks, up to where the answer begins."""
    if tokenizer.chat_template is None:
        before = "".join(f"{turn['role']}: {turn['content']}\n" for turn in history)
        return before, f"user: {question}\nassistant: "
    messages = [*history, {"role": "user", "content": question}]
    before = str(tokenizer.apply_chat_template(history, tokenize=False))
    whole = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    assert whole.startswith(before), "the template renders a conversation's beginning alike"
    return before, whole[len(before) :]


# --- tables --------------------------------------------------------------------------------------------------------


def shift_table(by_domain: dict[str, Measured]) -> list[list[str]]:
    rows = [["tested on", "samples", *(f"{name}" for name in NAMES), "plan minus best uniform (95 %)",
             "KL uniform, plan", "exact full, uniform, plan"]]  # fmt: skip
    for domain, measured in by_domain.items():
        for what, losses in (("all", measured.losses), ("answers", measured.answers)):
            if what == "all" and "text" not in losses["plan"].kinds:
                continue
            gain = interval(losses["plan"], "ce", minus=losses["best uniform"])
            exact = (f"{100 * losses[name].mean('exact'):.0f}" for name in NAMES)
            rows.append(
                [f"{domain}, {what}", str(len(losses["plan"].kinds)),
                 *(f"{losses[name].mean('ce'):.2f}" for name in NAMES),
                 f"{gain.mean:+.2f} ({gain.low:+.2f} to {gain.high:+.2f})",
                 f"{losses['best uniform'].mean('kl'):.2f}, {losses['plan'].mean('kl'):.2f}", ", ".join(exact) + " %"]
            )  # fmt: skip
    return rows


def confidence_table(by_domain: dict[str, Measured]) -> list[list[str]]:
    rows = [["", "answer tokens", "right", "mean confidence", "expected calibration error"]]
    for name in NAMES:
        tokens = [token for measured in by_domain.values() for token in measured.tokens[name]]
        confidence, right = np.array(tokens).T
        error = calibration_error(confidence, right)
        rows.append([name, str(len(tokens)), f"{right.mean():.3f}", f"{confidence.mean():.3f}", f"{error:.3f}"])
    return rows


def calibration_error(confidence: NDArray[np.float64], right: NDArray[np.float64]) -> float:
    """The mean distance of confidence and share right in bins of a tenth, weighted by how many fall in."""
    bins = np.minimum((confidence * NUM_BINS).astype(int), NUM_BINS - 1)
    gaps = [abs(confidence[bins == b].mean() - right[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
    return float(sum(gaps))


def regime_table(aware: Measured, agnostic: Measured) -> list[list[str]]:
    rows = [["cross-entropy of answers", *NAMES, "plan minus best uniform (95 %)"]]
    for name, measured in (("question in sight", aware), ("question comes after", agnostic)):
        losses = measured.answers
        gain = interval(losses["plan"], "ce", minus=losses["best uniform"])
        cells = (f"{losses[one].mean('ce'):.2f}" for one in NAMES)
        rows.append([name, *cells, f"{gain.mean:+.2f} ({gain.low:+.2f} to {gain.high:+.2f})"])
    return rows


def markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--plan", type=Path, required=True, help="a calibrated plan")
    parser.add_argument("--contexts", type=int, default=4, help="of each kind (default 4)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/open_questions_<plan>.md")
    arguments = parser.parse_args()
    plan = load_plan(arguments.plan)
    record = plan.calibration
    if record is None:
        parser.error("--plan must be calibrated: its record names the best uniform setting")
    model, tokenizer = load_model(plan.model.id, plan.model.dtype)
    uniform = setting_named(Space.of_plan(plan), record.best_uniform)
    plans = {"plan": plan, "best uniform": uniform.space.plan(uniform.allocation)}
    count, size, seed = arguments.contexts, plan.budget.context_tokens, arguments.seed
    splits = [documents(tokenizer, kind, count, size, seed) for kind in ("prose", "code")]
    splits.append(chats(tokenizer, count, size, seed))
    by_domain = {split.name: measure(model, split, plans) for split in splits}
    agnostic = measure(model, replace(splits[0], regime="agnostic"), plans)

    mix = dict(record.data.get("mix", {}))
    text = f"""# What the papers leave open, on {plan.model.id}

`python -m benchmarks.open_questions --plan {arguments.plan} --contexts {count} --seed {seed}`, {plan.budget.requested}
of {size} tokens ({plan.budget.planned_bytes:,} bytes); best uniform: {record.best_uniform}. Commit
{commit()}, {cpu()}, {plan.model.dtype} on {model.device}, torch {torch.__version__}.
{count} contexts of each kind, other texts, facts and wordings than the search or validation saw; nats per token.

## Other texts than the plan was calibrated on

Calibration: {", ".join(f"{kind} {number}" for kind, number in mix.items()) or "a user's file"} (facts per context,
shares of documents). Chat: a detail of turn one asked in turn four.

{markdown(shift_table(by_domain))}

## Confidence of answers

The tokens of all answers above, bins of a tenth.

{markdown(confidence_table(by_domain))}

## A context compressed before the question is known

The prose above; the plan was calibrated {record.data.get("regime", "aware")}.

{markdown(regime_table(by_domain["prose"], agnostic))}
"""
    output = arguments.output or RESULTS / f"open_questions_{arguments.plan.stem}.md"
    output.write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
