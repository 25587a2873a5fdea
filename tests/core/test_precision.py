"""TF32: PyTorch's settings are read when a call is made, for float32 on NVIDIA's GPUs alone, and hold for its backward, too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import adasplash_core
from adasplash_core import call as call_module
from adasplash_core import configs, plugins, precision
from adasplash_core.backend import AttentionCall, ForwardResult
from adasplash_core.call import make_call
from adasplash_core.configs import ConfigLadder
from adasplash_core.device import device_info
from adasplash_core.dispatch import Choice, Explanation
from adasplash_core.precision import as_in, restored, tf32, tf32_allowed
from adasplash_core.testing import oracle
from adasplash_core.testing.compare import ConformanceError, Expected, compare_forward
from tests.core.fakes import MeanBackend


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors stand for a GPU's."""
    monkeypatch.setattr(precision, "knows_tf32", lambda _device_type: True)


@pytest.fixture
def mean(monkeypatch: pytest.MonkeyPatch) -> MeanBackend:
    backend = MeanBackend(dtypes=frozenset({"float16", "bfloat16", "float32", "float64"}))
    monkeypatch.setitem(plugins.registry().backends, "mean", backend)
    monkeypatch.setattr(configs, "_ladder", ConfigLadder())
    configs.ladder().generation = id(backend)  # nothing kept from other ladders is valid
    return backend


def qkv(dtype: torch.dtype = torch.float32, grad: bool = False) -> list[torch.Tensor]:
    return [torch.randn(1, 2, 16, 8).to(dtype).requires_grad_(grad) for _ in range(3)]


def set_new(value: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = value


def set_old(value: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = value


@pytest.mark.filterwarnings("ignore:Please use the new API")
@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ([lambda: set_old(True)], True),
        ([lambda: torch.set_float32_matmul_precision("high")], True),
        ([lambda: torch.set_float32_matmul_precision("medium")], True),
        ([lambda: set_new("tf32")], True),
        ([lambda: set_old(True), lambda: set_new("ieee")], False),
        ([lambda: set_new("tf32"), lambda: set_old(False)], False),
        ([lambda: torch.set_float32_matmul_precision("highest"), lambda: set_new("tf32")], True),
    ],
)
def test_every_setting_of_pytorch_is_read_after_any_other(settings: list[Callable[[], None]], allowed: bool) -> None:
    with restored():
        for apply in settings:
            apply()
        assert tf32_allowed("cuda") is allowed
        assert not tf32_allowed("cpu")


def settings() -> tuple[str, str, str]:
    matmul = torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
    return (*matmul, torch.get_float32_matmul_precision())


@pytest.mark.parametrize("before", ["highest", "high", "medium"])
def test_settings_are_left_as_they_were(before: str) -> None:
    with restored():
        torch.set_float32_matmul_precision(before)
        found = settings()
        with tf32(True):
            assert torch.backends.cuda.matmul.fp32_precision == "tf32"
            with tf32(False):
                assert torch.backends.cuda.matmul.fp32_precision != "tf32"
            assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        assert settings() == found


def test_settings_that_contradict_each_other_are_left_so() -> None:
    with restored():
        torch.set_float32_matmul_precision("highest")
        set_new("tf32")
        with tf32(False):
            pass
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert torch.get_float32_matmul_precision()  # no contradiction is left behind


def test_a_cpus_calls_know_no_tf32() -> None:
    with tf32(True):
        assert not make_call(*qkv()).spec.tf32


@pytest.mark.usefixtures("as_on_a_gpu")
def test_float32_alone_has_it() -> None:
    with tf32(True):
        dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
        specs = [make_call(*qkv(dtype)).spec for dtype in dtypes]
    assert [spec.tf32 for spec in specs] == [True, False, False, False]
    assert [spec.arithmetic for spec in specs] == ["tf32", "float16", "bfloat16", "float64"]


def test_other_dtypes_do_not_even_read_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_module, "tf32_allowed", lambda _device_type: pytest.fail("read"))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        make_call(*qkv(dtype))


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_changed_setting_is_honoured_by_the_next_call(mean: MeanBackend) -> None:
    inputs = qkv()
    for allowed in (False, True, False, True):
        with tf32(allowed):
            adasplash_core.attention(*inputs, backend="mean")
    assert [call.spec.tf32 for call in mean.seen] == [False, True, False, True]


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("allowed", [False, True])
def test_a_backward_is_as_its_forward_was(mean: MeanBackend, allowed: bool) -> None:
    with tf32(allowed):
        out = adasplash_core.attention(*qkv(grad=True), backend="mean")
    assert isinstance(out, torch.Tensor)
    with tf32(not allowed):
        out.sum().backward()
    assert [call.spec.tf32 for call in mean.seen] == [allowed, allowed]


@pytest.mark.usefixtures("as_on_a_gpu")
def test_compiled_in_one_graph_it_is_made_anew_when_the_setting_has_changed(mean: MeanBackend) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def double(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return adasplash_core.attention(q, k, v, backend="mean") * 2  # type: ignore[operator]

    compiled = torch.compile(double, fullgraph=True, backend=counter)
    inputs = qkv()
    for allowed in (True, True, False):
        with tf32(allowed):
            compiled(*inputs)
    assert [call.spec.tf32 for call in mean.seen] == [True, True, False]
    assert counter.frame_count == 2


@pytest.mark.usefixtures("as_on_a_gpu")
def test_explain_says_it(mean: MeanBackend) -> None:
    inputs = qkv()
    said = {}
    for allowed in (False, True):
        with tf32(allowed):
            said[allowed] = adasplash_core.explain(*inputs, backend="mean")
    assert isinstance(said[True], Explanation)
    assert isinstance(said[True].choice, Choice)
    assert "products: may be rounded to TF32" in str(said[True])
    assert "TF32" not in str(said[False])
    assert [said[allowed].as_dict()["spec"]["tf32"] for allowed in (False, True)] == [False, True]
    assert said[True].device == device_info("cpu")


@pytest.mark.usefixtures("as_on_a_gpu")
def test_as_in_sets_what_a_spec_says_and_minds_float32_alone() -> None:
    with tf32(True):
        rounded, half = make_call(*qkv()).spec, make_call(*qkv(torch.float16)).spec
    exact = make_call(*qkv()).spec
    for spec, before, within in ((rounded, False, True), (exact, True, False), (half, True, True), (half, False, False)):
        with tf32(before), as_in(spec):
            assert tf32_allowed("cuda") is within


def rounded_to_tf32(x: torch.Tensor) -> torch.Tensor:
    """What tensor cores read: the last 13 bits of the significand dropped."""
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


def through_tf32(call: AttentionCall) -> ForwardResult:
    operands = {name: rounded_to_tf32(getattr(call, name)) for name in ("query", "key", "value")}
    return ForwardResult(oracle.attention(replace(call, **operands)).out.float(), [])


@pytest.mark.usefixtures("as_on_a_gpu")
def test_results_are_judged_by_what_their_spec_allows() -> None:
    backend, inputs = MeanBackend(), [torch.randn(1, 2, 64, 16) for _ in range(3)]
    for allowed in (False, True):
        with tf32(allowed):
            call = make_call(*inputs)
        expected = Expected.of(call, backend.error_bound(call.spec.arithmetic))
        if allowed:
            compare_forward(expected, through_tf32(call))
            with pytest.raises(ConformanceError, match="relative error"):
                compare_forward(expected, ForwardResult(through_tf32(call).out * 1.2, []))
        else:
            with pytest.raises(ConformanceError, match="relative error"):
                compare_forward(expected, through_tf32(call))
