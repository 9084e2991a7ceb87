"""Rows of the noisy class: times and energy, predicted from history or from a second file."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from peftbench.compare.decisions import Decisions, confirmed, decide, suite_regressed
from peftbench.compare.load import CaseRow, Key, Session
from peftbench.compare.pairing import Pair, environment_difference, same_first_seed, value
from peftbench.compare.rules import Rule
from peftbench.compare.statistics import (
    LEAST_CASES,
    MAD_TO_SD,
    Floats,
    Prediction,
    minimum_detectable,
    nanmedian,
    predict,
    sentinel_shift,
    shared,
)
from peftbench.compare.verdicts import Row, SuiteLine, plain_row, shares_of
from peftbench.metrics import metric_of

MOST_SESSIONS = 20
LEAST_SESSIONS = 3
MANY_DF = 1e6  # of a noise that is stated and not estimated
# Of a noise that one pair of sessions shows: its tails, fitted to 1,072 ratios between undisturbed
# neighbours of eleven real nights (7.8 to 9.4 by metric), on a machine shared with others.
PAIR_DF = 8.0
# What an observation counts in a median absolute deviation of normal values.
# Source: Rousseeuw and Croux 1993, section 1, https://doi.org/10.1080/01621459.1993.10476408
MAD_EFFICIENCY = 0.37
LEAST_OF_SPREAD = 5  # cases that tell a spread


@dataclass(frozen=True)
class TimedCase:
    """One case and metric of the noisy class. `history` is by session, None for a gap."""

    pair: Pair
    rule: Rule
    history: tuple[CaseRow | None, ...]


@dataclass(frozen=True)
class Predicted:
    """All cases of one metric."""

    metric: str
    tests: list[TimedCase]
    prediction: Prediction
    noise: str  # where the spread comes from, in words; "": from the history
    spread: float = 0.0  # of two sessions: what the cases show of it; 0 for too few of them


def log_of(row: CaseRow | None, metric: str) -> float:
    """NaN for a gap, to which a session whose every round was disturbed belongs."""
    found = None if row is None or row.is_disturbed else value(row, metric)
    return float(np.log(found)) if found is not None and found > 0 else float("nan")


def sentinel_logs(sessions: list[Session], names: list[str]) -> Floats:
    """(sessions, sentinels), NaN where a session lacks one."""
    found = [[s.sentinels.get(name, np.nan) for name in names] for s in sessions]
    table: Floats = np.array(found, dtype=float).reshape(len(sessions), len(names))
    return np.log(table)


def predicted(
    metric: str, tests: list[TimedCase], history: list[Session] | None, base: Session, new: Session,
    session_noise_ratio: float,
) -> Predicted:  # fmt: skip
    """The prediction for one metric in all cases, larger being worse.

    `history` has the sessions that the tests' histories go by; None compares two files.
    """
    sign = np.array([t.rule.sign for t in tests])
    fresh = np.array([log_of(t.pair.new, metric) for t in tests]) * sign
    if history is None:
        old = np.array([log_of(t.pair.base, metric) for t in tests]) * sign
        return _from_two(metric, tests, fresh - old, old, base, new, session_noise_ratio)
    past = np.array([[log_of(row, metric) for row in t.history] for t in tests], dtype=float)
    past = past.reshape(len(tests), len(history)).T * sign
    names = sorted(new.sentinels)
    prediction = predict(
        past, fresh, sentinel_logs(history, names), sentinel_logs([new], names)[0], LEAST_SESSIONS
    )
    return Predicted(metric, tests, prediction, "")


def _from_two(
    metric: str, tests: list[TimedCase], change: Floats, old: Floats, base: Session, new: Session,
    stated: float,
) -> Predicted:  # fmt: skip
    """Two sessions do not tell their noise: it is stated, or this suite's own spread if larger."""
    names = sorted(base.sentinels.keys() & new.sentinels.keys())
    ratios = sentinel_logs([new], names) - sentinel_logs([base], names)
    machine = sentinel_shift(np.zeros((1, len(names))), ratios[0])[-1:] if names else np.zeros(1)
    middle = nanmedian(change[None, :], axis=1)
    shift = float(shared(middle, machine)[0]) if len(tests) >= LEAST_CASES else 0.0
    spread = 0.0
    if len(tests) >= LEAST_OF_SPREAD:
        spread = MAD_TO_SD * float(np.median(np.abs(change - middle))) / np.sqrt(2)
    own = spread > stated
    noise = spread if own else stated
    words = f"noise {'in this pair' if own else 'taken as'} {100 * noise:.2g} %"
    count = len(tests)
    prediction = Prediction(
        centre=old, estimate=change - shift, se=np.full(count, noise * np.sqrt(2)),
        sd=np.full(count, noise), df=np.full(count, _pair_df(count) if own else MANY_DF),
        sessions=np.ones(count, dtype=int),
        machine=shift, session_means=np.array([]), raw=change,
    )  # fmt: skip
    return Predicted(metric, tests, prediction, words, spread)


def _pair_df(cases: int) -> float:
    """Degrees of freedom of a spread that so many cases of a pair show."""
    return min(PAIR_DF, MAD_EFFICIENCY * (cases - 1))


def with_borrowed_noise(groups: list[Predicted]) -> list[Predicted]:
    """Of two sessions: a metric with too few cases has the largest spread of its like.

    Those are the metrics of the same kinds of cases that have enough of them: merged models are
    few, and what they take moves as much as what the base takes beside them.
    """
    lenders = [g for g in groups if g.spread > 0]
    found = []
    for group in groups:
        kinds = metric_of(group.metric).kinds
        like = [g for g in lenders if metric_of(g.metric).kinds == kinds]
        most = max(like, key=lambda g: g.spread, default=None)
        few = group.noise != "" and len(group.tests) < LEAST_OF_SPREAD
        if not few or most is None or most.spread <= group.prediction.sd.max(initial=0.0):
            found.append(group)
            continue
        count = len(group.tests)
        prediction = replace(
            group.prediction, se=np.full(count, most.spread * np.sqrt(2)),
            sd=np.full(count, most.spread), df=np.full(count, _pair_df(len(most.tests))),
        )  # fmt: skip
        words = f"noise as {most.metric} has in this pair, {100 * most.spread:.2g} %"
        found.append(replace(group, prediction=prediction, noise=words))
    return found


def noisy_rows(groups: list[Predicted], again: Session | None = None) -> list[Row]:
    """The rows of all metrics together: the false discovery rate is held over all of them.

    `again` is a second session of the suspects, which decides on them.
    """
    if not groups:
        return []
    first = joined([g.prediction for g in groups])
    margin = np.log1p([t.rule.margin for g in groups for t in g.tests])
    decided = decide(first.estimate, first.se, first.df, margin)
    # taking out the machine's shift must never be what makes a case faster
    faster = decided.improved & (first.raw < -margin)
    # and without a history, which tells how steady the sentinels are, not what makes it slower
    alone = np.concatenate([np.full(len(g.tests), g.noise != "") for g in groups])
    slower = decided.regressed & ~(alone & (first.raw <= margin))
    detectable = minimum_detectable(first.se, first.df, margin, int(np.isfinite(first.se).sum()))
    rows, index = [], 0
    for group in groups:
        for number, test in enumerate(group.tests):
            rows.append(_row(group, number, test, decided, bool(faster[index] | slower[index]),
                             index, float(detectable[index])))  # fmt: skip
            index += 1
    return rows if again is None else after_rerun(rows, groups, first, margin, again)


def joined(predictions: list[Prediction]) -> Prediction:
    """Several metrics' predictions in one; of the machine and the session means there is none."""
    arrays = {
        name: np.concatenate([getattr(p, name) for p in predictions])
        for name in ("centre", "estimate", "se", "sd", "df", "sessions", "raw")
    }
    return Prediction(**arrays, machine=0.0, session_means=np.array([]))


def after_rerun(
    rows: list[Row], groups: list[Predicted], first: Prediction, margin: Floats, again: Session
) -> list[Row]:
    """Suspects and regressions that a second session has: confirmed, or taken back."""
    second = np.concatenate([second_estimates(g, again) for g in groups])
    is_confirmed, both = confirmed(first, second, margin)
    out = []
    for i, row in enumerate(rows):
        if row.verdict not in ("regressed", "suspect") or not np.isfinite(second[i]):
            out.append(row)
            continue
        sign = -1.0 if row.change is not None and row.change < 0 else 1.0
        mean = np.expm1(sign * (first.estimate[i] + second[i]) / 2)
        words = f"second session {100 * np.expm1(sign * second[i]):+.1f} %"
        verdict = "unchanged" if both.unchanged[i] else "inconclusive"
        if is_confirmed[i]:
            verdict, words = "regressed", f"confirmed: {words}"
        else:
            words = f"not confirmed: {words}"
        out.append(replace(row, verdict=verdict, reason=f"{words}, both {100 * mean:+.1f} %"))
    return out


def second_estimates(group: Predicted, again: Session) -> Floats:
    """The second session's change in each case, the machine's shift as it was in the first.

    The few cases that run again cannot tell their own slow-down from the machine's.
    """
    sign = np.array([t.rule.sign for t in group.tests])
    logs = np.array([
        log_of(again.cases.get((t.pair.new.case_id, t.pair.new.case_hash)), group.metric)
        for t in group.tests
    ])  # fmt: skip
    found: Floats = sign * logs - group.prediction.machine - group.prediction.centre
    return found


def _row(
    group: Predicted, number: int, test: TimedCase, decided: Decisions, stands: bool, index: int,
    detectable: float,
) -> Row:  # fmt: skip
    prediction, rule = group.prediction, test.rule
    sessions = int(prediction.sessions[number])
    base, new = value(test.pair.base, rule.metric), value(test.pair.new, rule.metric)
    if not np.isfinite(prediction.se[number]):
        reason = f"{sessions} sessions of history; {LEAST_SESSIONS} are needed"
        row = plain_row(test.pair.new, rule, "no-history", reason, base, new)
        return replace(row, sessions=sessions)
    if group.noise == "":
        base = float(np.exp(rule.sign * prediction.centre[number]))
    else:
        sessions = 0
    change, low, high = (
        float(np.expm1(rule.sign * logarithm))
        for logarithm in (prediction.estimate[number], decided.low[index], decided.high[index])
    )
    verdict = _verdict(decided, index, stands)
    row = plain_row(test.pair.new, rule, verdict, "", base, new)
    return replace(
        row, reason=_reason(verdict, group, rule, decided, index), change=change,
        low=min(low, high), high=max(low, high),
        minimum_detectable=abs(float(np.expm1(rule.sign * detectable))),
        sessions=sessions,
    )  # fmt: skip


def _verdict(decided: Decisions, index: int, stands: bool) -> str:
    """`stands`: a change that is there without the machine's shift, too."""
    if decided.regressed[index]:
        return "regressed" if stands else "inconclusive"
    if decided.improved[index]:
        return "improved" if stands else "inconclusive"
    if decided.unchanged[index]:
        return "unchanged"
    return "suspect" if decided.suspect[index] else "inconclusive"


def _reason(verdict: str, group: Predicted, rule: Rule, decided: Decisions, index: int) -> str:
    margin = f"{100 * rule.margin:g} %"
    shift = group.prediction.machine
    machine = f"; machine {100 * np.expm1(shift):+.1f} %" if abs(shift) >= 0.005 else ""
    tail = (f"; {group.noise}" if group.noise else "") + machine
    p = min(float(decided.p_worse[index]), float(decided.p_better[index]))
    words = {
        "regressed": f"p {p_text(p)}, margin {margin}",
        "improved": f"p {p_text(p)}, margin {margin}",
        "unchanged": f"90 % interval within {margin}",
        "suspect": f"p {p_text(p)} alone",
        "inconclusive": f"the 90 % interval reaches beyond {margin}",
    }
    return words[verdict] + tail


def p_text(p: float) -> str:
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def suite_lines(groups: list[Predicted]) -> list[SuiteLine]:
    """One for each metric that is worse in most cases."""
    lines = []
    for group in groups:
        margin = np.log1p([t.rule.margin for t in group.tests])
        if not suite_regressed(group.prediction, margin):
            continue
        estimate = group.prediction.estimate
        slower = np.isfinite(estimate) & (estimate > margin / 2)
        cases = tuple(t.pair.new.case_id for t, s in zip(group.tests, slower, strict=True) if s)
        change = float(np.expm1(np.mean(estimate[slower])))
        known = int(np.isfinite(group.prediction.se).sum())
        machine = 100 * np.expm1(group.prediction.machine)
        reason = f"the machine's own shift is {machine:+.1f} % and is taken out"
        shares = shares_of([t.pair.new for t in group.tests], [bool(s) for s in slower])
        lines.append(SuiteLine(group.metric, change, cases, known, reason, shares))
    return lines


def history_of(
    pairs: list[Pair], metric: str, sessions: list[Session], new: Session, starts: dict[Key, int]
) -> tuple[list[Session], list[tuple[CaseRow | None, ...]]]:
    """(the sessions that count, for each pair its rows in them), None for a gap.

    `starts` has the index of the first session after an accepted change, where there is one.
    """
    version = new.metric_versions.get(metric)
    # the last ones that ran any of these cases: a folder may hold several presets
    keys = {(pair.new.case_id, pair.new.case_hash) for pair in pairs}
    last = [i for i, s in enumerate(sessions) if not keys.isdisjoint(s.cases)][-MOST_SESSIONS:]
    same = [s.metric_versions.get(metric, version) == version for s in sessions]
    found = []
    for pair in pairs:
        key = (pair.new.case_id, pair.new.case_hash)
        start = starts.get(key, 0)
        found.append(tuple(
            comparable(s.cases.get(key), pair.new) if same[i] and i >= start else None
            for i, s in ((i, sessions[i]) for i in last)
        ))  # fmt: skip
    return [sessions[i] for i in last], found


def comparable(row: CaseRow | None, new: CaseRow) -> CaseRow | None:
    """The row if it ran where the new one did, on the same data; else None, which is a gap."""
    if row is None or row.status != "ok":
        return None
    if environment_difference(row.environment, new.environment) is not None:
        return None
    return row if row.inputs == new.inputs or not same_first_seed(row, new) else None
