#!/usr/bin/env bash
# The wheel alone: builds it, installs it into a new environment without the checkout, and runs a
# preset from an empty folder. wheel_check.sh [PRESET]
#
# PYTHON  to make the environment with. All is in a new folder in /tmp, removed at the end.
set -euo pipefail
cd "$(dirname "$0")/.."
unset PYTHONPATH # it could bring the checkout back in
preset=${1:-quick} python=${PYTHON:-python3}
work=$(mktemp -d -t peftbench-wheel-XXXXXX)
trap 'rm -rf "$work"' EXIT

check() {
  "$python" -m venv "$work/venv"
  # errors only: where an index lies is not for a log
  "$work/venv/bin/pip" install -qq -r requirements.lock
  # from a copy: setuptools leaves a build folder behind, and packs what an earlier one holds
  mkdir "$work/source"
  cp -R peftbench pyproject.toml README.md LICENSE "$work/source"
  "$work/venv/bin/pip" wheel -qq --no-deps --no-build-isolation --wheel-dir "$work" "$work/source"
  "$work/venv/bin/pip" install -qq --no-deps "$work"/peftbench-*.whl
  echo "$(basename "$work"/peftbench-*.whl): $(wc -c <"$(echo "$work"/peftbench-*.whl)") bytes"
  mkdir "$work/empty"
  cd "$work/empty"
  "$work/venv/bin/python" -c "import sys, peftbench as p; assert p.__file__.startswith(sys.prefix), p"
  "$work/venv/bin/python" -m peftbench bench --preset "$preset"
  "$work/venv/bin/peftbench" show output/run.json | tail -3
  echo "the wheel works alone: $(find . -type f | wc -l) files, none of the checkout"
}

# one name for the folder, whatever it is called this time
check 2>&1 | sed -u "s|$work|WORK|g"
