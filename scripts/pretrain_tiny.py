"""Train the tiny base models of peftbench/tiny on tinywiki's first domain, from nothing.

    python scripts/pretrain_tiny.py tiny-gpt2 --output peftbench/tiny/tiny-gpt2
    python scripts/pretrain_tiny.py tiny-llama --output peftbench/tiny/tiny-llama

Writes config, weights (float32 safetensors), tokenizer and metadata.json. Both models share one
tokenizer, a byte-level BPE trained here on both domains: any text can be encoded, and every word of
the corpus is one token. The report at the end holds the model against the corpus's entropy floor.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peftbench.data import tinywiki

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EOS, PAD = "<|endoftext|>", "<|pad|>"
MAX_VOCABULARY = 640  # 256 bytes, 2 special tokens, and room to merge every word
WIDTH, LAYERS, HEADS = 128, 4, 4
INITIALIZER_RANGE = 0.08  # about 1/sqrt(WIDTH): the usual 0.02 is for widths of a thousand and more
POSITIONS = 512  # of the models
WINDOW, STRIDE = 256, 128  # of training rows and of the evaluation
ROPE_THETA = 100.0  # longest wavelength about POSITIONS; 10,000 is for contexts of thousands
BATCH_ROWS = 8
PEAK_LEARNING_RATE = 3e-3
STEPS = {"tiny-gpt2": 700, "tiny-llama": 700}
WARMUP_STEPS = 100


def build_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [a.text for n in tinywiki.DOMAINS for a in tinywiki.articles(n, "train", 4000, seed=0)]
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCABULARY,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        bos_token=EOS,
        pad_token=PAD,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def build_model(name: str, tokenizer: PreTrainedTokenizerFast) -> Any:
    """The untrained model: about a million parameters, widths multiples of 64 (4-bit blocks)."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if name == "tiny-gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(tokenizer),
                n_positions=POSITIONS,
                n_embd=WIDTH,
                n_layer=LAYERS,
                n_head=HEADS,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                initializer_range=INITIALIZER_RANGE,
                # GPT-2's own `gelu_new`, the same function, as one kernel instead of eight
                activation_function="gelu_pytorch_tanh",
                **ids,
            )
        )
        # Learned from noise, positions take most of the training before "the token before this one"
        # can be found; from sinusoids (Vaswani et al. 2017) that is a linear map from the start.
        model.transformer.wpe.weight.data = INITIALIZER_RANGE * sinusoids()
        return model
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=POSITIONS,
            hidden_size=WIDTH,
            intermediate_size=3 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            tie_word_embeddings=True,
            initializer_range=INITIALIZER_RANGE,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
            **ids,
        )
    )


def silence_layers(model: Any) -> None:
    """Zero what each layer adds to the residual stream: random, it would drown the embeddings."""
    for name, weight in model.named_parameters():
        if name.endswith(("c_proj.weight", "o_proj.weight", "down_proj.weight")):
            torch.nn.init.zeros_(weight)


def sinusoids() -> torch.Tensor:
    """(POSITIONS, WIDTH) sines and cosines of wavelengths from 2 pi to 2 pi 1000, of variance 1."""
    rates = 1000 ** -(torch.arange(WIDTH // 2) / (WIDTH // 2))
    angles = torch.arange(POSITIONS)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1) * math.sqrt(2)


def encode(tokenizer: PreTrainedTokenizerFast, articles: Sequence[tinywiki.Article]) -> list[int]:
    """The articles' ids, each followed by EOS."""
    rows: list[list[int]] = tokenizer([a.text for a in articles])["input_ids"]
    return [token for row in rows for token in [*row, tokenizer.eos_token_id]]


def training_batches(
    tokenizer: PreTrainedTokenizerFast, steps: int, seed: int
) -> Iterator[torch.Tensor]:
    """(BATCH_ROWS, WINDOW) ids of packed articles; no article comes twice but by chance."""
    needed = BATCH_ROWS * WINDOW
    article_seeds = itertools.count(1_000_000 * (seed + 1))
    stream: list[int] = []
    for _ in range(steps):
        while len(stream) < needed:
            stream += encode(tokenizer, tinywiki.articles(1, "train", 100, next(article_seeds)))
        yield torch.tensor(stream[:needed]).view(BATCH_ROWS, WINDOW)
        del stream[:needed]


def held_out_perplexity(
    model: Any, tokenizer: PreTrainedTokenizerFast, domain: int, count: int = 300
) -> tuple[float, float]:
    """(perplexity, its floor) on held-out articles joined by EOS, each token scored once.

    Windows of WINDOW tokens every STRIDE tokens; the text's first token is not scored.
    """
    articles = tinywiki.articles(domain, "test", count, seed=0)
    ids = torch.tensor(encode(tokenizer, articles))
    nats, scored_to = 0.0, 1
    model.eval()
    with torch.no_grad():
        for start in range(0, len(ids), STRIDE):
            window = ids[start : start + WINDOW]
            logits = model(input_ids=window[None]).logits[0, :-1]
            losses = torch.nn.functional.cross_entropy(logits, window[1:], reduction="none")
            nats += losses[scored_to - start - 1 :].sum().item()
            scored_to = start + len(window)
            if scored_to == len(ids):
                break
    model.train()
    scored = len(ids) - 1
    floor = sum(a.nats for a in articles) / scored
    return math.exp(nats / scored), math.exp(floor)


def learning_rate_ratio(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine to zero."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / (steps - WARMUP_STEPS)))


def train(model: Any, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int) -> None:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_ratio(step, steps)
    )
    # Half of the rows start at a random position, so that all learned positions get trained: with
    # a prefix adapter a window of 256 tokens reaches beyond position 255.
    generator = torch.Generator().manual_seed(seed)
    started_s = time.perf_counter()
    for step, ids in enumerate(training_batches(tokenizer, steps, seed)):
        offsets = torch.randint(0, POSITIONS - WINDOW + 1, (BATCH_ROWS, 1), generator=generator)
        offsets[: BATCH_ROWS // 2] = 0
        logits = model(input_ids=ids, position_ids=offsets + torch.arange(WINDOW)).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            report(model, tokenizer, step + 1, steps, loss.item(), started_s)


def report(
    model: Any, tokenizer: PreTrainedTokenizerFast, step: int, steps: int, loss: float,
    started_s: float,
) -> None:  # fmt: skip
    perplexity, floor = held_out_perplexity(model, tokenizer, domain=1, count=30)
    elapsed_s = time.perf_counter() - started_s
    left_s = elapsed_s * (steps - step) / step
    print(
        f"step {step:5d} of {steps}  loss {loss:.4f}  perplexity / floor"
        f" {perplexity / floor:.4f}  elapsed {elapsed_s:4.0f} s  left {left_s:4.0f} s",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=("tiny-gpt2", "tiny-llama"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, help=f"default: {STEPS}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--check", type=Path, help="a folder written before: exit with 1 if its weights differ"
    )
    options = parser.parse_args()
    steps = options.steps or STEPS[options.model]

    torch.manual_seed(options.seed)
    tokenizer = build_tokenizer()
    model = build_model(options.model, tokenizer)
    silence_layers(model)
    train(model, tokenizer, steps, options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    weights = (options.output / "model.safetensors").read_bytes()
    perplexity, floor = held_out_perplexity(model, tokenizer, domain=1)
    other_perplexity, other_floor = held_out_perplexity(model, tokenizer, domain=2)
    metadata = {
        "model": options.model,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "tokens": steps * BATCH_ROWS * WINDOW,
        "seed": options.seed,
        "domain_1_perplexity": perplexity,
        "domain_1_floor": floor,
        "domain_1_ratio": perplexity / floor,
        "domain_2_perplexity": other_perplexity,
        "domain_2_floor": other_floor,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "corpus_digest": tinywiki.corpus_digest(),
        "torch_version": torch.__version__.split("+")[0],
    }
    (options.output / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    print(json.dumps(metadata, indent=2))
    if options.check is not None:
        shipped = json.loads((options.check / "metadata.json").read_text())["weights_sha256"]
        same = shipped == metadata["weights_sha256"]
        print(f"{options.check}: {'the same weights' if same else f'OTHER weights, {shipped}'}")
        return 0 if same else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
