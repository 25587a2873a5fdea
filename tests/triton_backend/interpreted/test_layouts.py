"""Outputs and gradients lie in memory as the inputs do, heads first or rows first, and hold the same values whichever it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import adasplash_core
from adasplash_core import layout
from adasplash_core.api import _op_arguments
from adasplash_core.call import make_call, validate
from adasplash_triton import operands
from tests.triton_backend.interpreted.test_passes import SMALL, compare, lengths, run

PATHS: dict[str, tuple[float, dict[str, Any]]] = {
    "lists": (4, {}),
    "all keys": (0.1, {}),
    "no lists kept": (4, {"deterministic": True, "is_causal": True}),
    "scores on chip": (2, {"alpha": torch.tensor([1.0, 1.4, 1.5, 1.9], requires_grad=True)}),
}
"""Spread of the scores and the arguments that lead a call there."""
ROWS_FIRST = [("query", "key", "value"), ("key",)]
"""Which inputs are views of (B, L, H, E) memory, the others being contiguous."""
BATCH, HEADS, KV_HEADS, Q_LEN, KV_LEN, HEAD_DIM, HEAD_DIM_V = 2, 4, 2, 40, 60, 16, 24


def rows_first(x: torch.Tensor) -> torch.Tensor:
    """The (B, H, L, E) view of (B, L, H, E) memory that a transformer hands over."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def draw(turned: tuple[str, ...], spread: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)  # so that lists are kept where they should be
    shapes = {
        "query": (BATCH, HEADS, Q_LEN, HEAD_DIM),
        "key": (BATCH, KV_HEADS, KV_LEN, HEAD_DIM),
        "value": (BATCH, KV_HEADS, KV_LEN, HEAD_DIM_V),
    }
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    made["query"] *= spread
    return {name: rows_first(x) if name in turned else x for name, x in made.items()}


def spaced(x: torch.Tensor) -> torch.Tensor:
    """Equal to ``x``, with a last dimension of stride 2."""
    return torch.stack([x, x], -1).select(-1, 0)


@pytest.mark.parametrize("turned", ROWS_FIRST, ids="-".join)
@pytest.mark.parametrize("path", PATHS)
def test_each_path_writes_in_its_inputs_order(path: str, turned: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    if path != "scores on chip":
        monkeypatch.setattr(operands, "short_length", lambda *sizes: 0)
    spread, arguments = PATHS[path]
    inputs = draw(turned, spread)
    call = make_call(**inputs, **arguments, enable_gqa=True, return_stats=True)
    found, gradients, grad_out = run(call, **{**SMALL, "least_list": KV_LEN})
    compare(call, found, gradients, grad_out)
    if path in ("lists", "all keys"):
        assert ((lengths(found) > 0) == (path == "lists")).all()
    for made, name in ((found.out, "query"), (gradients.query, "query"), (gradients.key, "key"), (gradients.value, "value")):
        assert (made.transpose(1, 2) if name in turned else made).is_contiguous()
        assert layout.conform(made, inputs[name]).data_ptr() == made.data_ptr()  # what the core would copy else


@pytest.mark.parametrize("turned", [(), ("query", "key", "value")], ids=["heads first", "rows first"])
def test_inputs_that_must_be_copied_keep_their_order(turned: tuple[str, ...]) -> None:
    inputs = {name: spaced(x) for name, x in draw(()).items()}
    if turned:
        inputs = {name: spaced(x.transpose(1, 2)).transpose(1, 2) for name, x in draw(turned).items()}
    assert all(x.stride(3) == 2 for x in inputs.values())
    found, gradients, _ = run(make_call(**inputs, enable_gqa=True))
    for made in (found.out, gradients.query, gradients.key, gradients.value):
        assert (made.transpose(1, 2) if turned else made).is_contiguous()


@pytest.mark.parametrize("empty", ["query", "key"])
def test_empty_calls_keep_the_order_and_give_zeros(empty: str) -> None:
    inputs = draw(("query", "key", "value"))
    inputs = {name: x[:, :, :0] if (name == "query") == (empty == "query") else x for name, x in inputs.items()}
    found, gradients, _ = run(make_call(**inputs, enable_gqa=True))
    for made in (found.out, gradients.query, gradients.key, gradients.value):
        assert made.transpose(1, 2).is_contiguous()
        assert not made.any()


@pytest.mark.parametrize("turned", ROWS_FIRST, ids="-".join)
def test_tracing_foretells_the_strides(turned: tuple[str, ...]) -> None:
    """Both operators, on what their kernels really return."""
    operators = torch.ops.adasplash
    query, key, value = (x.requires_grad_() for x in draw(turned).values())
    arguments = _op_arguments(validate(query, key, value, enable_gqa=True), "triton", None)
    with torch.no_grad():
        out, *saved = operators.attention_forward(*arguments)
        backward = (torch.randn_like(out), None, saved, *arguments)
        for operator, given in ((operators.attention_forward, arguments), (operators.attention_backward, backward)):
            torch.library.opcheck(operator.default, given, test_utils="test_faketensor")


@pytest.mark.parametrize("turned", [(), ("query", "key", "value")], ids=["heads first", "rows first"])
def test_compiled_strides_are_the_eager_ones(turned: tuple[str, ...]) -> None:
    torch._dynamo.reset()
    inputs = [x.requires_grad_() for x in draw(turned).values()]

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = adasplash_core.attention(query, key, value, enable_gqa=True, backend="triton")
        assert isinstance(out, torch.Tensor)
        return out

    results = []
    for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        out = function(*inputs)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for eager, compiled in zip(*results, strict=True):
        assert compiled.stride() == eager.stride()
        assert (compiled.transpose(1, 2) if turned else compiled).is_contiguous()
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
