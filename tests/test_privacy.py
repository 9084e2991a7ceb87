"""Secrets and places are hidden in what is written; all else stays as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftbench.privacy import clean_file, without_paths, without_secrets

ENVIRONMENT = {
    "HF_TOKEN": "abcdefgh12345", "MY_API_KEY": "abcdefgh12345-longer", "DB_PASSWORD": "short",
    "PATH": "/usr/bin:/bin", "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI",
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("key abcdefgh12345-longer, token abcdefgh12345", "key ***, token ***"),
        ("wJalrXUtnFEMI", "***"),
        ("a short word, /usr/bin:/bin", "a short word, /usr/bin:/bin"),
        ("https://me:pa55@host/x and ssh://git@host/y", "https://***@host/x and ssh://***@host/y"),
        ("https://host/a@b stays", "https://host/a@b stays"),
        ("hf_AbCdEfGhIjKlMnOpQrSt in a message", "*** in a message"),
        ("hf_hub is a library", "hf_hub is a library"),
    ],
)
def test_secrets_are_hidden_and_nothing_else(text, clean):
    assert without_secrets(text, ENVIRONMENT) == clean


def test_a_file_is_cleaned_in_place_and_a_clean_one_not_touched(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "plantedplanted")
    log, other = tmp_path / "a.log", tmp_path / "b.log"
    log.write_text("before plantedplanted after")
    other.write_bytes(b"bytes \xff that are no text")
    clean_file(log)
    clean_file(other)
    clean_file(tmp_path / "missing.log")
    assert log.read_text() == "before *** after"
    assert other.read_bytes() == b"bytes \xff that are no text"


def test_places_of_this_machine_are_shortened():
    assert without_paths(f"in {Path.cwd()}/x") == "in ./x"
    assert without_paths(f"in {Path.home()}-y") == "in ~-y"
