"""The arithmetic of the comparison, against scipy.stats and against sums done by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from peftbench.compare import statistics as s
from peftbench.compare.change_points import change_points
from peftbench.compare.decisions import confirmed, decide


def test_false_discovery_rate_is_scipys():
    rng = np.random.default_rng(0)
    for _ in range(50):
        p = rng.random(30) ** 3
        expected = stats.false_discovery_control(p) <= s.Q
        assert (s.rejected(p) == expected).all()
    assert s.rejected(np.array([np.nan, 0.01])).tolist() == [False, True]


def test_mcnemar_is_the_binomial_tail():
    # 7 pairs lost and 2 won: P(X >= 7), X ~ B(9, 1/2) = (36 + 9 + 1) / 512
    assert s.mcnemar_p(7, 2) == pytest.approx(46 / 512)
    assert s.mcnemar_p(1, 2) == pytest.approx(7 / 8)
    assert s.mcnemar_p(0, 5) == 1.0


def test_one_sided_p_is_students():
    found = s.slower_p(np.array([2.0]), np.array([1.0]), np.array([7.0]))[0]
    assert found == pytest.approx(stats.t.sf(2.0, 7))


def test_prediction_by_hand():
    # centre 0; squares 1 + 1 + 1 + 1 over n - 1 = 4; nothing is winsorised
    history = np.array([-1.0, -1.0, 0.0, 1.0, 1.0])[:, None]
    found = s.predict(history, np.array([3.0]))
    own = 4 / 4
    suite = own / (1 - 2 / 36) ** 3  # 4 degrees of freedom
    variance = (5 * suite + 4 * own) / 9
    assert found.estimate[0] == 3.0
    assert found.df[0] == 9
    assert found.se[0] == pytest.approx(np.sqrt(variance * (1 + 1.57 / 5)))


def test_cases_far_apart_are_each_about_their_own_centre():
    # variances 1, 4 and 100: the suite's is the median case's; centres 10, 20 and -30
    centres, sizes = np.array([10.0, 20.0, -30.0]), np.array([1.0, 2.0, 10.0])
    history = centres + np.array([-1.0, -1.0, 0.0, 1.0, 1.0])[:, None] * sizes
    found = s.predict(history, centres + 3)
    assert found.centre.tolist() == centres.tolist()
    assert found.estimate.tolist() == [3.0, 3.0, 3.0]
    assert found.session_means.tolist() == pytest.approx([-13 / 3, -13 / 3, 0, 13 / 3, 13 / 3])
    suite = 4 / (1 - 2 / 36) ** 3
    assert found.sd.tolist() == pytest.approx(np.sqrt((5 * suite + 4 * sizes**2) / 9).tolist())


def test_a_history_of_which_most_is_one_value_keeps_its_spread():
    # the median distance is 0: drawn in to there, a case that moved would have no spread at all
    own = s.winsorised_variance(np.array([0.0, 0.0, 0.0, 1.0])[:, None])
    assert own[0] == pytest.approx(1 / 3)


def test_gaps_are_left_out_and_a_short_history_predicts_nothing():
    history = np.array([[1.0, np.nan], [1.2, np.nan], [1.1, 5.0], [np.nan, 5.1]])
    found = s.predict(history, np.array([1.1, 5.0]))
    assert found.sessions.tolist() == [3, 2]
    assert np.isfinite(found.se).tolist() == [True, False]


def test_the_variance_of_normal_histories_is_nearly_unbiased():
    rng = np.random.default_rng(1)
    for sessions in (5, 20):
        draws = rng.normal(0, 1, (sessions, 20000))
        own = s.winsorised_variance(draws - np.median(draws, axis=0))
        # squares about the median are too large, winsorising takes more than that away again
        assert 0.94 < own.mean() < 1.01


def test_only_what_sentinels_show_is_the_machines():
    cases = np.array([0.05, 0.05, 0.05, -0.02, 0.02])
    sentinels = np.array([0.05, 0.0, 0.01, 0.03, 0.04])
    assert s.shared(cases, sentinels).tolist() == [0.05, 0.0, 0.01, 0.0, 0.02]
    # half of it is enough, less is not
    cases, sentinels = np.array([0.04, 0.05, 0.05]), np.array([0.02, 0.03, 0.02])
    assert s.shared(cases, sentinels).tolist() == [0.04, 0.05, 0.02]


def test_weighted_median_by_hand():
    values = np.array([3.0, 1.0, np.nan, 2.0])
    for weights, expected in (
        ([1.0, 1.0, 9.0, 1.0], 2.0), ([2.0, 1.0, 9.0, 1.0], 2.5), ([1.0, 3.0, 9.0, 1.0], 1.0),
        ([3.0, 1.0, 9.0, 1.0], 3.0),
    ):  # fmt: skip
        assert s.weighted_median(values, np.array(weights)) == expected
    assert np.isnan(s.weighted_median(values[2:3], np.ones(1)))


def test_the_steadiest_sentinel_outweighs_shaky_ones():
    steps = np.array([-1.0, 0.0, 1.0])[:, None]
    history = np.array([1.0, 2.0, 3.0]) + steps * np.array([0.01, 0.1, 0.1])
    shift = s.sentinel_shift(history, np.array([1.0, 2.5, 3.5]))
    assert shift.tolist() == pytest.approx([-0.01, 0.0, 0.01, 0.0])


def test_a_sentinel_gone_mad_moves_nothing():
    history = np.tile([1.0, 2.0, 3.0], (10, 1)) + np.linspace(-0.01, 0.01, 10)[:, None]
    found = s.sentinel_shift(history, np.array([1.0, 2.0, 9.0]))
    assert abs(found[-1]) < 0.01


def test_minimum_detectable_effect_is_detected_four_times_in_five():
    rng, margin = np.random.default_rng(2), np.full(1, 0.01)
    se, df = np.full(1, 0.01), np.full(1, 30.0)
    effect = s.minimum_detectable(se, df, margin, tests=1)[0]
    # as one of 20 tests it must be beyond the quantile of a twentieth of the rate
    reach = stats.t.isf(0.05 / 20, 30) + stats.t.ppf(0.8, 30)
    assert s.minimum_detectable(se, df, margin, tests=20)[0] == pytest.approx(0.01 * reach)
    found = 0
    for _ in range(4000):
        drawn = rng.chisquare(30) / 30
        estimate = np.array([rng.normal(effect, 0.01)])
        found += decide(estimate, se * np.sqrt(drawn), df, margin).regressed[0]
    assert found / 4000 == pytest.approx(0.8, abs=0.03)


def test_pairs_take_the_spread_of_seeds_out():
    # seeds differ by 1, pairs by 0.01 +- 0.001 in every case
    differences = [np.array([0.009, 0.010, 0.011])] * 8
    mean, se, df = s.paired(differences)
    assert mean[0] == pytest.approx(0.01)
    # the suite's variance is every case's own, 1e-6, made unbiased for a median of 2 df
    suite = 1e-6 / (1 - 2 / 18) ** 3
    assert se[0] == pytest.approx(np.sqrt((8 * suite + 2 * 1e-6) / 10 / 3))
    assert df[0] == 10


def test_pairs_are_judged_by_their_own_methods_spread():
    """Four cases are enough for a group; fewer take the spread of all, a median of its cases."""
    spreads = [1.0, 2.0, 3.0, 4.0, 10.0, 20.0, 30.0]
    differences = [np.array([-x, 0.0, x]) for x in spreads]  # variances: squares of the spreads
    _, se, df = s.paired(differences, ["sft"] * 4 + ["ppo"] * 3)
    unbiased = (1 - 2 / 18) ** 3
    for index, suite in ((0, (4 + 9) / 2), (6, 16)):
        variance = (8 * suite / unbiased + 2 * spreads[index] ** 2) / 10
        assert se[index] == pytest.approx(np.sqrt(variance / 3))
    assert df.tolist() == [10.0] * 7


def test_one_seed_is_judged_by_the_spread_of_its_cases():
    differences = [np.array([x]) for x in (0.0, 0.1, 0.2, 0.3, 1.0)]
    mean, se, df = s.paired(differences)
    assert mean.tolist() == [0.0, 0.1, 0.2, 0.3, 1.0]
    # the median is 0.2, the distances 0.2, 0.1, 0, 0.1, 0.8
    assert se.tolist() == pytest.approx([1.4826 * 0.1] * 5)
    assert df.tolist() == [8.0] * 5
    assert np.isnan(s.paired(differences[:4])[1]).all()


def test_a_second_session_that_disagrees_takes_a_regression_back():
    rng = np.random.default_rng(3)
    history = rng.normal(0, 0.01, (20, 10))
    new = np.zeros(10)
    new[0] = 0.08
    first = s.predict(history, new)
    margin = np.full(10, 0.03)
    for second, expected in ((0.07, True), (0.0, False)):
        again = np.full(10, np.nan)
        again[0] = second
        assert confirmed(first, again, margin)[0][0] == expected


def test_change_points_by_brute_force():
    """The chosen split of one step is where a t test over all splits is most significant."""
    rng = np.random.default_rng(4)
    series = rng.normal(0, 0.01, (5, 40))
    series[:, 25:] += 0.08
    for line, found in zip(series, change_points(series, 0.03), strict=True):
        p = [stats.ttest_ind(line[:k], line[k:]).pvalue for k in range(3, 38)]
        assert found == [3 + int(np.argmin(p))] == [25]


def test_change_points_of_counts_small_steps_and_short_series():
    exact = np.repeat([[1.0, 1.0, 2.0, 2.0]], 5, axis=1)
    assert change_points(np.log(exact), 0.03) == [[10]]
    assert change_points(np.log(exact * 0 + 1.0), 0.03) == [[]]
    small = np.repeat([[0.0, 0.02]], 10, axis=1)
    assert change_points(small, 0.03) == [[]]
    assert change_points(np.zeros((2, 5)), 0.03) == [[], []]


def test_two_steps_are_two_points():
    series = np.concatenate([np.zeros(20), np.full(20, 0.1), np.zeros(20)])[None, :]
    series = series + np.random.default_rng(5).normal(0, 0.005, series.shape)
    assert change_points(series, 0.03) == [[20, 40]]
