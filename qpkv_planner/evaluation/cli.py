"""The command qpkv-eval: how good are answers under a plan, and is one run better than another?"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpkv_planner.files import check_writable, write_whole
from qpkv_runtime.cli import CommandParser
from qpkv_runtime.errors import InputError, run_command
from qpkv_runtime.models.options import add_loading_options, as_planned, loading_options
from qpkv_runtime.plan import Plan, load_plan

if TYPE_CHECKING:
    from qpkv_planner.evaluation.samples import Encoder, Options, Sample

SUITES = ("niah", "ruler", "text", "longbench")
DEFAULT_SUITES = "niah,text"
DEFAULT_LENGTH = 2048

DESCRIPTION = """\
Answer the samples of known tasks inside a plan's bytes (--plan), or with the full cache (--model), and score them:
  niah       a needle in a haystack, at every depth and length
  ruler      RULER's 13 tasks (the two with questions on documents need --squad or --hotpotqa)
  text       cross-entropy of what documents go on with, by position
  longbench  LongBench v1 on your jsonl files (--longbench)
Answers are greedy. The table goes to stdout, progress to stderr."""

EXAMPLES = """\
  qpkv-eval --plan plan.yaml
  qpkv-eval --plan plan.yaml --suites ruler --lengths 1024,2048 --samples 5 --json plan.json
  qpkv-eval --model smollm2  --suites ruler --lengths 1024,2048 --samples 5 --json full.json
  qpkv-eval --compare full.json plan.json
  qpkv-eval --plan plan.yaml --suites niah --regime both --heatmap needle.png
  qpkv-eval --plan plan.yaml --suites longbench --longbench data/*.jsonl --lengths 8192

The same command with the same --json goes on where an interrupted one stopped."""


def parser() -> CommandParser:
    out = CommandParser("qpkv-eval", DESCRIPTION, EXAMPLES)
    out.add_argument("--plan", metavar="FILE", help="answer inside this plan's bytes")
    out.add_argument("--model", metavar="NAME", help="without --plan: the full cache; with it: instead of the plan's")
    out.add_argument("--compare", nargs=2, metavar=("A.json", "B.json"), help="paired differences of two runs, B - A")
    out.add_argument("--suites", default=DEFAULT_SUITES, help=f"of {', '.join(SUITES)} (default {DEFAULT_SUITES})")
    out.add_argument(
        "--regime",
        choices=("aware", "agnostic", "both"),
        default="aware",
        help="is the question compressed with the document, or asked afterwards? (default aware)",
    )
    out.add_argument("--lengths", metavar="N,N", help="tokens, answer included (default: the plan's context length)")
    out.add_argument(
        "--samples",
        type=int,
        default=1,
        metavar="N",
        help="per task and length, an interval needs 2; niah: at every depth; text: 8 times as many (default 1)",
    )
    out.add_argument("--limit", type=int, metavar="N", help="at most N samples of each suite, spread over it")
    out.add_argument("--seed", type=int, default=0, help="of the samples (default 0)")
    out.add_argument("--max-new-tokens", type=int, metavar="N", help="cut answers (default: what each task says)")
    out.add_argument("--tasks", metavar="NAME,NAME", help="only these tasks of ruler, data sets of longbench")
    out.add_argument("--depths", default="0,25,50,75,100", metavar="N,N", help="niah: per cent (default %(default)s)")
    out.add_argument("--needle", default="number", help="niah: number (default), or classic (Dolores Park)")
    out.add_argument("--templates", metavar="FILE", help="ruler: YAML with your own templates")
    out.add_argument("--squad", metavar="FILE", help="ruler: SQuAD's JSON file, for qa_1")
    out.add_argument("--hotpotqa", metavar="FILE", help="ruler: HotpotQA's JSON file, for qa_2")
    out.add_argument("--longbench", nargs="+", default=[], metavar="FILE", help="longbench: jsonl files")
    out.add_argument("--json", type=Path, metavar="FILE", help="write the run here, a row for each sample")
    out.add_argument("--heatmap", type=Path, metavar="FILE", help="niah: draw a PNG")
    out.add_argument("--quiet", action="store_true", help="no progress on stderr")
    add_loading_options(out, "the plan's, or what the machine does best")
    return out  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Entry point of qpkv-eval; returns the exit status."""
    return run_command("qpkv-eval", lambda: _main(argv))


def _main(argv: list[str] | None) -> int:
    args = parser().parse_args(argv)
    if args.compare:
        if args.plan or args.model:
            raise InputError("--compare reads two finished runs: leave --plan and --model out")
        return _compare(args)
    if args.plan is None and args.model is None:
        raise InputError("give --plan FILE, --model NAME for the full cache, or --compare (see qpkv-eval --help)")
    for name in ("samples", "limit", "max_new_tokens"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for name in ("json", "heatmap"):
        if (path := getattr(args, name)) is not None:
            check_writable(f"--{name}", path)
    suites = list(dict.fromkeys(args.suites.split(",")))
    for suite in suites:
        if suite not in SUITES:
            raise InputError(f"a suite is one of {', '.join(SUITES)}, got {suite!r}")
    if args.heatmap is not None and "niah" not in suites:
        raise InputError("--heatmap draws the suite niah, which is not among --suites")
    if args.heatmap is not None:
        from qpkv_planner.report import need_matplotlib

        need_matplotlib("--heatmap")
    plan = None if args.plan is None else load_plan(args.plan)
    _numbers(args.depths, "--depths", 0, 100)
    return _run(args, suites, plan)


def _run(args: argparse.Namespace, suites: list[str], plan: Plan | None) -> int:
    from qpkv_planner.evaluation.answering import REGIMES, Runner
    from qpkv_planner.evaluation.report import heat_map, summary
    from qpkv_planner.evaluation.run import evaluate
    from qpkv_planner.evaluation.samples import Encoder
    from qpkv_runtime.cache import check_shape
    from qpkv_runtime.models import load_model, load_tokenizer, model_shape, weights_warning

    name = args.model or (plan.model.id if plan is not None else "")
    options = loading_options(args) if plan is None else as_planned(loading_options(args), plan, name)
    tokenizer = load_tokenizer(name, **{key: options[key] for key in ("revision", "trust_remote_code")})
    encoder = Encoder(tokenizer)  # samples first: most mistakes show before the weights are read
    samples = _samples(args, suites, plan, encoder)
    model, tokenizer = load_model(name, **options)
    runner = Runner(model, tokenizer, plan)
    if plan is not None:
        check_shape(plan, model_shape(model))
        if warning := weights_warning(plan.model.weights_hash, name, runner.identity):
            _say(warning)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the prompt has .* tokens, more than")  # said once, below
        if plan is not None and (longest := max(s.length for s in samples)) > plan.budget.context_tokens:
            _say(f"warning: the plan was made for {plan.budget.context_tokens} tokens, samples have up to {longest}")
        run = evaluate(
            runner,
            samples,
            REGIMES if args.regime == "both" else (args.regime,),
            name=name,
            plan_file=args.plan,
            output=args.json,
            quiet=args.quiet,
        )
    print(summary(run["rows"]))
    if args.heatmap is not None:
        under = "full cache" if plan is None else f"{args.plan} ({plan.budget.requested})"
        heat_map(run["rows"], f"{name}, {under}", args.heatmap)
    return 0


def _samples(args: argparse.Namespace, suites: list[str], plan: Plan | None, encoder: Encoder) -> list[Sample]:
    from qpkv_planner.evaluation import longbench, niah, ruler, text
    from qpkv_planner.evaluation.samples import Options

    usual = DEFAULT_LENGTH if plan is None else plan.budget.context_tokens
    tasks = tuple(args.tasks.split(",")) if args.tasks else ()
    if unknown := [task for task in tasks if task not in {**ruler.TASKS, **longbench.DATA_SETS}]:
        known = ", ".join([*ruler.TASKS, *longbench.DATA_SETS])
        raise InputError(f"--tasks are of {known}, got {unknown[0]!r}")
    for suite, known_tasks in (("ruler", ruler.TASKS), ("longbench", longbench.DATA_SETS)):
        if suite not in suites and (others := [task for task in tasks if task in known_tasks]):
            raise InputError(f"--tasks {others[0]} is of the suite {suite}, which is not among --suites")
    lengths = _numbers(args.lengths, "--lengths", 1, 10**7) if args.lengths else (usual,)

    def options(suite: str) -> Options:
        own = {"ruler": set(ruler.TASKS), "longbench": set(longbench.DATA_SETS)}.get(suite, set())
        return Options(
            lengths=lengths if args.lengths or suite != "niah" else (usual // 4, usual // 2, usual),
            depths=_numbers(args.depths, "--depths", 0, 100),
            num_samples=args.samples * (8 if suite == "text" else 1),
            seed=args.seed,
            tasks=tuple(task for task in tasks if task in own),
            max_new_tokens=args.max_new_tokens,
            needle=args.needle,
            files={name: value for name in ("squad", "hotpotqa") if (value := getattr(args, name))},
            longbench=tuple(args.longbench),
            templates=ruler.load_templates(args.templates) if args.templates else {},
        )

    make = {
        "niah": niah.make_samples,
        "ruler": ruler.make_samples,
        "text": text.make_samples,
        "longbench": longbench.make_samples,
    }
    samples: list[Sample] = []
    for suite in suites:
        own = options(suite)
        if suite == "ruler" and not args.quiet:
            for line in ruler.left_out(own):
                _say(line)
        made = make[suite](encoder, own)
        if not made:
            raise InputError(f"{suite} has no samples: none of its data is of --tasks {args.tasks}")
        samples += _spread(made, args.limit)
    return samples


def _spread(samples: list[Sample], limit: int | None) -> list[Sample]:
    """At most `limit` of them, evenly from the first to the last."""
    if limit is None or limit >= len(samples):
        return samples
    return [samples[i * len(samples) // limit] for i in range(limit)]


def _numbers(text: str, option: str, least: int, most: int) -> tuple[int, ...]:
    try:
        numbers = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        numbers = ()
    if not numbers or not all(least <= number <= most for number in numbers):
        raise InputError(f"{option} must be whole numbers from {least} to {most}, with commas, got {text!r}")
    return numbers


def _compare(args: argparse.Namespace) -> int:
    from qpkv_planner.evaluation.comparison import compare, load_run
    from qpkv_planner.evaluation.report import comparison

    a, b = map(load_run, args.compare)
    differences = compare(a, b, tuple(args.compare))
    print(f"first: {args.compare[0]} ({_what(a)})\nsecond: {args.compare[1]} ({_what(b)})\n")
    print(comparison(differences, ("first", "second")))
    if args.json is not None:
        from dataclasses import asdict

        rows = [{**asdict(one), "change": one.change.model_dump()} for one in differences]
        write_whole(args.json, json.dumps({"a": args.compare[0], "b": args.compare[1], "differences": rows}) + "\n")
    return 0


def _what(run: dict[str, Any]) -> str:
    plan = run["plan"]
    return f"{run['model']}, " + ("full cache" if plan is None else f"{plan['file']}, {plan['planned_bytes']:,} bytes")


def _say(text: str) -> None:
    print(f"qpkv-eval: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
