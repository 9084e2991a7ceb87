"""What a data set gives to every case of a run: training pairs, held-out pairs, held-out text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TextPair:
    """A prompt with a preferred and a dispreferred continuation, as text."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class TokenPair:
    """The same as token ids: what both engines train on. No padding; ids are the model's own.

    `prompt` is never empty. A completion that ends where the author ended ends with EOS; one that
    was cut out of a longer text does not.
    """

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


@dataclass(frozen=True)
class TokenTask:
    """A data set, tokenised for one model."""

    name: str
    digest: str  # sha256 over the ids below: two runs with equal digests saw equal data
    train: tuple[TokenPair, ...]  # in training order for the case's seed; `settings.pairs` of them
    judge: tuple[TokenPair, ...]  # for a reward model; disjoint from train and test
    test: tuple[TokenPair, ...]  # held out, `settings.eval_pairs` of them, the same for every seed
    test_tokens: tuple[int, ...]  # held-out text, `settings.eval_tokens` ids, documents joined
    test_bytes: int  # UTF-8 bytes of the text that `test_tokens` encodes
    floor_nats: float | None  # -log probability of that text under its own generator, if known
    truncated_prompts: int  # pairs of `train` and `test` whose prompt lost tokens on its left
    truncated_completions: int  # pairs of which a completion lost tokens on its right
