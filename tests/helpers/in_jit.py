"""Calls of ops and runs of plans inside jax.jit; jax is imported by the first call."""

from __future__ import annotations

import functools

import numpy as np

from fi_ffi.ops.functions import OPS

from tests.attention.cases import Result

# Gates and shifts are parts of one tensor there, which XLA does not pass.
PARTS = {name for name, op in OPS.items() if any(arg.parts > 1 for arg in op.row.tensors)}


# Results of which an op leaves some elements as they are.
PADDED = {"fp8_quantize_1x128": ("outScaleFP8SF",), "segment_packbits": ("y",)}

# Results whose shapes or dtypes follow from no argument.
TOLD = {
    **dict.fromkeys(("rmsnorm_quant", "fused_add_rmsnorm_quant"), ("out",)),
    "fused_qk_rmsnorm_rope": ("q_out", "k_out", "v_out"),
    "rope_quantize": ("q_rope_out", "k_rope_out", "q_nope_out", "k_nope_out"),
    "segment_packbits": ("y",),
    "seq_chunk_cumsum": ("output",),
    "nvfp4_kv_dequant": ("output",),
    **dict.fromkeys(("fp4_gemm", "mxfp8_gemm", "bf16_gemm", "bmm_bf16", "bmm_mxfp8"), ("out",)),
    "bmm_fp8": ("D",),
    "gptq_marlin_repack": ("out",),
    "moe_align_block_size": ("sorted_token_ids", "num_tokens_post_pad"),
    "softmax_topk_flash": ("topk_indices", "topk_weights"),
}


def results_of(case):
    """The names of a call's results, in order; what the call reads as well is given."""
    return [
        arg.name
        for arg in case.row.tensors
        if arg.writes and not arg.is_scratch and arg.name in case.arrays
    ]


def call_in_jit(case, told=()):
    """The results of a call of compiled code, by name."""
    run, given = as_jitted(case, told)
    found = run(given)
    found = found if isinstance(found, tuple) else (found,)
    return dict(zip(results_of(case), map(np.asarray, found), strict=True))


def as_jitted(case, told=()):
    """A call that is to be compiled, and the arrays that it takes."""
    import jax

    import fi_ffi.jax
    from fi_ffi.jax.results import is_given, is_result

    row = case.row
    given = {
        arg.name: case.arrays[arg.name]
        for arg in row.tensors
        if is_given(arg) and arg.name in case.arrays
    }
    more = {
        arg.name: jax.ShapeDtypeStruct(case.arrays[arg.name].shape, case.arrays[arg.name].dtype)
        for arg in row.tensors
        if is_result(arg) and arg.name in case.arrays and (arg.optional or arg.name in told)
    }
    scalars = {name: value for name, value in case.scalars.items() if value is not None}
    function = functools.partial(fi_ffi.jax.call, row.name, **scalars, **more)
    return jax.jit(lambda arrays: function(**arrays)), given


def given(case, batch, rows=None):
    """The arrays of a run: the batch's queries, or so many, and the caches."""
    rows = batch.rows if rows is None else rows
    queries = [case.tensors[name][:rows] for name in ("q", "q_pe") if name in case.tensors]
    return [*queries, *(case.tensors[name] for name in case.caches())]


class Found:
    """A result as the attention tests take it."""

    def __init__(self, array):
        self.array = np.asarray(array)

    def get(self):
        return self.array

    def intact(self):
        return True


def in_jit(plan, case, batch):
    """A plan's run, to be compiled; with the options of a batch."""
    import jax

    import fi_ffi.jax

    options, lse = case.run_options(batch), case.spec.lse
    return jax.jit(lambda *tensors: fi_ffi.jax.run(plan, *tensors, lse=lse, **options))


def check_in_jit(run, case, batch, rows=None, device=None):
    """Run a batch by arrays of their own, and so many queries where a program is for any batch."""
    import jax

    tensors = [jax.device_put(np.array(array), device) for array in given(case, batch, rows)]
    found = jax.block_until_ready(run(*tensors))
    found = [np.array(each) for each in (found if case.spec.lse else (found,))]
    for each in found:
        each[batch.rows :] = np.nan  # rows of no request are as they were
    return case.check(batch, Result(*map(Found, found), *[None] * (not case.spec.lse)))


def check_lengths_as_arrays(service, device=None, runs=1):
    """Decode several batches by one program and a plan of any lengths, which takes them as arrays;
    each step has so many runs.  Returns the plan."""
    import jax

    import fi_ffi
    import fi_ffi.jax

    case, machine = service.case, service.case.machine
    plan = fi_ffi.BatchDecodePlan(
        service.spec.batch, None, None, **service.spec.options(), device=machine.device,
        stream=machine.stream,
    )  # fmt: skip
    step = jax.jit(
        lambda arrays, lengths: [
            fi_ffi.jax.run(plan, *arrays, lse=True, **lengths) for _ in range(runs)
        ]
    )
    for _ in range(5):
        batch = service.batch()
        pages = np.zeros(case.room, np.int32)
        pages[: len(batch.indices)] = batch.indices
        lengths = {
            "paged_kv_indptr": batch.kv_indptr,
            "paged_kv_indices": pages,
            "paged_kv_last_page_len": batch.last_page_len,
        }
        for o, lse in step(*jax.device_put((given(case, batch), lengths), device)):
            case.check(batch, Result(Found(o), Found(lse)))
    assert step._cache_size() == 1
    return plan
