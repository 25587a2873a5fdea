"""Running programs: compiled, loaded, and launched through the driver on torch's current stream."""

from __future__ import annotations

import ctypes
import struct
import threading
from typing import Any

import torch

from adasplash_core.device import device_info
from adasplash_cupy import driver, params
from adasplash_cupy.binaries import compiled
from adasplash_cupy.instances import Instance
from adasplash_cupy.program import Address, Program, Table
from adasplash_cupy.tensor_maps import ALIGNMENT, BYTES, Encoder

_functions: dict[tuple[Instance, int], ctypes.c_void_p] = {}
_loading = threading.Lock()


def prepare(program: Program, table: Table, device: torch.device) -> DriverRun:
    """What launches a program on a device; compiles and loads what this process has not used there.

    Raises
    ------
    CompileError, DriverError: where a kernel does not compile, or asks for more than the device has.
    """
    index = current_device() if device.index is None else device.index
    with torch.cuda.device(index):
        return DriverRun(program, functions([step.instance for step in program.steps], index), tuple(table), index)


def functions(instances: list[Instance], index: int) -> list[ctypes.c_void_p]:
    """Handles of kernels on the current device, whose number is ``index``."""
    missing = [instance for instance in dict.fromkeys(instances) if (instance, index) not in _functions]
    if missing:
        with _loading:
            missing = [instance for instance in missing if (instance, index) not in _functions]
            capability = device_info(torch.device("cuda", index)).capability
            assert capability is not None
            binaries = compiled(missing, index, capability)
            driver.enter_context(index)
            for instance, binary in zip(missing, binaries, strict=True):
                _functions[(instance, index)] = driver.load(binary.content, binary.symbol, instance.shared_bytes)
    return [_functions[(instance, index)] for instance in instances]


class DriverRun:
    """One ``cuLaunchKernel`` a step, with everything but addresses prepared.

    The driver copies parameters before it returns, so they are written where the last call's were. Threads do not share that memory:
    each call takes a :class:`_Frame` that no other uses at the time.
    """

    def __init__(self, program: Program, handles: list[ctypes.c_void_p], roles: tuple[str, ...], index: int) -> None:
        self.index = index
        self.content = params.pack({name: 0 if isinstance(x, Address) else x for name, x in program.values.items()})
        places = {role: i for i, role in enumerate(roles)}
        null = (len(roles), 0)
        addresses = [program.values.get(name) for name in params.pointers()]
        self.slots = [(places[x.role], x.offset) if isinstance(x, Address) else null for x in addresses]
        self.pack = struct.Struct(f"@{len(self.slots)}P").pack_into
        self.zeroed: tuple[int, int, ctypes.c_size_t] | None = None
        if program.zeroed is not None:
            (role, offset), words = program.zeroed
            self.zeroed = (places[role], offset, ctypes.c_size_t(words))
        self.encoders = [(places[role], Encoder(of, index)) for step in program.steps for role, of in step.maps]
        self.steps = [
            (handle, *step.blocks, step.instance.threads, 1, 1, step.instance.shared_bytes + step.more_shared_bytes)
            for handle, step in zip(handles, program.steps, strict=True)
        ]
        self.maps = [len(step.maps) for step in program.steps]
        self.spare: list[_Frame] = []
        self.launch = driver.library().cuLaunchKernel
        self.fill = driver.library().cuMemsetD32Async

    def __call__(self, table: Table) -> None:
        if self.index != current_device():
            with torch.cuda.device(self.index):
                return self(table)
        bases = [x.data_ptr() for x in table.values()]
        bases.append(0)
        try:
            frame = self.spare.pop()
        except IndexError:
            frame = _Frame(self)
        self.pack(frame.memory, frame.params, *[bases[place] + offset for place, offset in self.slots])
        if self.encoders:
            frame.encode(self.encoders, bases)
        stream = ctypes.c_void_p(current_stream(self.index))
        if self.zeroed is not None:
            place, offset, words = self.zeroed
            zeroed = ctypes.c_void_p(bases[place] + offset)
            if status := self.fill(zeroed, 0, words, stream):
                driver.failed(status, self.index)
                if status := self.fill(zeroed, 0, words, stream):
                    raise driver.DriverError("zero the workspace", status)
        launch = self.launch
        for step, pointers in frame.launches:
            if status := launch(*step, stream, pointers, None):
                driver.failed(status, self.index)
                if status := launch(*step, stream, pointers, None):
                    raise driver.DriverError("launch a kernel", status)
        self.spare.append(frame)
        return None


class _Frame:
    """Parameters of one call at a time: tensor maps, then ``Params``, and for each launch the array of their addresses."""

    def __init__(self, run: DriverRun) -> None:
        size = len(run.encoders) * BYTES
        self.memory = ctypes.create_string_buffer(ALIGNMENT + size + len(run.content))
        start = ctypes.addressof(self.memory)
        first = -start % ALIGNMENT
        self.params = first + size
        ctypes.memmove(start + self.params, run.content, len(run.content))
        self.places = [start + first + i * BYTES for i in range(len(run.encoders))]
        self.encoded = [0] * len(run.encoders)  # addresses, of the maps as they are
        maps = iter(self.places)
        self.launches: list[tuple[tuple[Any, ...], Any]] = []
        for step, count in zip(run.steps, run.maps, strict=True):
            pointers = (start + self.params, *(next(maps) for _ in range(count)))
            self.launches.append((step, (ctypes.c_void_p * len(pointers))(*pointers)))

    def encode(self, encoders: list[tuple[int, Encoder]], bases: list[int]) -> None:
        """Again, where a tensor lies elsewhere than in the last call."""
        for i, (place, encoder) in enumerate(encoders):
            if self.encoded[i] != bases[place]:
                self.encoded[i] = 0
                encoder(self.places[i], bases[place])
                self.encoded[i] = bases[place]


def current_device() -> int:
    """Index of the calling thread's device; CUDA must have been initialised (as by any tensor there)."""
    return torch._C._cuda_getDevice()


def current_stream(device: int) -> int:
    """Handle of the calling thread's current stream on a device."""
    return torch._C._cuda_getCurrentRawStream(device)
