#!/usr/bin/env bash
# Builds the Dockerfile without a container engine and runs the smoke preset inside, as root on
# Debian or Ubuntu: buildah with chroot isolation, over a base that debootstrap makes, for a machine
# that has neither docker nor a registry. What it does not try: GPUs, and the base that the
# Dockerfile names (this one has Debian's Python).
#
# WORK  where it is built (a new folder in /tmp; some 8 GB)   MIRROR  of Debian (apt's own)
# FOLDERS  of this machine that pip's settings name as local indexes, for the time of the build
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
  # what lets apt and pip of this machine reach their indexes: proxies, certificates, pip's settings
  for file in /etc/apt/apt.conf.d/*proxy* /etc/resolv.conf /etc/ssl/certs/ca-certificates.crt; do
    if [ -e "$file" ]; then cp "$file" "$work/base$file"; fi
  done
  python3 - >"$work/base/etc/pip.conf" <<'END'
import subprocess, sys
shown = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True)
found = dict(line.split("=", 1) for line in shown.stdout.splitlines() if "=" in line)
settings = {key.split(".", 1)[1]: value.strip("'") for key, value in found.items()}
settings["cert"] = "/etc/ssl/certs/ca-certificates.crt"
wanted = ("index-url", "extra-index-url", "find-links", "cert", "timeout")
print("[global]", *(f"{k} = {settings[k]}" for k in wanted if k in settings), sep="\n")
END
  container=$(buildah from scratch)
  buildah add --quiet "$container" "$work/base" / >/dev/null
  buildah commit --quiet --rm "$container" localhost/base >/dev/null
fi
volumes=()
for folder in ${FOLDERS:-}; do volumes+=(--volume "$folder:$folder:ro"); done
buildah build "${volumes[@]}" --build-arg BASE=localhost/base --build-arg COMMIT="$(git rev-parse HEAD)" \
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
