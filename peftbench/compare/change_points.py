"""Where a series changed its level: E-divisive splits on windows, judged by a t test.

Letters: B series of equal length N; S segments' ends. Values are logarithms, so a level's change is
a ratio's.

Source: Matteson & James 2014, https://arxiv.org/abs/1306.4933 (the statistic, with exponent 1);
Fleming et al. 2023, https://arxiv.org/abs/2301.03034 (the t test in place of permutations, windows).
Here the variance is unbiased, gaps are left out and not filled, and a change has a least size.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from peftbench.compare.statistics import Floats, slower_p

Ints = NDArray[np.int_]

CHANGE_P = 1e-3  # two-sided, of a split's t test; `make calibration` prints what it gives
LEAST_SEGMENT = 3
WINDOWS = (24, 48, 96)  # sessions; and the whole segment


def change_points(series: Floats, margin: float) -> list[list[int]]:
    """The first index after each change, for every row of series (B, N) without gaps."""
    count, length = series.shape
    if length < 2 * LEAST_SEGMENT:
        return [[] for _ in range(count)]
    found: list[list[int]] = []
    for start in range(0, count, 64):  # 64 tables of distances at a time: some 20 MB at N = 200
        block = series[start : start + 64]
        tables = distance_tables(block)
        first = best_splits(block, tables, 0, length, margin)
        for row, split in enumerate(first):
            one, table = block[row : row + 1], tables[row : row + 1]
            found.append(sorted(splits_within(one, table, 0, length, int(split), margin)))
    return found


def splits_within(
    series: Floats, table: Floats, start: int, end: int, split: int, margin: float
) -> list[int]:
    """`split` and all splits to its left and right; -1 is none. One series (1, N)."""
    if split < 0:
        return []
    found = [split]
    for a, b in ((start, split), (split, end)):
        if b - a >= 2 * LEAST_SEGMENT:
            inner = int(best_splits(series, table, a, b, margin)[0])
            found += splits_within(series, table, a, b, inner, margin)
    return found


def distance_tables(series: Floats) -> Floats:
    """(B, N + 1, N + 1) sums of |x_i - x_j| over all i < row and j < column."""
    count, length = series.shape
    table = np.zeros((count, length + 1, length + 1))
    inner = table[:, 1:, 1:]
    np.abs(series[:, :, None] - series[:, None, :], out=inner)
    np.cumsum(inner, axis=1, out=inner)
    np.cumsum(inner, axis=2, out=inner)
    return table


def windows(start: int, end: int) -> list[tuple[int, int]]:
    """The segment itself, and windows of several lengths that overlap by half."""
    found = [(start, end)]
    for length in WINDOWS:
        if length < end - start:
            found += [(a, a + length) for a in range(start, end - length, length // 2)]
            found.append((end - length, end))
    return found


def best_splits(series: Floats, tables: Floats, start: int, end: int, margin: float) -> Ints:
    """(B,) the most significant split of each series in [start, end); -1 where none is one."""
    count = len(series)
    best_p, best = np.full(count, CHANGE_P), np.full(count, -1)
    for a, b in windows(start, end):
        taus = np.arange(a + LEAST_SEGMENT, b - LEAST_SEGMENT + 1)
        at = taus[np.argmax(energy(tables, a, b, taus), axis=1)]
        p, shift = split_p(series, a, b, at)
        better = (p < best_p) & (np.abs(shift) > margin)
        best_p[better], best[better] = p[better], at[better]
    return best


def energy(tables: Floats, a: int, b: int, taus: Ints) -> Floats:
    """(B, len(taus)) the E-divisive statistic of splitting [a, b) before each of taus."""

    first, last = np.array([a]), np.array([b])

    def total(i: Ints, j: Ints, k: Ints, m: Ints) -> Floats:
        """Sum of distances between [i, j) and [k, m)."""
        return np.asarray(tables[:, j, m] - tables[:, i, m] - tables[:, j, k] + tables[:, i, k])

    left, right = taus - a, b - taus
    between = total(first, taus, taus, last) * 2 / (left * right)
    # a sum over ordered pairs, so a mean over n (n - 1) of them
    within_left = total(first, taus, first, taus) / (left * (left - 1))
    within_right = total(taus, last, taus, last) / (right * (right - 1))
    return (between - within_left - within_right) * left * right / (left + right)


def split_p(series: Floats, a: int, b: int, at: Ints) -> tuple[Floats, Floats]:
    """(two-sided p, shift) of Student's t test between [a, at) and [at, b), one split a series."""
    window = series[:, a:b]
    is_left = np.arange(a, b)[None, :] < at[:, None]
    n_left, n_right = is_left.sum(1), (~is_left).sum(1)
    mean_left = np.where(is_left, window, 0).sum(1) / n_left
    mean_right = np.where(is_left, 0, window).sum(1) / n_right
    residual = window - np.where(is_left, mean_left[:, None], mean_right[:, None])
    df = b - a - 2.0
    # a series without noise, such as a count, changes with certainty
    variance = np.maximum((residual**2).sum(1) / df, 1e-18)
    shift = mean_right - mean_left
    se = np.sqrt(variance * (1 / n_left + 1 / n_right))
    return 2 * slower_p(np.abs(shift), se, np.full(len(series), df)), shift
