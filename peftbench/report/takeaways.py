"""What a reader should know first: how the cases ended, and who is best at what."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from peftbench.methods import METHODS
from peftbench.metrics import METRICS
from peftbench.report.cases import Case
from peftbench.show import quantity

STANDARD_ERRORS = 2.0  # of the difference: within them two qualities are not told apart


@dataclass(frozen=True)
class Best:
    """`others` are those that the standard errors do not tell apart from the best."""

    adapters: tuple[str, ...]
    text: str
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Winners:
    """Of one model and method, by question; None where nothing was measured."""

    model: str
    method: str
    adapters: int
    best: tuple[Best | None, ...]


@dataclass(frozen=True)
class Fitting:
    """Of one model and method, the best of those cases whose recorded peak fits into a memory."""

    model: str
    method: str
    cases: int  # that ended ok and have a peak
    fitting: int
    fastest: Best | None
    quality: str  # the metric that the method is for
    best: Best | None


QUESTIONS = ("best preference accuracy", "lowest perplexity", "fastest", "least memory",
             "fewest parameters")  # fmt: skip


def statuses(cases: list[Case]) -> list[tuple[str, int]]:
    """How many ended how, ok first."""
    counted = Counter(case.status for case in cases)
    return sorted(counted.items(), key=lambda item: (item[0] != "ok", -item[1], item[0]))


def ended_ok(cases: list[Case]) -> dict[tuple[str, str], list[Case]]:
    """By model and method."""
    groups: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        if case.status == "ok":
            groups.setdefault((case.model, case.method), []).append(case)
    return groups


def what_fits(cases: list[Case], memory_bytes: int) -> list[Fitting]:
    """One line for each model and method that has a recorded peak."""
    lines = []
    for (model, method), group in ended_ok(cases).items():
        known = [(c, size) for c in group if (size := c.memory_bytes) is not None]
        own = [c for c, size in known if size <= memory_bytes]
        quality = METHODS[method].target if method in METHODS else "perplexity"
        if known:
            lines.append(Fitting(
                model, method, len(known), len(own), best_cost(own, "method_s"), quality,
                best_quality(own, quality),
            ))  # fmt: skip
    return lines


def winners(cases: list[Case]) -> list[Winners]:
    """One line for each model and method of which two adapters have numbers."""
    return [
        Winners(model, method, len({c.adapter for c in own}), (
            best_quality(own, "preference_accuracy"), best_quality(own, "perplexity"),
            best_cost(own, "method_s"), least_memory(own), best_cost(own, "trainable_params"),
        ))
        for (model, method), own in ended_ok(cases).items()
        if len({c.adapter for c in own}) > 1
    ]  # fmt: skip


def best_quality(cases: list[Case], metric: str) -> Best | None:
    known = [(c, v) for c in cases if (v := c.values[metric]) is not None]
    if not known:
        return None
    sign = 1 if METRICS[metric].direction == "lower" else -1
    best, value = min(known, key=lambda pair: sign * pair[1])
    others = [c.adapter for c, v in known if c is not best and not told_apart(c, best, metric)]
    return Best(
        (best.adapter,), quantity(value, METRICS[metric].unit), tuple(dict.fromkeys(others))
    )


def told_apart(one: Case, other: Case, metric: str) -> bool:
    """By the standard errors that the records state; True where they state none."""
    a, b = one.values[metric], other.values[metric]
    errors = [case.values[f"{metric}_se"] or 0.0 for case in (one, other)]
    assert a is not None
    assert b is not None
    return abs(a - b) > STANDARD_ERRORS * math.hypot(*errors)


def best_cost(cases: list[Case], metric: str) -> Best | None:
    known = [(c, v) for c in cases if (v := c.values[metric]) is not None]
    return lowest(known, METRICS[metric].unit)


def least_memory(cases: list[Case]) -> Best | None:
    """Only among cases whose peak is read from the same source."""
    sources = {case.memory for case in cases}
    if len(sources) != 1:
        return None
    return lowest([(c, v) for c in cases if (v := c.memory_bytes) is not None], "bytes")


def lowest(known: list[tuple[Case, float]], unit: str) -> Best | None:
    """All that share the lowest value."""
    if not known:
        return None
    least = min(v for _, v in known)
    names = dict.fromkeys(c.adapter for c, v in known if v == least)
    whole = int(least) if unit == "parameters" else least
    return Best(tuple(names), quantity(whole, unit))
