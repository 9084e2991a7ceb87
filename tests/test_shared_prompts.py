"""Both sides of a pair behind one prompt give what two rows give, or are not put there."""

from __future__ import annotations

import random
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen2Config,
)

from peftbench import adapters, training, values
from peftbench.batches import collate, token_counts
from peftbench.case import Case, Settings
from peftbench.data.task import TokenPair, TokenTask
from peftbench.shared_prompts import can_share_prompts, collate_shared

VOCABULARY = 61
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 128, "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS = {
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=64, n_layer=2, n_head=4),
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2),
    "gpt_neox": GPTNeoXConfig(**SIZES),
    "opt": OPTConfig(
        vocab_size=VOCABULARY, hidden_size=64, ffn_dim=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=64,
    ),
    "mistral, no window": MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=None),
}  # fmt: skip
NOT_SHARED = {
    "mistral": MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4),
    "bloom": BloomConfig(vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=4),
    "falcon": FalconConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        alibi=True,
    ),
}  # fmt: skip
CPU = torch.device("cpu")
SETTINGS = Settings(
    pairs=24, batch_size=4, warmup_steps=1, learning_rate=1e-3, device="cpu", rank=4, alpha=8
)


def build(config: Any) -> PreTrainedModel:
    torch.manual_seed(5)
    model = Auto.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 4  # wide enough for a token to hear the others
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def make_pairs(count: int, ragged: bool = True) -> tuple[TokenPair, ...]:
    draw = random.Random(3)

    def ids(longest: int) -> tuple[int, ...]:
        length = draw.randint(1, longest) if ragged else longest
        return tuple(draw.randrange(VOCABULARY) for _ in range(length))

    return tuple(TokenPair(ids(9), ids(7), ids(6 if ragged else 7)) for _ in range(count))


def make_task(ragged: bool = True) -> TokenTask:
    return TokenTask("random", "", make_pairs(SETTINGS.pairs, ragged), (), (), (), 0, None, 0, 0)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_logprobs_and_gradients_are_those_of_two_rows(name: str, ragged: bool):
    model, pairs = build(CONFIGS[name]), make_pairs(4, ragged)
    assert can_share_prompts(model, pairs, CPU)
    found = []
    for batch in (collate(pairs, "both"), collate_shared(pairs)):
        model.zero_grad()
        scored = batch.pair_logprobs(model, with_prompt=True)
        chosen, rejected = scored.completions.chunk(2)
        (chosen.sum() - 0.3 * rejected.sum() + 0.1 * scored.prompt.sum()).backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
        alone = batch.pair_logprobs(model).completions
        assert torch.allclose(alone, scored.completions, atol=1e-5)
        found.append((scored, gradients))
    (apart, gradients_apart), (together, gradients_together) = found
    assert torch.allclose(together.completions, apart.completions, atol=2e-5)
    assert torch.allclose(together.prompt, apart.prompt, atol=2e-5)
    assert torch.equal(together.prompt_mask, apart.prompt_mask)
    difference = (gradients_together - gradients_apart).norm()
    assert difference < 1e-5 * gradients_apart.norm()


def test_no_side_hears_of_the_other():
    """To the bit: a key that is masked counts 0."""
    model, pairs = build(CONFIGS["llama"]), make_pairs(4)
    other = tuple(replace(p, chosen=tuple((t + 7) % VOCABULARY for t in p.chosen)) for p in pairs)
    with torch.no_grad():
        one, two = (
            collate_shared(rows).pair_logprobs(model).completions for rows in (pairs, other)
        )
    assert torch.equal(one[4:], two[4:])
    assert not torch.allclose(one[:4], two[:4], atol=1e-2)


def test_a_row_by_hand():
    batch = collate_shared([TokenPair((5, 6), (8,), (9, 10)), TokenPair((7,), (1, 2), (3, 4))])
    assert batch.input_ids.tolist() == [[5, 6, 8, 0, 9, 10], [0, 7, 1, 2, 3, 4]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 2, 3], [0, 0, 1, 2, 1, 2]]
    assert batch.completion_mask.tolist() == [[1, 0], [1, 1], [1, 1], [1, 1]]
    assert (batch.prompt_length, batch.completion_length, batch.padded) == (2, 2, True)
    assert batch.attention_mask()[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],  # padding: its logits go nowhere
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 1, 1],
    ]
    assert batch.attention_mask()[1, 0, 0].int().tolist() == [1, 0, 0, 0, 0, 0]
    assert batch.predictors(with_prompt=False).tolist() == [1, 2, 1, 4]
    assert batch.predictors(with_prompt=True).tolist() == [0, 1, 2, 1, 4]
    assert not collate_shared([TokenPair((5,), (8,), (9,))]).padded


def test_rates_count_a_prompt_with_each_side_and_operations_once():
    pairs = make_pairs(5)
    real, computed = token_counts(pairs, "both", shared_prompts=True)
    assert real == int(collate(pairs, "both").attention_mask.sum())
    assert computed == collate_shared(pairs).input_ids.numel()
    assert computed < token_counts(pairs, "both")[1] == collate(pairs, "both").input_ids.numel()


@pytest.mark.parametrize("name", NOT_SHARED)
def test_a_model_that_does_not_follow_mask_and_positions_keeps_two_rows(name: str):
    assert not can_share_prompts(build(NOT_SHARED[name]), make_pairs(4), CPU)


def test_a_model_that_takes_positions_and_ignores_them_is_found_out():
    model = build(CONFIGS["llama"])
    forward = model.model.forward

    def deaf(*args: Any, position_ids: Any = None, **given: Any) -> Any:
        return forward(*args, **given)

    model.model.forward = deaf
    pairs = make_pairs(4, ragged=False)
    assert can_share_prompts(build(CONFIGS["llama"]), pairs, CPU)
    assert not can_share_prompts(model, pairs, CPU)


@pytest.mark.parametrize("adapter", ["prefix", "prompt"])
def test_virtual_tokens_keep_two_rows(adapter: str):
    model = adapters.attach(build(CONFIGS["llama"]), adapter, SETTINGS)
    assert not can_share_prompts(model, make_pairs(4), CPU)


def test_other_attention_keeps_two_rows():
    model = build(CONFIGS["llama"])
    model.set_attn_implementation("eager")
    assert not can_share_prompts(model, make_pairs(4), CPU)


def train(method: str, adapter: str, **changed: Any) -> training.Training:
    settings = replace(SETTINGS, **changed)
    model = build(CONFIGS["gpt2"])
    model = adapters.attach(model, adapter, settings)
    reference = nullcontext() if adapter == "full" else adapters.adapter_off(model)
    gate = training.SilentGate()
    return training.train(model, make_task(), settings, method, gate, reference)


@pytest.mark.parametrize(
    ("method", "adapter", "changed"),
    [
        ("dpo", "lora", {}),
        ("dpo", "full", {}),
        ("orpo", "lora", {}),
        ("orpo", "full", {"orpo_nll_on": "completion"}),
        ("orpo", "lora", {"gradient_accumulation": 2, "gradient_checkpointing": True}),
    ],
)
def test_a_training_is_the_same(method: str, adapter: str, changed: dict[str, Any]):
    once = train(method, adapter, **changed)
    twice = train(method, adapter, **changed, pair_prompts="twice")
    assert (once.shared_prompts, twice.shared_prompts) == (True, False)
    assert once.losses == pytest.approx(twice.losses, rel=1e-5)
    assert len(set(once.losses)) == len(once.losses)  # it moves


def test_sft_has_one_side_and_the_counts_follow_the_training():
    assert not train("sft", "lora").shared_prompts
    case = Case("tiny-gpt2", "lora", "dpo", SETTINGS)
    counts = {}
    for how in ("once", "twice"):
        done = train("dpo", "lora", pair_prompts=how)
        counts[how], _ = values.micro_batch_tokens(done, case, make_task())
    assert [real for real, _ in counts["once"]] == [real for real, _ in counts["twice"]]
    assert sum(n for _, n in counts["once"]) < sum(n for _, n in counts["twice"])
