"""What measuring itself costs: `make overhead`.

1. The sampler: a process trains without end, its parent reads the GPUs every 10 ms in every other
   fifth of a second, and the steps of both kinds are compared, neighbour by neighbour. Without a
   GPU the real pynvml reads the tests' stand-in for the driver's library.
   On one thread, as a process that drives a GPU runs, and on all cores, where the sampler has none.
2. Collection: what one more case adds to the time until pytest knows them all.
3. The harness: the quick preset's wall time less the phases of its cases, of the children that
   score the bases, and the sentinels. Start-up ends when the first of them begins its work.

Figures have their standard error. Exits with 1 unless all limits are shown to be kept: 1 % of the
training process's CPU time on one thread, two standard errors added (a CPU run is not sampled at
all), 10 ms a collected case, and 0.3 s a case plus 8 s of start-up.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MOST_SAMPLER_RATIO = 0.01
MOST_CASE_S, MOST_START_S = 0.3, 8.0
MOST_COLLECT_S = 0.010  # a case
COLLECTIONS = 7  # of each preset
BLOCK_S, BLOCKS = 0.2, 600
SCENE = """driver 575.57.08
cuda 12090
count 1
0.uuid GPU-aaaa1111-0000
0.name stand-in
0.bus 65
0.total 80000
0.used 1000
0.processes 4242:700
0.energy 123456
0.power 251500
"""


def train_without_end(threads: int) -> None:
    """In the process that is watched: prints the start and the length of each step at the end."""
    from dataclasses import replace
    from itertools import cycle

    import torch

    from peftbench import adapters, models, pipeline, training
    from peftbench.case import PRESETS, Case
    from peftbench.data.loading import load_task

    settings = replace(PRESETS["quick"].settings, threads=threads)
    case = models.resolved(Case("tiny-gpt2", "lora", "sft", settings))
    device = pipeline.prepare_process(case.settings)
    pipeline.import_libraries(case.settings)
    model = adapters.attach(pipeline.load(case, device, quantize=None), "lora", case.settings)
    tokenizer = models.load_tokenizer(case.model, case.settings.weights)
    task = load_task(case.settings, tokenizer, model.config.vocab_size)
    windows = training.build_windows(task, case.settings, "chosen", device)[:1]  # equal steps
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = training.build_optimizer(trained, case.settings, case.settings.learning_rate)
    steps: list[tuple[float, float, float]] = []
    print("ready", flush=True)
    end_s = time.monotonic() + 1.2 * BLOCK_S * BLOCKS  # starting and stopping takes time too
    for window in cycle(windows):
        started_s, cpu_s = time.monotonic(), time.process_time()
        loss = training.batch_loss(
            model, window.batches[0], "sft", case.settings,
            window_tokens=window.completion_tokens, reference=None,
        )  # fmt: skip
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        steps.append((started_s, time.monotonic() - started_s, time.process_time() - cpu_s))
        if time.monotonic() > end_s:
            break
    print(json.dumps(steps), flush=True)


def sampler_ratio(threads: int) -> dict[str, tuple[float, float]]:
    """By clock, (mean relative slow-down of a step while the sampler runs, its standard error).

    `wall` holds what any neighbour takes as well; `cpu`, the training process's own time, does not.
    """
    from peftbench.measuring.nvml import open_devices
    from peftbench.measuring.sampler import Sampler

    devices, note = open_devices(None, None)
    if not devices:
        sys.exit(f"no device to watch: {note}")
    child = subprocess.Popen(
        [sys.executable, __file__, "train", str(threads)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert child.stdout is not None
    while child.stdout.readline() != "ready\n":
        if child.poll() is not None:
            sys.exit("the training process ended before it began")
    blocks: list[tuple[bool, float, float]] = []
    passes_s = []
    for number in range(BLOCKS):
        watched = number % 4 in (1, 2)  # off on on off: a drift touches both kinds alike
        sampler = Sampler(devices, interval_s=0.01)
        if watched:
            sampler.start()
            sampler.set_pid(child.pid)
        began_s = time.monotonic()
        time.sleep(BLOCK_S)
        blocks.append((watched, began_s, time.monotonic()))
        if watched:
            passes_s.append(sampler.stop().pass_s or 0.0)
    steps = json.loads(child.communicate()[0].splitlines()[-1])
    found = {
        clock: slow_down(
            [
                (watched, [s[at] for s in steps if began <= s[0] and s[0] + s[1] <= ended])
                for watched, began, ended in blocks
            ]
        )
        for at, clock in ((1, "wall"), (2, "cpu"))
    }
    print(
        f"sampler: {len(devices)} device, a pass of {statistics.mean(passes_s) * 1e6:.0f} us every"
        f" 10 ms; a step {statistics.median(s[1] for s in steps) * 1e3:.1f} ms, {len(steps)} steps"
    )
    return found


def slow_down(blocks: list[tuple[bool, list[float]]]) -> tuple[float, float]:
    """(trimmed mean, its standard error) of watched over unwatched steps - 1.

    Four neighbouring blocks are compared with each other. A fifth of these comparisons is cut off
    at each end: where another machine's work takes our core for a block, it says nothing about us.
    """
    ratios = []
    for at in range(0, len(blocks) - 3, 4):
        group = blocks[at : at + 4]
        if all(found for _, found in group):  # a neighbour may have stopped a whole block
            off, on = (
                [statistics.median(found) for w, found in group if w == kind]
                for kind in (False, True)
            )
            ratios.append(sum(on) / sum(off) - 1)
    ratios.sort()
    cut = len(ratios) // 5
    kept = ratios[cut : len(ratios) - cut]
    # Tukey and McLaughlin (1963): the deviation of the values with the cut ones drawn in.
    drawn_in = [kept[0]] * cut + kept + [kept[-1]] * cut
    error = statistics.stdev(drawn_in) * math.sqrt(len(ratios)) / len(kept)
    return statistics.mean(kept), error


def collect_s() -> float:
    """Median seconds that one more case takes to collect: `quick-full` beside `smoke`, in turns."""
    rows = []
    for _ in range(COLLECTIONS):
        found = []
        for preset in ("smoke", "quick-full"):
            started_s = time.monotonic()
            out = subprocess.run(
                [sys.executable, "-m", "pytest", "bench", "--collect-only", "-q",
                 "-p", "no:cacheprovider", "--preset", preset],
                cwd=ROOT, capture_output=True, text=True, check=True,
            )  # fmt: skip
            found.append((time.monotonic() - started_s, out.stdout.count("::")))
        (few_s, few), (many_s, many) = found
        rows.append((many_s - few_s) / (many - few))
    return statistics.median(rows)


def harness_s(folder: Path, arguments: list[str]) -> tuple[float, float, int]:
    """(seconds outside all phases and after the start-up, start-up seconds, cases)."""
    file = folder / "run.json"
    began_unix_s, began_s = time.time(), time.monotonic()
    command = [
        sys.executable, "-m", "pytest", "bench", f"--benchmark-json={file}",
        "-p", "no:cacheprovider", "--results-dir", str(folder / "runs"), *arguments,
    ]  # fmt: skip
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    wall_s = time.monotonic() - began_s
    if out.returncode != 0:
        sys.exit(out.stdout + out.stderr)
    run = json.loads(file.read_text())
    rows = [b["extra_info"] for b in run["benchmarks"]]
    ours = run["peftbench"]
    cases_s = sum(r["total_s"] for row in rows for r in row["rounds"])
    between_s = sum(r["between_phases_s"] for row in rows for r in row["rounds"])
    bases_s = sum(sum(base["phases"].values()) for base in ours["bases"])
    sentinels_s = sum(s["seconds"] for s in ours["sentinels"].values())
    start_s = ours["sentinels"]["start"]["start_unix_s"] - began_unix_s
    outside_s = wall_s - cases_s - bases_s - sentinels_s
    print(
        f"harness: {wall_s:.1f} s of wall time = {cases_s:.1f} s in the phases of"
        f" {len(rows)} cases, {bases_s:.1f} s in those of {len(ours['bases'])} bases,"
        f" {sentinels_s:.1f} s of sentinels, {start_s:.1f} s until the first child worked, and"
        f" {outside_s - start_s:.1f} s for the rest ({between_s:.1f} s of it resetting peaks)"
    )
    return outside_s, start_s, len(rows)


def main() -> int:
    if sys.argv[1:2] == ["train"]:
        train_without_end(int(sys.argv[2]))
        return 0
    if shutil.which("nvidia-smi") is None and "FAKE_NVML_SCENE" not in os.environ:
        with tempfile.TemporaryDirectory() as place:
            library, scene = Path(place) / "libnvidia-ml.so.1", Path(place) / "scene"
            source = ROOT / "tests" / "fake_nvml" / "nvml.c"
            subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
            scene.write_text(SCENE)
            fake = {"LD_LIBRARY_PATH": place, "FAKE_NVML_SCENE": str(scene)}
            print("no GPU here: the sampler reads a stand-in for the driver's library")
            return subprocess.run(
                [sys.executable, *sys.argv], env=os.environ | fake, check=False
            ).returncode
    ratios = {}
    for threads in (1, os.cpu_count() or 1):
        ratios[threads] = sampler_ratio(threads)
        for clock, (mean, error) in ratios[threads].items():
            print(f"  {threads} thread(s), {clock} time of a step: {mean:+.2%} +- {error:.2%}")
    a_case_s = collect_s()
    print(f"collection: {1000 * a_case_s:.1f} ms a case; limit {1000 * MOST_COLLECT_S:.0f} ms")
    with tempfile.TemporaryDirectory() as folder:
        outside_s, start_s, cases = harness_s(Path(folder), sys.argv[1:])
    limit_s = MOST_START_S + MOST_CASE_S * cases
    print(
        f"harness: {outside_s:.1f} s outside all phases, {(outside_s - start_s) / cases:.2f} s a"
        f" case and a start-up of {start_s:.1f} s; limit {limit_s:.1f} s"
    )
    mean, error = ratios[1]["cpu"]
    most = mean + 2 * error
    print(f"sampler, 1 thread: at most {most:.2%} of the CPU time; limit {MOST_SAMPLER_RATIO:.0%}")
    return int(most > MOST_SAMPLER_RATIO or a_case_s > MOST_COLLECT_S or outside_s > limit_s)


if __name__ == "__main__":
    sys.exit(main())
