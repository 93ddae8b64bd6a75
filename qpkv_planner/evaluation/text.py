"""Cross-entropy of what a document goes on with, by how far on: what compression costs plain reading.

The document's beginning is compressed, the continuation runs over it through the plan's append path.
"""

from __future__ import annotations

import random

from qpkv_planner.evaluation.samples import Encoder, Options, Sample, documents, haystack
from qpkv_runtime.errors import InputError

CONTINUATION_TOKENS = 64


def make_samples(encoder: Encoder, options: Options) -> list[Sample]:
    """Documents of the test split, none twice while there are others, each from a place in its first half on; `length`
    counts the continuation too."""
    samples, num_documents = [], len(documents())
    order = random.Random(f"text-{options.seed}").sample(range(num_documents), num_documents)
    for length in options.lengths:
        continuation = min(options.new_tokens(CONTINUATION_TOKENS), length // 4)
        if continuation < 1:
            raise InputError(f"text at {length} tokens leaves no room for a continuation: raise --lengths")
        for index in range(options.num_samples):
            chance = random.Random(f"text-{options.seed}-{index}")
            document = order[index % num_documents]
            sentences = haystack(document)[chance.randrange(1 + len(documents()[document]) // 2) :]
            tokens = (*encoder.bos, *encoder.tokens(" ".join(sentences[: length // 2])))[:length]
            if len(tokens) < length:
                raise InputError(f"text at {length} tokens: the texts at hand have {len(tokens)}, lower --lengths")
            split = length - continuation
            samples.append(
                Sample(
                    suite="text",
                    task="speeches",
                    index=index,
                    length=length,
                    context=tokens[:split],
                    question=(),
                    target=tokens[split:],
                    document=document,
                )
            )
    return samples
