"""Where models and texts come from: files here, or files inside installed packages. Never the network, never a pickle.

Package files are found through the distribution's record, so nothing of the package is imported. Imports no torch.
"""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

from adasplash_core.errors import ArgumentError

TEXT_COLUMN = "text"
"""The column of a CSV file that is taken as text, one document a row."""

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_PIECE = 1 << 18  # characters of a plain text handed on at once: tokenizers work on whole strings
_LONGEST_FIELD = 1 << 27  # of a CSV file, in characters


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model on disk: a Hugging Face folder, with ``gguf_file`` where the weights are one GGUF file in it."""

    folder: Path
    name: str
    gguf_file: str | None = None


def find_model(name: str) -> ModelSource:
    """A Hugging Face folder, a ``.gguf`` file, or an installed package that carries exactly one of either.

    Raises
    ------
    ArgumentError: if it is none of these.
    """
    path = Path(name)
    if path.exists():
        if (source := _model_at(path, name)) is not None:
            return source
        raise ArgumentError(
            "A model must be a .gguf file or a folder with config.json and weights (*.safetensors, pytorch_model*.bin).",
            seen=name,
        )
    found = [source for file in _package_files(name, "model") if (source := _model_at(file, name)) is not None]
    found += [source for folder in _config_folders(name) if (source := _model_at(folder, name)) is not None]
    if len(found) == 1:
        return found[0]
    if found:
        paths = ", ".join(str(s.folder / s.gguf_file if s.gguf_file else s.folder) for s in found)
        raise ArgumentError("The package must carry one model.", seen=f"{name} with {len(found)}: {paths}", hint="pass a path.")
    raise ArgumentError("The package must carry a .gguf file or a Hugging Face folder.", seen=f"{name}, which has neither")


def read_documents(source: str) -> tuple[str, Iterator[str]]:
    """The texts of a UTF-8 ``.txt``/``.md``/... file, a CSV file with a ``text`` column, a zip of such files, or an installed
    package that carries one: ``package`` takes the largest, ``package:part`` the one whose path contains ``part``.

    Returns
    -------
    What is read, spelled out, and an iterator over its documents (a CSV file's rows; pieces of a plain text, cut at line
    ends). Read lazily: errors in the contents come from the iterator.

    Raises
    ------
    ArgumentError: if there is no such text, or it is not UTF-8.
    """
    path = Path(source)
    if path.is_file():
        members = _text_members(path)
        if not members:
            raise ArgumentError("A zip of texts must hold .txt or .csv files.", seen=f"{source}, which has none")
        return source, _read_members(path, members)
    if path.exists():
        raise ArgumentError("A text must be a file.", seen=f"{source}, a folder", hint="pass --text once for each file.")
    package, _, part = source.partition(":")
    candidates: list[tuple[int, Path, list[str]]] = []
    for file in _package_files(package, "text"):
        about_package = any(parent.suffix == ".dist-info" for parent in file.parents)  # its licence is no text to read
        fits = file.suffix.lower() in (".zip", ".csv", ".txt") and part in file.as_posix() and not about_package
        if fits and (members := _text_members(file)):
            candidates.append((_text_size(file, members), file, members))
    if not candidates:
        what = (
            f"a text file whose path contains {part!r}" if part else "text (.txt, .csv with a text column, or a .zip of those)"
        )
        raise ArgumentError(f"The package must carry {what}.", seen=package)
    _, file, members = max(candidates, key=lambda candidate: (candidate[0], candidate[1].as_posix()))
    return f"{package}:{file.name}", _read_members(file, members)


def _package_files(name: str, kind: str) -> list[Path]:
    """The files that the installed distribution of this name owns."""
    hint = f"pass a path, or install the package that carries the {kind}."
    try:
        files = metadata.distribution(name).files
    except (metadata.PackageNotFoundError, ValueError) as error:
        raise ArgumentError(
            f"A {kind} must be a path that exists or the name of an installed package.", seen=repr(name), hint=hint
        ) from error
    return [path for file in files or () if (path := Path(str(file.locate()))).is_file()]


def _config_folders(name: str) -> list[Path]:
    return [file.parent for file in _package_files(name, "model") if file.name == "config.json"]


def _model_at(path: Path, name: str) -> ModelSource | None:
    if path.is_file():
        return ModelSource(path.parent, name, path.name) if path.suffix.lower() == ".gguf" else None
    config = path / "config.json"
    if not config.is_file() or not any(file for pattern in _WEIGHTS for file in path.glob(pattern)):
        ggufs = sorted(path.glob("*.gguf"))
        return ModelSource(path, name, ggufs[0].name) if len(ggufs) == 1 and not config.is_file() else None
    try:
        described: Any = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArgumentError("A model's config.json must be JSON.", seen=f"{config}: {error}") from error
    # Folders of other parts (a pooling layer, an adapter) have a config.json too, without a model type.
    return ModelSource(path, name) if isinstance(described, dict) and "model_type" in described else None


def _text_members(path: Path) -> list[str]:
    """A zip's text files; for any other file one empty name, which stands for the file itself."""
    if path.suffix.lower() != ".zip":
        return [""]
    try:
        with zipfile.ZipFile(path) as archive:
            return sorted(n for n in archive.namelist() if n.lower().endswith((".txt", ".csv")))
    except zipfile.BadZipFile as error:
        raise ArgumentError("A zip of texts must be a zip file.", seen=f"{path}: {error}") from error


def _text_size(path: Path, members: list[str]) -> int:
    if members == [""]:
        return path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        return sum(archive.getinfo(member).file_size for member in members)


def _read_members(path: Path, members: list[str]) -> Iterator[str]:
    if members == [""]:
        with path.open("rb") as stream:
            yield from _read_stream(stream, path.name, str(path))
        return
    with zipfile.ZipFile(path) as archive:
        for member in members:
            with archive.open(member) as stream:
                yield from _read_stream(stream, member, f"{path}:{member}")


def _read_stream(stream: BinaryIO | Any, name: str, where: str) -> Iterator[str]:
    is_csv = name.lower().endswith(".csv")
    text = io.TextIOWrapper(stream, encoding="utf-8", newline="" if is_csv else None)
    try:
        yield from _read_csv(text, where) if is_csv else _read_plain(text)
    except UnicodeDecodeError as error:
        raise ArgumentError(
            "A text must be UTF-8.",
            seen=f"{where}: {error.reason} (byte {error.object[error.start]:#04x})",
            hint="convert it first.",
        ) from error
    except (csv.Error, zipfile.BadZipFile, EOFError) as error:
        raise ArgumentError("A text must be readable to its end.", seen=f"{where}: {error}") from error


def _read_plain(text: io.TextIOWrapper) -> Iterator[str]:
    while lines := text.readlines(_PIECE):
        yield "".join(lines)


def _read_csv(text: io.TextIOWrapper, where: str) -> Iterator[str]:
    previous = csv.field_size_limit(_LONGEST_FIELD)  # a whole article may pass the default of 128 KiB
    try:
        rows = csv.DictReader(text)
        if TEXT_COLUMN not in (rows.fieldnames or ()):
            raise ArgumentError(
                f"A CSV file of texts must have a column named {TEXT_COLUMN!r}.", seen=f"{where} with {rows.fieldnames}"
            )
        for row in rows:
            if document := row[TEXT_COLUMN]:
                yield document
    finally:
        csv.field_size_limit(previous)
