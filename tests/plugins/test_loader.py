"""The loader: whatever a plugin does wrong becomes a reason that is shown, and everybody else goes on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from adasplash_core import plugins
from adasplash_core.backend import BACKEND_API_VERSION
from adasplash_core.errors import UnknownBackendError
from tests.plugins.installing import backend_source, install


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path, to install into; modules imported from it are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv(plugins.ALLOW_LIST_VARIABLE, raising=False)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


def _problem(registry: plugins.Registry, plugin: str) -> str:
    return next(why for origin, why in registry.problems.items() if origin.startswith(f"{plugin} ("))


def test_a_good_plugin_is_registered_with_its_origin(site: Path) -> None:
    install(site, "good_plugin", backend_source("good"), version="2.3", distribution="good-kernels")
    registry = plugins.load()
    record = next(r for r in registry.records if r.name == "good")
    assert (record.origin.plugin, record.origin.distribution, record.origin.version) == ("good_plugin", "good-kernels", "2.3")
    assert record.unavailable_reasons() == []
    assert registry.backend("good").summary == "for tests"
    assert registry.problems == {}


BROKEN = {
    "cannot_import": ("import a_module_that_is_not_there", "its import failed: ModuleNotFoundError: No module named"),
    "bad_syntax": ("def broken(:", "its import failed: SyntaxError"),
    "exits": ("import sys; sys.exit('no licence')", "its import failed: SystemExit: no licence"),
    "old_api": (
        backend_source("old", "api_version = 0"),
        f"it was built for backend API version 0, this is version {BACKEND_API_VERSION}",
    ),
    "takes_our_name": (backend_source("torch"), "the backend name 'torch' is taken by torch (adasplash-core"),
    "named_auto": (backend_source("auto"), "'auto' cannot be a backend's name"),
    "not_a_backend": (
        """
        from adasplash_core.hookspecs import hookimpl

        @hookimpl
        def adasplash_register_backends(register):
            register("a string")
        """,
        "register() wants an AttentionBackend instance, got 'a string'",
    ),
    "raises_in_its_hook": (
        """
        from adasplash_core.hookspecs import hookimpl

        @hookimpl
        def adasplash_register_backends(register):
            raise RuntimeError("no kernels today")
        """,
        "adasplash_register_backends failed: RuntimeError: no kernels today",
    ),
    "exits_in_its_hook": (
        """
        import sys
        from adasplash_core.hookspecs import hookimpl

        @hookimpl
        def adasplash_register_config_providers(register):
            sys.exit(3)
        """,
        "adasplash_register_config_providers failed: SystemExit: 3",
    ),
    "misspells_a_hook": (
        """
        from adasplash_core.hookspecs import hookimpl

        @hookimpl
        def adasplash_register_backend(register):
            pass
        """,
        "adasplash_register_backend is no hook, did you mean adasplash_register_backends?",
    ),
    "wants_other_arguments": (
        """
        from adasplash_core.hookspecs import hookimpl

        @hookimpl
        def adasplash_register_backends(register, device):
            pass
        """,
        "adasplash_register_backends failed: PluginValidationError",
    ),
    "abstract": (
        """
        from adasplash_core.backend import AttentionBackend
        from adasplash_core.hookspecs import hookimpl

        class Half(AttentionBackend):
            name = "half"

        @hookimpl
        def adasplash_register_backends(register):
            register(Half())
        """,
        "adasplash_register_backends failed: TypeError: Can't instantiate abstract class Half",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_has_a_reason_and_the_others_work(site: Path, name: str) -> None:
    source, reason = BROKEN[name]
    install(site, name, source)
    install(site, "zz_later", backend_source("later"))  # sorted behind the broken one, which must not stop it
    registry = plugins.load()
    assert _problem(registry, name).startswith(reason)
    assert {"torch", "later"} <= set(registry.backends)
    assert len(registry.problems) == 1


def test_an_entry_point_that_names_nothing(site: Path) -> None:
    install(site, "points_nowhere", "", target="points_nowhere:absent")
    assert "AttributeError" in _problem(plugins.load(), "points_nowhere")


def test_two_plugins_of_one_name(site: Path) -> None:
    install(site, "twin_a", backend_source("first"), plugin="twin")
    install(site, "twin_b", backend_source("second"), plugin="twin")
    registry = plugins.load()
    assert "first" in registry.backends
    assert "second" not in registry.backends
    assert registry.problems == {"twin (twin_b-dist 1.0)": "another plugin is already named 'twin'"}


def test_what_an_interrupted_uninstall_leaves_behind(site: Path) -> None:
    """A dist-info folder without METADATA: importlib.metadata cannot name it."""
    install(site, "leftover", backend_source("left"))
    next(site.glob("*.dist-info/METADATA")).unlink()
    registry = plugins.load()
    assert "torch" in registry.backends
    assert "left" in registry.backends


def test_part_of_a_plugin_may_fail_and_the_rest_be_used(site: Path) -> None:
    source = backend_source("sound") + (
        "\n    @hookimpl\n    def adasplash_register_config_providers(register):\n        raise KeyError('db')\n"
    )
    install(site, "half_sound", source)
    registry = plugins.load()
    assert "sound" in registry.backends
    assert _problem(registry, "half_sound") == "adasplash_register_config_providers failed: KeyError: 'db'"


def test_an_availability_check_that_raises_is_a_reason(site: Path) -> None:
    install(site, "shaky", backend_source("shaky", "unavailable_reasons = lambda self: 1 / 0"))
    record = next(r for r in plugins.load().records if r.name == "shaky")
    assert record.unavailable_reasons() == ["its availability check failed: ZeroDivisionError('division by zero')"]


class TestAllowList:
    def test_only_those_named_are_loaded(self, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        install(site, "wanted", backend_source("wanted"))
        install(site, "unwanted", "raise AssertionError('imported')")
        monkeypatch.setenv("ADASPLASH_PLUGINS", "torch, wanted")
        registry = plugins.load()
        assert set(registry.backends) == {"torch", "wanted"}
        assert registry.problems == {}

    def test_a_name_that_is_not_installed_is_reported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ADASPLASH_PLUGINS", "torch,wnated")
        assert plugins.load().problems == {
            "wnated (not installed)": "ADASPLASH_PLUGINS names it, and no entry point has that name"
        }

    def test_empty_loads_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ADASPLASH_PLUGINS", "")
        registry = plugins.load()
        assert (registry.backends, registry.problems, registry.plugins) == ({}, {}, [])


def test_an_unknown_backend_names_near_ones_and_what_could_not_be_loaded(site: Path) -> None:
    install(site, "cannot_import", BROKEN["cannot_import"][0])
    with pytest.raises(UnknownBackendError, match=r"Did you mean 'torch'\?") as error:
        plugins.load().backend("trch")
    assert "cannot_import (cannot_import-dist 1.0): its import failed" in str(error.value)


def test_loading_plugins_imports_no_torch(site: Path) -> None:
    install(site, "good_plugin", backend_source("good"))
    code = "import sys; from adasplash_core import plugins; plugins.load(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(site)}, check=True)
