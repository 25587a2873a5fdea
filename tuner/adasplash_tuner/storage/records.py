"""Tuned configs as plain values, and the one strict reader that database rows, imported files and shipped files all go through."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from adasplash_tuner.key import KEY_FIELDS, TuningKey

ConfigValues = dict[str, int | float | str | bool]

BEST_VALUES = ("median_ms", "spread_ms", "default_ms", "error", "shape", "inputs", "samples", "measured_at", "version")
"""What is stored of a winner besides its key, its config and why it is in quarantine."""

MAX_TEXT = 500
MAX_CONFIG_FIELDS = 64
_INT64 = 2**63 - 1
_LAST_SECOND = 253_402_300_799  # of the year 9999
_KEY_TYPES = {"int": int, "str": str, "bool": bool}


class RecordError(ValueError):
    """A record has a field of the wrong type, size or range."""


@dataclass(frozen=True, slots=True)
class BestConfig:
    """The winner of one key. Times are medians in milliseconds, averaged over the inputs."""

    key: TuningKey
    config: ConfigValues
    median_ms: float
    spread_ms: float  # robust standard deviation of one run
    default_ms: float  # the default config, measured in turns with the winner
    error: float  # relative error against the fp64 oracle
    shape: str  # what was measured, inside the key's buckets
    inputs: str  # which inputs it was measured on
    samples: int
    measured_at: int  # Unix seconds
    version: str  # of adasplash-core
    quarantined: str = ""  # why it is no longer used

    @property
    def gain(self) -> float:
        """How many times faster than the default."""
        return self.default_ms / self.median_ms

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Row:
    """A stored winner: its id, and either the record or why it does not parse (``shelved``: which was found before)."""

    id: int
    readable: str
    record: BestConfig | None
    problem: str = ""
    shelved: bool = False

    @property
    def usable(self) -> BestConfig | None:
        return self.record if self.record is not None and not self.record.quarantined else None


@dataclass(frozen=True, slots=True)
class Measurement:
    """One measurement of one config. ``status``: "ok", "inaccurate" or "failed", the latter two with a note and without a time."""

    config: ConfigValues
    shape: str
    inputs: str
    stage: str  # "screening", "halving" or "final"
    status: str
    measured_at: int
    version: str
    median_ms: float | None = None
    spread_ms: float | None = None
    samples: int = 0
    error: float | None = None
    note: str = ""


def config_text(config: Mapping[str, Any]) -> str:
    """Canonical JSON, so that equal configs are equal strings."""
    return json.dumps(config, sort_keys=True, separators=(",", ":"), allow_nan=False)


def row_of(id_: Any, readable: Any, key: Mapping[str, Any], values: Mapping[str, Any]) -> Row:
    """A stored winner from untrusted columns; one that does not parse says why."""
    try:
        return Row(int(id_), str(readable), parse_best({"key": key, **values}))
    except RecordError as error:
        return Row(int(id_), str(readable), None, str(error), shelved=bool(values.get("quarantined")))


def parse_best(values: Mapping[str, Any]) -> BestConfig:
    """Build from untrusted values.

    Raises
    ------
    RecordError: for a missing, unknown or ill-typed field, with its name.
    """
    names = {f.name for f in fields(BestConfig)}
    _check_names("the record", values, names, optional={"quarantined"})
    return BestConfig(
        key=parse_key(values["key"]),
        config=parse_config(values["config"]),
        median_ms=_number(values, "median_ms", above_zero=True),
        spread_ms=_number(values, "spread_ms"),
        default_ms=_number(values, "default_ms", above_zero=True),
        error=_number(values, "error"),
        shape=_text(values, "shape"),
        inputs=_text(values, "inputs"),
        samples=_integer(values, "samples"),
        measured_at=_integer(values, "measured_at", high=_LAST_SECOND),
        version=_text(values, "version"),
        quarantined=_text({"quarantined": "", **values}, "quarantined"),
    )


def parse_key(values: Any) -> TuningKey:
    if not isinstance(values, Mapping):
        raise RecordError(f"key must be an object, got {type(values).__name__}")
    _check_names("key", values, set(KEY_FIELDS))
    parsed: dict[str, Any] = {}
    for f in fields(TuningKey):
        value, expected = values[f.name], _KEY_TYPES[str(f.type)]
        if type(value) is not expected:
            raise RecordError(f"key.{f.name} must be {f.type}, got {_shown(value)}")
        parsed[f.name] = _text(values, f.name) if expected is str else _integer(values, f.name) if expected is int else value
    if parsed["pass_"] not in ("forward", "backward"):
        raise RecordError(f"key.pass_ must be forward or backward, got {_shown(parsed['pass_'])}")
    return TuningKey(**parsed)


def parse_config(value: Any) -> ConfigValues:
    """A flat mapping of names to numbers, strings and booleans, from JSON text or an object."""
    if isinstance(value, str):
        value = load_json(value, "config")
    if not isinstance(value, Mapping):
        raise RecordError(f"config must be an object, got {_shown(value)}")
    if len(value) > MAX_CONFIG_FIELDS:
        raise RecordError(f"config has {len(value)} fields, more than {MAX_CONFIG_FIELDS}")
    for name, item in value.items():
        if not isinstance(name, str) or not name.isidentifier() or len(name) > MAX_TEXT:
            raise RecordError(f"config has a field named {_shown(name)}")
        if type(item) is str:
            _text(value, name)
        elif type(item) is int:
            _integer(value, name, low=-_INT64)
        elif type(item) is float:
            if not math.isfinite(item):
                raise RecordError(f"config.{name} must be finite, got {item}")
        elif type(item) is not bool:
            raise RecordError(f"config.{name} must be a number, a string or a boolean, got {_shown(item)}")
    return dict(value)


def load_json(text: str | bytes, what: str) -> Any:
    """``json.loads`` without NaN and infinities, and with every failure a RecordError."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise RecordError(f"{what} is nested too deeply") from error
    except ValueError as error:  # not JSON, not UTF-8, or a number of thousands of digits
        raise RecordError(f"{what} is not JSON: {error}") from error


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not allowed")


def _check_names(what: str, values: Mapping[str, Any], names: set[str], optional: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    if missing := names - set(values) - optional:
        raise RecordError(f"{what} lacks {', '.join(sorted(missing))}")
    if unknown := set(values) - names:
        raise RecordError(f"{what} has unknown fields: {', '.join(sorted(_shown(u) for u in unknown)[:5])}")


def _text(values: Mapping[str, Any], name: str) -> str:
    value = values[name]
    if type(value) is not str:
        raise RecordError(f"{name} must be a string, got {_shown(value)}")
    if len(value) > MAX_TEXT or not value.isprintable():
        raise RecordError(f"{name} must be at most {MAX_TEXT} printable characters, got {_shown(value)}")
    return value


def _integer(values: Mapping[str, Any], name: str, low: int = 0, high: int = _INT64) -> int:
    value = values[name]
    if type(value) is not int or not low <= value <= high:
        raise RecordError(f"{name} must be an integer from {low} to {high}, got {_shown(value)}")
    return value


def _number(values: Mapping[str, Any], name: str, *, above_zero: bool = False) -> float:
    value = values[name]
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0 or (above_zero and value == 0):
        raise RecordError(f"{name} must be a finite number {'above' if above_zero else 'of at least'} 0, got {_shown(value)}")
    return float(value)


def _shown(value: object) -> str:
    """A stranger's value, cut to a length that can be printed."""
    text = f"<{type(value).__name__}>" if isinstance(value, (int, dict, list)) and not isinstance(value, bool) else ascii(value)
    if isinstance(value, int) and abs(value) < 10**20:
        text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
