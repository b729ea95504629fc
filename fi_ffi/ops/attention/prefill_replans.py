"""The quick way of `BatchPrefillPlan.replan`, for ragged keys."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from operator import ge, sub
from typing import Any

from fi_ffi.ops.attention import sizes
from fi_ffi.ops.attention.again import Again, ints, positions
from fi_ffi.ops.attention.arrays import Arrays, host_ints
from fi_ffi.ops.attention.batch import Batch
from fi_ffi.ops.attention.indices import described_ints
from fi_ffi.ops.attention.prefill_runs import PrefillRuns


class PrefillReplans(PrefillRuns):
    """Plans batches like those before: as many requests, and no more queries."""

    index_arrays: Mapping[str, str] = {"qo_indptr": "qo_indptr", "kv_indptr": "kv_indptr"}
    geometry: sizes.Geometry

    def replan_again(self, qo_indptr: object, kv_indptr: object, stream: object) -> bool:
        """Plan a batch, if one like it was planned; what is new or wrong is left alone."""
        if not self.agains:
            return False
        qo, kv = ints(qo_indptr), ints(kv_indptr)
        queries, keys = positions(qo), positions(kv)
        if not queries or not keys or qo is None or kv is None or len(keys) != len(queries):
            return False
        rows = queries[-1]
        again = self.again_for(len(queries) - 1, rows)
        if again is None or (self._needs_keys and not _has_keys(queries, keys)):
            return False
        if again.lens is not None:
            again.lens[:] = array("i", _counts(keys))
        if not self.plan_again(again, {"qo_indptr": qo, "kv_indptr": kv}, rows, stream):
            return False
        self._batch_size, self._rows_now, self._kv_total = again.size, rows, keys[-1]
        return True

    def remember(self, batch: Batch, placed: Arrays, values: list[Any]) -> None:
        """Keep how a batch was planned that was placed by what it can need at most."""
        chosen, form = self.options, self._forms[0]
        if batch.pages is not None or chosen.use_custom_mask or self.workspace is None:
            return
        lens = None
        for i, arg in enumerate(form.row.args):
            if arg.name == "kv_len_arr" and self.backend == "fa3":  # fa2's does not read it
                lens = host_ints(batch.kv_lens)
                values[i] = described_ints(lens)
        least = sizes.least_rows(self.geometry, self.backend, batch.size, batch.rows)
        again = Again(form, values, placed, self.workspace, batch.size, least, batch.rows)
        again.lens = lens
        self.keep_again(again)

    @property
    def _needs_keys(self) -> bool:
        """Whether requests may not have fewer keys than queries."""
        chosen = self.options
        return bool(chosen.causal or chosen.pos_encoding_mode == "ROPE_LLAMA")


def _counts(starts: list[int]) -> Iterable[int]:
    return map(sub, starts[1:], starts)


def _has_keys(queries: list[int], keys: list[int]) -> bool:
    """Whether each request has as many keys as queries."""
    return keys == queries or all(map(ge, _counts(keys), _counts(queries)))
