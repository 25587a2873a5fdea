"""Entry point of the group ``adasplash``."""

from __future__ import annotations

from collections.abc import Callable

from adasplash_core.backend import AttentionBackend
from adasplash_core.hookspecs import hookimpl
from adasplash_torch.backend import TorchBackend


@hookimpl
def adasplash_register_backends(register: Callable[[AttentionBackend], None]) -> None:
    register(TorchBackend())
