"""What built-in calibration contexts hold: facts of each kind, and documents in proportion. Imports nothing heavy."""

from __future__ import annotations

from qpkv_runtime.errors import InputError

Mix = tuple[tuple[str, int], ...]
"""Facts of each kind in a context, and in which proportions the documents come, as sorted pairs."""

FACT_KINDS = ("number", "word", "place", "line", "chain")
DOCUMENTS = ("prose", "reference", "code")
SHORT_MIX = "number=2,word=1,place=1,line=1,chain=1,prose=5,reference=2,code=1"
# A small model's full cache cannot answer half of the words and chains of a long context: two of each, or a handful of
# samples makes up most of the loss (LOG.md).
LONG_MIX = "number=1,word=2,place=1,line=1,chain=2,prose=5,reference=2,code=1"
LONG_TOKENS = 2048


def default_mix(context_tokens: int) -> Mix:
    """For contexts of this length."""
    return parse_mix(LONG_MIX if context_tokens >= LONG_TOKENS else SHORT_MIX)


def parse_mix(text: str) -> Mix:
    """`number=2,word=1,prose=1` -> a mix; what is not named is left out. Raises InputError."""
    mix: dict[str, int] = {}
    for part in text.split(","):
        kind, _, count = part.strip().partition("=")
        if kind not in FACT_KINDS + DOCUMENTS or not count.isdigit():
            raise InputError(
                f"--calibration-mix is like number=2,word=1,prose=1, its kinds {', '.join(FACT_KINDS + DOCUMENTS)}, "
                f"got {text!r}"
            )
        mix[kind] = int(count)
    named = sum(mix.get(kind, 0) * (4 if kind == "line" else 1) for kind in FACT_KINDS)
    if named > 10 or mix.get("chain", 0) > 2:
        raise InputError(
            f"--calibration-mix takes up to 10 facts a context (a line counts 4) and 2 chains, got {text!r}"
        )
    if not any(mix.get(kind) for kind in DOCUMENTS):
        raise InputError(f"--calibration-mix needs a document kind ({', '.join(DOCUMENTS)}), got {text!r}")
    return tuple(sorted(mix.items()))
