"""The ``adasplash`` group: what it lists, what it imports, how it fails."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from adasplash_cli import main
from adasplash_cli.main import COMMANDS, SECTIONS, LazyGroup, cli
from adasplash_core import plugins
from adasplash_core.errors import AdasplashWarning, ArgumentError, BackendUnsupportedError, StoreError
from adasplash_core.hookspecs import hookimpl

OURS = {"adasplash_cli", "adasplash_core", "adasplash_cupy", "adasplash_torch", "adasplash_triton", "adasplash_tuner"}


def run(*arguments: str, group: click.Group = cli) -> tuple[int, str, str]:
    result = CliRunner().invoke(group, list(arguments), prog_name="adasplash")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def modules_after(program: str) -> set[str]:
    """Top-level modules that a new process has loaded at the end of ``program``."""
    code = f"{program}\nimport json, sys\nprint(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


class TestHelp:
    def test_lists_every_command_in_its_section(self) -> None:
        code, out, _ = run("--help")
        assert code == 0
        section = ""
        found = {}
        for line in out.splitlines():
            if line.rstrip(":") in SECTIONS:
                section = line.rstrip(":")
            elif (name := line.strip().partition(" ")[0]) in COMMANDS:
                found[name] = section
        assert found == {name: entry.section for name, entry in COMMANDS.items()}

    def test_loads_hardly_more_than_a_bare_click_program(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ADASPLASH_PLUGINS", "torch,tuner")  # a stranger's plugin may load what it likes
        bare = modules_after("import click\n@click.group()\ndef cli(): pass\ncli(['--help'], standalone_mode=False)")
        ours = modules_after("from adasplash_cli.main import cli\ncli(['--help'], standalone_mode=False)")
        assert ours - bare - set(sys.stdlib_module_names) <= OURS | {"pluggy"}

    def test_of_a_command_does_not_load_torch_or_the_database(self) -> None:
        for name in COMMANDS:
            loaded = modules_after(f"from adasplash_cli.main import cli\ncli(['{name}', '--help'], standalone_mode=False)")
            assert not loaded & {"torch", "sqlalchemy", "transformers", "triton", "rich"}, name

    def test_version(self) -> None:
        from importlib.metadata import version

        assert run("--version") == (0, f"adasplash {version('adasplash-core')}\n", "")


def leaves(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            yield from leaves(child, f"{path} {name}")
    if not isinstance(command, click.Group) or command.invoke_without_command:
        yield path, command


class TestCommands:
    @pytest.mark.parametrize("name", COMMANDS)
    def test_is_what_the_table_says(self, name: str) -> None:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        assert command.name == name
        assert command.help
        assert len(COMMANDS[name].help) < 80

    @pytest.mark.parametrize("name", COMMANDS)
    def test_takes_json(self, name: str) -> None:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        for path, leaf in leaves(command, name):
            assert any("--json" in option.opts for option in leaf.params), path

    def test_unknown_name_gets_near_matches(self) -> None:
        code, _, err = run("exlpain")
        assert code == 2
        assert "No such command 'exlpain'. Did you mean 'explain'?" in err

    def test_unknown_name_shows_plugins_that_could_not_be_loaded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            plugins, "_registry", plugins.Registry(problems={"fancy (fancy-kernels 2.0)": "its import failed: boom"})
        )
        code, _, err = run("fancy-tune", group=LazyGroup("adasplash"))
        assert code == 2
        assert "fancy (fancy-kernels 2.0): its import failed: boom" in err


def group_with_plugin(monkeypatch: pytest.MonkeyPatch, plugin: object) -> tuple[LazyGroup, plugins.Registry]:
    registry = plugins.Registry(plugins=[(plugins.Origin("greeter", "greeter-dist", "1.0"), plugin)])
    monkeypatch.setattr(plugins, "_registry", registry)
    return LazyGroup("adasplash"), registry


class Greeter:
    @hookimpl
    def adasplash_register_commands(self, cli: click.Group) -> None:
        @cli.command("greet")
        def greet() -> None:
            """Say hello."""
            click.echo("hello")


class Usurper:
    @hookimpl
    def adasplash_register_commands(self, cli: click.Group) -> None:
        cli.add_command(click.Command("tune", callback=lambda: click.echo("mine now")))


class TestPluginCommands:
    def test_are_listed_and_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        group, registry = group_with_plugin(monkeypatch, Greeter())
        _, out, _ = run("--help", group=group)
        assert "Plugins:" in out
        assert "Say hello." in out.partition("Plugins:")[2]
        assert run("greet", group=group) == (0, "hello\n", "")
        assert not registry.problems

    def test_are_not_loaded_for_our_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Slow:
            @hookimpl
            def adasplash_register_commands(self, cli: click.Group) -> None:
                raise AssertionError("not for `info --help`")

        group, registry = group_with_plugin(monkeypatch, Slow())
        assert run("info", "--help", group=group)[0] == 0
        assert not registry.problems

    def test_cannot_take_the_name_of_ours(self, monkeypatch: pytest.MonkeyPatch) -> None:
        group, registry = group_with_plugin(monkeypatch, Usurper())
        assert run("--help", group=group)[0] == 0
        assert "the command name 'tune' is taken" in registry.problems["greeter (greeter-dist 1.0)"]
        assert "tune" not in group.commands


class TestErrors:
    @pytest.mark.parametrize(
        ("error", "code"),
        [
            (ArgumentError("alpha must be at least 1.", seen="alpha=0.5"), 2),
            (BackendUnsupportedError("torch", ["no dropout"]), 2),
            (StoreError("sqlite:///x", "is locked", "Try again."), 1),
        ],
    )
    def test_of_the_library_print_as_their_message(self, error: Exception, code: int) -> None:
        @click.group(cls=LazyGroup)
        @click.option("--debug", is_flag=True)
        def group(debug: bool) -> None: ...

        @group.command("fail")
        def fail() -> None:
            raise error

        assert run("fail", group=group) == (code, "", f"Error: {error}\n")
        with pytest.raises(type(error)):
            run("--debug", "fail", group=group)

    def test_bugs_keep_their_traceback(self) -> None:
        group = LazyGroup("adasplash")

        @group.command("fail")
        def fail() -> None:
            raise ZeroDivisionError("a bug")

        with pytest.raises(ZeroDivisionError):
            run("fail", group=group)

    def test_warnings_print_without_their_source_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        with warnings.catch_warnings(record=False):
            warnings.simplefilter("always")
            warnings.showwarning = main._show_warning
            warnings.warn("defaults are used", AdasplashWarning, stacklevel=1)
        assert capsys.readouterr().err == "Warning: defaults are used\n"

    def test_the_installed_script_ends_with_the_exit_code(self) -> None:
        done = subprocess.run([sys.executable, "-m", "adasplash_cli.main", "nonsense"], capture_output=True, text=True)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
