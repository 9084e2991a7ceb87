"""The part of a page that a command writes: what stands between its two marks."""

from __future__ import annotations

import re
from pathlib import Path

from peftbench.errors import UserError
from peftbench.record import write_atomically


def marks(name: str) -> tuple[str, str]:
    """The lines around the part `name`, which `make name` writes."""
    return f"<!-- {name}: made by `make {name}` -->", f"<!-- end of {name} -->"


def write_part(page: Path, name: str, part: str) -> None:
    """Put `part` between the marks of the page; a page that is not there is nothing but it.

    Raises: UserError for a page without the marks, or with more than one pair.
    """
    start, end = marks(name)
    text = page.read_text(encoding="utf-8") if page.exists() else f"{start}\n{end}\n"
    pattern = f"({re.escape(start)}\n).*?({re.escape(end)})"
    written, found = re.subn(
        pattern, lambda mark: f"{mark[1]}{part.rstrip()}\n{mark[2]}", text, flags=re.DOTALL
    )
    if found != 1:
        raise UserError(f"{page} has {found} parts between {start!r} and {end!r}; one is needed")
    write_atomically(page, written)
