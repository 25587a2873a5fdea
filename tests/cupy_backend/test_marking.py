"""Hopper's marking pass in the emulator: its lists against those of exact scores, and the whole forward and backward over them."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from adasplash_core.backend import AttentionCall
from adasplash_core.call import make_call
from adasplash_core.device import DeviceInfo, device_info
from adasplash_core.errors import AdasplashWarning
from adasplash_core.masking import row_intervals
from adasplash_core.testing import oracle
from adasplash_core.testing.inputs import poisoned_memory
from adasplash_cupy import configs, launch, tensor_maps
from adasplash_cupy.binaries import ArchitectureError
from adasplash_cupy.instances import ROWS, Instance, MarkInstance
from adasplash_cupy.program import Step
from adasplash_cupy.tensor_maps import tensor_map
from tests.cupy_backend import drawing, emulator

BACKEND = emulator.EmulatedCupyBackend()
SMALL = {"mark_groups": 2, "mark_stages": 2, "list_percent": 100, "least_list": 1 << 20, "keys": 16, "select_keys": 64}
EPSILON = 3e-5  # scores this close to a threshold may fall on either side ...
CUT_OFF = 2**-19  # ... and this close, times the threshold
draw = partial(drawing.draw, dim=64, spread=4.0, dtype=torch.bfloat16, seed=None)
SPLIT = {"mark_split": 2, "mark_subtract": 1, "mark_ahead": 0}

pytestmark = pytest.mark.usefixtures("_lists")


@dataclasses.dataclass
class Found:
    """What the marking pass leaves: a list (or None) a block of rows, and T of each row before and after, with its margin."""

    lists: list[list[int] | None]
    before: torch.Tensor
    after: torch.Tensor
    margin: torch.Tensor


def configured(call: AttentionCall, pass_: Any = "forward", **config: Any) -> AttentionCall:
    base = BACKEND.default_config(call.spec, device_info("cpu"), pass_)
    return dataclasses.replace(call, config=dataclasses.replace(base, **config))


def mark(call: AttentionCall, monkeypatch: pytest.MonkeyPatch, **config: Any) -> Found:
    found: list[Found] = []

    inner = emulator.launch

    def outer(step: Step, values: Any, maps: Any) -> None:
        if found:
            return  # the passes that use the lists are tried below
        marks = step.instance.kernel == "forward_mark"
        rows = values["batch"] * values["heads"] * values["q_len"]
        before = _floats(values["t"], rows) if marks else None
        inner(step, values, maps)
        if before is not None:
            found.append(Found(_lists_of(values), before, _floats(values["t"], rows), _floats(values["margin"], rows)))

    monkeypatch.setattr(emulator, "launch", outer)
    with poisoned_memory():
        BACKEND.forward(configured(call, **{**SMALL, **config}))
    shape = call.query.shape[:3]
    return dataclasses.replace(
        found[0], **{name: getattr(found[0], name).view(shape) for name in ("before", "after", "margin")}
    )


def _floats(address: float, count: int) -> torch.Tensor:
    return torch.tensor((ctypes.c_float * count).from_address(int(address))[:], dtype=torch.float64)


def _lists_of(values: dict[str, Any]) -> list[list[int] | None]:
    blocks = values["batch"] * values["heads"] * values["q_blocks"]
    entries = (ctypes.c_int * (2 * blocks)).from_address(values["entries"])
    pool = (ctypes.c_int * values["lists_size"]).from_address(values["lists"])
    return [
        None if entries[2 * i + 1] < 0 else pool[entries[2 * i] : entries[2 * i] + entries[2 * i + 1]] for i in range(blocks)
    ]


def scores(call: AttentionCall) -> torch.Tensor:
    """x of every row and key, -inf where a row does not see a key, in fp64."""
    group = call.query.shape[1] // call.key.shape[1]
    x = call.query.double() @ call.key.double().repeat_interleave(group, 1).mT * call.scale
    x *= float(call.alpha) - 1 if float(call.alpha) in (1.5, 2.0) else 1.0
    lo, hi, _ = row_intervals(call)
    keys = torch.arange(call.key.shape[2])
    seen = (keys >= lo[..., None]) & (keys < hi[..., None])
    if call.spec.mask == "key":
        assert call.attn_mask is not None
        seen = seen & call.attn_mask.view(-1, 1, keys.numel())
    return x.masked_fill(~seen[:, None], -torch.inf)


def wanted(x: torch.Tensor, t: torch.Tensor) -> list[set[int]]:
    """Keys of each block of rows that some row has at or above t."""
    over = x >= t[..., None]
    pad = -x.shape[2] % ROWS
    over = torch.nn.functional.pad(over, (0, 0, 0, pad)).view(*x.shape[:2], -1, ROWS, x.shape[3]).any(3).flatten(0, 2)
    return [set(row.nonzero().flatten().tolist()) for row in over]


def check_lists(call: AttentionCall, found: Found, follow: bool) -> None:
    x = scores(call)
    near = EPSILON + CUT_OFF * found.before.abs()
    least = wanted(x, (found.after if follow else found.before) - found.margin + near)
    most = wanted(x, found.before - found.margin - near)
    assert len(found.lists) == len(least)
    for marked, must, may in zip(found.lists, least, most, strict=True):
        assert marked is not None
        assert marked == sorted(marked)
        assert must <= set(marked) <= may
    top = x.amax(-1)
    some = top > -torch.inf
    if follow:  # T ends as that of the whole row's max
        width = 1.0 if float(call.alpha) in (1.5, 2.0) else 1 / (float(call.alpha) - 1)
        assert ((found.after - torch.maximum(top - width, found.before)).abs() < near + 2 * found.margin)[some].all()
    else:
        assert torch.equal(found.after, found.before)


def causal(**arguments: Any) -> AttentionCall:
    return make_call(*draw(300, 300, heads=2, kv_heads=1, **arguments), enable_gqa=True, is_causal=True)


VARIANTS = {
    "as it is": {},
    "T stays": {"mark_follow": 0},
    "one product at a time": {"mark_ahead": 0},
    "one product, T stays": {"mark_ahead": 0, "mark_follow": 0},
    "in turns": {"mark_ahead": 2},
    "three groups in turns": {"mark_ahead": 2, "mark_groups": 3, "mark_follow": 0},
    "a group": {"mark_groups": 1, "mark_stages": 3},
    "three groups": {"mark_groups": 3, "mark_ahead": 0},
    "sums less T": {"mark_subtract": 1},
    "sums less T, T stays": {"mark_subtract": 1, "mark_follow": 0},
    "sums less T, in turns": {"mark_subtract": 1, "mark_ahead": 2},
    "sums less T, three groups": {"mark_subtract": 1, "mark_groups": 3, "mark_ahead": 0},
    "two warpgroups a group": SPLIT,
    "two warpgroups a group, T stays": {**SPLIT, "mark_follow": 0},
    "two warpgroups": {**SPLIT, "mark_groups": 1, "mark_stages": 3},
    "two warpgroups a group, products alone": {**SPLIT, "mark_subtract": 0},
}


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("name", VARIANTS)
def test_lists_hold_what_rows_want(name: str, order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulator, "order", order)
    call = causal()
    config = VARIANTS[name]
    check_lists(call, mark(call, monkeypatch, **config), bool(config.get("mark_follow", 1)))


CASES: dict[str, Callable[[], AttentionCall]] = {
    "float16, 128 columns": lambda: causal(dim=128, dtype=torch.float16),
    "bfloat16, 128 columns": lambda: causal(dim=128),
    "columns padded to 64": lambda: causal(dim=40),
    "columns padded to 128": lambda: causal(dim=72, dtype=torch.float16),
    "every key": lambda: make_call(*draw(200, 700, batch=2, heads=2, kv_heads=2)),
    "one row": lambda: make_call(*draw(1, 500)),
    "a window": lambda: make_call(*draw(600, 600), window=(150, 10)),
    "a causal window": lambda: make_call(*draw(600, 600), window=(100, 0), is_causal=True),
    "bottom right": lambda: make_call(*draw(100, 450), is_causal=True, causal_alignment="bottom_right"),
    "rows without keys": lambda: make_call(*draw(300, 200), is_causal=True, query_offset=-100),
    "padding, an empty sequence": lambda: make_call(
        *draw(150, 400, batch=2), kv_lengths=torch.tensor([300, 0]), kv_starts=torch.tensor([70, 0])
    ),
    "packed": lambda: make_call(
        *draw(400, 500),
        cu_seqlens_q=torch.tensor([0, 130, 130, 400]),
        cu_seqlens_k=torch.tensor([0, 140, 250, 500]),
        max_seqlen_q=270,
        max_seqlen_k=250,
        is_causal=True,
    ),
    "holes in the keys": lambda: make_call(*draw(140, 333, batch=2), attn_mask=torch.rand(2, 1, 1, 333) < 0.5),
    "negative scale": lambda: make_call(*draw(140, 300), scale=-0.2),
    "no scale": lambda: make_call(*draw(140, 300), scale=0.0),
    "alpha 2": lambda: make_call(*draw(140, 300), alpha=2.0),
    "alpha 1.25": lambda: make_call(*draw(140, 300), alpha=1.25),
    "heads between rows": lambda: make_call(
        *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in draw(300, 300, batch=2, heads=2, kv_heads=2)), is_causal=True
    ),
}


@pytest.mark.parametrize("config", [{}, {**SPLIT, "bound_warpgroups": 1}], ids=["fused", "subtracted, the bound by warpgroups"])
@pytest.mark.parametrize("name", CASES)
def test_masks_layouts_and_dtypes(name: str, config: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    call = CASES[name]()
    check_lists(call, mark(call, monkeypatch, **config), follow=True)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("size", [1.0, 1e-20, 1e36])
def test_large_thresholds_are_subtracted(size: float, sign: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of thousands, over products that leave no margin, and in units of products that are small or near the largest float."""
    query, key, value = draw(140, 500)
    query = (sign * size * (1 + torch.rand(140, 1))).expand(1, 1, 140, 64).bfloat16().contiguous()
    key = key.fill_(1.0)
    key[..., -1] = torch.rand(500)
    call = make_call(query, key, value, scale=sign * 200 / size)
    check_lists(call, mark(call, monkeypatch, **SPLIT), follow=True)


@pytest.mark.parametrize("scale", [1e-30, -3e-39])
def test_where_the_scale_is_next_to_none_every_key_is_wanted(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The threshold is -1, in units that no float holds."""
    found = mark(make_call(*draw(140, 300), scale=scale), monkeypatch, **SPLIT)
    assert found.lists == [list(range(300))] * 3


def test_a_product_that_is_not_finite_marks_and_moves_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """A query's infinity reaches no other query of its block, and no threshold follows it."""
    query, key, value = draw(128, 400)
    query[0, 0, 3, 5] = torch.inf
    found = mark(make_call(query, key, value), monkeypatch, **SPLIT)
    assert found.after[:, :, 64:].isfinite().all()
    x = scores(make_call(query[:, :, 64:], key, value))
    least, most = (
        wanted(x, (t - found.margin)[:, :, 64:] + near)[0] for t, near in ((found.after, EPSILON), (found.before, -EPSILON))
    )
    assert least <= set(found.lists[1] or []) <= most


@pytest.mark.parametrize("name", ["a causal window", "padding, an empty sequence", "packed", "rows without keys"])
def test_groups_that_see_other_keys_take_turns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = CASES[name]()
    check_lists(call, mark(call, monkeypatch, mark_ahead=2), follow=True)


@pytest.mark.parametrize("config", [{}, SPLIT], ids=["fused", "subtracted"])
@pytest.mark.parametrize("name", ["every key", "padding, an empty sequence", "holes in the keys", "packed"])
def test_output_and_gradients(name: str, config: dict[str, int]) -> None:
    call = CASES[name]()
    backward = configured(call, "backward", keys=16, rows=16)
    with poisoned_memory():
        found = BACKEND.forward(configured(call, **{**SMALL, "list_percent": 60, "least_list": 64, **config}))
        grad_out = torch.randn_like(found.out)
        grads = BACKEND.backward(backward, grad_out, found.saved, None)
    want, want_grads = oracle.attention(call), oracle.gradients(call, grad_out)
    assert oracle.relative_error(found.out, want.out) < 5e-3
    for side in ("query", "key", "value"):
        assert oracle.relative_error(getattr(grads, side), getattr(want_grads, side)) < 2e-2, side


@pytest.mark.parametrize(("sample", "worth"), [(1, 0.0), (1, 2.5), (2, 0.0), (5, 0.0), (100, 2.5)])
@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0])
def test_sampled_bounds_lie_below_tau(alpha: float, sample: int, worth: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is sampled and however many steps are taken; and steps over every key come close."""
    call = make_call(*draw(100, 704, heads=2, kv_heads=2, spread=1.0), alpha=alpha, return_stats=True)
    found = mark(call, monkeypatch, mark_sample=sample, mark_worth=worth)
    tau = oracle.attention(call).tau
    assert tau is not None
    if alpha not in (1.5, 2.0):
        tau = tau / (alpha - 1)
    assert (found.before <= tau + found.margin + EPSILON).all()
    if (sample, worth) == (1, 0.0):
        assert (found.before >= tau - 1e-2).all()


def test_a_block_over_the_limit_gets_no_list(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = draw(128, 400, spread=40.0)
    query[:, :, :64] = 0  # wants every key
    found = mark(make_call(query, key, value), monkeypatch, list_percent=50, least_list=16, mark_sample=1)
    assert found.lists[0] is None
    assert found.lists[1] is not None


def test_a_key_that_is_not_finite_leaves_no_list(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = draw(128, 400, heads=2, kv_heads=2)
    key[0, 1, 100] = torch.nan
    found = mark(make_call(query, key, value), monkeypatch)
    assert [marked is None for marked in found.lists] == [False, False, True, True]


def test_a_full_pool_leaves_no_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_MOST_ENTRIES", 500)
    found = mark(make_call(*draw(512, 400, spread=1.0)), monkeypatch)
    assert None in found.lists
    assert sum(len(marked) for marked in found.lists if marked) <= 500


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("groups", "split", "subtract"), [(1, 1, 0), (2, 2, 1), (3, 1, 1)])
def test_host_and_kernel_agree_on_shared_memory(groups: int, split: int, subtract: int, dim: int) -> None:
    instance = MarkInstance(head_dim=dim, groups=groups, stages=2, ahead=0, split=split, subtract=subtract)
    assert emulator.shared_bytes(instance) == instance.shared_bytes


def test_it_is_what_hopper_launches_where_it_can() -> None:
    hopper = DeviceInfo("cuda", "H100", capability=(9, 0), shared_memory=227 * 1024)
    call = causal()
    assert "forward_mark" in configs.forward_instances(call.spec, configs.default_forward(call.spec, hopper))
    for spec, device in (
        (call.spec, dataclasses.replace(hopper, capability=(8, 0))),
        (call.spec, dataclasses.replace(hopper, capability=(10, 0))),
        (dataclasses.replace(call.spec, dtype="float32"), hopper),
        (dataclasses.replace(call.spec, alibi=True), hopper),
        (dataclasses.replace(call.spec, head_dim=256), hopper),
        (dataclasses.replace(call.spec, head_dim=32), hopper),
    ):
        assert "forward_mark" not in configs.forward_instances(spec, configs.default_forward(spec, device))


def test_maps_are_of_tensors_that_the_copy_engine_reads() -> None:
    x = torch.zeros(2, 3, 5, 64, dtype=torch.float16)
    found = tensor_map(x.transpose(1, 2).contiguous().transpose(1, 2))
    assert found is not None
    assert (found.lengths, found.strides) == ((64, 5, 3, 2), (384, 128, 1920))
    assert tensor_map(x[:, :1]) is not None
    assert tensor_map(x[:, :1].expand(2, 3, 5, 64)) is None
    assert tensor_map(x[..., 1:]) is None
    assert tensor_map(x.mT) is None
    assert tensor_map(x.float()) is None


@pytest.mark.parametrize("status", [0, 1])
def test_the_driver_encodes_maps(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a function of C in the driver's place, called as the driver would be."""
    asked: dict[str, Any] = {}

    def driver(to: int, dtype: int, rank: int, base: int, lengths: Any, strides: Any, box: Any, steps: Any, *modes: int) -> int:
        asked.update(aligned=to % 64 == 0, dtype=dtype, base=base, lengths=lengths[:rank], strides=strides[: rank - 1])
        asked.update(box=box[:rank], steps=steps[:rank], modes=modes)
        ctypes.memset(to, 7, 128)
        return status

    pointer, integer, lengths, sizes = (
        ctypes.c_void_p,
        ctypes.c_uint32,
        *map(ctypes.POINTER, (ctypes.c_uint64, ctypes.c_uint32)),
    )
    signature = ctypes.CFUNCTYPE(
        ctypes.c_int, pointer, integer, integer, pointer, lengths, lengths, sizes, sizes, integer, integer, integer, integer
    )
    function = signature(driver)
    monkeypatch.setattr(tensor_maps, "_driver", lambda: function)
    x = torch.zeros(2, 3, 500, 72, dtype=torch.bfloat16)
    of = tensor_map(x)
    assert of is not None
    if status:
        with pytest.raises(RuntimeError, match="error 1"):
            tensor_maps.encode(of, 0)
        return
    assert tensor_maps.encode(of, 0) == bytes([7]) * 128
    assert asked == {
        "aligned": True,
        "dtype": 9,  # CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
        "base": x.data_ptr(),
        "lengths": [72, 500, 3, 2],
        "strides": [144, 72000, 216000],
        "box": [64, 128, 1, 1],
        "steps": [1, 1, 1, 1],
        "modes": (0, 3, 3, 0),  # no interleaving, swizzled by 128 bytes, fetched by 256, zeros outside
    }


def test_keys_the_copy_engine_cannot_read_are_selected_as_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads that share their memory have a stride of 0."""
    query, key, value = draw(100, 300, heads=2)
    launched: list[str] = []
    inner = emulator.launch

    def outer(step: Step, values: Any, maps: Any) -> None:
        launched.append(step.instance.kernel)
        inner(step, values, maps)

    monkeypatch.setattr(emulator, "launch", outer)
    call = make_call(query, key.expand(1, 2, 300, 64), value.expand(1, 2, 300, 64), needs_grad=False)
    found = BACKEND.forward(configured(call, **SMALL))
    assert "forward_select" in launched
    assert "forward_mark" not in launched
    assert oracle.relative_error(found.out, oracle.attention(call).out) < 5e-3


def test_where_nvrtc_refuses_another_pass_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = emulator.compiled

    def outer(instance: Instance) -> Any:
        if instance.architecture is not None:
            raise ArchitectureError("too old", frozenset({instance}))
        return inner(instance)

    monkeypatch.setattr(emulator, "compiled", outer)
    call = causal()
    with pytest.warns(AdasplashWarning, match="too old"):
        found = BACKEND.forward(configured(call, **SMALL))
    assert oracle.relative_error(found.out, oracle.attention(call).out) < 5e-3
