"""Exact alpha-entmax attention behind one call, with pluggable backends and configs tuned per machine.

Importing this package loads neither torch nor a backend: the public names below are resolved on first use (PEP 562).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adasplash_core.api import (
        AttentionStats as AttentionStats,
    )
    from adasplash_core.api import (
        attention as attention,
    )
    from adasplash_core.api import (
        entmax as entmax,
    )
    from adasplash_core.api import (
        entmax15 as entmax15,
    )
    from adasplash_core.api import (
        explain as explain,
    )
    from adasplash_core.api import (
        list_backends as list_backends,
    )
    from adasplash_core.api import (
        sparsemax as sparsemax,
    )
    from adasplash_core.backend import AttentionBackend as AttentionBackend
    from adasplash_core.backend import KernelConfig as KernelConfig
    from adasplash_core.spec import AttentionSpec as AttentionSpec

__all__ = [
    "AttentionBackend",
    "AttentionSpec",
    "AttentionStats",
    "KernelConfig",
    "__version__",
    "attention",
    "entmax",
    "entmax15",
    "explain",
    "list_backends",
    "sparsemax",
]

__version__ = "0.1.0"

_HOMES = {
    "AttentionBackend": "backend",
    "AttentionSpec": "spec",
    "AttentionStats": "api",
    "KernelConfig": "backend",
    "attention": "api",
    "entmax": "api",
    "entmax15": "api",
    "explain": "api",
    "list_backends": "api",
    "sparsemax": "api",
}


def __getattr__(name: str) -> Any:
    if (home := _HOMES.get(name)) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{home}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
