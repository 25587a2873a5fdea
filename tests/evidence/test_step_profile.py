"""The profile of a training step: kernels fall into the right groups, the parts add up to the whole, and the script runs small."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from .conftest import EVIDENCE, run_script

sys.path.insert(0, str(EVIDENCE))
try:
    import texts
    from step_profile import Event, busy, group_of, short, summary
finally:
    sys.path.remove(str(EVIDENCE))


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("forward_lists_kernel", "attention forward"),
        ("key_max_kernel", "attention forward"),
        ("_ZN9adasplash13forward_boundI6ShapesEEvNS_6ParamsE", "attention forward"),
        ("backward_keys_kernel", "attention backward"),
        ("_ZN9adasplash14backward_listsI6ShapesEEvNS_6ParamsE", "attention backward"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x128x128_4x1x1_kernel0_0", "attention forward"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_4_64x128x64_4x1x1_kernel0_0", "attention backward"),
        ("void cudnn::fusion::compute_dot_do_o_specialized<true, __nv_bfloat16, 128, 64>()", "attention backward"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<>()", "attention backward"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(AttentionKernel)", "attention forward"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopB_TNT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu>()", "matrix products"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>()", "optimizer"),
        ("void at::native::cunn_SoftMaxForward<8, float, float, float, LogSoftMaxForwardEpilogue>()", "loss"),
        ("void at::native::vectorized_layer_norm_kernel<float, float>()", "layer norms"),
        ("Memcpy HtoD (Pinned -> Device)", "copies, casts, fills"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda()>", "copies, casts, fills"),
        ("void at::native::vectorized_elementwise_kernel<4, GeluCUDAKernelImpl>()", "the rest"),
    ],
)
def test_kernels_are_told_apart_by_name(kernel: str, group: str) -> None:
    assert group_of(kernel) == group


def test_names_are_short() -> None:
    assert short("_ZN9adasplash13forward_boundI6ShapesEEvNS_6ParamsE") == "forward_bound"
    assert short("void at::native::vectorized_layer_norm_kernel<float, float>(int)") == "vectorized_layer_norm_kernel"


def test_the_parts_of_a_step_add_up() -> None:
    events = [
        Event("forward_mark_kernel", 0, 2000, 2000),
        Event("forward_lists_kernel", 2000, 5000, 3000),
        Event("nvjet_a", 4000, 6000, 2000),  # beside the last for 1 ms
        Event("backward_rows_kernel", 8000, 9000, 1000),  # after 2 ms in which nothing ran
        Event("forward_mark_kernel", 9000, 10000, 1000),
    ]
    assert busy(events) == 8000
    found = summary(events, steps=2)
    assert found["groups"]["attention forward"] == pytest.approx(3.0)
    assert found["groups"]["attention backward"] == pytest.approx(0.5)
    assert found["waiting"] == pytest.approx(1.0)
    assert found["at once"] == pytest.approx(-0.5)
    assert sum(found["groups"].values()) + found["at once"] + found["waiting"] == pytest.approx(found["profiled"])
    assert found["kernels"]["forward_mark"] == {"group": "attention forward", "ms": 1.5, "calls": 1.0}


def test_the_script_tells_the_parts_of_a_step_before_and_after_training(tmp_path: Path) -> None:
    stream = np.random.default_rng(0).integers(0, 50, 2000).astype(np.uint16)
    texts.Tokens(stream, stream[:300], 50, 1.0, ("numbers",)).save(tmp_path / "tokens.npz")
    sizes = (
        "--size",
        "tiny",
        "--context",
        "32",
        "--batch-tokens",
        "64",
        "--micro-tokens",
        "32",
        "--steps",
        "9",
        "--profiled",
        "2",
    )
    code, printed = run_script(
        "step_profile.py", *sizes, "--tokens", str(tmp_path / "tokens.npz"), "--json", str(tmp_path / "out.json"),
        "--variants", "softmax", "entmax 1.5 torch", "annealed 1.25",
    )  # fmt: skip
    assert code == 0, printed
    content = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    looks = content["looks"]
    assert [(look["variant"], look["after"]) for look in looks] == [
        (variant, after) for variant in ("softmax", "entmax 1.5 torch", "annealed 1.25") for after in (2, 9)
    ]
    for look in looks:
        assert look["ms"] > 0
        assert all(
            look["groups"][group] > 0 for group in ("attention forward", "attention backward", "matrix products", "loss")
        )
        assert len(look["density_by_layer_and_head"]) == (0 if look["variant"] == "softmax" else 2)
    assert content["machine"]["versions"]["torch"]
    assert re.search(r"\| annealed 1\.25 +\| 9 ", printed)


def test_a_variant_that_is_none_is_refused(tmp_path: Path) -> None:
    stream = np.zeros(100, dtype=np.uint16)
    texts.Tokens(stream, stream, 50, 1.0, ()).save(tmp_path / "tokens.npz")
    arguments = ("--size", "tiny", "--context", "32", "--tokens", str(tmp_path / "tokens.npz"), "--variants", "entmax")
    code, printed = run_script("step_profile.py", *arguments)
    assert code == 1
    assert "'entmax' is no variant: softmax, entmax ALPHA [BACKEND], annealed ALPHA [BACKEND]" in printed
