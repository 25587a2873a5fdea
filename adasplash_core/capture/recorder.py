"""Records what chosen layers of a loaded model hand to attention, through transformers' AttentionInterface.

A recording function is registered under a name of its own; it copies what it is given and lets SDPA compute.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from adasplash_core.capture.masks import MaskFacts, mask_facts
from adasplash_core.errors import ArgumentError
from adasplash_core.workload import WorkloadLayer, memory_order

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_IMPLEMENTATION = "qkv_recorder"  # names with "flash", "sdpa", "flex_attention" or "/" in them take other paths in transformers


def capture_layers(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    layers: Sequence[int],
    heads: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> list[WorkloadLayer]:
    """Capture layers of a loaded model; its attention implementation is put back afterwards.

    The model runs only as far as the last layer asked for. ``input_ids``, ``attention_mask`` (1: a token, 0: padding): (B, L).

    Raises
    ------
    ArgumentError: if the model does not go through AttentionInterface, has no such layer or head, or computes attention with
        more than scaled dot products and a mask (sinks, soft caps, position biases).
    """
    import torch

    if getattr(model.config, "is_encoder_decoder", False):
        raise ArgumentError(
            "Only decoder-only and encoder-only models can be captured.", seen=f"{type(model).__name__}, an encoder-decoder"
        )
    recorder = _Recorder(model, frozenset(layers), heads, dtype)
    inputs: dict[str, Any] = {"input_ids": input_ids.to(model.device)}
    accepted = inspect.signature(model.forward).parameters
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask.to(model.device)
        if "position_ids" in accepted and not attention_mask[:, 0].all():  # left padding: the first token is number 0
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    was_training = model.training
    with _recording(model, recorder), torch.no_grad():
        model.eval()
        try:
            model(**inputs)
        except _Complete:
            pass  # every layer asked for is recorded: the rest of the model has nothing to add
        finally:
            model.train(was_training)
    if missing := sorted(recorder.wanted - recorder.recorded.keys()):
        raise ArgumentError(
            "Every layer asked for must compute attention through transformers' AttentionInterface.",
            seen=f"{type(model).__name__}, whose layers {', '.join(map(str, missing))} did not",
            hint="layers without attention cannot be captured." if recorder.recorded else "",
        )
    return [recorder.recorded[index] for index in sorted(recorder.recorded)]


class _Complete(Exception):  # noqa: N818 (ends the model's run, no error)
    """Everything asked for is recorded."""


@dataclass
class _Recorder:
    """Copies what chosen layers hand to attention."""

    model: PreTrainedModel
    wanted: frozenset[int]
    heads: Sequence[int] | None
    dtype: torch.dtype | None
    recorded: dict[int, WorkloadLayer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = {id(module): name for name, module in self.model.named_modules()}
        self.facts: tuple[torch.Tensor, MaskFacts] | None = None

    def record(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        options: dict[str, Any],
    ) -> None:
        name = self.names.get(id(module), "")
        # The layer's number is the first in its dotted name: layers.4.self_attn, encoder.layer.4.attention.self, h.4.attn.
        number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
        if number is None or (index := int(number[1])) not in self.wanted:
            return
        if index in self.recorded:
            raise ArgumentError(
                "A layer must compute attention once.",
                seen=f"layer {index} doing so again in {name}",
                hint="models that reuse one module cannot be captured.",
            )
        for option, what in {
            "softcap": "caps its scores",
            "s_aux": "adds attention sinks",
            "position_bias": "adds a position bias",
        }.items():
            if options.get(option) is not None:
                raise ArgumentError(
                    "A layer must compute scaled dot products and a mask, no more.",
                    seen=f"layer {index}, which {what} ({option})",
                )
        facts = self._facts(module, query, mask, options.get("is_causal"))
        query_heads, key_heads = self._chosen_heads(query.shape[1], key.shape[1])
        scale = options.get("scaling")
        self.recorded[index] = WorkloadLayer(
            index=index,
            query=self._copy(query, query_heads),
            key=self._copy(key, key_heads),
            value=self._copy(value, key_heads),
            scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
            is_causal=facts.is_causal,
            window=facts.window,
            kv_lengths=None if facts.kv_lengths is None else facts.kv_lengths.cpu(),
            kv_starts=None if facts.kv_starts is None else facts.kv_starts.cpu(),
            attn_mask=None if facts.attn_mask is None else self._mask(facts.attn_mask, query_heads),
            module=name,
            heads=None if self.heads is None else tuple(self.heads),
        )

    def complete(self) -> bool:
        return self.recorded.keys() == self.wanted

    def _facts(
        self, module: torch.nn.Module, query: torch.Tensor, mask: torch.Tensor | None, is_causal: bool | None
    ) -> MaskFacts:
        if mask is None:  # the meaning that transformers' SDPA function gives to no mask
            causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
            return MaskFacts(is_causal=causal and query.shape[2] > 1)
        if self.facts is None or self.facts[0] is not mask:  # layers share masks, and reading one costs a pass over it
            self.facts = (mask, mask_facts(mask))
        return self.facts[1]

    def _chosen_heads(self, heads: int, kv_heads: int) -> tuple[list[int] | None, list[int] | None]:
        """Positions of the query and key heads to keep; key heads are repeated where the choice breaks their groups."""
        if self.heads is None:
            return None, None
        chosen = list(self.heads)
        if not chosen or len(set(chosen)) < len(chosen) or min(chosen) < 0 or max(chosen) >= heads:
            raise ArgumentError(
                "Heads must be distinct and exist in the model.", seen=f"heads {chosen}", hint=f"it has heads 0 to {heads - 1}."
            )
        group = heads // kv_heads
        keys = [head // group for head in chosen]
        distinct = list(dict.fromkeys(keys))
        even = len(chosen) // len(distinct)
        return chosen, distinct if keys == [key for key in distinct for _ in range(even)] else keys

    def _mask(self, mask: torch.Tensor, heads: list[int] | None) -> torch.Tensor:
        if heads is not None and mask.shape[1] != 1:
            mask = mask[:, heads]
        return mask.to("cpu", self.dtype if mask.is_floating_point() else None).contiguous()

    def _copy(self, tensor: torch.Tensor, heads: list[int] | None) -> torch.Tensor:
        import torch

        order = memory_order(tensor)
        if heads is not None:
            tensor = tensor[:, heads]
        copy = torch.empty_permuted(tensor.shape, order, dtype=self.dtype or tensor.dtype)
        return copy.copy_(tensor)


_active: ContextVar[_Recorder | None] = ContextVar("adasplash_recorder", default=None)


def _recording_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls: records, then computes with SDPA."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if (recorder := _active.get()) is not None:
        recorder.record(module, query, key, value, attention_mask, options)
        if recorder.complete():
            raise _Complete
    output: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return output


@contextmanager
def _recording(model: PreTrainedModel, recorder: _Recorder) -> Iterator[None]:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(_IMPLEMENTATION, _recording_attention)
    AttentionMaskInterface.register(_IMPLEMENTATION, sdpa_mask)  # without one, padding is silently lost
    previous = model.config._attn_implementation
    model.set_attn_implementation(_IMPLEMENTATION)
    token = _active.set(recorder)
    try:
        if model.config._attn_implementation != _IMPLEMENTATION:
            raise ArgumentError(
                "A model must let its attention be set through transformers' AttentionInterface.", seen=type(model).__name__
            )
        yield
    finally:
        _active.reset(token)
        model.set_attn_implementation(previous)
