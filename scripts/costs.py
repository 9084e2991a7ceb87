"""What PPO costs against DPO and ORPO, as a table in docs/ppo.md, out of committed records.

    python scripts/costs.py docs/ppo.md results/*/*/*.json

A folder holds one machine's runs of one preset: each case counts with its newest record there, and
folders without PPO add nothing. Cases of one model and adapter are compared on the same preference
pairs. "Pairs in PPO's time" is how many
pairs the method would have trained on in the seconds that PPO took, at its own measured rate.
"""

from __future__ import annotations

import sys
from collections.abc import Container
from pathlib import Path
from typing import Any

from peftbench.show import read_rows
from peftbench.summary import MIB, memory_of

START, END = "<!-- costs: made by `make costs` -->", "<!-- end of costs -->"
COMPARED = ("dpo", "orpo", "ppo")
HEADER = (
    "| model, adapter | method | method_s | of PPO's | pairs in PPO's time | peak MiB | preference"
    " accuracy | true reward | KL to base |"
)


def cost_rows(records: list[dict[str, Any]]) -> list[str]:
    """Markdown rows; cases without a PPO case of the same model and adapter are left out."""
    by_axes = {axes_of(r): r for r in records if r["status"] == "ok"}
    lines = []
    for (model, adapter, method), ppo in by_axes.items():
        if method != "ppo":
            continue
        for other in COMPARED:
            row = by_axes.get((model, adapter, other))
            if row is not None:
                lines.append(cost_row(f"{model}, {adapter}", other, row, ppo))
    return lines


def cost_row(name: str, method: str, row: dict[str, Any], ppo: dict[str, Any]) -> str:
    share = row["method_s"] / ppo["method_s"]
    cells = [
        name,
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


def axes_of(record: dict[str, Any]) -> tuple[str, str, str]:
    case = record["case"]
    return case["model"], case["adapter"], case["method"]


def counts(record: dict[str, Any], by_axes: Container[tuple[str, str, str]]) -> bool:
    """Whether the record is in the table."""
    model, adapter, method = axes_of(record)
    return method in COMPARED and (model, adapter, "ppo") in by_axes


def _change(row: dict[str, Any], name: str, form: str) -> str:
    before, after = row.get(f"{name}_base"), row.get(name)
    return "-" if before is None or after is None else f"{before:{form}} -> {after:{form}}"


def main() -> int:
    page, *files = (Path(a) for a in sys.argv[1:])
    text = page.read_text(encoding="utf-8")
    lines = [HEADER, "|---|---|---|---|---|---|---|---|---|"]
    by_folder: dict[Path, list[tuple[Path, dict[str, Any]]]] = {}
    for file in files:
        by_folder.setdefault(file.parent, []).extend((file, r) for r in read_rows(file))
    used = []
    for found in by_folder.values():
        ended = [(file, record) for file, record in found if record["status"] == "ok"]
        newest = sorted(ended, key=lambda item: item[1]["rounds"][0]["start_unix_s"])
        by_axes = {axes_of(record): (file, record) for file, record in newest}
        if rows := cost_rows([record for _, record in by_axes.values()]):
            lines += rows
            shown = (file for file, record in by_axes.values() if counts(record, by_axes))
            used += sorted({f"`{file}`" for file in shown})
    names = ", ".join(used)
    head, rest = text.split(START)
    tail = rest.split(END)[1]
    page.write_text(
        f"{head}{START}\n" + "\n".join(lines) + f"\n\nFrom {names}.\n{END}{tail}", encoding="utf-8"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
