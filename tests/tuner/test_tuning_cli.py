"""``adasplash tune`` as a command."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from adasplash_cli.main import cli
from adasplash_cli.tuning_display import Display, finished_words
from adasplash_core.device import device_info
from adasplash_core.errors import ArgumentError
from adasplash_core.plugins import registry
from adasplash_tuner.key import tuning_key
from adasplash_tuner.search.events import Finished, Planned, Step
from adasplash_tuner.search.search import Outcome, Progress
from adasplash_tuner.shapes.shape import PROFILES, Shape
from adasplash_tuner.storage.store import TuningStore
from tests.tuner.fakes import H100, record


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments)


def run_json(*arguments: str) -> Any:
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


# -- tune -------------------------------------------------------------------------------------------------------------------------

SMALL = ("--device", "cpu", "--shapes", "H=1,L=64,D=8", "--passes", "forward", "--budget", "2s")


def test_tune_prints_a_table_and_where_it_is_stored(database: Path) -> None:
    done = run("tune", *SMALL)
    assert done.exit_code == 0, done.output
    for words in ("default ms", "tuned ms", "gain", "B=1,H=1,L=64,D=8,float32", "torch", f"stored in {database}"):
        assert words in done.stdout
    assert "1 search, about" in done.stderr
    again = run("tune", *SMALL)
    assert "already tuned" in again.stderr


def test_a_winner_of_older_code_competes_again(store: TuningStore) -> None:
    backend, device = registry().backend("torch"), device_info("cpu")
    spec = Shape.parse(SMALL[3]).spec("cpu", needs_grad=False)
    key = tuning_key(backend, spec, device, "forward")
    unusual = {**backend.default_config(spec, device, "forward").to_dict(), "rows": 33}
    store.publish(replace(record(replace(key, code_hash="0ld")), config=unusual))
    done = run("tune", *SMALL)
    assert done.exit_code == 0, done.output
    assert unusual in [m.config for m in store.measurements(key)]


def test_gpu_auto_without_a_gpu_says_so_and_tunes_the_cpu(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adasplash_core.device.visible_devices", list)
    done = run("tune", "--gpu-auto", *SMALL[2:])
    assert done.exit_code == 0, done.output
    assert "No GPU is visible to torch: tuning the CPU." in done.stderr
    assert TuningStore().rows()[0].record.key.device_type == "cpu"  # type: ignore[union-attr]


def test_tune_on_captured_layers_measures_them(database: Path, tmp_path: Path) -> None:
    import torch

    from adasplash_core.workload import WorkloadInfo, WorkloadLayer, save_workload

    layers = [
        WorkloadLayer(
            index=n,
            query=4 * torch.randn(1, 2, 96, 8),
            key=torch.randn(1, 1, 96, 8),
            value=torch.randn(1, 1, 96, 8),
            scale=0.5,
            is_causal=True,
        )
        for n in (0, 3, 5, 7)
    ]
    file = tmp_path / "work.safetensors"
    save_workload(file, WorkloadInfo(model="tests"), layers)
    device = run_json("tune", "--device", "cpu", "--workload", str(file), "--passes", "forward,backward", "--budget", "4s")[
        "devices"
    ][0]
    assert [s["key"]["pass_"] for s in device["searches"]] == ["forward", "backward"]
    for search in device["searches"]:
        assert search["shape"] == "B=1,H=2,Hkv=1,L=96,D=8,float32,causal"
        assert search["inputs"].startswith("work.safetensors (")
        assert search["inputs"].endswith("layers 0,5,7")


def test_a_models_config_gives_the_shapes(database: Path, tmp_path: Path) -> None:
    tiny = {"model_type": "gpt2", "n_embd": 16, "n_head": 2, "n_positions": 64}
    (tmp_path / "config.json").write_text(json.dumps(tiny))
    (device,) = run_json("tune", "--device", "cpu", "--model", str(tmp_path), "--passes", "forward", "--budget", "2s")[
        "devices"
    ]
    assert [s["shape"] for s in device["searches"]] == ["B=1,H=2,L=64,D=8,float32,causal"]


def test_the_report_shows_what_the_table_shows(database: Path, tmp_path: Path) -> None:
    page = tmp_path / "out.html"
    done = run("tune", *SMALL, "--report", str(page))
    assert done.exit_code == 0, done.output
    assert f"report: {page}" in done.stdout
    text = page.read_text(encoding="utf-8").replace("<wbr>", "")
    for words in ("B=1,H=1,L=64,D=8,float32", "torch forward", "random, dense+moderate+sparse"):
        assert words in text


def test_json_says_how_sure_a_gain_is_and_what_each_input_took(database: Path) -> None:
    (device,) = run_json("tune", *SMALL)["devices"]
    (search,) = device["searches"]
    low, high = search["gain_interval"]
    assert 0 < low <= search["gain"] <= high
    assert set(search["by_input"]) == {"dense", "moderate", "sparse"}
    assert search["error"] <= search["error_bound"] == 5e-6
    assert not search["postponed"]


def test_every_device_has_a_line_with_what_it_does_and_how_long_it_takes() -> None:
    shown = Display(["NVIDIA H100 (cuda:0)", "NVIDIA H200 (cuda:1)"], quiet=True)
    outcome = Outcome(record(), "tuned", {}, 9, 9, gain_interval=(1.45, 1.56))
    shown.show(0, Planned(H100, ("first", "second"), 100.0, 120.0))
    shown.show(0, Finished(0, "first", outcome, left_s=80.0))
    shown.show(0, Step(1, "second", Progress("screening", 3, 12, default_ms=3.0, best_ms=2.0), left_s=75.0))
    screen = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
    screen.print(shown)
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    for words in (
        "NVIDIA H100 (cuda:0)", "1/2", "about 1 min 15 s left", "second: screening 3/12, best so far 2.00 ms (1.50x the default)",
        "NVIDIA H200 (cuda:1): starting",
    ):  # fmt: skip
        assert words in text
    assert finished_words(Finished(0, "first", outcome)) == "first: 1.00 ms, 1.50x the default's speed (1.45 to 1.56)"
    assert finished_words(Finished(1, "second", None, postponed=True)) == "second: no time left, the next run makes it"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--report", "no/such/folder/out.html"), "there is no folder"),
        (("--device", "cpu", "--model", "no/such/config.json"), "--model must be a Hugging Face config.json"),
        (("--gpu-auto", "--device", "cpu"), "exclude each other"),
        (("--budget", "soon"), "'soon' is not a duration like 40s, 5m or 1h"),
        (("--budget", "0s"), "is not a duration"),
        (("--passes", "forward,sideways"), "'sideways' is no pass"),
        (("--shapes", "B=1,H=32"), "it lacks D"),
        (("--shapes", "H=32,D=64"), "it lacks L"),
        (("--shapes", "H=3,Hkv=2,L=8,D=8"), "3 query heads are no multiple of 2 key heads"),
        (("--shapes", "H=3,L=8,D=8,bf17"), "'bf17' is not known"),
        (("--shapes", "H=3,L=-8,D=8"), "no positive integer"),
        (("--shapes", "H=3,L=8,D=8,alpha=3"), "alpha=3"),
        (("--device", "cuda:77"), "--device must be a device of this machine"),
        (("--device", "cpu", "--backend", "torhc"), "Did you mean 'torch'"),
        (("--device", "cpu", "--workload", "none.safetensors"), "there is no such file"),
    ],
)
def test_wrong_options_are_usage_errors_with_a_reason(database: Path, arguments: tuple[str, ...], reason: str) -> None:
    done = run("tune", *arguments)
    assert done.exit_code == 2, done.output
    assert reason in " ".join(done.stderr.split())


def test_a_database_that_cannot_be_written_is_told_before_measuring(database: Path) -> None:
    database.parent.mkdir()
    database.write_bytes(b"nonsense" * 1000)
    done = run("tune", *SMALL)
    assert done.exit_code == 1
    assert "adasplash cache mend" in done.stderr


def test_every_profile_shape_can_be_read_and_quick_holds_the_readme_example() -> None:
    for (device_type, _), profile in PROFILES.items():
        assert all(Shape.parse(text).spec(device_type, True).batch for text in profile.shapes)
    assert "B=1,H=9,Hkv=3,L=4096,D=64,float32,causal" in PROFILES["cpu", "quick"].shapes
    with pytest.raises(ArgumentError, match="written like B=1,H=32"):
        Shape.parse("nonsense")
