"""The language modelling script, run small: variants start alike, numbers are what they say, a missing package is a reason."""

from __future__ import annotations

import json
from typing import Any

import pytest

from .conftest import run_script

SCRIPT = "language_modelling.py"
SMALL = ("--size", "tiny", "--context", "32", "--batch-tokens", "128", "--micro-tokens", "64", "--validation-tokens", "256")
TEXTS = ("--sources", "news", "--documents", "60")


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("lm")
    code, printed = run_script(SCRIPT, *SMALL, *TEXTS, "--prepare", str(folder / "tokens.npz"))
    assert code == 0, printed
    code, printed = run_script(
        SCRIPT, *SMALL, "--tokens", str(folder / "tokens.npz"), "--variants", "softmax", "entmax", "annealed", "learned", "dense",
        "adasplash", "--steps", "10", "--seeds", "2", "--budget", "90s", "--lr", "0.01", "--json", str(folder / "out.json"),
    )  # fmt: skip
    assert code == 0, printed
    return printed, json.loads((folder / "out.json").read_text(encoding="utf-8"))


def curve(content: dict[str, Any], variant: str, seed: int = 0) -> list[dict[str, Any]]:
    (run,) = (r for r in content["runs"] if (r["variant"], r["seed"]) == (variant, seed))
    points: list[dict[str, Any]] = run["curve"]
    return points


def test_every_variant_learns(result: tuple[str, dict[str, Any]]) -> None:
    for variant in ("softmax", "entmax", "annealed", "learned", "dense"):
        for seed in (0, 1):
            losses = [point["validation_loss"] for point in curve(result[1], variant, seed)]
            assert len(losses) == 5
            assert losses[-1] < losses[0] - 0.02


def test_ours_and_the_dense_entmax_are_one_function(result: tuple[str, dict[str, Any]]) -> None:
    """The same weights and batches: the whole of training agrees, and differs from softmax's."""
    ours, dense, softmax = ([p["validation_loss"] for p in curve(result[1], v)] for v in ("entmax", "dense", "softmax"))
    assert ours == pytest.approx(dense, abs=2e-4)
    assert ours != pytest.approx(softmax, abs=1e-6)


def test_sparsity_is_told_for_every_layer_and_head(result: tuple[str, dict[str, Any]]) -> None:
    for point in curve(result[1], "entmax"):
        assert [len(layer) for layer in point["density_by_layer_and_head"]] == [2, 2]
        assert all(0 < density <= 1 for layer in point["density_by_layer_and_head"] for density in layer)
    assert curve(result[1], "softmax")[0]["density_by_layer_and_head"] == []


def test_the_file_says_what_was_run_on_what(result: tuple[str, dict[str, Any]]) -> None:
    content = result[1]
    assert content["settings"]["steps"] == 10
    assert content["machine"]["versions"]["torch"]
    assert content["texts"]["train"] > content["texts"]["validation"] > 256
    assert {row["variant"] for row in content["table"]} == {"softmax", "entmax", "annealed", "learned", "dense"}


def test_what_cannot_run_is_named_with_its_reason(result: tuple[str, dict[str, Any]]) -> None:
    output, content = result
    for seed in (0, 1):
        name = f"adasplash, seed {seed}"
        assert f"not run: {name}: {content['not run'][name]}" in output


def test_a_budget_that_is_spent_is_said() -> None:
    code, printed = run_script(SCRIPT, *SMALL, *TEXTS, "--budget", "0s", "--variants", "softmax", "--steps", "2")
    assert code == 1
    assert "The budget ended before the first variant began." in printed
