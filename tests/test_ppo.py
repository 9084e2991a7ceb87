"""PPO's arithmetic against numbers worked out in the tests."""

from __future__ import annotations

import math

import pytest
import torch

from peftbench.data import tinywiki
from peftbench.errors import InvalidTrainingError, UserError
from peftbench.methods import ppo, reward
from peftbench.models import load_tokenizer

# rows of 3 and 1 completion tokens
MASK = torch.tensor([[True, True, True], [True, False, False]])


def test_kl_estimates_by_hand():
    # d = reference - policy = -1 + 1.5 = 0.5
    k1, k2, k3 = ppo.kl_estimates(torch.tensor([[-1.5]]), torch.tensor([[-1.0]]))
    assert k1.item() == pytest.approx(-0.5)
    assert k2.item() == pytest.approx(0.125)
    assert k3.item() == pytest.approx(math.exp(0.5) - 1.5, rel=1e-6)


def test_k1_and_k3_estimate_the_same_kl():
    """Means over samples of one categorical distribution against the sum over its outcomes."""
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    k1, _, k3 = ppo.kl_estimates(p.log(), q.log())
    exact = (p * (p / q).log()).sum().item()
    assert (p * k1).sum().item() == pytest.approx(exact, rel=1e-6)
    assert (p * k3).sum().item() == pytest.approx(exact, rel=1e-5)


def test_rewards_are_minus_the_kl_and_the_score_at_the_last_token():
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, 9.0, 9.0]])
    reference = torch.tensor([[-2.0, -1.0, -3.5], [-4.0, -9.0, -9.0]])
    rewards = ppo.token_rewards(logprobs, reference, torch.tensor([10.0, -7.0]), MASK, kl_coef=0.1)
    # k1 = 1, -1, 0.5 -> -0.1, 0.1, -0.05 + 10; the second row ends after its first token
    assert rewards.tolist() == [pytest.approx([-0.1, 0.1, 9.95]), pytest.approx([-7.0, 0.0, 0.0])]


def test_gae_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 2.0], [3.0, 0.0, 0.0]])
    values = torch.tensor([[0.5, 1.0, -1.0], [1.0, 77.0, 77.0]])  # 77: after the end
    advantages, returns = ppo.advantages_and_returns(rewards, values, MASK, 0.9, 0.5)
    # row 0: delta = 1 + .9 x 1 - .5 = 1.4;  0 + .9 x -1 - 1 = -1.9;  2 + 0 + 1 = 3
    # A2 = 3;  A1 = -1.9 + .45 x 3 = -.55;  A0 = 1.4 + .45 x -.55 = 1.1525
    assert advantages[0].tolist() == pytest.approx([1.1525, -0.55, 3.0])
    # row 1: 3 + 0 - 1 = 2, nothing flows back from beyond its end
    assert advantages[1].tolist() == [2.0, 0.0, 0.0]
    assert returns[0].tolist() == pytest.approx([1.6525, 0.45, 2.0])
    assert returns[1].tolist() == [3.0, 0.0, 0.0]


def test_with_lambda_and_gamma_1_the_return_is_the_sum_of_the_rewards_to_come():
    rewards = torch.tensor([[1.0, 2.0, 4.0], [3.0, 0.0, 0.0]])
    values = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    _, returns = ppo.advantages_and_returns(rewards, values, MASK, 1.0, 1.0)
    assert returns[0].tolist() == pytest.approx([7.0, 6.0, 4.0])
    assert returns[1].tolist() == pytest.approx([3.0, 0.0, 0.0])


def test_whitening_uses_the_biased_variance_of_the_tokens_that_count():
    values = torch.tensor([[1.0, 2.0, 3.0], [6.0, 99.0, 99.0]])
    # mean 3; squares 4 + 1 + 0 + 9 = 14, divided by 4
    scale = 1 / math.sqrt(14 / 4)
    white = ppo.whiten(values, MASK)
    assert white[0].tolist() == pytest.approx([-2 * scale, -scale, 0.0])
    assert white[1].tolist() == pytest.approx([3 * scale, 0.0, 0.0])


def test_policy_loss_by_hand():
    # ratios 1.5 and 0.5 (clipped to 1.2 and 0.8), both with A = 2 and then with A = -2
    old = torch.tensor([[-1.0, -2.0, -0.5, -3.0, -1.0]])
    logprobs = old + torch.tensor([[1.5, 0.5, 1.5, 0.5, 9.0]]).log()
    advantages = torch.tensor([[2.0, 2.0, -2.0, -2.0, 5.0]])
    mask = torch.tensor([[True, True, True, True, False]])
    # max(-3, -2.4) = -2.4; max(-1, -1.6) = -1; max(3, 2.4) = 3; max(1, 1.6) = 1.6
    loss = ppo.policy_loss(logprobs, old, advantages, mask, 0.2, tokens=4)
    assert loss.item() == pytest.approx((-2.4 - 1 + 3 + 1.6) / 4)
    assert ppo.clipped_tokens(logprobs, old, mask, 0.2).item() == 4
    assert ppo.clipped_tokens(logprobs, old, mask, 0.5 + 1e-6).item() == 0


def test_value_loss_by_hand():
    values, old = torch.tensor([[6.0, -2.9, 9.0]]), torch.tensor([[5.0, -3.0, 0.0]])
    returns = torch.tensor([[7.0, -4.0, 0.0]])
    mask = torch.tensor([[True, True, False]])
    # first: (6-7)^2 = 1 against (5.2-7)^2 = 3.24; second: 1.1^2 = 1.21 both ways
    loss = ppo.value_loss(values, old, returns, mask, 0.2, tokens=2)
    assert loss.item() == pytest.approx(0.5 * (3.24 + 1.21) / 2)


def test_micro_batches_of_unequal_length_add_up_to_the_minibatch():
    """Mean over the minibatch's tokens: a mean of micro-batch means would be another number."""
    g = torch.Generator().manual_seed(1)
    logprobs, old, advantages = (torch.randn(2, 3, generator=g) for _ in range(3))
    tokens = int(MASK.sum())
    whole = ppo.policy_loss(logprobs, old, advantages, MASK, 0.2, tokens)
    parts = [
        ppo.policy_loss(logprobs[i], old[i], advantages[i], MASK[i], 0.2, tokens)
        for i in (slice(0, 1), slice(1, 2))
    ]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-6)


def test_explained_variance_by_hand():
    returns = torch.tensor([[1.0, 2.0, 3.0], [6.0, 99.0, 99.0]])
    assert ppo.explained_variance(returns, returns, MASK).item() == 1.0
    assert ppo.explained_variance(torch.full((2, 3), 3.0), returns, MASK).item() == 0.0
    # errors 0, 0, 0, 3: variance 9/4 - (3/4)^2 = 27/16, of returns 14/4
    values = torch.tensor([[1.0, 2.0, 3.0], [3.0, 0.0, 0.0]])
    expected = 1 - (27 / 16) / (14 / 4)
    assert ppo.explained_variance(values, returns, MASK).item() == pytest.approx(expected)


def test_entropy_by_hand():
    # probabilities 1/4 and 3/4
    expected = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
    assert ppo.entropy(torch.tensor([[0.0, math.log(3.0)]])).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("convention", "expected"),
    [("keep", [0.5, 2.0]), ("replace", [0.5, -1.0]), ("add", [0.5, 1.0])],
)
def test_a_completion_without_eos_is_scored_as_the_convention_says(convention, expected):
    scores, ended = torch.tensor([0.5, 2.0]), torch.tensor([True, False])
    assert ppo.with_missing_eos(scores, ended, convention, -1.0).tolist() == expected


def test_bradley_terry_by_hand():
    # margins 1 and -2: log(1 + e^-1) and log(1 + e^2)
    loss = reward.bradley_terry_loss(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 2.0]))
    expected = (math.log1p(math.exp(-1)) + math.log1p(math.exp(2))) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match=r"\(2,\).*\(3,\)"):
        reward.bradley_terry_loss(torch.zeros(2), torch.zeros(3))


def test_normalisation_gives_mean_0_and_standard_deviation_1():
    # mean 3, biased variance (4 + 0 + 4) / 3
    gain, bias = reward.normalisation(torch.tensor([1.0, 3.0, 5.0]))
    assert gain == pytest.approx(1 / math.sqrt(8 / 3))
    assert bias == pytest.approx(-3 * gain)
    assert reward.normalisation(torch.tensor([2.0, 2.0])) == (1.0, -2.0)


def test_rewards_that_cannot_be_used_are_refused():
    assert reward.check_shape(torch.tensor([1, 2]), 2).dtype == torch.float32
    with pytest.raises(UserError, match=r"of 2 completions has shape \(2, 1\); it must be"):
        reward.check_shape(torch.zeros(2, 1), 2)
    with pytest.raises(UserError, match="has shape list"):
        reward.check_shape([0.0, 0.0], 2)  # type: ignore[arg-type]
    with pytest.raises(InvalidTrainingError, match="completion 1 is nan"):
        reward.check_finite([0.0, math.nan])


def test_named_rewards():
    toy = reward.named_reward("count-token", None)
    token = reward.COUNTED_TOKEN_ID
    assert toy([[1], [1]], [[token, 0, token, 0], [0]]).tolist() == [0.5, 0.0]
    tokenizer = load_tokenizer("tiny-gpt2", "pretrained")
    first, *_ = tokenizer(reward.COUNTED_WORD)["input_ids"]
    found = reward.named_reward("count-token", tokenizer)([[1]], [[first, first, first + 1]])
    assert found.tolist() == [pytest.approx(2 / 3)]
    assert reward.named_reward("none", None)([[1]], [[2]]).tolist() == [0.0]
    with pytest.raises(UserError, match="judges text"):
        reward.named_reward("true", None)


def test_the_true_reward_refuses_prompts_that_lost_their_subject():
    tokenizer = load_tokenizer("tiny-gpt2", "pretrained")
    (pair,) = tinywiki.pairs(1, "train", 1, seed=0)
    whole = tokenizer(pair.prompt)["input_ids"]
    reward.check_truth_is_known(tokenizer, [whole], len(whole))
    with pytest.raises(UserError, match="prompt_length 8 cuts off whom a prompt is about"):
        reward.check_truth_is_known(tokenizer, [whole, whole[-8:]], 8)


def test_a_tie_is_half_a_win():
    assert reward.win_ratio([1.0, 0.5, 0.0], [0.0, 0.5, 1.0]) == 0.5
    assert reward.win_ratio([1.0, 1.0], [0.0, 0.5]) == 1.0
