"""Writes distributions to a folder on the path, as an installer would leave them: fast, and broken in any way wanted."""

from __future__ import annotations

import textwrap
from pathlib import Path


def install(
    site: Path,
    name: str,
    source: str,
    *,
    version: str = "1.0",
    distribution: str | None = None,
    plugin: str | None = None,
    target: str | None = None,
) -> None:
    """A distribution with one module ``name`` and one entry point.

    Parameters
    ----------
    source: of the module; dedented.
    distribution: its name, by default ``{name}-dist``.
    plugin: the entry point's name, by default the module's.
    target: what the entry point names, by default the module.
    """
    distribution = distribution or f"{name}-dist"
    (site / f"{name}.py").write_text(textwrap.dedent(source), encoding="utf-8")
    info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n", encoding="utf-8")
    entries = info / "entry_points.txt"
    before = entries.read_text(encoding="utf-8") if entries.exists() else "[adasplash]\n"
    entries.write_text(f"{before}{plugin or name} = {target or name}\n", encoding="utf-8")


BACKEND = """
    from adasplash_core.backend import AttentionBackend, KernelConfig
    from adasplash_core.hookspecs import hookimpl


    class Backend(AttentionBackend):
        name = {name!r}
        summary = "for tests"
        {body}

        def config_class(self, pass_):
            return KernelConfig

        def forward(self, call):
            raise NotImplementedError

        def backward(self, call, grad_out, saved, out):
            raise NotImplementedError


    @hookimpl
    def adasplash_register_backends(register):
        register(Backend())
"""


def backend_source(name: str, body: str = "") -> str:
    """A plugin that registers one backend of this name; ``body`` is a line of its class."""
    return BACKEND.format(name=name, body=body)
