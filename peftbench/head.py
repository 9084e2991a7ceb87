"""log p(label) of a frozen head, without the logits of a batch.

The head's product and its softmax go over a few rows at a time. Where a gradient is wanted, that of
log p(label) in the row's hidden state, W[label] - sum_v p_v W_v, is made in the forward pass from
the same logits: a frozen head's backward pass needs nothing else, so no logits are kept and none
are computed twice. A head that trains needs them for its own gradient: it keeps the batch's.

Letters: R rows of a forward pass, C columns that predict, N = R C, H hidden size, V vocabulary.
Source: Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models",
https://arxiv.org/abs/2411.09009; there the logits are computed again in the backward pass, as
their head trains.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

# Of float32 logits at a time. On two CPU cores 64 MiB cost what 1 GiB does, 16 MiB a fifth more.
CPU_BYTES, GPU_BYTES = 64 * 2**20, 256 * 2**20
# What configs call a change that a model makes to its head's answer: Gemma's, Cohere's, Granite's,
# Falcon-H1's. One that calls it otherwise is found out by its answer, at the cost of a second pass.
CHANGES = (
    "final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier",
    "output_multiplier",
)  # fmt: skip


class LabelLogprobs(torch.autograd.Function):
    """log_softmax(x W^T + b)[label] of (..., H) hidden states, (V, H) weight, (V,) bias or None and
    (...) labels: (...) float32, nats. Differentiable in the hidden states alone.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
    ) -> torch.Tensor:
        kind = hidden.device.type
        computed = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        x, w = hidden.to(computed or hidden.dtype), weight.to(computed or weight.dtype)
        x, flat = x.flatten(0, -2), labels.flatten()
        most_bytes = CPU_BYTES if kind == "cpu" else GPU_BYTES
        rows = max(1, most_bytes // (4 * len(w)))
        found = torch.empty(labels.shape, dtype=torch.float32, device=x.device)
        gradient = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        for at in range(0, len(x), rows):
            part = slice(at, at + rows)
            label = flat[part].unsqueeze(-1)
            logits = torch.nn.functional.linear(x[part], w, bias).float()
            largest = logits.amax(-1, keepdim=True)
            chosen = logits.gather(-1, label) - largest
            odds = logits.sub_(largest).exp_()
            total = odds.sum(-1, keepdim=True)
            found.view(-1)[part] = (chosen - total.log()).squeeze(-1)
            if gradient is not None:
                # before it is rounded: of a likely label little remains
                odds.scatter_add_(-1, label, -total)
                gradient[part] = (odds.to(w.dtype) @ w) / -total
        ctx.save_for_backward(gradient)
        ctx.dtype = hidden.dtype
        return found

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        gradient = gradient.view(*upstream.shape, -1)
        return (upstream.unsqueeze(-1) * gradient).to(ctx.dtype), None, None, None


@contextmanager
def answering_logprobs(model: Any, labels: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """Inside, a frozen linear head answers with log p of (R, C) labels in the place of logits.

    Yields what it has answered: nothing where the head trains or is of another kind, where the
    model changes its logits, or hands it other columns than the labels' predictors.
    """
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    head: Any = inner.get_output_embeddings()
    answers: list[torch.Tensor] = []
    if (
        type(head) is not torch.nn.Linear
        or any(getattr(inner.config, name, None) for name in CHANGES)
        or (torch.is_grad_enabled() and any(p.requires_grad for p in head.parameters()))
    ):
        yield answers
        return

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        if hidden.shape[:-1] != labels.shape:
            return torch.nn.Linear.forward(head, hidden)
        apply: Any = LabelLogprobs.apply
        answers.append(apply(hidden, head.weight, head.bias, labels))
        return answers[-1]

    vars(head)["forward"] = forward
    try:
        yield answers
    finally:
        del vars(head)["forward"]


def label_logprobs(
    model: Any, labels: torch.Tensor, columns: torch.Tensor, **inputs: Any
) -> torch.Tensor:
    """log p(label | all before it), (R, C) float32 nats: a forward pass of `inputs`.

    `columns` (C,) are those of the inputs whose logits predict the (R, C) labels.
    """
    with answering_logprobs(model, labels) as answers:
        out: torch.Tensor = model(**inputs, logits_to_keep=columns, use_cache=False).logits
    if answers and out is answers[-1]:
        return answers[-1]
    if answers:  # the model does something to its logits: with what it does, they are needed
        out = model(**inputs, logits_to_keep=columns, use_cache=False).logits
    if out.shape[1] != len(columns):  # a model that answers for every column
        out = out[:, columns]
    return token_logprobs(out, labels)


def token_logprobs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """log p(label), in float32 nats; logits (..., V), labels (...)."""
    return -torch.nn.functional.cross_entropy(
        logits.float().flatten(0, -2), labels.flatten(), reduction="none"
    ).view(labels.shape)
