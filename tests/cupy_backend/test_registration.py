"""What the backend declares, that declaring costs nothing, and why it says that it cannot run."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from adasplash_core.backend import AttentionBackend
from adasplash_core.device import DeviceInfo
from adasplash_core.spec import AttentionSpec
from adasplash_cupy import configs, requirements
from adasplash_cupy.backend import CupyBackend
from adasplash_cupy.plugin import adasplash_register_backends
from adasplash_triton.backend import TritonBackend

SPEC = AttentionSpec("cuda", "bfloat16", 8, 2, 64, 64, causal=True)
H100 = DeviceInfo("cuda", "H100", capability=(9, 0), multiprocessors=132, shared_memory=227 * 1024)
RTX = DeviceInfo("cuda", "RTX", capability=(8, 6), shared_memory=99 * 1024)
T4 = DeviceInfo("cuda", "T4", capability=(7, 5), shared_memory=64 * 1024)


def test_plugin_registers_one_backend() -> None:
    found: list[AttentionBackend] = []
    adasplash_register_backends(found.append)
    assert [backend.name for backend in found] == ["cupy"]


def test_registering_imports_neither_torch_nor_cupy() -> None:
    code = "import sys, adasplash_cupy.plugin; print([m for m in ('torch', 'cupy', 'numpy') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_triton_goes_first_and_the_reference_last() -> None:
    assert 0 < CupyBackend.priority < TritonBackend.priority


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[str]]:
    """Reasons on a machine with the given distributions, driver and NVRTC; nothing of CuPy is imported."""

    def reasons(*distributions: str, driver: tuple[int, int] | None, nvrtc: bool = True, module: bool = True) -> list[str]:
        for function in (requirements.cupy_major, requirements.rocm_distribution, requirements.nvrtc_library):
            function.cache_clear()
        folder = tmp_path / "site"
        (folder / "cupy").mkdir(parents=True)
        (folder / "cupy" / "__init__.py").write_text("raise AssertionError('cupy was imported')")
        if not module:
            (folder / "cupy" / "__init__.py").unlink()
            (folder / "cupy").rmdir()
        libraries = folder / "nvidia" / "cu13" / "lib"
        libraries.mkdir(parents=True)
        if nvrtc:
            (libraries / "libnvrtc.so.13").touch()
            (libraries / "libnvrtc.so.12").touch()

        def version(name: str) -> str:
            if name in distributions:
                return "14.2.0"
            raise metadata.PackageNotFoundError(name)

        path = [str(folder), *(p for p in sys.path if not (Path(p) / "cupy").exists() and not (Path(p) / "nvidia").exists())]
        monkeypatch.setattr(sys, "path", path)
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setattr(
            requirements, "metadata", type("Metadata", (), {**vars(metadata), "version": staticmethod(version)})
        )
        monkeypatch.setattr(requirements, "driver_version", lambda: driver)
        monkeypatch.setattr(requirements, "_torch_sees_cuda", lambda: True)
        monkeypatch.setattr(requirements, "_library_folders", lambda: iter([libraries]))
        monkeypatch.setattr(requirements.ctypes.util, "find_library", lambda _name: None)
        return CupyBackend().unavailable_reasons()

    yield reasons
    for function in (requirements.cupy_major, requirements.rocm_distribution, requirements.nvrtc_library):
        function.cache_clear()


def test_nothing_is_missing_where_all_is_there(machine: Callable[..., list[str]]) -> None:
    assert machine("cupy-cuda13x", driver=(13, 0)) == []


def test_a_newer_driver_runs_an_older_cupy(machine: Callable[..., list[str]]) -> None:
    assert machine("cupy-cuda12x", driver=(13, 0)) == []


def test_without_cupy(machine: Callable[..., list[str]]) -> None:
    (reason,) = machine(driver=(13, 0), module=False)
    assert "cupy is not installed" in reason
    assert 'pip install "adasplash-core[cupy]"' in reason


def test_without_a_driver(machine: Callable[..., list[str]]) -> None:
    assert machine("cupy-cuda13x", driver=None) == ["there is no NVIDIA driver on this machine"]


def test_built_for_a_newer_cuda_than_the_driver(machine: Callable[..., list[str]]) -> None:
    (reason,) = machine("cupy-cuda13x", driver=(12, 8))
    assert "cupy-cuda13x is built for CUDA 13, the driver supports up to 12.8" in reason
    assert "install cupy-cuda12x" in reason


def test_built_for_amd(machine: Callable[..., list[str]]) -> None:
    (reason,) = machine("amd-cupy", driver=None)
    assert "built for AMD GPUs" in reason


def test_without_nvrtc(machine: Callable[..., list[str]]) -> None:
    (reason,) = machine("cupy-cuda12x", driver=(12, 8), nvrtc=False)
    assert "NVRTC" in reason
    assert "nvidia-cuda-nvrtc-cu12" in reason


def test_several_reasons_are_all_told(machine: Callable[..., list[str]]) -> None:
    assert len(machine("cupy-cuda13x", driver=(12, 8), nvrtc=False)) == 2


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
def test_reasons_are_sentences(changes: dict[str, Any], words: str) -> None:
    reasons = CupyBackend().not_supported_reasons(dataclasses.replace(SPEC, **changes), H100)
    assert any(words in reason for reason in reasons)


def device_reasons(device: DeviceInfo, **changes: Any) -> list[str]:
    """What is said against a device, leaving out what this machine lacks."""
    backend = CupyBackend()
    missing = backend.unavailable_reasons()
    return [r for r in backend.not_supported_reasons(dataclasses.replace(SPEC, **changes), device) if r not in missing]


def test_turing_takes_half_precision_but_not_bfloat16() -> None:
    assert device_reasons(T4, dtype="float16") == []
    assert device_reasons(T4) == ["bfloat16 needs compute capability 8.0, T4 has 7.5"]


def test_older_gpus_are_refused() -> None:
    volta = DeviceInfo("cuda", "V100", capability=(7, 0), shared_memory=96 * 1024)
    assert device_reasons(volta, dtype="float16") == ["V100 has compute capability 7.0, 7.5 is needed"]


def test_the_widest_heads_need_a_large_gpu() -> None:
    (reason,) = device_reasons(RTX, dtype="float32", head_dim=256, head_dim_v=256)
    assert "needs more shared memory than RTX has" in reason
    assert device_reasons(H100, dtype="float32", head_dim=256, head_dim_v=256) == []


@pytest.mark.parametrize("device", [H100, RTX])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
def test_spaces_hold_distinct_configs_that_fit_and_round_trip(dtype: str, head_dim: int, device: DeviceInfo) -> None:
    backend, spec = CupyBackend(), AttentionSpec("cuda", dtype, 8, 8, head_dim, head_dim)
    if not configs.fits(spec, device):
        assert (dtype, head_dim, device) == ("float32", 256, RTX)
        return
    for pass_, instances in (("forward", configs.forward_instances), ("backward", configs.backward_instances)):
        space = list(backend.tuning_space(spec, device, pass_))
        assert len(space) == len(set(space)) >= 1
        for config in [backend.default_config(spec, device, pass_), *space]:
            assert backend.config_class(pass_).from_mapping(config.to_dict()) == config
            used = [instance.shared_bytes for instance in instances(spec, config).values()]  # type: ignore[operator]
            assert max(used) <= device.shared_memory


def test_configs_are_told_even_for_what_is_refused() -> None:
    """A tuner or a benchmark may ask before it looks at the reasons."""
    refused = dataclasses.replace(SPEC, dtype="float64", head_dim=300, head_dim_v=20)
    for pass_ in ("forward", "backward"):
        assert isinstance(CupyBackend().default_config(refused, RTX, pass_), CupyBackend().config_class(pass_))


def test_small_gpus_get_smaller_tiles() -> None:
    wide = dataclasses.replace(SPEC, dtype="float32", head_dim=128, head_dim_v=128)
    small, large = (configs.default_backward(wide, device) for device in (RTX, H100))
    assert (small.keys, small.stages, small.rows) < (large.keys, large.stages, large.rows)
