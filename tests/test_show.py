"""`peftbench show`: numbers with units, nulls with reasons, mistakes in one line."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from peftbench import __version__, show
from peftbench.case import Case, Settings
from peftbench.cli import main
from peftbench.compare.load import read_session
from peftbench.metrics import METRICS, kind_of, metrics_of
from peftbench.record import FORMAT, dumps, measured, merge_rounds
from peftbench.result_files import GIVE_FILE
from peftbench.summary import fitted, table

COMMITTED = sorted((Path(__file__).parent.parent / "results").glob("*/quick/*.json"))[-1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
VALUES = {
    "train_s": 2.0,
    "step_p50_s": 0.0125,
    "tokens_per_s": 6319.4,
    "host_peak_rss_delta_bytes": 48 * 2**20,
    "total_params": 1_000_000,
    "trainable_params": 4096,
    "trainable_ratio": 0.004096,
    "adapter_bytes": 2**18,
    "learning_rate": 0.004,
    "perplexity": 13.92,
    "perplexity_se": 0.42,
    "perplexity_base": 386.9,
    "preference_accuracy": 0.69,
    "preference_accuracy_se": 0.0231,
    "preference_accuracy_base": 0.5,
}
NO_GPU = "the run used cpu, no GPU"


def record(case: Case, *, seed: int = 0, **values: float | None) -> dict:
    """A round's record whose other metrics are null for one reason."""
    return {
        "format": FORMAT, "status": "ok", "case_id": case.id, "case_hash": case.hash,
        "case": case.to_dict(), "seed": seed, "device": "cpu", "run_id": "20260102T030405Z-abcdef",
        **measured(VALUES | values, dict.fromkeys(METRICS, NO_GPU)),
        "phases": {
            "load": {"seconds": 0.5, "host_peak_rss_bytes": 300 * 2**20,
                     "torch_peak_allocated_bytes": None},
            "train": {"seconds": 2.0, "host_peak_rss_bytes": None,
                      "torch_peak_allocated_bytes": None},
        },
        "samples": [{"prompt": "A\n\nship .", "before": "Its \x1b[31mflag", "after": ""}],
        "provenance": {
            "peftbench": "0.1.0", "commit": COMMIT, "commit_dirty": True,
            "libraries": {"torch": "2.13.0", "peft": "0.22.0"},
            "library_commits": {"peft": {"commit": COMMIT, "dirty": None, "repository": None}},
            "python": "3.11.7", "platform": "Linux x86_64", "cpu": "Some CPU", "cpu_cores": 2,
            "memory_bytes": 8 * 2**30,
        },
    }  # fmt: skip


LORA = Case("tiny-gpt2", "lora", "sft", Settings(batch_size=8, orpo_lambda=4.0))
FULL = Case("tiny-gpt2", "full", "sft", Settings(batch_size=8, orpo_lambda=4.0))
FAILED = {
    "case_id": FULL.id, "case_hash": FULL.hash, "status": "failed", "phase": "attach",
    "reason": "KeyError: 'q'",
}  # fmt: skip
SKIPPED = FAILED | {
    "case_id": "tiny-gpt2-prefix-sft", "status": "skipped", "phase": "collect",
    "reason": "no cache",
}  # fmt: skip


def write(path: Path, data: object) -> Path:
    path.write_text(data if isinstance(data, str) else dumps(data))
    return path


def session_file(folder: Path, records: list[dict], others: list[dict], **changes: object) -> Path:
    """As pytest-benchmark writes it: records under `extra_info`, all cases under our key."""
    cases = [{k: r[k] for k in ("case_id", "case_hash", "status")} for r in records] + others
    ours = {"format": FORMAT, "run_id": "r", "cases": cases} | changes
    entries = [{"name": r["case_id"], "extra_info": r} for r in records]
    return write(folder / "run.json", {"benchmarks": entries, "peftbench": ours})


@pytest.fixture
def shown(capsys):
    """A function that runs `peftbench show` and returns the lines it printed."""

    def run(*arguments: object) -> list[str]:
        code = main(["show", *map(str, arguments)])
        captured = capsys.readouterr()
        assert (code, captured.err) == (0, "")
        return captured.out.splitlines()

    return run


def section(lines: list[str], title: str) -> list[str]:
    """Lines of the block whose first line begins with the title, that line left out."""
    start = next(i for i, line in enumerate(lines) if line.startswith(title))
    end = next((i for i in range(start, len(lines)) if not lines[i]), len(lines))
    return [" ".join(line.split()) for line in lines[start + 1 : end] if set(line) != {"-", " "}]


# a whole file


def test_all_cases_of_a_committed_file_are_in_the_table(shown):
    lines = shown(COMMITTED)
    ids = [c["case_id"] for c in json.loads(COMMITTED.read_text())["peftbench"]["cases"]]
    names = [i for i in ids if not i.endswith("-infer")]
    assert [line.split()[0] for line in lines[2 : 2 + len(names)]] == names
    # those of inference stand in a table of their own, a line for each model
    start = next(i for i, line in enumerate(lines) if line.startswith("inference"))
    answering = [line.split()[:2] for line in lines[start + 2 :] if "-infer " in line]
    of_each = ("base", "unmerged", "merged")
    assert answering == [[i, m] for i in ids if i.endswith("-infer") for m in of_each]
    assert lines[2].endswith("ok")


def test_the_table_has_cases_without_a_record_and_says_where_the_numbers_come_from(shown, tmp_path):
    lines = shown(session_file(tmp_path, [record(LORA)], [FAILED, SKIPPED]))
    assert [" ".join(line.split()) for line in lines[2:5]] == [
        "tiny-gpt2-lora-sft 2.00 6,319 48.0 4,096 0.41% 386.9 -> 13.92 50.0% -> 69.0% ok",
        "tiny-gpt2-full-sft - - - - - - - failed: KeyError: 'q'",
        "tiny-gpt2-prefix-sft - - - - - - - skipped: no cache",
    ]
    assert lines[-4:] == [
        "run        20260102T030405Z-abcdef on cpu",
        "peftbench  0.1.0, commit 0123456789ab with changes that are not in it",
        "machine    Some CPU, 2 cores, 8.0 GiB, Linux x86_64, python 3.11.7",
        "libraries  torch 2.13.0, peft 0.22.0 (commit 0123456789ab)",
    ]


def test_a_file_in_which_no_case_ended_well_has_a_table_too(shown, tmp_path):
    lines = shown(session_file(tmp_path, [], [FAILED]))
    assert lines[2].split()[0] == FULL.id
    assert "peftbench" not in "\n".join(lines)


def test_a_round_file_is_a_table_of_one_case(shown, tmp_path):
    lines = shown(write(tmp_path / "round.json", record(LORA)))
    assert lines[2].startswith("tiny-gpt2-lora-sft")
    assert lines[3] == ""


def test_entries_of_other_tests_in_the_same_file_are_left_out(shown, tmp_path):
    path = session_file(tmp_path, [record(LORA)], [])
    data = json.loads(path.read_text())
    data["benchmarks"].insert(0, {"name": "test_of_someone_else", "extra_info": {"note": 1}})
    assert shown(write(path, data))[2].startswith("tiny-gpt2-lora-sft")


# one record


def test_every_committed_record_can_be_shown_in_full():
    rows = show.read_rows(COMMITTED)
    assert len(rows) == 44
    for row in rows:
        text = "\n".join(show.record_lines(row))
        # in its section, beside its metric, or not measured with a reason
        for name in metrics_of(kind_of(row["case_id"])):
            assert name in text or show._belongs_to_another(name), f"{row['case_id']}: {name}"


def test_a_record_has_units_bases_and_the_settings_that_were_changed(shown, tmp_path):
    lines = shown(write(tmp_path / "round.json", record(LORA)), LORA.id)
    assert lines[0] == "tiny-gpt2-lora-sft: ok"
    assert section(lines, "setting") == ["batch_size 8 16", "orpo_lambda 4.0 0.1"]
    assert section(lines, "time") == [
        "train_s 2 s", "step_p50_s 12.5 ms", "tokens_per_s 6,319 tokens/s",
    ]  # fmt: skip
    assert section(lines, "memory") == ["host_peak_rss_delta_bytes 48.0 MiB"]
    assert section(lines, "parameters and storage") == [
        "total_params 1,000,000 parameters", "trainable_params 4,096 parameters",
        "trainable_ratio 0.4096 %", "adapter_bytes 0.25 MiB",
    ]  # fmt: skip
    assert section(lines, "budget") == ["learning_rate 0.004"]
    assert section(lines, "quality") == [
        "perplexity 13.92 0.42 386.9", "preference_accuracy 69 % 2.31 % 50 %",
    ]  # fmt: skip
    header = next(line for line in lines if line.startswith("quality"))
    assert header.split("  ")[0] == "quality"
    assert header.split()[1:] == ["value", "standard", "error", "base"]


def test_a_null_is_under_its_reason(shown, tmp_path):
    row = record(LORA)
    row["null_reasons"]["reference_s"] = "sft has no reference"
    lines = shown(write(tmp_path / "round.json", row), "lora")
    block = section(lines, "not measured")
    assert block[block.index("sft has no reference:") + 1] == "reference_s"
    others = " ".join(block[block.index(f"{NO_GPU}:") + 1 :])
    assert "peak_gpu_memory_bytes" in others
    assert "perplexity_unquantized_base" in others
    assert "train_s" not in others.replace(",", "").split()


def test_phases_have_seconds_peaks_and_a_bar_relative_to_the_longest(shown, tmp_path):
    lines = shown(write(tmp_path / "round.json", record(LORA)), "lora")
    start = next(i for i, line in enumerate(lines) if line.startswith("phase"))
    assert lines[start].split() == ["phase", "time", "host_peak_rss"]  # no column of nulls
    assert lines[start + 2].split() == ["load", "0.5", "s", "300.0", "MiB", "#" * 6]
    assert lines[start + 3].split() == ["train", "2", "s", "-", "#" * 24]


def test_samples_are_one_line_each_and_cannot_steer_the_terminal(shown, tmp_path):
    lines = shown(write(tmp_path / "round.json", record(LORA)), "lora")
    start = lines.index("sample 1")
    assert lines[start + 1 : start + 4] == [
        "  prompt  A ship .", "  before  Its ?[31mflag", "  after   -",
    ]  # fmt: skip


def test_several_rounds_show_their_spread(shown, tmp_path):
    rounds = [record(LORA, seed=7, train_s=1.0), record(LORA, seed=8, train_s=3.0)]
    lines = shown(session_file(tmp_path, [merge_rounds(rounds)], []), LORA.id)
    assert lines[0] == "tiny-gpt2-lora-sft: ok, median of 2 rounds (seeds 7, 8)"
    assert section(lines, "time")[:2] == ["train_s 2 s 1 s to 3 s", "step_p50_s 12.5 ms"]


def test_a_disturbed_round_is_outside_the_median_and_its_spread(shown, tmp_path):
    disturbed = {"disturbances": ["the GPU was throttled"]}
    rounds = [
        record(LORA, seed=7, train_s=1.0),
        record(LORA, seed=8, train_s=90.0) | disturbed,
        record(LORA, seed=9, train_s=3.0),
    ]
    lines = shown(session_file(tmp_path, [merge_rounds(rounds)], []), LORA.id)
    assert lines[:2] == [
        "tiny-gpt2-lora-sft: ok, median of 2 rounds (seeds 7, 9, 1 disturbed and left out)",
        "disturbed: the GPU was throttled",
    ]
    assert section(lines, "time")[0] == "train_s 2 s 1 s to 3 s"


def test_settings_at_their_default_take_one_line(shown, tmp_path):
    row = record(Case("tiny-gpt2", "lora", "sft"))
    assert "settings: all at their default" in shown(write(tmp_path / "r.json", row), "lora")


def test_a_setting_of_another_version_is_shown(shown, tmp_path):
    row = record(Case("tiny-gpt2", "lora", "sft"))
    row["case"]["settings"] = {**asdict(Settings()), "momentum": 0.9}
    lines = shown(write(tmp_path / "r.json", row), "lora")
    assert section(lines, "setting") == ["momentum 0.9 not a setting of this version"]


def test_a_metric_that_the_file_does_not_know_is_null_with_that_reason(shown, tmp_path):
    row = record(LORA)
    del row["samples_per_s"], row["null_reasons"]["samples_per_s"]
    lines = shown(write(tmp_path / "r.json", row), "lora")
    block = section(lines, "not measured")
    assert block[block.index("the file is older than this metric:") + 1] == "samples_per_s"


def test_what_disturbed_a_record_is_said_before_its_numbers(shown, tmp_path):
    row = record(LORA) | {"disturbances": ["another process used the GPU"]}
    path = write(tmp_path / "r.json", row)
    assert shown(path, "lora")[1] == "disturbed: another process used the GPU"
    assert "another process used the GPU" in "\n".join(shown(path))


def test_a_case_that_failed_shows_its_phase_and_reason(shown, tmp_path):
    path = session_file(tmp_path, [record(LORA)], [FAILED, SKIPPED])
    assert shown(path, "full") == [
        "tiny-gpt2-full-sft: failed", "", "phase   attach", "reason  KeyError: 'q'",
    ]  # fmt: skip
    assert shown(path, "prefix")[0] == "tiny-gpt2-prefix-sft: skipped"


def test_a_terminal_without_the_samples_script_gets_a_replacement(monkeypatch, tmp_path):
    row = record(LORA)
    row["samples"][0]["after"] = "Œuvre 船"
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    assert main(["show", str(write(tmp_path / "r.json", row)), "lora"]) == 0
    screen.seek(0)
    assert "after   ?uvre ?" in screen.read()


# which case


def test_the_whole_id_wins_over_ids_that_contain_it(shown, tmp_path):
    longer = Case("big-tiny-gpt2", "lora", "sft")
    path = session_file(tmp_path, [record(longer), record(LORA)], [])
    assert shown(path, LORA.id)[0] == "tiny-gpt2-lora-sft: ok"
    assert shown(path, "big")[0] == "big-tiny-gpt2-lora-sft: ok"


def test_cases_of_one_id_are_told_apart_by_their_hash(shown, tmp_path, capsys):
    mine, yours = (Case(f"{owner}/gpt", "lora", "sft") for owner in ("me", "you"))
    assert mine.id == yours.id
    path = session_file(tmp_path, [record(mine), record(yours, train_s=9.0)], [])
    assert section(shown(path, yours.hash), "time")[0] == "train_s 9 s"
    assert main(["show", str(path), mine.id]) == 2
    assert capsys.readouterr().err == (
        f"peftbench: 'gpt-lora-sft' fits 2 cases: gpt-lora-sft ({mine.hash}), gpt-lora-sft"
        f" ({yours.hash}); give the whole id, or the hash where the ids are equal\n"
    )


# older files

GOLDEN = sorted((Path(__file__).parent / "golden").glob("session-*.json"))


def test_there_is_a_golden_file_of_every_format():
    assert [int(file.stem.removeprefix("session-")) for file in GOLDEN] == list(
        range(1, FORMAT + 1)
    )


def test_a_table_is_no_wider_than_the_terminal(monkeypatch):
    header, rows = ["case", "a", "bb", "status"], [["m-lora-sft", "12345", "67890", "x" * 90]]
    for columns, shown in (
        ("37", "case a bb status"),
        ("29", "case bb status"),
        ("9", "case status"),
    ):
        monkeypatch.setenv("COLUMNS", columns)
        first, *_, last = fitted(header, rows, ("a", "bb"))
        assert first.split() == shown.split()
        cut = [name for name in ("a", "bb") if name not in shown.split()]
        told = f"too wide for {columns} columns: {', '.join(cut)} "
        assert last.startswith(told) if cut else "x" * 90 in last
    monkeypatch.delenv("COLUMNS")  # and no terminal: pytest has the output
    assert fitted(header, rows, ("a", "bb")) == table(header, rows)


@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.stem)
def test_a_file_of_every_format_keeps_loading_and_its_cases_their_hashes(file):
    """Written by the first version of that format: metrics and settings of today were unknown."""
    rows = show.read_rows(file)
    assert [Case.from_dict(r["case"]).hash for r in rows] == [r["case_hash"] for r in rows]
    assert all(set(metrics_of("train")) <= set(r) for r in rows)
    assert rows[0]["null_reasons"]["reward_model_s"] == "the file is older than this metric"
    session = read_session(file)
    assert set(session.cases) == {(r["case_id"], r["case_hash"]) for r in rows}
    assert all(row.rounds and row.rounds[0].values for row in session.cases.values())


# mistakes


READS = f"peftbench {__version__} reads 1 to {FORMAT}"
NEWER = f"has format {FORMAT + 1}; {READS}: upgrade peftbench; {GIVE_FILE}"
OTHER = f"is JSON, but not of peftbench; {GIVE_FILE}"


def mistakes(folder: Path) -> dict[str, tuple[list[str], str]]:
    """Arguments and message by what is wrong; `FILE` in a message is the file's name, quoted."""
    files = {
        "good": session_file(folder, [record(LORA)], [FAILED, SKIPPED]),
        "not JSON": write(folder / "a.json", "train_s: 3\n"),
        "not text": folder / "b.json",
        "nested": write(folder / "n.json", "[" * 100_000),
        "a list": write(folder / "c.json", [1]),
        "other benchmark": write(folder / "d.json", {"benchmarks": [{"extra_info": {}}]}),
        "other program": write(folder / "e.json", {"peftbench": {"version": 3}}),
        "newer": write(folder / "f.json", {"peftbench": {"format": FORMAT + 1}, "benchmarks": []}),
        "newer round": write(folder / "g.json", record(LORA) | {"format": FORMAT + 1}),
        "no case": write(folder / "h.json", {"peftbench": {"format": 1}, "benchmarks": []}),
        "damaged": write(
            folder / "i.json",
            {"peftbench": {"format": 1, "cases": [FAILED | {"status": "ok"}]}, "benchmarks": []},
        ),
        "missing": folder / "none.json",
        "a folder": folder,
    }
    files["not text"].write_bytes(b"\x93NUMPY\x01")
    messages = {
        "not JSON": f"FILE is not JSON (Expecting value: line 1 column 1 (char 0)); {GIVE_FILE}",
        "not text": "FILE is not JSON ('utf-8' codec can't decode byte 0x93 in position 0: invalid"
        f" start byte); {GIVE_FILE}",
        "a list": f"FILE {OTHER}",
        "other benchmark": f"FILE {OTHER}",
        "other program": f"FILE {OTHER}",
        "newer": f"FILE {NEWER}",
        "newer round": f"FILE {NEWER}",
        "no case": f"FILE holds no case: the run ended before its first one; {GIVE_FILE}",
        "damaged": "FILE is damaged: tiny-gpt2-full-sft is ok but has no record in it;"
        f" {GIVE_FILE}",
        "missing": f"cannot read FILE (No such file or directory); {GIVE_FILE}",
        "a folder": "FILE is a folder; `show` reads one file. In it are: i.json, n.json, run.json",
    }
    found = {k: ([str(files[k])], m.replace("FILE", repr(str(files[k])), 1))
             for k, m in messages.items()}  # fmt: skip
    good = str(files["good"])
    return found | {
        "no such case": (
            [good, "tiny-gpt2-lorra-sft"],
            "unknown case 'tiny-gpt2-lorra-sft'; did you mean tiny-gpt2-lora-sft or"
            " tiny-gpt2-full-sft? choose from: tiny-gpt2-full-sft, tiny-gpt2-lora-sft,"
            " tiny-gpt2-prefix-sft",
        ),
        "several cases": (
            [good, "sft"],
            "'sft' fits 3 cases: tiny-gpt2-lora-sft, tiny-gpt2-full-sft, tiny-gpt2-prefix-sft;"
            " give the whole id, or the hash where the ids are equal",
        ),
    }


@pytest.mark.parametrize("what", [
    "not JSON", "not text", "a list", "other benchmark", "other program", "newer", "newer round",
    "no case", "damaged", "missing", "a folder", "no such case", "several cases",
])  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, capsys, what):
    arguments, message = mistakes(tmp_path)[what]
    assert main(["show", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"peftbench: {message}\n"


def test_json_nested_without_end_is_no_traceback(tmp_path, capsys):
    path = write(tmp_path / "n.json", "[" * 100_000)
    assert main(["show", str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"peftbench: {str(path)!r} is not JSON (")


# how values are written


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0000359, "s", "0.0359 ms"),
        (0.0998, "s", "99.8 ms"),
        (0.1, "s", "0.1 s"),
        (12.345, "s", "12.3 s"),
        (4321.5, "s", "4,322 s"),
        (0, "bytes", "0 MiB"),
        (12_288, "bytes", "0.0117 MiB"),
        (150 * 2**30, "bytes", "153,600.0 MiB"),
        (0.0001234, "ratio", "0.01234 %"),
        (1.0, "ratio", "100 %"),
        (1234567, "tokens", "1,234,567 tokens"),
        (12345.6, "tokens/s", "12,346 tokens/s"),
        (0.34151, "nats", "0.3415 nats"),
        (-0.34151, "nats", "-0.3415 nats"),
        (13.92129, "1", "13.92"),
        (2_500_000_000_000, "FLOP", "2.5 TFLOP"),
        (1.5e9, "FLOP/s", "0.0015 TFLOP/s"),
        (12.5, "J", "12.5 J"),
    ],
)
def test_values_are_in_units_that_a_person_reads(value, unit, text):
    assert show.quantity(value, unit) == text


def test_every_metric_is_in_exactly_one_section():
    sections = show.metric_sections("train")
    assert list(sections) == ["time", "memory", "parameters and storage", "budget", "quality"]
    assert [n for names in sections.values() for n in names] == list(metrics_of("train"))
    sections = show.metric_sections("infer")
    assert list(sections) == ["time", "parameters and storage", "inference"]
    assert [n for names in sections.values() for n in names] == list(metrics_of("infer"))
