"""Small random models of the families under test, and a dense entmax attention of a few lines to compare them with."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers.masking_utils import sdpa_mask

from adasplash_core import dropout as dropout_contract
from adasplash_core import entmax
from adasplash_core.nn import Alpha

DENSE = "dense_entmax"
VOCABULARY = 61


def dense_attention(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: Any = None, dropout: float = 0.0, **others: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores, the whole matrix of weights, and their sum of values."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, -torch.inf)
    weights = entmax(scores, alpha_of(module), backend="torch")
    if dropout > 0:
        weights = weights * kept(weights, dropout) / (1 - dropout)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def alpha_of(module: Any) -> Any:
    """A number, or a tensor (1, H, 1, 1)."""
    own = module.entmax_alpha() if hasattr(module, "entmax_alpha") else getattr(module.config, "entmax_alpha", 1.5)
    if isinstance(own, list):
        own = own[module.layer_idx]
    return own.reshape(1, -1, 1, 1) if isinstance(own, torch.Tensor) else own


def same_alphas(ours: Any, dense: Any) -> None:
    """Give the dense model copies of the alphas that ``set_alpha`` gave ours."""
    for name, module in list(ours.named_modules()):
        if isinstance(module, Alpha):
            dense.get_submodule(name.rpartition(".")[0]).entmax_alpha = copy.deepcopy(module)


def kept(weights: torch.Tensor, dropout: float) -> torch.Tensor:
    """Which entries the library's dropout keeps, drawn from torch's generator as it draws."""
    batch, heads, rows, columns = weights.shape
    pair = torch.arange(batch * heads).view(batch, heads, 1, 1)
    row, column = torch.arange(rows)[:, None], torch.arange(columns)
    return dropout_contract.keep(dropout_contract.draw_seed(weights.device), pair, row, column, dropout)


def dense_mask(**arguments: Any) -> torch.Tensor | None:
    arguments |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(**arguments)


transformers.AttentionInterface.register(DENSE, dense_attention)
transformers.AttentionMaskInterface.register(DENSE, dense_mask)


@dataclass(frozen=True)
class Family:
    """One model class with the arguments of a small configuration of it."""

    name: str
    model: str
    config: str
    arguments: dict[str, Any]
    causal: bool = False
    text: bool = True

    def make(self, attention: str, seed: int = 0, **changes: Any) -> Any:
        """A model with random weights large enough for attention that is far from uniform."""
        config = getattr(transformers, self.config)(**self.arguments, **changes)
        config._attn_implementation = attention
        torch.manual_seed(seed)
        model = getattr(transformers, self.model)(config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim == 2 and any(word in name.lower() for word in ("attn", "attention", "qkv", "embed", "wte")):
                    weight.copy_(torch.randn(weight.shape, generator=generator) * 0.25)
        return model.double().eval()

    def pair(self, **changes: Any) -> tuple[Any, Any]:
        """The same model with our attention and with the dense one."""
        ours, dense = self.make("entmax", **changes), self.make(DENSE, **changes)
        dense.load_state_dict(ours.state_dict())
        return ours, dense

    def inputs(self, batch: int = 2, length: int = 24, seed: int = 1) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        if not self.text:
            pixels = torch.randn(batch, 3, 24, 24, generator=generator, dtype=torch.float64)
            return {"pixel_values": pixels, "labels": torch.randint(0, 5, (batch,), generator=generator)}
        words = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
        return {"input_ids": words, "labels": words.clone()}


_COMMON = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ENCODER = {
    "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 48, "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
}  # fmt: skip
GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    "GPT2Config",
    {**_COMMON, "n_embd": 32, "n_head": 2, "n_layer": 2, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    causal=True,
)
LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    "LlamaConfig",
    {
        **_COMMON, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
        "intermediate_size": 48, "max_position_embeddings": 64,
    },
    causal=True,
)  # fmt: skip
BERT = Family("bert", "BertForMaskedLM", "BertConfig", {**_COMMON, **_ENCODER})
ROBERTA = Family("roberta", "RobertaForMaskedLM", "RobertaConfig", {**_COMMON, **_ENCODER})
MODERNBERT = Family(
    "modernbert",
    "ModernBertForMaskedLM",
    "ModernBertConfig",
    {
        **_COMMON, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3, "intermediate_size": 48,
        "max_position_embeddings": 64, "local_attention": 10, "cls_token_id": 1, "sep_token_id": 2,
    },
)  # fmt: skip
VIT = Family(
    "vit",
    "ViTForImageClassification",
    "ViTConfig",
    {
        "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 48, "image_size": 24,
        "patch_size": 4, "num_labels": 5, "hidden_dropout_prob": 0.0,
    },
    text=False,
)  # fmt: skip

MISTRAL = Family("mistral", "MistralForCausalLM", "MistralConfig", {**LLAMA.arguments, "sliding_window": 6}, causal=True)
GEMMA3 = Family(
    "gemma3",
    "Gemma3ForCausalLM",
    "Gemma3TextConfig",
    {**LLAMA.arguments, "head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    causal=True,
)

FAMILIES = (GPT2, LLAMA, BERT, ROBERTA, MODERNBERT, VIT)
TEXT = tuple(f for f in FAMILIES if f.text)
CAUSAL = (GPT2, LLAMA)
