"""A database that cannot be used: look-ups go on with defaults and warn once, writers get an error that says how to mend it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from adasplash_core.configs import ConfigLadder, Rung
from adasplash_core.errors import StoreError
from adasplash_core.plugins import Registry
from adasplash_tuner.provider import TunedConfigs
from adasplash_tuner.storage import upkeep
from adasplash_tuner.storage.exchange import export_document
from adasplash_tuner.storage.store import TuningStore
from tests.tuner.fakes import H100, SPEC, FakeBackend, Warned, record

ROOT = Path(__file__).parents[2]


def rungs(passes: tuple[str, ...] = ("forward", "backward")) -> list[Rung]:
    ladder = ConfigLadder([TunedConfigs()])
    return [ladder.find(FakeBackend(), SPEC, H100, pass_).rung for pass_ in passes]  # type: ignore[arg-type]


def assert_defaults_and_one_warning(warned: Warned, *words: str) -> None:
    assert rungs() == [Rung.HEURISTIC, Rung.HEURISTIC]
    text = warned.the_only_one()
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    "content", [b"not a database at all, but long enough to have a header" * 100, b"SQLite format 3\0" + b"\xff" * 8000]
)
def test_a_file_that_is_no_database(database: Path, store: TuningStore, warned: Warned, content: bytes) -> None:
    database.parent.mkdir()
    database.write_bytes(content)
    assert_defaults_and_one_warning(warned, "Run `adasplash cache mend`", "default configs")
    with pytest.raises(StoreError, match="adasplash cache mend"):
        store.publish(record())
    assert database.read_bytes() == content  # never overwritten


def test_a_file_damaged_in_the_middle(database: Path, store: TuningStore, warned: Warned) -> None:
    store.publish(record())
    store.engines.dispose()
    content = bytearray(database.read_bytes())
    content[4096:] = b"\xa5" * (len(content) - 4096)
    database.write_bytes(content)
    assert_defaults_and_one_warning(warned, "is corrupt", "Run `adasplash cache mend`")


def test_an_empty_file_is_an_empty_database(database: Path, store: TuningStore, warned: Warned) -> None:
    database.parent.mkdir()
    database.touch()
    assert rungs() == [Rung.HEURISTIC, Rung.HEURISTIC]
    assert warned == []
    assert store.publish(record())


def test_a_locked_database(database: Path, store: TuningStore, warned: Warned) -> None:
    store.publish(record())
    with sqlite3.connect(database, isolation_level=None) as holder:
        holder.execute("PRAGMA locking_mode = EXCLUSIVE")
        holder.execute("BEGIN EXCLUSIVE")
        holder.execute("UPDATE adasplash_best SET samples = 1")
        assert_defaults_and_one_warning(warned, "is locked by another process")
        with pytest.raises(StoreError, match="locked"):
            TuningStore(busy_timeout_s=0.1).publish(record(median_ms=0.1))
        holder.execute("ROLLBACK")


def test_a_writer_at_work_does_not_hinder_a_lookup(database: Path, store: TuningStore, warned: Warned) -> None:
    store.publish(record())
    store.publish(record(key=record().key))
    with store.engines.writing():
        assert rungs(("forward",)) == [Rung.USER_DATABASE]
    assert warned == []


def test_a_lock_that_passed_is_forgiven(
    database: Path, store: TuningStore, warned: Warned, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.publish(record())
    holder = sqlite3.connect(database, isolation_level=None)
    holder.execute("PRAGMA locking_mode = EXCLUSIVE")
    holder.execute("BEGIN EXCLUSIVE")
    holder.execute("UPDATE adasplash_best SET samples = 1")
    provider = TunedConfigs()
    first = provider.find(FakeBackend(), SPEC, H100, "backward")
    assert first is not None
    assert first.rung is Rung.HEURISTIC
    holder.execute("ROLLBACK")
    holder.close()
    monkeypatch.setattr("adasplash_tuner.provider.RETRY_S", 0.0)
    second = provider.find(FakeBackend(), SPEC, H100, "forward")
    assert second is not None
    assert second.rung is Rung.USER_DATABASE


def mounted(folder: Path, size: str = "4m") -> bool:
    mount = shutil.which("mount")
    command = [mount or "", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    return mount is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() != 0 or not mounted(folder, "512k"):
        pytest.skip("a small file system needs a mount, which is not allowed here")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.fixture
def read_only_mount(tmp_path: Path) -> Iterator[Path]:
    """A folder that can be mounted read-only by :func:`seal`: root ignores permission bits."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    if os.geteuid() == 0 and not mounted(folder):
        pytest.skip("as root a read-only folder needs a mount, which is not allowed here")
    yield folder
    if os.geteuid() == 0:
        subprocess.run(["umount", folder], check=True)
    else:
        folder.chmod(0o755)


def seal(folder: Path) -> None:
    if os.geteuid() == 0:
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    else:
        for path in folder.iterdir():
            path.chmod(0o444)
        folder.chmod(0o555)


def test_a_read_only_place_is_still_read(read_only_mount: Path, monkeypatch: pytest.MonkeyPatch, warned: Warned) -> None:
    monkeypatch.setenv("ADASPLASH_DB", str(read_only_mount / "tuned.db"))
    store = TuningStore()
    store.publish(record())
    for leftover in read_only_mount.glob("tuned.db-*"):
        leftover.unlink()
    seal(read_only_mount)
    assert rungs() == [Rung.USER_DATABASE, Rung.HEURISTIC]
    assert warned == []
    with pytest.raises(StoreError, match="read-only"):
        TuningStore().publish(record(median_ms=0.1))


def test_a_place_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warned: Warned) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ADASPLASH_DB", str(tmp_path / "file" / "folder" / "tuned.db"))
    assert rungs() == [Rung.HEURISTIC, Rung.HEURISTIC]
    assert warned == []
    with pytest.raises(StoreError, match="cannot be used"):
        TuningStore().publish(record())


def run_with_file_limit(code: str, limit: int) -> str:
    """Run code in a process whose files cannot grow beyond ``limit`` bytes, as on a full disk."""

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, cwd=ROOT, preexec_fn=full
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_a_full_disk_stops_writers_with_a_reason_and_keeps_what_is_there(store: TuningStore, database: Path) -> None:
    store.publish(record())
    said = run_with_file_limit(
        "from adasplash_tuner.storage.store import *; from tests.tuner.fakes import *; from adasplash_core.errors import StoreError\n"
        "try:\n    TuningStore().publish(record(block_n=32, median_ms=0.1))\n"
        "except StoreError as error: print('StoreError', error)",
        limit=1024,
    )
    assert "StoreError" in said
    assert "Free some space" in said or "Check free space" in said
    assert store.rows()[0].record == record()


def test_a_full_disk_does_not_hinder_lookups(store: TuningStore, database: Path) -> None:
    """A reader of a WAL database needs a small file of its own; without room for it the database is read as immutable."""
    store.publish(record())
    store.engines.dispose()
    for leftover in database.parent.glob("tuned.db-*"):
        leftover.unlink()
    said = run_with_file_limit(
        "from adasplash_core.configs import ConfigLadder; from adasplash_tuner.provider import TunedConfigs\n"
        "from tests.tuner.fakes import *\n"
        "print(ConfigLadder([TunedConfigs()]).find(FakeBackend(), SPEC, H100, 'forward').rung.name)",
        limit=1024,
    )
    assert said.strip() == "USER_DATABASE"


def test_a_disk_that_fills_up_while_tuning_does_not_end_the_tuning(store: TuningStore, database: Path) -> None:
    database.parent.mkdir()
    with sqlite3.connect(database) as connection:
        connection.execute("PRAGMA page_size = 32768")
        connection.execute("VACUUM")
    store.publish(record())
    store.engines.dispose()

    def nearly_full() -> None:
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (33_000, 33_000)
        )  # a WAL of one page: the test of writing fits, a measurement does not

    small = ["--device", "cpu", "--shapes", "H=1,L=64,D=8", "--passes", "forward", "--budget", "2s"]
    command = [sys.executable, "-m", "adasplash_cli.main", "tune", *small]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, preexec_fn=nearly_full)
    assert done.returncode == 1, done.stderr
    assert "Nothing more was kept from the moment the database failed" in done.stderr
    assert "B=1,H=1,L=64,D=8,float32" in done.stdout  # what was measured is shown nevertheless
    assert store.integrity_problems() == []
    assert [row.record for row in store.rows()] == [record()]


def test_a_postgresql_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, warned: Warned) -> None:
    monkeypatch.setenv("ADASPLASH_DB", "postgresql://ada:secret@127.0.0.1:9/tuned")
    assert rungs() == [Rung.HEURISTIC, Rung.HEURISTIC]
    assert "postgresql+psycopg://ada@127.0.0.1:9/tuned" in warned.the_only_one()
    assert "secret" not in warned.the_only_one()


def test_a_url_of_another_database(monkeypatch: pytest.MonkeyPatch, warned: Warned) -> None:
    monkeypatch.setenv("ADASPLASH_DB", "mysql://host/db")
    assert_defaults_and_one_warning(warned, "Set ADASPLASH_DB to")


def test_many_threads_asking_a_broken_database_give_one_warning(database: Path, warned: Warned) -> None:
    database.parent.mkdir()
    database.write_bytes(b"nonsense" * 1000)
    provider = TunedConfigs()
    threads = [threading.Thread(target=provider.find, args=(FakeBackend(f"b{i}"), SPEC, H100, "forward")) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    warned.the_only_one()


LOOK_UP_AND_PUBLISH = """
import warnings
warnings.showwarning = lambda message, *_: print("warned:", message)
from adasplash_core.configs import ConfigLadder
from adasplash_core.errors import StoreError
from adasplash_tuner.provider import TunedConfigs
from tests.tuner.fakes import *
ladder = ConfigLadder([TunedConfigs()])
print(*(ladder.find(FakeBackend(), SPEC, H100, pass_).rung.name for pass_ in ("forward", "backward")))
try:
    from adasplash_tuner.storage.store import TuningStore
    print("published", TuningStore(busy_timeout_s=0.2).publish(record(block_n=32, median_ms=0.1)))
except StoreError as error:
    print("refused:", error)
"""


def run_python(code: str, **environment: str | None) -> list[str]:
    """The lines a process prints; ``None`` unsets a variable."""
    variables = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_disk_without_room_is_read_and_refuses_writers(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that is really full."""
    database = small_disk / "tuned.db"
    store = TuningStore(str(database))
    store.publish(record())
    store.engines.dispose()
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(b"x" * 512)
    looked_up, refused = run_python(LOOK_UP_AND_PUBLISH, ADASPLASH_DB=str(database))
    assert looked_up == "USER_DATABASE HEURISTIC"
    assert refused.startswith("refused: ")
    assert "Free some space" in refused or "Check free space" in refused
    (small_disk / "filler").unlink()
    assert [row.record for row in TuningStore(str(database)).rows()] == [record()]
    assert run_python(LOOK_UP_AND_PUBLISH, ADASPLASH_DB=str(database))[1] == "published True"


def test_a_user_without_a_home(tmp_path: Path) -> None:
    """Neither HOME nor the list of users says where the data folder is: nothing is made in the working directory instead."""
    nobody = "import pwd\ndef unknown(_): raise KeyError('no such user')\npwd.getpwuid = unknown\n"
    here = f"import os\nos.chdir({str(tmp_path)!r})\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
    warned, looked_up, refused = run_python(
        nobody + here + LOOK_UP_AND_PUBLISH, ADASPLASH_DB=None, HOME=None, XDG_DATA_HOME=None
    )
    for text in (warned, refused):
        assert "this user has no home directory. Set HOME, or ADASPLASH_DB to a path." in text
    assert looked_up == "HEURISTIC HEURISTIC"
    assert list(tmp_path.iterdir()) == []


def test_a_home_that_does_not_exist_and_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    home = str(tmp_path / "file" / "home")
    looked_up, refused = run_python(LOOK_UP_AND_PUBLISH, ADASPLASH_DB=None, HOME=home, XDG_DATA_HOME=None)
    assert looked_up == "HEURISTIC HEURISTIC"
    assert "cannot be used (Not a directory). Mend that, or set ADASPLASH_DB to another place." in refused


def test_a_home_that_does_not_exist_is_made_when_something_is_stored(tmp_path: Path) -> None:
    home = tmp_path / "new" / "home"
    looked_up, published = run_python(LOOK_UP_AND_PUBLISH, ADASPLASH_DB=None, HOME=str(home), XDG_DATA_HOME=None)
    assert (looked_up, published) == ("HEURISTIC HEURISTIC", "published True")
    assert [path.name for path in home.rglob("*.db")] == ["tuned.db"]


REFUSE_LOCKS = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
static int refuse(int command) {
    if (command != F_SETLK && command != F_SETLKW && command != F_GETLK) return 0;
    errno = atoi(getenv("LOCK_ERROR"));
    return 1;
}
#define DEFINE(name)                                              \
    extern int __##name(int, int, ...);                           \
    int name(int file, int command, ...) {                        \
        va_list list; va_start(list, command);                    \
        void *argument = va_arg(list, void *); va_end(list);      \
        return refuse(command) ? -1 : real(file, command, argument); \
    }
#include <dlfcn.h>
static int real(int file, int command, void *argument) {
    static int (*next)(int, int, ...);
    if (!next) next = (int (*)(int, int, ...))dlsym(RTLD_NEXT, "fcntl64");
    if (!next) next = (int (*)(int, int, ...))dlsym(RTLD_NEXT, "fcntl");
    return next(file, command, argument);
}
DEFINE(fcntl)
DEFINE(fcntl64)
"""


@pytest.fixture(scope="module")
def refuses_locks(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A library that makes the system refuse every lock, as some network mounts do; to be preloaded."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C compiler to make a file system refuse locks with")
    folder = tmp_path_factory.mktemp("locks")
    (folder / "locks.c").write_text(REFUSE_LOCKS)
    library = folder / "locks.so"
    subprocess.run([compiler, "-x", "c", "-shared", "-fPIC", "-o", library, folder / "locks.c", "-ldl"], check=True)
    return str(library)


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.EACCES])
def test_a_file_system_that_refuses_locks(store: TuningStore, database: Path, refuses_locks: str, error: int) -> None:
    store.publish(record())
    store.engines.dispose()
    content = database.read_bytes()
    warned, looked_up, refused = run_python(LOOK_UP_AND_PUBLISH, LD_PRELOAD=refuses_locks, LOCK_ERROR=str(error))
    assert looked_up == "HEURISTIC HEURISTIC"
    for text in (warned, refused):
        assert "file system whose locks do not work" in text
        assert "set ADASPLASH_DB to another place" in text
    assert database.read_bytes() == content


def test_a_file_system_that_knows_no_locks_is_read(store: TuningStore, database: Path, refuses_locks: str) -> None:
    store.publish(record())
    store.engines.dispose()
    looked_up, refused = run_python(LOOK_UP_AND_PUBLISH, LD_PRELOAD=refuses_locks, LOCK_ERROR=str(errno.EOPNOTSUPP))
    assert looked_up == "USER_DATABASE HEURISTIC"
    assert "that its file system has locks" in refused


def test_a_snapshot_needs_no_locks(tmp_path: Path, refuses_locks: str) -> None:
    snapshot = tmp_path / "tuned.json"
    snapshot.write_text(export_document([record()]))
    lines = run_python(LOOK_UP_AND_PUBLISH, LD_PRELOAD=refuses_locks, LOCK_ERROR=str(errno.ENOLCK), ADASPLASH_DB=str(snapshot))
    assert lines[0] == "USER_DATABASE HEURISTIC"
    assert "is a snapshot, which is only read" in lines[1]


def test_a_clock_that_goes_backwards_loses_nothing(store: TuningStore) -> None:
    """A process tunes, the clock is set back by 40 years, and another tunes: the faster result stays, and both are of some age."""
    key = record().key
    code = """
import sys, time
seconds, block_n, median_ms = map(float, sys.argv[1:])
time.time = lambda: seconds
from adasplash_tuner.storage.records import Measurement
from adasplash_tuner.storage.store import TuningStore, now
from tests.tuner.fakes import *
best = record(block_n=int(block_n), median_ms=median_ms, measured_at=now())
TuningStore().publish(best)
TuningStore().add_measurement(best.key, Measurement(best.config, "s", "i", "final", "ok", now(), "1", median_ms=median_ms))
"""
    for arguments in (("4e9", "128", "1.0"), ("4e8", "64", "0.5"), ("399999999", "32", "0.9")):
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, cwd=ROOT)
    (row,) = store.rows()
    assert row.record is not None
    assert (row.record.config["block_n"], row.record.measured_at) == (64, 400_000_000)
    assert [m.config["block_n"] for m in store.measurements(key)] == [128, 64, 32]  # in the order in which they were made
    assert rungs(("forward",)) == [Rung.USER_DATABASE]
    old = upkeep.prunable(store.rows(), Registry(), older_than_s=86_400)
    assert list(old) == [row.id]
    store.merge([record(block_n=16, median_ms=0.1, measured_at=4_000_000_000)])  # of the future
    assert upkeep.prunable(store.rows(), Registry(), older_than_s=86_400) == {}


def test_a_hostile_file_is_refused_by_the_command_and_nothing_is_executed_or_written(database: Path, tmp_path: Path) -> None:
    """Real processes, with a limit on memory: what is huge must not be held."""
    canary = tmp_path / "executed"
    good = json.loads(export_document([record()]))
    pickled = b"cposix\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR."

    def with_key(**changes: object) -> bytes:
        return json.dumps(
            {**good, "configs": [{**good["configs"][0], "key": {**good["configs"][0]["key"], **changes}}]}
        ).encode()

    def with_config(config: object) -> bytes:
        return json.dumps({**good, "configs": [good["configs"][0], {**good["configs"][0], "config": config}]}).encode()

    hostile = {
        "pickle": pickled,
        "deep": b'{"format": ' + b"[" * 10**6,
        "huge": b'{"format": "adasplash-tuned-configs", "configs": [' + b"0," * (17 * 2**20),
        "many": json.dumps({**good, "configs": [0] * 100_001}).encode(),
        "path": with_key(backend="../../../../etc/passwd\x00"),
        "sql": with_key(pass_="forward'); DROP TABLE adasplash_best; --"),
        "terminal": with_key(device_name="\x1b]0;owned\x07"),
        "code": with_config({"__class__": f"__import__('os').system('touch {canary}')", "a.b": 1}),
        "nested": with_config({"block_n": {"block_n": 1}}),
        "number": b'{"format": "adasplash-tuned-configs", "format_version": 1e999}',
        "digits": with_config({"block_n": 0}).replace(b'"block_n": 0', b'"block_n": ' + b"9" * 100_000),
        "template": with_config({"block_n": f"{{{{ system('touch {canary}') }}}}\n"}),
        "twice": b'{"format": "adasplash-tuned-configs", "format": "x", "format_version": 1, "configs": []}',
    }
    for name, content in hostile.items():
        (tmp_path / f"{name}.json").write_bytes(content)
    code = """
import resource, sys
from click.testing import CliRunner
from adasplash_cli.main import cli
resource.setrlimit(resource.RLIMIT_DATA, (2**30, 2**30))
for name in sys.stdin.read().split():
    done = CliRunner().invoke(cli, ["cache", "import", name])
    assert done.exit_code == 2, (name, done.exit_code, done.output, done.exception)
    assert "An imported file must be what `adasplash cache export` writes. Got" in done.stderr, (name, done.stderr)
    assert len(done.stderr) < 1000, (name, len(done.stderr))
    assert done.stderr.strip().isprintable(), (name, done.stderr)
"""
    names = "\n".join(str(tmp_path / f"{name}.json") for name in hostile)
    done = subprocess.run([sys.executable, "-c", code], input=names, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert not canary.exists()
    assert not database.parent.exists()
