"""Entry point: registers the Triton backend. Imports neither torch nor triton."""

from __future__ import annotations

from collections.abc import Callable

from adasplash_core.backend import AttentionBackend
from adasplash_core.hookspecs import hookimpl
from adasplash_triton.backend import TritonBackend


@hookimpl
def adasplash_register_backends(register: Callable[[AttentionBackend], None]) -> None:
    register(TritonBackend())
