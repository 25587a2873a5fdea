"""BERT-type encoders for the evidence scripts: documents of many lengths in padded batches, positions for longer contexts."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hf
import numpy as np
import torch
from torch import nn

CLS, SEP, MASK = 101, 102, 103  # of BERT's uncased vocabulary, which MiniLM has
PAD_TO = 64  # tokens


@dataclass(frozen=True)
class Ragged:
    """Token sequences of many lengths."""

    ids: np.ndarray[Any, np.dtype[np.int32]]  # one after the other
    starts: np.ndarray[Any, np.dtype[np.int64]]  # where each begins, and the end

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> Ragged:
        lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
        flat = [token for sequence in sequences for token in sequence]
        return cls(np.array(flat, dtype=np.int32), np.concatenate(([0], lengths.cumsum())))

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.diff(self.starts)

    def padded(self, rows: Any, device: torch.device, most: int = 0) -> dict[str, torch.Tensor]:
        """``input_ids`` and ``attention_mask`` (B, L), padded on the right with 0.

        L is the longest of the rows, or, up to ``most``, the next multiple of 64: kernels and plans made for a length are made once.
        """
        lengths = self.lengths[rows]
        longest = int(lengths.max())
        ids = np.zeros((len(rows), max(longest, min(-(-longest // PAD_TO) * PAD_TO, most))), dtype=np.int64)
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            ids[i, :length] = self.ids[self.starts[row] : self.starts[row] + length]
        mask = np.arange(ids.shape[1]) < lengths[:, None]
        return {
            "input_ids": torch.from_numpy(ids).to(device),
            "attention_mask": torch.from_numpy(mask.astype(np.int64)).to(device),
        }

    def batches(self, size: int) -> Iterator[np.ndarray[Any, np.dtype[np.int64]]]:
        """All rows, those of like length together."""
        order = np.argsort(self.lengths, kind="stable")
        yield from (order[i : i + size] for i in range(0, len(order), size))


def save(path: Path, **arrays: Any) -> None:
    """Ragged arrays take two entries each."""
    flat: dict[str, Any] = {}
    for name, value in arrays.items():
        flat |= {f"{name}.ids": value.ids, f"{name}.starts": value.starts} if isinstance(value, Ragged) else {name: value}
    np.savez_compressed(path, **flat)


def load(path: Path) -> dict[str, Any]:
    """What :func:`save` wrote."""
    with np.load(path) as file:
        names = {name.rpartition(".")[0] or name for name in file.files}
        return {
            n: Ragged(file[f"{n}.ids"], file[f"{n}.starts"]) if f"{n}.ids" in file.files else file[n] for n in sorted(names)
        }


def encode(tokenizer: Any, documents: Sequence[str], length: int) -> Ragged:
    """With the tokenizer's special tokens, cut to a length."""
    encoded: list[list[int]] = tokenizer(list(documents), truncation=True, max_length=length, verbose=False)["input_ids"]
    return Ragged.of(encoded)


def longer(model: Any, length: int) -> Any:
    """A copy of a BERT-type model that takes sequences of this length: its table of positions, repeated (as Longformer's was made)."""
    model = copy.deepcopy(model)
    embeddings = model.base_model.embeddings
    table = embeddings.position_embeddings
    if length <= table.num_embeddings:
        return model
    repeats = -(-length // table.num_embeddings)
    weight = table.weight.detach().repeat(repeats, 1)[:length]
    embeddings.position_embeddings = nn.Embedding.from_pretrained(weight.clone(), freeze=False)
    embeddings.register_buffer("position_ids", torch.arange(length)[None], persistent=False)
    embeddings.register_buffer("token_type_ids", torch.zeros(1, length, dtype=torch.int64), persistent=False)
    model.config.max_position_embeddings = length
    return model


def modernbert(vocabulary: int, context: int, *, embed: int, layers: int, seed: int) -> Any:
    """A ModernBERT with random weights: of three layers one sees everything, two see 64 tokens to each side."""
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    torch.manual_seed(seed)
    config = ModernBertConfig(
        vocab_size=vocabulary, hidden_size=embed, intermediate_size=3 * embed // 2, num_hidden_layers=layers,
        num_attention_heads=max(embed // 64, 2), max_position_embeddings=context, local_attention=128, global_attn_every_n_layers=3,
        pad_token_id=0, bos_token_id=CLS, cls_token_id=CLS, eos_token_id=SEP, sep_token_id=SEP,
    )  # fmt: skip
    return ModernBertForMaskedLM(config)


def masked(inputs: dict[str, torch.Tensor], share: float = 0.3) -> dict[str, torch.Tensor]:
    """Inputs of masked language modelling: a share of the tokens hidden, and these as labels."""
    ids = inputs["input_ids"]
    hidden = (torch.rand(ids.shape, device=ids.device) < share) & (ids != 0) & (ids != CLS) & (ids != SEP)
    labels = torch.where(hidden, ids, -100)
    return inputs | {"input_ids": torch.where(hidden, MASK, ids), "labels": labels}


def density_of(model: Any, inputs: dict[str, torch.Tensor]) -> list[list[float]]:
    """By layer and head, what share of the visible weights is not zero; empty for softmax."""
    with torch.no_grad(), hf.watch_density() as found:
        model(**inputs)
    return [layer.tolist() for layer in found]
