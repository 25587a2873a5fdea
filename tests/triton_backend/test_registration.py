"""What the backend declares, and that declaring costs nothing."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from adasplash_core.backend import AttentionBackend
from adasplash_core.device import DeviceInfo
from adasplash_core.spec import AttentionSpec
from adasplash_triton import configs
from adasplash_triton.backend import TritonBackend
from adasplash_triton.plugin import adasplash_register_backends

SPEC = AttentionSpec("cuda", "bfloat16", 8, 2, 64, 64, causal=True)
H100 = DeviceInfo("cuda", "H100", capability=(9, 0), multiprocessors=132, shared_memory=227 * 1024)


def test_plugin_registers_one_backend() -> None:
    found: list[AttentionBackend] = []
    adasplash_register_backends(found.append)
    assert [backend.name for backend in found] == ["triton"]


def test_registering_imports_neither_torch_nor_triton() -> None:
    code = "import sys, adasplash_triton.plugin; print([m for m in ('torch', 'triton') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"device_type": "cpu"}, "device cpu"),
        ({"dtype": "float64"}, "dtype float64"),
        ({"head_dim": 20}, "head dim 20"),
        ({"head_dim": 264, "head_dim_v": 264}, "head dim 264"),
        ({"mask": "additive"}, "additive masks not supported"),
    ],
)
def test_reasons_are_sentences(changes: dict[str, object], words: str) -> None:
    reasons = TritonBackend().not_supported_reasons(dataclasses.replace(SPEC, **changes), H100)  # type: ignore[arg-type]
    assert any(words in reason for reason in reasons)


def test_old_gpus_are_refused() -> None:
    turing = DeviceInfo("cuda", "T4", capability=(7, 5))
    assert any("7.5" in reason for reason in TritonBackend().not_supported_reasons(SPEC, turing))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
def test_spaces_hold_distinct_configs_that_round_trip(dtype: str, head_dim: int) -> None:
    backend, spec = TritonBackend(), AttentionSpec("cuda", dtype, 8, 8, head_dim, head_dim)
    for pass_ in ("forward", "backward"):
        space = list(backend.tuning_space(spec, H100, pass_))
        assert len(space) > 3
        for config in space:
            assert backend.config_class(pass_).from_mapping(config.to_dict()) == config


def test_the_widest_float32_backward_is_refused_where_it_does_not_fit() -> None:
    a100 = DeviceInfo("cuda", "A100", capability=(8, 0), shared_memory=163 * 1024)
    spec = AttentionSpec("cuda", "float32", 8, 8, 256, 256)
    training = dataclasses.replace(spec, needs_grad=True)
    assert configs.fits(spec, a100)
    assert configs.fits(training, H100)
    assert any("shared memory" in reason for reason in TritonBackend().not_supported_reasons(training, a100))


def test_small_gpus_get_fewer_stages() -> None:
    small = DeviceInfo("cuda", "RTX", capability=(8, 6), shared_memory=99 * 1024)
    assert configs.default_forward(SPEC, small).select_stages < configs.default_forward(SPEC, H100).select_stages


B200 = dataclasses.replace(H100, name="B200", capability=(10, 0), multiprocessors=148)


def wide(head_dim: int, dtype: str = "bfloat16", *, tf32: bool = False) -> AttentionSpec:
    return AttentionSpec("cuda", dtype, 8, 8, head_dim, head_dim, needs_grad=True, tf32=tf32)


@pytest.mark.parametrize("device", [H100, B200], ids=lambda device: device.name)
def test_no_candidate_has_sums_that_fill_the_registers_alone(device: DeviceInfo) -> None:
    """dS K and U K of 64 rows: 128 registers a thread each over 4 warps and 256 columns."""
    warps = {dim: {c.num_warps for c in configs.backward_space(wide(dim), device)} for dim in (64, 128, 192, 256)}
    assert warps == {64: {4, 8}, 128: {4, 8}, 192: {8}, 256: {8}}


@pytest.mark.parametrize(
    ("head_dim", "tile", "stages", "rows_kernel", "keys_kernel"),
    [
        (32, 128, 3, 66048, 75824),
        (64, 32, 3, 46080, 46592),
        (64, 64, 2, 58432, 66368),
        (64, 128, 3, 132096, 116288),
        (128, 32, 2, 74816, 54016),
        (128, 64, 3, 148480, 149056),
        (128, 128, 3, 263168, 198208),
    ],
)
def test_blackwells_shared_memory_is_estimated_from_above(
    head_dim: int, tile: int, stages: int, rows_kernel: int, keys_kernel: int
) -> None:
    """Against what Triton 3.9 asks for on compute capability 10.0, in bytes; at most half too much."""
    config = configs.BackwardConfig(block_k=16, block_d=tile, block_n=tile, num_stages=stages)
    needed = max(rows_kernel, keys_kernel)
    assert needed <= configs._backward_shared(config, wide(head_dim), B200) <= 1.5 * needed
    assert configs._backward_shared(config, wide(head_dim), H100) < configs._backward_shared(config, wide(head_dim), B200)


def test_what_fits_hopper_alone_is_no_candidate_on_blackwell() -> None:
    hopper, blackwell = (set(configs.backward_space(wide(128), device)) for device in (H100, B200))
    assert {(c.block_d, c.num_stages) for c in hopper - blackwell} == {(128, 3)}
    assert blackwell < hopper
    for tf32 in (False, True):  # the rule is fitted to half precision
        single = wide(64, "float32", tf32=tf32)
        assert set(configs.backward_space(single, B200)) == set(configs.backward_space(single, H100))
