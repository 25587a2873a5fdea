"""Tuned configs as JSON documents: what `adasplash cache export` writes, what `import` reads, and the format of ``pretuned/*.json``.

A document comes from anywhere, so nothing in it is trusted: size, depth, names, types and ranges are checked, nothing is executed,
and one bad record refuses the whole document.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from adasplash_core.configs import warn_once
from adasplash_core.errors import ArgumentError
from adasplash_tuner.records import BestConfig, RecordError, load_json, parse_best

FORMAT = "adasplash-tuned-configs"
FORMAT_VERSION = 1
MAX_BYTES = 32 * 2**20
MAX_RECORDS = 100_000


def export_document(records: Iterable[BestConfig], provenance: dict[str, str] | None = None) -> str:
    """The records as JSON text. Records in quarantine are left out."""
    kept = [r.as_dict() for r in records if not r.quarantined]
    for record in kept:
        del record["quarantined"]
    document = {"format": FORMAT, "format_version": FORMAT_VERSION, "provenance": provenance or {}, "configs": kept}
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def read_document(path: Path) -> list[BestConfig]:
    """The records of an exported file.

    Raises
    ------
    ArgumentError: if the file is not such a document, or any record in it is not valid.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise _refused(path, f"it cannot be read ({error.strerror})") from error
    return parse_document(content, path)


def parse_document(content: bytes, source: object) -> list[BestConfig]:
    """As :func:`read_document`, from bytes; ``source`` names them in errors."""
    if len(content) > MAX_BYTES:
        raise _refused(source, f"more than {MAX_BYTES // 2**20} MiB")
    try:
        document = load_json(content, "the file")
    except RecordError as error:
        raise _refused(source, str(error)) from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise _refused(source, f'a file without "format": "{FORMAT}"')
    version = document.get("format_version")
    if type(version) is not int or version < 1:
        raise _refused(source, "a file without a format version")
    if version > FORMAT_VERSION:
        raise _refused(
            source, f"format version {version}; this release reads up to {FORMAT_VERSION}", "Upgrade adasplash-core."
        )
    configs: Any = document.get("configs")
    if not isinstance(configs, list) or len(configs) > MAX_RECORDS:
        raise _refused(source, f'"configs" that are not a list of at most {MAX_RECORDS} records')
    records = []
    for number, values in enumerate(configs):
        if not isinstance(values, dict):
            raise _refused(source, f"configs[{number}]: an object is wanted, got {type(values).__name__}")
        try:
            records.append(parse_best(values))
        except RecordError as error:
            raise _refused(source, f"configs[{number}]: {error}") from error
    return records


def _refused(
    source: object, seen: str, hint: str = "Nothing was imported. Export the file again with `adasplash cache export`."
) -> ArgumentError:
    return ArgumentError("An imported file must be what `adasplash cache export` writes.", seen=f"{source}: {seen}", hint=hint)


@cache
def shipped_records(folder: Path | None = None) -> tuple[BestConfig, ...]:
    """The configs shipped with the package; a file that is not valid is passed over with a warning."""
    root = files("adasplash_tuner") / "pretuned" if folder is None else folder
    if not root.is_dir():
        return ()
    records: list[BestConfig] = []
    for entry in sorted(root.iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".json"):
            try:
                records += parse_document(entry.read_bytes(), entry)
            except ArgumentError as error:
                warn_once(f"A shipped file of tuned configs is passed over. {error}")
    return tuple(records)
