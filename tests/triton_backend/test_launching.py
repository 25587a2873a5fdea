"""What reaches the CUDA driver, seen by a stand-in for it: kernels are compiled for an H100 that need not be here."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from triton import knobs
from triton.runtime.errors import OutOfResources

from adasplash_core.backend import AttentionCall
from adasplash_core.call import make_call
from adasplash_core.device import DeviceInfo
from adasplash_core.errors import ConfigRejectedError
from adasplash_core.programs import Programs
from adasplash_triton import aot, launch, program, replay
from adasplash_triton.backend import TritonBackend
from adasplash_triton.configs import BackwardConfig, ForwardConfig
from adasplash_triton.operands import inputs_of
from adasplash_triton.program import Step, Table
from adasplash_triton.runner import Address, Pointer

BACKEND = TritonBackend()
H100 = DeviceInfo("cuda", "H100", capability=(9, 0), multiprocessors=100, shared_memory=aot.SHARED_MEMORY["sm_90"])
STREAM = 0x5EED00000000
READERS: dict[str, Any] = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}


class Launched:
    """One launch: the kernel's name, its grid, and what its parameters held at the time."""

    def __init__(self, compiled: Any, grid: tuple[int, int, int], parameters: Any) -> None:
        self.name, self.grid = compiled.src.fn.__name__, grid
        named = replay.parameters(compiled.src.signature)
        assert len(parameters) == len(named) + 2
        self.values = {
            name: (ctypes.c_uint64 if kind[0] == "*" else READERS[kind]).from_address(at).value
            for (name, kind), at in zip(named, parameters, strict=False)
        }
        self.scratch = [ctypes.c_uint64.from_address(at).value for at in parameters[-2:]]


class FakeDriver:
    """``libcuda`` as far as launches go. ``errors``: what the next calls of cuLaunchKernel return instead of launching."""

    def __init__(self) -> None:
        self.kernels: dict[int, Any] = {}
        self.launched: list[Launched] = []
        self.by_name: list[str] = []
        self.errors: list[int] = []
        self.contexts: list[str] = []

    def add(self, step: Step, table: Table) -> Any:
        """Instead of Triton's launch path: compile, and give the kernel a handle."""

        def pointer(address: Address) -> Pointer:
            return Pointer(table[address.role].data_ptr() + address.offset, address.dtype)

        compiled = aot.compiled(aot.Launch(step.kernel, step.resolved(pointer), step.options), "sm_90")
        compiled.function = 0x1234567800000000 + len(self.kernels)
        self.kernels[compiled.function] = compiled
        self.by_name.append(step.kernel.__name__)
        return compiled

    def cuLaunchKernel(self, function: Any, *rest: Any) -> int:  # noqa: N802
        if self.errors and (error := self.errors.pop(0)):
            return error
        x, y, z, threads, threads_y, threads_z, shared, stream, parameters, extra = rest
        compiled = self.kernels[function.value]
        assert (threads, threads_y, threads_z) == (32 * compiled.metadata.num_warps, 1, 1)
        assert shared == compiled.metadata.shared
        assert stream.value == STREAM
        assert extra is None
        self.launched.append(Launched(compiled, (x, y, z), parameters))
        return 0

    def cuGetErrorName(self, error: int, name: Any) -> int:  # noqa: N802
        name._obj.value = {1: b"CUDA_ERROR_INVALID_VALUE", 201: b"CUDA_ERROR_INVALID_CONTEXT"}[error]
        return 0

    def __getattr__(self, name: str) -> Callable[..., int]:
        assert name in ("cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent")
        return lambda *_: self.contexts.append(name) or 0  # type: ignore[func-returns-value]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """CPU tensors in the place of a GPU's."""
    fake = FakeDriver()
    monkeypatch.setattr(replay, "driver", lambda: fake)
    monkeypatch.setattr(program, "_launch_by_name", fake.add)
    monkeypatch.setattr(program, "_binaries", {})
    monkeypatch.setattr(program, "current_device", lambda: None)
    monkeypatch.setattr(program, "current_stream", lambda _device: STREAM)
    monkeypatch.setattr(launch, "_multiprocessors", lambda _device: H100.multiprocessors)
    monkeypatch.setattr(launch, "_forwards", Programs())
    monkeypatch.setattr(launch, "_backwards", Programs())
    return fake


def short_call(length: int = 64, **arguments: Any) -> AttentionCall:
    """A call whose forward is one small kernel."""
    tensors = (torch.zeros(1, 2, length, 16, dtype=torch.float16) for _ in range(3))
    return make_call(*tensors, **arguments)


SHORT = ForwardConfig(short_rows=16, short_warps=4)
SHORT_BACKWARD = BackwardConfig(block_d=16, block_n=16, num_stages=1)


def long_calls(length: int) -> tuple[AttentionCall, AttentionCall]:
    call = make_call(*(torch.zeros(1, 2, length, 64, dtype=torch.bfloat16) for _ in range(3)), is_causal=True)
    spec = replace(call.spec, q_len=1024)
    forward, backward = (replace(call, config=BACKEND.default_config(spec, H100, pass_)) for pass_ in ("forward", "backward"))
    return forward, backward


def with_new_tensors(call: AttentionCall) -> AttentionCall:
    return replace(call, query=call.query.clone(), key=call.key.clone(), value=call.value.clone())


# -- the parameters' layout -------------------------------------------------------------------------------------------------------


def test_parameters_follow_the_signature() -> None:
    signature = {"X": "*fp16", "n": "i32", "BLOCK": "constexpr", "stride": "constexpr", "far": "i64", "scale": "fp32"}
    assert [name for name, _ in replay.parameters(signature)] == ["X", "n", "far", "scale"]
    assert replay.parameter_sizes(signature) == [8, 4, 8, 4, 8, 8]


@pytest.mark.parametrize("kind", ["i1", "fp64", "tensordesc<fp16[64, 64]>", ("*fp16", "i32")])
def test_unknown_types_are_not_guessed(kind: Any) -> None:
    assert replay.parameter_sizes({"X": "*fp16", "what": kind}) is None


PTX = """
.visible .entry some_kernel(
\t.param .u64 .ptr .global .align 16 some_kernel_param_0,
\t.param .u32 some_kernel_param_1,
\t.param .f32 some_kernel_param_2,
\t.param .b64 some_kernel_param_3
)
.reqntid 128
{
"""


def test_parameters_of_a_ptx_text() -> None:
    assert replay.ptx_parameter_sizes(PTX) == [8, 4, 4, 8]


def test_ptx_with_a_structure_among_its_parameters_is_not_read() -> None:
    assert replay.ptx_parameter_sizes(PTX.replace(".param .u32 some_kernel_param_1", ".param .align 64 .b8 tma[128]")) is None


@pytest.mark.parametrize(
    "features",
    [
        {"dropout_p": 0.1, "alibi_slopes": torch.ones(2), "return_stats": True, "alpha": 2.0},
        {"kv_lengths": torch.tensor([50]), "deterministic": True, "is_causal": True},
        {"alpha": torch.tensor([1.3, 1.7]), "attn_mask": torch.ones(1, 1, 1, 64, dtype=torch.bool)},
    ],
    ids=" ".join,
)
def test_kernels_declare_what_they_are_given(features: dict[str, Any]) -> None:
    """The list derived from the signature against the one in the PTX, with every optional argument in use somewhere."""
    call = short_call(**features)
    for recorded in aot.launches_of(replace(call, config=SHORT), replace(call, config=SHORT_BACKWARD)):
        assert replay.is_plain(aot.compiled(recorded, "sm_90")), recorded.kernel.__name__


def test_a_kernel_with_another_parameter_is_not_launched_through_the_driver() -> None:
    call = replace(short_call(), config=SHORT)
    (recorded,) = aot.launches_of(call)
    compiled = aot.compiled(recorded, "sm_90")
    assert replay.is_plain(compiled)
    (text,) = (compiled.asm["ptx"],)
    compiled.asm["ptx"] = text.replace("_param_0,", "_param_0,\n\t.param .u64 hidden,", 1)
    assert not replay.is_plain(compiled)


# -- what a launch is given -------------------------------------------------------------------------------------------------------


def test_a_replay_passes_its_own_addresses(cuda: FakeDriver) -> None:
    first = replace(short_call(), config=SHORT)
    BACKEND.forward(first)
    assert cuda.by_name == ["forward_short_kernel"]
    second = with_new_tensors(first)
    result = BACKEND.forward(second)
    (launched,) = cuda.launched
    rows = result.saved[1]
    wanted = {
        "Q": second.query, "K": second.key, "V": second.value, "OUT": result.out, "O2": result.saved[0], "M": rows[0], "C": rows[1],
    }  # fmt: skip
    assert {name: launched.values[name] for name in wanted} == {name: x.data_ptr() for name, x in wanted.items()}
    assert launched.scratch == [0, 0]


def test_a_backward_passes_what_the_forward_saved(cuda: FakeDriver) -> None:
    call = replace(short_call(), config=SHORT)
    result = BACKEND.forward(call)
    backward, grad_out = replace(call, config=SHORT_BACKWARD), torch.zeros_like(result.out)
    for _ in range(2):
        gradients = BACKEND.backward(backward, grad_out, result.saved, None)
    rows, keys = cuda.launched
    assert (rows.name, keys.name) == ("backward_rows_kernel", "backward_keys_kernel")
    assert rows.values["DO"] == grad_out.data_ptr()
    assert rows.values["O2"] == result.saved[0].data_ptr()
    assert rows.values["C"] == keys.values["C"] == result.saved[1][1].data_ptr()
    assert rows.values["DQ"] == gradients.query.data_ptr()
    assert (keys.values["DK"], keys.values["DV"]) == (gradients.key.data_ptr(), gradients.value.data_ptr())


def test_every_kernel_gets_its_numbers(cuda: FakeDriver) -> None:
    forward, backward = long_calls(1024)
    for _ in range(2):
        result = BACKEND.forward(forward)
        BACKEND.backward(backward, result.out, result.saved, None)
    table = inputs_of(forward)
    steps = list(launch.forward_program(forward, table).steps)
    table |= {"DO": result.out} | dict(zip(("O2", "rows", "lists"), result.saved, strict=True))
    steps += launch.backward_program(backward, table).steps
    assert [launched.name for launched in cuda.launched] == [step.kernel.__name__ for step in steps]
    for launched, step in zip(cuda.launched, steps, strict=True):
        assert launched.grid == step.grid
        for name, value in launched.values.items():
            wanted = step.arguments[name]
            if isinstance(wanted, float):
                assert value == pytest.approx(wanted, rel=1e-7)
            elif isinstance(wanted, int):
                assert value == wanted


def test_scratch_lies_in_one_allocation(cuda: FakeDriver) -> None:
    forward, _ = long_calls(1024)
    for _ in range(2):
        BACKEND.forward(forward)
    values: dict[str, int] = {}
    for launched in cuda.launched:
        values |= launched.values
    names = ("COUNTERS", "KEY_MAX", "HITS", "T", "MARGIN", "ENTRIES", "LISTS")
    places = [values[name] - values["COUNTERS"] for name in names]
    assert places == sorted(places)
    assert all(place % program.ALIGNMENT == 0 for place in places)
    assert (values["TOP"], values["POOL_TOP"]) == (values["COUNTERS"], values["COUNTERS"] + 8)
    assert values["SLOTS"] == values["COUNTERS"] + 16
    assert values["counters"] == values["slots"] + 4


def test_a_new_length_is_replayed_at_once(cuda: FakeDriver) -> None:
    for length in (1024, 3072):
        forward, backward = long_calls(length)
        result = BACKEND.forward(forward)
        BACKEND.backward(backward, result.out, result.saved, None)
    assert len(cuda.by_name) == 6
    assert [launched.values["kv_len"] for launched in cuda.launched] == [3072] * 6


def test_threads_do_not_mix_their_addresses(cuda: FakeDriver) -> None:
    call = replace(short_call(), config=SHORT)
    BACKEND.forward(call)
    wanted: list[tuple[int, int]] = []
    kept = []

    def work() -> None:
        mine = with_new_tensors(call)
        for _ in range(30):
            result = BACKEND.forward(mine)
            kept.append(result)  # so that no address is given out twice
            wanted.append((mine.query.data_ptr(), result.out.data_ptr()))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wanted) == 120
    assert sorted((x.values["Q"], x.values["OUT"]) for x in cuda.launched) == sorted(wanted)


# -- when something is different --------------------------------------------------------------------------------------------------


def test_an_error_is_named(cuda: FakeDriver) -> None:
    call = replace(short_call(), config=SHORT)
    BACKEND.forward(call)
    cuda.errors = [1]
    with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_VALUE"):
        BACKEND.forward(call)
    BACKEND.forward(call)
    assert len(cuda.launched) == 1


def test_a_thread_without_a_context_gets_one(cuda: FakeDriver) -> None:
    call = replace(short_call(), config=SHORT)
    BACKEND.forward(call)
    cuda.errors = [201]
    BACKEND.forward(call)
    assert cuda.contexts == ["cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent"]
    assert len(cuda.launched) == 1


def test_a_program_that_did_not_run_is_not_kept(cuda: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    call = replace(short_call(), config=SHORT)

    def refuse(_step: Step, _table: Table) -> None:
        raise OutOfResources(300_000, 232_448, "shared memory")

    with monkeypatch.context() as patch:
        patch.setattr(program, "_launch_by_name", refuse)
        with pytest.raises(ConfigRejectedError, match="shared memory"):
            BACKEND.forward(call)
    assert len(launch._forwards) == 0
    BACKEND.forward(call)
    BACKEND.forward(call)
    assert len(cuda.launched) == 1


def test_hooks_see_every_launch(cuda: FakeDriver) -> None:
    call = replace(short_call(), config=SHORT)
    BACKEND.forward(call)

    def hook(*_: Any) -> None: ...

    knobs.runtime.launch_enter_hook.add(hook)
    try:
        BACKEND.forward(call)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert (len(cuda.by_name), len(cuda.launched)) == (2, 0)
    BACKEND.forward(call)
    assert (len(cuda.by_name), len(cuda.launched)) == (2, 1)


def test_without_the_driver_triton_launches(cuda: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "driver", lambda: None)
    call = replace(short_call(), config=SHORT)
    BACKEND.forward(call)
    (compiled,) = cuda.kernels.values()
    seen: list[tuple[Any, ...]] = []
    compiled._run = lambda *arguments: seen.append(arguments)
    result = BACKEND.forward(call)
    (arguments,) = seen
    assert arguments[:5] == (8, 1, 1, STREAM, compiled.function)
    values = arguments[9:]
    names = compiled.src.fn.arg_names
    assert values[names.index("Q")] == call.query.data_ptr()
    assert values[names.index("OUT")] == result.out.data_ptr()
    assert values[names.index("kv_len")] == 64


def test_empty_calls_launch_nothing_and_give_zeros(cuda: FakeDriver) -> None:
    call = replace(short_call(), config=SHORT)
    call = replace(call, key=call.key[:, :, :0], value=call.value[:, :, :0])
    result = BACKEND.forward(call)
    gradients = BACKEND.backward(replace(call, config=SHORT_BACKWARD), result.out, result.saved, None)
    assert not result.out.any()
    assert not gradients.query.any()
    assert not cuda.by_name
