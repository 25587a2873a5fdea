"""benchmarks/tuned_vs_default.py at a size that a CPU does in a moment."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from adasplash_core.configs import ladder
from adasplash_tuner.search.events import Request
from adasplash_tuner.search.session import tune
from adasplash_tuner.shapes.shape import PROFILES, Shape

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "tuned_vs_default.py"


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tuned_vs_default", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tuned_vs_default"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, out: Path, *shapes: str) -> tuple[int, Any, str]:
    ladder().clear()
    fixed = ["--device", "cpu", "--passes", "forward", "--rounds", "3", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *fixed, "--shapes", *shapes])
    code = script.main()
    (numbers,) = out.glob("*.json")
    return code, json.loads(numbers.read_text()), next(out.glob("*.md")).read_text()


def test_it_times_what_a_call_gets_against_the_default_and_says_what_is_not_tuned(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, database: Path, tmp_path: Path
) -> None:
    tune(Request(shapes=(Shape.parse("H=2,L=128,D=8"),), passes=("forward",), budget_s=1.0))
    code, found, table = run(script, monkeypatch, tmp_path, "H=2,L=140,D=8", "H=2,L=2048,D=8")
    (row,) = found["rows"]  # the first has the bucket that was tuned
    assert (row["shape"], row["source"]) == ("B=1,H=2,L=140,D=8,float32", "user database")
    assert found["totals"] == {row["shape"]: row["default_ms"] / row["tuned_ms"]}
    assert found["lowest"] == min(row["ratio"], found["geometric_mean"])
    assert set(row["by_input"]) == {"dense", "moderate", "sparse"}
    assert len(found["not_tuned"]) == 1
    assert code == 1
    assert f"**{row['ratio']:.2f}**" in table
    assert found["versions"]["torch"] in table
    assert "Not tuned: B=1,H=2,L=2048,D=8" in table


def test_a_slower_shape_fails_and_a_faster_one_does_not(script: ModuleType) -> None:
    def result(*ratios: float) -> Any:
        rows = [script.Row(f"s{n}", "b", "forward", "", r, 1.0, r, (r, r), {}, False) for n, r in enumerate(ratios)]
        made = script.Result({}, {}, "", 3, 1, rows)
        made.summarise()
        return made

    good, bad = result(1.0, 1.44, 0.985), result(1.5, 0.97)
    assert good.ok
    assert not bad.ok
    assert result(1.0, 1.44).geometric_mean == pytest.approx(1.2)
    assert bad.lowest == 0.97


def test_a_pass_may_lose_on_another_backend_if_its_shape_gains(script: ModuleType) -> None:
    """The two passes go together: a faster forward pays for a slower backward, up to the shape's total."""

    def result(forward_ms: float, backward_ms: float, untuned: str) -> Any:
        times = {"forward": forward_ms, "backward": backward_ms}
        rows = [script.Row("s", "b", p, "", 2.0, t, 2.0 / t, (1, 1), {}, False, untuned) for p, t in times.items()]
        made = script.Result({}, {}, "", 3, 1, rows)
        made.summarise()
        return made

    gained = result(1.0, 2.5, untuned="a")
    assert gained.ok
    assert gained.lowest == gained.geometric_mean == pytest.approx(4 / 3.5)
    assert not result(1.0, 2.5, untuned="").ok
    assert not result(1.9, 2.5, untuned="a").ok


def test_the_shapes_of_a_gpu_are_at_least_twelve_tuned_by_the_full_profile_and_reach_from_short_to_long(
    script: ModuleType,
) -> None:
    from adasplash_core.plugins import registry
    from adasplash_tuner.key import tuning_key
    from tests.tuner.fakes import H100

    def key(text: str) -> Any:
        return tuning_key(registry().backend("triton"), Shape.parse(text).spec("cuda", True), H100, "forward")

    shapes = [Shape.parse(text) for text in script.SHAPES["cuda"]]
    assert len(shapes) >= 12
    assert {key(text) for text in script.SHAPES["cuda"]} <= {key(text) for text in PROFILES["cuda", "full"].shapes}
    assert any(s.heads != s.kv_heads for s in shapes)
    assert any(s.head_dim == 128 for s in shapes)
    assert min(s.q_len for s in shapes) <= 512
    assert max(s.q_len for s in shapes) >= 32768
