"""Says what an installation will download, and stops on a Python that is too old."""

from __future__ import annotations

import platform
import shutil
import sys


def main() -> int:
    if sys.version_info < (3, 11):  # noqa: UP036 - run by whatever `python3` is
        print(
            f"peftbench needs Python 3.11 or newer, this is {platform.python_version()};"
            " give another with `make PYTHON=/path/to/python3.12 ...`",
            file=sys.stderr,
        )
        return 1
    if sys.platform == "win32":
        print("peftbench does not run on Windows itself; run it inside WSL2", file=sys.stderr)
        return 1
    torch_index = sys.argv[1] if len(sys.argv) > 1 else ""
    has_gpu = shutil.which("nvidia-smi") is not None
    if torch_index or sys.platform == "darwin":
        print("installing into .venv: about 0.5 GB to download (a CPU build of torch)")
    elif has_gpu:
        print("installing into .venv: about 3 GB to download (torch with its CUDA packages)")
    else:
        print(
            "installing into .venv: up to 3 GB to download where the package index serves torch's"
            " CUDA build,\n  about 0.5 GB where it serves a CPU build. No NVIDIA driver was found:"
            " to get the CPU build from\n  PyTorch's own index, stop now and run"
            " `make <target> TORCH_INDEX=<address>`, the address that\n  PyTorch's page 'Get"
            " started' prints for pip and CPU."
        )
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
