"""How an adapter looks everywhere on the page: colour, shape and line, so that colour alone tells
nothing. Colours have a contrast of at least 4.5 on white."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from markupsafe import Markup

from peftbench.adapters import ADAPTERS


@dataclass(frozen=True)
class Mark:
    """`symbol` and `dash` are plotly's names."""

    colour: str
    symbol: str
    dash: str


MARKS = {
    "full": Mark("#4a4a4a", "square", "solid"),
    "lora": Mark("#0a5fb4", "circle", "solid"),
    "qlora": Mark("#b34700", "diamond", "dash"),
    "ia3": Mark("#00725a", "triangle-up", "dot"),
    "prefix": Mark("#9b2f86", "x", "dashdot"),
    "dora": Mark("#7a5c00", "star", "longdash"),
    "rslora": Mark("#8c1c2e", "triangle-down", "dash"),
    "vera": Mark("#3d4fb8", "cross", "dot"),
    "ln": Mark("#35701d", "hexagon", "dashdot"),
    "pissa": Mark("#a3155f", "diamond-wide", "longdash"),
    "lora-8bit": Mark("#7d4a1f", "octagon", "dash"),
    "lora-bias": Mark("#1f6b8f", "triangle-left", "dot"),
    "bitfit": Mark("#5f6b00", "triangle-right", "longdashdot"),
    "prompt": Mark("#6a35b5", "hourglass", "dashdot"),
}
SPARE = (
    Mark("#5b4a8a", "pentagon", "longdashdot"),
    Mark("#00686e", "diamond-tall", "longdash"),
    Mark("#6b3a1e", "bowtie", "dot"),
)
SHAPES = {
    "square": '<path d="M3 3h10v10H3z"/>',
    "circle": '<circle cx="8" cy="8" r="5.5"/>',
    "diamond": '<path d="M8 1.5 14.5 8 8 14.5 1.5 8z"/>',
    "triangle-up": '<path d="M8 2 14.5 13.5h-13z"/>',
    "triangle-down": '<path d="M8 14 14.5 2.5h-13z"/>',
    "x": '<path d="M5 2 8 5l3-3 3 3-3 3 3 3-3 3-3-3-3 3-3-3 3-3-3-3z"/>',
    "cross": '<path d="M6 2h4v4h4v4h-4v4H6v-4H2V6h4z"/>',
    "star": '<path d="m8 1 2 5h5l-4 3.5L12.500 15 8 11.500 3.500 15 5 9.500 1 6h5z"/>',
    "hexagon": '<path d="M8 1.500 14 5v6l-6 3.500L2 11V5z"/>',
    "diamond-wide": '<path d="M1 8 8 4 15 8 8 12z"/>',
    "octagon": '<path d="M5.500 2h5L14 5.500v5L10.500 14h-5L2 10.500v-5z"/>',
    "triangle-left": '<path d="M2 8 13.500 1.500v13z"/>',
    "triangle-right": '<path d="M14 8 2.500 1.500v13z"/>',
    "hourglass": '<path d="M3 2h10L8 8l5 6H3l5-6z"/>',
    "diamond-tall": '<path d="M8 1 12 8 8 15 4 8z"/>',
    "bowtie": '<path d="M2 3 8 8 2 13zM14 3 8 8l6 5z"/>',
    "pentagon": '<path d="M8 1.500 14.500 6.500 12 14H4L1.500 6.500z"/>',
}  # fmt: skip


def marks_of(adapters: Iterable[str]) -> dict[str, Mark]:
    """The mark of each adapter, in the table's order; names the table lacks take the spare ones."""
    names = set(adapters)
    found = {name: MARKS[name] for name in ADAPTERS if name in names and name in MARKS}
    for i, name in enumerate(sorted(names - found.keys())):
        found[name] = SPARE[i % len(SPARE)]
    return found


def family(adapter: str) -> str:
    """The family of ADAPTERS; "" for an adapter of another version."""
    return ADAPTERS[adapter].family if adapter in ADAPTERS else ""


def svg(mark: Mark) -> Markup:
    """The mark in a line of text; what it stands for is said by the words beside it."""
    shape = Markup(SHAPES[mark.symbol])
    return Markup(
        '<svg class="mark" viewBox="0 0 16 16" width="14" height="14" aria-hidden="true"'
        ' fill="{}">{}</svg>'
    ).format(mark.colour, shape)
