"""Rows of the classes exact and tight: equality, and a history's range."""

from __future__ import annotations

import math
from dataclasses import replace

from peftbench.compare.load import CaseRow
from peftbench.compare.pairing import Pair, by_seed, value
from peftbench.compare.rules import Rule
from peftbench.compare.verdicts import Row, plain_row, ratio_change
from peftbench.show import quantity


def exact_row(pair: Pair, rule: Rule) -> Row:
    """Equal for every seed that both sides ran, or changed.

    Without a common seed only what is one number over all seeds of a side can be compared.
    """
    left, right = by_seed(pair.base, rule.metric), by_seed(pair.new, rule.metric)
    base, new = value(pair.base, rule.metric), value(pair.new, rule.metric)
    both = sorted(left.keys() & right.keys())
    different = [seed for seed in both if set(left[seed]) != set(right[seed])]
    if different:
        # the first seed that differs, not the medians: those may be equal by chance
        base, new = left[different[0]][0], right[different[0]][-1]
        of = "" if len(both) == 1 else f" on {len(different)} of {len(both)} seeds"
        return plain_row(pair.new, rule, "changed", f"must be equal, and is not{of}", base, new)
    if both:
        return plain_row(pair.new, rule, "unchanged", "equal", base, new)
    of_base = {v for found in left.values() for v in found}
    of_new = {v for found in right.values() for v in found}
    if of_base == of_new and len(of_base) == 1:
        return plain_row(pair.new, rule, "unchanged", "equal, on other seeds", base, new)
    if len(of_base) == len(of_new) == 1 and len(left) > 1 and len(right) > 1:
        reason = "one number on every seed of a side, another on the other side's"
        return plain_row(pair.new, rule, "changed", reason, base, new)
    seeds = f"{_seeds(left)} against {_seeds(right)}"
    return plain_row(pair.new, rule, "inconclusive", f"no seed in common ({seeds})", base, new)


def _seeds(found: dict[int, list[float]]) -> str:
    return ", ".join(str(seed) for seed in sorted(found))


def tight_row(pair: Pair, rule: Rule, history: list[CaseRow]) -> Row:
    """Inside the range of the history's sessions, widened by the margin, or outside it."""
    base, new = value(pair.base, rule.metric), value(pair.new, rule.metric)
    assert base is not None
    assert new is not None
    past = [v for row in history if (v := value(row, rule.metric)) is not None]
    low, high = min([base, *past]), max([base, *past])
    margin = max(rule.margin * max(abs(low), abs(high)), rule.least_bytes)
    below, above = new < low - margin, new > high + margin
    verdict = "unchanged"
    if below or above:
        worse = above if rule.direction == "lower" else below
        verdict = "regressed" if worse else "improved"
        if rule.direction == "none":
            verdict = "changed"
    room = quantity(margin, "bytes") if rule.unit == "bytes" else f"{100 * rule.margin:g} %"
    where = "the base" if low == high else f"the range of {len(past)} sessions"
    reason = f"{'outside' if below or above else 'within'} {room} of {where}"
    row = plain_row(pair.new, rule, verdict, reason, base, new)
    ends = [ratio_change(high, new), ratio_change(low, new)]
    detectable = ratio_change(base, high + margin)
    if None in ends or detectable is None or not math.isfinite(detectable):
        return replace(row, sessions=len(past))
    return replace(
        row, low=ends[0], high=ends[1], minimum_detectable=detectable, sessions=len(past)
    )
