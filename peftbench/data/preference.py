"""Preference sets: rows to pairs, chat messages to text, pairs to disjoint splits."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from peftbench.data.task import TextPair
from peftbench.data.tokens import shared_length
from peftbench.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = ("prompt", "chosen", "rejected")  # `prompt` may be absent
_HH_TURN = "\n\nAssistant:"  # Anthropic's HH sets: the whole dialogue is in both columns


class Message(NamedTuple):
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True)
class ChatPair:
    """A pair of chats: what they share first, then each one's own turns (never empty)."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]


Pair = TextPair | ChatPair


def parse_row(row: Mapping[str, object], where: str) -> Pair:
    """The pair that a row holds; `where` names the row in messages.

    Raises: UserError if a value is missing, empty, or neither text nor chat messages.
    """
    chosen, rejected = (_parse_value(row, column, where) for column in ("chosen", "rejected"))
    prompt = _parse_value(row, "prompt", where) if row.get("prompt") is not None else None
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            return _split_dialogue(chosen, rejected)
        if isinstance(prompt, str):
            return TextPair(prompt, chosen, rejected)
        reply = [(Message("assistant", text),) for text in (chosen, rejected)]
        return ChatPair(prompt, reply[0], reply[1])
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise UserError(f"{where}: one of chosen and rejected is text, the other chat messages")
    return _split_chats(prompt, chosen, rejected)


def _parse_value(row: Mapping[str, object], column: str, where: str) -> str | tuple[Message, ...]:
    value = row.get(column)
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, str) or value == []:
        raise UserError(f"{where}: {column!r} is empty; give it text, or leave the row out")
    if not isinstance(value, list):
        raise UserError(
            f"{where}: {column!r} is {type(value).__name__}; it must be text or a list of"
            " chat messages"
        )
    messages = []
    for turn in value:
        role, content = (
            (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else 2 * (0,)
        )
        if not isinstance(role, str) or not isinstance(content, str):
            raise UserError(
                f"{where}: a message of {column!r} is not an object with the texts role and content"
            )
        messages.append(Message(role, content))
    return tuple(messages)


def _split_dialogue(chosen: str, rejected: str) -> TextPair:
    """The prompt is what both begin with, up to HH's last assistant turn or to a whole word."""
    shared = chosen[: shared_length(chosen, rejected)]
    turn = shared.rfind(_HH_TURN)
    # A space goes with the word after it, as tokenizers have it.
    word = max(shared.rfind(" "), shared.rfind("\n") + 1)
    cut = turn + len(_HH_TURN) if turn >= 0 else word
    return TextPair(shared[:cut], chosen[cut:], rejected[cut:])


def _split_chats(
    prompt: str | tuple[Message, ...] | None,
    chosen: tuple[Message, ...],
    rejected: tuple[Message, ...],
) -> ChatPair:
    """Many sets repeat the prompt in both chats: it is taken once."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    head = chosen[:shared]
    if isinstance(prompt, str):
        head = head or (Message("user", prompt),)
    elif prompt is not None and head[: len(prompt)] != prompt:
        head = prompt + head
    return ChatPair(head, chosen[shared:], rejected[shared:])


def render(pair: Pair, tokenizer: PreTrainedTokenizerBase) -> TextPair:
    """The pair as text: by the tokenizer's chat template, else as plain `role: content` lines.

    Raises: UserError if the template refuses the roles.
    """
    if isinstance(pair, TextPair):
        return pair
    if not tokenizer.chat_template:
        return _render_plain(pair)
    prompt = _apply(tokenizer, pair.prompt, is_open=True) if pair.prompt else ""
    chosen, rejected = (
        _apply(tokenizer, pair.prompt + turns, is_open=False)
        for turns in (pair.chosen, pair.rejected)
    )
    # Some templates write an earlier turn otherwise when more follows (thoughts left out).
    cut = shared_length(prompt, chosen, rejected)
    return TextPair(
        prompt[:cut], _without_eos(chosen[cut:], tokenizer), _without_eos(rejected[cut:], tokenizer)
    )


def _render_plain(pair: ChatPair) -> TextPair:
    """A line per turn; the role that both answer in stands at the end of the prompt."""
    prompt = "".join(f"{m.role}: {m.content}\n" for m in pair.prompt)
    chosen, rejected = (
        "\n".join(f"{m.role}: {m.content}" for m in turns) for turns in (pair.chosen, pair.rejected)
    )
    role = f"{pair.chosen[0].role}:"
    cut = len(role) if rejected.startswith(role) else 0
    return TextPair(prompt + chosen[:cut], chosen[cut:], rejected[cut:])


def _apply(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, is_open: bool
) -> str:
    from jinja2.exceptions import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(
            [m._asdict() for m in messages], tokenize=False, add_generation_prompt=is_open
        )
    except TemplateError as error:
        roles = ", ".join(m.role for m in messages)
        raise UserError(f"the chat template refuses the roles {roles}: {error}") from error
    return text


def _without_eos(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """`encode_pairs` ends every completion with EOS; a template's own must not make it two."""
    stripped = text.rstrip()
    if tokenizer.eos_token and stripped.endswith(tokenizer.eos_token):
        return stripped.removesuffix(tokenizer.eos_token)
    return text


@dataclass(frozen=True)
class Preferences:
    """Pairs of three splits that share no prompt; `train` is in training order."""

    train: Sequence[Pair]
    judge: Sequence[Pair]
    test: Sequence[Pair]  # at least as many as asked; more where the set has more held out


def split_pairs(
    name: str,
    rows: Sequence[Pair],
    held_out: Sequence[Pair] | None,
    pairs: int,
    eval_pairs: int,
    seed: int,
) -> Preferences:
    """`pairs` pairs in seeded order to train on, and held-out ones that do not move with the seed.

    `held_out` is the set's own test split; without one, test pairs come from `rows`. The judge gets
    what the training leaves, at most `pairs`. A pair whose sides are equal prefers nothing: it is
    left out. Raises: UserError if there are too few pairs.
    """
    useful = [pair for pair in rows if pair.chosen != pair.rejected]
    test = [pair for pair in held_out or () if pair.chosen != pair.rejected]
    if rows and not useful:
        raise UserError(
            f"{name}: chosen equals rejected in all {len(rows)} rows; nothing is preferred"
        )
    groups = _by_prompt(useful)
    random.Random("split").shuffle(groups)  # files are often sorted by topic or by score
    if held_out is None:
        test = _take(groups, eval_pairs)[:eval_pairs]
    tested = {_key(pair) for pair in test}
    groups = [group for group in groups if _key(group[0]) not in tested]
    judge: list[Pair] = []
    spare = min(pairs, sum(map(len, groups)) - pairs)
    while groups and len(judge) + len(groups[-1]) <= spare:
        judge += groups.pop()
    train = [pair for group in groups for pair in group]
    if len(test) < eval_pairs or len(train) < pairs:
        raise UserError(
            f"{name} has {len(useful) + len(test) if held_out is not None else len(useful)} pairs:"
            f" {len(train)} to train on and {len(test)} held out, none of them with a prompt of the"
            f" other; {pairs} and {eval_pairs} are asked for: lower pairs or eval_pairs"
        )
    return Preferences(random.Random(f"train {seed}").sample(train, pairs), judge, test)


def _key(pair: Pair) -> object:
    """What must not be on both sides of a split: the prompt, or without one the chosen answer."""
    return pair.prompt or pair.chosen


def _by_prompt(pairs: Iterable[Pair]) -> list[list[Pair]]:
    groups: dict[object, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(_key(pair), []).append(pair)
    return list(groups.values())


def _take(groups: list[list[Pair]], count: int) -> list[Pair]:
    """At least `count` pairs in whole groups, removed from the front of `groups`."""
    taken: list[Pair] = []
    while groups and len(taken) < count:
        taken += groups.pop(0)
    return taken
