"""The op: torch.compile, autograd, autocast, checkpointing, layouts, and backends that misbehave."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import adasplash_core
from adasplash_core import configs, layout, plugins
from adasplash_core.api import _op_arguments
from adasplash_core.backend import ForwardResult
from adasplash_core.call import validate
from adasplash_core.configs import ConfigLadder, FoundConfig, Rung
from adasplash_core.errors import AdasplashError, AdasplashWarning, ConfigRejectedError, DoubleBackwardError
from tests.core.fakes import FakeConfig, MeanBackend, Provider


def strided(*lengths: int, heads: int = 3, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """(B, H, L, E) views of (B, L, H, E) memory, as a transformer hands them over."""
    return [torch.randn(2, n, heads, 8, dtype=dtype).transpose(1, 2).requires_grad_() for n in lengths]


@pytest.fixture
def mean(monkeypatch: pytest.MonkeyPatch) -> MeanBackend:
    backend = MeanBackend()
    monkeypatch.setitem(plugins.registry().backends, "mean", backend)
    monkeypatch.setattr(configs, "_ladder", ConfigLadder())
    configs.ladder().generation = id(backend)  # nothing kept from other ladders is valid
    return backend


class TestCompile:
    def test_fullgraph_equals_eager_and_new_lengths_and_alphas_compile_nothing_more(self) -> None:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")

        def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, alpha: float) -> torch.Tensor:
            return adasplash_core.attention(q * 2, k, v, alpha=alpha, is_causal=True, backend="torch").square()  # type: ignore[union-attr]

        compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=counter)
        compiled(*strided(4, 6, 6), 1.4)
        compiled_once = counter.frame_count  # 2: aot_eager restarts once on floats that it makes tensors of
        for length, alpha in ((5, 1.5), (6, 1.7), (9, 1.25), (13, 1.9)):
            inputs = strided(length, length + 2, length + 2)
            expected, got = f(*inputs, alpha), compiled(*inputs, alpha)
            torch.testing.assert_close(got, expected)
            for mine, theirs in zip(
                torch.autograd.grad(got.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
            ):
                torch.testing.assert_close(mine, theirs)
        assert counter.frame_count == compiled_once

    @pytest.mark.parametrize(
        "arguments",
        [
            {"alpha": "per head"},
            {"attn_mask": "additive"},
            {"attn_mask": "key"},
            {"kv_lengths": torch.tensor([3, 7]), "window": (3, 0), "causal_alignment": "bottom_right"},
            {"query_offset": torch.tensor(2), "is_causal": True},
            {"dropout_p": 0.3},
            {"return_stats": True},
        ],
        ids=lambda a: "-".join(a),
    )
    def test_every_kind_of_argument_traces_without_a_break(self, arguments: dict[str, Any]) -> None:
        torch._dynamo.reset()
        inputs = strided(5, 7, 7)
        extra: list[torch.Tensor] = []
        if arguments.get("alpha") == "per head":
            extra = [torch.tensor([1.2, 1.5, 2.0], dtype=torch.float64, requires_grad=True)]
            arguments = {**arguments, "alpha": extra[0]}
        if "attn_mask" in arguments:
            additive = torch.randn(2, 1, 5, 7, dtype=torch.float64, requires_grad=True)
            extra = [additive] if arguments["attn_mask"] == "additive" else []
            arguments = {**arguments, "attn_mask": additive if extra else torch.rand(2, 1, 1, 7) > 0.3}

        def f(*tensors: torch.Tensor) -> torch.Tensor:
            result = adasplash_core.attention(*tensors[:3], backend="torch", **arguments)
            return result[0] + result[1].support.sum() if isinstance(result, tuple) else result

        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        torch.manual_seed(0)
        expected = f(*inputs)
        torch.manual_seed(0)
        got = compiled(*inputs)
        torch.testing.assert_close(got, expected)
        leaves = [*inputs, *extra]
        for mine, theirs in zip(
            torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
        ):
            torch.testing.assert_close(mine, theirs)

    def test_compiled_inference_keeps_nothing_for_a_backward(self, mean: MeanBackend) -> None:
        torch._dynamo.reset()
        x = torch.randn(1, 2, 4, 8)
        torch.compile(lambda x: adasplash_core.attention(x, x, x, backend="mean"), fullgraph=True, backend="aot_eager")(x)
        assert not mean.seen[-1].spec.needs_grad

    def test_the_transform_compiles_whole(self) -> None:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")

        def f(x: torch.Tensor, alpha: float) -> torch.Tensor:
            return adasplash_core.entmax(x, alpha, dim=1)

        compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=counter)
        for length, alpha in ((5, 1.5), (6, 1.3), (7, 1.75)):
            x = torch.randn(2, length, 3, dtype=torch.float64, requires_grad=True)
            torch.testing.assert_close(compiled(x, alpha), f(x, alpha))
        assert counter.frame_count == 1


class TestAutograd:
    @pytest.mark.parametrize("arguments", [{}, {"is_causal": True, "return_stats": True}, {"window": (2, 1), "dropout_p": 0.2}])
    def test_opcheck_with_inputs_that_require_grad(self, arguments: dict[str, Any]) -> None:
        alpha = torch.tensor(1.4, dtype=torch.float64, requires_grad=True)
        args = validate(*strided(5, 7, 7), alpha=alpha, **arguments)
        torch.library.opcheck(torch.ops.adasplash.attention_forward.default, _op_arguments(args, "torch", None))

    def test_opcheck_of_the_transform(self) -> None:
        x, alpha = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.tensor(1.5, dtype=torch.float64)
        torch.library.opcheck(torch.ops.adasplash.entmax_forward.default, (x, alpha, "torch", "1.5"))

    def test_a_second_derivative_is_refused_in_words(self) -> None:
        inputs = strided(4, 4, 4)
        out = adasplash_core.attention(*inputs, backend="torch")
        with pytest.raises(DoubleBackwardError, match="no second derivative.*create_graph"):
            torch.autograd.grad(out.sum(), inputs, create_graph=True)  # type: ignore[union-attr]

    def test_the_transform_has_second_derivatives(self) -> None:
        x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradgradcheck(lambda x: adasplash_core.entmax(x, 1.5), (x,))

    def test_no_grad_and_inference_mode_keep_nothing(self, mean: MeanBackend) -> None:
        x = torch.randn(1, 2, 4, 8, requires_grad=True)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                adasplash_core.attention(x, x, x, backend="mean", alpha=1.3)
            assert not mean.seen[-1].spec.needs_grad
        adasplash_core.attention(x, x, x, backend="mean", alpha=1.3).sum().backward()  # type: ignore[union-attr]
        assert x.grad is not None

    def test_only_inputs_that_require_grad_get_one(self) -> None:
        q, k, v = strided(4, 5, 5)
        k = k.detach()
        adasplash_core.attention(q, k, v, backend="torch").sum().backward()  # type: ignore[union-attr]
        assert q.grad is not None
        assert v.grad is not None
        assert k.grad is None

    def test_stats_carry_no_gradient(self) -> None:
        _, stats = adasplash_core.attention(*strided(4, 5, 5), return_stats=True, backend="torch")
        assert not any(x.requires_grad for x in stats)

    @pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
    def test_checkpointing_with_dropout_draws_the_same_mask_twice(self, compiled: bool) -> None:
        torch._dynamo.reset()
        inputs = strided(6, 6, 6)

        def block(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return adasplash_core.attention(q, k, v, dropout_p=0.5, backend="torch")  # type: ignore[return-value]

        def whole(*tensors: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = checkpoint(block, *tensors, use_reentrant=False)
            return result

        run = torch.compile(whole, fullgraph=True, backend="aot_eager") if compiled else whole
        out = run(*inputs)
        weights = torch.randn_like(out)
        _, _, dv = torch.autograd.grad((out * weights).sum(), inputs)
        # With the mask that the forward drew, out is linear in v: <dv, v> = <weights, out>.
        torch.testing.assert_close((dv * inputs[2]).sum(), (weights * out).sum())


class TestAutocast:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_q_k_v_are_cast_and_alpha_is_not(self, dtype: torch.dtype, mean: MeanBackend) -> None:
        mean.dtypes = frozenset({"bfloat16", "float16"})  # type: ignore[misc]
        q, k = torch.randn(1, 2, 4, 8, requires_grad=True), torch.randn(1, 2, 4, 8, dtype=torch.float32)
        with torch.autocast("cpu", dtype):
            out = adasplash_core.attention(q, k, k.to(torch.bfloat16), alpha=torch.tensor(1.3), backend="mean")
        assert out.dtype is dtype  # type: ignore[union-attr]
        assert mean.seen[-1].alpha.dtype is torch.float32

    def test_float64_stays(self, mean: MeanBackend) -> None:
        mean.dtypes = frozenset({"float64"})  # type: ignore[misc]
        x = torch.randn(1, 2, 4, 8, dtype=torch.float64)
        with torch.autocast("cpu", torch.bfloat16):
            assert adasplash_core.attention(x, x, x, backend="mean").dtype is torch.float64  # type: ignore[union-attr]


class TestLayout:
    @pytest.mark.parametrize("length_first", [False, True])
    def test_outputs_and_gradients_follow_the_inputs_memory_order(self, length_first: bool) -> None:
        q, k, v = strided(5, 6, 6) if length_first else [torch.randn(2, 3, n, 8, requires_grad=True) for n in (5, 6, 6)]
        out = adasplash_core.attention(q, k, v, backend="torch")
        gradients = torch.autograd.grad(out.sum(), (q, k, v))  # type: ignore[union-attr]
        for x in (out, *gradients):
            assert (x.transpose(1, 2) if length_first else x).is_contiguous()  # type: ignore[union-attr]

    def test_conform_copies_only_what_does_not_fit(self) -> None:
        x = torch.randn(2, 4, 3, 8).transpose(1, 2)
        fits = layout.empty_like(x, 5)
        assert layout.conform(fits, x).data_ptr() == fits.data_ptr()
        assert layout.conform(fits.contiguous(), x).stride() == fits.stride()


class TestEmpty:
    @pytest.mark.parametrize(("batch", "q_len", "kv_len"), [(0, 4, 4), (2, 0, 4), (2, 4, 0)])
    def test_empty_inputs_give_zeros_and_zero_gradients(self, batch: int, q_len: int, kv_len: int) -> None:
        inputs = [torch.randn(batch, 3, n, 8, requires_grad=True) for n in (q_len, kv_len, kv_len)]
        alpha = torch.full((3,), 1.5, requires_grad=True)
        out, stats = adasplash_core.attention(*inputs, alpha=alpha, return_stats=True)
        assert out.shape == (batch, 3, q_len, 8)
        assert not out.any()
        assert not stats.support.any()
        for gradient in torch.autograd.grad(out.sum(), [*inputs, alpha]):
            assert not gradient.any()


class TestBackendsThatMisbehave:
    def test_a_tuned_config_that_does_not_run_falls_back_to_the_default(
        self, mean: MeanBackend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        provider = Provider(answers={"forward": FoundConfig(FakeConfig(block=2000), Rung.USER_DATABASE)})
        monkeypatch.setattr(configs, "_ladder", ConfigLadder([provider]))
        configs.ladder().generation = id(provider)
        x = torch.randn(1, 2, 4, 8)
        with pytest.warns(AdasplashWarning, match=r"cannot run the tuned forward config FakeConfig\(block=2000"):
            adasplash_core.attention(x, x, x, backend="mean")
        adasplash_core.attention(x, x, x, backend="mean")  # no second warning
        assert mean.seen[-1].config == FakeConfig()

    def test_an_explicit_config_that_does_not_run_is_the_callers_error(self, mean: MeanBackend) -> None:
        x = torch.randn(1, 2, 4, 8)
        with pytest.raises(ConfigRejectedError, match="block=5000.*too large"):
            adasplash_core.attention(x, x, x, backend="mean", config={"forward": {"block": 5000}})

    def test_explicit_configs_reach_both_passes(self, mean: MeanBackend) -> None:
        x = torch.randn(1, 2, 4, 8, requires_grad=True)
        config = {"forward": {"block": 3}, "backward": FakeConfig(block=5)}
        adasplash_core.attention(x, x, x, backend="mean", config=config).sum().backward()  # type: ignore[union-attr]
        assert [call.config.to_dict()["block"] for call in mean.seen] == [3, 5]

    def test_a_wrong_output_is_named_as_the_backends_fault(self, mean: MeanBackend, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(mean, "forward", lambda call: ForwardResult(call.query[:, :1]), raising=False)
        x = torch.randn(1, 2, 4, 8)
        with pytest.raises(AdasplashError, match="'mean' broke its contract.*adasplash backends check"):
            adasplash_core.attention(x, x, x, backend="mean")
