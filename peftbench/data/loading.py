"""Any data set to a TokenTask: training pairs, held-out pairs and held-out text for one model.

name, Hub id or path -> read_source -> Preferences or Corpus (text, three disjoint splits)
                     -> load_task   -> TokenTask (ids)
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peftbench.case import expanded, is_local, public_name
from peftbench.data import assets, hub, tinywiki
from peftbench.data.corpus import (
    MIN_DOCUMENTS,
    Corpus,
    derive_pairs,
    most_pairs,
    split_documents,
    split_training,
)
from peftbench.data.files import SUFFIXES, Limits, read_folder_or_file
from peftbench.data.hub import HubData
from peftbench.data.preference import Preferences, render, split_pairs
from peftbench.data.task import TokenPair, TokenTask
from peftbench.data.tokens import (
    Document,
    EncodedPairs,
    Encoder,
    HeldOutText,
    encode_pairs,
    join_documents,
    make_encoder,
)
from peftbench.data.wikipedia import read_articles, split_articles
from peftbench.errors import UserError, unknown_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peftbench.case import Settings

_WIKITEXT = ("Salesforce/wikitext", "b08601e04326c79dfdd32d625aee71d232d685c3")
TINYWIKI_DOMAIN = 2  # the tiny models were pretrained on domain 1
# No tokenizer gets an article of more than 30 words into fewer ids: so many articles are enough.
_LEAST_ARTICLE_TOKENS = 20


@dataclass(frozen=True)
class Data:
    """A named data set; `hub` says where it is if it is on the Hub, with its revision."""

    about: str
    hub: HubData | None = None


DATA: dict[str, Data] = {
    "tinywiki": Data("generated articles and statements whose entropy and truth are known"),
    "wikipedia-sample": Data("89 real Wikipedia articles out of a PyPI wheel, 28 MB to fetch"),
    "wikitext-2": Data("WikiText-2, raw", HubData(_WIKITEXT[0], "wikitext-2-raw-v1", _WIKITEXT[1])),
    "wikitext-103": Data(
        "WikiText-103, raw", HubData(_WIKITEXT[0], "wikitext-103-raw-v1", _WIKITEXT[1])
    ),
    "synthetic": Data("seeded random ids of exact lengths: time and memory without a tokenizer"),
}


def load_task(
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
    judge_pairs: int = 0,
) -> TokenTask:
    """The data set of the settings as ids of this tokenizer; synthetic ids without one.

    `judge_pairs` is for methods with a reward model: at most so many pairs are tokenised for it.
    Training and test pairs are the same whatever it is.
    Raises: UserError for data that cannot be read or are too few.
    """
    if tokenizer is None or settings.data == "synthetic":
        return _synthetic_task(settings, vocab_size, judge_pairs)
    encoder = make_encoder(tokenizer)
    source = read_source(settings, judge_pairs)
    if isinstance(source, Corpus):
        train, judge, test = _derived(source, encoder, settings, judge_pairs)
        documents: Iterable[Document] = map(Document, source.test)
    else:
        train, judge, test = _encoded(source, encoder, settings, judge_pairs)
        documents = _held_out_documents(source, encoder, settings)
    text = join_documents(documents, encoder, settings.eval_tokens)
    return _task(public_name(settings.data), train, judge, test, text)


def check_data(settings: Settings) -> None:
    """Everything about the data that can fail without a tokenizer, before any training starts.

    Fetches what has to be fetched. Raises: UserError.
    """
    found = find(settings.data)
    if settings.data in ("tinywiki", "synthetic"):
        return
    if settings.data == "wikipedia-sample":
        assets.fetch(settings.data)
    elif isinstance(found, HubData):
        hub.fetch(found)
    source = read_source(settings)
    if isinstance(source, Corpus):
        # A token has at least one byte: what is too small in bytes is too small in any tokens.
        for split, texts, count in (
            ("training", source.train, settings.pairs),
            ("test", source.test, settings.eval_pairs),
        ):
            sizes = [len(text.encode()) + 1 for text in texts]
            most = most_pairs(sizes, settings.prompt_length, settings.completion_length)
            _check_count(settings, split, most, count, len(texts), at_most="at most ")


def check_lengths(settings: Settings, context: int | None) -> None:
    """Raise UserError if pairs or scored windows do not fit the model's context (None: any)."""
    if context is None:
        return
    length = settings.prompt_length + settings.completion_length
    if length > context:
        raise UserError(
            f"prompt_length {settings.prompt_length} + completion_length"
            f" {settings.completion_length} = {length} tokens, but the model's context is"
            f" {context}; lower one of them"
        )
    if settings.eval_context > context:
        raise UserError(
            f"eval_context is {settings.eval_context}, but the model's context is {context};"
            " lower eval_context"
        )


def find(name: str) -> str | HubData | Path:
    """What a value of `--data` means: a name of DATA (its HubData if it has one), a path, a Hub id.

    Raises: UserError if it is none of them.
    """
    if name in DATA:
        return DATA[name].hub or name
    path = expanded(name)
    if path.exists():
        return path
    if is_local(name) or path.suffix in SUFFIXES or name.count("/") > 1:
        raise UserError(
            f"no file or folder {name!r}; give an existing path, a Hub id (owner/name) or one of:"
            f" {', '.join(DATA)}"
        )
    if match := hub.HUB_ID.fullmatch(name):
        return HubData(match["id"], match["config"])
    raise UserError(f"{unknown_name('data', name, DATA)}, or give a path or a Hub id (owner/name)")


def read_source(settings: Settings, judge_pairs: int = 0) -> Preferences | Corpus:
    """The data set as text in three disjoint splits; training pairs are in the seed's order.

    What is generated has `judge_pairs` for the judge; what is read has as many as there are.
    """
    name = settings.data
    if name == "tinywiki":
        return Preferences(
            train=tinywiki.pairs(TINYWIKI_DOMAIN, "train", settings.pairs, settings.seed),
            judge=tinywiki.pairs(TINYWIKI_DOMAIN, "judge", judge_pairs, 0),
            test=tinywiki.pairs(TINYWIKI_DOMAIN, "test", settings.eval_pairs, 0),
        )
    if name == "wikipedia-sample":
        articles = split_articles(read_articles(assets.fetch(name) / assets.ARTICLES))
        texts = {split: [a.text for a in part] for split, part in articles.items()}
        return Corpus(texts["train"], judge=texts["validation"], test=texts["test"])
    found = find(name)
    if isinstance(found, HubData):
        found = hub.cached(found) or hub.fetch(found)
    return _read_path(Path(found), settings)


def _read_path(path: Path, settings: Settings) -> Preferences | Corpus:
    splits = read_folder_or_file(path, _limits(settings))
    train, test = splits["train"], splits.get("test")
    if train.pairs is not None:
        return split_pairs(
            public_name(settings.data), train.pairs, test.pairs if test else None,
            settings.pairs, settings.eval_pairs, settings.seed,
        )  # fmt: skip
    documents, held_out = train.documents or [], test.documents if test else None
    wanted = MIN_DOCUMENTS if held_out is None else MIN_DOCUMENTS - 1
    if len(documents) < wanted:
        raise UserError(
            f"{public_name(settings.data)} is cut into {len(documents)} documents; at least"
            f" {wanted} are needed so that training, judge and test share none: give more text"
        )
    if held_out is None:
        return split_documents(documents)
    return Corpus(*split_training(documents), test=held_out)


def _limits(settings: Settings) -> Limits:
    """Five times what is needed, at four characters a token."""
    pairs = 2 * settings.pairs + settings.eval_pairs
    pair_tokens = settings.prompt_length + 2 * settings.completion_length
    return Limits(
        rows=max(10_000, 5 * pairs),
        characters=max(4_000_000, 5 * 4 * (pairs * pair_tokens + settings.eval_tokens)),
        document_characters=4 * 4 * pair_tokens,
    )


def _derived(
    corpus: Corpus, encoder: Encoder, settings: Settings, judge_pairs: int
) -> list[EncodedPairs]:
    """Train, judge and test pairs cut out of the splits' documents."""
    made = []
    for split, texts, count, seed in (
        ("training", corpus.train, settings.pairs, f"train {settings.seed}"),
        ("judge", corpus.judge, judge_pairs, "judge"),
        ("test", corpus.test, settings.eval_pairs, "test"),
    ):
        pairs = derive_pairs(
            texts, encoder, count, settings.prompt_length, settings.completion_length, seed
        )
        if split != "judge":  # a judge makes do with what there is
            _check_count(settings, split, len(pairs), count, len(texts))
        made.append(EncodedPairs(tuple(pairs)))
    return made


def _check_count(
    settings: Settings, split: str, pairs: int, wanted: int, documents: int, at_most: str = ""
) -> None:
    if pairs < wanted:
        least = settings.prompt_length + 2 * settings.completion_length
        raise UserError(
            f"{public_name(settings.data)} gives {at_most}{pairs} {split} pairs out of"
            f" {documents} documents, {wanted} are asked for; a pair takes {least} tokens of one"
            f" document: give more text, or lower pairs, eval_pairs or the lengths"
        )


def _encoded(
    preferences: Preferences, encoder: Encoder, settings: Settings, judge_pairs: int
) -> list[EncodedPairs]:
    """Train, judge and test pairs as ids, of test as many as are scored."""
    made = [
        encode_pairs(
            [render(pair, encoder.tokenizer) for pair in pairs],
            encoder, settings.prompt_length, settings.completion_length,
        )
        for pairs in (
            preferences.train,
            preferences.judge[:judge_pairs],
            preferences.test[: settings.eval_pairs],
        )
    ]  # fmt: skip
    for split in (made[0], made[2]):
        if all(pair.chosen == pair.rejected for pair in split.pairs):
            raise UserError(
                f"{public_name(settings.data)}: cut to {settings.completion_length} tokens, chosen"
                " equals rejected in all pairs; raise completion_length"
            )
    return made


def _held_out_documents(
    preferences: Preferences, encoder: Encoder, settings: Settings
) -> Iterator[Document]:
    """tinywiki's own articles; of other preference sets the chosen side of the test pairs."""
    if settings.data == "tinywiki":
        count = settings.eval_tokens // _LEAST_ARTICLE_TOKENS + 1
        for article in tinywiki.articles(TINYWIKI_DOMAIN, "test", count, 0):
            yield Document(article.text, article.nats)
        return
    for pair in preferences.test:
        text = render(pair, encoder.tokenizer)
        yield Document(text.prompt + text.chosen)


def _synthetic_task(settings: Settings, vocab_size: int, judge_pairs: int) -> TokenTask:
    """Random ids of exact lengths: no text, so no bytes and no floor."""
    lengths = (settings.prompt_length, settings.completion_length, settings.completion_length)

    def pairs(count: int, seed: str) -> EncodedPairs:
        dice = random.Random(seed)
        rows = (
            [tuple(dice.choices(range(vocab_size), k=n)) for n in lengths] for _ in range(count)
        )
        return EncodedPairs(tuple(TokenPair(*row) for row in rows))

    ids = random.Random("text").choices(range(vocab_size), k=max(2, settings.eval_tokens))
    return _task(
        "synthetic",
        pairs(settings.pairs, f"train {settings.seed}"),
        pairs(judge_pairs, "judge"),
        pairs(settings.eval_pairs, "test"),
        HeldOutText(tuple(ids), 0, None),
    )


def _task(
    name: str, train: EncodedPairs, judge: EncodedPairs, test: EncodedPairs, text: HeldOutText
) -> TokenTask:
    return TokenTask(
        name=name,
        digest=_digest([train.pairs, judge.pairs, test.pairs], text.ids),
        train=train.pairs,
        judge=judge.pairs,
        test=test.pairs,
        test_tokens=text.ids,
        test_bytes=text.bytes,
        floor_nats=text.nats,
        truncated_prompts=train.truncated_prompts + test.truncated_prompts,
        truncated_completions=train.truncated_completions + test.truncated_completions,
    )


def _digest(splits: Sequence[Sequence[TokenPair]], text: Sequence[int]) -> str:
    """sha256 over all ids; lengths are in it, so no id can move to a neighbour unseen."""
    digest = hashlib.sha256()
    for split in splits:
        digest.update(f"pairs {len(split)}\n".encode())
        for pair in split:
            digest.update(f"{pair.prompt}{pair.chosen}{pair.rejected}\n".encode())
    digest.update(f"text {text}".encode())
    return digest.hexdigest()
