"""Sessions of a folder, in the order of their commits.

Files of one commit whose cases do not overlap are one session (a matrix that was split over jobs);
files whose cases overlap are sessions of their own (a commit that was run again). The same run and
round counts once, however often its file was copied.
"""

from __future__ import annotations

import gc
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from packaging.version import InvalidVersion, Version

from peftbench.compare.index import read_indexed
from peftbench.compare.load import (
    OTHER_SCHEMAS,
    CaseRow,
    Key,
    Session,
    merged,
    read_session,
)
from peftbench.errors import UserError
from peftbench.result_files import GIVE, read_json
from peftbench.trackers import FOLDERS

SPLIT_WITHIN_S = 24 * 3600.0  # jobs of one matrix start within a day of each other


def read_folder(folder: Path, subject: str | None = None) -> list[Session]:
    """All sessions below a folder, oldest commit first.

    Raises: UserError for a file that is not ours, and for a folder without any.
    """
    if not folder.is_dir():
        what = "is a file" if folder.is_file() else "is no folder"
        raise UserError(f"{str(folder)!r} {what}; give a folder of files of `pytest bench`")
    with collection_paused():
        sessions = [read_indexed(file) for file in files_below(folder)]
    return in_order(joined(without_copies(sessions)), subject)


@contextmanager
def collection_paused() -> Iterator[None]:
    """For millions of objects without cycles: the collector walks through all, again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def files_below(folder: Path) -> list[Path]:
    """Every result file below a folder, sorted. Raises: UserError where there is none."""
    files = [
        f for f in sorted(folder.rglob("*.json"))
        if not f.name.startswith(".") and set(FOLDERS).isdisjoint(f.relative_to(folder).parts)
    ]  # fmt: skip
    found = [f for f in files if not is_no_result(f)]
    if not found:
        raise UserError(f"{str(folder)!r} has no result file; {GIVE}")
    return found


def is_no_result(path: Path) -> bool:
    """Ours, of another kind. Told by its first bytes: a result is not read twice for it."""
    with path.open("rb") as file:
        start = file.read(200)
    told = any(f'"schema": "{schema}"'.encode() in start for schema in OTHER_SCHEMAS)
    return told and isinstance(read_json(path), dict)


def read_side(path: Path, subject: str | None = None) -> tuple[Session, list[Session]]:
    """One side of a comparison: the session of a file, or a folder's newest.

    The second value has all sessions of the folder, the newest included; [] for a file.
    """
    if path.is_dir():
        sessions = read_folder(path, subject)
        return sessions[-1], sessions
    return read_session(path), []


def without_copies(sessions: list[Session]) -> list[Session]:
    """Each round of a run once: rounds that an earlier session has are taken out of a later one."""
    seen: set[tuple[str, Key, int]] = set()
    kept = []
    for session in sorted(sessions, key=lambda s: (s.time_unix_s, s.name)):
        cases = {}
        for key, row in session.cases.items():
            fresh = new_rounds(row, key, seen)
            if fresh is not None:
                cases[key] = fresh
        if cases:
            kept.append(replace(session, cases=cases))
    return kept


def new_rounds(row: CaseRow, key: Key, seen: set[tuple[str, Key, int]]) -> CaseRow | None:
    """The row with the rounds not seen yet; None if all of its rounds were."""
    if not row.rounds:
        return row
    fresh = tuple(r for r in row.rounds if r.run_id == "?" or (r.run_id, key, r.seed) not in seen)
    seen.update((r.run_id, key, r.seed) for r in fresh)
    if len(fresh) == len(row.rounds):
        return row
    return replace(row, rounds=fresh) if fresh else None


def joined(sessions: list[Session]) -> list[Session]:
    """Parts of one session put together; `sessions` is in the order of time."""
    groups: list[list[Session]] = []
    for session in sessions:
        group = next((g for g in groups if belongs(session, g)), None)
        if group is None:
            groups.append([session])
        else:
            group.append(session)
    return [g[0] if len(g) == 1 else merged(g) for g in groups]


def belongs(session: Session, group: list[Session]) -> bool:
    first = group[0]
    return (
        session.commit is not None
        and session.commit == first.commit
        and not (session.dirty or first.dirty)
        and session.libraries == first.libraries
        and session.time_unix_s - first.time_unix_s <= SPLIT_WITHIN_S
        and all(session.cases.keys().isdisjoint(other.cases) for other in group)
    )


def in_order(sessions: list[Session], subject: str | None = None) -> list[Session]:
    """By commit topology, by time where that is unknown; with a subject by its version, then time.

    Sessions whose commit this repository knows take their places among themselves by topology; the
    others stand where their time puts them.
    """
    by_time = sorted(sessions, key=lambda s: (s.time_unix_s, s.name))
    if subject is not None:
        missing = [s.name for s in by_time if subject not in s.libraries]
        if missing:
            known = sorted({name for s in by_time for name in s.libraries})
            raise UserError(
                f"{missing[0]} does not name a version of {subject!r}; it can be one of:"
                f" {', '.join(known) or 'none'}"
            )
        return by_version(by_time, subject)
    position = topology({s.commit for s in by_time if s.commit is not None})
    places = [i for i, s in enumerate(by_time) if s.commit in position]
    known_ones = sorted(
        (by_time[i] for i in places), key=lambda s: (position[str(s.commit)], s.time_unix_s, s.name)
    )
    for place, session in zip(places, known_ones, strict=True):
        by_time[place] = session
    return by_time


def by_version(sessions: list[Session], subject: str) -> list[Session]:
    """Stable: sessions of one version, such as a development version's, keep their order in time.

    Where a version is not of the standard's form the whole order is that of time.
    """
    try:
        return sorted(sessions, key=lambda s: Version(s.libraries[subject]))
    except InvalidVersion:
        return sessions


def topology(commits: set[str]) -> dict[str, int]:
    """Position of each commit, given whole or abbreviated, that the working folder's repository
    knows; {} without a repository."""
    wanted = sorted(c for c in commits if c and not c.startswith("-") and "\n" not in c)
    if not wanted:
        return {}
    found = _git(["cat-file", "--batch-check=%(objectname) %(objecttype)"], "\n".join(wanted))
    whole = {
        short: line.split()[0]
        for short, line in zip(wanted, found, strict=False)
        if line.endswith(" commit")
    }
    if not whole:
        return {}
    ancestors = _git(
        ["rev-list", "--topo-order", "--reverse", "--stdin"], "\n".join(whole.values())
    )
    position = {commit: i for i, commit in enumerate(ancestors)}
    return {short: position[full] for short, full in whole.items() if full in position}


def _git(arguments: list[str], given: str) -> list[str]:
    try:
        return subprocess.run(
            ["git", *arguments], input=given + "\n", capture_output=True, text=True, check=True,
            timeout=30,
        ).stdout.splitlines()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return []


def place_name(session: Session, subject: str | None = None) -> str:
    """How a range names this session: its commit, or the subject's version and commit."""
    if subject is not None:
        commit = session.library_commits.get(subject)
        return f"{subject} {session.libraries[subject]}" + (f" ({commit[:7]})" if commit else "")
    if session.commit is None:
        return session.name
    return session.commit[:7] + ("+changes" if session.dirty else "")


def first_reached(sessions: list[Session], commit: str) -> int:
    """Index of the first session that has a commit, by topology where git knows it, else by name.

    `commit` may be `library==version`. The number of sessions where none has it.
    """
    library, _, version = commit.partition("==")
    if version:
        having = [s.libraries.get(library) == version for s in sessions]
    else:
        position = topology({commit, *(s.commit for s in sessions if s.commit)})
        at = position.get(commit)
        having = [
            (s.commit or "").startswith(commit)
            or (at is not None and position.get(s.commit or "", -1) >= at)
            for s in sessions
        ]
    return having.index(True) if True in having else len(sessions)
