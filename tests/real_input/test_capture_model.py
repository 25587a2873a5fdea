"""From a model on disk and a text to captured layers: tokens, special tokens, batches, padding, and what can go wrong."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import types
import warnings
from itertools import chain, repeat

import pytest
import torch

from adasplash_core.capture import capture, capture_layers, check_length, loading
from adasplash_core.capture.loading import tokenize
from adasplash_core.errors import AdasplashWarning, ArgumentError, MissingDependencyError

CLS, SEP, PAD = 1, 2, 0
LINE = [4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]  # the cat sat on a mat and slept until noon .


def documents(*texts):
    return iter(texts)


STORY = "the cat sat on a mat and slept until noon ."


# -- tokens


def test_sequences_are_stretches_between_special_tokens(tokenizer):
    tokens = tokenize(tokenizer, documents(STORY, STORY), length=8, batch=3, padding="none")
    stream = LINE + LINE
    assert tokens.input_ids.tolist() == [[CLS, *stream[i : i + 6], SEP] for i in (0, 6, 12)]
    assert tokens.attention_mask is None


def test_no_more_text_is_read_than_needed(tokenizer):
    endless = chain([STORY] * 3, (pytest.fail("read on") for _ in repeat(None)))
    assert tokenize(tokenizer, endless, length=14, batch=2, padding="none").input_ids.shape == (2, 14)


@pytest.mark.parametrize("side", ["left", "right"])
def test_with_padding_each_document_is_a_sequence(tokenizer, side):
    tokens = tokenize(tokenizer, documents("the cat", STORY), length=6, batch=2, padding=side)
    short, long = [CLS, 4, 5, SEP], [CLS, 4, 5, 6, 7, SEP]
    assert tokens.input_ids.tolist() == [[PAD, PAD, *short] if side == "left" else [*short, PAD, PAD], long]
    assert tokens.attention_mask.tolist() == [[0, 0, 1, 1, 1, 1] if side == "left" else [1, 1, 1, 1, 0, 0], [1] * 6]


def test_a_text_that_is_too_short_says_how_long_it_is(tokenizer):
    with pytest.raises(ArgumentError, match=r"at least 24 tokens for 2 sequences.*Got 22 tokens.*--text can be repeated"):
        tokenize(tokenizer, documents(STORY, STORY), length=14, batch=2, padding="none")
    with pytest.raises(ArgumentError, match="Got 2 for a batch of 3"):
        tokenize(tokenizer, documents(STORY, "", STORY), length=14, batch=3, padding="left")


def test_a_length_without_room_for_text_is_refused(tokenizer):
    with pytest.raises(ArgumentError, match="beside the model's 2 special tokens. Got 2 tokens"):
        tokenize(tokenizer, documents(STORY), length=2, batch=1, padding="none")


# -- the whole way


def test_capture_runs_the_model_on_the_text(llama_folder, story):
    from transformers import AutoModel

    info, layers = capture(str(llama_folder), [str(story)], 20, "0,2", batch=2)
    assert [layer.index for layer in layers] == [0, 2]
    stream = LINE * 4
    input_ids = torch.tensor([[CLS, *stream[i : i + 18], SEP] for i in (0, 18)])
    for layer, expected in zip(
        layers, capture_layers(AutoModel.from_pretrained(llama_folder), input_ids, layers=[0, 2]), strict=True
    ):
        assert torch.equal(layer.query, expected.query)
        assert torch.equal(layer.value, expected.value)
    assert (info.model_type, info.tokens, info.padding, info.text) == ("llama", 20, "none", str(story))
    assert info.libraries["torch"] == importlib.metadata.version("torch")


def test_padding_reaches_the_masks(llama_folder, tmp_path):
    for name, count in {"a": 3, "b": 30}.items():
        (tmp_path / name).write_text("cat " * count)
    _, (layer,) = capture(str(llama_folder), [str(tmp_path / "a"), str(tmp_path / "b")], 12, "1", batch=2, padding="right")
    assert layer.is_causal
    assert layer.kv_lengths.tolist() == [5, 12]


def test_dtypes_of_storage_and_of_the_run(llama_folder, story):
    _, (exact,) = capture(str(llama_folder), [str(story)], 20, "0")
    _, (rounded,) = capture(str(llama_folder), [str(story)], 20, "0", dtype="bfloat16")
    _, (coarse,) = capture(str(llama_folder), [str(story)], 20, "0", dtype="float32", compute_dtype="bfloat16")
    assert torch.equal(rounded.query, exact.query.bfloat16())
    assert coarse.query.dtype == torch.float32
    assert torch.equal(coarse.query, coarse.query.bfloat16().float())
    assert not torch.equal(coarse.query, exact.query)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 0}, "length must be 1 or more"),
        ({"batch": 0}, "batch must be 1 or more"),
        ({"dtype": "int8"}, "Got int8"),
        ({"compute_dtype": "fp8"}, "Got fp8"),
        ({"padding": "middle"}, "Got 'middle'"),
        ({"texts": []}, "must be a text"),
        ({"layers": "3"}, "layers 0 to 2"),
        ({"heads": [4]}, "heads 0 to 3"),
        ({"length": 200}, r"at least 198 tokens.*Got 110 tokens"),
    ],
)
def test_bad_arguments_are_refused(llama_folder, story, change, message):
    arguments = {"model": str(llama_folder), "texts": [str(story)], "length": 12, "layers": "0", **change}
    with pytest.raises(ArgumentError, match=message):
        capture(**arguments)


def test_a_broken_model_says_where(llama_folder, story, tmp_path):
    (tmp_path / "config.json").write_bytes((llama_folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    for file in llama_folder.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ArgumentError, match="able to load the model") as caught:
        capture(str(tmp_path), [str(story)], 12, "0")
    assert str(tmp_path) in str(caught.value)


# -- lengths beyond the model's


def test_learned_positions_are_a_hard_limit(build):
    config = build("bert").config
    check_length(config, 64)
    with pytest.raises(ArgumentError, match=r"Got 65 tokens.*at most 64"):
        check_length(config, 65)


def test_rotary_positions_go_on_with_a_warning(build):
    config = build("llama").config
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_length(config, 64)
    with pytest.warns(AdasplashWarning, match="65 tokens are more than the 64"):
        check_length(config, 65)


# -- packages that are missing


@pytest.mark.parametrize(("installed", "why"), [(None, "it is not installed"), ("5.3.0", "5.3.0 is installed")])
def test_without_a_new_enough_transformers_the_extra_is_named(monkeypatch, installed, why):
    def version(name):
        if installed is None:
            raise loading.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(
        loading, "metadata", types.SimpleNamespace(version=version, PackageNotFoundError=loading.metadata.PackageNotFoundError)
    )
    with pytest.raises(MissingDependencyError, match=rf'{why}.*pip install "adasplash-core\[hf\]"'):
        loading.require_transformers()


def test_a_gguf_file_without_gguf_names_the_extra(monkeypatch, tmp_path, story):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None if name == "gguf" else object())
    with pytest.raises(MissingDependencyError, match=r'needs gguf.*pip install "adasplash-core\[hf\]"'):
        capture(str(tmp_path / "m.gguf"), [str(story)], 12, "0")


def test_importing_capture_is_cheap():
    code = "import sys, adasplash_core.capture, adasplash_core.workload; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"
