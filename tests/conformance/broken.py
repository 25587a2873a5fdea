"""Backends broken on purpose, one fault each, over the reference: what the conformance suite must find out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from adasplash_core.backend import AttentionCall, ForwardResult, Gradients, SavedTensor
from adasplash_core.device import DeviceInfo
from adasplash_core.spec import AttentionSpec
from adasplash_core.testing import oracle
from adasplash_torch.backend import TorchBackend


class Honest(TorchBackend):
    """No fault. One dtype, to be quick."""

    name = "honest"
    dtypes = frozenset({"float32"})


class MisreadCall(Honest):
    """Computes another call than it was asked for, in both passes."""

    def misread(self, call: AttentionCall) -> AttentionCall:
        raise NotImplementedError

    def forward(self, call: AttentionCall) -> ForwardResult:
        return super().forward(self.misread(call))

    def backward(
        self, call: AttentionCall, grad_out: torch.Tensor, saved: Sequence[torch.Tensor], out: torch.Tensor | None
    ) -> Gradients:
        return super().backward(self.misread(call), grad_out, saved, out)


class CausalOffByOne(MisreadCall):
    def misread(self, call: AttentionCall) -> AttentionCall:
        if call.spec.causal and call.spec.causal_alignment == "top_left" and not call.spec.packed:
            return replace(call, query_offset=call.query_offset + 1)
        return call


class LengthsIgnored(MisreadCall):
    def misread(self, call: AttentionCall) -> AttentionCall:
        return replace(call, kv_lengths=None)


class StartsIgnored(MisreadCall):
    def misread(self, call: AttentionCall) -> AttentionCall:
        return replace(call, kv_starts=None)


class BottomRightOfThePadding(MisreadCall):
    """Aligns the last query with the end of the padded keys, not with the end of its sequence."""

    def misread(self, call: AttentionCall) -> AttentionCall:
        if call.spec.causal_alignment == "top_left" or call.spec.packed:
            return call
        spec = replace(call.spec, causal_alignment="top_left")
        return replace(call, spec=spec, query_offset=call.key.shape[2] - call.query.shape[2])


class WindowOneShort(MisreadCall):
    def misread(self, call: AttentionCall) -> AttentionCall:
        left, right = call.window
        return replace(call, window=(max(left - 1, 0) if left >= 0 else left, right))


class HolesReadAsLength(MisreadCall):
    """Takes a key mask for padding at the end: up to the last visible key."""

    def misread(self, call: AttentionCall) -> AttentionCall:
        if call.spec.mask != "key":
            return call
        assert call.attn_mask is not None
        position = torch.arange(1, call.attn_mask.shape[-1] + 1)
        last = (call.attn_mask * position).amax(-1).expand(call.query.shape[0])
        if call.kv_lengths is not None:
            last = torch.minimum(last, call.kv_lengths)
        return replace(call, spec=replace(call.spec, mask="none"), attn_mask=None, kv_lengths=last)


class ContiguityAssumed(MisreadCall):
    """Reads queries, keys and values as if they lay in memory in the order of their shape."""

    def misread(self, call: AttentionCall) -> AttentionCall:
        return replace(call, query=_as_contiguous(call.query), key=_as_contiguous(call.key), value=_as_contiguous(call.value))


class GradOutContiguityAssumed(Honest):
    def backward(
        self, call: AttentionCall, grad_out: torch.Tensor, saved: Sequence[torch.Tensor], out: torch.Tensor | None
    ) -> Gradients:
        return super().backward(call, _as_contiguous(grad_out), saved, out)


def _as_contiguous(x: torch.Tensor) -> torch.Tensor:
    strides = torch.empty(x.shape, device="meta").stride()
    memory = torch.as_strided(x, (x.untyped_storage().nbytes() // x.element_size() - x.storage_offset(),), (1,))
    if memory.numel() < x.numel():  # past the end of the memory lies something
        memory = torch.nn.functional.pad(memory, (0, x.numel() - memory.numel()), value=1.0)
    return memory.as_strided(x.shape, strides)


class HeadsInterleaved(MisreadCall):
    """Query head h reads key head h % Hkv."""

    def misread(self, call: AttentionCall) -> AttentionCall:
        heads, kv_heads = call.query.shape[1], call.key.shape[1]
        order = torch.arange(heads).view(heads // kv_heads, kv_heads).T.flatten()
        return replace(call, query=call.query[:, order])


class FirstHeadsAlpha(MisreadCall):
    def misread(self, call: AttentionCall) -> AttentionCall:
        return replace(call, alpha=call.alpha[:1].expand_as(call.alpha)) if call.alpha.ndim else call


class AlphaNotClamped(MisreadCall):
    """Reads an alpha beyond 2 as 1.5."""

    def misread(self, call: AttentionCall) -> AttentionCall:
        return replace(call, alpha=torch.where(call.alpha > 2, 1.5, call.alpha))


class ZeroAlphaGradient(Honest):
    def backward(
        self, call: AttentionCall, grad_out: torch.Tensor, saved: Sequence[torch.Tensor], out: torch.Tensor | None
    ) -> Gradients:
        found = super().backward(call, grad_out, saved, out)
        return replace(found, alpha=None if found.alpha is None else torch.zeros_like(found.alpha))


class SoftmaxBackward(Honest):
    """The gradient of the scores is p (dp - sum p dp), as for softmax."""

    def backward(
        self, call: AttentionCall, grad_out: torch.Tensor, saved: Sequence[torch.Tensor], out: torch.Tensor | None
    ) -> Gradients:
        found = super().backward(call, grad_out, saved, out)
        p = _weights(call)
        group = call.query.shape[1] // call.key.shape[1]
        value, key = (x.double().repeat_interleave(group, 1) for x in (call.value, call.key))
        dp = grad_out.double() @ value.mT
        ds = call.scale * p * (dp - (p * dp).sum(-1, keepdim=True))
        grad_key = (ds.mT @ call.query.double()).unflatten(1, (-1, group)).sum(2)
        return replace(found, query=(ds @ key).to(call.query.dtype), key=grad_key.to(call.key.dtype))


def _weights(call: AttentionCall) -> torch.Tensor:
    alpha = call.alpha.double().view(-1, 1, 1) if call.alpha.ndim else call.alpha
    return oracle.transform(oracle.Solution(call, requires_grad=False).scores, alpha)


class HidesKeys(MisreadCall):
    """Misses entries of calls without a dense mask."""

    def hidden(self, weights: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def misread(self, call: AttentionCall) -> AttentionCall:
        if call.spec.mask != "none":
            return call
        return replace(call, spec=replace(call.spec, mask="bool"), attn_mask=~self.hidden(_weights(call)))


class PlantedKeyMissed(HidesKeys):
    """Searches by blocks of 32 rows and overlooks a far key that a single row of the block wants."""

    def hidden(self, weights: torch.Tensor) -> torch.Tensor:
        q_len, kv_len = weights.shape[-2:]
        hidden = torch.zeros_like(weights, dtype=torch.bool)
        for start in range(0, q_len, 32):
            block = weights[..., start : start + 32, :] > 0
            far = (torch.arange(kv_len) < start - 8) | (torch.arange(kv_len) >= start + 40)
            hidden[..., start : start + 32, :] = (block.sum(-2, keepdim=True) == 1) & far & block
        return hidden & (weights.count_nonzero(-1)[..., None] > 1)


class PoolOverflows(HidesKeys):
    """Keeps room for 64 entries a row on average, and loses what does not fit: right for short and for sparse rows."""

    def hidden(self, weights: torch.Tensor) -> torch.Tensor:
        taken = (weights > 0).flatten(-2).cumsum(-1)
        return (taken > 64 * weights.shape[-2]).view_as(weights)


class DropoutNotScaled(Honest):
    def forward(self, call: AttentionCall) -> ForwardResult:
        found = super().forward(call)
        return replace(found, out=found.out * (1 - call.dropout_p))


class OtherDropoutInBackward(Honest):
    def backward(
        self, call: AttentionCall, grad_out: torch.Tensor, saved: Sequence[torch.Tensor], out: torch.Tensor | None
    ) -> Gradients:
        if call.dropout_seed is not None:
            call = replace(call, dropout_seed=call.dropout_seed + 1)
        return super().backward(call, grad_out, saved, out)


class EmptyRowsNotWritten(Honest):
    """Leaves the output of rows without a key as it found the memory."""

    def forward(self, call: AttentionCall) -> ForwardResult:
        found = super().forward(call)
        out = torch.empty_like(found.out)
        written = (found.out != 0).any(-1, keepdim=True)
        return replace(found, out=torch.where(written, found.out, out))


class ReadsHiddenValues(Honest):
    """Multiplies the values of keys that do not exist by 0, which NaN survives."""

    def forward(self, call: AttentionCall) -> ForwardResult:
        found = super().forward(call)
        group = call.query.shape[1] // call.key.shape[1]
        return replace(found, out=found.out + 0 * call.value.repeat_interleave(group, 1).sum(2, keepdim=True))


class NanSpreads(Honest):
    """A NaN in one row reaches its block of 16."""

    def forward(self, call: AttentionCall) -> ForwardResult:
        found = super().forward(call)
        out = found.out.clone()
        for start in range(0, out.shape[2], 16):
            out[:, :, start : start + 16] += 0 * out[:, :, start : start + 16].sum((2, 3), keepdim=True)
        return replace(found, out=out)


class RoundsToHalf(Honest):
    def forward(self, call: AttentionCall) -> ForwardResult:
        found = super().forward(call)
        return replace(found, out=found.out.half().float())


class CountsItsCalls(Honest):
    """Gives gradients that differ in their last bits from run to run, as unordered atomics do."""

    calls = 0

    def backward(
        self, call: AttentionCall, grad_out: torch.Tensor, saved: Sequence[torch.Tensor], out: torch.Tensor | None
    ) -> Gradients:
        self.calls += 1
        found = super().backward(call, grad_out, saved, out)
        return replace(found, key=found.key * (1 + self.calls * torch.finfo(found.key.dtype).eps))


class WritesToGradOut(Honest):
    def backward(
        self, call: AttentionCall, grad_out: torch.Tensor, saved: Sequence[torch.Tensor], out: torch.Tensor | None
    ) -> Gradients:
        found = super().backward(call, grad_out, saved, out)
        if grad_out.is_contiguous():
            grad_out.mul_(call.scale)
        return found


class SavesAnInput(Honest):
    def saved_spec(self, spec: AttentionSpec) -> Sequence[SavedTensor]:
        assert spec.batch is not None
        assert spec.q_len is not None
        return (*super().saved_spec(spec), SavedTensor((spec.batch, spec.heads, spec.q_len, spec.head_dim), spec.dtype))

    def forward(self, call: AttentionCall) -> ForwardResult:
        found = super().forward(call)
        return replace(found, saved=(*found.saved, call.query)) if call.spec.needs_grad else found


class SavesMoreThanTold(Honest):
    def forward(self, call: AttentionCall) -> ForwardResult:
        found = super().forward(call)
        return replace(found, saved=tuple(s[..., None] for s in found.saved))


class RefusesLongCalls(Honest):
    """Decides by lengths, which are not known while compiling."""

    def not_supported_reasons(self, spec: AttentionSpec, device: DeviceInfo | None = None) -> list[str]:
        reasons = super().not_supported_reasons(spec, device)
        return [*reasons, "too long"] if (spec.kv_len or 0) > 10**6 else reasons


class RefusesEverything(Honest):
    def not_supported_reasons(self, spec: AttentionSpec, device: DeviceInfo | None = None) -> list[str]:
        return ["not today"]


class ConfigChangesTheAnswer(MisreadCall):
    """Any config but the default forgets the last key."""

    def misread(self, call: AttentionCall) -> AttentionCall:
        if call.config == self.default_config(call.spec, None, "forward"):  # type: ignore[arg-type]
            return call
        return replace(call, kv_lengths=torch.full((call.query.shape[0],), call.key.shape[2] - 1))


class SupportCountsVisibleKeys(Honest):
    def forward(self, call: AttentionCall) -> ForwardResult:
        found = super().forward(call)
        if found.support is None:
            return found
        return replace(found, support=torch.where(found.support > 0, call.key.shape[2], 0).to(torch.int32))


Broken = type[Honest]

FAULTS: dict[Broken, tuple[str, ...]] = {
    CausalOffByOne: ("causal_top_left_53x53", "offset_int", "window_causal"),
    LengthsIgnored: ("lengths", "lengths_zero_and_beyond", "keys_beyond_the_length_do_not_exist"),
    StartsIgnored: ("starts", "keys_before_the_start_do_not_exist"),
    BottomRightOfThePadding: ("lengths_causal_bottom_right",),
    WindowOneShort: ("window_5_2", "window_causal"),
    HolesReadAsLength: ("key_mask_with_holes", "key_mask_one_for_all"),
    ContiguityAssumed: ("layout_transposed", "layout_sliced", "layout_expanded", "layout_every_other"),
    GradOutContiguityAssumed: ("grad_out_transposed", "grad_out_every_other", "grad_out_expanded"),
    HeadsInterleaved: ("gqa", "gqa_groups_of_3"),
    FirstHeadsAlpha: ("alpha_per_head", "alpha_per_head_softmax_among"),
    AlphaNotClamped: ("alpha_tensor_clamped", "alpha_per_head_clamped"),
    ZeroAlphaGradient: ("alpha_grad_1.2", "alpha_grad_per_head", "alpha_grad_1.0001"),
    SoftmaxBackward: ("plain_1.5_dense", "alpha_1.25", "two_clusters_1.5"),
    PlantedKeyMissed: ("needles_1.5", "needles_long"),
    PoolOverflows: ("full_support_long",),
    DropoutNotScaled: ("dropout",),
    OtherDropoutInBackward: ("dropout",),
    EmptyRowsNotWritten: ("bool_mask_37x53", "lengths_zero_and_beyond"),
    ReadsHiddenValues: ("keys_beyond_the_length_do_not_exist", "keys_before_the_start_do_not_exist"),
    NanSpreads: ("nan_stays_in_its_row",),
    RoundsToHalf: ("plain_1.5_dense", "plain_2_dense"),
    CountsItsCalls: ("deterministic_gradients_repeat",),
    WritesToGradOut: ("inputs_are_left_alone",),
    SavesAnInput: ("plain_1.5_dense",),
    SavesMoreThanTold: ("plain_1.5_dense",),
    RefusesLongCalls: ("support_is_decided_without_tensors",),
    RefusesEverything: ("plain_calls_are_supported",),
    ConfigChangesTheAnswer: ("every_config_gives_the_same_answer",),
    SupportCountsVisibleKeys: ("plain_1.5_sparse",),
}
"""Each fault, and checks that must fail for it: all of those named."""

UNTOUCHED: dict[Broken, tuple[str, ...]] = {
    CausalOffByOne: ("plain_1.5_dense", "causal_bottom_right_37x53"),
    PlantedKeyMissed: ("full_support_1.5", "constant_rows_1.5"),
    PoolOverflows: ("full_support_1.5", "plain_1.5_dense", "long_causal"),
    ContiguityAssumed: ("plain_1.5_dense",),
    HolesReadAsLength: ("plain_1.5_dense", "lengths"),
    ZeroAlphaGradient: ("alpha_tensor_1.3",),
    CountsItsCalls: ("plain_1.5_dense",),
    SoftmaxBackward: ("softmax",),
}
"""Checks that a fault must leave passing: it is as subtle as it claims to be."""
