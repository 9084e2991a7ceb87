"""The same cases through TRL: SFTTrainer, DPOTrainer and the experimental ORPOTrainer.

What a user of TRL pays, on the token ids, order, optimiser, schedule and precision of the native
loop, so that the two engines differ in their implementation only. Nothing of TRL's data preparation
runs: ids are final, so no tokeniser, no EOS or BOS added, no truncation, no shuffling, no packing.

What stays TRL's own, inside the clock: collating and copying each batch; a fused LM head that
recomputes logits in the backward pass (SFT, DPO; on a CPU over every position, prompt and padding
included, and slower than plain logits); metrics that nobody asked for here, each ending in
`.item()`, which waits for the device: 5 a micro-batch for SFT, 15 for DPO, 11 for ORPO; and two
more in transformers' attention mask.
"""

from __future__ import annotations

import importlib.util
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from peftbench.errors import UserError

if TYPE_CHECKING:
    import torch

    from peftbench.case import Settings
    from peftbench.data.task import TokenPair, TokenTask
    from peftbench.training import Gate, StepClock, Training

TRL_METHODS = ("sft", "dpo", "orpo")
PAD_TOKEN_ID = 0  # masks come from lengths, so any id may pad, and none hides an EOS
_INSTALL = "install trl 1.16 (pip install 'trl==1.16.0') or use --engine native"


def check_trl(method: str, settings: Settings) -> None:
    """Raise UserError for a case that this engine cannot run; imports nothing heavy."""
    if method not in TRL_METHODS:
        raise UserError(
            f"--engine trl has no method {method!r}; choose from: {', '.join(sorted(TRL_METHODS))},"
            " or use --engine native"
        )
    if method == "orpo" and settings.orpo_nll_on != "all":
        raise UserError(
            f"orpo_nll_on is {settings.orpo_nll_on!r}, but TRL's ORPO always takes the NLL over"
            " prompt and completion; set it to 'all' or use --engine native"
        )
    if settings.time_budget_s > 0:
        raise UserError("a time budget needs --engine native")
    if importlib.util.find_spec("trl") is None:
        raise UserError(f"--engine trl needs the package trl, which is missing; {_INSTALL}")


def train(
    model: Any,
    task: TokenTask,
    settings: Settings,
    method: str,
    gate: Gate,
    reference: AbstractContextManager[None],
) -> Training:
    """Train in place for the budget, as `training.train` does; `reference` is the same context.

    The model comes back with its own forward, configuration and float32 adapter, in training mode.
    One that is to be sharded comes whole and on the host.
    """
    import torch

    from peftbench import ranks
    from peftbench.measuring.phases import synchronize
    from peftbench.training import StepClock, Training, rates_of, state_bytes

    check_trl(method, settings)
    losses: list[torch.Tensor] = []
    clock = StepClock(training_device(model, settings))
    with tempfile.TemporaryDirectory() as folder, _restored(model):
        trainer = build_trainer(model, task, settings, method, folder, losses)
        if settings.sharding != "none":
            shard_model(trainer, settings)
        if method == "dpo":
            gate.prepared()
            add_reference(trainer, settings, reference)
        synchronize(trainer.args.device)
        gate.reference_done()
        callback = _gate_callback(gate, settings, clock)
        trainer.add_callback(callback)
        trainer.train()
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    steps = torch.stack(losses).view(-1, settings.gradient_accumulation)
    return Training(
        ranks.mean(steps.sum(1)).tolist(), clock.step_s(),
        callback.grad_bytes, state_bytes(trainer.optimizer),
        rates_of(trainer.lr_scheduler, len(steps)),
    )  # fmt: skip


def build_trainer(
    model: Any,
    task: TokenTask,
    settings: Settings,
    method: str,
    folder: str,
    losses: list[torch.Tensor],
) -> Any:
    """The TRL trainer of a case; its micro-batch losses (shares of their step's) go to `losses`."""
    from transformers.trainer_callback import PrinterCallback

    from peftbench.training import build_optimizer, build_schedule

    config_class, trainer_class = _import_trainer(method)
    pairs = task.train[: settings.steps * settings.batch_size * settings.gradient_accumulation]
    # TRL casts the adapter of a 4-bit model to bfloat16, in which IA3's and most of LoRA's updates
    # round to nothing. Keeping the tensors gives back the exact start, not one rounded to bfloat16.
    trained = {p: p.data for p in model.parameters() if p.requires_grad}
    optimizer = build_optimizer(list(trained), settings, settings.learning_rate)
    arguments = config_class(**_arguments(model, settings, method, folder))
    # A case runs on one device; over all that are visible the Trainer would split each batch.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    # As SFT and DPO do it; after ORPO's construction the Trainer would, with a warning.
    model.config.pad_token_id = model.generation_config.pad_token_id = PAD_TOKEN_ID
    with _quiet_datasets(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Adapter name 'ref' should not be contained")
        trainer = _token_trainer(trainer_class, losses, moves=settings.sharding == "none")(
            model=model,
            args=arguments,
            train_dataset=_dataset(pairs, method),
            processing_class=_padding_only_tokenizer(),
            optimizers=(optimizer, build_schedule(optimizer, settings, settings.steps)),
        )
    for parameter, data in trained.items():
        parameter.data = data
    if method == "dpo" and hasattr(model, "peft_config"):
        # A second copy of the adapter, TRL's reference for a model that was wrapped before. Ours is
        # the `reference` context, and for a prefix, whose start is not the base, not the same one.
        model.delete_adapter("ref")
    trainer.remove_callback(PrinterCallback)
    return trainer


def training_device(model: Any, settings: Settings) -> torch.device:
    """Where the steps are made: a model that is to be sharded waits on the host."""
    import torch

    if settings.sharding == "none":
        device: torch.device = next(model.parameters()).device
        return device
    on_host = settings.device == "cpu" or not torch.cuda.is_available()
    return torch.device("cpu") if on_host else torch.device("cuda", torch.cuda.current_device())


def shard_model(trainer: Any, settings: Settings) -> None:
    """Spread a trainer's model over the ranks, and let its optimiser take the slices.

    After the trainer was made: making a DPOTrainer copies the adapter from whole weights.
    """
    from transformers import DistributedConfig

    from peftbench import sharding
    from peftbench.training import build_optimizer, build_schedule

    model = trainer.model
    sharding.shard_all([model], trainer.args.device)
    # transformers' own way with a model that came sharded: it is neither wrapped nor sharded again
    trainer.is_distributed_loading_by_transformers = True
    model.config.distributed_config = DistributedConfig(fsdp_size=settings.processes)
    trained = [p for p in model.parameters() if p.requires_grad]
    trainer.optimizer = build_optimizer(trained, settings, settings.learning_rate)
    trainer.lr_scheduler = build_schedule(trainer.optimizer, settings, settings.steps)


def _import_trainer(method: str) -> tuple[Any, Any]:
    """(config class, trainer class) of a method."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You are importing from 'trl.experimental'")
            if method == "orpo":
                from trl.experimental.orpo import ORPOConfig, ORPOTrainer

                return ORPOConfig, ORPOTrainer
            from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
    except ImportError as error:
        raise UserError(f"this trl has no trainer for {method!r} ({error}); {_INSTALL}") from error
    return (SFTConfig, SFTTrainer) if method == "sft" else (DPOConfig, DPOTrainer)


def _token_trainer(base: Any, losses: list[torch.Tensor], *, moves: bool) -> Any:
    """A TRL trainer that takes token ids as they are and keeps its losses on the device.

    `moves`: it may put its whole model there.
    """

    class TokenTrainer(base):  # type: ignore[misc]
        def training_step(
            self, model: Any, inputs: Any, num_items_in_batch: torch.Tensor | None = None
        ) -> torch.Tensor:
            loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
            losses.append(loss)  # detached, and divided as the step's normalisation wants it
            return loss

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # SFT, DPO: they would tokenise text and append EOS

        @staticmethod
        def tokenize_row(row: dict[str, list[int]]) -> dict[str, list[int]]:
            return row  # ORPO: it would prepend BOS and append EOS

        def _precompute_ref_logps(self, dataset: Any, *_: Any) -> Any:
            return dataset  # DPO: `add_reference` does it, and caches nothing on the disk

        def _move_model_to_device(self, model: Any, device: torch.device) -> None:
            if moves:
                super()._move_model_to_device(model, device)

        def _send_telemetry(self) -> None:
            """A benchmark sends nothing; TRL asks its hub at every construction."""

    return TokenTrainer


def _arguments(model: Any, settings: Settings, method: str, folder: str) -> dict[str, Any]:
    """TRL's configuration of a case; every default of TRL that differs from ours is overridden."""
    from peftbench import ranks

    device = training_device(model, settings)
    values: dict[str, Any] = {
        "output_dir": folder,  # nothing is written, but a folder must be named
        "use_cpu": device.type == "cpu",
        # of several ranks each reads its share: accelerate deals the batches out in turn
        "per_device_train_batch_size": settings.batch_size // ranks.current().count,
        "gradient_accumulation_steps": settings.gradient_accumulation,
        "max_steps": settings.steps,
        "learning_rate": settings.learning_rate,
        "max_grad_norm": settings.max_grad_norm,
        "seed": settings.seed,
        "train_sampling_strategy": "sequential",  # the task's order
        "bf16": settings.dtype == "bfloat16",  # TRL's default is True
        "activation_checkpointing": settings.gradient_checkpointing,  # TRL's default is True
        "activation_checkpointing_kwargs": {"use_reentrant": False},
        "dataloader_pin_memory": device.type == "cuda",
        "save_strategy": "no",
        "logging_strategy": "no",
        "logging_nan_inf_filter": False,  # it would wait for the device at every micro-batch
        "report_to": "none",
        "disable_tqdm": True,
    }
    if method == "sft":
        values["max_length"] = None
    if method == "dpo":
        # Precomputed, or TRL would load a second copy of a fully trained model from its path.
        values |= {"beta": settings.beta, "max_length": None, "precompute_ref_log_probs": True}
    if method == "orpo":
        values["beta"] = settings.orpo_lambda
        values["remove_unused_columns"] = False
    return values


def _dataset(pairs: tuple[TokenPair, ...], method: str) -> Any:
    """The pairs in the columns that each trainer's own collator reads."""
    from datasets import Dataset

    return Dataset.from_list([_ROWS[method](pair) for pair in pairs])


def _sft_row(pair: TokenPair) -> dict[str, list[int]]:
    prompt, chosen = list(pair.prompt), list(pair.chosen)
    return {"input_ids": prompt + chosen, "labels": [-100] * len(prompt) + chosen}


def _dpo_row(pair: TokenPair) -> dict[str, list[int]]:
    return {
        "prompt_ids": list(pair.prompt),
        "chosen_ids": list(pair.chosen),
        "rejected_ids": list(pair.rejected),
    }


def _orpo_row(pair: TokenPair) -> dict[str, list[int]]:
    prompt = list(pair.prompt)
    row: dict[str, list[int]] = {}
    for side, completion in (("chosen", list(pair.chosen)), ("rejected", list(pair.rejected))):
        row[f"{side}_input_ids"] = prompt + completion
        row[f"{side}_attention_mask"] = [1] * (len(prompt) + len(completion))
        row[f"{side}_labels"] = [-100] * len(prompt) + completion
    return row


_ROWS = {"sft": _sft_row, "dpo": _dpo_row, "orpo": _orpo_row}


def _padding_only_tokenizer() -> Any:
    """A tokeniser that knows one token, its padding: all that TRL needs of it for final ids."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = WordLevel({"<pad>": PAD_TOKEN_ID}, unk_token="<pad>")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="<pad>")


def add_reference(
    trainer: Any, settings: Settings, reference: AbstractContextManager[None]
) -> None:
    """Add the columns of summed reference log-probabilities to a DPO trainer's data.

    They come through TRL's own fused LM head, so that at the first step policy and reference agree
    to the last bit, but with our reference: the model in the context, before any step.
    """
    import torch

    from peftbench import ranks

    model, data, own = trainer.model, trainer.train_dataset, ranks.current()
    rows: list[torch.Tensor] = []
    with torch.no_grad(), reference, trainer.accelerator.autocast():
        for start in range(0, len(data), settings.batch_size):
            pairs = list(data.select(range(start, start + settings.batch_size)))
            batch = trainer._prepare_inputs(trainer.data_collator(own.share_of(pairs)))
            labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
            logprobs = model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                use_cache=False, labels=labels, fused_lm_head=True,
            ).log_probs  # fmt: skip
            rows.append(logprobs.float().sum(-1))
    # (batches, ranks, chosen or rejected, rows of a share): in the order of the data
    table = torch.stack(ranks.gathered(torch.stack(rows).cpu()), 1)
    table = table.view(len(rows), own.count, 2, -1)
    for side, name in enumerate(("ref_chosen_logps", "ref_rejected_logps")):
        data = data.add_column(name, table[:, :, side].flatten().tolist())
    trainer.train_dataset = data


def _gate_callback(gate: Gate, settings: Settings, clock: StepClock) -> Any:
    """The callback that tells `gate` where a phase ends.

    A step begins where the one before it ended: collating its batch is part of it.
    """
    from transformers import TrainerCallback

    from peftbench.measuring.phases import synchronize
    from peftbench.training import gradient_bytes

    class GateCallback(TrainerCallback):  # type: ignore[misc]
        grad_bytes = 0

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.begin_step(args, state)

        def on_pre_optimizer_step(
            self, args: Any, state: Any, control: Any, model: Any, **_: Any
        ) -> None:
            if state.global_step == 0:  # the trainer has cleared them when a step ends
                self.grad_bytes = gradient_bytes(model.parameters())

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.mark()
            if state.global_step == settings.steps:
                control.should_training_stop = True
                # Here, not at `on_train_end`: the summary that TRL makes between is not training.
                synchronize(args.device)
                gate.trained()
            else:
                self.begin_step(args, state)

        def begin_step(self, args: Any, state: Any) -> None:
            if state.global_step == settings.warmup_steps:
                synchronize(args.device)
                gate.warmed_up()
            clock.mark()

    return GateCallback()


@contextmanager
def _restored(model: Any) -> Iterator[None]:
    """Undo what TRL and transformers' Trainer leave on a model.

    TRL replaces the forward by one with a fused LM head and writes its tokeniser's padding id into
    the configurations; the Trainer switches `use_cache` off, which would slow generation down.
    """
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    holders = [vars(model), vars(base)]
    forwards = [{"forward": h["forward"]} if "forward" in h else {} for h in holders]
    configs = [vars(model.config), vars(model.generation_config)]
    before = [dict(config) for config in configs]
    try:
        yield
    finally:
        for holder, forward in zip(holders, forwards, strict=True):
            holder.pop("forward", None)
            holder.update(forward)
        for config, values in zip(configs, before, strict=True):
            config.clear()
            config.update(values)


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """No progress bars of `datasets`: ORPOTrainer maps over its rows three times."""
    from datasets.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            enable_progress_bars()
