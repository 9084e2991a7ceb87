"""PiSSA: where it starts, what a layer answers, what is counted; the rest is in test_adapters."""

from __future__ import annotations

import copy
from typing import Any

import numpy
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from peftbench import adapters, pissa
from peftbench.case import Settings

SETTINGS = Settings(rank=4, alpha=12, seed=3)


def make_model(name: str) -> Any:
    torch.manual_seed(1)
    if name == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=61, n_positions=64, n_embd=64, n_layer=2, n_head=4)
        ).eval()
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2,
        )
    ).eval()  # fmt: skip


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_b_a_is_the_nearest_matrix_of_its_rank_and_the_base_stays(name):
    base = make_model(name)
    before = copy.deepcopy(base.state_dict())
    model = adapters.attach(base, "pissa", SETTINGS)
    layers = pissa.lora_layers(model)
    assert len(layers) == {"gpt2": 2 * 4, "llama": 2 * 7}[name]
    for path, layer in layers.items():
        weight = before[path.removeprefix("base_model.model.") + ".weight"]
        assert torch.equal(layer.base_layer.weight, weight)
        rows = (weight.T if name == "gpt2" else weight).double().numpy()
        u, s, vh = numpy.linalg.svd(rows, full_matrices=False)
        nearest = (u[:, :4] * s[:4]) @ vh[:4]
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert numpy.abs((12 / 4 * b @ a).detach().numpy() - nearest).max() < 1e-5
        # the singular values are shared evenly
        assert torch.allclose((3 * b.T @ b).diagonal(), (3 * a @ a.T).diagonal(), atol=1e-5)


def test_a_layer_adds_the_difference_to_its_start():
    """y = W x + s (B A x - B0 A0 x), by hand."""
    model = adapters.attach(make_model("llama"), "pissa", SETTINGS)
    layer = pissa.lora_layers(model)["base_model.model.model.layers.1.mlp.up_proj"]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    a0, b0 = a.detach().clone(), b.detach().clone()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((5, 64), generator=generator)
    with torch.no_grad():
        a += 0.1 * torch.randn(a.shape, generator=generator)
        b += 0.1 * torch.randn(b.shape, generator=generator)
        expected = x @ (layer.base_layer.weight + 3 * (b @ a - b0 @ a0)).T
        assert torch.allclose(layer(x), expected, atol=1e-5)
        assert not torch.allclose(layer(x), layer.base_layer(x), atol=1e-2)


def test_its_start_is_counted_and_does_not_train():
    totals = {
        name: adapters.count_params(adapters.attach(make_model("llama"), name, SETTINGS))
        for name in ("lora", "pissa")
    }
    lora, found = totals["lora"], totals["pissa"]
    assert found[1] == lora[1]
    assert found[0] == lora[0] + lora[1]


def test_a_large_model_without_weights_has_the_same_counts():
    with torch.device("meta"):
        base = make_model("llama")
    model = adapters.attach(base, "pissa", SETTINGS)
    real = adapters.attach(make_model("llama"), "pissa", SETTINGS)
    assert adapters.count_params(model) == adapters.count_params(real)
