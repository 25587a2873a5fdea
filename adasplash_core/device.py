"""DeviceInfo: the facts about a device that configs depend on. Imports torch only when asked about a device."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """One device: what it is called and what limits it has. Sizes in bytes."""

    type: str  # "cuda", "cpu", ...
    name: str  # as the driver or the kernel reports it; MIG slices carry their profile
    index: int = 0
    capability: tuple[int, int] | None = None  # CUDA compute capability
    multiprocessors: int = 0  # SMs; for a CPU the threads that torch uses
    shared_memory: int = 0  # largest shared memory of one block
    total_memory: int = 0
    runtime: str = ""  # CUDA/ROCm version torch was built for
    driver: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def capability_name(self) -> str:
        """``"9.0"``, or ``""`` where there is none."""
        return ".".join(map(str, self.capability)) if self.capability else ""


def device_info(device: torch.device | str) -> DeviceInfo:
    """Facts about one device, read once a process.

    Raises
    ------
    RuntimeError: from torch, if there is no such device.
    """
    import torch

    device = torch.device(device)
    index = device.index
    if index is None:
        index = torch.cuda.current_device() if device.type == "cuda" else 0
    # A CPU's fastest configs depend on the number of threads, which can be set at run time.
    return _device_info(device.type, index, torch.get_num_threads() if device.type == "cpu" else 0)


@cache
def _device_info(device_type: str, index: int, threads: int) -> DeviceInfo:
    import torch

    if device_type == "cuda":
        properties = torch.cuda.get_device_properties(index)
        return DeviceInfo(
            type="cuda",
            name=properties.name,
            index=index,
            capability=(properties.major, properties.minor),
            multiprocessors=properties.multi_processor_count,
            shared_memory=getattr(properties, "shared_memory_per_block_optin", 0),
            total_memory=properties.total_memory,
            runtime=f"cuda {torch.version.cuda}" if torch.version.cuda else f"rocm {torch.version.hip}",
            driver=_driver_version(),
        )
    if device_type == "cpu":
        return DeviceInfo(type="cpu", name=_cpu_name(), multiprocessors=threads, total_memory=_ram_bytes())
    return DeviceInfo(type=device_type, name=device_type, index=index)


def visible_devices() -> list[DeviceInfo]:
    """Every visible CUDA device, in torch's order; empty without a GPU."""
    import torch

    return [device_info(f"cuda:{i}") for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []


def _driver_version() -> str:
    version = Path("/proc/driver/nvidia/version")
    try:
        words = version.read_text(encoding="utf-8").split("\n")[0].split()
    except OSError:
        return ""
    return next((w for w in words if w[:1].isdigit() and "." in w), "")


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        return platform.processor() or platform.machine()  # not Linux
    return platform.processor() or platform.machine()


def _ram_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0
