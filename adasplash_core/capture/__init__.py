"""Runs a Hugging Face model and captures q, k, v and the mask of chosen layers, exactly as they reach the attention function.

What the mask says is read off the mask itself: :func:`mask_facts` finds the causal flag, window and padding that explain every
entry of it, and keeps the mask whole where none do, so that no model's special rule is lost. Importing loads neither torch nor
transformers (5.4 or newer, the ``hf`` extra).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib import metadata
from typing import Any, NamedTuple

from adasplash_core.capture.loading import PADDINGS, load_model, load_tokenizer, require_transformers, tokenize
from adasplash_core.capture.masks import MaskFacts, mask_facts
from adasplash_core.capture.recorder import capture_layers
from adasplash_core.capture.sources import find_model, read_documents
from adasplash_core.errors import AdasplashWarning, ArgumentError
from adasplash_core.workload import WorkloadInfo, WorkloadLayer

__all__ = ["CapturedModel", "MaskFacts", "capture", "capture_layers", "check_length", "mask_facts", "select_layers"]

DTYPES = ("float32", "bfloat16", "float16", "float64")

_LIBRARIES = ("adasplash-core", "torch", "transformers", "safetensors", "gguf")


class CapturedModel(NamedTuple):
    """What :func:`capture` returns; :func:`adasplash_core.workload.save_workload` takes the two parts."""

    info: WorkloadInfo
    layers: list[WorkloadLayer]


def capture(
    model: str,
    texts: Sequence[str],
    length: int,
    layers: str = "all",
    *,
    heads: Sequence[int] | None = None,
    batch: int = 1,
    padding: str = "none",
    dtype: str = "float32",
    compute_dtype: str = "float32",
    device: str = "cpu",
) -> CapturedModel:
    """Run a model over text and capture the attention inputs of chosen layers.

    Parameters
    ----------
    model: a local Hugging Face folder, a ``.gguf`` file, or an installed package that carries one.
    texts: see :func:`adasplash_core.capture.sources.read_documents`.
    length: tokens of each sequence, special tokens and padding included.
    layers: ``"all"``, ``"every:3"`` or ``"0,4,8"``.
    heads: query heads to keep, ``None`` for all; key heads follow.
    batch: sequences. Without padding they are consecutive stretches of the text.
    padding: ``"left"`` or ``"right"`` makes each sequence one document, cut or padded to ``length``.
    dtype: of the captured tensors. ``compute_dtype``: in which the model runs.
    device: where it runs; what is captured is moved to the CPU.

    Raises
    ------
    MissingDependencyError: without transformers 5.4 (or, for GGUF files, gguf and accelerate).
    ArgumentError: for bad arguments, a text that is too short, or a model that cannot be captured.
    """
    import torch

    for name, given in {"length": length, "batch": batch}.items():
        if given < 1:
            raise ArgumentError(f"The {name} must be 1 or more.", seen=str(given))
    for name in (dtype, compute_dtype):
        if name not in DTYPES:
            raise ArgumentError(f"A dtype must be one of {', '.join(DTYPES)}.", seen=name)
    if padding not in PADDINGS:
        raise ArgumentError(f"The padding must be one of {', '.join(PADDINGS)}.", seen=repr(padding))
    require_transformers()
    source = find_model(model)
    names, documents = _join_documents(texts)
    tokens = tokenize(load_tokenizer(source), documents, length=length, batch=batch, padding=padding)
    loaded = load_model(source, getattr(torch, compute_dtype), device)
    check_length(loaded.config, length)
    chosen = select_layers(layers, loaded.config.get_text_config().num_hidden_layers)
    captured = capture_layers(
        loaded, tokens.input_ids, tokens.attention_mask, layers=chosen, heads=heads, dtype=getattr(torch, dtype)
    )
    info = WorkloadInfo(
        model=source.name if source.gguf_file is None else f"{source.name} ({source.gguf_file})",
        model_type=loaded.config.model_type,
        text=", ".join(names),
        tokens=length,
        padding=padding,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        libraries=_library_versions(),
    )
    return CapturedModel(info, captured)


def select_layers(choice: str, count: int) -> list[int]:
    """The layer numbers that ``"all"``, ``"every:3"`` or ``"0,4,8"`` mean in a model of ``count`` layers.

    Raises
    ------
    ArgumentError: for anything else, or a number outside the model.
    """
    rule = 'Layers are given as "all", "every:N" or numbers with commas between them.'
    choice = choice.strip()
    if choice == "all":
        return list(range(count))
    if match := re.fullmatch(r"every:([1-9]\d*)", choice):
        return list(range(0, count, int(match[1])))
    if not re.fullmatch(r"\d+(\s*,\s*\d+)*", choice):
        raise ArgumentError(rule, seen=repr(choice), hint='for example "0,4,8" or "every:3".')
    chosen = sorted({int(number) for number in choice.split(",")})
    if chosen[-1] >= count:
        raise ArgumentError(
            "A layer must exist in the model.", seen=f"layer {chosen[-1]}", hint=f"it has layers 0 to {count - 1}."
        )
    return chosen


def check_length(config: Any, length: int) -> None:
    """Refuse a length that the model has no positions for; warn where it only was not trained for it.

    Raises
    ------
    ArgumentError: if positions are a learned table and ``length`` is beyond it.
    """
    config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None or length <= limit:
        return
    if not getattr(config, "rope_parameters", None):
        raise ArgumentError(
            "The length must not pass the model's table of positions.",
            seen=f"{length} tokens",
            hint=f"at most {limit}; --batch takes more text.",
        )
    message = (
        f"{length} tokens are more than the {limit} that {config.model_type} was made for: its attention may be untypical."
    )
    warnings.warn(message, AdasplashWarning, stacklevel=3)


def _join_documents(texts: Sequence[str]) -> tuple[list[str], Iterator[str]]:
    if not texts:
        raise ArgumentError(
            "There must be a text.", seen="none", hint="pass a UTF-8 file or an installed package that carries text."
        )
    opened = [read_documents(text) for text in texts]
    return [name for name, _ in opened], (document + "\n\n" for _, documents in opened for document in documents)


def _library_versions() -> dict[str, str]:
    versions = {}
    for library in _LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue  # gguf is only needed for GGUF files; a source checkout may not be installed
    return versions
