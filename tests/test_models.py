"""The model table, the pre-flight check, loading, random weights, 4-bit bases."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from peftbench import models, provenance
from peftbench.adapters import attach, count_params
from peftbench.case import Settings
from peftbench.errors import UserError
from peftbench.models import (
    MODELS,
    check_model,
    disable_dropout,
    load_config,
    load_model,
    load_tokenizer,
    model_context,
    parameter_bytes,
    weights_hash,
)
from peftbench.quantization import (
    Quantization,
    dequantize_layer,
    layers_4bit,
    layers_8bit,
    quantization_of,
)

CPU = torch.device("cpu")
IDS = torch.arange(3, 23).reshape(2, 10)

GPT2 = GPT2Config(
    vocab_size=61, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1
)
LLAMA = LlamaConfig(
    vocab_size=61, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    bos_token_id=0, eos_token_id=1,
)  # fmt: skip


def save_model(config: Any, folder: Path) -> str:
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = {f"w{i}": i for i in range(config.vocab_size)}
    Tokenizer(WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))
    return str(folder)


@pytest.fixture(params=[GPT2, LLAMA], ids=["gpt2", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return save_model(request.param, tmp_path / "model")


@pytest.fixture(autouse=True)
def no_tokens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No login, no Hub cache and no asset cache of the person who runs the tests."""
    from huggingface_hub import constants

    for name in ("HUGGINGFACE_TOKEN", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("PEFTBENCH_CACHE", str(tmp_path / "cache"))


def load(model: str, **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "weights": "pretrained", "dtype": torch.float32, "device": CPU, "quantize": None,
        "seed": 0,
    }  # fmt: skip
    return load_model(model, **(arguments | changes))


# --- the table ---


def test_every_hub_row_pins_a_commit() -> None:
    hub_rows = {name: row for name, row in MODELS.items() if row.kind == "hub"}
    assert set(hub_rows) == {"gpt-2", "llama-7b"}
    for name, row in hub_rows.items():
        assert re.fullmatch(r"[0-9a-f]{40}", row.revision or ""), name


def test_reading_the_table_imports_no_torch() -> None:
    code = (
        "import sys, peftbench.models, peftbench.adapters\n"
        "peftbench.models.check_model('gpt-2', 'random')\n"
        "peftbench.models.model_context('llama-7b', 'random')\n"
        "heavy = {'torch', 'transformers', 'peft', 'bitsandbytes'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- sizes that are known from the papers' models ---


def test_gpt_2_has_its_known_parameter_count_with_random_weights_and_runs() -> None:
    model = load("gpt-2", weights="random", seed=3)
    # wte 50257x768, wpe 1024x768, 12 blocks of 7,087,872, ln_f 1536; the head is tied to wte
    assert count_params(model)[0] == 50257 * 768 + 1024 * 768 + 12 * 7_087_872 + 1536 == 124_439_808
    with torch.no_grad():
        logits = model(IDS).logits
    assert torch.isfinite(logits).all()
    assert model.lm_head.weight is model.transformer.wte.weight
    # GPT-2's residual layers start 1/sqrt(2 * 12) as wide as the others
    assert model.transformer.h[5].mlp.c_proj.weight.std().item() == pytest.approx(
        0.02 / 24**0.5, rel=0.02
    )


def test_llama_7b_has_its_known_parameter_counts_on_the_meta_device() -> None:
    model = load("llama-7b", weights="random", device=torch.device("meta"))
    assert count_params(model)[0] == 6_738_415_616
    adapted = attach(model, "lora", Settings(rank=8, targets="qv"))
    # 32 layers x (q, v) x (8 x 4096 + 4096 x 8)
    assert count_params(adapted)[1] == 32 * 2 * 2 * 8 * 4096 == 4_194_304


def test_smollm2_config_gives_the_checkpoints_parameter_count() -> None:
    model = load("smollm2-135m-instruct-q4", weights="random", device=torch.device("meta"))
    assert count_params(model)[0] == 134_515_008


# --- memory ---


@pytest.mark.parametrize(
    ("quantize", "size"),
    [
        (None, 4 * 124_439_808),
        # 4 linear layers a block: 768 x (2304 + 768 + 3072 + 3072) weights at half a byte
        ("nf4", 4 * 124_439_808 - 12 * 768 * 9216 * 7 // 2),
    ],
)
def test_weights_that_the_machine_cannot_hold_are_out_of_memory_before_they_are_made(
    monkeypatch: pytest.MonkeyPatch, quantize: Quantization | None, size: int
) -> None:
    monkeypatch.setattr(provenance, "free_memory_bytes", lambda: size - 1)
    with pytest.raises(MemoryError, match=r"the weights take 0\.\d GiB, and 0\.\d GiB of this"):
        load("gpt-2", weights="random", quantize=quantize)
    monkeypatch.setattr(provenance, "free_memory_bytes", lambda: size)
    assert load("gpt-2", weights="random", quantize=quantize) is not None


def test_a_checkpoint_that_the_machine_cannot_hold_is_out_of_memory(
    monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    monkeypatch.setattr(provenance, "free_memory_bytes", lambda: 1000)
    with pytest.raises(MemoryError, match="the weights take"):
        load(folder)


# --- loading ---


def test_a_local_folder_gives_the_saved_weights(folder: str) -> None:
    check_model(folder, "pretrained")
    model = load(folder)
    expected = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected(IDS).logits)
    assert not model.training
    assert model.config.use_cache is False


def test_random_weights_follow_the_seed_and_leave_torchs_random_state_alone(folder: str) -> None:
    state = torch.get_rng_state()
    first, again, other = (load(folder, weights="random", seed=s) for s in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), state)
    pairs = list(zip(first.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    weight, changed = (m.get_input_embeddings().weight for m in (first, other))
    assert not torch.equal(weight, changed)


def test_random_weights_are_set_like_transformers_sets_them(folder: str) -> None:
    """Every parameter and buffer: same spread as a model that transformers initialises itself."""
    ours = load(folder, weights="random", seed=5)
    config = load_config(folder, "random")
    torch.manual_seed(7)
    theirs = AutoModelForCausalLM.from_config(config)
    expected = dict(theirs.named_parameters()) | dict(theirs.named_buffers())
    found = dict(ours.named_parameters()) | dict(ours.named_buffers())
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if tensor.numel() > 1000:
            assert found[name].std().item() == pytest.approx(tensor.std().item(), rel=0.15), name
        else:
            assert torch.equal(found[name], tensor), name  # norms, biases, rotary frequencies


def test_random_weights_need_only_a_config(tmp_path: Path) -> None:
    LLAMA.save_pretrained(tmp_path)
    check_model(str(tmp_path), "random")
    assert count_params(load(str(tmp_path), weights="random"))[1] > 0
    assert load_tokenizer(str(tmp_path), "random") is None


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_a_folder_without_tokenizer_files_has_no_empty_tokenizer(
    tmp_path: Path, config: Any
) -> None:
    """transformers 5 makes one of vocabulary size 0 for GPT-2."""
    folder = save_model(config, tmp_path)
    assert load_tokenizer(folder, "pretrained").vocab_size == 61
    (tmp_path / "tokenizer.json").unlink()
    assert load_tokenizer(folder, "random") is None
    with pytest.raises(UserError):
        load_tokenizer(folder, "pretrained")
    assert "no tokenizer files" in fails(folder)


def test_random_gpt_2_has_no_tokenizer_without_the_hub() -> None:
    assert load_tokenizer("gpt-2", "random") is None
    assert load_tokenizer("smollm2-135m-instruct-q4", "random") is None


def test_bfloat16_base_is_stored_in_bfloat16(folder: str) -> None:
    model = load(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_model_context_comes_from_the_config(folder: str) -> None:
    assert model_context(folder, "pretrained") == 64
    assert model_context("gpt-2", "random") == 1024
    assert model_context("llama-7b", "random") == 4096


def test_gguf_folder_loads_and_quantises_like_safetensors(tmp_path: Path) -> None:
    import gguf

    source = load(save_model(replace_vocabulary(LLAMA), tmp_path / "full"))
    write_gguf(gguf, source, tmp_path / "gguf")
    check_model(str(tmp_path / "gguf"), "pretrained")
    read = load(str(tmp_path / "gguf"))
    with torch.no_grad():
        assert torch.allclose(read(IDS).logits, source(IDS).logits, atol=1e-5)
        four_bit = load(str(tmp_path / "gguf"), quantize="nf4")
        expected = load(str(tmp_path / "full"), quantize="nf4")
        assert torch.allclose(four_bit(IDS).logits, expected(IDS).logits, atol=1e-5)


# --- 8 bits ---


def test_eight_bit_weights_are_rounded_rows_over_their_largest(folder: str) -> None:
    """Codes round(127 w / largest of the row), with one scale a row; the head is spared."""
    model, full = load(folder, quantize="int8"), load(folder)
    layers = layers_8bit(model)
    assert len(layers) == {"gpt2": 2 * 4, "llama": 2 * 7}[model.config.model_type]
    assert model.is_loaded_in_8bit
    assert count_params(model)[0] == count_params(full)[0]
    added = 0
    for name, layer in layers.items():
        original = full.get_submodule(name)
        rows = original.weight.T if type(original).__name__ == "Conv1D" else original.weight
        scales = rows.half().abs().amax(1).float()
        codes = (rows.half().float() * (127 / scales[:, None])).round()
        assert torch.equal(layer.weight.data.float(), codes), name
        back = dequantize_layer(layer, torch.float32)
        assert type(back) is type(original)
        rounding = scales.max() * (0.5 / 127 + 2**-11)  # half a step, after a float16
        assert 0 < (back.weight - original.weight).abs().max() < rounding
        added += 4 * rows.numel() - (rows.numel() + 4 * len(scales))
    assert parameter_bytes(full) - parameter_bytes(model) == added


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_eight_bit_layer_multiplies_its_weights_forward_and_backward(
    folder: str, dtype: torch.dtype
) -> None:
    """On a CPU, in both modes alike: bitsandbytes itself rounds activations in eval mode only."""
    model = load(folder, quantize="int8", dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    for layer in layers_8bit(model).values():
        weight = layer.weight.data.float() * layer.weight.SCB[:, None] / 127
        x = torch.randn(3, 5, weight.shape[1], generator=generator).to(dtype).requires_grad_()
        with torch.no_grad():
            x[0, 0, 3] = 9.0  # above the outliers' threshold
        bias = None if layer.bias is None else layer.bias.float()
        expected = torch.nn.functional.linear(x.float(), weight, bias)
        gradient = torch.randn(expected.shape, generator=generator).to(dtype)
        tolerance = 1e-5 if dtype == torch.float32 else 0.02
        for training in (True, False):
            out = layer.train(training)(x)
            (found,) = torch.autograd.grad(out, x, gradient)
            scale = expected.abs().max()
            assert (out - expected).abs().max() < tolerance * scale
            back = gradient.float() @ weight
            assert (found - back).abs().max() < tolerance * back.abs().max()


def test_bitsandbytes_alone_answers_otherwise_in_eval_mode(folder: str) -> None:
    """The test above can fail: what `prepare_8bit` is for."""
    from bitsandbytes.autograd._functions import MatmulLtState

    model = load(folder, quantize="int8").eval()
    with torch.no_grad():
        kept = model(IDS).logits
        for layer in layers_8bit(model).values():
            layer.state.__class__ = MatmulLtState
        assert (model(IDS).logits - kept).abs().max() > 1e-4


def test_random_eight_bit_weights_are_the_quantised_random_ones(folder: str) -> None:
    eight_bit = load(folder, weights="random", quantize="int8", seed=4)
    load(folder, weights="random", seed=4).save_pretrained(Path(folder) / "random")
    expected = load(str(Path(folder) / "random"), quantize="int8")
    assert layers_8bit(eight_bit).keys() == layers_8bit(expected).keys()
    with torch.no_grad():
        assert torch.equal(eight_bit(IDS).logits, expected(IDS).logits)
    assert quantization_of(eight_bit) == {
        "type": "int8", "activations": "full", "outlier_threshold": None
    }  # fmt: skip


# --- 4 bits ---


def test_four_bit_base_is_nf4_with_double_quantisation(folder: str) -> None:
    """Also GPT-2's Conv1D layers: a QLoRA row over full-precision layers would be LoRA."""
    model, full = load(folder, quantize="nf4"), load(folder)
    layers = layers_4bit(model)
    assert len(layers) == {"gpt2": 2 * 4, "llama": 2 * 7}[model.config.model_type]
    assert not any("head" in name for name in layers)
    for layer in layers.values():
        state = layer.weight.quant_state
        assert (state.quant_type, state.blocksize, state.nested) == ("nf4", 64, True)
        assert layer.weight.dtype == torch.uint8
        assert layer.compute_dtype == torch.float32
    assert model.is_loaded_in_4bit
    assert count_params(model)[0] == count_params(full)[0]


def test_base_bytes_count_four_bit_storage_with_its_scales(tmp_path: Path) -> None:
    model = load(save_model(LLAMA, tmp_path), quantize="nf4")
    hidden, inner, kv = 64, 128, 32
    sizes = [hidden * hidden] * 2 + [kv * hidden] * 2 + [hidden * inner] * 3
    # weights at half a byte, one scale byte a block of 64, the scales' own float scale (one block
    # of 256 covers all of a layer here), codebooks of 16 and 256 floats, one float offset
    quantized = 2 * sum(n // 2 + n // 64 + 4 + 16 * 4 + 256 * 4 + 4 for n in sizes)
    full = 4 * (2 * 61 * hidden + (2 * 2 + 1) * hidden)  # embedding, head, norms
    assert parameter_bytes(model) == quantized + full


def test_random_four_bit_weights_are_the_quantised_random_ones(folder: str) -> None:
    """Built block by block, yet equal to quantising the whole model that the seed gives."""
    four_bit = load(folder, weights="random", quantize="nf4", seed=4)
    full = load(folder, weights="random", seed=4)
    full.save_pretrained(Path(folder) / "random")
    expected = load(str(Path(folder) / "random"), quantize="nf4")
    theirs = layers_4bit(expected)
    assert layers_4bit(four_bit).keys() == theirs.keys()
    for name, layer in layers_4bit(four_bit).items():
        assert torch.equal(layer.weight.data, theirs[name].weight.data), name
        assert layer.source_cls is theirs[name].source_cls
    with torch.no_grad():
        assert torch.equal(four_bit(IDS).logits, expected(IDS).logits)
    assert four_bit.is_loaded_in_4bit
    assert four_bit.config.quantization_config.bnb_4bit_use_double_quant


def test_dequantised_layer_is_near_the_original_and_of_its_class(folder: str) -> None:
    model, full = load(folder, quantize="nf4"), load(folder)
    for name, layer in layers_4bit(model).items():
        original = full.get_submodule(name)
        back = dequantize_layer(layer, torch.float32)
        assert type(back) is type(original)
        # NF4's widest gap between neighbours is 0.304 of a block's largest weight; half of it
        # bounds the rounding, and double quantisation moves the scale by a little more
        bound = 0.17 * original.weight.abs().max()
        assert (back.weight - original.weight).abs().max() <= bound
        assert (back.weight - original.weight).abs().mean() > 0


@pytest.mark.parametrize("size", [96, 80])
def test_sizes_that_nf4_gets_wrong_are_refused_in_one_line(tmp_path: Path, size: int) -> None:
    config = replace_sizes(GPT2, size)
    folder = save_model(config, tmp_path)
    for weights in ("pretrained", "random"):
        with pytest.raises(UserError, match=f"has {size} inputs and NF4 needs a multiple of 64"):
            load(folder, weights=weights, quantize="nf4")


def test_evaluation_does_not_cut_the_gradient_of_a_four_bit_base(folder: str) -> None:
    """bitsandbytes repacks CPU weights at an eval-mode forward; see prepare_4bit."""
    model = attach(load(folder, quantize="nf4"), "lora", Settings(seed=2))
    before = first_layer_gradient(model)
    model.eval()
    with torch.no_grad():
        model(IDS)
    after = first_layer_gradient(model)
    assert before.abs().max() > 0
    assert torch.equal(before, after)


def test_the_gradient_is_cut_where_the_trap_is_not_neutralised(tmp_path: Path) -> None:
    """The test above can fail: with the switch on, a CPU with AVX512-BF16 repacks the weights."""
    from bitsandbytes.functional import has_avx512bf16

    model = attach(load(save_model(LLAMA, tmp_path), quantize="nf4"), "lora", Settings(seed=2))
    for layer in layers_4bit(model).values():
        layer.support_avx512bf16_for_cpu = bool(has_avx512bf16())
    before = first_layer_gradient(model)
    model.eval()
    with torch.no_grad():
        model(IDS)
    after = first_layer_gradient(model)
    assert before.abs().max() > 0
    assert torch.equal(after, before) is not bool(has_avx512bf16())


def test_linear4bit_still_has_the_switch_that_we_turn_off() -> None:
    from bitsandbytes.nn import Linear4bit

    assert hasattr(Linear4bit(64, 64), "support_avx512bf16_for_cpu")


def test_disable_dropout_makes_training_mode_equal_to_eval_mode(tmp_path: Path) -> None:
    from transformers import OPTConfig

    configs = [
        GPT2Config(**GPT2.to_diff_dict() | {"attn_pdrop": 0.3, "resid_pdrop": 0.3}),
        LlamaConfig(**LLAMA.to_diff_dict() | {"attention_dropout": 0.3}),
        OPTConfig(
            vocab_size=61, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, word_embed_proj_dim=64, dropout=0.3, attention_dropout=0.3,
        ),
    ]  # fmt: skip
    for number, config in enumerate(configs):
        model = load(save_model(config, tmp_path / str(number)))
        with torch.no_grad():
            expected = model(IDS).logits
            model.train()
            assert not torch.equal(model(IDS).logits, expected)
            disable_dropout(model)
            assert torch.equal(model(IDS).logits, expected)


# --- the weights' hash ---


def test_weights_hash_is_the_files_sha256(folder: str) -> None:
    expected = hashlib.sha256((Path(folder) / "model.safetensors").read_bytes()).hexdigest()
    assert weights_hash(folder, "pretrained", 0) == expected
    assert weights_hash(folder, "random", 7) == "random, seed 7"


def test_big_files_are_hashed_once_and_again_when_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    big = tmp_path / "model.safetensors"
    with big.open("wb") as file:
        file.truncate(2**27 + 1)  # sparse
    first = weights_hash(str(tmp_path), "pretrained", 0)
    (memory,) = (tmp_path / "cache" / "hashes").iterdir()
    memory.write_text("remembered")
    assert weights_hash(str(tmp_path), "pretrained", 0) == "remembered"
    with big.open("r+b") as file:
        file.write(b"x")
    assert weights_hash(str(tmp_path), "pretrained", 0) not in (first, "remembered")


# --- bad input: one line each, before anything is loaded ---


def fails(model: str, weights: str = "pretrained") -> str:
    with pytest.raises(UserError) as caught:
        check_model(model, weights)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_unknown_name_lists_the_nearest_first() -> None:
    assert fails("tiny-gpt").startswith("unknown model 'tiny-gpt'; did you mean tiny-gpt2")


def test_folder_mistakes_are_named(tmp_path: Path) -> None:
    assert "no folder" in fails(str(tmp_path / "nothing"))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no config.json" in fails(str(empty))
    (empty / "adapter_config.json").write_text("{}")
    assert "it is an adapter" in fails(str(empty))
    LLAMA.save_pretrained(empty)
    assert "no safetensors weights" in fails(str(empty))
    (empty / "pytest_model.bin").write_bytes(b"")
    assert "pickle" in fails(str(empty))
    assert "give the folder" in fails(str(empty / "config.json"))
    (empty / "tokenizer.json").write_text("{}")
    (empty / "config.json").write_text("{")
    (empty / "model.safetensors").write_bytes(b"")
    assert "cannot read" in fails(str(empty))
    (empty / "config.json").write_text('{"quantization_config": {}}')
    assert "already quantised" in fails(str(empty))


def test_a_checkpoint_that_lacks_weights_is_refused_not_made_up(folder: str) -> None:
    from safetensors.torch import load_file, save_file

    path = Path(folder) / "model.safetensors"
    tensors = load_file(path)
    lost = next(name for name in tensors if "0.mlp" in name)
    del tensors[lost]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=re.escape(f"lacks 1 of the model's weights, among them {lost}")
    ):
        load(folder)


def test_a_truncated_checkpoint_gives_one_line(folder: str) -> None:
    path = Path(folder) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot load"):
        load(folder)


def test_a_model_that_does_not_generate_text_is_refused(tmp_path: Path) -> None:
    from transformers import T5Config

    T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="a t5 model does not generate text"):
        load(str(tmp_path), weights="random")


def test_a_models_own_code_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.MineConfig"}})
    )
    (tmp_path / "mine.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UserError, match="cannot load"):
        load_config(str(tmp_path), "pretrained")


def test_gated_model_without_a_token_says_which_variables_to_set() -> None:
    message = fails("llama-7b")
    assert "gated" in message
    assert "HUGGINGFACE_TOKEN or HF_TOKEN" in message
    check_model("llama-7b", "random")


def test_unreachable_hub_says_what_was_tried_and_what_works_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    for model in ("gpt-2", "someone/something"):
        message = fails(model)
        assert "http://127.0.0.1:9" in message
        assert "--weights random" in message
        assert "tiny-gpt2" in message
    check_model("gpt-2", "random")
    assert "127.0.0.1" in fails("someone/something", "random")


def test_offline_variable_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in fails("gpt-2")


class FakeHub(BaseHTTPRequestHandler):
    """Answers like the Hub for five repositories."""

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].split("/")
        repo = "/".join(parts[3:5])
        files = {
            "a/good": ["config.json", "model.safetensors"],
            "a/pickled": ["config.json", "pytorch_model.bin"],
            "a/data": ["README.md"],
            "a/gated": ["config.json", "model.safetensors"],
        }.get(repo)
        if files is None:
            self.answer(404, {}, "RepoNotFound")
        elif "auth-check" in self.path:
            self.answer(403, {}, "GatedRepo")
        elif "no-such" in self.path:
            self.answer(404, {}, "RevisionNotFound")
        else:
            siblings = [{"rfilename": name} for name in files]
            gated = "manual" if repo == "a/gated" else False
            self.answer(200, {"id": repo, "gated": gated, "siblings": siblings})

    def answer(self, status: int, body: dict[str, Any], code: str = "") -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    from huggingface_hub import constants

    server = HTTPServer(("127.0.0.1", 0), FakeHub)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    server.server_close()


def test_hub_answers_become_one_line_each(
    fake_hub: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no model 'a/missing'" in fails("a/missing")
    assert "pickle checkpoints are refused" in fails("a/pickled")
    assert "no config.json" in fails("a/data")
    assert "HUGGINGFACE_TOKEN" in fails("a/gated")
    monkeypatch.setenv("HUGGINGFACE_TOKEN", "hf_token_of_a_test")
    assert "your token has no access to a/gated" in fails("a/gated")
    wrong = replace(MODELS["gpt-2"], location="a/good", revision="no-such")
    monkeypatch.setitem(models.MODELS, "wrong", wrong)
    assert "has no revision no-such" in fails("wrong")
    monkeypatch.setitem(models.MODELS, "right", replace(wrong, revision="main"))
    check_model("right", "pretrained")


def test_a_cached_hub_model_needs_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    row = MODELS["gpt-2"]
    snapshot = tmp_path / "hub" / "models--openai-community--gpt2" / "snapshots" / str(row.revision)
    snapshot.mkdir(parents=True)
    save_model(GPT2, snapshot)
    check_model("gpt-2", "pretrained")
    expected = hashlib.sha256((snapshot / "model.safetensors").read_bytes()).hexdigest()
    assert weights_hash("gpt-2", "pretrained", 0) == expected


# --- helpers ---


def first_layer_gradient(model: Any) -> torch.Tensor:
    """Gradient of layer 0's first adapter B in training mode; what comes after must let it pass."""
    model.train()
    disable_dropout(model)
    model.zero_grad()
    for name, parameter in model.named_parameters():
        if "lora_B" in name and ".1." in name:
            torch.manual_seed(0)
            parameter.data.normal_(std=0.01)
    model(IDS, labels=IDS).loss.backward()
    name = next(n for n, p in model.named_parameters() if "lora_B" in n and ".0." in n)
    gradient = model.get_parameter(name).grad
    return gradient.clone()


def replace_sizes(config: GPT2Config, hidden: int) -> GPT2Config:
    return GPT2Config(**config.to_diff_dict() | {"n_embd": hidden})


def replace_vocabulary(config: LlamaConfig) -> LlamaConfig:
    return LlamaConfig(**config.to_diff_dict() | {"vocab_size": 64})


def write_gguf(gguf: Any, model: Any, folder: Path) -> None:
    """A float32 GGUF file of a small LLaMA, with q and k in llama.cpp's row order."""
    config = model.config
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        for leaf, heads in (
            ("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads),
        ):  # fmt: skip
            if leaf in name:
                rows, columns = array.shape
                array = array.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2)
                array = array.reshape(rows, columns).copy()
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
