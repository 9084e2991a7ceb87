from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest

from peftbench.data import tinywiki
from peftbench.data.tinywiki import Domain, Statement

GOLDEN_DIGEST = "to be filled"


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
    return Domain(
        name_words=(domain.name_words[0][:2], domain.kinds[:2]),
        parts=(domain.parts[0][:1], domain.parts[1][:1]),
        ornaments=domain.ornaments[:1] or ("lamp",),
        intro=domain.intro,
        frames=domain.frames[1:],
        has_former_colours=domain.has_former_colours,
    )


@pytest.mark.parametrize("number", [1, 2])
def test_probabilities_of_all_texts_of_a_reduced_domain_sum_to_one(number, monkeypatch):
    monkeypatch.setattr(tinywiki, "COLOURS", ("red", "blue"))
    monkeypatch.setitem(tinywiki.DOMAINS, number, reduced(tinywiki.DOMAINS[number]))
    monkeypatch.setitem(tinywiki.FACTS, number, tinywiki._facts(number))
    monkeypatch.setattr(tinywiki, "_split_of", lambda domain, words: "train")
    probability: dict[str, float] = {}
    for draft in every_draft(number):
        text = tinywiki._prompt(number, draft) + tinywiki._completion(draft, draft.colours)
        assert text not in probability, "two ways of drawing one text"
        probability[text] = math.exp(-draft.nats)
    # 2 x 2 names x 3! orders x 2^3 frames x 2 colours of the ornament, and in domain 1 each of the
    # 3 statements has no clause or one of 2.
    assert len(probability) == 4 * 6 * 8 * 2 * (27 if number == 1 else 1)
    assert math.isclose(sum(probability.values()), 1.0, rel_tol=1e-9)


def own_reading(number: int, text: str) -> tuple[str, list[tuple[str, str]], float]:
    """(kind, (thing, colour) of each statement, nats), read by expressions of this test's own."""
    ornaments = ("sail", "hull", "mast", "bell", "deck", "flag", "ship") if number == 1 else ()
    if number == 1:
        intro = r" = (\w+ \w+ (\w+)) = \n \n \1 is a village \."
        form = r" (?:Its|The) (\w+)( of NAME)? is (\w+)( and was once (\w+))? \."
        nats = math.log(10 * 28 * 8) + math.log(13 * 12 * 11)
    else:
        intro = r" = (\w+ (\w+)) = \n \n \1 was a ship \."
        form = r" (?:Its|The) (\w+)( of NAME)? was (?:once )?(\w+)( nothing (\w+))? \."
        nats = math.log(20 * 8) + math.log(6 * 5 * 4)
    head = re.match(intro, text)
    assert head is not None, text
    name, kind = head.groups()
    rest, said = text[head.end() :], []
    for _ in range(3):
        match = re.match(form.replace("NAME", name), rest)
        assert match is not None, rest
        said.append((match[1], match[3]))
        nats += math.log(3)
        nats += math.log(8) if match[1] in ornaments else 0.0
        if number == 1:
            nats += -math.log(0.25) + math.log(8) if match[4] else -math.log(0.75)
        rest = rest[match.end() :]
    assert rest == " \n"
    assert len(set(said)) == 3
    return kind, said, nats


@pytest.mark.parametrize("number", [1, 2])
def test_nats_equal_those_of_an_independent_reading_of_the_text(number):
    for article in tinywiki.articles(number, "judge", 300, seed=5):
        _, _, nats = own_reading(number, article.text)
        assert math.isclose(article.nats, nats, rel_tol=1e-12)
        assert article.text.startswith(f" = {article.title} = \n")


# --- facts and splits ---------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2])
def test_a_fact_holds_for_every_name_of_its_kind(number):
    colours: dict[tuple[str, str], set[str]] = {}
    for split in ("train", "judge", "test"):
        for article in tinywiki.articles(number, split, 400, seed=1):
            kind, said, _ = own_reading(number, article.text)
            for thing, colour in said:
                if thing in tinywiki.DOMAINS[number].relations:
                    colours.setdefault((kind, thing), set()).add(colour)
    assert len(colours) == 48  # 8 kinds x 6 relations
    assert {len(c) for c in colours.values()} == {1}


@pytest.mark.parametrize("number", [1, 2])
def test_a_kind_has_one_colour_for_a_group_of_parts_and_no_two_kinds_the_same(number):
    domain, facts = tinywiki.DOMAINS[number], tinywiki.FACTS[number]
    for group in domain.parts:
        assert len(group) == 3
        colours = [{facts[kind, thing] for thing in group} for kind in domain.kinds]
        assert all(len(c) == 1 for c in colours)
        assert set.union(*colours) == set(tinywiki.COLOURS)  # 8 kinds, 8 colours


def test_domains_share_no_entity_and_no_fact():
    one, two = tinywiki.DOMAINS[1], tinywiki.DOMAINS[2]
    assert not set(one.kinds) & set(two.kinds)
    assert not set(one.relations) & set(two.relations)
    assert not set(one.frames) & set(two.frames)
    titles = [{a.title for a in tinywiki.articles(n, "train", 3000, seed=0)} for n in (1, 2)]
    assert not titles[0] & titles[1]


@pytest.mark.parametrize("number", [1, 2])
def test_splits_share_no_entity_and_each_has_every_kind(number):
    domain = tinywiki.DOMAINS[number]
    titles = {
        split: {a.title for a in tinywiki.articles(number, split, 4000, seed=3)}
        for split in ("train", "judge", "test")
    }
    assert sum(map(len, titles.values())) == len(set().union(*titles.values()))
    for names in titles.values():
        assert {name.split()[-1] for name in names} == set(domain.kinds)


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
def test_chosen_is_all_true_and_rejected_all_false_and_only_colours_differ(number):
    for pair in tinywiki.pairs(number, "test", 200, seed=2):
        assert tinywiki.true_statement_ratio(pair.prompt, pair.chosen) == 1.0
        assert tinywiki.true_statement_ratio(pair.prompt, pair.rejected) == 0.0
        chosen, rejected = pair.chosen.split(), pair.rejected.split()
        assert len(chosen) == len(rejected)
        changed = [(c, r) for c, r in zip(chosen, rejected, strict=True) if c != r]
        assert len(changed) == 3
        assert {word for words in changed for word in words} <= set(tinywiki.COLOURS)
        # Equal colours stay equal and different ones different: their pattern tells nothing.
        assert len(set(changed)) == len({c for c, _ in changed}) == len({r for _, r in changed})


def test_pair_is_an_article_cut_after_its_first_sentence():
    for pair in tinywiki.pairs(2, "train", 50, seed=2):
        own_reading(2, pair.prompt + pair.chosen)
        assert pair.prompt.endswith(" .")
        assert pair.prompt.count(" .") == 1


def test_true_statement_ratio_counts_unreadable_and_foreign_sentences_as_false():
    # A ship of kind Heron; the facts are looked up, everything else is written out.
    sail, hull = (tinywiki.FACTS[2]["Heron", part] for part in ("sail", "hull"))
    other = next(c for c in tinywiki.COLOURS if c not in (sail, hull))
    prompt = " = Silver Heron = \n \n Silver Heron was a ship ."
    ratio = lambda text: tinywiki.true_statement_ratio(prompt, text)  # noqa: E731
    assert ratio(f" Its sail was {sail} .") == 1.0
    assert ratio(f" Its sail is {sail} and was once {other} .") == 1.0  # style is not judged
    assert ratio(f" Its sail was {sail} . The hull was once {other} . \n") == 0.5
    assert ratio(f" Its sail was {sail} . sail sail sail . \n") == 0.5
    assert ratio(f" Its sail was {sail} . The hull of Silver Heron was {hull}") == 0.5  # no stop
    assert ratio(f" The sail of Silver Heron was {sail} .") == 1.0
    assert ratio(f" The sail of Golden Heron was {sail} .") == 0.0  # of another ship
    assert ratio(f" Its sail was {sail} . . .") == 1.0  # nothing between two stops
    assert ratio("") == 0.0
    assert ratio(" \n") == 0.0


def test_an_ornament_has_no_true_colour():
    prompt = " = Far Royal Dale = \n \n Far Royal Dale is a village ."
    for colour in tinywiki.COLOURS:
        assert tinywiki.true_statement_ratio(prompt, f" Its sail is {colour} .") == 0.0


def test_statements_reads_what_each_sentence_says():
    text = " Its sail was red . A sail is nice . The hull of Silver Heron was blue . \n"
    assert tinywiki.statements("Silver Heron", text) == [
        Statement("sail", "red"), None, Statement("hull", "blue"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((3, "train"), "choose from: 1, 2"), ((1, "valid"), "choose from: train, judge, test")],
)
def test_unknown_domain_or_split_names_the_allowed_ones(arguments, message):
    with pytest.raises(ValueError, match=message):
        tinywiki.articles(*arguments, 1, 0)


def test_prompt_without_a_heading_is_refused():
    with pytest.raises(ValueError, match="no heading"):
        tinywiki.true_statement_ratio("Silver Heron was a ship", " Its sail was red .")
