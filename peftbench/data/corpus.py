"""A plain corpus: lines to documents, and preference pairs derived from documents.

A derived pair is a passage of an article, its true continuation, and, as the rejected one, an
equally long passage from later in the same article: as fluent and on the same topic, but not what
comes next. It is harder to tell than a passage from another article.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from peftbench.data.task import TokenPair
from peftbench.data.tokens import Encoder

# A title line of WikiText (` = Title = `), not a section's (` = = Section = = `).
_TITLE = re.compile(r" ?= (?!=)(.*[^= ]) = *")

PAIRS_PER_PASS = 4  # taken from one article before the next article's turn: few read, many topics
MIN_DOCUMENTS = 3  # one each for training, judge and test
HELD_OUT_SHARE = 0.2  # of the documents, for the judge and for the test each


@dataclass(frozen=True)
class Corpus:
    """The documents of three disjoint splits."""

    train: Sequence[str]
    judge: Sequence[str]
    test: Sequence[str]


def has_titles(lines: Sequence[str]) -> bool:
    """Whether titles divide the lines; one or two may be chance."""
    return sum(_is_title(lines, i) for i in range(len(lines))) >= MIN_DOCUMENTS


def _is_title(lines: Sequence[str], i: int) -> bool:
    """Formulas in running text look like titles, but no blank line stands before them."""
    return "= " in lines[i] and (i == 0 or not lines[i - 1].strip()) and bool(
        _TITLE.fullmatch(lines[i])
    )  # fmt: skip


def documents_by_title(lines: Sequence[str]) -> list[str]:
    """One document per WikiText title; `lines` are without their line ends."""
    starts = [i for i in range(len(lines)) if _is_title(lines, i)]
    ends = [*starts, len(lines)]
    texts = (_join(lines[a:b]) for a, b in zip([0, *starts], ends, strict=True))
    return [text for text in texts if text]


def documents_by_size(lines: Iterable[str], characters: int) -> list[str]:
    """Paragraphs grouped to documents of about `characters`, ended at a blank line if one comes."""
    documents: list[str] = []
    group: list[str] = []
    size = 0
    for line in lines:
        group.append(line)
        size += len(line) + 1
        if size >= (2 * characters if line.strip() else characters):
            documents.append(_join(group))
            group, size = [], 0
    documents.append(_join(group))
    return [text for text in documents if text]


def _join(lines: Sequence[str]) -> str:
    # Blank lines hold one space in WikiText's files and none in its data set: here none.
    return "\n".join(line if line.strip() else "" for line in lines).strip()


def split_documents(documents: Sequence[str]) -> Corpus:
    """Disjoint splits by document, in an order that has nothing to do with the file's."""
    mixed = _shuffled(documents, "split")
    share = max(1, int(HELD_OUT_SHARE * len(mixed)))
    return Corpus(test=mixed[:share], judge=mixed[share : 2 * share], train=mixed[2 * share :])


def split_training(documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """(train, judge) of a training split whose test split is given."""
    mixed = _shuffled(documents, "split")
    share = max(1, int(HELD_OUT_SHARE * len(mixed)))
    return mixed[share:], mixed[:share]


def _shuffled(documents: Sequence[str], seed: str) -> list[str]:
    mixed = list(documents)
    random.Random(seed).shuffle(mixed)
    return mixed


def most_pairs(sizes: Iterable[int], prompt_length: int, completion_length: int) -> int:
    """How many pairs documents of these many tokens can give."""
    window = prompt_length + completion_length
    return sum(max(0, (size - completion_length) // window) for size in sizes)


def derive_pairs(
    documents: Sequence[str],
    encoder: Encoder,
    count: int,
    prompt_length: int,
    completion_length: int,
    seed: str,
) -> list[TokenPair]:
    """`count` pairs of exact lengths in seeded order, or as many as the documents give.

    Windows of prompt and chosen do not overlap each other, so no token is learnt twice as chosen.
    Documents are tokenised only when their turn comes.
    """
    order = list(range(len(documents)))
    random.Random(f"order {seed}").shuffle(order)
    left: dict[int, list[TokenPair]] = {}
    pairs: list[TokenPair] = []
    while order and len(pairs) < count:
        for i in order:
            if i not in left:
                ids = encoder.encode(documents[i])
                left[i] = _windows(ids, encoder, prompt_length, completion_length, f"{seed} {i}")
            pairs += left[i][:PAIRS_PER_PASS]
            del left[i][:PAIRS_PER_PASS]
            if len(pairs) >= count:
                break
        order = [i for i in order if left.get(i, True)]
    # Each article's pairs stand together until here: a batch must not be of one topic.
    made = pairs[:count]
    random.Random(f"mix {seed}").shuffle(made)
    return made


def _windows(
    ids: list[int], encoder: Encoder, prompt_length: int, completion_length: int, seed: str
) -> list[TokenPair]:
    """All pairs of one document, in seeded order."""
    dice = random.Random(seed)
    bos = [] if encoder.bos_id is None or prompt_length == 1 else [encoder.bos_id]
    last = len(ids) - completion_length  # where the last rejected passage can begin
    pairs = []
    for start in range(0, len(ids), prompt_length + completion_length):
        cut = start + prompt_length
        end = cut + completion_length
        if end > last:
            break
        other = dice.randint(end, last)
        prompt = [*bos, *ids[start + len(bos) : cut]]
        rejected = ids[other : other + completion_length]
        pairs.append(TokenPair(tuple(prompt), tuple(ids[cut:end]), tuple(rejected)))
    dice.shuffle(pairs)
    return pairs
