"""The proof on real nights: what it puts in, and what it says that it could find."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import made_sessions as made
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import nights

ROOT = Path(__file__).parent.parent


def test_another_version_of_peft_is_seen_by_records_and_by_libraries():
    injected = {
        "PYTHONPATH": str(ROOT / "tests" / "injected"),
        "PEFTBENCH_INJECT": '{"peft": "9.9.9"}',
    }
    code = (
        "import importlib.metadata as m; from peftbench.provenance import library_versions as v;"
        "print(v()['peft'], m.version('peft'), v()['torch'] == m.version('torch') != '9.9.9')"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | injected, capture_output=True, text=True,
        check=True, cwd=ROOT,
    )  # fmt: skip
    assert out.stdout.split() == ["9.9.9", "9.9.9", "True"]


def test_what_a_suites_line_finds_grows_with_the_nights_and_with_the_cases_left_alone(tmp_path):
    """Means that differ by 1 % (standard deviation), three of four cases having an adapter."""

    def folder(name: str, ids: list[str], spread: float) -> list[Path]:
        files = []
        for number, sign in enumerate((1, -1, 1, -1)):
            factor = math.exp(sign * spread * math.sqrt(3 / 4))
            cases = [made.case(case_id, train_s=2.0 * factor) for case_id in ids]
            files.append(made.write(tmp_path / name / f"{number}.json", made.session(cases)))
        return files

    ids = ["m-full-sft", "m-lora-sft", "m-ia3-sft", "m-qlora-sft"]
    found = nights.suite_detected_ratio(folder("a", ids, 0.01))
    # t with 3 degrees of freedom: 5.84 at 0.5 %, 0.98 at 80 %; the median of four nights
    assert found == pytest.approx(
        (5.841 + 0.978) * 0.01 * math.sqrt(1 + 1.57 / 4) * 4 / 3, rel=0.01
    )
    assert nights.suite_detected_ratio(folder("b", ids, 0.02)) == pytest.approx(2 * found)
    few = ["m-full-sft", "m-full-dpo", "m-full-orpo", "m-qlora-sft"]
    assert nights.suite_detected_ratio(folder("c", few, 0.01)) == pytest.approx(3 * found)
