"""A comparison as a person reads it in a terminal of 120 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from peftbench.compare.rules import default_rule
from peftbench.compare.verdicts import (
    STATUS,
    VERDICTS,
    Comparison,
    Row,
    Side,
    SuiteLine,
)
from peftbench.metrics import METRICS
from peftbench.progress import counted
from peftbench.show import commit_text, quantity
from peftbench.summary import table

WIDTH = 118
MOST_ROWS = 24  # of one verdict, unless all are asked for
LISTED = VERDICTS[: VERDICTS.index("inconclusive")]  # the rest is counted
WHOLE_CASE = ("failed", "missing", "incomparable", "redefined", "invalid", "new")
MEANING = {
    "regressed": "worse, beyond the margin and beyond chance",
    "changed": "must be equal, and is not",
    "failed": "did not end ok",
    "missing": "was there, is not any more",
    "incomparable": "measured on another machine",
    "redefined": "another case or metric under the same name",
    "invalid": "no number to compare",
    "suspect": "1 case of 20 has this by chance; decide with `pytest bench --confirm`",
    "no-history": "too few sessions to judge a time",
    "improved": "better, beyond the margin and beyond chance",
    "new": "nothing to compare with",
    "inconclusive": "a difference beyond the margin cannot be excluded",
    "unchanged": "within the margin",
}


def text_lines(found: Comparison, *, every_row: bool = False) -> list[str]:
    """Regressions first; what is unchanged or inconclusive is counted, not listed."""
    lines = [*head_lines(found), *wrapped(verdict_text(found), "result     "), ""]
    for line in found.suite:
        lines += [*wrapped(suite_text(line), "suite regressed  "), ""]
    for verdict in VERDICTS if every_row else LISTED:
        rows = [row for row in found.rows if row.verdict == verdict]
        if rows:
            lines += [*section_lines(verdict, rows, every_row), ""]
    if not every_row:
        lines += [*counted_lines(found), ""]
    lines += wrapped(exit_text(found), f"exit code {found.exit_code}: ")
    return ["".join(c if c.isprintable() else "?" for c in line).rstrip() for line in lines]


def head_lines(found: Comparison) -> list[str]:
    """What is compared with what, and what differs between them."""
    history = "none: two sessions alone" if found.sessions is None else f"{found.sessions} sessions"
    libraries = ", ".join(f"{c.name} {c.base} -> {c.new}" for c in found.libraries)
    return [
        f"base       {side_text(found.base)}",
        f"new        {side_text(found.new)}",
        f"history    {history}",
        *wrapped(libraries or "no library", "changed    "),
        *(line for note in found.notes for line in wrapped(note, "note       ")),
    ]


def side_text(side: Side) -> str:
    cases = counted(side.cases, "case")
    return f"{side.name}, {commit_text(side.commit, side.dirty)}, {cases}"


def verdict_text(found: Comparison) -> str:
    """One sentence: what a nightly's subject line would say."""
    parts = [f"{len(found.suite)} suite regressed"] if found.suite else []
    accepted = sum(row.acknowledged is not None for row in found.rows)
    for verdict in VERDICTS:
        rows = [r for r in found.rows if r.verdict == verdict and r.acknowledged is None]
        if rows:
            parts.append(f"{headcount(rows)} {verdict}")
    if accepted:
        parts.append(f"{accepted} acknowledged")
    return ", ".join(parts) or "nothing compared"


def exit_text(found: Comparison) -> str:
    """Why the exit code is what it is."""
    code = found.exit_code
    if code == 0:
        strict = any(row.code == 4 for row in found.rows) and not found.strict
        return "nothing gates" + (" (with --strict it would be 4)" if strict else "")
    gating = sorted({r.verdict for r in found.rows if r.code == code}, key=VERDICTS.index)
    if code == 1 and any(line.acknowledged is None for line in found.suite):
        gating.insert(0, "suite regressed")
    return ", ".join(gating)


def headcount(rows: list[Row]) -> int:
    """Cases, where the verdict is about whole cases; else a metric of a case each."""
    whole = whole_cases(rows)
    return len(whole) + sum(
        row.metric != STATUS and (row.case_id, row.case_hash) not in whole for row in rows
    )


def whole_cases(rows: list[Row]) -> set[tuple[str, str]]:
    """The cases of which the status has the rows' verdict, where that says all there is."""
    return {
        (r.case_id, r.case_hash) for r in rows if r.metric == STATUS and r.verdict in WHOLE_CASE
    }


def without_whole(rows: list[Row]) -> list[Row]:
    """A case that has one verdict in all of its metrics is one row."""
    whole = whole_cases(rows)
    return [r for r in rows if r.metric == STATUS or (r.case_id, r.case_hash) not in whole]


def suite_text(line: SuiteLine) -> str:
    """Where it is worse, by adapter, method and model; by case where no axis tells cases apart."""
    accepted = f"; acknowledged: {line.acknowledged}" if line.acknowledged else ""
    is_difference = default_rule(line.metric).is_difference
    axes = [
        f"{axis}: " + ", ".join(f"{s.name} {s.worse}/{s.of}" for s in line.shares if s.axis == axis)
        for axis in dict.fromkeys(s.axis for s in line.shares)
    ]
    where = "; ".join(axes) or ", ".join(line.cases)
    return (
        f"{line.metric} {signed(line.change, is_difference)} in {len(line.cases)} of {line.of}"
        f" cases; {line.reason}; {where}{accepted}"
    )


def section_lines(verdict: str, rows: list[Row], every_row: bool) -> list[str]:
    """One verdict: a table of numbers by case, or a line a case where the whole case has it."""
    whole = whole_cases(rows)
    of_metrics = [r for r in rows if (r.case_id, r.case_hash) not in whole]
    lines = [f"{verdict.upper()} ({headcount(rows)}): {MEANING[verdict]}"]
    for row in rows:
        if row.metric == STATUS and (row.case_id, row.case_hash) in whole:
            lines += wrapped(row.reason + acknowledged_text(row), f"  {row.case_id}  ")
    shown = of_metrics if every_row else of_metrics[:MOST_ROWS]
    if shown:
        lines += [f"  {line}" for line in row_table(shown)]
    if len(shown) < len(of_metrics):
        lines.append(f"  ... and {len(of_metrics) - len(shown)} more (--all)")
    return lines


HEADER = ["case and metric", "base", "new", "change", "90 % interval", "detects", "why"]


def row_table(rows: list[Row]) -> list[str]:
    """The rows under their case's name; a reason that does not fit goes on below itself."""
    grid: list[list[str]] = []
    case = None
    plain = [["  " + row.metric.removesuffix("_bytes"), *cells(row)] for row in rows]
    widths = [max(len(r[i]) for r in [HEADER, *plain]) for i in range(len(HEADER) - 1)]
    room = max(WIDTH - 2 - sum(widths) - 2 * len(widths), 28)
    for row, texts in zip(rows, plain, strict=True):
        if (row.case_id, row.case_hash) != case:
            case = (row.case_id, row.case_hash)
            grid.append([row.case_id])
        first, *more = folded(texts[-1], room)
        grid.append([*texts[:-1], first])
        grid += [[*[""] * (len(HEADER) - 1), line] for line in more]
    names = {line[0] for line in grid if len(line) == 1}
    full = [line if len(line) > 1 else [*[""] * (len(HEADER) - 1), line[0]] for line in grid]
    lines = table(HEADER, full)
    return lines[:1] + [name if (name := line.strip()) in names else line for line in lines[2:]]


def folded(text: str, room: int) -> list[str]:
    """Lines of at most `room` characters; a number and its unit stay together."""
    joined = text.replace(" %", "\0%").replace(" pp", "\0pp")
    lines = textwrap.wrap(joined, room, break_on_hyphens=False) or [""]
    return [line.replace("\0", " ") for line in lines]


def cells(row: Row) -> list[str]:
    """What every format says of a row after its name: base, new, change, interval, detects, why."""
    return [
        number(row.base, row.unit),
        number(row.new, row.unit),
        "" if row.change is None else signed(row.change, row.is_difference),
        interval(row),
        detects(row),
        row.reason + acknowledged_text(row),
    ]


def acknowledged_text(row: Row) -> str:
    return "" if row.acknowledged is None else f" [acknowledged: {row.acknowledged}]"


def number(value: float | str | None, unit: str) -> str:
    """As `peftbench show` writes it, without the units that the metric's name says."""
    if value is None or isinstance(value, str):
        return value or "-"
    told = unit in ("s", "bytes", "ratio", "J", "FLOP")
    return quantity(value, unit if told else "1")


def signed(change: float, is_difference: bool) -> str:
    """+10.2 %, or +1.2 pp for accuracies; a factor where a per cent says little."""
    if is_difference:
        return f"{100 * change:+.2f} pp"
    if abs(change) >= 10:
        return f"x {1 + change:,.3g}"
    return f"{100 * change:+.{1 if abs(change) >= 0.001 or change == 0 else 3}f} %"


def interval(row: Row) -> str:
    if row.low is None or row.high is None:
        return ""
    if not row.is_difference and abs(row.change or 0) >= 10:
        return f"x {1 + row.low:,.3g} to {1 + row.high:,.3g}"
    unit = "pp" if row.is_difference else "%"
    return f"{100 * row.low:+.1f} to {100 * row.high:+.1f} {unit}"


def detects(row: Row) -> str:
    if row.minimum_detectable is None:
        return ""
    size = 100 * row.minimum_detectable
    unit = "pp" if row.is_difference else "%"
    return f"{size:.0f} {unit}" if size >= 10 else f"{size:.2g} {unit}"


def counted_lines(found: Comparison) -> list[str]:
    """The verdicts that are not listed, by metric, with what they could not have seen."""
    lines = []
    for verdict in VERDICTS[len(LISTED) :]:
        rows = [row for row in found.rows if row.verdict == verdict and row.metric != STATUS]
        absent = {r.metric for r in rows if r.base is None and r.new is None}
        names = list(dict.fromkeys([*METRICS, *sorted(r.metric for r in rows)]))
        groups = {n: [r for r in rows if r.metric == n] for n in names}
        texts = [metric_count(n, group) for n, group in groups.items() if group and n not in absent]
        label = f"{verdict.upper()} ({len(rows)}): {MEANING[verdict]}"
        if rows:
            lines += [label, *wrapped("; ".join(texts), "  ")]
        if absent:
            listed = ", ".join(n for n in names if n in absent)
            lines += wrapped(listed, "  not measured on either side: ")
    return lines


def metric_count(name: str, rows: Sequence[Row]) -> str:
    reach = [r for r in rows if r.minimum_detectable is not None]
    text = f"{name} {len(rows)}"
    if not reach or rows[0].metric_class in ("exact", "tight"):
        return text
    best = min(reach, key=lambda r: r.minimum_detectable or 0)
    worst = max(reach, key=lambda r: r.minimum_detectable or 0)
    ends = list(dict.fromkeys([detects(best), detects(worst)]))
    return f"{text} (detects {' to '.join(ends)})"


def wrapped(text: str, label: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=label, subsequent_indent=" " * len(label),
        break_on_hyphens=False,
    ) or [label]  # fmt: skip
