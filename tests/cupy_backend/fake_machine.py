"""Stand-ins for NVRTC, CuPy and the driver: they write down what was asked of them."""

from __future__ import annotations

import ctypes
import dataclasses
import struct
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from adasplash_core.device import DeviceInfo
from adasplash_cupy import binaries, driver, launch, params, runner, tensor_maps

DEVICE = torch.device("cuda", 3)
STREAM = 4242
INVALID_VALUE, INVALID_CONTEXT, ILLEGAL_ADDRESS = 1, 201, 700


class CompileException(Exception):  # noqa: N818 (CuPy names it so)
    pass


@dataclasses.dataclass
class Launched:
    symbol: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    stream: int
    fields: dict[str, Any]
    memory: int  # where the parameters lay
    pointers: Any

    def map(self, i: int) -> bytes:
        return ctypes.string_at(self.pointers[i], 128)


class FakeDriver:
    """As much of libcuda as is called, in Python."""

    def __init__(self) -> None:
        self.symbols: list[str] = []
        self.loaded: list[bytes] = []
        self.shared: dict[str, int] = {}
        self.launched: list[Launched] = []
        self.filled: list[tuple[int, int, int, int]] = []
        self.entered: list[int] = []
        self.encoded: list[int] = []
        self.strangers = 0  # calls to come from a thread without a context
        self.answers: list[int] = []  # to the next launches, then 0
        self.during: Callable[[], None] = lambda: None

    def cuModuleLoadData(self, module: Any, content: bytes) -> int:  # noqa: N802
        self.loaded.append(content)
        return 0

    def cuModuleGetFunction(self, function: Any, _module: Any, symbol: bytes) -> int:  # noqa: N802
        self.symbols.append(symbol.decode())
        function._obj.value = len(self.symbols)
        return 0

    def cuFuncSetAttribute(self, function: Any, attribute: int, value: int) -> int:  # noqa: N802
        assert attribute == 8
        self.shared[self.symbols[function.value - 1]] = value
        return INVALID_VALUE if value > 227 * 1024 else 0

    def cuMemsetD32Async(self, to: Any, value: int, words: Any, stream: Any) -> int:  # noqa: N802
        self.filled.append((to.value, value, words.value, stream.value))
        return 0

    def cuLaunchKernel(self, function: Any, *rest: Any) -> int:  # noqa: N802
        *sizes, shared, stream, pointers, extra = rest
        assert extra is None
        if self.answers and (status := self.answers.pop(0)):
            return status
        content = ctypes.string_at(pointers[0], params.size())
        fields = params.fields()
        values = struct.unpack_from("@" + "".join(fields.values()), content)
        named = dict(zip(fields, values, strict=True))
        self.launched.append(
            Launched(
                self.symbols[function.value - 1],
                (*sizes[:3],),
                (*sizes[3:],),
                shared,
                stream.value,
                named,
                pointers[0],
                pointers,
            )
        )
        self.during()
        return 0

    def cuDeviceGet(self, number: Any, index: int) -> int:  # noqa: N802
        number._obj.value = index
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, number: Any) -> int:  # noqa: N802
        context._obj.value = 100 + number.value
        return 0

    def cuCtxSetCurrent(self, context: Any) -> int:  # noqa: N802
        self.entered.append(context.value)
        return 0

    def cuGetErrorName(self, _code: int, name: Any) -> int:  # noqa: N802
        name._obj.value = b"CUDA_ERROR_OF_A_TEST"
        return 0


@dataclasses.dataclass
class Machine:
    """What was asked, in order."""

    driver: FakeDriver
    compiled: list[tuple[str, int]] = dataclasses.field(default_factory=list)  # name expressions, the thread's device
    devices: list[int] = dataclasses.field(default_factory=list)  # that were made current
    compiling: Callable[[str], None] = lambda _expression: None

    def restart(self) -> None:
        """As another process: what is on disk stays."""
        runner._functions.clear()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    machine, current = Machine(FakeDriver()), [DEVICE.index]
    of_thread = threading.local()

    @contextmanager
    def cupy_device(index: int) -> Iterator[None]:
        of_thread.index = index
        yield
        of_thread.index = -1

    @contextmanager
    def torch_device(index: int) -> Iterator[None]:
        before, current[0] = current[0], index
        machine.devices.append(index)
        yield
        current[0] = before

    def compile_using_nvrtc(
        source: str, options: tuple[str, ...], filename: str, name_expressions: tuple[str, ...]
    ) -> tuple[bytes, dict[str, str]]:
        (expression,) = name_expressions
        assert expression.partition("<")[0] in source
        assert filename.endswith(".cu")
        assert "-std=c++17" in options
        machine.compiled.append((expression, of_thread.index))
        machine.compiling(expression)
        if "float, 256" in expression:
            raise CompileException("too wide")
        return b"binary of " + expression.encode(), {expression: f"_Z_{expression}"}

    compiler = types.SimpleNamespace(CompileException=CompileException, compile_using_nvrtc=compile_using_nvrtc)
    cuda = types.ModuleType("cupy.cuda")
    cuda.Device, cuda.compiler = cupy_device, compiler  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=cuda))
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(driver, "library", lambda: machine.driver)
    monkeypatch.setattr(driver, "_contexts", {})
    monkeypatch.setattr(torch.cuda, "device", torch_device)
    monkeypatch.setattr(runner, "current_device", lambda: current[0])
    monkeypatch.setattr(runner, "current_stream", lambda index: STREAM + index)
    monkeypatch.setattr(runner, "device_info", lambda _device: DeviceInfo("cuda", "H100", capability=(9, 0)))
    monkeypatch.setattr(runner, "_functions", {})
    monkeypatch.setattr(binaries, "_refused", {})
    monkeypatch.setattr(launch, "prepare", runner.prepare)

    def encode(to: int, _dtype: int, _rank: int, address: int, *_: Any) -> int:
        if machine.driver.strangers:
            machine.driver.strangers -= 1
            return INVALID_CONTEXT
        machine.driver.encoded.append(address)
        ctypes.memmove(to, address.to_bytes(128, "little"), 128)
        assert to % 64 == 0
        return 0

    monkeypatch.setattr(tensor_maps, "_driver", lambda: encode)
    return machine
