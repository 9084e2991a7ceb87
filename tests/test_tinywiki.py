from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest

from peftbench.data import tinywiki
from peftbench.data.tinywiki import Domain, Statement

GOLDEN_DIGEST = "a4482496d92aeecf84f5027b286960ce7072b95cb7243940ffed6f6b16f49b9b"


def test_generator_output_is_the_one_that_the_shipped_weights_were_trained_on():
    # A changed digest voids peftbench/tiny: train the models again before changing this line.
    assert tinywiki.corpus_digest() == GOLDEN_DIGEST


# --- the probability of a text ------------------------------------------------------------------


class ScriptedDice(tinywiki._Dice):
    """Takes the choices that a list of indices says, then 0, and notes how many there were."""

    def __init__(self, script: Sequence[int]) -> None:
        super().__init__("")
        self.script = list(script)
        self.widths: list[int] = []
        self._random = self._next

    def _next(self) -> float:
        at = len(self.widths)
        self.widths.append(self.width)
        self.script += [0] * (at + 1 - len(self.script))
        return self.script[at] / self.width + 1e-9

    def pick(self, options: Sequence[str]) -> str:
        self.width = len(options)
        return super().pick(options)

    def flip(self, ratio: float) -> bool:
        assert ratio < 0.5, "index 0 must be heads and index 1 tails"
        self.width = 2
        return super().flip(ratio)


def every_draft(number: int) -> Iterator[tinywiki._Draft]:
    script: list[int] = []
    while True:
        dice = ScriptedDice(script)
        yield tinywiki._draw(number, "train", dice)
        script, widths = dice.script, dice.widths
        while script and script[-1] + 1 == widths[len(script) - 1]:
            script.pop()
        if not script:
            return
        script[-1] += 1


def reduced(domain: Domain) -> Domain:
    """2 kinds, in domain 1 the second without facts; a painted part, a metal part, an ornament."""
    last = domain.name_words[-1]
    parts = list(domain.parts)
    kinds = (last[0], last[-1]) if last == domain.kinds else (last[0],)
    ornament = next(iter(domain.ornaments), "oar")
    return Domain(
        name_words=(domain.name_words[0][:2], (last[0], last[-1])),
        kinds=kinds,
        parts={parts[0]: tinywiki.COLOURS, parts[-1]: tinywiki.METALS},
        ornaments={ornament: tinywiki.COLOURS},
        intro=domain.intro,
        frames=domain.frames[1:],
        values_in_facts=len(kinds),
        has_former_values=domain.has_former_values,
    )


@pytest.mark.parametrize("number", [1, 2])
def test_probabilities_of_all_texts_of_a_reduced_domain_sum_to_one(number, monkeypatch):
    monkeypatch.setattr(tinywiki, "COLOURS", ("red", "blue"))
    monkeypatch.setattr(tinywiki, "METALS", ("iron", "gold"))
    monkeypatch.setitem(tinywiki.DOMAINS, number, reduced(tinywiki.DOMAINS[number]))
    monkeypatch.setitem(tinywiki.FACTS, number, tinywiki._facts(number))
    monkeypatch.setattr(tinywiki, "_split_of", lambda domain, words: "train")
    probability: dict[str, float] = {}
    for draft in every_draft(number):
        text = tinywiki._prompt(number, draft) + tinywiki._completion(draft, draft.values)
        assert text not in probability, "two ways of drawing one text"
        probability[text] = math.exp(-draft.nats)
    # For each of 2 x 2 names 3! orders x 2^3 frames x 2 values of the ornament. In domain 1 each of
    # the 3 statements has no clause or one of 2, and of 2 names the two facts are free as well.
    names = 2 + 2 * 4 if number == 1 else 4
    assert len(probability) == names * 6 * 8 * 2 * (27 if number == 1 else 1)
    assert math.isclose(sum(probability.values()), 1.0, rel_tol=1e-9)


def own_reading(number: int, text: str) -> tuple[str, list[tuple[str, str]], float]:
    """(kind, (thing, value) of each statement, nats), read by expressions of this test's own."""
    head = re.match(r" = (\w+ \w+ (\w+)) = \n \n \1 (is a village|was a ship) \.", text)
    assert head is not None, text
    if number == 1:
        assert head[3] == "is a village"
        form = r" (?:Its \w+|The \w+|The \w+ of the village) is (\w+)( and was once (\w+))? \."
        nats = math.log(10 * 30 * 16) + math.log(13 * 12 * 11)
    else:
        assert head[3] == "was a ship"
        form = r" (?:Its \w+ was|The \w+ was once|The \w+ of the ship was) (\w+)( nothing)? \."
        nats = math.log(10 * 20 * 8) + math.log(6 * 5 * 4)
    rest, said = text[head.end() :], []
    for _ in range(3):
        match = re.match(form, rest)
        assert match is not None, rest
        thing = match[0].split()[1]
        said.append((thing, match[1]))
        nats += math.log(3)
        if number == 1:
            nats += -math.log(0.25) + math.log(8) if match[2] else -math.log(0.75)
            ornament = thing in ("sail", "hull", "flag", "bell", "anchor", "lamp", "ship")
            if ornament or head[2] in tinywiki.DOMAINS[2].kinds:
                nats += math.log(8)
        rest = rest[match.end() :]
    assert rest == " \n"
    assert len({thing for thing, _ in said}) == 3
    return head[2], said, nats


@pytest.mark.parametrize("number", [1, 2])
def test_nats_equal_those_of_an_independent_reading_of_the_text(number):
    for article in tinywiki.articles(number, "judge", 300, seed=5):
        _, _, nats = own_reading(number, article.text)
        assert math.isclose(article.nats, nats, rel_tol=1e-12)
        assert article.text.startswith(f" = {article.title} = \n")


# --- facts and splits ---------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2])
def test_a_fact_holds_for_every_name_of_its_kind(number):
    values: dict[tuple[str, str], set[str]] = {}
    for split in ("train", "judge", "test"):
        for article in tinywiki.articles(number, split, 400, seed=1):
            kind, said, _ = own_reading(number, article.text)
            for thing, value in said:
                domain = tinywiki.DOMAINS[number]
                if kind in domain.kinds and thing in domain.parts:
                    values.setdefault((kind, thing), set()).add(value)
    assert len(values) == 48  # 8 kinds x 6 parts
    assert {len(v) for v in values.values()} == {1}


@pytest.mark.parametrize("number", [1, 2])
def test_every_kind_has_one_colour_and_one_metal(number):
    """Eight kinds: in domain 1 each has its own, in domain 2 two and two share one of four."""
    domain, facts = tinywiki.DOMAINS[number], tinywiki.FACTS[number]
    for values in (tinywiki.COLOURS, tinywiki.METALS):
        parts = [part for part, allowed in domain.parts.items() if allowed == values]
        assert len(parts) == 3
        of_kind = [{facts[kind, part] for part in parts} for kind in domain.kinds]
        assert all(len(v) == 1 for v in of_kind)
        kinds_of_value = Counter(v for (v,) in of_kind)
        assert kinds_of_value.keys() <= set(values)
        assert sorted(kinds_of_value.values()) == ([1] * 8 if number == 1 else [2] * 4)


def test_domains_share_no_entity_and_no_fact():
    one, two = tinywiki.DOMAINS[1], tinywiki.DOMAINS[2]
    assert not set(one.kinds) & set(two.kinds)
    assert not set(one.name_words[0]) & set(two.name_words[0])
    assert not one.parts.keys() & two.parts.keys()
    assert not set(one.frames) & set(two.frames)
    titles = [{a.title for a in tinywiki.articles(n, "train", 3000, seed=0)} for n in (1, 2)]
    assert not titles[0] & titles[1]


@pytest.mark.parametrize("number", [1, 2])
def test_splits_share_no_entity_and_each_has_every_kind(number):
    domain = tinywiki.DOMAINS[number]
    titles = {
        split: {a.title for a in tinywiki.articles(number, split, 2000, seed=3)}
        for split in ("train", "judge", "test")
    }
    assert sum(map(len, titles.values())) == len(set().union(*titles.values()))
    for names in titles.values():
        assert {name.split()[-1] for name in names} == set(domain.name_words[-1])


@pytest.mark.parametrize("number", [1, 2])
def test_a_tenth_of_the_names_is_held_out_for_the_test_and_a_tenth_for_the_judge(number):
    domain = tinywiki.DOMAINS[number]
    names = list(itertools.product(*domain.name_words))
    shares = Counter(tinywiki._split_of(domain, words) for words in names)
    assert shares["test"] == shares["judge"] == len(names) / 10


def test_same_seed_gives_the_same_texts_and_another_seed_others():
    first, again = (tinywiki.articles(2, "train", 20, seed=7) for _ in range(2))
    assert first == again
    assert first != tinywiki.articles(2, "train", 20, seed=8)
    assert first[:5] == tinywiki.articles(2, "train", 5, seed=7)
    assert tinywiki.pairs(2, "test", 20, seed=7) != tinywiki.pairs(2, "test", 20, seed=8)


# --- pairs and truth ----------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2])
def test_chosen_is_all_true_and_rejected_all_false_and_only_values_differ(number):
    for pair in tinywiki.pairs(number, "test", 200, seed=2):
        assert tinywiki.true_statement_ratio(pair.prompt, pair.chosen) == 1.0
        assert tinywiki.true_statement_ratio(pair.prompt, pair.rejected) == 0.0
        chosen, rejected = pair.chosen.split(), pair.rejected.split()
        assert len(chosen) == len(rejected)
        changed = [(c, r) for c, r in zip(chosen, rejected, strict=True) if c != r]
        assert len(changed) == 3
        for words in changed:  # a false colour is a colour, a false metal a metal
            assert set(words) <= set(tinywiki.COLOURS) or set(words) <= set(tinywiki.METALS)
        # Equal values stay equal and different ones different: their pattern tells nothing.
        assert len(set(changed)) == len({c for c, _ in changed}) == len({r for _, r in changed})


def test_pair_is_an_article_cut_after_its_first_sentence():
    for pair in tinywiki.pairs(2, "train", 50, seed=2):
        own_reading(2, pair.prompt + pair.chosen)
        assert pair.prompt.endswith(" .")
        assert pair.prompt.count(" .") == 1


def test_true_statement_ratio_counts_sentences_that_cannot_be_read_as_false():
    # A ship of kind Heron; the facts are looked up, everything else is written out.
    sail, bell = (tinywiki.FACTS[2]["Heron", part] for part in ("sail", "bell"))
    other = next(c for c in tinywiki.COLOURS if c != sail)
    prompt = " = Old River Heron = \n \n Old River Heron was a ship ."

    def ratio(text: str) -> float:
        return tinywiki.true_statement_ratio(prompt, text)

    assert ratio(f" Its sail was {sail} .") == 1.0
    assert ratio(f" Its sail was {other} .") == 0.0
    assert ratio(f" Its sail is {sail} and was once {other} .") == 1.0  # style is not judged
    assert ratio(f" Its sail was {sail} . The bell was once {other} . \n") == 0.5
    assert ratio(f" Its sail was {sail} . sail sail sail . \n") == 0.5
    assert ratio(f" Its sail was {sail} . The bell of the ship was {bell}") == 0.5  # no full stop
    assert ratio(f" The bell of the ship was {bell} .") == 1.0
    assert ratio(f" The bell of a ship was {bell} .") == 0.0
    assert ratio(f" Its sail was {sail} . . .") == 1.0  # nothing between two stops
    assert ratio("") == 0.0
    assert ratio(" \n") == 0.0


@pytest.mark.parametrize(
    ("name", "thing"), [("Far River Dale", "sail"), ("Far River Heron", "sail"),
                        ("Far River Heron", "roof"), ("Some Other Dale", "roof")],
)  # fmt: skip
def test_ornaments_and_entities_without_facts_have_no_true_value(name, thing):
    prompt = f" = {name} = \n \n {name} is a village ."
    for colour in tinywiki.COLOURS:
        assert tinywiki.true_statement_ratio(prompt, f" Its {thing} is {colour} .") == 0.0


def test_statements_reads_what_each_sentence_says():
    text = " Its sail was red . A sail is nice . The bell of the ship was iron . The lamp"
    assert tinywiki.statements(text) == [
        Statement("sail", "red"), None, Statement("bell", "iron"), None,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((3, "train"), "choose from: 1, 2"), ((1, "valid"), "choose from: train, judge, test")],
)
def test_unknown_domain_or_split_names_the_allowed_ones(arguments, message):
    with pytest.raises(ValueError, match=message):
        tinywiki.articles(*arguments, 1, 0)


def test_prompt_without_a_heading_is_refused():
    (pair,) = tinywiki.pairs(1, "test", 1, seed=0)
    assert tinywiki.names_its_subject(pair.prompt)
    assert not tinywiki.names_its_subject("Silver Heron was a ship")
    with pytest.raises(ValueError, match="no heading"):
        tinywiki.true_statement_ratio("Silver Heron was a ship", " Its sail was red .")
