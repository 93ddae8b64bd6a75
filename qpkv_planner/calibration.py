"""Calibration data: contexts of real text with facts put in, several questions each, and the text's own continuation.

A context is prefilled once; its samples branch from it: a question (its tokens run over the dense cache, so it is
inside the compressed prompt) whose answer is the continuation, or the document going on. Questions use the model's
chat template when it has one. Splits differ in source texts, fact templates, names and values, not just in samples.
Same tokenizer, sizes and seed: the same tokens.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from qpkv_planner import texts
from qpkv_runtime.errors import InputError

TEXT_PROMPT_TOKENS = 16  # of the document after the context, before the continuation that is measured
CONTINUATION_TOKENS = 6  # at most, of any sample
REFERENCE_EVERY = 4  # every fourth context is reference prose, the others are speeches


@dataclass(frozen=True)
class Fact:
    """A kind of fact: the statement, the question, the answer's beginning, and what kind of value is asked for."""

    kind: str
    statement: str
    question: str
    lead: str
    values: str


FACTS = {
    "search": (
        Fact("number", "The badge number of {name} is {value}.", "What is the badge number of {name}?",
             "The badge number of {name} is", "numbers"),
        Fact("number", "The number assigned to {thing} is {value}.", "Which number is assigned to {thing}?",
             "The number assigned to {thing} is", "numbers"),
        Fact("number", "The invoice of {name} amounts to {value} dollars.",
             "How many dollars is the invoice of {name}?", "The invoice of {name} amounts to", "numbers"),
        Fact("number", "The code of {thing} reads {value}.", "What does the code of {thing} read?",
             "The code of {thing} reads", "numbers"),
        Fact("word", "The favorite color of {person} is {value}.", "What is the favorite color of {person}?",
             "The favorite color of {person} is", "colors"),
        Fact("word", "{name} keeps a {value} in the office.", "What does {name} keep in the office?",
             "{name} keeps a", "words"),
        Fact("word", "The password of {thing} is {value}.", "What is the password of {thing}?",
             "The password of {thing} is", "words"),
        Fact("place", "{person} lives in {value}.", "Where does {person} live?", "{person} lives in", "places"),
        Fact("place", "{name} comes from {value} and likes the sea.", "Where does {name} come from?",
             "{name} comes from", "places"),
    ),
    "validation": (
        Fact("number", "The secret number of {thing} is {value}.", "What is the secret number of {thing}?",
             "The secret number of {thing} is", "numbers"),
        Fact("number", "Remember that {thing} keeps the number {value}.", "Which number does {thing} keep?",
             "The {thing} keeps the number", "numbers"),
        Fact("number", "The parcel of {name} weighs {value} grams.", "How many grams does the parcel of {name} weigh?",
             "The parcel of {name} weighs", "numbers"),
        Fact("word", "Note that the access word for {thing} was set to {value}.",
             "What was the access word for {thing} set to?", "The access word for {thing} was set to", "words"),
        Fact("word", "The nickname of {person} is {value}.", "What is the nickname of {person}?",
             "The nickname of {person} is", "words"),
        Fact("place", "{person} was born in {value}.", "Where was {person} born?", "{person} was born in", "places"),
        Fact("place", "{name} moved to {value} last year.", "Where did {name} move to last year?",
             "{name} moved to", "places"),
    ),
    "test": (
        Fact("number", "The locker number of {name} is {value}.", "What is the locker number of {name}?",
             "The locker number of {name} is", "numbers"),
        Fact("number", "The special number for {thing} is {value}.", "What is the special number for {thing}?",
             "The special number for {thing} is", "numbers"),
        Fact("word", "The secret word of {person} is {value}.", "What is the secret word of {person}?",
             "The secret word of {person} is", "words"),
        Fact("place", "The home of {person} is in {value}.", "Where is the home of {person}?",
             "The home of {person} is in", "places"),
        Fact("place", "The birthplace of {person} is {value}.", "What is the birthplace of {person}?",
             "The birthplace of {person} is", "places"),
    ),
}  # fmt: skip
KINDS = ("number", "number", "word", "place")  # the facts of one context

WORDS = {
    "search": {
        "first": "Maria John Elena Peter Laura David Sofia Thomas Clara Martin",
        "last": "Keller Smith Rossi Novak Meyer Silva Brown Larsen Costa Weber",
        "adjective": "brave quiet silver golden ancient gentle bitter clever",
        "noun": "river castle garden window mirror bridge forest candle",
        "colors": "red blue green yellow",
        "words": "kettle banjo hammer globe compass basket",
        "places": "Porto Hamburg Boston Dublin Madrid Oslo Vienna Cairo",
    },
    "validation": {
        "first": "Julia Daniel Nora Felix Alice Oscar Emma Victor Irene Hugo",
        "last": "Moreno Fischer Adams Petrov Lopez Baker Jensen Ferrari Miller Duarte",
        "adjective": "dusty eager famous frozen giant happy hidden hollow",
        "noun": "rocket saddle button camera carpet cherry cloud coffee",
        "words": "lemon piano tiger crown ladder pillow",
        "places": "Lisbon Prague Athens Berlin Lima Tokyo Paris Rome",
    },
    "test": {
        "first": "Helen Simon Rosa Walter Diana Henry Olga Frank Paula George",
        "last": "Clark Hansen Vargas Wood Parker Schmidt Lewis Romero Evans Berg",
        "adjective": "lazy little lonely lucky mighty misty narrow noble",
        "noun": "dragon eagle engine falcon feather finger flower guitar",
        "words": "honey anchor violet sailor market wheel",
        "places": "Delhi Seoul Milan Geneva Denver Austin Dallas London",
    },
}


@dataclass(frozen=True)
class Sample:
    """A branch of a context: prompt tokens after the context's, then the continuation that is measured.

    needle: (start, end) of the context's tokens that state what is asked for; None for a sample that asks for nothing.
    """

    kind: str
    prompt: tuple[int, ...]
    continuation: tuple[int, ...]
    needle: tuple[int, int] | None = None


@dataclass(frozen=True)
class Context:
    """A document's tokens with the head of the prompt, and the samples that branch from it."""

    tokens: tuple[int, ...]
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Split:
    """A part of the calibration data. context_tokens: the length that was asked for; prompts are a little shorter."""

    name: str
    contexts: tuple[Context, ...]
    context_tokens: int

    @property
    def hash(self) -> str:
        content = [[c.tokens, [[s.kind, s.prompt, s.continuation] for s in c.samples]] for c in self.contexts]
        return "sha256:" + hashlib.sha256(json.dumps(content).encode()).hexdigest()


@dataclass(frozen=True)
class Frame:
    """What surrounds a document and a question in a prompt: head + document + `question(...)`."""

    head: str
    before_question: str
    after_question: str
    starts_with_bos: bool

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Frame:
        """The model's chat template around "read, then answer"; plain text for a model without one."""
        if tokenizer.chat_template is None:
            first = tokenizer("a").input_ids[0]
            task = "Read the text below and remember every number and word that is mentioned."
            return cls(task, "\nQuestion: ", "\nAnswer: ", first == tokenizer.bos_token_id)
        message = {"role": "user", "content": "Read the text and remember it.\n\n{document}\n\n{question}"}
        rendered = str(tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True))
        head, _, rest = rendered.partition("{document}")
        before, _, after = rest.partition("{question}")
        return cls(head, before, after, False)

    def question(self, fact: Fact, names: dict[str, str]) -> str:
        return f"{self.before_question}{fact.question.format(**names)}{self.after_question}{fact.lead.format(**names)}"


def make_split(
    tokenizer: PreTrainedTokenizerBase, name: str, num_contexts: int, context_tokens: int, seed: int
) -> Split:
    """`num_contexts` contexts whose prompts, question and answer included, take up to `context_tokens` tokens.

    Raises InputError when that is too short for the questions.
    """
    chance = random.Random(f"{name}-{seed}")
    frame = Frame.of(tokenizer)
    contexts = [_make_context(tokenizer, frame, name, i, context_tokens, chance) for i in range(num_contexts)]
    return Split(name, tuple(contexts), context_tokens)


def _make_context(
    tokenizer: PreTrainedTokenizerBase, frame: Frame, split: str, index: int, size: int, chance: random.Random
) -> Context:
    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    statements, samples, taken = [], [], set[str]()
    for fact in _facts(split, chance):
        names = _names(split, fact, taken, chance)
        statements.append(encode(" " + fact.statement.format(**names)))
        answer = encode(" " + names["value"])[:CONTINUATION_TOKENS]
        samples.append(Sample(fact.kind, tuple(encode(frame.question(fact, names))), tuple(answer)))
    head = [tokenizer.bos_token_id] * frame.starts_with_bos + encode(frame.head)
    longest = max(len(sample.prompt) for sample in samples)
    room = size - len(head) - longest - CONTINUATION_TOKENS - sum(map(len, statements))
    if room < 4 * TEXT_PROMPT_TOKENS:
        raise InputError(f"calibration contexts must have room for text beside the questions, got {size} tokens")

    source = _document(split, index, chance)
    pieces: list[list[int]] = []
    while room > 0:
        piece = encode(" " + next(source))[:room]
        pieces.append(piece)
        room -= len(piece)
    tail: list[int] = []
    while len(tail) < TEXT_PROMPT_TOKENS + CONTINUATION_TOKENS:
        tail += encode(" " + next(source))
    for statement in statements:
        pieces.insert(chance.randrange(len(pieces)), statement)
    starts, start = {}, len(head)
    for piece in pieces:
        starts[id(piece)], start = start, start + len(piece)
    needles = [(starts[id(statement)], starts[id(statement)] + len(statement)) for statement in statements]
    samples = [replace(sample, needle=needle) for sample, needle in zip(samples, needles, strict=True)]
    text = Sample("text", tuple(tail[:TEXT_PROMPT_TOKENS]), tuple(tail[TEXT_PROMPT_TOKENS:][:CONTINUATION_TOKENS]))
    return Context(tuple(head + [token for piece in pieces for token in piece]), (*samples, text))


def _facts(split: str, chance: random.Random) -> list[Fact]:
    """One fact of each of KINDS, no wording twice."""
    facts: list[Fact] = []
    for kind in KINDS:
        facts.append(chance.choice([fact for fact in FACTS[split] if fact.kind == kind and fact not in facts]))
    return facts


def _document(split: str, index: int, chance: random.Random) -> Iterator[str]:
    """Sentences of one document from a random place on; further documents of the same sort follow."""
    speeches = texts.speeches(split)
    sources = texts.references(split) if index % REFERENCE_EVERY == REFERENCE_EVERY - 1 or not speeches else speeches
    first = True
    while True:
        found = texts.sentences(chance.choice(sources))
        start = chance.randrange(max(1, len(found) - 60)) if first else 0
        yield from found[start:]
        first = False


def _names(split: str, fact: Fact, taken: set[str], chance: random.Random) -> dict[str, str]:
    """What a fact is about (not `taken` yet in this context) and its value."""
    words = {key: value.split() for key, value in WORDS[split].items()}
    while True:
        first, last = chance.choice(words["first"]), chance.choice(words["last"])
        thing = f"{chance.choice(words['adjective'])} {chance.choice(words['noun'])}"
        if not {first, last, thing} & taken:
            break
    taken |= {first, last, thing}
    is_number = fact.values == "numbers"
    value = str(chance.randrange(1000, 100000)) if is_number else chance.choice(words[fact.values])
    return {"name": first, "person": f"{first} {last}", "thing": thing, "value": value}
