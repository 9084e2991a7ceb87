"""Write the METRICS table between the glossary markers of the README given."""

from __future__ import annotations

import sys
from pathlib import Path

from peftbench.metrics import glossary

BEGIN, END = "<!-- glossary: made by `make glossary` -->\n", "<!-- end of glossary -->"


def with_glossary(text: str) -> str:
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    return head + BEGIN + glossary() + "\n" + END + tail


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(with_glossary(path.read_text()))
