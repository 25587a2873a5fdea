"""torch.compile of whole models, autocast and activation checkpointing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from adasplash_core.nn import AlphaSchedule, replace_multihead_attention

from .conftest import ids, loss_and_gradients

Make = Callable[..., nn.Module]


class TestCompile:
    def test_the_whole_model_is_one_graph_for_all_lengths(self, decoder: Make) -> None:
        model, counter = decoder(layers=1), CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
        compilations = set()
        for length in (9, 12, 20):
            tokens = ids(length)
            torch.testing.assert_close(loss_and_gradients(model, tokens, compiled), loss_and_gradients(model, tokens))
            compilations.add(counter.frame_count)
        assert len(compilations) == 1

    def test_an_annealed_model_compiles_once(self, decoder: Make) -> None:
        model, counter = decoder(learnable_alpha=False, layers=1), CompileCounterWithBackend("aot_eager")
        schedule = AlphaSchedule(model, 3)
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        losses = []
        for _ in range(5):
            found = loss_and_gradients(model, ids(), compiled)
            torch.testing.assert_close(found, loss_and_gradients(model, ids()))
            losses.append(float(found[0]))
            schedule.step()
        assert counter.frame_count == 1
        assert len({f"{loss:.6f}" for loss in losses[:4]}) == 4

    @pytest.mark.parametrize("training", [False, True])
    def test_torchs_encoder_with_our_attention(self, training: bool) -> None:
        torch.manual_seed(0)
        torch._dynamo.reset()
        layer = nn.TransformerEncoderLayer(12, 2, 24, dropout=0.0, batch_first=True)
        encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).train(training)
        replace_multihead_attention(encoder, learnable_alpha=True)
        x, hidden = torch.randn(2, 6, 12), torch.zeros(2, 6, dtype=torch.bool)
        hidden[0, 4:] = True
        compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
        with torch.set_grad_enabled(training):
            torch.testing.assert_close(compiled(x, src_key_padding_mask=hidden), encoder(x, src_key_padding_mask=hidden))


class TestAutocast:
    @pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
    def test_bfloat16(self, decoder: Make, compiled: bool) -> None:
        model = decoder(layers=1)
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model

        def autocast(*inputs: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                result: torch.Tensor = run(*inputs)
                return result

        loss, gradients = loss_and_gradients(model, ids(), autocast)
        exact, exact_gradients = loss_and_gradients(model, ids())
        torch.testing.assert_close(loss, exact, rtol=1e-2, atol=0)
        for (name, _), found, expected in zip(model.named_parameters(), gradients, exact_gradients, strict=True):
            assert found.dtype is torch.float32
            # Small tensors of small gradients are rounding for the most part.
            assert (found - expected).norm() < 0.1 * expected.norm() + 1e-3, name
        with torch.autocast("cpu", torch.bfloat16):
            assert model.blocks[0].attention(torch.randn(1, 3, 16)).dtype is torch.bfloat16  # type: ignore[union-attr, index]

    def test_a_model_cast_to_bfloat16_keeps_its_alpha(self, decoder: Make) -> None:
        model = decoder(learnable_alpha=False, alpha=1.3).bfloat16()
        assert model(ids()).dtype is torch.bfloat16
        assert model.blocks[0].attention.alpha() == 1.3  # type: ignore[union-attr, index]


class TestCheckpointing:
    @pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
    def test_recomputes_the_same_also_with_dropout(self, decoder: Make, compiled: bool) -> None:
        layers = 1 if compiled else 2
        plain, model = decoder(layers=layers, dropout=0.3), decoder(layers=layers, dropout=0.3, checkpointed=True)
        model.load_state_dict(plain.state_dict())
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        found = loss_and_gradients(model, ids(), run)
        if not compiled:  # a compiled program draws other masks
            torch.testing.assert_close(found, loss_and_gradients(plain, ids()))
        # The gradient agrees with the loss's change in its direction: the backward saw the masks of the forward.
        step = 1e-3
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), found[1], strict=True):
                parameter.add_(gradient, alpha=step)
        torch.manual_seed(1)
        changed = run(ids()[:, :-1], ids()[:, 1:]).detach()
        slope = sum(float(gradient.square().sum()) for gradient in found[1])
        assert float(changed - found[0]) == pytest.approx(step * slope, rel=0.05)

    def test_keeps_less(self, decoder: Make) -> None:
        kept = []
        for checkpointed in (False, True):
            model, sizes = decoder(checkpointed=checkpointed), []

            def pack(x: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
                sizes.append(x.numel())
                return x

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                model(ids()[:, :-1], ids()[:, 1:])
            kept.append(sum(sizes))
        assert kept[1] < kept[0] / 2
