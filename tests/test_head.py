"""A frozen head without the batch's logits: what it answers, with what gradient, and when."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM as Auto
from transformers import GPT2Config, GraniteConfig, LlamaConfig, OPTConfig, PreTrainedModel

from peftbench import adapters, head
from peftbench.batches import collate, completion_logprobs, sequence_logprobs
from peftbench.case import Settings
from peftbench.data.task import TokenPair
from peftbench.head import LabelLogprobs, label_logprobs, token_logprobs
from peftbench.measuring.flops import count_flops

VOCABULARY = 61
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 128, "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS = {
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=64, n_layer=2, n_head=4),
    "llama": LlamaConfig(**SIZES),
    "opt": OPTConfig(
        vocab_size=VOCABULARY, hidden_size=64, ffn_dim=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=64,
    ),
    # its logits are the head's divided by 4
    "granite": GraniteConfig(**SIZES, logits_scaling=4.0),
}  # fmt: skip
PAIRS = [
    TokenPair((3, 4, 5, 6), (7, 8, 9), (9, 8)),
    TokenPair((5, 6), (10, 11, 12, 13, 14), (12, 1)),
    TokenPair((2, 7, 9), (1,), (4, 4, 4)),
]


def make(name: str) -> PreTrainedModel:
    torch.manual_seed(3)
    model = Auto.from_config(CONFIGS[name], attn_implementation="sdpa")
    return model.requires_grad_(False).eval()


def with_lora(model: Any) -> Any:
    return adapters.attach(model, "lora", Settings(rank=4, alpha=8)).eval()


@pytest.fixture
def counted(monkeypatch):
    """How many hidden states each call of the function without logits was given."""
    rows: list[int] = []
    honest = LabelLogprobs.apply

    def apply(hidden: torch.Tensor, *others: Any) -> torch.Tensor:
        rows.append(hidden.shape[:-1].numel())
        return honest(hidden, *others)

    monkeypatch.setattr(LabelLogprobs, "apply", apply)
    return rows


@pytest.fixture
def parts_of_five_rows(monkeypatch):
    monkeypatch.setattr(head, "CPU_BYTES", 5 * 4 * VOCABULARY)


def exact(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """log p and its gradients in the hidden states, in float64, written out."""
    x, w = hidden.double(), weight.double()
    p = torch.softmax(x @ w.T + (0 if bias is None else bias.double()), -1)
    return p.gather(-1, labels[:, None])[:, 0].log(), w[labels] - p @ w


@pytest.mark.usefixtures("parts_of_five_rows")
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 13])
def test_values_and_gradients_are_the_exact_ones(rows, has_bias):
    torch.manual_seed(0)
    weight, hidden = torch.randn(VOCABULARY, 16), torch.randn(rows, 16, requires_grad=True)
    bias = torch.randn(VOCABULARY) if has_bias else None
    labels, upstream = torch.randint(VOCABULARY, (rows,)), torch.randn(rows)
    found = LabelLogprobs.apply(hidden, weight, bias, labels)
    found.backward(upstream)
    value, gradient = exact(hidden.detach(), weight, bias, labels)
    assert found.dtype == torch.float32
    assert (found - value).abs().max() < 1e-5
    assert (hidden.grad - upstream[:, None] * gradient).abs().max() < 1e-5


def test_bfloat16_is_as_near_to_the_exact_gradient_as_logits_are():
    """Where a label is all but certain too: what is left of its gradient is not rounded away."""
    torch.manual_seed(0)
    weight, labels = torch.randn(VOCABULARY, 256), torch.arange(40)
    weight, upstream = weight.bfloat16(), torch.rand(40)
    # from as likely as any to 1 - 1e-5
    start = torch.linspace(0, 1, 40)[:, None] * weight[labels].float() / 15

    def error(function: Any) -> torch.Tensor:
        hidden = start.bfloat16().requires_grad_()
        function(hidden).backward(upstream)
        gradient = upstream[:, None] * exact(hidden.detach(), weight, None, labels)[1]
        return (hidden.grad - gradient).norm(dim=-1) / gradient.norm(dim=-1)

    logits = error(lambda x: token_logprobs(torch.nn.functional.linear(x, weight), labels))
    ours = error(lambda x: LabelLogprobs.apply(x, weight, None, labels))
    assert ours.max() < 2 * logits.max() < 0.2
    assert ours.mean() < 1.1 * logits.mean()


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_training_step_is_that_of_the_logits(monkeypatch, counted, name, padded):
    model = with_lora(make(name))
    batch = collate(PAIRS if padded else PAIRS[:1], "chosen")
    weights = torch.rand(batch.completion_mask.shape)

    def step() -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        found = completion_logprobs(model, batch)
        (found * weights).sum().backward()
        return found.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad]

    found, gradients = step()
    assert counted == [batch.completion_mask.numel()]  # the head runs on these columns only
    monkeypatch.setattr(head, "answering_logprobs", lambda *_: nullcontext([]))
    expected, others = step()
    assert len(counted) == 1
    assert (found - expected).abs().max() < 1e-5
    assert any(g.abs().max() > 0 for g in others)
    for ours, theirs in zip(gradients, others, strict=True):
        assert (ours - theirs).abs().max() < 1e-5 * max(1.0, float(theirs.abs().max()))


def test_no_tensor_of_the_logits_size_waits_for_the_backward_pass():
    model = with_lora(make("llama"))
    batch, sizes = collate(PAIRS, "chosen"), []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append((tensor.numel(), tensor.shape[-1] if tensor.dim() else 0))
        return tensor

    def kept_logits() -> bool:
        sizes.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            completion_logprobs(model, batch).sum().backward()
        rows = batch.completion_mask.numel()
        return (rows * VOCABULARY, VOCABULARY) in sizes

    assert not kept_logits()
    model.get_output_embeddings().requires_grad_(True)
    assert kept_logits()


def test_no_more_rows_at_a_time_than_the_part_holds(monkeypatch, parts_of_five_rows):
    rows: list[int] = []
    honest = torch.nn.functional.linear

    def linear(x: torch.Tensor, *others: Any) -> torch.Tensor:
        rows.append(len(x))
        return honest(x, *others)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    hidden, weight = torch.randn(3, 4, 8), torch.randn(VOCABULARY, 8)
    LabelLogprobs.apply(hidden, weight, None, torch.zeros(3, 4, dtype=torch.long))
    assert rows == [5, 5, 2]


def test_a_head_that_trains_has_its_gradient_and_without_gradients_needs_no_logits(counted):
    model = make("gpt2").requires_grad_(True)
    batch = collate(PAIRS, "chosen")
    completion_logprobs(model, batch).sum().backward()
    assert counted == []
    assert model.get_output_embeddings().weight.grad.abs().max() > 0
    with torch.no_grad():
        completion_logprobs(model, batch)
    assert counted == [batch.completion_mask.numel()]


@pytest.mark.parametrize("says_so", [True, False])
def test_logits_that_the_model_changes_are_taken_as_it_changes_them(monkeypatch, counted, says_so):
    model, batch = make("granite"), collate(PAIRS, "chosen")
    if not says_so:
        monkeypatch.setattr(head, "CHANGES", ())
    with torch.no_grad():
        found = sequence_logprobs(model, batch)
        plain = torch.log_softmax(
            model(batch.input_ids, batch.attention_mask, batch.position_ids).logits, -1
        )
    assert bool(counted) is not says_so  # tried where the config does not tell
    expected = plain[:, :-1].gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    scored = found != 0
    assert scored.sum() == sum(len(p.prompt + p.chosen) - 1 for p in PAIRS)
    assert (found - expected)[scored].abs().max() < 1e-5


def test_a_model_that_answers_for_every_column_is_read_at_the_labels(counted):
    model, batch = make("llama"), collate(PAIRS, "chosen")
    expected = sequence_logprobs(model, batch)
    honest = model.forward
    model.forward = lambda logits_to_keep, **inputs: honest(**inputs)
    counted.clear()
    C = batch.completion_length
    found = completion_logprobs(model, batch)
    assert counted == []
    assert (found - expected[:, -C:] * batch.completion_mask).abs().max() < 1e-6


def test_the_head_is_itself_again_after_an_error():
    model = make("llama")
    labels = torch.zeros((1, 3), dtype=torch.long)
    with pytest.raises(ValueError, match="input_ids"):
        label_logprobs(model, labels, torch.arange(3))
    logits = model(torch.tensor([[1, 2, 3]])).logits
    assert logits.shape == (1, 3, VOCABULARY)


def test_the_operations_are_those_of_the_logits(monkeypatch):
    """Nothing is computed twice, and nothing is hidden from the counter."""
    model, batch = with_lora(make("llama")), collate(PAIRS, "chosen")

    def flops() -> float:
        return count_flops(lambda: completion_logprobs(model, batch).sum().backward())

    ours = flops()
    monkeypatch.setattr(head, "answering_logprobs", lambda *_: nullcontext([]))
    assert ours == flops() > 0
