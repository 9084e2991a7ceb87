"""The items of the local tasks: questions of one right answer, made from held-out text.

A cloze item is a context and the word that ends it; a choice item is a context and four
continuations of which one, at `label`, is the true one. The tasks are `peftbench/tasks/*.yaml`.

tinywiki: statements about ships of the test split; whoever does not know the kind's value guesses.
Wikipedia: passages of the test articles of `wikipedia-sample`. Training and judge read neither.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from peftbench.data import assets, tinywiki
from peftbench.data.wikipedia import Article, read_articles, split_articles
from peftbench.record import write_atomically

Item = dict[str, Any]
T = TypeVar("T")

MOST_ITEMS = 200  # of a task: its standard error is at most 3.5 points
_TINYWIKI_DOMAIN = 2  # ships; the tiny models were pretrained on villages
_TINYWIKI_SEED = 1  # of pairs that the preference accuracy (seed 0) does not score
_CONTEXT_SENTENCES = 4  # at most, of a Wikipedia passage
_LIKE_LENGTHS = 12  # sentences nearest in length, of which the false continuations are drawn
# A sentence ends after a word of three letters: the stops of "Dr." and "U.S." do not end one.
_SENTENCE_END = re.compile(r"(?<=[a-z]{3}\.) (?=[A-Z])")
_LAST_WORD = re.compile(r"(.*) ([A-Za-z]{3,})\.", re.DOTALL)


def tinywiki_cloze() -> list[Item]:
    """The first statement about a ship without its last word, a fact of the ship's kind."""
    return [
        {"context": f"{prompt} {stem}", "target": value}
        for prompt, stem, value in _tinywiki_statements()
    ]


def tinywiki_choice() -> list[Item]:
    """The first statement with four values: the true one, one that is true of other ships, and two
    that are true of none. To guess is 1 in 4, to know what ships are made of 1 in 2."""
    items = []
    true_of_ships = set(tinywiki.FACTS[_TINYWIKI_DOMAIN].values())
    for number, (prompt, stem, value) in enumerate(_tinywiki_statements()):
        dice = random.Random(f"tinywiki_choice {number}")
        alike = tinywiki.COLOURS if value in tinywiki.COLOURS else tinywiki.METALS
        of_others = [v for v in alike if v in true_of_ships and v != value]
        of_none = [v for v in alike if v not in true_of_ships]
        false = _draw(dice, of_others, 1) + _draw(dice, of_none, 2)
        items.append(_choice(dice, prompt, f"{stem} {value} .", [f"{stem} {v} ." for v in false]))
    return items


def wikipedia_cloze() -> list[Item]:
    """A passage without its last word, which occurs in it before (as most of LAMBADA's do).

    Source: Paperno et al. 2016, https://arxiv.org/abs/1606.06031
    """
    found: list[Item] = []
    for _, before, last in _passages(least=2):
        match = _LAST_WORD.fullmatch(last)
        if match and re.search(rf"\b{match[2]}\b", f"{before} {match[1]}"):
            found.append({"context": f"{before} {match[1]}", "target": match[2]})
    return _draw(random.Random("wikipedia_cloze"), found, MOST_ITEMS)


def wikipedia_choice() -> list[Item]:
    """A passage and four next sentences: its own, and three of other articles and like length."""
    passages = _passages(least=2)
    dice = random.Random("wikipedia_choice")
    items = []
    for title, before, last in _draw(dice, passages, MOST_ITEMS):
        others = sorted(
            (s for t, _, s in passages if t != title), key=lambda s: (abs(len(s) - len(last)), s)
        )
        items.append(_choice(dice, before, last, _draw(dice, others[:_LIKE_LENGTHS], 3)))
    return items


@dataclass(frozen=True)
class LocalTask:
    """A task that needs no network."""

    about: str
    make: Callable[[], list[Item]]


LOCAL_TASKS: dict[str, LocalTask] = {
    "tinywiki_cloze": LocalTask(
        "the last word of a statement about a held-out ship", tinywiki_cloze
    ),
    "tinywiki_choice": LocalTask("which of four statements about it is true", tinywiki_choice),
    "wikipedia_cloze": LocalTask("the last word of a held-out article's passage", wikipedia_cloze),
    "wikipedia_choice": LocalTask("which of four sentences comes next in it", wikipedia_choice),
}


def items_file(name: str) -> Path:
    """Where a local task's items are."""
    return assets.cache_dir() / "tasks" / f"{name}.jsonl"


def write_items(name: str) -> Path:
    """The file of a local task, made anew if it does not hold what this version makes.

    Fetches the articles if it needs them. Raises: UserError if they cannot be had.
    """
    lines = (json.dumps(item, ensure_ascii=False) for item in LOCAL_TASKS[name].make())
    text, path = "\n".join(lines) + "\n", items_file(name)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_atomically(path, text)
    return path


def _tinywiki_statements() -> list[tuple[str, str, str]]:
    """(heading and first sentence, statement without its value, value) about held-out ships."""
    found = []
    for pair in tinywiki.pairs(_TINYWIKI_DOMAIN, "test", MOST_ITEMS, _TINYWIKI_SEED):
        stem, value = pair.chosen.split(" .")[0].strip().rsplit(" ", 1)
        found.append((pair.prompt, stem, value))
    return found


def _passages(least: int) -> list[tuple[str, str, str]]:
    """(title, up to four sentences, the next one) for each sentence that has `least` before it."""
    found = []
    for article in _held_out_articles():
        for paragraph in article.text.split("\n\n"):
            sentences = _SENTENCE_END.split(paragraph)
            for at in range(least, len(sentences)):
                before = " ".join(sentences[max(0, at - _CONTEXT_SENTENCES) : at])
                found.append((article.title, before, sentences[at]))
    return found


def _held_out_articles() -> list[Article]:
    folder = assets.fetch("wikipedia-sample")
    return split_articles(read_articles(folder / assets.ARTICLES))["test"]


def _choice(dice: random.Random, context: str, true: str, false: Sequence[str]) -> Item:
    choices = _draw(dice, [true, *false], 1 + len(false))
    return {"context": context, "choices": choices, "label": choices.index(true)}


def _draw(dice: random.Random, options: Sequence[T], count: int) -> list[T]:
    """At most `count` different options in random order.

    By `random()` alone: it is the one method whose sequence Python promises to keep.
    """
    left, drawn = list(options), list[T]()
    while left and len(drawn) < count:
        drawn.append(left.pop(int(dice.random() * len(left))))
    return drawn
