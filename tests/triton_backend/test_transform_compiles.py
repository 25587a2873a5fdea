"""The transform's kernels compile for GPUs that are not here, without spilling, and a length is no compile-time constant."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adasplash_core.device import DeviceInfo
from adasplash_triton import aot, aot_transform
from adasplash_triton.backend import TritonBackend


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_rows_on_chip_and_in_chunks(target: str) -> None:
    for n in (1000, 100_000):
        for launch in aot_transform.launches_of(n, torch.bfloat16, "1.5"):
            resources = aot.compile_launch(launch, target)
            assert resources.stack <= 16, resources  # a spill would be hundreds
            assert resources.shared <= aot.SHARED_MEMORY[target], resources


@pytest.mark.parametrize(
    ("n", "arguments"),
    [
        (4096, {"alpha_class": "any", "alpha_grad": True}),
        (512, {"alpha_class": "any", "per_row": True, "alpha_grad": True}),
        (512, {"alpha_class": "2", "dim": 0}),
        (16384, {"alpha_class": "1.5"}),
    ],
)
def test_the_largest_tiles_do_not_spill(n: int, arguments: dict[str, Any]) -> None:
    for launch in aot_transform.launches_of(n, torch.float32, **arguments):
        resources = aot.compile_launch(launch, "sm_90")
        assert resources.stack == 0, resources


def test_kernels_follow_a_lengths_power_of_two_alone() -> None:
    for short, long in ((1040, 2000), (33 * 1024, 67 * 1024)):
        pairs = zip(*(aot_transform.launches_of(n, torch.float32, "1.5") for n in (short, long)), strict=True)
        for one, other in pairs:
            constants = [p.name for p in one.kernel.params if p.is_constexpr and p.name != "ENTRIES"]
            assert all(one.arguments[name] == other.arguments[name] for name in constants)


def test_reasons_are_sentences() -> None:
    backend, turing = TritonBackend(), DeviceInfo("cuda", "T4", capability=(7, 5))
    assert any("float64" in reason for reason in backend.transform_not_supported_reasons("cuda", "float64"))
    assert any("device cpu" in reason for reason in backend.transform_not_supported_reasons("cpu", "float32"))
    assert any("7.5" in reason for reason in backend.transform_not_supported_reasons("cuda", "float32", turing))
