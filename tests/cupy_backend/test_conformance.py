"""The conformance suite on emulated kernels: over all keys, as sequences this short are computed, and over lists of keys."""

from __future__ import annotations

from typing import Any

import pytest

from adasplash_core.backend import HeadDims, KernelConfig
from adasplash_core.testing.conformance import AttentionConformance
from adasplash_cupy.configs import BackwardConfig, ForwardConfig
from tests.cupy_backend.emulator import EmulatedCupyBackend, limited


class TestTensorCores(AttentionConformance):
    backend = limited(64, "float16")
    quick = True


class TestCudaCores(AttentionConformance):
    backend = limited(16, "float32")
    quick = True


class _Listing(EmulatedCupyBackend):
    """Tiles so small that a case's keys are several, and lists whatever their share of the keys."""

    head_dims = limited(16).head_dims
    dtypes = frozenset({"float32"})

    def default_config(self, *_: Any) -> KernelConfig:
        return ForwardConfig(keys=16, select_keys=64) if _[2] == "forward" else BackwardConfig(keys=16, list_keys=16, rows=16)

    def tuning_space(self, *_: Any) -> tuple[()]:
        return ()


class _Marking(EmulatedCupyBackend):
    """Lists by the pass for Hopper, wherever it can run."""

    head_dims = HeadDims(low=40, high=64, multiple_of=8)
    dtypes = frozenset({"float16"})

    def default_config(self, *_: Any) -> KernelConfig:
        return ForwardConfig(mark_groups=2, mark_stages=2) if _[2] == "forward" else BackwardConfig()

    def tuning_space(self, *_: Any) -> tuple[()]:
        return ()


@pytest.mark.usefixtures("_lists")
class TestMarking(AttentionConformance):
    backend = _Marking()
    quick = True


class _Warpgroups(EmulatedCupyBackend):
    """Products by warpgroups in every pass that has them."""

    head_dims = HeadDims(low=40, high=64, multiple_of=8)
    dtypes = frozenset({"float16"})

    def default_config(self, *_: Any) -> KernelConfig:
        if _[2] == "forward":
            return ForwardConfig(lists_warpgroups=1, dense_warpgroups=1, stages=4)
        return BackwardConfig(
            keys=64, stages=3, rows_warpgroups=1, list_keys=64, lists_warpgroups=1, keys_warpgroups=1, row_stages=3
        )

    def tuning_space(self, *_: Any) -> tuple[()]:
        return ()


@pytest.mark.usefixtures("_lists")
class TestWarpgroups(AttentionConformance):
    backend = _Warpgroups()
    quick = True


@pytest.mark.usefixtures("_lists")
class TestLists(AttentionConformance):
    backend = _Listing()
    quick = True
