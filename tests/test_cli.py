"""The `peftbench` command: tables, assets, exit codes."""

from __future__ import annotations

import pytest

from peftbench.adapters import ADAPTERS
from peftbench.case import PRESETS
from peftbench.cli import main
from peftbench.data import assets
from peftbench.data.loading import DATA
from peftbench.methods import METHODS
from peftbench.models import MODELS


def test_list_names_everything_that_has_a_row(capsys):
    assert main(["list"]) == 0
    words = capsys.readouterr().out.split()
    for table in (MODELS, ADAPTERS, METHODS, DATA, PRESETS):
        assert set(table) <= set(words)
    assert all(row.papers or name == "full" for name, row in ADAPTERS.items())
    assert {paper for row in ADAPTERS.values() for paper in row.papers} <= {
        word.rstrip(";") for word in words
    }


def test_assets_list_says_what_is_in_the_cache(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PEFTBENCH_CACHE", str(tmp_path))
    assert main(["assets", "list"]) == 0
    out = capsys.readouterr().out
    assert out.count("not fetched") == len(assets.ASSETS)


def test_an_unknown_asset_is_one_line_and_exit_code_2(capsys):
    assert main(["assets", "fetch", "wikipedia"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "peftbench: unknown asset 'wikipedia'; did you mean wikipedia-sample? choose from:"
        " smollm2-135m-instruct-q4, wikipedia-sample\n"
    )


def test_an_unknown_option_is_answered_with_the_usage_of_its_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--model", "m", "--adapter", "a", "--method", "sft", "--epoch", "3"])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("usage: peftbench train ")
    assert error.endswith("peftbench train: error: unrecognized arguments: --epoch 3\n")


def test_no_command_is_a_usage_error():
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
