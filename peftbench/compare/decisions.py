"""From estimates to what is said of them: regressed, improved, unchanged, suspect.

All arrays have one entry a test, which is a case and a metric; larger is worse.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from peftbench.compare.statistics import (
    LEAST_CASES,
    MEDIAN_VARIANCE,
    SUITE_P,
    SUSPECT_P,
    Bools,
    Floats,
    Prediction,
    rejected,
    slower_p,
    t_quantile,
)

SUITE_SHARE = 0.5


@dataclass(frozen=True)
class Decisions:
    """At most one of the five is True for a test; none is: it cannot be told."""

    regressed: Bools
    improved: Bools
    unchanged: Bools
    suspect: Bools
    low: Floats  # 90 % interval of the change
    high: Floats
    p_worse: Floats
    p_better: Floats


def decide(estimate: Floats, se: Floats, df: Floats, margin: Floats) -> Decisions:
    """One verdict a test, the false discovery rate held over all that are given together."""
    return decide_p(
        estimate, se, df, margin, slower_p(estimate, se, df), slower_p(-estimate, se, df)
    )


def decide_p(
    estimate: Floats, se: Floats, df: Floats, margin: Floats, p_worse: Floats, p_better: Floats
) -> Decisions:
    """`decide` for p values of another test than t."""
    reach = t_quantile(df, 1 - SUSPECT_P) * se
    low, high = estimate - reach, estimate + reach
    regressed = rejected(p_worse) & (estimate > margin)
    improved = rejected(p_better) & (estimate < -margin)
    rest = ~(regressed | improved)
    unchanged = rest & (low > -margin) & (high < margin)
    suspect = rest & ~unchanged & (p_worse < SUSPECT_P)
    return Decisions(regressed, improved, unchanged, suspect, low, high, p_worse, p_better)


def suite_regressed(prediction: Prediction, margin: Floats) -> bool:
    """Whether most cases are slower than the machine explains.

    Half of the cases must be slower by half the margin, those together by more than the margin, and
    the mean over all cases must stand out from its own history.
    """
    known = np.isfinite(prediction.se)
    estimate, margins = prediction.estimate[known], margin[known]
    slower = estimate > margins / 2
    if known.sum() < LEAST_CASES or slower.mean() < SUITE_SHARE:
        return False
    if float(np.mean(estimate[slower])) <= float(np.mean(margins[slower])):
        return False
    return suite_p(prediction) < SUITE_P


def suite_p(prediction: Prediction) -> float:
    """One-sided p of the mean over cases, against its sessions of history."""
    known = np.isfinite(prediction.se)
    mean = float(np.mean(prediction.estimate[known]))
    if prediction.session_means.size == 0:  # two files: the standard error is all there is
        se, df = np.median(prediction.se[known]), np.median(prediction.df[known])
        return float(slower_p(np.array(mean), np.array(se), np.array(df)))
    past = prediction.session_means[np.isfinite(prediction.session_means)]
    sessions = max(past.size, 2)
    own = float(np.sum((past - np.median(past)) ** 2) / (sessions - 1))
    floor = float(np.median(prediction.sd[known]) ** 2 / known.sum())
    se = np.sqrt(max(own, floor) * (1 + MEDIAN_VARIANCE / sessions))
    return float(slower_p(np.array(mean), np.array(se), np.array(float(sessions - 1))))


def confirmed(first: Prediction, second: Floats, margin: Floats) -> tuple[Bools, Decisions]:
    """Whether a second session says the same, and what both sessions together say.

    `second` has its estimates, NaN for a case that was not run again. A regression is confirmed if
    the mean of both passes as one session must, and the second alone has p below 0.05. Cases that
    were not run again keep their first p value.
    """
    again = np.isfinite(second)
    mean = np.where(again, (first.estimate + second) / 2, first.estimate)
    of_centre = (first.se / first.sd) ** 2 - 1  # the base's part of the variance stays
    both = decide(mean, first.sd * np.sqrt(np.where(again, 0.5, 1.0) + of_centre), first.df, margin)
    alone = slower_p(second, first.se, first.df) < SUSPECT_P
    return again & both.regressed & alone, both
