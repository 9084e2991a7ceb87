"""The one native training loop: every method and adapter goes through it, so they compare.

The loop stands on accelerate (device placement, precision, clipping). Its clock belongs to the
caller: the loop says where a phase ends through a `Gate`, with the device synchronised.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.distributed.tensor import DTensor

from peftbench import ranks
from peftbench.batches import Batch, Sides, collate, token_counts
from peftbench.compiling import Compilation
from peftbench.data.task import TokenPair, TokenTask
from peftbench.errors import UserError
from peftbench.measuring.phases import synchronize
from peftbench.methods import METHODS, dpo, orpo, sft
from peftbench.sharding import check_gradients, is_sharded
from peftbench.shared_prompts import SharedBatch, can_share_prompts, collate_shared

if TYPE_CHECKING:
    from peftbench.case import Settings
    from peftbench.ppo_training import PPOOutcome

ADAM_BETAS = (0.9, 0.999)
ADAM_EPS = 1e-8


class Gate(Protocol):
    """The phase boundaries of a training, called by either engine."""

    def stage(self, name: str) -> None:
        """A phase that only some cases have begins: `sft`, `reward_model` or `compile`."""

    def prepared(self) -> None:
        """Batches and trainer are ready; called only where a reference pass follows."""

    def reference_done(self) -> None:
        """Reference log-probabilities are known; no optimiser step has been made."""

    def warmed_up(self) -> None:
        """The warm-up steps are done. Blocks until the parent says go: then the clock runs."""

    def trained(self) -> None:
        """The last step is done and the device synchronised: the clock stops."""


@dataclass(frozen=True)
class Training:
    """What a training leaves beside the model."""

    losses: list[float]  # mean loss of each optimiser step, warm-up included, nats
    step_s: list[float]  # wall time of each step, warm-up included; device events on a GPU
    grad_bytes: int  # of all gradients at the end of a backward pass
    optimizer_state_bytes: int  # moments and counters, wherever they lie
    learning_rates: list[float]  # of each optimiser step
    ppo: PPOOutcome | None = None
    compilation: dict[str, Any] | None = None  # what was compiled, and when
    shared_prompts: bool = False  # the sides of a pair were one row, their prompt read once


@dataclass
class TrainingState:
    """Where one stage of a training stands: with its case, all that is needed to go on."""

    stage: str  # sft, dpo, orpo or ppo
    steps: int  # of the whole stage: optimiser steps, of PPO its updates
    parameters: list[torch.nn.Parameter]  # those of the optimiser, in its order
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    step: int = 0  # steps done
    tokens: int = 0  # non-padding tokens that the policy has read
    losses: list[torch.Tensor] = field(
        default_factory=list
    )  # of each optimiser step, on the device
    history: list[dict[str, float | int | None]] = field(default_factory=list)  # PPO's, by update
    # beside what the optimiser moves: what the stage changed once and needs as it is
    others: list[torch.Tensor] = field(default_factory=list)


class Keeper(Protocol):
    """Who keeps a training while it runs. The benchmark has none: nothing writes in its clock."""

    def begin(self, state: TrainingState) -> None:
        """Before the first step: puts back what an interrupted run of this stage has left."""

    def step_done(self, state: TrainingState) -> None:
        """After each step."""


class SilentGate:
    """The gate of a training that is only a stage of another's phase: nobody is told."""

    def stage(self, name: str) -> None:
        pass

    def prepared(self) -> None:
        pass

    def reference_done(self) -> None:
        pass

    def warmed_up(self) -> None:
        pass

    def trained(self) -> None:
        pass


class StepClock:
    """Times steps without waiting for the device: CUDA events on a GPU, else the wall clock."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Called at the start and at the end of every step."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def step_s(self) -> list[float]:
        """Seconds of each step; the device must be synchronised."""
        ends = zip(self._marks[::2], self._marks[1::2], strict=True)
        if self._cuda:
            return [start.elapsed_time(end) / 1000 for start, end in ends]
        return [end - start for start, end in ends]


def micro_batches(
    pairs: tuple[TokenPair, ...], settings: Settings
) -> Iterator[list[list[TokenPair]]]:
    """The micro-batches of each optimiser step, in the task's order; a ragged rest is left out."""
    window = settings.batch_size * settings.gradient_accumulation
    for start in range(0, len(pairs) - window + 1, window):
        yield [
            list(pairs[at : at + settings.batch_size])
            for at in range(start, start + window, settings.batch_size)
        ]


@dataclass(frozen=True)
class Window:
    """What one optimiser step reads: its micro-batches, padded and on the device.

    Of several ranks the batches are this one's shares; the tokens are those of all.
    """

    batches: Sequence[Batch | SharedBatch]
    completion_tokens: int  # chosen completion tokens of all of them: SFT's normaliser
    tokens: int  # non-padding tokens of all of them
    nll_weights: Sequence[float]  # of each batch: what its mean NLL counts among the ranks' (ORPO)


def shares_prompts(model: Any, task: TokenTask, settings: Settings, method: str) -> bool:
    """Whether the sides of a pair are read in one row: where both are, and the model can."""
    if METHODS[method].sides != "both" or settings.pair_prompts != "once":
        return False
    device = next(model.parameters()).device
    return can_share_prompts(model, task.train[: settings.batch_size], device)


def batch_of(
    pairs: Sequence[TokenPair], sides: Sides, device: torch.device, shared_prompts: bool
) -> Batch | SharedBatch:
    """One micro-batch, as the training reads it."""
    return collate_shared(pairs, device) if shared_prompts else collate(pairs, sides, device)


def build_windows(
    task: TokenTask,
    settings: Settings,
    sides: Sides,
    device: torch.device,
    shared_prompts: bool = False,
) -> list[Window]:
    """All steps of the budget, so that no padding or copy to the device falls inside the clock."""
    own = ranks.current()
    return [
        Window(
            [batch_of(own.share_of(pairs), sides, device, shared_prompts) for pairs in window],
            sum(len(pair.chosen) for pairs in window for pair in pairs),
            sum(token_counts(pairs, sides)[0] for pairs in window),
            [nll_weight(own, pairs, settings.orpo_nll_on) for pairs in window],
        )
        for window in micro_batches(task.train, settings)
    ]


def nll_weight(own: ranks.Ranks, pairs: list[TokenPair], nll_on: str) -> float:
    """What makes the mean over the ranks of their mean NLL a token that of the whole batch."""
    prompts = nll_on == "all"

    def tokens(some: list[TokenPair]) -> int:
        return sum(len(p.chosen) + prompts * (len(p.prompt) - 1) for p in some)

    return own.count * tokens(own.share_of(pairs)) / tokens(pairs)


def reference_logratios(
    model: Any, windows: list[Window], reference: AbstractContextManager[None]
) -> list[torch.Tensor]:
    """Per micro-batch of the whole budget, (B,) log p(chosen) - log p(rejected) of the reference.

    The reference is the model before its first step with the adapter switched off: for `full`
    nothing is trained yet, so the model itself. Stored: 4 bytes a pair.
    """
    was_training = model.training
    model.eval()
    with torch.no_grad(), reference:
        rows = [dpo.logratios(model, batch) for window in windows for batch in window.batches]
    model.train(was_training)
    return rows


def build_optimizer(
    trained: list[torch.nn.Parameter],
    settings: Settings,
    learning_rate: float,
    eps: float = ADAM_EPS,
) -> torch.optim.Optimizer:
    """AdamW over these parameters, in its fused form: the others read their step counter with
    `.item()`, on a GPU a wait for the device in every step."""
    if not trained:
        raise RuntimeError("nothing to train: no parameter requires a gradient")
    if settings.optimizer == "paged-adamw-8bit":
        if not trained[0].is_cuda:
            raise UserError("paged-adamw-8bit pages between a GPU and its host: on a CPU use adamw")
        import bitsandbytes

        optimizer: torch.optim.Optimizer = bitsandbytes.optim.PagedAdamW8bit(
            trained, lr=learning_rate, eps=eps, weight_decay=settings.weight_decay
        )
        return optimizer
    # those of a sharded model and those that each rank has whole do not go into one call
    kinds = [[p for p in trained if isinstance(p, DTensor) == sharded] for sharded in (True, False)]
    groups = [{"params": parameters} for parameters in kinds if parameters]
    return torch.optim.AdamW(
        groups, lr=learning_rate, betas=ADAM_BETAS, eps=eps,
        weight_decay=settings.weight_decay, fused=True,
    )  # fmt: skip


def build_schedule(
    optimizer: torch.optim.Optimizer, settings: Settings, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear to zero over so many steps, or constant; no learning-rate warm-up."""
    if settings.schedule == "linear":
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


def rates_of(schedule: torch.optim.lr_scheduler.LambdaLR, steps: int) -> list[float]:
    """The learning rates of a schedule's first steps."""
    return [float(schedule.base_lrs[0] * schedule.lr_lambdas[0](step)) for step in range(steps)]


def batch_loss(
    model: Any, batch: Batch | SharedBatch, method: str, settings: Settings, *,
    window_tokens: float, reference: torch.Tensor | None, nll_weight: float = 1.0,
) -> torch.Tensor:  # fmt: skip
    """One micro-batch's share of the optimiser step's loss."""
    accumulation = settings.gradient_accumulation
    if method == "sft":
        assert isinstance(batch, Batch)  # of one side
        return sft.loss(model, batch, window_tokens)
    if method == "dpo":
        assert reference is not None
        return dpo.loss(model, batch, reference, settings.beta, accumulation)
    if method == "orpo":
        return orpo.loss(
            model, batch, settings.orpo_lambda, settings.orpo_nll_on, accumulation, nll_weight
        )
    raise UserError(f"method {method!r} has no native loss; choose from: {', '.join(METHODS)}")


@contextmanager
def masks_from_lengths() -> Iterator[None]:
    """Let transformers build a given attention mask without looking whether it hides anything.

    It asks with `.item()` in every forward, for which a host waits until the GPU has caught up. Our
    batches know it from their lengths: those without padding give no mask at all.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

    def unread(*args: Any, **given: Any) -> Any:  # the library's interface, passed on as it is
        skip = given.pop("allow_is_causal_skip", True) and given.get("attention_mask") is None
        return sdpa_mask(*args, allow_is_causal_skip=skip, **given)

    ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = unread  # a local override, by the library's own means
    try:
        yield
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]


def with_one_graph(windows: list[Window]) -> list[Window]:
    """The windows, their batches all with a mask if any has padding: with and without one are two
    graphs to the compiler."""
    padded = any(batch.padded for window in windows for batch in window.batches)
    return [
        replace(window, batches=[replace(batch, padded=padded) for batch in window.batches])
        for window in windows
    ]


def narrowest_and_widest(windows: list[Window]) -> list[Batch | SharedBatch]:
    """Two batches, or the first where all are as wide."""
    batches = {b.input_ids.shape[1]: b for window in windows for b in window.batches}
    return [batches[width] for width in sorted({min(batches), max(batches)})]


@masks_from_lengths()
def train(
    model: Any,
    task: TokenTask,
    settings: Settings,
    method: str,
    gate: Gate,
    reference: AbstractContextManager[None],
    keeper: Keeper | None = None,
    compilation: Compilation | None = None,
) -> Training:
    """Train in place for the budget; the model is left in training mode.

    `reference` is a context in which the model answers as the reference (the adapter switched off).
    Nothing inside the timed window evaluates, writes, or waits for the device: losses stay on it
    until the clock has stopped. Of several ranks each calls this, and all leave the same model.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs

    device = next(model.parameters()).device
    compilation = compilation or Compilation()
    bf16 = settings.dtype == "bfloat16"
    accelerator = Accelerator(
        mixed_precision="bf16" if bf16 else "no", cpu=device.type == "cpu",
        # nothing that is not trained changes: buffers need not be sent before each pass
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )  # fmt: skip
    count = ranks.current().count
    model.train()
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    sides = METHODS[method].sides
    with accelerator.autocast():
        shared = shares_prompts(model, task, settings, method)
    windows = build_windows(task, settings, sides, device, shared)
    reference_rows: list[torch.Tensor] = []
    if METHODS[method].needs_reference:
        gate.prepared()
        with accelerator.autocast():
            reference_rows = reference_logratios(model, windows, reference)
    synchronize(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    sharded = is_sharded(model)
    # a sharded one reduces its gradients itself, after each micro-batch: they are never whole
    wrapped = accelerator.prepare_model(model, evaluation_mode=sharded)
    if compilation.compiles:
        gate.stage("compile")
        windows = with_one_graph(windows)
        rehearsed = narrowest_and_widest(windows)
        compilation.add("policy", model, dynamic=len(rehearsed) > 1)
        for batch in rehearsed:
            # without the other ranks, which may have another number of shapes
            with accelerator.no_sync(wrapped):
                loss = batch_loss(
                    wrapped, batch, method, settings, window_tokens=windows[0].completion_tokens,
                    reference=torch.zeros(settings.batch_size // count, device=device),
                )  # fmt: skip
                accelerator.backward(loss)
        for parameter in trained:
            parameter.grad = None
        synchronize(device)
    gate.reference_done()

    optimizer = build_optimizer(trained, settings, settings.learning_rate)
    schedule = build_schedule(optimizer, settings, settings.steps)
    state = TrainingState(method, len(windows), trained, optimizer, schedule)
    if keeper is not None:
        keeper.begin(state)
    clock = StepClock(device)
    started_s = time.perf_counter()
    for step, window in enumerate(windows[state.step :], start=state.step):
        if step == settings.warmup_steps:
            synchronize(device)
            compilation.clock_starts()
            gate.warmed_up()
            started_s = time.perf_counter()
        clock.mark()
        optimizer.zero_grad(set_to_none=True)  # here, so that the last step's can be counted
        step_loss = torch.zeros((), device=device)
        for micro, batch in enumerate(window.batches):
            at = step * settings.gradient_accumulation + micro
            last = micro == len(window.batches) - 1  # gradients are averaged once a step
            with nullcontext() if last or sharded else accelerator.no_sync(wrapped):
                loss = batch_loss(
                    wrapped, batch, method, settings,
                    window_tokens=window.completion_tokens / count,  # the ranks' mean is taken
                    reference=reference_rows[at] if reference_rows else None,
                    nll_weight=window.nll_weights[micro],
                )  # fmt: skip
                accelerator.backward(loss)
            step_loss += loss.detach()
        if sharded:
            check_gradients(trained)
        if settings.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
        optimizer.step()
        schedule.step()
        state.losses.append(step_loss)
        clock.mark()
        state.step, state.tokens = step + 1, state.tokens + window.tokens
        if keeper is not None:
            keeper.step_done(state)
        if step >= settings.warmup_steps and budget_is_spent(settings, started_s, device):
            break
    synchronize(device)
    gate.trained()
    compilation.clock_stops()
    grad_bytes = gradient_bytes(trained)
    optimizer.zero_grad(set_to_none=True)
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    losses = ranks.mean(torch.stack(state.losses)).tolist()
    rates = rates_of(schedule, len(losses))
    return Training(
        losses, clock.step_s(), grad_bytes, state_bytes(optimizer), rates, shared_prompts=shared
    )


ALONE_STEPS = 8  # some of these are outside the clock


def alone_step_s(
    engine: Callable[..., Training], model: Any, task: TokenTask, settings: Settings, method: str
) -> list[float]:
    """Seconds of a training's first steps when this process makes them alone, with whole batches.

    Trains the model in place. The warm-up is that of the settings.
    """
    window = settings.batch_size * settings.gradient_accumulation
    steps = min(settings.steps, settings.warmup_steps + ALONE_STEPS)
    few = replace(settings, processes=1, pairs=steps * window, time_budget_s=0.0)
    short = replace(task, train=task.train[: few.pairs])
    return engine(model, short, few, method, SilentGate(), nullcontext()).step_s


def budget_is_spent(settings: Settings, started_s: float, device: torch.device) -> bool:
    """Whether the time budget is over: for all ranks at once, by the clock of the last."""
    if settings.time_budget_s == 0:
        return False
    seconds = time.perf_counter() - started_s
    if ranks.current().count > 1:
        seconds = ranks.largest(torch.tensor(seconds, device=device)).item()
    return seconds >= settings.time_budget_s


def gradient_bytes(parameters: Iterable[torch.nn.Parameter]) -> int:
    """Bytes of the gradients that are there now."""
    return sum(p.grad.nbytes for p in parameters if p.grad is not None)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors that the optimiser keeps."""
    return sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
