"""Key-value caches of one attention layer, for generation token by token. All sequences of a batch advance together."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from adasplash_core.errors import ArgumentError


class Cached(NamedTuple):
    """Keys and values (B, Hkv, Lk, E) to attend to, and the key position of the first new token: an integer or int64 ()."""

    key: torch.Tensor
    value: torch.Tensor
    query_offset: int | torch.Tensor


class KVCache(Protocol):
    """What :class:`EntmaxAttention` asks of a cache."""

    @property
    def position(self) -> int | torch.Tensor:
        """How many tokens are in it: an integer, or int64 () on the device."""

    def append(self, key: torch.Tensor, value: torch.Tensor) -> Cached:
        """Add new keys and values (B, Hkv, L, E) at the end."""


class DynamicCache:
    """Grows by what is appended, with a copy each time. Its length is known on the host."""

    def __init__(self) -> None:
        self.key: torch.Tensor | None = None
        self.value: torch.Tensor | None = None

    @property
    def position(self) -> int:
        return 0 if self.key is None else self.key.shape[2]

    def append(self, key: torch.Tensor, value: torch.Tensor) -> Cached:
        before = self.position
        if self.key is not None and self.value is not None:
            key, value = torch.cat((self.key, key), dim=2), torch.cat((self.value, value), dim=2)
        self.key, self.value = key, value
        return Cached(key, value, before)

    def reset(self) -> None:
        """Forget everything."""
        self.key = self.value = None


class StaticCache:
    """Preallocated, so that every step has the same shapes: one compiled graph or CUDA graph serves all of generation.

    Its length is a tensor on the device and is never read on the host; keys that are not filled yet lie behind the causal mask.

    Parameters
    ----------
    batch, kv_heads, max_length, head_dim: of the keys and values to come.
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        max_length: int,
        head_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = (batch, kv_heads, max_length, head_dim)
        self.key = torch.zeros(shape, device=device, dtype=dtype)
        self.value = torch.zeros(shape, device=device, dtype=dtype)
        self.position = torch.zeros((), dtype=torch.int64, device=device)

    def append(self, key: torch.Tensor, value: torch.Tensor) -> Cached:
        """Add new keys and values (B, Hkv, L, E) at the end.

        Raises
        ------
        ArgumentError: if they do not fit; on an accelerator or in compiled code torch's own check of indices stops the program.
        """
        if (key.shape[0], key.shape[1], key.shape[3]) != (self.key.shape[0], self.key.shape[1], self.key.shape[3]):
            raise ArgumentError(
                "What is appended must have the cache's batch, heads and head dim.",
                seen=f"keys {tuple(key.shape)} for a cache {tuple(self.key.shape)}",
            )
        length, room = key.shape[2], self.key.shape[2]
        on_host = self.position.device.type == "cpu" and not torch.compiler.is_compiling()
        if length > room or (on_host and int(self.position) + length > room):
            raise ArgumentError(
                f"A static cache holds max_length = {room} tokens.",
                seen=f"{length} more{f' after {int(self.position)}' if on_host else ''}",
                hint="make it longer",
            )
        before = self.position.clone()
        places = before + torch.arange(length, device=before.device)
        self.key.index_copy_(2, places, key.to(self.key.dtype))
        self.value.index_copy_(2, places, value.to(self.value.dtype))
        self.position.add_(length)
        return Cached(self.key, self.value, before)

    def reset(self) -> None:
        """Forget everything; the memory is kept."""
        self.key.zero_()
        self.value.zero_()
        self.position.zero_()
