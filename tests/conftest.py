"""Shared parts of the tests: a strict skip rule for CI, small random models."""

from __future__ import annotations

import os

import pytest

pytest_plugins = ["pytester"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fail-on-skip", action="store_true", help="a skip that is not for want of a GPU fails"
    )


def pytest_configure():
    """A worker of pytest-xdist says so in its environment, and in pytests that a test starts
    pytest-benchmark would then measure nothing.

    Each worker has one thread: two with a thread for every core wait for one another at each
    product, and the tests take three times as long. What is trained in a worker sets its own
    threads: they sleep where they wait for one another, and do not keep the others' core. Of the
    terminal's width, which pytest-xdist hands on, a worker's captured output has none.
    """
    os.environ.pop("COLUMNS", None)
    workers = [n for n in os.environ if n.startswith("PYTEST_XDIST_")]
    for name in workers:
        del os.environ[name]
    if workers:
        os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    wants_gpu = item.get_closest_marker("gpu") is not None
    if report.skipped and item.config.getoption("--fail-on-skip") and not wants_gpu:
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"skipped, which this run forbids: {reason}"


def pytest_collection_modifyitems(items):
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
