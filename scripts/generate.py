"""Rewrite the parts of README.md and docs/ that come from code or committed results, between ``<!-- NAME:begin/end -->`` lines.

Usage: generate.py [--check]

With --check nothing is written, and the exit code is 1 if a file is out of date.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import evidence_tables

ROOT = Path(__file__).resolve().parent.parent
ITERATIONS = ROOT / "docs" / "_generated" / "solver_iterations.md"
REFERENCE_RESULTS = ROOT / "benchmarks" / "results" / "reference_cpu.json"
ATTENTION_RESULTS = ROOT / "benchmarks" / "results" / "attention_h200.json"
KERNEL_RESULTS = ROOT / "benchmarks" / "results" / "kernels_h200.json"
TRANSFORM_RESULTS = ROOT / "benchmarks" / "results" / "transforms_h200.json"


def main() -> int:
    check = "--check" in sys.argv[1:]
    stale = []
    for path, text in outputs():
        if path.read_text(encoding="utf-8") == text:
            continue
        stale.append(path)
        if not check:
            path.write_text(text, encoding="utf-8")
    for path in stale:
        print(f"{path.relative_to(ROOT)} {'is out of date: run `make generated`' if check else 'was rewritten'}")
    return 1 if check and stale else 0


def outputs() -> Iterator[tuple[Path, str]]:
    """Every file with generated parts, and what it should say."""
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ATTENTION_RESULTS.parent.glob("*.md"))):
        text = path.read_text(encoding="utf-8")
        for name, make in PARTS.items():
            if f"<!-- {name}:begin -->" in text:
                text = fill(text, name, make())
        yield path, text


def fill(text: str, name: str, content: str) -> str:
    """``text`` with ``content`` between the markers of ``name``."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{begin} has no {end} after it")
    return f"{before}{begin}\n{content.strip()}\n{end}{after}"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], right: Iterable[int] = ()) -> str:
    right = set(right)
    lines = [columns, ["--:" if i in right else "---" for i in range(len(columns))], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def support_table() -> str:
    """What the backends of this distribution declare, one column each."""
    from adasplash_core.plugins import registry
    from adasplash_core.spec import FEATURES

    records = [r for r in registry().records if r.origin.distribution == "adasplash-core" and r.backend is not None]
    backends = sorted((r.backend for r in records if r.backend is not None), key=lambda b: (b.priority, b.name))
    rows: list[list[str]] = [
        ["devices", *("any that torch has" if b.device_types is None else ", ".join(sorted(b.device_types)) for b in backends)],
        [
            "compute capability",
            *(f"{b.min_capability[0]}.{b.min_capability[1]} or newer" if b.min_capability else "-" for b in backends),
        ],
        ["data types", *(", ".join(sorted(b.dtypes)) for b in backends)],
        ["head dims", *(str(b.head_dims) for b in backends)],
    ]
    rows += [[words, *("yes" if feature in b.features else "no" for b in backends)] for feature, words in FEATURES.items()]
    return table(["", *(f"`{b.name}`" for b in backends)], rows)


def command_reference() -> str:
    """Every command and option of the command line."""
    from adasplash_cli.main import COMMANDS, SECTIONS, cli

    parts = ["## Options of `adasplash` itself", options_table(cli, click.Context(cli, info_name="adasplash"))]
    context = click.Context(cli, info_name="adasplash")
    for section in SECTIONS:
        for name in (n for n, entry in COMMANDS.items() if entry.section == section):
            command = cli.get_command(context, name)
            assert command is not None
            parts += command_page(command, name, context, level=2)
    return "\n\n".join(parts)


def command_page(command: click.Command, name: str, parent: click.Context, level: int) -> Iterator[str]:
    context = click.Context(command, info_name=name, parent=parent)
    yield f"{'#' * level} {context.command_path}"
    yield help_text(command)
    yield f"```text\n{context.command_path} {' '.join(command.collect_usage_pieces(context))}\n```"
    yield options_table(command, context)
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            found = command.get_command(context, child)
            assert found is not None
            yield from command_page(found, child, context, level + 1)


def help_text(command: click.Command) -> str:
    """A command's help as Markdown; paragraphs that click must not wrap become code blocks."""
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(command.help or ""))
    return "\n\n".join(
        f"```text\n{p.removeprefix(chr(8)).strip(chr(10))}\n```" if p.startswith("\b") else p for p in paragraphs
    )


def options_table(command: click.Command, context: click.Context) -> str:
    rows = []
    for parameter in command.get_params(context):
        if not isinstance(parameter, click.Option) or parameter.hidden or "--help" in parameter.opts:
            continue
        record = parameter.get_help_record(context)
        assert record is not None
        names, described = record
        rows.append([f"`{names}`".replace("|", "\\|"), described.replace("|", "\\|").replace("  [", " [")])
    return table(["option", "meaning"], rows)


def benchmark_table() -> str:
    """The reference backend beside dense entmax and softmax on a CPU, from the committed results."""
    how = "`python benchmarks/reference_cpu.py`"
    if not REFERENCE_RESULTS.exists():
        return f"{how} measures the reference backend beside the `entmax` package's dense functions and softmax."
    report: dict[str, Any] = json.loads(REFERENCE_RESULTS.read_text(encoding="utf-8"))
    machine = report["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("adasplash-core", "torch", "entmax"))
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] != 1)}"
    where = f"{machine['cpu']}, {threads}, load {machine['load']} at the start; {versions}; {machine['date'][:10]}"
    text = (
        f"Forward and backward in float32 at alpha = 1.5, medians, on a CPU ({where}). Made by {how}, from "
        f"`{REFERENCE_RESULTS.relative_to(ROOT)}`. The `entmax` package's functions compute the same from the whole score matrix; "
        "softmax computes something else, and stands by for scale. Memory is the peak beyond the inputs."
    )
    rows = []
    for result in report["results"]:
        ours = result["rows"][0]
        for row in result["rows"]:
            times = [f"{row[key]:.0f}" for key in ("forward_ms", "backward_ms", "total_ms")]
            memory = f"{row['peak_mib']:.0f}"
            factors = [f"{row[key] / ours[key]:.1f}x" for key in ("total_ms", "peak_mib")]
            rows.append([result["case"]["name"] if row is ours else "", row["name"], *times, factors[0], memory, factors[1]])
    columns = ["input", "", "forward ms", "backward ms", "both", "time / ours", "peak MiB", "memory / ours"]
    return f"{text}\n\n" + table(columns, rows, right=range(2, 8))


def attention_table() -> str:
    """Entmax attention beside softmax attention on a GPU, and beside the adasplash package where that was run."""
    report: dict[str, Any] = json.loads(ATTENTION_RESULTS.read_text(encoding="utf-8"))
    machine = report["machine"]
    measured = [row for row in report["rows"] if "times" in row]
    peers = any("peer" in row for row in measured)
    columns = ["input", "ours, ms", "cuDNN softmax, ms", "cuDNN's time / ours", "forward alone"]
    columns += ["adasplash's time / ours"] if peers else []
    backends = [name for name in ("triton", "cupy") if any(name in row["times"] for row in measured)]
    for name in backends:
        columns += [f"`{name}`, ms", f"cuDNN's time / `{name}`"]
    rows = []
    for row in measured:
        ours, cudnn = row["times"]["ours"], row["times"]["cudnn"]
        cells = [row["name"], f"{pair(ours)} `{row['backend']}`", pair(cudnn)]
        cells += [f"{both(cudnn) / both(ours):.2f}x", f"{cudnn['forward'] / ours['forward']:.2f}x"]
        if peers:
            cells.append(peer_ratio(row["peer"]) if "peer" in row else "-")
        for name in backends:
            found = row["times"].get(name)
            cells += [pair(found), f"{both(cudnn) / both(found):.2f}x"] if found else ["-", "-"]
        rows.append(cells)
        if graphs := row.get("graphs"):
            times = [f"{graphs['ours']:.2f}", f"{graphs['cudnn']:.2f}", f"{graphs['cudnn'] / graphs['ours']:.2f}x"]
            cells = [f"{row['name']}, as a CUDA graph", *times]
            rows.append(cells + ["-"] * (len(columns) - len(cells)))
    where = f"{machine['gpu']}, torch {machine['torch']}, triton {machine['triton']}; {machine['date']}"
    return f"Medians, forward + backward ({where}).\n\n" + table(columns, rows, right=range(1, len(columns)))


def attention_details() -> str:
    """Every row of the same results: what was wanted, memory, the peer's times and the CUDA backend's."""
    report: dict[str, Any] = json.loads(ATTENTION_RESULTS.read_text(encoding="utf-8"))
    columns = ["input", "ours", "cuDNN", "FlashAttention-2", "cuDNN / ours", "wanted", "forward alone"]
    columns += ["`adasplash`", "`adasplash` / ours", "wanted", "Triton", "CuPy", "CuPy / Triton", "peak forward / (q+k+v+o)"]
    columns += ["as one step: ours", "cuDNN", "Triton", "CuPy"]
    rows = []
    for row in report["rows"]:
        times = row["times"]
        cells = [row["name"], *(pair(times[name]) for name in ("ours", "cudnn", "flash2"))]
        cells[1] += f" {row['backend']}"
        cells += [f"{both(times['cudnn']) / both(times['ours']):.2f}x", wanted(row["target"])]
        cells.append(f"{times['cudnn']['forward'] / times['ours']['forward']:.2f}x")
        peer = row.get("peer")
        cells += [pair(peer["times"]["adasplash"]), peer_ratio(peer), wanted(peer["target"])] if peer else ["-"] * 3
        pairs = [times.get(name) for name in ("triton", "cupy")]
        cells += [pair(found) if found else "-" for found in pairs]
        cells.append(f"{both(pairs[1]) / both(pairs[0]):.2f}x" if pairs[0] and pairs[1] else "-")
        cells.append(f"{times['ours']['peak_forward'] / row['input_bytes']:.2f}")
        steps = [times.get(name, {}).get("together") for name in ("ours", "cudnn", "triton", "cupy")]
        cells += ["-" if step is None else f"{step:.2f}" for step in steps]
        rows.append(cells)
        if graphs := row.get("graphs"):
            ours, cudnn = graphs["ours"], graphs["cudnn"]
            cells = [
                f"{row['name']}, as a CUDA graph",
                f"{ours:.2f}",
                f"{cudnn:.2f}",
                "-",
                f"{cudnn / ours:.2f}x",
                wanted(row["target"]),
            ]
            rows.append(cells + ["-"] * (len(columns) - len(cells)))
    return table(columns, rows, right=range(1, len(columns)))


def kernel_table() -> str:
    """Milliseconds a kernel of each workload and backend."""
    report: dict[str, Any] = json.loads(KERNEL_RESULTS.read_text(encoding="utf-8"))
    used = [name for name in dict.fromkeys(k for row in report["rows"] for k in row["ms"]) if name != "other"]
    columns = ["input", "backend", "all", *(name.replace("_", " ") for name in used), "other"]
    rows = []
    for row in report["rows"]:
        cells = [f"{row['ms'][name]:.3f}" if name in row["ms"] else "" for name in (*used, "other")]
        rows.append([row["name"], row["backend"], f"{sum(row['ms'].values()):.2f}", *cells])
    return table(columns, rows, right=range(2, len(columns)))


def pair(times: dict[str, float]) -> str:
    """Forward + backward in ms."""
    return f"{times['forward']:.2f} + {times['backward']:.2f}"


def wanted(target: str) -> str:
    """A target such as 3.0 or 1/1.5 as a ratio."""
    above, _, below = target.partition("/")
    return f"{float(above) / float(below or 1):.2f}x" if target else "-"


def both(times: dict[str, float]) -> float:
    """Milliseconds of forward and backward together, timed apart."""
    return times["forward"] + times["backward"]


def peer_ratio(peer: dict[str, Any]) -> str:
    return f"{both(peer['times']['adasplash']) / both(peer['times']['ours']):.2f}x"


def transform_table() -> str:
    """The entmax transform beside softmax and other packages on a GPU."""
    how = "`python benchmarks/transforms.py`"
    if not TRANSFORM_RESULTS.exists():
        return f"{how} measures the transform beside softmax, the `entmax` package and `adasplash.triton_entmax`."
    report: dict[str, Any] = json.loads(TRANSFORM_RESULTS.read_text(encoding="utf-8"))
    machine, others = report["machine"], ("softmax", "entmax package", "adasplash")
    rows = []
    for row in report["rows"]:
        ours = row["times"]["ours"]
        cells = [f"{row['name']}, {row['rows']} rows", f"{ours['forward']:.3f} + {ours['backward']:.3f}"]
        cells.append(f"{ours['forward'] / row['copy_ms']:.1f}x")
        cells += [f"{both(row['times'][name]) / both(ours):.1f}x" if name in row["times"] else "-" for name in others]
        rows.append(cells)
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "triton", "entmax", "adasplash"))
    text = f"Forward + backward, medians ({machine['gpu']}; {versions}; {machine['date']}), by {how}; a copy reads and writes once. "
    text += "Where a package has no ratio, it failed: `adasplash.triton_entmax` does not compile for bfloat16."
    columns = ["input", "ours, ms", "forward / copy", *(f"{name}'s time / ours" for name in others)]
    return f"{text}\n\n" + table(columns, rows, right=range(1, len(columns)))


def iterations_table() -> str:
    """How many steps the solvers of tau need, as benchmarks/solver_iterations.py measured it."""
    return ITERATIONS.read_text(encoding="utf-8")


PARTS: dict[str, Callable[[], str]] = {
    "support": support_table,
    "commands": command_reference,
    "benchmark": benchmark_table,
    "attention": attention_table,
    "attention-details": attention_details,
    "kernels": kernel_table,
    "transforms": transform_table,
    "evidence": evidence_tables.evidence,
    "iterations": iterations_table,
}

if __name__ == "__main__":
    sys.exit(main())
