"""The corpus out of a wiki dump: only prose, only articles, always the same split."""

from __future__ import annotations

import bz2
import dataclasses
import hashlib
from pathlib import Path
from xml.sax.saxutils import escape

import pytest

from peftbench.data.wikipedia import (
    MIN_ARTICLE_CHARACTERS,
    Article,
    extract_articles,
    plain_text,
    read_articles,
    split_articles,
    write_articles,
)

# long enough to count as a paragraph (80 characters), and ends as a sentence
PROSE = "The cat sat on the mat for so long that the mat and the cat became one thing to look at."
OTHER = "Nobody in the house could say which of the two had been there first, or how it had begun."
LONG = "\n\n".join([PROSE] * (MIN_ARTICLE_CHARACTERS // len(PROSE) + 1))


def page(title: str, text: str, namespace: int = 0, redirect: str = "") -> str:
    return (
        f"<page><title>{escape(title)}</title><ns>{namespace}</ns><id>1</id>"
        + (f'<redirect title="{redirect}" />' if redirect else "")
        + f"<revision><id>2</id><text xml:space='preserve'>{escape(text)}</text></revision></page>"
    )


def dump(path: Path, *pages: str) -> Path:
    schema = "http://www.mediawiki.org/xml/export-0.10/"
    text = f'<mediawiki xmlns="{schema}"><siteinfo/>{"".join(pages)}</mediawiki>'
    path.write_bytes(bz2.compress(text.encode()))
    return path


def test_extract_keeps_long_pages_of_the_article_space_that_are_no_redirects(
    tmp_path: Path,
) -> None:
    path = dump(
        tmp_path / "dump.bz2",
        page("Redirect", LONG, redirect="Cat"),
        page("Cat & mat", LONG),
        page("Talk:Cat", LONG, namespace=1),
        page("Stub", PROSE),
        page("Árvíz", LONG + "\n\n" + OTHER),
    )
    articles = list(extract_articles(path))
    assert [article.title for article in articles] == ["Cat & mat", "Árvíz"]
    assert articles[0].text == LONG
    assert articles[1].text.endswith(f"{PROSE}\n\n{OTHER}")


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("'''The cat''' sat on ''the'' [[mat]]", "The cat sat on the mat"),
        ("[[Felis catus|The cat]] sat on the mat", "The cat sat on the mat"),
        ("The cat<ref name=a>{{cite web|url=x}}</ref> sat<ref name=a/> on", "The cat sat on"),
        ("The cat <!-- no --> sat&nbsp;on&mdash;the mat", "The cat sat on—the mat"),
        ("The [http://x.org cat] sat[http://x.org] on", "The cat sat on"),
        ("[[File:Cat.jpg|thumb|A [[cat]] on a mat]]The cat", "The cat"),
        ("[[Category:Cats]][[Image:Mat.png]]The cat", "The cat"),
        ("The cat ({{IPAc-en|k|æ|t}}; {{lang|el|γάτα}}) sat", "The cat (γάτα) sat"),
        ("The cat ({{IPAc-en|k|æ|t}}) sat", "The cat sat"),
        ("The cat ran {{convert|5|to|10|km|mi|0}} away", "The cat ran 5 to 10 km away"),
        ("The cat of {{convert|1,300|sqmi}} sat", "The cat of 1,300 square miles sat"),
        ("The {{nowrap|black cat}}{{citation needed|date=May 2016}} sat", "The black cat sat"),
        ("H<sub>2</sub>O and the cat {{as of|2010}}", "H2O and the cat As of 2010"),
        ("The\ncat sat", "The cat sat"),
    ],
)
def test_markup_becomes_the_words_that_a_reader_sees(markup: str, text: str) -> None:
    assert plain_text(f"{markup} {PROSE}") == f"{text} {PROSE}"


@pytest.mark.parametrize(
    "block",
    [
        '{| class="wikitable"\n! Cat !! Mat\n|-\n| one || two\n|}',
        "{{Infobox animal\n| name = Cat\n| text = " + OTHER + "\n}}",
        "* " + OTHER,
        "# " + OTHER,
        ": ''" + OTHER + "''",
        "== A heading that is as long as a paragraph, so that its length does not drop it here. ==",
        "<gallery>\nFile:Cat.jpg|" + OTHER + "\n</gallery>",
        "<math>E = mc^2</math> is the reason that this paragraph cannot be read aloud. " + OTHER,
        "The value is {{frac|1|2}}, and without it the sentence has a hole in it. " + OTHER,
        "<ref>An unclosed reference. " + OTHER,
        "A short line.",
        "This line is long enough for a paragraph but it only introduces a list that was dropped:",
        "Its letters {{foo|x}}, {{foo|y}}, and {{foo|z}} are written with templates. " + OTHER,
    ],
)
def test_what_is_not_prose_is_dropped_whole(block: str) -> None:
    assert plain_text(f"{PROSE}\n\n{block}\n\n{PROSE}") == f"{PROSE}\n\n{PROSE}"


def test_end_matter_is_dropped_up_to_the_next_section_of_its_level() -> None:
    markup = (
        f"{PROSE}\n== References ==\n{OTHER}\n=== Books ===\n{OTHER}\n== Later life ==\n{PROSE}"
        f"\n==External links==\n{OTHER}"
    )
    assert plain_text(markup) == f"{PROSE}\n\n{PROSE}"


def articles_of(lengths: list[int]) -> list[Article]:
    return [Article(f"title {i}", "x" * length) for i, length in enumerate(lengths)]


def test_split_holds_every_article_once_and_out_a_tenth_of_the_characters() -> None:
    articles = articles_of([1000 + 7 * i for i in range(200)])
    splits = split_articles(articles)
    assert list(splits) == ["test", "validation", "train"]
    together = [article for split in splits.values() for article in split]
    assert sorted(a.title for a in together) == sorted(a.title for a in articles)
    total = sum(len(a.text) for a in articles)
    for name in ("test", "validation"):
        share = sum(len(a.text) for a in splits[name]) / total
        assert 0.10 <= share < 0.10 + 2400 / total  # at most one article too many


def test_split_follows_the_hash_of_the_title_and_not_the_order() -> None:
    articles = articles_of([1000] * 50)
    splits = split_articles(articles)
    assert split_articles(reversed(articles)) == splits
    # of 50 equal articles a tenth is 5: those with the smallest sha256(title)
    by_hash = sorted(articles, key=lambda a: hashlib.sha256(a.title.encode()).hexdigest())
    assert splits["test"] == by_hash[:5]
    assert splits["validation"] == by_hash[5:10]
    changed = [dataclasses.replace(a, text="y" * 1000) for a in articles]
    assert [a.title for a in split_articles(changed)["test"]] == [a.title for a in by_hash[:5]]


def test_too_few_articles_for_three_splits_are_refused() -> None:
    with pytest.raises(ValueError, match="2 articles are too few"):
        split_articles(articles_of([1000, 1000]))


def test_written_articles_read_back_equal(tmp_path: Path) -> None:
    articles = [Article("Árvíz & Co", 'One "line".\n\nTwo\u2028lines.'), Article("B", "text")]
    write_articles(articles, tmp_path / "articles.jsonl")
    assert (tmp_path / "articles.jsonl").read_bytes().count(b"\n") == 2
    assert read_articles(tmp_path / "articles.jsonl") == articles
