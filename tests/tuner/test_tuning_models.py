"""From a model's config to shapes, and from a machine's listing to devices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adasplash_core.errors import ArgumentError
from adasplash_tuner.search.targets import Target, groups, mig_slices
from adasplash_tuner.shapes.models import model_shapes
from adasplash_tuner.shapes.shape import Shape

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "num_attention_heads": 32,
    "num_key_value_heads": 8, "max_position_embeddings": 131072, "torch_dtype": "bfloat16",
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 768, "n_head": 12, "n_positions": 1024}
BERT = {
    "model_type": "bert", "architectures": ["BertForMaskedLM"], "hidden_size": 768, "num_attention_heads": 12,
    "max_position_embeddings": 512, "torch_dtype": "float32",
}  # fmt: skip
MODERNBERT = {
    "model_type": "modernbert", "architectures": ["ModernBertForMaskedLM"], "hidden_size": 768, "num_attention_heads": 12,
    "max_position_embeddings": 8192, "local_attention": 128,
}  # fmt: skip
DISTILBERT = {"model_type": "distilbert", "n_heads": 12, "dim": 768, "max_position_embeddings": 512}
FALCON = {"model_type": "falcon", "hidden_size": 4544, "num_attention_heads": 71, "num_kv_heads": 71, "multi_query": True}
QWEN3 = {"model_type": "qwen3", "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
GEMMA3 = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "dtype": "float16", "text_config": QWEN3}
DEEPSEEK = {
    "model_type": "deepseek_v3", "num_attention_heads": 128, "num_key_value_heads": 128, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "max_position_embeddings": 4096,
}  # fmt: skip


def shapes(tmp_path: Path, config: Any, profile: str = "quick", device: str = "cuda") -> list[str]:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    return [str(shape) for shape in model_shapes(file, profile, device)]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LLAMA, ["B=1,H=32,Hkv=8,L=8192,D=128,bfloat16,causal", "B=1,H=32,Hkv=8,L=2048,D=128,bfloat16,causal"]),
        (GPT2, ["B=1,H=12,L=1024,D=64,bfloat16,causal"]),
        (BERT, ["B=16,H=12,L=512,D=64,bfloat16", "B=1,H=12,L=512,D=64,bfloat16"]),
        (MODERNBERT, ["B=16,H=12,L=8192,D=64,bfloat16", "B=1,H=12,L=8192,D=64,bfloat16"]),
        (DISTILBERT, ["B=16,H=12,L=512,D=64,bfloat16", "B=1,H=12,L=512,D=64,bfloat16"]),
        (FALCON, ["B=1,H=71,Hkv=1,L=2048,D=64,bfloat16,causal", "B=1,H=71,Hkv=1,L=512,D=64,bfloat16,causal"]),
        (QWEN3, ["B=1,H=16,Hkv=8,L=2048,D=128,bfloat16,causal", "B=1,H=16,Hkv=8,L=512,D=128,bfloat16,causal"]),
        (GEMMA3, ["B=1,H=16,Hkv=8,L=2048,D=128,float16,causal", "B=1,H=16,Hkv=8,L=512,D=128,float16,causal"]),
        (DEEPSEEK, ["B=1,H=128,L=4096,D=192,Dv=128,bfloat16,causal", "B=1,H=128,L=1024,D=192,Dv=128,bfloat16,causal"]),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_each_familys_field_names_are_known(tmp_path: Path, config: Any, expected: list[str]) -> None:
    found = shapes(tmp_path, config)
    assert found == expected
    assert all(str(Shape.parse(text)) == text for text in found)


def test_full_covers_every_length_bucket_up_to_the_longest(tmp_path: Path) -> None:
    lengths = [Shape.parse(text).q_len for text in shapes(tmp_path, LLAMA, "full")]
    assert lengths == [32768, 16384, 8192, 4096, 2048, 1024, 512]
    odd = [Shape.parse(text).q_len for text in shapes(tmp_path, {**LLAMA, "max_position_embeddings": 5000}, "full")]
    assert odd == [5000, 4096, 2048, 1024, 512]
    batches = [(s.batch, s.q_len) for s in map(Shape.parse, shapes(tmp_path, MODERNBERT, "full"))]
    assert batches == [(16, 8192), (1, 8192), (16, 2048), (16, 512)]


def test_a_cpu_gets_float32_and_shorter_prompts(tmp_path: Path) -> None:
    assert shapes(tmp_path, LLAMA, device="cpu")[0] == "B=1,H=32,Hkv=8,L=4096,D=128,float32,causal"


def test_a_folder_holds_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GPT2))
    assert model_shapes(tmp_path, "quick", "cuda") == model_shapes(tmp_path / "config.json", "quick", "cuda")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[1]", "holds a list"),
        ('{"hidden_size": 64}', "one of num_attention_heads"),
        ('{"num_attention_heads": 4}', "one of hidden_size"),
        ('{"num_attention_heads": 4, "hidden_size": 64, "num_key_value_heads": 3}', "multiple of its key heads"),
    ],
)
def test_what_is_no_config_is_refused_with_the_reason(tmp_path: Path, content: str | None, reason: str) -> None:
    file = tmp_path / "config.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ArgumentError, match=reason):
        model_shapes(file, "quick", "cuda")


SLICED = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77)
  MIG 1g.5gb      Device  0: (UUID: MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f)
  MIG 1g.5gb      Device  1: (UUID: MIG-cba663e8-9bed-5b25-b243-5985ef7c9beb)
  MIG 3g.20gb     Device  2: (UUID: MIG-1e8a0a2c-8f9e-5c27-8f0e-0d3a3b7ad9aa)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-11111111-d33d-2b2c-524d-9e3d8d2b8a77)
"""


def test_each_mig_slice_is_a_device_of_its_own_beside_the_whole_gpus() -> None:
    found = mig_slices(SLICED, None)
    assert [t.name for t in found] == [
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
        "NVIDIA A100-SXM4-40GB",
    ]
    assert {t.device for t in found} == {"cuda:0"}  # each process sees its own device only
    assert [len(group) for group in groups(found)] == [2, 1, 1]
    assert found[1].visible == "MIG-cba663e8-9bed-5b25-b243-5985ef7c9beb"
    assert found[3].visible == "GPU-11111111-d33d-2b2c-524d-9e3d8d2b8a77"


@pytest.mark.parametrize(
    ("visible", "profiles"),
    [
        ("0", ["1g.5gb", "1g.5gb", "3g.20gb"]),
        ("GPU-5d5b", ["1g.5gb", "1g.5gb", "3g.20gb"]),
        ("1", ["A100-SXM4-40GB"]),
        ("MIG-1e8a0a2c", ["3g.20gb"]),
        ("", []),
    ],
)
def test_only_what_cuda_visible_devices_names_is_used(visible: str, profiles: list[str]) -> None:
    assert [t.name.split()[-1] for t in mig_slices(SLICED, visible)] == profiles


def test_without_slices_torch_says_what_there_is() -> None:
    assert mig_slices("GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-5d5ba0d6)\n", None) == []
    assert mig_slices("", None) == []
    assert Target("a", "cpu", ("cpu",)).visible is None
