"""Multi-head latent attention: two parts of each query, and of each token of the cache."""

from __future__ import annotations

from typing import Any

import numpy as np

from fi_ffi.reference.attention.formula import from_pages

from tests.attention.arrays import first, random
from tests.attention.batches import Batch
from tests.attention.cases import Case

CKV, KPE = 512, 64


class MlaCase(Case):
    """A `Case` whose keys are compressed, and whose values are the first part of the keys."""

    def _inputs(self) -> dict[str, Any]:
        spec, rng = self.spec, self.rng
        made = {}
        for name, size in (("q", CKV), ("q_pe", KPE)):
            made[name] = random(rng, (self.rows, spec.heads, size), spec.dtype, spec.pad)
        for name, size in (("ckv", CKV), ("kpe", KPE)):
            made[name] = random(rng, (self.room, spec.page_size, size), spec.dtype, spec.pad)
        return made

    def caches(self) -> list[str]:
        return ["ckv", "kpe"]

    def arguments(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        indices = None if self.spec.indices_at_run else batch.indices
        lengths = np.array(batch.kv, np.int32)
        return (batch.qo_indptr, batch.kv_indptr, indices, lengths), {}

    def inputs(self, rows: int) -> list[Any]:
        parts = [first(self.placed(name).desc(), rows) for name in ("q", "q_pe")]
        return [*parts, *(self.placed(name).desc() for name in self.caches())]

    def run_options(self, batch: Batch) -> dict[str, Any]:
        made = super().run_options(batch)
        if "paged_kv_indices" in made:
            made["kv_indices"] = made.pop("paged_kv_indices")
        return made

    def keys(self, batch: Batch, request: int) -> tuple[Any, Any]:
        tables = batch.kv_indptr, batch.indices, batch.last_page_len, request
        ckv, kpe = (from_pages(self.tensors[name], *tables) for name in ("ckv", "kpe"))
        return np.concatenate((ckv, kpe), axis=-1), ckv

    def queries(self, rows: slice) -> Any:
        return np.concatenate([self.tensors[name][rows] for name in ("q", "q_pe")], axis=-1)
