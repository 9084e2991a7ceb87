"""`peftbench export`: every round as a row, whatever reads it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import made_sessions as made
import pyarrow.parquet
import pytest

from peftbench.cli import main
from peftbench.export import COLUMNS, rows
from peftbench.metrics import METRICS

QUICK = Path(__file__).parent.parent / "results" / "xeon-amx-2c" / "quick"


def test_a_row_for_each_round_and_for_each_case_without_one(tmp_path):
    lora = made.case("m-lora-dpo", seeds=3)
    for seed, entry in enumerate(lora["rounds"]):
        entry["train_s"] = 2.0 + seed
    lora["rounds"][1]["disturbances"] = ["shared"]
    file = made.write(tmp_path / "a.json", made.session([lora, made.stopped("m-full-dpo", "oom")]))
    found = rows([file])
    assert [(r["case_id"], r["status"], r["seed"], r["train_s"]) for r in found] == [
        ("m-lora-dpo", "ok", 0, 2.0), ("m-lora-dpo", "ok", 1, 3.0), ("m-lora-dpo", "ok", 2, 4.0),
        ("m-full-dpo", "oom", None, None),
    ]  # fmt: skip
    assert [r["disturbed"] for r in found] == [False, True, False, False]
    assert found[3]["reason"] == "out of memory"
    assert found[0]["torch_version"] == "2.13.0"
    assert all(tuple(r) and set(r) == set(COLUMNS) for r in found)


def test_csv_and_parquet_hold_what_the_records_say(tmp_path, capsys):
    newest = max(QUICK.glob("*.json"))
    data = json.loads(newest.read_text())
    records = {b["extra_info"]["case_id"]: b["extra_info"] for b in data["benchmarks"]}
    for name in ("table.csv", "table.parquet"):
        assert main(["export", str(newest), "-o", str(tmp_path / name)]) == 0
        assert f"{len(records)} rounds in " in capsys.readouterr().out
    with (tmp_path / "table.csv").open(newline="") as file:
        text = {row["case_id"]: row for row in csv.DictReader(file)}
    table = pyarrow.parquet.read_table(tmp_path / "table.parquet")
    assert table.column_names == list(COLUMNS)
    for row in table.to_pylist():
        record = records[row["case_id"]]
        assert row["commit"] == record["provenance"]["commit"]
        for name in METRICS:
            value = record.get(name)
            assert row[name] == (None if value is None else float(value)), name
            assert text[row["case_id"]][name] == ("" if value is None else str(value)), name


def test_a_case_that_lost_its_numbers_is_damage(tmp_path, capsys):
    file = made.write(tmp_path / "a.json", made.session([made.case("m-lora-dpo")]))
    data = json.loads(file.read_text())
    data["benchmarks"][0]["extra_info"] = {}
    file.write_text(json.dumps(data))
    for command in (["export", "-o", str(tmp_path / "t.csv")], ["show"], ["history"]):
        place = tmp_path if command == ["history"] else file
        assert main([*command, str(place)]) == 2
        err = capsys.readouterr().err
        assert "is damaged: m-lora-dpo is ok but has no record in it" in err
        assert err.count("\n") == 1
    assert not (tmp_path / "t.csv").exists()


def test_a_case_without_its_time_is_no_table(tmp_path, capsys):
    lora = made.case("m-lora-dpo")
    for entry in (lora, *lora["rounds"]):
        entry.pop("train_s", None)
    file = made.write(tmp_path / "a.json", made.session([lora]))
    assert main(["show", str(file)]) == 2
    assert "is damaged: m-lora-dpo is ok but has no record in it" in capsys.readouterr().err


def test_a_folder_is_all_of_its_files(tmp_path):
    for number in range(2):
        session = made.session([made.case("m-lora-dpo")], run_id=f"run-{number}")
        made.write(tmp_path / f"{number}.json", session)
    assert [r["run_id"] for r in rows([tmp_path])] == ["run-0", "run-1"]


@pytest.mark.parametrize(
    ("name", "words"),
    [("table.xlsx", "must end in .csv or .parquet"), ("a.json/t.csv", "cannot be written"),
     ("a.json/t.parquet", "cannot be written")],
)  # fmt: skip
def test_an_output_that_cannot_be_is_one_line(tmp_path, capsys, name, words):
    file = made.write(tmp_path / "a.json", made.session([made.case("m-lora-dpo")]))
    assert main(["export", str(file), "-o", str(tmp_path / name)]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
