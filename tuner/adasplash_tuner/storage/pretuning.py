"""Making the files in ``pretuned/``: one card's winners, measured with the installed code, and where they are from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from adasplash_core.errors import ArgumentError, ConfigError
from adasplash_tuner.key import MACHINE_FIELDS, PROBLEM_FIELDS, TuningKey, is_of_machine
from adasplash_tuner.storage.exchange import export_document
from adasplash_tuner.storage.records import BestConfig, Row

if TYPE_CHECKING:
    from adasplash_core.device import DeviceInfo
    from adasplash_core.plugins import Registry
    from adasplash_core.spec import Pass


def shippable(rows: Iterable[Row], registry: Registry) -> list[BestConfig]:
    """Usable winners of the installed code, the newest of each problem and machine: another driver's are the same to a stranger."""
    newest: dict[tuple[object, ...], BestConfig] = {}
    for row in rows:
        record = row.usable
        if record is None or not _is_current(record, registry):
            continue
        place = tuple(getattr(record.key, n) for n in PROBLEM_FIELDS + MACHINE_FIELDS)
        if place not in newest or newest[place].measured_at < record.measured_at:
            newest[place] = record
    return [newest[place] for place in sorted(newest, key=str)]


def _is_current(record: BestConfig, registry: Registry) -> bool:
    backend = registry.backends.get(record.key.backend)
    if backend is None or backend.code_hash() != record.key.code_hash:
        return False
    pass_: Pass = "backward" if record.key.pass_ == "backward" else "forward"
    try:
        backend.config_class(pass_).from_mapping(record.config)
    except ConfigError:
        return False
    return True


def one_card(records: Sequence[BestConfig], devices: Sequence[DeviceInfo]) -> list[BestConfig]:
    """The records of one card: of this machine's if it is among them, else of the only one there is.

    Raises
    ------
    ArgumentError: if there is none, or nothing says which.
    """
    here = [r for r in records if any(is_of_machine(r.key, device) for device in devices)]
    chosen = here or list(records)
    cards = sorted({r.key.machine() for r in chosen})
    if len(cards) != 1:
        raise ArgumentError(
            "A file to ship holds the configs of one card, measured with the installed code.",
            seen="; ".join(cards) or "none",
            hint="name it with --device" if cards else "run `adasplash tune --gpu-auto --profile full` first",
        )
    return chosen


def provenance(records: Sequence[BestConfig]) -> dict[str, str]:
    """Where the records are from, for a person: the card, the versions, the dates, and the largest error of each dtype."""
    key = records[0].key
    errors: dict[str, float] = {}
    for r in records:
        errors[r.key.dtype] = max(errors.get(r.key.dtype, 0.0), r.error)
    dates = sorted(_date(r.measured_at) for r in records)
    toolchains: dict[str, set[str]] = {}
    for r in records:
        toolchains.setdefault(r.key.backend, set()).add(r.key.toolchain)
    return {
        "card": key.machine(),
        "measured": dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}",
        "adasplash-core": ", ".join(sorted({r.version for r in records})),
        **{f"toolchain of {backend}": "; ".join(sorted(found)) for backend, found in sorted(toolchains.items())},
        **{f"largest error in {dtype}": f"{error:.1e}" for dtype, error in sorted(errors.items())},
        "exported": f"{_date(datetime.now(UTC).timestamp())}, torch {_version('torch')}",
        "made by": "adasplash cache export --pretuned",
    }


def pretuned_document(records: Sequence[BestConfig]) -> str:
    """The file to ship, as JSON text; four digits of a time are more than another machine repeats."""
    rounded = [
        replace(
            r,
            median_ms=_rounded(r.median_ms),
            spread_ms=_rounded(r.spread_ms),
            default_ms=_rounded(r.default_ms),
            error=_rounded(r.error),
        )
        for r in records
    ]
    return export_document(rounded, provenance(records))


def file_name(key: TuningKey) -> str:
    """``nvidia-h100-80gb-hbm3.json``"""
    return re.sub(r"[^a-z0-9]+", "-", key.device_name.lower()).strip("-") + ".json"


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
