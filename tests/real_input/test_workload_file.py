"""The file format: what is written comes back, and a file that contradicts itself is refused with the reason."""

from __future__ import annotations

import json
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import adasplash_core
from adasplash_core.errors import ArgumentError
from adasplash_core.workload import METADATA_KEY, Workload, WorkloadInfo, WorkloadLayer, save_workload


def make_layer(index=4, dtype=torch.float32, **facts) -> WorkloadLayer:
    """Two sequences of 10 tokens, 4 query and 2 key heads of 8, as transposed views."""
    generator = torch.Generator().manual_seed(index)
    query, key, value = (torch.randn(2, 10, heads, 8, generator=generator).to(dtype).transpose(1, 2) for heads in (4, 2, 2))
    return WorkloadLayer(index, query, key, value, scale=0.25, **facts)


INFO = WorkloadInfo(model="m", model_type="llama", text="t", tokens=10, libraries={"torch": "2"})


# -- what is written comes back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_layer_comes_back_with_its_facts_and_memory_order(tmp_path, dtype):
    lengths = torch.tensor([10, 7], dtype=torch.int32)
    starts = torch.tensor([0, 2], dtype=torch.int32)
    written = make_layer(
        dtype=dtype, is_causal=True, window=(3, 0), kv_lengths=lengths, kv_starts=starts, module="layers.4", heads=(0, 1, 4, 5)
    )
    workload = save_workload(tmp_path / "w.safetensors", INFO, [written])
    assert workload.info == INFO
    layer = workload.layer(4)
    for name in ("query", "key", "value", "kv_lengths", "kv_starts"):
        assert torch.equal(getattr(layer, name), getattr(written, name))
        assert getattr(layer, name).stride() == getattr(written, name).stride()
    for name in ("index", "scale", "is_causal", "window", "attn_mask", "module", "heads"):
        assert getattr(layer, name) == getattr(written, name)


def test_layers_come_in_order_one_at_a_time(tmp_path):
    workload = save_workload(tmp_path / "w.safetensors", INFO, [make_layer(9), make_layer(2)])
    assert workload.indices == (2, 9)
    assert len(workload) == 2
    assert [layer.index for layer in workload] == [2, 9]
    with pytest.raises(ArgumentError, match=r"Got layer 3.*has 2, 9"):
        workload.layer(3)


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"is_causal": True},
        {"window": (2, 2)},
        {"kv_lengths": torch.tensor([10, 4]), "is_causal": True},
        {"attn_mask": torch.rand(2, 1, 10, 10) > 0.5},
        {"attn_mask": torch.randn(1, 4, 10, 10)},
    ],
)
def test_attention_takes_a_layers_arguments(tmp_path, facts):
    layer = save_workload(tmp_path / "w.safetensors", INFO, [make_layer(**facts)]).layer(4)
    out = adasplash_core.attention(**layer.kwargs(), alpha=1.5)
    assert out.shape == layer.query.shape
    assert out.isfinite().all()


def test_a_layer_moves_to_another_dtype(tmp_path):
    layer = make_layer(kv_lengths=torch.tensor([10, 4]), attn_mask=torch.randn(1, 4, 10, 10)).to(dtype=torch.bfloat16)
    assert {t.dtype for t in (layer.query, layer.key, layer.value, layer.attn_mask)} == {torch.bfloat16}
    assert layer.kv_lengths.dtype == torch.int64
    assert layer.query.transpose(1, 2).is_contiguous()


def test_the_header_is_read_without_torch_or_tensors(tmp_path):
    path = tmp_path / "w.safetensors"
    save_workload(path, INFO, [make_layer(dtype=torch.bfloat16, is_causal=True)])
    code = (
        "import sys; from adasplash_core.workload import Workload; "
        f"s = Workload.load({str(path)!r}).summary(4); print(s.query_shape, s.dtype, s.mask_name(), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "(2, 4, 10, 8) bfloat16 causal False"


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "w.safetensors"
    save_workload(path, INFO, [make_layer()])
    before = path.read_bytes()
    with pytest.raises(ArgumentError, match="no layers"):
        save_workload(path, INFO, [])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# -- hostile and broken files


def rewrite(path, tensors=None, **changes):
    """A valid two-layer file's parts, changed, written past our own checks. A change of ``layer`` is one of its first entry."""
    layer = make_layer(is_causal=True, kv_lengths=torch.tensor([10, 7]))
    save_workload(path, INFO, [layer, make_layer(7)])
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        document = json.loads(file.metadata()[METADATA_KEY])
    stored.update(tensors or {})
    entry = changes.pop("layer", {})
    document.update(changes)
    if entry:
        document["layers"][0].update(entry)
    save_file({n: t for n, t in stored.items() if t is not None}, path, metadata={METADATA_KEY: json.dumps(document)})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format_version": 2}, r"format version 2.*Upgrade adasplash-core"),
        ({"format_version": "1"}, "format version is '1'"),
        ({"format_version": True}, "format version is True"),
        ({"model": None}, "'model' is None, not a str"),
        ({"tokens": 1.5}, "'tokens' is 1.5, not a int"),
        ({"libraries": []}, r"'libraries' is \[\]"),
        ({"layers": {}}, r"'layers' is \{\}, not a list"),
        ({"layers": []}, "no layers"),
        ({"layers": [3]}, "described by 3"),
        ({"layer": {"index": 7}}, "layer 7 twice"),
        ({"layer": {"index": 5}}, "layer 5 has no query"),
        ({"layer": {"index": -1}}, "numbered -1"),
        ({"layer": {"scale": float("nan")}}, "scale nan"),
        ({"layer": {"scale": "1"}}, "scale '1'"),
        ({"layer": {"scale": None}}, "scale None"),
        ({"layer": {"is_causal": 1}}, "'is_causal' is 1, not a bool"),
        ({"layer": {"window": [1]}}, r"window \[1\]"),
        ({"layer": {"window": [-2, 0]}}, r"window \[-2, 0\]"),
        ({"layer": {"heads": [0, 1]}}, r"names its 4 query heads \[0, 1\]"),
        ({"layer": {"order": {"query": [0, 1, 2, 2]}}}, r"memory order \[0, 1, 2, 2\] for query"),
        ({"layer": {"order": {"query": "bhle"}}}, "memory order 'bhle'"),
        ({"tensors": {"layer.4.key": None}}, "layer 4 has no key"),
        ({"tensors": {"layer.5.key": torch.zeros(1)}}, "'layer.5.key' belongs to no described layer"),
        ({"tensors": {"layer.4.secret": torch.zeros(1)}}, "'layer.4.secret' belongs to no"),
        ({"tensors": {"layer.4.query": torch.zeros(2, 4, 80)}}, r"query of shape \(2, 4, 80\)"),
        ({"tensors": {"layer.4.query": torch.zeros(2, 4, 0, 8)}}, r"query of shape \(2, 4, 0, 8\)"),
        ({"tensors": {"layer.4.query": torch.zeros(2, 3, 10, 8)}}, "2 key heads do not divide 3"),
        ({"tensors": {"layer.4.query": torch.zeros(3, 4, 10, 8)}}, "do not fit together"),
        ({"tensors": {"layer.4.value": torch.zeros(2, 2, 9, 8)}}, "do not fit together"),
        ({"tensors": {"layer.4.query": torch.zeros(2, 4, 10, 8, dtype=torch.float16)}}, "share one of"),
        ({"tensors": {"layer.4.kv_lengths": torch.tensor([10.0, 7.0])}}, "kv_lengths of shape.*F32"),
        ({"tensors": {"layer.4.kv_starts": torch.tensor([1])}}, r"kv_starts of shape \(1,\)"),
        ({"tensors": {"layer.4.attn_mask": torch.ones(2, 4, 10, 10)}}, "both a mask and the causal flag"),
        ({"tensors": {"layer.7.attn_mask": torch.ones(2, 3, 10, 10)}}, r"attn_mask of shape \(2, 3, 10, 10\)"),
        ({"tensors": {"layer.7.attn_mask": torch.ones(2, 4, 10, 10, dtype=torch.int32)}}, "attn_mask.*I32"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(tmp_path, change, reason):
    path = tmp_path / "w.safetensors"
    rewrite(path, **change)
    with pytest.raises(ArgumentError, match=reason) as caught:
        Workload.load(path)
    assert str(path) in str(caught.value)
    assert "Hint" in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"layer.4.query": torch.full((2, 4, 10, 8), float("nan"))}, "query that is not finite"),
        ({"layer.4.value": torch.full((2, 2, 10, 8), float("inf"))}, "value that is not finite"),
        ({"layer.4.kv_lengths": torch.tensor([11, 0])}, r"kv_lengths \[11, 0\] and 10 keys"),
        ({"layer.4.kv_starts": torch.tensor([-1, 0])}, r"kv_starts \[-1, 0\]"),
    ],
)
def test_values_that_cannot_be_used_are_refused_when_read(tmp_path, tensors, reason):
    path = tmp_path / "w.safetensors"
    rewrite(path, tensors)
    workload = Workload.load(path)
    assert workload.layer(7).index == 7
    with pytest.raises(ArgumentError, match=reason):
        workload.layer(4)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot be read"),
        (b"\xff" * 64, "cannot be read"),
        (struct.pack("<Q", 2**62) + b"{}", "cannot be read"),
        (b"\x80\x04\x95pickle", "cannot be read"),
        (struct.pack("<Q", 2) + b"{}", "without a workload's metadata"),
    ],
    ids=["empty", "noise", "huge header", "pickle", "no metadata"],
)
def test_other_files_are_refused(tmp_path, content, reason):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(ArgumentError, match=reason):
        Workload.load(path)


@pytest.mark.parametrize("document", ["{", "[]", "[" * 100_000, '{"format_version": 1}'])
def test_metadata_that_is_no_description_is_refused(tmp_path, document):
    path = tmp_path / "w.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata={METADATA_KEY: document})
    with pytest.raises(ArgumentError, match=r"metadata"):
        Workload.load(path)


def test_a_truncated_file_is_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    save_workload(path, INFO, [make_layer()])
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ArgumentError, match="cannot be read"):
        Workload.load(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(ArgumentError, match="no such file"):
        Workload.load(tmp_path / "none.safetensors")
    with pytest.raises(ArgumentError, match="not a file"):
        Workload.load(tmp_path)
