from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_tokenizers import gpt2_like

from peftbench.case import Settings
from peftbench.data import hub
from peftbench.data.hub import HubData
from peftbench.data.loading import DATA, check_data, load_task
from peftbench.errors import UserError

SMALL = Settings(
    pairs=4, batch_size=1, eval_pairs=2, prompt_length=8, completion_length=6, eval_tokens=50
)
ONE_LINE = r"\A[^\n]*\Z"
ROWS = [{"chosen": f"Say {i} yes", "rejected": f"Say {i} no", "score": i} for i in range(9)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PEFTBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGINGFACE_TOKEN", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    # Port 9 of this machine: nobody listens there.
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")


class _Answer(BaseHTTPRequestHandler):
    """A Hub with one data set, `me/open`, at commit abc; of others it says that there are none."""

    seen_tokens: list[str | None] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.seen_tokens.append(self.headers.get("Authorization"))
        found = self.path.startswith("/api/datasets/me/open")
        body = json.dumps({"id": "me/open", "sha": "abc"} if found else {"error": "none"}).encode()
        self.send_response(200 if found else 401)
        if not found:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def a_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str | None]]:
    server = HTTPServer(("127.0.0.1", 0), _Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(
        "huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}"
    )
    _Answer.seen_tokens.clear()
    yield _Answer.seen_tokens
    server.shutdown()
    server.server_close()


def _dataset(folder: Path) -> Path:
    """A data set in a folder, as the Hub has it: `datasets` reads both by the same code."""
    folder.mkdir()
    for name, rows in (("train", ROWS[:6]), ("test", ROWS[6:])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("name", ["wikitext-2", "Anthropic/hh-rlhf"])
def test_a_hub_out_of_reach_is_said_at_once_with_the_offline_choices(name: str) -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match=ONE_LINE) as error:
        check_data(replace(SMALL, data=name))
    assert time.monotonic() - start < 15  # `datasets` alone retries for 23 s
    for part in ("http://127.0.0.1:9 is out of reach", "tinywiki", "--data PATH"):
        assert part in str(error.value)


def test_a_set_that_the_hub_does_not_have_is_one_line(a_hub: list[str | None]) -> None:
    with pytest.raises(UserError, match=ONE_LINE) as error:
        check_data(replace(SMALL, data="nobody/nothing"))
    assert "no data set 'nobody/nothing'" in str(error.value)
    assert "without a token" in str(error.value)
    assert a_hub == [None]


@pytest.mark.parametrize("variable", ["HF_TOKEN", "HUGGINGFACE_TOKEN"])
def test_a_token_of_either_variable_is_sent_and_not_shown(
    variable: str, a_hub: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "hf_secret")
    with pytest.raises(UserError, match="with the token of the environment") as error:
        check_data(replace(SMALL, data="nobody/private"))
    assert "hf_secret" not in str(error.value)
    assert a_hub == ["Bearer hf_secret"]


def test_a_download_keeps_the_splits_and_the_columns_that_are_used(
    tmp_path: Path, cache: Path
) -> None:
    folder = cache / "hub" / "entry"
    hub.download(HubData(str(_dataset(tmp_path / "set"))), folder)
    assert sorted(f.name for f in folder.parent.iterdir()) == ["entry"]  # no leftovers
    assert sorted(f.name for f in folder.iterdir()) == ["test.parquet", "train.parquet"]
    table = pq.read_table(folder / "train.parquet")
    assert table.column_names == ["chosen", "rejected"]
    assert table.num_rows == 6


def test_what_datasets_cannot_load_is_one_line(tmp_path: Path, cache: Path) -> None:
    folder = cache / "entry"
    with pytest.raises(UserError, match=r"^datasets cannot load [^\n]*owner/name:config$"):
        hub.download(HubData(str(_dataset(tmp_path / "set")), config="german"), folder)
    assert not folder.exists()


def test_a_set_fetched_once_needs_no_hub_again(
    a_hub: list[str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    source = _dataset(tmp_path / "set")
    real = hub.download
    monkeypatch.setattr(
        hub, "download", lambda data, folder: real(replace(data, id=str(source)), folder)
    )
    settings = replace(SMALL, data="me/open")
    check_data(settings)
    assert (hub.HubData("me/open").folder / "abc" / "train.parquet").is_file()
    task = load_task(settings, gpt2_like(), 400)
    assert len(a_hub) == 1  # loading asked nobody
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    check_data(settings)
    assert "using revision abc, fetched before" in capsys.readouterr().err
    assert load_task(settings, gpt2_like(), 400) == task
    assert gpt2_like().decode(task.test[0].prompt) == "Say 6"


def test_a_pinned_set_is_read_from_the_cache_without_asking(a_hub: list[str | None]) -> None:
    row = DATA["wikitext-2"].hub
    assert row is not None
    assert row.revision is not None
    folder = row.folder / row.revision
    folder.mkdir(parents=True)
    for split, count in (("train", 6), ("validation", 3), ("test", 3)):
        lines: list[str] = []
        for i in range(count):
            lines += ["", f" = {split} {i} = \n", "", "word " * 60 + "\n"]
        pq.write_table(pa.table({"text": lines}), folder / f"{split}.parquet")
    settings = replace(SMALL, data="wikitext-2")
    check_data(settings)
    task = load_task(settings, gpt2_like(), 400)
    assert a_hub == []
    assert task.name == "wikitext-2"
    text = gpt2_like().decode(task.test_tokens)
    assert text.startswith("<|endoftext|>= test 0 = \n\nword word")


def test_a_preference_split_is_preferred_to_others() -> None:
    names = ["train_sft", "test_sft", "train_prefs", "test_prefs", "train_gen"]
    splits = dict.fromkeys(names)
    assert hub._roles(splits) == {"train": "train_prefs", "test": "test_prefs"}  # type: ignore[arg-type]
    assert hub._roles({"all": None}) == {"train": "all"}  # type: ignore[dict-item]
    assert hub._roles({"train_x": None, "train": None}) == {"train": "train"}  # type: ignore[dict-item]
