"""A comparison for a CI job's summary: regressions first, the rest folded, at most 1 MiB."""

from __future__ import annotations

import html
import re

from peftbench.compare.text import (
    LISTED,
    MEANING,
    cells,
    exit_text,
    headcount,
    side_text,
    suite_text,
    verdict_text,
    without_whole,
)
from peftbench.compare.verdicts import VERDICTS, Comparison, Row

MOST_BYTES = 2**20  # what a CI service shows of a summary
OPEN = ("regressed", "changed", "failed", "missing", "incomparable", "redefined", "invalid")
OPEN_ROWS = 50  # of one verdict, before its fold
HEADER = (
    "| case | metric | base | new | change | 90 % interval | detects | why |\n"
    "|---|---|--:|--:|--:|--:|--:|---|"
)
TAIL = "\n\n*{} rows are left out: a summary holds 1 MiB. The JSON has them all.*\n"


def markdown_text(found: Comparison) -> str:
    """The whole summary; details are cut at the end where it would be too long."""
    parts = [head(found)]
    folded: list[Row] = []
    for verdict in VERDICTS:
        rows = [row for row in found.rows if row.verdict == verdict]
        if verdict in OPEN and rows:
            listed = without_whole(rows)
            parts.append(section(verdict, rows, listed[:OPEN_ROWS]))
            folded += listed[OPEN_ROWS:]
        else:
            folded += rows
    text = "\n\n".join(parts)
    return text + details(folded, MOST_BYTES - len(text.encode()) - 200)


def head(found: Comparison) -> str:
    passed = "passed" if found.exit_code == 0 else "failed"
    history = "none" if found.sessions is None else f"{found.sessions} sessions"
    lines = [
        f"## peftbench: {passed} (exit code {found.exit_code}: {exit_text(found)})",
        "",
        f"**{escaped(verdict_text(found))}**",
        "",
        f"- base: {escaped(side_text(found.base))}",
        f"- new: {escaped(side_text(found.new))}",
        f"- history: {history}",
    ]
    changed = ", ".join(f"{c.name} {c.base} → {c.new}" for c in found.libraries)
    lines.append(f"- changed libraries: {escaped(changed) or 'none'}")
    lines += [f"- note: {escaped(note)}" for note in found.notes]
    lines += [f"- **suite regressed**: {escaped(suite_text(line))}" for line in found.suite]
    return "\n".join(lines)


def section(verdict: str, rows: list[Row], shown: list[Row]) -> str:
    title = f"### {verdict} ({headcount(rows)})\n\n{MEANING[verdict]}\n"
    return "\n".join([title, HEADER, *(row_text(row) for row in shown)])


def details(rows: list[Row], room_bytes: int) -> str:
    """The rest in folds of one verdict each, as far as the room goes."""
    out, left_out = [], 0
    for verdict in VERDICTS:
        own = [row for row in rows if row.verdict == verdict]
        if not own:
            continue
        start = (
            f"\n\n<details><summary>{verdict} ({headcount(own)}): {MEANING[verdict]}</summary>\n\n"
            f"{HEADER}\n"
        )
        end = "\n</details>"
        room_bytes -= len((start + end).encode())
        lines = []
        for row in without_whole(own) if verdict in LISTED else own:
            line = row_text(row) + "\n"
            room_bytes -= len(line.encode())
            if room_bytes < 0:
                left_out += 1
            else:
                lines.append(line)
        if lines:
            out.append(start + "".join(lines) + end)
    return "".join(out) + (TAIL.format(left_out) if left_out else "\n")


def row_text(row: Row) -> str:
    texts = [row.case_id, row.metric, *cells(row)]
    return "| " + " | ".join(escaped(text) for text in texts) + " |"


def escaped(text: str) -> str:
    """Text from a file as text: no tag, no link, no column, no line of its own."""
    plain = "".join(c if c.isprintable() else " " for c in text)
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", html.escape(plain, quote=False))
