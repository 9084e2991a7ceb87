"""Result files and folders -> parts: sessions of the same cases, oldest first, of which the newest
is shown and compared with the one before it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftbench.compare.compare import compare
from peftbench.compare.history import History, history_of
from peftbench.compare.index import read_indexed
from peftbench.compare.load import CaseRow, Session, read_session
from peftbench.compare.order import files_below, in_order, joined, without_copies
from peftbench.compare.rules import Rules
from peftbench.compare.verdicts import Comparison
from peftbench.result_files import case_records, read_json

READ_WHOLE = 20  # more files than these go through the index, as `peftbench history` reads them
SAME_CASES_SHARE = 0.5  # of the larger session's case ids


@dataclass(frozen=True)
class Part:
    """Sessions of the same cases. `records` has the raw record of each case of the newest one."""

    sessions: tuple[Session, ...]
    records: dict[tuple[str, str], dict[str, Any]]
    comparison: Comparison | None  # None: there is one session alone
    history: History | None

    @property
    def newest(self) -> Session:
        return self.sessions[-1]


def read_parts(paths: list[Path], rules: Rules, subject: str | None = None) -> list[Part]:
    """Every part of the files, in the order of their newest sessions.

    Raises: UserError for what is missing, no result file, or damaged.
    """
    files = result_files(paths)
    read = read_session if len(files) <= READ_WHOLE else read_indexed
    sessions = in_order(joined(without_copies([read(f) for f in files])), subject)
    by_name: dict[str, list[Path]] = {}
    for file in files:
        by_name.setdefault(file.name, []).append(file)
    return [part_of(group, by_name, rules, subject) for group in grouped(sessions)]


def result_files(paths: Iterable[Path]) -> list[Path]:
    """The files themselves, and every result file below a folder; each once."""
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            found[path.resolve()] = path
            continue
        found |= {f.resolve(): f for f in files_below(path)}
    return list(found.values())


def grouped(sessions: list[Session]) -> list[list[Session]]:
    """Sessions of the same cases together; `sessions` is in order, and so is each group."""
    groups: list[list[int]] = []
    for place, session in enumerate(sessions):
        own = [any(same_cases(session, sessions[i]) for i in group) for group in groups]
        together = [i for group, is_own in zip(groups, own, strict=True) if is_own for i in group]
        groups = [group for group, is_own in zip(groups, own, strict=True) if not is_own]
        groups.append([*sorted(together), place])
    return [[sessions[i] for i in group] for group in groups]


def same_cases(one: Session, other: Session) -> bool:
    """A case in common; or, where every case was redefined, most of the names."""
    if one.cases.keys() & other.cases.keys():
        return True
    ids, others = ({key[0] for key in s.cases} for s in (one, other))
    return len(ids & others) >= SAME_CASES_SHARE * max(len(ids), len(others))


def part_of(
    sessions: list[Session], by_name: dict[str, list[Path]], rules: Rules, subject: str | None
) -> Part:
    newest = sessions[-1]
    comparison = history = None
    if len(sessions) > 1:
        earlier = sessions if len(sessions) > 2 else None
        comparison = compare(sessions[-2], newest, earlier, rules, subject=subject)
        cases = {key[0] for key in newest.cases}
        history = history_of(sessions, rules, cases, None, subject)
    paths = [p for name in newest.name.split(" + ") for p in by_name[name]]
    return Part(tuple(sessions), records_of(newest, paths), comparison, history)


def records_of(session: Session, paths: list[Path]) -> dict[tuple[str, str], dict[str, Any]]:
    """The raw record of each case of a session, out of the files that may hold it.

    A comparison's rows have no samples, losses or phases.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for path in paths:
        for record in case_records(read_json(path)):
            key = (str(record.get("case_id")), str(record.get("case_hash")))
            row = session.cases.get(key)
            if row is not None and is_record_of(record, row) and key not in found:
                found[key] = record
    return {key: found.get(key, {}) for key in session.cases}


def is_record_of(record: dict[str, Any], row: CaseRow) -> bool:
    """Files of one name may be of several runs."""
    runs = {r.run_id for r in row.rounds}
    own = str(record.get("run_id") or "?")
    return record.get("status") == row.status and (not runs or own in runs)
