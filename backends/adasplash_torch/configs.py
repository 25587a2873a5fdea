"""What can be tuned: how the (query, key) plane is cut into tiles, and when a tile counts as sparse.

Nothing here changes results beyond rounding, except too few ``iterations``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from adasplash_core.backend import KernelConfig
from adasplash_core.errors import ConfigError
from adasplash_core.spec import AttentionSpec

TILE_SCORES = 4 << 20
"""Scores of one tile in the default configs: 16 MiB in float32."""


@dataclass(frozen=True)
class TileConfig(KernelConfig):
    """How scores are tiled. A tile is ``heads`` (batch, head) pairs by ``rows`` queries by every key those queries see.

    ``panel``: query rows of one matrix product, which computes only the keys its own rows see.
    ``group``: keys of a group; a group whose largest score lies below the row's threshold is never looked at again.
    ``dense_above``: a tile with a larger part of its groups above the threshold is computed densely.
    """

    rows: int = 1024
    heads: int = 1
    panel: int = 512
    group: int = 16
    dense_above: float = 0.4

    def __post_init__(self) -> None:
        names = [f.name for f in fields(self)]
        for name in ("rows", "heads", "panel", "group"):
            if getattr(self, name) < 1:
                raise ConfigError(type(self).__name__, f"wants {name} of at least 1, got {getattr(self, name)}", fields=names)
        if not 0 <= self.dense_above <= 1:
            raise ConfigError(type(self).__name__, f"wants dense_above in [0, 1], got {self.dense_above}", fields=names)


@dataclass(frozen=True)
class ForwardConfig(TileConfig):
    """Adds ``iterations``, at most how many steps the threshold's solver takes (it stops early on a CPU), and ``bound_steps``,
    Newton steps on the groups' maxima that lower-bound the threshold before the scores themselves are looked at."""

    bound_steps: int = 3
    iterations: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations < 1 or self.bound_steps < 0:
            seen = f"iterations={self.iterations}, bound_steps={self.bound_steps}"
            raise ConfigError(
                "ForwardConfig",
                f"wants iterations >= 1 and bound_steps >= 0, got {seen}",
                fields=[f.name for f in fields(self)],
            )


@dataclass(frozen=True)
class BackwardConfig(TileConfig):
    """Tiles of the backward pass, which needs no solver: the forward keeps each row's threshold."""


def default_tile(spec: AttentionSpec) -> dict[str, int]:
    """Rows and heads of a tile of about :data:`TILE_SCORES` scores."""
    kv_len = max(spec.kv_len or 4096, 1)
    pairs = max(spec.batch or 1, 1) * spec.heads
    rows = min(max(spec.q_len or 1024, 1), max(64, min(1024, TILE_SCORES // kv_len)))
    heads = max(1, min(pairs, TILE_SCORES // (rows * kv_len)))
    return {"rows": rows, "heads": heads, "panel": min(rows, 512)}


def tile_candidates(spec: AttentionSpec) -> Iterator[dict[str, int]]:
    """Tiles for the tuner: the default's, then fewer and more rows, smaller panels, other groups."""
    default = default_tile(spec)
    q_len, kv_len = max(spec.q_len or 1024, 1), max(spec.kv_len or 4096, 1)
    seen = set()
    for rows in (default["rows"], 128, 256, 512, 1024, 2048):
        rows = min(rows, q_len)
        if rows * kv_len > 16 * TILE_SCORES and rows > 64:
            continue
        heads = max(1, min(max(spec.batch or 1, 1) * spec.heads, TILE_SCORES // (rows * kv_len)))
        for panel in (128, 256, 512):
            for group in (8, 16, 32):
                if group != 16 and panel != 256:
                    continue
                candidate = (rows, heads, min(panel, rows), group)
                if candidate not in seen:
                    seen.add(candidate)
                    yield {"rows": rows, "heads": heads, "panel": min(panel, rows), "group": group}
