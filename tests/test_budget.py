"""A budget in any of its forms is an exact number of bytes."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpkv_runtime.budget import limit_bytes
from qpkv_runtime.errors import BudgetError

FULL = 47_185_921  # odd, so that every share of it has something to round down


@pytest.mark.parametrize(
    ("requested", "expected"),
    [
        ("1/64", FULL // 64),
        (" 1/64 ", FULL // 64),
        ("3/7", 3 * FULL // 7),
        ("0.0156", 156 * FULL // 10_000),
        (".5", FULL // 2),
        ("1e-2", FULL // 100),
        ("1", FULL),
        ("1.6%", 16 * FULL // 1000),
        ("1.6 %", 16 * FULL // 1000),
        ("100%", FULL),
        ("700B", 700),
        ("3KB", 3_000),
        ("3KiB", 3_072),
        ("1MB", 1_000_000),
        ("1.5MiB", 1_572_864),
        ("20 mib", 20_971_520),
        ("512MiB", 536_870_912),
        ("2GB", 2_000_000_000),
        ("0.25GiB", 268_435_456),
    ],
)
def test_every_form_is_exact(requested: str, expected: int) -> None:
    assert limit_bytes(requested, FULL) == expected


def test_a_share_is_no_float_away() -> None:
    exact = 10**17 + 1  # floats are 16 apart here
    assert limit_bytes("1/7", 7 * exact) == exact


@given(st.integers(1, 10**15), st.integers(1, 10**4), st.integers(1, 10**4))
def test_a_fraction_is_the_largest_whole_number_of_bytes_not_above_it(full: int, part: int, whole: int) -> None:
    part, whole = sorted((part, whole))
    if full * part < whole:
        with pytest.raises(BudgetError, match="more than nothing"):
            limit_bytes(f"{part}/{whole}", full)
    else:
        limit = limit_bytes(f"{part}/{whole}", full)
        assert limit <= Fraction(full * part, whole) < limit + 1


@pytest.mark.parametrize(
    "requested", ["", "a lot", "1/0", "1/", "1/64MiB", "12XB", "1.2.3MiB", "%", "1.2.3%", "MiB", "nan", "inf", "1/64/2"]
)
def test_an_unknown_form_is_refused_and_the_known_ones_listed(requested: str) -> None:
    with pytest.raises(BudgetError) as caught:
        limit_bytes(requested, FULL)
    assert str(caught.value) == f"a budget is written as 1/64, 0.0156, 1.6%, 512MiB or 2GB; got {requested!r}"


@pytest.mark.parametrize("requested", ["2", "65/64", "1.01", "150%"])
def test_a_share_of_more_than_all_is_refused(requested: str) -> None:
    with pytest.raises(BudgetError, match="must be at most 1"):
        limit_bytes(requested, FULL)


@pytest.mark.parametrize("requested", ["0", "0%", "0B", "0.4B", "-1/4", "1/99999999"])
def test_nothing_is_no_budget(requested: str) -> None:
    with pytest.raises(BudgetError, match="must be more than nothing"):
        limit_bytes(requested, FULL)
