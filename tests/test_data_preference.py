from __future__ import annotations

from typing import Any

import pytest
from small_tokenizers import chat, gpt2_like

from peftbench.data.preference import ChatPair, Message, parse_row, render, split_pairs
from peftbench.data.task import TextPair
from peftbench.data.tokens import encode_pairs, make_encoder
from peftbench.errors import UserError


def _turns(*contents: str) -> list[dict[str, str]]:
    """User and assistant by turns."""
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": c}
            for i, c in enumerate(contents)]  # fmt: skip


def _parse(**row: Any) -> TextPair | ChatPair:
    return parse_row(row, "row 1")


def test_three_texts_are_a_pair_as_they_are() -> None:
    assert _parse(prompt="Q ", chosen="a", rejected="b", score=3) == TextPair("Q ", "a", "b")


def test_a_shared_dialogue_becomes_the_prompt_up_to_the_last_assistant_turn() -> None:
    dialogue = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"
    # Both answers begin with "I": that must not slip into the prompt.
    pair = _parse(chosen=dialogue + " I know.", rejected=dialogue + " I do not.")
    assert pair == TextPair(dialogue, " I know.", " I do not.")


def test_a_shared_beginning_is_cut_at_a_whole_word() -> None:
    pair = _parse(chosen="The sky is blue", rejected="The sky is black")
    assert pair == TextPair("The sky is", " blue", " black")
    assert _parse(chosen="one", rejected="two") == TextPair("", "one", "two")
    # One answer goes on where the other ends: its completion is the end alone.
    assert _parse(chosen="A b", rejected="A b c") == TextPair("A", " b", " b c")


def test_the_common_turns_of_two_chats_are_the_prompt() -> None:
    pair = _parse(chosen=_turns("q", "r", "s", "yes"), rejected=_turns("q", "r", "s", "no"))
    assert isinstance(pair, ChatPair)
    assert [m.content for m in pair.prompt] == ["q", "r", "s"]
    assert (pair.chosen, pair.rejected) == (
        (Message("assistant", "yes"),), (Message("assistant", "no"),)
    )  # fmt: skip


@pytest.mark.parametrize("prompt", ["q", _turns("q")])
@pytest.mark.parametrize("is_repeated", [True, False])
def test_a_prompt_beside_chats_is_taken_once(prompt: Any, is_repeated: bool) -> None:
    sides = [_turns("q", text)[0 if is_repeated else 1 :] for text in ("yes", "no")]
    pair = _parse(prompt=prompt, chosen=sides[0], rejected=sides[1])
    assert pair == ChatPair(
        (Message("user", "q"),), (Message("assistant", "yes"),), (Message("assistant", "no"),)
    )


def test_shared_turns_tell_more_than_a_prompt_text_beside_them() -> None:
    system = {"role": "system", "content": "S"}
    sides = [[system, *_turns("q", text)] for text in ("yes", "no")]
    pair = _parse(prompt="q", chosen=sides[0], rejected=sides[1])
    assert pair.prompt == (Message("system", "S"), Message("user", "q"))


def test_chat_prompts_with_text_answers_are_chats() -> None:
    assert _parse(prompt=_turns("q"), chosen="yes", rejected="no") == ChatPair(
        (Message("user", "q"),), (Message("assistant", "yes"),), (Message("assistant", "no"),)
    )


def test_equal_chats_keep_a_completion() -> None:
    pair = _parse(chosen=_turns("q", "r"), rejected=_turns("q", "r"))
    assert isinstance(pair, ChatPair)
    assert pair.chosen == pair.rejected == (Message("assistant", "r"),)


CHAT = ChatPair(
    (Message("system", "S"), Message("user", "q")),
    (Message("assistant", "yes"),),
    (Message("assistant", "no"),),
)


def test_a_chat_template_renders_the_pair_and_its_eos_is_not_doubled() -> None:
    tokenizer = chat()
    text = render(CHAT, tokenizer)
    assert text == TextPair(
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n",
        "yes",
        "no",
    )
    (pair,) = encode_pairs([text], make_encoder(tokenizer), 99, 99).pairs
    assert tokenizer.decode(pair.chosen) == "yes<|im_end|>"
    # The template's own marks are special tokens, not their letters.
    marks = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert [i for i in pair.prompt if i in marks] == [marks[0], marks[1]] * 2 + [marks[0]]


def test_without_a_template_turns_are_lines_and_the_role_belongs_to_the_prompt() -> None:
    text = render(CHAT, gpt2_like())
    assert text == TextPair("system: S\nuser: q\nassistant:", " yes", " no")


def test_a_template_that_refuses_the_roles_is_one_line() -> None:
    tokenizer = chat()
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{{ raise_exception('no system role here') }}"
        with pytest.raises(UserError, match=r"refuses the roles system, user: no system role here"):
            render(CHAT, tokenizer)
    finally:
        tokenizer.chat_template = template


def _pairs(count: int, per_prompt: int = 1) -> list[TextPair]:
    return [TextPair(f"p{i // per_prompt}", f"good {i}", f"bad {i}") for i in range(count)]


def test_splits_share_no_prompt() -> None:
    made = split_pairs("set", _pairs(90, per_prompt=3), None, 30, 20, seed=0)
    train, judge, test = ({p.prompt for p in s} for s in (made.train, made.judge, made.test))
    assert (len(made.train), len(made.test)) == (30, 20)
    assert 27 <= len(made.judge) <= 30
    assert not train & judge
    assert not train & test
    assert not judge & test


def test_the_seed_draws_the_training_pairs_alone() -> None:
    one, two = (split_pairs("set", _pairs(200), None, 30, 20, seed=s) for s in (0, 1))
    assert set(one.train) != set(two.train)
    assert one.test == two.test
    assert one.judge == two.judge


def test_training_rows_with_a_prompt_of_the_test_split_are_left_out() -> None:
    held_out = [TextPair(f"p{i}", "other", "answers") for i in range(5)]
    made = split_pairs("set", _pairs(40), held_out, 30, 5, seed=0)
    assert made.test == held_out
    assert not {p.prompt for p in made.train} & {p.prompt for p in held_out}
    with pytest.raises(UserError, match="35 to train on and 5 held out"):
        split_pairs("set", _pairs(40), held_out, 36, 5, seed=0)


def test_pairs_that_prefer_nothing_are_left_out() -> None:
    equal = [TextPair(f"e{i}", "same", "same") for i in range(50)]
    made = split_pairs("set", equal + _pairs(30), None, 20, 10, seed=0)
    assert all(p.chosen != p.rejected for p in [*made.train, *made.test])
    with pytest.raises(UserError, match="has 30 pairs: 20 to train on and 10 held out"):
        split_pairs("set", equal + _pairs(30), None, 21, 10, seed=0)
