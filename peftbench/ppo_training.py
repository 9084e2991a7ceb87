"""The PPO loop: rollout, score, update, on one copy of the base.

Policy, reference, reward and value are trees of modules over the same frozen weights, so nothing is
switched. Passes over the base per update: the rollout (one over the prompts, then one token at a
time), policy and old values together, reference, reward; then forward and backward of policy and
value together, `ppo_epochs` times, where the first micro-batch's forward pass is the scoring's.
`full` has no frozen base: a frozen copy is its reference.

docs/ppo.md maps the 34 lines of the PPO checklist to the code here and its tests.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from peftbench import ranks, rollout
from peftbench.batches import Batch, collate, token_counts
from peftbench.compiling import Compilation, decoder_layers
from peftbench.data.task import TokenPair, TokenTask
from peftbench.errors import InvalidTrainingError, UserError
from peftbench.measuring.flops import count_flops
from peftbench.measuring.phases import synchronize
from peftbench.methods import ppo
from peftbench.methods.reward import check_finite, check_shape
from peftbench.ppo_roles import Roles, score_tokens, score_values
from peftbench.ranks import Ranks
from peftbench.rollout import Rollout
from peftbench.sharding import clip_gradients
from peftbench.training import (
    Gate,
    Keeper,
    SilentGate,
    StepClock,
    Training,
    TrainingState,
    budget_is_spent,
    build_optimizer,
    build_schedule,
    gradient_bytes,
    masks_from_lengths,
    rates_of,
    state_bytes,
)

if TYPE_CHECKING:
    from peftbench.case import Settings

ADAM_EPS = 1e-5  # source: N implementation details of RLHF with PPO, detail 28
# How far the ratio of the first minibatch may be from 1: rounding, nothing else.
RATIO_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
# And the mean log-probability of a drawn token, at sampling with its cache, from the scored one.
SAMPLING_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05}


ALONE_UPDATES = 2  # beside the warm-up


@dataclass(frozen=True)
class PPOOutcome:
    """What PPO leaves beside the model and its losses."""

    history: list[dict[str, float | int | None]]  # one row an update, warm-up included
    warmup_updates: int
    micro_batch_tokens: list[list[tuple[int, int]]]  # per update: (non-padding, padded) in training
    rows_read: list[tuple[int, ...]]  # prompt and completion of every episode
    roles: Roles  # as they stand when the training has ended


@dataclass
class Experience:
    """One update's episodes, scored. Tensors are (B, C), padded to the longest completion."""

    pairs: list[TokenPair]
    mask: torch.Tensor
    logprobs: torch.Tensor  # of the policy that sampled, teacher-forced
    values: torch.Tensor
    advantages: torch.Tensor  # whitened
    returns: torch.Tensor


@dataclass
class Kept:
    """A micro-batch that was scored with its graph: its learning needs no forward pass."""

    rows: list[int]
    logprobs: torch.Tensor
    values: torch.Tensor | None  # None: those of a value model, whose graph would be a second one


class PPO:
    """The state of one PPO training: policy, roles, optimiser, random state, history."""

    def __init__(
        self,
        model: Any,
        roles: Roles,
        task: TokenTask,
        settings: Settings,
        eos_id: int,
        compilation: Compilation | None = None,
    ) -> None:
        self.model, self.roles, self.task = model, roles, task
        self.compilation = compilation or Compilation()
        # Trees of the same modules that stay eager: compiled, a forward pass alone is no faster.
        self.eager_model, self.eager_value = model, roles.value_model
        # whether two micro-batches of the budget can have different shapes
        self.varies = eos_id >= 0 or len({len(p.prompt) for p in task.train}) > 1
        self.step_width = 0  # of the rollout's cache; 0: its token steps are not compiled
        if self.compilation.compiles:
            if rollout.has_plain_cache(model):
                longest = max(len(p.prompt) for p in task.train)
                self.step_width = longest + settings.completion_length
                self.compilation.layers["token step"] = len(decoder_layers(model))
            self.eager_model = rollout.same_modules(model)
            self.compilation.add("policy", model, dynamic=self.varies)
            if roles.value_model is not None:
                self.eager_value = rollout.same_modules(roles.value_model)
                self.compilation.add("value", roles.value_model, dynamic=self.varies)
        self.settings, self.eos_id = settings, eos_id
        self.device = next(model.parameters()).device
        self.policy_parameters = [p for p in model.parameters() if p.requires_grad]
        self.parameters = list(self.policy_parameters)
        if roles.value_head is not None:
            self.parameters += list(roles.value_head.parameters())
        if roles.value_model is not None:
            self.parameters += roles.value_model.own_parameters()
        self.own = ranks.current()  # each samples and learns its share of every micro-batch
        self.updates = settings.ppo_updates
        self.micro_batch = settings.ppo_micro_batch
        self.optimizer = build_optimizer(
            self.parameters, settings, settings.learning_rate, ADAM_EPS
        )
        steps = self.updates * settings.ppo_epochs * settings.ppo_minibatches
        self.schedule = build_schedule(self.optimizer, settings, steps)
        self.generator = torch.Generator(self.device)
        self.permutations = torch.Generator()
        self.clock = StepClock(self.device)
        self.losses: list[float] = []
        self.history: list[dict[str, float | int | None]] = []
        self.micro_batch_tokens: list[list[tuple[int, int]]] = []
        self.rows_read: list[tuple[int, ...]] = []
        self.grad_bytes = 0

    def as_kept(self) -> TrainingState:
        """What a `Keeper` is given. The reward model's head moves once, in the first update."""
        head = [] if self.roles.reward_model is None else self.roles.reward_model.head.parameters()
        return TrainingState(
            "ppo", self.updates, self.parameters, self.optimizer, self.schedule,
            others=[p.data for p in head],
        )  # fmt: skip

    def report(self, kept: TrainingState) -> None:
        """Bring what the keeper is given up to the last update."""
        kept.step, kept.history = len(self.history), self.history
        kept.losses = [torch.tensor(loss, dtype=torch.float64) for loss in self.losses]
        kept.tokens += sum(real for real, _ in self.micro_batch_tokens[-1])

    def go_on(self, kept: TrainingState) -> None:
        """Take over what the keeper has put back."""
        self.history = kept.history
        self.losses = [float(loss) for loss in kept.losses]

    def update(self, index: int) -> None:
        """One update: each part ends with the device's results on the host, its only wait."""
        started_s = time.perf_counter()
        sampled = self.roll_out(index)
        rolled_s = time.perf_counter()
        orders = self.orders(index)
        experience, row, kept = self.score(index, sampled, orders[0])
        scored_s = time.perf_counter()
        row |= self.learn(experience, orders, kept)
        ended_s = time.perf_counter()
        lengths = [len(c) for c in sampled.completions]
        self.rows_read += [p.prompt + p.chosen for p in sampled.pairs]
        self.history.append({
            "update": index,
            "rollout_s": rolled_s - started_s,
            "score_s": scored_s - rolled_s,
            "update_s": ended_s - scored_s,
            "episodes": len(lengths),
            "response_tokens": sum(lengths) / len(lengths),
            **row,
        })  # fmt: skip

    def roll_out(self, index: int) -> Rollout:
        """Sample one completion for each of the next prompts; the seed is the update's own.

        Of several ranks each samples a share, and all have all episodes.
        """
        settings, size = self.settings, self.settings.ppo_batch_size
        prompts = [p.prompt for p in self.task.train[index * size : (index + 1) * size]]
        self.generator.manual_seed(settings.seed * 100_003 + index)
        was_training = self.eager_model.training
        self.eager_model.eval()
        with torch.no_grad(), self.autocast():
            sampled = rollout.sample(
                self.eager_model, self.own.share_of(prompts), settings.completion_length,
                settings.ppo_temperature, self.eos_id, self.generator, self.step_width, self.own,
            )  # fmt: skip
        self.eager_model.train(was_training)
        if self.own.count == 1:
            return sampled
        on_host = replace(sampled, ended=sampled.ended.cpu(), logprobs=sampled.logprobs.cpu())
        return rollout.joined(ranks.gathered(on_host), self.device)

    def orders(self, index: int) -> list[list[int]]:
        """The episodes' order in each epoch of an update."""
        self.permutations.manual_seed(self.settings.seed * 100_003 + index)
        return [
            torch.randperm(self.settings.ppo_batch_size, generator=self.permutations).tolist()
            for _ in range(self.settings.ppo_epochs)
        ]

    def score(
        self, index: int, sampled: Rollout, order: list[int]
    ) -> tuple[Experience, dict[str, float | int | None], Kept]:
        """Old log-probabilities, values, reference and reward of what was sampled.

        `order` is the first epoch's. Its first micro-batch comes last and keeps its graph: nothing
        is held beside it, and nothing is computed twice.
        """
        settings, roles, pairs = self.settings, self.roles, sampled.pairs
        lengths = torch.tensor([[len(c)] for c in sampled.completions], device=self.device)
        mask = torch.arange(sampled.logprobs.shape[1], device=self.device) < lengths
        old, values, reference = (torch.zeros_like(sampled.logprobs) for _ in range(3))
        scores = torch.zeros(len(pairs), device=self.device)
        entropy = torch.zeros((), device=self.device)
        chunks = [
            order[at : at + self.micro_batch] for at in range(0, len(order), self.micro_batch)
        ]
        for chunk in reversed(chunks):
            rows = self.own.share_of(chunk)
            picked = torch.tensor(rows, device=self.device)
            batch = self.collate([pairs[i] for i in rows])
            width = batch.completion_length
            with torch.no_grad(), self.autocast():
                reference[picked, :width] = score_tokens(
                    roles.reference, batch, settings.ppo_temperature, None
                )[0]
                if roles.reward_model is not None:
                    scores[picked] = roles.reward_model.scores(batch)
                if self.eager_value is not None:
                    values[picked, :width] = score_values(self.eager_value, batch)
            is_kept = chunk is chunks[0]
            with torch.set_grad_enabled(is_kept), self.autocast():
                logprobs, found, logits = self.policy(batch, eager=not is_kept)
            old[picked, :width] = logprobs.detach()
            if found is not None:
                values[picked, :width] = found.detach()
            # row by row: a batch's worth of probabilities would be as large as its logits
            for row_logits, counts in zip(logits.detach(), batch.completion_mask, strict=True):
                entropy += (ppo.entropy(row_logits) * counts).sum()
            del logits
        kept = Kept(rows, logprobs, found)
        # what is another rank's is 0 here
        old, values, reference, scores, entropy = map(
            ranks.total, (old, values, reference, scores, entropy)
        )
        if roles.reward_model is not None and index == 0:
            # the policy has not moved: these are samples of the reference
            scores = roles.reward_model.normalise(scores)
        if roles.reward is not None:
            scores = roles.reward(sampled.prompts, sampled.completions)
        scores = check_shape(scores, len(pairs)).to(self.device)
        given = ppo.with_missing_eos(
            scores, sampled.ended, settings.missing_eos, settings.missing_eos_score
        )
        rewards = ppo.token_rewards(old, reference, given, mask, settings.ppo_kl_coef)
        advantages, returns = ppo.advantages_and_returns(
            rewards, values, mask, settings.ppo_gamma, settings.ppo_gae_lambda
        )
        k1, k2, k3 = (ppo.masked_mean(k, mask) for k in ppo.kl_estimates(old, reference))
        gap = ppo.masked_mean((sampled.logprobs - old).abs(), mask)
        means = torch.stack([
            gap, sampled.ended.float().mean(), scores.mean(), scores.std(correction=0), k1, k2, k3,
            entropy / mask.sum(), ppo.explained_variance(values, returns, mask),
        ])  # fmt: skip
        numbers = torch.cat([means, scores]).tolist()  # waits for the device
        check_finite(numbers[len(means) :])
        self.check_sampling(numbers[0])
        names = ("eos_ratio", "reward_mean", "reward_std", "kl_k1", "kl_k2", "kl_k3", "entropy",
                 "explained_variance")  # fmt: skip
        row: dict[str, float | int | None] = dict(zip(names, numbers[1 : len(means)], strict=True))
        if not math.isfinite(numbers[len(means) - 1]):
            row["explained_variance"] = None  # all returns are equal: nothing to explain
        experience = Experience(pairs, mask, old, values, ppo.whiten(advantages, mask), returns)
        return experience, row, kept

    def policy(
        self, batch: Batch, *, eager: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """(log-probabilities, values where they are a head's on the trunk, logits) in one pass."""
        model = self.eager_model if eager else self.model
        return score_tokens(model, batch, self.settings.ppo_temperature, self.roles.value_head)

    def rehearse(self) -> None:
        """Every pass of an update once, without a step: then everything is compiled."""
        for batch in self.rehearsal_batches(self.roll_out(0)):
            with self.autocast():
                logprobs, values, _ = self.policy(batch)
            torch.autograd.backward(logprobs.sum() if values is None else (logprobs + values).sum())
            if self.roles.value_model is not None:
                with self.autocast():
                    values = score_values(self.roles.value_model, batch)
                torch.autograd.backward(values.sum())
        self.optimizer.zero_grad(set_to_none=True)

    def rehearsal_batches(self, sampled: Rollout) -> list[Batch]:
        """A micro-batch with its completions as long as they may be, and where shapes vary a
        shorter one beside it."""
        full, found = self.settings.completion_length, []
        for length in (full, max(1, full // 2)) if self.varies else (full,):
            rows = sampled.pairs[: self.micro_batch]
            cut = [(p.prompt, (p.chosen + (0,) * length)[:length]) for p in rows]
            found.append(self.collate([TokenPair(p, c, c) for p, c in cut]))
        return found

    def collate(self, pairs: list[TokenPair]) -> Batch:
        """A micro-batch. For the compiler all are padded where some are: one graph, not two."""
        batch = collate(pairs, "chosen", self.device)
        return replace(batch, padded=True) if self.compilation.compiles and self.varies else batch

    def learn(
        self, experience: Experience, orders: list[list[int]], kept: Kept
    ) -> dict[str, float | int | None]:
        """A pass over the episodes in each of these orders; one optimiser step a minibatch."""
        settings, minibatch = self.settings, self.settings.ppo_minibatch
        sums: list[torch.Tensor] = []
        counts: list[tuple[int, int]] = []
        for order in orders:
            for at in range(0, len(order), minibatch):
                self.clock.mark()
                self.optimizer.zero_grad(set_to_none=True)
                first = None if sums else kept
                sums.append(self.minibatch(experience, order[at : at + minibatch], counts, first))
                ranks.add_gradients(self.parameters)
                if not self.losses and len(sums) == 1:
                    self.check_gradients()
                if settings.max_grad_norm > 0:
                    clip_gradients(self.parameters, settings.max_grad_norm)
                self.optimizer.step()
                self.schedule.step()
                self.clock.mark()
        self.micro_batch_tokens.append(counts)
        table = torch.stack(sums)
        table = torch.cat([ranks.total(table[:, :4]), ranks.largest(table[:, 4:])], dim=1)
        steps = table.tolist()  # waits for the device
        self.check_first_minibatch(steps[0])
        columns = [math.fsum(column) / len(steps) for column in zip(*steps, strict=True)]
        losses = [step[0] + settings.ppo_value_coef * step[1] for step in steps]
        for step, loss in enumerate(losses, start=len(self.losses) + 1):
            if not math.isfinite(loss):  # here, as nothing can be sampled from such a policy
                raise InvalidTrainingError(f"the loss is {loss} at step {step}")
        self.losses += losses
        names = ("policy_loss", "value_loss", "approx_kl", "clip_ratio")
        return dict(zip(names, columns, strict=False))

    def minibatch(
        self,
        experience: Experience,
        order: list[int],
        counts: list[tuple[int, int]],
        kept: Kept | None,
    ) -> torch.Tensor:
        """Gradients of this rank's share of a minibatch; (5,) policy loss, value loss, k3 of old
        and new, share of clipped tokens, and the largest |log ratio|. `kept` is its first
        micro-batch, if scored."""
        settings, size = self.settings, self.micro_batch
        tokens = sum(len(experience.pairs[i].chosen) for i in order)
        total = torch.zeros(5, device=self.device)
        for at in range(0, len(order), size):
            shares = [
                Ranks(rank, self.own.count).share_of(order[at : at + size])
                for rank in range(self.own.count)
            ]
            read = [token_counts([experience.pairs[i] for i in rows], "chosen") for rows in shares]
            counts.append((sum(real for real, _ in read), sum(padded for _, padded in read)))
            rows = shares[self.own.rank]
            batch = self.collate([experience.pairs[i] for i in rows])
            width, mask = batch.completion_length, batch.completion_mask
            picked = torch.tensor(rows, device=self.device)
            old, old_values, advantages, returns = (
                t[picked, :width]
                for t in (experience.logprobs, experience.values, experience.advantages,
                          experience.returns)
            )  # fmt: skip
            if kept is not None and kept.rows == rows:
                logprobs, values = kept.logprobs, kept.values
            else:
                with self.autocast():
                    logprobs, values, logits = self.policy(batch)
                del logits
            clip, coefficient = settings.ppo_clip_range, settings.ppo_value_coef
            policy = ppo.policy_loss(logprobs, old, advantages, mask, clip, tokens)
            own_model = self.roles.value_model
            if own_model is not None:
                torch.autograd.backward(policy)  # before the value's pass: one graph at a time
                with self.autocast():
                    values = score_values(own_model, batch)
            assert values is not None
            value = ppo.value_loss(values, old_values, returns, mask, clip, tokens)
            rest = coefficient * value
            torch.autograd.backward(policy + rest if own_model is None else rest)
            with torch.no_grad():
                # old minus new, as the sample came from the old policy
                k3 = (ppo.kl_estimates(old, logprobs)[2] * mask).sum() / tokens
                clipped = ppo.clipped_tokens(logprobs, old, mask, clip) / tokens
                total[:4] += torch.stack([policy.detach(), value.detach(), k3, clipped])
                total[4] = torch.maximum(total[4], ((logprobs - old) * mask).abs().max())
        return total

    def check_sampling(self, gap: float) -> None:
        """Raise RuntimeError unless what was sampled came from the policy that was scored."""
        if not gap <= SAMPLING_TOLERANCE[self.settings.dtype]:
            raise RuntimeError(
                f"the completions were not drawn from the policy that was scored: their"
                f" log-probabilities differ by {gap:.2g} a token"
            )

    def check_first_minibatch(self, step: list[float]) -> None:
        """Raise RuntimeError unless the policy of the first minibatch is the one that was scored.

        Then every ratio is 1, the approximate KL 0 and nothing clipped.
        """
        _, _, approx_kl, clip_ratio, log_ratio = step
        tolerance = RATIO_TOLERANCE[self.settings.dtype]
        if log_ratio > tolerance or approx_kl > tolerance or clip_ratio > 0:
            raise RuntimeError(
                f"the first minibatch's policy is not the one that was scored: log ratio up to"
                f" {log_ratio:.2g}, KL {approx_kl:.2g}, {clip_ratio:.1%} clipped"
            )

    def check_gradients(self) -> None:
        """Raise RuntimeError for a trained parameter without a gradient; count their bytes."""
        if any(p.grad is None for p in self.parameters):
            missing = sum(p.grad is None for p in self.parameters)
            raise RuntimeError(f"{missing} of {len(self.parameters)} parameters have no gradient")
        self.grad_bytes = gradient_bytes(self.parameters)

    def autocast(self) -> Any:
        bf16 = self.settings.dtype == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)


def update_s(history: list[dict[str, float | int | None]]) -> list[float]:
    """Seconds of each update, its rollout and scoring included."""
    parts = ("rollout_s", "score_s", "update_s")
    return [math.fsum(row[name] or 0.0 for name in parts) for row in history]


def alone_update_s(
    model: Any, roles: Roles, task: TokenTask, settings: Settings, eos_id: int | None
) -> list[float]:
    """Seconds of a training's first updates when this process makes them alone.

    Trains the model in place. The warm-up is that of the settings.
    """
    updates = min(settings.ppo_updates, settings.ppo_warmup_updates + ALONE_UPDATES)
    few = replace(settings, processes=1, pairs=updates * settings.ppo_batch_size, time_budget_s=0.0)
    done = train(model, roles, task, few, eos_id, SilentGate())
    assert done.ppo is not None
    return update_s(done.ppo.history)


@masks_from_lengths()
def flops_per_token(
    model: Any, roles: Roles, task: TokenTask, settings: Settings, eos_id: int | None
) -> float:
    """Operations of an update, rollout and scoring included, for each padded token of its epochs.

    Counted on one more micro-batch of it: all are alike but the first epoch's first, whose forward
    pass is the scoring's.
    """
    assert eos_id is not None, "train has refused it"
    model.train()
    size = settings.ppo_micro_batch
    one = replace(
        settings, ppo_batch_size=size, ppo_minibatch_size=size, gradient_accumulation=1, pairs=size
    )
    state, order = PPO(model, roles, task, one, eos_id), list(range(size))
    sampled: list[Rollout] = []
    scored: list[Experience] = []
    counts: list[tuple[int, int]] = []
    rollout_flops = count_flops(lambda: sampled.append(state.roll_out(0)))
    # an index above 0: the reward is normalised already
    score_flops = count_flops(lambda: scored.append(state.score(1, sampled[0], order)[0]))
    epoch_flops = count_flops(lambda: state.minibatch(scored[0], order, counts, None))
    batch = collate(state.own.share_of(sampled[0].pairs), "chosen", state.device)
    with torch.no_grad(), state.autocast():
        forward_flops = count_flops(lambda: state.policy(batch))
    epochs, micro_batches = settings.ppo_epochs, settings.ppo_batch_size // size
    flops = rollout_flops + score_flops + epochs * epoch_flops - forward_flops / micro_batches
    own = torch.tensor(flops, dtype=torch.float64, device=state.device)
    return ranks.total(own).item() / (epochs * counts[0][1])


@masks_from_lengths()
def train(
    model: Any,
    roles: Roles,
    task: TokenTask,
    settings: Settings,
    eos_id: int | None,
    gate: Gate,
    keeper: Keeper | None = None,
    compilation: Compilation | None = None,
) -> Training:
    """Train in place, one update for each `ppo_batch_size` prompts of the pairs.

    Raises: UserError without an EOS token: no completion could end.
    """
    if eos_id is None:
        raise UserError("ppo needs a model with an EOS token: without one no completion ends")
    model.train()
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    compilation = compilation or Compilation()
    if compilation.compiles:
        gate.stage("compile")
    state = PPO(model, roles, task, settings, eos_id, compilation)
    if compilation.compiles:
        state.rehearse()
    gate.reference_done()
    kept = state.as_kept()
    if keeper is not None:
        keeper.begin(kept)
        state.go_on(kept)
    started_s = time.perf_counter()
    for index in range(kept.step, state.updates):
        if index == settings.ppo_warmup_updates:
            synchronize(state.device)
            compilation.clock_starts()
            gate.warmed_up()
            started_s = time.perf_counter()
        state.update(index)
        if keeper is not None:
            state.report(kept)
            keeper.step_done(kept)
        timed = index >= settings.ppo_warmup_updates
        if timed and budget_is_spent(settings, started_s, state.device):
            break
    synchronize(state.device)
    gate.trained()
    compilation.clock_stops()
    state.optimizer.zero_grad(set_to_none=True)
    return Training(
        state.losses, state.clock.step_s(), state.grad_bytes, state_bytes(state.optimizer),
        rates_of(state.schedule, len(state.losses)),
        PPOOutcome(
            state.history, settings.ppo_warmup_updates, state.micro_batch_tokens, state.rows_read,
            roles,
        ),
    )  # fmt: skip
