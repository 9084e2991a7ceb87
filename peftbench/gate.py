"""The comparison at a pytest session's end: `--compare-to`, `--fail-on-regression`, `--confirm`.

Everything is measured and written before it begins. Suspects run again in fresh children, in a run
folder inside the session's own; their rounds decide and are no part of the run's JSON.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from peftbench.case import Case
from peftbench.errors import UserError
from peftbench.record import dumps, write_atomically
from peftbench.rounds import CaseRounds
from peftbench.session import Session
from peftbench.worker import RoundStoppedError

VERDICTS_FILE = "verdicts"
USAGE_ERROR = 2


@dataclass(frozen=True)
class Verdict:
    """What the terminal shows and pytest's exit code is made of."""

    lines: list[str]
    exit_code: int
    file: Path | None


def add_options(group: Any) -> None:
    group.addoption(
        "--compare-to", metavar="FILE|DIR",
        help="compare with an earlier result file, or with a folder of them as the history",
    )  # fmt: skip
    group.addoption(
        "--fail-on-regression", action="store_true", help="a verdict that gates fails the session"
    )
    group.addoption(
        "--confirm", action="store_true",
        help="run suspects and regressions again in fresh processes, and decide on both",
    )  # fmt: skip


def check_options(config: pytest.Config) -> None:
    """Raises: UserError for options that mean nothing, before anything is measured."""
    target = config.getoption("compare_to")
    if target is None:
        for name in ("fail_on_regression", "confirm"):
            if config.getoption(name):
                raise UserError(f"--{name.replace('_', '-')} needs --compare-to FILE or DIR")
        return
    # numpy and scipy: only for those who compare
    from peftbench.compare.order import read_side
    from peftbench.compare.rules import read_rules

    read_side(Path(target))
    read_rules(Path.cwd())


def judge(config: pytest.Config, ours: Session, cases: list[Case], data: dict[str, Any]) -> Verdict:
    """Compare the session that has just ended.

    `cases` are all of the selection, of which pytest may have deselected some; `data` is what the
    run's JSON holds under `peftbench`.
    """
    from peftbench.compare.as_json import json_text
    from peftbench.compare.compare import compare, doubtful, read_base
    from peftbench.compare.load import session_of
    from peftbench.compare.markdown import markdown_text
    from peftbench.compare.rules import read_rules
    from peftbench.compare.text import text_lines

    rules, new = read_rules(Path.cwd()), session_of("this run", plain(ours, data))
    base, history = read_base(Path(config.getoption("compare_to")), new)
    base, left_out = without_deselected(base, cases, {row["case_id"] for row in ours.rows})
    found = compare(base, new, history, rules)
    if config.getoption("confirm"):
        wanted = {(r.case_id, r.case_hash) for r in found.rows if doubtful(r)}
        again = [c for c in cases if (c.id, c.hash) in wanted]
        if again:
            second = run_again(ours, again)
            if any(row["status"] == "ok" for row in second.rows):
                seen = session_of("second session", plain(second, data | {"cases": []}))
                found = compare(base, new, history, rules, again=seen)
    if left_out:
        found = replace(found, notes=(*found.notes, f"not run, so not compared: {left_out}"))
    written(config, ours, "md", markdown_text(found))
    file = written(config, ours, "json", json_text(found))
    lines = text_lines(found)
    if found.exit_code != 0 and not config.getoption("fail_on_regression"):
        lines.append("(of `peftbench compare`: without --fail-on-regression no session fails)")
    return Verdict(lines, found.exit_code, file)


def plain(ours: Session, data: dict[str, Any]) -> dict[str, Any]:
    """The session as its JSON file holds it."""
    rows = [{"extra_info": row} for row in ours.rows if row["status"] == "ok"]
    found: dict[str, Any] = json.loads(dumps({"peftbench": data, "benchmarks": rows}))
    return found


def without_deselected(base: Any, cases: list[Case], ran: set[str]) -> tuple[Any, str]:
    """(the base without cases that the user deselected with -k, their names)."""
    deselected = {case.id for case in cases} - ran
    kept = {key: row for key, row in base.cases.items() if key[0] not in deselected}
    gone = sorted({key[0] for key in base.cases} & deselected)
    return replace(base, cases=kept), ", ".join(gone)


def run_again(ours: Session, cases: list[Case]) -> Session:
    """A second session of some cases; those that fail this time have no record in it."""
    second = Session(ours.folder, ours.progress, ours.rounds, ours.time_limit_s)
    second._bases = ours._bases  # scored once is enough: the base has not changed since
    for case in cases:
        try:
            with CaseRounds(second, case) as rounds:
                for _ in range(second.rounds):
                    rounds.setup()
                    rounds.train()
                    rounds.teardown()
                second.finish(rounds.record())
        except RoundStoppedError as stop:
            second.finish(second.stopped(case, stop.outcome))
    return second


def json_path(config: pytest.Config) -> Path | None:
    """Where `--benchmark-json` writes, be it a path or pytest-benchmark's open file by now."""
    target = config.getoption("benchmark_json", None)
    if target is None:
        return None
    return Path(target if isinstance(target, (str, os.PathLike)) else target.name)


def written(config: pytest.Config, ours: Session, form: str, text: str) -> Path:
    """The verdicts beside the run's JSON (`run.verdicts.json`), else in the run's folder."""
    run = json_path(config)
    if run is None:
        path = ours.folder / f"{VERDICTS_FILE}.{form}"
    else:
        path = run.with_name(f"{run.stem}.{VERDICTS_FILE}.{form}")
    write_atomically(path, text)
    return path
