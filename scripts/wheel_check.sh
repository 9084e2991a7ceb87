#!/usr/bin/env bash
# The wheel alone: builds it, installs it into a new environment without the checkout, and runs a
# preset from an empty folder. wheel_check.sh [PRESET]
#
# WORK  where (a new folder in /tmp; removed at the end)   PYTHON  to make the environment with
set -euo pipefail
cd "$(dirname "$0")/.."
preset=${1:-quick} python=${PYTHON:-python3}
work=$(mktemp -d -t peftbench-wheel-XXXXXX)
trap 'rm -rf "$work"' EXIT
"$python" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet -r requirements.lock
"$work/venv/bin/pip" wheel --quiet --no-deps --no-build-isolation --wheel-dir "$work" .
"$work/venv/bin/pip" install --quiet --no-deps "$work"/peftbench-*.whl
mkdir "$work/empty"
cd "$work/empty"
"$work/venv/bin/python" -m peftbench bench --preset "$preset"
"$work/venv/bin/peftbench" show output/run.json | tail -3
echo "the wheel works alone: $(find . -type f | wc -l) files, none of the checkout"
