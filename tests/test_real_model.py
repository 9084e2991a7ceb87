"""The real model on real text against plain transformers. Long: run by `make verify`."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from peftbench import evaluation, models
from peftbench.case import PRESETS
from peftbench.data import assets
from peftbench.data.loading import load_task

pytestmark = pytest.mark.verify
NAME = "smollm2-135m-instruct-q4"


@pytest.fixture(scope="module")
def task():
    assets.fetch("wikipedia-sample")
    assets.fetch(NAME)
    settings = replace(PRESETS["cpu-real"].settings, eval_tokens=2048, eval_pairs=6)
    return settings, load_task(settings, models.load_tokenizer(NAME, "pretrained"), 49152)


@pytest.fixture(scope="module")
def plain():
    """The converted folder through transformers alone."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(assets.fetch(NAME), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ours():
    return models.load_model(
        NAME, weights="pretrained", dtype=torch.float32, device=torch.device("cpu"),
        quantize=None, seed=0,
    )  # fmt: skip


def test_perplexity_equals_plain_transformers_to_1e_5(task, plain, ours):
    """The usual recipe: labels with -100 where a window overlaps, the model's own loss."""
    settings, data = task
    ids = torch.tensor([data.test_tokens])
    total, scored, reached = 0.0, 0, 1
    for start in range(0, ids.shape[1], settings.eval_stride):
        end = min(start + settings.eval_context, ids.shape[1])
        labels = ids[:, start:end].clone()
        labels[:, : max(0, reached - start)] = -100
        count = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += plain(ids[:, start:end], labels=labels).loss.double().item() * count
        scored, reached = scored + count, end
        if end == ids.shape[1]:
            break
    assert scored == ids.shape[1] - 1
    with evaluation.evaluating(ours, settings):
        score = evaluation.score_text(
            ours, data.test_tokens, settings.eval_context, settings.eval_stride, 4
        )
    metrics = evaluation.text_metrics(score, data.test_bytes)
    assert metrics["perplexity"] == pytest.approx(math.exp(total / scored), rel=1e-5)
    assert 10 < metrics["perplexity"] < 60  # a model that reads English


def test_pair_logprobs_equal_plain_transformers(task, plain, ours):
    settings, data = task
    with evaluation.evaluating(ours, settings):
        score = evaluation.score_pairs(ours, data.test, 3)
    for i, pair in enumerate(data.test):
        ids = torch.tensor([pair.prompt + pair.chosen])
        with torch.no_grad():
            logprobs = torch.log_softmax(plain(ids).logits[0].double(), -1)
        at = torch.arange(len(pair.prompt) - 1, ids.shape[1] - 1)
        expected = logprobs[at, torch.tensor(pair.chosen)].sum().item()
        assert score.chosen[i] == pytest.approx(expected, rel=1e-5)
