"""Where a transformers model keeps alpha: in its config, or in one :class:`~adasplash_core.nn.Alpha` an attention module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from adasplash_core.errors import ArgumentError, ArgumentTypeError
from adasplash_core.nn.alpha import Alpha

NAME = "entmax"
LEARNABLE = "learnable"
_ATTRIBUTE = "entmax_alpha"


def alpha_of(module: nn.Module) -> float | torch.Tensor:
    """alpha of one attention module: its own, or its config's, or 1.5."""
    own = getattr(module, _ATTRIBUTE, None)
    if isinstance(own, Alpha):
        alpha: float | torch.Tensor = own()
        return alpha
    config = getattr(module, "config", None)
    said = getattr(config, _ATTRIBUTE, None)
    if said is None:
        return 1.5
    if isinstance(said, (int, float)) and not isinstance(said, bool):
        return float(said)
    if said == LEARNABLE:
        raise ArgumentError(
            "config.entmax_alpha says that every head has its own learnable alpha, and this model has none.",
            seen=type(module).__name__,
            hint="call set_alpha(model, learnable=True), or load a checkpoint that has them by with_learnable_alpha(its class)",
        )
    if not isinstance(said, (list, tuple)):
        raise ArgumentTypeError(
            f'config.entmax_alpha must be a number, a list of one a layer, or "{LEARNABLE}".', seen=repr(said)
        )
    layers = getattr(config, "num_hidden_layers", None)
    if layers is not None and len(said) != layers:
        raise ArgumentError("config.entmax_alpha must list one alpha a layer.", seen=f"{len(said)} for {layers} layers")
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise ArgumentError(
            f"{type(module).__name__} does not know which layer it belongs to, so a list in config.entmax_alpha cannot be read there.",
            seen=f"entmax_alpha={said}",
            hint="call set_alpha(model, model.config.entmax_alpha) once",
        )
    if layer >= len(said):
        raise ArgumentError("config.entmax_alpha must list one alpha a layer.", seen=f"{len(said)}, and layer {layer}")
    return float(said[layer])


def set_alpha(model: nn.Module, alpha: float | Sequence[float] = 1.5, *, learnable: bool = False) -> list[Alpha]:
    """Give every attention module of a transformers model its alpha, and write it into the config, so that it is saved.

    Call it before the optimizer is made and before the model is compiled. ``AlphaSchedule`` and ``AlphaCallback`` move what it made.

    Parameters
    ----------
    model: a transformers model.
    alpha: number in [1, 2], or a sequence of one a layer.
    learnable: give every head its own parameter, alpha = 1 + sigmoid(theta), which starts at ``alpha``, inside (1, 2).

    Returns
    -------
    The modules it made, in the model's order.

    Raises
    ------
    ArgumentError: the model's attention is not "entmax", or cannot be, or the sequence has another length than the model layers.
    """
    modules = _attention_modules(model)
    layers: dict[tuple[int, Any], list[nn.Module]] = {}
    for module in modules:
        index = getattr(module, "layer_idx", None)
        layers.setdefault((id(module.config), id(module) if index is None else index), []).append(module)
    several = isinstance(alpha, Sequence) and not isinstance(alpha, str)
    values = list(alpha) if several else [alpha] * len(layers)  # type: ignore[arg-type]
    if len(values) != len(layers):
        raise ArgumentError("A sequence of alphas must have one a layer.", seen=f"{len(values)} for {len(layers)} layers")
    made: dict[int, Alpha] = {}
    saved: dict[int, tuple[Any, list[float]]] = {}
    for value, group in zip(values, layers.values(), strict=True):
        for module in group:
            made[id(module)] = _make(module, value, learnable)
        config = group[0].config
        saved.setdefault(id(config), (config, []))[1].append(value)  # type: ignore[arg-type]
    for module in modules:  # all of them are right: now they may be kept
        module.add_module(_ATTRIBUTE, made[id(module)])
    for config, numbers in saved.values():
        config.entmax_alpha = LEARNABLE if learnable else (numbers if several else numbers[0])
    return [made[id(module)] for module in modules]


def note_alpha(model: nn.Module, value: float) -> None:
    """Write where a schedule leads into the configs of the modules that follow it: a saved model must be used with that."""
    for module in model.modules():
        own = getattr(module, _ATTRIBUTE, None)
        config: Any = getattr(module, "config", None)
        if isinstance(own, Alpha) and not own.learnable and config is not None:
            config.entmax_alpha = value


def _attention_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that call the attention interface for entmax: they have a config, and say whether they are causal."""
    found = [
        module
        for module in model.modules()
        if hasattr(module, "is_causal") and hasattr(module, "config") and not hasattr(module, "get_input_embeddings")
    ]
    if not found:
        raise ArgumentError(
            "The model must have attention modules that ask transformers' interface for their attention.",
            seen=type(model).__name__,
            hint="its attention is its own, which no attn_implementation changes",
        )
    chosen = {getattr(module.config, "_attn_implementation", None) for module in found}
    if NAME not in chosen:
        raise ArgumentError(
            f'The model\'s attention must be "{NAME}" before it gets an alpha.',
            seen=f"attn_implementation={', '.join(map(repr, chosen))}",
            hint="load it with attn_implementation=register(), or call model.set_attn_implementation(register())",
        )
    return [module for module in found if getattr(module.config, "_attn_implementation", None) == NAME]


def _make(module: nn.Module, value: Any, learnable: bool) -> Alpha:
    device = next((p.device for p in module.parameters()), None)
    heads = getattr(module.config, "num_attention_heads", None) if learnable else None
    return Alpha(value, heads=heads, learnable=learnable, persistent=False, device=device)


def with_learnable_alpha(model_class: type[Any], alpha: float = 1.5) -> type[Any]:
    """The same model class with a learnable alpha a head from the start: its ``from_pretrained`` loads what such a model saved.

    Where a checkpoint has none, they start at ``alpha``.

    Parameters
    ----------
    model_class: a concrete class of transformers, like ``LlamaForCausalLM``.
    """

    def __init__(self: Any, config: Any, *inputs: Any, **kwargs: Any) -> None:  # noqa: N807
        super(made, self).__init__(config, *inputs, **kwargs)
        set_alpha(self, alpha, learnable=True)

    @classmethod  # type: ignore[misc]
    def from_pretrained(cls: Any, *inputs: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        model, info = super(made, cls).from_pretrained(*inputs, output_loading_info=True, **kwargs)
        missing = set(info["missing_keys"])
        for name, module in model.named_modules():
            if isinstance(module, Alpha) and f"{name}.theta" in missing:
                module.reset_parameters()
        return (model, info) if output_loading_info else model

    body = {"__init__": __init__, "from_pretrained": from_pretrained, "__module__": model_class.__module__}
    made: type[Any] = type(model_class.__name__, (model_class,), body)
    return made
