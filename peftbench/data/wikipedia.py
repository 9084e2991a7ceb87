"""Real articles out of a Wikipedia XML dump: running text without markup, split by article.

Only prose is kept. Tables, lists, formulas, headings and end matter would teach a model the wiki's
layout, and a paragraph with a hole in it (a formula or a broken table was there) is not English:
such paragraphs are dropped whole. One dump and one version of mwparserfromhell give one result.
"""

from __future__ import annotations

import bz2
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

if TYPE_CHECKING:
    from mwparserfromhell.nodes import Node, Tag, Template, Wikilink
    from mwparserfromhell.wikicode import Wikicode

MIN_ARTICLE_CHARACTERS = 2000  # shorter ones are disambiguation pages, stubs and emptied lists
MIN_PARAGRAPH_CHARACTERS = 80  # shorter ones are captions and remnants of layout
HELD_OUT_RATIO = 0.10  # of all characters, at least, for test and for validation each

_LIST_ITEM = "\x00"  # starts a line that was a list item, an indented line or a hatnote
_HOLE = "\x01"  # something that cannot be written as text stood here

_DROPPED_TAGS = {"ref", "references", "gallery", "table", "timeline", "imagemap", "poem", "hr"}
_HOLE_TAGS = {"math", "source", "syntaxhighlight", "pre", "hiero", "score", "ce", "chem"}
_LIST_TAGS = {"li", "dd", "dt"}
_DROPPED_LINKS = {"file", "image", "category", "media"}

# Templates whose text is part of the sentence around them; every other template is invisible in
# print (citations, maintenance) or is layout (infoboxes, navigation). The number says which
# positional argument is the text.
_TEXT_ARGUMENT = {
    "lang": 2, "native name": 2, "transl": -1, "nihongo": 1, "nowrap": 1, "small": 1, "smaller": 1,
    "smallcaps": 1, "sc": 1, "angbr": 1, "ipa": 1, "vanchor": 1, "visible anchor": 1, "quote": 1,
    "cquote": 1, "blockquote": 1, "abbr": 1, "tooltip": 1, "flag": 1, "sic": 1, "linktext": 1,
    "not a typo": 1, "sup": 1, "sub": 1, "keypress": 1, "mono": 1, "big": 1, "ill": 1,
}  # fmt: skip
_SYMBOLS = {"'s": "'s", "nbsp": " ", "spaces": " ", "·": "·", "ndash": "–", "spaced ndash": " – ",
            "snd": " – ", "mdash": "—", "emdash": "—", "pi": "π", "!": "|"}  # fmt: skip
_HOLE_TEMPLATES = {"math", "mvar", "chem", "chem2", "eqm", "frac", "sfrac", "val", "e", "su",
                   "nuclide", "simplenuclide", "simplenuclide2", "inflation"}  # fmt: skip

_END_MATTER = {
    "see also", "references", "notes", "notes and references", "references and notes", "footnotes",
    "further reading", "references and further reading", "external links", "bibliography",
    "sources", "citations", "works cited", "literature", "publications", "general references",
    "selected works",
}  # fmt: skip

_BROKEN_MARKUP = re.compile(r"\{\||\|\}|\{\{|\}\}|\[\[|\]\]|\|\||</?\w+[^>]*>|''|__\w+__")
_GAP = re.compile(r",[,;:]|;:|:[,;]|,\.(?!\.)")  # words between two of these marks were taken out
_SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]*$")


@dataclass(frozen=True)
class Article:
    """One article: its title and its paragraphs, separated by one blank line."""

    title: str
    text: str


def extract_articles(bz2_path: Path) -> Iterator[Article]:
    """The dump's articles of at least `MIN_ARTICLE_CHARACTERS`, in the dump's order.

    Pages of other namespaces than the article space and redirects are left out.
    """
    with bz2.open(bz2_path) as dump:
        for _, element in ElementTree.iterparse(dump):
            namespace, _, tag = element.tag.rpartition("}")
            if tag != "page":
                continue
            prefix = namespace + "}" if namespace else ""
            is_article = element.findtext(f"{prefix}ns") == "0"
            if is_article and element.find(f"{prefix}redirect") is None:
                title = element.findtext(f"{prefix}title") or ""
                markup = element.findtext(f"{prefix}revision/{prefix}text") or ""
                text = plain_text(markup)
                if len(text) >= MIN_ARTICLE_CHARACTERS:
                    yield Article(title, text)
            element.clear()  # a page's tree is not needed again; without this the whole dump stays


def plain_text(markup: str) -> str:
    """The prose of wiki markup: paragraphs of whole sentences, separated by one blank line."""
    import mwparserfromhell

    return "\n\n".join(_paragraphs(_top_level_text(mwparserfromhell.parse(markup))))


def split_articles(articles: Iterable[Article]) -> dict[str, list[Article]]:
    """The articles as `train`, `validation` and `test`, whole articles each.

    In the order of sha256(title), which has nothing to do with the alphabet or the topic, `test` is
    filled to `HELD_OUT_RATIO` of all characters, then `validation`; the rest is `train`.

    Raises: ValueError if there are too few articles for three splits.
    """
    ordered = sorted(articles, key=lambda a: hashlib.sha256(a.title.encode()).digest())
    held_out = HELD_OUT_RATIO * sum(len(article.text) for article in ordered)
    splits: dict[str, list[Article]] = {"test": [], "validation": [], "train": []}
    for article in ordered:
        for name, split in splits.items():
            if name == "train" or sum(len(a.text) for a in split) < held_out:
                split.append(article)
                break
    empty = [name for name, split in splits.items() if not split]
    if empty:
        raise ValueError(f"{len(ordered)} articles are too few: nothing is left for {empty}")
    return splits


def write_articles(articles: Iterable[Article], path: Path) -> None:
    """One JSON object with `title` and `text` per line, UTF-8."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for article in articles:
            file.write(json.dumps(asdict(article), ensure_ascii=False) + "\n")


def read_articles(path: Path) -> list[Article]:
    """The articles that `write_articles` wrote, in the same order."""
    with path.open(encoding="utf-8") as file:
        return [Article(**json.loads(line)) for line in file]


def _top_level_text(page: Wikicode) -> str:
    """The page's text with the two marks in it, without headings and end matter."""
    parts: list[str] = []
    in_end_matter = False
    for node in page.nodes:
        if type(node).__name__ == "Heading":
            if node.level <= 2:
                in_end_matter = str(node.title).strip().lower() in _END_MATTER
            parts.append("\n\n")
        elif not in_end_matter:
            parts.append(_node_text(node))
    return "".join(parts)


def _text(code: Wikicode | None) -> str:
    return "".join(_node_text(node) for node in code.nodes) if code is not None else ""


def _node_text(node: Node) -> str:
    match type(node).__name__:  # by name: importing the classes would import the parser here
        case "Text":
            return str(node.value)
        case "HTMLEntity":
            return str(node.normalize())
        case "Wikilink":
            return _link_text(node)
        case "ExternalLink":
            return _text(node.title) if node.brackets else ""
        case "Tag":
            return _tag_text(node)
        case "Template":
            return _template_text(node)
        case _:  # comments, template arguments
            return ""


def _link_text(link: Wikilink) -> str:
    namespace, colon, _ = str(link.title).lstrip(": ").partition(":")
    if colon and namespace.strip().lower() in _DROPPED_LINKS:
        return ""
    return _text(link.text) or _text(link.title)


def _tag_text(tag: Tag) -> str:
    name = str(tag.tag).strip().lower()
    if name in _LIST_TAGS:
        return _LIST_ITEM
    if name in _HOLE_TAGS:
        return _HOLE
    if name in _DROPPED_TAGS:
        return ""
    if name == "br":
        return " "
    text = _text(tag.contents)
    return f"\n\n{text}\n\n" if name in {"blockquote", "div", "center"} else text


def _template_text(template: Template) -> str:
    name = str(template.name).strip().lower()
    if name in _SYMBOLS:
        return _SYMBOLS[name]
    if name in _HOLE_TEMPLATES:
        return _HOLE
    arguments = [_text(p.value).strip() for p in template.params if not p.showkey]
    if name in {"convert", "cvt"}:
        return _conversion_text(arguments)
    if name == "as of" and arguments:
        return f"As of {arguments[0]}"
    position = _TEXT_ARGUMENT.get(name, 0)
    if not position or len(arguments) < abs(position):
        return ""
    return arguments[position - 1 if position > 0 else position]


_UNITS = {"km2": "km²", "m2": "m²", "sqmi": "square miles", "mi": "miles", "sqft": "square feet",
          "ft": "feet", "in": "inches", "lb": "pounds", "acre": "acres", "ha": "hectares",
          "C": "°C", "F": "°F", "yd": "yards", "nmi": "nautical miles"}  # fmt: skip
_RANGES = {"-", "–", "to", "and", "or", "x", "by"}


def _conversion_text(arguments: list[str]) -> str:
    """`{{convert|5|to|10|km|mi}}` is `5 to 10 km`: the article's own unit, not the second one."""
    words: list[str] = []
    for argument in arguments:
        words.append(_UNITS.get(argument, argument))
        is_unit = not re.match(r"[-−+]?[\d.,]+$", argument) and argument not in _RANGES
        if is_unit:
            break
    return " ".join(words)


def _paragraphs(text: str) -> Iterator[str]:
    """The prose paragraphs of text that still has the two marks in it."""
    lines: list[str] = []
    for line in [*text.split("\n"), ""]:
        if line.strip() and not line.lstrip().startswith(_LIST_ITEM):
            lines.append(line)
            continue
        paragraph = _tidied(" ".join(lines))
        if _is_prose(paragraph):
            yield paragraph
        lines = []


def _tidied(paragraph: str) -> str:
    """Without the traces of what was taken out: empty brackets, doubled spaces."""
    paragraph = re.sub(r"[\s\u200b\ufeff]+", " ", paragraph)
    for _ in range(2):  # brackets may be nested
        paragraph = re.sub(r"\(\s*[,;:]\s*", "(", paragraph)
        paragraph = re.sub(r"\s*[,;:]\s*\)", ")", paragraph)
        paragraph = re.sub(r"\s*(\(\s*\)|\[\s*\])", "", paragraph)
    paragraph = re.sub(r"\s+([,.;:!?)])", r"\1", paragraph)
    return re.sub(r"\(\s+", "(", paragraph).strip()


def _is_prose(paragraph: str) -> bool:
    return (
        len(paragraph) >= MIN_PARAGRAPH_CHARACTERS
        and _HOLE not in paragraph
        and _LIST_ITEM not in paragraph
        and not _BROKEN_MARKUP.search(paragraph)
        and not _GAP.search(paragraph)
        and _SENTENCE_END.search(paragraph) is not None
    )
