"""Where a series changed its level: E-divisive splits on windows, judged by a t test.

Letters: B series of equal length N; S segments' ends. Values are logarithms, so a level's change is
a ratio's.

Source: Matteson & James 2014, https://arxiv.org/abs/1306.4933 (the statistic, exponent 1);
Fleming et al. 2023, https://arxiv.org/abs/2301.03034 (a t test in place of permutations).
Here the variance is unbiased, gaps are left out and not filled, and a change has a least size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from peftbench.compare.statistics import Floats, slower_p

Ints = NDArray[np.int_]

CHANGE_P = 1e-3  # two-sided, of a split's t test; `make calibration` prints what it gives
LEAST_SEGMENT = 3
WINDOWS = (24, 48, 96)  # sessions; and the whole segment


@dataclass(frozen=True)
class Sums:
    """Prefix sums of B series: with them any window's statistics take no pass over its values.

    distances (B, N + 1, N + 1) is the sum of |x_i - x_j| over i < row and j < column; values and
    squares (B, N + 1) those of x and of x squared.
    """

    distances: Floats
    values: Floats
    squares: Floats


def change_points(series: Floats, margin: float) -> list[list[int]]:
    """The first index after each change, for every row of series (B, N) without gaps."""
    count, length = series.shape
    if length < 2 * LEAST_SEGMENT:
        return [[] for _ in range(count)]
    found: list[list[int]] = []
    for start in range(0, count, 64):  # 64 tables of distances at a time: some 20 MB at N = 200
        sums = prefix_sums(series[start : start + 64])
        for row, split in enumerate(best_splits(sums, 0, length, margin)):
            one = Sums(*(table[row : row + 1] for table in
                         (sums.distances, sums.values, sums.squares)))  # fmt: skip
            found.append(sorted(splits_within(one, 0, length, int(split), margin)))
    return found


def splits_within(sums: Sums, start: int, end: int, split: int, margin: float) -> list[int]:
    """`split` and all splits to its left and right; -1 is none. Of one series."""
    if split < 0:
        return []
    found = [split]
    for a, b in ((start, split), (split, end)):
        if b - a >= 2 * LEAST_SEGMENT:
            inner = int(best_splits(sums, a, b, margin)[0])
            found += splits_within(sums, a, b, inner, margin)
    return found


def prefix_sums(series: Floats) -> Sums:
    count, length = series.shape
    table = np.zeros((count, length + 1, length + 1))
    inner = table[:, 1:, 1:]
    np.abs(series[:, :, None] - series[:, None, :], out=inner)
    np.cumsum(inner, axis=1, out=inner)
    np.cumsum(inner, axis=2, out=inner)
    # about each series' own mean: a variance out of sums of squares would else lose its digits
    centred = series - series.mean(axis=1, keepdims=True)
    before = np.zeros((count, 1))
    return Sums(
        table,
        np.hstack([before, np.cumsum(centred, axis=1)]),
        np.hstack([before, np.cumsum(centred**2, axis=1)]),
    )


def window_starts(start: int, end: int) -> list[tuple[int, Ints]]:
    """(length, starts): the segment itself, and windows of several lengths that overlap by half."""
    found = [(end - start, np.array([start]))]
    for length in WINDOWS:
        if length < end - start:
            starts = np.arange(start, end - length, length // 2)
            found.append((length, np.append(starts, end - length)))
    return found


def best_splits(sums: Sums, start: int, end: int, margin: float) -> Ints:
    """(B,) the most significant split of each series in [start, end); -1 where none is one."""
    count = len(sums.values)
    best_p, best = np.full(count, CHANGE_P), np.full(count, -1)
    for length, starts in window_starts(start, end):
        offsets = np.arange(LEAST_SEGMENT, length - LEAST_SEGMENT + 1)
        most = np.argmax(energy(sums.distances, starts[:, None], length, offsets), axis=2)
        at = starts + offsets[most]
        p, shift = split_p(sums, starts, starts + length, at)
        p[np.abs(shift) <= margin] = 1.0
        first = np.argmin(p, axis=1)
        rows = np.arange(count)
        better = p[rows, first] < best_p
        best_p[better] = p[rows, first][better]
        best[better] = at[rows, first][better]
    return best


def energy(distances: Floats, starts: Ints, length: int, offsets: Ints) -> Floats:
    """(B, windows, offsets) the E-divisive statistic of splitting each window at each offset."""
    a, b = np.broadcast_arrays(starts, starts + length)
    taus = starts + offsets

    def total(i: Ints, j: Ints, k: Ints, m: Ints) -> Floats:
        """Sum of distances between [i, j) and [k, m)."""
        return np.asarray(
            distances[:, j, m] - distances[:, i, m] - distances[:, j, k] + distances[:, i, k]
        )

    left, right = offsets, length - offsets
    between = total(a, taus, taus, b) * 2 / (left * right)
    # a sum over ordered pairs, so a mean over n (n - 1) of them
    within_left = total(a, taus, a, taus) / (left * (left - 1))
    within_right = total(taus, b, taus, b) / (right * (right - 1))
    return (between - within_left - within_right) * left * right / length


def split_p(sums: Sums, a: Ints, b: Ints, at: Ints) -> tuple[Floats, Floats]:
    """(two-sided p, shift) of Student's t test between [a, at) and [at, b), each (B, windows)."""
    rows = np.arange(len(at))[:, None]
    n_left, n_right = at - a, b - at
    left = sums.values[rows, at] - sums.values[rows, a]
    right = sums.values[rows, b] - sums.values[rows, at]
    squares = sums.squares[rows, b] - sums.squares[rows, a]
    df = (b - a - 2.0) * np.ones(at.shape)
    # a series without noise, such as a count, changes with certainty
    variance = np.maximum((squares - left**2 / n_left - right**2 / n_right) / df, 1e-18)
    shift = right / n_right - left / n_left
    return 2 * slower_p(np.abs(shift), np.sqrt(variance * (1 / n_left + 1 / n_right)), df), shift
