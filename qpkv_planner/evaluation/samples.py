"""What is evaluated: a prompt in tokens, parted where its document ends, with the right answers and how to score them.

A prompt is the model's chat template (when it has one) around an instruction, a document and a question, and then the
beginning of the answer. The two parts are tokenized apart, so that both regimes see the same tokens: question-aware
compresses the whole prompt but its last token, question-agnostic only the first part.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from qpkv_planner import texts
from qpkv_runtime.errors import InputError

if TYPE_CHECKING:
    from qpkv_planner.evaluation.ruler import Template

_DOCUMENT, _QUESTION = "\u241edocument\u241e", "\u241equestion\u241e"  # places in a rendered chat template


@dataclass(frozen=True)
class Sample:
    """One prompt and what is right.

    context, question: the prompt's tokens up to the document's end and after it (may be empty); target: tokens whose
    cross-entropy after the prompt is measured (may be empty); answers: right ones, or the parts of one, as `metric`
    of `metrics.METRICS` takes them; classes: all answers there are, for metrics that want to know; category: of tasks
    whose mean is reported too; length: tokens that were asked for; depth: per cent, for a needle; max_new_tokens: 0
    for a sample that is only measured; document: of the texts at hand (`documents`), where indices may share one.
    """

    suite: str
    task: str
    index: int
    length: int
    context: tuple[int, ...]
    question: tuple[int, ...]
    target: tuple[int, ...] = ()
    answers: tuple[str, ...] = ()
    metric: str | None = None
    max_new_tokens: int = 0
    depth: int | None = None
    document: int | None = None
    classes: tuple[str, ...] = field(default=(), repr=False)
    category: str = ""

    @property
    def id(self) -> str:
        depth = "" if self.depth is None else f"/{self.depth}%"
        return f"{self.suite}/{self.task}/{self.length}{depth}/{self.index}"

    @property
    def cluster(self) -> str:
        """Names what samples share that are not independent: one document at every length and depth."""
        return f"{self.suite}/{self.task}/{self.index if self.document is None else f'document {self.document}'}"

    @cached_property
    def hash(self) -> str:
        """Names what is asked and what is right: two runs can be compared on samples of the same hash."""
        content = [self.context, self.question, self.target, self.answers, self.metric, self.max_new_tokens]
        return "sha256:" + hashlib.sha256(json.dumps(content).encode()).hexdigest()


@dataclass(frozen=True)
class Options:
    """What to make samples of. lengths: tokens, answer included; depths: per cent of the haystack before the needle;
    num_samples: per task and length (and depth); tasks: only these (all where empty); max_new_tokens: no more than
    so many per answer; files: the user's data by name; templates: RULER's templates that the user changed."""

    lengths: tuple[int, ...]
    depths: tuple[int, ...] = (0, 25, 50, 75, 100)
    num_samples: int = 1
    seed: int = 0
    tasks: tuple[str, ...] = ()
    max_new_tokens: int | None = None
    needle: str = "number"
    files: dict[str, str] = field(default_factory=dict)
    longbench: tuple[str, ...] = ()
    templates: dict[str, Template] = field(default_factory=dict)

    def new_tokens(self, usual: int) -> int:
        return min(usual, self.max_new_tokens or usual)


class Encoder:
    """Texts to the tokens of a prompt, in the model's chat template where it has one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        first = tokenizer("a").input_ids[:1]
        self.bos = tuple(first) if first and first[0] == tokenizer.bos_token_id else ()
        self.frame = ("", "", "")
        if tokenizer.chat_template is not None:
            message = {"role": "user", "content": _DOCUMENT + _QUESTION}
            rendered = str(tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True))
            head, _, rest = rendered.partition(_DOCUMENT)
            between, _, tail = rest.partition(_QUESTION)
            self.frame = (head, between, tail)

    def tokens(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids) if text else ()

    def prompt(
        self, context: str, question: str, answer_prefix: str = "", is_chat: bool = True
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The tokens up to the end of `context` (instruction and document), and those of all that follows."""
        if not is_chat or self.frame == ("", "", ""):
            return self.bos + self.tokens(context), self.tokens(question + answer_prefix)
        head, between, tail = self.frame
        answer = answer_prefix.lstrip() if tail[-1:].isspace() else answer_prefix
        return self.tokens(head + context), self.tokens(between + question + tail + answer)

    def target(self, answer: str, after: str) -> tuple[int, ...]:
        """An answer's tokens, after a text that says whether a space is due."""
        return self.tokens(answer if not after or after[-1:].isspace() else " " + answer)


def largest(fits: Callable[[int], bool], low: int, what: str) -> int:
    """The largest n >= low for which `fits` is true, which it is up to some n and not beyond.

    Raises InputError, naming `what`, where not even `low` fits.
    """
    if not fits(low):
        raise InputError(f"{what}: the length is too short for the question alone, raise --lengths")
    step = max(1, low)
    while fits(low + step):
        low, step = low + step, 2 * step
    while step > 1:
        step = (step + 1) // 2
        if fits(low + step):
            low += step
    return low


def haystack(index: int) -> list[str]:
    """Sentences of `documents`, from one document on and round."""
    sources = documents()
    order = [*sources[index % len(sources) :], *sources[: index % len(sources)]]
    return [sentence for source in order for sentence in source]


@cache
def documents() -> tuple[list[str], ...]:
    """Sentences of each text of the test split's prose; never searched or validated on."""
    return tuple(texts.sentences(source) for source in texts.speeches("test") or texts.references("test"))
