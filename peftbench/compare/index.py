"""The derived index: what a comparison needs of a result file, kept in the cache by its content.

A result file is immutable and mostly losses, samples and phases; reading two hundred of them takes
tens of seconds. An entry is named by the file's sha256, so it is never out of date, and a cache
that is lost or damaged is made again.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import orjson

from peftbench.compare.load import CaseRow, Round, Session, read_session
from peftbench.data.assets import cache_dir
from peftbench.metrics import METRICS

INDEX_VERSION = 4
OF_SESSION = tuple(f.name for f in fields(Session) if f.name not in ("name", "cases"))
OF_CASE = tuple(f.name for f in fields(CaseRow) if f.name != "rounds")
# mostly the same in many cases
SHARED = ("axes", "environment", "inputs", "null_reasons", "settings")


def read_indexed(path: Path) -> Session:
    """`read_session` through the index.

    Raises: UserError as `read_session` does.
    """
    try:
        content = path.read_bytes()
    except OSError:
        return read_session(path)  # which says what is wrong
    entry = index_folder() / f"{hashlib.sha256(content).hexdigest()}.json"
    try:
        return from_entry(path.name, orjson.loads(entry.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        session = read_session(path)
    with suppress(OSError):  # a cache that cannot be written costs time only
        entry.parent.mkdir(parents=True, exist_ok=True)
        unfinished = entry.with_name(f".{entry.name}.{os.getpid()}")
        # not synchronised with the disk: an entry that a power cut damaged is made again
        unfinished.write_bytes(orjson.dumps(to_entry(session)))
        unfinished.replace(entry)
    return session


def index_folder() -> Path:
    """Entries of other metrics or of another form lie in other folders."""
    return cache_dir() / "index" / kind_of_entries()


@cache
def kind_of_entries() -> str:
    return hashlib.sha256(repr((INDEX_VERSION, *METRICS)).encode()).hexdigest()[:12]


def to_entry(session: Session) -> dict[str, Any]:
    """Facts and rounds as lists; what many cases share is written once, a round's names as well."""
    shared: list[Any] = []
    place: dict[bytes, int] = {}

    def index(value: dict[str, str] | list[str]) -> int:
        text = orjson.dumps(value)
        if text not in place:
            place[text] = len(shared)
            shared.append(value)
        return place[text]

    cases = []
    for row in session.cases.values():
        facts = [index(getattr(row, n)) if n in SHARED else getattr(row, n) for n in OF_CASE]
        cases.append([facts, [
            [r.run_id, r.seed, r.disturbed, index([*r.values]), [*r.values.values()], r.broken,
             r.outcomes]
            for r in row.rounds
        ]])  # fmt: skip
    return {
        "session": {n: getattr(session, n) for n in OF_SESSION}, "shared": shared, "cases": cases
    }  # fmt: skip


def from_entry(name: str, entry: dict[str, Any]) -> Session:
    shared, cases = entry["shared"], {}
    for facts, rounds in entry["cases"]:
        given = dict(zip(OF_CASE, facts, strict=True))
        for key in SHARED:
            given[key] = shared[given[key]]
        given["rounds"] = tuple(round_from(r, shared) for r in rounds)
        row = CaseRow(**given)
        cases[row.case_id, row.case_hash] = row
    return Session(name=name, cases=cases, **entry["session"])


def round_from(entry: list[Any], shared: list[Any]) -> Round:
    run_id, seed, disturbed, names, values, broken, outcomes = entry
    known = dict(zip(shared[names], values, strict=True))
    return Round(run_id, seed, disturbed, known, broken, outcomes)
