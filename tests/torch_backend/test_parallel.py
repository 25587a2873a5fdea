"""Blocks on several threads: the same numbers, in the caller's autograd mode, and errors that arrive."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
import torch

import adasplash_core
from adasplash_torch import parallel
from adasplash_torch.tiles import Block, Workspace


@pytest.fixture
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


def run(heads: int = 6, kv_heads: int = 2) -> list[torch.Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, 70, 16, dtype=torch.float64, requires_grad=True) for h in (heads, kv_heads, kv_heads))
    config = {name: {"rows": 32, "heads": 2, "panel": 32} for name in ("forward", "backward")}
    out = adasplash_core.attention(q * 3, k, v, is_causal=True, enable_gqa=True, backend="torch", config=config)
    assert isinstance(out, torch.Tensor)
    return [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]


def test_threads_change_no_bit(threads: int) -> None:
    several = run()
    torch.set_num_threads(1)
    for mine, theirs in zip(several, run(), strict=True):
        assert torch.equal(mine, theirs)


def test_blocks_really_run_on_several_threads_with_single_threaded_operations(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[tuple[int, int]] = set()
    together = threading.Barrier(threads, timeout=20)

    def work(block: Block, workspace: Workspace) -> None:
        together.wait()
        seen.add((threading.get_ident(), torch.get_num_threads()))

    parallel.for_each_block([[lambda: None] for _ in range(threads)], work, torch.float32, torch.device("cpu"))  # type: ignore[list-item, return-value]
    assert len(seen) == threads
    assert {count for _, count in seen} == {1}
    assert torch.get_num_threads() == threads


def test_blocks_of_a_group_keep_their_order(threads: int) -> None:
    seen: dict[int, list[int]] = {}

    def maker(group: int, place: int) -> parallel.BlockMaker:
        return lambda: (group, place)  # type: ignore[return-value]

    def work(block: tuple[int, int], workspace: Workspace) -> None:
        seen.setdefault(block[0], []).append(block[1])

    groups = [[maker(group, place) for place in range(5)] for group in range(7)]
    parallel.for_each_block(groups, work, torch.float32, torch.device("cpu"))  # type: ignore[arg-type]
    assert seen == {group: list(range(5)) for group in range(7)}


def test_an_error_on_a_thread_is_the_callers(threads: int) -> None:
    def work(block: Block, workspace: Workspace) -> None:
        raise RuntimeError("in a worker")

    with pytest.raises(RuntimeError, match="in a worker"):
        parallel.for_each_block([[lambda: None]] * 4, work, torch.float32, torch.device("cpu"))  # type: ignore[list-item, return-value]
    assert run()  # the pool is still good


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_every_autograd_mode(threads: int, mode: type) -> None:
    q = torch.randn(1, 4, 40, 16, dtype=torch.float64, requires_grad=True)
    config = {"forward": {"rows": 16, "heads": 1, "panel": 16}}
    with mode():
        out = adasplash_core.attention(q, q, q, backend="torch", config=config)
    assert out.requires_grad is (mode is torch.enable_grad)  # type: ignore[union-attr]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_gets_threads_of_its_own(threads: int) -> None:
    run()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if run()[0].isfinite().all() else 1
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
