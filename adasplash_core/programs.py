"""For backends that compute once what launches a call needs, and replay it: what a call is found again by, and where it is kept.

A backend gathers a call's tensors into a table by role, q under "q" and so on, and takes :func:`describe` of both as the key. What it
builds for a key (a *program*: grids, strides, the order of kernels) then depends on nothing else: each call puts its own tensors in.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

if TYPE_CHECKING:
    from adasplash_core.backend import AttentionCall

Program = TypeVar("Program")


def describe(call: AttentionCall, table: Mapping[str, torch.Tensor]) -> tuple[Any, ...]:
    """Everything that decides a pass's program: two calls with equal descriptions differ in values and addresses alone.

    Of each tensor in ``table`` its role, shape, strides, dtype and address modulo 16 (what vectorised loads depend on), in the table's
    order. Holds the ids of spec and config, which are cheaper to hash than these: whoever keeps a description keeps those.
    """
    offset = call.query_offset
    return (
        id(call.spec),
        id(call.config),
        call.scale,
        call.dropout_p,
        call.window,
        None if isinstance(offset, torch.Tensor) else offset,
        call.query.get_device(),
        *table,
        *[(x.shape, x.stride(), x.dtype, x.data_ptr() & 15) for x in table.values()],
    )


class Programs(Generic[Program]):
    """A bounded cache, safe to use from threads. What is asked for is built by the caller and kept once it has run."""

    def __init__(self, most: int = 1024) -> None:
        self.most = most
        self._lock = threading.Lock()
        self._known: dict[Hashable, Program] = {}
        self.find = self._known.get
        """``find(key)``: the program kept under a key, or None. The dictionary's own method, which costs no call more."""

    def __len__(self) -> int:
        return len(self._known)

    def keep(self, key: Hashable, program: Program) -> None:
        with self._lock:
            if len(self._known) >= self.most:  # a decode loop sees a new length each step
                self._known.clear()
            self._known[key] = program
