"""`bgmv_moe`: low-rank adapters for a mixture of experts, with one of many adapters for each token.

The kernels read tables with the addresses of each expert's matrices. The tables are made on the
host and copied in order with the launch. The kernels run on the legacy default stream whatever
stream they get (`BGMV_MOE_GET_STREAM` in `csrc/bgmv_moe/moe_bgmv_impl.cuh`), so that stream and the
call's are made to wait for each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fi_ffi.abi.interop import TensorLike, as_desc
from fi_ffi.abi.streams import handle_for
from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.errors import ArgumentError, ArgumentTypeError, printed
from fi_ffi.ops.call import cuda
from fi_ffi.ops.call.compiled import CompiledRow
from fi_ffi.ops.call.op import Op
from fi_ffi.ops.call.providers import check_available
from fi_ffi.ops.call.releases import forms_of
from fi_ffi.ops.call.row import Absent, Row, Scalar, Tensor, Vector
from fi_ffi.ops.steps.keyword_call import Launch, PreparedSteps, keyword_function
from fi_ffi.ops.steps.memory import check_apart, staged, zero

if TYPE_CHECKING:
    from fi_ffi.abi.tensor import Device

_OP = "bgmv_moe"
_F16 = ("float16", "bfloat16")
_INT = 2**31 - 1
# The sizes that kernels were compiled for (`csrc/bgmv_moe/moe_bgmv_config.h`).
RANKS = (8, 16, 32, 64)
WIDTHS = (
    384, 736, 768, 1024, 1344, 1472, 1536, 1856, 2048, 2112, 2688, 2816, 2880, 2944, 3072, 4096,
    5120, 5888, 7168, 8192, 10240, 14336, 16384, 28672,
)  # fmt: skip
_PLAIN: dict[str, Any] = {"doc": "", "contiguous": True}
_FIELDS: dict[str, Any] = {
    "module": "bgmv_moe", "source": "csrc/bgmv_moe/moe_bgmv_binding.cu", "doc": "",
    "dtypes": {"T": _F16}, "releases": ">=0.6.13", "vector": Vector(("h", "rank")),
    "offset_limit": 2**63, "capabilities": (9, 10, 11, 12),
}  # fmt: skip
_X = Tensor("x", "n h", "T", **_PLAIN)
_PAIRS = (
    Tensor("sorted_token_ids", "pairs", "int64", **_PLAIN),
    Tensor("expert_ids", "pairs", "int64", **_PLAIN),
)
_WEIGHTS = Tensor("topk_weights", "pairs", "float32", **_PLAIN)
_ADAPTERS = Tensor("lora_indices", "n", "int64", **_PLAIN)
_TABLE = Tensor("w_ptr", "slices experts", "int64", **_PLAIN)
_STRIDE = Scalar("lora_stride", int, None, "")
# The caller's arguments except the lists of weights.
CHECKS = Row(
    _OP, symbol="", args=(
        _X, *_PAIRS, _ADAPTERS, _WEIGHTS,
        Tensor("out", "n total", "float32", writes=True, reads=False, **_PLAIN),
    ),
    requires=(f"h in {WIDTHS}", f"pairs <= {_INT}", f"n <= {_INT}"), **_FIELDS,
)  # fmt: skip
# From this release on, each pair may have its own row of x and its own result: not used here.
_LATER = "0.6.16"
SHRINK = forms_of(Row(
    "bgmv_moe_shrink", symbol="bgmv_moe_shrink", args=(
        Tensor("y", "slices pairs rank", "T", writes=True, **_PLAIN), _X, _TABLE, *_PAIRS,
        _ADAPTERS, _STRIDE, Absent("per_pair_input", "bool", since=_LATER),
    ),
    **_FIELDS,
))  # fmt: skip
EXPAND = forms_of(Row(
    "bgmv_moe_expand", symbol="bgmv_moe_expand", args=(
        Tensor("y", "n total", "float32", writes=True, **_PLAIN),
        Tensor("x", "slices pairs rank", "T", **_PLAIN), _TABLE, *_PAIRS, _WEIGHTS, _ADAPTERS,
        Tensor("slice_start_loc", "slices", "int64", **_PLAIN),
        Scalar("first_feat_out", int, None, ""), _STRIDE,
        Absent("finalize", "bool", value=1, since=_LATER),
    ),
    **_FIELDS,
))  # fmt: skip
ROWS = (*SHRINK, *EXPAND)
_checks = CompiledRow(CHECKS, op=_OP)
_shrink, _expand = (Op(*forms, op=_OP) for forms in (SHRINK, EXPAND))


def _listed(name: str, given: Any, x: TensorDesc, num_experts: int | None) -> list[TensorDesc]:
    """Describe the matrices of adapters and experts; refuse lists of several layouts."""
    if not isinstance(given, (list, tuple)) or not given:
        raise ArgumentTypeError(_OP, name, got=printed(given), expected="a list of tensors")
    descs = [as_desc(tensor, _OP, f"{name}[{i}]") for i, tensor in enumerate(given)]
    first = descs[0]
    for i, desc in enumerate(descs):
        argument, is_in_rows = f"{name}[{i}]", False
        if len(desc.shape) == 4:
            is_in_rows = desc.strides[2:] == (desc.shape[3], 1)
        expected = ""
        if desc.dtype is not x.dtype or desc.device is not x.device:
            expected = f"{x.dtype} on {x.device}, as x"
        elif len(desc.shape) != 4 or (num_experts is not None and desc.shape[1] != num_experts):
            count = "experts" if num_experts is None else str(num_experts)
            expected = f"rank 4 (adapters {count} rows columns)"
        elif (desc.shape, desc.strides) != (first.shape, first.strides):
            expected = f"the shape and the strides of {name}[0]: {first.shape}, {first.strides}"
        elif not is_in_rows or any(stride < 0 or stride % 8 for stride in desc.strides[:2]):
            expected = "matrices without gaps, at multiples of 8 elements"
        elif desc.ptr % 16:
            expected = "an address that is a multiple of 16 bytes"
        if expected:
            got = f"{desc.layout} with strides {desc.strides}"
            raise ArgumentError(_OP, argument, got=got, expected=expected)
    return descs


def _checked_weights(
    a: list[TensorDesc], b: list[TensorDesc], wide: int, total: int
) -> tuple[int, int]:
    """Return the rank, and the columns of the output in a slice."""

    def wrong(argument: str, desc: TensorDesc, expected: str) -> ArgumentError:
        return ArgumentError(_OP, argument, got=desc.layout, expected=expected)

    adapters, experts, rank, columns = a[0].shape
    if columns != wide or rank not in RANKS:
        expected = f"[adapters, experts, rank, {wide}], and a rank of {', '.join(map(str, RANKS))}"
        raise wrong("lora_a_weights[0]", a[0], expected)
    if len(b) != len(a):
        raise ArgumentError(
            _OP, "lora_b_weights", got=f"{len(b)} tensors", expected=f"{len(a)}, as lora_a_weights"
        )
    feat = b[0].shape[2]
    if b[0].shape != (adapters, experts, feat, rank) or feat not in WIDTHS:
        sizes = ", ".join(map(str, WIDTHS))
        expected = f"[{adapters}, {experts}, columns, {rank}], and columns of {sizes}"
        raise wrong("lora_b_weights[0]", b[0], expected)
    if total < feat * len(b):
        raise ArgumentError(
            _OP, "out", got=f"{total} columns", expected=f"{feat * len(b)} columns or more"
        )
    return rank, feat


def _prepare(
    lora_a_weights: Any, lora_b_weights: Any, num_experts: Any, stream: object, **tensors: Any
) -> PreparedSteps:
    def check(**tensors: Any) -> Launch:
        return _checked(lora_a_weights, lora_b_weights, num_experts, **tensors)

    return PreparedSteps(_OP, tensors, check, stream)


@keyword_function(_prepare)
def bgmv_moe(
    x: TensorLike,
    lora_a_weights: Sequence[TensorLike],
    lora_b_weights: Sequence[TensorLike],
    sorted_token_ids: TensorLike,
    expert_ids: TensorLike,
    lora_indices: TensorLike,
    topk_weights: TensorLike,
    num_experts: int | None = None,
    *,
    out: TensorLike,
    stream: object = None,
) -> None:
    """Apply adapters: sum `topk_weight * (x @ a.T) @ b.T` over each token's experts.

    `a` and `b` are the matrices of the token's adapter and the expert.

    Args:
        x: [tokens, h] float16 or bfloat16.
        lora_a_weights: a list with [adapters, experts, rank, h] of x's dtype for each slice of the
            output; all of one shape and strides.
        lora_b_weights: a list with [adapters, experts, columns, rank], as many and alike.
        sorted_token_ids, expert_ids: [pairs] int64: a token and one of its experts. Pairs with a
            token out of range are skipped.
        lora_indices: [tokens] int64: each token's adapter, -1 for none.
        topk_weights: [pairs] float32.
        num_experts: the number of experts, which must be that of the weights; optional.
        out: [tokens, slices * columns or more] float32, written; 0 where nothing is added.

    h and `columns` must be widths that the kernels were compiled for, and rank is 8, 16, 32 or 64.
    The first product is rounded to x's dtype. Indices are on the GPU and not checked: an expert or
    adapter out of range makes the kernels read past the weights.

    The kernels run on the legacy default stream, which waits for `stream`, and `stream` for it. So
    a stream that records a graph is refused. Other streams are not delayed if they do not wait for
    the default stream.

    Raises `ArgumentError` and `ArgumentTypeError` before anything is launched, and
    `ArchitectureError` on GPUs before SM90.
    Upstream: flashinfer/fused_moe/bgmv_moe.py, csrc/bgmv_moe/moe_bgmv_ops.cu.
    """
    _checked(
        lora_a_weights, lora_b_weights, num_experts, x, sorted_token_ids, expert_ids, lora_indices,
        topk_weights, out,
    )(stream)  # fmt: skip


def _checked(
    lora_a_weights: Sequence[TensorLike], lora_b_weights: Sequence[TensorLike],
    num_experts: int | None, x: TensorLike, sorted_token_ids: TensorLike, expert_ids: TensorLike,
    lora_indices: TensorLike, topk_weights: TensorLike, out: TensorLike,
) -> Launch:  # fmt: skip
    """Check a call; return the function that launches it on a stream."""
    given = (x, sorted_token_ids, expert_ids, lora_indices, topk_weights, out)
    descs, sizes = _checks.check(*given)
    left, output, device = descs["x"], descs["out"], descs["x"].device
    a, b = (
        _listed(name, weights, left, num_experts)
        for name, weights in (
            ("lora_a_weights", lora_a_weights),
            ("lora_b_weights", lora_b_weights),
        )
    )
    rank, feat = _checked_weights(a, b, sizes["h"], sizes["total"])
    for name, weights in (("lora_a_weights", a), ("lora_b_weights", b)):
        own = {f"{name}[{i}]": desc for i, desc in enumerate(weights)}
        check_apart(_checks.refuse, "out", output, own)

    def launch(stream: object) -> None:
        handle = handle_for(stream, device, _OP)
        if device.is_cuda:
            check_available(CHECKS, device)
            if cuda.is_capturing(handle):
                expected = "a stream that records no graph: the kernels run on the default stream"
                raise ArgumentError(_OP, "stream", got=f"{handle:#x}", expected=expected)
        if not sizes["n"]:
            return
        shape = len(a), sizes["pairs"], rank
        count = shape[0] * shape[1] * rank * left.dtype.itemsize
        tables = _tables(a, b, feat)
        with cuda.current(device), staged(device, handle, tables.data.cast("B"), count) as place:
            zero(output.ptr, output.numel * 4, device, handle)
            if not sizes["pairs"]:
                return
            zero(place.scratch, count, device, handle)
            of_a, of_b, starts = _placed(place.address, len(a), a[0].shape[1], device)
            middle = TensorDesc(place.scratch, shape, left.dtype.name, device=device)
            pairs = descs["sorted_token_ids"], descs["expert_ids"]
            adapters, weights = descs["lora_indices"], descs["topk_weights"]
            with _on_default_stream(device, handle):
                _shrink(middle, left, of_a, *pairs, adapters, a[0].strides[0], stream=stream)
                _expand(
                    output, middle, of_b, *pairs, weights, adapters, starts, feat,
                    b[0].strides[0], stream=stream,
                )  # fmt: skip

    return launch


def _tables(a: list[TensorDesc], b: list[TensorDesc], feat: int) -> Any:
    """Return the addresses of each slice's and expert's matrices, and each slice's columns."""
    import numpy as np

    experts, found = a[0].shape[1], []
    for weights in (a, b):
        step = weights[0].strides[1] * weights[0].dtype.itemsize
        for desc in weights:
            found.append(
                np.uint64(desc.ptr) + np.arange(experts, dtype=np.uint64) * np.uint64(step)
            )
    table = np.concatenate([*found, np.arange(len(a), dtype=np.uint64) * np.uint64(feat)])
    return table.view(np.int64)


def _placed(
    address: int, slices: int, experts: int, device: Device
) -> tuple[TensorDesc, TensorDesc, TensorDesc]:
    size = 8 * slices * experts
    of_a, of_b = (
        TensorDesc(address + at, (slices, experts), "int64", device=device) for at in (0, size)
    )
    return of_a, of_b, TensorDesc(address + 2 * size, (slices,), "int64", device=device)


@contextmanager
def _on_default_stream(device: Device, stream: int) -> Iterator[None]:
    """Order launches inside the block, on the legacy default stream, into `stream`."""
    if not device.is_cuda or stream in _DEFAULT:
        yield
        return
    before, after = cuda.Event(), cuda.Event()
    before.record(stream)
    before.make_wait(0)
    try:
        yield
    finally:
        after.record(0)
        after.make_wait(stream)


_DEFAULT = (0, 1)  # also cudaStreamLegacy
