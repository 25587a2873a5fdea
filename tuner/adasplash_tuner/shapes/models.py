"""The shapes that a model computes, from its Hugging Face ``config.json``: read as plain JSON, without transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adasplash_core.errors import ArgumentError
from adasplash_tuner.shapes.shape import DTYPES, Shape

HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num")
WIDTH = ("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "model_dim")
HEAD_DIM = ("head_dim", "kv_channels", "d_kv", "attention_head_size")
LENGTH = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length", "max_target_positions",
)  # fmt: skip
NESTED = ("text_config", "llm_config", "language_config", "decoder", "thinker_config")
"""Where models of several modalities keep the language model's fields."""

ENCODERS = (
    "albert", "bert", "camembert", "convbert", "deberta", "deberta-v2", "distilbert", "electra", "ernie", "esm", "eurobert", "flaubert",
    "ibert", "longformer", "megatron-bert", "mobilebert", "modernbert", "mpnet", "nomic_bert", "nystromformer", "rembert", "roberta",
    "roberta-prelayernorm", "roformer", "siglip", "splinter", "squeezebert", "vit", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip
"""``model_type`` of models that see both sides of a token. ``is_decoder`` and the architecture's name are looked at first."""

DEFAULT_LENGTH = 2048
SHORTEST = 512
LONGEST = {"quick": 8192, "full": 32768}
ENCODER_BATCH = 16


def model_shapes(path: str | Path, profile: str, device_type: str) -> tuple[Shape, ...]:
    """Shapes to tune for a model: prompts of powers of two up to its longest for decoders, batches of full length for encoders.

    Parameters
    ----------
    path: a ``config.json``, or the folder that holds it.
    profile: "quick" gives few shapes, "full" one a length bucket.

    Raises
    ------
    ArgumentError: if there is no such file, or it lacks what a shape needs.
    """
    config = _load(Path(path))
    layout = _layout(config, str(path))
    dtype = _dtype(config, device_type)
    longest = _first(config, LENGTH)
    longest = longest if isinstance(longest, int) and longest > 0 else DEFAULT_LENGTH
    heads, kv_heads, head_dim, head_dim_v = layout
    causal = is_causal(config)

    def shape(batch: int, q_len: int, kv_len: int) -> Shape:
        return Shape(batch, heads, kv_heads, q_len, kv_len, head_dim, head_dim_v, dtype, causal)

    limit = min(longest, LONGEST[profile] if device_type != "cpu" else 4096)
    if not causal:
        sizes = [(ENCODER_BATCH if device_type != "cpu" else 4, limit), (1, limit)]
        if profile == "full":
            sizes += [(ENCODER_BATCH, n) for n in (limit // 4, limit // 16) if n >= 32]
        return tuple(dict.fromkeys(shape(batch, length, length) for batch, length in sizes))
    lengths = [limit]
    while lengths[-1] // 2 >= SHORTEST:
        lengths.append(1 << (lengths[-1] - 1).bit_length() - 1)
    if profile == "quick":
        lengths = [lengths[0], *lengths[2:3]]
    return tuple(shape(1, length, length) for length in lengths)


def is_causal(config: Mapping[str, Any]) -> bool:
    """Whether a token sees only those before it: by ``is_decoder``, the architecture's name, then the model's type."""
    if config.get("is_decoder") is True:
        return True
    names = " ".join(map(str, config.get("architectures") or ()))
    if any(word in names for word in ("CausalLM", "LMHeadModel", "ConditionalGeneration")):
        return True
    if any(
        word in names for word in ("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering", "Encoder")
    ):
        return config.get("model_type") not in ENCODERS and "MaskedLM" not in names and "Encoder" not in names
    return config.get("model_type") not in ENCODERS


def _load(path: Path) -> Mapping[str, Any]:
    rule = "--model must be a Hugging Face config.json, or the folder that holds one."
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArgumentError(rule, seen=f"{file} ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ArgumentError(rule, seen=f"{file}, which is no JSON ({error})") from error
    if not isinstance(config, dict):
        raise ArgumentError(rule, seen=f"{file}, which holds a {type(config).__name__}")
    for name in NESTED:
        inner = config.get(name)
        if isinstance(inner, dict) and _first(inner, HEADS) is not None:
            return {**{k: config[k] for k in ("architectures", "torch_dtype", "dtype") if k in config}, **inner}
    return config


def _layout(config: Mapping[str, Any], path: str) -> tuple[int, int, int, int]:
    """(heads, key heads, head dim of query and key, head dim of value)."""
    heads = _required(config, HEADS, path)
    if "qk_rope_head_dim" in config and "v_head_dim" in config:  # latent attention: every head has its own keys
        return (
            heads,
            heads,
            int(config.get("qk_nope_head_dim") or 0) + int(config["qk_rope_head_dim"]),
            int(config["v_head_dim"]),
        )
    kv_heads = _first(config, KV_HEADS)
    if config.get("multi_query") is True and not config.get("new_decoder_architecture") and kv_heads in (None, heads):
        kv_heads = 1
    kv_heads = kv_heads or heads
    head_dim = _first(config, HEAD_DIM) or _required(config, WIDTH, path) // heads
    if heads % kv_heads or head_dim < 1:
        raise ArgumentError(
            "A model's query heads must be a multiple of its key heads.",
            seen=f"{path}: {heads} heads, {kv_heads} key heads, head dim {head_dim}",
        )
    return heads, kv_heads, head_dim, head_dim


def _dtype(config: Mapping[str, Any], device_type: str) -> str:
    if device_type == "cpu":
        return "float32"
    named = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    # Encoders are often stored in float32 and run in half precision; tuning follows what a GPU is used for.
    return named if named in DTYPES.values() and named not in ("float32", "float64") else "bfloat16"


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """The first of these fields that is there, as an integer; a list's largest (models that change it from layer to layer)."""
    for name in names:
        value = config.get(name)
        if isinstance(value, list) and value and all(isinstance(v, int) for v in value):
            value = max(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def _required(config: Mapping[str, Any], names: tuple[str, ...], path: str) -> int:
    found = _first(config, names)
    if found is None or found < 1:
        raise ArgumentError(
            f"A model's config must have one of {', '.join(names)}.", seen=f"{path}, with {', '.join(sorted(config)[:20])}"
        )
    return int(found)
