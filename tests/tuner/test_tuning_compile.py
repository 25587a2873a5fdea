"""Compiling candidates ahead: in processes that see no GPU, that may crash or hang, while the search goes on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adasplash_core.backend import CompileReport, KernelConfig, KernelResources
from adasplash_tuner.measure.compiling import CompilePool, Compiler, Unprepared, compiles_ahead, processes_for, refusal
from tests.tuner.fakes import H100, SPEC, BlockConfig, FakeBackend

DEFAULT = BlockConfig(64, 8)


class Compiling(FakeBackend):
    """What compiling does is the number of iterations."""

    def precompile(self, spec: Any, device: Any, pass_: Any, config: KernelConfig) -> CompileReport | None:
        assert isinstance(config, BlockConfig)
        does = config.iterations
        if does == 1:
            raise RuntimeError("PassManager::run failed")
        if does == 2:
            os.abort()
        if does == 3:
            time.sleep(60)
        if does == 4:
            return None
        spilled = {5: 400, 6: 300, 8: 300}.get(does, 0)
        seen = 0 if os.environ["CUDA_VISIBLE_DEVICES"] == "" and signal.getsignal(signal.SIGINT) is signal.SIG_IGN else 1
        return CompileReport((KernelResources("kernel", registers=32, spilled=spilled, shared=1000 * config.block_n + seen),))


class Leaving(FakeBackend):
    """Leaves what it compiled in the folder that it is named after."""

    def precompile(self, spec: Any, device: Any, pass_: Any, config: KernelConfig) -> CompileReport | None:
        assert isinstance(config, BlockConfig)
        (Path(self.name) / str(config.block_n)).touch()
        return None


class Unpicklable(Compiling):
    def __reduce__(self) -> Any:
        raise TypeError("cannot be pickled")


@pytest.fixture(scope="module")
def pool() -> Iterator[CompilePool]:
    with CompilePool(2, timeout_s=1.5) as pool:
        yield pool


def prepared(pool: CompilePool, *configs: BlockConfig, backend: FakeBackend | None = None) -> dict[int, str]:
    """What became of configs, by their iterations."""
    compiler = Compiler(pool, backend or Compiling(), SPEC, replace(H100, shared_memory=150_000), "forward", DEFAULT)
    for config in configs:
        compiler.submit(config)
    found = {}
    while len(found) < len(configs):
        ready = compiler.next(30.0)
        assert ready is not None, found
        config, why = ready
        assert isinstance(config, BlockConfig)
        found[config.iterations] = why
    assert compiler.next(0.0) is None
    return found


def test_what_compiles_may_run_and_what_raises_may_not(pool: CompilePool) -> None:
    found = prepared(pool, BlockConfig(128, 0), BlockConfig(64, 1), BlockConfig(64, 4))
    assert found == {0: "", 1: "does not compile: RuntimeError: PassManager::run failed", 4: ""}


def test_a_compiler_that_crashes_refuses_its_config_and_no_other(pool: CompilePool) -> None:
    found = prepared(pool, BlockConfig(64, 2), BlockConfig(64, 0))
    assert found == {2: "the compiler's process ended with exit code -6", 0: ""}
    assert prepared(pool, BlockConfig(64, 0)) == {0: ""}


def test_a_compiler_that_hangs_is_ended(pool: CompilePool) -> None:
    prepared(pool, BlockConfig(64, 0))  # its process is up: the timeout is the config's own
    assert prepared(pool, BlockConfig(64, 3)) == {3: "compiling took longer than 2 s"}


def test_a_config_may_spill_about_as_much_as_the_default_and_must_fit_the_shared_memory(pool: CompilePool) -> None:
    found = prepared(pool, BlockConfig(64, 5), BlockConfig(64, 6), BlockConfig(200, 0))
    assert found == {
        5: "kernel spills 400 bytes a thread (limit 364)",
        6: "",
        0: "kernel needs 200000 bytes of shared memory, NVIDIA H100 80GB HBM3 has 150000",
    }


def test_a_backend_that_cannot_cross_processes_compiles_where_it_runs(pool: CompilePool) -> None:
    assert prepared(pool, BlockConfig(64, 1), backend=Unpicklable()) == {1: ""}


def test_what_nobody_waits_for_is_compiled_all_the_same(pool: CompilePool, tmp_path: Path) -> None:
    for block_n in (16, 32):
        pool.submit((Leaving(str(tmp_path)), SPEC, H100, "forward", BlockConfig(block_n, 8)), lambda _report: None)
    deadline = time.monotonic() + 20
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert {path.name for path in tmp_path.iterdir()} == {"16", "32"}


def test_limits_follow_from_the_default_alone() -> None:
    spills = CompileReport((KernelResources("kernel", spilled=100),))
    assert refusal(spills, H100, default=spills) == ""
    assert refusal(spills, H100, CompileReport((KernelResources("kernel"),))) == "kernel spills 100 bytes a thread (limit 64)"
    assert (
        refusal(spills, H100, CompileReport((KernelResources("another", spilled=50),))) == ""
    )  # what it spills elsewhere counts
    assert refusal(spills, H100, default=None) == ""
    assert refusal(CompileReport((KernelResources("kernel"),)), H100, None) == ""  # nobody can tell
    assert refusal(CompileReport(refusal="why not"), H100, None) == "why not"


def test_a_closed_pool_ends_its_processes_though_they_hang() -> None:
    with CompilePool(1, timeout_s=60) as pool:
        pool.submit((Compiling(), SPEC, H100, "forward", BlockConfig(64, 3)), lambda _report: None)
        deadline = time.monotonic() + 20
        while not pool._running and time.monotonic() < deadline:
            time.sleep(0.01)
        (process,) = pool._running
    process.join(10)
    assert process.exitcode == -signal.SIGKILL


def test_without_a_compiler_every_config_is_ready_at_once() -> None:
    assert not compiles_ahead(FakeBackend())
    assert compiles_ahead(Compiling())
    ready = Unprepared()
    ready.submit(DEFAULT)
    assert ready.next(0.0) == (DEFAULT, "")
    assert ready.next(0.0) is None


def test_devices_side_by_side_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(32)), raising=False)
    assert [processes_for(n) for n in (1, 2, 8, 64)] == [16, 15, 3, 1]
