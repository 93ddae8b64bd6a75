"""What bits cost: under every scorer and quantizer at the same kept tokens, and MiKV's two tiers against eviction.

    python -m benchmarks.precisions bits --model smollm2      (cross-entropy and KL by kind; held-out samples)
    python -m benchmarks.precisions scorers --model smollm2   (likewise, in rotated codes; heads shared in every way)
    python -m benchmarks.precisions tiers --model smollm2     (likewise, the settings of the ladder)
    python -m benchmarks.precisions ladder --model tiny       (key-value lines; asked in the prompt, or only later)

`bits` keeps 256 of 1,024 tokens in every layer and writes them in each format; generated tokens are 16 bit, so that
nothing else differs. `scorers` keeps 32, 96 and 256. `ladder` gives every setting the same exact bytes: the important
tokens at 16 bit and all others at a few bits with nothing evicted (MiKV), eviction alone, or one width for all. Its
questions stand in the prompt that is compressed, or come after it, about one of the first lines ("later"). Rows go to
benchmarks/results/<command>_<model>.csv with hardware and commit.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.where import RESULTS, where, write_rows
from qpkv_planner.allocation import Choice, Space, uniform
from qpkv_planner.calibration import Split, make_split
from qpkv_planner.heads import measure_heads
from qpkv_planner.measurement import Evaluator, Losses, interval
from qpkv_planner.prefill import prepare
from qpkv_planner.session import describe
from qpkv_runtime.cache import PlannedCache
from qpkv_runtime.compression import Scoring
from qpkv_runtime.methods import SCORERS
from qpkv_runtime.models import load_model
from qpkv_runtime.overview import table
from qpkv_runtime.plan import UNIFORM, Decode, Heads, Model, Scorer

KINDS = ("number", "word", "place", "text")
LOW_BIT = ("flexgen", "kivi", "kvquant", "hqq", "mikv", "rotated", "paper_hqq")
KEPT_TOKENS = 256
BIT_FORMATS = (
    "16bit",
    "flexgen-k8v8",
    *(f"{name}-k{bits}v{bits}" for bits in (4, 3, 2) for name in LOW_BIT),
    "kivi-k1v1",
    "rotated-k1v1",
    "kivi-k2g32v2g32",
    "kivi-k2v2o0.01",
    "flexgen-k2v2o0.01",
    "rotated-k3v2",
    "kivi-k3v2",
)
SCORED_TOKENS = (32, 96, 256)
SCORED_FORMATS = ("16bit", "rotated-k8v8", "rotated-k4v4", "rotated-k3v3", "rotated-k2v2")
SHARED_FORMATS = ("16bit", "rotated-k4v4")  # with heads of unlike counts
BATCH = 6  # prompts of the ladder at a time
LADDER_BUDGETS = ("1/3", "1/5", "1/6")
RESTS = tuple(f"{name}-k{bits}v{bits}" for name in ("mikv", "flexgen") for bits in (4, 3, 2))  # mikv has the balancer
ONE_WIDTH = ("flexgen-k4v4", "flexgen-k2v2", "rotated-k2v2")
LADDER = {  # name: (how tokens are divided, in which format)
    "h2o eviction": ("eviction", "16bit"),
    "snapkv eviction": ("eviction", "16bit"),
    **{f"one width {name}": ("one width", name) for name in ONE_WIDTH},
    **{f"16bit + {rest}": ("two tiers", rest) for rest in RESTS},
}
WHENS = ("in the prompt", "later")
ADJECTIVES = (
    "dusty eager famous frozen giant happy hidden hollow brave quiet silver golden ancient gentle bitter clever"
)
NOUNS = "rocket saddle button camera carpet cherry cloud coffee river castle garden window mirror bridge forest candle"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("command", choices=["bits", "scorers", "tiers", "ladder"])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--context-length", type=int, default=1024)
    parser.add_argument("--contexts", type=int, default=8)
    parser.add_argument("--formats", nargs="+", help="bits: only these")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    started, here = time.monotonic(), where()
    model, tokenizer = load_model(arguments.model)
    measure = {"bits": bits, "scorers": scorers, "tiers": tiers, "ladder": ladder}[arguments.command]
    rows = measure(model, tokenizer, arguments)
    about = {
        "model": arguments.model,
        "context_tokens": str(arguments.context_length),
        "contexts": str(arguments.contexts),
        **here,
        "seconds": f"{time.monotonic() - started:.0f}",
    }
    path = arguments.output or RESULTS / f"{arguments.command}_{arguments.model}.csv"
    write_rows(path, [{**row, **about} for row in rows])
    print("\n".join(table([list(rows[0]), *(list(row.values()) for row in rows)], left={0, 1})))
    print(f"\n{path}: " + ", ".join(f"{key} {value}" for key, value in about.items()))
    return 0


def bits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, arguments: argparse.Namespace
) -> list[dict[str, str]]:
    """Every format at the same kept tokens, on the validation split."""
    split, section = _validation(model, tokenizer, arguments)
    space = _space(section, "100%", arguments.context_length, "snapkv", "16bit")
    evaluator, rows = _evaluator(model, split, [space]), []
    full = evaluator.full()
    reference = evaluator.evaluate(space, [Choice(KEPT_TOKENS, "16bit")] * section.num_layers)
    for format in arguments.formats or BIT_FORMATS:
        allocation = [Choice(KEPT_TOKENS, format)] * section.num_layers
        losses = evaluator.evaluate(space, allocation)
        rows.append(
            {
                "format": format,
                "tokens": str(KEPT_TOKENS),
                **_measured(space, allocation, losses, "over_16bit", reference),
                "full_cross_entropy": f"{full.mean('ce'):.4f}",
            }
        )
        print(f"{format:<22} {losses.mean('ce'):.3f}  text {rows[-1]['ce_text']}", file=sys.stderr, flush=True)
    return rows


def _validation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, arguments: argparse.Namespace
) -> tuple[Split, Model]:
    split = make_split(tokenizer, "validation", arguments.contexts, arguments.context_length, seed=0)
    return split, describe(model, tokenizer, arguments.model, split.contexts[0])


def _evaluator(model: PreTrainedModel, split: Split, spaces: Sequence[Space]) -> Evaluator:
    """Of plans in these spaces."""
    scorings = list(dict.fromkeys(Scoring.of(space.scorer, space.sinks, space.window) for space in spaces))
    section = spaces[0].model
    return Evaluator(model, prepare(model, section.shape, section.storage_dtype, split, scorings, 1, lambda: None))


def _measured(
    space: Space, allocation: Sequence[Choice], losses: Losses, over: str, reference: Losses
) -> dict[str, str]:
    """over: what to call the paired difference of the cross-entropy to `reference`."""
    change, kinds = interval(losses, "ce", minus=reference), losses.by_kind()
    return {
        "bytes": str(space.bytes(allocation)),
        "samples": str(len(losses.ce)),
        "cross_entropy": f"{losses.mean('ce'):.4f}",
        over: f"{change.mean:.4f}",
        f"{over}_low": f"{change.low:.4f}",
        f"{over}_high": f"{change.high:.4f}",
        "kl": f"{losses.mean('kl'):.4f}",
        "exact": f"{losses.mean('exact'):.3f}",
        **{f"ce_{kind}": f"{kinds[kind]['cross_entropy']:.3f}" if kind in kinds else "" for kind in KINDS},
    }


def scorers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, arguments: argparse.Namespace
) -> list[dict[str, str]]:
    """Every scorer, in every way of sharing heads, at the same kept tokens, on the validation split."""
    split, section = _validation(model, tokenizer, arguments)
    spaces = {name: _space(section, "100%", arguments.context_length, name, "16bit") for name in SCORERS}
    evaluator, rows = _evaluator(model, split, list(spaces.values())), []
    needles = make_split(tokenizer, "search", arguments.contexts, arguments.context_length, seed=0)
    sharings = {
        "uniform": (UNIFORM, SCORED_FORMATS),
        "adaptive": (Heads(share="adaptive"), SHARED_FORMATS),
        "weighted": (measure_heads(model, section.shape, needles), SHARED_FORMATS),
    }
    full = evaluator.full()
    for name, space in spaces.items():
        for share, (heads, formats) in sharings.items():
            shared = replace(space, heads=heads)
            for tokens in SCORED_TOKENS:
                for format in formats:
                    allocation = [Choice(tokens, format)] * section.num_layers
                    losses = evaluator.evaluate(shared, allocation)
                    kinds = losses.by_kind()
                    rows.append(
                        {
                            "scorer": name,
                            "heads": share,
                            "tokens": str(tokens),
                            "format": format,
                            **_measured(shared, allocation, losses, "over_full", full),
                            **{f"exact_{kind}": f"{kinds[kind]['exact']:.2f}" for kind in KINDS[:-1] if kind in kinds},
                        }
                    )
                    print(" ".join(list(rows[-1].values())[:7]), file=sys.stderr, flush=True)
    return rows


def tiers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, arguments: argparse.Namespace
) -> list[dict[str, str]]:
    """The ladder's settings on the validation split, at equal exact bytes."""
    split, section = _validation(model, tokenizer, arguments)
    made = {
        (budget, name): setting
        for budget in LADDER_BUDGETS
        for name in LADDER
        if (setting := ladder_setting(section, budget, arguments.context_length, name)) is not None
    }
    evaluator, rows = _evaluator(model, split, [space for space, _ in made.values()]), []
    full = evaluator.full()
    for (budget, name), (space, allocation) in made.items():
        losses = evaluator.evaluate(space, tuple(allocation))
        rows.append(
            {
                "budget": budget,
                "setting": name,
                "tokens": " + ".join(str(count) for count, _ in allocation[0].tiers),
                **_measured(space, allocation, losses, "over_full", full),
            }
        )
        print(" ".join(list(rows[-1].values())[:7]), file=sys.stderr, flush=True)
    return rows


def ladder(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, arguments: argparse.Namespace
) -> list[dict[str, str]]:
    """Two tiers with nothing evicted, eviction, and one width for all, at equal exact bytes, on key-value lines."""
    length, rows = arguments.context_length, []
    split = make_split(tokenizer, "validation", 1, length, seed=0)
    section = describe(model, tokenizer, arguments.model, split.contexts[0])
    for when in WHENS:
        lines = [key_value_lines(tokenizer, seed, length, when) for seed in range(arguments.contexts)]
        full = answer(model, _space(section, "64MiB", length, "h2o", "16bit"), [Choice(length, "16bit")], lines)
        rows.append(_ladder_row(when, "1", "full cache", "", 0, full))
        for budget in LADDER_BUDGETS:
            for name in LADDER:
                made = ladder_setting(section, budget, length, name)
                if made is None:
                    continue  # does not fit
                space, allocation = made
                losses = answer(model, space, allocation, lines)
                tokens = " + ".join(str(count) for count, _ in allocation[0].tiers)
                rows.append(_ladder_row(when, budget, name, tokens, space.bytes(allocation), losses))
                print(" ".join(list(rows[-1].values())), file=sys.stderr, flush=True)
    return rows


def ladder_setting(section: Model, budget: str, length: int, name: str) -> tuple[Space, Sequence[Choice]] | None:
    """One of the LADDER at these exact bytes; None where it does not fit."""
    how, format = LADDER[name]
    space = ladder_space(section, budget, length, "snapkv" if name.startswith("snapkv") else "h2o")
    allocation = two_tiers(space, format) if how == "two tiers" else uniform(space, format)
    return None if allocation is None else (space, allocation)


def two_tiers(space: Space, rest: str) -> list[Choice] | None:
    """The most tokens at 16 bit for which all others, none evicted, still fit in the format `rest`."""

    def at(important: int) -> list[Choice]:
        return [Choice(space.context_tokens - important, rest, ((important, "16bit"),))] * space.shape.num_layers

    fitting = range(space.sinks + space.window, space.context_tokens)
    if space.bytes(at(fitting[0])) > space.limit_bytes:
        return None
    low, high = fitting[0], fitting[-1]
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if space.bytes(at(middle)) <= space.limit_bytes else (low, middle - 1)
    return at(low)


def ladder_space(section: Model, budget: str, length: int, scorer: str) -> Space:
    """Where the ladder's settings live: generated tokens at 4 bit."""
    return _space(section, budget, length, scorer, "flexgen-k4v4")


def _space(section: Model, budget: str, length: int, scorer: str, reserve: str) -> Space:
    decode = Decode(reserve_tokens=64, format=reserve)
    return Space(section, budget, length, Scorer.model_validate({"name": scorer}), 4, 16, decode)


def key_value_lines(
    tokenizer: PreTrainedTokenizerBase, seed: int, length: int, when: str
) -> tuple[list[int], list[int], list[int]]:
    """(the prompt that is compressed, exactly `length` tokens; what is fed after it; the answer), in token ids."""
    chance = random.Random(seed)
    keys = [f"{adjective} {noun}" for adjective in ADJECTIVES.split() for noun in NOUNS.split()]
    chance.shuffle(keys)
    values = [str(chance.randint(1000, 99999)) for _ in keys]
    head = "Read the text below and remember every number that is mentioned."  # a wording that tiny was trained on

    def encode(text: str, special: bool = False) -> list[int]:
        return tokenizer(text, add_special_tokens=special).input_ids

    def tail(asked: int) -> list[int]:
        question = f"\nQuestion: What is the secret number of {keys[asked]}?"
        return encode(f"{question}\nAnswer: The secret number of {keys[asked]} is")

    statements = [encode(f" The secret number of {k} is {v}.") for k, v in zip(keys, values, strict=True)]
    prompt, count = encode(head, special=True), 0
    room = length - len(prompt) - (64 if when == "in the prompt" else 16)
    while sum(map(len, statements[: count + 1])) <= room:
        count += 1
    asked = chance.randrange(count if when == "in the prompt" else count // 3)
    question = tail(asked)
    filler = encode(" The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again." * 8)
    prompt += [token for statement in statements[:count] for token in statement]
    after = question[-1:] if when == "in the prompt" else question
    rest = question[:-1] if when == "in the prompt" else []
    prompt += filler[: length - len(prompt) - len(rest)] + rest
    assert len(prompt) == length
    return prompt, after, encode(f" {values[asked]}.")


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    space: Space,
    allocation: Sequence[Choice],
    lines: list[tuple[list[int], list[int], list[int]]],
) -> tuple[list[float], list[bool]]:
    """Per prompt: nats per token of the answer, and whether each of its tokens is the most likely one."""
    plan = space.probe((list(allocation) * space.shape.num_layers)[: space.shape.num_layers])
    nats, exact = [], []
    for start in range(0, len(lines), BATCH):
        batch = lines[start : start + BATCH]
        cache = PlannedCache.from_plan(plan, model)
        model(torch.tensor([prompt for prompt, _, _ in batch]), past_key_values=cache, logits_to_keep=1)
        fed = [after + answer for _, after, answer in batch]
        longest = max(map(len, fed))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in fed])  # what follows a row's end is not read
        logprobs = model(ids, past_key_values=cache).logits.float().log_softmax(-1)
        for row, (_, after, answer) in enumerate(batch):
            own = logprobs[row, len(after) - 1 : len(after) - 1 + len(answer)]
            targets = torch.tensor(answer)
            nats.append(-own.gather(1, targets[:, None]).mean().item())
            exact.append(bool((own.argmax(-1) == targets).all()))
    return nats, exact


def _ladder_row(
    when: str, budget: str, setting: str, tokens: str, num_bytes: int, losses: tuple[list[float], list[bool]]
) -> dict[str, str]:
    nats, exact = torch.tensor(losses[0], dtype=torch.float64), losses[1]
    return {
        "asked": when,
        "setting": setting,
        "budget": budget,
        "tokens": tokens,
        "bytes": str(num_bytes),
        "cross_entropy": f"{nats.mean().item():.3f}",
        "standard_error": f"{(nats.std() / len(nats) ** 0.5).item():.3f}",
        "exact": f"{sum(exact) / len(exact):.3f}",
    }


if __name__ == "__main__":
    sys.exit(main())
