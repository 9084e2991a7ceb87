"""Rounds on a Ray cluster: what one asks for, bad input, and a real cluster that loses a node."""

from __future__ import annotations

import json
import time

import pytest
from bench_run import bench, cases, finish, read, rows, start

from peftbench.case import PRESETS, Case, Settings
from peftbench.cluster import (
    RayOptions,
    needed,
    read_runtime_env,
    with_absolute_paths,
)
from peftbench.errors import UserError

GPU_NODE = {"CPU": 16.0, "GPU": 4.0, "memory": 64e9}
CPU_NODE = {"CPU": 8.0, "memory": 32e9}
SMALL_NODE = {"CPU": 2.0, "memory": 8e9}


def test_a_round_takes_one_whole_gpu_where_there_are_any():
    assert needed(Settings(), RayOptions(), [CPU_NODE, GPU_NODE]) == {"num_cpus": 1, "num_gpus": 1}
    on_cpu = needed(Settings(device="cpu"), RayOptions(), [CPU_NODE, GPU_NODE])
    assert on_cpu == {"num_cpus": 16, "num_gpus": 0}


def test_a_round_on_a_cpu_takes_a_node_so_large_that_no_other_has_room_for_two():
    assert needed(Settings(threads=2), RayOptions(), [CPU_NODE, SMALL_NODE])["num_cpus"] == 8
    assert needed(Settings(), RayOptions(cpus=8), [CPU_NODE, SMALL_NODE])["num_cpus"] == 8
    asked = needed(Settings(), RayOptions(memory_bytes=2**30), [CPU_NODE])
    assert asked == {"num_cpus": 8, "num_gpus": 0, "memory": 2**30}


@pytest.mark.parametrize(
    ("settings", "options", "nodes", "said"),
    [
        (Settings(device="cuda"), RayOptions(), [CPU_NODE], "no node of the Ray cluster has a GPU"),
        (Settings(), RayOptions(cpus=9), [CPU_NODE], r"asks for \(9 CPU\)"),
        (Settings(), RayOptions(memory_bytes=10**12), [CPU_NODE], "lower --round-cpus"),
        (Settings(), RayOptions(), [], "or add a node"),
    ],
)
def test_what_no_node_has_is_said_before_anything_runs(settings, options, nodes, said):
    with pytest.raises(UserError, match=said):
        needed(settings, options, nodes)


def test_a_task_finds_local_files_and_the_case_stays_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text("{}")
    settings = Settings(data="./data.jsonl", tasks="tinywiki_cloze,./my.yaml")
    case = Case("./model", "lora", "sft", settings)
    whole = with_absolute_paths(case)
    assert whole.model == str(tmp_path / "model")
    assert whole.settings.data == str(tmp_path / "data.jsonl")
    assert whole.settings.tasks == f"tinywiki_cloze,{tmp_path / 'my.yaml'}"
    assert whole.hash == case.hash
    named = Case("tiny-gpt2", "lora", "sft", PRESETS["quick"].settings)
    assert with_absolute_paths(named) == named


def test_an_environment_is_a_dictionary(tmp_path):
    file = tmp_path / "env.json"
    file.write_text('{"env_vars": {"A": "1"}}')
    assert read_runtime_env(file) == {"env_vars": {"A": "1"}}
    file.write_text("[1]")
    with pytest.raises(UserError, match="holds no dictionary"):
        read_runtime_env(file)
    with pytest.raises(UserError, match="cannot read --runtime-env"):
        read_runtime_env(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dispatch", "ray", "--ray-address", "127.0.0.1:1"], "no Ray cluster at 127.0.0.1:1"),
        (["--dispatch", "ray", "--ray-address", "there"], "give HOST:PORT"),
        (["--dispatch", "ray", "--ray-address", "a..b:6379"], "no Ray cluster at a..b:6379"),
        (["--ray-address", "127.0.0.1:1"], "--ray-address needs --dispatch ray"),
        (["--dispatch", "ray", "--round-cpus", "0"], "round-cpus is 0"),
        (["--dispatch", "ray", "--confirm"], "with --dispatch ray leave it out"),
    ],
)
def test_bad_input_is_one_line(tmp_path, arguments, said):
    code, text, _ = bench(tmp_path, *arguments)
    assert code == 4
    assert said in text
    assert "Traceback" not in text


@pytest.fixture
def cluster(monkeypatch):
    """A real Ray cluster whose head has one core; its nodes are processes of this machine."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    yield found
    found.shutdown()


def check_times(run: dict) -> None:
    """pytest-benchmark's statistics are made of the training times on the nodes."""
    for entry in run["benchmarks"]:
        seconds = [r["train_s"] for r in entry["extra_info"]["rounds"]]
        assert entry["stats"]["data"] == pytest.approx(seconds, abs=0.05)


def test_rounds_on_a_cluster_are_records_on_the_drivers_disk(tmp_path, cluster):
    some = ("-k", "lora and sft", "--dispatch", "ray", "--ray-address", cluster.address)
    code, text, run = bench(tmp_path, *some)
    assert code == 0, text
    (row,) = rows(run).values()
    assert row["dispatch"] == {"node": 1, "attempts": 1, "lost": []}
    assert row["run_id"] == run["peftbench"]["run_id"]
    assert list(run["peftbench"]["sentinels"]) == ["start of node 1"]
    assert len(run["peftbench"]["bases"]) == 1
    check_times(run)
    (file,) = tmp_path.glob("runs/*/*.json")
    kept = json.loads(file.read_text())
    assert kept["losses"] == row["losses"]
    assert row["provenance"]["environment"].get("OMP_NUM_THREADS") is None
    code, text, again = bench(tmp_path, *some, "--resume", row["run_id"])
    assert code == 0, text
    assert "from before the interrupt" in text
    assert rows(again)[row["case_id"]]["losses"] == row["losses"]


@pytest.mark.verify
def test_a_cluster_that_loses_a_node_gives_the_records_of_one_machine(tmp_path, cluster):
    """The second node comes later, as the driver would else belong to it, and goes at work."""
    some = ("-k", "lora", "--rounds", "15")
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    code, text, local = bench(here, *some)
    assert code == 0, text
    process = start(there, *some, "--dispatch", "ray", "--ray-address", cluster.address)
    wait_for_record(there, node=1)
    second = cluster.add_node(num_cpus=1)
    wait_for_record(there, node=2)
    cluster.remove_node(second, allow_graceful=False)
    code, text = finish(process)
    assert code == 0, text
    run = read(there)
    assert cases(run) == cases(local)
    check_times(run)
    dispatched = []
    for name, row in rows(run).items():
        assert len(row["rounds"]) == 15
        for ours, theirs in zip(row["rounds"], rows(local)[name]["rounds"], strict=True):
            assert ours["losses"] == theirs["losses"]
            assert ours["perplexity"] == theirs["perplexity"]
            dispatched.append(ours["dispatch"])
    assert {d["node"] for d in dispatched} == {1, 2}
    (again,) = [d for d in dispatched if d["attempts"] > 1]
    assert again["node"] == 1
    assert len(again["lost"]) == 1


def wait_for_record(folder, node: int) -> None:
    deadline_s = time.monotonic() + 180
    while time.monotonic() < deadline_s:
        for file in folder.glob("runs/*/*.json"):
            if json.loads(file.read_text())["dispatch"]["node"] == node:
                return
        time.sleep(0.05)
    pytest.fail(f"no record of node {node}")
