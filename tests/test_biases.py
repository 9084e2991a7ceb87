"""BitFit and LoRA with biases: which entries train, and models that have no biases."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from test_pissa import make_model
from transformers import AutoConfig, AutoModelForCausalLM

from peftbench import adapters
from peftbench.case import Case, Settings
from peftbench.errors import UserError
from peftbench.models import has_biases
from peftbench.preflight import impossible

SETTINGS = Settings(rank=4, alpha=12, seed=3)
# of GPT-2's block: c_attn, attention's c_proj, c_fc, the MLP's c_proj
LINEAR_BIASES = 192 + 64 + 256 + 64


def test_bitfit_trains_every_bias_and_saves_nothing_else(tmp_path):
    model = adapters.attach(make_model("gpt2"), "bitfit", SETTINGS)
    assert adapters.count_params(model)[1] == 2 * (LINEAR_BIASES + 2 * 64) + 64
    assert adapters.count_params(model)[0] == adapters.count_params(make_model("gpt2"))[0] + (
        2 * (LINEAR_BIASES + 2 * 64) + 64
    )
    adapters.save_adapter(model, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    biases = [n for n, _ in make_model("gpt2").named_parameters() if n.endswith(".bias")]
    assert len(saved) == len(biases) == 2 * 6 + 1
    assert all(name.endswith(".bias") for name in saved)


def test_a_layer_answers_with_its_own_bias():
    """LayerNorm and Conv1D by hand."""
    model = adapters.attach(make_model("gpt2"), "bitfit", SETTINGS)
    block = model.get_base_model().transformer.h[1]
    x = torch.randn((5, 64), generator=torch.Generator().manual_seed(1))
    for layer in (block.ln_1, block.attn.c_attn):
        own = layer.ln_tuning_layers["default"].bias
        own.data += torch.linspace(-1, 1, len(own))
        with torch.no_grad():
            expected = layer.base_layer(x) - layer.base_layer.bias + own
            assert torch.allclose(layer(x), expected, atol=1e-5)


def test_lora_bias_counts_lora_biases_and_norms():
    lora = {n: adapters.count_params(adapters.attach(make_model(n), "lora", SETTINGS))[1]
            for n in ("gpt2", "llama")}  # fmt: skip
    found = {n: adapters.count_params(adapters.attach(make_model(n), "lora-bias", SETTINGS))[1]
             for n in ("gpt2", "llama")}  # fmt: skip
    norms = (2 * 2 + 1) * 64
    assert found["gpt2"] == lora["gpt2"] + 2 * LINEAR_BIASES + 2 * norms  # weights and biases
    assert found["llama"] == lora["llama"] + norms  # no biases


def test_a_model_without_biases_is_refused_in_one_line():
    with pytest.raises(UserError, match="LlamaForCausalLM has no biases; use ln or lora-bias"):
        adapters.attach(make_model("llama"), "bitfit", SETTINGS)
    assert "tiny-llama has no biases" in (impossible(Case("tiny-llama", "bitfit", "sft")) or "")
    assert impossible(Case("tiny-gpt2", "bitfit", "sft")) is None
    assert impossible(Case("tiny-llama", "lora-bias", "ppo")) is None


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("llama", {}), ("llama", {"attention_bias": True}), ("llama", {"mlp_bias": True}),
     ("mistral", {}), ("gemma", {}), ("gemma2", {}), ("olmo2", {}), ("phi3", {}), ("qwen3", {}),
     ("qwen3", {"attention_bias": True}), ("granite", {}), ("smollm3", {}), ("qwen2", {}),
     ("gpt2", {}), ("opt", {})],
)  # fmt: skip
def test_the_config_tells_what_the_modules_have(tmp_path, kind, changes):
    config = AutoConfig.for_model(kind, **changes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind} | changes))
    expected = any(name.endswith(".bias") for name, _ in model.named_parameters())
    assert has_biases(str(tmp_path)) is expected
