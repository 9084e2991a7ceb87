"""Small real tokenizers, made here: as GPT-2's, as LLaMA's, a chat model's, and one id a word."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from peftbench.data import tinywiki

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _byte_level(specials: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [a.text for a in tinywiki.articles(2, "train", 300, seed=3)]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@cache
def gpt2_like() -> PreTrainedTokenizerFast:
    """BOS, EOS and pad are one token, and none is put before a text."""
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_level([end]), bos_token=end, eos_token=end, pad_token=end
    )


@cache
def llama_like() -> PreTrainedTokenizerFast:
    """A BOS of its own before every text."""
    tokenizer = _byte_level(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@cache
def chat() -> PreTrainedTokenizerFast:
    """ChatML, whose end of a turn is EOS and pad."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=_byte_level(["<|im_start|>", "<|im_end|>"]),
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    made.chat_template = CHATML
    return made


def one_id_a_word(words: list[str]) -> PreTrainedTokenizerFast:
    """Id n + 1 is the n-th word; 0 is EOS."""
    vocabulary = {"<end>": 0} | {word: n for n, word in enumerate(words, 1)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
