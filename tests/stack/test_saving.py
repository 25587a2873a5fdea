"""Models leave the process and come back: state dicts, safetensors, pickles, torch.export."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn

from adasplash_core.nn import AlphaSchedule, EntmaxMultiheadAttention, replace_multihead_attention

from .conftest import ids

Make = Callable[..., nn.Module]


@pytest.mark.parametrize("learnable", [False, True], ids=["scheduled", "learnable"])
class TestStateDicts:
    def test_carry_alpha_as_it_was_left(self, decoder: Make, learnable: bool) -> None:
        source = self.trained(decoder, learnable)
        stream = io.BytesIO()
        torch.save(source.state_dict(), stream)
        stream.seek(0)
        target = decoder(learnable_alpha=learnable, alpha=1.9)
        assert not torch.allclose(target(ids()), source(ids()))
        target.load_state_dict(torch.load(stream, weights_only=True))
        torch.testing.assert_close(target(ids()), source(ids()))

    def test_load_onto_the_meta_device_by_assignment(self, decoder: Make, learnable: bool) -> None:
        source = self.trained(decoder, learnable)
        with torch.device("meta"):
            target = decoder(learnable_alpha=learnable, alpha=1.9)
        target.load_state_dict(source.state_dict(), assign=True)
        for module in target.modules():
            if hasattr(module, "frequencies"):  # rotary tables are not in state dicts
                module.to_empty(device="cpu")
        torch.testing.assert_close(target(ids()), source(ids()))

    def test_safetensors(self, decoder: Make, learnable: bool, tmp_path: Path) -> None:
        source, target = self.trained(decoder, learnable), decoder(learnable_alpha=learnable, alpha=1.9)
        save_model(source, str(tmp_path / "model.safetensors"))
        load_model(target, tmp_path / "model.safetensors")
        torch.testing.assert_close(target(ids()), source(ids()))

    def test_copies_and_pickles(self, decoder: Make, learnable: bool) -> None:
        source = self.trained(decoder, learnable)
        attention = source.blocks[0].attention  # type: ignore[union-attr, index]
        for other in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
            x = torch.randn(1, 5, 16)
            torch.testing.assert_close(other(x), attention(x))

    @staticmethod
    def trained(decoder: Make, learnable: bool) -> nn.Module:
        model = decoder(learnable_alpha=learnable, alpha=1.2)
        if learnable:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name.endswith("theta"):
                        parameter.add_(torch.linspace(-1, 1, 4))
        else:
            AlphaSchedule(model, 4).set_step(3)
        return model


def exported(program: torch.export.ExportedProgram) -> nn.Module:
    """The program after a trip through a file."""
    stream = io.BytesIO()
    torch.export.save(program, stream)
    stream.seek(0)
    return torch.export.load(stream).module()


class TestExport:
    def test_a_decoder_for_all_lengths(self, decoder: Make) -> None:
        model = decoder(layers=1).eval()
        shapes = {"ids": {0: torch.export.Dim("batch", max=8), 1: torch.export.Dim("length", min=2, max=20)}}
        with torch.no_grad():
            module = exported(torch.export.export(model, (ids(12),), dynamic_shapes=shapes))
            for tokens in (ids(12), ids(20), ids(5, batch=3)):
                torch.testing.assert_close(module(tokens), model(tokens))

    def test_torchs_encoder_with_a_padding_mask(self) -> None:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(12, 2, 24, dropout=0.1, batch_first=True)
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
        replace_multihead_attention(encoder, alpha=1.7)
        x, hidden = torch.randn(2, 6, 12), torch.zeros(2, 6, dtype=torch.bool)
        hidden[0, 4:] = True
        options = {"src_key_padding_mask": hidden}
        with torch.no_grad():
            module = exported(torch.export.export(encoder, (x,), options))
            torch.testing.assert_close(module(x, **options), encoder(x, **options))

    def test_the_drop_in_with_weights(self) -> None:
        torch.manual_seed(0)
        layer, x = EntmaxMultiheadAttention(12, 3, batch_first=True).eval(), torch.randn(2, 6, 12)
        with torch.no_grad():
            module = exported(torch.export.export(layer, (x, x, x)))
            torch.testing.assert_close(module(x, x, x), layer(x, x, x))
