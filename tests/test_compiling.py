"""`--compile layers`: the same training, counted compiling, and nothing that stays compiled."""

from __future__ import annotations

import copy
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench_run import bench, rows
from test_ppo_training import EOS, SETTINGS, make_model, make_task
from transformers.modeling_layers import GradientCheckpointingLayer

from peftbench import adapters, compiling, ppo_roles, ppo_training, rollout, training, values
from peftbench.case import Case, Settings
from peftbench.compiling import Compilation, cache_state, decoder_layers
from peftbench.errors import UserError
from peftbench.measuring.host import cpu_times
from peftbench.preflight import check_compiler, impossible
from peftbench.training import SilentGate, Training


class StageGate(SilentGate):
    """Notes what the training says."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def stage(self, name: str) -> None:
        self.heard.append(name)

    def reference_done(self) -> None:
        self.heard.append("reference_done")


class ProfileGate(SilentGate):
    """Looks at what runs while the training clock does."""

    def warmed_up(self) -> None:
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self.profile.__enter__()

    def trained(self) -> None:
        self.profile.__exit__(None, None, None)

    def calls(self) -> int:
        """How often a compiled graph that has a backward pass was called."""
        return sum(e.count for e in self.profile.key_averages() if e.key == "CompiledFunction")


def train(
    name: str, adapter: str, method: str, how: str, gate: Any = None, **changes: Any
) -> tuple[Any, Training, dict[str, Any] | None]:
    """(the trained model, its training, what was compiled)."""
    settings = replace(SETTINGS, compile=how, **changes)
    model, task, gate = make_model(name, adapter), make_task(), gate or SilentGate()
    plain = adapters.shared_copy(model)
    model = adapters.attach(model, adapter, settings)
    with compiling.compiling(how) as compilation:
        if method == "ppo":
            roles = ppo_roles.build_roles(
                model, plain, adapter, settings, None, gate, after_sft=False
            )
            ppo_roles.train_roles(roles, task, settings)
            done = ppo_training.train(model, roles, task, settings, EOS, gate, None, compilation)
        else:
            reference = nullcontext() if adapter == "full" else adapters.adapter_off(model)
            done = training.train(model, task, settings, method, gate, reference, None, compilation)
    return model, done, compilation.described()


def is_compiled(model: torch.nn.Module) -> bool:
    return any(m._compiled_call_impl is not None for m in model.modules())


def test_a_copy_of_a_compiled_model_is_eager():
    """Else PPO's trees would call the layers of another tree: another adapter's, other weights."""
    model = make_model("llama", "lora")
    compiling.compile_layers(model, dynamic=False)
    assert is_compiled(model)
    for twin in (copy.deepcopy(model), adapters.shared_copy(model), rollout.same_modules(model)):
        assert not is_compiled(twin)
        assert all(isinstance(m, GradientCheckpointingLayer) for m in decoder_layers(twin))
    assert is_compiled(model)


def test_a_model_without_known_layers_is_refused():
    with pytest.raises(UserError, match="Linear has no decoder layers"):
        decoder_layers(torch.nn.Linear(2, 2))


def test_training_compiles_before_the_clock_and_ends_eager(monkeypatch):
    """Traced without code being generated, so that it is quick: widths and padding vary."""
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    torch._dynamo.reset()
    gate = StageGate()
    model, done, described = train("gpt2", "lora", "sft", "layers", gate)
    _, plain, nothing = train("gpt2", "lora", "sft", "none")
    assert gate.heard == ["compile", "reference_done"]
    assert described is not None
    assert described["layers"] == {"policy": 2}
    # of the first layer, whose input needs no gradient, and of the second
    assert (described["frames"], described["graphs"], described["graph_breaks"]) == (2, 2, 0)
    assert described["recompilations_in_training"] == 0
    assert not is_compiled(model)
    assert done.losses == pytest.approx(plain.losses, rel=1e-6)
    assert nothing is None


def test_compiling_while_the_clock_runs_is_counted_and_disturbs_the_round(monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    torch._dynamo.reset()
    model = make_model("gpt2", "full")
    with compiling.compiling("layers") as compilation, torch.no_grad():
        compilation.add("policy", model, dynamic=False)
        model(torch.ones(2, 5, dtype=torch.long), use_cache=False)
        compilation.clock_starts()
        model(torch.ones(2, 6, dtype=torch.long), use_cache=False)
        model(torch.ones(2, 5, dtype=torch.long), use_cache=False)
        compilation.clock_stops()
    described = compilation.described()
    assert described is not None
    assert described["frames"] == 1
    assert described["recompilations_in_training"] == 1
    device = torch.device("cuda")  # where other processes are not looked for
    phases: Any = SimpleNamespace(readings={"train": None}, stalled_s=0.0)
    (sentence,) = values.disturbances(phases, device, described)
    assert sentence == "torch.compile compiled 1 times while the training clock ran"
    assert values.disturbances(phases, device, None) == []


def test_what_is_not_compiled_has_no_description():
    assert Compilation().described() is None


@pytest.mark.parametrize(
    ("hits", "misses", "state"),
    [(0, 0, "cold"), (0, 4, "cold"), (3, 0, "warm"), (3, 1, "partly warm")],
)
def test_the_cache_is_warm_when_nothing_was_missing(hits, misses, state):
    assert cache_state(hits, misses) == state


def test_a_missing_compiler_is_one_line_before_the_training(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    check_compiler(Settings())
    with pytest.raises(UserError, match="there is no 'no-such-compiler'"):
        check_compiler(Settings(compile="layers"))


def test_what_cannot_be_compiled_is_skipped_with_a_sentence():
    layers = Settings(compile="layers")
    assert impossible(Case("tiny-gpt2", "lora", "dpo", layers)) is None
    prefix = impossible(Case("tiny-gpt2", "prefix", "dpo", layers))
    trl = impossible(Case("tiny-gpt2", "lora", "dpo", replace(layers, engine="trl")))
    assert prefix is not None and "every layer would be compiled" in prefix  # noqa: PT018
    assert trl is not None and "native engine's" in trl  # noqa: PT018


def test_the_default_leaves_a_cases_hash_as_it_was():
    case = Case("tiny-gpt2", "lora", "sft", Settings())
    assert "compile" not in case.identity()
    assert replace(case, settings=Settings(compile="layers")).hash != case.hash


def test_the_cpu_time_of_a_compiler_is_the_process_own():
    before = cpu_times()
    busy = "import time\nwhile time.process_time() < 0.5: pass"
    subprocess.run([sys.executable, "-c", busy], check=True)
    after = cpu_times()
    if before is None or after is None:
        pytest.skip("this system has no /proc/stat")
    assert after.own_s - before.own_s > 0.4


@pytest.mark.verify
@pytest.mark.parametrize("method", ["sft", "dpo", "orpo", "ppo"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_compiled_losses_are_the_eager_ones(name, method):
    """Six steps in float32; PPO's own checks (ratio 1, KL 0, sampled as scored) run in each."""
    torch._dynamo.reset()
    changes = {"value": "adapter"} if name == "llama" else {}
    _, eager, _ = train(name, "lora", method, "none", **changes)
    gate = ProfileGate()
    _, compiled, described = train(name, "lora", method, "layers", gate, **changes)
    assert described is not None
    assert described["recompilations_in_training"] == 0
    assert described["graph_breaks"] == 0
    assert described["cache_hits"] + described["cache_misses"] > 0  # code was made, or found
    assert compiled.losses == pytest.approx(eager.losses, rel=1e-4, abs=1e-5)
    assert gate.calls() >= 2 * 2  # both layers, in two steps at least; the losses may be equal bits


@pytest.mark.verify
@pytest.mark.parametrize("adapter", sorted(set(adapters.ADAPTERS) - {"prefix", "lora", "bitfit"}))
def test_every_adapter_trains_compiled(adapter):
    torch._dynamo.reset()
    _, eager, _ = train("llama", adapter, "sft", "none")
    _, compiled, described = train("llama", adapter, "sft", "layers")
    assert described is not None
    assert described["recompilations_in_training"] == 0
    assert compiled.losses == pytest.approx(eager.losses, rel=1e-4)


@pytest.mark.verify
def test_the_rounds_of_a_session_share_a_cache_and_no_session_finds_anothers(tmp_path):
    """PPO and DPO through the workers: what is compiled, in which phase, and from where."""
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        code, text, run = bench(
            folder, "--adapters", "lora", "--methods", "dpo,ppo", "--compile", "layers",
            "--rounds", "2", "--ppo-batch-size", "16", "--reward", "none",
        )  # fmt: skip
        assert code == 0, text
        found = rows(run)
        assert set(found) == {"tiny-gpt2-lora-dpo", "tiny-gpt2-lora-ppo"}
        for row in found.values():
            cold, warm = (r["compilation"] for r in row["rounds"])
            assert cold["cache"] in ("cold", "partly warm")  # PPO may share a graph with DPO
            assert (warm["cache"], warm["cache_misses"]) == ("warm", 0)
            for compilation, r in zip((cold, warm), row["rounds"], strict=True):
                assert compilation["recompilations_in_training"] == 0
                assert not any("torch.compile" in d for d in r["disturbances"])
                stages = ("reward_model_s", "reference_s", "compile_s", "warmup_s", "train_s")
                assert r["method_s"] == pytest.approx(sum(r[n] or 0.0 for n in stages))
            assert row["rounds"][1]["compile_s"] < row["rounds"][0]["compile_s"]
        layers = found["tiny-gpt2-lora-ppo"]["compilation"]["layers"]
        assert layers == {"policy": 4, "token step": 4}
        assert found["tiny-gpt2-lora-dpo"]["compilation"]["cache"] == "cold"
        assert not list(folder.glob("runs/*/.compiled"))
