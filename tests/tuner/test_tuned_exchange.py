"""Export and import: a stranger's file is taken whole or refused whole, and nothing in it is executed."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adasplash_core.errors import ArgumentError
from adasplash_tuner.storage.exchange import MAX_BYTES, export_document, parse_document, read_document
from adasplash_tuner.storage.records import RecordError, parse_config
from adasplash_tuner.storage.snapshot import shipped
from adasplash_tuner.storage.store import TuningStore
from tests.tuner.fakes import Warned, record


def document() -> dict[str, Any]:
    second = replace(record(), key=replace(record().key, kv_bucket=1024))
    return json.loads(export_document([record(), second]))  # type: ignore[no-any-return]


def test_what_is_exported_is_imported_unchanged(tmp_path: Path) -> None:
    records = [
        record(),
        replace(record(), key=replace(record().key, deterministic=True), config={"name": "wgmma", "fast": True, "x": 0.5}),
    ]
    path = tmp_path / "tuned.json"
    path.write_text(export_document(records))
    assert read_document(path) == records


def test_configs_in_quarantine_are_not_exported() -> None:
    assert parse_document(export_document([replace(record(), quarantined="spills")]).encode(), "x") == []


def change_record(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda d: d["configs"][1].__setitem__(name, value)


def change_key(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda d: d["configs"][1]["key"].__setitem__(name, value)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda d: d.pop("format"), 'without "format"'),
        (lambda d: d.update(format_version="1"), "without a format version"),
        (lambda d: d.update(format_version=99), "Upgrade adasplash-core"),
        (lambda d: d.update(configs={}), "not a list"),
        (lambda d: d["configs"].append("config"), r"configs\[2\]: an object is wanted"),
        (lambda d: d["configs"][1].pop("error"), r"configs\[1\]: the record lacks error"),
        (change_record("__class__", "os.system"), "unknown fields: '__class__'"),
        (change_record("median_ms", "1.0"), "median_ms must be a finite number"),
        (change_record("median_ms", 0), "median_ms must be a finite number above 0"),
        (change_record("error", True), "error must be a finite number"),
        (change_record("samples", 2**63), "samples must be an integer"),
        (change_record("samples", 1.5), "samples must be an integer"),
        (change_record("shape", "x" * 501), "at most 500 printable"),
        (change_record("shape", "a\x1b[2Jb"), "printable"),
        (change_record("config", [1]), "config must be an object"),
        (change_record("config", {"a": {"b": 1}}), "config.a must be a number"),
        (change_record("config", {"a": None}), "config.a must be a number"),
        (change_record("config", {"../../etc": 1}), "field named"),
        (change_record("config", {f"f{i}": i for i in range(65)}), "65 fields"),
        (change_record("config", {"a": 10**30}), "a must be an integer"),
        (change_key("causal", 1), "key.causal must be bool"),
        (change_key("head_dim", True), "key.head_dim must be int"),
        (change_key("head_dim", -1), "head_dim must be an integer from 0"),
        (change_key("backend", ["torch"]), "key.backend must be str"),
        (change_key("device_name", "NVIDIA\x00H100"), "printable"),
        (change_key("pass_", "'; DROP TABLE adasplash_best; --"), "key.pass_ must be forward or backward"),
        (change_key("extra", 1), "key has unknown fields"),
    ],
)
def test_one_bad_field_refuses_the_whole_file(spoil: Callable[[dict[str, Any]], Any], reason: str) -> None:
    bad = document()
    spoil(bad)
    with pytest.raises(ArgumentError, match=reason):
        parse_document(json.dumps(bad).encode(), "stranger.json")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not JSON"),
        (b"\x80\x04\x95cos\nsystem\n", "not JSON"),  # a pickle
        (b"[" * 200_000 + b"]" * 200_000, "nested too deeply"),
        (b'{"format": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001, "nested too deeply"),
        (b'{"format": "adasplash-tuned-configs", "format_version": 1, "configs": [NaN]}', "NaN is not allowed"),
        (b'{"format_version": ' + b"9" * 10_000 + b"}", "not JSON"),
        (b"[1, 2]", 'without "format"'),
        (b" " * (MAX_BYTES + 1), "more than 32 MiB"),
    ],
)
def test_what_is_no_such_document_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(ArgumentError, match=reason):
        parse_document(content, "stranger.json")


def test_a_missing_file_is_an_argument_error(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="cannot be read"):
        read_document(tmp_path / "none.json")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(sorted(record().as_dict())), json_values)
def test_any_value_in_any_field_is_taken_or_refused_and_nothing_else(name: str, value: Any) -> None:
    spoiled = document()
    spoiled["configs"][0][name] = value
    with contextlib.suppress(ArgumentError):
        assert len(parse_document(json.dumps(spoiled).encode(), "x")) == 2


@given(
    st.dictionaries(
        st.from_regex(r"[a-z_]{1,8}", fullmatch=True), st.booleans() | st.integers(-(2**62), 2**62) | st.text("abc", max_size=5)
    )
)
def test_flat_configs_of_scalars_pass_unchanged(config: dict[str, Any]) -> None:
    if len(config) <= 64:
        assert parse_config(json.dumps(config)) == config


def test_a_config_of_infinity_is_refused() -> None:
    with pytest.raises(RecordError, match="Infinity is not allowed"):
        parse_config('{"a": Infinity}')


def test_nothing_is_written_if_a_later_record_cannot_be(store: TuningStore, tmp_path: Path) -> None:
    store.publish(record(median_ms=1.0))
    good = record(block_n=32, median_ms=0.1)
    bad = replace(record(), key=replace(record().key, kv_bucket=2**70))  # SQLite has no such integer
    with pytest.raises(OverflowError):
        store.merge([good, bad])
    assert [row.record for row in store.rows()] == [record(median_ms=1.0)]


def test_a_shipped_file_that_is_not_valid_is_passed_over_with_a_warning(tmp_path: Path, warned: Warned) -> None:
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_text(export_document([record()]))
    (tmp_path / "notes.txt").write_text("not read")
    assert [row.record for row in shipped(tmp_path).rows()] == [record()]
    assert "a.json" in warned.the_only_one()
