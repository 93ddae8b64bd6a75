"""The Lagrangian: lambda is the slope at which two points of the curve cost the same."""

from __future__ import annotations

import pytest

from qpkv_planner.lagrangian import MIB, beta, lagrangian, slope


def test_at_the_slope_between_two_points_neither_is_preferred():
    small, large = (0.5, MIB), (0.1, 3 * MIB)
    between = slope(*small, *large)
    assert between == pytest.approx(0.2)
    assert lagrangian(*small, between) == pytest.approx(lagrangian(*large, between))
    assert lagrangian(*small, 2 * between) < lagrangian(*large, 2 * between), "dear bytes favour the smaller plan"
    assert slope(*large, *small) == pytest.approx(between)


def test_beta_is_what_a_nat_costs_and_absent_where_bytes_save_nothing():
    assert beta(0.25) == 4.0
    assert beta(0.0) is None and beta(-0.1) is None
    assert slope(0.5, MIB, 0.4, MIB) == 0.0
