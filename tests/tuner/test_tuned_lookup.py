"""Look-ups through the core's ladder: which rung answers, and what it says."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from adasplash_core.backend import KernelConfig
from adasplash_core.configs import ConfigLadder, Rung
from adasplash_core.device import DeviceInfo
from adasplash_tuner.exchange import export_document
from adasplash_tuner.key import TuningKey, tuning_key
from adasplash_tuner.provider import TunedConfigs
from adasplash_tuner.store import TuningStore
from tests.tuner.fakes import A100, H100, H200, SPEC, BlockConfig, FakeBackend, Warned, record

CPU = DeviceInfo("cpu", "Some CPU", multiprocessors=8)


def found(backend: FakeBackend, spec=SPEC, device=H100, provider: TunedConfigs | None = None):  # type: ignore[no-untyped-def]
    return ConfigLadder([provider or TunedConfigs()]).find(backend, spec, device, "forward")


def test_without_a_database_the_heuristic_answers_and_sqlalchemy_is_not_imported(database: Path) -> None:
    code = (
        "import sys; from adasplash_core.configs import ConfigLadder; from adasplash_tuner.provider import TunedConfigs\n"
        "from tests.tuner.fakes import *\n"
        "answer = ConfigLadder([TunedConfigs()]).find(FakeBackend(), SPEC, H100, 'forward')\n"
        "print(answer.rung.name, answer.detail, 'sqlalchemy' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout.strip() == "HEURISTIC nothing is tuned on this machine: run `adasplash tune` False False"
    assert not database.exists()


def test_the_exact_key_answers_from_the_user_database(store: TuningStore, backend: FakeBackend) -> None:
    store.publish(record(block_n=256, median_ms=0.75))
    answer = found(backend)
    assert (answer.config, answer.rung, answer.median_ms) == (BlockConfig(256, 8), Rung.USER_DATABASE, 0.75)
    for word in ("2025-06-15", "0.1.0", "2.00 times as fast as the default", "random, moderate", "Lq~8192"):
        assert word in answer.detail


def test_another_length_of_the_bucket_gets_the_same_config(store: TuningStore, backend: FakeBackend) -> None:
    store.publish(record(block_n=256))
    assert found(backend, replace(SPEC, q_len=6000, kv_len=7001)).config == BlockConfig(256, 8)


@pytest.mark.parametrize(
    ("backend", "device", "said"),
    [
        (FakeBackend(code="newer"), H100, "code_hash was 'c0de' and is 'newer'"),
        (FakeBackend(compiler="compiler 2"), H100, "toolchain was"),
        (FakeBackend(), replace(H100, driver="600"), "driver 600"),
    ],
)
def test_other_code_or_another_driver_makes_a_result_stale_and_does_not_lose_it(
    store: TuningStore, backend: FakeBackend, device: DeviceInfo, said: str
) -> None:
    store.publish(record(block_n=256))
    answer = found(backend, device=device)
    assert (answer.config, answer.rung) == (BlockConfig(256, 8), Rung.STALE)
    assert said in answer.detail


def test_the_newest_of_several_stale_results_is_taken(store: TuningStore, key: TuningKey) -> None:
    for code, block_n, when in (("a", 32, 1_700_000_000), ("b", 64, 1_740_000_000), ("c", 16, 1_600_000_000)):
        store.publish(record(replace(key, code_hash=code), block_n, measured_at=when))
    assert found(FakeBackend(code="now")).config == BlockConfig(64, 8)


def test_a_stale_result_whose_fields_have_changed_is_passed_over_in_silence(
    store: TuningStore, key: TuningKey, warned: Warned
) -> None:
    @dataclass(frozen=True)
    class Renamed(KernelConfig):
        tile: int = 64

    class RenamedBackend(FakeBackend):
        def config_class(self, pass_: str) -> type[KernelConfig]:
            return Renamed

    store.publish(record(key))
    answer = found(RenamedBackend(code="newer"))
    assert (answer.config, answer.rung) == (Renamed(), Rung.HEURISTIC)
    assert warned == []
    assert store.rows()[0].usable is not None  # the older version can still use it


def test_another_gpu_of_the_same_capability_is_better_than_nothing(store: TuningStore, backend: FakeBackend) -> None:
    store.publish(record(tuning_key(backend, SPEC, H200, "forward"), 256))
    store.publish(record(tuning_key(backend, SPEC, A100, "forward"), 32))
    answer = found(backend, device=H100)
    assert (answer.config, answer.rung) == (BlockConfig(256, 8), Rung.SAME_CAPABILITY)
    assert "device_name was 'NVIDIA H200'" in answer.detail


def test_a_cpu_with_other_threads_is_the_nearest_and_another_cpu_is_nothing(store: TuningStore, backend: FakeBackend) -> None:
    spec = replace(SPEC, device_type="cpu")
    for threads, block_n in ((1, 16), (32, 32), (12, 64)):
        store.publish(record(tuning_key(backend, spec, replace(CPU, multiprocessors=threads), "forward"), block_n))
    answer = found(backend, spec, CPU)
    assert (answer.config, answer.rung) == (BlockConfig(64, 8), Rung.SAME_CAPABILITY)
    assert found(backend, spec, replace(CPU, name="Another CPU")).rung is Rung.HEURISTIC


def test_shipped_configs_stand_between_stale_ones_and_other_gpus(
    store: TuningStore, backend: FakeBackend, key: TuningKey, tmp_path: Path
) -> None:
    shipped = tmp_path / "pretuned"
    shipped.mkdir()
    (shipped / "h100.json").write_text(export_document([record(replace(key, code_hash="at release"), 512)]))
    store.publish(record(tuning_key(backend, SPEC, H200, "forward"), 256))
    provider = TunedConfigs(pretuned=shipped)
    assert (found(backend, provider=provider).config, found(backend, provider=provider).rung) == (
        BlockConfig(512, 8),
        Rung.SHIPPED,
    )
    assert found(backend, device=replace(H100, name="NVIDIA H100 PCIe"), provider=provider).rung is Rung.SAME_CAPABILITY
    store.publish(record(replace(key, code_hash="older"), 128))
    assert found(backend, provider=TunedConfigs(pretuned=shipped)).rung is Rung.STALE


def test_a_miss_says_which_field_differs_from_the_nearest_key(store: TuningStore, backend: FakeBackend) -> None:
    store.publish(record())
    answer = found(backend, replace(SPEC, kv_len=16384, q_len=16384))
    assert answer.rung is Rung.HEURISTIC
    assert "q_bucket is 8192 there and 16384 here; kv_bucket is 8192 there and 16384 here" in answer.detail
    assert "run `adasplash tune`" in answer.detail


def test_unknown_lengths_are_a_miss_that_says_so(store: TuningStore, backend: FakeBackend) -> None:
    store.publish(record())
    answer = found(backend, SPEC.without_lengths())
    assert answer.rung is Rung.HEURISTIC
    assert "lengths" in answer.detail


def test_only_the_first_lookup_of_a_bucket_asks_the_database(store: TuningStore, backend: FakeBackend, database: Path) -> None:
    store.publish(record(block_n=256))
    provider = TunedConfigs()
    provider.find(backend, SPEC, H100, "forward")
    database.unlink()
    again = provider.find(backend, replace(SPEC, q_len=7000, kv_len=7000), H100, "forward")
    assert again is not None
    assert again.config == BlockConfig(256, 8)
    provider.clear()
    missed = provider.find(backend, SPEC, H100, "forward")
    assert missed is not None
    assert missed.rung is Rung.HEURISTIC


def test_a_row_edited_to_nonsense_is_a_miss_and_goes_into_quarantine(
    store: TuningStore, backend: FakeBackend, database: Path, warned: Warned
) -> None:
    store.publish(record())
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE adasplash_best SET config = '{{{'")
    assert found(backend).rung is Rung.HEURISTIC
    assert "no longer used (row 1): config is not JSON" in warned.the_only_one()
    with sqlite3.connect(database) as connection:
        assert "not JSON" in connection.execute("SELECT quarantined FROM adasplash_best").fetchone()[0]


def test_a_config_with_foreign_fields_under_the_current_code_goes_into_quarantine(
    store: TuningStore, backend: FakeBackend, warned: Warned
) -> None:
    store.publish(replace(record(), config={"block_x": 3}))
    assert found(backend).rung is Rung.HEURISTIC
    assert "is no fake config" in warned.the_only_one()
    assert store.rows()[0].usable is None


def test_a_rejected_config_is_never_returned_again(store: TuningStore, backend: FakeBackend, warned: Warned) -> None:
    store.publish(record(block_n=256))
    provider = TunedConfigs()
    ladder = ConfigLadder([provider])
    tuned = ladder.find(backend, SPEC, H100, "forward")
    ladder.reject(backend, SPEC, H100, "forward", tuned.config, "needs 300 KB of shared memory")
    assert found(backend, replace(SPEC, q_len=8000, kv_len=8000), provider=provider).rung is Rung.HEURISTIC
    assert found(backend).rung is Rung.HEURISTIC  # another process
    record_ = store.rows()[0].record
    assert record_ is not None
    assert record_.quarantined == "does not run: needs 300 KB of shared memory"


def test_a_rejected_config_is_not_returned_even_if_the_database_cannot_be_written(
    store: TuningStore, backend: FakeBackend, database: Path, warned: Warned
) -> None:
    store.publish(record(block_n=256))
    provider = TunedConfigs()
    answer = provider.find(backend, SPEC, H100, "forward")
    assert answer is not None
    database.write_bytes(b"x" * 4096)
    provider.reject(backend, SPEC, H100, "forward", answer.config, "spills")
    store.engines.dispose()
    database.unlink()
    store.publish(record(block_n=256))
    provider._failed_at = -1e9
    again = provider.find(backend, SPEC, H100, "forward")
    assert again is not None
    assert again.rung is Rung.HEURISTIC


class TestFastest:
    """``auto`` takes the backend measured fastest, if there is anything to compare."""

    fast, slow = FakeBackend("fast"), FakeBackend("slow")

    def publish(self, store: TuningStore, backend: FakeBackend, pass_: str, ms: float, **changes: object) -> None:
        spec = changes.pop("spec", SPEC)
        store.publish(record(tuning_key(backend, spec, H100, pass_), median_ms=ms, **changes))  # type: ignore[arg-type]

    def ask(self, spec=SPEC) -> str | None:  # type: ignore[no-untyped-def]
        return TunedConfigs().fastest([self.slow, self.fast], spec, H100)

    def test_the_least_forward_time_wins_without_grad(self, store: TuningStore) -> None:
        self.publish(store, self.fast, "forward", 1.0)
        self.publish(store, self.slow, "forward", 2.0)
        assert self.ask() == "fast"

    def test_with_grad_forward_and_backward_count_together(self, store: TuningStore) -> None:
        for backend, forward, backward in ((self.fast, 1.0, 5.0), (self.slow, 2.0, 2.0)):
            self.publish(store, backend, "forward", forward)
            self.publish(store, backend, "backward", backward)
        assert self.ask(replace(SPEC, needs_grad=True)) == "slow"
        assert self.ask() == "fast"

    def test_a_backend_measured_alone_says_nothing_of_the_others(self, store: TuningStore) -> None:
        self.publish(store, self.fast, "forward", 1.0)
        assert self.ask() is None

    def test_times_on_different_inputs_are_not_compared(self, store: TuningStore) -> None:
        self.publish(store, self.fast, "forward", 1.0, inputs="random, dense")
        self.publish(store, self.slow, "forward", 2.0, inputs="random, sparse")
        assert self.ask() is None

    def test_while_lengths_are_unknown_the_buckets_measured_by_all_are_added_up(self, store: TuningStore) -> None:
        short = replace(SPEC, q_len=1024, kv_len=1024)
        for spec, fast, slow in ((SPEC, 3.0, 4.0), (short, 1.0, 0.5)):
            self.publish(store, self.fast, "forward", fast, spec=spec)
            self.publish(store, self.slow, "forward", slow, spec=spec)
        self.publish(store, self.slow, "forward", 0.1, spec=replace(SPEC, q_len=2**17, kv_len=2**17))
        assert self.ask(SPEC.without_lengths()) == "fast"
        assert self.ask(short) == "slow"


def test_a_new_process_finds_the_config_through_its_plugin(store: TuningStore) -> None:
    """The entry point, the ladder and the database together, as a user's process has them."""
    store.publish(record(block_n=256))
    code = (
        "from adasplash_core.configs import ladder; from tests.tuner.fakes import *; import json\n"
        "answer = ladder().find(FakeBackend(), SPEC, H100, 'forward')\n"
        "print(json.dumps([answer.rung.name, answer.config.to_dict()]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert json.loads(done.stdout) == ["USER_DATABASE", {"block_n": 256, "iterations": 8}]
