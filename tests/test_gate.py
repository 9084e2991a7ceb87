"""The comparison at the end of `pytest bench`: real runs against edited copies of their files."""

from __future__ import annotations

import json

import pytest
from bench_run import bench


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    code, text, _ = bench(folder)
    assert code == 0, text
    return folder / "run.json"


def edited(base, folder, **values):
    """A copy in which one case had other numbers."""
    data = json.loads(base.read_text())
    record = next(b["extra_info"] for b in data["benchmarks"]
                  if b["extra_info"]["case_id"] == "tiny-gpt2-lora-sft")  # fmt: skip
    for entry in [record, *record["rounds"]]:
        entry |= values
    path = folder / "base.json"
    path.write_text(json.dumps(data))
    return path


def test_a_change_fails_the_session_only_when_asked_and_is_written_beside_the_run(base, tmp_path):
    changed = edited(base, tmp_path, trainable_params=1)
    selected = ("--compare-to", str(changed), "-k", "lora-sft")
    code, text, _ = bench(tmp_path, *selected)
    assert code == 0, text
    assert "CHANGED (1)" in text
    # what -k leaves out is said, and is not missing
    assert "not run, so not compared: tiny-gpt2-full-dpo" in text
    assert "MISSING" not in text
    code, text, _ = bench(tmp_path, *selected, "--fail-on-regression")
    assert code == 1, text
    verdicts = json.loads((tmp_path / "run.verdicts.json").read_text())
    assert verdicts["exit_code"] == 1
    assert [r["metric"] for r in verdicts["rows"] if r["verdict"] == "changed"] == [
        "trainable_params"
    ]


def test_confirm_runs_suspects_again_and_takes_back_what_was_chance(base, tmp_path):
    # the base seems to have taken 1 MiB: so does no second session either
    changed = edited(base, tmp_path, host_peak_rss_delta_bytes=2**20)
    code, text, run = bench(
        tmp_path, "--compare-to", str(changed), "-k", "lora-sft", "--confirm",
        "--fail-on-regression",
    )  # fmt: skip
    assert code == 1, text
    assert "confirmed; outside" in " ".join(text.split())
    # the rounds that confirmed are no part of the run's own file
    assert len(run["benchmarks"][0]["extra_info"]["rounds"]) == 1
    (folder,) = (tmp_path / "runs").iterdir()
    assert len([f for f in folder.iterdir() if f.is_dir()]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--confirm"], "--confirm needs --compare-to"),
        (["--fail-on-regression"], "--fail-on-regression needs --compare-to"),
        (["--compare-to", "none.json"], "cannot read 'none.json'"),
    ],
)
def test_a_mistake_is_said_before_anything_runs(tmp_path, arguments, message):
    code, text, _ = bench(tmp_path, *arguments)
    assert code == 4
    assert message in text
    assert "[1/" not in text
