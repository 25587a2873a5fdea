"""``adasplash info``: an environment report to paste in a bug report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from typing import Any

import click

from adasplash_cli.output import json_option, print_json

PACKAGES = (
    "torch",
    "triton",
    "cupy-cuda13x",
    "cupy-cuda12x",
    "transformers",
    "entmax",
    "sqlalchemy",
    "pluggy",
    "numpy",
    "safetensors",
)
"""Distributions whose versions matter, installed or not."""

VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "CUDA_HOME",
    "LD_LIBRARY_PATH",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "TRITON_INTERPRET",
    "TRITON_CACHE_DIR",
    "PYTORCH_CUDA_ALLOC_CONF",
)
"""Variables of others that change speed or results; all that start with ``ADASPLASH_`` are shown besides."""


@click.command("info")
@json_option
def command(as_json: bool) -> None:
    """Describe this installation and machine, to paste in a bug report."""
    report = collect()
    if as_json:
        print_json(report)
    else:
        _print(report)


def collect() -> dict[str, Any]:
    """Everything the report says, JSON-like."""
    return {
        "adasplash": _version("adasplash-core"),
        "python": f"{platform.python_version()} ({platform.python_implementation()}, {sys.executable})",
        "system": platform.platform(),
        "packages": {
            name: version for name in PACKAGES if (version := _version(name)) is not None or not name.startswith("cupy")
        },
        "torch": _torch(),
        "devices": _devices(),
        "backends": _backends(),
        "plugins": _plugins(),
        "database": _database(),
        "environment": _environment(),
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch() -> dict[str, Any]:
    import torch

    return {
        "cuda_build": torch.version.cuda,
        "hip_build": torch.version.hip,
        "cuda_available": torch.cuda.is_available(),
        "cudnn": torch.backends.cudnn.version(),
        "threads": torch.get_num_threads(),
    }


def _devices() -> list[dict[str, Any]]:
    from adasplash_core.device import device_info, visible_devices

    return [device.as_dict() for device in [*visible_devices(), device_info("cpu")]]


def _backends() -> list[dict[str, Any]]:
    from adasplash_core.plugins import registry

    found = []
    for record in registry().records:
        reasons = record.unavailable_reasons()
        found.append({"name": record.name, "origin": str(record.origin), "available": not reasons, "reasons": reasons})
    return found


def _plugins() -> dict[str, Any]:
    from adasplash_core.plugins import registry

    found = registry()
    return {"loaded": [str(origin) for origin, _ in found.plugins], "problems": dict(found.problems)}


def _database() -> dict[str, Any]:
    from adasplash_core.errors import StoreError
    from adasplash_tuner.storage.location import locate

    try:
        location = locate()
        found: dict[str, Any] = {"location": str(location), "exists": location.exists()}
        if location.exists():
            from adasplash_tuner.storage.snapshot import open_source

            found |= open_source(location).counts()
    except StoreError as error:
        return {"location": "unusable", "problem": str(error)}
    return found


def _environment() -> dict[str, str]:
    """Set variables that matter. Passwords in URLs are not shown."""
    names = sorted(name for name in os.environ if name.startswith("ADASPLASH_"))
    values = {name: os.environ[name] for name in (*names, *VARIABLES) if name in os.environ}
    return {name: re.sub(r"(://[^:/@]*):.*@", r"\1:***@", value) for name, value in values.items()}


def _print(report: dict[str, Any]) -> None:
    click.echo(f"adasplash-core {report['adasplash']}, Python {report['python']}, {report['system']}")
    click.echo(
        "packages: " + ", ".join(f"{name} {version or '(not installed)'}" for name, version in report["packages"].items())
    )
    torch = report["torch"]
    build = (
        f"CUDA {torch['cuda_build']}"
        if torch["cuda_build"]
        else f"ROCm {torch['hip_build']}"
        if torch["hip_build"]
        else "CPU only"
    )
    click.echo(f"torch: built for {build}, {torch['threads']} threads, cuDNN {torch['cudnn'] or 'none'}")
    click.echo("devices:")
    for device in report["devices"]:
        click.echo(f"  {_device_line(device)}")
    click.echo("backends:")
    for backend in report["backends"]:
        state = "available" if backend["available"] else f"not available: {'; '.join(backend['reasons'])}"
        click.echo(f"  {backend['name']} from {backend['origin']}: {state}")
    click.echo("plugins: " + (", ".join(report["plugins"]["loaded"]) or "none"))
    for origin, why in report["plugins"]["problems"].items():
        click.echo(f"  problem with {origin}: {why}")
    click.echo("database:")
    for name, value in report["database"].items():
        click.echo(f"  {name}: {value}")
    click.echo("environment:")
    for name, value in report["environment"].items() or {"": "nothing that matters is set"}.items():
        click.echo(f"  {name}={value}" if name else f"  {value}")


def _device_line(device: dict[str, Any]) -> str:
    memory = f"{device['total_memory'] / 2**30:.1f} GiB"
    if device["type"] == "cpu":
        return f"cpu: {device['name']}, {device['multiprocessors']} threads, {memory}"
    if device["type"] == "cuda":
        capability = ".".join(map(str, device["capability"] or ()))
        toolchain = f"{device['runtime']}, driver {device['driver'] or 'unknown'}"
        return f"cuda:{device['index']}: {device['name']}, {capability}, {device['multiprocessors']} SMs, {memory}, {toolchain}"
    return f"{device['type']}: {device['name']}"
