"""Ranks that are threads of this process, or processes over shared memory."""

from __future__ import annotations

import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import shared_memory
from typing import Any

import numpy as np

KINDS = ("threads", "processes")
_IMPORTED = ["fi_ffi.comm", "fi_ffi.reference", "tests.helpers.rank_programs"]


def address_of(array: np.ndarray[Any, Any]) -> int:
    return int(array.__array_interface__["data"][0])


class Memory:
    """So many bytes that each rank has, as every rank sees them: zeros at first."""

    def __init__(self, size: int, nbytes: int, *, shared: bool) -> None:
        self.size, self.nbytes, self._views = size, nbytes, {}
        self._blocks = (
            [shared_memory.SharedMemory(create=True, size=nbytes + 256) for _ in range(size)]
            if shared
            else [np.zeros(nbytes + 256, np.uint8) for _ in range(size)]
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_views": {}}

    def of(self, rank: int) -> np.ndarray[Any, Any]:
        if rank not in self._views:
            block = self._blocks[rank]
            whole = np.frombuffer(block.buf if hasattr(block, "buf") else block, np.uint8)
            start = -address_of(whole) % 128
            self._views[rank] = whole[start : start + self.nbytes]
        return self._views[rank]

    def addresses(self) -> list[int]:
        return [address_of(self.of(rank)) for rank in range(self.size)]

    def close(self) -> None:
        self._views.clear()
        for block in self._blocks:
            if hasattr(block, "unlink"):
                block.unlink()


def processes() -> multiprocessing.context.ForkServerContext:
    """Return what makes processes of ranks: forks of one that has imported what they need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    return context


def _in_process(
    body: Callable[..., Any], rank: int, args: Sequence[Any], results: Any, start: Any
) -> None:
    try:
        from fi_ffi import reference  # it takes a while, before ranks wait for each other

        assert reference.kernels()
        start.wait(240)
        results.put((rank, body(rank, *args)))
    except BaseException as error:
        results.put((rank, RuntimeError(f"{error}\n{traceback.format_exc()}")))
    results.close()
    results.join_thread()
    os._exit(0)  # views of shared memory are alive: nothing is closed on the way out


def run(
    kind: str, size: int, body: Callable[..., Any], *args: Any, absent: Sequence[int] = ()
) -> list[Any]:
    """What `body(rank, *args)` returned on every rank; an exception, where it raised one.

    Ranks that are `absent` never start, and have None; the others begin together.
    """
    found: list[Any] = [None] * size
    ranks = [rank for rank in range(size) if rank not in absent]
    if kind == "threads":

        def in_thread(rank: int) -> None:
            try:
                found[rank] = body(rank, *args)
            except BaseException as error:
                found[rank] = error

        threads = [threading.Thread(target=in_thread, args=(rank,)) for rank in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found
    context = processes()
    results, start = context.Queue(), context.Barrier(len(ranks))
    children = [
        context.Process(target=_in_process, args=(body, rank, args, results, start))
        for rank in ranks
    ]
    for child in children:
        child.start()
    for _ in ranks:
        rank, value = results.get(timeout=300)
        found[rank] = value
    for child in children:
        child.join()
    return found
