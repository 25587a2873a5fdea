"""Values of options that several commands take."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from adasplash_core.device import DeviceInfo

DTYPES = ("float16", "bfloat16", "float32", "float64")


def find_device(name: str | None) -> tuple[str, DeviceInfo]:
    """The device of ``--device`` and its facts; without a name a GPU if there is one, else the CPU.

    Raises
    ------
    click.BadParameter: if torch knows no such device, or there is none.
    """
    import torch

    from adasplash_core.device import device_info

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        return str(device), device_info(device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise click.BadParameter(f"{name!r}: {str(error).splitlines()[0]}", param_hint="--device") from error
