#!/usr/bin/env bash
# One night of one leg: run the preset, compare with the leg's history, confirm suspects, write the
# summary and the report, store the session. nightly.sh HISTORY OUT
#
# HISTORY/<leg>/ holds the earlier sessions and gets this one; OUT gets run.json, the verdicts,
# summary.md, report.html and versions.txt. Exit code: 0; 1 where something gates; 2 for a mistake.
#
# LEG     pinned: requirements.lock; newest: the same, then the newest of the libraries under test
# PRESET  of the matrix (nightly)      PYTHON  to make environments with (python3)
# UPGRADE the command's packages for the newest leg
set -euo pipefail
if [ $# -ne 2 ]; then
  echo "usage: nightly.sh HISTORY OUT" >&2
  exit 2
fi
history=$1 out=$2 leg=${LEG:-pinned} preset=${PRESET:-nightly}
upgrade=${UPGRADE-torch transformers peft trl accelerate datasets bitsandbytes}
case $leg in pinned | newest) ;; *)
  echo "nightly.sh: LEG is $leg; it must be pinned or newest" >&2
  exit 2
  ;;
esac
cd "$(dirname "$0")/.."
mkdir -p "$history/$leg" "$out"

venv=.venv
if [ "$leg" = newest ]; then venv=.venv-newest; fi
make install VENV="$venv" ${PYTHON:+PYTHON="$PYTHON"}
if [ "$leg" = newest ] && [ -n "$upgrade" ]; then
  # shellcheck disable=SC2086  # several packages
  "$venv/bin/python" -m pip install --quiet --upgrade $upgrade
fi
"$venv/bin/python" -m pip freeze >"$out/versions.txt"

options=(--preset "$preset" "--benchmark-json=$out/run.json" --results-dir "$out/runs")
if compgen -G "$history/$leg/*.json" >/dev/null; then
  options+=(--compare-to "$history/$leg" --confirm --fail-on-regression)
fi
code=0
COLUMNS=160 "$venv/bin/python" -m pytest bench -p no:cacheprovider "${options[@]}" || code=$?

{
  echo "# Night, $leg versions"
  echo
  if [ -f "$out/run.verdicts.md" ]; then
    cat "$out/run.verdicts.md"
  else
    echo "The first night of this leg: nothing to compare with yet."
  fi
  if [ "$leg" = newest ] && newest_pinned=$(find "$history/pinned" -name '*.json' 2>/dev/null | sort | tail -1) \
    && [ -n "$newest_pinned" ] && [ -f "$out/run.json" ]; then
    echo
    echo "## Against the pinned versions"
    echo
    "$venv/bin/python" -m peftbench compare "$newest_pinned" "$out/run.json" --format markdown || true
  fi
} >"$out/summary.md"

if [ -f "$out/run.json" ]; then
  commit=$(git rev-parse --short HEAD)
  cp "$out/run.json" "$history/$leg/$(date -u +%F-%H%M%S)-$commit.json"
  "$venv/bin/python" -m peftbench report "$history/$leg" -o "$out/report.html"
fi
exit "$code"
