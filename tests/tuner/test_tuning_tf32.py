"""Tuning with TF32: PyTorch's setting holds while something runs and is found again afterwards; CPU tensors stand for a GPU's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from adasplash_cli.main import cli
from adasplash_core import plugins, precision
from adasplash_core.backend import AttentionCall, ForwardResult, Gradients
from adasplash_core.device import device_info
from adasplash_core.plugins import registry
from adasplash_core.precision import restored, tf32_allowed
from adasplash_core.testing import inputs
from adasplash_torch.backend import TorchBackend
from adasplash_tuner.key import tuning_key
from adasplash_tuner.measure.bench import Bench, Case, CpuTimer
from adasplash_tuner.search.events import Request
from adasplash_tuner.search.session import tune
from adasplash_tuner.shapes.shape import Shape
from adasplash_tuner.storage.store import TuningStore

ROUNDED, EXACT = (Shape.parse(f"H=1,L=64,D=8,{word}") for word in ("tf32", "fp32"))


class Watched(TorchBackend):
    """Notes, at each run, the call's arithmetic and whether PyTorch's setting allowed TF32."""

    name = "watched"

    def __init__(self) -> None:
        self.seen: set[tuple[str, bool]] = set()

    def forward(self, call: AttentionCall) -> ForwardResult:
        self.seen.add((call.spec.arithmetic, tf32_allowed("cuda")))
        return super().forward(call)

    def backward(
        self, call: AttentionCall, grad_out: torch.Tensor, saved: Sequence[torch.Tensor], out: torch.Tensor | None
    ) -> Gradients:
        self.seen.add((call.spec.arithmetic, tf32_allowed("cuda")))
        return super().backward(call, grad_out, saved, out)


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "knows_tf32", lambda _device_type: True)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    backend = Watched()
    monkeypatch.setitem(plugins.registry().backends, "watched", backend)
    return backend


@pytest.mark.parametrize("before", ["highest", "high"])
def test_a_run_sets_what_each_shape_asks_for(database: Path, watched: Watched, before: str) -> None:
    with restored():
        torch.set_float32_matmul_precision(before)
        requests = [Request(backends=("watched",), shapes=(s,), passes=("forward",), budget_s=2.0) for s in (ROUNDED, EXACT)]
        finished = [f for request in requests for f in tune(request).finished]
        assert torch.get_float32_matmul_precision() == before
    assert watched.seen == {("tf32", True), ("float32", False)}
    bounds = {f.label: f.outcome.error_bound for f in finished if f.outcome is not None}
    assert bounds == {f"{ROUNDED} watched forward": 4e-3, f"{EXACT} watched forward": 5e-6}
    stored = {r.key.dtype: r.shape for row in TuningStore().rows() if (r := row.record) is not None}
    assert stored == {"tf32": str(ROUNDED), "float32": str(EXACT)}


@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_a_bench_leaves_the_setting_alone_between_its_runs(watched: Watched, pass_: str) -> None:
    call = inputs.make_call(ROUNDED.spec("cpu", needs_grad=True))
    bench = Bench(watched, device_info("cpu"), pass_, [Case("random", call)], CpuTimer())  # type: ignore[arg-type]
    for run in (bench.check, bench.time):
        run(bench.default)
        assert not tf32_allowed("cuda")
    assert watched.seen == {("tf32", True)}


def test_a_failing_config_leaves_the_setting_as_it_was(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    call = inputs.make_call(ROUNDED.spec("cpu", needs_grad=False))
    bench = Bench(watched, device_info("cpu"), "forward", [Case("random", call)], CpuTimer())

    def fail(_call: AttentionCall) -> ForwardResult:
        raise RuntimeError("spills")

    monkeypatch.setattr(watched, "forward", fail)
    with pytest.raises(RuntimeError, match="spills"):
        bench.check(bench.default)
    assert not tf32_allowed("cuda")


def test_a_stored_result_is_measured_again_as_it_was(database: Path, watched: Watched) -> None:
    tune(Request(backends=("watched",), shapes=(ROUNDED,), passes=("forward",), budget_s=3.0))
    watched.seen.clear()
    done = CliRunner().invoke(cli, ["cache", "verify", "--all", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["counts"].get("quarantined", 0) == 0
    assert watched.seen == {("tf32", True)}


def test_explain_asks_for_it_and_finds_what_was_tuned(database: Path) -> None:
    tune(Request(backends=("torch",), shapes=(ROUNDED,), passes=("forward",), budget_s=3.0))
    command = ["explain", "--heads", "1", "--length", "64", "--head-dim", "8", "--forward-only", "--device", "cpu", "--dtype"]
    found = {dtype: json.loads(CliRunner().invoke(cli, [*command, dtype, "--json"]).stdout) for dtype in ("tf32", "float32")}
    assert found["tf32"]["passes"]["forward"]["source"] == "user_database"
    assert found["float32"]["passes"]["forward"]["source"] == "heuristic"
    assert found["tf32"]["spec"]["dtype"] == "float32"
    assert found["tf32"]["spec"]["tf32"]
    printed = CliRunner().invoke(cli, [*command, "tf32"]).stdout
    assert "products: may be rounded to TF32" in printed
    assert "key: torch forward: tf32 D=8" in printed or "measured" in printed


def test_benchmarks_run_as_their_shape_says(watched: Watched) -> None:
    command = ["bench", "--backend", "watched", "--no-dense", "--no-memory", "--rounds", "1", "--device", "cpu", "--json"]
    done = CliRunner().invoke(cli, [*command, "--shapes", str(ROUNDED), "--shapes", str(EXACT)])
    assert done.exit_code == 0, done.output
    assert [p["problem"] for p in json.loads(done.stdout)["problems"]] == [str(ROUNDED), str(EXACT)]
    assert watched.seen == {("tf32", True), ("float32", False)}
    assert not tf32_allowed("cuda")


@pytest.mark.parametrize("command", [["bench", "--shapes", "H=1,L=8,D=8,tf32"], ["tune", "--shapes", "H=1,L=8,D=8,tf32"]])
def test_a_device_without_it_is_told(monkeypatch: pytest.MonkeyPatch, database: Path, command: list[str]) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("ADASPLASH_DB", str(database))
    done = CliRunner().invoke(cli, [*command, "--device", "cpu"])
    assert done.exit_code != 0
    assert "TF32 is of NVIDIA's GPUs" in " ".join(done.output.split())


def test_the_key_of_a_backend_that_is_registered_is_of_tf32() -> None:
    key = tuning_key(registry().backend("torch"), ROUNDED.spec("cuda", False), device_info("cpu"), "forward")
    assert key.dtype == "tf32"
