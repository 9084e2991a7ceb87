"""The tests that pytest multiplies into the matrix: once for each case of the chosen preset.

`pytest bench` collects it from bench/, `peftbench bench` from here, where an installed package has
it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def test_train(peftbench_run: Callable[[], dict[str, Any]]) -> None:
    """Train and measure one model x adapter x method; the record goes into the JSON."""
    row = peftbench_run()
    assert row["status"] in ("ok", "oom")


def test_infer(peftbench_infer: Callable[[], dict[str, Any]]) -> None:
    """Measure one model x adapter when it answers: base, unmerged and merged beside each other."""
    row = peftbench_infer()
    assert row["status"] in ("ok", "oom")
