"""What is asked of NVRTC and of the driver: with stand-ins for both, since nothing here can launch."""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from adasplash_core.call import make_call
from adasplash_core.device import DeviceInfo
from adasplash_core.errors import AdasplashWarning, ConfigRejectedError
from adasplash_cupy import binaries, instances, launch, nvrtc, runner, tensor_maps
from adasplash_cupy.backend import CupyBackend
from adasplash_cupy.configs import BackwardConfig, ForwardConfig
from adasplash_cupy.instances import Instance, MarkInstance
from adasplash_cupy.operands import has_aligned_rows
from adasplash_cupy.program import Address, Output, Program, Step, Zeroed
from adasplash_cupy.tensor_maps import tensor_map
from tests.cupy_backend.fake_machine import (
    DEVICE,
    ILLEGAL_ADDRESS,
    INVALID_CONTEXT,
    INVALID_VALUE,
    STREAM,
    Machine,
)

INSTANCE = Instance("forward_dense", "float16", 64, 64, 15, 64, 2, 1)


def run(program: Program, device: torch.device = DEVICE, **table: torch.Tensor) -> dict[str, torch.Tensor]:
    """Run a program, whose outputs lie in host memory, as for a device."""
    if program.run is None:
        program.run = runner.prepare(program, table, device)
    program.run(table)
    return table


def simple(*steps: Step, **values: Any) -> Program:
    return Program([], steps or [Step(INSTANCE, (7,))], values)


def test_a_kernel_is_compiled_once_and_launched_on_torchs_stream(machine: Machine) -> None:
    q, workspace = torch.zeros(4), torch.zeros(64)
    for _ in range(2):
        run(simple(q_len=5, scale=0.5, q=Address("q"), t=Address("workspace", 128)), q=q, workspace=workspace)
    assert machine.compiled == [("forward_dense<Shape<half_t, 64, 64, 15, 64, 2, 1>>", DEVICE.index)]
    launched = machine.driver.launched[-1]
    assert launched.symbol == "_Z_forward_dense<Shape<half_t, 64, 64, 15, 64, 2, 1>>"
    assert (launched.grid, launched.block, launched.shared) == ((7, 1, 1), (128, 1, 1), INSTANCE.shared_bytes)
    assert launched.stream == STREAM + DEVICE.index
    given = {name: value for name, value in launched.fields.items() if value}
    assert given == {"q": q.data_ptr(), "t": workspace.data_ptr() + 128, "q_len": 5, "scale": 0.5}


def test_another_call_brings_its_own_addresses(machine: Machine) -> None:
    program = simple(q=Address("q"), out=Address("out", 8), kv_len=9)
    tables = [run(program, q=torch.zeros(4), out=torch.zeros(4)) for _ in range(3)]
    found = [(x.fields["q"], x.fields["out"], x.fields["kv_len"]) for x in machine.driver.launched]
    assert found == [(table["q"].data_ptr(), table["out"].data_ptr() + 8, 9) for table in tables]


def test_the_workspaces_front_is_zeroed_before_anything_runs(machine: Machine) -> None:
    program = simple()
    program.zeroed = Zeroed(Address("workspace", 256), 12)
    machine.driver.during = lambda: order.append("launch")
    order: list[str] = []
    table = run(program, workspace=torch.zeros(100))
    assert machine.driver.filled == [(table["workspace"].data_ptr() + 256, 0, 12, STREAM + DEVICE.index)]
    assert order == ["launch"]


def test_all_steps_are_launched_in_order_with_their_grids(machine: Machine) -> None:
    steps = [Step(Instance("key_max", "float16"), (5,)), Step(Instance("transform", "float16"), (6, 2), 400)]
    run(simple(*steps))
    found = [(x.symbol.partition("<")[0], x.grid, x.shared) for x in machine.driver.launched]
    assert found == [("_Z_key_max", (5, 1, 1), 0), ("_Z_transform", (6, 2, 1), 448)]


def test_large_shared_memory_is_asked_for(machine: Machine) -> None:
    wide = Instance("forward_dense", "float16", 256, 256, 15, 32, 2, 1)
    run(simple(Step(wide, (1,)), Step(Instance("key_max", "float16"), (1,))))
    assert list(machine.driver.shared.values()) == [wide.shared_bytes]
    assert wide.shared_bytes > 48 * 1024


def test_each_device_has_its_own_kernel_and_is_made_current(machine: Machine) -> None:
    programs = [simple(), simple()]
    run(programs[0])
    machine.devices.clear()
    for _ in range(2):
        run(programs[1], torch.device("cuda", 1))
    assert machine.devices == [1, 1, 1]  # once to load, once for each run
    assert len(machine.driver.symbols) == 2
    assert {x.stream for x in machine.driver.launched[1:]} == {STREAM + 1}
    assert [index for _, index in machine.compiled] == [DEVICE.index], "the other device loads what was compiled for the first"


def test_a_thread_that_has_not_used_the_device_enters_its_context(machine: Machine) -> None:
    program = simple()
    run(program)
    machine.driver.entered.clear()
    machine.driver.answers = [INVALID_CONTEXT]
    run(program)
    assert machine.driver.entered == [100 + DEVICE.index]
    assert len(machine.driver.launched) == 2


def test_a_failing_launch_names_the_error(machine: Machine) -> None:
    machine.driver.answers = [ILLEGAL_ADDRESS]
    with pytest.raises(RuntimeError, match="refused to launch a kernel: CUDA_ERROR_OF_A_TEST"):
        run(simple())


def test_calls_that_overlap_write_their_parameters_to_memory_of_their_own(machine: Machine) -> None:
    program, (first, second) = simple(q=Address("q")), [torch.zeros(4) for _ in range(2)]
    run(program, q=first)

    def another() -> None:
        machine.driver.during = lambda: None
        run(program, q=second)

    machine.driver.during = another
    run(program, q=first)
    _, outer, inner = machine.driver.launched
    assert (outer.fields["q"], inner.fields["q"]) == (first.data_ptr(), second.data_ptr())
    assert outer.memory != inner.memory
    assert program.run is not None
    for _ in range(5):
        run(program, q=first)
    assert len(program.run.spare) == 2, "memory is used again"  # type: ignore[attr-defined]


def test_a_thread_that_has_not_used_the_device_enters_it_to_encode(machine: Machine) -> None:
    x = torch.zeros(1, 1, 128, 64, dtype=torch.float16)
    of = tensor_map(x)
    assert of is not None
    machine.driver.strangers = 1
    encoded = tensor_maps.encode(of, 3)
    assert int.from_bytes(encoded, "little") == x.data_ptr()
    assert machine.driver.entered == [100 + 3]
    machine.driver.strangers = 2
    with pytest.raises(RuntimeError, match="error 201"):
        tensor_maps.encode(of, 3)


def test_maps_are_encoded_again_where_a_tensor_moves(machine: Machine) -> None:
    x, y, z = (torch.zeros(1, 1, 128, 64, dtype=torch.float16) for _ in range(3))
    of = tensor_map(x)
    assert of is not None
    program = simple(Step(Instance("key_max", "float16"), (1,)), Step(INSTANCE, (1,), maps=(("q", of), ("k", of))))
    for q, k in ((x, y), (x, y), (x, z)):
        run(program, q=q, k=k)
        last = machine.driver.launched[-1]
        assert [int.from_bytes(last.map(i), "little") for i in (1, 2)] == [q.data_ptr(), k.data_ptr()]
    assert machine.driver.encoded == [x.data_ptr(), y.data_ptr(), z.data_ptr()]


# -- compiling --------------------------------------------------------------------------------------------------------------------


def test_the_next_process_compiles_nothing_and_needs_no_cupy(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    run(simple())
    machine.restart()
    monkeypatch.setitem(sys.modules, "cupy", None)
    run(simple())
    assert len(machine.compiled) == 1
    assert machine.driver.loaded[0] == machine.driver.loaded[1] == b"binary of " + INSTANCE.expression.encode() + b"\0"


def test_a_torn_file_is_compiled_again(machine: Machine) -> None:
    run(simple())
    (path,) = binaries.cache_folder().iterdir()
    path.write_bytes(path.read_bytes()[:-3])
    machine.restart()
    run(simple())
    assert len(machine.compiled) == 2
    assert machine.driver.loaded[0] == machine.driver.loaded[1]


@pytest.mark.parametrize("changed", ["capability", "source", "NVRTC"])
def test_what_a_binary_follows_from_finds_it(machine: Machine, changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run(simple())
    machine.restart()
    if changed == "capability":
        monkeypatch.setattr(runner, "device_info", lambda _device: DeviceInfo("cuda", "A100", capability=(8, 0)))
    elif changed == "source":
        source = instances.source
        monkeypatch.setattr(binaries, "source", lambda kernel: source(kernel) + "\n// another line")
    else:
        monkeypatch.setattr(nvrtc, "identity", lambda: "another libnvrtc")
    run(simple())
    assert len(machine.compiled) == 2


def test_kernels_are_compiled_side_by_side(machine: Machine) -> None:
    """Each waits until the others have begun."""
    if (os.cpu_count() or 1) < 2:
        pytest.skip("one processor compiles one kernel at a time")
    together = threading.Barrier(2, timeout=20)

    def wait(_expression: str) -> None:
        together.wait()

    machine.compiling = wait
    run(simple(*(Step(Instance(kernel, "float16"), (1,)) for kernel in ("key_max", "forward_dense"))))
    assert [symbol.partition("<")[0] for symbol in machine.driver.symbols] == ["_Z_key_max", "_Z_forward_dense"]


def test_an_unwritable_cache_folder_costs_compiling_again(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "file" / "cache"))
    for _ in range(2):
        run(simple())
        machine.restart()
    assert len(machine.compiled) == 2


@pytest.mark.skipif(not nvrtc.is_available(), reason="NVRTC is not installed: pip install nvidia-cuda-nvrtc")
def test_what_is_written_for_one_architecture_is_compiled_for_it_and_kept(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    compile_instance = nvrtc.compile_instance

    def recorded(instance: Instance, architecture: str) -> nvrtc.Program:
        compiled.append(architecture)
        return compile_instance(instance, architecture)

    monkeypatch.setattr(nvrtc, "compile_instance", recorded)
    instance = MarkInstance(dtype="float16", head_dim=64, stages=4)
    for _ in range(2):
        machine.restart()
        run(simple(Step(instance, (9,))))
    assert compiled == ["sm_90a"]
    assert machine.driver.loaded[0] == machine.driver.loaded[1]
    assert machine.driver.loaded[0].startswith(b"\x7fELF")
    launched = machine.driver.launched[-1]
    assert launched.symbol.startswith("_Z12forward_mark")
    assert launched.symbol.encode() in machine.driver.loaded[0]
    assert (launched.grid, launched.block, launched.shared) == ((9, 1, 1), (384, 1, 1), instance.shared_bytes)


# -- whole calls ------------------------------------------------------------------------------------------------------------------


def call(dtype: torch.dtype = torch.float16, dim: int = 64, length: int = 700) -> Any:
    made = make_call(*(torch.randn(1, 1, length, dim).to(dtype) for _ in range(3)), is_causal=True)
    return dataclasses.replace(made, config=ForwardConfig())


def test_what_does_not_compile_rejects_the_config(machine: Machine) -> None:
    rejected = call(torch.float32, 256)
    with pytest.raises(ConfigRejectedError, match="too wide") as raised:
        CupyBackend().forward(rejected)
    assert raised.value.config is rejected.config


@pytest.mark.parametrize("dim", [64, 256])
def test_what_the_device_has_no_room_for_rejects_the_config(machine: Machine, dim: int) -> None:
    """More shared memory than a block may have, or a launch that is refused."""
    wide = call(dim=dim)
    wide.config = dataclasses.replace(wide.config, dense_stages=9 if dim == 256 else 2)
    machine.driver.answers = [] if dim == 256 else [INVALID_VALUE]
    with pytest.raises(ConfigRejectedError, match="CUDA refused") as raised:
        CupyBackend().forward(wide)
    assert raised.value.config is wide.config
    assert len(launch._forwards) == 0, "a program that does not run is not kept"


def test_where_nvrtc_refuses_hoppers_kernel_another_runs(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def refuse(instance: Instance, _architecture: str) -> None:
        asked.append(instance.kernel)
        raise nvrtc.CompileError("too old")

    monkeypatch.setattr(nvrtc, "compile_instance", refuse)
    marked = call()
    marked.config = ForwardConfig(mark_groups=2)
    for length in (700, 800):
        again = call(length=length)
        again.config = marked.config
        with pytest.warns(AdasplashWarning, match="too old"):
            CupyBackend().forward(again)
    launched = [x.symbol.partition("<")[0] for x in machine.driver.launched]
    assert launched == ["_Z_key_max", "_Z_forward_select", "_Z_forward_lists", "_Z_forward_dense"] * 2
    assert asked == ["forward_mark"], "NVRTC is not asked twice"


def test_equal_descriptions_share_a_program_and_others_do_not(machine: Machine) -> None:
    backend, first = CupyBackend(), call()
    backend.forward(first)
    addresses = []
    for _ in range(3):
        fresh = dataclasses.replace(first, query=torch.randn_like(first.query))
        backend.forward(fresh)
        addresses.append((machine.driver.launched[-1].fields["q"], fresh.query.data_ptr()))
    assert len(launch._forwards) == 1
    assert all(given == wanted for given, wanted in addresses)
    variants: dict[str, dict[str, Any]] = {
        "scale": {"scale": 0.3},
        "strides": {"key": torch.randn(1, 700, 1, 64).half().transpose(1, 2)},
        "alpha": {"alpha": torch.full((1,), 1.5, dtype=torch.float64)},
        "window": {"window": (5, 5)},
        "offset": {"query_offset": 3},
        "a misaligned tensor": {"value": torch.randn(700 * 64 + 1).half()[1:].view(1, 1, 700, 64)},
    }
    for count, changes in enumerate(variants.values(), 2):
        backend.forward(dataclasses.replace(first, **changes))
        assert len(launch._forwards) == count


def test_misaligned_rows_are_copied_in_every_call(machine: Machine) -> None:
    backend, base = CupyBackend(), call()
    value = torch.randn(700 * 64 + 1).half()[1:].view(1, 1, 700, 64)
    for _ in range(2):
        backend.forward(dataclasses.replace(base, value=value))
        given = machine.driver.launched[-1].fields["v"]
        assert given % 16 == 0
        assert given != value.data_ptr()


@pytest.mark.parametrize(("stride", "far"), [(2**31, True), (2**31 - 8, False)])
def test_rows_that_are_4_gib_apart_are_copied(stride: int, far: bool) -> None:
    """Kernels find a row by 32-bit arithmetic."""
    rows = torch.empty_strided((1, 1, 2, 64), (2 * stride, 2 * stride, stride, 1), dtype=torch.float16, device="meta")
    assert has_aligned_rows(rows) != far


def test_backward_hands_over_what_the_forward_kept(machine: Machine) -> None:
    backend, forward = CupyBackend(), call()
    found = backend.forward(forward)
    machine.driver.launched.clear()
    machine.driver.filled.clear()
    grad_out = torch.randn_like(found.out)
    backend.backward(dataclasses.replace(forward, config=BackwardConfig()), grad_out, found.saved, None)
    launched = [x.symbol.partition("<")[0] for x in machine.driver.launched]
    assert launched == ["_Z_backward_lists", "_Z_backward_rows", "_Z_backward_keys"]
    for launched in machine.driver.launched:
        assert launched.fields["d_out"] == grad_out.data_ptr()
        for name, x in zip(("o2", "m", "c", "blocks", "pool"), found.saved, strict=True):
            assert launched.fields[name] == x.data_ptr()
        assert launched.fields["dv_sum"] - launched.fields["dk_sum"] == 4 * 700 * 64
    ((address, value, words, _),) = machine.driver.filled
    assert (address, value, words) == (machine.driver.launched[0].fields["dk_sum"], 0, 700 * 128)


def test_outputs_are_laid_out_as_torch_would() -> None:
    for shape in ((2, 3, 4), (5,), (2, 0, 3), ()):
        assert Output.contiguous("x", shape, torch.float32).strides == torch.empty(shape).stride()
