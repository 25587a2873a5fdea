"""Look-ups between what was measured: which results may be lent, to whom, and that it is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from adasplash_core.configs import ConfigLadder, FoundBackend, FoundConfig, Rung
from adasplash_core.device import DeviceInfo
from adasplash_core.dispatch import Choice, Explanation, choose
from adasplash_core.plugins import Registry
from adasplash_core.spec import AttentionSpec, Pass
from adasplash_tuner.key import tuning_key
from adasplash_tuner.provider import TunedConfigs
from adasplash_tuner.storage.exchange import export_document
from adasplash_tuner.storage.records import BestConfig
from adasplash_tuner.storage.store import TuningStore
from tests.tuner.fakes import H100, H200, SPEC, BlockConfig, FakeBackend, Warned, record

FEWER = replace(SPEC, heads=8, kv_heads=2)  # one bucket of heads below SPEC's, 65536 rows of 8192
OTHERS = (
    replace(SPEC, q_len=4096, kv_len=4096),
    replace(SPEC, kv_heads=32),
    replace(SPEC, causal=False),
    replace(SPEC, dtype="float32"),
    replace(SPEC, window=(512, 0)),
    replace(SPEC, alpha_class="2"),
    replace(SPEC, deterministic=True),
    replace(SPEC, head_dim=64, head_dim_v=64),
)


def found(backend: FakeBackend, spec: AttentionSpec, device: DeviceInfo = H100, pretuned: Path | None = None) -> FoundConfig:
    return ConfigLadder([TunedConfigs(pretuned=pretuned)]).find(backend, spec, device, "forward")


def at(backend: FakeBackend, spec: AttentionSpec, block_n: int = 256, **changes: object) -> BestConfig:
    device = changes.pop("device", H100)
    return record(tuning_key(backend, spec, device, "forward"), block_n, **changes)  # type: ignore[arg-type]


class TestConfigs:
    """Blocks of rows of one head are the programs: where they fill the device, more heads are more of the same."""

    def test_another_number_of_heads_that_fills_the_device_as_well_gets_the_config(
        self, store: TuningStore, backend: FakeBackend
    ) -> None:
        store.publish(at(backend, SPEC))
        for spec, bucket in ((FEWER, 16), (replace(SPEC, batch=64), 256)):
            answer = found(backend, spec)
            assert (answer.config, answer.rung) == (BlockConfig(256, 8), Rung.NEARBY)
            assert f"batch_heads_bucket was 64 and is {bucket}" in answer.detail
        assert "another batch size or number of heads" in Rung.NEARBY.words

    def test_nothing_else_may_differ(self, store: TuningStore, backend: FakeBackend) -> None:
        store.merge(at(backend, other) for other in OTHERS)
        assert found(backend, FEWER).rung is Rung.HEURISTIC
        assert len(store.rows()) == len(OTHERS)

    def test_a_device_half_empty_neither_borrows_nor_lends(self, store: TuningStore, backend: FakeBackend) -> None:
        """4 heads of 4096 are 256 blocks of 64 rows, two for each multiprocessor here."""
        full = replace(SPEC, q_len=4096, kv_len=4096)
        few = replace(full, heads=4, kv_heads=1)
        store.publish(at(backend, full))
        assert found(backend, few).rung is Rung.HEURISTIC
        store.publish(at(backend, replace(few, batch=2, q_len=1, kv_len=4096)))
        assert found(backend, replace(few, q_len=1, kv_len=4096)).rung is Rung.HEURISTIC

    def test_where_the_heuristic_sees_a_difference_it_answers_itself(self, store: TuningStore) -> None:
        class Sized(FakeBackend):
            def default_config(self, spec: AttentionSpec, device: DeviceInfo, pass_: Pass) -> BlockConfig:
                return BlockConfig(16 if (spec.batch or 1) * spec.heads < 1024 else 48)

        store.publish(at(Sized(), SPEC))
        assert found(Sized(), replace(SPEC, batch=16)).config == BlockConfig(256)
        answer = found(Sized(), replace(SPEC, batch=64))
        assert (answer.config, answer.rung) == (BlockConfig(48), Rung.HEURISTIC)

    def test_a_shape_whose_text_does_not_say_all_lends_nothing(self, store: TuningStore, backend: FakeBackend) -> None:
        window = replace(SPEC, window=(512, 0))
        store.publish(at(backend, window, shape="B=1,H=32,Hkv=8,L=8192,D=128,bfloat16,causal,window"))
        assert found(backend, replace(window, batch=16)).rung is Rung.HEURISTIC

    def test_the_nearest_number_of_heads_answers_then_the_newest_code(self, store: TuningStore, backend: FakeBackend) -> None:
        store.publish(at(backend, replace(SPEC, batch=64), 32, measured_at=1_760_000_000))
        store.publish(at(FakeBackend(code="older"), SPEC, 64))
        assert found(backend, FEWER).config == BlockConfig(64, 8)
        store.publish(at(backend, SPEC, 128, measured_at=1_600_000_000))
        assert found(backend, FEWER).config == BlockConfig(128, 8)

    def test_it_stands_between_what_ships_for_the_problem_and_other_gpus(
        self, store: TuningStore, backend: FakeBackend, tmp_path: Path
    ) -> None:
        store.publish(at(backend, FEWER, 32, device=H200))
        assert found(backend, FEWER).rung is Rung.SAME_CAPABILITY
        store.publish(at(backend, SPEC, 64))
        assert found(backend, FEWER).rung is Rung.NEARBY
        (tmp_path / "h100.json").write_text(export_document([at(backend, FEWER, 512)]))
        assert found(backend, FEWER, pretuned=tmp_path).rung is Rung.SHIPPED

    def test_what_ships_lends_where_the_database_has_nothing_to_lend(
        self, store: TuningStore, backend: FakeBackend, tmp_path: Path
    ) -> None:
        (tmp_path / "h100.json").write_text(export_document([at(backend, SPEC, 512)]))
        assert (found(backend, FEWER, pretuned=tmp_path).config.block_n, store.rows()) == (512, [])  # type: ignore[attr-defined]
        store.publish(at(backend, replace(SPEC, batch=64), 64))
        assert found(backend, FEWER, pretuned=tmp_path).config == BlockConfig(64, 8)

    def test_a_lent_config_that_does_not_run_is_given_back_and_stays_with_its_own(
        self, store: TuningStore, backend: FakeBackend, warned: Warned
    ) -> None:
        store.publish(at(backend, SPEC))
        ladder = ConfigLadder([TunedConfigs()])
        ladder.reject(backend, FEWER, H100, "forward", ladder.find(backend, FEWER, H100, "forward").config, "spills")
        assert ladder.find(backend, replace(FEWER, q_len=8000, kv_len=8000), H100, "forward").rung is Rung.HEURISTIC
        assert ladder.find(backend, SPEC, H100, "forward").rung is Rung.USER_DATABASE
        assert store.rows()[0].usable is not None

    def test_a_lent_config_of_other_fields_is_passed_over(self, store: TuningStore, backend: FakeBackend) -> None:
        store.publish(replace(at(backend, SPEC), config={"block_x": 3}))
        assert found(backend, FEWER).rung is Rung.HEURISTIC

    def test_frozen_ranks_borrow_nothing(
        self, store: TuningStore, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.publish(at(backend, SPEC))
        store.publish(at(FakeBackend("other"), SPEC))
        monkeypatch.setenv("ADASPLASH_CACHE_MODE", "frozen")
        assert found(backend, FEWER).rung is Rung.HEURISTIC
        assert TunedConfigs().fastest([backend, FakeBackend("other")], FEWER, H100) is None


class TestBackends:
    """Which backend is faster changes less with the sizes than which config is: near comparisons hold, with the times of what runs."""

    fast, slow = FakeBackend("fast"), FakeBackend("slow")

    def publish(self, store: TuningStore, spec: AttentionSpec, times: dict[str, float], pass_: Pass = "forward") -> None:
        """Milliseconds by backend, the same with the default config and the tuned one."""
        for name, ms in times.items():
            key = tuning_key(FakeBackend(name), spec, H100, pass_)
            store.publish(record(key, median_ms=ms, default_ms=ms, shape=f"L={spec.q_len}"))

    def ask(self, spec: AttentionSpec) -> FoundBackend | None:
        return TunedConfigs().fastest([self.slow, self.fast], spec, H100)

    def test_the_nearest_comparison_tells_and_is_named(self, store: TuningStore) -> None:
        longer, group, heads = {"q_len": 32768, "kv_len": 32768}, {"kv_heads": 32}, {"batch": 64}
        for near in (longer, group, heads):  # each nearer than the one before
            self.publish(store, replace(SPEC, **near), {"fast": len(near), "slow": 2.5})  # type: ignore[arg-type]
            answer = self.ask(SPEC)
            assert answer is not None
            assert answer.name == "fast"
            said = f"at the nearest sizes, L={near.get('q_len', 8192)}: fast {len(near)} ms, slow 2.5 ms"
            assert answer.why == f"measured fastest on this device {said}"

    def test_what_is_far_says_nothing(self, store: TuningStore) -> None:
        """Lengths over four times away, decoding, a device half empty, other problems."""
        for far in (
            replace(SPEC, q_len=1024, kv_len=1024),
            replace(SPEC, kv_len=2**17, causal_alignment="bottom_right"),
            replace(SPEC, q_len=1, kv_len=8192, causal_alignment="bottom_right"),
            replace(SPEC, heads=1, kv_heads=1),
            replace(SPEC, causal=False),
        ):
            self.publish(store, far, {"fast": 1.0, "slow": 2.0})
        assert self.ask(SPEC) is None

    def test_the_bucket_itself_comes_first_then_lengths_then_groups(self, store: TuningStore) -> None:
        self.publish(store, replace(SPEC, q_len=32768, kv_len=32768), {"fast": 1.0, "slow": 2.0})
        self.publish(store, replace(SPEC, q_len=4096, kv_len=4096), {"fast": 2.0, "slow": 1.0})
        answers = [self.ask(SPEC)]
        self.publish(store, replace(SPEC, kv_heads=32), {"fast": 1.0, "slow": 2.0})
        answers.append(self.ask(SPEC))
        self.publish(store, SPEC, {"fast": 2.0, "slow": 1.0})
        answers.append(self.ask(SPEC))
        assert [answer.name for answer in answers if answer] == ["slow", "fast", "slow"]
        assert answers[-1] == FoundBackend("slow")

    def test_the_times_compared_are_those_of_the_configs_that_will_run(self, store: TuningStore) -> None:
        """Tuned, ``fast`` is faster; by their defaults, which another length gets, it is not."""
        for backend, tuned, default in ((self.fast, 1.0, 3.0), (self.slow, 1.5, 2.0)):
            store.publish(record(tuning_key(backend, SPEC, H100, "forward"), median_ms=tuned, default_ms=default))
        by_spec = {spec: self.ask(spec) for spec in (FEWER, replace(SPEC, q_len=4096, kv_len=4096))}
        assert [answer.name for answer in by_spec.values() if answer] == ["fast", "slow"]
        assert [found(self.fast, spec).rung for spec in by_spec] == [Rung.NEARBY, Rung.HEURISTIC]

    def test_a_draw_nearby_says_nothing_whatever_is_known_farther_away(self, store: TuningStore) -> None:
        self.publish(store, replace(SPEC, q_len=16384, kv_len=16384), {"fast": 1.0, "slow": 1.01})
        self.publish(store, replace(SPEC, q_len=32768, kv_len=32768), {"fast": 1.0, "slow": 2.0})
        assert self.ask(SPEC) is None

    def test_a_nearer_backend_measured_alone_does_not_hide_a_comparison(self, store: TuningStore) -> None:
        self.publish(store, replace(SPEC, q_len=16384, kv_len=16384), {"slow": 0.1})
        self.publish(store, replace(SPEC, q_len=32768, kv_len=32768), {"fast": 1.0, "slow": 2.0})
        assert (answer := self.ask(SPEC)) is not None
        assert answer.name == "fast"

    def test_every_pass_must_be_measured_nearby(self, store: TuningStore) -> None:
        training = replace(SPEC, needs_grad=True)
        near = replace(training, q_len=16384, kv_len=16384)
        self.publish(store, near, {"fast": 1.0, "slow": 2.0})
        assert self.ask(training) is None
        self.publish(store, near, {"fast": 5.0, "slow": 2.0}, "backward")
        assert (answer := self.ask(training)) is not None
        assert answer.name == "slow"

    def test_while_lengths_are_unknown_another_group_of_heads_tells(self, store: TuningStore) -> None:
        self.publish(store, replace(SPEC, kv_heads=32), {"fast": 1.0, "slow": 2.0})
        assert (answer := self.ask(SPEC.without_lengths())) is not None
        assert answer.name == "fast"

    def test_an_explanation_names_the_neighbour(self, store: TuningStore) -> None:
        """As a call would be explained whose shape nobody tuned."""
        spec = replace(SPEC, causal=False, kv_heads=SPEC.heads)
        self.publish(store, replace(spec, q_len=4096, kv_len=4096), {"fast": 1.0, "slow": 2.0})
        registry, ladder = Registry(), ConfigLadder([TunedConfigs()])
        registry.backends.update({"slow": self.slow, "fast": self.fast})
        choice: Choice = choose(spec, H100, registry=registry, configs=ladder)
        text = str(Explanation(spec, H100, choice, {"forward": ladder.find(choice.backend, spec, H100, "forward")}))
        assert "backend: fast (measured fastest on this device at the nearest sizes, L=4096: fast 1 ms, slow 2 ms)" in text
        assert "the backend's heuristic" in text


@pytest.mark.parametrize(
    ("sizes", "causal"),
    [((1, 8, 16384, 128), True), ((2, 8, 8192, 64), False)],
    ids=["8 heads of 16384 x 128", "2 x 8 heads of 8192 x 64"],
)
def test_what_ships_for_the_h200_tells_which_backend_takes_shapes_between_those_tuned(
    store: TuningStore, sizes: tuple[int, int, int, int], causal: bool
) -> None:
    from adasplash_core.plugins import registry

    batch, heads, length, dim = sizes
    spec = AttentionSpec(
        "cuda", "bfloat16", heads, heads, dim, dim, batch=batch, q_len=length, kv_len=length, causal=causal, needs_grad=True
    )
    answer = TunedConfigs().fastest([registry().backend(name) for name in ("triton", "cupy")], spec, H200)
    assert answer is not None
    assert answer.name == "cupy"
