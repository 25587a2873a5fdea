"""What the attention does not do it refuses, or warns of once: never silent softmax, never silently lost padding."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from adasplash_core import configs
from adasplash_core.errors import (
    AdasplashWarning,
    ArgumentError,
    ArgumentTypeError,
    MissingDependencyError,
    UnknownBackendError,
)
from adasplash_core.integrations.hf_attention import entmax_attention
from adasplash_core.integrations.hf_masks import StructuredMask
from adasplash_core.integrations.transformers import NAME, register, set_alpha
from tests.integrations.models import BERT, FAMILIES, GPT2, LLAMA, Family


def call(length: int = 4, keys: int | None = None, causal: bool = False, mask: Any = None, **arguments: Any) -> torch.Tensor:
    module = torch.nn.Module()
    module.is_causal, module.config = causal, SimpleNamespace()  # type: ignore[assignment]
    query, key = torch.randn(1, 2, length, 8), torch.randn(1, 2, length if keys is None else keys, 8)
    return entmax_attention(module, query, key, key, mask, **arguments)[0]


class TestRegistration:
    def test_again_changes_nothing(self) -> None:
        before = transformers.AttentionInterface()[NAME]
        assert register() == register() == "entmax"
        assert transformers.AttentionInterface()[NAME] is before is entmax_attention

    def test_importing_loads_no_transformers(self) -> None:
        code = """
import sys
import adasplash_core.integrations.transformers as door
assert "transformers" not in sys.modules
assert door.register() == "entmax"
assert "transformers" in sys.modules
"""
        subprocess.run([sys.executable, "-c", code], check=True)

    @pytest.mark.parametrize("version", ["4.57.1", "5.3.0", "5.0.0rc1"])
    def test_older_versions_are_refused(self, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(metadata, "version", lambda name: version)
        with pytest.raises(MissingDependencyError, match=rf"needs transformers 5.4 or newer: {version}.*adasplash-core\[hf\]"):
            register()

    @pytest.mark.parametrize("version", ["5.4.0", "5.24.0", "5.25.0.dev0", "6.0"])
    def test_newer_versions_are_not(self, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(metadata, "version", lambda name: version)
        assert register() == "entmax"

    def test_a_missing_transformers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(name: str) -> str:
            raise metadata.PackageNotFoundError(name)

        monkeypatch.setattr(metadata, "version", missing)
        with pytest.raises(MissingDependencyError, match="it is not installed"):
            register()

    def test_the_name_takes_no_other_path(self) -> None:
        """transformers treats names with these parts in ways of their own."""
        assert not any(part in NAME for part in ("flash", "sdpa", "flex_attention", "/", "|"))


class TestWhatIsRefused:
    @pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
    def test_output_attentions(self, family: Family) -> None:
        inputs = family.inputs()
        model = family.make("entmax")
        with pytest.raises(ArgumentError, match="never has the whole matrix of weights"):
            model(**inputs, output_attentions=True)
        model(**inputs, output_hidden_states=True)

    def test_output_attentions_in_generate(self) -> None:
        words = LLAMA.inputs()["input_ids"]
        with pytest.raises(ArgumentError, match="never has the whole matrix of weights"):
            LLAMA.make("entmax").generate(words, max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)

    @pytest.mark.parametrize(
        "name",
        [
            "softcap",
            "s_aux",
            "sinks",
            "position_bias",
            "attention_bias",
            "head_mask",
            "layer_head_mask",
            "indices",
            "block_table",
        ],
    )
    def test_keyword_arguments_that_change_the_result(self, name: str) -> None:
        with pytest.raises(ArgumentError, match=f"does not do what the keyword argument '{name}' asks for"):
            call(**{name: torch.ones(2)})
        assert call(**{name: None}).shape == (1, 4, 2, 8)

    def test_head_masks_of_a_model(self) -> None:
        with pytest.raises(ArgumentError, match="'head_mask' asks for: masked heads"):
            BERT.make("entmax")(**BERT.inputs(), head_mask=torch.ones(2, 2))

    @pytest.mark.parametrize(
        ("model", "config", "changes", "what"),
        [
            ("Gemma2ForCausalLM", "Gemma2Config", {"head_dim": 8}, "softcap"),
            ("GptOssForCausalLM", "GptOssConfig", {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}, "s_aux"),
        ],
    )
    def test_models_that_need_them(self, model: str, config: str, changes: dict[str, Any], what: str) -> None:
        family = Family(model, model, config, {**LLAMA.arguments, **changes}, causal=True)
        with pytest.raises(ArgumentError, match=f"the keyword argument '{what}'"):
            family.make("entmax")(**LLAMA.inputs())

    def test_unknown_keyword_arguments_are_told_of_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(configs, "_warned", set())
        with pytest.warns(AdasplashWarning, match="does not know the keyword argument 'novelty'"):
            call(novelty=3)
        call(novelty=3)
        call(novelty_two=None, novelty_three=False)

    def test_models_that_compute_with_their_masks(self) -> None:
        """They take any name for their attention, and would go on with softmax."""
        family = Family("bloom", "BloomModel", "BloomConfig", {"vocab_size": 61, "hidden_size": 32, "n_head": 4, "n_layer": 2})
        with pytest.raises(
            ArgumentError, match="Only models that leave their masks and their attention to transformers' interfaces"
        ):
            family.make("entmax")(input_ids=LLAMA.inputs()["input_ids"])

    @pytest.mark.parametrize("name", ["Bloom", "MPNet", "DebertaV2"])
    def test_set_alpha_knows_models_with_an_attention_of_their_own(self, name: str) -> None:
        config = getattr(transformers, f"{name}Config")(
            vocab_size=61, hidden_size=32, num_attention_heads=4, num_hidden_layers=1
        )
        with pytest.raises(ArgumentError, match="must have attention modules that ask transformers' interface"):
            set_alpha(getattr(transformers, f"{name}Model")(config))

    def test_masks_are_no_tensors(self) -> None:
        mask = StructuredMask(-1, 0)
        for use in (lambda: torch.ones(2) + mask, lambda: mask[0], lambda: torch.cat([mask]), lambda: torch.ones(2) * mask):
            with pytest.raises(ArgumentError, match="Only models that leave their masks"):
                use()

    def test_flat_masks(self) -> None:
        """What a model hands down that makes no mask of the user's padding."""
        with pytest.raises(ArgumentError, match=r"must have four dimensions.*\(1, 4\)"):
            call(mask=torch.ones(1, 4, dtype=torch.bool))
        with pytest.raises(ArgumentError, match="must have four dimensions.*Got str"):
            call(mask="causal")

    @pytest.mark.parametrize("family", [BERT, LLAMA], ids=lambda f: f.name)
    def test_masks_with_three_dimensions(self, family: Family) -> None:
        with pytest.raises(ArgumentError, match=r"attention_mask must be \(batch, keys\), or .*Got shape \(2, 24, 24\)"):
            family.make("entmax")(**family.inputs(), attention_mask=torch.ones(2, 24, 24))

    def test_integer_masks(self) -> None:
        with pytest.raises(ArgumentTypeError, match="boolean .* or floating point"):
            call(mask=torch.ones(1, 1, 4, 4, dtype=torch.long))

    def test_a_cache_without_a_mask(self) -> None:
        with pytest.raises(ArgumentError, match="needs a mask that says where the queries stand"):
            call(length=3, keys=8, causal=True)

    def test_devices_that_differ(self) -> None:
        """As in a pipeline whose masks were left behind."""
        with pytest.raises(ArgumentError, match="must be on the query's device"):
            call(mask=torch.ones(1, 1, 1, 4, dtype=torch.bool, device="meta"))

    @pytest.mark.parametrize("family", [GPT2, LLAMA, BERT], ids=lambda f: f.name)
    def test_packing_beside_padding(self, family: Family) -> None:
        inputs = family.inputs(batch=1, length=8)
        edges = torch.tensor([0, 3, 8], dtype=torch.int32)
        lengths = {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": 5, "max_length_k": 5}
        mask = torch.ones_like(inputs["input_ids"])
        with pytest.raises(ArgumentError, match="already say which keys belong to which query"):
            family.make("entmax")(**inputs, **lengths, attention_mask=mask)

    def test_packing_in_a_batch(self) -> None:
        edges = torch.tensor([0, 3, 8], dtype=torch.int32)
        lengths = {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": 5, "max_length_k": 5, "use_cache": False}
        with pytest.raises(ArgumentError, match=r"Packed input must be \(1, heads"):
            LLAMA.make("entmax")(**LLAMA.inputs(batch=2, length=8), **lengths)

    def test_one_side_of_the_packing(self) -> None:
        with pytest.raises(ArgumentError, match="Packed input needs .* together"):
            call(cu_seq_lens_q=torch.tensor([0, 4]))


class TestBackend:
    def test_is_the_configs(self) -> None:
        model = LLAMA.make("entmax", entmax_backend="torch")
        assert torch.equal(model(**LLAMA.inputs()).logits, LLAMA.make("entmax")(**LLAMA.inputs()).logits)

    def test_unknown_ones_are_refused(self) -> None:
        with pytest.raises(UnknownBackendError, match="'torhc'.*Did you mean 'torch'"):
            LLAMA.make("entmax", entmax_backend="torhc")(**LLAMA.inputs())

    def test_must_be_a_name(self) -> None:
        with pytest.raises(ArgumentTypeError, match="must be the name of a backend"):
            LLAMA.make("entmax", entmax_backend=3)(**LLAMA.inputs())


class TestWithoutMask:
    """Models that make no mask for attention, because they have no padding or leave it to the attention function."""

    def test_one_query_sees_all_keys(self) -> None:
        torch.manual_seed(0)
        causal = call(length=1, keys=6, causal=True)
        torch.manual_seed(0)
        assert torch.equal(causal, call(length=1, keys=6))

    @pytest.mark.parametrize("causal", [True, False])
    @pytest.mark.parametrize("length", [1, 6])
    def test_sliding_window(self, causal: bool, length: int) -> None:
        torch.manual_seed(0)
        out = call(length=length, keys=6, causal=causal, sliding_window=3)
        row, key = torch.arange(6 - length, 6)[:, None], torch.arange(6)
        seen = (key > row - 3) & ((key <= row) if causal else (key < row + 3))
        torch.manual_seed(0)
        torch.testing.assert_close(out, call(length=length, keys=6, mask=seen[None, None]))

    def test_is_causal_can_be_said_in_the_call(self) -> None:
        torch.manual_seed(0)
        bidirectional = call(causal=True, is_causal=False)
        torch.manual_seed(0)
        assert torch.equal(bidirectional, call(causal=False))


def test_deterministic_gradients_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from adasplash_core.integrations import hf_attention

    seen: list[bool | None] = []
    attention = hf_attention.attention

    def spy(*tensors: Any, **arguments: Any) -> Any:
        seen.append(arguments["deterministic"])
        return attention(*tensors, **arguments)

    monkeypatch.setattr(hf_attention, "attention", spy)
    call(deterministic=True)
    call(deterministic=False)
    assert seen == [True, None]
