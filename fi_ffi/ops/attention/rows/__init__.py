"""The entries of FlashInfer's attention modules, argument by argument.

A family's modules differ in what they were compiled for, and their names say it
(`fi_ffi.loader.uris`); their entries are the same.  fa3 is for SM90, and has another row,
as has its fp8 form.  The arguments after `enable_pdl` are those that
`flashinfer/jit/attention/modules.py` adds to the binding's.

The names here are of the first form of each row; `of_release` has the others.
"""

from __future__ import annotations

from fi_ffi.errors import KernelNotFoundError
from fi_ffi.ops.attention.rows import decode, mla, pod, prefill, xqa
from fi_ffi.ops.attention.rows.arguments import F16 as F16
from fi_ffi.ops.attention.rows.arguments import FP8 as FP8
from fi_ffi.ops.attention.rows.decode import DECODE_GROUPS as DECODE_GROUPS
from fi_ffi.ops.attention.rows.mla import NEED_KEYS as NEED_KEYS
from fi_ffi.ops.releases import fits, span_of
from fi_ffi.ops.row import Row

SINGLE_DECODE = decode.SINGLE[0]
BATCH_DECODE_PLAN, BATCH_DECODE_RUN = decode.BATCH_PLAN[0], decode.BATCH_RUN[0]
SINGLE_PREFILL = {kind: forms[0] for kind, forms in prefill.SINGLE.items()}
# Of each kernel: plan, ragged_run, paged_run.
BATCH_PREFILL = {kind: tuple(f[0] for f in rows) for kind, rows in prefill.BATCH.items()}
BATCH_PREFILL_SINK = {kind: tuple(f[0] for f in rows) for kind, rows in prefill.BATCH_SINK.items()}
# Of each kernel: plan, run.
BATCH_MLA = {kind: tuple(f[0] for f in rows) for kind, rows in mla.MLA.items()}

XQA, POD = xqa.XQA[0], pod.POD[0]

# The forms of each row, by the first.
FORMS = {
    forms[0]: forms
    for forms in (
        decode.SINGLE,
        *prefill.SINGLE.values(),
        decode.BATCH_PLAN,
        decode.BATCH_RUN,
        *(forms for rows in prefill.BATCH.values() for forms in rows),
        *(forms for rows in prefill.BATCH_SINK.values() for forms in rows),
        *(forms for rows in mla.MLA.values() for forms in rows),
        xqa.XQA,
        pod.POD,
    )
}
ROWS = tuple(FORMS)


def of_release(row: Row, release: str) -> Row:
    """The form that a row has in a release; `KernelNotFoundError` where it has none."""
    for form in FORMS[row]:
        if fits(form, release):
            return form
    raise KernelNotFoundError(
        f"{row.name} can be called in FlashInfer {span_of(FORMS[row])}; "
        f"the kernels in use are of {release}"
    )
