"""Proximal Policy Optimization for language models: its arithmetic, no model runs here.

Letters: B completions, C completion columns. Every (B, C) tensor is aligned with the completion's
tokens: column t holds token t, its log-probability, and the value of the state *before* it. `mask`
is True where a token counts: all up to a completion's end, its EOS included.

Sources: [Z] Ziegler et al. 2019, https://arxiv.org/abs/1909.08593; [S] Schulman et al. 2017,
https://arxiv.org/abs/1707.06347; [G] Schulman et al. 2015, https://arxiv.org/abs/1506.02438;
[N] Huang et al. 2023, "The N Implementation Details of RLHF with PPO",
https://huggingface.co/blog/the_n_implementation_details_of_rlhf_with_ppo.
"""

from __future__ import annotations

import torch

WHITENING_EPS = 1e-8


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over all tokens that count, a scalar; at least one does."""
    return (values * mask).sum() / mask.sum()


def kl_estimates(
    logprobs: torch.Tensor, reference_logprobs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(k1, k2, k3) of KL(policy || reference) at each sampled token, nats, (B, C) each.

    With d = reference - policy: k1 = -d, unbiased and of either sign; k2 = d^2 / 2, biased;
    k3 = exp(d) - 1 - d, unbiased and never negative.
    Source: Schulman 2020, http://joschu.net/blog/kl-approx.html
    """
    d = reference_logprobs - logprobs
    return -d, 0.5 * d * d, torch.expm1(d) - d


def token_rewards(
    logprobs: torch.Tensor,
    reference_logprobs: torch.Tensor,
    scores: torch.Tensor,
    mask: torch.Tensor,
    kl_coef: float,
) -> torch.Tensor:
    """(B, C) rewards: -kl_coef x k1 at each token, and the completion's score at its last one.

    `scores` is (B,). k1, not k3: only k1's gradient through the returns is that of the KL. The
    score stands on the last token that counts (the EOS where there is one), so rewards, values and
    GAE share one mask.
    Source: [Z] section 2; [N] detail 13.
    """
    rewards = -kl_coef * kl_estimates(logprobs, reference_logprobs)[0] * mask
    last = mask.sum(-1, keepdim=True) - 1
    return rewards.scatter_add(-1, last, scores.to(rewards.dtype).unsqueeze(-1))


def advantages_and_returns(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimates and returns, (B, C) each, 0 where nothing counts.

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lambda A_{t+1}, backwards over the
    completion only; after its last token the next value is 0. Returns = A + V, before A is
    whitened.
    Source: [G] equations 11 and 16.
    """
    values = values * mask
    advantages = torch.zeros_like(values)
    following = next_value = torch.zeros_like(values[:, 0])
    for t in range(values.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = (delta + gamma * gae_lambda * following) * mask[:, t]
        advantages[:, t] = following
        next_value = values[:, t]
    return advantages, (advantages + values) * mask


def whiten(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Values that count shifted to mean 0 and scaled to variance 1, (B, C); 0 elsewhere.

    The variance is the biased one (divided by n), as in OpenAI's code; TRL divides by n - 1.
    Source: [N] detail 18.
    """
    scale = torch.rsqrt(masked_variance(values, mask) + WHITENING_EPS)
    return (values - masked_mean(values, mask)) * scale * mask


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    clip_range: float,
    tokens: int | torch.Tensor,
) -> torch.Tensor:
    """Clipped surrogate loss: sum over tokens of max(-A r, -A clip(r)), divided by `tokens`.

    r = exp(logprobs - old_logprobs). `tokens` counts those of the whole minibatch, so that the
    shares of its micro-batches add up to the mean over its tokens.
    Source: [S] equation 7.
    """
    ratio = torch.exp((logprobs - old_logprobs) * mask)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    losses = torch.max(-advantages * ratio, -advantages * clipped)
    return (losses * mask).sum() / tokens


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    clip_range: float,
    tokens: int | torch.Tensor,
) -> torch.Tensor:
    """Clipped value loss: half the sum over tokens of the larger squared error, over `tokens`.

    The new value may move the loss down only within `clip_range` of the old one.
    Source: [N] detail 20.
    """
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    losses = torch.max((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * (losses * mask).sum() / tokens


def clipped_tokens(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, mask: torch.Tensor, clip_range: float
) -> torch.Tensor:
    """How many tokens have a ratio outside 1 +- clip_range, a scalar."""
    ratio = torch.exp(logprobs - old_logprobs)
    return (((ratio - 1).abs() > clip_range) & mask).sum()


def explained_variance(
    values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """1 - Var(returns - values) / Var(returns) over the tokens that count, a scalar.

    1: the values are the returns; 0: they are no better than a constant; NaN for constant returns.
    """
    return 1 - masked_variance(returns - values, mask) / masked_variance(returns, mask)


def masked_variance(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Biased variance (divided by n) over all tokens that count, a scalar."""
    return masked_mean((values - masked_mean(values, mask)) ** 2, mask)


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of the distributions of (..., V) logits, (...)."""
    logprobs = torch.log_softmax(logits.float(), -1)
    return -(logprobs.exp() * logprobs).sum(-1)


def with_missing_eos(
    scores: torch.Tensor, ended: torch.Tensor, missing_eos: str, missing_eos_score: float
) -> torch.Tensor:
    """(B,) scores of completions; those that were cut off without an EOS as `missing_eos` says.

    replace: their score is `missing_eos_score` (Huang et al. 2024, arXiv 2403.17031); add: it is
    added to theirs (TRL subtracts a penalty); keep: theirs.
    """
    if missing_eos == "keep":
        return scores
    given = torch.full_like(scores, missing_eos_score)
    return torch.where(ended, scores, given if missing_eos == "replace" else scores + given)
