"""EntmaxMultiheadAttention: torch's module in everything but the function that turns scores into weights."""

from __future__ import annotations

import inspect
from typing import Any

import entmax as entmax_package
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adasplash_core.errors import ArgumentError, ArgumentTypeError
from adasplash_core.nn import EntmaxMultiheadAttention, replace_multihead_attention

EMBED, HEADS = 12, 3


def pair(alpha: float = 1.0, **options: Any) -> tuple[nn.MultiheadAttention, EntmaxMultiheadAttention]:
    """torch's layer and ours with the same float64 weights, all of them random (torch starts biases at 0)."""
    torch.manual_seed(0)
    softmax = nn.MultiheadAttention(EMBED, HEADS, dtype=torch.float64, **options)
    for parameter in softmax.parameters():
        nn.init.normal_(parameter, std=0.5)
    ours = EntmaxMultiheadAttention(EMBED, HEADS, dtype=torch.float64, alpha=alpha, **options)
    ours.load_state_dict(softmax.state_dict())
    return softmax, ours


def tensors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]


class TestAlphaOneIsTorch:
    """With alpha = 1 it must be torch's layer: outputs, weights, and gradients to inputs and parameters."""

    @pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")  # torch merges a boolean and an added mask, too
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(
        batch_first=st.booleans(),
        batched=st.booleans(),
        bias=st.booleans(),
        add_bias_kv=st.booleans(),
        add_zero_attn=st.booleans(),
        kdim=st.sampled_from([None, 7]),
        vdim=st.sampled_from([None, 5]),
        same=st.booleans(),
        padding=st.sampled_from([None, "bool", "float"]),
        mask=st.sampled_from([None, "bool", "float", "bool, one a head", "float, one a head"]),
        need_weights=st.booleans(),
        average=st.booleans(),
    )
    def test_all_options(
        self, batch_first: bool, batched: bool, bias: bool, add_bias_kv: bool, add_zero_attn: bool, kdim: int | None,
        vdim: int | None, same: bool, padding: str | None, mask: str | None, need_weights: bool, average: bool,
    ) -> None:  # fmt: skip
        batch, q_len, kv_len = (2 if batched else 1), 5, (5 if same else 6)
        same = same and kdim is None and vdim is None
        softmax, ours = pair(
            bias=bias, add_bias_kv=add_bias_kv, add_zero_attn=add_zero_attn, kdim=kdim, vdim=vdim, batch_first=batch_first
        )

        def shape(length: int, size: int) -> tuple[int, ...]:
            if not batched:
                return (length, size)
            return (batch, length, size) if batch_first else (length, batch, size)

        inputs = tensors(shape(q_len, EMBED), shape(kv_len, kdim or EMBED), shape(kv_len, vdim or EMBED))
        options: dict[str, Any] = {"need_weights": need_weights, "average_attn_weights": average}
        if padding:
            hidden = torch.zeros(batch, kv_len, dtype=torch.bool)
            hidden[0, -2:] = hidden[-1, 1] = True
            options["key_padding_mask"] = as_mask(hidden if batched else hidden[0], padding)
        if mask:
            hidden = torch.rand(batch * HEADS, q_len, kv_len, generator=torch.Generator().manual_seed(2)) < 0.4
            hidden[..., 0] = False  # a row that sees nothing is NaN in torch
            options["attn_mask"] = as_mask(hidden if "head" in mask else hidden[0], mask)
        results = []
        for layer in (softmax, ours):
            q, k, v = (x.detach().requires_grad_() for x in inputs)
            out, weights = layer(q, q, q, **options) if same else layer(q, k, v, **options)
            loss = (out * out.detach().cos()).sum() + (0 if weights is None else (weights**2).sum())
            given_to = [q] if same else [q, k, v]
            results.append((out, weights, torch.autograd.grad(loss, [*given_to, *layer.parameters()])))
        torch.testing.assert_close(results[1], results[0])

    @pytest.mark.parametrize("padding", [None, "bool", "float"])
    @pytest.mark.parametrize("extra", [{}, {"add_bias_kv": True, "add_zero_attn": True}])
    @pytest.mark.parametrize("need_weights", [False, True])
    def test_causal(self, padding: str | None, extra: dict[str, bool], need_weights: bool) -> None:
        softmax, ours = pair(batch_first=True, **extra)
        (x,) = tensors((2, 6, EMBED))
        future = torch.ones(6, 6, dtype=torch.bool).triu(1)
        options: dict[str, Any] = {"need_weights": need_weights}
        if padding:
            hidden = torch.zeros(2, 6, dtype=torch.bool)
            hidden[0, -2:] = hidden[1, 2] = True
            options["key_padding_mask"] = as_mask(hidden, padding)
        expected = softmax(x, x, x, attn_mask=as_mask(future, padding or "bool"), **options)
        # A hint, as in torch, that makes the mask superfluous.
        torch.testing.assert_close(ours(x, x, x, is_causal=True, **options), expected)
        torch.testing.assert_close(ours(x, x, x, is_causal=True, attn_mask=future, **options), expected)


def as_mask(hidden: torch.Tensor, kind: str) -> torch.Tensor:
    return torch.zeros(hidden.shape, dtype=torch.float64).masked_fill(hidden, -torch.inf) if "float" in kind else hidden


class TestEntmax:
    @pytest.mark.parametrize("need_weights", [False, True])
    def test_is_torchs_layer_with_the_function_exchanged(self, need_weights: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        softmax, ours = pair(alpha=1.5, batch_first=True)
        (x,) = tensors((2, 9, EMBED))
        out, weights = ours(x, x, x, need_weights=need_weights)
        monkeypatch.setattr(nn.functional, "softmax", entmax_package.entmax15)
        expected, expected_weights = softmax(x, x, x)
        torch.testing.assert_close(out, expected)
        assert (expected_weights == 0).any()
        if need_weights:
            torch.testing.assert_close(weights, expected_weights)
            torch.testing.assert_close(weights == 0, expected_weights == 0)

    def test_the_dense_way_agrees_with_the_fused_in_gradients(self) -> None:
        _, ours = pair(alpha=1.3, add_bias_kv=True)
        assert not ours.alpha.learnable
        ours = EntmaxMultiheadAttention.from_softmax(ours, alpha=1.3, learnable_alpha=True)
        x, y = tensors((5, 2, EMBED), (7, 2, EMBED))
        gradients = []
        for need_weights in (False, True):
            out, _ = ours(x, y, y, need_weights=need_weights)
            gradients.append(torch.autograd.grad((out * out.detach().sin()).sum(), [x, y, *ours.parameters()]))
        # alpha is float32, and so is its gradient.
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)

    def test_a_query_that_may_see_nothing_gives_the_outputs_bias(self) -> None:
        _, ours = pair(alpha=1.5, batch_first=True)
        (x,) = tensors((1, 3, EMBED))
        nothing = torch.tensor([[False] * 3, [True] * 3, [False] * 3])
        for need_weights in (False, True):
            out, _ = ours(x, x, x, attn_mask=nothing, need_weights=need_weights)
            torch.testing.assert_close(out[0, 1], ours.out_proj.bias.detach())
            (gradient,) = torch.autograd.grad(out[0, 1].sum(), x)
            assert not gradient.any()

    @pytest.mark.parametrize("need_weights", [False, True])
    def test_dropout_in_training_only(self, need_weights: bool) -> None:
        _, ours = pair(alpha=1.5, dropout=0.5)
        (x,) = tensors((16, 2, EMBED))

        def run(seed: int) -> torch.Tensor:
            torch.manual_seed(seed)
            result: torch.Tensor = ours(x, x, x, need_weights=need_weights)[0]
            return result

        assert torch.equal(run(0), run(0))
        assert not torch.equal(run(0), run(1))
        ours.eval()
        assert torch.equal(run(0), run(1))


class TestSameInterface:
    def test_constructor_and_forward(self) -> None:
        for method in ("__init__", "forward"):
            theirs = inspect.signature(getattr(nn.MultiheadAttention, method)).parameters
            ours = inspect.signature(getattr(EntmaxMultiheadAttention, method)).parameters
            shared = [name for name, p in ours.items() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
            assert shared == list(theirs)
            assert {name: ours[name].default for name in shared} == {name: p.default for name, p in theirs.items()}

    @pytest.mark.parametrize(
        "options",
        [{}, {"bias": False}, {"kdim": 5, "vdim": 7, "add_bias_kv": True}, {"add_zero_attn": True, "batch_first": True}],
    )
    def test_state_dict(self, options: dict[str, Any]) -> None:
        softmax, ours = pair(alpha=1.7, **options)
        assert {n: x.shape for n, x in ours.state_dict().items()} == {n: x.shape for n, x in softmax.state_dict().items()}
        softmax.load_state_dict(ours.state_dict())

    def test_a_learnable_alpha_adds_one_key(self) -> None:
        ours = EntmaxMultiheadAttention(EMBED, HEADS, learnable_alpha=True)
        assert set(ours.state_dict()) - set(nn.MultiheadAttention(EMBED, HEADS).state_dict()) == {"alpha.theta"}

    def test_the_same_seed_starts_with_the_same_weights(self) -> None:
        for kdim in (None, 5):
            torch.manual_seed(3)
            softmax = nn.MultiheadAttention(EMBED, HEADS, kdim=kdim)
            torch.manual_seed(3)
            ours = EntmaxMultiheadAttention(EMBED, HEADS, kdim=kdim)
            torch.testing.assert_close(ours.state_dict(), softmax.state_dict(), rtol=0, atol=0)

    def test_parameters_are_shared_with_a_converted_layer(self) -> None:
        softmax = nn.MultiheadAttention(EMBED, HEADS, add_bias_kv=True).eval()
        ours = EntmaxMultiheadAttention.from_softmax(softmax, alpha=1.25)
        theirs = dict(softmax.named_parameters())
        assert {n: id(p) for n, p in ours.named_parameters()} == {n: id(p) for n, p in theirs.items()}
        assert not ours.training
        assert ours.alpha() == 1.25


class TestInTorchsTransformer:
    """torch's layers have a fused kernel for inference that computes softmax whatever self_attn is. It must not be taken."""

    @pytest.mark.parametrize("nested", [False, True])
    def test_encoder(self, nested: bool) -> None:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(EMBED, 2, 24, dropout=0.0, batch_first=True)
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
        (x,) = tensors((2, 6, EMBED))
        x = x.detach().float()
        hidden = torch.zeros(2, 6, dtype=torch.bool)
        hidden[0, 4:] = True
        softmax = encoder.eval()(x, src_key_padding_mask=hidden)
        names = replace_multihead_attention(encoder, alpha=2.0)
        assert names == ["layers.0.self_attn", "layers.1.self_attn"]
        slow = encoder.train()(x, src_key_padding_mask=hidden)
        with torch.no_grad():
            fast = encoder.eval()(x, src_key_padding_mask=hidden)
        torch.testing.assert_close(fast, slow)
        seen = ~hidden
        assert (fast - softmax)[seen].abs().max() > 1e-3

    def test_a_lone_layer_at_inference(self) -> None:
        layer = nn.TransformerEncoderLayer(EMBED, 2, 24, dropout=0.0, batch_first=True).eval()
        replace_multihead_attention(layer, alpha=2.0)
        (x,) = tensors((2, 6, EMBED))
        x = x.detach().float()
        with torch.no_grad():
            fast = layer(x)
        torch.testing.assert_close(fast, layer(x))  # with grad there is no fast path

    def test_a_causal_decoder_sees_no_future(self) -> None:
        decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(EMBED, 2, 24, dropout=0.0, batch_first=True), 1).eval()
        assert len(replace_multihead_attention(decoder)) == 2
        x, memory = (t.detach().float() for t in tensors((2, 6, EMBED), (2, 4, EMBED)))
        mask = nn.Transformer.generate_square_subsequent_mask(6)
        changed = x.clone()
        changed[:, 4:] = 0
        first, second = (decoder(t, memory, tgt_mask=mask, tgt_is_causal=True) for t in (x, changed))
        torch.testing.assert_close(first[:, :4], second[:, :4])
        assert not torch.equal(first[:, 4:], second[:, 4:])

    def test_a_layer_used_twice_stays_one(self) -> None:
        shared = nn.MultiheadAttention(EMBED, 2)
        model = nn.ModuleDict({"first": nn.ModuleList([shared]), "second": nn.ModuleList([shared])})
        assert replace_multihead_attention(model) == ["first.0", "second.0"]
        assert isinstance(model["first"][0], EntmaxMultiheadAttention)
        assert model["first"][0] is model["second"][0]

    def test_only_the_layers_asked_for(self) -> None:
        encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(EMBED, 2, 24, batch_first=True), 3)
        names = replace_multihead_attention(encoder, where=lambda name, module: name.startswith("layers.2"))
        assert names == ["layers.2.self_attn"]
        assert type(encoder.layers[0].self_attn) is nn.MultiheadAttention


class TestRefused:
    @pytest.mark.parametrize(
        ("shapes", "options", "message"),
        [
            ([(5, 2, 12), (5, 2, 11), (5, 2, 12)], {}, "12, 12 and 12 features"),
            ([(5, 2, 12), (5, 12), (5, 12)], {}, "2 dimensions.*or all have 3"),
            ([(5, 2, 12), (6, 2, 12), (7, 2, 12)], {}, "same length and batch size"),
            ([(5, 2, 12), (5, 3, 12), (5, 3, 12)], {}, "same batch size.*batch_first=False"),
            ([(5, 2, 12)] * 3, {"key_padding_mask": torch.zeros(5, 2, dtype=torch.bool)}, r"key_padding_mask must have shape \(2, 5\)"),
            ([(5, 2, 12)] * 3, {"attn_mask": torch.zeros(2, 5, 5)}, r"attn_mask must have shape \(5, 5\) or \(6, 5, 5\)"),
            ([(5, 2, 12)] * 3, {"attn_mask": torch.zeros(5, 5, dtype=torch.int64)}, "boolean.*or floating point.*int64"),
        ],
    )  # fmt: skip
    def test_shapes_and_masks_that_do_not_fit(
        self, shapes: list[tuple[int, ...]], options: dict[str, Any], message: str
    ) -> None:
        layer = EntmaxMultiheadAttention(12, 3)
        with pytest.raises(ArgumentError, match=message):
            layer(*(torch.zeros(shape) for shape in shapes), **options)

    def test_biases_in_a_key_padding_mask(self) -> None:
        layer, x = EntmaxMultiheadAttention(12, 3), torch.zeros(5, 2, 12)
        with pytest.raises(RuntimeError, match="0 and -inf.*attn_mask"):
            layer(x, x, x, key_padding_mask=torch.full((2, 5), -1e9), need_weights=False)

    def test_a_learned_bias_of_keys_is_added(self) -> None:
        softmax, ours = pair(batch_first=True)
        (x,) = tensors((2, 5, EMBED))
        (bias,) = tensors((2, 5))
        torch.testing.assert_close(ours(x, x, x, key_padding_mask=bias), softmax(x, x, x, key_padding_mask=bias))

    def test_nested_tensors(self) -> None:
        layer = EntmaxMultiheadAttention(12, 3, batch_first=True)
        x = torch.nested.nested_tensor([torch.zeros(3, 12), torch.zeros(5, 12)], layout=torch.jagged)
        with pytest.raises(ArgumentTypeError, match="padded tensors.*enable_nested_tensor=False"):
            layer(x, x, x)

    def test_models_without_such_a_layer(self) -> None:
        with pytest.raises(ArgumentError, match="from_softmax"):
            replace_multihead_attention(nn.MultiheadAttention(12, 3))
        with pytest.raises(ArgumentError, match="Linear"):
            replace_multihead_attention(nn.Linear(2, 2))

    def test_layers_that_are_none_or_carry_hooks(self) -> None:
        with pytest.raises(ArgumentTypeError, match="Linear"):
            EntmaxMultiheadAttention.from_softmax(nn.Linear(2, 2))  # type: ignore[arg-type]
        layer = nn.MultiheadAttention(12, 3)
        layer.register_forward_hook(lambda *_: None)
        with pytest.raises(ArgumentError, match="hooks"):
            EntmaxMultiheadAttention.from_softmax(layer)

    def test_subclasses_that_compute_something_else(self) -> None:
        class Other(nn.MultiheadAttention):
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                return args

        model = nn.ModuleList([nn.MultiheadAttention(12, 3), Other(12, 3)])
        with pytest.raises(ArgumentTypeError, match="something of its own.*Other"):
            replace_multihead_attention(model)
        assert type(model[0]) is nn.MultiheadAttention

    @pytest.mark.parametrize("alpha", [0.9, 2.1, [1.5, 1.5]])
    def test_alphas_out_of_range_or_number(self, alpha: Any) -> None:
        with pytest.raises(ArgumentError, match="alpha"):
            EntmaxMultiheadAttention(12, 3, alpha=alpha)
