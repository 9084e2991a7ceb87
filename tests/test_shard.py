"""A matrix in parts, and the parts' files in one: in arithmetic, and with the real thing."""

from __future__ import annotations

import json
import os
import subprocess

import made_sessions as made
import pytest
from bench_run import ROOT, bench, cases, own_compare, rows
from hypothesis import given
from hypothesis import strategies as st

from peftbench.case import Case
from peftbench.cli import main
from peftbench.compare.load import read_session
from peftbench.errors import UserError
from peftbench.shard import Shard, expected_seconds, longest_first, parts

IDS = [f"m-{i}" for i in range(40)]
LENGTHS = st.lists(st.floats(0.1, 1000), min_size=1, max_size=len(IDS))


@given(lengths=LENGTHS, count=st.integers(1, len(IDS)), known=st.data())
def test_every_case_is_in_one_part_and_no_part_is_too_long(lengths, count, known):
    ids = IDS[: len(lengths)]
    seconds = dict(zip(ids, lengths, strict=True))
    for case_id in known.draw(st.sets(st.sampled_from(ids))):
        del seconds[case_id]  # a case that no record knows
    if count > len(ids):
        with pytest.raises(UserError, match=f"{count} parts of {len(ids)} cases"):
            parts(ids, count, seconds)
        return
    found = parts(ids, count, seconds)
    assert len(found) == count
    assert sorted(c for part in found for c in part) == sorted(ids)
    assert all(part == [c for c in ids if c in part] for part in found)
    assert found == parts(ids, count, seconds)
    if len(seconds) == len(ids):
        longest = max(sum(seconds[c] for c in part) for part in found)
        # no division is shorter than the mean, or than the longest case
        floor = max(sum(lengths) / count, max(lengths))
        # two cases of more than a third of the floor each may have to share a part
        in_order = sorted(lengths, reverse=True)
        if count < len(ids):
            floor = max(floor, in_order[count - 1] + in_order[count])
        assert longest <= (4 / 3) * floor + 1e-9


def test_parts_by_time_are_more_even_than_parts_by_number():
    ids = ["long", "a", "b", "c"]
    assert parts(ids, 2, {"long": 30, "a": 10, "b": 10, "c": 10}) == [["long"], ["a", "b", "c"]]
    assert parts(ids, 2, {}) == [["long", "b"], ["a", "c"]]
    # what no record knows counts as the median of what they know
    assert parts(ids, 2, {"long": 30, "a": 10, "b": 10}) == [["long"], ["a", "b", "c"]]


def test_a_cluster_takes_the_longest_first():
    cases = [Case("m", "lora", method) for method in ("sft", "dpo", "orpo", "ppo")]
    known = {"m-lora-dpo": 3.0, "m-lora-ppo": 9.0, "m-lora-sft": 1.0}
    assert [c.method for c in longest_first(cases, known)] == ["ppo", "dpo", "orpo", "sft"]
    assert longest_first(cases, {}) == cases


def test_expected_seconds_are_the_medians_of_earlier_rounds(tmp_path):
    slow, quick = made.case("m-lora-dpo", seeds=3), made.case("m-full-dpo", total_s=4.0)
    for entry, seconds in zip(slow["rounds"], (9.0, 7.0, 30.0), strict=True):
        entry["total_s"] = seconds
    made.write(tmp_path / "a.json", made.session([slow, quick, made.stopped("m-ia3-dpo", "oom")]))
    assert expected_seconds(tmp_path) == {"m-lora-dpo": 9.0, "m-full-dpo": 4.0}
    assert expected_seconds(tmp_path / "a.json") == expected_seconds(tmp_path)


@pytest.mark.parametrize("text", ["", "3", "0/2", "3/2", "1/0", "-1/2", "a/b", "1/2/3"])
def test_a_part_that_is_none_is_one_line(text):
    with pytest.raises(UserError, match="give i/n with i from 1 to n"):
        Shard.parse(text)


def shard_file(folder, index, ids, count=2, every=("m-lora-dpo", "m-full-dpo"), **of_session):
    name = f"{index}.json"
    data = made.session(
        [made.case(n) for n in ids], run_id=f"run-{index}",
        shard=Shard(index, count).to_dict(every), bases=[], **of_session,
    )  # fmt: skip
    return made.write(folder / name, data)


def test_merged_shards_are_the_undivided_session(tmp_path, capsys):
    one = shard_file(tmp_path, 1, ["m-lora-dpo"])
    two = shard_file(tmp_path, 2, ["m-full-dpo"])
    whole = tmp_path / "whole.json"
    assert main(["merge", str(two), str(one), "-o", str(whole)]) == 0
    assert "2 cases of 2 shards" in capsys.readouterr().out
    session = read_session(whole)
    assert [key[0] for key in session.cases] == ["m-lora-dpo", "m-full-dpo"]
    assert session.sentinels == pytest.approx(read_session(one).sentinels)
    undivided = read_session(
        made.write(
            tmp_path / "u.json",
            made.session([made.case("m-lora-dpo"), made.case("m-full-dpo")]),
        )
    )
    for key, row in undivided.cases.items():
        mine = session.cases[key]
        assert [r.values for r in mine.rounds] == [r.values for r in row.rounds]
    assert main(["compare", str(tmp_path / "u.json"), str(whole)]) == 0


def test_what_is_no_whole_run_is_refused(tmp_path, capsys):
    one = shard_file(tmp_path, 1, ["m-lora-dpo"])
    (tmp_path / "b").mkdir()
    again = shard_file(tmp_path / "b", 1, ["m-lora-dpo"])
    (tmp_path / "c").mkdir()
    others = shard_file(tmp_path / "c", 2, ["m-full-dpo"], every=("m-full-dpo", "m-ia3-dpo"))
    of_three = shard_file(tmp_path / "c", 3, ["m-full-dpo"], count=3)
    newer = shard_file(
        tmp_path / "b", 2, ["m-full-dpo"], libraries=made.LIBRARIES | {"torch": "2.14.0"}
    )
    undivided = made.write(tmp_path / "u.json", made.session([made.case("m-lora-dpo")]))
    out = tmp_path / "out.json"
    for files, said in (
        ([one], "of 2 shards there is no 2"),
        ([one, again], "are both shard 1/2"),
        ([one, others], "their cases differ"),
        ([one, of_three], "their shards differ"),
        ([one, newer], "torch was 2.13.0, now it is 2.14.0"),
        ([one, undivided], "is no shard"),
    ):
        assert main(["merge", *map(str, files), "-o", str(out)]) == 2, said
        assert said in capsys.readouterr().err
        assert not out.exists()
    assert main(["merge", str(one), "--partial", "-o", str(out)]) == 0


@pytest.mark.verify
def test_real_shards_give_the_cases_and_losses_of_an_undivided_run(tmp_path):
    some = ("-k", "lora and not qlora", "--pairs", "24")
    folders = [tmp_path / name for name in ("whole", "1", "2")]
    for folder, shard in zip(folders, ((), ("--shard", "1/2"), ("--shard", "2/2")), strict=True):
        folder.mkdir()
        code, text, _ = bench(folder, *some, *shard)
        assert code == 0, text
    whole, *shards = [json.loads((f / "run.json").read_text()) for f in folders]
    files = [str(f / "run.json") for f in folders[1:]]
    assert len(rows(shards[0])) == len(rows(shards[1])) == 1
    (tmp_path / "joined").mkdir()
    assert main(["merge", *files, "-o", str(tmp_path / "joined" / "run.json")]) == 0
    joined = json.loads((tmp_path / "joined" / "run.json").read_text())
    assert cases(joined) == cases(whole)
    for name, row in rows(whole).items():
        assert rows(joined)[name]["losses"] == row["losses"]
        assert rows(joined)[name]["perplexity"] == row["perplexity"]
    assert all(name in own_compare(tmp_path / "joined") for name in rows(whole))


def test_shards_of_the_command_line_are_checked_before_anything_runs(tmp_path):
    for arguments, said in (
        (("--shard", "5/4"), "give i/n"),
        (("--shard", "1/99"), "asks for 99 parts"),
        (("--expected-times", "x.json"), "--expected-times needs --shard or --dispatch ray"),
        (("--shard", "1/2", "--expected-times", "x.json"), "cannot read"),
    ):
        code, text, _ = bench(tmp_path, *arguments)
        assert code == 4
        assert said in text
        assert "Traceback" not in text


def test_a_slurm_task_runs_its_part_and_goes_on_where_it_was_preempted(tmp_path):
    script = ROOT / "scripts" / "slurm_array.sh"
    python = tmp_path / "python"  # says what it would run
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    task = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "3",
            "PEFTBENCH_PYTHON": str(python)}  # fmt: skip

    def run(**environment):
        return subprocess.run(
            [script, "night", "--preset", "smoke"], cwd=tmp_path, text=True, check=False,
            capture_output=True, env=os.environ | environment,
        )  # fmt: skip

    said = run(**task).stdout.split()
    assert said[:3] == ["-m", "pytest", "bench"]
    assert said[3:5] == ["--shard", "2/3"]
    assert "--benchmark-json=night/2.json" in said
    assert said[-2:] == ["--preset", "smoke"]
    assert "--resume" not in said
    (tmp_path / "night" / "runs-2" / "20260101T000000Z-aaaaaa").mkdir(parents=True)
    assert "--resume 20260101T000000Z-aaaaaa" in run(**task).stdout
    assert run().returncode == 2
