"""Prompt tuning: where it starts, and which columns and positions the base reads."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from test_pissa import make_model

from peftbench import adapters
from peftbench.case import Settings

SETTINGS = Settings(prefix_tokens=5, seed=3)
IDS = torch.randint(3, 61, (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_it_starts_as_if_real_tokens_had_been_read(name):
    base = make_model(name)
    plain = copy.deepcopy(base)
    model = adapters.attach(base, "prompt", SETTINGS)
    assert adapters.count_params(model)[1] == 5 * 64
    start = model.prompt_encoder["default"].embedding.weight
    table = plain.get_input_embeddings().weight
    tokens = torch.cdist(start, table).argmin(-1)
    assert torch.equal(start, table[tokens])
    with torch.no_grad():
        read = torch.cat([tokens.expand(3, 5), IDS], 1)
        expected = plain(input_ids=read).logits[:, 5:]
        assert torch.allclose(model(input_ids=IDS).logits, expected, atol=1e-5)
        kept = torch.tensor([4, 9])
        found = model(input_ids=IDS, logits_to_keep=kept).logits
        assert torch.allclose(found, expected[:, kept], atol=1e-5)
        last = model(input_ids=IDS, logits_to_keep=3).logits
        assert torch.allclose(last, expected[:, -3:], atol=1e-5)


def test_given_positions_bring_no_warning():
    model = adapters.attach(make_model("gpt2"), "prompt", SETTINGS)
    mask = torch.ones_like(IDS)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=IDS, attention_mask=mask, position_ids=mask.cumsum(-1) - 1)
