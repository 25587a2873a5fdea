"""Descriptions find programs, and programs find compiled kernels: equal keys must mean equal work, and equal binaries."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from adasplash_core.backend import KernelConfig
from adasplash_core.call import make_call
from adasplash_core.device import DeviceInfo
from adasplash_core.programs import describe
from adasplash_core.spec import AttentionSpec
from adasplash_triton import launch
from adasplash_triton.backend import TritonBackend
from adasplash_triton.configs import ForwardConfig
from adasplash_triton.operands import inputs_of
from adasplash_triton.program import Program, Step, Table
from adasplash_triton.runner import Address, Pointer

BACKEND = TritonBackend()
H100 = DeviceInfo("cuda", "H100", capability=(9, 0), multiprocessors=132, shared_memory=227 * 1024)
_SPECS: dict[AttentionSpec, AttentionSpec] = {}
_CONFIGS: dict[KernelConfig, KernelConfig] = {}


def draw_tensor(choose: random.Random, batch: int, heads: int, length: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    skipped = choose.choice([0] * 10 + [1, 8])
    flat = torch.zeros(batch * heads * length * dim + 8, dtype=dtype)[skipped : skipped + batch * heads * length * dim]
    if choose.random() < 0.85:
        return flat.view(batch, heads, length, dim)
    return flat.view(batch, length, heads, dim).transpose(1, 2)


def draw_arguments(choose: random.Random, batch: int, heads: int, kv_len: int) -> dict[str, Any]:
    """Mostly the defaults, so that many calls differ in one thing alone."""
    padding = torch.ones(choose.choice([1, batch]), 1, 1, kv_len, dtype=torch.bool)
    others: dict[str, list[Any]] = {
        "alpha": [2.0, 1.2, 1.3, torch.tensor(1.4), torch.tensor(1.4, requires_grad=True), torch.full((heads,), 1.3)],
        "deterministic": [True],
        "return_stats": [True],
        "window": [(10, 3), (10, -1)],
        "alibi_slopes": [torch.ones(heads), torch.ones(batch, heads)],
        "dropout_p": [0.1, 0.2],
        "scale": [0.1, 0.2],
        "query_offset": [3, 5, torch.tensor(4)],
    }
    masks: list[dict[str, Any]] = [
        {},
        {"is_causal": True},
        {"kv_lengths": torch.full((batch,), kv_len)},
        {"attn_mask": padding},
    ]
    return {
        **{name: choose.choice(values) for name, values in others.items() if choose.random() < 0.12},
        **choose.choice(masks),
    }


def draw_programs(choose: random.Random, dims: list[int], lengths: list[int]) -> list[tuple[Any, Table, Program]]:
    """(description, table, program) of a random call's forward and, if it has one, backward. Equal specs and configs are one object."""
    dim, batch, dtype = choose.choice(dims), choose.choice([1, 2]), choose.choice([torch.float32, torch.bfloat16])
    q_len, kv_len = choose.choice(lengths), choose.choice(lengths)
    heads, kv_heads = choose.choice([(1, 1), (2, 1), (4, 4)])
    query = draw_tensor(choose, batch, heads, q_len, dim, dtype)
    key, value = (draw_tensor(choose, batch, kv_heads, kv_len, size, dtype) for size in (dim, choose.choice([dim, 64])))
    arguments = draw_arguments(choose, batch, heads, kv_len)
    call = make_call(query, key, value, enable_gqa=True, needs_grad=choose.random() < 0.8, **arguments)
    call.spec = _SPECS.setdefault(call.spec, call.spec)
    configs = (BACKEND.default_config(call.spec.without_lengths(), H100, pass_) for pass_ in ("forward", "backward"))
    forward, backward = (dataclasses.replace(call, config=_CONFIGS.setdefault(config, config)) for config in configs)
    table = inputs_of(forward)
    program = launch.forward_program(forward, table)
    found = [(describe(forward, table), table, program)]
    if call.spec.needs_grad:
        saved = {x.role: torch.empty(x.shape, dtype=x.dtype) for x in program.outputs if x.role in ("O2", "rows", "lists")}
        grad_out = draw_tensor(choose, batch, heads, q_len, value.shape[3], dtype)
        table = {**inputs_of(backward), "DO": grad_out, **saved}
        found.append((describe(backward, table), table, launch.backward_program(backward, table)))
    return found


def test_equal_descriptions_have_equal_programs() -> None:
    seen: dict[Any, tuple[Any, ...]] = {}
    repeats = 0
    choose = random.Random(0)
    for _ in range(1000):
        for description, _, program in draw_programs(choose, [64], [64, 600]):
            work = (tuple(program.outputs), [(id(s.kernel), s.grid, s.resolved(tuple), s.options) for s in program.steps])
            repeats += description in seen
            assert seen.setdefault(description, work) == work
    assert 50 < repeats < len(seen)


def test_what_a_forward_keeps_was_foretold() -> None:
    choose = random.Random(1)
    for _ in range(50):
        (_, table, program), *_ = draw_programs(choose, [16, 64], [64, 600])
        spec = program.owners[0]
        assert isinstance(spec, AttentionSpec)
        kept = [x for x in program.outputs if x.role in ("O2", "rows", "lists")]
        foretold = BACKEND.saved_spec(spec) if spec.needs_grad else []
        assert [(x.shape, str(x.dtype)) for x in kept] == [(x.shape, f"torch.{x.dtype}") for x in foretold]
        assert table["Q"].shape[2] == spec.q_len


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"scale": 0.1}, {"scale": 0.2}),
        ({"dropout_p": 0.1}, {"dropout_p": 0.2}),
        ({"window": (10, 3)}, {"window": (10, -1)}),
        ({"query_offset": 3}, {"query_offset": 5}),
        ({"query_offset": 3}, {"query_offset": torch.tensor(3)}),
        ({"alibi_slopes": torch.ones(2)}, {"alibi_slopes": torch.ones(1, 2)}),
        ({"alpha": torch.tensor(1.4)}, {"alpha": torch.tensor(1.4, dtype=torch.float64)}),
    ],
)
def test_what_no_spec_holds_is_described(one: dict[str, Any], other: dict[str, Any]) -> None:
    def described(arguments: dict[str, Any]) -> Any:
        call = make_call(*(torch.empty(1, 2, 600, 64) for _ in range(3)), **arguments)
        call.spec = _SPECS.setdefault(call.spec, call.spec)
        return describe(call, inputs_of(call))

    assert described(one) != described(other)
    assert described(one) == described(one)


def test_configs_are_described() -> None:
    call = make_call(*(torch.empty(1, 2, 600, 64) for _ in range(3)))
    table, config = inputs_of(call), BACKEND.default_config(call.spec, H100, "forward")
    assert isinstance(config, ForwardConfig)
    other = dataclasses.replace(config, select_stages=1)
    first, second = (describe(dataclasses.replace(call, config=c), table) for c in (config, other))
    assert first != second


class Oracle:
    """What Triton itself says that it compiles into a kernel, for an H100."""

    def __init__(self) -> None:
        self.backend = make_backend(GPUTarget("cuda", 90, 32))
        self.binders: dict[Any, Any] = {}

    def __call__(self, step: Step, misaligned: dict[str, int]) -> Any:
        def pointer(address: Address) -> Pointer:
            return Pointer(1 << 40 | (misaligned[address.role] + address.offset), address.dtype)

        kernel = step.kernel
        if kernel not in self.binders:
            self.binders[kernel] = create_function_from_signature(kernel.signature, kernel.params, self.backend)
        _, specialization, options = self.binders[kernel](**step.resolved(pointer), **step.options)
        return specialization, options


def test_equal_keys_have_equal_binaries() -> None:
    oracle, choose = Oracle(), random.Random(0)
    seen: dict[Any, Any] = {}
    for _ in range(150):
        for _, table, program in draw_programs(choose, [16, 24, 64, 128], [1, 7, 100, 129, 500, 513, 1500]):
            misaligned = {role: x.data_ptr() & 15 for role, x in table.items()}
            misaligned |= {x.role: 0 for x in program.outputs}
            for step in program.steps:
                wanted = oracle(step, misaligned)
                assert seen.setdefault(step.binary(misaligned), wanted) == wanted, step.kernel.__name__
    assert len(seen) > 300


def causal_steps(length: int, rows_first: bool) -> list[tuple[Step, dict[str, int]]]:
    """The steps of a long causal call's forward and backward, and the alignment of their tensors: all aligned."""
    shape = (1, length, 2, 64) if rows_first else (1, 2, length, 64)
    query, key, value = (torch.empty(shape, dtype=torch.bfloat16) for _ in range(3))
    if rows_first:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    call = make_call(query, key, value, is_causal=True)
    call.config = BACKEND.default_config(dataclasses.replace(call.spec, q_len=1024), H100, "forward")
    table = inputs_of(call)
    program = launch.forward_program(call, table)
    saved = {x.role: x.allocate(call.query.device) for x in program.outputs}
    call.config = BACKEND.default_config(call.spec, H100, "backward")
    backward = launch.backward_program(call, {**table, **saved, "DO": saved["OUT"]})
    aligned = dict.fromkeys([*table, *saved, "DO", *(x.role for x in backward.outputs)], 0)
    return [(step, aligned) for step in (*program.steps, *backward.steps)]


@pytest.mark.parametrize(("length", "rows_first"), [(3072, False), (8192, False), (1024, True)])
def test_a_new_length_or_layout_needs_no_new_kernel(length: int, rows_first: bool) -> None:
    """Neither compile-time constants nor what Triton specialises on may follow the length (if strides stay multiples of 16)."""
    first, second = causal_steps(1024, False), causal_steps(length, rows_first)
    assert [step.binary(aligned) for step, aligned in first] == [step.binary(aligned) for step, aligned in second]
    steps = {name: value for step, _ in second for name, value in step.arguments.items() if name.endswith("_row")}
    assert steps == dict.fromkeys(("out_row", "dq_row", "dk_row", "dv_row"), 2 if rows_first else 1)
