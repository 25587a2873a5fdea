"""Continued training, classification and retrieval, each run small on random models and made-up tokens."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from .conftest import EVIDENCE, run_script

sys.path.insert(0, str(EVIDENCE))
try:
    import encoders
    import texts
    from classification import joined, macro_f1
    from retrieval import ndcg_at_10
finally:
    sys.path.remove(str(EVIDENCE))

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2
}  # fmt: skip


def run(script: str, folder: Path, *arguments: str) -> dict[str, Any]:
    out = folder / "out.json"
    paths = ("--model", str(folder), "--tokens", str(folder / "tokens.npz"), "--json", str(out))
    code, printed = run_script(script, *paths, "--budget", "90s", *arguments)
    assert code == 0, printed
    content: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return content


def sequences(count: int, length: int, classes: int = 1, seed: int = 0) -> tuple[encoders.Ragged, Any]:
    """Tokens whose class shows: each class has a part of the vocabulary to itself."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    width = 62 // classes
    rows = [
        random.integers(2 + label * width, 2 + (label + 1) * width, random.integers(length // 2, length)) for label in labels
    ]
    return encoders.Ragged.of([row.tolist() for row in rows]), labels


def test_continued_training(tmp_path: Path) -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=True)).save_pretrained(tmp_path)
    stream = np.tile(np.arange(3, 40, dtype=np.uint16), 60)  # learnable: the next token is always the next number
    texts.Tokens(stream, stream[:500], 64, 1.0, ("numbers",)).save(tmp_path / "tokens.npz")
    variants = ("--variants", "softmax", "entmax 1.5", "annealed 1.5")
    sizes = ("--context", "24", "--batch-tokens", "96", "--micro-tokens", "48", "--validation-tokens", "240")
    content = run("continued_training.py", tmp_path, *variants, *sizes, "--steps", "12", "--lr", "0.02")
    assert len(content["runs"]) == 3
    for one in content["runs"]:
        losses = [point["validation_loss"] for point in one["curve"]]
        assert losses[-1] < losses[0] - 0.3, one["variant"]
        layers = [len(point["density_by_layer_and_head"]) for point in one["curve"]]
        assert set(layers) == ({0} if one["variant"] == "softmax" else {2})
    before = {one["variant"]: one["curve"][0]["validation_loss"] for one in content["runs"]}
    assert before["annealed 1.5"] == pytest.approx(before["softmax"], abs=1e-5)  # alpha = 1 is softmax
    assert before["entmax 1.5"] != pytest.approx(before["softmax"], abs=1e-7)


def test_classification_beyond_the_table_of_positions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    BertModel(BertConfig(**SIZES, max_position_embeddings=16)).save_pretrained(tmp_path)
    parts: dict[str, Any] = {"names": np.array(["a", "b", "c"])}
    for seed, (part, count) in enumerate((("train", 48), ("test", 24))):
        parts[part], parts[f"{part}_labels"] = sequences(count, 40, 3, seed)
    encoders.save(tmp_path / "tokens.npz", **parts)
    sizes = ("--context", "40", "--batch", "16", "--micro", "8", "--steps", "25", "--seeds", "1", "--lr", "0.01")
    content = run("classification.py", tmp_path, *sizes, "--variants", "softmax", "annealed 1.5")
    for one in content["runs"]:
        assert one["curve"][-1]["macro_f1"] > 0.8, one["variant"]
    assert len(content["runs"][1]["curve"][-1]["density_by_layer_and_head"]) == 2


def pairs(path: Path) -> None:
    """Titles that are the beginning of their bodies."""
    parts: dict[str, Any] = {}
    for seed, (part, count) in enumerate((("train", 40), ("test", 20))):
        bodies, _ = sequences(count, 30, 20, seed)
        parts[f"{part}_bodies"] = bodies
        parts[f"{part}_titles"] = encoders.Ragged.of([bodies.ids[a : a + 4].tolist() for a in bodies.starts[:-1]])
    encoders.save(path, **parts)


def test_retrieval(tmp_path: Path) -> None:
    torch.manual_seed(0)
    BertModel(BertConfig(**SIZES, max_position_embeddings=64)).save_pretrained(tmp_path)
    pairs(tmp_path / "tokens.npz")
    content = run("retrieval.py", tmp_path, "--batch", "20", "--steps", "20", "--seeds", "1", "--lr", "0.003", "--shared",
                  "--variants", "softmax", "annealed 2", "entmax 1.5")  # fmt: skip
    assert [one["variant"] for one in content["runs"]] == ["softmax", "annealed 2", "entmax 1.5"]
    assert content["settings"]["shared"]
    assert "ms a step" not in content["table"][0]
    for one in content["runs"]:
        scores = [point["ndcg_at_10"] for point in one["curve"]]
        assert scores[-1] > max(0.6, scores[0]), one["variant"]


def test_retrieval_with_a_modernbert_from_scratch(tmp_path: Path) -> None:
    pairs(tmp_path / "tokens.npz")
    model = ("--model", "modernbert", "--embed", "16", "--layers", "2", "--context", "32", "--batch", "20")
    training = ("--steps", "4", "--seeds", "1", "--lr", "0.01", "--pretraining-lr", "0.01")
    content = run("retrieval.py", tmp_path, *model, *training, "--variants", "softmax", "annealed 2")
    for one in content["runs"]:
        assert one["steps"] == 4
        assert one["curve"][-1]["ndcg_at_10"] > 0.3, one["variant"]
    assert len(content["runs"][1]["curve"][-1]["density_by_layer_and_head"]) == 2


def test_hidden_words_are_labels_and_nothing_else_is() -> None:
    torch.manual_seed(0)
    ids = torch.randint(104, 200, (4, 100))
    ids[:, 0], ids[:, 90], ids[:, 91:] = encoders.CLS, encoders.SEP, 0
    batch = encoders.masked({"input_ids": ids, "attention_mask": (ids != 0).long()})
    hidden = batch["input_ids"] == encoders.MASK
    assert 0.2 < hidden[:, 1:90].double().mean() < 0.4
    assert torch.equal(hidden, batch["labels"] != -100)
    assert torch.equal(torch.where(hidden, batch["labels"], batch["input_ids"]), ids)
    assert not hidden[:, [0, *range(90, 100)]].any()


class TestMeasures:
    def test_macro_f1(self) -> None:
        true = np.array([0, 0, 0, 1, 1, 2])
        assert macro_f1(true, true) == 1
        # class 0: 2 hits of 3 found and 3 true; class 1: 1 of 2 and 2; class 2: 0 of 1 and 1
        assert macro_f1(np.array([0, 0, 1, 1, 2, 0]), true) == pytest.approx((4 / 6 + 2 / 4 + 0) / 3)

    def test_ndcg_at_10(self) -> None:
        similarity = torch.eye(12)
        assert ndcg_at_10(similarity) == 1
        similarity[0, 1:3] = 2.0  # the right one is third
        assert ndcg_at_10(similarity) == pytest.approx((11 + 1 / 2) / 12)
        assert ndcg_at_10(torch.ones(12, 12)) == 0  # ties are no success

    def test_documents_of_one_class_are_joined_to_length(self) -> None:
        pairs = [("a b", "x"), ("c", "y"), ("d e", "x"), ("f g h", "y"), ("i", "x")]
        assert joined(pairs, words=4) == [("a b d e", "x"), ("c f g h", "y")]


class TestRagged:
    def test_pads_on_the_right(self) -> None:
        ragged = encoders.Ragged.of([[5, 6, 7], [8], [9, 10]])
        batch = ragged.padded(np.array([2, 0]), torch.device("cpu"))
        assert batch["input_ids"].tolist() == [[9, 10, 0], [5, 6, 7]]
        assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]

    def test_lengths_are_rounded_up_to_64_but_not_beyond_the_most(self) -> None:
        ragged = encoders.Ragged.of([[1] * n for n in (3, 65, 99)])
        lengths = {most: [ragged.padded([row], torch.device("cpu"), most)["input_ids"].shape[1] for row in range(3)]
                   for most in (0, 99, 512)}  # fmt: skip
        assert lengths == {0: [3, 65, 99], 99: [64, 99, 99], 512: [64, 128, 128]}

    def test_batches_have_every_row_once_and_like_lengths(self) -> None:
        ragged = encoders.Ragged.of([[1] * n for n in (5, 1, 4, 2, 3)])
        assert [rows.tolist() for rows in ragged.batches(2)] == [[1, 3], [4, 2], [0]]

    def test_survives_a_file(self, tmp_path: Path) -> None:
        ragged = encoders.Ragged.of([[1, 2], [3]])
        encoders.save(tmp_path / "x.npz", words=ragged, labels=np.array([0, 1]))
        found = encoders.load(tmp_path / "x.npz")
        assert np.array_equal(found["words"].starts, ragged.starts)
        assert found["labels"].tolist() == [0, 1]


def test_a_longer_table_repeats_the_shorter() -> None:
    model = BertModel(BertConfig(**SIZES, max_position_embeddings=8))
    longer = encoders.longer(model, 20)
    weight = longer.embeddings.position_embeddings.weight
    assert torch.equal(weight[8:16], model.embeddings.position_embeddings.weight)
    assert weight.requires_grad
    assert longer(torch.arange(20)[None]).last_hidden_state.shape == (1, 20, 16)
    ids = torch.arange(8)[None]
    torch.testing.assert_close(longer.eval()(ids).last_hidden_state, model.eval()(ids).last_hidden_state)
