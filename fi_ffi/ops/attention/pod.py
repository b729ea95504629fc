"""`PodPlan`: one request's prefill and a batch's decode in one launch (POD attention)."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from fi_ffi.abi.interop import TensorLike, as_desc
from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.ops import cuda
from fi_ffi.ops.attention.arrays import HostArray
from fi_ffi.ops.attention.options import CAUSAL, CUSTOM, NON_CAUSAL, SHORT, in_use, release
from fi_ffi.ops.attention.plan import BoundRow
from fi_ffi.ops.attention.prefill import BatchPrefillPlan
from fi_ffi.ops.attention.rows import POD
from fi_ffi.ops.attention.run import Values
from fi_ffi.ops.attention.single import prefill_bytes
from fi_ffi.ops.call.arguments import check_choice, check_flag, check_int, check_number
from fi_ffi.ops.nhd import as_nhd
from fi_ffi.ops.row import KV_LAYOUTS, Row

# The kernel's decode half is compiled for tiles of so many rows, and plans have to agree.
_MOST_GROUP = 16
# The kind of run, after those of prefill plans.
_POD = 2


class PodPlan(BatchPrefillPlan):
    """A batch's decode, planned on the host, that is run with another request's prefill.

    Args:
        paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len: the batch's pages, int32 on the
            host, as for `BatchDecodePlan`; one request or more.
        num_qo_heads, num_kv_heads: the same of both halves; up to 16 query heads share keys.
        head_dim, page_size, window_left, q_data_type, kv_data_type: of the decode; the first
            and the dtypes of the prefill as well.  float16 and bfloat16, keys also in fp8.
        device, workspace, stream: as for `BatchPrefillPlan`.

    Its kernel hands out blocks through one counter for the whole process, which is set to zero
    on the legacy default stream: runs are only for streams that wait for that one (stream 0,
    and those made without `cudaStreamNonBlocking`), and cannot be captured into a graph.

    Raises `ArgumentError` and `ArgumentTypeError` before anything is copied or launched,
    `KernelNotFoundError` where the kernels in use lack a module.
    Upstream: flashinfer/pod.py, csrc/pod.cu.
    """

    op = "PodPlan"
    run_arrays: Mapping[str, str] = {
        "qo_indptr_d": "qo_indptr", "paged_kv_indptr_d": "kv_indptr",
        "paged_kv_indices_d": "indices", "paged_kv_last_page_len_d": "last_page_len",
    }  # fmt: skip
    run_workspaces = ("float_workspace_buffer_d", "int_workspace_buffer_d")
    run_not_less: ClassVar = {
        _POD: (("num_pages", "planned_pages"), ("num_indices", "planned_indices")),
    }

    def __init__(
        self,
        paged_kv_indptr: TensorLike,
        *,
        paged_kv_last_page_len: TensorLike,
        head_dim: int,
        **options: Any,
    ) -> None:
        for name in ("backend", "head_dim_qk", "enable_cuda_graph", "causal", "kv_indptr"):
            if name in options:
                raise TypeError(f"{self.op}() got an unexpected keyword argument {name!r}")
        super().__init__(
            self._each_one(paged_kv_last_page_len), paged_kv_indptr=paged_kv_indptr,
            paged_kv_last_page_len=paged_kv_last_page_len, head_dim_qk=head_dim, backend="fa2",
            **options,
        )  # fmt: skip
        chosen = self.options
        if chosen.num_qo_heads // chosen.num_kv_heads > _MOST_GROUP:
            expected = f"at most {_MOST_GROUP} for each of the {chosen.num_kv_heads} of keys"
            raise self.refuse("num_qo_heads", chosen.num_qo_heads, expected)
        self._run_rows = (*self._run_rows, *in_use((POD,), self.device))

    def _each_one(self, last_page_len: TensorLike) -> Any:
        """One query for each request."""
        count = len(HostArray(self.op, "paged_kv_last_page_len", last_page_len).view)
        if not count:
            raise self.refuse("paged_kv_last_page_len", "no requests", "one or more")
        return array("i", range(count + 1))

    def replan(  # type: ignore[override]
        self, paged_kv_indptr: TensorLike, *, paged_kv_last_page_len: TensorLike,
        paged_kv_indices: TensorLike | None = None, stream: object = None,
    ) -> None:  # fmt: skip
        """Plan another batch with the same options, in the same workspace."""
        super().replan(
            self._each_one(paged_kv_last_page_len), paged_kv_indptr=paged_kv_indptr,
            paged_kv_last_page_len=paged_kv_last_page_len, paged_kv_indices=paged_kv_indices,
            stream=stream,
        )  # fmt: skip

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
        """The prefill of `q_p` over `k_p` and `v_p` into `o_p`, and the batch's decode into `o_d`.

        Args:
            q_p, o_p, lse_p, k_p, v_p, tmp_p, causal_p, custom_mask_p, window_left_p: as q, o, lse,
                k, v, tmp, causal, custom_mask and window_left of `single_prefill`; a query and
                a key at least.
            q_d, o_d: [b, num_qo_heads, head_dim]; lse_d: [b, num_qo_heads] float32.
            paged_k_cache_d, paged_v_cache_d: [num_pages, page_size, num_kv_heads, head_dim], or
                with "HND" the middle axes exchanged, with the same strides.
            paged_kv_indices: the pages on the device, where the plan was given none.
            sm_scale_p, sm_scale_d: 1 / sqrt(head_dim) by default.
            stream: one that waits for the legacy default stream.
        """
        self._check_stream(stream)
        bound, values = self._run_arguments(
            q_p, k_p, v_p, tmp_p, o_p, q_d, paged_k_cache_d, paged_v_cache_d, o_d, lse_p, lse_d,
            causal_p, custom_mask_p, window_left_p, sm_scale_p, sm_scale_d, kv_layout_p,
            kv_layout_d, paged_kv_indices, enable_pdl,
        )  # fmt: skip
        self.run_packed(bound, values, stream)

    def _run_arguments(
        self, q_p: Any, k_p: Any, v_p: Any, tmp_p: Any, o_p: Any, q_d: Any, paged_k_cache_d: Any,
        paged_v_cache_d: Any, o_d: Any, lse_p: Any = None, lse_d: Any = None,
        causal_p: bool = False, custom_mask_p: Any = None, window_left_p: int = -1,
        sm_scale_p: float | None = None, sm_scale_d: float | None = None,
        kv_layout_p: str = "NHD", kv_layout_d: str = "NHD", paged_kv_indices: Any = None,
        enable_pdl: bool = False,
    ) -> tuple[BoundRow, Sequence[Any]]:  # fmt: skip
        """The row of a run, and what it is given."""
        for layout, part in ((kv_layout_p, "p"), (kv_layout_d, "d")):
            check_choice(self.op, f"kv_layout_{part}", layout, tuple(KV_LAYOUTS))
        window = check_int(self.op, "window_left_p", window_left_p, -1)
        has_indices = self.check_indices("paged_kv_indices", paged_kv_indices)
        bound = self.bound_run(_POD, has_indices, self._pod_module(window))
        values = bound.template.fresh()
        self._put_prefill(values, q_p, k_p, v_p, tmp_p, kv_layout_p, causal_p, custom_mask_p)
        values.put(
            o_p=o_p, o_d=o_d, maybe_lse_p=lse_p, maybe_lse_d=lse_d, window_left_p=window, q_d=q_d,
            paged_kv_indices_d=paged_kv_indices,
            enable_pdl=check_flag(self.op, "enable_pdl", enable_pdl),
            sm_scale_p=self._scale("sm_scale_p", sm_scale_p),
            sm_scale_d=self._scale("sm_scale_d", sm_scale_d),
            paged_k_cache_d=as_nhd(as_desc(paged_k_cache_d, self.op, "paged_k_cache_d"),
                                   kv_layout_d),
            paged_v_cache_d=as_nhd(as_desc(paged_v_cache_d, self.op, "paged_v_cache_d"),
                                   kv_layout_d),
        )  # fmt: skip
        return bound, values.values

    def other_rows(self, kind: int) -> Mapping[str, Row]:
        return {}  # there is one kernel

    def fill_defaults(self, values: Values) -> None:
        pass  # a run says all

    def run_constants(self) -> dict[str, Any]:
        return {
            "window_left_d": self.options.window_left, "logits_soft_cap_p": 0.0,
            "logits_soft_cap_d": 0.0, "rope_rcp_scale_p": 1.0, "rope_rcp_scale_d": 1.0,
            "rope_rcp_theta_p": 1e-4, "rope_rcp_theta_d": 1e-4, "layout_p": 0, "layout_d": 0,
            "mask_mode_code_d": NON_CAUSAL,
        }  # fmt: skip

    def run_known(self) -> tuple[str, ...]:
        return (
            "b", "num_qo_heads", "num_kv_heads", "head_dim", "page_size", "planned_pages",
            "planned_indices",
        )  # fmt: skip

    def run_sizes(self) -> Sequence[int]:
        chosen = self.options
        return (
            self._batch_size, chosen.num_qo_heads, chosen.num_kv_heads, chosen.head_dim_qk,
            chosen.page_size, self._max_page + 1, self._num_indices,
        )  # fmt: skip

    def _scale(self, name: str, value: object) -> float:
        return check_number(self.op, name, value, 0.0) if value is not None else self._default_scale

    @property
    def _default_scale(self) -> float:
        return float(self.options.head_dim_qk**-0.5)

    def _check_stream(self, stream: object) -> None:
        if not self.device.is_cuda:
            return
        handle = self.stream(stream)
        with cuda.current(self.device):
            if cuda.is_capturing(handle):
                raise self.refuse("stream", "one that is capturing a graph", "no capture")
            if not cuda.waits_for_default(handle):
                expected = "one that waits for the legacy default stream, where a counter is reset"
                raise self.refuse("stream", "one made with cudaStreamNonBlocking", expected)

    def _put_prefill(
        self, values: Values, q: TensorLike, k: TensorLike, v: TensorLike, tmp: TensorLike,
        layout: str, causal: bool, mask: Any,
    ) -> None:  # fmt: skip
        chosen, given = self.options, {"q_p": q, "k_p": k, "v_p": v, "tmp_p": tmp}
        descs = {name: as_desc(tensor, self.op, name) for name, tensor in given.items()}
        for name in ("q_p", "k_p", "v_p"):
            if len(descs[name].shape) != 3 or 0 in descs[name].shape:
                expected = "rank 3, and tokens, heads and elements of at least 1"
                raise self.refuse(name, descs[name].layout, expected)
        for name in ("k_p", "v_p"):
            descs[name] = as_nhd(descs[name], layout)
        qo_len, kv_len = descs["q_p"].shape[0], descs["k_p"].shape[0]
        is_causal = check_flag(self.op, "causal_p", causal)
        if is_causal and kv_len < qo_len:
            expected = f"{qo_len} keys or more for {qo_len} causal queries"
            raise self.refuse("k_p", descs["k_p"].layout, expected)
        packed = self._mask(mask, is_causal, qo_len, kv_len)
        heads = chosen.num_qo_heads, chosen.num_kv_heads
        need = prefill_bytes(qo_len, kv_len, *heads, chosen.head_dim_vo, self.machine[0])
        have = descs["tmp_p"].span_bytes
        if have < need:
            expected = f"{need} bytes or more, as single_prefill_workspace_size tells"
            raise self.refuse("tmp_p", f"{have} bytes", expected)
        mode = CUSTOM if packed else CAUSAL if is_causal else NON_CAUSAL
        values.put(**descs, maybe_custom_mask_p=packed, mask_mode_code_p=mode)

    def _mask(self, mask: Any, is_causal: bool, qo_len: int, kv_len: int) -> TensorDesc | None:
        if mask is None:
            return None
        desc, need = as_desc(mask, self.op, "custom_mask_p"), (qo_len * kv_len + 7) // 8
        if is_causal:
            raise self.refuse("causal_p", True, "False with custom_mask_p")
        if desc.shape != (need,):
            raise self.refuse("custom_mask_p", desc.layout, f"{need} bytes: see pack_custom_mask")
        return desc

    def _pod_module(self, window_left_p: int) -> str:
        from fi_ffi.loader.uris import uri  # as late as can be: it has a large table

        kernel = self.options.kernel
        return uri(
            "pod", release=release(), dtype_q=SHORT[kernel.q_data_type],
            dtype_kv=SHORT[kernel.kv_data_type], dtype_o=SHORT[kernel.o_data_type],
            head_dim=kernel.head_dim_qk, use_sliding_window_p=window_left_p >= 0,
            use_sliding_window_d=self.options.window_left >= 0,
        )  # fmt: skip
