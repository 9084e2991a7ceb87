"""Folders of sessions: order, copies, splits, re-runs, and the series with their changes."""

from __future__ import annotations

import json
import random
import shutil
import subprocess

import made_sessions as made
import numpy as np
import pytest

from peftbench.cli import main
from peftbench.compare import index
from peftbench.compare.as_json import json_text
from peftbench.compare.compare import compare_paths
from peftbench.compare.history import read_history
from peftbench.compare.order import first_reached, read_folder
from peftbench.errors import UserError

NAMES = [f"m-{a}-{t}" for a in ("full", "lora", "ia3") for t in ("sft", "dpo")]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def git(*arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", *identity, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def nights(folder, count, *, step_at=None, names=NAMES, commits=None, seed=6):
    """One file a night, of which those from `step_at` on are 8 % slower in one case."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        cases = [made.case(n, train_s=2.0 * float(np.exp(rng.normal(0, 0.01)))) for n in names]
        for entry in cases[0]["rounds"]:
            entry["train_s"] *= 1.08 if step_at is not None and i >= step_at else 1.0
        commit = commits[i] if commits else f"{i:07x}".ljust(40, "0")
        data = made.session(cases, run_id=f"night-{i}", commit=commit,
                            start_unix_s=1.6e9 + 86400 * i)  # fmt: skip
        made.write(folder / f"{random.Random(i).random()}.json", data)  # names say nothing
    return folder


def test_sessions_are_in_the_order_of_commits_and_not_of_files_or_time(tmp_path):
    git("init", "-q", ".")
    commits = []
    for i in range(4):
        git("commit", "-q", "--allow-empty", "-m", str(i))
        commits.append(git("rev-parse", "HEAD"))
    # the first commit was measured last
    measured = [commits[1], commits[2], commits[3], commits[0]]
    nights(tmp_path / "r", 4, commits=measured)
    found = read_folder(tmp_path / "r")
    assert [s.commit for s in found] == commits
    assert first_reached(found, commits[2][:8]) == 2
    assert first_reached(found, "fffffff") == 4


def test_without_a_repository_the_order_is_that_of_time(tmp_path):
    nights(tmp_path / "r", 5)
    assert [s.run_ids for s in read_folder(tmp_path / "r")] == [{f"night-{i}"} for i in range(5)]


def test_a_copy_counts_once_and_a_rerun_is_a_session(tmp_path):
    folder = nights(tmp_path / "r", 3)
    first = sorted(folder.iterdir())[0]
    shutil.copy(first, folder / "copy.json")
    assert len(read_folder(folder)) == 3
    data = json.loads(first.read_text())
    for benchmark in data["benchmarks"]:
        benchmark["extra_info"]["run_id"] = "rerun"
    made.write(folder / "rerun.json", data)
    assert len(read_folder(folder)) == 4


def test_files_of_one_commit_with_other_cases_are_one_session(tmp_path):
    for i, part in enumerate((NAMES[:3], NAMES[3:])):
        cases = [made.case(n) for n in part]
        made.write(tmp_path / "r" / f"{i}.json", made.session(cases, run_id=f"job-{i}"))
    found = read_folder(tmp_path / "r")
    assert len(found) == 1
    assert {k[0] for k in found[0].cases} == set(NAMES)


def test_a_folder_is_its_own_history_and_the_new_file_may_lie_in_it(tmp_path):
    folder = nights(tmp_path / "r", 12)
    newest = max(folder.iterdir(), key=lambda f: json.loads(f.read_text())["peftbench"]["run_id"]
                 .removeprefix("night-").zfill(3))  # fmt: skip
    found = compare_paths(folder, newest, None)
    assert found.sessions == 11
    assert found.exit_code == 0
    made.write(folder / "verdicts.json", json_text(found))  # is not taken for a session
    assert json_text(compare_paths(folder, newest, None)) == json_text(found)


def test_a_change_point_is_a_range_of_commits(tmp_path, capsys):
    nights(tmp_path / "r", 30, step_at=20)
    found = read_history(tmp_path / "r", metric="train_s")
    assert len(found.series) == len(NAMES)
    (changed,) = [s for s in found.series if s.points]
    (point,) = changed.points
    assert (changed.case_id, point.after, point.until) == (NAMES[0], "0000013", "0000014")
    assert point.is_worse
    assert point.change == pytest.approx(0.08, abs=0.02)
    assert main(["history", str(tmp_path / "r"), "--case", NAMES[0]]) == 0
    assert "0000013..0000014" in capsys.readouterr().out


def test_gaps_stay_gaps_and_widen_the_range(tmp_path):
    folder = nights(tmp_path / "r", 24, step_at=14)
    for file in folder.iterdir():
        data = json.loads(file.read_text())
        if data["peftbench"]["run_id"] in ("night-13", "night-14"):
            data["benchmarks"].pop(0)
            data["peftbench"]["cases"][0] |= {"status": "crashed", "reason": "signal 9"}
            made.write(file, data)
    found = read_history(tmp_path / "r", case=NAMES[0], metric="train_s")
    (series,) = found.series
    assert series.values[13:15] == (None, None)
    (point,) = series.points
    assert (point.after, point.until, point.between) == ("000000c", "000000f", 2)


def test_a_subject_orders_and_names_by_its_version(tmp_path):
    for i, version in enumerate(("0.10.0", "0.9.1", "0.22.0")):
        data = made.session(
            [made.case(n) for n in NAMES], run_id=f"r{i}", start_unix_s=1.6e9 + i * 1e5,
            commit=f"{i}" * 40, libraries={"peft": version},
        )  # fmt: skip
        made.write(tmp_path / "r" / f"{i}.json", data)
    found = read_history(tmp_path / "r", subject="peft")
    assert found.places == ("peft 0.9.1", "peft 0.10.0", "peft 0.22.0")
    with pytest.raises(UserError, match="a version of 'trl'"):
        read_history(tmp_path / "r", subject="trl")


def test_the_index_gives_the_same_sessions_and_survives_damage(tmp_path):
    folder = nights(tmp_path / "r", 2)
    first = read_folder(folder)
    entries = list(index.index_folder().iterdir())
    assert len(entries) == 2
    again = read_folder(folder)
    assert [s.run_ids for s in again] == [s.run_ids for s in first]
    key = next(iter(first[0].cases))
    assert again[0].cases[key].rounds == first[0].cases[key].rounds
    assert again[0].cases[key].environment == first[0].cases[key].environment
    entries[0].write_text("{")
    assert len(read_folder(folder)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["r", "--metric", "trian_s"], "did you mean train_s"),
        (["r", "--case", "q"], "unknown case 'q'"),
        (["none"], "'none' is no folder; give a folder"),
        (["file.json"], "is a file; give a folder"),
        (["empty"], "has no result file"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, arguments, message):
    nights(tmp_path / "r", 1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.json").write_text("{}")
    assert main(["history", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err) < 300


def test_a_truncated_file_in_the_folder_is_named(tmp_path, capsys):
    folder = nights(tmp_path / "r", 2)
    (folder / "half.json").write_text('{"peftbench": {')
    assert main(["compare", str(folder), str(sorted(folder.glob("0*"))[0])]) == 2
    assert "half.json' is not JSON" in capsys.readouterr().err
