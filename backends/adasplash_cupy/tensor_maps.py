"""Tensor maps: how Hopper's copy engine is told where tiles of a tensor lie. The driver encodes them, asked on first use only."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from adasplash_cupy import driver

BYTES = 128
ALIGNMENT = 64
"""Of the encoded map in memory."""
_COLUMNS, _ROWS = 64, 128  # of a tile: rows of 128 bytes, which are swizzled as the tensor cores read them
_MOST_BYTES = 1 << 40  # that a stride may have
_DTYPES = {torch.float16: 6, torch.bfloat16: 9}  # CU_TENSOR_MAP_DATA_TYPE_...
_SWIZZLE_128B, _PROMOTE_256B = 3, 3


@dataclass(frozen=True, slots=True)
class TensorMap:
    """A (batch, heads, length, columns) tensor of 16-bit elements and contiguous rows, read in tiles of 128 rows and 64 columns."""

    address: int
    dtype: torch.dtype
    lengths: tuple[int, int, int, int]  # columns, length, heads, batch
    strides: tuple[int, int, int]  # bytes from a row, a head, a sequence to the next
    columns: int = _COLUMNS
    rows: int = _ROWS


def tensor_map(x: torch.Tensor) -> TensorMap | None:
    """The map of a 4-d tensor; None where the copy engine cannot read it."""
    batch, heads, length, columns = x.shape
    size = x.element_size()
    if x.dtype not in _DTYPES or x.stride(3) != 1 or x.data_ptr() % 16 or 0 in x.shape:
        return None
    strides: list[int] = []
    for i in (2, 1, 0):
        # The stride of a dimension of length 1 is never used, but must look like one.
        packed = strides[-1] * x.shape[i + 1] if strides else columns * size
        strides.append(x.stride(i) * size if x.shape[i] > 1 else packed)
    if any(stride <= 0 or stride % 16 or stride >= _MOST_BYTES for stride in strides):
        return None
    return TensorMap(x.data_ptr(), x.dtype, (columns, length, heads, batch), (strides[0], strides[1], strides[2]))


@cache
def reason_against() -> str | None:
    """Why this machine cannot encode tensor maps; None where it can."""
    try:
        _driver()
    except (OSError, AttributeError) as error:
        return f"the driver has no cuTensorMapEncodeTiled ({error})"
    return None


class Encoder:
    """Writes maps of tensors on one device that differ in their address alone."""

    def __init__(self, of: TensorMap, index: int) -> None:
        self.of, self.index = of, index
        self.before = (_DTYPES[of.dtype], len(of.lengths))
        self.after = (
            (ctypes.c_uint64 * 4)(*of.lengths),
            (ctypes.c_uint64 * 3)(*of.strides),
            (ctypes.c_uint32 * 4)(of.columns, of.rows, 1, 1),
            (ctypes.c_uint32 * 4)(1, 1, 1, 1),
            0,  # no interleaving
            _SWIZZLE_128B,
            _PROMOTE_256B,
            0,  # zeros outside
        )

    def __call__(self, to: int, address: int) -> None:
        """Write the map's bytes to ``to``, a multiple of ALIGNMENT.

        Raises
        ------
        RuntimeError: if the driver refuses, which says that :func:`tensor_map` accepts what it should not.
        """
        status = _driver()(to, *self.before, address, *self.after)
        if status == driver.INVALID_CONTEXT:  # a thread that has not used the device yet
            driver.enter_context(self.index)
            status = _driver()(to, *self.before, address, *self.after)
        if status:
            raise RuntimeError(f"cuTensorMapEncodeTiled refuses {self.of} with error {status}")


def encode(of: TensorMap, index: int) -> bytes:
    """The map's bytes, as kernels on the device of this number take them.

    Raises
    ------
    RuntimeError: as :class:`Encoder`.
    """
    memory = ctypes.create_string_buffer(BYTES + ALIGNMENT)
    start = -ctypes.addressof(memory) % ALIGNMENT
    Encoder(of, index)(ctypes.addressof(memory) + start, of.address)
    return memory.raw[start : start + BYTES]


@cache
def _driver() -> Callable[..., int]:
    library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    function = library.cuTensorMapEncodeTiled
    pointer, integer = ctypes.c_void_p, ctypes.c_uint32
    function.argtypes = [pointer, integer, integer, pointer, *[pointer] * 4, *[integer] * 4]
    function.restype = ctypes.c_int
    return function
