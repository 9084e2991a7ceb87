"""READ THIS FIRST: two sessions, and perhaps a history, become a Comparison.

pair the cases -> settle those without numbers -> one row a metric, by its class -> exit code
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from peftbench.compare import by_seed, by_time
from peftbench.compare.by_class import exact_row, tight_row
from peftbench.compare.load import Key, Session, metric_names
from peftbench.compare.order import first_reached, in_order, place_name, read_folder, read_side
from peftbench.compare.pairing import Pair, judge_case, paired_cases, unusable, value
from peftbench.compare.rules import GATED_CLASSES, Acknowledged, Rule, Rules, read_rules
from peftbench.compare.verdicts import (
    STATUS,
    VERDICTS,
    Comparison,
    LibraryChange,
    Row,
    Side,
    SuiteLine,
    counts_of,
    plain_row,
)
from peftbench.errors import UserError
from peftbench.metrics import METRICS, kind_of, metric_of


@dataclass(frozen=True)
class Timeline:
    """The sessions before the new one in order, and which changes were accepted when.

    `past` is empty where two files are compared. `accepted` has the entry and the index of the
    first session that has it, in past + [new], or in [base, new] where past is empty; `base` and
    `new` are indices of the same list.
    """

    past: list[Session]
    accepted: list[tuple[Acknowledged, int]]
    base: int
    new: int

    def starts(self, pairs: list[Pair], metric: str) -> dict[Key, int]:
        """Where the history of each case begins: at the last change accepted before the base."""
        found: dict[Key, int] = {}
        for pair in pairs:
            row = pair.new
            indices = [
                i for a, i in self.accepted if i <= self.base and a.covers(metric, row.case_id)
            ]
            if indices:
                found[row.case_id, row.case_hash] = max(indices)
        return found

    def reason(self, metric: str, case_id: str) -> str | None:
        """The words of the entry that accepts a change between the base and the new session."""
        for entry, index in self.accepted:
            if self.base < index <= self.new and entry.covers(metric, case_id):
                return f"{entry.reason} ({entry.commit})"
        return None


def compare_paths(
    base: Path, new: Path, history: Path | None, *, strict: bool = False, subject: str | None = None
) -> Comparison:
    """What the command line compares.

    Raises: UserError for anything that cannot be read.
    """
    rules = read_rules(Path.cwd())
    new_session, _ = read_side(new, subject)
    base_session, given = read_base(base, new_session, history, subject)
    return compare(base_session, new_session, given, rules, strict=strict, subject=subject)


def read_base(
    base: Path, new: Session, history: Path | None = None, subject: str | None = None
) -> tuple[Session, list[Session] | None]:
    """(base, history): a base folder is its own history, and its last session before `new` the
    base. The history is None where none is given."""
    session, sessions = read_side(base, subject)
    if sessions:
        # tonight's file may already lie among the others, and later ones too
        others = [s for s in sessions if not same_run(s, new)]
        ordered = in_order([*others, new], subject)
        if ordered[0] is new:
            raise UserError(f"{str(base)!r} has no session before {new.name}")
        session = ordered[ordered.index(new) - 1]
    return session, read_folder(history, subject) if history is not None else sessions or None


def same_run(one: Session, other: Session) -> bool:
    return bool(one.run_ids & other.run_ids)


def compare(
    base: Session,
    new: Session,
    history: list[Session] | None,
    rules: Rules,
    *,
    strict: bool = False,
    subject: str | None = None,
    again: Session | None = None,
) -> Comparison:
    """One row for every case of either side and every metric that is compared.

    `history` None compares two sessions; else those of it that come before the new one count.
    `again` is a second session of suspects, which decides on them.
    """
    timeline = timeline_of(history, base, new, rules, subject)
    rows: list[Row] = []
    pairs: list[Pair] = []
    for left, right in paired_cases(base, new):
        settled, pair = judge_case(left, right, timeline.past, rules)
        rows += settled
        pairs += [] if pair is None else [pair]
    measured, suite = metric_rows(pairs, base, new, timeline, history is not None, rules, again)
    if again is not None:
        second = compare(base, again, history, rules, subject=subject)
        measured = [confirmed_by(row, second) for row in measured]
    ordered = in_report_order([acknowledge(row, timeline) for row in rows + measured])
    return Comparison(
        base=side(base, subject), new=side(new, subject),
        sessions=None if history is None else len(timeline.past),
        libraries=library_changes(base, new),
        suite=tuple(acknowledge_line(line, timeline) for line in suite),
        rows=ordered, notes=tuple(notes(base, new, history, timeline.past)), strict=strict,
        subject=subject, counts=counts_of(ordered),
    )  # fmt: skip


def timeline_of(
    history: list[Session] | None, base: Session, new: Session, rules: Rules, subject: str | None
) -> Timeline:
    """The history's sessions that come before the new one; the base is always one of them."""
    past: list[Session] = []
    if history is not None:
        others = [s for s in history if not same_run(s, new) and not same_run(s, base)]
        ordered = in_order([*others, base, new], subject)
        past = ordered[: ordered.index(new)]
        if base not in past:  # somebody compares backwards
            past.append(base)
    together = [*(past or [base]), new]
    accepted = [(a, first_reached(together, a.commit)) for a in rules.acknowledged]
    return Timeline(past, accepted, together.index(base), len(together) - 1)


def metric_rows(
    pairs: list[Pair],
    base: Session,
    new: Session,
    timeline: Timeline,
    has_history: bool,
    rules: Rules,
    again: Session | None = None,
) -> tuple[list[Row], list[SuiteLine]]:
    """Rows of all metrics of the cases that have numbers on both sides, and the suite's lines.

    What is tested by chance is kept together, for its false discovery rate.
    """
    rows: list[Row] = []
    timed: list[by_time.Predicted] = []
    seeded: list[by_seed.Estimates] = []
    for name in metric_names(row for pair in pairs for row in (pair.base, pair.new)):
        settled, usable = usable_pairs(pairs, name, base, new, rules, has_history)
        rows += settled
        for metric_class, found in usable.items():
            own, of = [pair for pair, _ in found], [rule for _, rule in found]
            sessions, earlier = by_time.history_of(
                own, name, timeline.past, new, timeline.starts(own, name)
            )
            if metric_class == "exact":
                rows += [exact_row(pair, rule) for pair, rule in found]
            elif metric_class == "tight":
                kept = [[r for r in row if r is not None] for row in earlier]
                rows += [tight_row(*f, k) for f, k in zip(found, kept, strict=True)]
            elif metric_class == "seeded":
                seeded.append(by_seed.estimates(of, own, earlier))
            else:
                cases = [by_time.TimedCase(*f, h) for f, h in zip(found, earlier, strict=True)]
                timed.append(by_time.predicted(
                    name, cases, sessions if has_history else None, base, new,
                    rules.session_noise_ratio,
                ))  # fmt: skip
    timed = by_time.with_borrowed_noise(timed)
    rows += by_time.noisy_rows(timed, again) + by_seed.seeded_rows(seeded)
    return rows, by_time.suite_lines(timed) + by_seed.seeded_suite_lines(seeded)


def usable_pairs(
    pairs: list[Pair], name: str, base: Session, new: Session, rules: Rules, has_history: bool
) -> tuple[list[Row], dict[str, list[tuple[Pair, Rule]]]]:
    """(rows of cases without two numbers, the others by the class of the metric)."""
    versions = (base.metric_versions.get(name), new.metric_versions.get(name))
    rows: list[Row] = []
    usable: dict[str, list[tuple[Pair, Rule]]] = {}
    for pair in pairs:
        rule = rules.of(name, pair.new.case_id)
        if kind_of(pair.new.case_id) not in metric_of(name).kinds:
            continue
        if rule.ignore or rule.metric_class not in GATED_CLASSES:
            continue
        if ":" in name and name not in pair.base.task_metrics | pair.new.task_metrics:
            continue  # not a task of this case
        settled = unusable(pair, rule, versions) or disturbed_row(pair, rule, has_history)
        if settled is None:
            usable.setdefault(rule.metric_class, []).append((pair, rule))
        else:
            rows.append(settled)
    return rows, usable


def acknowledge(row: Row, timeline: Timeline) -> Row:
    """The row with the reason of the entry that accepted it."""
    reason = timeline.reason(row.metric, row.case_id) if row.code in (1, 3) else None
    return row if reason is None else replace(row, acknowledged=reason)


def acknowledge_line(line: SuiteLine, timeline: Timeline) -> SuiteLine:
    """Accepted where an entry covers each of its cases."""
    reasons = [timeline.reason(line.metric, case) for case in line.cases]
    return line if None in reasons else replace(line, acknowledged=reasons[0])


def disturbed_row(pair: Pair, rule: Rule, has_history: bool) -> Row | None:
    """Of a time of which one side has disturbed rounds only; a disturbed base matters without a
    history alone."""
    sides = [pair.new] if has_history else [pair.new, pair.base]
    if rule.metric_class != "noisy" or not any(row.is_disturbed for row in sides):
        return None
    reason = "every round of one side was disturbed"
    base, new = value(pair.base, rule.metric), value(pair.new, rule.metric)
    return plain_row(pair.new, rule, "inconclusive", reason, base, new)


CONFIRMED_BY_RERUN = ("noisy", "tight", "seeded")


def doubtful(row: Row) -> bool:
    """Whether a second session could take the row's verdict back."""
    return row.verdict in ("regressed", "suspect") and row.metric_class in CONFIRMED_BY_RERUN


def confirmed_by(row: Row, second: Comparison) -> Row:
    """Of memory and quality: a regression if a second session says so too.

    Times are decided before, on both sessions together.
    """
    if not doubtful(row) or row.metric_class == "noisy":
        return row
    key = (row.case_id, row.case_hash, row.metric)
    other = next((r for r in second.rows if (r.case_id, r.case_hash, r.metric) == key), None)
    if other is None or other.new is None:
        return row
    if doubtful(other):
        return replace(row, verdict="regressed", reason=f"confirmed; {row.reason}")
    reason = f"not confirmed: the second session is {other.verdict}; {row.reason}"
    return replace(row, verdict="inconclusive", reason=reason)


def in_report_order(rows: list[Row]) -> tuple[Row, ...]:
    """What gates first; in a verdict the case with the largest change first; then by name."""
    largest: dict[tuple[str, str, str], float] = {}
    for row in rows:
        key = (row.verdict, row.case_id, row.case_hash)
        size = abs(row.change) if row.change is not None else 0.0
        largest[key] = max(largest.get(key, 0.0), size)
    names = dict.fromkeys([STATUS, *METRICS, *sorted(row.metric for row in rows)])
    position = {name: i for i, name in enumerate(names)}

    def order(row: Row) -> tuple[int, bool, float, str, str, int]:
        size = largest[row.verdict, row.case_id, row.case_hash]
        return (VERDICTS.index(row.verdict), row.acknowledged is not None, -size, row.case_id,
                row.case_hash, position[row.metric])  # fmt: skip

    return tuple(sorted(rows, key=order))


def side(session: Session, subject: str | None) -> Side:
    name = session.name if subject is None else f"{session.name}, {place_name(session, subject)}"
    return Side(name, session.commit, session.dirty, len(session.cases))


def library_changes(base: Session, new: Session) -> tuple[LibraryChange, ...]:
    """Every library whose version or commit differs; "-" where one side has none."""
    found = []
    for name in sorted(base.libraries.keys() | new.libraries.keys()):
        texts = [version_text(s, name) for s in (base, new)]
        if texts[0] != texts[1]:
            found.append(LibraryChange(name, *texts))
    return tuple(found)


def version_text(session: Session, name: str) -> str:
    commit = session.library_commits.get(name)
    return session.libraries.get(name, "-") + (f" ({commit[:7]})" if commit else "")


def notes(
    base: Session, new: Session, history: list[Session] | None, past: list[Session]
) -> list[str]:
    """What a reader should know before the rows."""
    found = []
    if same_run(base, new):
        found.append("base and new are the same run")
    if history is not None and len(past) < len(history):
        found.append(
            f"sessions of the history that do not precede the new one: {len(history) - len(past)}"
        )
    if not new.sentinels or not base.sentinels:
        found.append("no sentinels on one side: the machine's own shift cannot be taken out")
    disturbed = [row.case_id for row in new.cases.values() if row.is_disturbed]
    if disturbed:
        found.append(f"disturbed in every round: {', '.join(sorted(set(disturbed)))}")
    return found
