"""Which devices of this machine are to be tuned, and what a process must see to use one of them.

A CUDA process sees one MIG slice at most, so each slice is given to its own process by its UUID; what slices there are is read from
``nvidia-smi -L``.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adasplash_core.device import DeviceInfo

_GPU = re.compile(r"^GPU (\d+): (.+) \(UUID: (GPU-[\w-]+)\)")
_SLICE = re.compile(r"^\s+MIG (\S+)\s+Device\s+\d+: \(UUID: (MIG-[\w/-]+)\)")


@dataclass(frozen=True)
class Target:
    """One device. ``model``: what identical ones have in common. ``visible``: its process's CUDA_VISIBLE_DEVICES, if it needs one."""

    name: str
    device: str  # as torch names it in the process that uses it
    model: tuple[object, ...]
    visible: str | None = None

    @classmethod
    def of(cls, device: DeviceInfo) -> Target:
        name = device.type if device.type == "cpu" else f"{device.type}:{device.index}"
        return cls(device.name, name, (device.type, device.name, device.capability, device.multiprocessors))


def targets() -> list[Target]:
    """Every GPU and MIG slice that this process may use; empty if there is none."""
    from adasplash_core.device import visible_devices

    if slices := mig_slices(_nvidia_smi(), os.environ.get("CUDA_VISIBLE_DEVICES")):
        return slices
    return [Target.of(device) for device in visible_devices()]


def mig_slices(listing: str, visible: str | None) -> list[Target]:
    """MIG slices in the output of ``nvidia-smi -L``, and beside them the GPUs that are not sliced; nothing if no GPU is sliced.

    ``visible``: CUDA_VISIBLE_DEVICES. A slice is left out unless it, or its GPU, is named there.
    """
    found: list[Target] = []
    sliced: set[str] = set()
    number, gpu, uuid = "", "", ""
    whole: list[tuple[str, str, str]] = []
    for line in listing.splitlines():
        if match := _GPU.match(line):
            number, gpu, uuid = match.groups()
            whole.append((number, gpu, uuid))
        elif match := _SLICE.match(line):
            profile, slice_uuid = match.groups()
            sliced.add(uuid)
            if _may_use(visible, number, uuid, slice_uuid):
                name = f"{gpu} MIG {profile}"
                found.append(Target(name, "cuda:0", ("cuda", name), slice_uuid))
    if not sliced:
        return []
    rest = [(n, g, u) for n, g, u in whole if u not in sliced and _may_use(visible, n, u)]
    return found + [Target(g, "cuda:0", ("cuda", g), u) for _, g, u in rest]


def _may_use(visible: str | None, number: str, *uuids: str) -> bool:
    if visible is None:
        return True
    named = [word.strip() for word in visible.split(",") if word.strip()]
    return any(word == number or any(uuid.startswith(word) for uuid in uuids) for word in named)


def _nvidia_smi() -> str:
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (
        OSError,
        subprocess.SubprocessError,
    ):  # no NVIDIA driver, or a container without the tool: torch tells what there is
        return ""


def groups(found: Sequence[Target]) -> list[list[Target]]:
    """Identical devices together, in order of appearance."""
    by_model: dict[tuple[object, ...], list[Target]] = {}
    for target in found:
        by_model.setdefault(target.model, []).append(target)
    return list(by_model.values())
