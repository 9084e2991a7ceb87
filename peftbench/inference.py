"""READ THIS FIRST: an inference case, top to bottom; what an adapter costs when the model answers.

    import -> load -> base -> attach -> unmerged -> merge -> check -> warm up -> [go] -> measure
    -> free -> merged

In `base`, `unmerged` and `merged` one model alone answers a batch, for its memory. In `measure` all
are loaded and answer in turn, so that a machine that becomes slower does so for each of them.

Letters: B rows of the batch, T prompt tokens, N new tokens.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from peftbench import adapters, infer_values, models, pipeline, values
from peftbench.agreement import AGREEMENT_RATIO, logit_difference, probe_logits
from peftbench.case import Case, Settings
from peftbench.errors import InvalidInferenceError
from peftbench.infer_values import Cycle, Turn
from peftbench.measuring.phases import Phases
from peftbench.metrics import VARIANTS
from peftbench.quantization import quantization_of, quantized_layers
from peftbench.record import measured
from peftbench.rollout import virtual_tokens

WARMUP_TURNS = 2
CLEAR_EFFECT = 2.0  # how many times what merging changes the effect must be, or nothing is shown
# Of the largest logit, what the adapter is made to change: a fresh one changes nothing, and then
# merged would agree with unmerged whatever the merge did.
EFFECT = 0.2
FIRST_STEP, MOST_STEP = 0.01, 10.0  # standard deviations of the noise that is added for it


@dataclass(frozen=True)
class Answer:
    """`tokens` (B, N) are the likeliest; `cache_bytes` are of the keys and values at the end."""

    tokens: torch.Tensor
    turn: Turn
    cache_bytes: int


def run_infer_round(case: Case, parent: pipeline.Parent) -> dict[str, Any]:
    """Run one round of an inference case in this process and return its record.

    Raises: InvalidInferenceError where merged and unmerged, or zero effect and base, do not agree.
    """
    settings, start_unix_s = case.settings, time.time()
    device = pipeline.prepare_process(settings)
    phases = Phases(device, parent.phase)

    phases.enter("import")
    pipeline.import_libraries(settings)
    phases.imported()

    phases.enter("load")
    base = load_base(case, device)
    prompt = prompt_ids(base, settings)
    trees = {"base": base}
    weight_bytes = {"base": models.parameter_bytes(base)}
    quantized, quantization = len(quantized_layers(base)), quantization_of(base)

    phases.enter("base")
    cache_bytes = {"base": answer(base, prompt, settings.infer_new_tokens).cache_bytes}

    phases.enter("attach")
    trees["unmerged"] = adapted_tree(base, case)
    params = adapters.count_params(trees["unmerged"])
    weight_bytes["unmerged"] = models.parameter_bytes(trees["unmerged"])

    if case.adapter == "full":  # its copy is a control: the peak would be that of two models
        cache_bytes["unmerged"] = cache_bytes["base"]
    else:
        phases.enter("unmerged")
        found = answer(trees["unmerged"], prompt, settings.infer_new_tokens)
        cache_bytes["unmerged"] = found.cache_bytes

    logit_ratios: dict[str, float] = {}
    if infer_values.merges(case):
        phases.enter("merge")
        plain = probe_logits(base)
        logit_ratios["zero_merge_logit_ratio"] = logit_difference(
            plain, probe_logits(adapters.merged(trees["unmerged"], case.adapter))
        )
        give_effect(base, trees["unmerged"], settings.seed)
        trees["merged"] = adapters.merged(trees["unmerged"], case.adapter).eval()
        weight_bytes["merged"] = models.parameter_bytes(trees["merged"])
    elif case.adapter != "full":
        give_effect(base, trees["unmerged"], settings.seed)

    phases.enter("check")
    logit_ratios |= compared(trees, case)
    check_agreement(logit_ratios, case)

    phases.enter("warmup")
    measure(trees, prompt, settings.infer_new_tokens, WARMUP_TURNS)

    phases.enter("measure", hold=parent.ready)
    cycles = measure(trees, prompt, settings.infer_new_tokens, settings.infer_turns)
    phases.leave(stopped=parent.trained)

    if "merged" in trees:
        phases.enter("free")
        merged = trees.pop("merged")
        del base
        trees.clear()
        give_back_memory()
        phases.enter("merged")
        cache_bytes["merged"] = answer(merged, prompt, settings.infer_new_tokens).cache_bytes
        phases.leave()
    phases.check_sum()

    numbers: dict[str, float | int | None] = {
        "total_params": params[0],
        "trainable_params": params[1],
        "trainable_ratio": params[1] / params[0],
        "base_bytes": weight_bytes["base"],
        "quantized_modules": quantized,
        "import_s": phases.readings["import"].seconds,
        "load_s": phases.readings["load"].seconds,
        "attach_s": phases.readings["attach"].seconds,
        "measure_s": phases.readings["measure"].seconds,
        "between_phases_s": phases.between_s,
        "total_s": sum(reading.seconds for reading in phases.readings.values()),
        "other_cpu_ratio": values.other_cpu_ratio(phases.readings["measure"]),
        **{f"{variant}_weight_bytes": size for variant, size in weight_bytes.items()},
        **{f"{variant}_cache_bytes": size for variant, size in cache_bytes.items()},
        **infer_values.speed_values(cycles, settings),
        **logit_ratios,
        **memory_values(phases),
    }
    reasons = infer_values.null_reasons(case, device.type, phases.peak_unavailable)
    return {
        **pipeline.run_facts(case, device, quantization, start_unix_s),
        **measured(numbers, reasons, "infer"),
        "disturbances": [
            *values.taken_by_others(
                device, {"during the measurement": [phases.readings["measure"]]}
            ),
            *values.stood_still(phases),
        ],
        "phases": {name: asdict(reading) for name, reading in phases.readings.items()},
        "turns": [{name: asdict(turn) for name, turn in cycle.items()} for cycle in cycles],
    }


def load_base(case: Case, device: torch.device) -> Any:
    """The base, frozen, in memory of its own.

    What is read from a file may lie on mapped pages, and a merged copy does not: on such pages a
    product can take another time, which is the file's and not the adapter's.
    """
    base = pipeline.load(case, device, quantize=adapters.ADAPTERS[case.adapter].quantization)
    base.requires_grad_(False)
    if not quantized_layers(base):
        for parameter in base.parameters():
            parameter.data = parameter.data.clone()
    give_back_memory()
    return base.eval()


def adapted_tree(base: Any, case: Case) -> Any:
    """The adapter on a tree of its own over the base's weights; of `full` a copy of the base."""
    if case.adapter == "full":
        return copy.deepcopy(base).requires_grad_(True)
    return adapters.attach(adapters.shared_copy(base), case.adapter, case.settings).eval()


def prompt_ids(model: Any, settings: Settings) -> torch.Tensor:
    """(B, T) random ids by the seed: what a pass costs does not depend on what it reads."""
    generator = torch.Generator().manual_seed(settings.seed)
    shape = (settings.infer_batch_size, settings.infer_prompt_tokens)
    ids = torch.randint(model.config.get_text_config().vocab_size, shape, generator=generator)
    return ids.to(next(model.parameters()).device)


@torch.no_grad()
def give_effect(base: Any, model: Any, seed: int) -> None:
    """Move the adapter's weights along seeded noise, in doubling steps, until the logits show it.

    Adapters differ: what hardly moves VeRA's would make LoRA's updates larger than the weights.
    """
    generator = torch.Generator().manual_seed(seed)
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    noise = [torch.randn(p.shape, generator=generator).to(p) for p in own]
    plain, step = probe_logits(base), FIRST_STEP
    while logit_difference(plain, probe_logits(model)) < EFFECT and step < MOST_STEP:
        for parameter, direction in zip(own, noise, strict=True):
            parameter.add_(step * direction)
        step *= 2


@torch.no_grad()
def answer(model: Any, prompt: torch.Tensor, new_tokens: int) -> Answer:
    """Read prompts (B, T) of equal lengths and write `new_tokens` each, always the likeliest.

    The clock of the prefill stops when the first new token is known, that of the decode steps when
    the last is; a GPU is waited for at these three moments only.
    """
    inner = adapters.inner_model(model)
    first = model if virtual_tokens(model) else inner  # a prefix is put in by its wrapper
    synchronize(prompt.device)
    started = time.perf_counter()
    out = first(input_ids=prompt, use_cache=True, logits_to_keep=1)
    tokens = [out.logits[:, -1].argmax(-1, keepdim=True)]
    synchronize(prompt.device)
    read = time.perf_counter()
    for _ in range(new_tokens - 1):
        out = inner(
            input_ids=tokens[-1], past_key_values=out.past_key_values, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        tokens.append(out.logits[:, -1].argmax(-1, keepdim=True))
    synchronize(prompt.device)
    turn = Turn(read - started, time.perf_counter() - read)
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in out.past_key_values.layers)
    return Answer(torch.cat(tokens, -1), turn, size)


def measure(
    trees: dict[str, Any], prompt: torch.Tensor, new_tokens: int, turns: int
) -> list[Cycle]:
    """So many turns of each model, interleaved and in changing order."""
    return [
        {
            name: turn_of(trees[name], prompt, new_tokens)
            for name in infer_values.order(cycle, tuple(trees))
        }
        for cycle in range(turns)
    ]


@torch.no_grad()
def turn_of(model: Any, prompt: torch.Tensor, new_tokens: int) -> Turn:
    """One turn, after a pass over one column that is not timed: whose weights the caches of the
    processor held before, base and adapter having them in common, must not matter."""
    adapters.inner_model(model)(input_ids=prompt[:, :1], use_cache=False)
    return answer(model, prompt, new_tokens).turn


def compared(trees: dict[str, Any], case: Case) -> dict[str, float]:
    """How far the adapter moves the logits, and merged from unmerged."""
    if case.adapter == "full":
        return {}
    unmerged = probe_logits(trees["unmerged"])
    found = {"effect_logit_ratio": logit_difference(probe_logits(trees["base"]), unmerged)}
    if "merged" in trees:
        found["merge_logit_ratio"] = logit_difference(unmerged, probe_logits(trees["merged"]))
    return found


def check_agreement(logit_ratios: dict[str, float], case: Case) -> None:
    """Raises: InvalidInferenceError for a merge that changes answers, or a check that is none."""
    rounding = AGREEMENT_RATIO[case.settings.dtype]
    effect = logit_ratios.get("effect_logit_ratio")
    # what merging rounds grows with what is merged
    larger = 1.0 if effect is None else max(1.0, effect / EFFECT)
    for name, words, limit in (
        ("zero_merge_logit_ratio", "merged without an effect and base", rounding),
        ("merge_logit_ratio", "merged and unmerged", rounding * larger),
    ):
        found = logit_ratios.get(name, 0.0)
        if not found <= limit:
            raise InvalidInferenceError(
                f"logits of {words} differ by {found:.2g} of the largest, more than rounding in"
                f" {case.settings.dtype} ({limit:.2g}): the times are not of the same model"
            )
    if effect is not None and not effect > CLEAR_EFFECT * logit_ratios.get("merge_logit_ratio", 0):
        raise InvalidInferenceError(
            f"the adapter moves the logits by {effect:.2g} of the largest only: that merged agrees"
            " with unmerged says nothing"
        )


def memory_values(phases: Phases) -> dict[str, int | None]:
    """Peaks of each model alone; the host's beyond what the imports take."""
    found: dict[str, int | None] = {}
    for variant in VARIANTS:
        reading = phases.readings.get(variant)
        if reading is None:
            continue
        found[f"torch_peak_{variant}_bytes"] = reading.torch_peak_allocated_bytes
        peak, start = reading.host_peak_rss_bytes, phases.start_rss_bytes
        found[f"host_peak_{variant}_bytes"] = (
            None if peak is None or start is None else peak - start
        )
    return found


def give_back_memory() -> None:
    """Hand what was freed back to the kernel: what others took is not the next model's."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; musl has none
        if trim is not None:
            trim(0)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
