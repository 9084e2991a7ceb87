"""Text to token ids: preference pairs, and held-out documents joined to one stream.

Special tokens are put here, not by the tokenizer: where it would put BOS a BOS is put, and an EOS
ends what its author ended. Nothing is padded, so a model whose pad id is its EOS id keeps its EOS.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftbench.data.task import TextPair, TokenPair
from peftbench.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Document:
    """A held-out text; `nats` is -log of its probability, its end included, where that is known."""

    text: str
    nats: float | None = None


@dataclass(frozen=True)
class Encoder:
    """A tokenizer, and the ids that begin and end its texts."""

    tokenizer: PreTrainedTokenizerBase
    bos_id: int | None  # None where the tokenizer puts none by default, even if it has one
    eos_id: int

    def encode(self, text: str) -> list[int]:
        return self.encode_all([text])[0]

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """Ids without special tokens, but those whose own text is in `texts` (chat templates)."""
        if not texts:
            return []
        # `verbose` would warn of texts longer than the context: they are cut later.
        encoded = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def with_bos(self, ids: list[int]) -> list[int]:
        """`ids` after a BOS, if the tokenizer puts one and a chat template has not."""
        return ids if self.bos_id is None or ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    @property
    def first_id(self) -> int:
        """What stands before a text of which nothing is known yet."""
        return self.eos_id if self.bos_id is None else self.bos_id


def make_encoder(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """Raises: UserError if the tokenizer has no EOS."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {os.path.basename(tokenizer.name_or_path) or 'this model'} has no"
            " eos token, so no completion could end; set eos_token in its tokenizer_config.json"
        )
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    default = tokenizer("a")["input_ids"]
    puts_bos = len(default) > len(plain) and default[0] == tokenizer.bos_token_id
    return Encoder(tokenizer, tokenizer.bos_token_id if puts_bos else None, tokenizer.eos_token_id)


def shared_length(*rows: Sequence[object]) -> int:
    """How many items all rows begin with."""
    first, *others = rows

    def differ(n: int) -> bool:  # within the first n + 1 items; slices compare faster than a loop
        return any(row[: n + 1] != first[: n + 1] for row in others)

    return bisect_left(range(min(map(len, rows))), True, key=differ)


@dataclass(frozen=True)
class EncodedPairs:
    """Token pairs, and of how many of them something was cut off."""

    pairs: tuple[TokenPair, ...]
    truncated_prompts: int = 0
    truncated_completions: int = 0


def encode_pairs(
    pairs: Sequence[TextPair], encoder: Encoder, prompt_length: int, completion_length: int
) -> EncodedPairs:
    """Pairs as ids: prompts cut on their left, completions, which end with EOS, on their right."""
    texts = [t for p in pairs for t in (p.prompt, p.prompt + p.chosen, p.prompt + p.rejected)]
    ids = [encoder.with_bos(row) for row in encoder.encode_all(texts)]
    made: list[TokenPair] = []
    cut_prompts = cut_completions = 0
    for prompt, chosen, rejected in zip(ids[::3], ids[1::3], ids[2::3], strict=True):
        # A token may reach over the end of the prompt, and not the same way in both: the prompt
        # is what all three share, so that both completions are scored after the same ids.
        shared = shared_length(prompt, chosen, rejected)
        head = _keep_end(prompt[:shared] or [encoder.first_id], prompt_length, encoder.bos_id)
        tails = [[*full[shared:], encoder.eos_id] for full in (chosen, rejected)]
        made.append(TokenPair(head, *(tuple(tail[:completion_length]) for tail in tails)))
        cut_prompts += shared > prompt_length
        cut_completions += any(len(tail) > completion_length for tail in tails)
    return EncodedPairs(tuple(made), cut_prompts, cut_completions)


def _keep_end(prompt: list[int], length: int, bos_id: int | None) -> tuple[int, ...]:
    """The last `length` ids; a BOS stays first, as LLaMA-like models are bad without one."""
    if len(prompt) <= length:
        return tuple(prompt)
    if bos_id is not None and prompt[0] == bos_id and length > 1:
        return (bos_id, *prompt[1 - length :])
    return tuple(prompt[-length:])


@dataclass(frozen=True)
class HeldOutText:
    """One stream of ids, the UTF-8 bytes of its text, and its floor in nats where known."""

    ids: tuple[int, ...]
    bytes: int
    nats: float | None


def join_documents(documents: Iterable[Document], encoder: Encoder, tokens: int) -> HeldOutText:
    """`<s> document <e> document <e> ...`, cut at `tokens` ids; <s> is BOS or EOS, <e> is EOS.

    A perplexity never scores a stream's first id: with <s> there, all bytes counted are scored.
    Documents of known probability are not cut, so that the floor is that of what is scored: the
    stream then ends with the last whole document that fits.
    Raises: UserError if nothing is left to score.
    """
    ids, size, nats = [encoder.first_id], 0, [0.0]
    is_known = False
    for document in documents:
        is_known = document.nats is not None
        body = encoder.encode(document.text)
        room = tokens - len(ids)
        if document.nats is not None:
            if len(body) + 1 > room:
                break
            nats.append(document.nats)
        ids += [*body, encoder.eos_id][:room]
        size += len(
            (document.text if len(body) <= room else _decode(encoder, body[:room])).encode()
        )
        if len(ids) >= tokens:
            break
    if len(ids) < 2:
        raise UserError(
            f"no held-out text to score in {tokens} tokens; raise eval_tokens, or give more text"
        )
    return HeldOutText(tuple(ids), size, sum(nats) if is_known else None)


def _decode(encoder: Encoder, ids: list[int]) -> str:
    text: str = encoder.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return text.rstrip("\ufffd")  # the cut may go through a character of several bytes
