"""`PodPlan`: one request's prefill and a batch's decode in one launch (POD attention)."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.function import Frame
from fi_ffi.abi.interop import TensorLike
from fi_ffi.abi.streams import handle_for
from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.loader import machine
from fi_ffi.ops.attention.arrays import int32_array
from fi_ffi.ops.attention.backends import NON_CAUSAL, module_name
from fi_ffi.ops.attention.bind import RunNames
from fi_ffi.ops.attention.options import check_keywords
from fi_ffi.ops.attention.prefill import BatchPrefillPlan
from fi_ffi.ops.attention.values import Values
from fi_ffi.ops.attention.workspace import Workspace
from fi_ffi.ops.call import cuda
from fi_ffi.ops.call.arguments import check_choice, check_flag, check_int, check_number
from fi_ffi.ops.call.row import KV_LAYOUTS, Row, as_nhd
from fi_ffi.ops.plans.arguments import (
    NotOf,
    PodKeywords,
    check_causal,
    described,
    packed_mask,
)
from fi_ffi.ops.plans.rows import POD
from fi_ffi.ops.plans.single import check_tmp, prefill_bytes

if TYPE_CHECKING:
    from typing_extensions import Unpack

_NON_BLOCKING = 1  # cudaStreamNonBlocking
# The decode half is compiled for tiles of 16 rows, and the planner has to choose the same tile.
_MAX_GROUP = 16
# The kind of run: its row follows those of a prefill plan.
POD_RUN = 2
# Arguments of each half that the kernel is compiled without, or that have one value.
_NEUTRAL = {"logits_soft_cap": 0.0, "rope_rcp_scale": 1.0, "rope_rcp_theta": 1e-4, "layout": 0}


class PodPlan(BatchPrefillPlan):
    """Decode of a batch, planned on the host and run together with the prefill of a request.

    Args:
        paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len: the decode batch's pages, int32
            on the host, as in `BatchDecodePlan`; at least one request.
        num_qo_heads, num_kv_heads: heads of both halves; at most 16 query heads share a key head.
        head_dim: size of a head, in both halves.
        page_size, window_left: of the decode.
        q_data_type, kv_data_type: dtypes of both halves: float16 or bfloat16; keys also fp8.
        device, workspace, stream: as in `BatchPrefillPlan`.

    The kernel assigns blocks through one counter for the whole process, which is reset on the
    legacy default stream. So run it only on streams that wait for that stream: stream 0, and
    streams made without `cudaStreamNonBlocking`. A run cannot be captured into a graph.

    Raises `ArgumentError` and `ArgumentTypeError` before anything is copied or launched, and
    `KernelNotFoundError` if the kernels in use lack a module.
    Upstream: flashinfer/pod.py, csrc/pod.cu.
    """

    op = "PodPlan"
    _run_names = RunNames(
        {
            "qo_indptr_d": "qo_indptr",
            "paged_kv_indptr_d": "kv_indptr",
            "paged_kv_indices_d": "indices",
            "paged_kv_last_page_len_d": "last_page_len",
        },
        workspaces=("float_workspace_buffer_d", "int_workspace_buffer_d"),
    )
    _run_methods = ("run",)
    # The row of the run, the module's family, and the argument that has the last pages' lengths.
    _pod_row: ClassVar[Row] = POD
    _family: ClassVar[str] = "pod"
    _last_page_len: ClassVar[str] = "paged_kv_last_page_len"
    ragged_run: Any = NotOf()
    paged_run: Any = NotOf()

    def __init__(
        self,
        paged_kv_indptr: TensorLike,
        *,
        paged_kv_last_page_len: TensorLike,
        head_dim: int,
        paged_kv_indices: TensorLike | None = None,
        workspace: Workspace | None = None,
        **options: Unpack[PodKeywords],
    ) -> None:
        check_keywords(self.op, PodKeywords.__annotations__, options)
        super().__init__(
            self._each_one(paged_kv_last_page_len),
            paged_kv_indptr=paged_kv_indptr,
            paged_kv_indices=paged_kv_indices,
            paged_kv_last_page_len=paged_kv_last_page_len,
            head_dim_qk=head_dim,
            backend="fa2",
            workspace=workspace,
            **options,
        )

    def _choose_rows(self) -> Sequence[Row]:
        chosen = self.options
        if chosen.num_qo_heads // chosen.num_kv_heads > _MAX_GROUP:
            expected = f"at most {_MAX_GROUP} for each of the {chosen.num_kv_heads} key heads"
            raise self._refuse("num_qo_heads", chosen.num_qo_heads, expected)
        return (*super()._choose_rows(), self._pod_row)

    def _each_one(self, last_page_len: TensorLike) -> Any:
        """Return the `qo_indptr` of a batch with one query per request."""
        count = len(int32_array(self.op, self._last_page_len, last_page_len))
        if not count:
            raise self._refuse(self._last_page_len, "no requests", "one or more")
        return array("i", range(count + 1))

    def replan(  # type: ignore[override]
        self,
        paged_kv_indptr: TensorLike,
        *,
        paged_kv_last_page_len: TensorLike,
        paged_kv_indices: TensorLike | None = None,
        stream: object = None,
    ) -> None:
        """Plan another decode batch with the same options, in the same workspace."""
        super().replan(
            self._each_one(paged_kv_last_page_len),
            paged_kv_indptr=paged_kv_indptr,
            paged_kv_indices=paged_kv_indices,
            paged_kv_last_page_len=paged_kv_last_page_len,
            stream=stream,
        )

    def run(
        self,
        q_p: TensorLike,
        k_p: TensorLike,
        v_p: TensorLike,
        tmp_p: TensorLike,
        o_p: TensorLike,
        q_d: TensorLike,
        paged_k_cache_d: TensorLike,
        paged_v_cache_d: TensorLike,
        o_d: TensorLike,
        *,
        lse_p: TensorLike | None = None,
        lse_d: TensorLike | None = None,
        causal_p: bool = False,
        custom_mask_p: TensorLike | None = None,
        window_left_p: int = -1,
        sm_scale_p: float | None = None,
        sm_scale_d: float | None = None,
        kv_layout_p: str = "NHD",
        kv_layout_d: str = "NHD",
        paged_kv_indices: TensorLike | None = None,
        enable_pdl: bool = False,
        stream: object = None,
    ) -> None:
        """Compute the prefill of `q_p` into `o_p` and the batch's decode of `q_d` into `o_d`.

        Args:
            q_p, o_p, lse_p, k_p, v_p, tmp_p, causal_p, custom_mask_p, window_left_p: as q, o, lse,
                k, v, tmp, causal, custom_mask and window_left of `single_prefill`; at least one
                query and one key.
            q_d, o_d: [b, num_qo_heads, head_dim].
            lse_d: [b, num_qo_heads] float32, written: log2 of the sum of exponentials.
            paged_k_cache_d, paged_v_cache_d: [num_pages, page_size, num_kv_heads, head_dim], or
                with "HND" [num_pages, num_kv_heads, page_size, head_dim], with the same strides.
            paged_kv_indices: the pages, int32 on the device, if the plan has none.
            sm_scale_p, sm_scale_d: 1 / sqrt(head_dim) by default.
            stream: a stream that waits for the legacy default stream.
        """
        for layout, part in ((kv_layout_p, "p"), (kv_layout_d, "d")):
            check_choice(self.op, f"kv_layout_{part}", layout, tuple(KV_LAYOUTS))
        window = check_int(self.op, "window_left_p", window_left_p, -1)
        has_indices = self._check_indices("paged_kv_indices", paged_kv_indices)
        bound = self._bound_run(POD_RUN, has_indices, self._pod_module(window))
        values = bound.template.fresh()
        prefill = described(self.op, q_p=q_p, k_p=k_p, v_p=v_p, tmp_p=tmp_p)
        self._put_prefill(values, prefill, kv_layout_p, causal_p, custom_mask_p)
        caches = described(
            self.op, paged_k_cache_d=paged_k_cache_d, paged_v_cache_d=paged_v_cache_d
        )
        values.put(**{name: as_nhd(cache, kv_layout_d) for name, cache in caches.items()})
        values.put(q_d=q_d, paged_kv_indices_d=paged_kv_indices, window_left_p=window)
        values.put(o_p=o_p, o_d=o_d, maybe_lse_p=lse_p, maybe_lse_d=lse_d)
        self._put_options(values, sm_scale_p, sm_scale_d, enable_pdl)
        self._run_packed(bound, bound.pack(bound, *values.values), stream)

    def _other_rows(self, kind: int) -> Mapping[str, Row]:
        return {}  # there is one kernel

    def _fill_defaults(self, values: Values) -> None:
        pass  # each run sets all arguments

    def _facts(self) -> dict[str, Any]:
        chosen = self.options
        neutral = {f"{name}_{half}": _NEUTRAL[name] for half in "pd" for name in _NEUTRAL}
        sizes = {"head_dim": chosen.head_dim_qk, "window_left_d": chosen.window_left}
        return super()._facts() | neutral | sizes | {"mask_mode_code_d": NON_CAUSAL}

    def _put_options(
        self, values: Values, sm_scale_p: object, sm_scale_d: object, enable_pdl: object
    ) -> None:
        values.put(
            enable_pdl=check_flag(self.op, "enable_pdl", enable_pdl),
            sm_scale_p=self._scale("sm_scale_p", sm_scale_p),
            sm_scale_d=self._scale("sm_scale_d", sm_scale_d),
        )

    def _scale(self, name: str, value: object) -> float:
        if value is None:
            return float(self.options.head_dim_qk**-0.5)
        return check_number(self.op, name, value, 0.0)

    def _launch_frame(self, frame: Frame, stream: object) -> None:
        self._check_stream(stream)
        super()._launch_frame(frame, stream)

    def _check_stream(self, stream: object) -> None:
        """Raise if a launch on this stream would not wait until the counter is reset."""
        if not self.device.is_cuda:
            return
        handle = handle_for(stream, self.device, self.op)
        with cuda.current(self.device):
            if cuda.is_capturing(handle):
                raise self._refuse("stream", "one that is capturing a graph", "no capture")
            if not _waits_for_default(handle):
                expected = "one that waits for the legacy default stream, where a counter is reset"
                raise self._refuse("stream", "one made with cudaStreamNonBlocking", expected)

    def _put_prefill(
        self, values: Values, descs: dict[str, TensorDesc], layout: str, causal: bool, mask: Any
    ) -> None:
        """Check the request's tensors, which the row knows as NHD, and set them and the mask."""
        chosen = self.options
        for name in ("q_p", "k_p", "v_p"):
            if len(descs[name].shape) != 3 or 0 in descs[name].shape:
                expected = "rank 3, and tokens, heads and elements of at least 1"
                raise self._refuse(name, descs[name].layout, expected)
        for name in ("k_p", "v_p"):
            descs[name] = as_nhd(descs[name], layout)
        lens = descs["q_p"].shape[0], descs["k_p"].shape[0]
        is_causal = check_causal(self.op, causal, descs["k_p"], lens, "_p")
        packed, mode = packed_mask(self.op, mask, is_causal, lens, "_p")
        heads = chosen.num_qo_heads, chosen.num_kv_heads
        need = prefill_bytes(*lens, *heads, chosen.head_dim_vo, self._machine[0])
        check_tmp(self.op, "tmp_p", descs["tmp_p"], need, "single_prefill")
        values.put(**descs, maybe_custom_mask_p=packed, mask_mode_code_p=mode)

    def _pod_module(self, window_left_p: int) -> str:
        chosen = self.options
        return module_name(
            self._family,
            dtype_q=chosen.q_data_type,
            dtype_kv=chosen.kv_data_type,
            dtype_o=chosen.o_data_type,
            head_dim=chosen.head_dim_qk,
            use_sliding_window_p=window_left_p >= 0,
            use_sliding_window_d=chosen.window_left >= 0,
        )


def _waits_for_default(stream: int) -> bool:
    """Whether a stream and the legacy default stream wait for each other."""
    flags = ffi.new("unsigned int *")
    code = machine.load_cudart()[0].cudaStreamGetFlags(cuda.pointer(stream), flags)
    cuda.check(code, "cudaStreamGetFlags")
    return not flags[0] & _NON_BLOCKING
