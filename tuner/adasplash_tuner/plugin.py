"""The tuner's plugin: gives the core a source of tuned configs. Imports neither torch nor SQLAlchemy."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from adasplash_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from adasplash_core.configs import ConfigProvider


@hookimpl
def adasplash_register_config_providers(register: Callable[[ConfigProvider], None]) -> None:
    from adasplash_tuner.provider import TunedConfigs

    register(TunedConfigs())
