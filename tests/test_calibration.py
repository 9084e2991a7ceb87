"""The comparison's promises, on fewer nights than `make calibration` and with room for chance."""

from __future__ import annotations

import calibration_goals as goals
import pytest
from simulator import NOISY, QUIET


@pytest.mark.parametrize(("noise", "most"), [(QUIET, 3), (NOISY, 9)], ids=["quiet", "noisy"])
def test_confirmed_false_alarms_are_rare(noise, most):
    found = goals.rates(noise, 150, 1)
    assert found.false_confirmed <= most
    # the same nights under a test on rounds alone: the simulator's noise is not harmless
    assert found.rounds_t_false > 40


@pytest.mark.parametrize(("noise", "least"), [(QUIET, 97), (NOISY, 72)], ids=["quiet", "noisy"])
def test_five_per_cent_is_found(noise, least):
    assert goals.rates(noise, 100, 2, effect=0.05).found_confirmed >= least


def test_five_sessions_are_enough_for_ten_per_cent():
    assert goals.rates(NOISY, 100, 4, sessions=5, effect=0.1).found >= 92


def test_one_round_is_enough_for_ten_per_cent():
    assert goals.rates(NOISY, 100, 5, rounds=1, effect=0.1).found_confirmed >= 97


@pytest.mark.parametrize("slowed", [13, 19, 24])
def test_a_slower_suite_is_one_line_and_nobody_improves(slowed):
    found = goals.rates(QUIET, 60, 6, effect=0.05, slowed=slowed)
    assert found.suite == 100
    assert found.improved == 0


def test_a_slower_machine_is_no_regression():
    found = goals.rates(QUIET, 60, 7, machine=0.05)
    assert found.false_confirmed == found.suite == 0
    assert found.fixed_false > 40


def test_quality_is_found_by_pairs_and_not_without():
    found, false = goals.perplexity_goals(150)
    assert found.reached >= 93
    assert false.reached <= 9


def test_change_points_are_found_where_they_are():
    false, *found = goals.change_point_goals(240)
    assert false.reached <= 6
    assert all(goal.reached >= 88 for goal in found)
