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
