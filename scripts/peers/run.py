"""peftbench beside TRL on the same work: `make peers`.

    python scripts/peers/run.py ppo functions curve --trl-1.12 .venv-peers-trl-1.12/bin/python

Parts: `ppo` (time, memory and floors on the real model), `functions` (the arithmetic on the same
tensors), `curve` (the toy reward on a tiny model), `quick` (the preset against plain TRL scripts),
`pairs-...` (SFT, DPO, ORPO against TRL 1.16).
Each part prints a table and its goals and writes results/peers/<part>.json and .txt. A goal that is
missed does not fail the command: the table says so.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import compare_pairs
import compare_ppo
import compare_quick
from sides import run_side

from peftbench import provenance

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("ppo", "functions", "curve", "quick", *compare_pairs.GROUPS)


def library_versions(python: Path) -> dict[str, str]:
    """What the peer's environment holds."""
    code = (
        "import json; from peftbench import provenance; "
        "print(json.dumps(provenance.library_versions()))"
    )
    found = subprocess.run(
        [python, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    versions: dict[str, str] = json.loads(found)
    return versions


def functions(python: Path, sizes: str) -> tuple[dict[str, Any], str]:
    """peftbench's PPO arithmetic against TRL's own lines, both run in TRL's environment."""
    found = run_side(python, "ppo_functions.py", {})
    lines = ["PPO's arithmetic against TRL 1.12's own lines on the same tensors"]
    lines += [f"{row['name']:<62} {row['difference']:.1e}" for row in found["rows"]]
    return found, "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=("all", *PARTS))
    parser.add_argument("--trl-1.12", dest="trl_ppo", type=Path, required=True)
    parser.add_argument("--sizes", choices=("full", "smoke"), default="full")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "peers")
    asked = parser.parse_args()
    run = {
        "ppo": compare_ppo.measure,
        "curve": compare_ppo.curve,
        "functions": functions,
        "quick": compare_quick.measure,
    }
    asked.results.mkdir(parents=True, exist_ok=True)
    where = provenance.describe()
    commit = f"{where['commit']}{' (changed)' if where['commit_dirty'] else ''}"
    for part in PARTS if "all" in asked.parts else asked.parts:
        if part in compare_pairs.GROUPS:
            numbers, text = compare_pairs.measure(part, asked.sizes)
            peer = where["libraries"]
        else:
            numbers, text = run[part](asked.trl_ppo.absolute(), asked.sizes)
            # of `quick` most are on 1.16; its PPO on 1.12 as `ppo`
            quick = part == "quick"
            peer = where["libraries"] if quick else library_versions(asked.trl_ppo.absolute())
        versions = ", ".join(f"{n} {peer[n]}" for n in ("torch", "transformers", "peft", "trl"))
        text += f"\n{where['cpu']}, {where['cpu_cores']} cores; the peer: {versions}; {commit}\n"
        print(text, flush=True)
        (asked.results / f"{part}.txt").write_text(text)
        record = {
            "schema": "peftbench-peers", "part": part,
            "date": datetime.date.today().isoformat(), **numbers,
            "provenance": where, "peer_libraries": peer,
        }  # fmt: skip
        (asked.results / f"{part}.json").write_text(
            json.dumps(record, indent=1, allow_nan=False) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
