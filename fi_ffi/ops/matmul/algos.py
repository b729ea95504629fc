"""cuBLASLt's algorithms for `bmm_fp8`: asked for once, then called without asking again."""

from __future__ import annotations

from typing import Any

from fi_ffi.abi.interop import TensorLike, as_desc
from fi_ffi.errors import ArgumentError
from fi_ffi.ops.matmul.entries import GET_ALGOS, RUN_WITH_ALGO, in_force
from fi_ffi.ops.op import Op


def _call(op: Op, matrices: dict[str, Any], handle: int, stream: object, **more: Any) -> Any:
    values = matrices | more
    left = values["A"] = as_desc(values["A"], op.row.name, "A")
    if any(arg.name == "cublas_handle" for arg in in_force(op, left.device).row.args):
        values["cublas_handle"] = handle
    elif handle:  # from FlashInfer 0.7 on, the kernels make their own
        raise ArgumentError(op.row.name, "cublas_handle", got=handle, expected="0")
    return op(**values, stream=stream)


def bmm_fp8_get_algos(
    A: TensorLike,
    B: TensorLike,
    D: TensorLike,
    A_scale: TensorLike,
    B_scale: TensorLike,
    algo_buffer: TensorLike,
    workspace_buffer: TensorLike | None = None,
    cublas_handle: int = 0,
    *,
    stream: object = None,
) -> int:
    """How many algorithms cuBLASLt has for such a `bmm_fp8`, the one it thinks best first.

    Args:
        A, B, D, A_scale, B_scale, workspace_buffer, cublas_handle: as of `bmm_fp8`; nothing is
            computed, and only shapes, dtypes and the workspace's size matter.
        algo_buffer: uint8 on the host, written: 64 bytes for each algorithm that there is room
            for, 100 of them at most.

    What it writes is for this shape, these dtypes and this GPU.
    """
    matrices = {"A": A, "B": B, "D": D, "A_scale": A_scale, "B_scale": B_scale}
    count: int = _call(GET_ALGOS, matrices, cublas_handle, stream, algo_buffer=algo_buffer,
                       workspace_buffer=workspace_buffer)  # fmt: skip
    return count


def bmm_fp8_run_with_algo(
    A: TensorLike,
    B: TensorLike,
    D: TensorLike,
    A_scale: TensorLike,
    B_scale: TensorLike,
    algo_buffer: TensorLike,
    algo_idx: int,
    workspace_buffer: TensorLike | None = None,
    cublas_handle: int = 0,
    *,
    stream: object = None,
) -> None:
    """`bmm_fp8` by one of the algorithms that `bmm_fp8_get_algos` told.

    Args:
        A, B, D, A_scale, B_scale, workspace_buffer, cublas_handle: as of `bmm_fp8`.
        algo_buffer, algo_idx: what `bmm_fp8_get_algos` wrote, and which of them.

    An algorithm of another shape or GPU is refused by cuBLASLt, with a `KernelError`.
    """
    matrices = {"A": A, "B": B, "D": D, "A_scale": A_scale, "B_scale": B_scale}
    _call(RUN_WITH_ALGO, matrices, cublas_handle, stream, algo_buffer=algo_buffer,
          algo_idx=algo_idx, workspace_buffer=workspace_buffer)  # fmt: skip
