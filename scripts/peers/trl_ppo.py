"""TRL 1.12's side of the PPO comparison. Runs in TRL's environment: no torch code of peftbench.

value=full: as its users run it, the value model trains in full. value=adapter: the value model's
base is frozen and carries LoRA, so that as much trains as with peftbench's value=adapter. Policy
with `peft_config`, whose base is the reference; the reward model is a full copy in both.
"""

from __future__ import annotations

import gc
import itertools
import json
import tempfile
import time
import warnings
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from machine import time_machine
from peft import LoraConfig, inject_adapter_in_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
)
from work import Meter, PPOWork, read_arguments

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

GENERATION, WHITEN = ppo_trainer.batch_generation, ppo_trainer.masked_whiten  # TRL's own


def main() -> None:
    values, outcome_file = read_arguments()
    work = PPOWork(**values)
    torch.set_num_threads(work.threads)
    meter = Meter()
    runs = [train(work, seed, meter) for seed in work.seeds]
    outcome_file.write_text(
        json.dumps({"runs": runs, **meter.outcome(), "machine": time_machine()})
    )


class ToyReward(torch.nn.Module):
    """Share of the counted token in the response, in the shape that TRL asks of a reward model."""

    base_model_prefix = "backbone"

    def __init__(self, counted: int, prompt_length: int) -> None:
        super().__init__()
        self.counted, self.prompt_length = counted, prompt_length
        self.score = torch.nn.Identity()

    def backbone(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        found = (input_ids == self.counted).float()
        found[:, : self.prompt_length] = 0
        length = (torch.arange(input_ids.shape[1]) + 1 - self.prompt_length).clamp(min=1)
        return SimpleNamespace(hidden_states=[(found.cumsum(-1) / length).unsqueeze(-1)])


class Clock(TrainerCallback):  # type: ignore[misc]
    """Where an update's parts end: at the names that TRL's loop looks up, which cost nothing.

    Rollout: until its generation returns. Score: until it whitens the advantages, once an update.
    """

    def __init__(self) -> None:
        self.marks: list[float] = []  # rollout, score, update of each update, after a start
        self.logs: list[dict[str, float]] = []
        self.responses: list[int] = []

    def mark(self) -> None:
        self.marks.append(time.perf_counter())

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.mark()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.mark()

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        self.logs.append(logs)

    def parts_s(self, part: int) -> list[float]:
        ends = self.marks[1:]
        return [end - self.marks[i] for i, end in enumerate(ends) if i % 3 == part]

    def watch(self) -> None:
        """Put this clock into TRL's module, in the place of an earlier training's."""

        def generation(model: Any, queries: torch.Tensor, *rest: Any) -> Any:
            found = GENERATION(model, queries, *rest)
            self.mark()
            self.responses.append(found[0].shape[1] - queries.shape[1])
            return found

        def whiten(*arguments: Any, **options: Any) -> Any:
            found = WHITEN(*arguments, **options)
            self.mark()
            return found

        ppo_trainer.batch_generation, ppo_trainer.masked_whiten = generation, whiten


def train(work: PPOWork, seed: int, meter: Meter) -> dict[str, Any]:
    torch.manual_seed(seed)
    clock = Clock()
    clock.watch()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(work, seed, folder, clock)
        gc.collect()
        meter.start()
        trainer.train()
        meter.stop()
    if set(clock.responses) != {work.response_length}:
        raise RuntimeError(f"responses have {set(clock.responses)} tokens")
    ends = clock.marks[::3]
    return {
        "update_s": [b - a for a, b in itertools.pairwise(ends)],
        "rollout_s": clock.parts_s(0),
        "score_s": clock.parts_s(1),
        "learn_s": clock.parts_s(2),
        "response_tokens": clock.responses,
        "reward_mean": [log["objective/scores"] for log in clock.logs],
        "kl_k1": [log["objective/kl"] / work.response_length for log in clock.logs],
        "trainable_params": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "floor": None,
    }


def build_trainer(work: PPOWork, seed: int, folder: str, clock: Clock) -> Any:
    lora = LoraConfig(
        r=work.rank, lora_alpha=work.alpha, lora_dropout=0.0, bias="none",
        target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM",
    )  # fmt: skip
    policy = AutoModelForCausalLM.from_pretrained(work.folder, dtype=torch.float32)
    value = scalar_model(work)
    if work.value == "adapter":
        value = inject_adapter_in_model(lora, value.requires_grad_(False))
        value.score.requires_grad_(True)
    if work.counted_token is None:
        reward: torch.nn.Module = scalar_model(work)
    else:
        reward = ToyReward(work.counted_token, len(work.prompts[0]))
        torch.nn.init.zeros_(value.score.weight)  # as peftbench's head starts
    trainer = PPOTrainer(
        args=arguments(work, seed, folder),
        processing_class=padding_only_tokenizer(policy.config),
        model=policy, ref_model=None, reward_model=reward.eval(), value_model=value,
        train_dataset=Dataset.from_list([{"input_ids": prompt} for prompt in work.prompts]),
        peft_config=lora, callbacks=[clock],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def scalar_model(work: PPOWork) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(
        work.folder, num_labels=1, dtype=torch.float32
    )


def arguments(work: PPOWork, seed: int, folder: str) -> Any:
    """TRL's defaults but for what the work fixes; gradient checkpointing and bf16 are off."""
    return PPOConfig(
        output_dir=folder, use_cpu=True, seed=seed,
        per_device_train_batch_size=work.micro_batch_size,
        gradient_accumulation_steps=work.batch_size // work.micro_batch_size,
        num_mini_batches=1, local_rollout_forward_batch_size=work.batch_size,
        total_episodes=len(work.prompts), num_ppo_epochs=work.epochs,
        response_length=work.response_length, temperature=1.0, kl_coef=work.kl_coef,
        learning_rate=work.learning_rate, lr_scheduler_type="constant", adam_epsilon=1e-5,
        bf16=False, gradient_checkpointing=False,
        num_sample_generations=0, save_strategy="no", report_to="none", disable_tqdm=True,
        logging_steps=1, dataloader_pin_memory=False,
    )  # fmt: skip


def padding_only_tokenizer(config: Any) -> Any:
    """Pads with an id beyond the vocabulary, which nothing samples: TRL puts 0 in its place."""
    words = WordLevel({"<pad>": config.vocab_size, "<eos>": config.eos_token_id}, unk_token="<pad>")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), pad_token="<pad>", eos_token="<eos>"
    )


if __name__ == "__main__":
    main()
