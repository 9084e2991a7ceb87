#!/usr/bin/env bash
# Builds the Dockerfile without a container engine and runs the smoke preset inside, as root on
# Debian or Ubuntu: buildah with chroot isolation, over a base that debootstrap makes, for a machine
# that has neither docker nor a registry. What it does not try: GPUs, and the base that the
# Dockerfile names (this one has Debian's Python).
#
# WORK  where it is built (a new folder in /tmp; some 8 GB)   MIRROR  of Debian (apt's own)
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "$(id -u)" != 0 ]; then
  echo "peftbench: image_check.sh needs root: debootstrap and chroot do" >&2
  exit 2
fi
need=()
for program in buildah debootstrap; do command -v "$program" >/dev/null || need+=("$program"); done
if [ ${#need[@]} -gt 0 ]; then
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "${need[@]}"
fi
work=${WORK:-$(mktemp -d -t peftbench-image-XXXXXX)}
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=vfs
export CONTAINERS_STORAGE_CONF="$work/storage.conf"
mkdir -p "$work/storage" "$work/run"
printf '[storage]\ndriver = "vfs"\ngraphroot = "%s/storage"\nrunroot = "%s/run"\n' "$work" "$work" \
  >"$CONTAINERS_STORAGE_CONF"

if ! buildah images --quiet localhost/base >/dev/null 2>&1; then
  [ -d "$work/base" ] || debootstrap --variant=minbase \
    --include=ca-certificates,python3,python3-venv bookworm "$work/base" ${MIRROR:+"$MIRROR"}
  # what lets apt and pip of this machine reach their indexes
  for file in /etc/apt/apt.conf.d/*proxy* /etc/pip.conf /etc/resolv.conf; do
    if [ -e "$file" ]; then cp "$file" "$work/base$file"; fi
  done
  container=$(buildah from scratch)
  buildah add --quiet "$container" "$work/base" / >/dev/null
  buildah commit --quiet --rm "$container" localhost/base >/dev/null
fi
buildah build --build-arg BASE=localhost/base --build-arg COMMIT="$(git rev-parse HEAD)" \
  --tag localhost/peftbench .
container=$(buildah from localhost/peftbench)
trap 'buildah rm "$container" >/dev/null' EXIT
inside() { buildah run --user 4321:4321 "$container" -- "$@"; }
echo "--- without arguments"
inside peftbench --help | head -5
echo "--- who, what, and that a compiler is there"
inside sh -c 'id -u; gcc --version | head -1; peftbench env | head -12'
echo "--- no weights, no token, no cache in it"
inside sh -c '! find / -xdev -name "*.gguf" -size +1M -o -xdev -path "*huggingface/hub*" -type d 2>/dev/null | grep .'
echo "--- smoke"
inside peftbench bench --preset smoke
echo "--- train"
inside peftbench train --model tiny-gpt2 --adapter lora --method sft --preset smoke
echo "the image builds and works"
