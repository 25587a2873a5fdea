"""Tuned configs as JSON documents: what `adasplash cache export` writes, what `import` reads, and the format of ``pretuned/*.json``.

A document comes from anywhere, so nothing in it is trusted: size, depth, names, types and ranges are checked, nothing is executed,
and one bad record refuses the whole document.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from adasplash_core.errors import ArgumentError
from adasplash_tuner.storage.records import BestConfig, RecordError, load_json, parse_best

FORMAT = "adasplash-tuned-configs"
FORMAT_VERSION = 1
MAX_BYTES = 32 * 2**20
MAX_RECORDS = 100_000


def export_document(records: Iterable[BestConfig], provenance: Mapping[str, str] | None = None) -> str:
    """The records as JSON text, one a line. Records in quarantine are left out."""
    kept = [r.as_dict() for r in records if not r.quarantined]
    for record in kept:
        del record["quarantined"]
    lines = ",\n  ".join(json.dumps(record, allow_nan=False) for record in kept)
    head = {"format": FORMAT, "format_version": FORMAT_VERSION, "provenance": dict(provenance or {})}
    return json.dumps(head, indent=1, allow_nan=False).removesuffix("\n}") + f',\n "configs": [\n  {lines}\n ]\n}}\n'


def read_document(path: Path) -> list[BestConfig]:
    """The records of an exported file.

    Raises
    ------
    ArgumentError: if the file is not such a document, or any record in it is not valid.
    """
    return parse_document(read_bytes(path), path)


def read_bytes(path: Path) -> bytes:
    """The content of a file, no more of it than is then refused. Raises ArgumentError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise _refused(path, f"it cannot be read ({error.strerror})") from error


def parse_document(content: bytes, source: object) -> list[BestConfig]:
    """As :func:`read_document`, from bytes; ``source`` names them in errors."""
    records = []
    for number, values in enumerate(load_document(content, source)):
        if not isinstance(values, dict):
            raise _refused(source, f"configs[{number}]: an object is wanted, got {type(values).__name__}")
        try:
            records.append(parse_best(values))
        except RecordError as error:
            raise _refused(source, f"configs[{number}]: {error}") from error
    return records


def load_document(content: bytes, source: object) -> list[Any]:
    """The records of a document, not yet looked at. Raises ArgumentError if it is none."""
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
    configs = document.get("configs")
    if not isinstance(configs, list) or len(configs) > MAX_RECORDS:
        raise _refused(source, f'"configs" that are not a list of at most {MAX_RECORDS} records')
    return configs


def _refused(
    source: object, seen: str, hint: str = "Nothing was imported. Export the file again with `adasplash cache export`."
) -> ArgumentError:
    return ArgumentError("An imported file must be what `adasplash cache export` writes.", seen=f"{source}: {seen}", hint=hint)
