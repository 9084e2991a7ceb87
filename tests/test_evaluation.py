"""Quality numbers against independent computations, and evaluation that leaves no trace."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from peftbench import evaluation
from peftbench.batches import collate
from peftbench.case import Settings
from peftbench.data.task import TokenPair
from peftbench.evaluation import ChosenLosses, GapScore, PairScore, TextScore


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request):
    torch.manual_seed(0)
    if request.param == "gpt2":
        config = GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=2)
        return GPT2LMHeadModel(config).eval()
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tokens(n: int) -> list[int]:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(0, 97, (n,), generator=generator).tolist()


def greedy(model, ids: list[int], n: int, context: int) -> list[int]:
    """`ids` continued to `n` with the most likely token after the last `context - 1`."""
    with torch.no_grad():
        while len(ids) < n:
            ids = [*ids, model(torch.tensor([ids[1 - context :]])).logits[0, -1].argmax().item()]
    return ids


@pytest.mark.parametrize(
    ("n", "context", "stride"), [(100, 16, 8), (65, 64, 1), (17, 16, 5), (9, 32, 4)]
)
def test_each_token_but_the_first_is_scored_once(n, context, stride):
    scored = []
    for start, end, first in evaluation.text_windows(n, context, stride):
        assert 0 <= start < first < end <= n
        assert end - start <= context
        assert first == 1 or first - start >= context - stride
        scored += range(first, end)
    assert scored == list(range(1, n))


def test_text_score_equals_token_by_token_scoring(model):
    """Every scored token predicted alone from its own window, with plain transformers calls."""
    context, stride = 12, 5
    ids = greedy(model, tokens(1), 50, context)  # of random ids it would get none right
    score = evaluation.score_text(model, ids, context, stride, batch_size=3)
    expected = correct = 0.0
    for start, end, first in evaluation.text_windows(len(ids), context, stride):
        for at in range(first, end):
            with torch.no_grad():
                logits = model(torch.tensor([ids[start:at]])).logits[0, -1]
            expected -= torch.log_softmax(logits.double(), -1)[ids[at]].item()
            correct += logits.argmax().item() == ids[at]
    assert sum(score.window_nll) == pytest.approx(expected, rel=1e-5)
    assert sum(score.window_tokens) == 49
    assert score.correct_tokens == correct
    assert correct > 5


def test_pair_score_equals_scoring_each_row_alone_without_padding(model):
    pairs = [
        TokenPair(tuple(tokens(7)), tuple(tokens(5)), tuple(tokens(3))),
        TokenPair(tuple(tokens(2)), tuple(tokens(4)), tuple(tokens(9))),
        TokenPair(tuple(tokens(11)), tuple(tokens(6)), tuple(tokens(8))),
    ]
    with torch.no_grad():
        score = evaluation.score_pairs(model, pairs, batch_size=2)
    for i, pair in enumerate(pairs):
        for completion, got in ((pair.chosen, score.chosen[i]), (pair.rejected, score.rejected[i])):
            ids = torch.tensor([pair.prompt + completion])
            with torch.no_grad():
                logprobs = torch.log_softmax(model(ids).logits[0].double(), -1)
            start = len(pair.prompt)
            expected = sum(logprobs[start - 1 + k, t].item() for k, t in enumerate(completion))
            assert got == pytest.approx(expected, abs=2e-4)


def test_accuracy_compares_mean_not_summed_logprobs():
    # sums say rejected (-4 < -3) but a token of chosen has -1 and one of rejected -3
    score = PairScore(
        [-4.0, -1.0, -1.0, -1.0], [-3.0, -2.0, -2.0, -2.0], [4, 1, 1, 1], [1, 4, 1, 1]
    )
    assert score.correct() == [True, False, True, True]  # second: -1 a token against -0.5
    assert evaluation.pair_metrics(score) == {
        "preference_accuracy": 0.75,
        "preference_accuracy_se": pytest.approx(math.sqrt(0.75 * 0.25 / 4)),
    }


def test_text_metrics_by_hand():
    # windows of 2, 3 and 5 tokens with 4, 4 and 8 nats: mean 16 / 10 = 1.6
    metrics = evaluation.text_metrics(TextScore([4.0, 4.0, 8.0], [2, 3, 5], 4), test_bytes=20)
    assert metrics["nll_per_token"] == pytest.approx(1.6)
    assert metrics["perplexity"] == pytest.approx(math.exp(1.6))
    assert metrics["next_token_accuracy"] == pytest.approx(0.4)
    assert metrics["bits_per_byte"] == pytest.approx(16 / math.log(2) / 20)
    # residuals 4 - 3.2, 4 - 4.8 and 8 - 8: sqrt((0.64 + 0.64) * 3 / 2) / 10
    se = math.sqrt(1.28 * 3 / 2) / 10
    assert metrics["nll_per_token_se"] == pytest.approx(se)
    assert metrics["perplexity_se"] == pytest.approx(math.exp(1.6) * se)


def test_the_gap_is_held_out_minus_trained_on_loss_by_plain_transformers(model):
    """As many pairs of each kind, spread over their set; transformers' own loss on each alone."""
    pairs = [
        TokenPair(tuple(tokens(3 + n % 4)), tuple(tokens(2 + n % 5)), tuple(tokens(4)))
        for n in range(9)
    ]
    trained_on, test = pairs[:6], pairs[6:]
    task = SimpleNamespace(test=test)
    settings = Settings(eval_batch_size=2)
    model.train()
    with evaluation.evaluating(model, settings):
        held_out = evaluation.score_pairs(model, test, 2)
    score = evaluation.score_gap(model, trained_on, task, held_out, settings)
    assert model.training
    model.eval()
    means = []
    for kind in ([trained_on[0], trained_on[2], trained_on[4]], test):
        nll = 0.0
        for pair in kind:
            labels = torch.tensor([[-100] * len(pair.prompt) + list(pair.chosen)])
            with torch.no_grad():
                loss = model(torch.tensor([pair.prompt + pair.chosen]), labels=labels).loss
            nll += loss.double().item() * len(pair.chosen)
        means.append(nll / sum(len(pair.chosen) for pair in kind))
    found = evaluation.gap_metrics(score)
    gap = means[1] - means[0]
    assert abs(gap) > 1e-3  # else the sign could not be told
    assert found["generalization_gap_nats_per_token"] == pytest.approx(gap, abs=1e-5)
    assert score.trained.tokens == [len(trained_on[i].chosen) for i in (0, 2, 4)]
    assert evaluation.score_gap(model, (), task, held_out, settings) is None


def test_the_gaps_standard_error_by_hand():
    # 1.0 and 3.0 a token, each of 2 tokens: residuals of 2 about 2, sqrt((4 + 4) * 2) / 4 = 1
    spread = ChosenLosses([2.0, 6.0], [2, 2])
    even = ChosenLosses([9.0, 9.0], [3, 3])  # 3 a token, no residual
    found = evaluation.gap_metrics(GapScore(trained=spread, held_out=even))
    assert found == {
        "generalization_gap_nats_per_token": pytest.approx(1.0),
        "generalization_gap_nats_per_token_se": pytest.approx(1.0),
    }
    alone = ChosenLosses([4.0], [2])
    assert evaluation.gap_metrics(GapScore(alone, even)) == {
        "generalization_gap_nats_per_token": pytest.approx(1.0)
    }


def test_reward_margin_is_beta_times_the_gain_over_the_base():
    policy = PairScore([-1.0, -2.0], [-8.0, -2.0], [1, 1], [1, 1])  # log-ratios 7 and 0
    base = PairScore([-3.0, -2.0], [-4.0, -4.0], [1, 1], [1, 1])  # 1 and 2
    assert evaluation.reward_margin(policy, base, beta=0.5) == pytest.approx(0.5 * (6 - 2) / 2)


def test_kl_is_zero_for_the_same_model_and_k3_by_hand():
    logprobs = torch.tensor([[-1.0, -2.0]])
    mask = torch.tensor([[True, True]])
    assert evaluation.kl_to_base(logprobs, logprobs, mask) == 0.0
    # d = 0.5 and -1: (e^0.5 - 1 - 0.5 + e^-1 - 1 + 1) / 2
    base = logprobs + torch.tensor([[0.5, -1.0]])
    expected = (math.exp(0.5) - 1.5 + math.exp(-1.0)) / 2
    assert evaluation.kl_to_base(logprobs, base, mask) == pytest.approx(expected)


def test_samples_come_from_the_scored_distribution_whatever_the_models_own_config(model):
    """With top_k 1 in the model's config every draw would be the greedy one."""
    model.generation_config.top_k = 1
    model.generation_config.do_sample = False
    pairs = [TokenPair((1, 2, 3), (4,), (5,))] * 300
    settings = Settings(eval_sample_length=1)
    draws = [ids[0] for ids in evaluation.sample(model, pairs, settings, eos_id=None)]
    with torch.no_grad():
        p = torch.softmax(model(torch.tensor([[1, 2, 3]])).logits[0, -1], -1)
    counts = torch.bincount(torch.tensor(draws), minlength=97)
    # 300 draws from a nearly uniform distribution over 97: chi-square over 97 cells, 5 sigma
    chi2 = (((counts - 300 * p) ** 2) / (300 * p)).sum().item()
    assert chi2 < 96 + 5 * math.sqrt(2 * 96)
    assert len(set(draws)) > 50


def test_a_sample_ends_with_its_eos(model):
    pairs = [TokenPair((1, 2), (3,), (4,))] * 64
    for ids in evaluation.sample(model, pairs, Settings(eval_sample_length=40), eos_id=5):
        assert 5 not in ids[:-1]
        assert ids[-1] == 5 or len(ids) == 40


def test_evaluation_leaves_mode_gradients_and_random_state(model):
    model.train()
    model.zero_grad()
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    flags = [p.requires_grad for p in model.parameters()]
    torch.manual_seed(7)
    state = torch.get_rng_state()
    settings = Settings(eval_context=16, eval_stride=8, eval_samples=2, eval_sample_length=4)
    pairs = [TokenPair((1, 2), (3, 4), (5, 6)), TokenPair((1,), (3,), (5, 6, 7))]
    with evaluation.evaluating(model, settings):
        evaluation.score_text(model, tokens(40), 16, 8, 4)
        evaluation.score_pairs(model, pairs, 2)
        evaluation.sample(model, pairs, settings, eos_id=0)
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    model.eval()


def test_left_padding_does_not_change_a_rows_logprobs(model):
    from peftbench.batches import completion_logprobs

    short, long = TokenPair((9,), (8, 7), (6,)), TokenPair(tuple(tokens(20)), (8, 7), (6,))
    with torch.no_grad():
        alone = completion_logprobs(model, collate([short], "chosen"))
        beside = completion_logprobs(model, collate([short, long], "chosen"))
    assert torch.allclose(alone[0], beside[0], atol=1e-5)
