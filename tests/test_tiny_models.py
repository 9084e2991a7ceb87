from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path

import pytest
import torch

import peftbench
from peftbench.data import tinywiki

NAMES = ("tiny-gpt2", "tiny-llama")
FOLDER = Path(peftbench.__file__).parent / "tiny"


@pytest.fixture(scope="module", params=NAMES)
def loaded(request):
    """(name, model, tokenizer) of a shipped model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = FOLDER / request.param
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return request.param, model, AutoTokenizer.from_pretrained(folder)


def metadata(name: str) -> dict:
    return json.loads((FOLDER / name / "metadata.json").read_text())


def perplexity_ratio(model, tokenizer, domain: int, count: int) -> float:
    """Perplexity / floor of held-out articles joined by EOS.

    Not the training script's sliding windows: every block of 128 tokens is scored behind the 128
    tokens before it, which is the same for windows of 256 tokens every 128.
    """
    articles = tinywiki.articles(domain, "test", count, seed=11)
    text = "".join(a.text + tokenizer.eos_token for a in articles)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(ids), 128):
            context = min(start, 128)
            block = ids[start - context : start + 128]
            logprobs = model(input_ids=block[None]).logits[0].log_softmax(-1)
            scored = range(max(context, 1), len(block))
            nats -= sum(logprobs[at - 1, block[at]].item() for at in scored)
    return math.exp((nats - sum(a.nats for a in articles)) / (len(ids) - 1))


def test_model_is_within_a_tenth_of_the_floor_of_its_own_domain(loaded):
    _, model, tokenizer = loaded
    # Sampling noise of the articles cancels: text and floor are of the same articles.
    assert 0.99 < perplexity_ratio(model, tokenizer, domain=1, count=200) < 1.10


def test_model_is_far_from_the_floor_of_the_other_domain(loaded):
    # Otherwise there would be nothing to fine-tune.
    _, model, tokenizer = loaded
    assert perplexity_ratio(model, tokenizer, domain=2, count=60) > 2.0


@pytest.mark.parametrize("name", NAMES)
def test_weights_were_trained_on_the_corpus_as_it_is_now(name):
    assert metadata(name)["corpus_digest"] == tinywiki.corpus_digest()


@pytest.mark.parametrize("name", NAMES)
def test_weights_file_is_the_one_that_the_metadata_describe(name):
    weights = (FOLDER / name / "model.safetensors").read_bytes()
    assert metadata(name)["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    assert len(weights) < 6e6


def test_base_model_does_not_know_the_facts_of_the_other_domain(loaded):
    _, model, tokenizer = loaded
    pairs = tinywiki.pairs(2, "test", 400, seed=0)
    right = 0
    with torch.no_grad():
        for pair in pairs:
            prompt = len(tokenizer(pair.prompt)["input_ids"])
            rows = torch.tensor(
                tokenizer([pair.prompt + pair.chosen, pair.prompt + pair.rejected])["input_ids"]
            )
            logprobs = model(input_ids=rows).logits[:, :-1].log_softmax(-1)
            taken = logprobs.gather(-1, rows[:, 1:, None])[:, prompt - 1 :, 0].mean(-1)
            right += bool(taken[0] > taken[1])
    # A fair coin's share of 400 has a standard deviation of 2.5 points, and the base may lean to
    # some values without a reason: 4 colours and 4 metals, sqrt(0.25 / 8) = 18 points at the most.
    assert 0.30 < right / len(pairs) < 0.70


def test_base_model_sometimes_tells_the_truth_about_the_other_domain(loaded):
    # Reinforcement learning needs a reward to explore from.
    _, model, tokenizer = loaded
    torch.manual_seed(0)
    pairs = tinywiki.pairs(2, "test", 128, seed=1)
    rows = tokenizer([p.prompt for p in pairs], return_tensors="pt", padding=False)["input_ids"]
    assert rows.shape[0] == 128  # prompts are of equal length: nothing to pad
    out = model.generate(
        rows, attention_mask=torch.ones_like(rows), do_sample=True, top_k=0, top_p=1.0,
        temperature=1.0, max_new_tokens=32, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    texts = tokenizer.batch_decode(out[:, rows.shape[1] :], skip_special_tokens=True)
    rewards = [
        tinywiki.true_statement_ratio(p.prompt, t) for p, t in zip(pairs, texts, strict=True)
    ]
    assert sum(rewards) / len(rewards) > 0.03


def test_tokenizer_reads_any_text_back(loaded):
    _, _, tokenizer = loaded
    text = "Ein Schiff\t→ \x00 naïve\r\n\n 🚢  <b>12,5</b> 中文 ' s  end "
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_pads_with_another_token_than_eos(loaded):
    _, model, tokenizer = loaded
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert len(tokenizer) == model.config.vocab_size


def test_both_models_have_the_same_tokenizer():
    one, two = ((FOLDER / name / "tokenizer.json").read_bytes() for name in NAMES)
    assert one == two


def test_every_word_is_one_token_that_the_base_model_has_met(loaded):
    _, _, tokenizer = loaded
    met = {
        token
        for a in tinywiki.articles(1, "train", 2000, seed=0)
        for token in tokenizer(a.text)["input_ids"]
    }
    for article in tinywiki.articles(2, "train", 500, seed=0):
        tokens = tokenizer(article.text)["input_ids"]
        assert len(tokens) == len(article.text.split()) + 2  # words, and two groups of newlines
        assert set(tokens) <= met


def test_prompt_and_completion_tokenize_apart_as_together(loaded):
    _, _, tokenizer = loaded
    for pair in tinywiki.pairs(2, "train", 100, seed=0):
        prompt, chosen, both = tokenizer([pair.prompt, pair.chosen, pair.prompt + pair.chosen])[
            "input_ids"
        ]
        assert prompt + chosen == both


def test_linear_layers_fit_blocks_of_64_and_training_is_deterministic(loaded):
    _, model, _ = loaded
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and "wte" not in name and "embed" not in name:
            assert all(size % 64 == 0 for size in weight.shape), name
    # GPT-2's `summary_first_dropout` belongs to a classification head that is not there.
    dropouts = {k: v for k, v in model.config.to_dict().items() if re.search("dropout$|pdrop$", k)}
    assert not any(dropouts[k] for k in dropouts if k != "summary_first_dropout"), dropouts
    assert 0.5e6 < sum(p.numel() for p in model.parameters()) < 3e6
