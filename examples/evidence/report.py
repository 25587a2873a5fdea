"""What the evidence scripts share: the machine in words, tables, files of results."""

from __future__ import annotations

import json
import platform
import re
import shlex
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from adasplash_core.device import device_info

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def machine(device: torch.device | str) -> dict[str, Any]:
    """Device, versions, date and command, for the head of a file of results."""
    info = device_info(device)
    versions = {"torch": torch.__version__, "python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for package in ("adasplash-core", "triton", "transformers", "entmax", "adasplash"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "device": info.name,
        "threads": torch.get_num_threads() if info.type == "cpu" else None,
        "versions": versions,
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
    }


def short_name(of: Mapping[str, Any]) -> str:
    """A machine in a file's name: `h200` for `NVIDIA H200`, `h100` for `NVIDIA H100 80GB HBM3`, `cpu` for any CPU."""
    found = re.search(r"\b[A-Z]{1,2}\d{1,4}[A-Z]?\b", of["device"]) if of["threads"] is None else None
    return found[0].lower() if found else "cpu" if of["threads"] else "gpu"


def spread(values: Sequence[float], form: str = "{:.3f}") -> str:
    """Mean, and half the range where there are several."""
    if not values:
        return "-"
    mean = form.format(statistics.fmean(values))
    return mean if len(values) == 1 else f"{mean} ± {form.format((max(values) - min(values)) / 2)}"


def table(rows: Iterable[Mapping[str, Any]], columns: Sequence[str], form: str = "{:.4g}") -> str:
    """A Markdown table of these columns; numbers in ``form``, missing values as a dash."""

    def cell(value: Any) -> str:
        return "-" if value is None else form.format(value) if isinstance(value, float) else str(value)

    lines = [[cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(column), *(len(line[i]) for line in lines)) for i, column in enumerate(columns)]
    text = [list(columns), ["-" * width for width in widths], *lines]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in text)


def save(name: str, content: Mapping[str, Any], path: Path | None) -> Path:
    """Write a file of results: unless a path is given, into ``benchmarks/results``, its name ended by the machine's."""
    path = RESULTS / f"{name}_{short_name(content['machine'])}.json" if path is None else path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")  # a program ended while it writes leaves the file that was there whole
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return part.replace(path)


def without_times(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows less what other programs on the device would have spoilt."""
    return [{column: value for column, value in row.items() if column not in ("ms a step", "tokens / s")} for row in rows]
