"""The long proofs, in parts: `make verify` or `make verify PARTS="tests offline"`.

Each part's output goes to the terminal and to results/verify/<date>-<part>.log. Exits with 1 if a
part failed.
"""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
from pathlib import Path

from peftbench import provenance

ROOT = Path(__file__).resolve().parent.parent
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
JSON = "output/verify-{}.json"

PARTS: dict[str, list[list[str]]] = {
    # tests marked `verify`: the real model against plain transformers, compiled trainings against
    # eager ones, and the like
    "tests": [[*PYTEST, "tests", "-m", "verify", "-rs"]],
    # the shipped tiny models, trained again from nothing: the same weights to the last bit (on the
    # kind of CPU and with the torch that trained them; elsewhere only the perplexities are equal)
    "pretrain": [
        [sys.executable, "scripts/pretrain_tiny.py", name, "--output", f"output/pretrain/{name}",
         "--check", f"peftbench/tiny/{name}"]
        for name in ("tiny-gpt2", "tiny-llama")
    ],
    # the quick preset with the network cut: no interface but loopback exists for it
    "offline": [["unshare", "--net", "--map-root-user", *PYTEST, "bench", "--preset", "quick",
                 f"--benchmark-json={JSON.format('offline')}"]],
    # what measuring costs: the GPUs' sampler, and the wall time outside all phases
    "overhead": [[sys.executable, "scripts/overhead.py"]],
    # what the README says the quick preset learns, on each of three seeds
    "three-seeds": [
        [*PYTEST, "bench", "--seeds", "3", f"--benchmark-json={JSON.format('seeds')}"],
        [sys.executable, "scripts/claims.py", "quick", JSON.format("seeds")],
    ],
    # that PPO raises the true reward on held-out prompts; 10 minutes
    "ppo-truth": [
        [*PYTEST, "bench", "--preset", "ppo-truth", f"--benchmark-json={JSON.format('truth')}"],
        [sys.executable, "scripts/claims.py", "ppo-truth", JSON.format("truth")],
    ],
    # the built wheel in an environment of its own, without the checkout
    "wheel": [["bash", "scripts/wheel_check.sh"]],
    # the comparison on eleven real nights and on changes put in one at a time, over an hour
    "nights": [[sys.executable, "scripts/nights.py"]],
    # the real model on real text, about an hour
    "cpu-real": [
        [*PYTEST, "bench", "--preset", "cpu-real", f"--benchmark-json={JSON.format('real')}"],
        [sys.executable, "scripts/claims.py", "cpu-real", JSON.format("real")],
    ],
}  # fmt: skip


def run_part(name: str, log_folder: Path) -> bool:
    where = provenance.describe()
    log = log_folder / f"{datetime.date.today().isoformat()}-{name}.log"
    with log.open("w") as file:
        commit = f"{where['commit']}{' (changed)' if where['commit_dirty'] else ''}"
        file.write(f"commit {commit}\n{where['cpu']}, {where['cpu_cores']} cores\n")
        file.write(f"{where['libraries']} {where['library_commits'] or ''}\n")
        for command in PARTS[name]:
            shown = " ".join(Path(c).name if c == sys.executable else c for c in command)
            file.write(f"\n$ {shown}\n")
            process = subprocess.Popen(
                command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                env=os.environ | {"COLUMNS": "160"},
            )  # fmt: skip
            assert process.stdout is not None
            for line in process.stdout:
                text = line.replace(str(ROOT), ".")
                sys.stdout.write(text)
                sys.stdout.flush()
                file.write(text)
            if process.wait() != 0:
                file.write(f"exit code {process.returncode}\n")
                return False
    return True


def main() -> int:
    asked = sys.argv[1:]
    names = list(PARTS) if asked in ([], ["all"]) else asked
    unknown = [n for n in names if n not in PARTS]
    if unknown:
        print(f"unknown part {unknown[0]!r}; choose from: all, {', '.join(PARTS)}", file=sys.stderr)
        return 2
    folder = ROOT / "results" / "verify"
    folder.mkdir(parents=True, exist_ok=True)
    (ROOT / "output").mkdir(exist_ok=True)
    results = {name: run_part(name, folder) for name in names}
    for name, passed in results.items():
        print(f"verify {name}: {'passed' if passed else 'FAILED'}")
    return 0 if all(results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
