"""What is handed to CuPy: with a stand-in for it, since nothing here can launch."""

from __future__ import annotations

import struct
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from adasplash_core.errors import ConfigRejectedError
from adasplash_cupy import nvrtc, params, runner
from adasplash_cupy.configs import ForwardConfig
from adasplash_cupy.instances import Instance, MarkInstance
from adasplash_cupy.tensor_maps import tensor_map


class CompileException(Exception):  # noqa: N818 (CuPy names it so)
    pass


class CUDADriverError(Exception):
    pass


class FakeKernel:
    def __init__(self, log: list[Any], expression: str) -> None:
        self.log, self.expression, self.max_dynamic_shared_size_bytes = log, expression, 0

    def __call__(self, grid: Any, block: Any, args: tuple[Any, ...], *, shared_mem: int) -> None:
        contents = [bytes(argument.tobytes()) for argument in args]
        self.log.append(("launch", self.expression, grid, block, contents[0], shared_mem, *contents[1:]))


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """What was asked of CuPy, in order."""
    asked: list[Any] = []

    class RawModule:
        def __init__(
            self, *, code: str = "", options: tuple[str, ...] = (), name_expressions: Any = None, path: str = ""
        ) -> None:
            asked.append(("load", path) if path else ("compile", options, name_expressions))

        def get_function(self, expression: str) -> FakeKernel:
            if "float, 256" in expression:
                raise CompileException("too wide")
            return FakeKernel(asked, expression)

    @contextmanager
    def device(index: int) -> Iterator[None]:
        asked.append(("device", index))
        yield

    @contextmanager
    def stream(owner: Any) -> Iterator[None]:
        asked.append(("stream", *owner.__cuda_stream__()))
        yield

    compiler = types.SimpleNamespace(CompileException=CompileException)
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cache"))
    driver = types.SimpleNamespace(CUDADriverError=CUDADriverError)
    cuda = types.SimpleNamespace(
        Device=device, Stream=types.SimpleNamespace(from_external=stream), compiler=compiler, driver=driver
    )
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(RawModule=RawModule, cuda=cuda))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _index: types.SimpleNamespace(cuda_stream=4242))
    monkeypatch.setattr(torch.cuda, "device", lambda _index: device(-1))
    monkeypatch.setattr(runner, "_kernels", {})
    return asked


def test_a_kernel_is_compiled_once_and_launched_on_torchs_stream(log: list[Any]) -> None:
    instance = Instance("forward_dense", "float16", 64, 64, 15, 64, 2, 1)
    for _ in range(2):
        with runner.launching("cupy", ForwardConfig(), torch.device("cuda", 3)) as launch:
            launch(instance, (7,), {"q_len": 5, "scale": 0.5})
    assert [entry[0] for entry in log].count("compile") == 1
    assert ("stream", 0, 4242) in log
    assert ("device", 3) in log
    _, expression, grid, block, content, shared = log[-1]
    assert expression == "forward_dense<Shape<half_t, 64, 64, 15, 64, 2, 1>>"
    assert (grid, block, shared) == ((7, 1, 1), (128, 1, 1), instance.shared_bytes)
    assert len(content) == params.size()
    assert struct.pack("i", 5) in content
    assert struct.pack("f", 0.5) in content


def test_large_shared_memory_is_asked_for(log: list[Any]) -> None:
    wide = Instance("forward_dense", "float16", 256, 256, 15, 32, 2, 1)
    with runner.launching("cupy", ForwardConfig(), torch.device("cuda", 0)) as launch:
        launch(wide, (1,), {})
    assert runner._kernels[(wide, 0)].max_dynamic_shared_size_bytes == wide.shared_bytes > 48 * 1024


def test_parameters_are_packed_once_a_call(log: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[Any] = []
    monkeypatch.setattr(runner, "pack", lambda values: packed.append(values) or params.pack(values))
    for _ in range(2):
        with runner.launching("cupy", ForwardConfig(), torch.device("cuda", 0)) as launch:
            for kernel in ("forward_lists", "forward_dense"):
                launch(Instance(kernel, "float16"), (1,), {"q_len": 9})
    assert len(packed) == 2
    assert {entry[4] for entry in log if entry[0] == "launch"} == {params.pack({"q_len": 9})}


def test_each_device_has_its_own_kernel(log: list[Any]) -> None:
    for index in (0, 1):
        with runner.launching("cupy", ForwardConfig(), torch.device("cuda", index)) as launch:
            launch(Instance("key_max", "float16"), (1, 1), {})
    assert [entry[0] for entry in log].count("compile") == 2


def test_what_does_not_compile_rejects_the_config(log: list[Any]) -> None:
    config = ForwardConfig()
    with (
        pytest.raises(ConfigRejectedError, match="too wide") as raised,
        runner.launching("cupy", config, torch.device("cuda", 0)) as launch,
    ):
        launch(Instance("forward_dense", "float32", 256, 256), (1,), {})
    assert raised.value.config is config


@pytest.mark.skipif(not nvrtc.is_available(), reason="NVRTC is not installed: pip install nvidia-cuda-nvrtc")
def test_what_is_written_for_one_architecture_is_compiled_for_it_and_kept(
    log: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    compile_instance = nvrtc.compile_instance
    monkeypatch.setattr(nvrtc, "compile_instance", lambda *a: compiled.append(a[1]) or compile_instance(*a))
    monkeypatch.setattr(runner, "encode", lambda of: of.address.to_bytes(128, "little"))
    of = tensor_map(torch.zeros(1, 1, 128, 64, dtype=torch.float16))
    assert of is not None
    instance = MarkInstance(dtype="float16", head_dim=64, stages=4)
    for _ in range(2):  # as two processes
        runner._kernels.clear()
        with runner.launching("cupy", ForwardConfig(), torch.device("cuda", 0)) as launch:
            launch(instance, (9,), {"q_len": 5}, maps=(of, of))
    assert compiled == ["sm_90a"]
    (_, path), (_, same_path) = [entry for entry in log if entry[0] == "load"]
    assert path == same_path
    assert Path(path).read_bytes().startswith(b"\x7fELF")
    _, symbol, grid, block, content, shared, *maps = log[-1]
    assert symbol.startswith("_Z12forward_mark")
    assert symbol.encode() in Path(path).read_bytes()
    assert (grid, block, shared) == ((9, 1, 1), (384, 1, 1), instance.shared_bytes)
    assert len(content) == params.size()
    assert maps == [of.address.to_bytes(128, "little")] * 2
