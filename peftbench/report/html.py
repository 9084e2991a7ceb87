"""READ THIS FIRST: parts become a context, the context a page, the page one file.

Text from records reaches the page in three ways only, each of which makes it harmless: jinja2's
autoescape, `script_json`, and in the scripts `plotText`. A content security policy forbids the
page every request, and every script that is not one of ours by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from peftbench import __version__
from peftbench.compare.order import place_name
from peftbench.compare.rules import read_rules
from peftbench.errors import UserError
from peftbench.progress import counted
from peftbench.record import write_atomically
from peftbench.report.cases import MEMORY, Case, cases_of
from peftbench.report.changes import changes_of
from peftbench.report.figures import figure_data
from peftbench.report.marks import Mark, family, marks_of, svg
from peftbench.report.origin import origin_of
from peftbench.report.samples import samples_of
from peftbench.report.sources import Part, read_parts
from peftbench.report.sparklines import sparklines_of
from peftbench.report.table import COLUMNS, cells, change_of, definition
from peftbench.report.takeaways import QUESTIONS, statuses, what_fits, winners
from peftbench.result_files import reading
from peftbench.show import quantity
from peftbench.summary import INFERENCE_HEADER, inference_cells, inference_notes

SCRIPTS = ("common.js", "table.js", "figures.js")


def write_report(
    files: list[Path], output: Path, subject: str | None = None, memory_bytes: int | None = None
) -> str:
    """Write the page; a line that says where it is, how large, and what it holds.

    With `memory_bytes` the page names the best cases whose peak fits into it.
    Raises: UserError for a file that cannot be read, or an output that cannot be written.
    """
    parts = read_parts(files, read_rules(Path.cwd()), subject)
    with reading(*files):  # what a comparison needs is checked: not samples, curves and phases
        found = context(parts, subject, memory_bytes)
    text = page(found)
    try:
        write_atomically(output, text)
    except OSError as error:
        raise UserError(f"cannot write {str(output)!r} ({error.strerror})") from None
    cases = sum(len(part.newest.cases) for part in parts)
    sessions = sum(len(part.sessions) for part in parts)
    size = len(text.encode()) / 2**20
    return f"wrote {output}: {counted(cases, 'case')} of {counted(sessions, 'session')}," \
        f" {size:.1f} MiB"  # fmt: skip


def page(found: dict[str, Any]) -> str:
    """The whole file, of what `context` found."""
    plotly = get_plotlyjs().replace("</script", "<\\/script")
    own = "\n".join(asset(name) for name in SCRIPTS)
    env = Environment(
        loader=PackageLoader("peftbench.report", "page"), autoescape=True, finalize=harmless,
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    env.filters |= {"svg": svg, "groupby_family": by_family, "counted": counted}
    return env.get_template("page.html").render(
        found,
        style=Markup(asset("style.css")),
        plotly=Markup(plotly),
        script=Markup(own),
        hashes=Markup(" ".join(f"'{script_hash(text)}'" for text in (plotly, own))),
    )


def context(
    parts: list[Part], subject: str | None = None, memory_bytes: int | None = None
) -> dict[str, Any]:
    """What the template shows, by section."""
    by_part = [cases_of(part) for part in parts]
    cases = [case for own in by_part for case in own]
    trained = [case for case in cases if not case.is_inference]
    answered = [case.record for case in cases if case.is_inference]
    several = len(parts) > 1
    rows = [
        (
            case,
            cells(case),
            change_of(case, part.comparison),
            place_name(part.newest, subject) if several else "",
        )
        for part, own in zip(parts, by_part, strict=True)
        for case in own
        if not case.is_inference
    ]
    marks = marks_of(case.adapter for case in cases)
    return {
        "version": __version__,
        "cases": cases,
        "axes": {
            "model": names_of(cases, "model"),
            "adapter": list(marks),
            "method": names_of(cases, "method"),
        },
        "marks": marks,
        "statuses": statuses(cases),
        "failed": [case for case in cases if case.status != "ok"],
        "questions": QUESTIONS,
        "winners": winners(trained),
        "memory": None if memory_bytes is None else quantity(memory_bytes, "bytes"),
        "fitting": [] if memory_bytes is None else what_fits(trained, memory_bytes),
        "memory_sources": [MEMORY[m] for m in dict.fromkeys(c.memory for c in trained) if m],
        "inference": [cells for record in answered for cells in inference_cells(record)],
        "inference_header": INFERENCE_HEADER,
        "inference_notes": inference_notes(answered),
        "trained": len(trained),
        "changes": [changes_of(p.comparison) for p in parts if p.comparison is not None],
        "columns": [(column, definition(column)) for column in COLUMNS],
        "rows": rows,
        "compared": any(part.comparison is not None for part in parts),
        "histories": [
            sparklines_of(p.history, p.newest.cases) for p in parts if p.history is not None
        ],
        "samples": samples_of(trained),
        "origins": [origin_of(part, own) for part, own in zip(parts, by_part, strict=True)],
        "data": Markup(script_json(printable_data(figure_data(trained, marks)))),
    }


def names_of(cases: list[Case], axis: str) -> list[str]:
    """In the order of the file."""
    return list(dict.fromkeys(getattr(case, axis) for case in cases))


def by_family(marks: dict[str, Mark]) -> list[dict[str, Any]]:
    """Adapters by family, in their order."""
    found: dict[str, list[str]] = {}
    for name in marks:
        found.setdefault(family(name), []).append(name)
    return [{"family": title, "names": names} for title, names in found.items()]


def asset(name: str) -> str:
    return resources.files("peftbench.report").joinpath("page", name).read_text(encoding="utf-8")


def script_hash(text: str) -> str:
    """As a content security policy names a script: with newlines as the parser will see them."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def harmless(value: Any) -> Any:
    """Text without control and bidirectional characters; what is no text, as it is."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return printable(value)
    return value


def printable(text: str) -> str:
    """Line ends and tabs are kept; a lone surrogate or a control character becomes U+FFFD."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def printable_data(data: Any) -> Any:
    """The same with every text, keys too, made `printable`."""
    if isinstance(data, dict):
        return {printable_data(key): printable_data(value) for key, value in data.items()}
    if isinstance(data, list):
        return [printable_data(value) for value in data]
    return printable(data) if isinstance(data, str) else data


def script_json(data: Any) -> str:
    """JSON that may stand inside <script>: no tag can begin in it, and it is pure ASCII."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
