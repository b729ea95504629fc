"""Generated from the op table by tools/generate_stubs.py."""

from typing import Literal

from fi_ffi.abi.interop import TensorLike
from fi_ffi.ops.op import Op

OPS: dict[str, Op]

class _rmsnorm(Op):
    def __call__(
        self,
        out: TensorLike,
        input: TensorLike,
        weight: TensorLike,
        eps: float = 1e-06,
        enable_pdl: bool = False,
        *,
        stream: object = None,
    ) -> None:
        """RMS-normalise rows: `out = input / sqrt(mean(input**2) + eps) * weight`.

        Args:
            out ([n, h] T; written): may be `input` itself.
            input ([n, h] T): rows to normalise.
            weight ([h] T): scale of each column.
            eps (float = 1e-06, 0.0 or more): added to the mean square before the root.
            enable_pdl (bool = False): programmatic dependent launch (SM90 and later): start while the
                previous kernel drains.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        T is float16 or bfloat16. All tensors are on one device. The last axis has stride 1. Tensors
        with h are loaded gcd(16 bytes / the itemsize of T, h) elements at a time: addresses and the
        other strides are multiples of that. Offsets stay below 4294967296 elements. With no rows,
        nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `rmsnorm` of module `norm`, FlashInfer >=0.6.3, `csrc/flashinfer_norm_binding.cu`.
        """

rmsnorm: _rmsnorm

class _qk_rmsnorm(Op):
    def __call__(
        self,
        out: TensorLike,
        input: TensorLike,
        weight: TensorLike,
        eps: float = 1e-06,
        enable_pdl: bool = False,
        *,
        stream: object = None,
    ) -> None:
        """RMS-normalise the last axis of a 3-D tensor, one warp for each (token, head).

        Args:
            out ([n, k, h] T; written): may be `input` itself.
            input ([n, k, h] T): (tokens, heads, head_dim).
            weight ([h] T): scale of each column.
            eps (float = 1e-06, 0.0 or more): added to the mean square before the root.
            enable_pdl (bool = False): programmatic dependent launch (SM90 and later): start while the
                previous kernel drains.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        T is float16 or bfloat16. All tensors are on one device. The last axis has stride 1. Tensors
        with h are loaded gcd(16 bytes / the itemsize of T, h) elements at a time: addresses and the
        other strides are multiples of that. Offsets stay below 4294967296 elements. With no rows,
        nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `rmsnorm` of module `norm`, FlashInfer >=0.6.3, `csrc/flashinfer_norm_binding.cu`.
        """

qk_rmsnorm: _qk_rmsnorm

class _gemma_rmsnorm(Op):
    def __call__(
        self,
        out: TensorLike,
        input: TensorLike,
        weight: TensorLike,
        eps: float = 1e-06,
        enable_pdl: bool = False,
        *,
        stream: object = None,
    ) -> None:
        """RMS-normalise rows, Gemma's way: `out = input / rms(input) * (1 + weight)`.

        Args:
            out ([n, h] T; written): may be `input` itself.
            input ([n, h] T): rows to normalise.
            weight ([h] T): scale of each column.
            eps (float = 1e-06, 0.0 or more): added to the mean square before the root.
            enable_pdl (bool = False): programmatic dependent launch (SM90 and later): start while the
                previous kernel drains.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        T is float16 or bfloat16. All tensors are on one device. The last axis has stride 1. Tensors
        with h are loaded gcd(16 bytes / the itemsize of T, h) elements at a time: addresses and the
        other strides are multiples of that. Offsets stay below 4294967296 elements. With no rows,
        nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `gemma_rmsnorm` of module `norm`, FlashInfer >=0.6.3, `csrc/flashinfer_norm_binding.cu`.
        """

gemma_rmsnorm: _gemma_rmsnorm

class _fused_add_rmsnorm(Op):
    def __call__(
        self,
        input: TensorLike,
        residual: TensorLike,
        weight: TensorLike,
        eps: float = 1e-06,
        enable_pdl: bool = False,
        *,
        stream: object = None,
    ) -> None:
        """In place: `residual += input`, then `input = residual / rms(residual) * weight`.

        Args:
            input ([n, h] T; written): gets the normalised rows.
            residual ([n, h] T; written): gets `input + residual`, rounded to T.
            weight ([h] T): scale of each column.
            eps (float = 1e-06, 0.0 or more): added to the mean square before the root.
            enable_pdl (bool = False): programmatic dependent launch (SM90 and later): start while the
                previous kernel drains.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        T is float16 or bfloat16. All tensors are on one device. The last axis has stride 1. Tensors
        with h are loaded gcd(16 bytes / the itemsize of T, h) elements at a time: addresses and the
        other strides are multiples of that. Offsets stay below 4294967296 elements. With no rows,
        nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `fused_add_rmsnorm` of module `norm`, FlashInfer >=0.6.3,
        `csrc/flashinfer_norm_binding.cu`.
        """

fused_add_rmsnorm: _fused_add_rmsnorm

class _gemma_fused_add_rmsnorm(Op):
    def __call__(
        self,
        input: TensorLike,
        residual: TensorLike,
        weight: TensorLike,
        eps: float = 1e-06,
        enable_pdl: bool = False,
        *,
        stream: object = None,
    ) -> None:
        """In place: `residual += input`, then `input = residual / rms(residual) * (1 + weight)`.

        Args:
            input ([n, h] T; written): gets the normalised rows.
            residual ([n, h] T; written): gets `input + residual`, rounded to T.
            weight ([h] T): scale of each column.
            eps (float = 1e-06, 0.0 or more): added to the mean square before the root.
            enable_pdl (bool = False): programmatic dependent launch (SM90 and later): start while the
                previous kernel drains.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        T is float16 or bfloat16. All tensors are on one device. The last axis has stride 1. Tensors
        with h are loaded gcd(16 bytes / the itemsize of T, h) elements at a time: addresses and the
        other strides are multiples of that. Offsets stay below 4294967296 elements. With no rows,
        nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `gemma_fused_add_rmsnorm` of module `norm`, FlashInfer >=0.6.3,
        `csrc/flashinfer_norm_binding.cu`.
        """

gemma_fused_add_rmsnorm: _gemma_fused_add_rmsnorm

class _rmsnorm_quant(Op):
    def __call__(
        self,
        out: TensorLike,
        input: TensorLike,
        weight: TensorLike,
        scale: TensorLike,
        eps: float = 1e-06,
        enable_pdl: bool = False,
        *,
        stream: object = None,
    ) -> None:
        """RMS-normalise rows and quantise: `out = fp8(input / rms(input) * weight / scale)`.

        Args:
            out ([n, h] O; written): quantised rows.
            input ([n, h] T): rows to normalise.
            weight ([h] T): scale of each column.
            scale ([1] float32): the output is divided by it, then clamped to ±448.
            eps (float = 1e-06, 0.0 or more): added to the mean square before the root.
            enable_pdl (bool = False): programmatic dependent launch (SM90 and later): start while the
                previous kernel drains.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        T is float16 or bfloat16; O is float8_e4m3fn or float8_e5m2. All tensors are on one device. The
        last axis has stride 1. Tensors with h are loaded gcd(16 bytes / the itemsize of T, h) elements
        at a time: addresses and the other strides are multiples of that. Offsets stay below 4294967296
        elements. With no rows, nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `rmsnorm_quant` of module `norm`, FlashInfer >=0.6.7,<0.6.16,
        `csrc/flashinfer_norm_binding.cu`.
        """

rmsnorm_quant: _rmsnorm_quant

class _fused_add_rmsnorm_quant(Op):
    def __call__(
        self,
        out: TensorLike,
        input: TensorLike,
        residual: TensorLike,
        weight: TensorLike,
        scale: TensorLike,
        eps: float = 1e-06,
        enable_pdl: bool = False,
        *,
        stream: object = None,
    ) -> None:
        """`residual += input`, then `out = fp8(residual / rms(residual) * weight / scale)`.

        Args:
            out ([n, h] O; written): quantised rows.
            input ([n, h] T): added to the residual.
            residual ([n, h] T; written): gets `input + residual`, rounded to T.
            weight ([h] T): scale of each column.
            scale ([1] float32): the output is divided by it, then clamped to ±448.
            eps (float = 1e-06, 0.0 or more): added to the mean square before the root.
            enable_pdl (bool = False): programmatic dependent launch (SM90 and later): start while the
                previous kernel drains.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        T is float16 or bfloat16; O is float8_e4m3fn or float8_e5m2. All tensors are on one device. The
        last axis has stride 1. Tensors with h are loaded gcd(16 bytes / the itemsize of T, h) elements
        at a time: addresses and the other strides are multiples of that. Offsets stay below 4294967296
        elements. With no rows, nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `fused_add_rmsnorm_quant` of module `norm`, FlashInfer >=0.6.7,<0.6.16,
        `csrc/flashinfer_norm_binding.cu`.
        """

fused_add_rmsnorm_quant: _fused_add_rmsnorm_quant

class _layernorm(Op):
    def __call__(
        self,
        out: TensorLike,
        input: TensorLike,
        gamma: TensorLike,
        beta: TensorLike,
        eps: float = 1e-06,
        *,
        stream: object = None,
    ) -> None:
        """Layer-normalise rows: `out = (input - mean) / sqrt(variance + eps) * gamma + beta`.

        Args:
            out ([n, h] T; contiguous; written): normalised rows.
            input ([n, h] T; contiguous): rows to normalise.
            gamma ([h] float32): scale of each column.
            beta ([h] float32): shift of each column.
            eps (float = 1e-06, 0.0 or more): added to the mean square before the root.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        T is bfloat16. All tensors are on one device. The last axis has stride 1. Tensors with h are
        loaded gcd(4 bytes / the itemsize of T, h) elements at a time: addresses and the other strides
        are multiples of that. Offsets stay below 2147483648 elements. With no rows, nothing is
        launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `layernorm` of module `norm`, FlashInfer >=0.6.3, `csrc/flashinfer_norm_binding.cu`.
        """

layernorm: _layernorm

class _append_paged_kv_cache(Op):
    def __call__(
        self,
        append_key: TensorLike,
        append_value: TensorLike,
        batch_indices: TensorLike,
        positions: TensorLike,
        paged_k_cache: TensorLike,
        paged_v_cache: TensorLike,
        kv_indices: TensorLike,
        kv_indptr: TensorLike,
        kv_last_page_len: TensorLike,
        kv_layout: Literal['NHD', 'HND'] = 'NHD',
        *,
        stream: object = None,
    ) -> None:
        """Write new tokens' keys and values to their places in a paged cache.

        Args:
            append_key ([nnz, num_kv_heads, head_dim] T): keys of the new tokens.
            append_value ([nnz, num_kv_heads, head_dim] T): values of the new tokens.
            batch_indices ([nnz] int32; contiguous): the request of each new token.
            positions ([nnz] int32; contiguous): its place in the request, from 0.
            paged_k_cache ([num_pages, page_size, num_kv_heads, head_dim] T; written; here in NHD):
                keys; in one tensor with the values: see `split_paged_kv_cache`.
            paged_v_cache ([num_pages, page_size, num_kv_heads, head_dim] T; written; here in NHD):
                values.
            kv_indices ([num_indices] int32; contiguous): the pages of all requests, in order.
            kv_indptr ([b+1] int32; contiguous): where each request's pages start in `kv_indices`.
            kv_last_page_len ([b] int32; contiguous): tokens in each request's last page.
            kv_layout (str = 'NHD'): "NHD" (tokens, heads, head_dim) or "HND" (heads, tokens, head_dim).
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        T is float16 or bfloat16 or float8_e4m3fn or float8_e5m2. All tensors are on one device. The
        last axis has stride 1. Tensors with head_dim are loaded gcd(16 bytes / its own itemsize,
        head_dim) elements at a time: addresses and the other strides are multiples of that. head_dim is
        64 or 128 or 256 or 512. num_kv_heads * the threads that share head_dim (one for each 16 bytes,
        32 at most) is at most 1024. Strides of paged_k_cache and paged_v_cache stay below 4294967296
        elements. paged_k_cache and paged_v_cache have the same strides. nnz is at most 2147482624.
        num_indices * page_size is at most 4294967296. With nnz = 0, nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `append_paged_kv_cache` of module `page`, FlashInfer >=0.6.3,
        `csrc/flashinfer_page_binding.cu`.
        """

append_paged_kv_cache: _append_paged_kv_cache

class _append_paged_mla_kv_cache(Op):
    def __call__(
        self,
        append_ckv: TensorLike,
        append_kpe: TensorLike,
        batch_indices: TensorLike,
        positions: TensorLike,
        ckv_cache: TensorLike,
        kpe_cache: TensorLike,
        kv_indices: TensorLike,
        kv_indptr: TensorLike,
        kv_last_page_len: TensorLike,
        *,
        stream: object = None,
    ) -> None:
        """Write new tokens' compressed keys and values to their places in a paged MLA cache.

        Args:
            append_ckv ([nnz, head_dim_ckv] T): compressed keys and values.
            append_kpe ([nnz, head_dim_kpe] T): keys' part with the position encoding.
            batch_indices ([nnz] int32; contiguous): the request of each new token.
            positions ([nnz] int32; contiguous): its place in the request, from 0.
            ckv_cache ([num_pages, page_size, head_dim_ckv] T; written): cache of `append_ckv`.
            kpe_cache ([num_pages, page_size, head_dim_kpe] T; written): cache of `append_kpe`.
            kv_indices ([num_indices] int32; contiguous): the pages of all requests, in order.
            kv_indptr ([b+1] int32; contiguous): where each request's pages start in `kv_indices`.
            kv_last_page_len ([b] int32; contiguous): tokens in each request's last page.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        T is float16 or bfloat16 or float8_e4m3fn or float8_e5m2. All tensors are on one device. The
        last axis has stride 1. Tensors with head_dim_ckv or head_dim_kpe are loaded gcd(16 bytes / its
        own itemsize, head_dim_ckv or head_dim_kpe) elements at a time: addresses and the other strides
        are multiples of that. head_dim_ckv is 512. head_dim_kpe is 64. Strides of ckv_cache and
        kpe_cache stay below 4294967296 elements. nnz is at most 2147482624. num_indices * page_size is
        at most 4294967296. With nnz = 0, nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `append_paged_mla_kv_cache` of module `page`, FlashInfer >=0.6.3,
        `csrc/flashinfer_page_binding.cu`.
        """

append_paged_mla_kv_cache: _append_paged_mla_kv_cache

class _gdn_prefill(Op):
    def __call__(
        self,
        output: TensorLike,
        output_state: TensorLike,
        q: TensorLike,
        k: TensorLike,
        v: TensorLike,
        cu_seqlens: TensorLike,
        input_state: TensorLike | None = None,
        alpha: TensorLike | None = None,
        beta: TensorLike | None = None,
        scale: float = 0.0,
        workspace_buffer: TensorLike | None = None,
        state_checkpoints: TensorLike | None = None,
        checkpoint_cu_starts: TensorLike | None = None,
        checkpoint_every_n_tokens: int = 0,
        *,
        stream: object = None,
    ) -> None:
        """The gated delta rule over ragged sequences, a state for each head: for every token `state *=
        alpha`, `state += beta * outer(v - state @ k, k)`, `output = scale * state @ q`. Heads are those
        of q (GQA: q's are a multiple of k's and v's) or of v (GVA: v's are a multiple of q's and k's),
        whichever are more.

        Args:
            output ([total_seq_len, num_sab_heads, head_size] T; contiguous; written): what the tokens
                read.
            output_state ([num_seqs, num_sab_heads, head_size, head_size] float32; contiguous; written):
                the state after each sequence, as [value, key]; may be `input_state` itself.
            q ([total_seq_len, num_q_heads, head_size] T; contiguous): queries, of length 1 as a rule;
                all sequences' tokens one after another.
            k ([total_seq_len, num_k_heads, head_size] T; contiguous): keys, of length 1.
            v ([total_seq_len, num_v_heads, head_size] T; contiguous): values.
            cu_seqlens ([num_seqs+1] int64; contiguous): where each sequence starts, and the end: from
                0, and rising, for the kernel never ends on a sequence without tokens; see
                `fi_ffi.cu_seqlens`.
            input_state ([num_seqs, num_sab_heads, head_size, head_size] float32; contiguous; or None):
                the state before each sequence, as [value, key]; zero where there is none.
            alpha ([total_seq_len, num_sab_heads] float32; contiguous; or None): how much of the state
                is kept before a token, 0 to 1 (not its logarithm); 1.
            beta ([total_seq_len, num_sab_heads] float32; contiguous; or None): how much of a token is
                written, 0 to 1; 1.
            scale (float = 0.0, 0.0 or more): of the output; 0.0 means 1 / sqrt(head_size).
            workspace_buffer ([workspace_size] uint8; contiguous; written; or None; aligned to 128
                bytes): scratch of `gdn_prefill_workspace_size()` bytes that no other stream uses;
                without it each stream has its own of fi_ffi's.
            state_checkpoints ([total_checkpoints, num_sab_heads, head_size, head_size] float32;
                contiguous; written; or None): states on the way, as [value, key].
            checkpoint_cu_starts ([num_seqs+1] int64; contiguous; or None): where each sequence's
                checkpoints start: see `fi_ffi.checkpoint_cu_starts`.
            checkpoint_every_n_tokens (int = 0, 0 or more, a multiple of 64): tokens between
                checkpoints; 0 for none.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        T is float16 or bfloat16. All tensors are on one device. The last axis has stride 1. Tensors
        with head_size are loaded gcd(16 bytes / its own itemsize, head_size) elements at a time:
        addresses and the other strides are multiples of that. head_size is 128. num_sab_heads is the
        max of num_q_heads and num_v_heads. num_k_heads is the min of num_q_heads and num_v_heads.
        num_sab_heads is a multiple of num_k_heads. total_seq_len is at least num_seqs. num_seqs *
        num_sab_heads is at most 2147483647. total_seq_len is at most 2147483647. Of output_state and
        input_state there are at most 2147483648 elements. state_checkpoints, checkpoint_cu_starts,
        checkpoint_every_n_tokens are given together. What is written shares no memory with other
        tensors; output_state and input_state may be one. With num_seqs = 0, nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words,
        `ArchitectureError` on GPUs other than of compute capability 9.x.

        Kernel: `gdn_prefill` of module `gdn_prefill_sm90`, FlashInfer >=0.6.8,<0.6.14,
        `csrc/gdn_prefill_launcher.cu`.
        """

gdn_prefill: _gdn_prefill
