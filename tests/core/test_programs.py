"""What backends find their launches again by."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch

from adasplash_core.backend import AttentionCall, KernelConfig
from adasplash_core.call import make_call
from adasplash_core.programs import Programs, describe

SPECS: dict[Any, Any] = {}
CONFIG = KernelConfig()


def call_of(length: int = 16, dtype: torch.dtype = torch.float32, **arguments: Any) -> AttentionCall:
    """Equal specs are one object, as the core makes it."""
    call = make_call(*(torch.randn(1, 2, length, 8).to(dtype) for _ in range(3)), **arguments)
    return replace(call, spec=SPECS.setdefault(call.spec, call.spec), config=CONFIG)


def described(call: AttentionCall, **more: torch.Tensor) -> tuple[Any, ...]:
    return describe(call, {"q": call.query, "k": call.key, "v": call.value, **more})


def test_other_values_at_other_addresses_are_described_equally() -> None:
    first, second = call_of(), call_of()
    assert first.query.data_ptr() != second.query.data_ptr()
    assert described(first) == described(second)
    assert hash(described(first)) == hash(described(second))


@pytest.mark.parametrize(
    "other",
    [
        {"length": 17},
        {"dtype": torch.float64},
        {"scale": 0.3},
        {"dropout_p": 0.1},
        {"window": (3, 0)},
        {"query_offset": 4},
        {"is_causal": True},
    ],
    ids=str,
)
def test_what_decides_a_program_is_described(other: dict[str, Any]) -> None:
    assert described(call_of(**other)) != described(call_of())


def test_configs_strides_alignment_and_roles_are_described() -> None:
    call = call_of()
    base = described(call)
    assert described(replace(call, config=KernelConfig())) != base
    turned = call.query.transpose(1, 2).contiguous().transpose(1, 2)
    assert described(replace(call, query=turned)) != base
    shifted = torch.empty(call.query.numel() + 1)[1:].view(call.query.shape)
    assert described(replace(call, query=shifted)) != base
    assert described(call, mask=torch.zeros(3)) != base
    assert described(call, mask=torch.zeros(3)) != described(call, slopes=torch.zeros(3))


def test_an_offset_on_the_device_is_no_part_of_it() -> None:
    one, other = (call_of(query_offset=torch.tensor(offset)) for offset in (3, 5))
    assert described(one) == described(other)


def test_the_cache_is_bounded_and_holds_what_was_kept_last() -> None:
    programs = Programs[str](most=3)
    for key in range(10):
        assert programs.find(key) is None
        programs.keep(key, f"program {key}")
        assert programs.find(key) == f"program {key}"
        assert len(programs) <= 3


def test_threads_may_keep_at_the_same_time() -> None:
    programs = Programs[int](most=8)
    failures: list[BaseException] = []

    def keep(first: int) -> None:
        try:
            for key in range(first, first + 2000):
                programs.keep(key, key)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=keep, args=(10_000 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert 0 < len(programs) <= 8
