"""What commands write into pages, between two marks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import pages

from peftbench.errors import UserError

ROOT = Path(__file__).parent.parent


def test_a_part_goes_between_the_marks_of_its_page(tmp_path):
    start, end = pages.marks("growth")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{start}\nold\n{end}\nafter\n")
    pages.write_part(page, "growth", "new \\1\nlines\n\n")
    assert page.read_text() == f"before\n{start}\nnew \\1\nlines\n{end}\nafter\n"
    pages.write_part(tmp_path / "other.md", "growth", "new")
    assert (tmp_path / "other.md").read_text() == f"{start}\nnew\n{end}\n"


def test_a_page_of_something_else_is_refused_and_kept(tmp_path):
    start, end = pages.marks("growth")
    for text in ("a page of something else", f"{start}\n{end}\n" * 2):
        page = tmp_path / "page.md"
        page.write_text(text)
        with pytest.raises(UserError, match="one is needed"):
            pages.write_part(page, "growth", "new")
        assert page.read_text() == text


@pytest.mark.parametrize(
    ("page", "name"),
    [
        ("README.md", "glossary"), ("README.es.md", "glossary"), ("docs/ppo.md", "costs"),
        ("docs/against-full.md", "against-full"), ("docs/growth.md", "growth"),
        ("docs/scaling.md", "scale"),
    ],
)  # fmt: skip
def test_every_part_has_its_marks_and_its_target(page, name):
    text = (ROOT / page).read_text()
    assert all(text.count(f"{mark}\n") == 1 for mark in pages.marks(name))
    assert f"\n{name}: install\n" in (ROOT / "Makefile").read_text()
