"""The GPU backends' tests on a GPU, within nine minutes. Prints a short table last; the exit code is 1 if anything failed.

    python scripts/gpu_test.py [--workers 16] [--log FOLDER] [--only conformance ...] [--skip-sanitizer] [--dry-run]

Conformance of every feature in every dtype against the float64 oracle, sizes up to 1,048,576 keys, poisoned memory, CUDA graphs,
torch.compile, checkpointing with dropout, streams, several GPUs where there are, tf32 only where allowed, the entmax transform,
transformers' models; then
compute-sanitizer over scripts/sanitizer_set.py for each backend: memcheck and racecheck, for CUDA C++ synccheck and initcheck too.
``--dry-run`` tries the same steps without a GPU: interpreted,
and without the sanitizer's watch.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SANITIZER_SET = ROOT / "scripts" / "sanitizer_set.py"
TESTS = tuple(ROOT / "tests" / folder / "gpu" for folder in ("triton_backend", "cupy_backend", "integrations", "stack"))
BUDGET_S = 520
SANITIZER_S = 200
TOOLS = {"triton": ("memcheck", "racecheck"), "cupy": ("memcheck", "racecheck", "synccheck", "initcheck")}
DTYPES = ("float16", "bfloat16", "float32")


@dataclass
class Row:
    """One line of the table."""

    name: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    note: str = ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument("--log", type=Path, help="folder for whole outputs (default: a temporary one)")
    parser.add_argument("--only", help="tests whose name matches this expression, as pytest's -k")
    parser.add_argument("--skip-sanitizer", action="store_true")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: interpreted, small")
    arguments = parser.parse_args()
    if not arguments.dry_run and not gpu_is_there():
        raise SystemExit("torch sees no GPU; --dry-run tries the steps without one.")
    log = arguments.log or Path(tempfile.mkdtemp(prefix="adasplash-gpu-test-"))
    log.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH", "")]))
    if arguments.dry_run:
        environment["TRITON_INTERPRET"] = "1"
    started = time.monotonic()
    if not (arguments.skip_sanitizer or arguments.dry_run):
        # Compiles, unwatched.
        warming = {
            name: start_logged([sys.executable, str(SANITIZER_SET), name], log / f"sanitizer-set-{name}.log", environment)
            for name in TOOLS
        }
    rows = run_tests(arguments.workers, arguments.only, log, environment, BUDGET_S - 60)
    if not arguments.skip_sanitizer:
        sound = list(TOOLS)
        if not arguments.dry_run:
            sound = [name for name, process in warming.items() if process.wait() == 0]
        rows += [
            Row(f"sanitizer set {name}", failed=1, note=f"fails unwatched: {log / f'sanitizer-set-{name}.log'}")
            for name in TOOLS
            if name not in sound
        ]
        left = BUDGET_S - (time.monotonic() - started)
        rows += run_sanitizer(log, environment, sound, min(SANITIZER_S, left), arguments.dry_run)
    print_table(rows, time.monotonic() - started, log)
    return 1 if any(row.failed for row in rows) else 0


def gpu_is_there() -> bool:
    import torch

    return torch.cuda.is_available()


def run_tests(workers: int, only: str | None, log: Path, environment: dict[str, str], limit_s: float) -> list[Row]:
    report = log / "pytest.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--dist", "worksteal", "-n", str(workers)]
    command += ["--tb", "short", f"--junitxml={report}", *(["-k", only] if only else []), *map(str, TESTS)]
    print(" ".join(command), flush=True)
    started = time.monotonic()
    code = run_logged(command, log / "pytest.log", environment, limit_s)
    seconds = time.monotonic() - started
    if not report.exists():
        tail = "\n".join((log / "pytest.log").read_text(errors="replace").splitlines()[-40:])
        print(tail)
        return [
            Row("tests", failed=1, seconds=seconds, note="timed out" if code == 124 else f"pytest gave {code} and no report")
        ]
    rows = rows_of(report)
    if code not in (0, 1):
        rows.append(Row("pytest itself", failed=1, note=f"exit code {code}"))
    return rows


def rows_of(report: Path) -> list[Row]:
    """Tests by file, conformance by dtype too; seconds are the sum over workers. Prints what failed."""
    rows: dict[str, Row] = defaultdict(lambda: Row(""))
    for case in ET.parse(report).iter("testcase"):
        module = case.get("classname", "").split("gpu.")[-1].split(".")[0].removeprefix("test_").replace("_", " ")
        dtype = next((d for d in DTYPES if f"-{d}" in case.get("name", "")), "") if module == "conformance" else ""
        row = rows[f"{module} {dtype}".strip()]
        row.seconds += float(case.get("time", 0))
        problem = case.find("failure") if case.find("failure") is not None else case.find("error")
        if problem is not None:
            row.failed += 1
            print(f"FAILED {case.get('classname')}::{case.get('name')}\n  {(problem.get('message') or '')[:600]}", flush=True)
        elif case.find("skipped") is not None:
            row.skipped += 1
        else:
            row.passed += 1
    for name, row in rows.items():
        row.name = name
    return [rows[name] for name in sorted(rows)]


def run_sanitizer(log: Path, environment: dict[str, str], backends: list[str], limit_s: float, dry_run: bool) -> list[Row]:
    """Each tool over the whole set, side by side. Allocations are not cached, so that their ends are watched."""
    script = [sys.executable, str(SANITIZER_SET)]
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if dry_run:
        commands = {"sanitizer set, not watched": [*script, "triton"]}
    elif tool is None:
        return [Row("compute-sanitizer", failed=1, note="is not installed")]
    else:
        commands = {
            f"{name} {backend}": [tool, "--tool", name, "--error-exitcode", "99", "--print-limit", "20", *script, backend]
            for backend in backends
            for name in TOOLS[backend]
        }
        environment = environment | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    started = time.monotonic()
    running = {}
    for name, command in commands.items():
        output = (log / f"{name.split(',')[0].replace(' ', '-')}.log").open("w")
        running[name] = (subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT), output)
    rows = []
    for name, (process, output) in running.items():
        note = ""
        try:
            code = process.wait(max(1.0, limit_s - (time.monotonic() - started)))
        except subprocess.TimeoutExpired:
            process.kill()
            code, note = process.wait(), "ran out of time"
        output.close()
        text = Path(output.name).read_text(errors="replace")
        done = text.count("done: ")
        if code:
            note = note or f"exit code {code}"
            print(f"FAILED {name}:\n" + "\n".join(text.splitlines()[-30:]), flush=True)
        rows.append(Row(name, passed=done, failed=int(code != 0), seconds=time.monotonic() - started, note=note))
    return rows


def start_logged(command: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Everything that is printed goes to ``log``."""
    with log.open("w") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)


def run_logged(command: list[str], log: Path, environment: dict[str, str], limit_s: float) -> int:
    """Exit code; 124 where the limit was reached. Everything that is printed goes to ``log``."""
    with log.open("w") as output:
        try:
            return subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, timeout=limit_s, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            return 124


def print_table(rows: list[Row], seconds: float, log: Path) -> None:
    print(f"\n{'':<28}{'passed':>8}{'failed':>8}{'skipped':>8}{'seconds':>9}")
    for row in rows:
        print(f"{row.name:<28}{row.passed:>8}{row.failed:>8}{row.skipped:>8}{row.seconds:>9.0f}  {row.note}".rstrip())
    passed, failed, skipped = (sum(getattr(row, what) for row in rows) for what in ("passed", "failed", "skipped"))
    print(f"{'all':<28}{passed:>8}{failed:>8}{skipped:>8}{seconds:>9.0f}  whole outputs: {log}")


if __name__ == "__main__":
    sys.exit(main())
