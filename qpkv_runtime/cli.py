"""The commands `qpkv-run` (answer prompts under a plan) and `qpkv-show` (look at plans and methods).

Answers and tables go to stdout, everything said about them to stderr. torch is imported once there is a plan and a
prompt to run, so `qpkv-show`, `--help` and most mistakes answer at once.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import qpkv_runtime
from qpkv_runtime.errors import InputError, QpkvError, is_out_of_memory, run_command
from qpkv_runtime.models.options import add_loading_options, as_planned, loading_options
from qpkv_runtime.overview import methods_overview, methods_text, plan_overview, plan_text
from qpkv_runtime.plan import Plan, load_plan

if TYPE_CHECKING:
    from torch import Tensor

    from qpkv_runtime.generation import Answer, Sampling

SAMPLE_PROMPT = Path(__file__).with_name("sample_prompt.txt")
QUESTIONS_MARKER = "\n=== questions ===\n"

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}, as chat templates take it


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose complaints are InputErrors, one line like any other; it has --version."""

    def __init__(self, prog: str, description: str, examples: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--version", action="version", version=f"{prog} {qpkv_runtime.__version__}")

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def show(argv: list[str] | None = None) -> int:
    """The command `qpkv-show`; argv: the arguments, the process's own by default -> exit status."""
    return run_command("qpkv-show", lambda: _show(_show_parser().parse_args(argv)))


def run(argv: list[str] | None = None) -> int:
    """The command `qpkv-run`; argv: the arguments, the process's own by default -> exit status."""
    return run_command("qpkv-run", lambda: _run(_run_parser().parse_args(argv)))


# --- qpkv-show -----------------------------------------------------------------------------------------------------


def _show_parser() -> CommandParser:
    parser = CommandParser(
        "qpkv-show",
        "Show what plans keep in each layer, what that weighs, and what it was measured to cost.",
        "  qpkv-show plan.yaml\n"
        "  qpkv-show --json plan.yaml | python -m json.tool\n"
        "  qpkv-show --methods              the scorers and quantizers that a plan can name",
    )
    parser.add_argument("plans", nargs="*", metavar="PLAN", help="plan files")
    parser.add_argument("--methods", action="store_true", help="list the token scorers and quantizers")
    parser.add_argument("--json", action="store_true", help="one JSON object, on one line, for each plan")
    return parser


def _show(args: argparse.Namespace) -> int:
    if not args.plans and not args.methods:
        raise InputError("give a plan file, or --methods (see qpkv-show --help)")
    plans = [(load_plan(file), file) for file in args.plans]
    if args.json:
        shown = [plan_overview(plan, file) for plan, file in plans] + [methods_overview()] * args.methods
        print("\n".join(json.dumps(data) for data in shown))
    else:
        print("\n\n".join([plan_text(plan, file) for plan, file in plans] + [methods_text()] * args.methods))
    return 0


# --- qpkv-run ------------------------------------------------------------------------------------------------------


def _run_parser() -> CommandParser:
    parser = CommandParser(
        "qpkv-run",
        "Answer prompts with a model whose KV cache stays inside the bytes of a plan. Without a prompt it is a\n"
        "conversation on a terminal, and asks questions about a bundled text elsewhere.",
        "  qpkv-run --plan plan.yaml --prompt 'Why is the sky blue?'\n"
        "  qpkv-run --plan plan.yaml --prompt-file question.txt --stats\n"
        "  cat report.txt | qpkv-run --plan plan.yaml --max-new-tokens 64\n"
        "  qpkv-run --plan plan.yaml --model ./my-copy --compare-full < prompt.txt\n"
        "  qpkv-run --plan plan.yaml        a conversation: /stats, /exit, Ctrl-C stops an answer",
    )
    parser.add_argument("--plan", required=True, metavar="FILE", help="the plan (qpkv-plan makes one)")
    parser.add_argument("--model", metavar="NAME", help="name, directory, .gguf file or hub id; default: the plan's")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt; default: standard input")
    prompt.add_argument("--prompt-file", metavar="FILE", help="read the prompt from a file, - for standard input")
    parser.add_argument("--system", metavar="TEXT", help="a system message for the chat template")
    parser.add_argument("--raw", action="store_true", help="continue the prompt as it is, without a chat template")
    parser.add_argument("--compare-full", action="store_true", help="also answer with the full cache and compare")
    parser.add_argument("--stats", action="store_true", help="bytes, kept tokens, speed and memory, on stderr")
    parser.add_argument("--eager", action="store_true", help="on a GPU: transformers' loop instead of a CUDA graph")
    add_loading_options(parser)
    sampling = parser.add_argument_group("generation, as transformers names it; greedy by default")
    sampling.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="default 256")
    sampling.add_argument("--do-sample", action="store_true", help="sample; implied by the next three")
    sampling.add_argument("--temperature", type=float, metavar="X")
    sampling.add_argument("--top-k", type=int, metavar="N")
    sampling.add_argument("--top-p", type=float, metavar="X")
    sampling.add_argument("--repetition-penalty", type=float, metavar="X")
    sampling.add_argument("--seed", type=int, metavar="N", help="of every answer")
    return parser


def _run(args: argparse.Namespace) -> int:
    plan = load_plan(args.plan)
    prompt = _given_prompt(args)
    with _one_line_warnings():
        session = _Session(plan, args)
        if prompt is not None:
            session.answer(session.opening(prompt))
        elif _is_terminal():
            _converse(session)
        else:
            _ask_about_sample(session)
    return 0


def _given_prompt(args: argparse.Namespace) -> str | None:
    """The prompt of the options or of standard input, without its last line break; None where there is none.

    Raises InputError for a prompt that was given and is empty or no UTF-8 text, and for a file that cannot be read.
    """
    is_optional = args.prompt is None and args.prompt_file is None
    if is_optional and _is_terminal():
        return None
    source = "standard input" if args.prompt_file in (None, "-") else args.prompt_file
    try:
        if args.prompt is not None:
            source, text = "--prompt", args.prompt
        elif source == args.prompt_file:
            text = Path(source).read_text(encoding="utf-8")
        else:
            text = sys.stdin.read() if sys.stdin is not None else ""
        text.encode()
    except OSError as error:
        raise InputError(f"cannot read a prompt from {source}: {error.strerror or error}") from None
    except UnicodeError:
        raise InputError(f"a prompt must be UTF-8 text, and {source} is not") from None
    if text.strip():
        return str(text).removesuffix("\n")
    if is_optional:
        return None
    raise InputError(f"a prompt must not be empty, and {source} is")


def _is_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Python's warnings as lines on stderr, once for each place that gives one."""
    said: set[tuple[str, int]] = set()

    def say(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if (filename, lineno) not in said:
            said.add((filename, lineno))
            _say(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = say
        yield


def _say(text: str) -> None:
    print(f"qpkv-run: {text}", file=sys.stderr, flush=True)


class _Session:
    """A model loaded to answer under a plan: to each conversation it is given, on stdout, as it is formed."""

    def __init__(self, plan: Plan, args: argparse.Namespace) -> None:
        from qpkv_runtime.cache import check_shape
        from qpkv_runtime.models import load_model, model_identity, model_shape, weights_warning

        self.plan, self.args, self.name = plan, args, args.model or plan.model.id
        self.sampling = _sampling(args)
        options = as_planned(loading_options(args), plan, self.name)
        self.model, self.tokenizer = load_model(self.name, **{**options, "dtype": args.dtype})
        check_shape(plan, model_shape(self.model))
        self.is_raw = args.raw or self.tokenizer.chat_template is None
        if self.is_raw and args.system is not None:
            reason = "--raw goes without it" if args.raw else f"{self.name} has none"
            raise InputError(f"--system needs a chat template, and {reason}: put the text into the prompt")
        if self.is_raw and not args.raw:
            _say(f"{self.name} has no chat template, so it continues the prompt as it is (--raw)")
        if (planned := plan.model.weights_hash) is not None and (
            warning := weights_warning(planned, self.name, model_identity(self.model, self.tokenizer))
        ):
            _say(warning)
        self.last: Answer | None = None
        self.text_so_far = ""  # of the answer under the plan, also when it was interrupted

    def opening(self, prompt: str) -> list[Message]:
        """A conversation that begins with `prompt`."""
        system = [] if self.args.system is None else [{"role": "system", "content": self.args.system}]
        return [*system, {"role": "user", "content": prompt}]

    def answer(self, messages: list[Message], heading: str = "") -> str:
        """Answer the conversation, print what the options ask for, and return the answer's text."""
        self.text_so_far = ""
        ids = self._encode(messages)
        is_compared = self.args.compare_full
        self.last = self._stream(self.plan, ids, heading + "plan:\n" * is_compared)
        if is_compared:
            full = self._stream(None, ids, "\nfull cache:\n")
            print(f"\n{_comparison(self.last, full, str(self.model.dtype).removeprefix('torch.'))}", flush=True)
        if self.args.stats:
            self.print_stats()
        return self.last.text

    def print_stats(self) -> None:
        if self.last is not None:
            lines = _stats_lines(self.last, self.plan)
        else:
            lines = ["the last answer did not come to its end" if self.text_so_far else "no answer yet"]
        print("\n".join(lines), file=sys.stderr, flush=True)

    def _encode(self, messages: list[Message]) -> Tensor:
        """int64 [1, T]. Tokenizers warn of a prompt longer than the context, which `generate` refuses: not verbose."""
        if self.is_raw:
            encoded: Any = self.tokenizer(_raw_text(messages), return_tensors="pt", verbose=False)
        else:
            try:
                encoded = self.tokenizer.apply_chat_template(
                    messages,
                    add_generation_prompt=True,
                    return_tensors="pt",
                    return_dict=True,
                    tokenizer_kwargs={"verbose": False},
                )
            except Exception as error:  # a template is a program of the model's, and can end in any of them
                if is_out_of_memory(error):
                    raise
                reason = " ".join(str(error).split()) or type(error).__name__
                raise InputError(f"the chat template of {self.name} refuses this conversation: {reason}") from error
        ids: Tensor = encoded["input_ids"]
        return ids

    def _stream(self, plan: Plan | None, ids: Tensor, heading: str) -> Answer:
        """Generate and print; the heading comes with the first token, so a prompt that is refused prints nothing."""
        from qpkv_runtime.generation import TextStream, generate

        has_begun = False

        def write(text: str) -> None:
            nonlocal has_begun
            first, has_begun = not has_begun, True  # before printing, which Ctrl-C may interrupt
            if plan is not None:
                self.last = None  # of an answer that this one takes the place of
                self.text_so_far += text
            print(heading + text if first else text, end="", flush=True)

        stream = TextStream(self.tokenizer, write)
        try:
            return generate(
                self.model,
                self.tokenizer,
                plan,
                ids,
                max_new_tokens=self.args.max_new_tokens,
                sampling=self.sampling,
                streamer=stream,
                eager=self.args.eager,
            )
        finally:
            if has_begun:
                print(flush=True)


def _sampling(args: argparse.Namespace) -> Sampling:
    from qpkv_runtime.generation import Sampling

    do_sample = args.do_sample or any(x is not None for x in (args.temperature, args.top_k, args.top_p))
    seed = args.seed
    if seed is None and do_sample and args.compare_full:
        seed = random.randrange(2**32)  # the two answers are comparable only under one seed
    return Sampling(do_sample, args.temperature, args.top_k, args.top_p, args.repetition_penalty, seed)


def _raw_text(messages: list[Message]) -> str:
    """The conversation as one text: an answer continues its prompt, the next prompt begins on a new line."""
    text = ""
    for message in messages:
        text += ("\n" if text and message["role"] == "user" else "") + message["content"]
    return text


def _converse(session: _Session) -> None:
    """Prompts from the terminal until Ctrl-D or /exit. Each turn prefills the whole conversation anew, so that what
    is kept is chosen with the new question in sight."""
    with suppress(ImportError):
        import readline  # noqa: F401  (gives input() line editing and history)

    _say(f"{session.name} under {session.plan.budget.planned_bytes:,} bytes; /stats, /exit, Ctrl-C stops an answer")
    messages: list[Message] = []
    while True:
        try:
            prompt = _read_line().strip()
            prompt.encode()
        except UnicodeError:
            _say("error: a prompt must be UTF-8 text, and this line is not")
            continue
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print(file=sys.stderr)
            continue
        if prompt == "/exit":
            return
        if prompt == "/stats":
            session.print_stats()
        elif prompt:
            turn = [*messages, {"role": "user", "content": prompt}] if messages else session.opening(prompt)
            try:
                messages = [*turn, {"role": "assistant", "content": session.answer(turn)}]
            except KeyboardInterrupt:
                if session.text_so_far:
                    messages = [*turn, {"role": "assistant", "content": session.text_so_far}]
                else:
                    print(file=sys.stderr)
            except QpkvError as error:
                _say(f"error: {error}; this turn is forgotten")


def _read_line() -> str:
    """A line from the terminal; what invites it belongs on stderr unless a person reads stdout too."""
    if sys.stdout.isatty():
        return input("> ")
    print("> ", end="", file=sys.stderr, flush=True)
    return input()


def _ask_about_sample(session: _Session) -> None:
    """Put each of the bundled questions to the bundled text, in a prompt of its own."""
    text, _, questions = SAMPLE_PROMPT.read_text(encoding="utf-8").partition(QUESTIONS_MARKER)
    _say("no prompt was given (see --help); asking about a bundled text instead")
    frame = "{}\n\nQuestion: {}\nAnswer:" if session.is_raw else "{}\n\n{}"
    for i, question in enumerate(questions.splitlines()):
        heading = "\n" * (i > 0) + f"question: {question}\n"
        session.answer(session.opening(frame.format(text, question)), heading)


def _comparison(plan: Answer, full: Answer, dtype: str) -> str:
    """Two lines: how many tokens are the same, place by place, and what the two caches weigh."""
    pairs = list(zip(plan.tokens, full.tokens, strict=False))
    num_equal, num_tokens = sum(a == b for a, b in pairs), max(len(plan.tokens), len(full.tokens))
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    difference = "" if num_equal == num_tokens else f", the first difference is token {first + 1}"
    return (
        f"equal tokens: {num_equal} of {num_tokens} ({100 * num_equal / num_tokens:.1f} %){difference}\n"
        f"bytes: {plan.stats.allocated_bytes:,} under the plan; {full.stats.full_bytes:,} for all of the prompt at "
        f"16 bit; {full.stats.allocated_bytes:,} in the full cache here, answer included, as {dtype}"
    )


def _stats_lines(answer: Answer, plan: Plan) -> list[str]:
    stats, budget = answer.stats, plan.budget
    kept = ["+".join(map(str, held[:-1])) for held in stats.tokens_held]
    memory = f"{stats.peak_memory_bytes:,} bytes "
    memory += "allocated on the GPU" if stats.peak_memory_of == "cuda" else "growth of the process's peak RSS"
    speed = stats.decode_tokens_per_second
    decode = "" if speed is None else f"{speed:.1f} tokens/s ({stats.new_tokens - 1} in {stats.decode_seconds:.2f} s)"
    rows = {
        "bytes": f"full {stats.full_bytes:,} (this prompt at 16 bit), budget {budget.limit_bytes:,}, "
        f"planned {budget.planned_bytes:,}, allocated {stats.allocated_bytes:,}",
        "prompt": f"{stats.prompt_tokens} tokens",
        "kept": f"{_by_layer(kept)}; and {stats.tokens_held[0][-1]} of {plan.decode.reserve_tokens} in the reserve",
        "prefill": f"{stats.prefill_seconds:.2f} s, {stats.prefill_tokens_per_second:.1f} tokens/s",
        "peak memory": f"{memory} by the end of the prefill",
        "decode": decode or "one token: no speed to tell",
    }
    return [f"{name:<11}  {value}" for name, value in rows.items()]


def _by_layer(kept: list[str]) -> str:
    """["9", "9", "4"] -> "9 in layers 0-1, 4 in layer 2"."""
    parts, start = [], 0
    for tokens, run_of_layers in groupby(kept):
        end = start + len(list(run_of_layers))
        where = f"layers {start}-{end - 1}" if end - start > 1 else f"layer {start}"
        parts.append(f"{tokens} in {where}")
        start = end
    return ", ".join(parts)
