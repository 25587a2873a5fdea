"""Small models of every kind that capture must understand: random weights, real code of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

VOCABULARY = [
    "[PAD]",
    "[CLS]",
    "[SEP]",
    "[UNK]",
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "slept",
    "until",
    "noon",
    ".",
    "\n",
]


def tiny_llama():
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(
        LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.5,
            pad_token_id=0,
        )
    )


def tiny_gpt2():
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(
        vocab_size=len(VOCABULARY),
        n_positions=64,
        n_embd=32,
        n_layer=3,
        n_head=4,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2Model(config)


def tiny_bert():
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    return BertModel(config)


def tiny_modernbert():
    from transformers import ModernBertConfig, ModernBertModel

    config = ModernBertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        local_attention=8,
        global_attn_every_n_layers=2,
        initializer_range=0.5,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    )
    return ModernBertModel(config)


def tiny_mistral():
    from transformers import MistralConfig, MistralModel

    return MistralModel(
        MistralConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=1,
            max_position_embeddings=64,
            sliding_window=6,
            initializer_range=0.5,
            pad_token_id=0,
        )
    )


# Each family's model, and the name of the projection whose input is attention's output.
FAMILIES: dict[str, tuple[Callable[[], torch.nn.Module], str]] = {
    "llama": (tiny_llama, "layers.{}.self_attn.o_proj"),
    "mistral": (tiny_mistral, "layers.{}.self_attn.o_proj"),
    "gpt2": (tiny_gpt2, "h.{}.attn.c_proj"),
    "bert": (tiny_bert, "encoder.layer.{}.attention.output.dense"),
    "modernbert": (tiny_modernbert, "layers.{}.attn.Wo"),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def build() -> Callable[[str], torch.nn.Module]:
    """Builds a family's model, the same one each time."""

    def make(family: str) -> torch.nn.Module:
        torch.manual_seed(0)
        return FAMILIES[family][0]().eval()

    return make


@pytest.fixture(scope="session")
def tokenizer():
    """Knows VOCABULARY and puts [CLS] and [SEP] around a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    )


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    """A Hugging Face folder: tiny Llama and tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    tiny_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def story(tmp_path: Path) -> Path:
    """A text of 110 tokens."""
    path = tmp_path / "story.txt"
    path.write_text("the cat sat on a mat and slept until noon .\n" * 10, encoding="utf-8")
    return path
