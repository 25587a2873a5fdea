"""The kernels' one argument, as its declaration in ``src/params.cuh`` tells: packed by name into bytes."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from functools import cache
from pathlib import Path

SOURCES = Path(__file__).parent / "src"
_FORMATS = {"i64": "q", "int": "i", "u32": "I", "float": "f"}


@cache
def fields() -> dict[str, str]:
    """Each field's name and its format character for :mod:`struct`, in order; pointers are ``P``."""
    body = re.search(r"struct Params \{(.*?)\n\};", (SOURCES / "params.cuh").read_text(encoding="utf-8"), re.S)
    assert body is not None
    found: dict[str, str] = {}
    for line in body[1].splitlines():
        declaration = line.partition("//")[0].strip().rstrip(";")
        if not declaration:
            continue
        type_, names = re.fullmatch(r"((?:const )?\w+ ?\*?) ?(.+)", declaration).groups()  # type: ignore[union-attr]
        for name in names.split(","):
            pointer = "*" in type_ or name.strip().startswith("*")
            found[name.strip(" *")] = "P" if pointer else _FORMATS[type_.strip()]
    return found


@cache
def _packer() -> tuple[struct.Struct, tuple[str, ...]]:
    layout = "".join(fields().values())
    # C pads the struct to its alignment, and packs without gaps because the 8-byte fields come first.
    return struct.Struct(f"@{layout}0P"), tuple(fields())


def size() -> int:
    """sizeof(Params)."""
    return _packer()[0].size


@cache
def pointers() -> tuple[str, ...]:
    """The pointer fields, which come first: a call writes its addresses over them and nothing else."""
    codes = fields()
    found = tuple(name for name, code in codes.items() if code == "P")
    if found != tuple(codes)[: len(found)]:
        raise AssertionError("params.cuh: declare pointers before other fields")
    return found


def pack(values: Mapping[str, int | float]) -> bytes:
    """The struct's bytes; fields not named are 0.

    Raises
    ------
    KeyError: for a name that is no field.
    """
    packer, names = _packer()
    if unknown := values.keys() - fields().keys():
        raise KeyError(f"no fields of Params: {sorted(unknown)}")
    return packer.pack(*[values.get(name, 0) for name in names])
