"""Whether this process can compile and run CUDA through CuPy, found out without importing it."""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
import os
import sys
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

_MAJORS = range(11, 20)


def missing() -> list[str]:
    """Sentences on what is missing; empty where everything is there."""
    if importlib.util.find_spec("cupy") is None:
        return [
            'cupy is not installed: pip install "adasplash-core[cupy]" (CUDA 13), or cupy-cuda12x with nvidia-cuda-nvrtc-cu12'
        ]
    if (name := rocm_distribution()) is not None:
        return [f"{name} is built for AMD GPUs, and these kernels are CUDA"]
    driver = driver_version()
    if driver is None:
        return ["there is no NVIDIA driver on this machine"]
    reasons = []
    built_for = cupy_major()
    if built_for is not None and built_for > driver[0]:
        reasons.append(
            f"cupy-cuda{built_for}x is built for CUDA {built_for}, the driver supports up to {driver[0]}.{driver[1]}: "
            f"install cupy-cuda{driver[0]}x in its place"
        )
    if nvrtc_library(built_for) is None:
        wanted = "nvidia-cuda-nvrtc" if built_for is None or built_for >= 13 else f"nvidia-cuda-nvrtc-cu{built_for}"
        reasons.append(f"NVRTC, which compiles the kernels, is not installed: pip install {wanted}")
    if not reasons and not _torch_sees_cuda():
        reasons.append("torch sees no CUDA device")
    return reasons


@cache
def cupy_major() -> int | None:
    """The CUDA major that the installed CuPy is built for; None where its name does not tell (built from source)."""
    return next((major for major in _MAJORS if _installed(f"cupy-cuda{major}x")), None)


@cache
def rocm_distribution() -> str | None:
    """The name of a CuPy for AMD GPUs, if one is installed."""
    return next((name for name in ("amd-cupy", "cupy-rocm-7-0", "cupy-rocm-5-0", "cupy-rocm-4-3") if _installed(name)), None)


@cache
def driver_version() -> tuple[int, int] | None:
    """The newest CUDA version that the driver supports; None without a driver."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        version = ctypes.c_int()
        status = driver.cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return (version.value // 1000, version.value % 1000 // 10) if status == 0 and version.value else None


@cache
def nvrtc_library(major: int | None = None) -> str | None:
    """NVRTC of a CUDA major (None: any) where CuPy looks: NVIDIA's wheels, a toolkit, the system's libraries; None if it is nowhere."""
    wanted = "*" if major is None else str(major)
    patterns = [f"nvrtc64_{wanted}*_0.dll"] if sys.platform == "win32" else [f"libnvrtc.so.{wanted}", f"libnvrtc.so.{wanted}.*"]
    for folder in _library_folders():
        for pattern in patterns:
            if found := sorted(folder.glob(pattern)):
                return str(found[0])
    return ctypes.util.find_library("nvrtc")


def _library_folders() -> Iterator[Path]:
    for entry in map(Path, sys.path):
        for pattern in ("nvidia/*/lib", "nvidia/*/bin", "nvidia/*/bin/x86_64"):
            yield from entry.glob(pattern)
    toolkits = [os.environ[name] for name in ("CUDA_PATH", "CUDA_HOME", "CONDA_PREFIX") if name in os.environ]
    for root in map(Path, [*toolkits, "/usr/local/cuda"]):
        yield from (root / folder for folder in ("lib64", "lib", "bin", "bin/x64", "targets/x86_64-linux/lib"))
    yield from map(Path, os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep))


def _installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _torch_sees_cuda() -> bool:
    """Asked only of a torch that is loaded, as in every call; a listing takes the driver's word."""
    if "torch" not in sys.modules:
        return True
    import torch

    return torch.cuda.is_available()
