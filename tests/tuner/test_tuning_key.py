"""The key: what shares a tuned config and what does not."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adasplash_core.backend import KernelConfig
from adasplash_core.call import make_call
from adasplash_core.device import DeviceInfo
from adasplash_core.spec import AttentionSpec
from adasplash_tuner.key import KEY_FIELDS, TuningKey, bucket, key_bucket, nearest, query_bucket, space_version, tuning_key
from adasplash_tuner.shapes.shape import Shape, describe
from adasplash_tuner.storage.models import KEYS
from adasplash_tuner.storage.records import Row
from tests.tuner.fakes import A100, H100, SPEC, BlockConfig, FakeBackend, record


def key_of(spec: AttentionSpec = SPEC, device: DeviceInfo = H100, backend: FakeBackend | None = None) -> TuningKey:
    return tuning_key(backend or FakeBackend(), spec, device, "forward")


@given(st.integers(1, 10**7))
def test_a_bucket_is_the_nearest_power_of_two_on_a_logarithmic_scale(n: int) -> None:
    centre = bucket(n)
    assert centre & (centre - 1) == 0
    assert abs(math.log2(n) - math.log2(centre)) <= 0.5 + 1e-9


@given(st.integers(1, 10**6), st.integers(0, 10**4))
def test_buckets_grow_with_lengths(n: int, more: int) -> None:
    assert key_bucket(n) <= key_bucket(n + more)
    assert query_bucket(n) <= query_bucket(n + more)


def test_decoding_is_a_bucket_of_its_own() -> None:
    assert [query_bucket(n) for n in (1, 2, 8, 22, 23, 4096)] == [1, 16, 16, 16, 32, 4096]


def test_lengths_within_a_bucket_share_a_key_and_others_do_not() -> None:
    def with_length(n: int) -> TuningKey:
        return key_of(replace(SPEC, q_len=n, kv_len=n))

    assert with_length(8192) == with_length(8000) == with_length(11585)
    assert set(with_length(8192).differences(with_length(4096))) == {"q_bucket", "kv_bucket"}


def test_keys_that_no_row_can_see_do_not_count() -> None:
    top_left = replace(SPEC, q_len=1024, kv_len=65536)
    assert key_of(top_left).kv_bucket == 1024
    assert key_of(replace(top_left, causal_alignment="bottom_right")).kv_bucket == 65536
    assert key_of(replace(top_left, causal=False)).kv_bucket == 65536


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "float16"},
        {"dtype": "float32"},
        {"dtype": "float32", "tf32": True},
        {"head_dim": 64},
        {"head_dim_v": 64},
        {"causal": False},
        {"alpha_class": "2"},
        {"deterministic": True},
        {"window": True},
        {"mask": "bool", "causal": False},
        {"packed": True},
        {"kv_heads": 32},
        {"batch": 64},
    ],
)
def test_what_changes_the_work_changes_the_key(change: dict[str, object]) -> None:
    assert key_of(replace(SPEC, **change)) != key_of()


@pytest.mark.parametrize(
    "change",
    [
        {"needs_grad": True},
        {"return_stats": True},
        {"kv_lengths": True},
        {"kv_starts": True},
        {"alibi": True},
        {"dropout": True},
        {"batch": 2},
    ],
)
def test_what_hardly_changes_the_work_does_not(change: dict[str, object]) -> None:
    assert key_of(replace(SPEC, **change)) == key_of()


def test_tf32_is_a_dtype_of_its_own() -> None:
    exact = replace(SPEC, dtype="float32")
    rounded = replace(exact, tf32=True)
    assert key_of(rounded).differences(key_of(exact)) == {"dtype": ("tf32", "float32")}
    assert "fake forward: tf32 D=128" in key_of(rounded).readable()


@pytest.mark.parametrize("word", ["tf32", "fp32,tf32", "bf16,tf32"])
def test_a_shape_may_be_of_tf32(word: str) -> None:
    shape = Shape.parse(f"B=1,H=32,Hkv=8,L=8192,D=128,{word},causal")
    assert (shape.dtype, shape.tf32) == ("float32", True)
    assert str(shape) == "B=1,H=32,Hkv=8,L=8192,D=128,tf32,causal"
    assert Shape.parse(str(shape)) == shape
    spec = shape.spec("cuda", needs_grad=False)
    assert spec == replace(SPEC, dtype="float32", tf32=True)
    assert describe(spec) == str(shape)
    assert not Shape.parse("H=1,L=8,D=8,tf32,fp32").tf32


def test_the_machine_and_the_code_are_in_the_key() -> None:
    assert set(key_of().differences(key_of(device=A100))) == {"device_name", "capability", "multiprocessors"}
    assert set(key_of().differences(key_of(device=replace(H100, driver="590.2")))) == {"toolchain"}
    assert set(key_of().differences(key_of(backend=FakeBackend(code="0ther")))) == {"code_hash"}


def test_the_space_version_changes_with_the_fields_and_not_with_the_candidates() -> None:
    @dataclass(frozen=True)
    class Wider(BlockConfig):
        stages: int = 2

    class WiderBackend(FakeBackend):
        def config_class(self, pass_: str) -> type[KernelConfig]:
            return Wider

    assert space_version(WiderBackend(), "forward") != space_version(FakeBackend(), "forward")
    assert space_version(FakeBackend(), "forward") == space_version(FakeBackend("another", "another"), "forward")


def test_every_field_of_the_key_is_a_column_that_is_never_null() -> None:
    columns = KEYS.columns
    assert set(KEY_FIELDS) == set(columns.keys()) - {"id", "readable"}
    assert not any(column.nullable for column in columns)
    assert [f.name for f in fields(TuningKey)] == list(KEY_FIELDS)


def test_the_readable_form_names_problem_machine_and_code() -> None:
    text = key_of().readable()
    for word in (
        "fake forward",
        "bfloat16",
        "Lq~8192",
        "causal",
        "H100",
        "132 SMs",
        "(9.0)",
        "c0de",
        "compiler 1",
        "driver 580.1",
    ):
        assert word in text


def test_the_closest_key_differs_in_the_fewest_fields() -> None:
    wanted = key_of()
    near, far = replace(wanted, kv_bucket=16384), replace(wanted, kv_bucket=16384, q_bucket=16384, dtype="float16")
    newer_code = replace(wanted, code_hash="other")
    rows = [Row(n, "", record(key)) for n, key in enumerate((far, near, newer_code))]
    assert nearest(wanted, rows, 2) == [rows[2], rows[1]]
    assert nearest(wanted, [Row(9, "", replace(record(wanted), quarantined="spills")), Row(8, "", None, "not JSON")], 2) == []


@pytest.mark.parametrize(
    "text", ["B=2,H=8,Hkv=2,L=300,D=16,float32,causal", "H=4,Lq=1,Lk=300,D=16,Dv=8,float32", "H=4,L=64,D=16,float64,alpha=2"]
)
def test_a_tuned_shape_has_the_key_of_the_call_it_stands_for(text: str) -> None:
    import torch

    shape = Shape.parse(text)
    dtype = getattr(torch, shape.dtype)
    call = make_call(
        torch.zeros(shape.batch, shape.heads, shape.q_len, shape.head_dim, dtype=dtype),
        torch.zeros(shape.batch, shape.kv_heads, shape.kv_len, shape.head_dim, dtype=dtype),
        torch.zeros(shape.batch, shape.kv_heads, shape.kv_len, shape.head_dim_v, dtype=dtype),
        is_causal=shape.causal,
        enable_gqa=True,
        alpha=float(shape.alpha_class),
    )
    assert call.spec == shape.spec("cpu", needs_grad=True)
    assert Shape.parse(str(shape)) == shape
