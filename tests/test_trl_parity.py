"""The TRL engine against the native losses: same ids, same order, same numbers."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sync_counter import SyncCounter
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from peftbench import adapters, training, trl_engine
from peftbench.case import Settings
from peftbench.data.task import TokenPair, TokenTask
from peftbench.errors import UserError
from peftbench.measuring import phases
from peftbench.methods import METHODS
from peftbench.quantization import prepare_quantized, quantization_config

VOCABULARY = 96
EOS = trl_engine.PAD_TOKEN_ID  # as in SmolLM2: the padding id is the EOS id
ADAPTERS = ("full", "lora", "qlora", "ia3", "prefix")
OTHERS = ("pissa", "lora-8bit", "lora-bias", "bitfit", "prompt")
LOSS_TOLERANCE, GRADIENT_TOLERANCE, CURVE_TOLERANCE = 1e-5, 1e-4, 1e-3


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of two random 2-layer models; 4-bit blocks want widths that are multiples of 64."""
    torch.manual_seed(0)
    gpt2 = GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=EOS,
        eos_token_id=EOS, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.2,
    )  # fmt: skip
    llama = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1,
        eos_token_id=EOS, initializer_range=0.2,
    )  # fmt: skip
    folders = {}
    for name, model in (("gpt2", GPT2LMHeadModel(gpt2)), ("llama", LlamaForCausalLM(llama))):
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
    return folders


def build(folder: Path, adapter: str, settings: Settings, *, moved: float = 0.0) -> Any:
    """A tiny model with its adapter, seeded.

    `moved` is the size of noise on what trains: with it the policy is not the reference, and beta
    counts.
    """
    kind = adapters.ADAPTERS[adapter].quantization
    quantization = quantization_config(kind, torch.float32) if kind else None
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=quantization, device_map="cpu"
    )
    if kind:
        prepare_quantized(model, kind)
    torch.manual_seed(1)
    model = adapters.attach(model, adapter, settings)
    if adapter != "full":
        for parameter in trained(model).values():
            parameter.data += moved * torch.randn_like(parameter)
    return model


def trained(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@contextmanager
def shifted(model: Any) -> Iterator[None]:
    """A reference for `full` that is not the policy: every token has another one's embedding."""
    weight = model.get_input_embeddings().weight
    start = weight.data
    weight.data = start.roll(1, dims=0)
    try:
        yield
    finally:
        weight.data = start


def reference_of(model: Any, adapter: str) -> AbstractContextManager[None]:
    off: AbstractContextManager[None] = (
        shifted(model) if adapter == "full" else adapters.adapter_off(model)
    )
    return off


def make_task(pairs: int) -> TokenTask:
    """Pairs of unequal lengths with ids that include the padding id; some end in it, as EOS."""
    draw = random.Random(2)

    def ids(longest: int) -> tuple[int, ...]:
        return tuple(draw.randrange(VOCABULARY) for _ in range(draw.randint(1, longest)))

    rows = tuple(TokenPair(ids(9), (*ids(9), EOS), ids(7)) for _ in range(pairs))
    return TokenTask("random", "", rows, (), (), (), 0, None, 0, 0)


def make_settings(**changed: Any) -> Settings:
    values: dict[str, Any] = {
        "pairs": 40, "batch_size": 4, "beta": 0.3, "orpo_lambda": 0.7, "prefix_tokens": 3,
        "weight_decay": 0.05, "max_grad_norm": 0.5, "device": "cpu", "warmup_steps": 2,
        "learning_rate": 1e-3,
    }  # fmt: skip
    return Settings(**(values | changed))


class Gate:
    """Writes down when it was called, in optimiser steps, and the gradient norm of each step."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.norms: list[float] = []

    @property
    def steps(self) -> int:
        return len(self.norms)

    def before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        self.norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    def prepared(self) -> None:
        self.calls.append(("prepared", self.steps))

    def reference_done(self) -> None:
        self.calls.append(("reference_done", self.steps))

    def warmed_up(self) -> None:
        self.calls.append(("warmed_up", self.steps))

    def trained(self) -> None:
        self.calls.append(("trained", self.steps))


def native_loss(
    model: Any, task: TokenTask, settings: Settings, method: str, adapter: str, shared: bool
) -> float:
    """Loss of the first optimiser step by the native losses; leaves its gradients on the model."""
    sides, cpu = METHODS[method].sides, torch.device("cpu")
    windows = training.build_windows(task, settings, sides, cpu, shared)[:1]
    rows = training.reference_logratios(model, windows, reference_of(model, adapter))
    total = 0.0
    for batch, reference in zip(windows[0].batches, rows, strict=True):
        loss = training.batch_loss(
            model, batch, method, settings,
            window_tokens=windows[0].completion_tokens, reference=reference,
        )  # fmt: skip
        loss.backward()
        total += loss.item()
    return total


def trl_loss(
    model: Any, task: TokenTask, settings: Settings, method: str, adapter: str, folder: Path
) -> float:
    """The same through TRL's trainer, as its training loop does it."""
    losses: list[torch.Tensor] = []
    trainer = trl_engine.build_trainer(model, task, settings, method, str(folder), losses)
    if method == "dpo":
        trl_engine.add_reference(trainer, settings, reference_of(model, adapter))
    window = settings.gradient_accumulation
    batches, tokens = trainer.get_batch_samples(
        iter(trainer.get_train_dataloader()), window, trainer.args.device
    )
    trainer.current_gradient_accumulation_steps = window
    for batch in batches:
        trainer.training_step(model, batch, tokens)
    return float(sum(losses))


@pytest.mark.parametrize("method", trl_engine.TRL_METHODS)
@pytest.mark.parametrize(
    ("base", "accumulation", "adapter"),
    [("gpt2", 1, a) for a in (*ADAPTERS, *OTHERS)] + [("llama", 2, a) for a in ADAPTERS],
)
def test_both_engines_give_one_batch_the_same_loss_and_gradients(
    bases: dict[str, Path], base: str, accumulation: int, adapter: str, method: str, tmp_path: Path
) -> None:
    settings = make_settings(pairs=24, gradient_accumulation=accumulation, warmup_steps=1)
    task = make_task(settings.pairs)
    model = build(bases[base], adapter, settings, moved=0.1)

    through_trl = trl_loss(model, task, settings, method, adapter, tmp_path)
    found = {name: p.grad.clone() for name, p in trained(model).items() if p.grad is not None}
    shares = training.shares_prompts(model, task, settings, method)
    assert shares == (METHODS[method].sides == "both" and adapter not in ("prefix", "prompt"))
    for shared in {shares, False}:  # both forms of a batch of pairs
        model.zero_grad()
        native = native_loss(model, task, settings, method, adapter, shared)
        expected = {name: p.grad for name, p in trained(model).items() if p.grad is not None}

        assert through_trl == pytest.approx(native, rel=LOSS_TOLERANCE)
        assert found.keys() == expected.keys() == trained(model).keys()
        largest = max(float(g.norm()) for g in expected.values())
        worst = max(float((found[name] - expected[name]).norm()) for name in expected)
        assert largest > 1e-3
        assert worst <= GRADIENT_TOLERANCE * largest


@pytest.mark.parametrize(
    ("base", "adapter", "changed", "method"),
    [("gpt2", "full", {}, method) for method in trl_engine.TRL_METHODS]
    + [
        ("llama", "lora", {"schedule": "constant", "batch_size": 2, "gradient_accumulation": 2}, m)
        for m in trl_engine.TRL_METHODS
    ]
    + [("gpt2", "qlora", {}, "sft")],
)
def test_both_engines_give_the_same_loss_curve(
    bases: dict[str, Path], base: str, adapter: str, changed: dict[str, Any], method: str
) -> None:
    settings = make_settings(**changed)
    task = make_task(settings.pairs + 3)  # the ragged rest is left out by both
    start = build(bases[base], adapter, settings)

    def curve(engine: Any, learning_rate: float) -> list[float]:
        at_rate = replace(settings, learning_rate=learning_rate)
        model = copy.deepcopy(start)
        reference = reference_of(model, adapter)
        result = engine.train(model, task, at_rate, method, Gate(), reference)
        return list(result.losses)

    native = curve(training, 5e-3)
    assert len(native) == settings.steps == 10
    assert curve(trl_engine, 5e-3) == pytest.approx(native, rel=CURVE_TOLERANCE)
    # The tolerance is narrow enough to see a learning rate that is off by a tenth.
    assert curve(training, 4.5e-3) != pytest.approx(native, rel=CURVE_TOLERANCE)


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_4_bit_models_adapter_stays_float32_and_moves(
    bases: dict[str, Path], method: str
) -> None:
    # At this learning rate a step is below bfloat16's resolution of most entries.
    settings = make_settings(schedule="constant", learning_rate=1e-5)
    model = build(bases["llama"], "qlora", settings, moved=0.1)
    before = {name: p.detach().clone() for name, p in trained(model).items()}

    trl_engine.train(model, make_task(40), settings, method, Gate(), reference_of(model, "qlora"))

    after = trained(model)
    assert after.keys() == before.keys()
    assert {p.dtype for p in after.values()} == {torch.float32}
    moved = sum(int((after[name] != before[name]).sum()) for name in before)
    assert moved / sum(p.numel() for p in before.values()) > 0.9


@pytest.mark.parametrize("method", trl_engine.TRL_METHODS)
def test_the_gate_opens_after_the_warm_up_steps_and_closes_after_the_last(
    bases: dict[str, Path], method: str
) -> None:
    settings, gate = make_settings(warmup_steps=3, max_grad_norm=0.01), Gate()
    model = build(bases["gpt2"], "lora", settings)
    hook = register_optimizer_step_pre_hook(gate.before_step)
    try:
        result = trl_engine.train(
            model, make_task(40), settings, method, gate, reference_of(model, "lora")
        )
    finally:
        hook.remove()

    reference = [("prepared", 0)] if METHODS[method].needs_reference else []
    assert gate.calls == [*reference, ("reference_done", 0), ("warmed_up", 3), ("trained", 10)]
    assert gate.norms == pytest.approx([0.01] * 10, rel=1e-3)  # every step's gradient is clipped
    assert len(result.losses) == len(result.step_s) == 10
    assert all(seconds > 0 for seconds in result.step_s)


@pytest.mark.parametrize("method", trl_engine.TRL_METHODS)
@pytest.mark.parametrize(("adapter", "dtype"), [("full", "float32"), ("prefix", "bfloat16")])
def test_the_model_comes_back_as_it_was_but_for_its_training(
    bases: dict[str, Path], adapter: str, method: str, dtype: str
) -> None:
    settings = make_settings(pairs=12, warmup_steps=1, dtype=dtype)
    model = build(bases["llama"], adapter, settings)
    base = model if adapter == "full" else model.get_base_model()
    configs = [copy.deepcopy(vars(c)) for c in (model.config, model.generation_config)]
    names = {name: p.dtype for name, p in model.named_parameters()}

    trl_engine.train(model, make_task(12), settings, method, Gate(), reference_of(model, adapter))

    assert [vars(model.config), vars(model.generation_config)] == configs
    assert {name: p.dtype for name, p in model.named_parameters()} == names
    assert "forward" not in vars(model)
    assert "forward" not in vars(base)
    assert getattr(model, "active_adapter", "default") == "default"
    assert model.training


def test_nothing_is_written_and_nothing_is_sent(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    import trl.trainer.base_trainer

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("telemetry was sent")

    monkeypatch.setattr(trl.trainer.base_trainer, "send_telemetry", refuse)
    monkeypatch.delenv("CI", raising=False)  # where it is set, TRL sends nothing anyway
    monkeypatch.chdir(tmp_path)
    settings = make_settings(pairs=12, warmup_steps=1)
    for method in trl_engine.TRL_METHODS:
        model = build(bases["gpt2"], "lora", settings)
        capfd.readouterr()
        trl_engine.train(
            model, make_task(12), settings, method, Gate(), reference_of(model, "lora")
        )
        assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_a_time_budget_stops_the_native_loop_and_is_refused_by_trl(bases: dict[str, Path]) -> None:
    settings, gate = make_settings(warmup_steps=0, time_budget_s=1e-9), Gate()
    model = build(bases["gpt2"], "lora", settings)
    off = reference_of(model, "lora")
    result = training.train(model, make_task(40), settings, "sft", gate, off)
    assert len(result.losses) == 1
    assert [name for name, _ in gate.calls] == ["reference_done", "warmed_up", "trained"]
    with pytest.raises(UserError, match=r"^a time budget needs --engine native$"):
        trl_engine.train(model, make_task(40), settings, "sft", Gate(), off)


def test_eos_counts_in_the_loss_though_it_is_also_the_padding(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    # Completions of 1, 2 and 3 tokens, every one of them EOS: 6 labels for SFT.
    rows = tuple(TokenPair((5, 6), (EOS,) * n, (EOS,) * (4 - n)) for n in (1, 2, 3))
    task = TokenTask("eos", "", rows, (), (), (), 0, None, 0, 0)
    settings = make_settings(pairs=3, batch_size=3, warmup_steps=0)
    counted = {}
    for method in trl_engine.TRL_METHODS:
        model = build(bases["gpt2"], "full", settings)
        trainer = trl_engine.build_trainer(model, task, settings, method, str(tmp_path), [])
        batch = next(iter(trainer.get_train_dataloader()))
        counted[method] = {
            "sft": lambda b: int((b["labels"] != -100).sum()),
            "dpo": lambda b: b["completion_mask"].sum(1).tolist(),
            "orpo": lambda b: (b["chosen_labels"] != -100).sum(1).tolist(),
        }[method](batch)
    assert counted == {"sft": 6, "dpo": [1, 2, 3, 3, 2, 1], "orpo": [1, 2, 3]}


def test_what_trl_cannot_run_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = make_settings()
    for method in trl_engine.TRL_METHODS:
        trl_engine.check_trl(method, settings)
    with pytest.raises(UserError, match=r"no method 'ppo'; choose from: dpo, orpo, sft"):
        trl_engine.check_trl("ppo", settings)
    with pytest.raises(UserError, match=r"orpo_nll_on is 'completion'.*--engine native"):
        trl_engine.check_trl("orpo", make_settings(orpo_nll_on="completion"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package trl, which is missing; install trl"):
        trl_engine.check_trl("sft", settings)


def test_a_trl_without_the_experimental_orpo_is_refused_in_one_line(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trl.experimental.orpo", None)
    settings = make_settings()
    model = build(bases["gpt2"], "lora", settings)
    with pytest.raises(UserError, match=r"this trl has no trainer for 'orpo'.*--engine native"):
        trl_engine.train(
            model, make_task(40), settings, "orpo", Gate(), reference_of(model, "lora")
        )


def waits_in_the_window(
    engine: Any, model: Any, settings: Settings, method: str, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    counter = SyncCounter()
    monkeypatch.setattr(training, "synchronize", counter.synchronize)
    monkeypatch.setattr(phases, "synchronize", counter.synchronize)  # of the TRL engine
    with counter:
        engine.train(
            model, make_task(settings.pairs), settings, method, counter,
            reference_of(model, "lora"),
        )  # fmt: skip
    return counter.waits


@pytest.mark.parametrize("method", trl_engine.TRL_METHODS)
def test_nothing_in_the_native_window_waits_for_the_device(
    bases: dict[str, Path], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings(pairs=24, gradient_accumulation=2, warmup_steps=1)
    model = build(bases["llama"], "lora", settings)
    assert waits_in_the_window(training, model, settings, method, monkeypatch) == []
    # the counter does count: a loss that is read in every micro-batch is seen 4 times in 2 steps
    honest = training.batch_loss

    def reads_its_loss(*arguments: Any, **named: Any) -> torch.Tensor:
        loss = honest(*arguments, **named)
        loss.item()
        return loss

    monkeypatch.setattr(training, "batch_loss", reads_its_loss)
    found = waits_in_the_window(training, model, settings, method, monkeypatch)
    assert found == ["_local_scalar_dense"] * 4


@pytest.mark.parametrize(("method", "a_micro_batch"), [("sft", 5), ("dpo", 15), ("orpo", 11)])
def test_trl_waits_as_often_as_its_own_metrics_do(
    bases: dict[str, Path], method: str, a_micro_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers that trl_engine.py states: its trainers' own and transformers', none ours."""
    settings = make_settings(pairs=24, gradient_accumulation=2, warmup_steps=1)
    model = build(bases["llama"], "lora", settings)
    found = waits_in_the_window(trl_engine, model, settings, method, monkeypatch)
    mask = 2  # transformers looks twice whether a mask hides anything
    assert found.count("_local_scalar_dense") == 4 * (a_micro_batch + mask), found
