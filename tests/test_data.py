from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from small_tokenizers import gpt2_like, llama_like, one_id_a_word

from peftbench.case import Settings
from peftbench.data import assets, tinywiki
from peftbench.data.loading import DATA, check_data, check_lengths, load_task
from peftbench.data.task import TextPair
from peftbench.data.tokens import encode_pairs, make_encoder
from peftbench.errors import UserError

SMALL = Settings(
    pairs=12, batch_size=2, eval_pairs=6, prompt_length=8, completion_length=6, eval_tokens=100
)
TINYWIKI = replace(SMALL, data="tinywiki", prompt_length=64, completion_length=128, eval_tokens=900)

# Words and parts of words of the tokenizers' vocabulary, letters of one to four bytes, white space.
TEXTS = st.text(st.sampled_from([*"Thewasrdit .,\n\tßæ€語𐍈🙂"]), max_size=16)
DOCUMENTS, WORDS = 10, 120
VOCABULARY = [f"d{d}w{w}" for d in range(DOCUMENTS) for w in range(WORDS)]


@pytest.fixture
def wiki_file(tmp_path: Path) -> Path:
    """Ten articles whose words say where they stand: `d3w17` is word 17 of document 3."""
    lines = []
    for d in range(DOCUMENTS):
        words = VOCABULARY[d * WORDS : (d + 1) * WORDS]
        lines += [" \n", f" = Title {d} = \n", " \n", " = = Section = = \n"]
        lines += [" ".join(words[at : at + 30]) + " \n" for at in range(0, WORDS, 30)]
    path = tmp_path / "wiki.tokens"
    path.write_text("".join(lines))
    return path


def _at(ids: tuple[int, ...]) -> list[tuple[int, int]]:
    """(document, word) of ids of `one_id_a_word(VOCABULARY)`; the headings' words are id 0."""
    return [divmod(i - 1, WORDS) for i in ids if i > 0]


def test_tinywiki_pairs_are_the_generators_and_end_with_eos_although_pad_is_eos() -> None:
    tokenizer = gpt2_like()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    task = load_task(TINYWIKI, tokenizer, len(tokenizer))
    expected = tinywiki.pairs(2, "test", TINYWIKI.eval_pairs, 0)
    for pair, text in zip(task.test, expected, strict=True):
        assert pair.chosen[-1] == pair.rejected[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(pair.prompt + pair.chosen[:-1]) == text.prompt + text.chosen
        assert tokenizer.decode(pair.prompt + pair.rejected[:-1]) == text.prompt + text.rejected
    assert (len(task.train), len(task.judge)) == (12, 0)
    assert (task.truncated_prompts, task.truncated_completions) == (0, 0)


def test_tinywiki_floor_bytes_and_ids_cover_the_same_whole_articles() -> None:
    tokenizer = gpt2_like()
    task = load_task(TINYWIKI, tokenizer, len(tokenizer))
    eos = tokenizer.eos_token_id
    assert task.test_tokens[0] == task.test_tokens[-1] == eos
    texts, at = [], 1
    while at < len(task.test_tokens):
        end = task.test_tokens.index(eos, at)
        texts.append(tokenizer.decode(task.test_tokens[at:end]))
        at = end + 1
    articles = tinywiki.articles(2, "test", len(texts) + 1, 0)
    assert texts == [a.text for a in articles[:-1]]
    assert task.floor_nats == pytest.approx(math.fsum(a.nats for a in articles[:-1]), abs=1e-9)
    assert task.test_bytes == sum(len(t.encode()) for t in texts)


def test_tinywiki_takes_every_article_that_fits_and_cuts_none() -> None:
    tokenizer = gpt2_like()
    articles = tinywiki.articles(2, "test", 3, 0)
    lengths = [len(tokenizer(a.text)["input_ids"]) + 1 for a in articles]  # each with its EOS
    three = 1 + sum(lengths)
    for tokens, expected in ((three, three), (three - 1, three - lengths[2])):
        task = load_task(replace(TINYWIKI, eval_tokens=tokens), tokenizer, len(tokenizer))
        assert len(task.test_tokens) == expected


def test_an_eval_budget_below_one_article_is_an_error() -> None:
    with pytest.raises(UserError, match="raise eval_tokens"):
        load_task(replace(TINYWIKI, eval_tokens=9), gpt2_like(), 400)


@pytest.mark.parametrize("data", ["tinywiki", "synthetic", "wiki"])
def test_the_seed_moves_the_training_pairs_and_nothing_that_is_held_out(
    data: str, wiki_file: Path
) -> None:
    name = str(wiki_file) if data == "wiki" else data
    settings = replace(SMALL, data=name, eval_tokens=400)
    tasks = [load_task(replace(settings, seed=s), gpt2_like(), 400, judge_pairs=4) for s in (1, 2)]
    assert tasks[0].train != tasks[1].train
    assert tasks[0].test == tasks[1].test
    assert tasks[0].judge == tasks[1].judge
    assert len(tasks[0].judge) == 4
    assert tasks[0].test_tokens == tasks[1].test_tokens
    assert tasks[0].digest != tasks[1].digest
    assert tasks[0] == load_task(replace(settings, seed=1), gpt2_like(), 400, judge_pairs=4)


@pytest.mark.parametrize("data", ["tinywiki", "wiki"])
def test_a_judge_does_not_move_the_pairs_that_the_methods_share(data: str, wiki_file: Path) -> None:
    settings = replace(SMALL, data=str(wiki_file) if data == "wiki" else data, eval_tokens=400)
    without, with_judge = (load_task(settings, gpt2_like(), 400, judge_pairs=n) for n in (0, 4))
    assert (without.train, without.test) == (with_judge.train, with_judge.test)


def test_another_process_with_another_hash_seed_reads_the_same_ids(wiki_file: Path) -> None:
    settings = replace(SMALL, data=str(wiki_file))
    code = (
        "from small_tokenizers import gpt2_like; from peftbench.case import Settings;"
        "from peftbench.data.loading import load_task;"
        f"print(load_task({settings!r}, gpt2_like(), 400).digest)"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": f"{root}:{root / 'tests'}"},
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.strip() == load_task(settings, gpt2_like(), 400).digest


def test_checking_data_imports_nothing_heavy(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(20)]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code = (
        "import sys; from peftbench.case import Settings;"
        "from peftbench.data.loading import check_data;"
        "check_data(Settings());"
        f"check_data(Settings(data={str(tmp_path / 'set.jsonl')!r}, pairs=9, eval_pairs=9));"
        "print({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.stdout.strip() == "set()"


def test_without_a_tokenizer_ids_are_synthetic_of_exact_lengths() -> None:
    task = load_task(replace(SMALL, data="tinywiki"), None, vocab_size=50)
    assert task.name == "synthetic"
    assert (len(task.train), len(task.test), len(task.test_tokens)) == (12, 6, 100)
    for pair in task.train + task.test:
        assert (len(pair.prompt), len(pair.chosen), len(pair.rejected)) == (8, 6, 6)
    ids = {i for p in task.train for i in p.prompt + p.chosen + p.rejected}
    assert min(ids) >= 0
    assert 40 < max(ids) < 50  # 240 draws of 50 ids
    assert (task.test_bytes, task.floor_nats) == (0, None)


def test_derived_pairs_are_a_passage_what_follows_it_and_a_later_one(wiki_file: Path) -> None:
    tokenizer = one_id_a_word(VOCABULARY)
    task = load_task(replace(SMALL, data=str(wiki_file)), tokenizer, 2000, judge_pairs=5)
    starts = set()
    for pair in task.train + task.judge + task.test:
        assert (len(pair.prompt), len(pair.chosen), len(pair.rejected)) == (8, 6, 6)
        prompt, chosen, rejected = map(_at, (pair.prompt, pair.chosen, pair.rejected))
        passage = prompt + chosen  # without the words of the heading
        assert passage == [(passage[0][0], passage[0][1] + i) for i in range(len(passage))]
        assert rejected == [(chosen[0][0], rejected[0][1] + i) for i in range(6)]
        assert rejected[0][1] > chosen[-1][1]
        starts.add(chosen[0])
    assert len(starts) == 12 + 5 + 6  # no passage twice
    documents = [{_at(p.chosen)[0][0] for p in s} for s in (task.train, task.judge, task.test)]
    assert not documents[0] & documents[1]
    assert not documents[0] & documents[2]
    assert not documents[1] & documents[2]


def test_derived_prompts_hold_the_bos_within_their_length(wiki_file: Path) -> None:
    tokenizer = llama_like()
    task = load_task(replace(SMALL, data=str(wiki_file)), tokenizer, 400)
    for pair in task.train:
        assert len(pair.prompt) == 8
        assert pair.prompt[0] == tokenizer.bos_token_id
        assert tokenizer.eos_token_id not in pair.prompt + pair.chosen + pair.rejected


def test_held_out_text_is_cut_at_the_exact_number_of_tokens(tmp_path: Path) -> None:
    """Four-byte letters and a byte-level tokenizer: the cut goes through a letter."""
    (tmp_path / "train.txt").write_text("\n\n".join(["a b c d " * 200] * 9))
    (tmp_path / "test.txt").write_text("𐍈" * 1000)
    tokenizer = gpt2_like()
    settings = replace(SMALL, data=str(tmp_path), eval_tokens=100)
    task = load_task(settings, tokenizer, len(tokenizer))
    # First the EOS, then 99 ids of one byte each: 24 letters and three quarters of one.
    assert len(task.test_tokens) == 100
    assert task.test_bytes == 4 * 24
    assert tokenizer.decode(task.test_tokens[1:97]) == "𐍈" * 24
    assert task.floor_nats is None


def test_a_folder_with_train_and_test_files_keeps_its_splits(tmp_path: Path) -> None:
    words = [f"{part}{i}" for part in ("train", "test") for i in range(400)]
    for part in ("train", "test"):
        lines = [" ".join(f"{part}{i}" for i in range(at, at + 40)) for at in range(0, 400, 40)]
        (tmp_path / f"wiki.{part}.tokens").write_text("\n\n".join(lines))
    tokenizer = one_id_a_word(words)
    task = load_task(replace(SMALL, data=str(tmp_path)), tokenizer, 900, judge_pairs=2)
    assert all(0 < i <= 400 for p in task.train + task.judge for i in p.prompt + p.chosen)
    assert all(400 < i <= 800 for p in task.test for i in p.prompt + p.chosen)
    assert task.test_tokens[1:31] == tuple(range(401, 431))  # the file's beginning, in its order
    assert task.name == tmp_path.name


def test_wikipedia_articles_are_split_by_article(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    articles = [
        {"title": f"T{d}", "text": " ".join(VOCABULARY[d * WORDS : (d + 1) * WORDS])}
        for d in range(DOCUMENTS)
    ]
    (tmp_path / assets.ARTICLES).write_text("\n".join(map(json.dumps, articles)))
    asked = []
    monkeypatch.setattr(assets, "fetch", lambda name: asked.append(name) or tmp_path)
    settings = replace(SMALL, data="wikipedia-sample")
    check_data(settings)
    task = load_task(settings, one_id_a_word(VOCABULARY), 2000)
    train, test = ({_at(p.chosen)[0][0] for p in s} for s in (task.train, task.test))
    assert len(train) > 1
    assert not train & test
    assert {d for d, _ in _at(task.test_tokens)} == test
    assert set(asked) == {"wikipedia-sample"}


@pytest.mark.parametrize("make", [gpt2_like, llama_like])
@given(prompt=TEXTS, chosen=TEXTS, rejected=TEXTS)
@hypothesis_settings(max_examples=60, deadline=None, derandomize=True)
def test_ids_decode_to_the_text_they_came_from(make, prompt, chosen, rejected) -> None:  # type: ignore[no-untyped-def]
    tokenizer = make()
    encoder = make_encoder(tokenizer)
    (pair,) = encode_pairs([TextPair(prompt, chosen, rejected)], encoder, 500, 500).pairs
    body = pair.prompt[1:] if pair.prompt[0] == encoder.first_id else pair.prompt
    for completion, text in ((pair.chosen, chosen), (pair.rejected, rejected)):
        assert completion[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(body + completion[:-1]) == prompt + text


def test_a_token_over_the_end_of_the_prompt_goes_to_both_completions() -> None:
    tokenizer = gpt2_like()
    # " was" is one token of this vocabulary; a prompt that ends inside it cannot keep its half.
    assert len(tokenizer(" was")["input_ids"]) == 1
    encoder = make_encoder(tokenizer)
    (pair,) = encode_pairs([TextPair("It w", "as", "ent")], encoder, 50, 50).pairs
    assert tokenizer.decode(pair.prompt) == "It"
    assert tokenizer.decode(pair.chosen[:-1]) == " was"
    assert tokenizer.decode(pair.rejected[:-1]) == " went"


def test_an_empty_prompt_becomes_bos_or_eos() -> None:
    for tokenizer, first in ((gpt2_like(), "<|endoftext|>"), (llama_like(), "<s>")):
        pairs = encode_pairs([TextPair("", "red", "blue")], make_encoder(tokenizer), 8, 8).pairs
        assert tokenizer.decode(pairs[0].prompt) == first


def test_long_prompts_lose_their_beginning_but_not_their_bos_and_are_counted() -> None:
    # Four letters are four ids, and five with a BOS.
    for tokenizer, kept, cut in (
        (gpt2_like(), [*"wxyz"], 1),
        (llama_like(), ["<s>", *"xyz"], 2),
    ):
        texts = [TextPair(p, "!", "?") for p in ("qvwxyz", "yz", "wxyz")]
        made = encode_pairs(texts, make_encoder(tokenizer), 4, 4)
        assert [tokenizer.decode([i]) for i in made.pairs[0].prompt] == kept
        assert (made.truncated_prompts, made.truncated_completions) == (cut, 0)


def test_a_completion_that_is_cut_has_no_eos_and_is_counted() -> None:
    tokenizer = gpt2_like()
    texts = [TextPair("p", "vwxyz", "v"), TextPair("p", "vwx", "xyz")]
    made = encode_pairs(texts, make_encoder(tokenizer), 4, 4)
    assert tokenizer.decode(made.pairs[0].chosen) == "vwxy"
    assert tokenizer.decode(made.pairs[0].rejected) == "v<|endoftext|>"
    assert tokenizer.decode(made.pairs[1].chosen) == "vwx<|endoftext|>"
    assert (made.truncated_prompts, made.truncated_completions) == (0, 1)


def test_cutting_that_makes_all_pairs_equal_is_an_error(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "chosen": "vwxyz!", "rejected": "vwxyz?"} for i in range(20)]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = replace(SMALL, data=str(tmp_path / "set.jsonl"), completion_length=3)
    with pytest.raises(UserError, match=r"cut to 3 tokens.*raise completion_length"):
        load_task(settings, gpt2_like(), 400)


def test_a_corpus_that_is_too_small_says_how_much_there_is(wiki_file: Path) -> None:
    settings = replace(SMALL, data=str(wiki_file), pairs=500)
    # Six of ten documents train. Each has 4 + 5 words of headings and 120 of text, from
    # which (129 - 6) // 14 = 8 pairs follow: 48.
    with pytest.raises(UserError, match=r"gives 48 training pairs out of 6 documents, 500 are"):
        load_task(settings, one_id_a_word(VOCABULARY), 2000)
    with pytest.raises(UserError, match=r"gives at most \d+ training pairs"):
        check_data(settings)


def test_a_tokenizer_without_eos_is_an_error() -> None:
    tokenizer = one_id_a_word(["a"])
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no eos token"):
        load_task(TINYWIKI, tokenizer, 2)


def test_lengths_are_held_against_the_context() -> None:
    settings = replace(SMALL, prompt_length=40, completion_length=24, eval_context=64)
    check_lengths(settings, 64)
    check_lengths(settings, None)
    with pytest.raises(UserError, match=r"40 \+ completion_length 24 = 64 .* context is 63"):
        check_lengths(settings, 63)
    with pytest.raises(UserError, match=r"eval_context is 65, .* context is 64"):
        check_lengths(replace(settings, eval_context=65), 64)


def test_every_hub_row_of_the_table_is_pinned_to_a_commit() -> None:
    rows = [row.hub for row in DATA.values() if row.hub]
    assert len(rows) >= 2
    for row in rows:
        assert row.revision is not None
        assert len(row.revision) == 40
        assert int(row.revision, 16) > 0
