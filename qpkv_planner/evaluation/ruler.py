"""RULER's 13 tasks in 4 categories (arXiv 2404.06654), made at any length with the model's own tokenizer.

Wording, counts and answer lengths follow NVIDIA's generator (constants.py and synthetic.yaml of its repository).
Differences: the haystack of "essay" tasks is presidents' messages instead of Paul Graham's essays; words are taken
from that prose and not from the package wonderwords; needles lie anywhere between sentences, not on 40 fixed depths.
The two question-answering tasks need the user's SQuAD or HotpotQA file. Templates can be replaced (`load_templates`).
"""

from __future__ import annotations

import json
import random
import string
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.special import zeta

from qpkv_planner.evaluation.samples import Encoder, Options, Sample, haystack, largest
from qpkv_runtime.errors import InputError

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."


@dataclass(frozen=True)
class Template:
    """What stands around a document. template: with {context} once; both may use {query}."""

    template: str
    answer_prefix: str
    new_tokens: int


TEMPLATES = {
    "niah": Template(
        "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you "
        "about the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the "
        "provided text?",
        " The special magic {kind} for {query} mentioned in the provided text are",
        128,
    ),
    "vt": Template(
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: "
        "Find all variables that are assigned the value {query} in the text above.",
        " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned "
        "the value {query}, they are: ",
        30,
    ),
    "cwe": Template(
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones "
        "that appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?",
        " Answer: The top 10 words that appear most often in the list are:",
        120,
    ),
    "fwe": Template(
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        "appeared coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
        "What are the three most frequently appeared words in the above coded text?",
        " Answer: According to the coded text above, the three most frequently appeared words are:",
        50,
    ),
    "qa": Template(
        "Answer the question based on the given documents. Only give me the answer and do not output any other "
        "words.\n\nThe following are given documents.\n\n{context}\n\nAnswer the question based on the given "
        "documents. Only give me the answer and do not output any other words.\n\nQuestion: {query}",
        " Answer:",
        32,
    ),
}


@dataclass(frozen=True)
class Task:
    """One of the 13. category: RULER's; family: whose template; needle tasks: haystack, kind of key and value, and
    how many keys, values per key and queries; file: the name of the user's file it needs."""

    category: str
    family: str
    haystack: str = ""
    key: str = ""
    value: str = ""
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1
    file: str = ""


TASKS = {
    "niah_single_1": Task("retrieval", "niah", "noise", "words", "numbers"),
    "niah_single_2": Task("retrieval", "niah", "essay", "words", "numbers"),
    "niah_single_3": Task("retrieval", "niah", "essay", "words", "uuids"),
    "niah_multikey_1": Task("retrieval", "niah", "essay", "words", "numbers", num_keys=4),
    "niah_multikey_2": Task("retrieval", "niah", "needle", "words", "numbers"),
    "niah_multikey_3": Task("retrieval", "niah", "needle", "uuids", "uuids"),
    "niah_multivalue": Task("retrieval", "niah", "essay", "words", "numbers", num_values=4),
    "niah_multiquery": Task("retrieval", "niah", "essay", "words", "numbers", num_keys=4, num_queries=4),
    "vt": Task("tracing", "vt"),
    "cwe": Task("aggregation", "cwe"),
    "fwe": Task("aggregation", "fwe"),
    "qa_1": Task("question answering", "qa", file="squad"),
    "qa_2": Task("question answering", "qa", file="hotpotqa"),
}

Question = tuple[str, tuple[str, ...], list[int]]  # text, right answers, places of the documents it needs
Draft = tuple[str, dict[str, str], tuple[str, ...]]  # the document, what the template's other fields are, the answers


def load_templates(file: str) -> dict[str, Template]:
    """The templates that a YAML file changes, whole, from lines such as
    `niah: {template: "... {context} ... {query}", answer_prefix: "..."}`. Raises InputError."""
    try:
        given = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file}: cannot be read as templates: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{file}: cannot be read as templates: {' '.join(str(error).split())}") from None
    if not isinstance(given, dict):
        raise InputError(f"{file}: templates are a YAML mapping of {', '.join(TEMPLATES)}")
    for family, fields in given.items():
        if family not in TEMPLATES:
            raise InputError(f"{file}: a template is for one of {', '.join(TEMPLATES)}, got {family!r}")
        is_text = isinstance(fields, dict) and all(isinstance(value, str) for value in fields.values())
        if not is_text or not set(fields) <= {"template", "answer_prefix"}:
            raise InputError(f"{file}: {family} must have the texts template and answer_prefix, or one of them")
        if fields.get("template", "{context}").count("{context}") != 1:
            raise InputError(f"{file}: {family}.template must have {{context}} once")
        filled = dict.fromkeys(("kind", "query", "count", "context"), "")
        try:
            for text in fields.values():
                text.format_map(filled)
        except (KeyError, ValueError, IndexError) as error:
            places = "{context}, {query}, {kind} and {count}"
            raise InputError(f"{file}: {family} may have {places}, got {error}") from None
    return {family: replace(TEMPLATES[family], **fields) for family, fields in given.items()}


def make_samples(encoder: Encoder, options: Options) -> list[Sample]:
    """`num_samples` of every task (options.tasks, or all that need no file, or whose file is given) and length."""
    for name in options.tasks:
        if name not in TASKS:
            raise InputError(f"a task of ruler is one of {', '.join(TASKS)}, got {name!r}")
        if (file := TASKS[name].file) and file not in options.files:
            raise InputError(f"{name} needs the {file} data set: give its file with --{file} FILE")
    names = options.tasks or [name for name, task in TASKS.items() if not task.file or task.file in options.files]
    return [
        _make_sample(encoder, options, name, length, index)
        for name in names
        for length in options.lengths
        for index in range(options.num_samples)
    ]


def left_out(options: Options) -> list[str]:
    """Lines about the tasks that are not run for want of a file."""
    if options.tasks:
        return []
    return [
        f"ruler's {name} is left out: it needs the {task.file} data set (--{task.file} FILE)"
        for name, task in TASKS.items()
        if task.file and task.file not in options.files
    ]


def _make_sample(encoder: Encoder, options: Options, name: str, length: int, index: int) -> Sample:
    task = TASKS[name]
    template = _template(task.family, options)
    new_tokens = options.new_tokens(template.new_tokens)
    seed = f"ruler-{name}-{options.seed}-{index}"

    def draft(size: int) -> Draft:
        return _DRAFTS[task.family](task, size, length, random.Random(seed), options, index)

    def fits(size: int) -> bool:
        if size > _MOST:
            return False
        document, fields, _ = draft(size)
        return sum(map(len, encoder.prompt(*_texts(template, document, fields)))) + new_tokens <= length

    size = largest(fits, _LEAST.get(task.family, 1), f"ruler's {name} at {length} tokens")
    document, fields, answers = draft(size)
    before, after, prefix = _texts(template, document, fields)
    context, question = encoder.prompt(before, after, prefix)
    return Sample(
        suite="ruler",
        category=task.category,
        task=name,
        index=index,
        length=length,
        context=context,
        question=question,
        target=encoder.target(", ".join(answers if task.family != "qa" else answers[:1]), prefix),
        answers=answers,
        metric="contains_any" if task.family == "qa" else "contains_all",
        max_new_tokens=new_tokens,
    )


def _template(family: str, options: Options) -> Template:
    return options.templates.get(family, TEMPLATES[family])


def _texts(template: Template, document: str, fields: dict[str, str]) -> tuple[str, str, str]:
    """What stands up to the document's end, the question, and the answer's beginning. `example`: shown before."""
    before, after = template.template.split("{context}")
    prefix = template.answer_prefix
    if fields.get("single"):
        before, after, prefix = (_singular(text) for text in (before, after, prefix))
    before, after, prefix = (text.format_map({**fields, "context": "{context}"}) for text in (before, after, prefix))
    return fields.get("example", "") + before + document, after, prefix


def _singular(text: str) -> str:
    """RULER's own way to word a question about one value."""
    return text.replace("Some", "A").replace("are all", "is").replace("are", "is").replace("answers", "answer")


# --- documents -----------------------------------------------------------------------------------------------------


@cache
def _vocabulary() -> tuple[str, ...]:
    """Words of the haystack's prose."""
    words = {word.strip(string.punctuation) for sentence in haystack(0) for word in sentence.split()}
    return tuple(
        sorted(word for word in words if word.isascii() and word.isalpha() and word.islower() and len(word) > 3)
    )


def _random(kind: str, chance: random.Random) -> str:
    if kind == "numbers":
        return str(chance.randrange(10**6, 10**7))
    if kind == "uuids":
        return str(uuid.UUID(int=chance.getrandbits(128), version=4))
    return f"{chance.choice(_vocabulary())}-{chance.choice(_vocabulary())}"


def _listed(words: list[str]) -> str:
    return ", ".join(words[:-1]) + ", and " + words[-1] if len(words) > 1 else words[0]


def _niah(task: Task, size: int, length: int, chance: random.Random, options: Options, index: int) -> Draft:
    """size: sentences of hay, or other needles."""
    values = {
        _random(task.key, chance): [_random(task.value, chance) for _ in range(task.num_values)]
        for _ in range(task.num_keys)
    }
    needles = [NEEDLE.format(kind=task.value, key=key, value=value) for key, all in values.items() for value in all]
    asked = chance.sample(list(values), task.num_queries)
    chance.shuffle(needles)
    places = random.Random(f"{options.seed}-{index}")  # apart, so that the size moves no other choice
    start = chance.randrange(1000)
    if task.haystack == "essay":
        hay, joined = haystack(start)[:size], " "
    elif task.haystack == "noise":
        hay, joined = [NOISE] * size, "\n"
    else:
        hay, joined = [], "\n"
        for _ in range(size):
            hay.append(NEEDLE.format(kind=task.value, key=_random(task.key, chance), value=_random(task.value, chance)))
    for needle in needles:
        hay.insert(places.randrange(len(hay) + 1), needle)
    is_single = task.num_queries * task.num_values == 1
    fields = {"kind": task.value.removesuffix("s") if is_single else task.value, "query": _listed(asked)}
    answers = tuple(value for key in asked for value in values[key])
    return joined.join(hay), {**fields, "single": "yes" * is_single, "count": str(len(answers))}, answers


def _vt(task: Task, size: int, length: int, chance: random.Random, options: Options, index: int) -> Draft:
    """size: lines of noise. One chain of five variables; a short chain is shown before, with its answer."""
    template = _template("vt", options)
    shown, fields, answers = _chain(6, 3, chance)
    example = "".join(_texts(template, shown, fields)) + " ".join(answers) + "\n\n"
    document, fields, answers = _chain(size, 5, chance)
    return document, {**fields, "example": example}, answers


def _chain(num_noise: int, name_letters: int, chance: random.Random) -> Draft:
    names: list[str] = []
    while len(names) < 5:
        name = "".join(chance.choices(string.ascii_uppercase, k=name_letters))
        names += [name] * (name not in names)
    value = str(chance.randrange(10000, 100000))
    hops = [
        f"VAR {names[0]} = {value}",
        *(f"VAR {new} = VAR {old} " for old, new in pairwise(names)),
    ]
    lines, places = [NOISE] * num_noise, sorted(chance.randrange(num_noise + 1) for _ in hops)
    for hop, place in reversed(list(zip(hops, places, strict=True))):
        lines.insert(place, hop)
    return "\n".join(lines), {"query": value, "count": str(len(names)), "kind": ""}, tuple(names)


def _cwe(task: Task, size: int, length: int, chance: random.Random, options: Options, index: int) -> Draft:
    """size: different words besides the ten common ones. A short list is shown before, with its answer."""
    template = _template("cwe", options)
    small, large = ((3, 1), (6, 1)) if length < 4096 else ((10, 3), (30, 3))
    shown, answers = _list_of_words(10, *small, chance)
    numbered = " ".join(f"{i}. {word}" for i, word in enumerate(answers, 1))
    fields = {"query": "", "count": "10", "kind": ""}
    example = "".join(_texts(template, shown, fields)) + " " + numbered + "\n"
    document, answers = _list_of_words(size, *large, chance)
    return document, {**fields, "example": example}, answers


def _list_of_words(
    num_rare: int, common_times: int, rare_times: int, chance: random.Random
) -> tuple[str, tuple[str, ...]]:
    words = chance.sample(_vocabulary(), min(10 + num_rare, len(_vocabulary())))
    common, rare = words[:10], words[10:]
    listed = common * common_times + rare * rare_times
    chance.shuffle(listed)
    return " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1)), tuple(common)


def _fwe(task: Task, size: int, length: int, chance: random.Random, options: Options, index: int) -> Draft:
    """size: words. Frequencies fall as k**-2; the most frequent word is noise."""
    coded: dict[str, None] = {}
    while len(coded) < max(8, length // 50):
        coded["".join(chance.choices(string.ascii_lowercase, k=6))] = None
    words = ["...", *coded]
    counts = (size * np.arange(1, len(words) + 1) ** -2.0 / zeta(2.0)).astype(int)
    text = [word for word, times in zip(words, counts, strict=True) for _ in range(times)]
    chance.shuffle(text)
    return " ".join(text), {"query": "", "count": "3", "kind": ""}, tuple(words[1:4])


def _qa(task: Task, size: int, length: int, chance: random.Random, options: Options, index: int) -> Draft:
    """size: documents, those with the answer among them."""
    documents, questions = _qa_data(task.file, options.files[task.file])
    question, answers, own = questions[
        random.Random(options.seed).sample(range(len(questions)), len(questions))[index % len(questions)]
    ]
    others = [i for i in chance.sample(range(len(documents)), len(documents)) if i not in own]
    chosen = [*own, *others][: max(size, len(own))]
    chance.shuffle(chosen)
    text = "\n\n".join(f"Document {i}:\n{documents[place]}" for i, place in enumerate(chosen, 1))
    return text, {"query": question, "count": "1", "kind": ""}, answers


@cache
def _qa_data(name: str, file: str) -> tuple[list[str], list[Question]]:
    """All documents of a file, and its questions."""
    try:
        data = json.loads(Path(file).read_text(encoding="utf-8"))
        documents, questions = _squad(data) if name == "squad" else _hotpotqa(data)
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{file}: is not JSON: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: is not a {name} file as its authors publish it: {error!r}") from None
    if not questions:
        raise InputError(f"{file}: has no question with an answer")
    return documents, questions


def _squad(data: Any) -> tuple[list[str], list[Question]]:
    places: dict[str, int] = {}
    questions: list[Question] = []
    for paragraph in (paragraph for article in data["data"] for paragraph in article["paragraphs"]):
        place = places.setdefault(paragraph["context"], len(places))
        for asked in paragraph["qas"]:
            if answers := tuple(dict.fromkeys(answer["text"] for answer in asked["answers"])):
                questions.append((asked["question"], answers, [place]))
    return list(places), questions


def _hotpotqa(data: Any) -> tuple[list[str], list[Question]]:
    places: dict[str, int] = {}
    questions: list[Question] = []
    for asked in data:
        own = [places.setdefault(f"{title}\n{''.join(parts)}", len(places)) for title, parts in asked["context"]]
        questions.append((asked["question"], (asked["answer"],), list(dict.fromkeys(own))))
    return list(places), questions


_MOST = 2_000_000  # no document is that long; the search for the largest must end where a source runs dry
_LEAST = {"niah": 4, "fwe": 40}
_DRAFTS: dict[str, Callable[..., Draft]] = {"niah": _niah, "vt": _vt, "cwe": _cwe, "fwe": _fwe, "qa": _qa}
