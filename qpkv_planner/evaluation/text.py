"""Cross-entropy of what a document goes on with, by how far on: what compression costs plain reading.

The document's beginning is compressed, the continuation runs over it through the plan's append path.
"""

from __future__ import annotations

import random

from qpkv_planner.evaluation.samples import Encoder, Options, Sample, haystack
from qpkv_runtime.errors import InputError

CONTINUATION_TOKENS = 64


def make_samples(encoder: Encoder, options: Options) -> list[Sample]:
    """Documents of the test split; `length` counts the continuation too."""
    samples = []
    for length in options.lengths:
        continuation = min(options.new_tokens(CONTINUATION_TOKENS), length // 4)
        if continuation < 1:
            raise InputError(f"text at {length} tokens leaves no room for a continuation: raise --lengths")
        for index in range(options.num_samples):
            chance = random.Random(f"text-{options.seed}-{index}")
            sentences = haystack(chance.randrange(1000))
            tokens = (*encoder.bos, *encoder.tokens(" ".join(sentences[: length // 2])))[:length]
            if len(tokens) < length:
                raise InputError(f"text at {length} tokens: the texts at hand have {len(tokens)}, lower --lengths")
            split = length - continuation
            samples.append(
                Sample("text", "speeches", index, length, context=tokens[:split], question=(), target=tokens[split:])
            )
    return samples
