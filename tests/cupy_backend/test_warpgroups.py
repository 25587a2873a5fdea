"""Products of a warpgroup in the emulator: the instructions against plain products, their misuse, and every pass that takes them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from adasplash_core.backend import AttentionCall, ForwardResult, Gradients
from adasplash_core.call import make_call
from adasplash_core.device import DeviceInfo, device_info
from adasplash_core.errors import AdasplashWarning
from adasplash_core.testing import oracle
from adasplash_core.testing.inputs import poisoned_memory
from adasplash_cupy import configs
from adasplash_cupy.binaries import ArchitectureError
from adasplash_cupy.instances import ALL_FLAGS, Instance
from tests.cupy_backend import emulator

BACKEND = emulator.EmulatedCupyBackend()
HOPPER = DeviceInfo("cuda", "H200", capability=(9, 0), shared_memory=227 * 1024, multiprocessors=132)
DTYPES = {torch.float16: "half_t", torch.bfloat16: "bf16_t"}
BACKWARD_WARPGROUPS = {"rows_warpgroups": 1, "lists_warpgroups": 1, "keys_warpgroups": 1}
BOUNDS = {torch.float16: 1e-3, torch.bfloat16: 5e-3}

PRODUCT = """
// out (64 x COLUMNS) = a b over DEPTH: of a and b the inner dimension runs along their rows, or down them.
struct Argument { const T *a, *b; float* out; };
template <int R, int D>
static void put(T* to, const T* from) {
    each_chunk<T, D, R, true>([&](int r, int c) { ptx::copy_16(to + Layout<T, D, R, true>::at(r, c), from + r * D + c, true); });
    ptx::commit_copies();
    ptx::wait_copies<0>();
    PUBLISH
}
static void entry(const void* argument) {
    auto& x = *static_cast<const Argument*>(argument);
    u8* memory = ptx::shared_memory();
    memory += (1024 - ptx::shared_address(memory) % 1024) % 1024;
    T *a = reinterpret_cast<T*>(memory), *b = a + 64 * DEPTH;
    if (A_DOWN) put<DEPTH, 64>(a, x.a);
    else put<64, DEPTH>(a, x.a);
    if (B_DOWN) put<DEPTH, COLUMNS>(b, x.b);
    else put<COLUMNS, DEPTH>(b, x.b);
    ptx::sync();
    u64 left = A_DOWN ? ptx::columns_of_128_bytes(a, DEPTH * 128) : ptx::rows_of_128_bytes(a);
    u64 right = B_DOWN ? ptx::columns_of_128_bytes(b, DEPTH * 128) : ptx::rows_of_128_bytes(b);
    float d[COLUMNS / 8][4];
    clear(d);
    u32 held[DEPTH / 16][4];
    if (HELD)
        for (int k = 0; k < DEPTH / 16; ++k)
            ptx::load_matrices(held[k], a + Layout<T, DEPTH, 64, true>::at(warp() * 16 + lane() % 16, k * 16 + lane() / 16 * 8));
    OPEN
    for (int k = 0; k < DEPTH / 16; ++k) {
        int l = A_DOWN ? k * 128 : k / 4 * 512 + k % 4 * 2, r = B_DOWN ? k * 128 : k / 4 * (COLUMNS * 8) + k % 4 * 2;
        if constexpr (HELD) ptx::multiply_tiles<T, true, B_DOWN>(d, held[k], right + r);
        else ptx::multiply_tiles<T, true, A_DOWN, B_DOWN>(d, left + l, right + r);
    }
    ptx::commit_products();
    TOUCH
    ptx::wait_products<0>();
    ptx::settle(d);
    for (int n = 0; n < COLUMNS / 8; ++n)
        for (int i = 0; i < 4; ++i)
            x.out[(warp() * 16 + lane() / 4 + i / 2 * 8) * COLUMNS + n * 8 + lane() % 4 * 2 + i % 2] = d[n][i];
}
"""


def multiply(a: torch.Tensor, b: torch.Tensor, a_down: bool, b_down: bool, held: bool = False, **misuse: str) -> torch.Tensor:
    """``a`` (64, depth) times ``b`` (depth, columns), each contiguous along the inner dimension or down it."""
    left, right = (a.T if a_down else a).contiguous(), (b if b_down else b.T).contiguous()
    out = torch.full((64, b.shape[1]), torch.nan)
    names: dict[str, Any] = {
        "DEPTH": a.shape[1],
        "COLUMNS": b.shape[1],
        "HELD": int(held),
        "A_DOWN": int(a_down),
        "B_DOWN": int(b_down),
    }
    names |= {"PUBLISH": "ptx::publish_stores();", "OPEN": "ptx::open_products();", "TOUCH": ""} | misuse
    defines = "".join(f"#define {name} {value}\n" for name, value in names.items())
    headers = ("ptx.cuh", "wgmma.cuh", "params.cuh", "entmax.cuh", "products.cuh", "rows.cuh")
    emulator.run(headers, f"using T = {DTYPES[a.dtype]};\n{defines}{PRODUCT}", (left, right, out), 64 * 1024)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("depth", "columns", "a_down", "b_down", "held"),
    [
        (64, 64, False, False, False),  # scores
        (128, 32, False, False, False),
        (64, 64, False, False, True),
        (64, 64, False, True, True),  # weights times values
        (64, 128, False, True, True),  # two panels
        (64, 64, True, True, False),  # a tile's weights, transposed, times queries
    ],
)
def test_products(dtype: torch.dtype, depth: int, columns: int, a_down: bool, b_down: bool, held: bool) -> None:
    a, b = torch.randn(64, depth).to(dtype), torch.randn(depth, columns).to(dtype)
    found = multiply(a, b, a_down, b_down, held)
    torch.testing.assert_close(found.double(), a.double() @ b.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        ({"OPEN": ""}, "without a fence"),
        ({"PUBLISH": ""}, "copied and not published"),
        ({"TOUCH": "held[0][0] ^= 1;"}, "changed before"),
    ],
)
def test_misuse_is_found(misuse: dict[str, str], message: str) -> None:
    a, b = torch.randn(64, 64).half(), torch.randn(64, 64).half()
    with pytest.raises(AssertionError, match=message):
        multiply(a, b, False, True, True, **misuse)


# -- the passes ---------------------------------------------------------------------------------------------------------------------


def draw(
    q_len: int, kv_len: int, dim: int = 64, dim_v: int = 0, spread: float = 4.0, dtype: torch.dtype = torch.float16
) -> Any:
    query, key = (torch.randn(1, heads, length, dim).to(dtype) for heads, length in ((2, q_len), (1, kv_len)))
    return query * spread, key, torch.randn(1, 1, kv_len, dim_v or dim).to(dtype)


def run(call: AttentionCall, backward: dict[str, Any], **forward: Any) -> tuple[ForwardResult, Gradients, torch.Tensor]:
    info = device_info("cpu")
    of_forward = {"keys": 64, "stages": 2, "dense_stages": 2, "least_list": 4096, "lists_warpgroups": 1, "dense_warpgroups": 1}
    of_backward = {"keys": 64, "stages": 3, "list_keys": 64, "rows": 32, "row_stages": 3} | BACKWARD_WARPGROUPS
    first, second = (
        dataclasses.replace(BACKEND.default_config(call.spec, info, pass_), **config)  # type: ignore[arg-type]
        for pass_, config in (("forward", of_forward | forward), ("backward", of_backward | backward))
    )
    with poisoned_memory():
        found = BACKEND.forward(dataclasses.replace(call, config=first))
        grad_out = torch.randn(found.out.shape).to(found.out.dtype)
        grads = BACKEND.backward(dataclasses.replace(call, config=second), grad_out, found.saved, None)
    return found, grads, grad_out


def check(call: AttentionCall, backward: dict[str, Any] | None = None, **forward: Any) -> ForwardResult:
    found, grads, grad_out = run(call, backward or {}, **forward)
    want, want_grads = oracle.attention(call), oracle.gradients(call, grad_out)
    bound = BOUNDS[found.out.dtype]
    assert oracle.relative_error(found.out, want.out) < bound
    for name in ("query", "key", "value"):
        assert oracle.relative_error(getattr(grads, name), getattr(want_grads, name)) < 2 * bound, name
    return found


CALLS: dict[str, Any] = {
    "causal": lambda: (draw(100, 200), {"is_causal": True, "causal_alignment": "bottom_right"}, {}, {}),
    "flat rows": lambda: (draw(70, 200, spread=0.05, dtype=torch.bfloat16), {}, {}, {}),
    "sparsemax": lambda: (draw(70, 300, spread=1.0), {"alpha": 2.0}, {}, {}),
    "another alpha": lambda: (draw(70, 300), {"alpha": 1.3}, {}, {}),
    "one stage": lambda: (
        draw(70, 200),
        {},
        {"stages": 1, "row_stages": 1, "list_stages": 1},
        {"stages": 1, "dense_stages": 1},
    ),
    "longer lists held by the last pass": lambda: (draw(64, 300, spread=2.0), {}, {}, {"stages": 3, "dense_stages": 5}),
    "longer lists held": lambda: (draw(64, 400, spread=2.0), {"is_causal": True, "query_offset": 250}, {}, {"stages": 5}),
    "32 keys a tile": lambda: (draw(70, 200), {"window": (60, 5)}, {}, {"keys": 32}),
    "a head dim between": lambda: (draw(64, 130, dim=40, dim_v=48), {}, {}, {}),
    "128 columns": lambda: (draw(64, 300, dim=128, spread=1.0, dtype=torch.bfloat16), {}, {}, {}),
    "128 and 64 columns, dropout": lambda: (draw(64, 130, dim=128, dim_v=64), {"dropout_p": 0.3}, {}, {}),
    "256 columns": lambda: (draw(64, 130, dim=80, dim_v=256), {}, {"stages": 1, "list_stages": 1}, {"keys": 32}),
    "32 columns": lambda: (draw(70, 200, dim=32), {"is_causal": True, "query_offset": 130}, {}, {}),
    "32 and 64 columns, another alpha": lambda: (draw(70, 200, dim=24, dim_v=64), {"alpha": 1.3}, {}, {}),
    "lists by warps, all keys by warpgroups": lambda: (draw(70, 300), {}, {"lists_warpgroups": 0, "list_keys": 32}, {}),
    "lists by warpgroups, all keys by warps": lambda: (
        draw(70, 300),
        {},
        {"rows_warpgroups": 0, "keys": 32, "keys_warpgroups": 0},
        {},
    ),
    "32 keys of all": lambda: (draw(70, 200), {}, {"keys": 32}, {}),
    "a tile at a time": lambda: (draw(70, 300), {"window": (90, 5)}, {}, {"dense_pairs": 0}),
    "hidden keys": lambda: (draw(70, 200), {"attn_mask": torch.rand(1, 1, 1, 200) < 0.5}, {}, {"dense_stages": 3}),
    "two stages, 64 rows": lambda: (
        draw(150, 200),
        {"is_causal": True, "query_offset": 50},
        {"stages": 2, "row_stages": 2, "rows": 64},
        {},
    ),
    "four stages": lambda: (draw(70, 400, dtype=torch.bfloat16), {"window": (300, 40)}, {"stages": 4}, {}),
    "dropout": lambda: (draw(70, 200), {"dropout_p": 0.3, "is_causal": True, "query_offset": 130}, {}, {}),
}


@pytest.mark.parametrize("lists", [False, True], ids=["all keys", "lists"])
@pytest.mark.parametrize("name", CALLS)
def test_passes(name: str, lists: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adasplash_cupy.launch.short_tile", lambda *_: 0)
    monkeypatch.setattr("adasplash_cupy.launch.uses_lists", lambda *_: lists)
    tensors, given, backward, forward = CALLS[name]()
    found = check(make_call(*tensors, enable_gqa=True, **given), backward, **forward)
    if lists:
        assert "held" not in name or (found.saved[3][..., 1] > 128).any()  # more than registers hold scores of
        assert bool((found.saved[3][..., 1] >= 0).any()) == (name != "flat rows")


@pytest.mark.usefixtures("_lists")
@pytest.mark.parametrize("order", [1, 2])
def test_no_result_depends_on_the_order_of_threads(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    call = make_call(*draw(70, 300), enable_gqa=True, is_causal=True, query_offset=230, deterministic=True)
    torch.manual_seed(3)
    first, first_grads, _ = run(call, {})
    monkeypatch.setattr(emulator, "order", order)
    torch.manual_seed(3)
    second, second_grads, _ = run(call, {})
    assert torch.equal(first.out, second.out)
    for name in ("query", "key", "value"):
        assert torch.equal(getattr(first_grads, name), getattr(second_grads, name))


TURNS = """
struct Argument { int* bh; };
static void entry(const void* argument) {
    Params p{};
    p.batch = 1, p.heads = 5, p.q_blocks = 3, p.heads_in_turn = TOGETHER;
    for (int at = 0; at < 15; ++at) {
        auto [bh, block] = block_in_turn(p, at);
        if (ptx::thread() == 0) static_cast<const Argument*>(argument)->bh[at] = 10 * bh + block;
    }
}
"""


@pytest.mark.parametrize("together", [1, 2, 5])
def test_blocks_of_so_many_heads_come_in_turn_the_last_rows_first(together: int) -> None:
    found = torch.zeros(15, dtype=torch.int32)
    headers = ("ptx.cuh", "wgmma.cuh", "params.cuh", "entmax.cuh", "products.cuh", "rows.cuh")
    emulator.run(headers, f"#define TOGETHER {together}\n{TURNS}", (found,), 1024)
    groups = [range(first, min(first + together, 5)) for first in range(0, 5, together)]
    assert found.tolist() == [10 * head + block for heads in groups for block in (2, 1, 0) for head in heads]


@pytest.mark.parametrize("kernel", ["forward_lists", "forward_dense", "backward_lists", "backward_rows", "backward_keys"])
def test_host_and_kernel_agree_on_shared_memory(kernel: str) -> None:
    instance = Instance(kernel, "float16", 64, 128, 0, 64, 2, ALL_FLAGS, warpgroup=True)
    assert emulator.shared_bytes(instance) == emulator.merged(instance).shared_bytes


def test_hopper_takes_them_by_itself_and_tries_the_others() -> None:
    spec = make_call(*draw(64, 64), enable_gqa=True).spec
    forward, backward = configs.default_forward(spec, HOPPER), configs.default_backward(spec, HOPPER)
    made = [*configs.forward_instances(spec, forward).values(), *configs.backward_instances(spec, backward).values()]
    of_forward = {"forward_bound", "forward_lists", "forward_dense"}
    assert {i.kernel for i in made if i.warpgroup} == {*of_forward, "backward_lists", "backward_rows", "backward_keys"}
    tried = [*configs.forward_space(spec, HOPPER), *configs.backward_space(spec, HOPPER)]
    for name in ("lists_warpgroups", "dense_warpgroups", "bound_warpgroups", "rows_warpgroups", "keys_warpgroups"):
        assert {getattr(config, name) for config in tried if hasattr(config, name)} == {0, 1}


@pytest.mark.parametrize("pass_", ["lists", "rows", "keys"])
def test_each_pass_of_the_backward_chooses_by_itself(pass_: str) -> None:
    spec = make_call(*draw(64, 64), enable_gqa=True).spec
    config = configs.BackwardConfig(list_keys=64, keys=64, **{f"{pass_}_warpgroups": 1, f"{pass_}_programs": 2})  # type: ignore[arg-type]
    made = configs.backward_instances(spec, config)
    assert [name for name, instance in made.items() if instance.warpgroup] == [f"backward_{pass_}"]
    assert made[f"backward_{pass_}"].expression.endswith(", 1, 2>>")
    assert sum(instance.programs for instance in made.values()) == 2


@pytest.mark.parametrize("change", [{"dtype": "float32"}, {"head_dim": 16}, {"head_dim_v": 16}])
def test_what_has_no_panels_of_64_columns_is_multiplied_by_warps(change: dict[str, Any]) -> None:
    spec = dataclasses.replace(make_call(*draw(64, 64), enable_gqa=True).spec, **change)
    forward = configs.forward_instances(spec, configs.default_forward(spec, HOPPER))
    assert {name for name, instance in forward.items() if instance.warpgroup} <= {"forward_bound"}  # which reads no values
    assert not any(i.warpgroup for i in configs.backward_instances(spec, configs.default_backward(spec, HOPPER)).values())


@pytest.mark.usefixtures("_lists")
def test_where_nvrtc_refuses_them_warps_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    inner, launched = emulator.compiled, set()

    def outer(instance: Instance) -> Any:
        if instance.architecture is not None:
            raise ArchitectureError("too old", frozenset({instance}))
        launched.add(instance.kernel)
        return inner(instance)

    monkeypatch.setattr(emulator, "compiled", outer)
    with pytest.warns(AdasplashWarning, match="too old"):
        check(make_call(*draw(64, 130), enable_gqa=True))
    assert {"forward_lists", "forward_dense", "backward_rows", "backward_keys"} < launched
