"""Losses against arithmetic that the test shows, and batches against what they promise."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import peftbench.methods
from peftbench.batches import collate, masked_mean, token_counts
from peftbench.data.task import TokenPair
from peftbench.head import token_logprobs
from peftbench.methods import METHODS, stages
from peftbench.methods.dpo import dpo_loss
from peftbench.methods.orpo import log1m_exp, odds_ratio_loss, orpo_loss
from peftbench.methods.sft import sft_loss


def test_every_method_has_its_file_and_every_file_its_row():
    folder = Path(peftbench.methods.__file__).parent
    stages_of_all = {stage for method in METHODS for stage in stages(method)}
    # the reward model's arithmetic is no method
    assert {p.stem for p in folder.glob("*.py")} - {"__init__", "reward"} == stages_of_all


def test_sft_loss_is_the_summed_nll_over_the_windows_tokens():
    # rows of 3 and 1 completion tokens; log-probs -1 -2 -3 and -4; padding must not count
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -99.0, -99.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    # this micro-batch's share of a window of 8 tokens: (1 + 2 + 3 + 4) / 8
    assert sft_loss(logprobs, mask, 8).item() == pytest.approx(1.25)


def test_dpo_loss_is_log_2_when_policy_equals_reference():
    ratios = torch.tensor([3.0, -7.0])
    assert dpo_loss(ratios, ratios, beta=0.3).item() == pytest.approx(math.log(2))


def test_dpo_loss_matches_equation_7_by_hand():
    # margins 0.5 * (2 - 1) = 0.5 and 0.5 * (-1 - 3) = -2
    # -log sigmoid(0.5) = log(1 + e^-0.5), -log sigmoid(-2) = log(1 + e^2)
    expected = (math.log1p(math.exp(-0.5)) + math.log1p(math.exp(2.0))) / 2
    loss = dpo_loss(torch.tensor([2.0, -1.0]), torch.tensor([1.0, 3.0]), beta=0.5)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_dpo_loss_refuses_unequal_shapes():
    with pytest.raises(ValueError, match=r"\(2,\).*\(3,\)"):
        dpo_loss(torch.zeros(2), torch.zeros(3), beta=0.1)


def test_odds_ratio_by_hand():
    # mean probabilities 0.5 and 0.2: odds 1 and 0.25, ratio 4, -log sigmoid(log 4) = log(1 + 1/4)
    loss = odds_ratio_loss(torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.2)]))
    assert loss.item() == pytest.approx(math.log(1.25), rel=1e-6)


def test_orpo_loss_is_nll_plus_lambda_times_the_odds_ratio_term():
    chosen, rejected = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.2)])
    loss = orpo_loss(torch.tensor(1.5), chosen, rejected, orpo_lambda=0.25)
    assert loss.item() == pytest.approx(1.5 + 0.25 * math.log(1.25), rel=1e-6)


@pytest.mark.parametrize("x", [-1e-5, -0.1, -0.6931, -0.7, -5.0, -40.0])
def test_log1m_exp_is_stable_at_both_ends(x):
    expected = math.log(-math.expm1(x)) if x > -0.7 else math.log1p(-math.exp(x))
    assert log1m_exp(torch.tensor([x], dtype=torch.float64)).item() == pytest.approx(
        expected, rel=1e-9
    )


def test_a_certain_token_gives_finite_gradients():
    chosen = torch.tensor([0.0], requires_grad=True)
    odds_ratio_loss(chosen, torch.tensor([-1.0])).sum().backward()
    assert torch.isfinite(chosen.grad).all()


PAIRS = [
    TokenPair((5, 6, 7), (8, 9), (10, 11, 12, 13)),
    TokenPair((20,), (21, 22, 23), (24,)),
]


def test_collate_pads_prompts_left_and_completions_right():
    batch = collate(PAIRS, "both")
    assert batch.input_ids.tolist() == [
        [5, 6, 7, 8, 9, 0, 0],
        [0, 0, 20, 21, 22, 23, 0],
        [5, 6, 7, 10, 11, 12, 13],
        [0, 0, 20, 24, 0, 0, 0],
    ]
    assert batch.attention_mask.tolist() == [
        [1, 1, 1, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 1, 1],
        [0, 0, 1, 1, 0, 0, 0],
    ]
    assert batch.position_ids[1].tolist()[:6] == [0, 0, 0, 1, 2, 3]
    assert batch.completion_mask.sum(1).tolist() == [2, 3, 4, 1]
    assert batch.prompt_mask.sum(1).tolist() == [3, 1, 3, 1]


def test_masks_come_from_lengths_so_an_eos_that_is_the_pad_id_counts():
    pad_id_as_eos = [TokenPair((3,), (4, 0), (5, 0))]
    assert collate(pad_id_as_eos, "both").completion_mask.tolist() == [[True, True]] * 2


@pytest.mark.parametrize(
    ("sides", "real", "padded"),
    [
        ("chosen", 3 + 2 + 1 + 3, 2 * (3 + 3)),
        ("rejected", 3 + 4 + 1 + 1, 2 * (3 + 4)),
        ("both", 3 + 2 + 1 + 3 + 3 + 4 + 1 + 1, 4 * (3 + 4)),
    ],
)
def test_token_counts_equal_the_batch(sides, real, padded):
    batch = collate(PAIRS, sides)
    assert token_counts(PAIRS, sides) == (real, padded)
    assert (int(batch.attention_mask.sum()), batch.input_ids.numel()) == (real, padded)


def test_token_logprobs_by_hand():
    # logits 0 and log 3: probabilities 1/4 and 3/4
    logits = torch.tensor([[[0.0, math.log(3.0)]]])
    assert token_logprobs(logits, torch.tensor([[1]])).item() == pytest.approx(math.log(0.75))


def test_masked_mean_ignores_padding():
    values = torch.tensor([[1.0, 3.0, 99.0]])
    assert masked_mean(values, torch.tensor([[True, True, False]])).tolist() == [2.0]
