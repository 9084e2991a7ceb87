"""peftbench's side of the PPO comparison: `ppo_training.train`, the loop of every case."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from machine import time_machine
from work import Meter, PPOWork, read_arguments

from peftbench import adapters, models, pipeline, ppo_training
from peftbench.case import Settings
from peftbench.compiling import compiling
from peftbench.data.task import TokenPair, TokenTask
from peftbench.measuring.flops import count_flops
from peftbench.methods.reward import token_share
from peftbench.ppo_roles import Roles, build_value, copy_adapter
from peftbench.reward_model import ScalarModel
from peftbench.rollout import NO_EOS
from peftbench.training import SilentGate


def main() -> None:
    values, outcome_file = read_arguments()
    work = PPOWork(**values)
    torch.set_num_threads(work.threads)
    pipeline.import_libraries(Settings(compile=work.compile))
    meter = Meter()
    runs = [train(work, seed, meter) for seed in work.seeds]
    outcome_file.write_text(
        json.dumps({"runs": runs, **meter.outcome(), "machine": time_machine()})
    )


class CompileClock(SilentGate):
    """How long the compiling before the first update takes; None where there is none."""

    def __init__(self) -> None:
        self.compile_s: float | None = None
        self._started_s = 0.0

    def stage(self, name: str) -> None:
        assert name == "compile"
        self._started_s = time.perf_counter()

    def reference_done(self) -> None:
        if self._started_s:
            self.compile_s = time.perf_counter() - self._started_s


def settings_of(work: PPOWork, seed: int) -> Settings:
    return Settings(
        device="cpu", threads=work.threads, targets="qv", rank=work.rank, alpha=work.alpha,
        pairs=len(work.prompts), prompt_length=len(work.prompts[0]),
        completion_length=work.response_length,
        batch_size=work.micro_batch_size,
        gradient_accumulation=work.batch_size // work.micro_batch_size,
        warmup_steps=0, learning_rate=work.learning_rate, schedule="constant", max_grad_norm=0.0,
        ppo_batch_size=work.batch_size, ppo_minibatch_size=work.batch_size,
        ppo_epochs=work.epochs, ppo_kl_coef=work.kl_coef, value=work.value,
        reward="model" if work.counted_token is None else "count-token",
        missing_eos="keep", seed=seed, compile=work.compile,
    )  # fmt: skip


def train(work: PPOWork, seed: int, meter: Meter) -> dict[str, Any]:
    torch.manual_seed(seed)
    settings = settings_of(work, seed)
    model = models.load_model(
        work.model, weights="pretrained", dtype=torch.float32, device=torch.device("cpu"),
        quantize=None, seed=seed,
    )  # fmt: skip
    models.disable_dropout(model)
    plain = adapters.shared_copy(model)
    model = adapters.attach(model, "lora", settings)
    roles = build_roles(model, plain, settings, work.counted_token)
    meter.start()
    gate = CompileClock()
    with compiling(settings.compile) as compilation:
        found = ppo_training.train(
            model, roles, task_of(work), settings, NO_EOS, gate, None, compilation
        )
    meter.stop()
    compiled = compilation.described()
    if compiled is not None and compiled["recompilations_in_training"]:
        raise RuntimeError(f"compiled while the updates were timed: {compiled}")
    assert found.ppo is not None
    rows: list[dict[str, Any]] = list(found.ppo.history)
    if any(row["response_tokens"] != work.response_length for row in rows):
        raise RuntimeError("a response has not its full length")
    parts = [[row[k] for k in ("rollout_s", "score_s", "update_s")] for row in rows]
    return {
        "update_s": [math.fsum(part) for part in parts],
        "rollout_s": [row["rollout_s"] for row in rows],
        "score_s": [row["score_s"] for row in rows],
        "learn_s": [row["update_s"] for row in rows],
        "response_tokens": [row["response_tokens"] for row in rows],
        "reward_mean": [row["reward_mean"] for row in rows],
        "kl_k1": [row["kl_k1"] for row in rows],
        "compile_s": gate.compile_s,
        "compilation": compiled,
        "trainable_params": sum(p.numel() for p in trained_parameters(model, roles)),
        "floor": None if work.counted_token is not None else floors(model, roles, work, settings),
    }


def trained_parameters(model: Any, roles: Roles) -> list[torch.nn.Parameter]:
    """The policy's and the value's."""
    value = roles.value_model or roles.value_head
    assert value is not None
    return [p for module in (model, value) for p in module.parameters() if p.requires_grad]


def build_roles(model: Any, plain: Any, settings: Settings, counted: int | None) -> Roles:
    """As `ppo_roles.build_roles`; the reward model stays as it starts: its scores cost the same."""
    reward_model = None
    if counted is None:
        reward_model = ScalarModel(adapters.shared_copy(plain), settings)
        reward_model.requires_grad_(False).eval()
    head, value_model = build_value(model, plain, settings)
    if reward_model is not None and value_model is not None:
        copy_adapter(reward_model, value_model)
    reward = None if counted is None else partial(toy_reward, counted)
    return Roles(plain, reward_model, reward, head, value_model, 0)


def toy_reward(counted: int, _: Any, completions: Sequence[Sequence[int]]) -> torch.Tensor:
    return torch.tensor([token_share(row, counted) for row in completions])


def task_of(work: PPOWork) -> TokenTask:
    rows = tuple(TokenPair(tuple(p), tuple(p), tuple(p)) for p in work.prompts)
    return TokenTask("peers", "", rows, (), (), (), 0, None, 0, 0)


def floors(model: Any, roles: Roles, work: PPOWork, settings: Settings) -> dict[str, float]:
    """What reading and multiplying alone take of a rollout, and multiplying of an update.

    Rollout: the prompts in one pass, whose head runs on the last column, then a pass a token; a
    pass takes the bytes of all weights that it multiplies by, over the read rate, plus its
    operations over the matmul rate. Update: the counted operations over the matmul rate.
    """
    machine = time_machine()
    state = ppo_training.PPO(model, roles, task_of(work), settings, NO_EOS)
    trunk, head = multiplied_weights(model)
    rows, prompt = work.batch_size, len(work.prompts[0])
    read_s = 4 * (trunk + head) / machine["read_bytes_per_s"]
    rate = machine["matmul_flops_per_s"]
    step_s = read_s + 2 * rows * (trunk + head) / rate
    prompts_s = read_s + 2 * rows * (trunk * prompt + head) / rate
    last = work.updates - 1
    sampled = state.roll_out(last)
    orders = state.orders(last)
    score_flops = count_flops(lambda: state.score(last, sampled, orders[0]))
    experience, _, kept = state.score(last, sampled, orders[0])
    learn_flops = count_flops(lambda: state.learn(experience, orders, kept))
    return machine | {
        "token_step_s": step_s,
        "rollout_s": prompts_s + (work.response_length - 1) * step_s,
        "learn_s": learn_flops / rate,
        "score_s": score_flops / rate,
        "read_bytes_per_step": 4 * (trunk + head),
    }


def multiplied_weights(model: Any) -> tuple[int, int]:
    """Entries of the trunk's and the head's linear layers, the adapter's included."""
    linear = {
        name: module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    head = math.fsum(count for name, count in linear.items() if name.endswith("lm_head"))
    return int(sum(linear.values()) - head), int(head)


if __name__ == "__main__":
    main()
