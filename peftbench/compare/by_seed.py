"""Rows of the seeded class: quality in pairs of one seed; accuracies by exact McNemar."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy import special

from peftbench.compare.by_time import MANY_DF, p_text
from peftbench.compare.decisions import SUITE_SHARE, Decisions, decide_p
from peftbench.compare.load import CaseRow
from peftbench.compare.pairing import Pair, needs_logarithm, rounds_by_seed, value
from peftbench.compare.rules import Rule
from peftbench.compare.statistics import (
    LEAST_CASES,
    SUITE_P,
    Floats,
    mcnemar_p,
    minimum_detectable,
    paired,
    slower_p,
)
from peftbench.compare.verdicts import Row, SuiteLine, plain_row, shares_of
from peftbench.progress import counted

LEAST_HISTORY = 3
EXACT_SE = 1e-9  # runs that repeat to the last bit: any difference is real


@dataclass(frozen=True)
class Estimates:
    """All cases of one metric, larger being worse; `se` is NaN where nothing tells the spread."""

    rule: Rule
    pairs: list[Pair]
    rules: list[Rule]
    seeds: list[int]  # how many are common to both sides
    estimate: Floats
    se: Floats
    df: Floats
    p_worse: Floats
    p_better: Floats
    basis: list[str]


def estimates(
    rules: list[Rule], pairs: list[Pair], history: list[tuple[CaseRow | None, ...]]
) -> Estimates:
    """One metric's differences by seed; `history` is that of each pair, [] where none is given."""
    rule = rules[0]
    differences = [differences_of(pair, rule) for pair in pairs]
    estimate, se, df = paired(differences, [pair.new.axes["method"] for pair in pairs])
    seeds = [len(d) for d in differences]
    basis = [counted(n, "seed") for n in seeds]
    for i, (pair, found) in enumerate(zip(pairs, history, strict=True)):
        if seeds[i] != 1:
            continue
        spread = repeated_spread(pair, rule, found)
        margin = rules[i].margin
        if spread is not None:
            # an upgrade may move every case a little: then tonight's spread is the larger
            from_history = spread[0] * np.sqrt(1 + 1 / spread[1])
            if not se[i] > from_history:
                se[i], df[i] = from_history, spread[1] - 1
            basis[i] = f"1 seed, its spread over {spread[1]} sessions"
        elif not se[i] > margin:
            # rounding alone moves some cases by per cents and others not at all: one pair of runs
            # cannot say which case is which
            se[i] = margin
            basis[i] = f"1 seed, noise taken as {100 * margin:g} %"
        else:
            basis[i] = f"1 seed, noise in this pair {100 * se[i]:.2g} %"
    se = np.where(np.isfinite(se), np.maximum(se, EXACT_SE), np.nan)
    p_worse, p_better = slower_p(estimate, se, df), slower_p(-estimate, se, df)
    for i, pair in enumerate(pairs):
        outcome = discordant(pair, rule.metric)
        if outcome is not None:
            worse, better, items = outcome
            p_worse[i], p_better[i] = mcnemar_p(worse, better), mcnemar_p(better, worse)
            estimate[i] = share = (worse - better) / items
            # of a mean of +1, 0 and -1; one discordant pair more than were seen, so never 0
            se[i] = np.sqrt(worse + better + 1 - items * share**2) / items
            df[i] = MANY_DF
            things = "pairs" if rule.metric == "preference_accuracy" else "items"
            basis[i] = f"McNemar on {items} {things}: {worse} lost, {better} won"
    return Estimates(rule, pairs, rules, seeds, estimate, se, df, p_worse, p_better, basis)


def differences_of(pair: Pair, rule: Rule) -> Floats:
    """By common seed: log ratios, differences for accuracies, shares of the base for margins."""
    left, right = rounds_by_seed(pair.base), rounds_by_seed(pair.new)
    seeds = sorted(left.keys() & right.keys())
    old = np.array([left[s].values[rule.metric] for s in seeds])
    new = np.array([right[s].values[rule.metric] for s in seeds])
    if needs_logarithm(rule):
        found = np.log(new / old)
    elif rule.is_difference:
        found = new - old
    else:
        # one denominator for all seeds, or a seed whose margin is near 0 would decide alone
        found = (new - old) / max(float(np.mean(np.abs(old))), 1e-12) if len(old) else old
    worsening: Floats = rule.sign * found
    return worsening


def repeated_spread(
    pair: Pair, rule: Rule, history: tuple[CaseRow | None, ...]
) -> tuple[float, int] | None:
    """(standard deviation, sessions) of the pair's one seed over the history; None if too short."""
    left, right = rounds_by_seed(pair.base), rounds_by_seed(pair.new)
    seed = next(iter(left.keys() & right.keys()))
    rounds = [rounds_by_seed(row).get(seed) for row in history if row is not None]
    found = [r.values[rule.metric] for r in rounds if r is not None and rule.metric in r.values]
    if len(found) < LEAST_HISTORY:
        return None
    values = np.array(found)
    if needs_logarithm(rule):
        if (values <= 0).any():
            return None
        values = np.log(values)
    elif not rule.is_difference:
        values = values / max(float(np.mean(np.abs(values))), 1e-12)
    return float(np.std(values, ddof=1)), len(found)


def discordant(pair: Pair, metric: str) -> tuple[int, int, int] | None:
    """(items only the base got right, only the new one, all) over common seeds; None: no items."""
    left, right = rounds_by_seed(pair.base), rounds_by_seed(pair.new)
    worse = better = items = 0
    for seed in sorted(left.keys() & right.keys()):
        before, after = left[seed].outcomes.get(metric), right[seed].outcomes.get(metric)
        if before is None or after is None or len(before) != len(after):
            return None
        worse += sum(a == "1" and b == "0" for a, b in zip(before, after, strict=True))
        better += sum(a == "0" and b == "1" for a, b in zip(before, after, strict=True))
        items += len(before)
    return (worse, better, items) if items else None


def seeded_rows(groups: list[Estimates]) -> list[Row]:
    """The rows of all metrics together: the false discovery rate is held over all of them."""
    if not groups:
        return []
    margin = margins(groups)
    estimate, se, df, p_worse, p_better = (
        np.concatenate([getattr(g, name) for g in groups])
        for name in ("estimate", "se", "df", "p_worse", "p_better")
    )
    decided = decide_p(estimate, se, df, margin, p_worse, p_better)
    detectable = minimum_detectable(se, df, margin, int(np.isfinite(se).sum()))
    rows, index = [], 0
    for group in groups:
        for number in range(len(group.pairs)):
            rows.append(_row(group, number, decided, index, float(detectable[index])))
            index += 1
    return rows


def margins(groups: list[Estimates]) -> Floats:
    return np.array([
        np.log1p(r.margin) if needs_logarithm(r) else r.margin for g in groups for r in g.rules
    ])  # fmt: skip


def _row(group: Estimates, number: int, decided: Decisions, index: int, detectable: float) -> Row:
    pair, rule = group.pairs[number], group.rules[number]
    base, new = value(pair.base, rule.metric), value(pair.new, rule.metric)
    if group.seeds[number] == 0:
        return plain_row(pair.new, rule, "inconclusive", "no seed in common", base, new)
    estimate = float(group.estimate[number])
    identical = estimate == 0 and not differences_of(pair, rule).any()
    verdict, reason = _verdict(group, number, decided, index)
    if identical:
        verdict, reason = "unchanged", "equal on every common seed"
    row = plain_row(pair.new, rule, verdict, f"{reason}; {group.basis[number]}", base, new)
    ends = [estimate, float(decided.low[index]), float(decided.high[index])]
    change, *both = (float(np.expm1(rule.sign * v)) if needs_logarithm(rule) else rule.sign * v
                     for v in ends)  # fmt: skip
    if not all(np.isfinite(both)):
        return replace(row, change=change)
    # beyond e**50 no number means anything, and far beyond there is none
    reach = np.expm1(min(detectable, 50.0)) if needs_logarithm(rule) else detectable
    return replace(row, change=change, low=min(both), high=max(both),
                   minimum_detectable=float(reach))  # fmt: skip


def _verdict(group: Estimates, number: int, decided: Decisions, index: int) -> tuple[str, str]:
    rule = group.rules[number]
    margin = f"{100 * rule.margin:g} {'pp' if rule.is_difference else '%'}"
    p = min(float(decided.p_worse[index]), float(decided.p_better[index]))
    if decided.regressed[index] or decided.improved[index]:
        verdict = "regressed" if decided.regressed[index] else "improved"
        if rule.direction == "none":
            verdict = "changed"
        return verdict, f"p {p_text(p)}, margin {margin}"
    if decided.unchanged[index]:
        return "unchanged", f"90 % interval within {margin}"
    if decided.suspect[index]:
        return "suspect", f"p {p_text(p)} alone"
    if not np.isfinite(group.se[number]):
        return "inconclusive", "nothing tells how far a rerun would differ"
    return "inconclusive", f"the 90 % interval reaches beyond {margin}"


def seeded_suite_lines(groups: list[Estimates]) -> list[SuiteLine]:
    """One for each metric that is worse by more than its margin in most cases.

    By a sign test: where nothing happened as many become better as worse.
    """
    lines = []
    for group in groups:
        margin = margins([group])
        worse, better = group.estimate > margin, group.estimate < -margin
        known = int(np.isfinite(group.estimate).sum())
        if known < LEAST_CASES or worse.sum() < SUITE_SHARE * known:
            continue
        moved = int(worse.sum() + better.sum())
        p = float(special.bdtrc(int(worse.sum()) - 1, moved, 0.5))
        if p >= SUITE_P:
            continue
        middle = group.rule.sign * float(np.median(group.estimate[worse]))
        change = float(np.expm1(middle)) if needs_logarithm(group.rule) else middle
        cases = tuple(q.new.case_id for q, w in zip(group.pairs, worse, strict=True) if w)
        reason = f"{int(worse.sum())} became worse and {int(better.sum())} better, p {p_text(p)}"
        shares = shares_of([pair.new for pair in group.pairs], [bool(w) for w in worse])
        lines.append(SuiteLine(group.rule.metric, change, cases, known, reason, shares))
    return lines
