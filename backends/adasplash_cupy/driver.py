"""The CUDA driver through ctypes: loading what was compiled, and launching it with as little work on the host as Python allows.

CuPy's own launch spends some 20 us on packing arguments and on finding the current device and stream; ``cuLaunchKernel`` takes one call
with everything prepared. The driver's interface is stable, and torch and CuPy share its primary contexts.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from functools import cache
from typing import Any

INVALID_CONTEXT = 201
_REJECTED = {
    1: "a value that the device does not take",
    200: "not an image for this device",
    209: "no kernel for this device",
    218: "PTX that the driver does not compile",
    222: "PTX that is newer than the driver",
    701: "more registers or shared memory than the device has",
}
"""Errors that say that a kernel cannot run on this device, and not that something else went wrong."""
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_FREE_SHARED_BYTES = 48 * 1024  # more must be asked for

_contexts: dict[int, ctypes.c_void_p] = {}
_retaining = threading.Lock()


class DriverError(RuntimeError):
    """What the driver refused to do. ``rejects``: because the kernel cannot run on this device."""

    def __init__(self, doing: str, code: int) -> None:
        self.rejects = code in _REJECTED
        hint = f", {_REJECTED[code]}" if self.rejects else ""
        super().__init__(f"CUDA refused to {doing}: {error_name(code)}{hint}")


@cache
def library() -> Any:
    """The driver's library. Calls release the interpreter's lock: a launch may wait for a full queue.

    Raises
    ------
    OSError: where there is no driver.
    """
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def load(binary: bytes, symbol: str, shared_bytes: int) -> ctypes.c_void_p:
    """A kernel of a cubin or a PTX text, in the calling thread's context and for as long as the process lives.

    ``shared_bytes``: most dynamic shared memory that launches will ask for.

    Raises
    ------
    DriverError: if the device does not take it.
    """
    cuda, module, function = library(), ctypes.c_void_p(), ctypes.c_void_p()
    _check(f"load {symbol}", cuda.cuModuleLoadData(ctypes.byref(module), binary + b"\0"))  # PTX is a C string
    _check(f"find {symbol}", cuda.cuModuleGetFunction(ctypes.byref(function), module, symbol.encode()))
    if shared_bytes > _FREE_SHARED_BYTES:
        status = cuda.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, shared_bytes)
        _check(f"give {symbol} {shared_bytes} bytes of shared memory", status)
    return function


def enter_context(index: int) -> None:
    """Make a device's primary context the calling thread's.

    Raises
    ------
    DriverError: if the driver has none to give.
    """
    cuda = library()
    with _retaining:
        context = _contexts.get(index)
        if context is None:
            number, context = ctypes.c_int(), ctypes.c_void_p()
            _check("name a device", cuda.cuDeviceGet(ctypes.byref(number), index))
            _check("give a context", cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), number))
            _contexts[index] = context
    _check("enter a context", cuda.cuCtxSetCurrent(context))


def failed(status: int, index: int) -> None:
    """After a launch on a device that the driver answered with ``status``: return if it is worth another try, else raise.

    Raises
    ------
    DriverError: for any error but that the calling thread has not used the device yet.
    """
    if status != INVALID_CONTEXT:
        raise DriverError("launch a kernel", status)
    enter_context(index)


def error_name(code: int) -> str:
    """``CUDA_ERROR_...`` and the number."""
    name = ctypes.c_char_p()
    library().cuGetErrorName(code, ctypes.byref(name))
    return f"{name.value.decode() if name.value else 'unknown error'} ({code})"


def _check(doing: str, status: int) -> None:
    if status:
        raise DriverError(doing, status)
