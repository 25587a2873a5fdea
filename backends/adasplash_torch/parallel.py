"""Threads over blocks of heads, each with single-threaded operations.

torch's own threads meet at a barrier after every operation. A tile is hundreds of short ones, so with one core taken by another
process the barriers cost far more than the arithmetic (seen: 40 times). Threads over blocks meet once a pass.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache

import torch

from adasplash_torch.tiles import Block, Workspace

BlockMaker = Callable[[], Block]


def for_each_block(
    groups: Sequence[Sequence[BlockMaker]], work: Callable[[Block, Workspace], None], dtype: torch.dtype, device: torch.device
) -> None:
    """Call ``work`` on every block: groups in any order and on any thread, the blocks of one group in order on one thread."""
    pending = deque(groups)

    def drain() -> None:
        workspace = Workspace(dtype, device)
        while True:
            try:
                group = pending.popleft()
            except IndexError:  # another thread took the last
                return
            for make in group:
                work(make(), workspace)

    threads = _threads(len(groups), device)
    if threads == 1:
        drain()
        return
    inference = torch.is_inference_mode_enabled()  # as grad mode, known to the calling thread only

    def drain_as_caller() -> None:
        try:
            with torch.inference_mode() if inference else torch.no_grad():
                drain()
        except BaseException:
            pending.clear()  # the others stop at their next group
            raise

    futures = [_pool(torch.get_num_threads(), os.getpid()).submit(drain_as_caller) for _ in range(threads)]
    wait(futures)
    for future in futures:
        future.result()


def _threads(groups: int, device: torch.device) -> int:
    """How many threads are worth starting: none where a dispatch mode, which is its thread's own, must see the operations."""
    if device.type != "cpu" or torch._C._len_torch_dispatch_stack() > 0:
        return 1
    return max(1, min(torch.get_num_threads(), groups))


@lru_cache(maxsize=1)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Workers whose operations run on one thread. ``process``: a forked child has none of its parent's threads."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="adasplash", initializer=_one_thread)
    everyone = threading.Barrier(threads)
    wait([pool.submit(everyone.wait) for _ in range(threads)])
    torch.set_num_threads(threads)  # the workers' setting is also the default of threads to come: put it back
    return pool


def _one_thread() -> None:
    torch.get_num_threads()  # a new thread takes the process's number at its first look, and would undo what was set before
    torch.set_num_threads(1)
