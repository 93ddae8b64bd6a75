"""Calibration data: contexts of real text with facts put in, several questions each, and the text's own continuation.

A context is prefilled once; its samples branch from it: a question (its tokens run over the dense cache, so it is
inside the compressed prompt) whose answer is the continuation, or the document going on. Questions use the model's
chat template when it has one. Splits differ in source texts, fact templates, names and values, not just in samples.
Same tokenizer, sizes and seed: the same tokens. A user's own file takes the place of all this (`Data.file`).
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile, zip_longest
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from qpkv_planner import texts
from qpkv_planner.mix import DOCUMENTS, FACT_KINDS, Mix, default_mix
from qpkv_runtime.errors import InputError

TEXT_PROMPT_TOKENS = 16  # of the document after the context, before the continuation that is measured
CONTINUATION_TOKENS = 6  # at most, of any sample
USER_PROMPT_TOKENS = 16  # of a user's prompt, the part that branches from the context
SEARCH_SHARE = 0.4  # of a user's samples; the others are for validation

Regime = Literal["aware", "agnostic"]
Target = Literal["gold", "self"]


@dataclass(frozen=True)
class Data:
    """Where calibration samples come from.

    regime: "aware", the question is inside the compressed prompt; "agnostic", the context is compressed first and the
    question goes over the compressed cache. target: the "gold" continuation, or what the full cache writes itself
    ("self"). mix: None for the default of the contexts' length. file: a user's samples in place of the built-in ones.
    """

    regime: Regime = "aware"
    target: Target = "gold"
    mix: Mix | None = None
    file: Path | None = None

    def mix_of(self, context_tokens: int) -> Mix:
        """Of contexts of this length."""
        return self.mix or default_mix(context_tokens)

    def record(self, context_tokens: int) -> dict[str, Any]:
        """What a plan says of it, made of contexts of this length, and `of_record` reads."""
        source: dict[str, Any] = {"mix": dict(self.mix_of(context_tokens))}
        if self.file is not None:
            source = {"file": self.file.name, "file_hash": hash_file(self.file)}
        return {"regime": self.regime, "target": self.target, **source}

    @classmethod
    def of_record(cls, record: Mapping[str, Any], file: Path | None = None) -> Data:
        """The data that `record` describes. Raises InputError where it was a user's and `file` is not that one."""
        if not record:
            return BUILT_IN
        if "file" in record:
            if file is None:
                raise InputError(f"the plan was calibrated on {record['file']}: name that file with --calibration")
            if hash_file(file) != record["file_hash"]:
                raise InputError(
                    f"{file} is not the {record['file']} that the plan was calibrated on: its hash differs"
                )
            return cls(record["regime"], record["target"], file=file)
        return cls(record["regime"], record["target"], tuple(sorted(record["mix"].items())))


BUILT_IN = Data()


def hash_file(path: Path) -> str:
    try:
        return "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


@dataclass(frozen=True)
class Fact:
    """A kind of fact: the statement, the question, the answer's beginning, and what kind of value is asked for.

    more: statements that stand elsewhere in the context; copies: how often it is stated of something else too.
    """

    kind: str
    statement: str
    question: str
    lead: str
    values: str
    more: tuple[str, ...] = ()
    copies: int = 0


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
        Fact("word", "{name} ordered a {value} yesterday.", "What did {name} order yesterday?", "{name} ordered a",
             "words"),
        Fact("place", "{person} lives in {value}.", "Where does {person} live?", "{person} lives in", "places"),
        Fact("place", "{name} comes from {value} and likes the sea.", "Where does {name} come from?",
             "{name} comes from", "places"),
        Fact("place", "{person} works in {value} these days.", "Where does {person} work these days?",
             "{person} works in", "places"),
        Fact("line", "line {thing}: REGISTER_CONTENT is <{value}>.", "What is the REGISTER_CONTENT in line {thing}?",
             "The REGISTER_CONTENT in line {thing} is <", "numbers", copies=3),
        Fact("line", "row {thing} contains ({value})", "What does row {thing} contain?",
             "The row {thing} contains (", "numbers", copies=3),
        Fact("line", "record {thing}: {value};", "What is in record {thing}?", "In record {thing} is", "numbers",
             copies=3),
        Fact("chain", "VAR {variable} = {value}.", "What is the value of VAR {copy}?", "The value of VAR {copy} is",
             "numbers", more=("VAR {copy} = VAR {variable}.",)),
        Fact("chain", "Assign {value} to {variable}.", "What is assigned to {copy}?", "Assigned to {copy} is",
             "numbers", more=("Assign {variable} to {copy}.",)),
        Fact("chain", "{variable} equals {value}.", "What does {copy} equal?", "The variable {copy} equals",
             "numbers", more=("{copy} equals {variable}.",)),
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
        Fact("line", "entry {thing} holds <{value}>;", "What does entry {thing} hold?",
             "The entry {thing} holds <", "numbers", copies=3),
        Fact("chain", "Set {variable} to {value}.", "What is {copy} set to?", "The variable {copy} is set to",
             "numbers", more=("Set {copy} to {variable}.",)),
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
        Fact("line", "key {thing} -> [{value}]", "Which value does key {thing} have?",
             "The value of key {thing} is [", "numbers", copies=3),
        Fact("chain", "Let {variable} be {value}.", "What is {copy}?", "The value of {copy} is", "numbers",
             more=("Let {copy} be {variable}.",)),
    ),
}  # fmt: skip
WORDS = {
    "search": {
        "first": "Maria John Elena Peter Laura David Sofia Thomas Clara Martin",
        "last": "Keller Smith Rossi Novak Meyer Silva Brown Larsen Costa Weber",
        "adjective": "brave quiet silver golden ancient gentle bitter clever",
        "noun": "river castle garden window mirror bridge forest candle",
        "colors": "red blue green yellow",
        "words": "kettle banjo hammer globe compass basket",
        "places": "Porto Hamburg Boston Dublin Madrid Oslo Vienna Cairo",
        "variables": "X1 X7 Q3 K9 M4 T6",
    },
    "validation": {
        "first": "Julia Daniel Nora Felix Alice Oscar Emma Victor Irene Hugo",
        "last": "Moreno Fischer Adams Petrov Lopez Baker Jensen Ferrari Miller Duarte",
        "adjective": "dusty eager famous frozen giant happy hidden hollow",
        "noun": "rocket saddle button camera carpet cherry cloud coffee",
        "words": "lemon piano tiger crown ladder pillow",
        "places": "Lisbon Prague Athens Berlin Lima Tokyo Paris Rome",
        "variables": "A2 B8 D5 F1 H7 J3",
    },
    "test": {
        "first": "Helen Simon Rosa Walter Diana Henry Olga Frank Paula George",
        "last": "Clark Hansen Vargas Wood Parker Schmidt Lewis Romero Evans Berg",
        "adjective": "lazy little lonely lucky mighty misty narrow noble",
        "noun": "dragon eagle engine falcon feather finger flower guitar",
        "words": "honey anchor violet sailor market wheel",
        "places": "Delhi Seoul Milan Geneva Denver Austin Dallas London",
        "variables": "N1 P6 R4 U9 V2 W8",
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
    """A part of the calibration data. regime, target: as in `Data`; documents: a number for each context's, where some
    may be of one; None for the built-in ones, and for a user's where splits have some in common: there are too few."""

    name: str
    contexts: tuple[Context, ...]
    regime: Regime = "aware"
    target: Target = "gold"
    documents: tuple[int, ...] | None = None

    def document_of(self, index: int) -> int:
        """The document of a context, by its place: what is drawn as one, and lies in one part of the samples."""
        return index if self.documents is None else self.documents[index]

    @property
    def hash(self) -> str:
        content = [[c.tokens, [[s.kind, s.prompt, s.continuation] for s in c.samples]] for c in self.contexts]
        how = [] if (self.regime, self.target) == ("aware", "gold") else [self.regime, self.target]
        return "sha256:" + hashlib.sha256(json.dumps([*content, *how]).encode()).hexdigest()


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
            task = "Read the text below and remember every number and word that is mentioned."
            return cls(task, "\nQuestion: ", "\nAnswer: ", _starts_with_bos(tokenizer))
        message = {"role": "user", "content": "Read the text and remember it.\n\n{document}\n\n{question}"}
        rendered = str(tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True))
        head, _, rest = rendered.partition("{document}")
        before, _, after = rest.partition("{question}")
        return cls(head, before, after, False)

    def question(self, fact: Fact, names: dict[str, str]) -> str:
        return f"{self.before_question}{fact.question.format(**names)}{self.after_question}{fact.lead.format(**names)}"


def _starts_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts its first token before a text."""
    return bool(tokenizer("a").input_ids[0] == tokenizer.bos_token_id)


def make_splits(
    tokenizer: PreTrainedTokenizerBase, counts: Mapping[str, int], context_tokens: int, seed: int, data: Data,
    search_tokens: int | None = None,
) -> dict[str, Split]:  # fmt: skip
    """The splits of these names, each of so many contexts whose prompts, question and answer included, take up to
    `context_tokens` tokens, the built-in search split's up to `search_tokens` where that is given.

    Raises InputError when that is too short for the questions, or a user's file cannot be read or holds too little.
    """
    if data.file is not None:
        return _user_splits(tokenizer, data, counts, context_tokens, seed)
    data = replace(data, mix=data.mix_of(context_tokens))
    tokens = dict.fromkeys(counts, context_tokens) | {"search": search_tokens or context_tokens}
    return {name: make_split(tokenizer, name, count, tokens[name], seed, data) for name, count in counts.items()}


def make_split(
    tokenizer: PreTrainedTokenizerBase, name: str, num_contexts: int, context_tokens: int, seed: int,
    data: Data = BUILT_IN,
) -> Split:  # fmt: skip
    """One built-in split, as `make_splits`."""
    chance = random.Random(f"{name}-{seed}")
    frame, mix = Frame.of(tokenizer), dict(data.mix_of(context_tokens))
    contexts = [_make_context(tokenizer, frame, name, i, context_tokens, mix, chance) for i in range(num_contexts)]
    return Split(name, tuple(contexts), data.regime, data.target)


def _make_context(
    tokenizer: PreTrainedTokenizerBase, frame: Frame, split: str, index: int, size: int, mix: Mapping[str, int],
    chance: random.Random,
) -> Context:  # fmt: skip
    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    statements, samples, taken = list[list[int]](), list[Sample](), set[str]()
    asked: list[int] = []  # which statement each sample asks for
    for fact in _facts(split, mix, chance):
        names = _names(split, fact, taken, chance)
        stated = [(text, names) for text in (fact.statement, *fact.more)]
        stated += [(fact.statement, _names(split, fact, taken, chance)) for _ in range(fact.copies)]
        asked.append(len(statements))
        statements += [encode(" " + text.format(**about)) for text, about in stated]
        separator = "" if fact.lead.endswith(("<", "[", "(")) else " "
        answer = encode(separator + names["value"])[:CONTINUATION_TOKENS]
        samples.append(Sample(fact.kind, tuple(encode(frame.question(fact, names))), tuple(answer)))
    head = [tokenizer.bos_token_id] * frame.starts_with_bos + encode(frame.head)
    longest = max((len(sample.prompt) for sample in samples), default=TEXT_PROMPT_TOKENS)
    room = size - len(head) - longest - CONTINUATION_TOKENS - sum(map(len, statements))
    if room < 4 * TEXT_PROMPT_TOKENS:
        raise InputError(f"calibration contexts must have room for text beside the questions, got {size} tokens")

    source = _document(split, _document_kind(mix, index), chance)
    pieces: list[list[int]] = []
    while room > 0:
        piece = encode(next(source))[:room]
        pieces.append(piece)
        room -= len(piece)
    tail: list[int] = []
    while len(tail) < TEXT_PROMPT_TOKENS + CONTINUATION_TOKENS:
        tail += encode(next(source))
    for statement in statements:
        pieces.insert(chance.randrange(len(pieces)), statement)
    starts, start = {}, len(head)
    for piece in pieces:
        starts[id(piece)], start = start, start + len(piece)
    stated_at = [starts[id(statements[index])] for index in asked]
    needles = [(start, start + len(statements[index])) for start, index in zip(stated_at, asked, strict=True)]
    samples = [replace(sample, needle=needle) for sample, needle in zip(samples, needles, strict=True)]
    text = Sample("text", tuple(tail[:TEXT_PROMPT_TOKENS]), tuple(tail[TEXT_PROMPT_TOKENS:][:CONTINUATION_TOKENS]))
    return Context(tuple(head + [token for piece in pieces for token in piece]), (*samples, text))


def _facts(split: str, mix: Mapping[str, int], chance: random.Random) -> list[Fact]:
    """As many facts of each kind as the mix says, no wording twice while there are others."""
    facts: list[Fact] = []
    for kind in FACT_KINDS:
        for _ in range(mix.get(kind, 0)):
            known = [fact for fact in FACTS[split] if fact.kind == kind]
            facts.append(chance.choice([fact for fact in known if fact not in facts] or known))
    return facts


def _document_kind(mix: Mapping[str, int], index: int) -> str:
    """The kind of context `index`'s document: they take turns so that any few contexts have about the mix."""
    shares = {kind: mix.get(kind, 0) for kind in DOCUMENTS}
    given = dict.fromkeys(DOCUMENTS, 0)
    kind = ""
    for _ in range(index + 1):
        kind = max((k for k in DOCUMENTS if shares[k]), key=lambda k: shares[k] / (given[k] + 1))
        given[kind] += 1
    return kind


def _document(split: str, kind: str, chance: random.Random) -> Iterator[str]:
    """Pieces of one document from a random place on; further documents of the same sort follow."""
    sources = {"prose": texts.speeches, "reference": texts.references, "code": texts.code}[kind](split)
    sources = sources or texts.references(split)
    first = True
    while True:
        document = chance.choice(sources)
        pieces = texts.lines(document) if kind == "code" else [f" {one}" for one in texts.sentences(document)]
        start = chance.randrange(max(1, len(pieces) - 60)) if first else 0
        yield from pieces[start:]
        first = False


def _user_splits(
    tokenizer: PreTrainedTokenizerBase, data: Data, counts: Mapping[str, int], context_tokens: int, seed: int
) -> dict[str, Split]:
    """A user's file: jsonl with prompt and continuation (taken as they are, no chat template), or plain text cut into
    windows. Samples of one prompt share a context; documents go to search or validation as wholes and are taken in
    turns, as long as there are enough."""
    assert data.file is not None
    try:
        content = data.file.read_bytes()
        text = content.decode()
    except OSError as error:
        raise InputError(f"cannot read {data.file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{data.file}:{line} must be UTF-8 text, got byte {content[error.start]:#x}") from None
    if data.file.suffix in (".jsonl", ".json"):
        documents = _from_lines(tokenizer, data.file, text, context_tokens)
    else:
        documents = [[window] for window in _from_text(tokenizer, text, context_tokens)]
    enough = len(counts) * 2
    if (num_contexts := sum(map(len, documents))) < enough:
        raise InputError(
            f"{data.file} must hold at least {enough} contexts of {context_tokens} tokens or fewer, got "
            f"{num_contexts}: give more text, or lower --calibration-length"
        )
    are_enough = len(documents) >= enough
    if not are_enough:
        documents = [[context] for document in documents for context in document]
    random.Random(f"user-{seed}").shuffle(documents)
    cut = max(2, int(SEARCH_SHARE * len(documents)))
    parts = {"search": documents[:cut], "validation": documents[cut:]}
    splits = {}
    for name, count in counts.items():
        in_turns = zip_longest(*([(number, context) for context in its] for number, its in enumerate(parts[name])))
        taken = [one for turn in in_turns for one in turn if one is not None][:count]
        numbers, contexts = zip(*taken, strict=True)
        splits[name] = Split(name, contexts, data.regime, data.target, numbers if are_enough else None)
    return splits


def _from_lines(tokenizer: PreTrainedTokenizerBase, file: Path, text: str, context_tokens: int) -> list[list[Context]]:
    """The contexts of every document."""
    samples: dict[str, list[Sample]] = {}
    tokens: dict[str, list[int]] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not all(
            isinstance(row.get(k), str) and row[k] for k in ("prompt", "continuation")
        ):
            raise InputError(
                f'{file}:{number} must be a JSON object with texts "prompt" and "continuation", got {line[:60]!r}'
            )
        prompt = row["prompt"]
        if prompt not in tokens:
            tokens[prompt] = list(tokenizer(prompt).input_ids)
        answer = list(tokenizer(row["continuation"], add_special_tokens=False).input_ids)[:CONTINUATION_TOKENS]
        if len(tokens[prompt]) < 2 * USER_PROMPT_TOKENS:
            raise InputError(
                f"{file}:{number} must have a prompt of at least {2 * USER_PROMPT_TOKENS} tokens, got "
                f"{len(tokens[prompt])}: give it more of its context, or leave it out"
            )
        if not answer:
            raise InputError(
                f"{file}:{number} must have a continuation of at least one token, got {row['continuation'][:60]!r}"
            )
        if (count := len(tokens[prompt]) + len(answer)) > context_tokens:
            raise InputError(
                f"{file}:{number} must have at most {context_tokens} tokens, got {count}: cut it, or raise "
                "--calibration-length"
            )
        branch = tuple(tokens[prompt][-USER_PROMPT_TOKENS:])
        samples.setdefault(prompt, []).append(Sample(str(row.get("kind", "user")), branch, tuple(answer)))
    contexts = [Context(tuple(tokens[prompt][:-USER_PROMPT_TOKENS]), tuple(own)) for prompt, own in samples.items()]
    return [[contexts[row] for row in document] for document in _documents_of(list(tokens.values()))]


def _documents_of(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Which prompts, by their places, are about one document: they have half of the shorter one's tokens in common from
    the first on."""
    found: list[list[int]] = []
    for row in sorted(range(len(prompts)), key=lambda row: list(prompts[row])):  # which are alike are neighbours then
        last = prompts[found[-1][-1]] if found else ()
        if found and 2 * _num_shared((last, prompts[row])) >= min(len(last), len(prompts[row])):
            found[-1].append(row)
        else:
            found.append([row])
    return sorted(map(sorted, found))


def _num_shared(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens these begin with alike."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*prompts, strict=False)))


def _from_text(tokenizer: PreTrainedTokenizerBase, text: str, context_tokens: int) -> list[Context]:
    tokens = list(tokenizer(text, add_special_tokens=False).input_ids)
    first = [tokenizer.bos_token_id] * _starts_with_bos(tokenizer)
    contexts, size = [], context_tokens - len(first)
    for start in range(0, len(tokens) - size + 1, size):
        window = first + tokens[start : start + size]
        body, end = window[: -USER_PROMPT_TOKENS - CONTINUATION_TOKENS], window[-CONTINUATION_TOKENS:]
        branch = window[len(body) : -CONTINUATION_TOKENS]
        contexts.append(Context(tuple(body), (Sample("text", tuple(branch), tuple(end)),)))
    return contexts


def _names(split: str, fact: Fact, taken: set[str], chance: random.Random) -> dict[str, str]:
    """What a fact is about (not `taken` yet in this context) and its value."""
    words = {key: value.split() for key, value in WORDS[split].items()}
    while True:
        first, last = chance.choice(words["first"]), chance.choice(words["last"])
        thing = f"{chance.choice(words['adjective'])} {chance.choice(words['noun'])}"
        variable, copy = chance.sample(words["variables"], 2)
        if not {first, last, thing, variable, copy} & taken:
            break
    taken |= {first, last, thing} | ({variable, copy} if fact.kind == "chain" else set())
    is_number = fact.values == "numbers"
    value = str(chance.randrange(1000, 100000)) if is_number else chance.choice(words[fact.values])
    names = {"name": first, "person": f"{first} {last}", "thing": thing, "value": value}
    return {**names, "variable": variable, "copy": copy}
