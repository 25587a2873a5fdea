"""Look-ups of float32 calls whose products may be rounded to TF32, and of those whose products may not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from adasplash_core.configs import ConfigLadder, FoundBackend, Rung
from adasplash_core.spec import AttentionSpec
from adasplash_tuner.key import TuningKey, tuning_key
from adasplash_tuner.provider import TunedConfigs
from adasplash_tuner.storage.exchange import export_document, parse_document
from adasplash_tuner.storage.store import TuningStore
from tests.tuner.fakes import H100, H200, SPEC, BlockConfig, FakeBackend, record
from tests.tuner.test_tuned_lookup import found


class TestTf32:
    """Float32 while PyTorch lets products be rounded is a problem of its own: another arithmetic, and other tiles fit."""

    EXACT = replace(SPEC, dtype="float32")
    ROUNDED = replace(EXACT, tf32=True)

    def key(self, spec: AttentionSpec, backend: FakeBackend | None = None) -> TuningKey:
        return tuning_key(backend or FakeBackend(), spec, H100, "forward")

    def test_each_gets_what_was_tuned_for_it(self, store: TuningStore, backend: FakeBackend) -> None:
        store.publish(record(self.key(self.EXACT), 32))
        store.publish(record(self.key(self.ROUNDED), 256))
        ladder = ConfigLadder([TunedConfigs()])
        answers = [ladder.find(backend, spec, H100, "forward") for spec in (self.EXACT, self.ROUNDED, self.EXACT)]
        assert [answer.config for answer in answers] == [BlockConfig(32, 8), BlockConfig(256, 8), BlockConfig(32, 8)]
        assert {answer.rung for answer in answers} == {Rung.USER_DATABASE}

    @pytest.mark.parametrize(("tuned", "asked"), [("EXACT", "ROUNDED"), ("ROUNDED", "EXACT")])
    def test_what_was_tuned_for_the_other_does_not_answer_and_is_named(
        self, store: TuningStore, backend: FakeBackend, tmp_path: Path, tuned: str, asked: str
    ) -> None:
        tuned_for, asked_for = getattr(self, tuned), getattr(self, asked)
        store.publish(record(self.key(tuned_for), 256))
        (tmp_path / "h100.json").write_text(export_document([record(self.key(tuned_for), 256)]))
        for device in (H100, H200):
            answer = found(backend, asked_for, device, TunedConfigs(pretuned=tmp_path))
            assert answer.rung is Rung.HEURISTIC
            assert f"dtype is {tuned_for.arithmetic!r} there and {asked_for.arithmetic!r} here" in answer.detail

    def test_the_fastest_backend_of_one_is_not_that_of_the_other(self, store: TuningStore) -> None:
        for name, exact_ms, rounded_ms in (("a", 2.5, 2.5), ("b", 6.0, 0.8)):
            for spec, median_ms in ((self.EXACT, exact_ms), (self.ROUNDED, rounded_ms)):
                store.publish(record(self.key(spec, FakeBackend(name)), median_ms=median_ms))
        backends = [FakeBackend("a"), FakeBackend("b")]
        assert TunedConfigs().fastest(backends, self.EXACT, H100) == FoundBackend("a")
        assert TunedConfigs().fastest(backends, self.ROUNDED, H100) == FoundBackend("b")

    def test_times_of_exact_products_say_nothing_of_rounded_ones(self, store: TuningStore) -> None:
        for name in ("a", "b"):
            store.publish(record(self.key(self.EXACT, FakeBackend(name))))
        assert TunedConfigs().fastest([FakeBackend("a"), FakeBackend("b")], self.ROUNDED, H100) is None

    def test_an_export_from_before_is_taken_and_is_of_exact_products(self, store: TuningStore, backend: FakeBackend) -> None:
        """Its keys say "float32", which then meant both."""
        document = json.loads(export_document([record(self.key(self.EXACT), 256)]))
        assert document["configs"][0]["key"]["dtype"] == "float32"
        assert "tf32" not in json.dumps(document)
        store.merge(parse_document(json.dumps(document).encode(), "old.json"))
        assert found(backend, self.EXACT).config == BlockConfig(256, 8)
        assert found(backend, self.ROUNDED).rung is Rung.HEURISTIC
