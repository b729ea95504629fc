"""`bgmv_moe`: low-rank adapters for a mixture of experts, with one of many adapters for each token.

The kernels read tables with the addresses of each expert's matrices. The tables are made on the
host and copied in order with the launch. Before FlashInfer 0.7.2.post1 the kernels run on the
legacy default stream whatever stream they get (`BGMV_MOE_GET_STREAM` in
`csrc/bgmv_moe/moe_bgmv_impl.cuh`). That stream and the call's are made to wait for each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fi_ffi.abi.interop import TensorLike, as_desc
from fi_ffi.abi.streams import handle_for
from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.errors import ArgumentTypeError, printed
from fi_ffi.loader.distributions import is_in
from fi_ffi.ops.call import cuda
from fi_ffi.ops.call.arguments import INT32_MAX, Refusal
from fi_ffi.ops.call.compiled import CompiledRow
from fi_ffi.ops.call.op import Op
from fi_ffi.ops.call.releases import check_available, forms_of, reference, release_in_force
from fi_ffi.ops.call.row import Absent, Row, Scalar, Tensor, Vector
from fi_ffi.ops.steps.keyword_call import Launch, PreparedSteps, keyword_function
from fi_ffi.ops.steps.memory import check_apart, staged, zero

if TYPE_CHECKING:
    from fi_ffi.abi.tensor import Device

_OP = "bgmv_moe"
_refuse = Refusal(_OP)
_F16 = ("float16", "bfloat16")
# The sizes that kernels were compiled for (`csrc/bgmv_moe/moe_bgmv_config.h`).
RANKS = (8, 16, 32, 64)
WIDTHS = (
    384, 736, 768, 1024, 1344, 1472, 1536, 1856, 2048, 2112, 2688, 2816, 2880, 2944, 3072, 4096,
    5120, 5888, 7168, 8192, 10240, 14336, 16384, 28672,
)  # fmt: skip
_PLAIN: dict[str, Any] = {"doc": "", "contiguous": True}
_FIELDS: dict[str, Any] = {
    "module": "bgmv_moe",
    "source": "csrc/bgmv_moe/moe_bgmv_binding.cu",
    "doc": "",
    "dtypes": {"T": _F16},
    "releases": ">=0.6.13",
    "vector": Vector(("h", "rank")),
    "offset_limit": 2**63,
    "capabilities": (9, 10, 11, 12),
}
_X = Tensor("x", "n h", "T", **_PLAIN)
# What callers give is judged by `CHECKS`, and the tables are fi_ffi's own.
_JUDGED: dict[str, Any] = {"no_index": "judged before", **_PLAIN}
_OWN: dict[str, Any] = {"no_index": "fi_ffi's own", **_PLAIN}
_PAIRS = (
    Tensor("sorted_token_ids", "pairs", "int64", **_JUDGED),
    Tensor("expert_ids", "pairs", "int64", **_JUDGED),
)
_WEIGHTS = Tensor("topk_weights", "pairs", "float32", **_PLAIN)
_ADAPTERS = Tensor("lora_indices", "n", "int64", **_JUDGED)
_TABLE = Tensor("w_ptr", "slices experts", "int64", **_OWN)
_STRIDE = Scalar("lora_stride", int, None, "")
# Pairs of no token, or of one without an adapter, are skipped.
_USED = (
    "(sorted_token_ids >= 0) & (sorted_token_ids < n) & (lora_indices[sorted_token_ids % n] >= 0)"
)
# The caller's arguments except the lists of weights.
CHECKS = Row(
    _OP,
    symbol="",
    args=(
        _X,
        replace(_PAIRS[0], no_index="others than tokens are skipped"),
        replace(_PAIRS[1], index=(f"0 <= expert_ids < experts where {_USED}",), no_index=""),
        replace(_ADAPTERS, index=("lora_indices < adapters",), no_index=""),
        _WEIGHTS,
        Tensor("out", "n total", "float32", writes=True, reads=False, **_PLAIN),
    ),
    requires=(f"h in {WIDTHS}", f"pairs <= {INT32_MAX}", f"n <= {INT32_MAX}"),
    **_FIELDS,
)
# From this release on, each pair may have its own row of x and its own result: not used here.
_LATER = "0.6.16"
# The releases whose kernels run on the legacy default stream, whatever stream they get.
_ON_DEFAULT_STREAM = "<0.7.2.post1"
SHRINK = forms_of(
    Row(
        "bgmv_moe_shrink",
        symbol="bgmv_moe_shrink",
        args=(
            Tensor("y", "slices pairs rank", "T", writes=True, **_PLAIN),
            _X,
            _TABLE,
            *_PAIRS,
            _ADAPTERS,
            _STRIDE,
            Absent("per_pair_input", "bool", since=_LATER),
        ),
        **_FIELDS,
    )
)
EXPAND = forms_of(
    Row(
        "bgmv_moe_expand",
        symbol="bgmv_moe_expand",
        args=(
            Tensor("y", "n total", "float32", writes=True, **_PLAIN),
            Tensor("x", "slices pairs rank", "T", **_PLAIN),
            _TABLE,
            *_PAIRS,
            _WEIGHTS,
            _ADAPTERS,
            Tensor("slice_start_loc", "slices", "int64", **_OWN),
            Scalar("first_feat_out", int, None, ""),
            _STRIDE,
            Absent("finalize", "bool", value=1, since=_LATER),
        ),
        **_FIELDS,
    )
)
ROWS = (*SHRINK, *EXPAND)
_checks = CompiledRow(CHECKS, op=_OP)
_shrink, _expand = (Op(*forms, op=_OP) for forms in (SHRINK, EXPAND))


def _listed(name: str, tensors: Any, x: TensorDesc, num_experts: int | None) -> list[TensorDesc]:
    """Describe the matrices of adapters and experts; refuse lists of several layouts."""
    if not isinstance(tensors, (list, tuple)) or not tensors:
        raise ArgumentTypeError(_OP, name, got=printed(tensors), expected="a list of tensors")
    descs = [as_desc(tensor, _OP, f"{name}[{i}]") for i, tensor in enumerate(tensors)]
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
            raise _refuse(argument, f"{desc.layout} with strides {desc.strides}", expected)
    return descs


def _checked_weights(
    a: list[TensorDesc], b: list[TensorDesc], wide: int, total: int
) -> tuple[int, int]:
    """Return the rank, and the columns of the output in a slice."""
    adapters, experts, rank, columns = a[0].shape
    if columns != wide or rank not in RANKS:
        expected = f"[adapters, experts, rank, {wide}], and a rank of {', '.join(map(str, RANKS))}"
        raise _refuse("lora_a_weights[0]", a[0].layout, expected)
    if len(b) != len(a):
        raise _refuse("lora_b_weights", f"{len(b)} tensors", f"{len(a)}, as lora_a_weights")
    feat = b[0].shape[2]
    if b[0].shape != (adapters, experts, feat, rank) or feat not in WIDTHS:
        sizes = ", ".join(map(str, WIDTHS))
        expected = f"[{adapters}, {experts}, columns, {rank}], and columns of {sizes}"
        raise _refuse("lora_b_weights[0]", b[0].layout, expected)
    if total < feat * len(b):
        raise _refuse("out", f"{total} columns", f"{feat * len(b)} columns or more")
    return rank, feat


_LISTS = ("lora_a_weights", "lora_b_weights")


def _prepare(stream: object, **arguments: Any) -> PreparedSteps:
    tensors = {arg.name: arguments[arg.name] for arg in CHECKS.given}

    def check(**tensors: Any) -> Launch:
        return _checked({**arguments, **tensors})

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

    Before FlashInfer 0.7.2.post1 the kernels run on the legacy default stream. It and `stream` wait
    for each other, and a stream that records a graph is refused. Other streams are not delayed if
    they do not wait for the default stream.

    Raises `ArgumentError` and `ArgumentTypeError` before anything is launched, and
    `ArchitectureError` on GPUs before SM90.
    Upstream: flashinfer/fused_moe/bgmv_moe.py, csrc/bgmv_moe/moe_bgmv_ops.cu.
    """
    _checked(locals())(stream)


def _checked(arguments: Mapping[str, Any]) -> Launch:
    """Check a call; return the function that launches it on a stream."""
    descs, sizes = _checks.check(*(arguments[arg.name] for arg in CHECKS.given))
    x, device = descs["x"], descs["x"].device
    a, b = (_listed(name, arguments[name], x, arguments["num_experts"]) for name in _LISTS)
    rank, feat = _checked_weights(a, b, sizes["h"], sizes["total"])
    for name, weights in zip(_LISTS, (a, b), strict=True):
        own = {f"{name}[{i}]": desc for i, desc in enumerate(weights)}
        check_apart(_checks.refuse, "out", descs["out"], own)

    def launch(stream: object) -> None:
        handle = handle_for(stream, device, _OP)
        if device.is_cuda:
            check_available(CHECKS, device)
            if on_default_stream(device) and cuda.is_capturing(handle):
                expected = "a stream that records no graph: kernels of FlashInfer "
                expected += f"{_ON_DEFAULT_STREAM} run on the default stream"
                raise _refuse("stream", f"{handle:#x}", expected)
        elif sizes["n"]:  # on the CPU, where nothing may be read past the weights
            adapters, experts = a[0].shape[:2]
            reference().judge_descs(CHECKS, descs, adapters=adapters, experts=experts)
        if sizes["n"]:
            _launch(descs, (a, b), (sizes["pairs"], rank, feat), handle)

    return launch


def _launch(
    descs: Mapping[str, TensorDesc],
    weights: tuple[list[TensorDesc], list[TensorDesc]],
    sizes: tuple[int, int, int],
    stream: int,
) -> None:
    x, out, device = descs["x"], descs["out"], descs["x"].device
    (a, b), (pairs, rank, feat) = weights, sizes
    shape = len(a), pairs, rank
    count = math.prod(shape) * x.dtype.itemsize
    tables = _tables(a, b, feat)
    with cuda.current(device), staged(device, stream, tables.data.cast("B"), count) as place:
        zero(out.ptr, out.numel * 4, device, stream)
        if not pairs:
            return
        zero(place.scratch, count, device, stream)
        of_a, of_b, starts = _placed(place.address, len(a), a[0].shape[1], device)
        middle = TensorDesc(place.scratch, shape, x.dtype.name, device=device)
        indices = {arg.name: descs[arg.name] for arg in (*_PAIRS, _ADAPTERS)}
        step_a, step_b = a[0].strides[0], b[0].strides[0]
        summed: dict[str, Any] = {"topk_weights": descs["topk_weights"], "slice_start_loc": starts}
        summed |= {"first_feat_out": feat, "lora_stride": step_b}
        with _in_order(device, stream):
            _shrink(middle, x, of_a, **indices, lora_stride=step_a, stream=stream)
            _expand(out, middle, of_b, **indices, **summed, stream=stream)


def _tables(a: list[TensorDesc], b: list[TensorDesc], feat: int) -> Any:
    """Return the addresses of each slice's and expert's matrices, and each slice's columns."""
    import numpy as np

    experts, columns = np.arange(a[0].shape[1], dtype=np.uint64), np.arange(len(a), dtype=np.uint64)
    rows = []
    for weights in (a, b):
        step = weights[0].strides[1] * weights[0].dtype.itemsize
        rows += [np.uint64(desc.ptr) + experts * np.uint64(step) for desc in weights]
    return np.concatenate([*rows, columns * np.uint64(feat)]).view(np.int64)


def _placed(
    address: int, slices: int, experts: int, device: Device
) -> tuple[TensorDesc, TensorDesc, TensorDesc]:
    size = 8 * slices * experts
    of_a, of_b = (
        TensorDesc(address + at, (slices, experts), "int64", device=device) for at in (0, size)
    )
    return of_a, of_b, TensorDesc(address + 2 * size, (slices,), "int64", device=device)


def on_default_stream(device: Device) -> bool:
    """Whether the kernels in use run on the legacy default stream, whatever stream they get."""
    return device.is_cuda and is_in(release_in_force(), _ON_DEFAULT_STREAM)


@contextmanager
def _in_order(device: Device, stream: int) -> Iterator[None]:
    """Order launches inside the block into `stream`, on whichever stream they are."""
    if not on_default_stream(device) or stream in _DEFAULT:
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
