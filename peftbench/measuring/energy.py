"""Energy of the card in a window of the trace, and the card's state during it: arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from peftbench.measuring.nvml import HARMFUL_REASONS
from peftbench.measuring.sampler import DeviceTrace

MIN_SAMPLES = 2  # a peak made of one reading is only a reading, and a rate needs two

Window = tuple[float, float]  # start and end, seconds of time.monotonic()
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Conditions:
    """The state of the card during the timed phase; None where the driver does not tell it.

    `throttled_ratio` is the share of readings with a reason that slows the card down;
    `throttle_reasons` names all that were seen, harmful or not.
    """

    sm_clock_mean_mhz: float | None
    memory_clock_mean_mhz: float | None
    power_mean_w: float | None
    temperature_max_c: int | None
    throttled_ratio: float | None
    throttle_reasons: tuple[str, ...] | None


def _points(times: Sequence[float], values: Sequence[float | None]) -> Points:
    return [(t, v) for t, v in zip(times, values, strict=True) if v is not None]


def energy_in(device: DeviceTrace, window: Window) -> tuple[float | None, str | None, str | None]:
    """Joules of the card in the window, their source, and why there are none."""
    counter = _points(device.slow.times_s, device.slow.energy_j)
    why = _uncovered(device, "energy_counter", counter, window)
    if why is None:
        spent = _at(counter, window[1]) - _at(counter, window[0])
        if spent > 0:
            return spent, "nvml energy counter", None
        why = "the energy counter did not advance"
    power = _points(device.slow.times_s, device.slow.power_w)
    why_no_power = _uncovered(device, "power", power, window)
    if why_no_power is None:
        return _integral(power, window), "integrated power", None
    return None, None, f"{why}; {why_no_power}" if why != why_no_power else why


def _uncovered(device: DeviceTrace, quantity: str, points: Points, window: Window) -> str | None:
    """Why the points do not tell what happened in the window, or None where they do."""
    start, end = window
    if not points:
        return device.reasons.get(quantity, f"no reading of {quantity.replace('_', ' ')}")
    if points[0][0] > start or points[-1][0] < end:
        why = "the readings do not reach over the whole phase"
        return f"{why}; {device.reasons['device']}" if "device" in device.reasons else why
    if sum(start <= t <= end for t, _ in points) < MIN_SAMPLES:
        return "the phase is too short for the readings of energy and power"
    return None


def _at(points: Points, when: float) -> float:
    """The value on the straight line between the two points around `when`."""
    for (t0, v0), (t1, v1) in pairwise(points):
        if t0 <= when <= t1:
            return v0 + (v1 - v0) * (when - t0) / (t1 - t0)
    raise AssertionError("the caller checks that the points reach over the window")


def _integral(points: Points, window: Window) -> float:
    """Trapezoid rule, with the values at both ends of the window interpolated."""
    start, end = window
    inside = [(t, v) for t, v in points if start < t < end]
    line = [(start, _at(points, start)), *inside, (end, _at(points, end))]
    return sum((t1 - t0) * (v0 + v1) / 2 for (t0, v0), (t1, v1) in pairwise(line))


def conditions_in(device: DeviceTrace, window: Window | None) -> Conditions:
    """The card in the window; a round without that phase has no readings."""
    start, end = window or (0.0, 0.0)
    slow = device.slow
    inside = [i for i, t in enumerate(slow.times_s) if start <= t < end]
    temperatures = [c for c in (slow.temperature_c[i] for i in inside) if c is not None]
    seen = [r for r in (slow.throttle_reasons[i] for i in inside) if r is not None]
    harmed = sum(bool(HARMFUL_REASONS & {*names}) for names in seen)
    return Conditions(
        _mean([slow.sm_clock_mhz[i] for i in inside]),
        _mean([slow.memory_clock_mhz[i] for i in inside]),
        _mean([slow.power_w[i] for i in inside]),
        max(temperatures, default=None),
        harmed / len(seen) if seen else None,
        tuple(sorted({name for names in seen for name in names})) if seen else None,
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None
