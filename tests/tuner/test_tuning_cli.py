"""``adasplash tune`` and ``adasplash cache`` as commands."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from adasplash_cli.main import cli
from adasplash_core.device import device_info
from adasplash_core.errors import ArgumentError
from adasplash_core.plugins import registry
from adasplash_tuner.key import tuning_key
from adasplash_tuner.records import Measurement
from adasplash_tuner.shapes import PROFILES, Shape
from adasplash_tuner.store import TuningStore, now
from tests.tuner.fakes import H100, SPEC, record


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments)


def run_json(*arguments: str) -> Any:
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture
def filled(store: TuningStore) -> TuningStore:
    store.publish(record(measured_at=now()))
    store.add_measurement(
        record().key, Measurement({"block_n": 128}, "s", "i", "final", "ok", 1, "1", median_ms=1.0, spread_ms=0.1, samples=3)
    )
    store.publish(
        replace(record(), key=replace(record().key, backend="torch", device_type="cpu", device_name="Some CPU", capability=""))
    )
    return store


# -- cache ------------------------------------------------------------------------------------------------------------------------


def test_path_says_where_and_in_which_state(database: Path) -> None:
    done = run("cache", "path")
    assert done.stdout.strip() == str(database)
    assert "`adasplash tune` makes it" in done.stderr
    TuningStore().publish(record())
    facts = run_json("cache", "path")
    assert (facts["location"], facts["exists"], facts["best"], facts["problem"]) == (str(database), True, 1, None)


def test_list_shows_each_row_and_filters(filled: TuningStore) -> None:
    done = run("cache", "list")
    assert done.exit_code == 0
    for words in ("fake forward: bfloat16 D=128", "NVIDIA H100", "1.50x", "block_n=128", "Some CPU"):
        assert words in done.stdout
    assert [row["record"]["key"]["backend"] for row in run_json("cache", "list")["rows"]] == ["fake", "torch"]
    assert len(run_json("cache", "list", "--backend", "torch")["rows"]) == 1
    assert len(run_json("cache", "list", "--device", "h100")["rows"]) == 1


def test_an_empty_database_lists_nothing_and_is_not_made(database: Path) -> None:
    assert "No tuned config is in" in run("cache", "list").stdout
    assert not database.exists()


def test_show_prints_the_key_and_the_measurements(filled: TuningStore) -> None:
    done = run("cache", "show", "1")
    for words in ("kv_bucket            8192", "code_hash            c0de", "default_ms           1.5", "block_n=128", "final"):
        assert words in done.stdout
    shown = run_json("cache", "show", "1")
    assert shown["record"]["median_ms"] == 1.0
    assert [m["stage"] for m in shown["measurements"]] == ["final"]
    missing = run("cache", "show", "99")
    assert missing.exit_code == 2
    assert "there is no row 99" in missing.stderr


def test_export_and_import_carry_configs_to_another_database(
    filled: TuningStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tuned.json"
    assert run_json("cache", "export", str(file))["configs"] == 2
    assert run("cache", "export").stdout == file.read_text()
    monkeypatch.setenv("ADASPLASH_DB", str(tmp_path / "other.db"))
    assert run_json("cache", "import", str(file))["taken"] == 2
    assert run_json("cache", "import", str(file))["taken"] == 0
    assert TuningStore().rows()[0].record == filled.rows()[0].record


def test_a_strangers_file_is_refused_with_the_reason_and_nothing_is_written(database: Path, tmp_path: Path) -> None:
    file = tmp_path / "stranger.json"
    file.write_text('{"format": "adasplash-tuned-configs", "format_version": 1, "configs": [{"key": {}}]}')
    done = run("cache", "import", str(file))
    assert done.exit_code == 2
    assert "configs[0]: the record lacks config" in done.stderr
    assert not database.exists()


def test_prune_by_age(store: TuningStore) -> None:
    store.publish(record(measured_at=now() - 100 * 86_400))
    store.publish(replace(record(measured_at=now()), key=replace(record().key, kv_bucket=1024)))
    dry = run_json("cache", "prune", "--older-than", "90", "--dry-run")
    assert (dry["chosen"], dry["deleted"]) == ({"1": ["100 days old"]}, 0)
    assert run_json("cache", "prune", "--older-than", "90")["deleted"] == 1
    assert [row.record.key.kv_bucket for row in store.rows() if row.record] == [1024]


def test_prune_missing_gpus_leaves_cpus(filled: TuningStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adasplash_core.device.visible_devices", lambda: [H100])
    assert run_json("cache", "prune", "--missing-gpu")["deleted"] == 0
    monkeypatch.setattr("adasplash_core.device.visible_devices", list)
    assert run_json("cache", "prune", "--missing-gpu")["deleted"] == 1
    assert [row.record.key.device_type for row in filled.rows() if row.record] == ["cpu"]


def torch_record(code: str | None = None) -> Any:
    backend, device = registry().backend("torch"), device_info("cpu")
    spec = replace(SPEC, device_type="cpu", dtype="float32")
    key = tuning_key(backend, spec, device, "forward")
    config = backend.default_config(spec, device, "forward").to_dict()
    return replace(record(measured_at=now()), key=key if code is None else replace(key, code_hash=code), config=config)


def test_prune_stale_deletes_results_of_other_code(store: TuningStore) -> None:
    store.publish(torch_record())
    store.publish(torch_record("0ld"))
    chosen = run_json("cache", "prune", "--stale")["chosen"]
    assert list(chosen) == ["2"]
    assert "measured with code 0ld" in chosen["2"][0]
    assert len(store.rows()) == 1


def test_prune_wants_to_be_told_what(filled: TuningStore) -> None:
    done = run("cache", "prune")
    assert done.exit_code == 2
    assert "--older-than" in done.stderr
    assert len(filled.rows()) == 2


def test_verify_tells_good_stale_unknown_and_broken_rows_apart(store: TuningStore, database: Path) -> None:
    store.publish(torch_record())
    store.publish(torch_record("0ld"))
    store.publish(record())  # of a backend that is not installed
    for number, config in ((1, "{}}"), (2, '{"rows":"many"}')):
        store.publish(replace(torch_record(), key=replace(torch_record().key, kv_bucket=number)))
        with sqlite3.connect(database) as connection:
            connection.execute(
                "UPDATE adasplash_best SET config = ? WHERE key_id = (SELECT max(key_id) FROM adasplash_best)", (config,)
            )
    done = run("cache", "verify", "--json")
    assert done.exit_code == 1
    report = json.loads(done.stdout)
    assert [row["state"] for row in report["rows"]] == ["ok", "stale", "unknown backend", "broken", "broken"]
    assert report["damage"] == []
    assert "not JSON" in report["rows"][3]["why"]
    assert "wants int for 'rows'" in report["rows"][4]["why"]
    again = run("cache", "verify")
    assert "1 broken, 1 ok, 1 quarantined, 1 stale, 1 unknown backend" in again.stdout
    assert store.counts()["quarantined"] == 2


def test_a_corrupt_file_is_mended(database: Path) -> None:
    database.parent.mkdir()
    database.write_bytes(b"nonsense" * 1000)
    for command in ("list", "verify", "path"):
        assert "adasplash cache mend" in run("cache", command).stderr
    mended = run_json("cache", "mend")
    assert Path(mended["set_aside"]).read_bytes() == b"nonsense" * 1000
    assert run("cache", "verify").exit_code == 0


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


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
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
