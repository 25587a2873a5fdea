"""``adasplash explain`` describes the very call that :func:`adasplash_core.attention` would make."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import adasplash_core
from adasplash_cli.main import cli

H, HKV, LQ, LK, E, EV = 6, 2, 24, 40, 16, 32
SIZES = f"--heads {H} --kv-heads {HKV} --q-length {LQ} --length {LK} --head-dim {E} --head-dim-v {EV} --batch 2"


@pytest.fixture(autouse=True)
def _empty_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADASPLASH_DB", str(tmp_path / "tuned.db"))


def explain(options: str) -> dict[str, Any]:
    result = CliRunner().invoke(cli, ["explain", *shlex.split(options), "--json"])
    assert result.exit_code == 0, result.output
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def tensors(dtype: torch.dtype = torch.float32, grad: bool = True, batch: int = 2) -> dict[str, Any]:
    shapes = {"query": (batch, H, LQ, E), "key": (batch, HKV, LK, E), "value": (batch, HKV, LK, EV)}
    return {name: torch.zeros(shape, dtype=dtype, requires_grad=grad) for name, shape in shapes.items()} | {"enable_gqa": True}


LENGTHS = torch.tensor([30, 40])

CALLS: dict[str, dict[str, Any]] = {
    "": {},
    "--causal": {"is_causal": True},
    "--causal --causal-alignment bottom_right": {"is_causal": True, "causal_alignment": "bottom_right"},
    "--alpha 1": {"alpha": 1},
    "--alpha 2.0": {"alpha": 2.0},
    "--alpha 1.3": {"alpha": 1.3},
    "--alpha tensor": {"alpha": torch.tensor(1.5)},
    "--alpha-per-head": {"alpha": torch.full((H,), 1.5)},
    "--alpha-per-head --alpha-grad": {"alpha": torch.full((H,), 1.5, requires_grad=True)},
    "--causal --window": {"is_causal": True, "window": (8, 0)},
    "--causal --query-offset": {"is_causal": True, "query_offset": 16},
    "--causal --kv-lengths": {"is_causal": True, "kv_lengths": LENGTHS},
    "--kv-starts": {"kv_starts": LENGTHS - 30},
    "--alibi": {"alibi_slopes": torch.ones(H)},
    "--mask key": {"attn_mask": torch.ones(2, 1, 1, LK, dtype=torch.bool)},
    "--mask bool": {"attn_mask": torch.ones(LQ, LK, dtype=torch.bool)},
    "--mask additive": {"attn_mask": torch.zeros(LQ, LK)},
    "--mask additive --mask-grad": {"attn_mask": torch.zeros(LQ, LK, requires_grad=True)},
    "--dropout": {"dropout_p": 0.1},
    "--deterministic": {"deterministic": True},
    "--stats": {"return_stats": True},
}


@pytest.mark.parametrize("options", CALLS)
def test_agrees_with_the_call(options: str) -> None:
    expected = adasplash_core.explain(**tensors(), **CALLS[options]).as_dict()
    assert explain(f"{SIZES} {options}") == json.loads(json.dumps(expected))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_agrees_on_dtypes(dtype: str) -> None:
    expected = adasplash_core.explain(**tensors(getattr(torch, dtype))).as_dict()
    assert explain(f"{SIZES} --dtype {dtype}") == json.loads(json.dumps(expected))


def test_forward_only_is_a_call_without_gradients() -> None:
    expected = adasplash_core.explain(**tensors(grad=False)).as_dict()
    assert explain(f"{SIZES} --forward-only") == json.loads(json.dumps(expected))
    assert list(expected["passes"]) == ["forward"]


def test_packed_counts_sequences() -> None:
    ends_q, ends_k = torch.tensor([0, 20, 24], dtype=torch.int32), torch.tensor([0, 10, 40], dtype=torch.int32)
    packed = {"cu_seqlens_q": ends_q, "cu_seqlens_k": ends_k, "max_seqlen_q": 20, "max_seqlen_k": 30}
    expected = adasplash_core.explain(**tensors(batch=1), **packed).as_dict()
    options = SIZES.replace(f"--q-length {LQ} --length {LK}", "--q-length 20 --length 30")
    assert explain(f"{options} --packed") == json.loads(json.dumps(expected))


def test_prints_for_people() -> None:
    result = CliRunner().invoke(cli, ["explain", *shlex.split(f"{SIZES} --causal")])
    assert result.exit_code == 0
    assert result.stdout.startswith("backend: ")
    assert "forward: " in result.stdout
    assert "backward: " in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--heads 6 --kv-heads 4 --length 8 --head-dim 8", "4 key heads do not divide 6 query heads"),
        ("--heads 6 --length 8 --head-dim 8 --alpha 2.5", "'2.5' is neither a number from 1"),
        ("--heads 6 --length 8 --head-dim 8 --alpha nan", "'nan' is neither a number from 1"),
        ("--heads 6 --length 8 --head-dim 8 --mask bool --causal", "--mask excludes --causal"),
        ("--heads 6 --length 8 --head-dim 8 --mask bool --mask-grad", "--mask-grad needs --mask additive"),
        ("--heads 6 --length 8 --head-dim 8 --backend troch", "Did you mean 'torch'?"),
        ("--heads 6 --length 8 --head-dim 8 --device nonsense", "'nonsense'"),
        ("--length 8 --head-dim 8", "Missing option '--heads'"),
    ],
)
def test_what_cannot_be_is_refused(options: str, message: str) -> None:
    result = CliRunner().invoke(cli, ["explain", *shlex.split(options)])
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""
