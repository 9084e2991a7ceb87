"""Series over commits, per case and metric, and where they changed.

A session in which a case did not run, or failed, is a gap and stays one. Times have the part of a
session's shift that its sentinels share taken out; another machine begins a series of its own.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from peftbench.compare.by_time import sentinel_logs
from peftbench.compare.change_points import Ints, change_points
from peftbench.compare.load import CaseRow, Session, metric_names
from peftbench.compare.order import place_name, read_folder
from peftbench.compare.pairing import needs_logarithm, value
from peftbench.compare.rules import GATED_CLASSES, Rule, Rules, read_rules
from peftbench.compare.statistics import Floats, nanmedian, sentinel_shift, shared
from peftbench.errors import unknown_name
from peftbench.metrics import kind_of, metric_of


@dataclass(frozen=True)
class Point:
    """A change of level: somewhere after `after` and not later than `until`."""

    after: str
    until: str
    base: float  # medians of the segments on both sides
    new: float
    change: float
    is_worse: bool | None  # None: the metric has no better
    between: int  # sessions that have no value between the two


@dataclass(frozen=True)
class Series:
    """One case and metric on one machine. `values` is None where a session has none."""

    case_id: str
    case_hash: str
    metric: str
    unit: str
    environment: str
    is_difference: bool
    values: tuple[float | None, ...]
    points: tuple[Point, ...]


@dataclass(frozen=True)
class History:
    """All series of a folder. `places` names the sessions, in the order of `values`."""

    sessions: tuple[str, ...]
    places: tuple[str, ...]
    series: tuple[Series, ...]


def read_history(
    folder: Path, case: str | None = None, metric: str | None = None, subject: str | None = None
) -> History:
    """The series of a folder, of the cases and the metric asked for.

    Raises: UserError for a folder without sessions, or where nothing is asked for by those names.
    """
    sessions = read_folder(folder, subject)
    names = metric_names(row for s in sessions for row in s.cases.values())
    if metric is not None and metric not in names:
        raise unknown_name("metric", metric, names)
    ids = sorted({key[0] for s in sessions for key in s.cases})
    wanted = [i for i in ids if case is None or case in i or fnmatch.fnmatchcase(i, case)]
    if not wanted:
        raise unknown_name("case", str(case), ids)
    return history_of(sessions, read_rules(Path.cwd()), set(wanted), metric, subject)


def history_of(
    sessions: list[Session], rules: Rules, cases: set[str], metric: str | None, subject: str | None
) -> History:
    """Series of `sessions`, which are in order. A metric asked for by name is shown even where no
    comparison uses it."""
    places = tuple(place_name(s, subject) for s in sessions)
    tracks = tracks_of(sessions, cases)
    series: list[Series] = []
    names = metric_names(row for s in sessions for row in s.cases.values())
    measured = {n for rows in tracks.values() for row in rows if row for n in row.measured}
    for name in names if metric is None else [metric]:
        if name not in measured:
            continue
        chosen = {}
        for track, rows in tracks.items():
            if kind_of(track[0]) not in metric_of(name).kinds:
                continue
            rule = rules.of(name, track[0])
            if metric is not None or (not rule.ignore and rule.metric_class in GATED_CLASSES):
                chosen[track] = (rule, rows)
        series += metric_series(sessions, places, chosen)
    order = {name: i for i, name in enumerate(names)}
    series.sort(key=lambda s: (s.case_id, s.case_hash, s.environment, order[s.metric]))
    return History(tuple(s.name for s in sessions), places, tuple(series))


Track = tuple[str, str, str]  # case id, case hash, environment


def tracks_of(sessions: list[Session], cases: set[str]) -> dict[Track, list[CaseRow | None]]:
    """Each case's rows by session, one track for each machine it ran on; None for a gap."""
    tracks: dict[Track, list[CaseRow | None]] = {}
    for index, session in enumerate(sessions):
        words: dict[int, str] = {}  # cases of a session share one dictionary, mostly
        for (case_id, case_hash), row in session.cases.items():
            if case_id in cases and row.status == "ok":
                where = words.get(id(row.environment))
                if where is None:
                    where = ", ".join(f"{k} {v}" for k, v in sorted(row.environment.items()))
                    words[id(row.environment)] = where
                track = tracks.setdefault((case_id, case_hash, where), [None] * len(sessions))
                track[index] = row
    return tracks


def metric_series(
    sessions: list[Session],
    places: tuple[str, ...],
    chosen: dict[Track, tuple[Rule, list[CaseRow | None]]],
) -> list[Series]:
    """One metric of all cases: the values as stored, the points as the adjusted ones show them."""
    if not chosen:
        return []
    rules = [rule for rule, _ in chosen.values()]
    stored = np.array(
        [[number(row, rule.metric) for row in rows] for rule, rows in chosen.values()]
    )
    measured = np.isfinite(stored).any(axis=1)
    scaled = np.array([scale(rule, line) for rule, line in zip(rules, stored, strict=True)])
    if any(rule.metric_class == "noisy" for rule in rules):
        scaled = scaled - machine_shifts(sessions, list(chosen), scaled)
    found = points_of(scaled, rules)
    out = []
    for track, rule, line, at, known in zip(chosen, rules, stored, found, measured, strict=True):
        if known:
            values = tuple(float(v) if np.isfinite(v) else None for v in line)
            points = tuple(point(line, at_index, at, rule, places) for at_index in at)
            out.append(Series(track[0], track[1], rule.metric, rule.unit, track[2],
                              rule.is_difference, values, points))  # fmt: skip
    return out


def number(row: CaseRow | None, metric: str) -> float:
    found = None if row is None else value(row, metric)
    return float("nan") if found is None else float(found)


def scale(rule: Rule, line: Floats) -> Floats:
    """Logarithms where a ratio counts; else the values, margins in shares of their median."""
    if rule.is_difference:
        return line
    if needs_logarithm(rule) or (np.nan_to_num(line, nan=1.0) > 0).all():
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(line > 0, np.log(line), np.nan)
    middle = float(nanmedian(np.abs(line)[None, :], axis=1)[0])
    return line / middle if middle > 0 else line


def machine_shifts(sessions: list[Session], tracks: list[Track], scaled: Floats) -> Floats:
    """(cases, sessions) the machine's part of each session's shift, machine by machine."""
    names = sorted({name for s in sessions for name in s.sentinels})
    shifts = np.zeros_like(scaled)
    if not names:
        return shifts
    logs = sentinel_logs(sessions, names)
    for where in {track[2] for track in tracks}:
        own = np.array([track[2] == where for track in tracks])
        ran = np.isfinite(scaled[own]).any(axis=0)
        if ran.sum() < 2:
            continue
        seen = np.where(ran[:, None], logs, np.nan)
        # the machine as it was on the whole: `sentinel_shift` sets a last session against the rest
        sentinels = sentinel_shift(seen, seen[-1])[:-1]
        values = scaled[own].T
        cases = nanmedian(values - nanmedian(values, axis=0), axis=1)
        shifts[own] = shared(cases, sentinels)
    return shifts


def points_of(scaled: Floats, rules: list[Rule]) -> list[list[int]]:
    """Indices of the first session after each change; gaps are stepped over."""
    found: list[list[int]] = [[] for _ in rules]
    groups: dict[tuple[int, float], list[tuple[int, Ints]]] = {}
    for i, (line, rule) in enumerate(zip(scaled, rules, strict=True)):
        known = np.flatnonzero(np.isfinite(line))
        if known.size == 0:
            continue
        if rule.metric_class == "exact":  # equality needs no statistics
            found[i] = [int(known[k + 1]) for k in np.flatnonzero(np.diff(line[known]))]
            continue
        margin = rule.margin if rule.is_difference else float(np.log1p(rule.margin))
        if np.ptp(line[known]) > margin:  # else no two parts of it differ by more
            groups.setdefault((known.size, margin), []).append((i, known))
    for (_, margin), members in groups.items():
        series = np.array([scaled[i][known] for i, known in members])
        for (i, known), split in zip(members, change_points(series, margin), strict=True):
            found[i] = [int(known[k]) for k in split]
    return found


def point(
    line: Floats, index: int, all_points: list[int], rule: Rule, places: tuple[str, ...]
) -> Point:
    """The change before session `index`, between its neighbours among `all_points`."""
    known = np.flatnonzero(np.isfinite(line))
    last = int(known[known < index][-1])
    starts = [p for p in all_points if p < index]
    ends = [p for p in all_points if p > index]
    base = float(nanmedian(line[max(starts, default=0) : index][None, :], axis=1)[0])
    new = float(nanmedian(line[index : min(ends, default=len(line))][None, :], axis=1)[0])
    if rule.is_difference:
        change = new - base
    else:
        change = (new - base) / abs(base) if base else float(np.sign(new))
    worse = None if rule.direction == "none" else rule.sign * change > 0
    return Point(places[last], places[index], base, new, change, worse, index - last - 1)
