"""Tables of what examples/evidence/ measured, from ``benchmarks/results/``: read by generate.py."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
EXPERIMENTS = {
    "language_modelling_124m_4096": "A GPT-2-class model from scratch, {context} tokens, by the Triton backend",
    "language_modelling_cupy_124m_4096": "The same by the backend that is chosen by default, CuPy",
    "language_modelling_longer_124m_4096": "A GPT-2-class model from scratch, {context} tokens, more steps, by the Triton backend",
    "language_modelling_124m_1024": "A GPT-2-class model from scratch, {context} tokens",
    "step_profile_124m_4096": "Where a step of the GPT-2-class model goes, {context} tokens, milliseconds",
    "continued_training_8192": "SmolLM2-135M goes on training on news, {context} tokens",
    "classification_512": "20 Newsgroups with MiniLM, {context} tokens",
    "classification_4096": "20 Newsgroups with MiniLM, documents joined to {context} tokens",
    "retrieval_minilm": "News articles by their titles, MiniLM, {context} tokens",
    "retrieval_modernbert": "News articles by their titles, a ModernBERT-class encoder from scratch, {context} tokens",
}
"""Results' files, without the card, and what was done."""
COLUMNS = {
    "step_profile_124m_4096": (
        "attention",
        "after steps",
        "ms a step",
        "attention forward",
        "attention backward",
        "matrix products",
        "loss",
        "waiting",
        "not zero, by layer",
    ),
}
"""Those of a table that are shown; of a table that is not named here all are."""
REASON_CHARACTERS = 60


def evidence() -> str:
    """Every experiment that has results: a heading, how it was measured, its table."""
    return "\n\n".join(part for name, title in EXPERIMENTS.items() for part in experiment(name, title))


def experiment(name: str, title: str) -> Iterator[str]:
    for path in sorted(RESULTS.glob(f"{name}_*.json")):
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        machine, settings = found["machine"], found["settings"]
        versions = ", ".join(f"{package} {machine['versions'][package]}" for package in ("torch", "triton", "transformers"))
        yield f"### {title.format(context=settings['context'])}"
        shared = " Other programs used the card meanwhile: times would say nothing." if settings.get("shared") else ""
        yield (
            f"{machine['device']}; {versions}; {machine['date']}; {found['seconds']:.0f} s in all, by `{machine['command']}`; "
            f"`benchmarks/results/{path.name}`.{shared}"
        )
        yield markdown(found["table"], COLUMNS.get(name))
        yield from not_run(found["not run"])


def not_run(reasons: Mapping[str, str]) -> Iterator[str]:
    """One line a reason, cut to its beginning: messages of compilers are long."""
    runs: dict[str, list[str]] = {}
    for run, reason in reasons.items():
        told = textwrap.shorten(reason.split(". ")[0].rstrip("."), REASON_CHARACTERS, placeholder=" ...")
        runs.setdefault(told, []).append(run)
    for told, those in runs.items():
        yield f"Not run ({told}): {'; '.join(those)}."


def markdown(rows: list[dict[str, Any]], columns: Sequence[str] | None = None) -> str:
    columns = columns or list(rows[0])
    right = {c for c in columns if any(isinstance(row[c], int | float) or _is_number(row[c]) for row in rows)}
    cells = [["-" if row[c] is None else str(row[c]) for c in columns] for row in rows]
    lines = [columns, ["--:" if c in right else "---" for c in columns], *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _is_number(cell: Any) -> bool:
    return isinstance(cell, str) and cell.split(" ± ")[0].replace(".", "", 1).isdigit()
