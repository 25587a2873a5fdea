"""Where alpha lives: numbers, values that a schedule moves, parameters; and the schedule."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from adasplash_core import attention
from adasplash_core.errors import ArgumentError, ArgumentTypeError
from adasplash_core.nn import Alpha, AlphaSchedule, EntmaxAttention


class TestAlpha:
    def test_a_fixed_number_stays_a_number(self) -> None:
        assert Alpha(1.3)() == 1.3
        assert isinstance(Alpha(1.3)(), float)

    def test_one_a_head(self) -> None:
        torch.testing.assert_close(Alpha([1.0, 1.5, 2.0], heads=3)(), torch.tensor([1.0, 1.5, 2.0]))

    def test_learnable_is_one_plus_sigmoid(self) -> None:
        alpha = Alpha(1.2, heads=3, learnable=True)
        value = alpha()
        torch.testing.assert_close(value, torch.full((3,), 1.2))
        torch.testing.assert_close(value, 1 + alpha.theta.sigmoid())
        value.sum().backward()
        torch.testing.assert_close(alpha.theta.grad, torch.full((3,), 0.2 * 0.8))

    def test_learning_it_moves_towards_the_data(self) -> None:
        """Outputs made with alpha = 1.8 are fitted from 1.2: only alpha can learn."""
        torch.manual_seed(0)
        q, k, v = (torch.randn(2, 3, 32, 8) for _ in range(3))
        wanted = attention(2 * q, k, v, alpha=1.8)
        alpha = Alpha(1.2, heads=3, learnable=True)
        optimizer = torch.optim.Adam(alpha.parameters(), lr=0.1)
        for _ in range(80):
            optimizer.zero_grad()
            (attention(2 * q, k, v, alpha=alpha()) - wanted).square().sum().backward()
            optimizer.step()
        torch.testing.assert_close(alpha.current(), torch.full((3,), 1.8), atol=0.02, rtol=0)

    @pytest.mark.parametrize("cast", [nn.Module.bfloat16, nn.Module.half, lambda m: m.to_empty(device="cpu"), nn.Module.double])
    def test_a_models_cast_does_not_change_it(self, cast: Any) -> None:
        for value, kept in ((1.3, 1.3), ([1.3, 1.7], [1.3, 1.7])):
            model = nn.Sequential(Alpha(value))
            cast(model)
            assert model[0].value.dtype is torch.float32
            torch.testing.assert_close(model[0].current(), torch.tensor(kept))

    def test_meta_devices(self) -> None:
        with torch.device("meta"):
            layer = EntmaxAttention(8, 2, alpha=1.3, learnable_alpha=True, rotary_base=100.0)
            fixed = EntmaxAttention(8, 2, alpha=1.3)
        for module in (layer, fixed):
            module.to_empty(device="cpu")
            for part in module.modules():
                if hasattr(part, "reset_parameters"):
                    part.reset_parameters()
        torch.testing.assert_close(layer.alpha.current(), torch.full((2,), 1.3))
        assert layer.rotary is not None
        torch.testing.assert_close(layer.rotary.frequencies, torch.tensor([1.0, 0.1]))
        assert fixed.alpha() == 1.3

    def test_state_dicts_carry_it(self) -> None:
        for make in (lambda a: Alpha(a), lambda a: Alpha([a, a / 1.1]), lambda a: Alpha(a, heads=2, learnable=True)):
            source, target = make(1.7), make(1.2)
            target.load_state_dict(source.state_dict())
            torch.testing.assert_close(target.current(), source.current())
            torch.testing.assert_close(torch.as_tensor(target()), torch.as_tensor(source()))
            model = copy.deepcopy(target).bfloat16()
            torch.testing.assert_close(model.current(), source.current(), atol=4e-3, rtol=0)

    def test_loading_the_same_number_keeps_its_digits(self) -> None:
        alpha = Alpha(1.3)
        alpha.load_state_dict(Alpha(1.3).state_dict())
        assert alpha() == 1.3

    def test_one_that_is_not_persistent_leaves_no_trace(self) -> None:
        assert not Alpha(1.7, persistent=False).state_dict()

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"value": 0.99}, ArgumentError, "at least 1"),
            ({"value": math.nan}, ArgumentError, "at least 1"),
            ({"value": "1.5"}, ArgumentTypeError, "number"),
            ({"value": torch.tensor(1.5)}, ArgumentTypeError, "number"),
            ({"value": True}, ArgumentTypeError, "number"),
            ({"value": [1.5, 1.6], "heads": 3}, ArgumentError, "one a head, 3"),
            ({"value": []}, ArgumentError, "one a head"),
            ({"value": 1.0, "heads": 2, "learnable": True}, ArgumentError, "never reaches"),
            ({"value": 2.0, "heads": 2, "learnable": True}, ArgumentError, "never reaches"),
            ({"value": 1.5, "learnable": True}, ArgumentError, "how many heads"),
        ],
    )
    def test_bad_values(self, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            Alpha(**arguments)


class TestSchedule:
    @settings(max_examples=50, deadline=None, derandomize=True)
    @given(steps=st.integers(1, 40), start=st.floats(1, 2), end=st.floats(1, 2), shape=st.sampled_from(["linear", "cosine"]))
    def test_goes_from_start_to_end_and_stays(self, steps: int, start: float, end: float, shape: str) -> None:
        alpha = Alpha()
        schedule = AlphaSchedule([alpha], steps, start=start, end=end, shape=shape)
        way = [schedule.alpha] + [schedule.step() for _ in range(steps + 2)]
        assert way[0] == start
        assert way[steps:] == [end] * 3
        assert way == sorted(way, reverse=end < start)
        assert alpha() == end
        torch.testing.assert_close(alpha.current(), torch.tensor(end, dtype=torch.float32))

    def test_is_a_number_again_where_it_has_come_to_its_end(self) -> None:
        """So that eager calls take the kernels made for that number."""
        alpha = Alpha()
        schedule = AlphaSchedule([alpha], 2)
        seen = [type(alpha())] + [(schedule.step(), type(alpha()))[1] for _ in range(3)]
        assert seen == [torch.Tensor, torch.Tensor, float, float]
        schedule.set_step(1)
        torch.testing.assert_close(alpha(), torch.tensor(1.25))

    def test_finished_early_it_lets_go(self) -> None:
        alphas = Alpha(), Alpha([1.1, 1.2])
        assert AlphaSchedule(alphas, 100, end=2.0).finish() == 2.0
        assert alphas[0]() == 2.0
        assert isinstance(alphas[0](), float)
        torch.testing.assert_close(alphas[1](), torch.full((2,), 2.0))

    def test_shapes(self) -> None:
        linear, cosine = (AlphaSchedule([Alpha()], 8, shape=shape) for shape in ("linear", "cosine"))
        assert linear.alpha_at(2) == 1.125
        assert cosine.alpha_at(2) == pytest.approx(1 + 0.5 * (1 - math.cos(math.pi / 4)) / 2)
        assert cosine.alpha_at(4) == pytest.approx(1.25)

    def test_no_steps_mean_the_end_at_once(self) -> None:
        assert AlphaSchedule([Alpha()], 0).alpha == 1.5

    def test_moves_all_that_is_not_learnable(self) -> None:
        model = nn.ModuleList(
            [EntmaxAttention(8, 2), EntmaxAttention(8, 2, learnable_alpha=True, alpha=1.3), Alpha([1.1, 1.2])]
        )
        AlphaSchedule(model, 10, end=2.0).set_step(5)
        torch.testing.assert_close(model[0].alpha(), torch.tensor(1.5))
        torch.testing.assert_close(model[1].alpha(), torch.full((2,), 1.3))
        torch.testing.assert_close(model[2](), torch.full((2,), 1.5))

    def test_starts_as_softmax(self) -> None:
        torch.manual_seed(0)
        layer, x = EntmaxAttention(8, 2), torch.randn(1, 6, 8)
        AlphaSchedule(layer, 10)
        softmax = EntmaxAttention(8, 2, alpha=1.0)
        softmax.load_state_dict({**layer.state_dict(), "alpha.value": torch.tensor(1.0)})
        torch.testing.assert_close(layer(x), softmax(x))

    def test_goes_on_from_a_state_dict(self) -> None:
        first = AlphaSchedule([Alpha()], 10, start=1.2, end=1.9, shape="cosine")
        for _ in range(4):
            first.step()
        alpha = Alpha()
        second = AlphaSchedule([alpha], 3)
        second.load_state_dict(first.state_dict())
        assert second.alpha == first.alpha
        assert [second.step() for _ in range(8)] == [first.step() for _ in range(8)]
        assert alpha() == 1.9

    def test_no_step_compiles_anything(self) -> None:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        torch.manual_seed(0)
        layer, x = EntmaxAttention(8, 2, is_causal=True), torch.randn(2, 9, 8)
        schedule = AlphaSchedule(layer, 4)
        compiled = torch.compile(layer, fullgraph=True, backend=counter)
        outputs = []
        for _ in range(6):
            out = compiled(x)
            torch.testing.assert_close(out, layer(x))
            out.sum().backward()
            outputs.append(out.detach())
            schedule.step()
        assert counter.frame_count == 1
        assert not torch.equal(outputs[0], outputs[1])
        assert torch.equal(outputs[4], outputs[5])
        schedule.finish()
        torch.testing.assert_close(compiled(x), outputs[5])
        assert counter.frame_count == 2

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"steps": -1}, "steps must not be negative"),
            ({"steps": 5, "start": 0.5}, "start must be"),
            ({"steps": 5, "end": 2.5}, "end must be"),
            ({"steps": 5, "shape": "sine"}, "'linear', 'cosine'"),
        ],
    )
    def test_bad_arguments(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ArgumentError, match=message):
            AlphaSchedule([Alpha()], **arguments)

    def test_models_with_nothing_to_move(self) -> None:
        for model in (nn.Linear(2, 2), Alpha(1.5, heads=2, learnable=True)):
            with pytest.raises(ArgumentError, match="not learnable"):
                AlphaSchedule(model, 5)

    def test_a_learnable_alpha_cannot_be_set(self) -> None:
        alpha = Alpha(1.5, heads=2, learnable=True)
        with pytest.raises(ArgumentError, match="optimizer"):
            alpha.set_(1.2)
        with pytest.raises(ArgumentError, match="not learnable"):
            alpha.follow_schedule()
