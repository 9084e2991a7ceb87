"""Quality on held-out data: text, preference pairs, the model's own samples.

Nothing here changes the model: it runs in eval mode without gradients and the mode is restored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from peftbench import rollout
from peftbench.batches import collate, completion_logprobs, last_columns
from peftbench.data.task import TokenPair, TokenTask
from peftbench.harness import TaskScore
from peftbench.head import token_logprobs

if TYPE_CHECKING:
    from peftbench.batches import Sides
    from peftbench.case import Settings

GAP_PAIRS = 64  # of each kind in the generalisation gap: a tenth of a second on a tiny model


@dataclass(frozen=True)
class TextScore:
    """Held-out text, by windows: the sums from which every text metric follows."""

    window_nll: list[float]  # nats, summed over the tokens that the window scores
    window_tokens: list[int]  # tokens that the window scores
    correct_tokens: int  # scored tokens that were the model's most likely one


@dataclass(frozen=True)
class PairScore:
    """Held-out pairs: summed log-probabilities of the two completions, in nats, in pair order."""

    chosen: list[float]
    rejected: list[float]
    chosen_tokens: list[int]
    rejected_tokens: list[int]

    def correct(self) -> list[bool]:
        """Whether the chosen completion has the higher mean log-probability a token."""
        return [
            c / n > r / m
            for c, r, n, m in zip(
                self.chosen, self.rejected, self.chosen_tokens, self.rejected_tokens, strict=True
            )
        ]

    def logratios(self) -> list[float]:
        return [c - r for c, r in zip(self.chosen, self.rejected, strict=True)]


@dataclass(frozen=True)
class ChosenLosses:
    """Chosen completions of some pairs: summed negative log-likelihoods, nats, and tokens."""

    nll: list[float]
    tokens: list[int]


@dataclass(frozen=True)
class GapScore:
    """What the generalisation gap is made of: equally many pairs of each kind."""

    trained: ChosenLosses
    held_out: ChosenLosses


@dataclass(frozen=True)
class Quality:
    """What one model scores on a task."""

    text: TextScore
    pairs: PairScore
    samples: list[list[int]]  # token ids of sampled completions of the first test prompts
    completions: list[list[int]]  # of more of them and up to their full length, to be judged
    tasks: dict[str, TaskScore] = field(default_factory=dict)  # of `--tasks`, by name

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Quality:
        return cls(
            TextScore(**data["text"]), PairScore(**data["pairs"]), data["samples"],
            data["completions"],
            {name: TaskScore(**score) for name, score in data.get("tasks", {}).items()},
        )  # fmt: skip


@contextmanager
def evaluating(model: Any, settings: Settings) -> Iterator[None]:
    """Eval mode, no gradients, the run's compute precision; the mode is restored."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    bf16 = settings.dtype == "bfloat16"
    try:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            yield
    finally:
        model.train(was_training)


def evaluate(
    model: Any, task: TokenTask, settings: Settings, eos_id: int | None, *, completes: bool
) -> Quality:
    """Score held-out text and pairs, and sample; `completes` also what is to be judged."""
    with evaluating(model, settings):
        return Quality(
            score_text(
                model, task.test_tokens, settings.eval_context, settings.eval_stride,
                settings.eval_batch_size,
            ),
            score_pairs(model, task.test, settings.eval_batch_size),
            sample(model, task.test[: settings.eval_samples], settings, eos_id),
            complete(model, task, settings, eos_id) if completes else [],
        )  # fmt: skip


def text_windows(tokens: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """(start, end, first scored) of each window, so that each token but the first is scored once.

    Windows of `context` tokens start every `stride`; a window scores what the one before did not
    reach, so all but the first have at least `context - stride` tokens before the first scored.
    """
    windows = []
    start, reached = 0, 1
    while reached < tokens:
        end = min(start + context, tokens)
        windows.append((start, end, reached))
        start, reached = start + stride, end
    return windows


def score_text(
    model: Any, tokens: Sequence[int], context: int, stride: int, batch_size: int
) -> TextScore:
    """Sliding-window negative log-likelihood of one long text, (N,) token ids."""
    device = next(model.parameters()).device
    ids = torch.tensor(tokens, device=device)
    nll: list[float] = []
    counts: list[int] = []
    correct = 0
    for group in _equal_shapes(text_windows(len(tokens), context, stride), batch_size):
        rows = torch.stack([ids[start:end] for start, end, _ in group])
        scored = group[0][1] - group[0][2]
        keep = last_columns(rows, scored + 1)
        logits = model(input_ids=rows, logits_to_keep=keep, use_cache=False).logits
        logits = logits[:, -(scored + 1) : -1]
        labels = rows[:, -scored:]
        nll += [float(x) for x in -token_logprobs(logits, labels).double().sum(-1)]
        counts += [scored] * len(group)
        correct += int((logits.argmax(-1) == labels).sum())
    return TextScore(nll, counts, correct)


def _equal_shapes(
    windows: list[tuple[int, int, int]], batch_size: int
) -> Iterator[list[tuple[int, int, int]]]:
    """Runs of windows with equal length and equal scored part, at most `batch_size` each."""
    group: list[tuple[int, int, int]] = []
    for window in windows:
        shape = (window[1] - window[0], window[1] - window[2])
        if group and (
            len(group) == batch_size
            or shape != (group[0][1] - group[0][0], group[0][1] - group[0][2])
        ):
            yield group
            group = []
        group.append(window)
    if group:
        yield group


def score_pairs(model: Any, pairs: Sequence[TokenPair], batch_size: int) -> PairScore:
    """Summed completion log-probabilities of both sides."""
    chosen, rejected = _completion_sums(model, pairs, "both", batch_size)
    return PairScore(
        chosen, rejected, [len(p.chosen) for p in pairs], [len(p.rejected) for p in pairs]
    )


def _completion_sums(
    model: Any, pairs: Sequence[TokenPair], sides: Sides, batch_size: int
) -> list[list[float]]:
    """Summed log-probabilities by side, in pair order; batches are of like lengths."""
    device = next(model.parameters()).device
    order = sorted(range(len(pairs)), key=lambda i: (len(pairs[i].chosen), len(pairs[i].prompt)))
    found = [[0.0] * len(pairs) for _ in range(2 if sides == "both" else 1)]
    for at in range(0, len(order), batch_size):
        rows = order[at : at + batch_size]
        batch = collate([pairs[i] for i in rows], sides, device)
        sums = completion_logprobs(model, batch).double().sum(-1).tolist()
        for side, start in zip(found, range(0, len(sums), len(rows)), strict=True):
            for i, value in zip(rows, sums[start : start + len(rows)], strict=True):
                side[i] = value
    return found


def score_gap(
    model: Any,
    trained_on: Sequence[TokenPair],
    task: TokenTask,
    held_out: PairScore,
    settings: Settings,
) -> GapScore | None:
    """Losses of pairs that training read, and of as many test pairs, whose scores are there.

    Both are spread evenly over their set. None where training read no chosen completion.
    """
    count = min(GAP_PAIRS, len(trained_on), len(task.test))
    if count == 0:
        return None
    pairs = [trained_on[i] for i in _spread(len(trained_on), count)]
    with evaluating(model, settings):
        (logprobs,) = _completion_sums(model, pairs, "chosen", settings.eval_batch_size)
    others = _spread(len(task.test), count)
    return GapScore(
        ChosenLosses([-x for x in logprobs], [len(pair.chosen) for pair in pairs]),
        ChosenLosses(
            [-held_out.chosen[i] for i in others], [held_out.chosen_tokens[i] for i in others]
        ),
    )


def _spread(size: int, count: int) -> list[int]:
    """`count` indices below `size`, evenly apart."""
    return [i * size // count for i in range(count)]


def sample(
    model: Any, pairs: Sequence[TokenPair], settings: Settings, eos_id: int | None
) -> list[list[int]]:
    """Completions of the pairs' prompts, seeded, as `rollout.sample` draws them: what is sampled is
    what `completion_logprobs` scores. They end with EOS or after `eval_sample_length` tokens.
    """
    generator = torch.Generator(next(model.parameters()).device).manual_seed(settings.seed)
    drawn = rollout.sample(
        model, [pair.prompt for pair in pairs], settings.eval_sample_length, 1.0,
        rollout.NO_EOS if eos_id is None else eos_id, generator,
    )  # fmt: skip
    return [list(ids) for ids in drawn.completions]


def complete(
    model: Any, task: TokenTask, settings: Settings, eos_id: int | None
) -> list[list[int]]:
    """Completions of the first `eval_completions` test prompts, seeded, drawn as PPO draws."""
    if eos_id is None:
        return []
    prompts = [pair.prompt for pair in task.test[: settings.eval_completions]]
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(settings.seed)
    # a token's step has no gradients and no long logits: four times the scored batch is as much
    size = 4 * settings.eval_batch_size
    found: list[list[int]] = []
    for at in range(0, len(prompts), size):
        drawn = rollout.sample(
            model, prompts[at : at + size], settings.completion_length, settings.ppo_temperature,
            eos_id, generator,
        )  # fmt: skip
        found += [list(ids) for ids in drawn.completions]
    return found


def kl_to_base(
    policy_logprobs: torch.Tensor, base_logprobs: torch.Tensor, mask: torch.Tensor
) -> float:
    """Mean k3 estimate of KL(policy || base), nats a token, over the policy's own samples (R, C).

    k3 = exp(d) - 1 - d with d = base - policy: unbiased and never negative.
    Source: Schulman 2020, http://joschu.net/blog/kl-approx.html
    """
    d = (base_logprobs - policy_logprobs).double()
    return float(((torch.expm1(d) - d) * mask).sum() / mask.sum())


def sampled_pairs(task: TokenTask, samples: Sequence[Sequence[int]]) -> list[TokenPair]:
    """The sampled completions in the place of the chosen ones, ready for `collate`."""
    return [
        TokenPair(pair.prompt, tuple(ids), tuple(ids))
        for pair, ids in zip(task.test, samples, strict=False)
    ]


def text_metrics(score: TextScore, test_bytes: int) -> dict[str, float]:
    """nll_per_token, perplexity, bits_per_byte, next_token_accuracy and standard errors."""
    n = sum(score.window_tokens)
    mean, se = mean_per_token(score.window_nll, score.window_tokens)
    metrics = {
        "nll_per_token": mean,
        "perplexity": math.exp(mean),
        "next_token_accuracy": score.correct_tokens / n,
        "bits_per_byte": mean * n / math.log(2) / test_bytes,
    }
    if se is not None:
        metrics |= {"nll_per_token_se": se, "perplexity_se": math.exp(mean) * se}
    return metrics


def mean_per_token(sums: Sequence[float], tokens: Sequence[int]) -> tuple[float, float | None]:
    """Mean a token and its standard error, None of one unit alone.

    A unit is a text whose tokens are summed: neighbouring tokens are not independent.
    """
    n, k = sum(tokens), len(sums)
    mean = math.fsum(sums) / n
    if k == 1:
        return mean, None
    squares = math.fsum((s - mean * t) ** 2 for s, t in zip(sums, tokens, strict=True))
    return mean, math.sqrt(squares * k / (k - 1)) / n


def gap_metrics(score: GapScore) -> dict[str, float]:
    """generalization_gap_nats_per_token and its standard error."""
    trained, trained_se = mean_per_token(score.trained.nll, score.trained.tokens)
    held_out, held_out_se = mean_per_token(score.held_out.nll, score.held_out.tokens)
    metrics = {"generalization_gap_nats_per_token": held_out - trained}
    if trained_se is not None and held_out_se is not None:
        metrics["generalization_gap_nats_per_token_se"] = math.hypot(trained_se, held_out_se)
    return metrics


def pair_metrics(score: PairScore) -> dict[str, float]:
    """preference_accuracy and its binomial standard error."""
    correct = score.correct()
    accuracy = sum(correct) / len(correct)
    return {
        "preference_accuracy": accuracy,
        "preference_accuracy_se": math.sqrt(accuracy * (1 - accuracy) / len(correct)),
    }


def task_metrics(score: TaskScore) -> dict[str, float | int | None]:
    """task_items, and the two accuracies of one task with their standard errors."""
    accuracy, se = _share(score.correct)
    norm, norm_se = (None, None) if score.correct_norm is None else _share(score.correct_norm)
    return {
        "task_items": len(score.correct),
        "task_accuracy": accuracy, "task_accuracy_se": se,
        "task_accuracy_norm": norm, "task_accuracy_norm_se": norm_se,
    }  # fmt: skip


def _share(outcomes: str) -> tuple[float, float | None]:
    """Share of ones, and its standard error; None of a single item."""
    n = len(outcomes)
    share = outcomes.count("1") / n
    return share, math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else None


def reward_margin(policy: PairScore, base: PairScore, beta: float) -> float:
    """Mean over pairs of beta x (policy log-ratio - base log-ratio), nats."""
    gaps = [p - b for p, b in zip(policy.logratios(), base.logratios(), strict=True)]
    return beta * math.fsum(gaps) / len(gaps)
