"""PPO's part of a record, and what is judged of completions, whatever the method."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

from peftbench.batches import collate
from peftbench.case import Case
from peftbench.data.task import TokenPair, TokenTask
from peftbench.evaluation import Quality, sampled_pairs
from peftbench.methods import uses_ppo
from peftbench.methods.reward import true_statement_ratios, truth_is_known, win_ratio
from peftbench.reward_model import ScalarModel, pair_accuracy
from peftbench.training import Training

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Values = dict[str, float | int | None]

# summed over the timed updates
_SECONDS = ("rollout_s", "score_s", "update_s")
# mean of the last tenth of the updates
_AT_THE_END = (
    "response_tokens", "eos_ratio", "reward_mean", "reward_std", "kl_k1", "kl_k3", "entropy",
    "clip_ratio", "value_loss", "explained_variance",
)  # fmt: skip
_OF_THE_REWARD_MODEL = (
    "reward_model_s", "reward_model_bytes", "reward_model_accuracy", "reward_model_score",
    "reward_model_score_base",
)  # fmt: skip
_OF_THE_TRUTH = ("true_reward", "true_reward_se", "true_reward_base", "true_reward_std_base")


def training_values(training: Training) -> Values:
    """What the loop itself saw; empty for another method."""
    if training.ppo is None:
        return {}
    history, roles = training.ppo.history, training.ppo.roles
    tail = history[-max(1, len(history) // 10) :]
    found: Values = {"episodes": len(training.ppo.rows_read)}
    for name in _SECONDS:
        rows = history[training.ppo.warmup_updates :]
        found[name] = math.fsum(row[name] or 0.0 for row in rows)
    for name in _AT_THE_END:
        seen = [row[name] for row in tail]
        known = [x for x in seen if x is not None]
        found[name] = statistics.fmean(known) if len(known) == len(seen) else None
    found["reference_bytes"] = roles.reference_bytes
    if roles.reward_model is not None:
        found["reward_model_bytes"] = roles.reward_model.own_bytes
    return found


def truth_values(
    case: Case,
    task: TokenTask,
    tokenizer: PreTrainedTokenizerBase,
    quality: Quality,
    base: Quality | None,
) -> Values:
    """tinywiki's true reward of the completions, the base's beside it, and who wins.

    Empty where a prompt was cut so short that it does not say whom it is about.
    """
    prompts = [pair.prompt for pair in task.test[: len(quality.completions)]]
    if not truth_is_known(tokenizer, prompts):
        return {}
    after = true_statement_ratios(tokenizer, prompts, quality.completions)
    found: Values = {"true_reward": statistics.fmean(after)}
    if len(after) > 1:
        found["true_reward_se"] = statistics.stdev(after) / math.sqrt(len(after))
    if base is not None:
        before = true_statement_ratios(tokenizer, prompts, base.completions)
        found["true_reward_base"] = statistics.fmean(before)
        found["true_reward_std_base"] = statistics.pstdev(before)
        if not (uses_ppo(case.method) and case.settings.reward == "true"):
            found["win_ratio"] = win_ratio(after, before)
    return found


def opinion_values(
    reward_model: ScalarModel,
    case: Case,
    task: TokenTask,
    quality: Quality,
    base: Quality | None,
) -> Values:
    """What PPO's reward model says of held-out pairs and completions; in eval mode already."""
    size = case.settings.eval_batch_size
    found: Values = {"reward_model_accuracy": pair_accuracy(reward_model, task.test, size)}
    for name, judged in (("reward_model_score", quality), ("reward_model_score_base", base)):
        if judged is not None:
            found[name] = mean_score(reward_model, sampled_pairs(task, judged.completions), size)
    return found


def mean_score(reward_model: ScalarModel, rows: list[TokenPair], batch_size: int) -> float:
    device = reward_model.head.weight.device
    scores: list[float] = []
    for at in range(0, len(rows), batch_size):
        batch = collate(rows[at : at + batch_size], "chosen", device)
        scores += reward_model.scores(batch).tolist()
    return statistics.fmean(scores)


def null_reasons(case: Case) -> dict[str, str]:
    """Why each value of this page that is not there is not."""
    method, settings = case.method, case.settings
    reasons: dict[str, str] = {}
    for name in (*_SECONDS, *_AT_THE_END, "episodes", "reference_bytes", *_OF_THE_REWARD_MODEL):
        reasons[name] = f"{method} does not sample: this is PPO's"
    if uses_ppo(method):
        for name in _OF_THE_REWARD_MODEL:
            reasons[name] = f"the reward is {settings.reward!r}, no reward model"
        reasons["explained_variance"] = "all returns are equal: there is no variance to explain"
    for name in _OF_THE_TRUTH:
        reasons[name] = "the truth of this text is not known"
    reasons["win_ratio"] = "no judge but the training's own reward knows this text"
    if not settings.measures_quality:
        random = "weights" if settings.weights == "random" else "ids"
        for name in (*_OF_THE_TRUTH, "win_ratio", "reward_model_accuracy", "reward_model_score",
                     "reward_model_score_base"):  # fmt: skip
            reasons[name] = f"random {random} (seed {settings.seed}): quality means nothing"
    return reasons
