"""What commands share: the ``--json`` option, tables, and how numbers are written. rich is imported when something is printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import floor, log10
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from rich.console import Console

F = TypeVar("F", bound=Callable[..., Any])


def json_option(function: F) -> F:
    """Add ``--json``, passed to the command as ``as_json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output, and nothing else there.")(
        function
    )


def print_json(data: Any) -> None:
    """Print JSON that other programs read: stable key order as given, NaN and infinities as null."""
    click.echo(json.dumps(_plain(data), indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    """Tuples, sets, paths and enums as JSON knows them; non-finite floats, which JSON does not know, as null."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(_plain, value))
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if value - value == 0 else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)


def console(*, stderr: bool = False) -> Console:
    """A rich console on today's standard output or error. Where that is no terminal, lines are as long as they need to be."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, highlight=False, width=None if stream.isatty() else 1000)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Sequence[str] = ()) -> None:
    """Print a table; the columns named in ``right`` hold numbers. ``None`` prints as a dash, text is never cut when piped."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    out = console()
    for column in columns:
        table.add_column(Text(column), justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text("-" if cell is None else str(cell)) for cell in row))
    if title:
        out.print(Text(title))
    if not out.is_terminal:
        out.width = out.measure(table).maximum
    out.print(table)


def note(text: str) -> None:
    """A line for a person on standard error, where it does not mix with ``--json``."""
    click.echo(text, err=True)


def milliseconds(value: float | None) -> str:
    """A duration in ms to three significant digits: ``0.123``, ``4.56``, ``1230``."""
    return "-" if value is None else _significant(value)


def mebibytes(value: float | None) -> str:
    """Bytes as MiB to three significant digits."""
    return "-" if value is None else _significant(value / 2**20)


def _significant(value: float, digits: int = 3) -> str:
    rounded = float(f"{value:.{digits}g}")
    if rounded == 0:
        return "0"
    places = digits - 1 - floor(log10(abs(rounded)))
    return f"{rounded:.{max(places, 0)}f}"
