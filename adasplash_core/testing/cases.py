"""The calls on which a backend is compared with the oracle: every feature, alone and together, in small awkward sizes.

Empty calls (no sequence, no query or no key at all) are not among them: the core answers those without asking a backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from adasplash_core.backend import AttentionCall
from adasplash_core.testing import inputs
from adasplash_core.testing.inputs import Sparsity
from adasplash_core.testing.target import Target


@dataclass(frozen=True)
class Case:
    """One call to compare. ``build`` raises UndeclaredError where the backend does not declare what the call needs."""

    name: str
    build: Callable[[Target], AttentionCall]
    quick: bool = False  # part of the short run
    grad_out: Callable[[torch.Tensor], torch.Tensor] | None = None  # the gradient, from the output


def _case(
    name: str, *, quick: bool = False, sparsity: Sparsity = "dense", sizes: dict[str, Any] | None = None, **arguments: Any
) -> Case:
    """A case on random input. Arguments that are callables are given the target: for tensors, which need its device."""

    def build(target: Target) -> AttentionCall:
        spec = target.base_spec(**(sizes or {}))
        query, key, value = inputs.make_qkv(spec, sparsity, target.device, seed=len(name))
        return target.call(query, key, value, **{k: v(target) if callable(v) else v for k, v in arguments.items()})

    return Case(name, build, quick)


def _tensor(values: Any, dtype: torch.dtype = torch.int32, requires_grad: bool = False) -> Callable[[Target], torch.Tensor]:
    return lambda target: torch.tensor(values, dtype=dtype, device=target.device).requires_grad_(requires_grad)


def _alpha(values: Any, requires_grad: bool = False, dtype: torch.dtype = torch.float32) -> Callable[[Target], torch.Tensor]:
    return _tensor(values, dtype, requires_grad)


def _random(shape: tuple[int, ...], seed: int = 3) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _bool_mask(*shape: int, hide: Callable[[torch.Tensor], None] | None = None) -> Callable[[Target], torch.Tensor]:
    def build(target: Target) -> torch.Tensor:
        mask = _random(shape) < 0.5
        if hide is not None:
            hide(mask)
        return mask.to(target.device)

    return build


def _additive_mask(
    *shape: int, requires_grad: bool = False, dtype: str | None = None, edit: bool = True
) -> Callable[[Target], torch.Tensor]:
    """Random biases; with ``edit`` some are -inf, some the lowest finite number, and the first row is -inf throughout."""

    def build(target: Target) -> torch.Tensor:
        mask = _random(shape).to(getattr(torch, dtype or target.dtype))
        if edit:
            chosen = _random(shape, seed=4)
            mask[chosen > 1] = -torch.inf
            mask[chosen < -1.5] = torch.finfo(mask.dtype).min
            if shape[-2] > 1:
                mask[..., 0, :] = -torch.inf
        return mask.to(target.device).requires_grad_(requires_grad)

    return build


def _hide_first_rows(mask: torch.Tensor) -> None:
    mask[..., :5, :] = False


def _hide_first_sequence(mask: torch.Tensor) -> None:
    mask[0] = False


def _sizes(q_len: int, kv_len: int, **more: Any) -> dict[str, Any]:
    return {"q_len": q_len, "kv_len": kv_len, **more}


def _plain() -> Iterator[Case]:
    for sparsity in ("dense", "moderate", "sparse"):
        yield _case(f"plain_1.5_{sparsity}", sparsity=sparsity, quick=sparsity != "moderate")
        yield _case(f"plain_2_{sparsity}", sparsity=sparsity, quick=sparsity == "dense", alpha=2.0)
    yield _case("scale_given", scale=0.7)
    yield _case("scale_negative", scale=-0.4)
    yield _case("scale_zero", scale=0.0)


def _alphas() -> Iterator[Case]:
    yield _case("softmax", alpha=1.0, quick=True)
    for alpha in (1.001, 1.25, 1.4, 1.75, 1.95):
        yield _case(f"alpha_{alpha}", alpha=alpha, quick=alpha == 1.25)
        yield _case(f"alpha_{alpha}_sparse", alpha=alpha, sparsity="sparse")
    yield _case("alpha_1+1e-6", alpha=1 + 1e-6, quick=True)
    for value in (1.0, 1.3, 1.5, 2.0):
        yield _case(f"alpha_tensor_{value}", alpha=_alpha(value), is_causal=True)
    yield _case("alpha_tensor_float64", alpha=_alpha(1.3, dtype=torch.float64))
    yield _case("alpha_tensor_clamped", alpha=_alpha(2.5), quick=True)
    yield _case("alpha_per_head", alpha=_alpha([1.2, 1.5, 2.0]), quick=True)
    yield _case("alpha_per_head_softmax_among", alpha=_alpha([1.0, 1.7, 1.5]), sparsity="moderate")
    yield _case("alpha_per_head_clamped", alpha=_alpha([0.5, 1.5, 3.0]))
    for value in (1.0001, 1.2, 1.5, 1.8):
        yield _case(f"alpha_grad_{value}", alpha=_alpha(value, requires_grad=True), quick=value == 1.2)
    yield _case("alpha_grad_per_head", alpha=_alpha([1.1, 1.5, 1.6], requires_grad=True), sparsity="moderate", quick=True)
    yield _case("alpha_grad_causal", alpha=_alpha([1.1, 1.5, 2.0], requires_grad=True), is_causal=True)
    yield _case("alpha_grad_at_the_ends", alpha=_alpha([1.0, 1.000001, 2.0], requires_grad=True))


def _sizes_and_heads() -> Iterator[Case]:
    for q_len, kv_len in ((1, 1), (1, 129), (129, 1), (2, 300), (64, 64), (130, 257)):
        yield _case(f"lengths_{q_len}x{kv_len}", sizes=_sizes(q_len, kv_len), quick=(q_len, kv_len) in {(1, 129), (130, 257)})
    yield _case("long_causal", sizes=_sizes(515, 515, batch=1, heads=1, kv_heads=1), is_causal=True, sparsity="moderate")
    yield _case("gqa", sizes={"heads": 4, "kv_heads": 2}, quick=True)
    yield _case("gqa_one_kv_head", sizes={"heads": 5, "kv_heads": 1}, is_causal=True)
    yield _case("gqa_groups_of_3", sizes={"heads": 6, "kv_heads": 2}, alpha=_alpha([1.2, 1.5, 2.0, 1.5, 1.6, 1.3]))

    def head_dims(wanted: int, wanted_v: int | None = None) -> Callable[[Target], AttentionCall]:
        def build(target: Target) -> AttentionCall:
            dim = target.head_dim(wanted)
            spec = target.base_spec(head_dim=dim, head_dim_v=dim if wanted_v is None else target.head_dim(wanted_v))
            return target.call(*inputs.make_qkv(spec, "moderate", target.device, seed=wanted), is_causal=target.takes("causal"))

        return build

    for wanted in (1, 17, 64, 80, 128, 256):
        yield Case(f"head_dim_{wanted}", head_dims(wanted), quick=wanted == 64)
    yield Case("value_head_dim_smaller", head_dims(64, 16))
    yield Case("value_head_dim_larger", head_dims(16, 40), quick=True)


def _structural_masks() -> Iterator[Case]:
    for q_len, kv_len in ((53, 53), (37, 53), (53, 37)):
        for alignment in ("top_left", "bottom_right"):
            name = f"causal_{alignment}_{q_len}x{kv_len}"
            yield _case(name, sizes=_sizes(q_len, kv_len), is_causal=True, causal_alignment=alignment, quick=q_len != kv_len)
    yield _case("causal_sparsemax", is_causal=True, alpha=2.0, sparsity="sparse")
    yield _case("offset_int", is_causal=True, query_offset=16)
    yield _case("offset_negative", is_causal=True, query_offset=-7)
    yield _case("offset_beyond", is_causal=True, query_offset=100)
    yield _case("offset_tensor_scalar", is_causal=True, query_offset=_tensor(9))
    yield _case("offset_tensor", is_causal=True, query_offset=_tensor([3, 30], torch.int64), quick=True)
    yield _case("decode", sizes=_sizes(1, 200), is_causal=True, query_offset=_tensor([150, 20]), kv_lengths=_tensor([151, 21]))
    for left, right in ((3, 0), (5, 2), (0, 0), (-1, 2), (2, -1), (500, 500)):
        yield _case(f"window_{left}_{right}", window=(left, right), quick=(left, right) == (5, 2))
    yield _case("window_causal", window=(6, 4), is_causal=True, quick=True)
    yield _case("window_bottom_right", window=(6, 3), causal_alignment="bottom_right")
    yield _case("window_offset", window=(6, 3), query_offset=_tensor([0, 40]))
    yield _case("lengths", kv_lengths=_tensor([53, 20]), quick=True)
    yield _case("lengths_zero_and_beyond", kv_lengths=_tensor([0, 99], torch.int64))
    yield _case("lengths_causal_bottom_right", kv_lengths=_tensor([41, 20]), is_causal=True, causal_alignment="bottom_right")
    yield _case("starts", kv_starts=_tensor([0, 31]), quick=True)
    yield _case("starts_causal", kv_starts=_tensor([5, 31]), is_causal=True)
    yield _case("starts_and_lengths", kv_starts=_tensor([5, 40]), kv_lengths=_tensor([50, 30]))
    yield _case("alibi", alibi_slopes=_alpha([0.5, 0.1, 0.02]), quick=True)
    yield _case("alibi_per_sequence", alibi_slopes=_alpha([[0.5, 0.1, 0.02], [0.3, 0.0, 1.0]]), is_causal=True)
    yield _case("alibi_bottom_right", alibi_slopes=_alpha([0.5, 0.1, 0.02]), is_causal=True, causal_alignment="bottom_right")
    yield _case("alibi_offset_alpha", alibi_slopes=_alpha([0.5, 0.1, 0.02]), query_offset=7, alpha=2.0)
    for name, q, k, quick in (
        ("packed", [0, 10, 11, 37], [0, 10, 11, 37], True),
        ("packed_cross", [0, 10, 25, 37], [0, 20, 22, 53], False),
        ("packed_empty_sequences", [0, 0, 20, 20, 37], [0, 9, 9, 30, 53], False),
        ("packed_with_a_tail", [0, 12, 30], [0, 12, 40], False),
    ):
        lengths: dict[str, Any] = {
            "cu_seqlens_q": _tensor(q),
            "cu_seqlens_k": _tensor(k),
            "max_seqlen_q": max(b - a for a, b in pairwise(q)),
            "max_seqlen_k": max(b - a for a, b in pairwise(k)),
        }
        sizes = _sizes(37, 37 if q == k else 53, batch=1)
        yield _case(name, sizes=sizes, quick=quick, **lengths)
        yield _case(f"{name}_causal", sizes=sizes, is_causal=True, **lengths)
        yield _case(f"{name}_bottom_right", sizes=sizes, is_causal=True, causal_alignment="bottom_right", **lengths)
    yield _case("packed_window", sizes=sizes, window=(4, 1), **lengths)
    yield _case("packed_alibi", sizes=sizes, alibi_slopes=_alpha([0.5, 0.1, 0.02]), is_causal=True, **lengths)


def _dense_masks() -> Iterator[Case]:
    yield _case("key_mask_with_holes", attn_mask=_bool_mask(2, 1, 1, 53), quick=True)
    yield _case("key_mask_one_for_all", attn_mask=_bool_mask(1, 1, 1, 53), alpha=2.0)
    yield _case("key_mask_hides_a_sequence", attn_mask=_bool_mask(2, 1, 1, 53, hide=_hide_first_sequence))
    yield _case("key_mask_and_window", attn_mask=_bool_mask(2, 1, 1, 53), window=(7, 3))
    yield _case("key_mask_and_lengths", attn_mask=_bool_mask(2, 1, 1, 53), kv_lengths=_tensor([53, 20]))
    for shape in ((37, 53), (2, 1, 37, 53), (1, 3, 37, 53), (2, 3, 37, 1)):
        name = "bool_mask_" + "x".join(map(str, shape))
        yield _case(name, attn_mask=_bool_mask(*shape, hide=_hide_first_rows), quick=len(shape) == 2)
    yield _case("bool_mask_and_lengths", attn_mask=_bool_mask(37, 53), kv_lengths=_tensor([53, 20]), window=(9, 9))
    for shape in ((37, 53), (2, 1, 1, 53), (1, 3, 37, 1), (2, 3, 37, 53)):
        name = "additive_mask_" + "x".join(map(str, shape))
        yield _case(name, attn_mask=_additive_mask(*shape), quick=len(shape) == 2)
        yield _case(f"{name}_grad", attn_mask=_additive_mask(*shape, requires_grad=True), quick=len(shape) == 2)
    yield _case("additive_mask_float32", attn_mask=_additive_mask(37, 53, dtype="float32", requires_grad=True), alpha=2.0)
    yield _case("additive_mask_softmax_grad", attn_mask=_additive_mask(2, 3, 37, 53, requires_grad=True), alpha=1.0)
    yield _case("additive_mask_other_grad", attn_mask=_additive_mask(3, 37, 53, requires_grad=True), alpha=_alpha(1.3, True))

    def transposed(target: Target) -> torch.Tensor:
        return _additive_mask(2, 3, 53, 37, edit=False)(target).mT.detach().requires_grad_()

    yield _case("additive_mask_transposed_grad", attn_mask=transposed)


def _dropout() -> Iterator[Case]:
    yield _case("dropout", dropout_p=0.3, quick=True)
    yield _case("dropout_causal_gqa", dropout_p=0.5, is_causal=True, sizes={"heads": 4, "kv_heads": 2}, alpha=2.0)
    yield _case("dropout_alpha_grad", dropout_p=0.2, alpha=_alpha([1.2, 1.5, 1.7], requires_grad=True))
    yield _case("dropout_mask_grad", dropout_p=0.2, attn_mask=_additive_mask(2, 1, 37, 53, requires_grad=True))


def _together() -> Iterator[Case]:
    def all_at_once(target: Target) -> AttentionCall:
        spec = target.base_spec(heads=4 if target.takes("gqa") else 2, kv_heads=2, q_len=70, kv_len=90)
        arguments: dict[str, Any] = {"alpha": 1.5}
        if target.takes("causal"):
            arguments["is_causal"] = True
        if target.takes("bottom_right"):
            arguments["causal_alignment"] = "bottom_right"
        if target.takes("kv_lengths"):
            arguments["kv_lengths"] = torch.tensor([88, 61], device=target.device)
        if target.takes("kv_starts"):
            arguments["kv_starts"] = torch.tensor([3, 17], device=target.device)
        if target.takes("window"):
            arguments["window"] = (40, 0)
        if target.takes("alibi"):
            arguments["alibi_slopes"] = torch.tensor([0.5, 0.25, 0.1, 0.01][: spec.heads], device=target.device)
        if target.takes("dropout"):
            arguments["dropout_p"] = 0.1
        if target.takes("alpha_per_head", "alpha_tensor", "alpha_other"):
            alpha = torch.tensor([1.2, 1.5, 1.0, 2.0][: spec.heads], device=target.device)
            arguments["alpha"] = alpha.requires_grad_(target.takes("alpha_grad", "backward"))
        return target.call(*inputs.make_qkv(spec, "moderate", target.device), **arguments)

    yield Case("everything_declared_at_once", all_at_once, quick=True)


def _patterns() -> Iterator[Case]:
    def pattern(name: str, alpha: float, **sizes: Any) -> Callable[[Target], AttentionCall]:
        def build(target: Target) -> AttentionCall:
            spec = target.base_spec(**sizes)
            query, key, value = (x.to(target.device) for x in inputs.PATTERNS[name](spec, 5))
            return target.call(query, key, value, alpha=alpha)

        return build

    for name in inputs.PATTERNS:
        for alpha in (1.5, 2.0, 1.25, 1.0):
            yield Case(f"{name}_{alpha}", pattern(name, alpha), quick=alpha == 1.5)
        if name in ("needles", "full_support", "two_clusters"):
            yield Case(
                f"{name}_long",
                pattern(name, 1.5, batch=1, heads=1, kv_heads=1, q_len=300, kv_len=420),
                quick=name != "two_clusters",
            )


def _layouts() -> Iterator[Case]:
    def laid_out(layout: str, gqa: bool = False) -> Callable[[Target], AttentionCall]:
        def build(target: Target) -> AttentionCall:
            spec = target.base_spec(**({"heads": 4, "kv_heads": 2} if gqa else {}))
            change = inputs.LAYOUTS[layout]
            query, key, value = (change(x) for x in inputs.make_qkv(spec, "moderate", target.device))
            return target.call(query, key, value, is_causal=target.takes("causal"))

        return build

    for layout in inputs.LAYOUTS:
        yield Case(f"layout_{layout}", laid_out(layout), quick=layout in ("transposed", "sliced"))
    yield Case("layout_transposed_gqa", laid_out("transposed", gqa=True))

    def contiguous(target: Target) -> AttentionCall:
        return target.call(*inputs.make_qkv(target.base_spec(), "dense", target.device))

    def of_a_sum(out: torch.Tensor) -> torch.Tensor:
        return torch.ones((), dtype=out.dtype, device=out.device).expand_as(out)

    yield Case("grad_out_of_a_sum", contiguous, quick=True, grad_out=of_a_sum)
    for layout in ("transposed", "every_other", "length_last", "expanded"):
        change = inputs.LAYOUTS[layout]
        drawn = lambda out, change=change: change(_random(tuple(out.shape), seed=9).to(out.device, out.dtype))  # noqa: E731
        yield Case(f"grad_out_{layout}", contiguous, grad_out=drawn, quick=layout == "transposed")


CASES: tuple[Case, ...] = (
    *_plain(),
    *_alphas(),
    *_sizes_and_heads(),
    *_structural_masks(),
    *_dense_masks(),
    *_dropout(),
    *_together(),
    *_patterns(),
    *_layouts(),
)
