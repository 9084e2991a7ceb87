#!/usr/bin/env bash
#SBATCH --job-name=peftbench
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --time=08:00:00
#SBATCH --requeue
# A matrix over the tasks of a Slurm array, one GPU each; an example to copy and change.
#
#   sbatch --array=1-8 scripts/slurm_array.sh output/night --preset nightly
#   peftbench merge output/night/*.json -o output/night.json     # when all have ended
#
# The first argument is a folder that all nodes see; the others go to `pytest bench`. --exclusive:
# a neighbour on the node would be in the times. A task that was preempted and put back into the
# queue goes on with its finished rounds.
set -euo pipefail
if [ $# -lt 1 ] || [ -z "${SLURM_ARRAY_TASK_ID:-}" ]; then
  echo "usage: sbatch --array=1-N slurm_array.sh FOLDER [OPTIONS of pytest bench]" >&2
  exit 2
fi
folder=$1 part=$SLURM_ARRAY_TASK_ID
shift
cd "${SLURM_SUBMIT_DIR:-.}"
runs=$folder/runs-$part
mkdir -p "$runs"
options=(--shard "$part/$SLURM_ARRAY_TASK_COUNT" --results-dir "$runs" "--benchmark-json=$folder/$part.json")
earlier=$(find "$runs" -mindepth 1 -maxdepth 1 -type d -printf '%f\n' | sort | tail -n 1)
if [ -n "$earlier" ]; then options+=(--resume "$earlier"); fi
exec "${PEFTBENCH_PYTHON:-.venv/bin/python}" -m pytest bench "${options[@]}" "$@"
