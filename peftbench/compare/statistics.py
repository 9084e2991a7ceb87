"""The arithmetic of a comparison, on plain arrays: no files, no verdicts.

Times are compared as logarithms. Letters: H sessions of history, C cases, K sentinels. NaN: a gap.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

MAD_TO_SD = 1.4826  # of a normal distribution
MEDIAN_VARIANCE = 1.57  # pi / 2: variance of a median over that of a mean
WINSOR_SDS = 3.0
PRIOR_DF = 5.0  # how many observations the suite's own spread is worth beside a case's
PAIR_PRIOR_DF = 8.0  # the same of a method's pairs by seed, whose spreads differ less between cases
Q = 0.05  # false discovery rate of a comparison
SUSPECT_P = 0.05
SUITE_P = 0.005
POWER = 0.8
SD_FLOOR = 1e-3  # of a logarithm of seconds: no clock on a shared machine repeats better
SENTINEL_SD_FLOOR = 5e-3
LEAST_CASES = 4  # of which a shift may be the machine's or the suite's


@dataclass(frozen=True)
class Prediction:
    """What the history says of a new session, one entry a case; logarithms throughout.

    `estimate` is the change, `se` its standard error, NaN where `sessions` is below what is needed.
    `raw` is the change with nothing taken out, `machine` the part of all cases' shift that the
    sentinels share and that was taken out, `session_means` the mean over cases of what is left of
    each session of history.
    """

    centre: Floats
    estimate: Floats
    se: Floats
    sd: Floats
    df: Floats
    sessions: NDArray[np.int_]
    machine: float
    session_means: Floats
    raw: Floats


def predict(
    history: Floats,
    new: Floats,
    sentinels: Floats | None = None,
    new_sentinels: Floats | None = None,
    least: int = 3,
) -> Prediction:
    """Predict one session from the last ones.

    history (H, C) and new (C,) are logarithms of seconds; sentinels (H, K) and new_sentinels (K,)
    likewise. A case with fewer than `least` sessions gets NaN.
    """
    together = np.vstack([history, new[None, :]])
    deviations = together - nanmedian(history, axis=0)
    cases_shift = nanmedian(deviations, axis=1)
    machine = np.zeros(len(together))
    # of few cases the median is a case's own change, and no suite's
    if sentinels is not None and new_sentinels is not None and len(new) >= LEAST_CASES:
        machine = shared(cases_shift, sentinel_shift(sentinels, new_sentinels))
    adjusted = together - machine[:, None]
    centre = nanmedian(adjusted[:-1], axis=0)
    residuals = adjusted[:-1] - centre
    count = np.sum(np.isfinite(residuals), axis=0)
    enough = count >= least
    own = winsorised_variance(residuals)
    suite = suite_variance(own[enough], count[enough])
    df = PRIOR_DF + count - 1
    variance = (PRIOR_DF * suite + (count - 1) * np.nan_to_num(own)) / np.maximum(df, 1)
    sd = np.where(enough, np.sqrt(np.maximum(variance, SD_FLOOR**2)), np.nan)
    with np.errstate(divide="ignore"):
        se = sd * np.sqrt(1 + MEDIAN_VARIANCE / count)
    return Prediction(
        centre, adjusted[-1] - centre, se, sd, df, count, float(machine[-1]),
        nanmean(residuals, axis=1), deviations[-1],
    )  # fmt: skip


def nanmedian(values: Floats, axis: int) -> Floats:
    """np.nanmedian without its warning: an empty slice is NaN."""
    if values.shape[axis] == 0:
        return np.full(np.delete(values.shape, axis), np.nan)
    if np.isfinite(values).all():  # five times faster, and the common case
        return np.asarray(np.median(values, axis=axis))
    empty = np.isnan(values).all(axis=axis, keepdims=True)
    found = np.asarray(np.nanmedian(np.where(empty, 0.0, values), axis=axis))
    return np.where(np.squeeze(empty, axis=axis), np.nan, found)


def nanmean(values: Floats, axis: int) -> Floats:
    count = np.isfinite(values).sum(axis=axis)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.nansum(values, axis=axis) / count)


def shared(cases: Floats, sentinels: Floats) -> Floats:
    """The part of the cases' shift that is the machine's.

    All of it where the sentinels show at least half of it, for their median of a few is less exact
    than the cases' of many; else as much as they show; nothing where they moved the other way.
    """
    same_way = np.sign(cases) == np.sign(sentinels)
    part = np.where(np.abs(sentinels) >= np.abs(cases) / 2, cases, sentinels)
    return np.nan_to_num(np.where(same_way, part, 0.0))


def sentinel_shift(history: Floats, new: Floats) -> Floats:
    """(H + 1,) how much slower the machine was in each session, the new one last; NaN: unknown.

    The median over sentinels, each weighted by how steady it has been: one that has gone mad moves
    nothing.
    """
    together = np.vstack([history, new[None, :]])
    deviations = together - nanmedian(history, axis=0)
    spread = MAD_TO_SD * nanmedian(np.abs(deviations[:-1]), axis=0)
    weights = 1 / np.maximum(spread, SENTINEL_SD_FLOOR)
    return np.array([weighted_median(row, weights) for row in deviations])


def weighted_median(values: Floats, weights: Floats) -> float:
    """NaN without a finite value; the mean of the two in the middle where the halves are equal."""
    known = np.isfinite(values) & np.isfinite(weights)
    if not known.any():
        return float("nan")
    order = np.argsort(values[known], kind="stable")
    ranked = values[known][order]
    share = np.cumsum(weights[known][order]) / np.sum(weights[known])
    low = int(np.searchsorted(share, 0.5 - 1e-9))
    high = int(np.searchsorted(share, 0.5 + 1e-9))
    return float((ranked[low] + ranked[min(high, len(ranked) - 1)]) / 2)


def winsorised_variance(residuals: Floats) -> Floats:
    """(C,) variance of each column of residuals about a median, those beyond 3 robust sigmas drawn
    in to there: 0.96 of a normal distribution's for 5 sessions, 0.995 for 20."""
    count = np.sum(np.isfinite(residuals), axis=0)
    limit = WINSOR_SDS * MAD_TO_SD * nanmedian(np.abs(residuals), axis=0)
    # more than half of a short history may be one value: its spread is then taken as it is
    drawn_in = np.where(limit > 0, np.clip(residuals, -limit, limit), residuals)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(count > 1, np.nansum(drawn_in**2, axis=0) / (count - 1), np.nan)


def suite_variance(own: Floats, count: NDArray[np.int_]) -> float:
    """The suite's variance: the median over cases, made unbiased for a normal distribution.

    Source: Wilson & Hilferty 1931: the median of chi2 / df is about (1 - 2 / (9 df)) ** 3.
    """
    if own.size == 0:
        return SD_FLOOR**2
    unbiased = own / (1 - 2 / (9 * np.maximum(count - 1, 1))) ** 3
    return max(float(np.median(unbiased)), SD_FLOOR**2)


def slower_p(estimate: Floats, se: Floats, df: Floats) -> Floats:
    """One-sided p value of a change upwards; NaN stays."""
    return np.asarray(special.stdtr(df, -estimate / se))


def t_quantile(df: Floats, p: float) -> Floats:
    return np.asarray(special.stdtrit(df, p))


def rejected(p_values: Floats, q: float = Q) -> Bools:
    """Benjamini & Hochberg's procedure; NaN is no test. As `scipy.stats.false_discovery_control`,
    whose import alone takes longer than a whole comparison may."""
    tested = np.isfinite(p_values)
    out = np.zeros(p_values.shape, dtype=bool)
    ranked = np.sort(p_values[tested])
    if ranked.size == 0:
        return out
    below = ranked <= q * np.arange(1, ranked.size + 1) / ranked.size
    if below.any():
        out[tested] = p_values[tested] <= ranked[np.flatnonzero(below)[-1]]
    return out


def minimum_detectable(se: Floats, df: Floats, margin: Floats, tests: int) -> Floats:
    """The change that would be called a regression four times out of five.

    It must be rejected as the only one of `tests`, and its estimate must lie beyond the margin.
    """
    reach = t_quantile(df, POWER) * se
    return np.maximum(t_quantile(df, 1 - Q / max(tests, 1)) * se, margin) + reach


def paired(
    differences: list[Floats], groups: list[str] | None = None
) -> tuple[Floats, Floats, Floats]:
    """(mean, standard error, degrees of freedom) of each case's differences by seed.

    The variance of a case is shrunk to that of its group: methods differ in how far rounding errors
    carry a training. NaN where nothing tells it.
    """
    count = np.array([len(d) for d in differences])
    mean = np.array([float(np.mean(d)) if len(d) else np.nan for d in differences])
    own = np.array([float(np.var(d, ddof=1)) if len(d) > 1 else np.nan for d in differences])
    names = np.array(groups if groups is not None else [""] * len(differences))
    suite = np.array([typical_variance(mean, own, count, names == name) for name in names])
    df = PAIR_PRIOR_DF + np.maximum(count - 1, 0)
    variance = (PAIR_PRIOR_DF * suite + np.maximum(count - 1, 0) * np.nan_to_num(own)) / df
    with np.errstate(divide="ignore", invalid="ignore"):
        return mean, np.sqrt(variance / count), df


def typical_variance(mean: Floats, own: Floats, count: NDArray[np.int_], group: Bools) -> float:
    """Of one difference in a group: the median over its cases, or over all where it has too few.

    Without a second seed it is the spread of the cases about their median; NaN below five cases.
    """
    repeated = np.isfinite(own)
    if repeated.any():
        chosen = repeated & group if (repeated & group).sum() >= LEAST_CASES else repeated
        return float(np.median(own[chosen] / (1 - 2 / (9 * (count[chosen] - 1))) ** 3))
    known = np.isfinite(mean)
    chosen = known & group if (known & group).sum() > LEAST_CASES else known
    if chosen.sum() <= LEAST_CASES:
        return float("nan")
    found = mean[chosen]
    return float((MAD_TO_SD * np.median(np.abs(found - np.median(found)))) ** 2)


def mcnemar_p(only_base: int, only_new: int) -> float:
    """One-sided exact p that the new model is worse: pairs that only one of two got right.

    Source: McNemar 1947; under no change each of them is a coin's throw.
    """
    if only_base == 0:
        return 1.0
    return float(special.betainc(only_base, only_new + 1, 0.5))
