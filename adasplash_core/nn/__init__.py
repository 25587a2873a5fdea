"""Modules: attention layers, a drop-in for ``nn.MultiheadAttention``, and a schedule for alpha. For use as ``adasplash_core.nn``."""

from __future__ import annotations

from adasplash_core.nn.alpha import Alpha
from adasplash_core.nn.attention import EntmaxAttention
from adasplash_core.nn.cache import DynamicCache, KVCache, StaticCache
from adasplash_core.nn.multihead import EntmaxMultiheadAttention, replace_multihead_attention
from adasplash_core.nn.rotary import RotaryEmbedding
from adasplash_core.nn.scaling import LengthScaling
from adasplash_core.nn.schedule import AlphaSchedule

__all__ = [
    "Alpha",
    "AlphaSchedule",
    "DynamicCache",
    "EntmaxAttention",
    "EntmaxMultiheadAttention",
    "KVCache",
    "LengthScaling",
    "RotaryEmbedding",
    "StaticCache",
    "replace_multihead_attention",
]
