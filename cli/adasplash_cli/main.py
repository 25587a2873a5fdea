"""The ``adasplash`` group. Lists its commands without importing them: ``adasplash --help`` costs about what click costs."""

from __future__ import annotations

import difflib
import importlib
import warnings
from typing import Any, NamedTuple, TextIO

import click

from adasplash_core.errors import AdasplashError, AdasplashWarning

USAGE_ERROR = 2
"""Exit code of a call that cannot be right as it was written; 1 means that a right call failed."""


class Entry(NamedTuple):
    """A command of ours: where it lives and what ``--help`` says of it."""

    module: str
    help: str
    section: str


SECTIONS = ("Look", "Tune", "Measure", "Plugins")

COMMANDS: dict[str, Entry] = {
    "info": Entry("info", "Describe this installation and machine, to paste in a bug report.", "Look"),
    "backends": Entry("backends", "List the backends and why one is unavailable; check one's conformance.", "Look"),
    "explain": Entry("explain", "Say which backend and config a call would get, and why.", "Look"),
    "tune": Entry("tune", "Find the fastest configs for this machine and remember them.", "Tune"),
    "cache": Entry("cache", "List, show, export, import and prune tuned configs.", "Tune"),
    "capture": Entry("capture", "Save the attention inputs of a real model on a real text.", "Measure"),
    "profile": Entry("profile", "Show how sparse entmax would be on captured inputs, by layer and head.", "Measure"),
    "bench": Entry("bench", "Time every capable backend, and its peak memory, beside softmax.", "Measure"),
}


class LazyGroup(click.Group):
    """A group whose own commands are imported when called, and plugins' when listed or asked for by name."""

    _plugins_loaded = False

    def list_commands(self, ctx: click.Context) -> list[str]:
        self._load_plugin_commands()
        return [*COMMANDS, *sorted(self.commands)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if (entry := COMMANDS.get(cmd_name)) is not None:
            command: click.Command = importlib.import_module(f"adasplash_cli.commands.{entry.module}").command
            return command
        self._load_plugin_commands()
        return self.commands.get(cmd_name)

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """What a plugin calls. An error here becomes the plugin's reason in ``adasplash backends``."""
        name = name or cmd.name
        if name in COMMANDS or name in self.commands:
            raise ValueError(f"the command name {name!r} is taken")
        super().add_command(cmd, name)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            near = difflib.get_close_matches(name, self.list_commands(ctx), n=2, cutoff=0.5)
            hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
            ctx.fail(f"No such command {name!r}.{hint}{self._plugin_problems()}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        names = self.list_commands(ctx)
        rows: dict[str, list[tuple[str, str]]] = {section: [] for section in SECTIONS}
        limit = formatter.width - 6 - max(map(len, names))
        for name in names:
            if (entry := COMMANDS.get(name)) is not None:
                rows[entry.section].append((name, entry.help))
            elif not self.commands[name].hidden:
                rows["Plugins"].append((name, self.commands[name].get_short_help_str(limit)))
        for section, lines in rows.items():
            if lines:
                with formatter.section(section):
                    formatter.write_dl(lines)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AdasplashError as error:
            if ctx.params.get("debug"):
                raise
            click.echo(f"Error: {error}", err=True)
            wrong_usage = isinstance(error, (ValueError, TypeError, NotImplementedError))
            ctx.exit(USAGE_ERROR if wrong_usage else 1)

    def _load_plugin_commands(self) -> None:
        if not self._plugins_loaded:
            self._plugins_loaded = True  # before loading: a plugin's command may look at this group
            from adasplash_core import plugins

            plugins.registry().add_commands(self)

    def _plugin_problems(self) -> str:
        """A missing command may be that of a plugin that could not be loaded."""
        from adasplash_core import plugins

        problems = plugins.registry().problems
        lines = "".join(f"\n  {origin}: {why}" for origin, why in problems.items())
        return f"\nPlugins that could not be used:{lines}" if lines else ""


def _print_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from importlib.metadata import version

    click.echo(f"adasplash {version('adasplash-core')}")
    ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--debug", is_flag=True, help="Show the traceback of an error instead of its message.")
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show the version and exit."
)
def cli(debug: bool) -> None:
    """AdaSplash Core: exact alpha-entmax attention, tuned for the machine it runs on.

    Every command takes --json and -h. Errors in the call exit with 2, failures with 1.
    """


_python_show_warning = warnings.showwarning


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Our own warnings are written for people: their source line is noise here."""
    if issubclass(category, AdasplashWarning):
        click.echo(f"Warning: {message}", err=True)
    else:
        _python_show_warning(message, category, filename, lineno, file, line)


def main() -> None:
    """Entry point of the ``adasplash`` script."""
    warnings.showwarning = _show_warning
    cli(prog_name="adasplash")


if __name__ == "__main__":
    main()
