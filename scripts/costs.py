"""What PPO costs against DPO and ORPO, as a table in docs/ppo.md, out of committed records.

    python scripts/costs.py docs/ppo.md results/*/*/*.json

A folder holds one machine's runs of one preset: each case counts with its newest record there, and
folders without PPO add nothing. Cases of one model and adapter are compared on the same preference
pairs. "Pairs in PPO's time" is how many pairs the method would have trained on in the seconds that
PPO took, at its own measured rate.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pages import write_part

from peftbench.show import read_rows
from peftbench.summary import MIB, memory_of

AXES = ("model", "adapter", "method")
COMPARED = ("dpo", "orpo", "ppo")
HEADER = (
    "| model, adapter | method | method_s | of PPO's | pairs in PPO's time | peak MiB | preference"
    " accuracy | true reward | KL to base |"
)


def comparisons(records: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(record, PPO's) of cases that have a PPO case of their model and adapter; the last counts."""
    by_axes = {tuple(r["case"][axis] for axis in AXES): r for r in records if r["status"] == "ok"}
    return [
        (by_axes[model, adapter, other], ppo)
        for (model, adapter, method), ppo in by_axes.items()
        if method == "ppo"
        for other in COMPARED
        if (model, adapter, other) in by_axes
    ]


def cost_rows(records: list[dict[str, Any]]) -> list[str]:
    """Markdown rows, in the records' order of PPO cases."""
    return [cost_row(row, ppo) for row, ppo in comparisons(records)]


def cost_row(row: dict[str, Any], ppo: dict[str, Any]) -> str:
    model, adapter, method = (row["case"][axis] for axis in AXES)
    share = row["method_s"] / ppo["method_s"]
    cells = [
        f"{model}, {adapter}",
        method,
        f"{row['method_s']:.1f}",
        f"{share:.0%}",
        f"{row['pairs'] / share:,.0f}",
        f"{(memory_of(row)[1] or 0) / MIB:.0f}",
        _change(row, "preference_accuracy", ".1%"),
        _change(row, "true_reward", ".3f"),
        f"{row['kl_to_base_nats_per_token']:.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


def _change(row: dict[str, Any], name: str, form: str) -> str:
    before, after = row.get(f"{name}_base"), row.get(name)
    return "-" if before is None or after is None else f"{before:{form}} -> {after:{form}}"


def main() -> int:
    page, *files = (Path(a) for a in sys.argv[1:])
    lines = [HEADER, "|---|---|---|---|---|---|---|---|---|"]
    by_folder: dict[Path, list[dict[str, Any]]] = {}
    for file in files:
        rows = [record | {"file": file} for record in read_rows(file)]
        by_folder.setdefault(file.parent, []).extend(rows)
    used: list[Path] = []
    for found in by_folder.values():
        ended = [record for record in found if record["status"] == "ok"]
        ended.sort(key=lambda record: record["rounds"][0]["start_unix_s"])
        lines += cost_rows(ended)
        used += sorted({record["file"] for record, _ in comparisons(ended)})
    names = ", ".join(f"`{file}`" for file in used)
    write_part(page, "costs", "\n".join([*lines, "", f"From {names}."]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
