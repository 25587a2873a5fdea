"""``adasplash bench``: every contender computes what it says, on the same inputs, and is measured."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import adasplash_core
from adasplash_cli import contest
from adasplash_cli.contest import DEFAULT_CONFIG, DENSE, SOFTMAX, Problem
from adasplash_cli.main import cli
from adasplash_core import plugins
from adasplash_core.workload import WorkloadInfo, WorkloadLayer, save_workload

TINY = "H=2,L=64,D=16,causal"
SMALL = Problem(batch=2, heads=4, kv_heads=2, q_len=40, kv_len=40, head_dim=16, head_dim_v=16, sharpness=4.0)


@pytest.fixture(autouse=True)
def _empty_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADASPLASH_DB", str(tmp_path / "tuned.db"))


@pytest.fixture
def workload(tmp_path: Path) -> Path:
    """A padded causal layer, a windowed one and one with an additive mask."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def layer(index: int, **facts: Any) -> WorkloadLayer:
        return WorkloadLayer(index, normal(2, 4, 24, 8), normal(2, 2, 24, 8), normal(2, 2, 24, 8), scale=0.5, **facts)

    layers = [
        layer(0, is_causal=True, kv_starts=torch.tensor([0, 5], dtype=torch.int32)),
        layer(3, is_causal=True, window=(7, 0)),
        layer(5, attn_mask=normal(1, 1, 24, 24)),
    ]
    path = tmp_path / "work.safetensors"
    save_workload(path, WorkloadInfo(model="random"), layers)
    return path


def problem_of(workload: Path, layer: int | str | None) -> Problem:
    if isinstance(layer, int):
        return Problem(workload=str(workload), layer=layer)
    return SMALL if layer is None else replace(SMALL, kv_len=56)


def bench(options: str) -> dict[str, Any]:
    result = CliRunner().invoke(cli, ["bench", *shlex.split(options), "--rounds", "2", "--json"])
    assert result.exit_code == 0, result.output
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


class TestContenders:
    @pytest.mark.parametrize("layer", [None, "two lengths", 0, 3, 5])
    def test_softmax_is_attention_at_alpha_one(self, workload: Path, layer: int | str | None) -> None:
        problem = problem_of(workload, layer)
        arguments = problem.build()
        expected = adasplash_core.attention(**arguments, alpha=1)
        seen = contest.forward_function(SOFTMAX, arguments, 1.5)()
        visible = seen.isfinite()  # SDPA gives NaN where a row sees no key
        torch.testing.assert_close(seen[visible], expected[visible], rtol=1e-4, atol=1e-5)
        assert visible.float().mean() > 0.8

    @pytest.mark.parametrize("layer", [None, "two lengths", 0, 3, 5])
    @pytest.mark.parametrize("alpha", [1.5, 2.0])
    def test_dense_entmax_is_attention(self, workload: Path, layer: int | str | None, alpha: float) -> None:
        pytest.importorskip("entmax")
        problem = problem_of(workload, layer)
        arguments = problem.build()
        expected = adasplash_core.attention(**arguments, alpha=alpha)
        seen = contest.forward_function(DENSE, arguments, alpha)()
        visible = seen.isfinite()
        torch.testing.assert_close(seen[visible], expected[visible], rtol=1e-4, atol=1e-5)
        assert visible.float().mean() > 0.8

    def test_default_config_is_the_backends_own(self) -> None:
        arguments = SMALL.build()
        configs = contest.default_configs("torch", arguments, 1.5)
        assert set(configs) == {"forward", "backward"}
        tuned, default = (contest.forward_function("torch" + end, arguments, 1.5)() for end in ("", DEFAULT_CONFIG))
        torch.testing.assert_close(tuned, default)

    def test_the_same_problem_is_the_same_input_in_every_process(self) -> None:
        first, second = SMALL.build(), SMALL.build()
        assert torch.equal(first["query"], second["query"])
        assert torch.equal(replace(SMALL, sharpness=8.0).build()["query"], 2 * first["query"])


class TestMeasuring:
    def test_times_are_interleaved_and_summed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        order = []
        times = iter([(4.0, 1.0), (40.0, 10.0), (2.0, 3.0), (20.0, 30.0), (3.0, 2.0), (30.0, 20.0)])
        names: dict[int, str] = {}
        original = contest.forward_function

        def remember(name: str, *arguments: Any) -> Any:
            function = original(name, *arguments)
            names[id(function)] = name
            return function

        def fake(function: Any, *_: Any) -> tuple[float, float]:
            order.append(names[id(function)])
            return next(times)

        monkeypatch.setattr(contest, "forward_function", remember)
        monkeypatch.setattr(contest, "_time_once", fake)
        first, second = contest.time_contenders(SMALL, ["torch", SOFTMAX], alpha=1.5, backward=True, rounds=3)
        assert order == ["torch", SOFTMAX] * 3
        assert (first.forward_ms, first.backward_ms, first.total_ms, first.spread) == (3.0, 2.0, 5.0, 0.0)
        assert second.total_ms == 50.0

    def test_a_slow_contender_sits_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        times = iter([(900.0, 200.0), (1.0, 1.0), (2.0, 2.0), (3.0, 3.0)])
        monkeypatch.setattr(contest, "_time_once", lambda *_: next(times))
        names = ["torch", SOFTMAX]
        slow, fast = contest.time_contenders(SMALL, names, alpha=1.5, backward=True, rounds=3, patience_s=1.0)
        assert slow.samples_ms == [(900.0, 200.0)]
        assert fast.samples_ms == [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)]

    def test_a_very_slow_contender_runs_once(self) -> None:
        (only,) = contest.time_contenders(SMALL, ["torch"], alpha=1.5, backward=True, rounds=3, patience_s=1e-9)
        assert len(only.samples_ms) == 1
        assert only.forward_ms is not None
        assert only.forward_ms > 0

    @pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory comes from /proc")
    def test_peak_memory_of_the_dense_way_is_some_score_matrices(self) -> None:
        problem = Problem(heads=4, kv_heads=4, q_len=1024, kv_len=1024, head_dim=32, head_dim_v=32)
        scores = 4 * 1024 * 1024 * 4
        peak = contest.peak_memory(problem, DENSE, alpha=1.5, backward=True)
        frugal = contest.peak_memory(problem, SOFTMAX, alpha=1.5, backward=True)
        assert peak is not None
        assert frugal is not None
        assert 2 * scores < peak < 20 * scores
        assert frugal < scores

    def test_a_failing_measuring_process_says_why(self) -> None:
        with pytest.raises(RuntimeError, match="No backend is named 'nothing'"):
            contest.peak_memory(SMALL, "nothing", alpha=1.5, backward=True)


class TestCommand:
    def test_measures_every_contender(self) -> None:
        report = bench(f"--shapes {TINY} --shapes B=2,H=4,Hkv=2,Lq=32,Lk=48,D=16,Dv=8,fp64,causal --with-defaults --no-memory")
        assert [p["problem"] for p in report["problems"]] == [
            "B=1,H=2,L=64,D=16,float32,causal",
            "B=2,H=4,Hkv=2,Lq=32,Lk=48,D=16,Dv=8,float64,causal",
        ]
        for problem in report["problems"]:
            assert 0 < problem["density"] <= 1
            measured = {r["contender"]: r for r in problem["results"]}
            assert {"torch", "torch" + DEFAULT_CONFIG, DENSE, SOFTMAX} <= set(measured)
            for name in ("torch", "torch" + DEFAULT_CONFIG, SOFTMAX):
                assert measured[name]["forward_ms"] > 0
                assert measured[name]["backward_ms"] > 0
                assert len(measured[name]["samples_ms"]) == 2
            assert measured["torch"]["difference"] < 1e-4

    def test_measures_captured_layers(self, workload: Path) -> None:
        report = bench(f"--workload {workload} --layers 3,5 --no-memory --no-dense --forward-only")
        assert [p["problem"] for p in report["problems"]] == [
            "work.safetensors, layer 3, float32",
            "work.safetensors, layer 5, float32",
        ]
        assert all(r["backward_ms"] is None for p in report["problems"] for r in p["results"])

    def test_memory_is_in_the_report(self) -> None:
        (problem,) = bench(f"--shapes {TINY} --backend torch --no-dense")["problems"]
        peaks = [r["peak_bytes"] for r in problem["results"]]
        assert all(isinstance(peak, int) for peak in peaks) or not Path("/proc/self/clear_refs").exists()

    def test_a_backend_that_cannot_gives_its_reason(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # A shape of its own: plans of earlier calls are remembered.
        monkeypatch.setattr(type(plugins.registry().backend("torch")), "dtypes", frozenset({"float64"}))
        (problem,) = bench("--shapes H=3,L=52,D=16 --no-memory")["problems"]
        broken = next(r for r in problem["results"] if r["contender"] == "torch")
        assert broken["forward_ms"] is None
        assert "Backend 'torch' cannot do this call: dtype float32 is not supported" in broken["reason"]

    def test_prints_a_table(self) -> None:
        result = CliRunner().invoke(
            cli, shlex.split(f"bench --shapes {TINY} --no-memory --no-dense --rounds 1 --backend torch")
        )
        assert result.exit_code == 0
        assert "of the visible weights are not 0" in result.stdout
        assert [line.split()[0] for line in result.stdout.splitlines() if line.strip().startswith(("torch", "softmax"))] == [
            "torch",
            "softmax",
        ]

    def test_runs_without_the_entmax_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "entmax", None)
        (problem,) = bench(f"--shapes {TINY} --no-memory")["problems"]
        (dense,) = (r for r in problem["results"] if r["contender"] == DENSE)
        assert "entmax" in dense["reason"]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ("--shapes 8x1024", "A shape to tune is written like"),
            ("--shapes H=2,L=64,D=16,alpha=2", "alpha is given by --alpha"),
            ("--shapes H=2,L=8,D=8 --workload x.safetensors", "exclude each other"),
            ("--workload missing.safetensors", "there is no such file"),
            ("--alpha 3", "3.0 is not in the range"),
            ("--backend troch", "Did you mean 'torch'?"),
        ],
    )
    def test_what_cannot_be_is_refused(self, options: str, message: str) -> None:
        result = CliRunner().invoke(cli, ["bench", *shlex.split(options)])
        assert result.exit_code == 2
        assert message in result.stderr

    def test_a_layer_that_was_not_captured_is_refused(self, workload: Path) -> None:
        result = CliRunner().invoke(cli, ["bench", "--workload", str(workload), "--layers", "0,4"])
        assert result.exit_code == 2
        assert "has no layer 4; it has 0, 3, 5" in result.stderr
