#!/usr/bin/env bash
# Runs a command of peftbench in its image: image.sh (train|infer|shell|bench|...) [arguments]
#
# IMAGE   its name (peftbench)        GPUS   which to pass through: all, device=0, none (all)
# OUTPUT  the folder that results go to (./output)
# CACHE   the folder for models and compiled kernels (~/.cache/peftbench-image)
# A Hub token is handed over by name when it runs: it is in no layer and no command line.
set -euo pipefail

say() {
  echo "peftbench: $*" >&2
  exit 2
}

image=${IMAGE:-peftbench} gpus=${GPUS:-all} docker=${DOCKER:-docker}
output=${OUTPUT:-$PWD/output} cache=${CACHE:-$HOME/.cache/peftbench-image}

command -v "$docker" >/dev/null || say "$docker is not installed; install it, or add LOCAL=1 to run without an image"
"$docker" version >/dev/null 2>&1 || say "$docker has no engine that answers; start it, or add LOCAL=1 to run without an image"
"$docker" image inspect "$image" >/dev/null 2>&1 || say "there is no image $image yet; make build"

options=(--rm --user "$(id -u):$(id -g)" --ipc=host -e HUGGINGFACE_TOKEN -e HF_TOKEN)
if [ "$gpus" != none ]; then
  command -v nvidia-smi >/dev/null || say "no NVIDIA driver is installed here; install it, or add GPUS=none to use the CPU"
  nvidia-smi >/dev/null 2>&1 || say "the NVIDIA driver sees no GPU (nvidia-smi fails); add GPUS=none to use the CPU"
  options+=(--gpus "$gpus")
fi
mkdir -p "$output" "$cache"
options+=(-v "$output:/peftbench/output" -v "$cache:/cache")
[ -t 0 ] && [ -t 1 ] && options+=(-it)
if [ "${1:-}" = shell ]; then
  exec "$docker" run "${options[@]}" --entrypoint bash "$image"
fi
exec "$docker" run "${options[@]}" "$image" "$@"
