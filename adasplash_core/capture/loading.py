"""Loads models and tokenizers from disk and cuts texts into token sequences."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import TYPE_CHECKING, Any, NamedTuple

from adasplash_core.capture.sources import ModelSource
from adasplash_core.errors import ArgumentError, MissingDependencyError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PADDINGS = ("none", "left", "right")
"""With none, sequences are stretches of a stream; else each is one document, padded on that side."""

_MIN_TRANSFORMERS = (5, 4)


def require_transformers() -> None:
    try:
        version = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        raise MissingDependencyError("Capturing", "transformers", "it is not installed", extra="hf") from None
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < _MIN_TRANSFORMERS:
        wanted = ".".join(map(str, _MIN_TRANSFORMERS))
        raise MissingDependencyError("Capturing", f"transformers {wanted} or newer", f"{version} is installed", extra="hf")


def load_tokenizer(source: ModelSource) -> Any:
    """The model's tokenizer, from disk only."""
    from transformers import AutoTokenizer

    return _loading(source, AutoTokenizer.from_pretrained)


def load_model(source: ModelSource, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """The model without a head, from disk only, and no code of its own."""
    from transformers import AutoModel

    model: PreTrainedModel = _loading(source, AutoModel.from_pretrained, dtype=dtype).to(device)
    return model.eval()


def _loading(source: ModelSource, load: Callable[..., Any], **options: Any) -> Any:
    if source.gguf_file is not None:
        for package in ("gguf", "accelerate"):
            if importlib.util.find_spec(package) is None:
                raise MissingDependencyError("Reading a GGUF file", package, "it is not installed", extra="hf")
        options["gguf_file"] = source.gguf_file
    from safetensors import SafetensorError

    try:
        with _quiet():
            return load(source.folder, local_files_only=True, trust_remote_code=False, **options)
    except (
        OSError,
        ValueError,
        KeyError,
        RuntimeError,
        ImportError,
        SafetensorError,
    ) as error:  # whatever a broken folder makes it raise
        where = source.folder / source.gguf_file if source.gguf_file else source.folder
        raise ArgumentError(
            "transformers must be able to load the model and its tokenizer.", seen=f"{where}: {type(error).__name__}: {error}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars, which would fall into ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class Tokens(NamedTuple):
    """``input_ids`` (B, L) int64; ``attention_mask`` the same, 0 where padded, ``None`` without padding."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None


def tokenize(tokenizer: Any, documents: Iterator[str], *, length: int, batch: int, padding: str) -> Tokens:
    """Cut documents into ``batch`` sequences of ``length`` tokens, each with the tokenizer's special tokens around it.

    Raises
    ------
    ArgumentError: if there is too little text, or ``length`` leaves no room beside the special tokens.
    """
    import torch

    prefix, suffix = _special_tokens(tokenizer)
    body = length - len(prefix) - len(suffix)
    if body < 1:
        raise ArgumentError(
            f"The length must leave room beside the model's {len(prefix) + len(suffix)} special tokens.",
            seen=f"{length} tokens",
        )
    encoded = (tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"] for document in documents)
    if padding == "none":
        bodies = _stretches(encoded, body, batch)
        return Tokens(torch.tensor([prefix + ids + suffix for ids in bodies]), None)
    bodies = [ids[:body] for _, ids in zip(range(batch), (ids for ids in encoded if ids), strict=False)]
    if len(bodies) < batch:
        raise ArgumentError(
            "With padding there must be a document for each sequence.", seen=f"{len(bodies)} for a batch of {batch}"
        )
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    rows, masks = [], []
    for ids in bodies:
        row = prefix + ids + suffix
        pad, token = [filler] * (length - len(row)), [1] * len(row)
        rows.append(pad + row if padding == "left" else row + pad)
        masks.append([0] * len(pad) + token if padding == "left" else token + [0] * len(pad))
    return Tokens(torch.tensor(rows), torch.tensor(masks))


def _stretches(encoded: Iterator[list[int]], body: int, batch: int) -> list[list[int]]:
    stream: list[int] = []
    for ids in encoded:
        stream += ids
        if len(stream) >= body * batch:
            return [stream[row * body : (row + 1) * body] for row in range(batch)]
    raise ArgumentError(
        f"The text must hold at least {body * batch} tokens for {batch} sequence{'s' if batch > 1 else ''} of that length.",
        seen=f"{len(stream)} tokens",
        hint="pass more text (--text can be repeated), or ask for a smaller length or batch.",
    )


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after one text, found on a sample."""
    sample = tokenizer("a", return_special_tokens_mask=True)
    ids, special = list(sample["input_ids"]), list(sample["special_tokens_mask"])
    first = next((i for i, flag in enumerate(special) if not flag), len(ids))
    last = next((i for i, flag in enumerate(reversed(special)) if not flag), 0)
    return ids[:first], ids[len(ids) - last :]
