"""Install the build of torch that suits this machine, unless one is installed. Run with the environment's own Python.

Usage: install_torch.py [ARGUMENTS FOR PIP ...]

Given arguments go to ``pip install`` as they are. Without them: with an NVIDIA GPU (nvidia-smi answers) and on systems other than
Linux, whatever the package index offers; else a CPU build, from PyTorch's CPU index if it answers, or the release in ``PINNED``.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import urllib.error
import urllib.request

REQUIREMENT = "torch>=2.11"
PINNED = "torch==2.13.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def main() -> int:
    arguments = sys.argv[1:]
    if not arguments and importlib.util.find_spec("torch") is not None:
        print("torch is installed already")
        return 0
    why, arguments = ("as asked", arguments) if arguments else choose()
    print(f"Installing {' '.join(arguments)} ({why})", flush=True)
    return subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    ).returncode


def choose() -> tuple[str, list[str]]:
    """Why, and the arguments for pip."""
    if has_nvidia_gpu():
        return "nvidia-smi lists a GPU", [REQUIREMENT]
    if not sys.platform.startswith("linux"):
        return "the default build has no CUDA on this system", [REQUIREMENT]
    if answers(f"{CPU_INDEX}/torch/"):
        return "no GPU: a CPU build", [REQUIREMENT, "--index-url", CPU_INDEX]
    return "no GPU, and PyTorch's CPU index does not answer", [PINNED]


def has_nvidia_gpu() -> bool:
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU" in listed.stdout


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, TimeoutError):
        return False


if __name__ == "__main__":
    sys.exit(main())
