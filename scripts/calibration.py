"""Every promise of the comparison on simulated nights, and what plainer rules give on the same.

    python scripts/calibration.py [NIGHTS] [PART ...]        # 2000 nights: some minutes

Prints a line a goal and exits with 1 if one is missed that docs/comparison.md does not name: those
are marked `known`. `told` is a figure without a promise.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import calibration_goals as goals


def main() -> int:
    asked = sys.argv[1:]
    nights = int(asked.pop(0)) if asked and asked[0].isdigit() else 2000
    parts = {part.__name__.removesuffix("_goals"): part for part in goals.ALL}
    unknown = [name for name in asked if name not in parts]
    if unknown:
        print(f"unknown part {unknown[0]!r}; choose from: {', '.join(parts)}", file=sys.stderr)
        return 2
    started, failed, count = time.monotonic(), 0, 0
    print(f"{nights} simulated nights a goal; all figures in per cent")
    for name in asked or parts:
        for goal in parts[name](nights):
            word = "told" if goal.promised == "(told)" else "ok" if goal.met else "MISS"
            count, failed = count + 1, failed + (not goal.met and not goal.known)
            word = "known" if goal.known else word
            line = f"{word:<5} {goal.name:<62} {goal.promised:>8}  {goal.reached:6.2f}"
            print(line + (f"   [{goal.others}]" if goal.others else ""), flush=True)
    print(f"{failed} of {count} goals missed, {time.monotonic() - started:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
