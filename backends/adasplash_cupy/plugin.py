"""Entry point: registers the CuPy backend. Imports neither torch nor cupy."""

from __future__ import annotations

from collections.abc import Callable

from adasplash_core.backend import AttentionBackend
from adasplash_core.hookspecs import hookimpl
from adasplash_cupy.backend import CupyBackend


@hookimpl
def adasplash_register_backends(register: Callable[[AttentionBackend], None]) -> None:
    register(CupyBackend())
