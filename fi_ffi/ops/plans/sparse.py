"""Block-sparse attention: a prefill whose requests are rows of blocks and whose pages are columns.

With `BlockSparseAttentionPlan` all heads have the same blocks. With
`VariableBlockSparseAttentionPlan` each key head has its own rows, columns and blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fi_ffi.abi.interop import TensorLike, as_desc
from fi_ffi.abi.tensor import TensorDesc, make_desc
from fi_ffi.ops.attention.arrays import Batch, Indptr, host_ints
from fi_ffi.ops.attention.options import check_keywords
from fi_ffi.ops.attention.prefill import BatchPrefillPlan
from fi_ffi.ops.call.arguments import INT32_MAX, Refusal, check_int
from fi_ffi.ops.on_host import host_array
from fi_ffi.ops.plans.arguments import NotOf, SparseKeywords, check_heads, described
from fi_ffi.ops.plans.masks import pack_custom_mask

if TYPE_CHECKING:
    import numpy
    import numpy.typing
    from typing_extensions import Unpack

    from fi_ffi.ops.plans.masks import Bytes

    _Array = numpy.ndarray[Any, numpy.dtype[Any]]


def pack_block_mask(mask: numpy.typing.ArrayLike, indptr: TensorLike, M: int) -> Bytes:
    """Pack boolean blocks [nnz, R, C] into a `custom_mask`; True if a query of a block sees a key.

    Blocks are in the order of a `BlockSparseAttentionPlan`'s `indices`. `indptr` is the plan's, and
    assigns them to rows of blocks. In the last row of blocks, the rows from `M` on are dropped.

    Raises `ArgumentError` if the number of blocks is not `indptr[-1]`.
    """
    import numpy as np

    refuse = Refusal("pack_block_mask")
    blocks = host_array(refuse.op, "mask", mask, "an array on the host")
    rows = Indptr(refuse.op, "indptr", indptr)
    if blocks.dtype != np.bool_ or blocks.ndim != 3 or len(blocks) != rows.total:
        got = f"{blocks.dtype} of shape {blocks.shape}"
        raise refuse("mask", got, f"bool of shape ({rows.total}, R, C)")
    height = blocks.shape[1]
    if not (rows.size - 1) * height < check_int(refuse.op, "M", M, 1) <= rows.size * height:
        raise refuse("M", M, f"a number that needs {rows.size} rows of blocks of {height}")
    parts = np.split(blocks, rows.view.tolist()[1:-1])
    return pack_custom_mask(
        [part.swapaxes(0, 1).reshape(height, -1)[: M - i * height] for i, part in enumerate(parts)]
    )


class BlockSparseAttentionPlan(BatchPrefillPlan):
    """Attention whose mask is a block-sparse matrix of M rows (queries) and N columns (keys).

    Args:
        indptr: [ceil(M / R) + 1] int32 on the host: where each row of blocks starts in `indices`.
        indices: [indptr[-1] or more] int32 on the host: column numbers of blocks, below N / C.
        M: number of queries.
        N: number of keys, a multiple of C.
        R, C: rows and columns of a block.
        num_qo_heads, num_kv_heads: heads of q, and of k and v.
        head_dim: size of a head.
        options: those of `BatchPrefillPlan` named `q_data_type`, `kv_data_type`, `o_data_type`,
            `backend`, `logits_soft_cap`, `use_fp16_qk_reduction` and `disable_split_kv`; and
            `use_custom_mask` if runs pass a mask inside the blocks (`pack_block_mask`).
        device, workspace, stream: as in `BatchPrefillPlan`.

    Raises as `BatchPrefillPlan` does.
    Upstream: flashinfer/sparse.py (BlockSparseAttentionWrapper), csrc/batch_prefill.cu.
    """

    op = "BlockSparseAttentionPlan"
    _run_methods: Sequence[str] = ("run",)
    ragged_run: Any = NotOf()

    def __init__(
        self,
        indptr: TensorLike,
        indices: TensorLike,
        *,
        M: int,
        N: int,
        R: int,
        C: int,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        **options: Unpack[SparseKeywords],
    ) -> None:
        for name, size in (("M", M), ("N", N), ("R", R), ("C", C)):
            check_int(self.op, name, size, 1)
        if N % C:
            raise self._refuse("N", N, f"a multiple of C = {C}")
        self.M, self.N, self.R, self.C = M, N, R, C
        check_keywords(self.op, SparseKeywords.__annotations__, options)
        super().__init__(
            **self._arrays(indptr, indices),
            page_size=C,
            num_qo_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            head_dim_qk=head_dim,
            **options,
        )

    def _arrays(self, indptr: TensorLike, indices: TensorLike) -> dict[str, Any]:
        """Describe the matrix as a batch: a request for each row of blocks."""
        rows = -(-self.M // self.R)
        return {
            "qo_indptr": host_ints([*range(0, self.M, self.R), self.M]),
            "paged_kv_indptr": indptr,
            "paged_kv_indices": indices,
            "paged_kv_last_page_len": host_ints([self.C] * rows),
        }

    @property
    def _names(self) -> Mapping[str, str]:  # type: ignore[override]
        return dict(super()._names) | {"kv_indptr": "indptr", "indices": "indices"}

    def _read(self, arrays: Sequence[object]) -> Batch:
        batch = super()._read(arrays)
        if batch.num_pages > self.N // self.C:
            expected = f"columns of blocks below N / C = {self.N // self.C}"
            raise self._refuse("indices", batch.max_page, expected)
        return batch

    def replan(  # type: ignore[override]
        self, indptr: TensorLike, indices: TensorLike, *, stream: object = None
    ) -> None:
        """Plan other blocks of a matrix of the same size, in the same workspace."""
        super().replan(**self._arrays(indptr, indices), stream=stream)

    def run(
        self,
        q: TensorLike,
        k: TensorLike,
        v: TensorLike,
        o: TensorLike,
        lse: TensorLike | None = None,
        *,
        stream: object = None,
        **options: Any,
    ) -> None:
        """Compute the attention of `q` over its blocks of `k` and `v` into `o`, on `stream`.

        Args:
            q: [M, num_qo_heads, head_dim].
            k, v: [N, num_kv_heads, head_dim], with the same strides.
            o: as q, written.
            lse: [M, num_qo_heads] float32, written: log2 of the sum of exponentials.
            options: of `BatchPrefillPlan.paged_run`: `custom_mask`, `sm_scale` and the scales.
        """
        pages = []
        for name, desc in described(self.op, k=k, v=v).items():
            if len(desc.shape) != 3 or desc.shape[0] != self.N:
                raise self._refuse(name, desc.layout, f"rank 3, and N = {self.N} rows, as planned")
            shape = (self.N // self.C, self.C, *desc.shape[1:])
            pages.append(_viewed(desc, shape, (self.C * desc.strides[0], *desc.strides)))
        super().paged_run(q, pages[0], pages[1], o, lse, stream=stream, **options)

    paged_run: Any = NotOf()


class VariableBlockSparseAttentionPlan(BatchPrefillPlan):
    """Attention whose mask is made of blocks of any sizes, different for each key head.

    Args:
        block_mask_map: [num_kv_heads, MB, NB] bool on the host: which blocks exist.
        block_row_sz: [num_kv_heads, MB] integers on the host: queries of each row of blocks.
        block_col_sz: [num_kv_heads, NB] integers on the host: keys of each column of blocks. Both
            arrays have the same sum for every head.
        num_qo_heads, num_kv_heads: heads of q, and of k and v.
        head_dim: size of a head.
        options: as in `BlockSparseAttentionPlan`.
        device, workspace, stream: as in `BatchPrefillPlan`.

    Raises as `BatchPrefillPlan` does.
    Upstream: flashinfer/sparse.py (VariableBlockSparseAttentionWrapper), csrc/batch_prefill.cu.
    """

    op = "VariableBlockSparseAttentionPlan"
    _run_methods: Sequence[str] = ("run",)
    ragged_run: Any = NotOf()

    def __init__(
        self,
        block_mask_map: numpy.typing.ArrayLike,
        block_row_sz: numpy.typing.ArrayLike,
        block_col_sz: numpy.typing.ArrayLike,
        *,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        **options: Unpack[SparseKeywords],
    ) -> None:
        self.group = check_heads(self.op, num_qo_heads, num_kv_heads)
        self.num_kv_heads = num_kv_heads
        check_keywords(self.op, SparseKeywords.__annotations__, options)
        arrays, lens = self._arrays(block_mask_map, block_row_sz, block_col_sz)
        # Each key head becomes MB requests with one key head and `group` query heads.
        super().__init__(
            **arrays,
            page_size=1,
            num_qo_heads=self.group,
            num_kv_heads=1,
            head_dim_qk=head_dim,
            **options,
        )
        self.qo_len, self.kv_len = lens

    def _arrays(self, mask: Any, rows: Any, columns: Any) -> tuple[dict[str, Any], tuple[int, int]]:
        """Describe the mask as a batch, a request for each row of blocks of each head and pages of
        one key; return each head's numbers of queries and of keys, too."""
        import numpy as np

        heads = self.num_kv_heads
        blocks = _host(self.op, "block_mask_map", mask, (heads, None, None), "b")
        row_sizes = _host(self.op, "block_row_sz", rows, (heads, blocks.shape[1]), "iu")
        sizes = _host(self.op, "block_col_sz", columns, (heads, blocks.shape[2]), "iu")
        for name, each in (("block_row_sz", row_sizes), ("block_col_sz", sizes)):
            totals = each.sum(axis=1, dtype=np.int64)
            if each.min() < 0 or totals.min() != totals.max() or totals[0] * heads > INT32_MAX:
                expected = "sizes of 0 or more that add up to the same for every head, below 2**31"
                raise self._refuse(name, f"sums {totals.tolist()}", expected)
        ends = np.cumsum(sizes, axis=None)
        starts = (ends - sizes.ravel()).reshape(sizes.shape)
        chosen = np.nonzero(blocks)
        lengths = sizes[chosen[0], chosen[2]].astype(np.int64)
        first = np.cumsum(lengths) - lengths
        indices = np.repeat(starts[chosen[0], chosen[2]] - first, lengths)
        indices = indices + np.arange(len(indices))
        counts = (blocks * sizes[:, None]).sum(axis=2, dtype=np.int64).ravel()
        each_start = np.concatenate(([0], np.cumsum(row_sizes, axis=None)))
        arrays = {
            "qo_indptr": each_start.astype(np.int32),
            "paged_kv_indptr": np.concatenate(([0], np.cumsum(counts))).astype(np.int32),
            "paged_kv_indices": indices.astype(np.int32),
            "paged_kv_last_page_len": np.ones(len(counts), np.int32),
        }
        return arrays, (int(row_sizes[0].sum()), int(sizes[0].sum()))

    def replan(  # type: ignore[override]
        self,
        block_mask_map: numpy.typing.ArrayLike,
        block_row_sz: numpy.typing.ArrayLike,
        block_col_sz: numpy.typing.ArrayLike,
        *,
        stream: object = None,
    ) -> None:
        """Plan other blocks with the same options, in the same workspace."""
        arrays, lens = self._arrays(block_mask_map, block_row_sz, block_col_sz)
        super().replan(**arrays, stream=stream)
        self.qo_len, self.kv_len = lens

    def run(
        self,
        q: TensorLike,
        k: TensorLike,
        v: TensorLike,
        o: TensorLike,
        lse: TensorLike | None = None,
        *,
        stream: object = None,
        **options: Any,
    ) -> None:
        """Compute the attention of `q` over its blocks of `k` and `v` into `o`, on `stream`.

        All tensors are contiguous, with the key heads as first axis.

        Args:
            q: [num_kv_heads, qo_len, num_qo_heads / num_kv_heads, head_dim]: query heads that share
                a key head are adjacent. FlashInfer makes this layout by a copy.
            k, v: [num_kv_heads, kv_len, head_dim].
            o: as q, written.
            lse: [num_kv_heads, qo_len, num_qo_heads / num_kv_heads] float32, written: log2 of the
                sum of exponentials.
            options: of `BatchPrefillPlan.paged_run`: `sm_scale`, and scales that are numbers.
        """
        heads, queries, keys = self.num_kv_heads, self.qo_len, self.kv_len
        group, dim = self.group, self.options.head_dim_qk
        of_rows, of_keys = (heads, queries, group), (heads, keys, dim)
        rows, pages = (heads * queries, group), (heads * keys, 1, 1, dim)
        views = [
            self._flat("q", q, (*of_rows, dim), (*rows, dim)),
            self._flat("k", k, of_keys, pages),
            self._flat("v", v, of_keys, pages),
            self._flat("o", o, (*of_rows, dim), (*rows, dim)),
        ]
        if lse is not None:
            views.append(self._flat("lse", lse, of_rows, rows))
        super().paged_run(*views, stream=stream, **options)

    def _flat(
        self, name: str, tensor: TensorLike, shape: tuple[int, ...], flat: tuple[int, ...]
    ) -> TensorDesc:
        desc = as_desc(tensor, self.op, name)
        if desc.shape != shape or not desc.is_contiguous:
            raise self._refuse(name, desc.layout, f"shape {shape}, contiguous, as planned")
        return _viewed(desc, flat, None)

    paged_run: Any = NotOf()


def _viewed(
    desc: TensorDesc, shape: tuple[int, ...], strides: tuple[int, ...] | None
) -> TensorDesc:
    """View the same memory with other axes."""
    return make_desc(desc.ptr, shape, desc.dtype, strides, desc.device, desc.readonly, desc)


def _host(op: str, name: str, value: Any, shape: tuple[int | None, ...], kinds: str) -> _Array:
    """Read a host array of these kinds of elements and this shape; None stands for any size but
    0."""
    array = host_array(op, name, value, "an array on the host")
    fits = len(array.shape) == len(shape) and all(
        have == want or (want is None and have)
        for have, want in zip(array.shape, shape, strict=True)
    )
    if not fits or array.dtype.kind not in kinds:
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        expected = f"{'booleans' if kinds == 'b' else 'integers'} of shape ({sizes})"
        raise Refusal(op)(name, f"{array.dtype} of shape {array.shape}", expected)
    return array
