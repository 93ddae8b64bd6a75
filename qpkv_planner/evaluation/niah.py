"""Needle in a haystack: one sentence hidden in prose, at every depth and length.

`number` hides a 7-digit number in RULER's words and wants it back; `classic` is Greg Kamradt's needle about Dolores
Park, as in the papers, scored by the share of its words that come back. Both papers and we differ in the haystack:
presidents' messages instead of Paul Graham's essays, which are not ours to ship.
"""

from __future__ import annotations

import random

from qpkv_planner.evaluation.samples import Encoder, Options, Sample, documents, haystack, largest
from qpkv_runtime.errors import InputError

CLASSIC = "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day."
NEEDLES = ("number", "classic")


def make_samples(encoder: Encoder, options: Options) -> list[Sample]:
    """A sample for each length, depth and index; the samples of one index share key, value and haystack."""
    if options.needle not in NEEDLES:
        raise InputError(f"--needle must be one of {', '.join(NEEDLES)}, got {options.needle!r}")
    return [
        _make_sample(encoder, options, length, depth, index)
        for length in options.lengths
        for depth in options.depths
        for index in range(options.num_samples)
    ]


def _make_sample(encoder: Encoder, options: Options, length: int, depth: int, index: int) -> Sample:
    chance = random.Random(f"niah-{options.seed}-{index}")
    document = chance.randrange(1000) % len(documents())
    sentences = haystack(document)
    if options.needle == "classic":
        before, needle = "Read the text and answer the question about it.\n", CLASSIC
        question, prefix = (
            "\nWhat is the best thing to do in San Francisco?",
            " The best thing to do in San Francisco is",
        )
        answer, metric, new_tokens = "eat a sandwich and sit in Dolores Park on a sunny day", "word_recall", 32
    else:
        key = f"{chance.choice(_ADJECTIVES.split())} {chance.choice(_NOUNS.split())}"
        answer, metric, new_tokens = str(chance.randrange(10**6, 10**7)), "contains_all", 16
        before = (
            "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you "
            "about the number afterwards.\n"
        )
        needle = f"One of the special magic numbers for {key} is: {answer}."
        question = f"\nWhat is the special magic number for {key} mentioned in the provided text?"
        prefix = f" The special magic number for {key} mentioned in the provided text is"
    new_tokens = options.new_tokens(new_tokens)

    def prompt(num_sentences: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        at = round(num_sentences * depth / 100)
        hay = [*sentences[:at], needle, *sentences[at:num_sentences]]
        return encoder.prompt(before + " ".join(hay), question, prefix)

    def fits(num_sentences: int) -> bool:
        return num_sentences <= len(sentences) and sum(map(len, prompt(num_sentences))) + new_tokens <= length

    context, after = prompt(largest(fits, 0, f"niah at {length} tokens"))
    return Sample(
        suite="niah",
        task=options.needle,
        index=index,
        length=length,
        context=context,
        question=after,
        target=encoder.target(answer, prefix),
        answers=(answer,),
        metric=metric,
        max_new_tokens=new_tokens,
        depth=depth,
        document=document,
    )


_ADJECTIVES = "brisk calm daring early faint gloomy hasty idle keen loyal merry neat odd plain quaint rusty"
_NOUNS = "acorn barrel cactus dolphin ember falcon goblet harbor icicle jacket kernel lantern meadow nectar"
