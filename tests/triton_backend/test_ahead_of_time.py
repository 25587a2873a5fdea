"""Kernels compile for GPUs that are not here, within the shared memory that those have."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from adasplash_core.call import make_call
from adasplash_core.device import DeviceInfo
from adasplash_triton import aot, configs, replay
from adasplash_triton.backend import TritonBackend
from tests.triton_backend.machine_code import products_fused_into_exchanges

BACKEND = TritonBackend()
MOST_STACK = 1536
"""Bytes a thread: the dense pass is held to 128 registers so that four programs share a multiprocessor, and parks what its inner loop
does not use."""


def launches(
    target: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    dim: int = 64,
    length: int = 1024,
    tf32: bool = False,
    **arguments: object,
) -> list[aot.Launch]:
    query, key, value = (torch.zeros(1, 2, length, dim, dtype=dtype) for _ in range(3))
    call = make_call(query, key, value, **arguments)  # type: ignore[arg-type]
    call.spec = dataclasses.replace(call.spec, tf32=tf32)
    major, minor = divmod(int(target[3:]), 10) if target.startswith("sm_") else (9, 4)
    device = DeviceInfo("cuda", target, capability=(major, minor), multiprocessors=100, shared_memory=aot.SHARED_MEMORY[target])
    chosen = [BACKEND.default_config(call.spec, device, pass_) for pass_ in ("forward", "backward")]
    forward, backward = (dataclasses.replace(call, config=config) for config in chosen)
    return aot.launches_of(forward, backward, configs.precision_of(call.spec, device))


def check(target: str, recorded: list[aot.Launch], most_stack: int | None = MOST_STACK) -> None:
    for launch in recorded:
        resources = aot.compile_launch(launch, target)
        assert resources.shared <= aot.SHARED_MEMORY[target], resources
        assert replay.is_plain(aot.compiled(launch, target)) or target == "gfx942"
        assert most_stack is None or resources.stack <= most_stack, resources
        if target.startswith("sm_"):
            assert products_fused_into_exchanges(aot.compiled(launch, target).asm["cubin"]) == 0, resources


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_causal_bfloat16(target: str) -> None:
    recorded = launches(target, is_causal=True)
    names = {launch.kernel.__name__ for launch in recorded}
    forward = {"key_max_kernel", "forward_select_kernel", "forward_lists_kernel", "forward_dense_kernel"}
    assert names == forward | {"backward_rows_kernel", "backward_keys_kernel"}
    check(target, recorded)


def test_short_sequences() -> None:
    check("sm_90", launches("sm_90", length=512)[:1])


def test_wide_heads_on_a_small_gpu() -> None:
    check("sm_86", launches("sm_86", dim=256), most_stack=None)


def test_float32_on_a_small_gpu() -> None:
    check("sm_86", launches("sm_86", dim=128, dtype=torch.float32), most_stack=None)


@pytest.mark.parametrize(("dtype", "dim"), [(torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float32, 32)])
def test_the_longest_short_sequences_on_a_small_gpu(dtype: torch.dtype, dim: int) -> None:
    length = configs.short_length(dim, dim, dtype.itemsize)
    (forward, *_) = launches("sm_86", length=length, dim=dim, dtype=dtype)
    assert forward.kernel.__name__ == "forward_short_kernel"
    check("sm_86", [forward], most_stack=None)


@pytest.mark.parametrize(
    ("target", "dim", "length", "passes"),
    [  # each pass with each target and each head dim: a compilation takes seconds
        ("sm_80", 64, 1024, ("forward",)),
        ("sm_80", 128, 1024, ("backward",)),
        ("sm_90", 128, 1024, ("forward",)),
        ("sm_90", 64, 256, ("forward", "backward")),
    ],
)
def test_tf32(target: str, dim: int, length: int, passes: tuple[str, ...]) -> None:
    """Within the spills of products without tensor cores; operands go in as they are, so that all passes drop the same bits."""
    recorded = launches(target, dim=dim, length=length, dtype=torch.float32, tf32=True, is_causal=True)
    of_backward = [launch for launch in recorded if launch.kernel.__name__.startswith("backward")]
    of_forward = [launch for launch in recorded if launch not in of_backward]
    chosen = of_forward * ("forward" in passes) + of_backward * ("backward" in passes)
    assert chosen
    check(target, chosen, most_stack=608)
    for launch in chosen:
        ptx = aot.compiled(launch, target).asm["ptx"]
        assert ("f32.tf32.tf32" in ptx) == (launch.kernel.__name__ != "key_max_kernel")
        assert re.search(r"cvt\.\S*tf32", ptx) is None
