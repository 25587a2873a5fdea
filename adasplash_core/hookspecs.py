"""The hooks through which backends, config providers and commands enter. Our own plugins use exactly these.

A plugin is a module named by an entry point of the group ``adasplash``, with functions decorated by :data:`hookimpl`. Importing it
must be cheap: neither torch nor a kernel compiler, only on first use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import click

    from adasplash_core.backend import AttentionBackend
    from adasplash_core.configs import ConfigProvider

GROUP = "adasplash"
"""Entry-point group, and the name of the pluggy project."""

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@hookspec
def adasplash_register_backends(register: Callable[[AttentionBackend], None]) -> None:
    """Register attention backends.

    Call ``register(backend)`` once for each, with an instance of an :class:`~adasplash_core.backend.AttentionBackend` subclass. A name
    that is taken, or a class built for another ``BACKEND_API_VERSION``, is listed as unavailable with that reason.
    """


@hookspec
def adasplash_register_config_providers(register: Callable[[ConfigProvider], None]) -> None:
    """Register sources of tuned configs.

    Call ``register(provider)`` with an object that follows the :class:`~adasplash_core.configs.ConfigProvider` protocol. All
    providers are asked; the answer on the best rung of the ladder wins.
    """


@hookspec
def adasplash_register_commands(cli: click.Group) -> None:
    """Add commands to the ``adasplash`` command line: ``cli.add_command(command)`` or the ``@cli.command()`` decorator."""
