"""Tables and numbers on the command line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adasplash_cli.output import mebibytes, milliseconds, print_json, print_table


@given(st.floats(1e-6, 1e9))
def test_numbers_are_within_half_of_the_third_digit(value: float) -> None:
    text = milliseconds(value)
    assert "e" not in text
    assert abs(float(text) - value) <= 0.5 * 10 ** (math.floor(math.log10(value)) - 2) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("value", "text"), [(0.12345, "0.123"), (4.5678, "4.57"), (99.99, "100"), (1234.5, "1230"), (0.0, "0"), (None, "-")]
)
def test_numbers_read_well(value: float | None, text: str) -> None:
    assert milliseconds(value) == text


def test_mebibytes() -> None:
    assert mebibytes(3 * 2**20) == "3.00"


def test_json_knows_paths_tuples_and_what_is_not_finite(capsys: pytest.CaptureFixture[str]) -> None:
    print_json(
        {"path": Path("a/b"), "pair": (1, 2), "nan": math.nan, "inf": -math.inf, "set": {"y", "x"}, "none": None, "yes": True}
    )
    assert json.loads(capsys.readouterr().out) == {
        "path": "a/b", "pair": [1, 2], "nan": None, "inf": None, "set": ["x", "y"], "none": None, "yes": True,
    }  # fmt: skip


def test_piped_tables_cut_nothing_and_interpret_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("made [of] things", ["name", "n"], [["x" * 200, 1], ["[bold]y[/bold]", None]], right=["n"])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[0] == "made [of] things"
    assert any("x" * 200 in line and line.endswith(" 1") for line in lines)
    assert any("[bold]y[/bold]" in line and line.endswith(" -") for line in lines)
