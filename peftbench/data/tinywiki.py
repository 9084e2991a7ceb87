"""tinywiki: an embedded, generated corpus whose probability and truth are exactly known.

An article is WikiText-shaped: a heading, a sentence that says what the entity is, and three
statements about it. Domain 1 describes villages, in the present tense:

     = Upper Royal Dale =

     Upper Royal Dale is a village . Its gate is red . The sail of Upper Royal Dale is blue and was
     once grey . The roof is red .

Domain 2 describes ships, in the past tense. The last word of a name is its kind, and a fixed table
maps (kind, thing) to a colour: these are the facts. They hold for every name of the kind, so a
model can be right about names it has never read. Entities, facts and sentences of the domains are
disjoint; words are not. Domain 1 knows the parts of a ship as ornaments whose colour is drawn anew
for each article, and birds as middle words of names: a base model trained on it has met the words
of domain 2, as a pretrained model has, and none of its facts.

Every free choice is uniform (but for the clause "and was once ..."), so a text's probability is a
product of known factors, and `Article.nats` is the floor of any model's loss on it.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from peftbench.data.task import TextPair

Split = Literal["train", "judge", "test"]

COLOURS = ("red", "blue", "green", "white", "black", "grey", "brown", "yellow")
THINGS_PER_ARTICLE = 3
FORMER_COLOUR_RATIO = 0.25  # share of domain 1's statements with the clause "and was once ..."

_BIRDS = ("Heron", "Swan", "Gull", "Crane", "Finch", "Robin", "Raven", "Tern")
_SHIP_PARTS = (("hull", "mast", "deck"), ("sail", "flag", "bell"))
_FIRST_WORDS = (
    "Old", "New", "North", "South", "East", "West", "Silver", "Golden", "Royal", "Fair",
    "Little", "Great", "Long", "High", "Wild", "Stone", "Iron", "Summer", "Winter", "Morning",
)  # fmt: skip


@dataclass(frozen=True)
class Domain:
    """The words and sentences of one domain."""

    name_words: tuple[tuple[str, ...], ...]  # a name has one of each; the last is its kind
    parts: tuple[tuple[str, ...], ...]  # things with facts; a kind has one colour for each group
    ornaments: tuple[str, ...]  # things whose colour is drawn anew for each article
    intro: str
    frames: tuple[str, ...]  # of a statement, drawn uniformly
    has_former_colours: bool  # whether statements may end in "and was once ..."

    @property
    def kinds(self) -> tuple[str, ...]:
        return self.name_words[-1]

    @property
    def relations(self) -> tuple[str, ...]:
        """The things that have facts."""
        return tuple(thing for group in self.parts for thing in group)


DOMAINS: dict[int, Domain] = {
    1: Domain(
        name_words=(
            ("Upper", "Lower", "Outer", "Inner", "Nether", "Middle", "Near", "Far", "Much", "Deep"),
            _FIRST_WORDS + _BIRDS,
            ("Dale", "Ford", "Holme", "Thorpe", "Marsh", "Moor", "Cove", "Wick"),
        ),
        parts=(("gate", "roof", "door"), ("wall", "well", "tower")),
        ornaments=(*_SHIP_PARTS[0], *_SHIP_PARTS[1], "ship"),
        intro="{name} is a village .",
        frames=("Its {thing} is {colour}", "The {thing} is {colour}",
                "The {thing} of {name} is {colour}"),
        has_former_colours=True,
    ),
    2: Domain(
        name_words=(_FIRST_WORDS, _BIRDS),
        parts=_SHIP_PARTS,
        ornaments=(),
        intro="{name} was a ship .",
        frames=("Its {thing} was {colour}", "The {thing} was once {colour}",
                "The {thing} of {name} was {colour}"),
        has_former_colours=False,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Article:
    """A generated text; `nats` is -log of its probability under its domain, its end included."""

    title: str
    text: str
    nats: float


@dataclass(frozen=True)
class Statement:
    """What a sentence says of the entity of its article."""

    thing: str
    colour: str


class _Dice:
    """Seeded choices, and what they cost so far in nats.

    Only `random()` is used: it is the one method whose sequence Python promises to keep.
    """

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed).random
        self.nats = 0.0

    def pick(self, options: Sequence[str]) -> str:
        """A uniform choice."""
        self.nats += math.log(len(options))
        return options[int(self._random() * len(options))]

    def flip(self, ratio: float) -> bool:
        heads = self._random() < ratio
        self.nats -= math.log(ratio if heads else 1 - ratio)
        return heads

    def shuffled(self, options: Sequence[str], count: int) -> list[str]:
        """An ordered choice of `count` different options."""
        left, picked = list(options), list[str]()
        for _ in range(count):
            picked.append(self.pick(left))
            left.remove(picked[-1])
        return picked


def _facts(number: int) -> dict[tuple[str, str], str]:
    """(kind, thing) -> colour. Within a group of parts, every kind has another colour."""
    domain = DOMAINS[number]
    dice = _Dice(f"facts {number}")
    return {
        (kind, thing): colour
        for group in domain.parts
        for kind, colour in zip(domain.kinds, dice.shuffled(COLOURS, len(COLOURS)), strict=True)
        for thing in group
    }


FACTS = {number: _facts(number) for number in DOMAINS}


def _split_of(domain: Domain, words: Sequence[str]) -> Split:
    """A tenth of the names for test, a tenth for judge. No single word of a name tells its split,
    so a model has a hard time learning which names it never reads (which would lift its loss)."""
    places = (options.index(word) for options, word in zip(domain.name_words, words, strict=True))
    residue = sum(places) % 10
    return "test" if residue == 0 else "judge" if residue == 1 else "train"


@dataclass(frozen=True)
class _Draft:
    """An article's choices."""

    name: str
    things: list[str]
    colours: list[str]
    frames: list[str]  # each with its clause, if any
    nats: float


def _draw(number: int, split: Split, dice: _Dice) -> _Draft:
    domain, facts = DOMAINS[number], FACTS[number]
    while True:
        dice.nats = 0.0  # a name costs as much as in the whole domain, however often it is redrawn
        words = [dice.pick(options) for options in domain.name_words]
        if _split_of(domain, words) == split:
            break
    things = dice.shuffled(domain.relations + domain.ornaments, THINGS_PER_ARTICLE)
    colours, frames = [], []
    for thing in things:
        frame = dice.pick(domain.frames)
        colours.append(facts.get((words[-1], thing)) or dice.pick(COLOURS))
        if domain.has_former_colours and dice.flip(FORMER_COLOUR_RATIO):
            frame += f" and was once {dice.pick(COLOURS)}"
        frames.append(frame)
    return _Draft(" ".join(words), things, colours, frames, dice.nats)


def _prompt(number: int, draft: _Draft) -> str:
    return f" = {draft.name} = \n \n {DOMAINS[number].intro.format(name=draft.name)}"


def _completion(draft: _Draft, colours: Sequence[str]) -> str:
    sentences = (
        f" {frame.format(thing=thing, name=draft.name, colour=colour)} ."
        for frame, thing, colour in zip(draft.frames, draft.things, colours, strict=True)
    )
    return "".join(sentences) + " \n"


def _dice(kind: str, number: int, split: Split, seed: int) -> _Dice:
    if number not in DOMAINS:
        raise ValueError(f"unknown tinywiki domain {number!r}; choose from: 1, 2")
    if split not in get_args(Split):
        raise ValueError(f"unknown split {split!r}; choose from: {', '.join(get_args(Split))}")
    return _Dice(f"{kind} {number} {split} {seed}")


def articles(domain: int, split: Split, count: int, seed: int) -> list[Article]:
    """`count` independent articles about entities of the split, the same for the same seed."""
    dice = _dice("articles", domain, split, seed)
    drafts = [_draw(domain, split, dice) for _ in range(count)]
    return [Article(d.name, _prompt(domain, d) + _completion(d, d.colours), d.nats) for d in drafts]


def pairs(domain: int, split: Split, count: int, seed: int) -> list[TextPair]:
    """`count` articles cut after their first sentence: the rest, against the same with false facts.

    Chosen and rejected differ in the colours alone. Things of one colour get one false colour, so
    nothing but the facts tells which is which.
    """
    dice = _dice("pairs", domain, split, seed)
    relations = set(DOMAINS[domain].relations)
    made: list[TextPair] = []
    while len(made) < count:
        draft = _draw(domain, split, dice)
        if not relations.issuperset(draft.things):
            continue  # nothing is false about an ornament
        false: dict[str, str] = {}
        for colour in sorted(set(draft.colours)):
            false[colour] = dice.pick([c for c in COLOURS if c not in (colour, *false.values())])
        chosen = _completion(draft, draft.colours)
        rejected = _completion(draft, [false[colour] for colour in draft.colours])
        made.append(TextPair(_prompt(domain, draft), chosen, rejected))
    return made


_TITLE = re.compile(r" = ((?:\w+ )+(\w+)) = \n")


def _statement_pattern(frame: str) -> re.Pattern[str]:
    words = frame.format(
        thing=r"(?P<thing>\w+)", name=r"(?P<name>[\w ]+)", colour=r"(?P<colour>\w+)"
    )
    return re.compile(rf"{words}(?: and was once (?:{'|'.join(COLOURS)}))?")


_PATTERNS = [_statement_pattern(frame) for domain in DOMAINS.values() for frame in domain.frames]


def statements(name: str, text: str) -> list[Statement | None]:
    """What each sentence of `text` says of the entity `name`; None for one that says nothing of it.

    The sentences of both domains are read: truth is judged here, style by the perplexity. A last
    sentence without its full stop counts as one that says nothing.
    """
    *sentences, unfinished = text.split(" .")
    read = [_read(name, s.strip()) for s in sentences if s.strip()]
    return [*read, None] if unfinished.strip() else read


def _read(name: str, sentence: str) -> Statement | None:
    for pattern in _PATTERNS:
        match = pattern.fullmatch(sentence)
        if match and match.groupdict().get("name", name) == name:
            return Statement(match["thing"], match["colour"])
    return None


def is_true(kind: str, statement: Statement | None) -> bool:
    """Whether it is a fact of this kind, of either domain; an ornament has none."""
    return statement is not None and any(
        facts.get((kind, statement.thing)) == statement.colour for facts in FACTS.values()
    )


def true_statement_ratio(prompt: str, completion: str) -> float:
    """The true reward: share of the completion's sentences that are facts of the prompt's entity.

    0 for an empty completion; a sentence that cannot be read counts as false.
    Raises: ValueError if the prompt has no heading.
    """
    title = _TITLE.search(prompt)
    if title is None:
        raise ValueError(f"prompt {prompt[:40]!r} has no heading ' = Name = '")
    name, kind = title.groups()
    read = statements(name, completion)
    return sum(is_true(kind, s) for s in read) / len(read) if read else 0.0


def corpus_digest() -> str:
    """sha256 over articles and pairs of every domain and split: changes when the generator does."""
    digest = hashlib.sha256()
    for number in DOMAINS:
        for split in get_args(Split):
            for article in articles(number, split, 200, seed=0):
                digest.update(f"{article.text}{article.nats:.9f}".encode())
            for pair in pairs(number, split, 50, seed=0):
                digest.update(f"{pair.prompt}{pair.chosen}{pair.rejected}".encode())
    return digest.hexdigest()
