"""``ADASPLASH_CACHE_MODE``: who writes, what is looked up, and how the processes of one job agree."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adasplash_core import attention
from adasplash_core.configs import ConfigLadder, FoundBackend, FoundConfig, Rung, ladder
from adasplash_core.device import DeviceInfo
from adasplash_core.errors import ArgumentError, FrozenConfigsError
from adasplash_core.spec import AttentionSpec
from adasplash_tuner.key import TuningKey, tuning_key
from adasplash_tuner.provider import TunedConfigs
from adasplash_tuner.storage.exchange import export_document
from adasplash_tuner.storage.location import MODE_VARIABLE, CacheMode, cache_mode
from adasplash_tuner.storage.store import TuningStore
from tests.tuner.fakes import H100, H200, SPEC, BlockConfig, FakeBackend, Warned, record

ROOT = Path(__file__).parents[2]
Setting = Callable[[str], None]
UNREADABLE = [None, b"", b"{", b"\x00" * 100, b"[" * 100_000]


@pytest.fixture
def mode(monkeypatch: pytest.MonkeyPatch) -> Setting:
    return lambda name: monkeypatch.setenv(MODE_VARIABLE, name)


def find(
    backend: FakeBackend | None = None,
    spec: AttentionSpec = SPEC,
    device: DeviceInfo = H100,
    provider: TunedConfigs | None = None,
) -> FoundConfig:
    return ConfigLadder([provider or TunedConfigs()]).find(backend or FakeBackend(), spec, device, "forward")


@pytest.mark.parametrize(("value", "expected"), [("", "readwrite"), ("READ", "read"), (" frozen ", "frozen"), ("off", "off")])
def test_the_variable_names_the_mode(mode: Setting, value: str, expected: str) -> None:
    mode(value)
    assert cache_mode() is CacheMode(expected)
    assert cache_mode().writes is (expected == "readwrite")


def test_a_wrong_mode_warns_once_and_nothing_is_written(store: TuningStore, mode: Setting, warned: Warned) -> None:
    store.publish(record(block_n=256))
    mode("forzen")
    with pytest.raises(ArgumentError, match="must be one of readwrite, read, frozen, off. Got 'forzen'"):
        cache_mode()
    provider = TunedConfigs()
    assert find(provider=provider).config == BlockConfig(256, 8)
    provider.reject(FakeBackend(), SPEC, H100, "forward", BlockConfig(256, 8), "spills")
    assert "Got 'forzen'. Until then nothing is written" in warned[0]
    with pytest.raises(ArgumentError):
        store.publish(record())


class TestOff:
    def test_the_heuristic_answers_and_nothing_is_opened(
        self, store: TuningStore, key: TuningKey, mode: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.publish(record(key))
        (tmp_path / "h100.json").write_text(export_document([record(key)]))
        mode("off")
        monkeypatch.setattr("adasplash_tuner.provider.locate", lambda *_: pytest.fail("the database was looked for"))
        provider = TunedConfigs(pretuned=tmp_path)
        answer = find(provider=provider)
        assert (answer.rung, answer.detail) == (Rung.HEURISTIC, "ADASPLASH_CACHE_MODE is 'off'")
        assert provider.fastest([FakeBackend("a"), FakeBackend("b")], SPEC, H100) is None
        provider.reject(FakeBackend(), SPEC, H100, "forward", BlockConfig(), "spills")


class TestRead:
    def test_everything_is_looked_up_as_ever(self, store: TuningStore, mode: Setting) -> None:
        store.publish(record(block_n=256))
        mode("read")
        assert find().rung is Rung.USER_DATABASE
        assert find(FakeBackend(code="newer")).rung is Rung.STALE
        assert find(device=H200).rung is Rung.SAME_CAPABILITY

    def test_a_broken_row_is_passed_over_and_not_marked(
        self, store: TuningStore, database: Path, mode: Setting, warned: Warned
    ) -> None:
        store.publish(record())
        with sqlite3.connect(database) as connection:
            connection.execute("UPDATE adasplash_best SET config = '{{{'")
        mode("read")
        assert find().rung is Rung.HEURISTIC
        assert "no longer used (row 1): config is not JSON" in warned.the_only_one()
        with sqlite3.connect(database) as connection:
            assert connection.execute("SELECT quarantined FROM adasplash_best").fetchall() == [("",)]

    def test_a_config_that_does_not_run_is_forgotten_here_and_not_marked(
        self, store: TuningStore, mode: Setting, warned: Warned
    ) -> None:
        store.publish(record(block_n=256))
        mode("read")
        provider = TunedConfigs()
        provider.reject(FakeBackend(), SPEC, H100, "forward", BlockConfig(256, 8), "spills")
        assert find(provider=provider).rung is Rung.HEURISTIC
        assert store.rows()[0].usable is not None


class TestFrozen:
    def test_only_what_was_measured_for_exactly_this_key_is_used(
        self, store: TuningStore, key: TuningKey, mode: Setting, tmp_path: Path
    ) -> None:
        store.publish(record(key, 256))
        (tmp_path / "h100.json").write_text(export_document([record(replace(key, kv_bucket=1024))]))
        mode("frozen")
        assert (find().config, find().rung) == (BlockConfig(256, 8), Rung.USER_DATABASE)
        assert find(spec=replace(SPEC, alpha_class="any")).rung is Rung.USER_DATABASE
        provider = TunedConfigs(pretuned=tmp_path)
        for backend, spec, device in (
            (FakeBackend(code="newer"), SPEC, H100),  # stale elsewhere
            (FakeBackend(), SPEC, replace(H100, driver="600")),
            (FakeBackend(), SPEC, H200),  # a similar device elsewhere
            (FakeBackend(), replace(SPEC, kv_len=1024, causal_alignment="bottom_right"), H100),  # shipped elsewhere
        ):
            answer = find(backend, spec, device, provider)
            assert answer.rung is Rung.HEURISTIC
            assert "ADASPLASH_CACHE_MODE is 'frozen'" in answer.detail
            assert "adasplash tune" not in answer.detail  # it would be refused

    def test_what_is_tuned_meanwhile_is_not_seen(
        self, store: TuningStore, key: TuningKey, mode: Setting, warned: Warned
    ) -> None:
        store.publish(record(key, 256))
        mode("frozen")
        provider = TunedConfigs()
        assert find(provider=provider).config == BlockConfig(256, 8)
        mode("readwrite")
        short = replace(SPEC, q_len=1024, kv_len=1024)
        store.publish(record(tuning_key(FakeBackend(), short, H100, "forward"), 512))
        store.publish(record(key, 32, median_ms=0.1))
        mode("frozen")
        assert find(provider=provider).config == BlockConfig(256, 8)
        assert find(spec=short, provider=provider).rung is Rung.HEURISTIC
        assert find(spec=short).config == BlockConfig(512, 8)  # another process, started later
        assert warned == []

    def test_the_fastest_backend_too_is_that_of_the_snapshot(self, store: TuningStore, mode: Setting) -> None:
        fast, slow = FakeBackend("fast"), FakeBackend("slow")
        store.publish(record(tuning_key(fast, SPEC, H100, "forward"), median_ms=1.0))
        store.publish(record(tuning_key(slow, SPEC, H100, "forward"), median_ms=2.0))
        mode("frozen")
        assert TunedConfigs().fastest([slow, fast], SPEC, H100) == FoundBackend("fast")
        assert TunedConfigs().fastest([FakeBackend("slow", code="newer"), fast], SPEC, H100) is None

    def test_a_database_that_is_not_there_is_an_error_at_every_call(
        self, database: Path, mode: Setting, warned: Warned
    ) -> None:
        mode("frozen")
        provider = TunedConfigs()
        for spec in (SPEC, SPEC, replace(SPEC, q_len=64)):
            with pytest.raises(FrozenConfigsError) as caught:
                find(spec=spec, provider=provider)
            for words in (str(database), "does not exist, while ADASPLASH_CACHE_MODE is 'frozen'", "Hint: check ADASPLASH_DB"):
                assert words in str(caught.value)
        with pytest.raises(FrozenConfigsError):
            ConfigLadder([provider]).fastest([FakeBackend("a"), FakeBackend("b")], SPEC, H100)
        assert warned == []

    def test_the_first_that_can_be_read_is_the_frozen_one(self, store: TuningStore, key: TuningKey, mode: Setting) -> None:
        mode("frozen")
        provider = TunedConfigs()
        with pytest.raises(FrozenConfigsError):
            find(provider=provider)
        mode("readwrite")
        store.publish(record(key, 256))
        mode("frozen")
        assert find(provider=provider).config == BlockConfig(256, 8)

    @pytest.mark.parametrize("content", [b"", b"nonsense" * 1000])
    def test_a_file_that_is_no_database_is_an_error(self, database: Path, mode: Setting, content: bytes) -> None:
        database.parent.mkdir()
        database.write_bytes(content)
        mode("frozen")
        with pytest.raises(FrozenConfigsError, match="while ADASPLASH_CACHE_MODE is 'frozen'"):
            find()

    @pytest.mark.parametrize("where", ["mysql://host/x", "postgresql://127.0.0.1:1/nobody"])
    def test_a_server_that_cannot_be_asked_is_an_error(self, mode: Setting, where: str) -> None:
        mode("frozen")
        with pytest.raises(FrozenConfigsError, match="while ADASPLASH_CACHE_MODE is 'frozen'"):
            find(provider=TunedConfigs(where))

    def test_a_call_ends_with_the_error_before_anything_runs(self, database: Path, mode: Setting) -> None:
        """With a backend named or chosen; a config of the call's own needs no look-up."""
        mode("frozen")
        x = torch.randn(1, 1, 8, 4)
        ladder().clear()
        for provider in ladder().providers:
            provider.clear()  # type: ignore[attr-defined]
        try:
            for backend in ("torch", "auto"):
                with pytest.raises(FrozenConfigsError, match="does not exist"):
                    attention(x, x, x, backend=backend)
            assert attention(x, x, x, backend="torch", config={"forward": {}}).shape == x.shape  # type: ignore[union-attr]
        finally:
            mode("readwrite")
            ladder().clear()
            for provider in ladder().providers:
                provider.clear()  # type: ignore[attr-defined]

    def test_a_config_that_does_not_run_is_not_marked(self, store: TuningStore, mode: Setting, warned: Warned) -> None:
        store.publish(record(block_n=256))
        mode("frozen")
        TunedConfigs().reject(FakeBackend(), SPEC, H100, "forward", BlockConfig(256, 8), "spills")
        assert "no longer used" in warned.the_only_one()
        assert store.rows()[0].usable is not None


class TestSnapshotFile:
    """``ADASPLASH_DB`` names what ``adasplash cache export`` wrote."""

    def write(self, path: Path, *records: object) -> Path:
        path.write_text(export_document(records))  # type: ignore[arg-type]
        return path

    @pytest.mark.parametrize("name", ["readwrite", "read", "frozen"])
    def test_it_is_looked_up_as_a_database_is(self, tmp_path: Path, key: TuningKey, mode: Setting, name: str) -> None:
        path = self.write(tmp_path / "s.json", record(key, 256), record(replace(key, kv_bucket=1024), 16))
        mode(name)
        answer = find(provider=TunedConfigs(str(path)))
        assert (answer.config, answer.rung) == (BlockConfig(256, 8), Rung.USER_DATABASE)
        missed = find(spec=replace(SPEC, dtype="float32"), provider=TunedConfigs(str(path)))
        assert missed.rung is Rung.HEURISTIC
        assert "sha256" in missed.detail
        assert "dtype is 'bfloat16' there and 'float32' here" in missed.detail

    def test_a_bad_record_is_passed_over_with_its_reason(self, tmp_path: Path, key: TuningKey, warned: Warned) -> None:
        path = self.write(tmp_path / "s.json", record(key, 256), record(replace(key, kv_bucket=1024), 16))
        document = json.loads(path.read_text())
        document["configs"][0]["median_ms"] = -1
        document["configs"] += [7, {"key": {"backend": ["fake"]}}, {}]
        path.write_text(json.dumps(document))
        assert find(provider=TunedConfigs(str(path))).rung is Rung.HEURISTIC
        assert "row 1): median_ms must be a finite number above 0" in warned.the_only_one()
        other = replace(SPEC, kv_len=1024, causal_alignment="bottom_right")
        assert find(spec=other, provider=TunedConfigs(str(path))).config == BlockConfig(16, 8)

    @pytest.mark.parametrize("content", UNREADABLE)
    def test_one_that_cannot_be_read_is_an_error_where_it_is_frozen(
        self, tmp_path: Path, mode: Setting, content: bytes | None
    ) -> None:
        path = tmp_path / "s.json"
        if content is not None:
            path.write_bytes(content)
        mode("frozen")
        with pytest.raises(FrozenConfigsError, match=r"s\.json cannot be read as a snapshot .*, while ADASPLASH_CACHE_MODE is"):
            find(provider=TunedConfigs(str(path)))

    @pytest.mark.parametrize("content", UNREADABLE)
    def test_one_that_cannot_be_read_is_else_one_warning(self, tmp_path: Path, warned: Warned, content: bytes | None) -> None:
        path = tmp_path / "s.json"
        if content is not None:
            path.write_bytes(content)
        provider = TunedConfigs(str(path))
        assert find(provider=provider).rung is Rung.HEURISTIC
        assert find(spec=replace(SPEC, q_len=64), provider=provider).rung is Rung.HEURISTIC
        assert "cannot be read as a snapshot" in warned.the_only_one()


RANK = """
import sys
from adasplash_core.configs import ConfigLadder
from adasplash_tuner.provider import TunedConfigs
from tests.tuner.fakes import *
ladder = ConfigLadder([TunedConfigs()])
def ask(spec):
    found = ladder.find(FakeBackend(), spec, H100, "forward")
    return f"{found.rung.name} {found.config.block_n}"
print(ask(SPEC), flush=True)
sys.stdin.readline()  # the database is changed now
print(ask(replace(SPEC, q_len=1024, kv_len=1024)), ladder.providers[0].fastest([FakeBackend("a"), FakeBackend("b")], SPEC, H100))
print("sqlalchemy" in sys.modules)
"""


def test_a_rank_that_finds_no_snapshot_ends_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADASPLASH_DB", str(tmp_path / "job.json"))
    monkeypatch.setenv(MODE_VARIABLE, "frozen")
    done = subprocess.run([sys.executable, "-c", RANK], cwd=ROOT, text=True, stdin=subprocess.DEVNULL, capture_output=True)
    assert done.returncode != 0
    assert done.stdout == ""
    assert f"FrozenConfigsError: The tuning database {tmp_path / 'job.json'} cannot be read as a snapshot" in done.stderr


def test_the_ranks_of_a_job_agree_on_a_snapshot_while_another_job_tunes(
    store: TuningStore, key: TuningKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real processes: an export, a variable, and nothing that happens afterwards matters."""
    store.publish(record(key, 256))
    snapshot = tmp_path / "job.json"
    cli = [sys.executable, "-m", "adasplash_cli.main", "cache", "export", str(snapshot)]
    subprocess.run(cli, check=True, cwd=ROOT, capture_output=True)
    with monkeypatch.context() as patch:
        patch.setenv("ADASPLASH_DB", str(snapshot))
        patch.setenv(MODE_VARIABLE, "frozen")
        ranks = [
            subprocess.Popen([sys.executable, "-c", RANK], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            for _ in range(3)
        ]
    firsts = [rank.stdout.readline() for rank in ranks if rank.stdout]
    short = replace(SPEC, q_len=1024, kv_len=1024)
    store.publish(record(tuning_key(FakeBackend(), short, H100, "forward"), 512))
    store.publish(record(key, 16, median_ms=0.01))
    snapshot.unlink()
    said = [first + rank.communicate("\n", timeout=60)[0] for first, rank in zip(firsts, ranks, strict=True)]
    assert said == ["USER_DATABASE 256\nHEURISTIC 64 None\nFalse\n"] * 3
