"""Sessions of a suite with known noise and known changes: what the comparison is calibrated on.

    log seconds = case + suite[session] + case_session[session, case] + round noise + spikes

Sentinels are four more "cases" of the same noise that no library can slow down: what the machine
does to a whole session, it does to them too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Noise:
    """Standard deviations of logarithms; a spike adds `spike_size` to one round."""

    round_sd: float
    suite_sd: float
    case_session_sd: float
    spike_share: float
    spike_size: float


QUIET = Noise(0.005, 0.003, 0.004, 0.01, 0.08)
NOISY = Noise(0.01, 0.012, 0.012, 0.03, 0.10)
SENTINELS = 4


@dataclass(frozen=True)
class Suite:
    """History (H, C) and (H, K), and a new session and its rerun (C,) and (K,), as log medians.

    `rounds` (H + 1, C, R) has every round of history and of the new session.
    """

    history: Floats
    sentinels: Floats
    new: Floats
    new_sentinels: Floats
    again: Floats
    rounds: Floats


def session_rounds(
    rng: np.random.Generator, noise: Noise, suite: Floats, cases: int, rounds: int
) -> Floats:
    """(sessions, cases, rounds) logarithms about 0, for sessions with the given suite shifts."""
    shape = (len(suite), cases, rounds)
    spikes = rng.random(shape) < noise.spike_share
    return (
        suite[:, None, None]
        + rng.normal(0, noise.case_session_sd, (len(suite), cases, 1))
        + rng.normal(0, noise.round_sd, shape)
        + noise.spike_size * spikes
    )


def simulate(
    rng: np.random.Generator,
    noise: Noise,
    sessions: int = 20,
    cases: int = 24,
    rounds: int = 3,
    effect: Floats | float = 0.0,
    machine: float = 0.0,
    sentinels_share: bool = True,
) -> Suite:
    """One night. `effect` slows the new session's cases, `machine` its cases and its sentinels.

    The rerun happens in the same hour on the same machine, so it has the suite shift of the new
    session; everything else is drawn again. With `sentinels_share` False the sentinels know
    nothing of the sessions' suite shifts.
    """
    suite = rng.normal(0, noise.suite_sd, sessions + 1)
    suite[-1] += machine
    level = rng.normal(0, 1, cases)
    drawn = session_rounds(rng, noise, suite, cases, rounds) + level[:, None]
    drawn[-1] += np.broadcast_to(np.asarray(effect, dtype=float), (cases,))[:, None]
    again = session_rounds(rng, noise, suite[-1:], cases, rounds)[0] + level[:, None]
    again += np.broadcast_to(np.asarray(effect, dtype=float), (cases,))[:, None]
    seen = suite if sentinels_share else rng.normal(0, noise.suite_sd, sessions + 1)
    if not sentinels_share:
        seen[-1] += machine
    sentinels = np.median(session_rounds(rng, noise, seen, SENTINELS, rounds), axis=2)
    medians = np.median(drawn, axis=2)
    return Suite(
        medians[:-1], sentinels[:-1], medians[-1], sentinels[-1], np.median(again, axis=1), drawn
    )


def paired_differences(
    rng: np.random.Generator,
    cases: int,
    seeds: int,
    effect: float,
    seed_sd: float = 0.014,
    nondeterminism_sd: float = 0.002,
) -> tuple[list[Floats], list[Floats]]:
    """Log perplexities by seed of every case, before and after; the first case becomes worse."""
    base, new = [], []
    for case in range(cases):
        of_seed = rng.normal(0, seed_sd, seeds)
        base.append(of_seed + rng.normal(0, nondeterminism_sd, seeds))
        after = of_seed + rng.normal(0, nondeterminism_sd, seeds)
        new.append(after + (np.log1p(effect) if case == 0 else 0.0))
    return base, new
