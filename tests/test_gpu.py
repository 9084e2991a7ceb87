"""The instrument on a real GPU: what the driver says against what torch says and what is known."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from bench_run import ROOT, bench, cases, rows

from peftbench.measuring.nvml import open_devices
from peftbench.measuring.sampler import Sampler

pytestmark = pytest.mark.gpu
GIB = 2**30


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    code, text, run = bench(folder, "--device", "cuda", "--adapters", "lora,full,qlora")
    assert code == 0, text
    return rows(run)


def test_memory_of_the_driver_covers_what_torch_reserved(smoke):
    for name, row in smoke.items():
        assert row["torch_peak_allocated_bytes"] <= row["torch_peak_reserved_bytes"], name
        assert row["peak_gpu_memory_bytes"] >= 0.9 * row["torch_peak_reserved_bytes"], name
        assert row["peak_gpu_memory_source"], name
        assert row["gpu"]["interval_s"] < 0.03, name
        for phase in ("warmup", "train"):
            assert row["phases"][phase]["torch_peak_reserved_bytes"] > 0, name


def test_energy_clock_and_utilisation_are_of_this_world(smoke):
    for name, row in smoke.items():
        watts = row["energy_j"] / row["train_s"]
        assert 10 < watts < 1500, name
        assert 0 < row["mfu_ratio"] < 1, name
        assert row["energy_per_token_j"] > 0, name
        # device events see the steps, the host's clock sees them too: neither may miss any
        timed = 2 * row["step_p50_s"]
        assert timed < 3 * row["train_s"], name


def test_a_gpu_learns_what_a_cpu_learns(smoke, tmp_path):
    code, text, run = bench(
        tmp_path, "--device", "cpu", "--adapters", "lora", "--methods", "sft,dpo"
    )
    assert code == 0, text
    for name, row in rows(run).items():
        assert smoke[name]["losses"] == pytest.approx(row["losses"], rel=2e-3)
        assert smoke[name]["perplexity_base"] == pytest.approx(row["perplexity_base"], rel=1e-3)


def test_a_smaller_card_is_played_and_runs_out_of_memory(tmp_path):
    code, text, run = bench(
        tmp_path, "--models", "gpt-2", "--weights", "random", "--data", "synthetic", "--adapters",
        "full", "--methods", "dpo", "--pairs", "256", "--batch-size", "64",
        "--gpu-memory-limit", "2GiB",
    )  # fmt: skip
    assert code == 0, text
    (case,) = cases(run).values()
    assert case["status"] == "oom"
    assert case["oom"]["bytes_asked"] > 0


def test_an_allocation_of_known_size_is_seen_by_the_sampler():
    devices, _ = open_devices(
        os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("CUDA_DEVICE_ORDER")
    )
    sampler = Sampler(devices)
    sampler.start()
    code = "import time, torch; x = torch.ones(2**28, device='cuda'); time.sleep(1); print(x.sum())"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as child:
        sampler.set_pid(child.pid)
        child.wait(timeout=120)
    trace = sampler.stop()
    growth = max(
        max(u for u in d.memory.used_bytes if u is not None) - (d.baseline.used_bytes or 0)
        for d in trace.devices
    )
    # the tensor, and what CUDA itself takes for a process: some hundreds of megabytes
    assert GIB <= growth < 2 * GIB
