"""The transform's kernels compile for GPUs that are not here, without spilling, and a length is no compile-time constant."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from adasplash_core.device import DeviceInfo
from adasplash_triton import aot, aot_transform
from adasplash_triton.backend import TritonBackend
from tests.triton_backend.machine_code import products_fused_into_exchanges


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


@pytest.mark.parametrize("n", [2, 7, 64])
def test_threads_of_a_row_agree_on_its_sums(n: int) -> None:
    for launch in aot_transform.launches_of(n, torch.float32, "1.5"):
        assert products_fused_into_exchanges(aot.compiled(launch, "sm_90").asm["cubin"]) == 0


def test_they_would_not_with_fused_multiply_adds() -> None:
    forward = aot_transform.launches_of(7, torch.float32, "1.5")[0]
    fused = dataclasses.replace(forward, options=forward.options | {"enable_fp_fusion": True})
    assert products_fused_into_exchanges(aot.compiled(fused, "sm_90").asm["cubin"]) > 0


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
