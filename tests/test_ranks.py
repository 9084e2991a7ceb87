"""A case over several processes: what they learn, what they take, and how they end."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from bench_run import bench, cases, finish, read, rows, start
from test_lifecycle import LONG, assert_nothing_left, child_of, family
from test_ppo_training import make_model
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from peftbench import adapters, rollout, values
from peftbench.case import Case, Settings, check_ppo, check_settings
from peftbench.data.task import TokenPair
from peftbench.errors import UserError
from peftbench.measuring.gpu import PhaseReadings
from peftbench.measuring.phases import PhaseReading
from peftbench.preflight import impossible
from peftbench.ranks import Ranks, check_alike
from peftbench.rollout import Rollout, draw, uniforms
from peftbench.rounds import add_rank_readings
from peftbench.sharding import (
    check_gradients,
    clip_gradients,
    is_sharded,
    own_slice,
    shard_all,
)
from peftbench.show import record_lines
from peftbench.training import budget_is_spent, nll_weight
from peftbench.values import RankReading, rank_values, without_ranks
from peftbench.worker import LOST_RANK, Child, Outcome

RAGGED = ["--pairs", "64", "--prompt-length", "60", "--completion-length", "60",
          "--gradient-accumulation", "2", "--ppo-batch-size", "16"]  # fmt: skip
ADAPTERS = "lora,qlora,ia3,prefix,full,dora,vera,rslora,pissa,ln,lora-bias,prompt"


def test_ranks_share_a_batch_in_its_order():
    assert [Ranks(rank, 3).share_of("abcdef") for rank in range(3)] == [
        ["a", "b"], ["c", "d"], ["e", "f"]
    ]  # fmt: skip
    with pytest.raises(ValueError, match="5 rows cannot be shared among 2"):
        Ranks(0, 2).share_of("abcde")


@pytest.mark.parametrize(("nll_on", "tokens"), [("completion", (1, 3)), ("all", (3, 7))])
def test_the_mean_of_weighted_mean_losses_is_that_of_all_tokens(nll_on, tokens):
    pairs = [TokenPair((1, 2, 3), (4,), (5,)), TokenPair((1,) * 5, (4, 5, 6), (7,))]
    weights = [nll_weight(Ranks(rank, 2), pairs, nll_on) for rank in range(2)]
    # two ranks with sums 10 and 20 over their own tokens
    means = [10 / tokens[0], 20 / tokens[1]]
    mean = sum(w * m for w, m in zip(weights, means, strict=True)) / 2
    assert mean == pytest.approx(30 / sum(tokens))
    assert nll_weight(Ranks(), pairs, nll_on) == 1


def compared(tmp_path, *arguments: str, of_two: tuple[str, ...] = ()) -> dict:
    """The records of each case, of one process and of two; `of_two` is for these alone."""
    found = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        code, text, run = bench(
            folder, *RAGGED, "--processes", str(count), *arguments, *(of_two if count == 2 else ())
        )
        assert code == 0, text
        found.append(rows(run))
    one, two = found
    assert set(one) == set(two)
    assert one
    return {name: (one[name], two[name]) for name in one}


def assert_alike(one: dict, two: dict) -> None:
    assert len(two["losses"]) == len(one["losses"]) > 2
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-4)
    assert two["losses"] != [one["losses"][0]] * len(two["losses"])
    assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-3)
    assert two["train_tokens"] == one["train_tokens"]
    assert two["step_tokens"] == one["step_tokens"]
    assert two["trainable_params"] == one["trainable_params"]
    assert one["ranks"] is None
    each = two["ranks"]["each"]
    assert [rank["rank"] for rank in each] == [0, 1]
    peaks = [rank["host_peak_rss_delta_bytes"] for rank in each]
    assert two["ranks"]["max"]["host_peak_rss_delta_bytes"] == max(peaks)
    assert two["ranks"]["sum"]["host_peak_rss_delta_bytes"] == sum(peaks)
    if two["case"]["settings"].get("sharding", "none") == "none":
        assert 0.02 < two["ranks"]["scaling_efficiency_ratio"] < 2
    else:
        assert two["ranks"]["scaling_efficiency_ratio"] is None
    assert all(rank["train_s"] > 0.5 * two["train_s"] for rank in each)
    assert "rank 1" in "\n".join(record_lines(two))
    assert two["case_hash"] != one["case_hash"]


def assert_all_alike(found: dict, check=assert_alike) -> None:
    for one, two in found.values():
        check(one, two)


def test_two_processes_learn_what_one_does(tmp_path):
    found = compared(tmp_path, "--models", "tiny-gpt2", "--adapters", "lora",
                     "--methods", "sft,orpo,sft+dpo,sft+ppo")  # fmt: skip
    assert len(found) == 4
    assert_all_alike(found)


@pytest.mark.verify
@pytest.mark.parametrize("model", ["tiny-gpt2", "tiny-llama"])
def test_two_processes_learn_what_one_does_with_every_adapter(tmp_path, model):
    found = compared(
        tmp_path, "--models", model, "--methods", "sft,dpo,orpo,ppo", "--adapters", ADAPTERS
    )
    assert len(found) >= 44
    assert_all_alike(found)


def test_two_processes_learn_through_trl_what_one_does(tmp_path):
    found = compared(tmp_path, "--models", "tiny-gpt2", "--adapters", "lora", "--engine", "trl",
                     "--methods", "sft,dpo")  # fmt: skip
    assert len(found) == 2
    assert_all_alike(found)


# whose trainer copies the adapter while it is made
def test_a_model_that_trl_trains_spread_over_two_processes_learns_what_one_does(tmp_path):
    found = compared(tmp_path, "--models", "tiny-gpt2", "--adapters", "lora", "--engine", "trl",
                     "--methods", "dpo", of_two=("--sharding", "full"))  # fmt: skip
    assert len(found) == 1
    assert_all_alike(found, assert_sharded_alike)


def assert_sharded_alike(one: dict, two: dict) -> None:
    assert_alike(one, two)
    # of all ranks together: what one process has
    for name in ("grad_bytes", "param_bytes", "adapter_bytes", "total_params"):
        assert two[name] == one[name], name
    # AdamW counts its steps in each rank
    assert two["optimizer_state_bytes"] == pytest.approx(one["optimizer_state_bytes"], rel=0.01)
    assert two["kl_to_base_nats_per_token"] == pytest.approx(
        one["kl_to_base_nats_per_token"], rel=0.02, abs=1e-4
    )
    assert two["moved_ratio"] == pytest.approx(one["moved_ratio"], abs=1e-3)
    assert two["null_reasons"]["merge_max_logit_difference"] == "a sharded model is not merged"


# ln's last norm is in no layer; DPO asks the model without gradients before it trains; PPO has
# several models over the same slices, and a head beside them that every rank has whole
def test_a_model_spread_over_two_processes_learns_what_one_does(tmp_path):
    found = compared(tmp_path, "--models", "tiny-gpt2", "--adapters", "ln", "--methods", "dpo,ppo",
                     of_two=("--sharding", "full"))  # fmt: skip
    assert len(found) == 2
    assert_all_alike(found, assert_sharded_alike)


@pytest.mark.verify
@pytest.mark.parametrize("model", ["tiny-gpt2", "tiny-llama"])
def test_a_model_spread_over_two_processes_learns_what_one_does_with_every_adapter(tmp_path, model):
    found = compared(tmp_path, "--models", model, "--adapters", ADAPTERS, "--methods",
                     "sft,dpo,orpo,ppo", of_two=("--sharding", "full"))  # fmt: skip
    assert len(found) == 48
    assert_all_alike(found, assert_sharded_alike)


@pytest.mark.verify
def test_ppo_after_sft_with_a_value_adapter_over_a_spread_model_learns_what_one_does(tmp_path):
    found = compared(
        tmp_path, "--models", "tiny-llama", "--adapters", "lora,qlora", "--methods", "sft+ppo",
        "--value", "adapter", of_two=("--sharding", "full"),
    )  # fmt: skip
    assert len(found) == 2
    assert_all_alike(found, assert_sharded_alike)


@pytest.fixture
def one_rank(tmp_path):
    """A group of this process alone, in which a model can be sharded."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


def test_models_over_the_same_weights_share_their_slices(one_rank):
    # QLoRA's weights have scales beside them, which are never sliced
    model = make_model("llama", "qlora")
    plain = adapters.shared_copy(model)
    adapted = adapters.attach(model, "qlora", Settings())
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        expected = [m(input_ids=ids).logits for m in (adapted, plain)]
    shard_all([adapted, plain], torch.device("cpu"))
    with torch.no_grad():
        found = [m(input_ids=ids).logits for m in (adapted, plain)]
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))

    def slices(module):
        assert is_sharded(module)
        return {own_slice(p).data_ptr() for p in module.parameters()}

    assert slices(plain) < slices(adapted)


@pytest.mark.parametrize("max_norm", [1.0, 100.0])
def test_sharded_and_whole_gradients_are_clipped_by_the_norm_of_all(one_rank, max_norm):
    def gradients(sharded: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        layer, head = torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)
        if sharded:
            fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
        head(layer(torch.ones(5, 4))).square().sum().backward()
        parameters = [*layer.parameters(), *head.parameters()]
        clip_gradients(parameters, max_norm)
        return [own_slice(p.grad) for p in parameters]

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.verify
def test_a_spread_model_takes_less_of_each_process(tmp_path):
    def largest_bytes(sharding: str) -> int:
        folder = tmp_path / sharding
        folder.mkdir()
        code, text, run = bench(
            folder, "--models", "smollm2-135m-instruct-q4", "--weights", "random", "--adapters",
            "full", "--methods", "sft", "--pairs", "8", "--batch-size", "2", "--prompt-length",
            "32", "--completion-length", "32", "--processes", "2", "--sharding", sharding,
        )  # fmt: skip
        assert code == 0, text
        (record,) = rows(run).values()
        return record["ranks"]["max"]["host_peak_rss_delta_bytes"]

    # weights, gradients and two moments: 2.0 GiB of a process that has them all, and half of it
    whole_bytes, half_bytes = largest_bytes("none"), largest_bytes("full")
    assert whole_bytes - half_bytes > 0.9 * 2**30


@pytest.mark.parametrize(
    ("adapter", "method", "changed"),
    [
        ("lora-8bit", "sft", {}), ("lora-8bit", "ppo", {}), ("lora", "sft", {"compile": "layers"}),
        ("lora", "sft", {"optimizer": "paged-adamw-8bit"}), ("lora", "sft", {"tasks": "a"}),
    ],
)  # fmt: skip
def test_what_cannot_be_spread_is_one_line(adapter, method, changed):
    settings = Settings(processes=2, sharding="full", **changed)
    why = impossible(Case("tiny-gpt2", adapter, method, settings))
    assert why is not None
    assert why.endswith("leave out --sharding")


def test_one_process_has_nobody_to_share_a_model_with():
    with pytest.raises(UserError, match="sharding is 'full', but processes is 1: give at least 2"):
        check_settings(Settings(sharding="full"))


def test_a_lost_gradient_is_an_error():
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    weights[1].grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="2 trained parameters of a sharded model have no"):
        check_gradients(weights)


@pytest.mark.verify
@pytest.mark.parametrize("model", ["tiny-gpt2", "tiny-llama"])
def test_two_processes_learn_through_trl_what_one_does_with_every_adapter(tmp_path, model):
    found = compared(tmp_path, "--models", model, "--adapters", ADAPTERS, "--methods", "sft,dpo",
                     "--engine", "trl")  # fmt: skip
    assert len(found) >= 22
    assert_all_alike(found)


@pytest.mark.verify
@pytest.mark.parametrize("model", ["tiny-gpt2", "tiny-llama"])
def test_a_model_that_trl_trains_spread_learns_what_one_does_with_every_adapter(tmp_path, model):
    found = compared(tmp_path, "--models", model, "--adapters", ADAPTERS, "--methods", "sft,dpo",
                     "--engine", "trl", of_two=("--sharding", "full"))  # fmt: skip
    assert len(found) >= 22
    assert_all_alike(found, assert_sharded_alike)


@pytest.mark.verify
def test_two_processes_learn_orpo_through_trl_where_rows_are_equally_long(tmp_path):
    # each rank's NLL is the mean of its own tokens: TRL does not weight it
    found = compared(
        tmp_path, "--models", "tiny-gpt2", "--adapters", "lora", "--methods", "orpo", "--engine",
        "trl", "--orpo-nll-on", "all", "--data", "wikipedia-sample", "--prompt-length", "16",
        "--completion-length", "16",
    )  # fmt: skip
    assert_all_alike(found)


@pytest.mark.verify
def test_two_processes_learn_compiled_what_one_does(tmp_path):
    found = compared(tmp_path, "--models", "tiny-gpt2", "--adapters", "lora", "--methods",
                     "sft,dpo,orpo,ppo", "--compile", "layers")  # fmt: skip
    assert len(found) == 4
    assert_all_alike(found)


def test_ranks_that_left_different_weights_are_an_error(monkeypatch):
    weights = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))]
    check_alike(weights)
    monkeypatch.setattr(
        "peftbench.ranks.gathered", lambda sums: [sums, sums + torch.tensor([0.0, 1e-6])]
    )
    with pytest.raises(RuntimeError, match="a sum of rank 1's is 1e-06 from rank 0's"):
        check_alike(weights)


def test_all_ranks_stop_at_the_same_step(monkeypatch):
    def spent(budget_s: float, ranks: int, others_s: float) -> bool:
        monkeypatch.setattr("peftbench.training.time.perf_counter", lambda: 103.0)
        monkeypatch.setattr("peftbench.ranks.current", lambda: Ranks(0, ranks))
        monkeypatch.setattr("peftbench.ranks.largest", lambda own: own.clamp(min=others_s))
        return budget_is_spent(Settings(time_budget_s=budget_s), 100.0, torch.device("cpu"))

    assert not spent(0.0, 2, 99.0)
    assert [spent(budget_s, 1, 99.0) for budget_s in (2.0, 3.0, 4.0)] == [True, True, False]
    assert [spent(budget_s, 2, 5.0) for budget_s in (2.0, 4.0, 6.0)] == [True, True, False]


# not `full` after SFT: at its rate rounding grows until another token is drawn
@pytest.mark.verify
@pytest.mark.parametrize(
    ("method", "names"), [("ppo", "lora,qlora,full"), ("sft+ppo", "lora,qlora")]
)
def test_two_processes_learn_what_one_does_with_a_value_adapter(tmp_path, method, names):
    found = compared(tmp_path, "--models", "tiny-llama", "--methods", method, "--adapters", names,
                     "--value", "adapter")  # fmt: skip
    assert len(found) == len(names.split(","))
    assert_all_alike(found)


def test_ranks_draw_what_one_process_would():
    logprobs = torch.log_softmax(torch.randn(6, 50, generator=torch.Generator().manual_seed(1)), -1)

    def drawn(rows: torch.Tensor, own: Ranks) -> list[int]:
        random = uniforms(len(rows), torch.Generator().manual_seed(7), own)
        return draw(rows, random).flatten().tolist()

    whole = drawn(logprobs, Ranks())
    assert len(set(whole)) > 2
    shares = [drawn(logprobs[2 * r : 2 * r + 2], Ranks(r, 3)) for r in range(3)]
    assert [token for share in shares for token in share] == whole


def test_the_ranks_completions_are_one_rollout():
    shares = [
        Rollout([(1, 2)], [(3,)], torch.tensor([True]), torch.tensor([[-1.0]])),
        Rollout([(4,)], [(5, 6)], torch.tensor([False]), torch.tensor([[-2.0, -3.0]])),
    ]
    found = rollout.joined(shares, torch.device("cpu"))
    assert found.prompts == [(1, 2), (4,)]
    assert found.completions == [(3,), (5, 6)]
    assert found.ended.tolist() == [True, False]
    assert found.logprobs.tolist() == [[-1.0, 0.0], [-2.0, -3.0]]


def outcome_after(folder, signal_number: int, *arguments: str, delay_s: float = 0) -> dict:
    """What becomes of a case of two processes when the second is sent this; nothing stays."""
    process = start(folder, "--methods", "sft", "--adapters", "lora", "--processes", "2",
                    *arguments)  # fmt: skip
    rank = child_of(process, "tiny-gpt2-lora-sft-", "-rank1.log")
    started = set(family(process.pid))
    assert child_of(process, "tiny-gpt2-lora-sft-") in started
    time.sleep(delay_s)
    os.kill(rank, signal_number)
    code, text = finish(process)
    assert code == 1, text
    assert_nothing_left(folder, started)
    lost = cases(read(folder))["tiny-gpt2-lora-sft"]
    return {name: lost[name] for name in ("status", "reason")}


def test_a_killed_rank_is_named_and_nothing_stays_behind(tmp_path):
    assert outcome_after(tmp_path, signal.SIGKILL, *LONG) == {
        "status": "crashed", "reason": "rank 1 of 2: the process died with signal 9"
    }  # fmt: skip


@pytest.mark.verify
@pytest.mark.parametrize("phase", ["load", "train"])
def test_a_rank_that_stands_still_is_named(tmp_path, phase):
    # it loads for some tenths of a second and trains for many
    delay_s = 4 if phase == "train" else 0
    many = ["--pairs", "8000", "--case-timeout", "60"]
    assert outcome_after(tmp_path, signal.SIGSTOP, *many, delay_s=delay_s) == {
        "status": "timeout", "reason": "rank 1 of 2 did not answer the others"
    }  # fmt: skip


def test_the_rank_that_ended_is_blamed_and_not_those_that_lost_it(monkeypatch):
    child = object.__new__(Child)
    child._ranks = [type("Rank", (), {"phase": "train", "done": True})() for _ in range(3)]
    monkeypatch.setattr("peftbench.worker._LAST_WORDS_S", 0.0)
    lost, died = (Outcome("crashed", "train", reason) for reason in (LOST_RANK, "signal 9"))
    oom = Outcome("oom", "train", "no memory", memory={"bytes_asked": 5})
    assert child._blamed({0: lost, 1: lost, 2: died}).reason == "rank 2 of 3: signal 9"
    blamed = child._blamed({0: lost, 1: oom})
    assert (blamed.status, blamed.reason) == ("oom", "rank 1 of 3: no memory")
    assert blamed.memory == {"bytes_asked": 5}
    silent = child._blamed({0: lost, 2: lost})
    assert (silent.status, silent.reason) == ("timeout", "rank 1 of 3 did not answer the others")
    child._ranks = child._ranks[:1]
    assert child._blamed({0: died}) is died


def reading(other_cpu_s: float) -> PhaseReading:
    return PhaseReading(2.0, 0.0, 1, None, None, 1.5, other_cpu_s, None)


def rank(number: int, own_cpu_s: float, peak: int | None) -> RankReading:
    return RankReading(number, None, 2.0, peak, peak, None, None, {"train": own_cpu_s})


def test_other_ranks_are_not_other_processes():
    phases = type("Phases", (), {"readings": {"train": reading(1.9), "load": reading(0.3)}})()
    without_ranks(phases, [rank(0, 1.5, 1), rank(1, 1.6, 1)])
    assert phases.readings["train"].other_cpu_s == pytest.approx(0.3)
    assert phases.readings["load"].other_cpu_s == 0.3
    without_ranks(phases, [rank(0, 1.5, 1), rank(1, 1.6, 1)])
    assert phases.readings["train"].other_cpu_s == 0


def test_what_one_rank_cannot_tell_has_no_sum():
    found = rank_values([rank(0, 1.0, 7), rank(1, 1.0, 5)], ([3.0], [2.0]))
    assert found["max"]["host_peak_rss_bytes"] == 7
    assert found["sum"]["host_peak_rss_bytes"] == 12
    assert found["sum"]["torch_peak_allocated_bytes"] is None
    assert rank_values([rank(0, 1.0, 7)], None) is None


def test_scaling_is_measured_on_the_steps_that_both_made():
    together, alone = [1.0, 2.0, 4.0, 0.1], [1.8, 3.0, 2.0]
    found = rank_values([rank(0, 1.0, 7), rank(1, 1.0, 5)], (together, alone))
    # of 1.8 / (2 x 1), 3 / (2 x 2) and 2 / (2 x 4) the median
    assert found["scaling_efficiency_ratio"] == pytest.approx(0.75)


def gpu_phases(energy_j: float | None, peak: int) -> dict[str, PhaseReadings]:
    reasons = {} if energy_j is not None else {"energy_j": "no counter"}
    return {"train": PhaseReadings(9, None, peak, energy_j, None, reasons),
            "load": PhaseReadings(9, None, 99, 7.0, None, {})}  # fmt: skip


@pytest.mark.parametrize(("energies", "summed"), [((30.0, 12.0), 42.0), ((30.0, None), None)])
def test_the_energy_of_a_case_is_that_of_all_its_ranks(energies, summed):
    trace = SimpleNamespace(
        devices=[SimpleNamespace(uuid=f"GPU-{name}", parent_uuid=None) for name in "xba"]
    )
    phases = [gpu_phases(1000.0, 1), gpu_phases(energies[1], 5), gpu_phases(energies[0], 8)]
    found = SimpleNamespace(devices=[SimpleNamespace(phases=p) for p in phases])
    each = [asdict(replace(rank(n, 1.0, 7), device_uuid=uuid)) for n, uuid in enumerate("ab")]
    ranks = {"each": each, "max": {}, "sum": {}}
    total, why = add_rank_readings(ranks, trace, found)
    assert total == summed == ranks["sum"]["energy_j"]
    assert why == (None if summed else "the GPU of rank 1: no counter")
    assert [r["energy_j"] for r in each] == list(energies)
    assert ranks["max"]["nvml_device_peak_bytes"] == 8  # of training, not of loading
    assert ranks["sum"]["nvml_device_peak_bytes"] == 13


def test_the_utilisation_is_that_of_all_gpus(monkeypatch):
    def ratio(processes: int, gpu_bytes: int | None) -> float:
        train = PhaseReading(2.0, 0.0, 1, gpu_bytes, None, 1.5, 0.0, None)
        phases = SimpleNamespace(readings={"train": train})
        case = Case("tiny-gpt2", "lora", "sft", Settings(processes=processes))
        return values.work_values(phases, None, case, None, 3.0, 100.0)["mfu_ratio"]

    monkeypatch.setattr(values, "micro_batch_tokens", lambda *_: ([], [(5, 8)]))
    # 8 tokens of 3 operations in 2 s, of 100 operations a second
    assert ratio(1, 4) == ratio(2, None) == pytest.approx(0.12)
    assert ratio(2, 4) == pytest.approx(0.06)


def test_what_cannot_be_shared_is_one_line():
    with pytest.raises(UserError, match="batch_size is 6; it must be a multiple of processes"):
        check_settings(Settings(processes=4, batch_size=6))
    with pytest.raises(UserError, match="processes is 0; it must be at least 1"):
        check_settings(Settings(processes=0))
    with pytest.raises(
        UserError, match=r"PPO's micro-batch is 4 .* multiple of processes, which is 3"
    ):
        check_ppo(Settings(processes=3, batch_size=4))
    for method, changed in (
        ("sft+ppo", {}),
        ("dpo", {"engine": "trl"}),
        ("sft", {"compile": "layers"}),
    ):
        assert (
            impossible(Case("tiny-gpt2", "lora", method, Settings(processes=2, **changed))) is None
        )
