"""`--report-to`: what TensorBoard's own reader finds again, of a training and of a session."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import bench_run
import pytest
import torch
import yaml
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from peftbench import trackers
from peftbench.case import Case, Settings
from peftbench.cli import main
from peftbench.compare.order import files_below
from peftbench.errors import UserError
from peftbench.metrics import METRICS
from peftbench.round_reports import REPORTED, report_rounds
from peftbench.trackers import LiveRun, final_values, run_name, step_rows, tracker_names
from peftbench.train_command import Keeping, StoppedError, push_to_hub, train_case

SETTINGS = Settings(
    pairs=16, batch_size=4, prompt_length=16, completion_length=8, eval_tokens=256,
    eval_context=64, eval_stride=32, eval_pairs=4, eval_completions=2, eval_samples=1,
    ppo_batch_size=8, ppo_epochs=2, reward="true", learning_rate=0.01, threads=1,
)  # fmt: skip
SECRET = "hf_neverInAnyFileOfATracker"
PPO_UPDATE = {"update": 0, "rollout_s": 1.0, "score_s": 0.5, "update_s": 0.5, "kl_k1": None}


@pytest.fixture(autouse=True)
def one_state(monkeypatch):
    """A training sets threads and seeds of its process."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    threads, random = torch.get_num_threads(), torch.get_rng_state()
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(random)


def events(folder: Path) -> EventAccumulator:
    """All that one run's event files hold, as TensorBoard reads them."""
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    return found.Reload()


def series(found: EventAccumulator, tag: str) -> dict[int, float]:
    return {e.step: e.value for e in found.Scalars(tag)}


def no_secret(folder: Path) -> None:
    for file in (f for f in folder.rglob("*") if f.is_file()):
        assert SECRET.encode() not in file.read_bytes(), file.name


def close(values: list[float]) -> object:
    return pytest.approx(values, rel=1e-6)  # event files hold float32


def trained(folder: Path, method: str, **more) -> dict:
    given = {"resume": False, "overwrite": False, "checkpoint_every_s": 3600.0} | more
    train_case(Case("tiny-gpt2", "lora", method, SETTINGS), folder, report_to=("tensorboard",),
               **given)  # fmt: skip
    return json.loads((folder / "training.json").read_text())


def run_of(folder: Path) -> Path:
    (run,) = (folder / "tensorboard").iterdir()
    return run


def test_a_training_is_read_back_as_its_file_says(tmp_path):
    found = trained(tmp_path / "t", "sft+dpo")
    run = run_of(tmp_path / "t")
    assert run.name == run_name("tiny-gpt2-lora-sft+dpo", found["provenance"])
    seen = events(run)
    # 4 steps of SFT, then 4 of DPO, on one axis
    losses = series(seen, "train/loss")
    assert list(losses) == list(range(5, 9))
    assert list(losses.values()) == close(found["losses"])
    assert list(series(seen, "sft/loss")) == list(range(1, 5))
    rates = [0.01 * (1 - step / 4) for step in range(4)]
    assert list(series(seen, "train/learning_rate").values()) == close(rates)
    speeds = series(seen, "train/tokens_per_s")
    assert list(speeds) == list(range(5, 9))
    assert all(speed > 0 for speed in speeds.values())
    for name in ("perplexity", "perplexity_base", "final_loss", "trainable_params"):
        assert series(seen, f"final/{name}") == {8: close(found["metrics"][name])}
    (table,) = seen.Tensors("metric_table/text_summary")
    rows = table.tensor_proto.string_val[0].decode().splitlines()
    assert f"| nll_per_token | {found['metrics']['nll_per_token']} | nats |" in rows
    (config,) = run.rglob("hparams.yml")
    given = yaml.safe_load(config.read_text())
    assert (given["adapter"], given["rank"], given["learning_rate"]) == ("lora", 8, 0.01)
    assert given["case_hash"] == found["case_hash"]
    no_secret(tmp_path)


def test_a_resumed_training_goes_on_in_its_run(tmp_path, monkeypatch):
    done = Keeping.step_done

    def interrupted(self, state):
        if state.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        done(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(Keeping, "step_done", interrupted)
        with pytest.raises(StoppedError):
            trained(tmp_path / "t", "ppo")
    assert len(series(events(run_of(tmp_path / "t")), "train/loss")) == 4
    found = trained(tmp_path / "t", "ppo", resume=True)
    seen = events(run_of(tmp_path / "t"))
    # 2 updates of 8 prompts; 2 epochs x 2 minibatches of 4 are 4 optimiser steps each
    assert list(series(seen, "train/loss").values()) == close(found["losses"])
    assert list(series(seen, "train/loss")) == list(range(1, 9))
    rewards = series(seen, "ppo/reward_mean")
    assert list(rewards) == list(series(seen, "train/tokens_per_s")) == [4, 8]
    assert list(rewards.values()) == close([u["reward_mean"] for u in found["ppo_history"]])


def test_a_session_is_read_back_as_its_rounds_say(tmp_path):
    arguments = ["--rounds", "2", "-k", "lora and sft", "--report-to", "tensorboard"]
    code, text, run = bench_run.bench(tmp_path, *arguments)
    assert code == 0, text
    assert "tensorboard: 2 rounds told" in text
    (row,) = bench_run.rows(run).values()
    (folder,) = (tmp_path / "runs").iterdir()
    for record in row["rounds"]:
        name = f"{run_name(row['case_id'], row['provenance'])}-seed{record['seed']}"
        seen = events(folder / "tensorboard" / name)
        assert list(series(seen, "train/loss").values()) == close(record["losses"])
        for metric in ("train_s", "tokens_per_s", "perplexity", "steps"):
            assert list(series(seen, f"final/{metric}").values()) == close([record[metric]])
        # nothing is told before the machine's last timing and the run's file
        assert seen.FirstEventTimestamp() >= (tmp_path / "run.json").stat().st_mtime
    assert row["step_learning_rates"] == close(
        [row["learning_rate"] * (1 - i / row["steps"]) for i in range(row["steps"])]
    )
    assert sum(row["step_tokens"]) == row["rounds"][0]["train_tokens"]
    timed_s = sum(row["step_s"][-(row["steps"] - row["case"]["settings"]["warmup_steps"]) :])
    # one step of the two more or less would be out of it, however busy the machine is
    assert 0.6 < timed_s / row["rounds"][0]["train_s"] <= 1
    no_secret(tmp_path)


def made_round(folder: Path, stem: str, **changes: object) -> dict:
    """A finished round of run `run-a`, on disk."""
    record = {
        "run_id": "run-a", "case_id": stem, "case_hash": "c0ffee", "seed": 3, "device": "cpu",
        "case": {"model": "m", "adapter": "lora", "method": "sft", "settings": {"rank": 8}},
        "provenance": {"peftbench": "0.1.0", "commit": "ab" * 20, "commit_dirty": False,
                       "cpu": "c", "python": "3", "libraries": {"torch": "2"}},
        "losses": [4.0, 2.0], "step_s": [0.5, 0.25], "step_tokens": [100, 200],
        "step_learning_rates": [0.1, 0.05], "ppo_history": None,
        **dict.fromkeys(METRICS), "null_reasons": dict.fromkeys(METRICS, "not here"),
        "train_s": 0.25,
    } | changes  # fmt: skip
    (folder / f"{stem}.json").write_text(json.dumps(record))
    return record


def test_no_round_is_told_twice(tmp_path):
    made_round(tmp_path, "one")
    assert report_rounds(tmp_path, "run-a", ("tensorboard",))[0].startswith(
        "tensorboard: 1 round told"
    )
    made_round(tmp_path, "two")
    assert report_rounds(tmp_path, "run-a", ("tensorboard",))[0].startswith(
        "tensorboard: 1 round told"
    )
    assert (tmp_path / REPORTED).read_text() == "tensorboard one\ntensorboard two\n"
    seen = events(tmp_path / "tensorboard" / "one-abababababab-seed3")
    assert series(seen, "train/tokens_per_s") == {1: 200.0, 2: 800.0}
    assert series(seen, "final/train_s") == {2: 0.25}


def test_a_tracker_that_fails_leaves_the_rest_for_a_resumed_session(tmp_path, monkeypatch):
    made_round(tmp_path, "one")
    made_round(tmp_path, "two")
    opened = trackers.open_tracker

    def refused(name, run, *more, **settings):
        if run.startswith("two"):
            raise UserError("--report-to tensorboard: No space left on device")
        return opened(name, run, *more, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(trackers, "open_tracker", refused)
        (line,) = report_rounds(tmp_path, "run-a", ("tensorboard",))
    assert "No space left on device; 1 of 2 rounds told, --resume" in line
    (line,) = report_rounds(tmp_path, "run-a", ("tensorboard",))
    assert line.startswith("tensorboard: 1 round told")


def test_what_a_tracker_writes_is_no_result_and_is_not_pushed(tmp_path, monkeypatch):
    for folder in ("wandb/run-1", "tensorboard/x"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "wandb-summary.json").write_text('{"final/train_s": 1}')
    (tmp_path / "run.json").write_text("{}")
    assert files_below(tmp_path) == [tmp_path / "run.json"]
    pushed: list[str] = []

    def upload(api, *, folder_path, ignore_patterns, **_):
        files = [str(f.relative_to(folder_path)) for f in folder_path.rglob("*") if f.is_file()]
        pushed.extend(filter_repo_objects(files, ignore_patterns=ignore_patterns))

    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: None)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    push_to_hub(tmp_path, "someone/something", SECRET)
    assert pushed == ["run.json"]


def test_the_steps_of_ppo_carry_their_update():
    record = {"losses": [1.0, 2.0, 3.0, 4.0], "step_tokens": [10, 20, 30, 40],
              "step_s": [9.0] * 4, "step_learning_rates": [4.0, 3.0, 2.0, 1.0],
              "ppo_history": [PPO_UPDATE, PPO_UPDATE | {"update_s": 1.0}]}  # fmt: skip
    rows = dict(step_rows(record))
    assert rows[1] == {"train/loss": 1.0, "train/learning_rate": 4.0}
    assert rows[2]["train/tokens_per_s"] == (10 + 20) / 2.0
    assert rows[4]["train/tokens_per_s"] == (30 + 40) / 2.5
    assert rows[4]["ppo/rollout_s"] == 1.0
    assert "ppo/kl_k1" not in rows[4]
    assert "ppo/update" not in rows[4]


def test_a_null_has_its_reason_in_the_table_and_no_value():
    found = final_values({"train_s": 2.0}, dict.fromkeys(METRICS, "no GPU"))
    assert set(found) == {"final/train_s", "metric_table"}
    table = str(found["metric_table"]).splitlines()
    assert "| train_s | 2.0 | s |" in table
    assert "| energy_j | (no GPU) | J |" in table
    assert len(table) == 2 + len(METRICS)


def test_a_tracker_that_fails_on_the_way_does_not_end_the_training():
    class Full:
        def log(self, values, step):
            raise OSError(28, f"no space, {SECRET}")

    class Fine:
        def __init__(self):
            self.rows = []

        def log(self, values, step):
            self.rows.append((step, values))

    said: list[str] = []
    run, fine = LiveRun("sft", said.append), Fine()
    run.add("tensorboard", Full())
    run.add("trackio", fine)
    run.log({"a": 1}, 1)
    run.log({"a": 2}, 2)
    assert fine.rows == [(1, {"a": 1}), (2, {"a": 2})]
    (line,) = said
    assert line.startswith("--report-to tensorboard: [Errno 28] no space")
    assert SECRET not in line


def test_names_are_checked_before_anything_starts(monkeypatch, tmp_path, capsys):
    assert tracker_names("none") == ()
    assert tracker_names("tensorboard, tensorboard") == ("tensorboard",)
    for text, words in ((",", "is empty"), ("none,tensorboard", "leave it out"),
                        ("tensorbord", "did you mean tensorboard")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            tracker_names(text)
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    assert main(["train", "--model", "tiny-gpt2", "--adapter", "lora", "--method", "sft",
                 "--output", str(tmp_path / "o"), "--report-to", "wandb"]) == 2  # fmt: skip
    err = capsys.readouterr().err
    assert err == "peftbench: --report-to wandb needs a package: pip install wandb\n"
    assert not (tmp_path / "o").exists()


@pytest.mark.verify
def test_trackio_has_what_the_round_says(tmp_path, monkeypatch):
    pytest.importorskip("trackio", reason="pip install trackio")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    from trackio.sqlite_storage import SQLiteStorage

    made_round(tmp_path, "one")
    assert report_rounds(tmp_path, "run-a", ("trackio",)) == ["trackio: 1 round told"]
    assert SQLiteStorage.get_runs("peftbench") == ["one-abababababab-seed3"]
    logs = SQLiteStorage.get_logs("peftbench", "one-abababababab-seed3")
    assert [(row["step"], row.get("train/loss")) for row in logs] == [(1, 4.0), (2, 2.0), (2, None)]
    assert logs[1]["train/tokens_per_s"] == 800.0
    assert logs[2]["final/train_s"] == 0.25
    assert SQLiteStorage.get_run_config("peftbench", "one-abababababab-seed3")["rank"] == 8
    no_secret(tmp_path)


@pytest.mark.verify
def test_wandb_offline_has_what_the_round_says(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="pip install wandb")
    wandb.teardown()  # it remembers the variables that it saw first
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("socket.gethostname", lambda: "the-host-of-somebody")
    made_round(tmp_path, "one", losses=[4.0625, 2.0])
    assert report_rounds(tmp_path, "run-a", ("wandb",)) == ["wandb: 1 round told"]
    wandb.teardown()  # its own process writes the file, until this has waited for its end
    (file,) = tmp_path.rglob("*.wandb")
    content = file.read_bytes()
    # its records hold names and values as text
    for text in ("one-abababababab-seed3", "train/loss", "4.0625", "train/tokens_per_s", "800",
                 "final/train_s", "| energy_j | (not here) | J |", "case_hash"):  # fmt: skip
        assert text.encode() in content, text
    for hidden in ("the-host-of-somebody", str(Path.cwd())):
        assert hidden.encode() not in content, hidden
    no_secret(tmp_path)


@pytest.mark.verify
def test_wandb_without_a_key_is_one_line(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="pip install wandb")
    wandb.teardown()
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    made_round(tmp_path, "one")
    (line,) = report_rounds(tmp_path, "run-a", ("wandb",))
    assert line.startswith("--report-to wandb: No API key configured.")
    assert "0 of 1 rounds told, --resume" in line


def test_what_a_kind_of_case_does_not_measure_is_in_no_table():
    found = trackers.final_values({"train_s": 2.0}, {"perplexity": "random weights"})
    assert found["final/train_s"] == 2.0
    table = str(found["metric_table"])
    assert "| perplexity | (random weights) |" in table
    assert "measure_s" not in table
