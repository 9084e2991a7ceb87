from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_tokenizers import gpt2_like

from peftbench.case import Settings
from peftbench.data.corpus import documents_by_size, documents_by_title, has_titles
from peftbench.data.files import Limits, read_folder_or_file, role_of
from peftbench.data.loading import check_data, find, load_task
from peftbench.data.task import TextPair
from peftbench.errors import UserError

SMALL = Settings(
    pairs=12, batch_size=2, eval_pairs=6, prompt_length=8, completion_length=6, eval_tokens=100
)
LIMITS = Limits(rows=1000, characters=100_000, document_characters=200)
ONE_LINE = r"\A[^\n]*\Z"
ROWS = [{"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(20)]


def _jsonl(rows: list[Any]) -> bytes:
    return "\n".join(json.dumps(r) for r in rows).encode()


def _row(**changed: Any) -> list[Any]:
    """Twenty rows, of which the third is changed; None takes a column out."""
    row = {k: v for k, v in (ROWS[2] | changed).items() if v is not None}
    return [*ROWS[:2], row, *ROWS[3:]]


BAD_FILES = {
    "empty text": ("a.txt", b"", ["a.txt is empty"]),
    "blank text": ("a.txt", b" \n\n \n", ["holds no text"]),
    "empty jsonl": ("a.jsonl", b"", ["a.jsonl is empty"]),
    "blank jsonl": ("a.jsonl", b"\n\n", ["a.jsonl is empty"]),
    "empty parquet": ("a.parquet", b"", ["a.parquet is empty"]),
    "one paragraph": ("a.txt", b"Only this.", ["1 documents", "at least 3"]),
    "little text": ("a.txt", b"some words\n" * 60, ["cut into 2 documents", "at least 3"]),
    "short texts": (  # 19 bytes give (20 - 6) // 14 = 1 pair; three of five texts train
        "a.jsonl", _jsonl([{"text": "Some words to read."}] * 5),
        ["gives at most 3 training pairs out of 3 documents, 12 are asked for"],
    ),
    "suffix": ("a.csv", b"x", ["'.csv'", ".txt, .tokens, .jsonl, .parquet"]),
    "latin-1": ("a.txt", "Grüße".encode("latin-1") * 9, ["not UTF-8", "0xfc"]),
    "latin-1 rows": ("a.jsonl", '{"text": "ü"}'.encode("latin-1"), ["not UTF-8"]),
    "not json": ("a.jsonl", _jsonl(ROWS[:2]) + b"\n{prompt: 3}", ["line 3 is not JSON"]),
    "json list": ("a.jsonl", _jsonl(ROWS) + b"\n[1]", ["line 21 is not a JSON object"]),
    "columns": (
        "a.jsonl", _jsonl([{"question": "q", "answer": "a"}]),
        ["columns answer, question", "wanted are chosen and rejected"],
    ),
    "no rejected": ("a.jsonl", _jsonl([{"chosen": "a", "prompt": "q"}]), ["columns chosen, pro"]),
    "other columns later": ("a.jsonl", _jsonl(_row(rejected=None)), ["line 3", "columns"]),
    "mixed rows": ("a.jsonl", _jsonl([*ROWS, {"text": "t"}]), ["line 1 and line 21"]),
    "empty chosen": ("a.jsonl", _jsonl(_row(chosen=" ")), ["line 3: 'chosen' is empty"]),
    "empty prompt": ("a.jsonl", _jsonl(_row(prompt="")), ["line 3: 'prompt' is empty"]),
    "no messages": ("a.jsonl", _jsonl(_row(rejected=[])), ["line 3: 'rejected' is empty"]),
    "number": ("a.jsonl", _jsonl(_row(rejected=7)), ["line 3: 'rejected' is int"]),
    "bad message": (
        "a.jsonl", _jsonl(_row(chosen=[{"from": "gpt"}])), ["a message of 'chosen'", "role"],
    ),
    "text and chat": (
        "a.jsonl", _jsonl(_row(chosen=[{"role": "user", "content": "x"}])),
        ["line 3", "one of chosen and rejected is text"],
    ),
    "all equal": (
        "a.jsonl", _jsonl([r | {"rejected": r["chosen"]} for r in ROWS]),
        ["chosen equals rejected in all 20 rows"],
    ),
    "too few": (
        "a.jsonl", _jsonl(ROWS[:17]), ["a.jsonl has 17 pairs", "11 to train", "12 and 6 are asked"],
    ),
    "null text": ("a.jsonl", b'{"text": null}', ["line 1: 'text' is NoneType"]),
    "not parquet": ("a.parquet", b"PAR1 no, not at all", ["a.parquet is not a parquet file"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_one_line_that_says_what_is_wrong(case: str, tmp_path: Path) -> None:
    name, content, said = BAD_FILES[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        check_data(replace(SMALL, data=str(tmp_path / name)))
    for part in said:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("wikitxt-2", "did you mean wikitext-2"),
        ("nonsense", "choose from: synthetic, tinywiki"),
        ("./nowhere", "no file or folder './nowhere'"),
        ("/nowhere/at/all", "no file or folder"),
        ("nowhere.jsonl", "no file or folder 'nowhere.jsonl'"),
        ("a/b/c", "no file or folder 'a/b/c'"),
        ("owner/na me", "unknown data 'owner/na me'"),
    ],
)
def test_a_name_that_is_nothing_is_one_line(name: str, said: str) -> None:
    with pytest.raises(UserError, match=ONE_LINE) as error:
        check_data(replace(SMALL, data=name))
    assert said in str(error.value)


def test_a_local_path_goes_before_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hub = find("owner/name:en")
    assert not isinstance(hub, str | Path)
    assert (hub.id, hub.config, hub.revision) == ("owner/name", "en", None)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert find("owner/name") == Path("owner/name")


def test_folders_without_data_or_with_two_kinds_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no \.txt, \.tokens, \.jsonl, \.parquet file"):
        check_data(replace(SMALL, data=str(tmp_path)))
    (tmp_path / "a.jsonl").write_bytes(_jsonl(ROWS))
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(UserError, match=r"several kinds: \.jsonl, \.txt; name the one"):
        check_data(replace(SMALL, data=str(tmp_path)))


def test_train_pairs_and_test_text_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(_jsonl(ROWS))
    (tmp_path / "test.jsonl").write_bytes(_jsonl([{"text": "words"}]))
    with pytest.raises(UserError, match="has pairs, the other text"):
        check_data(replace(SMALL, data=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("train-00000-of-00001", "train"), ("wiki.test", "test"), ("wiki.valid", "validation"),
        ("train_prefs", "train"), ("dev", "validation"), ("latest", None), ("training", "train"),
    ],
)  # fmt: skip
def test_a_files_name_tells_its_split(name: str, role: str | None) -> None:
    assert role_of(name) == role


def test_jsonl_and_parquet_give_the_same_pairs_in_the_same_order(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(_jsonl(ROWS))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    expected = [TextPair(**row) for row in ROWS]
    for name in ("a.jsonl", "a.parquet"):
        assert read_folder_or_file(tmp_path / name, LIMITS)["train"].pairs == expected


def test_a_parquet_file_with_damaged_pages_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["some text " * 50] * 400}), file, compression="zstd")
    damaged = bytearray(file.read_bytes())
    damaged[4:60] = bytes(56)  # the pages come first, the footer last
    file.write_bytes(damaged)
    with pytest.raises(UserError, match=r"a\.parquet is not a parquet file, or is damaged: "):
        read_folder_or_file(file, LIMITS)


def test_parquet_chats_are_read_like_jsonl_chats(tmp_path: Path) -> None:
    user = {"role": "user", "content": "?"}
    rows = [
        {"chosen": [user, {"role": "assistant", "content": f"y{i}"}],
         "rejected": [user, {"role": "assistant", "content": f"n{i}"}]}
        for i in range(3)
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_bytes(_jsonl(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    pairs = [
        read_folder_or_file(tmp_path / n, LIMITS)["train"].pairs for n in ("a.jsonl", "a.parquet")
    ]
    assert pairs[0] == pairs[1]
    assert pairs[0] is not None
    assert [p.chosen[0].content for p in pairs[0] if not isinstance(p, TextPair)] == [
        "y0",
        "y1",
        "y2",
    ]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_huge_preference_set_is_sampled_evenly(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        path.write_bytes(_jsonl(ROWS))
    else:
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    pairs = read_folder_or_file(path, replace(LIMITS, rows=5))["train"].pairs
    assert pairs is not None
    assert [p.prompt for p in pairs] == ["p0", "p4", "p8", "p12", "p16"]


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet"])
def test_a_huge_corpus_is_read_from_its_start_only(suffix: str, tmp_path: Path) -> None:
    path, texts = tmp_path / f"a.{suffix}", [f"{i:04d} " * 20 for i in range(50)]
    if suffix == "txt":
        path.write_text("\n\n".join(texts))
    elif suffix == "jsonl":
        path.write_bytes(_jsonl([{"text": t} for t in texts]))
    else:
        pq.write_table(pa.table({"text": texts}), path)
    documents = read_folder_or_file(path, replace(LIMITS, characters=350))["train"].documents
    assert documents is not None
    assert "".join(documents).startswith("0000 ")
    assert 300 <= sum(map(len, documents)) <= 500  # of 5000


def test_wikitext_as_rows_of_lines_equals_wikitext_as_a_file(tmp_path: Path) -> None:
    lines = [
        line
        for i in range(4)
        for line in (" \n", f" = A {i} = \n", " \n", " Text = of it . \n", " \n",
                     " = = S = = \n", " \n", " 1 + 1 = 2 \n")
    ]  # fmt: skip
    (tmp_path / "a.tokens").write_text("".join(lines))
    rows = [line if line.strip() else "" for line in lines]  # as the Hub's data set has it
    pq.write_table(pa.table({"text": rows}), tmp_path / "a.parquet")
    read = [
        read_folder_or_file(tmp_path / n, LIMITS)["train"].documents
        for n in ("a.tokens", "a.parquet")
    ]
    assert read[0] == read[1]
    expected = "= A {} = \n\n Text = of it . \n\n = = S = = \n\n 1 + 1 = 2"
    assert read[0] == [expected.format(i) for i in range(4)]


def test_titles_need_a_blank_line_and_one_equals_sign() -> None:
    assert has_titles(["", " = A = ", "", " = B = ", "", " = C = "])
    assert not has_titles(["", " = = A = = ", "", " = = B = = ", "", " = = C = = "])
    assert not has_titles(["x", " = A = ", "x", " = B = ", "x", " = C = "])
    assert documents_by_title(["intro", "", " = A = ", "text"]) == ["intro", "= A = \ntext"]


def test_paragraphs_are_grouped_and_cut_at_blank_lines_if_there_are_any() -> None:
    paragraph = ["0123456789"] * 3  # 33 characters with line ends
    assert (
        documents_by_size([*paragraph, "", *paragraph, "", *paragraph], 30)
        == ["\n".join(paragraph)] * 3
    )
    # Without blank lines: at the first line end after twice the size.
    assert documents_by_size(["0123456789"] * 12, 30) == ["\n".join(["0123456789"] * 6)] * 2


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfFirst words.")
    assert read_folder_or_file(tmp_path / "a.txt", LIMITS)["train"].documents == ["First words."]


def test_a_preference_files_held_out_text_is_the_chosen_side(tmp_path: Path) -> None:
    (tmp_path / "set.jsonl").write_bytes(_jsonl(ROWS))
    tokenizer = gpt2_like()
    settings = replace(SMALL, data=str(tmp_path / "set.jsonl"), completion_length=20)
    task = load_task(settings, tokenizer, len(tokenizer))
    texts = tokenizer.decode(task.test_tokens).removeprefix("<|endoftext|>").split("<|endoftext|>")
    whole = [t for t in texts if t][:-1]
    assert len(whole) >= 3
    pairs = [tokenizer.decode(p.prompt + p.chosen[:-1]) for p in task.test]
    assert whole == pairs[: len(whole)]
    assert all("good" in t for t in whole)
    assert task.name == "set.jsonl"
