"""A memory budget as people write it, turned into exact bytes.

Ratios refer to the full cache (16 bit, all KV heads, all tokens of the reference context); sizes are per sequence.
Fractions are exact: `1/64` of the full cache is floor(full_bytes / 64), never a float away from it.
"""

from __future__ import annotations

import re
from fractions import Fraction

from qpkv_runtime.errors import BudgetError

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_FORMS = "1/64, 0.0156, 1.6%, 512MiB or 2GB"


def limit_bytes(requested: str, full_bytes: int) -> int:
    """The bytes that `requested` allows of a full cache of `full_bytes`.

    Raises BudgetError when `requested` is not one of the known forms, is not positive, or asks for more than all.
    """
    text = requested.strip()
    try:
        if size := re.fullmatch(r"([0-9.]+)\s*([KMG]?i?B)", text, re.IGNORECASE):
            limit = int(Fraction(size[1]) * _UNITS[size[2].upper()])
        else:
            share = re.fullmatch(r"([0-9.]+)\s*%", text)
            ratio = Fraction(share[1]) / 100 if share else Fraction(text)
            if ratio > 1:
                raise BudgetError(
                    f"a budget given as a ratio must be at most 1, got {requested!r}; for bytes write 2GB"
                )
            limit = int(full_bytes * ratio)
    except (ValueError, ZeroDivisionError):
        raise BudgetError(f"a budget is written as {_FORMS}; got {requested!r}") from None
    if limit <= 0:
        raise BudgetError(f"a budget must be more than nothing; {requested!r} of {full_bytes:,} bytes is {limit} bytes")
    return limit
