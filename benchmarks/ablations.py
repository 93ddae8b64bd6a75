"""What each part of the search is worth: variants of it at one budget, on the search and on the validation split.

    python -m benchmarks.ablations --model smollm2 --budget 1/64 --study runs/ablations        (goes on where it was)

The rows: the best uniform setting; elimination alone; the knapsack alone, from uniform; both; and the knapsack from
uniform with less to choose from or another goal: tokens only (as EvolKV searches), bits only at equal tokens (as
KVTuner does), keys and values of equal bits, cross-entropy in place of KL, every head its own
count, heads shared adaptively. And a ladder of
precisions that is the same in every layer and head (as RDKV's reverse water-filling gives), the best of a few.
Writes benchmarks/results/ablations_<model>.csv.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.where import RESULTS, where, write_rows
from qpkv_planner.allocation import Allocation, Choice, Space, format_name, format_named, uniform
from qpkv_planner.calibration import make_split
from qpkv_planner.calibration_cache import load_or_prepare
from qpkv_planner.elimination import eliminate, roomy
from qpkv_planner.grid import QUICK_FORMATS, Setting, make_setting
from qpkv_planner.journal import Journal
from qpkv_planner.knapsack import POWERS, Wishes, improve, next_bits
from qpkv_planner.measurement import Evaluator, Objective, interval
from qpkv_planner.options import SCORERS, THOROUGH
from qpkv_planner.session import describe
from qpkv_planner.stages import LEAST_SHARE
from qpkv_runtime.compression import Scoring
from qpkv_runtime.models import load_model
from qpkv_runtime.plan import Decode, Heads

LADDERS = (
    (0.0, 0.25),
    (0.0, 0.5),
    (0.125, 0.5),
    (0.0625, 0.25),
)  # shares of the tokens at 8 and at 4 bit, the rest at 2


@dataclass(frozen=True)
class Variant:
    name: str
    space: Space
    allocation: Allocation


def tokens_only(mine: Choice, quantizer: str, radius: float) -> list[tuple[float, str]]:
    return [(mine.tokens * radius**power, mine.format) for power in POWERS]


def bits_only(mine: Choice, quantizer: str, radius: float) -> list[tuple[float, str]]:
    format = format_named(mine.format)
    keys, values = format.keys.bits, format.values.bits
    steps = [(next_bits(keys, k), next_bits(values, v)) for k in (-1, 0, 1) for v in (-1, 0, 1)]
    return [(mine.tokens, format_name(quantizer, *bits)) for bits in steps]


def equal_bits(mine: Choice, quantizer: str, radius: float) -> list[tuple[float, str]]:
    bits = format_named(mine.format).keys.bits
    steps = [(mine.tokens * bits / other, other) for other in (next_bits(bits, -1), next_bits(bits, 1))]
    alike = [(tokens * radius**power, other) for tokens, other in steps for power in (-1.0, 0.0, 1.0)]
    return tokens_only(mine, quantizer, radius) + [(n, format_name(quantizer, b, b)) for n, b in alike]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--budget", default="1/64")
    parser.add_argument("--context-length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3, help="of the knapsack, in every variant")
    parser.add_argument(
        "--contexts", type=int, nargs=2, default=[THOROUGH.search_contexts, THOROUGH.validation_contexts]
    )
    parser.add_argument("--study", type=Path, required=True, help="where evaluations and prefills are kept")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/ablations_<model>.csv")
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model)
    splits = [
        make_split(tokenizer, name, count, arguments.context_length, seed=0)
        for name, count in zip(("search", "validation"), arguments.contexts, strict=True)
    ]
    section = describe(model, tokenizer, arguments.model, splits[0].contexts[0])
    space = Space(
        section, arguments.budget, arguments.context_length, SCORERS[0], 4, 4,
        Decode(reserve_tokens=1, format="rotated-k4v4"),
    )  # fmt: skip
    arguments.study.mkdir(parents=True, exist_ok=True)
    journal = Journal(arguments.study / "journal.jsonl", {"model": section.model_dump()})
    scorings = [Scoring.of(scorer, 4, 4) for scorer in SCORERS]
    search, validation = (
        Evaluator(model, load_or_prepare(model, section, split, scorings, 3, lambda: None, arguments.study), journal)
        for split in splits
    )
    full, rows, baseline = validation.full(), [], None
    started, spent = time.monotonic(), search.spent
    for variant in _variants(search, space, arguments.rounds):
        on_search = search.evaluate(variant.space, variant.allocation)
        losses = validation.evaluate(variant.space, variant.allocation)
        baseline = baseline or losses
        gain = interval(losses, "ce", minus=baseline)
        gap = baseline.mean("ce") - full.mean("ce")
        rows.append(
            {
                "budget": arguments.budget,
                "variant": variant.name,
                "bytes": variant.space.bytes(variant.allocation),
                "search_kl": f"{on_search.mean('kl'):.4f}",
                "cross_entropy": f"{losses.mean('ce'):.4f}",
                "kl": f"{losses.mean('kl'):.4f}",
                "exact": f"{losses.mean('exact'):.3f}",
                "to_uniform": f"{gain.mean:+.4f}",
                "to_uniform_low": f"{gain.low:+.4f}",
                "to_uniform_high": f"{gain.high:+.4f}",
                "gap_closed": f"{-gain.mean / gap:.3f}",
                "samples": len(validation.prepared),
                **where(),
            }
        )
        print(
            f"{variant.name:<34} search kl {on_search.mean('kl'):.3f}  validation ce {losses.mean('ce'):.3f} "
            f"kl {losses.mean('kl'):.3f}  ({search.spent - spent:.0f} forwards, {time.monotonic() - started:.0f} s)",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        started, spent = time.monotonic(), search.spent
        write_rows(arguments.output or RESULTS / f"ablations_{arguments.model}.csv", rows)
    return 0


def _variants(search: Evaluator, space: Space, rounds: int) -> Iterator[Variant]:
    def best(spaces: list[Space]) -> Setting:
        made = [make_setting(one, "uniform", format, None) for one in spaces for format in QUICK_FORMATS]
        fitting = [setting for setting in made if setting is not None]
        return min(fitting, key=lambda one: search.evaluate(one.space, one.allocation).mean("kl"))

    start = best([replace(space, scorer=scorer) for scorer in SCORERS])
    yield Variant(f"uniform: {start.name}", start.space, start.allocation)

    def refined(
        name: str, start: Setting, begin: Allocation, wishes: Wishes | None = None, objective: Objective = "kl",
        by_head: bool = False,
    ) -> Variant:  # fmt: skip
        quantizer, floor = format_named(start.format).keys.quantizer, _floor(start)
        space, found, *_ = improve(
            search, start.space, begin, quantizer, rounds, objective, floor, _nothing, wishes=wishes, by_head=by_head
        )
        return Variant(name, space, found)

    roomier = roomy(start.space, start.format, THOROUGH.times_budget)
    eliminated, _ = eliminate(search, start.space, roomier, "kl", _floor(start), _nothing)
    yield Variant("elimination alone", start.space, eliminated)
    yield refined("elimination and knapsack", start, eliminated)
    yield refined("knapsack alone", start, start.allocation)
    for name, wishes in (("tokens only", tokens_only), ("bits only", bits_only), ("K = V bits", equal_bits)):
        yield refined(f"knapsack, {name}", start, start.allocation, wishes)
    yield refined("knapsack, cross-entropy for KL", start, start.allocation, objective="ce")
    yield refined("knapsack, by head", start, start.allocation, by_head=True)
    ladders = [one for one in (_ladder(start.space, *shares) for shares in LADDERS) if one is not None]
    ladder = min(ladders, key=lambda one: search.evaluate(start.space, one).mean("kl"))
    yield Variant("the same ladder 8/4/2 everywhere", start.space, ladder)
    shared = best([replace(start.space, heads=Heads.model_validate({"share": "adaptive"}))])
    yield Variant("uniform, adaptive heads", shared.space, shared.allocation)
    yield refined("knapsack, adaptive heads", shared, shared.allocation)


def _floor(start: Setting) -> int:
    """The least tokens that a layer may have, as in the planner."""
    return min(choice.tokens for choice in start.allocation) // LEAST_SHARE


def _ladder(space: Space, eight: float, four: float) -> Allocation | None:
    """Every layer the same tokens, in these shares at 8 and 4 bit and the rest at 2, as many as fit."""
    at_most = uniform(space, "rotated-k2v2")
    if at_most is None:
        return None
    found = None
    for tokens in range(16, at_most[0].tokens + 1, 8):
        above = [(8 * round(share * tokens / 8), name) for share, name in ((eight, "k8v8"), (four, "k4v4"))]
        held = tuple((count, f"rotated-{name}") for count, name in above if count)
        choice = Choice(tokens - sum(count for count, _ in held), "rotated-k2v2", held)
        allocation = (choice,) * space.shape.num_layers
        if choice.tokens > 0 and space.bytes(allocation) <= space.limit_bytes:
            found = allocation
    return found


_nothing: Callable[[int], None] = lambda count: None  # noqa: E731


if __name__ == "__main__":
    sys.exit(main())
