"""Batches of many lengths over one cache, as a server plans them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

import fi_ffi

from tests.attention.batches import SPARE, Batch, draw
from tests.attention.cases import Case, MlaCase
from tests.attention.machines import POISON, Cpu, part
from tests.attention.specs import Spec


class Service:
    """One cache that batches of many lengths are planned over."""

    def __init__(self, spec: Spec, machine: Cpu, rng: np.random.Generator) -> None:
        self.spec, self.rng = spec, rng
        self.most_keys = min(spec.keys, machine.most_keys)
        self.rows = spec.batch * spec.queries
        room = SPARE + spec.batch * -(-self.most_keys // spec.page_size) + 2
        kind = MlaCase if spec.family == "batch_mla" else Case
        self.case = kind(spec, machine, rng, self.rows, room)
        for name in self.case.caches():
            self.case.tensors[name][:SPARE] = np.nan  # no batch has these pages

    def batch(self) -> Batch:
        """Another batch of the same number of requests."""
        spec = self.spec
        size = spec.page_size
        qo, kv = draw(spec.batch, spec.queries, self.most_keys, size, self.rng,
                      no_keys=spec.no_keys)  # fmt: skip
        if spec.family == "batch_decode":
            qo = [1] * spec.batch
        elif spec.family == "batch_mla":
            # As many that the number of blocks that work together stays the same.
            qo = [spec.queries] * spec.batch
            kv = [max(n, spec.queries) for n in kv]
        return self.case.batch(qo, kv)


def exact_workspace(
    case: Case, batch: Batch, less: tuple[int, int] = (0, 0), **more: Any
) -> tuple[fi_ffi.Workspace, list[Any]]:
    """A workspace of just as many bytes as are asked for, or fewer, poisoned."""
    sizes = case.workspace_size(batch, **more)
    device = case.machine.device
    placed = [case.machine.place(np.full(max(n, 16), POISON, np.uint8)) for n in sizes]
    counts = [n - m for n, m in zip(sizes, less, strict=True)]
    parts = [part(array, n, device) for array, n in zip(placed, counts, strict=True)]
    return fi_ffi.Workspace(*parts), placed


# CUDA graphs; on the CPU a run is repeated instead of a graph.


def graph_options(service: Service) -> dict[str, Any]:
    """Room for every batch of a service."""
    made = {"enable_cuda_graph": True, "max_num_indices": service.case.room}
    if service.spec.family != "batch_decode":
        made["max_total_num_rows"] = service.rows
    return made


def refused(service: Service, like: Batch) -> list[Batch]:
    """Batches that would change what was captured."""
    assert like.indices is not None and like.last_page_len is not None
    fewer = service.case.batch(like.qo[:-1], like.kv[:-1])
    past = like.indices.copy()
    past[0] = service.case.room + 5  # a page that the cache has not
    wrong = [fewer, replace(like, indices=past)]
    if service.spec.family != "batch_decode":
        more = [n + service.rows for n in like.qo]
        starts = np.cumsum([0, *more]).astype(np.int32)
        wrong.append(replace(like, qo=more, qo_indptr=starts))
    counts = np.diff(like.kv_indptr) + service.case.room
    starts = np.cumsum([0, *counts]).astype(np.int32)
    full = np.full(len(like.last_page_len), service.spec.page_size, np.int32)
    pages = np.zeros(starts[-1], np.int32)
    kv = [int(n) * service.spec.page_size for n in counts]
    wrong.append(replace(like, kv=kv, kv_indptr=starts, indices=pages, last_page_len=full))
    return wrong
