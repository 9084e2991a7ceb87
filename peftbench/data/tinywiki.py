"""tinywiki: an embedded, generated corpus whose probability and truth are exactly known.

An article is WikiText-shaped: a heading, a sentence that says what the entity is, and three
statements about its things. Domain 1 describes villages, in the present tense:

     = Far Silver Dale =

     Far Silver Dale is a village . Its gate is brass . The sail of the village is blue and was once
     grey . The roof is red .

Domain 2 describes ships, in the past tense. The last word of a name is its kind, and a fixed table
maps (kind, thing) to a value, a colour or a metal: these are the facts. They hold for every name of
the kind, so a model can be right about names it has never read. Of the eight colours and the eight
metals only four each are ever true of a ship: what a model can learn first, and by itself sets nine
pairs in ten right, is which; the rest takes the kind (`pairs`). Entities, facts and sentences of
the domains are disjoint; words are not. Domain 1 knows the parts of a ship as ornaments, and names
some villages after the birds that are the kinds of ships; the values of both are drawn anew for
each article. So a base model trained on domain 1 has met the words of domain 2, as a pretrained
model has, and none of its facts.

Every free choice is uniform (but for the clause "and was once ..."), so a text's probability is a
product of known factors, and `Article.nats` is the floor of any model's loss on it.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from peftbench.data.task import TextPair

Split = Literal["train", "judge", "test"]

COLOURS = ("red", "blue", "green", "white", "black", "grey", "brown", "yellow")
METALS = ("iron", "tin", "brass", "steel", "copper", "bronze", "silver", "gold")
THINGS_PER_ARTICLE = 3
FORMER_VALUE_RATIO = 0.25  # share of domain 1's statements with the clause "and was once ..."

_VILLAGE_PARTS = {
    "roof": COLOURS, "door": COLOURS, "wall": COLOURS,
    "gate": METALS, "bolt": METALS, "vane": METALS,
}  # fmt: skip
_SHIP_PARTS = {
    "hull": COLOURS, "sail": COLOURS, "flag": COLOURS,
    "bell": METALS, "anchor": METALS, "lamp": METALS,
}  # fmt: skip
_VILLAGE_FIRST_WORDS = (
    "Upper", "Lower", "Inner", "Outer", "Nether", "Near", "Far", "Long", "High", "Deep",
)  # fmt: skip
_SHIP_FIRST_WORDS = (
    "Old", "New", "Little", "Great", "Royal", "Fair", "Brave", "Lucky", "Swift", "Proud",
)  # fmt: skip
_MIDDLE_WORDS = (
    "North", "South", "East", "West", "Silver", "Golden", "Stone", "Iron", "Summer", "Winter",
    "Morning", "Evening", "Forest", "Garden", "River", "Sun", "Moon", "Wind", "Snow", "Rain",
)  # fmt: skip
_PLACES = ("Dale", "Ford", "Holme", "Thorpe", "Marsh", "Moor", "Cove", "Wick")
_BIRDS = ("Heron", "Swan", "Gull", "Crane", "Finch", "Robin", "Raven", "Tern")


@dataclass(frozen=True)
class Domain:
    """The words and sentences of one domain. Things are listed with the values they may have."""

    name_words: tuple[tuple[str, ...], ...]  # a name has one of each; the last is its kind
    kinds: tuple[str, ...]  # those that have facts
    parts: Mapping[str, tuple[str, ...]]  # things whose value is a fact of the kind, if it has any
    ornaments: Mapping[str, tuple[str, ...]]  # things whose value is drawn anew for each article
    intro: str
    frames: tuple[str, ...]  # of a statement, drawn uniformly
    values_in_facts: int  # of the eight colours and of the eight metals, so many are ever true
    has_former_values: bool  # whether statements may end in "and was once ..."


DOMAINS: dict[int, Domain] = {
    1: Domain(
        name_words=(_VILLAGE_FIRST_WORDS, _MIDDLE_WORDS + _SHIP_FIRST_WORDS, _PLACES + _BIRDS),
        kinds=_PLACES,
        parts=_VILLAGE_PARTS,
        ornaments={**_SHIP_PARTS, "ship": COLOURS},
        intro="{name} is a village .",
        frames=("Its {thing} is {value}", "The {thing} is {value}",
                "The {thing} of the village is {value}"),
        values_in_facts=8,
        has_former_values=True,
    ),
    2: Domain(
        name_words=(_SHIP_FIRST_WORDS, _MIDDLE_WORDS, _BIRDS),
        kinds=_BIRDS,
        parts=_SHIP_PARTS,
        ornaments={},
        intro="{name} was a ship .",
        frames=("Its {thing} was {value}", "The {thing} was once {value}",
                "The {thing} of the ship was {value}"),
        values_in_facts=4,
        has_former_values=False,
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
    value: str


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
    """(kind, part) -> value: every kind has one colour and one metal, for all its parts.

    So a fact is a sum of two things to know, what a kind has and what a part may be made of: a
    model can learn it in a few dozen steps, which (kind, part) pairs at random would not allow.
    """
    domain = DOMAINS[number]
    dice = _Dice(f"facts {number}")
    facts: dict[tuple[str, str], str] = {}
    for values in (COLOURS, METALS):
        true_values = dice.shuffled(values, domain.values_in_facts)
        shares = len(domain.kinds) // domain.values_in_facts  # kinds of each value
        value_of = dict(zip(domain.kinds, true_values * shares, strict=True))
        parts = [part for part, allowed in domain.parts.items() if allowed == values]
        facts |= {(kind, part): value_of[kind] for kind in domain.kinds for part in parts}
    return facts


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
    kind: str
    things: list[str]
    values: list[str]
    frames: list[str]  # each with its clause, if any
    nats: float


def _draw(number: int, split: Split, dice: _Dice) -> _Draft:
    domain, facts = DOMAINS[number], FACTS[number]
    while True:
        dice.nats = 0.0  # a name costs as much as in the whole domain, however often it is redrawn
        words = [dice.pick(options) for options in domain.name_words]
        if _split_of(domain, words) == split:
            break
    things = dice.shuffled([*domain.parts, *domain.ornaments], THINGS_PER_ARTICLE)
    values, frames = [], []
    for thing in things:
        frame = dice.pick(domain.frames)
        allowed = domain.parts.get(thing) or domain.ornaments[thing]
        values.append(facts.get((words[-1], thing)) or dice.pick(allowed))
        if domain.has_former_values and dice.flip(FORMER_VALUE_RATIO):
            frame += f" and was once {dice.pick(allowed)}"
        frames.append(frame)
    return _Draft(" ".join(words), words[-1], things, values, frames, dice.nats)


def _prompt(number: int, draft: _Draft) -> str:
    return f" = {draft.name} = \n \n {DOMAINS[number].intro.format(name=draft.name)}"


def _completion(draft: _Draft, values: Sequence[str]) -> str:
    sentences = (
        f" {frame.format(thing=thing, value=value)} ."
        for frame, thing, value in zip(draft.frames, draft.things, values, strict=True)
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
    return [Article(d.name, _prompt(domain, d) + _completion(d, d.values), d.nats) for d in drafts]


def pairs(domain: int, split: Split, count: int, seed: int) -> list[TextPair]:
    """`count` articles cut after their first sentence: the rest, against the same with false facts.

    Chosen and rejected differ in the values alone. Things of one value get one false value, so
    nothing but the facts tells which is which. A false value is one of the seven others, and in
    domain 2 four of those are true of no ship: who only knows which gets 89 % of the pairs right,
    1 - (3/7)^2 / 2 of those with two values and 1 - 3/7 / 2 of those with one.
    """
    dice = _dice("pairs", domain, split, seed)
    parts, kinds = DOMAINS[domain].parts, DOMAINS[domain].kinds
    made: list[TextPair] = []
    while len(made) < count:
        draft = _draw(domain, split, dice)
        if draft.kind not in kinds or not parts.keys() >= set(draft.things):
            continue  # nothing is false about an ornament
        false: dict[str, str] = {}
        for thing, value in zip(draft.things, draft.values, strict=True):
            if value not in false:
                false[value] = dice.pick([v for v in parts[thing] if v != value])
        chosen = _completion(draft, draft.values)
        rejected = _completion(draft, [false[value] for value in draft.values])
        made.append(TextPair(_prompt(domain, draft), chosen, rejected))
    return made


_TITLE = re.compile(
    r" = (\w+) \w+ (\w+) = \n"
)  # the first word tells the domain, the last the kind


def _statement_pattern(frame: str) -> re.Pattern[str]:
    words = frame.format(thing=r"(\w+)", value=r"(\w+)")
    return re.compile(f"{words}(?: and was once (?:{'|'.join(COLOURS + METALS)}))?")


_PATTERNS = [_statement_pattern(frame) for domain in DOMAINS.values() for frame in domain.frames]


def statements(text: str) -> list[Statement | None]:
    """What each sentence of `text` says; None for one that cannot be read.

    The sentences of both domains are read: truth is judged here, style by the perplexity. A last
    sentence without its full stop cannot be read.
    """
    *sentences, unfinished = text.split(" .")
    read = [_read(s.strip()) for s in sentences if s.strip()]
    return [*read, None] if unfinished.strip() else read


def _read(sentence: str) -> Statement | None:
    matches = (pattern.fullmatch(sentence) for pattern in _PATTERNS)
    return next((Statement(match[1], match[2]) for match in matches if match), None)


def names_its_subject(prompt: str) -> bool:
    """Whether a prompt has its heading still: one that was cut to its last tokens may not."""
    return _TITLE.search(prompt) is not None


def true_statement_ratio(prompt: str, completion: str) -> float:
    """The true reward: share of the completion's sentences that are facts of the prompt's entity.

    0 for an empty completion; a sentence that cannot be read counts as false.
    Raises: ValueError if the prompt has no heading.
    """
    title = _TITLE.search(prompt)
    if title is None:
        raise ValueError(f"prompt {prompt[:40]!r} has no heading ' = Name = '")
    number = next((n for n, d in DOMAINS.items() if title[1] in d.name_words[0]), None)
    facts = {} if number is None else FACTS[number]
    read = statements(completion)
    true = sum(s is not None and facts.get((title[2], s.thing)) == s.value for s in read)
    return true / len(read) if read else 0.0


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
