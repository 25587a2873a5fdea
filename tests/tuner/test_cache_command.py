"""``adasplash cache`` as a command: looking, carrying elsewhere, shipping, pruning, verifying, mending."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from adasplash_cli.main import cli
from adasplash_core.configs import ConfigLadder, Rung
from adasplash_core.device import device_info
from adasplash_core.errors import ConfigRejectedError
from adasplash_core.plugins import registry
from adasplash_core.spec import PASSES, Pass
from adasplash_tuner.key import tuning_key
from adasplash_tuner.provider import TunedConfigs
from adasplash_tuner.shapes.shape import Shape
from adasplash_tuner.storage.records import BestConfig, Measurement
from adasplash_tuner.storage.snapshot import shipped
from adasplash_tuner.storage.store import TuningStore, now
from tests.tuner.fakes import H100, H200, SPEC, record


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


SHAPE = Shape.parse("B=1,H=2,L=64,D=16,float32,causal")


def torch_record(code: str | None = None, pass_: Pass = "forward", **changes: Any) -> BestConfig:
    """The reference backend's default on this CPU, as if it had been tuned."""
    backend, device = registry().backend("torch"), device_info("cpu")
    spec = SHAPE.spec("cpu", needs_grad=True)
    key = tuning_key(backend, spec, device, pass_)
    best = replace(
        record(measured_at=now()),
        key=key if code is None else replace(key, code_hash=code),
        config=backend.default_config(spec, device, pass_).to_dict(),
        shape=str(SHAPE),
        inputs="random, dense+sparse",
    )
    return replace(best, **changes)


def test_prune_stale_deletes_results_of_other_code(store: TuningStore) -> None:
    store.publish(torch_record())
    store.publish(torch_record("0ld"))
    chosen = run_json("cache", "prune", "--stale")["chosen"]
    assert list(chosen) == ["2"]
    assert "measured with code 0ld" in chosen["2"][0]
    assert len(store.rows()) == 1


def test_prune_deletes_what_is_in_quarantine_or_cannot_be_read(store: TuningStore, database: Path) -> None:
    store.publish(torch_record())
    store.publish(torch_record("spilling", quarantined="does not run: spills"))
    store.publish(torch_record("edited"))
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE adasplash_best SET config = '{{{' WHERE key_id = 3")
    chosen = run_json("cache", "prune", "--quarantined")["chosen"]
    assert chosen["2"] == ["in quarantine: does not run: spills"]
    assert chosen["3"][0].startswith("cannot be read: config is not JSON")
    assert [row.id for row in store.rows()] == [1]


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
    done = run("cache", "verify", "--sample", "0", "--json")
    assert done.exit_code == 1
    report = json.loads(done.stdout)
    assert [row["state"] for row in report["rows"]] == ["ok", "stale", "unknown backend", "broken", "broken"]
    assert report["damage"] == []
    assert "not JSON" in report["rows"][3]["why"]
    assert "wants int for 'rows'" in report["rows"][4]["why"]
    again = run("cache", "verify", "--sample", "0")
    assert again.exit_code == 0
    assert "1 ok, 2 quarantined, 1 stale, 1 unknown backend" in again.stdout
    assert store.counts()["quarantined"] == 2


def test_verify_measures_again_and_tells_the_drift(store: TuningStore) -> None:
    for pass_ in PASSES:
        store.publish(torch_record(pass_=pass_, median_ms=1000.0, default_ms=1000.0))
    store.publish(torch_record("0ld", "forward"))
    store.publish(replace(torch_record(), key=replace(torch_record().key, device_name="Another CPU")))
    report = run_json("cache", "verify", "--all")
    assert sorted(measured["id"] for measured in report["measured"]) == [1, 2]  # not those of other code and machines
    for measured in report["measured"]:
        assert measured["problem"] is None
        assert measured["drift_percent"] == pytest.approx((measured["now_ms"] / 1000 - 1) * 100)
        assert measured["drift_percent"] < -90
        assert 0 < measured["default_ms"] < 100
        assert measured["error"] < 5e-6
    shown = run("cache", "verify", "--sample", "1")
    assert shown.exit_code == 0
    assert "drifted" in shown.stdout
    assert "-9" in shown.stdout
    assert (
        len([line for line in shown.stdout.splitlines() if "torch forward" in line or "torch backward" in line]) == 2
    )  # and the stale one
    assert store.counts()["quarantined"] == 0


def test_verify_puts_configs_in_quarantine_that_do_not_run_or_are_not_accurate(
    store: TuningStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adasplash_torch.backend import TorchBackend

    for pass_ in PASSES:
        store.publish(torch_record(pass_=pass_, config={**torch_record(pass_=pass_).config, "rows": 33}))
    forward, backward = TorchBackend.forward, TorchBackend.backward

    def off_by_a_percent(backend: TorchBackend, call: Any) -> Any:
        result = forward(backend, call)
        return replace(result, out=result.out * 1.01) if call.config.rows == 33 else result

    def too_much_to_ask(backend: TorchBackend, call: Any, *rest: Any) -> Any:
        if call.config.rows == 33:
            raise ConfigRejectedError("torch", call.config, "too large")
        return backward(backend, call, *rest)

    monkeypatch.setattr(TorchBackend, "forward", off_by_a_percent)
    monkeypatch.setattr(TorchBackend, "backward", too_much_to_ask)
    done = run("cache", "verify", "--json")
    assert done.exit_code == 1
    problems = {measured["id"]: measured["problem"] for measured in json.loads(done.stdout)["measured"]}
    assert problems[1] == "is off by 1.0e-02, more than 5e-06"
    assert problems[2].startswith("does not run: ConfigRejectedError: ")
    assert {row.record.quarantined for row in store.rows() if row.record} == set(problems.values())
    assert json.loads(run("cache", "verify", "--json").stdout)["counts"] == {"quarantined": 2}


def test_verify_does_not_blame_a_config_for_a_device_that_fails(store: TuningStore, monkeypatch: pytest.MonkeyPatch) -> None:
    from adasplash_torch.backend import TorchBackend

    def fail(*_: Any) -> Any:
        raise MemoryError("no room")

    store.publish(torch_record())
    monkeypatch.setattr(TorchBackend, "forward", fail)
    (measured,) = run_json("cache", "verify")["measured"]
    assert measured["problem"] == "was not measured, as the default config fails: MemoryError: no room"
    assert store.counts()["quarantined"] == 0


def test_verify_stops_at_a_device_that_is_lost(store: TuningStore, monkeypatch: pytest.MonkeyPatch) -> None:
    from adasplash_torch.backend import TorchBackend

    def lose(*_: Any) -> Any:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    for number in range(3):
        key = replace(torch_record().key, kv_bucket=1000 + number)
        store.publish(torch_record(key=key, config={**torch_record().config, "rows": 33}))
    forward = TorchBackend.forward
    monkeypatch.setattr(TorchBackend, "forward", lambda self, call: lose() if call.config.rows == 33 else forward(self, call))
    done = run("cache", "verify", "--json")
    assert done.exit_code == 1
    assert len(json.loads(done.stdout)["measured"]) == 1
    assert store.counts()["quarantined"] == 1


def test_verify_measures_captured_layers_if_it_is_given_their_file(store: TuningStore, tmp_path: Path) -> None:
    from adasplash_core.workload import WorkloadInfo, WorkloadLayer, save_workload

    file = tmp_path / "work.safetensors"
    q, k, v = torch.randn(1, 2, 64, 16), torch.randn(1, 2, 64, 16), torch.randn(1, 2, 64, 16)
    save_workload(
        file, WorkloadInfo(model="tests"), [WorkloadLayer(index=3, query=q, key=k, value=v, scale=0.25, is_causal=True)]
    )
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    store.publish(torch_record(inputs=f"work.safetensors ({digest}), layers 3"))
    (without,) = run_json("cache", "verify")["measured"]
    assert "pass their file as --workload" in without["problem"]
    (with_it,) = run_json("cache", "verify", "--workload", str(file))["measured"]
    assert with_it["problem"] is None
    assert with_it["now_ms"] > 0
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "work.safetensors"
    save_workload(
        other, WorkloadInfo(model="tests"), [WorkloadLayer(index=3, query=k, key=q, value=v, scale=0.25, is_causal=True)]
    )
    (changed,) = run_json("cache", "verify", "--workload", str(other))["measured"]
    assert "must be the file it was measured on" in changed["problem"]


# -- shipping and pinning ---------------------------------------------------------------------------------------------------------


def test_the_file_to_ship_holds_one_card_of_this_code_and_says_where_it_is_from(
    store: TuningStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = registry().backend("torch")
    for device in (H100, H200):
        key = tuning_key(backend, SPEC, device, "forward")
        config = backend.default_config(SPEC, device, "forward").to_dict()
        store.publish(replace(record(key, error=3e-3), config=config))
        store.publish(
            replace(
                record(replace(key, kv_bucket=1024, toolchain="driver 1", device_name=device.name), error=9e-3), config=config
            )
        )
        store.publish(replace(record(replace(key, q_bucket=64, code_hash="0ld")), config=config))
        store.publish(replace(record(replace(key, q_bucket=128)), config=config, quarantined="spills"))
        store.publish(replace(record(replace(key, q_bucket=256)), config={"nonsense": 1}))
    both = run("cache", "export", "--pretuned", str(tmp_path))
    assert both.exit_code == 2
    assert "H100" in both.stderr
    assert "H200" in both.stderr
    assert "--device" in both.stderr
    written = run_json("cache", "export", "--pretuned", "--device", "H200", str(tmp_path))
    assert written == {"file": str(tmp_path / "nvidia-h200.json"), "configs": 2}
    document = json.loads((tmp_path / "nvidia-h200.json").read_text())
    provenance = document["provenance"]
    assert provenance["card"] == "cuda NVIDIA H200 (9.0), 132 SMs"
    assert provenance["measured"] == "2025-06-15"
    assert provenance["adasplash-core"] == "0.1.0"
    assert "driver 1" in provenance["toolchain of torch"]
    assert "cuda 13.0, driver 580.1" in provenance["toolchain of torch"]
    assert provenance["largest error in bfloat16"] == "9.0e-03"
    monkeypatch.setattr("adasplash_core.device.visible_devices", lambda: [H100])
    assert Path(run_json("cache", "export", "--pretuned", str(tmp_path))["file"]).name == "nvidia-h100-80gb-hbm3.json"
    answer = ConfigLadder([TunedConfigs(str(tmp_path / "none.db"), pretuned=tmp_path)]).find(backend, SPEC, H200, "forward")
    assert answer.rung is Rung.SHIPPED


def test_nothing_tuned_is_nothing_to_ship(database: Path) -> None:
    done = run("cache", "export", "--pretuned")
    assert done.exit_code == 2
    assert "run `adasplash tune --gpu-auto --profile full` first" in done.stderr


def test_the_shipped_files_are_valid_and_their_configs_are_the_backends() -> None:
    for row in shipped().rows():
        assert row.record is not None, row.problem
        backend = registry().backends[row.record.key.backend]
        backend.config_class("backward" if row.record.key.pass_ == "backward" else "forward").from_mapping(row.record.config)


def test_a_snapshot_is_looked_at_as_a_database_is_and_never_written(
    filled: TuningStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "snapshot.json"
    run_json("cache", "export", str(snapshot))
    content = snapshot.read_bytes()
    monkeypatch.setenv("ADASPLASH_DB", str(snapshot))
    assert [row["record"]["key"]["backend"] for row in run_json("cache", "list")["rows"]] == ["fake", "torch"]
    assert run_json("cache", "show", "2")["measurements"] == []
    path = run_json("cache", "path")
    assert (path["best"], path["sha256"]) == (2, hashlib.sha256(content).hexdigest()[:12])
    assert f"A snapshot, sha256 {path['sha256']}" in run("cache", "path").stderr
    assert run_json("cache", "list")["location"] == str(snapshot)
    assert run_json("info")["database"]["best"] == 2
    assert run("cache", "export").stdout == content.decode()
    assert run_json("cache", "verify", "--sample", "0")["counts"] == {"stale": 1, "unknown backend": 1}
    for refused in (("import", str(snapshot)), ("prune", "--older-than", "0"), ("mend",)):
        done = run("cache", *refused)
        assert done.exit_code == 1
        assert "is a snapshot, which is only read" in done.stderr
    assert run("tune", "--device", "cpu", "--shapes", "H=1,L=64,D=8").exit_code == 1
    assert snapshot.read_bytes() == content


@pytest.mark.parametrize("mode", ["read", "frozen", "off"])
def test_nothing_is_written_unless_the_mode_allows_it(
    filled: TuningStore, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    exported = tmp_path / "tuned.json"
    run_json("cache", "export", str(exported))
    filled.engines.dispose()
    content = database.read_bytes()
    monkeypatch.setenv("ADASPLASH_CACHE_MODE", mode)
    for refused in (("cache", "import", str(exported)), ("cache", "prune", "--older-than", "0"), ("cache", "mend"), ("tune",)):
        done = run(*refused)
        assert done.exit_code == 1
        assert f"is not written while ADASPLASH_CACHE_MODE is '{mode}'" in done.stderr
    assert run_json("cache", "path")["mode"] == mode
    assert len(run_json("cache", "list")["rows"]) == 2
    assert database.read_bytes() == content


def test_a_mode_that_does_not_exist_is_a_usage_error(filled: TuningStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADASPLASH_CACHE_MODE", "forzen")
    done = run("cache", "path")
    assert done.exit_code == 2
    assert "must be one of readwrite, read, frozen, off. Got 'forzen'" in done.stderr


# -- mending ----------------------------------------------------------------------------------------------------------------------


def test_a_corrupt_file_is_mended(database: Path) -> None:
    database.parent.mkdir()
    database.write_bytes(b"nonsense" * 1000)
    for command in ("list", "verify", "path"):
        assert "adasplash cache mend" in run("cache", command).stderr
    mended = run_json("cache", "mend")
    assert Path(mended["set_aside"]).read_bytes() == b"nonsense" * 1000
    assert run("cache", "verify").exit_code == 0
