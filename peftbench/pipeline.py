"""READ THIS FIRST: what happens to a case, top to bottom.

    pytest (plugin.py)  ->  one fresh child process per round (worker.py)  ->  run_round, below:
    import -> load -> attach -> data -> check -> prepare -> (sft) -> (reward model) -> (reference)
    -> (compile) -> warm up -> [go] -> train -> collect -> evaluate -> (tasks) -> compare
    -> save -> merge -> count

The parent process collects, shows progress and writes files; it never imports torch (but for
`--report-to`, when all is measured). The child
does everything on this page and sends back one plain dictionary, the round's record.
"""

from __future__ import annotations

import gc
import importlib
import math
import tempfile
import time
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from peftbench import (
    adapters,
    evaluation,
    harness,
    models,
    ppo_values,
    provenance,
    ranks,
    sharding,
    values,
)
from peftbench.batches import collate, completion_logprobs, forward_logits
from peftbench.case import Case, Settings
from peftbench.compiling import compiling
from peftbench.data.loading import load_task
from peftbench.data.task import TokenPair, TokenTask
from peftbench.errors import InvalidTrainingError, UserError
from peftbench.evaluation import Quality
from peftbench.harness import TaskScore
from peftbench.measuring import host
from peftbench.measuring.flops import count_flops
from peftbench.measuring.phases import Phases
from peftbench.measuring.sentinels import time_sentinels
from peftbench.methods import METHODS, samples_completions, stages, uses_ppo
from peftbench.methods.reward import check_truth_is_known
from peftbench.out_of_memory import is_out_of_memory
from peftbench.quantization import Quantization, quantization_of, quantized_layers
from peftbench.record import FORMAT, measured
from peftbench.training import Gate as StageGate
from peftbench.training import Keeper, SilentGate, Training

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peftbench.ppo_roles import Roles


class Parent(Protocol):
    """The other end of the child's pipe."""

    def phase(self, name: str) -> None:
        """A phase is about to start."""

    def ready(self) -> None:
        """Warmed up; blocks until the parent says go."""

    def trained(self, seconds: float) -> None:
        """The training clock has stopped."""


class Gate:
    """Turns the engines' boundaries into phases and messages."""

    def __init__(self, phases: Phases, parent: Parent) -> None:
        self._phases = phases
        self._parent = parent

    def stage(self, name: str) -> None:
        self._phases.enter(name)

    def prepared(self) -> None:
        self._phases.enter("reference")

    def reference_done(self) -> None:
        self._phases.enter("warmup")

    def warmed_up(self) -> None:
        self._phases.enter("train", hold=self._go)

    def _go(self) -> None:
        self._parent.ready()
        ranks.meet()

    def trained(self) -> None:
        self._phases.leave(stopped=self._parent.trained)
        self._phases.enter("collect")


def run_round(
    case: Case,
    base: Quality | None,
    unquantized_base: Quality | None,
    peak_flops_per_s: float | None,
    parent: Parent,
    place: ranks.Ranks = ranks.ALONE,
) -> dict[str, Any] | None:
    """Run one round of a case in this process and return its record.

    `base` is what the untrained model scores on the same held-out data (`score_base`), and
    `unquantized_base` the same before quantisation; both None when quality is not measured.
    `peak_flops_per_s` is the device's rate in one large matrix product (`time_sentinels`). Of
    several ranks all train, each at its `place`, and the first one does the rest, all of them only
    where the model is spread over them: None of the others.
    """
    with ExitStack() as together:
        return record_of(case, base, unquantized_base, peak_flops_per_s, parent, place, together)


def record_of(
    case: Case,
    base: Quality | None,
    unquantized_base: Quality | None,
    peak_flops_per_s: float | None,
    parent: Parent,
    place: ranks.Ranks,
    together: ExitStack,
) -> dict[str, Any] | None:
    """`run_round`; `together` is open as long as the ranks are one group."""
    case = models.resolved(case)
    settings, start_unix_s = case.settings, time.time()
    device = prepare_process(settings, place)
    phases = Phases(device, parent.phase)

    phases.enter("import")
    import_libraries(settings)
    phases.imported()

    phases.enter("load")
    sharded = settings.sharding != "none"
    held_on = torch.device("cpu") if sharded else device
    if sharded and device.type == "cpu":
        host.return_large_blocks()
    model = load(case, held_on, quantize=adapters.ADAPTERS[case.adapter].quantization)
    base_bytes, quantized = models.parameter_bytes(model), len(quantized_layers(model))
    quantization = quantization_of(model)

    phases.enter("attach")
    # the base on a second tree of modules, for PPO's reference and reward; it costs no weights
    plain = adapters.shared_copy(model) if uses_ppo(case.method) else None
    model = adapters.attach(model, case.adapter, settings)
    before = adapters.trainable_names(model)
    total_params, trainable_params = adapters.count_params(model)
    param_bytes = models.parameter_bytes(model)

    phases.enter("data")
    tokenizer = models.load_tokenizer(case.model, settings.weights)
    task = load_task(settings, tokenizer, model.config.vocab_size)

    phases.enter("check")
    start_difference = start_max_logit_difference(model, case, task)
    # A copy of the adapter, not of a whole model: `full` is compared with a fresh base instead.
    at_start = None if case.adapter == "full" else adapters.snapshot(model)

    phases.enter("prepare")
    together.enter_context(ranks.joined(place, device))
    roles = spread(model, plain, case, tokenizer, device) if sharded else None
    plain = None if sharded else plain
    training = train(model, plain, case, task, tokenizer, Gate(phases, parent), roles=roles)
    readings = ranks.gathered(values.rank_reading(place.rank, phases, device_uuid(device)))
    if not sharded:
        ranks.check_alike([p for p in model.parameters() if p.requires_grad])
        together.close()
        if place.rank > 0:
            return None
    values.without_ranks(phases, readings)
    if not all(math.isfinite(loss) for loss in training.losses):
        step = next(i for i, loss in enumerate(training.losses) if not math.isfinite(loss))
        raise InvalidTrainingError(f"the loss is {training.losses[step]} at step {step + 1}")

    trained = [sharding.own_slice(p) for p in model.parameters() if p.requires_grad]
    if not all(bool(p.isfinite().all()) for p in trained):
        raise InvalidTrainingError("a trained weight is not finite after the last step")

    phases.enter("evaluate")
    quality, gap, judged = None, None, {}
    if settings.measures_quality:
        quality = quality_of(model, case, task, tokenizer)
        trained_on = pairs_trained_on(training, case, task)
        gap = evaluation.score_gap(model, trained_on, task, quality.pairs, settings)
        judged = judge(case, task, tokenizer, quality, base, training)

    if quality is not None and settings.tasks:
        phases.enter("tasks")
        quality = replace(quality, tasks=task_scores(model, case, tokenizer))

    phases.enter("compare")
    fresh_base = load(case, held_on, quantize=None) if case.adapter == "full" else None
    if fresh_base is not None:
        at_start = adapters.snapshot(fresh_base)
        if sharded:
            sharding.shard(fresh_base, device)
    assert at_start is not None
    kl = None if quality is None else kl_of(model, fresh_base, quality, task, case)
    del fresh_base
    with sharding.on_host(model):
        rows_read = rows_trained_on(training, case, task)
        rows = touched_rows(model, rows_read) if case.adapter == "full" else None
        moved = adapters.moved_ratio(at_start, model, rows)

        phases.enter("save")
        with tempfile.TemporaryDirectory(prefix="peftbench-") as folder:
            adapter_bytes = adapters.save_adapter(model, Path(folder))

    merge_difference = None
    if adapters.ADAPTERS[case.adapter].merges and not sharded:
        phases.enter("merge")
        merge_difference = merge_max_logit_difference(model, case, task)

    phases.enter("count")
    # At the very end: it takes as much memory and time as a step, and moves no number.
    flops = flops_per_token(model, case, task, training, tokenizer)
    # after all that asks for the model, as it goes on training it
    scaling = None
    if place.count > 1 and not sharded:
        scaling = steps_alone_s(model, case, task, training, tokenizer)
    phases.leave()
    phases.check_sum()
    if place.rank > 0:
        return None

    if adapters.trainable_names(model) != before:
        raise RuntimeError("the set of trainable parameters changed during the round")
    numbers: dict[str, float | int | None] = {
        "total_params": total_params,
        "trainable_params": trainable_params,
        "trainable_ratio": trainable_params / total_params,
        "adapter_bytes": adapter_bytes,
        "param_bytes": param_bytes,
        "grad_bytes": training.grad_bytes,
        "optimizer_state_bytes": training.optimizer_state_bytes,
        "base_bytes": base_bytes,
        "quantized_modules": quantized,
        "moved_ratio": moved,
        "start_max_logit_difference": start_difference,
        "merge_max_logit_difference": merge_difference,
        "learning_rate": settings.learning_rate,
        "truncated_prompts": task.truncated_prompts,
        "truncated_completions": task.truncated_completions,
        **values.loss_values(training),
        **values.time_values(phases, training, case, task),
        **values.work_values(phases, training, case, task, flops, peak_flops_per_s),
        **values.memory_values(phases),
        **values.quality_values(quality, base, unquantized_base, task, settings),
        **({} if gap is None else evaluation.gap_metrics(gap)),
        **ppo_values.training_values(training),
        **judged,
        "kl_to_base_nats_per_token": kl,
    }
    return {
        **run_facts(case, device, quantization, start_unix_s),
        **measured(numbers, values.null_reasons(case, device, phases, peak_flops_per_s)),
        "disturbances": values.disturbances(phases, device, training.compilation),
        "adapter_dtype": ", ".join(
            sorted(
                {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad}
            )
        ),
        "data": task.name,
        "data_digest": task.digest,
        "phases": {name: asdict(reading) for name, reading in phases.readings.items()},
        "compilation": training.compilation,
        "ranks": values.rank_values(readings, scaling),
        "shared_prompts": training.shared_prompts,
        "losses": training.losses,
        "step_s": training.step_s,
        "step_tokens": values.step_tokens(training, case, task),
        "step_learning_rates": training.learning_rates,
        "ppo_history": None if training.ppo is None else training.ppo.history,
        "items": values.item_outcomes(quality, base, gap),
        "tasks": values.task_values(quality, base),
        "samples": values.samples_text(task, base, quality, tokenizer),
    }


def run_facts(
    case: Case, device: torch.device, quantization: dict[str, Any] | None, start_unix_s: float
) -> dict[str, Any]:
    """What a record of either kind says first: the case, and on what its round ran."""
    settings = case.settings
    return {
        "format": FORMAT,
        "status": "ok",
        "case_id": case.id,
        "case_hash": case.hash,
        "case": case.public().to_dict(),
        "seed": settings.seed,
        "start_unix_s": start_unix_s,
        "device": device_name(device),
        "device_uuid": device_uuid(device),
        "emulated_gpu_memory_bytes": settings.gpu_memory_limit_bytes or None,
        "threads": torch.get_num_threads(),
        "model_revision": models.find_model(case.model).revision,
        "base_dtype": case.weights_dtype,
        "quantization": quantization,
        "weights_hash": models.weights_hash(case.model, settings.weights, settings.seed),
    }


def score_base(case: Case, quantize: Quantization | None, parent: Parent) -> dict[str, Any]:
    """What the model scores before any training; done once per session and model.

    `quality` as plain values, and `phases` with the seconds of each.
    """
    device = prepare_process(case.settings)
    phases = Phases(device, parent.phase)
    phases.enter("import")
    import_libraries(case.settings)
    phases.imported()
    phases.enter("load")
    model = load(case, device, quantize=quantize)
    phases.enter("data")
    tokenizer = models.load_tokenizer(case.model, case.settings.weights)
    task = load_task(case.settings, tokenizer, model.config.vocab_size)
    phases.enter("evaluate")
    quality = quality_of(model, case, task, tokenizer)
    if case.settings.tasks:
        phases.enter("tasks")
        quality = replace(quality, tasks=task_scores(model, case, tokenizer, is_base=True))
    phases.leave()
    return {
        "quality": asdict(quality),
        "phases": {name: reading.seconds for name, reading in phases.readings.items()},
    }


def prepare_process(settings: Settings, place: ranks.Ranks = ranks.ALONE) -> torch.device:
    """Seeds, threads and the device; called in a fresh child only. Ranks share the cores."""
    # What the imports left is never garbage: without this each phase's collection walks through it
    # all, a third of a second at every boundary.
    gc.collect()
    gc.freeze()
    cores = provenance.available_cores() or 1
    torch.set_num_threads(settings.threads or max(1, cores // place.count))
    torch.manual_seed(settings.seed)
    if settings.device == "cpu" or (settings.device == "auto" and not torch.cuda.is_available()):
        limit_host_memory(settings.host_memory_limit_bytes)
        return torch.device("cpu")
    torch.cuda.init()  # type: ignore[no-untyped-call]  # the memory counters are read before anything is put on the device
    if place.count > torch.cuda.device_count():
        raise UserError(
            f"processes is {place.count}, but there are {torch.cuda.device_count()} GPUs; give at"
            " most as many"
        )
    device = torch.device("cuda", place.rank)
    torch.cuda.set_device(device)
    if settings.gpu_memory_limit_bytes > 0:
        total = torch.cuda.get_device_properties(device).total_memory
        fraction = settings.gpu_memory_limit_bytes / total
        if fraction > 1:
            raise UserError(
                f"gpu_memory_limit is {settings.gpu_memory_limit_bytes} bytes, but the device has"
                f" {total}; give less"
            )
        torch.cuda.set_per_process_memory_fraction(fraction, device)
    return device


def limit_host_memory(limit_bytes: int) -> None:
    """Let the address space grow by so much from here; 0 sets no limit.

    The thread pool is started first: where its stacks no longer fit, the OpenMP library ends the
    process without a word.
    """
    if limit_bytes == 0:
        return
    import resource

    torch.ones(256, 256).mm(torch.ones(256, 256))
    now_bytes = host.address_space_bytes()
    if now_bytes is None:
        raise UserError("host_memory_limit needs Linux: this system does not tell a process's size")
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now_bytes + limit_bytes, hard))


def import_libraries(settings: Settings) -> None:
    """Import what the case needs and the server has not: neither its time nor its memory is the
    training's."""
    names = ["accelerate", "bitsandbytes", "peft"]
    if settings.compile != "none":
        names += ["torch._dynamo", "torch._inductor.compile_fx"]
    if settings.engine == "trl":
        names += ["trl.trainer.sft_trainer", "trl.trainer.dpo_trainer"]
    if settings.tasks:
        names += ["lm_eval.evaluator", "lm_eval.models.huggingface"]
    for name in names:
        importlib.import_module(name)


def load(case: Case, device: torch.device, *, quantize: Quantization | None) -> Any:
    """The base model of a case, without dropout: frozen weights in `dtype`, trained in float32."""
    settings = case.settings
    dtype = getattr(torch, case.weights_dtype)
    model = models.load_model(
        case.model, weights=settings.weights, dtype=dtype, device=device, quantize=quantize,
        seed=settings.seed,
    )  # fmt: skip
    models.disable_dropout(model)
    return model


def train(
    model: Any,
    plain: Any,
    case: Case,
    task: TokenTask,
    tokenizer: PreTrainedTokenizerBase | None,
    gate: StageGate,
    keeper: Keeper | None = None,
    roles: Roles | None = None,
) -> Training:
    """Through the engine that the settings name; the SFT stage of a pipeline first.

    `plain` is the base on a tree of its own, for PPO's roles where they are not given. A `keeper`
    is asked by the native engine.
    """
    from peftbench import ppo_roles, ppo_training, training, trl_engine

    settings, (*before, last) = case.settings, stages(case.method)
    if last == "ppo" and settings.reward == "true" and tokenizer is not None:
        check_truth_is_known(
            tokenizer, [pair.prompt for pair in task.train], settings.prompt_length
        )
    reference = reference_of(model, case)
    if before:
        gate.stage("sft")
        sft = replace(settings, learning_rate=settings.sft_learning_rate, time_budget_s=0.0)
        training.train(model, task, sft, "sft", SilentGate(), nullcontext(), keeper)
        reference = nullcontext()  # the model itself, which the second stage has not moved yet
    if settings.engine == "trl":
        return trl_engine.train(model, task, settings, last, gate, reference)
    with compiling(settings.compile) as compilation:
        if last == "ppo":
            if roles is None:
                roles = build_roles(model, plain, case, tokenizer, gate)
            else:  # made before the model was sharded, and trained
                if before:
                    ppo_roles.copy_trained(model, roles.reference)
                if roles.reward_model is not None:
                    gate.stage("reward_model")
            ppo_roles.train_roles(roles, task, settings)
            done = ppo_training.train(
                model, roles, task, settings, eos_id_of(model, tokenizer), gate, keeper,
                compilation,
            )  # fmt: skip
        else:
            done = training.train(model, task, settings, last, gate, reference, keeper, compilation)
        return replace(done, compilation=compilation.described())


def spread(
    model: Any,
    plain: Any,
    case: Case,
    tokenizer: PreTrainedTokenizerBase | None,
    device: torch.device,
) -> Roles | None:
    """Spread a case's model over the ranks; with it PPO's roles, made while its weights are whole.

    TRL's engine does it itself, as its trainers are made with a whole model.
    """
    if case.settings.engine == "trl":
        return None
    if not uses_ppo(case.method):
        sharding.shard_all([model], device)
        return None
    roles = build_roles(model, plain, case, tokenizer, SilentGate())
    for head in roles.heads():
        head.to(device)
    sharding.shard_all([model, *roles.trees()], device)
    return roles


def build_roles(
    model: Any,
    plain: Any,
    case: Case,
    tokenizer: PreTrainedTokenizerBase | None,
    gate: StageGate,
) -> Roles:
    """Who takes part in a case's PPO, on the weights as they are now."""
    from peftbench import ppo_roles

    return ppo_roles.build_roles(
        model, plain, case.adapter, case.settings, tokenizer, gate,
        after_sft=len(stages(case.method)) > 1,
    )  # fmt: skip


def steps_alone_s(
    model: Any, case: Case, task: TokenTask, training: Training, tokenizer: Any
) -> tuple[list[float], list[float]]:
    """Seconds of the timed steps, or PPO's updates, of all ranks; and when one makes the first of
    them alone: what its scaling is measured against."""
    from peftbench import ppo_training, trl_engine
    from peftbench import training as native

    settings = case.settings
    if training.ppo is None:
        train = trl_engine.train if settings.engine == "trl" else native.train
        alone_s = native.alone_step_s(train, model, task, settings, stages(case.method)[-1])
        return training.step_s[settings.warmup_steps :], alone_s[settings.warmup_steps :]
    alone_s = ppo_training.alone_update_s(
        model, training.ppo.roles, task, settings, eos_id_of(model, tokenizer)
    )
    together_s = ppo_training.update_s(training.ppo.history)
    warmup = settings.ppo_warmup_updates
    return together_s[warmup:], alone_s[warmup:]


def eos_id_of(model: Any, tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    """The tokenizer's, else the config's; of several the first."""
    found: Any = model.config.eos_token_id if tokenizer is None else tokenizer.eos_token_id
    first: int | None = found[0] if isinstance(found, list) else found
    return first


def quality_of(
    model: Any, case: Case, task: TokenTask, tokenizer: PreTrainedTokenizerBase | None
) -> Quality:
    """What the model scores on the held-out data."""
    return evaluation.evaluate(
        model, task, case.settings, eos_id_of(model, tokenizer),
        completes=samples_completions(case.method, case.settings.data),
    )  # fmt: skip


def task_scores(
    model: Any, case: Case, tokenizer: PreTrainedTokenizerBase | None, *, is_base: bool = False
) -> dict[str, TaskScore]:
    """What the model answers in the tasks of `--tasks`."""
    assert tokenizer is not None  # `check_settings` lets no tasks pass beside random weights
    context = models.model_context(case.model, case.settings.weights)
    if context is not None and case.adapter == "prefix" and not is_base:
        context -= case.settings.prefix_tokens  # learned positions count the prefix too
    with evaluation.evaluating(model, case.settings):
        return harness.score_tasks(model, tokenizer, case.settings, context)


def judge(
    case: Case,
    task: TokenTask,
    tokenizer: PreTrainedTokenizerBase | None,
    quality: Quality,
    base: Quality | None,
    training: Training,
) -> dict[str, float | int | None]:
    """What the truth and PPO's reward model say of the completions of held-out prompts."""
    found: dict[str, float | int | None] = {}
    if tokenizer is not None and case.settings.data == "tinywiki":
        found |= ppo_values.truth_values(case, task, tokenizer, quality, base)
    reward_model = None if training.ppo is None else training.ppo.roles.reward_model
    if reward_model is not None:
        with evaluation.evaluating(reward_model, case.settings):
            found |= ppo_values.opinion_values(reward_model, case, task, quality, base)
    return found


def reference_of(model: Any, case: Case) -> AbstractContextManager[None]:
    """A context in which the model, not yet trained, answers as the reference."""
    return nullcontext() if case.adapter == "full" else adapters.adapter_off(model)


def start_max_logit_difference(model: Any, case: Case, task: TokenTask) -> float:
    """Largest |adapted - base| logit over a few training rows, before any step."""
    device = next(model.parameters()).device
    batch = collate(task.train[:4], "chosen", device)
    with evaluation.evaluating(model, case.settings):
        adapted = forward_logits(model, batch, batch.completion_length)
        with reference_of(model, case):
            plain = forward_logits(model, batch, batch.completion_length)
    return float((adapted - plain)[batch.completion_mask].abs().max())


def merge_max_logit_difference(model: Any, case: Case, task: TokenTask) -> float | None:
    """Largest |merged - adapted| logit over a few held-out rows; None where the memory does not
    hold the merged copy beside the model: all else is measured already."""
    device = next(model.parameters()).device
    batch = collate(task.test[:4], "chosen", device)
    try:
        with evaluation.evaluating(model, case.settings):
            merged = adapters.merged(model, case.adapter).eval()
            adapted = forward_logits(model, batch, batch.completion_length)
            folded = forward_logits(merged, batch, batch.completion_length)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    return float((adapted - folded)[batch.completion_mask].abs().max())


def pairs_trained_on(training: Training, case: Case, task: TokenTask) -> tuple[TokenPair, ...]:
    """The pairs whose chosen side the policy read with gradients; PPO reads its own completions.

    A pipeline's SFT stage reads them all, another training as many as its time budget held.
    """
    if case.method == "ppo":
        return ()
    settings = case.settings
    steps = settings.steps if len(stages(case.method)) > 1 else len(training.step_s)
    return task.train[: steps * settings.batch_size * settings.gradient_accumulation]


def rows_trained_on(training: Training, case: Case, task: TokenTask) -> list[tuple[int, ...]]:
    """Token ids that the policy read with gradients: PPO its own completions."""
    rows = [] if training.ppo is None else list(training.ppo.rows_read)
    if case.method != "ppo":
        rows += [p.prompt + p.chosen for p in task.train]
    if stages(case.method)[-1] in ("dpo", "orpo"):
        rows += [p.prompt + p.rejected for p in task.train]
    return rows


def touched_rows(model: Any, rows_read: list[tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Masks over embedding rows that training could move: the others have no gradient.

    `rows_read` is what training read. A token embedding that is tied to the head has a gradient in
    every row, through the softmax.
    """
    ids = torch.tensor(sorted({token for row in rows_read for token in row}))
    longest = max(len(row) for row in rows_read)
    head = model.get_output_embeddings()
    rows = {}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Embedding):
            continue
        if head is not None and module.weight is head.weight:
            continue
        mask = torch.zeros(module.num_embeddings, dtype=torch.bool)
        if module is model.get_input_embeddings():
            mask[ids] = True
        else:  # learned positions; OPT's start at an offset
            offset = getattr(module, "offset", 0)
            mask[offset : offset + longest] = True
        rows[f"{name}.weight"] = mask
    return rows


def flops_per_token(
    model: Any,
    case: Case,
    task: TokenTask,
    training: Training,
    tokenizer: PreTrainedTokenizerBase | None,
) -> float | None:
    """Operations of the training for each token that it computes, forward and backward.

    Counted on the native loss of the first micro-batch, of PPO with its rollout and scoring. None
    where the memory no longer holds that: then all else is measured already.
    """
    from peftbench import ppo_training
    from peftbench.training import batch_loss, batch_of

    settings, method = case.settings, stages(case.method)[-1]
    one = replace(settings, gradient_accumulation=1)
    device = next(model.parameters()).device

    def step() -> None:
        bf16 = settings.dtype == "bfloat16"
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = batch_loss(
                model, batch, method, one,
                window_tokens=sum(len(pair.chosen) for pair in pairs),
                reference=torch.zeros(settings.batch_size, device=device),
            )  # fmt: skip
        torch.autograd.backward(loss)

    try:
        if training.ppo is not None:
            return ppo_training.flops_per_token(
                model, training.ppo.roles, task, settings, eos_id_of(model, tokenizer)
            )
        pairs = task.train[: settings.batch_size]
        batch = batch_of(pairs, METHODS[method].sides, device, training.shared_prompts)
        return count_flops(step) / batch.input_ids.numel()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return None


def time_machine(case: Case, parent: Parent) -> dict[str, Any]:
    """The case's device and its sentinels: what it does now, whatever is trained on it."""
    device = prepare_process(case.settings)
    phases = Phases(device, parent.phase)
    start_unix_s = time.time()
    phases.enter("sentinels")
    found = time_sentinels(device)
    phases.leave()
    reading = phases.readings["sentinels"]
    return {
        "device": device_name(device),
        "start_unix_s": start_unix_s,
        "seconds": reading.seconds,
        "other_cpu_ratio": values.other_cpu_ratio(reading),
        **found,
    }


def kl_of(model: Any, fresh_base: Any, quality: Quality, task: TokenTask, case: Case) -> float:
    """KL to the base on the policy's own samples; `full` is compared with a base loaded anew."""
    device = next(model.parameters()).device
    batch = collate(evaluation.sampled_pairs(task, quality.samples), "chosen", device)
    with evaluation.evaluating(model, case.settings):
        policy = completion_logprobs(model, batch)
        with reference_of(model, case):
            base_model = model if fresh_base is None else fresh_base.eval()
            base = completion_logprobs(base_model, batch)
    return evaluation.kl_to_base(policy, base, batch.completion_mask)


def device_uuid(device: torch.device) -> str | None:
    """By which NVML can find it: an index would mean another device there."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
