"""The command qpkv-plan: a model and a budget in, a plan's YAML out on stdout."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpkv_planner.allocation import DEFAULT_CONTEXT_TOKENS, HEADS
from qpkv_planner.files import check_readable, check_writable, make_folder, write_whole
from qpkv_planner.fit import Fit, fit, memory_bytes, weights_bytes
from qpkv_planner.grid import PAPER_WINDOW
from qpkv_planner.mix import LONG_MIX, LONG_TOKENS, SHORT_MIX, parse_mix
from qpkv_runtime.budget import limit_bytes
from qpkv_runtime.cli import CommandParser
from qpkv_runtime.errors import EXIT_INTERRUPTED, InputError, run_command
from qpkv_runtime.models.options import add_loading_options, loading_options

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qpkv_planner.options import Options
    from qpkv_runtime.plan import Plan


MEASURED_TOKENS = 1024  # a prefill's peak is measured at, and grows with the tokens
LEAST_MEASURED_TOKENS = 128
OF_A_SEARCH = (  # options that a uniform setting has no use for
    "quick", "trials", "timeout", "study", "resume", "storage", "report", "calibration", "calibration_mix", "target",
    "calibration_cache", "calibration_length", "search_length", "prefill_memory", "objective", "sampler", "regime",
    "seed",
)  # fmt: skip
ANY_CACHE_BYTES = 2**40  # for finding out whether a budget can be read at all

DESCRIPTION = """\
Search for the plan of a model under a memory budget: how many tokens of its KV cache each layer keeps, and with how
many bits. The plan goes to stdout as YAML; progress and results on the way go to stderr. Interrupted (Ctrl-C), the
search writes the best plan so far, which says so, and exits with 130; with 1 when --timeout left budgets of --out-dir
without a plan."""

EXAMPLES = """\
  qpkv-plan --model smollm2 --budget 1/64 > plan.yaml
  qpkv-plan --model smollm2 --budget 1/32 --context-length 1024 --quick --output plan.yaml
  qpkv-plan --model smollm2 --budget 1/8,1/16,1/32,1/64 --out-dir plans    (one prefill, and plans/frontier.json)
  qpkv-plan --model smollm2 --budget auto --max-loss 0.05 > plan.yaml      (the smallest within 0.05 nats)
  qpkv-plan --model smollm2 --budget 1/64 --report report.html > plan.yaml (the search, drawn: open it in a browser)
  qpkv-plan --model smollm2 --budget 1/64 --study study > plan.yaml        (killed? again with --resume)
  qpkv-plan --model smollm2 --budget 1/64 --storage trials.log > plan.yaml (then: optuna-dashboard trials.log)
  qpkv-plan --model ./my-model --budget 512MiB --context-length 32768 --search-length 8192
  qpkv-plan --model smollm2 --budget 1/16 --calibration samples.jsonl --regime agnostic > plan.yaml
  qpkv-plan --model llama-3-8b --fit 24GiB --batch 16 --context-length 8192 --dry-run     (what would be done)
  qpkv-plan --model mistral-7b --budget 1/64 --uniform snapkv:kivi:4bit    (by arithmetic alone: no weights, no search)

budgets, per sequence: 1/64, 0.0156 or 1.6% of the full cache (16 bit, all KV heads, --context-length tokens), or bytes:
512MiB, 2GB."""


def parser() -> CommandParser:
    out = CommandParser("qpkv-plan", DESCRIPTION, EXAMPLES)
    out.add_argument("--model", required=True, help="smollm2, tiny, an alias, a directory, a .gguf file or a hub id")
    out.add_argument(
        "--budget",
        help="1/64, 0.0156, 1.6%%, 512MiB or 2GB, per sequence; several: 1/8,1/16 with --out-dir; auto with --max-loss",
    )
    out.add_argument(
        "--fit",
        metavar="SIZE",
        help="in place of --budget: a device's memory (24GiB) that must hold the model, its work and --batch "
        "sequences of --context-length tokens; what is left is their cache",
    )
    out.add_argument("--batch", type=int, metavar="N", help="with --fit: sequences at a time (default 1)")
    out.add_argument(
        "--dry-run",
        action="store_true",
        help="print what would be done and an estimate of its time and memory, as YAML; needs no weights",
    )
    out.add_argument("--out-dir", type=Path, metavar="DIR", help="where the plans of several budgets go")
    out.add_argument(
        "--max-loss",
        type=float,
        metavar="NATS",
        help="with --budget auto: how far validation cross-entropy may exceed the full cache's (95 %% upper bound)",
    )
    out.add_argument(
        "--context-length",
        type=int,
        metavar="TOKENS",
        help="the length a ratio refers to (default 2048, with --quick 1024, or the model's if that is smaller)",
    )
    out.add_argument(
        "--calibration-length",
        type=int,
        metavar="TOKENS",
        help="the length of the contexts that the result is measured on (default: the context length)",
    )
    out.add_argument(
        "--search-length",
        type=int,
        metavar="TOKENS",
        help="the length of the contexts that the search looks at, to save time on long ones; what it finds is "
        "stretched and measured at the calibration length (default: that length)",
    )
    out.add_argument("--quick", action="store_true", help="a first look: fewer contexts, formats and rounds")
    out.add_argument("--objective", choices=("kl", "ce"), default="kl", help="what the search minimises (default kl)")
    out.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="TOKENS",
        help="room for generated tokens inside the budget (default 64, or what a quarter of the budget holds)",
    )
    out.add_argument(
        "--then",
        choices=("evict", "stop"),
        default="evict",
        help="when that room is full: evict the oldest generated token, or stop with an error (default evict)",
    )
    out.add_argument("--sinks", type=int, default=4, help="first tokens that every layer keeps (default 4)")
    out.add_argument(
        "--heads", choices=HEADS,
        help="how KV heads share a layer's tokens (default searched: each its own count; with --uniform: uniform; "
        "adaptive: by each prompt's scores; weighted: by measured importance)",
    )  # fmt: skip
    out.add_argument(
        "--window", type=int, help="last tokens that every layer keeps (default 4; with --uniform the papers' 16)"
    )
    out.add_argument("--trials", type=int, help="Optuna trials (default 8)")
    out.add_argument("--sampler", choices=("tpe", "gp", "random"), default="tpe", help="Optuna's (default tpe)")
    out.add_argument(
        "--storage",
        metavar="URL|FILE",
        help="share the Optuna stage: every process that runs this command with the same storage joins its study",
    )
    out.add_argument(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help="end the search then and ship the best plan so far, validated; the plan says so",
    )
    out.add_argument("--seed", type=int, default=0, help="of the calibration data and the search (default 0)")
    out.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="your own samples: jsonl with prompt and continuation, taken as they are (prompts of which half begins "
        "alike are about one document), or plain text, cut into windows",
    )
    out.add_argument(
        "--calibration-mix",
        metavar="KIND=N,...",
        help="facts per context and shares of documents "
        f"(default {SHORT_MIX}; from {LONG_TOKENS} tokens on {LONG_MIX})",
    )
    out.add_argument(
        "--regime",
        choices=("aware", "agnostic"),
        default="aware",
        help="aware: the question is in the prompt when it is compressed; agnostic: it comes after (default aware)",
    )
    out.add_argument(
        "--target",
        choices=("gold", "self"),
        default="gold",
        help="measure on the true continuation, or on what the full cache writes (default gold)",
    )
    out.add_argument("--study", type=Path, metavar="DIR", help="keep prefills and a journal of every evaluation there")
    out.add_argument("--resume", action="store_true", help="go on over the --study of a run that was stopped")
    out.add_argument(
        "--calibration-cache", type=Path, metavar="DIR", help="keep prefills there, for other searches to reuse"
    )
    out.add_argument(
        "--uniform",
        metavar="SCORER:QUANTIZER:BITS",
        help="no search: every layer alike, such as snapkv:kivi:4bit, snapkv:rotated:k4v2 or (fewer tokens with depth) "
        "pyramidkv:kivi:4bit; marked calibrated: false",
    )
    out.add_argument("--output", "-o", type=Path, metavar="FILE", help="write the plan here instead of to stdout")
    out.add_argument(
        "--report", type=Path, metavar="FILE",
        help="draw the search, an .html file for browsers or a .png (needs matplotlib: extra `report`)",
    )  # fmt: skip
    out.add_argument(
        "--prefill-memory",
        metavar="SIZE",
        help="memory that prefills may take, the rest going to disk (default: half of what is free on the device, "
        "or else in main memory)",
    )
    out.add_argument("--quiet", action="store_true", help="nothing on stderr but errors")
    add_loading_options(out)
    return out


def main(argv: list[str] | None = None) -> int:
    """Entry point of qpkv-plan; returns the exit status."""
    return run_command("qpkv-plan", lambda: _main(argv))


def _main(argv: list[str] | None) -> int:
    arguments = parser().parse_args(argv)
    _check(arguments)
    if arguments.dry_run:
        _put(arguments, _dry_run(arguments))
        return 0
    if arguments.uniform:
        _put(arguments, _uniform(arguments))
        return 0
    _options(arguments)  # raises before a model is loaded
    if arguments.out_dir is not None:
        return _frontier(arguments)

    from qpkv_planner import planner

    model, tokenizer = _load(arguments)
    if arguments.fit is not None:
        arguments.budget = _fitted(arguments, model).budget
    if arguments.budget == "auto":
        found = planner.smallest(model, tokenizer, arguments.max_loss, **_settings(arguments))
    else:
        found = planner.plan(model, tokenizer, arguments.budget, **_settings(arguments))
    _put(arguments, found.to_yaml())
    return _status(found)


def _check(arguments: argparse.Namespace) -> None:
    """Raise InputError, before anything is loaded, for options that make no sense alone or together."""
    if (arguments.budget is None) == (arguments.fit is None):
        raise InputError("give --budget, or --fit with a device's memory to derive it from (see qpkv-plan --help)")
    if arguments.fit is None and arguments.batch is not None:
        raise InputError("--batch is for --fit, which divides memory among sequences: leave it away with --budget")
    for name in ("fit", "prefill_memory"):
        if getattr(arguments, name) is not None:
            memory_bytes(getattr(arguments, name), f"--{name.replace('_', '-')}")
    if arguments.fit is not None and (arguments.out_dir is not None or arguments.max_loss is not None):
        raise InputError("--fit gives one budget: leave --out-dir and --max-loss to --budget")
    for name, least in (
        ("sinks", 0), ("window", 1), ("trials", 1), ("max_new_tokens", 1), ("context_length", 1), ("batch", 1),
    ):  # fmt: skip
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    for name in ("timeout", "max_loss"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise InputError(f"--{name.replace('_', '-')} must be above 0, got {value}")
    if (arguments.budget == "auto") != (arguments.max_loss is not None):
        raise InputError("--budget auto and --max-loss NATS go together: the one is found from the other")
    for budget in _budgets(arguments):
        limit_bytes(budget, ANY_CACHE_BYTES)
    if (len(_budgets(arguments)) > 1) != (arguments.out_dir is not None):
        raise InputError("several budgets (1/8,1/16) and --out-dir DIR go together: one file for each plan")
    if arguments.out_dir is not None and (arguments.output is not None or arguments.uniform):
        raise InputError("--out-dir names its files itself and is for searches: leave --output and --uniform away")
    if arguments.resume and arguments.study is None:
        raise InputError("--resume needs the --study DIR of the run that it goes on with")
    if arguments.study is not None and not arguments.resume and (arguments.study / "journal.jsonl").exists():
        raise InputError(f"{arguments.study} holds a study already: add --resume to go on, or choose another folder")
    if arguments.calibration is not None and arguments.calibration_mix is not None:
        raise InputError("--calibration-mix is about the built-in samples: leave it away with --calibration")
    if arguments.output is not None:
        check_writable("--output", arguments.output)
    if arguments.uniform:
        defaults = parser()
        for name in OF_A_SEARCH:
            if getattr(arguments, name) != defaults.get_default(name):
                option = "--" + name.replace("_", "-")
                raise InputError(f"{option} is of a search, and --uniform makes none: leave one of them away")
    if arguments.report is not None:
        from qpkv_planner.report import check_report

        check_report(arguments.report)
    if arguments.calibration is not None:
        check_readable("--calibration", arguments.calibration)


def _budgets(arguments: argparse.Namespace) -> list[str]:
    """The budgets as asked; none for `auto` and --fit."""
    return [] if arguments.budget in (None, "auto") else [one.strip() for one in arguments.budget.split(",")]


def _put(arguments: argparse.Namespace, text: str) -> None:
    if arguments.output is None:
        sys.stdout.flush()
        sys.stdout.buffer.write(text.encode())  # YAML is UTF-8 whatever the terminal is
    else:
        write_whole(arguments.output, text)


def _load(arguments: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from qpkv_runtime.models import load_model

    return load_model(arguments.model, **loading_options(arguments))


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `planner.plan` and its siblings."""
    from qpkv_planner.calibration import Data
    from qpkv_runtime.models import hub_commit

    mix = parse_mix(arguments.calibration_mix) if arguments.calibration_mix else None
    settings = {
        "name": arguments.model,
        "revision": hub_commit(arguments.model, arguments.revision),
        "study": arguments.study,
        "calibration_cache": arguments.calibration_cache,
        "report": arguments.report,
        "quiet": arguments.quiet,
        "context_tokens": arguments.context_length,
        "calibration_tokens": arguments.calibration_length,
        "search_tokens": arguments.search_length,
        "timeout_seconds": arguments.timeout,
        "prefill_memory": arguments.prefill_memory and memory_bytes(arguments.prefill_memory, "--prefill-memory"),
        "data": Data(arguments.regime, arguments.target, mix, arguments.calibration),
    }
    for name in (
        "quick", "objective", "max_new_tokens", "then", "sinks", "window", "heads", "trials", "sampler", "storage",
        "seed",
    ):  # fmt: skip
        if getattr(arguments, name) is not None:
            settings[name] = getattr(arguments, name)
    return settings


def _options(arguments: argparse.Namespace) -> Options:
    from qpkv_planner.options import Options

    settings = _settings(arguments)
    return Options(**{name: settings[name] for name in settings if name in Options.__dataclass_fields__})


def _frontier(arguments: argparse.Namespace) -> int:
    """One plan a file, named <model>__<budget>.yaml, and frontier.json: what each takes and loses."""
    from qpkv_planner import planner

    budgets = _budgets(arguments)
    make_folder("--out-dir", arguments.out_dir)
    model, tokenizer = _load(arguments)
    points, status = [], 0
    model_name = re.sub(r"[^\w.-]+", "-", Path(arguments.model).name)
    for found in planner.frontier(model, tokenizer, budgets, **_settings(arguments)):
        file = f"{model_name}__{found.budget.requested.replace('/', '-')}.yaml"
        write_whole(arguments.out_dir / file, found.to_yaml())
        points.append({"file": file, **_point(found)})
        write_whole(arguments.out_dir / "frontier.json", json.dumps(points, indent=2) + "\n")
        status = _status(found)
    return status or int(len(points) < len(budgets))


def _point(plan: Plan) -> dict[str, Any]:
    record = plan.calibration
    measured = (
        {} if record is None else {"cross_entropy": record.cross_entropy.model_dump(), "kl": record.kl.model_dump()}
    )
    return {**plan.budget.model_dump(), **measured}


def _status(plan: Plan) -> int:
    """130 for a plan that an interrupt cut short: it is written, and a script must not take it for a finished one."""
    return EXIT_INTERRUPTED if plan.calibration is not None and plan.calibration.stopped == "interrupted" else 0


def _fitted(arguments: argparse.Namespace, model: PreTrainedModel | None = None) -> Fit:
    """The division of --fit's memory, said on stderr. A loaded model's prefill is measured at up to the calibration
    length, and grows with the tokens; of very few it is computed."""
    from qpkv_planner.uniform import known

    facts, measured = known(arguments.model), None
    if arguments.uniform:  # no search has lengths, and torch is not loaded for theirs
        tokens = here = arguments.context_length or min(DEFAULT_CONTEXT_TOKENS, facts.shape.max_context_tokens)
    else:
        from qpkv_planner.options import check_lengths

        lengths = check_lengths(_options(arguments), facts.shape)
        tokens, here = lengths.context, min(lengths.calibration, MEASURED_TOKENS)
    dtype = "bfloat16" if arguments.dtype == "auto" else arguments.dtype
    if model is not None and here >= LEAST_MEASURED_TOKENS:
        from qpkv_planner.machine import measured_prefill_bytes

        width = weights_bytes(1, dtype) / model.dtype.itemsize
        measured = int(measured_prefill_bytes(model, here) * tokens / here * width)
    divided = fit(facts, memory_bytes(arguments.fit, "--fit"), arguments.batch or 1, tokens, dtype, measured)
    divided.budget  # noqa: B018  (raises where nothing is left)
    if not arguments.quiet:
        print(f"qpkv-plan: {divided.line()}", file=sys.stderr)
    return divided


def _dry_run(arguments: argparse.Namespace) -> str:
    import yaml

    from qpkv_planner.dry_run import outline
    from qpkv_planner.uniform import known
    from qpkv_runtime.models.load import place_and_dtype

    divided = None if arguments.fit is None else _fitted(arguments)
    options = _options(arguments)
    device, dtype = place_and_dtype(arguments.device, arguments.dtype)
    budgets = _budgets(arguments) if divided is None else [divided.budget]
    found = outline(arguments.model, known(arguments.model), budgets, options, dtype, device, divided)
    if arguments.uniform:
        del found["search"]
    text: str = yaml.safe_dump(found, sort_keys=False)
    return text


def _uniform(arguments: argparse.Namespace) -> str:
    from qpkv_planner.uniform import uniform_plan

    if arguments.fit is not None:
        arguments.budget = _fitted(arguments).budget
    return uniform_plan(
        arguments.model,
        arguments.budget,
        arguments.uniform,
        context_tokens=arguments.context_length,
        max_new_tokens=arguments.max_new_tokens,
        then=arguments.then,
        sinks=arguments.sinks,
        window=arguments.window or PAPER_WINDOW,
        heads=arguments.heads or "uniform",
    ).to_yaml()
