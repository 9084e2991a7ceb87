"""Every command that the documentation shows is one: its options exist and its targets are made."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from peftbench.case import PRESETS
from peftbench.cli import build_parser

ROOT = Path(__file__).parent.parent
LANGUAGES = [ROOT / "README.md", ROOT / "README.es.md"]
PAGES = [*LANGUAGES, ROOT / "results" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: Path) -> list[str]:
    """Lines of the code blocks that begin with a program of ours, without their comments."""
    found = []
    for block in re.findall(r"^```[a-z]*\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            text = line.removeprefix("$ ")
            is_prose = "  " in text.split("#")[0].strip()  # a table or an output
            if re.match(r"(peftbench|pytest|make) [a-z]", text) and not is_prose:
                found.append(text)
    return found


EVERY = [(page.name, line) for page in PAGES for line in commands(page)]


@pytest.fixture(scope="module")
def pytest_options() -> set[str]:
    shown = subprocess.run(
        [sys.executable, "-m", "pytest", "--help"], cwd=ROOT, capture_output=True, text=True,
        check=True,
    ).stdout  # fmt: skip
    return set(re.findall(r"(?<![\w-])-{1,2}[a-zA-Z][\w-]*", shown))


def test_the_pages_show_commands():
    assert {line.split()[0] for _, line in EVERY} == {"peftbench", "pytest", "make"}
    assert len(EVERY) > 40


@pytest.mark.parametrize(("page", "line"), [e for e in EVERY if e[1].startswith("peftbench")])
def test_a_command_of_peftbench_parses(page, line, capsys):
    words = shlex.split(line, comments=True)[1:]
    if words[0] == "bench":
        assert words[words.index("--preset") + 1] in PRESETS
        return
    try:
        build_parser().parse_args(words)
    except SystemExit:
        pytest.fail(f"{page}: {line}\n{capsys.readouterr().err}")


@pytest.mark.parametrize(("page", "line"), [e for e in EVERY if e[1].startswith("pytest")])
def test_an_option_of_pytest_exists(page, line, pytest_options):
    words = shlex.split(line, comments=True)
    for word in words:
        if word.startswith("-"):
            assert word.split("=")[0] in pytest_options, f"{page}: {line}"


@pytest.mark.parametrize(("page", "line"), [e for e in EVERY if e[1].startswith("make")])
def test_a_target_of_make_exists(page, line):
    makefile = (ROOT / "Makefile").read_text()
    words = shlex.split(line, comments=True)[1:]
    targets = [w for w in words if "=" not in w]
    assert targets
    for target in targets:
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), f"{page}: {line}"
    for name in (w.split("=")[0] for w in words if "=" in w):
        assert re.search(rf"\b{name}\b", makefile), f"{page}: {line}"


def test_both_languages_have_the_same_content():
    """The same commands, outputs, tables, headings and points, in one order."""
    shapes = []
    for page in LANGUAGES:
        text = page.read_text()
        blocks = re.findall(r"^```.*?^```", text, re.MULTILINE | re.DOTALL)
        prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        names = re.findall(r"`([^`\n]+)`", prose)
        shapes.append({
            "commands": [shlex.split(line, comments=True) for line in commands(page)],
            "outputs": [b for b in blocks if not re.match(r"```\n(make|pytest|peftbench) ", b)],
            "headings": [len(h) for h in re.findall(r"^#+ ", prose, re.MULTILINE)],
            "points": len(re.findall(r"^- ", prose, re.MULTILINE)),
            "rows": [row.split("|")[1].strip() if "`" in row.split("|")[1] else ""
                     for row in re.findall(r"^\|.*$", prose, re.MULTILINE)],
            "names": sorted(n for n in set(names) if re.fullmatch(r"[\w.+-]+", n)),
        })  # fmt: skip
    for key in shapes[0]:
        assert shapes[0][key] == shapes[1][key], key


def test_every_command_is_shown():
    shown = {
        line.split()[1]
        for page, line in EVERY
        if line.startswith("peftbench") and page == "README.md"
    }
    parser = build_parser()
    (choices,) = (a.choices for a in parser._actions if a.dest == "command")
    assert set(choices) - shown <= {"completion", "list", "assets"}  # in lines of prose
