"""The kernels compile, without a warning or a spilled register, for every generation: by NVRTC, as CuPy compiles them.

A few of each kind; ``python -m adasplash_cupy.aot`` compiles what every call launches.
"""

from __future__ import annotations

import re

import pytest

from adasplash_cupy import aot, nvrtc
from adasplash_cupy.instances import ALIBI, ALL_FLAGS, DROPOUT, GRAD, KERNELS, Instance, MarkInstance, source
from adasplash_cupy.params import fields, pointers

needs_nvrtc = pytest.mark.skipif(not nvrtc.is_available(), reason="NVRTC is not installed: pip install nvidia-cuda-nvrtc")

SAMPLES = [
    ("sm_75", Instance("backward_rows", "float16", 16, 16, 0, 16, 1, ALL_FLAGS - GRAD)),
    ("sm_80", Instance("forward_select", "bfloat16", 64, 16, 15, 128, 2, 0)),
    ("sm_80", Instance("forward_dense", "float32", 16, 16, 0, 16, 2, GRAD | ALIBI | DROPOUT)),
    ("sm_90a", Instance("forward_lists", "bfloat16", 64, 64, 15, 64, 2, GRAD)),
    ("sm_90a", Instance("backward_lists", "bfloat16", 64, 64, 15, 32, 2, 0)),
    ("sm_90a", Instance("backward_lists", "bfloat16", 64, 64, 15, 64, 2, 0, warpgroup=True)),
    ("sm_90a", Instance("backward_rows", "bfloat16", 32, 32, 15, 64, 2, 0, warpgroup=True)),
    ("sm_90a", Instance("forward_dense", "bfloat16", 64, 64, 15, 64, 5, GRAD, warpgroup=True)),
    ("sm_90a", Instance("forward_lists", "float16", 128, 128, 15, 64, 2, GRAD, warpgroup=True)),
    ("sm_90a", Instance("backward_rows", "bfloat16", 64, 64, 15, 64, 2, 0, warpgroup=True)),
    ("sm_90a", Instance("backward_keys", "float16", 64, 64, 15, 64, 2, 0, warpgroup=True)),
    ("sm_90a", Instance("transform", "bfloat16")),
    ("sm_90a", Instance("forward_bound", "bfloat16", 64, 16, 15, 64, 3, 0)),
    ("sm_90a", Instance("forward_dense", "bfloat16", 64, 64, 15, 64, 5, GRAD)),
    ("sm_90a", MarkInstance(dtype="bfloat16", head_dim=64, stages=6)),
    ("sm_90a", MarkInstance(dtype="float16", head_dim=128, stages=4)),
    ("sm_100", Instance("backward_keys", "bfloat16", 64, 64, 15, 64, 1, 0)),
    ("sm_100", Instance("key_max", "float16")),
]


@needs_nvrtc
@pytest.mark.parametrize(
    ("architecture", "instance"), SAMPLES, ids=[f"{i.kernel}-{i.dtype}-{a}{'-warpgroup' * i.warpgroup}" for a, i in SAMPLES]
)
def test_compiles_without_warnings_or_spills(architecture: str, instance: Instance) -> None:
    used = aot.compile_instance(instance, architecture)
    assert used.warnings == ""
    assert used.spills == 0
    assert 0 < used.registers <= 255


@needs_nvrtc
def test_an_error_carries_the_compilers_words() -> None:
    with pytest.raises(aot.CompileError, match="BN"):
        aot.compile_instance(Instance("forward_dense", "float16", 16, 16, 15, 256, 2, 0), "sm_80")  # more keys than threads


def test_every_kernel_is_among_the_instances() -> None:
    for architecture in aot.ARCHITECTURES:
        found = list(aot.instances(architecture))
        of_hopper = {"forward_bound", "forward_mark"}
        assert {instance.kernel for instance in found} == set(KERNELS) - (set() if architecture == "sm_90a" else of_hopper)
        assert len(found) == len(set(found))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_source_is_one_piece_without_headers_of_the_toolkit(kernel: str) -> None:
    assert re.search(r"^\s*#include", source(kernel), re.M) is None
    assert source(kernel).count("struct Params {") == 1


def test_parameters_are_read_from_their_declaration() -> None:
    found = fields()
    assert list(found)[:3] == ["q", "k", "v"]
    assert (found["o2"], found["q_row"], found["kv_len"], found["keep_from"], found["scale"]) == ("P", "q", "i", "I", "f")
    order = [code in "Pq" for code in found.values()]
    assert order == sorted(order, reverse=True), "8-byte fields first, or C would pad"
    assert pointers() == tuple(name for name, code in found.items() if code == "P"), "calls write their addresses at the front"


@needs_nvrtc
def test_the_command_tells_what_does_not_compile_and_sums_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right, wrong = Instance("key_max", "float16"), Instance("forward_dense", "float16", 16, 16, 15, 256, 2, 0)
    monkeypatch.setattr(aot, "instances", lambda architecture, everything=False: iter([right, wrong]))
    assert aot.main(["sm_80", "--workers", "1"]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"sm_80 {wrong.expression}: ")
    assert printed[-1] == "sm_80: 2 instances compiled, 1 with problems"


def test_the_command_names_the_architectures_that_it_knows(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        aot.main(["sm_70"])
    assert "architectures are sm_75, sm_80, sm_86, sm_90a, sm_100; got sm_70" in capsys.readouterr().err
