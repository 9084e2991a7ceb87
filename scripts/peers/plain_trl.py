"""One case of the quick preset as a plain TRL script, nothing of peftbench in it.

It trains, scores held-out text and pairs and completes held-out prompts, each in the way that the
libraries' own documentation shows. PPO needs TRL 1.12, the other methods run on 1.16.

    python plain_trl.py work.json outcome.json
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
STARTED_S = time.perf_counter()

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import IA3Config, LoraConfig, PrefixTuningConfig  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
)

Work = dict[str, Any]


def main() -> None:
    work: Work = json.loads(Path(sys.argv[1]).read_text())
    torch.manual_seed(work["seed"])
    tokenizer = AutoTokenizer.from_pretrained(work["folder"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        build = ppo_trainer if work["method"] == "ppo" else pair_trainer
        trainer = build(work, tokenizer, folder)
        training_s = time.perf_counter()
        trainer.train()
        trained_s = time.perf_counter()
        metrics = {} if work["method"] == "ppo" else trainer.evaluate()
    model = trainer.model.policy if work["method"] == "ppo" else trainer.model
    model.eval()
    outcome = {
        "steps": trainer.state.global_step,
        "accuracy": metrics.get("eval_rewards/accuracies"),
        "perplexity": perplexity(model, tokenizer, work),
        "completions": completions(model, tokenizer, work),
        "start_s": training_s - STARTED_S,
        "train_s": trained_s - training_s,
        "score_s": time.perf_counter() - trained_s,
    }
    Path(sys.argv[2]).write_text(json.dumps(outcome))


def load(work: Work) -> Any:
    quantization = None
    if work["adapter"] == "qlora":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
    return AutoModelForCausalLM.from_pretrained(
        work["folder"], dtype=torch.float32, quantization_config=quantization
    )


def adapter_config(work: Work) -> Any:
    if work["adapter"] in ("lora", "qlora"):
        return LoraConfig(
            task_type="CAUSAL_LM", r=work["rank"], lora_alpha=work["alpha"],
            target_modules="all-linear",
        )  # fmt: skip
    if work["adapter"] == "ia3":
        return IA3Config(task_type="CAUSAL_LM")
    if work["adapter"] == "prefix":
        return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=work["prefix_tokens"])
    return None


def arguments(work: Work, folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": work["batch_size"],
        "learning_rate": work["learning_rate"],
        "seed": work["seed"],
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def pair_trainer(work: Work, tokenizer: Any, folder: str) -> Any:
    """SFT, DPO or ORPO over texts, one epoch, without gradient checkpointing."""
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    config_class, trainer_class = {
        "sft": (SFTConfig, SFTTrainer),
        "dpo": (DPOConfig, DPOTrainer),
        "orpo": (ORPOConfig, ORPOTrainer),
    }[work["method"]]
    values = arguments(work, folder) | {
        "num_train_epochs": 1,
        "per_device_eval_batch_size": work["eval_batch_size"],
        "activation_checkpointing": False,
    }
    if work["method"] != "sft":
        values["beta"] = work["beta"] if work["method"] == "dpo" else work["orpo_lambda"]
    return trainer_class(
        model=load(work),
        args=config_class(**values),
        train_dataset=dataset(work["train"], work["method"]),
        eval_dataset=dataset(work["test"], work["method"]),
        processing_class=tokenizer,
        peft_config=adapter_config(work),
    )


def dataset(pairs: list[list[str]], method: str) -> Dataset:
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in pairs]
    if method == "sft":
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    return Dataset.from_list(rows)


def ppo_trainer(work: Work, tokenizer: Any, folder: str) -> Any:
    """PPO after a reward model with LoRA and an epoch of SFT before it, as peftbench's own has."""
    from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    lora = adapter_config(work | {"adapter": "lora"})
    epoch = arguments(work, folder) | {"num_train_epochs": 1, "gradient_checkpointing": False}
    sft_epoch = epoch | {"learning_rate": work["reward_sft_learning_rate"]}
    writer = SFTTrainer(
        model=load(work), args=SFTConfig(**sft_epoch),
        train_dataset=dataset(work["train"], "sft"), processing_class=tokenizer, peft_config=lora,
    )  # fmt: skip
    writer.train()
    written = Path(folder) / "writer"
    writer.model.merge_and_unload().save_pretrained(written)
    judge = RewardTrainer(
        model=scalar_model(str(written), tokenizer),
        args=RewardConfig(**epoch | {"learning_rate": work["reward_learning_rate"]}),
        train_dataset=dataset(work["train"], "reward"), processing_class=tokenizer,
        peft_config=LoraConfig(task_type="SEQ_CLS", r=work["rank"], lora_alpha=work["alpha"],
                               target_modules="all-linear", modules_to_save=["score"]),
    )  # fmt: skip
    judge.train()
    values = arguments(work, folder) | {
        # a minibatch, which it cuts the whole batch into, is one optimiser step only like this
        "per_device_train_batch_size": work["ppo_batch_size"],
        "num_mini_batches": work["ppo_batch_size"] // work["batch_size"],
        "num_ppo_epochs": work["ppo_epochs"],
        "total_episodes": len(work["train"]),
        "response_length": work["completion_length"],
        "local_rollout_forward_batch_size": work["ppo_batch_size"],
        "temperature": 1.0,
        "kl_coef": work["ppo_kl_coef"],
        "num_sample_generations": 0,
        "stop_token": "eos",
        "gradient_checkpointing": False,
    }
    tokenizer.padding_side = "left"
    prompts = [tokenizer(prompt)["input_ids"] for prompt, _, _ in work["train"]]
    return PPOTrainer(
        args=PPOConfig(**values),
        processing_class=tokenizer,
        model=load(work),
        ref_model=None if work["adapter"] != "full" else load(work),
        reward_model=judge.model.merge_and_unload().eval(),
        value_model=scalar_model(work["folder"], tokenizer),
        train_dataset=Dataset.from_list([{"input_ids": ids} for ids in prompts]),
        peft_config=adapter_config(work),
    )


def scalar_model(folder: str, tokenizer: Any) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, dtype=torch.float32, pad_token_id=tokenizer.pad_token_id
    )


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, work: Work) -> float:
    """A sliding window over the held-out text, as transformers' page on perplexity writes it."""
    ids = tokenizer(work["text"], return_tensors="pt")["input_ids"][:, : work["eval_tokens"]]
    if ids.shape[1] < work["eval_tokens"]:
        raise ValueError(f"the held-out text has {ids.shape[1]} tokens only")
    nll, scored, reached = 0.0, 0, 0
    for begin in range(0, ids.shape[1], work["eval_stride"]):
        end = min(begin + work["eval_context"], ids.shape[1])
        labels = ids[:, begin:end].clone()
        labels[:, : -(end - reached)] = -100
        count = int((labels != -100).sum()) - 1  # labels are shifted by one inside the model
        nll += float(model(ids[:, begin:end], labels=labels).loss) * count
        scored, reached = scored + count, end
        if end == ids.shape[1]:
            break
    return math.exp(nll / scored)


@torch.no_grad()
def completions(model: Any, tokenizer: Any, work: Work) -> list[str]:
    """Sampled completions of the held-out prompts, in batches."""
    tokenizer.padding_side = "left"
    prompts = [prompt for prompt, _, _ in work["test"][: work["eval_completions"]]]
    found: list[str] = []
    for at in range(0, len(prompts), 4 * work["eval_batch_size"]):
        rows = tokenizer(
            prompts[at : at + 4 * work["eval_batch_size"]], return_tensors="pt", padding=True
        )
        ids = model.generate(
            input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], do_sample=True,
            top_k=0, max_new_tokens=work["completion_length"],
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        answers = ids[:, rows["input_ids"].shape[1] :]
        found += tokenizer.batch_decode(answers, skip_special_tokens=True)
    return found


if __name__ == "__main__":
    main()
