"""Generated from the op table by tools/generate_stubs.py."""

from typing import Literal

from fi_ffi.abi.interop import TensorLike
from fi_ffi.ops.call.op import Op

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
        other strides are multiples of that. h is at least 1. Offsets stay below 4294967296 elements.
        With no rows, nothing is launched.

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
        other strides are multiples of that. h is at least 1. Offsets stay below 4294967296 elements.
        With no rows, nothing is launched.

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
        other strides are multiples of that. h is at least 1. Offsets stay below 4294967296 elements.
        With no rows, nothing is launched.

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
        other strides are multiples of that. h is at least 1. Offsets stay below 4294967296 elements.
        With no rows, nothing is launched.

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
        other strides are multiples of that. h is at least 1. Offsets stay below 4294967296 elements.
        With no rows, nothing is launched.

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
        at a time: addresses and the other strides are multiples of that. h is at least 1. Offsets stay
        below 4294967296 elements. With no rows, nothing is launched.

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
        at a time: addresses and the other strides are multiples of that. h is at least 1. Offsets stay
        below 4294967296 elements. With no rows, nothing is launched.

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
        are multiples of that. h is at least 1. Offsets stay below 2147483648 elements. With no rows,
        nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `layernorm` of module `norm`, FlashInfer >=0.6.3, `csrc/flashinfer_norm_binding.cu`.
        """

layernorm: _layernorm

class _fused_qk_rmsnorm_rope(Op):
    def __call__(
        self,
        qkv_in: TensorLike,
        q_weight: TensorLike,
        k_weight: TensorLike,
        q_out: TensorLike,
        k_out: TensorLike,
        v_out: TensorLike,
        num_tokens: int | None = None,
        seq_len: int = ...,
        ppf: int = ...,
        pph: int = ...,
        ppw: int = ...,
        num_frame_channels: int = ...,
        num_height_channels: int = ...,
        num_width_channels: int = ...,
        num_heads_q: int | None = None,
        num_heads_k: int | None = None,
        num_heads_v: int | None = None,
        head_dim: int | None = None,
        eps: float = 1e-06,
        base: float = 10000.0,
        interleave: bool = True,
        factor: float = 1.0,
        low: float = 0.0,
        high: float = 0.0,
        attention_factor: float = 1.0,
        is_qk_norm: bool = True,
        output_fp8: bool = False,
        output_quant_scale: float = 1.0,
        v_quant_scale: float = 1.0,
        *,
        stream: object = None,
    ) -> None:
        """RMS-normalise queries and keys over all their heads, turn them by where their patch is in a
        video, and copy values: see docs/norm_fused.md.

        Args:
            qkv_in ([n, num_heads_q+num_heads_k+num_heads_v, head_dim] T; contiguous): queries, keys and
                values of each token.
            q_weight ([num_heads_q, head_dim] T; contiguous): scales of the queries.
            k_weight ([num_heads_k, head_dim] T; contiguous): scales of the keys.
            q_out ([n, num_heads_q, head_dim] O; contiguous; written): the queries.
            k_out ([n, num_heads_k, head_dim] O; contiguous; written): the keys.
            v_out ([n, num_heads_v, head_dim] O; contiguous; written): the values.
            num_tokens (int or None = None, 0 or more, the size of n): what the tensors have.
            seq_len (int, 1 or more, 2147483647 or less): tokens of one video; token i is its token i %
                seq_len.
            ppf (int, 1 or more, 2147483647 or less): patches in time.
            pph (int, 1 or more, 2147483647 or less): patches from top to bottom.
            ppw (int, 1 or more, 2147483647 or less): patches from left to right, which follow one
                another.
            num_frame_channels (int, 0 or more, 256 or less, a multiple of 2): elements of a head that
                turn with time, the first.
            num_height_channels (int, 0 or more, 256 or less, a multiple of 2): those that turn with the
                height, the next.
            num_width_channels (int, 0 or more, 256 or less, a multiple of 2): those that turn with the
                width.
            num_heads_q (int or None = None, 0 or more, the size of num_heads_q): what the tensors have.
            num_heads_k (int or None = None, 0 or more, the size of num_heads_k): what the tensors have.
            num_heads_v (int or None = None, 0 or more, the size of num_heads_v): what the tensors have.
            head_dim (int or None = None, 0 or more, the size of head_dim): what the tensors have.
            eps (float = 1e-06, 0.0 or more): added to the mean square before the root.
            base (float = 10000.0, 1e-06 or more): pair i of c channels turns by base**(-2 * i / c) of a
                patch.
            interleave (bool = True): pairs are neighbours; or else an element, and that half a head
                further on.
            factor (float = 1.0, 1e-06 or more): YaRN's, by which slow pairs are slower; 1.0 for none.
            low (float = 0.0, 0.0 or more): the pair up to which none is slower.
            high (float = 0.0, 0.0 or more): the pair from which all are.
            attention_factor (float = 1.0, 0.0 or more): what YaRN multiplies queries and keys by.
            is_qk_norm (bool = True): whether to normalise.
            output_fp8 (bool = False): whether the outputs are float8.
            output_quant_scale (float = 1.0, 0.0 or more): what float8 queries and keys are multiplied
                by, before they are clamped to ±448.
            v_quant_scale (float = 1.0, 0.0 or more): the same of values.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        T is bfloat16; O is bfloat16 or float8_e4m3fn. All tensors are on one device. The last axis has
        stride 1. Tensors with head_dim are loaded gcd(16 bytes / the itemsize of T, head_dim) elements
        at a time: addresses and the other strides are multiples of that. head_dim is 64 or 128 or 256.
        n is at most 2147483647. num_heads_q is at most 32. num_heads_k is at most 32. num_heads_v is at
        most 32. seq_len is seq_len = ppf * pph * ppw. num_frame_channels is num_frame_channels +
        num_height_channels + num_width_channels = head_dim. attention_factor is an attention_factor of
        1.0, or a factor that is not. output_fp8 is output_fp8 where O is float8_e4m3fn, and only there.
        With no rows, nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `fused_qk_rmsnorm_rope` of module `norm`, FlashInfer >=0.6.12,
        `csrc/flashinfer_norm_binding.cu`.
        """

fused_qk_rmsnorm_rope: _fused_qk_rmsnorm_rope

class _fused_dit_gate_residual_layernorm_gamma_beta(Op):
    def __call__(
        self,
        input: TensorLike,
        residual: TensorLike,
        gate: TensorLike,
        gate_bias: TensorLike,
        gamma: TensorLike,
        beta: TensorLike,
        residual_out: TensorLike,
        norm_out: TensorLike,
        input_sf_scale: TensorLike | None = None,
        epsilon: float = 1e-06,
        *,
        stream: object = None,
    ) -> None:
        """Layer-normalise `residual_out = input * (gate + gate_bias) + residual`, then `norm_out =
        normalised * gamma + beta`.

        Args:
            input ([n, num_rows, 3072] T; contiguous; aligned to 16 bytes): what is added to the
                residual.
            residual ([n, num_rows, 3072] T; contiguous; aligned to 16 bytes): the residual.
            gate ([n, num_rows, 3072] T; one of 6 parts, side by side; aligned to 16 bytes): the gate of
                each row, a part of a table.
            gate_bias ([3072] float32; contiguous; aligned to 32 bytes): added to `gate`.
            gamma ([3072] float32; contiguous; aligned to 32 bytes): scale of each column.
            beta ([3072] float32; contiguous; aligned to 32 bytes): shift of each column.
            residual_out ([n, num_rows, 3072] T; contiguous; written; aligned to 16 bytes): the new
                residual.
            norm_out ([n, num_rows, 3072] T; contiguous; written; aligned to 16 bytes): it normalised.
            input_sf_scale ([1] float32; or None): multiplies `input`.
            epsilon (float = 1e-06, 0.0 or more): added to the variance before the root.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        T is bfloat16. All tensors are on one device. The last axis has stride 1. n is at most
        2147483647. num_rows is at most 2147483647. Offsets stay below 4294967296 elements. Of gate
        there are at most 9223372036854775808 elements. With no rows, nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `fused_dit_layernorm` of module `norm`, FlashInfer >=0.6.11,
        `csrc/flashinfer_norm_binding.cu`.
        """

fused_dit_gate_residual_layernorm_gamma_beta: _fused_dit_gate_residual_layernorm_gamma_beta

class _fused_dit_residual_layernorm_scale_shift(Op):
    def __call__(
        self,
        input: TensorLike,
        residual: TensorLike | None = None,
        scale: TensorLike = ...,
        scale_bias: TensorLike = ...,
        shift: TensorLike = ...,
        shift_bias: TensorLike = ...,
        residual_out: TensorLike = ...,
        norm_out: TensorLike = ...,
        input_sf_scale: TensorLike | None = None,
        epsilon: float = 1e-06,
        *,
        stream: object = None,
    ) -> None:
        """Layer-normalise `residual_out = input + residual`, then `norm_out = normalised * (1 + scale +
        scale_bias) + shift + shift_bias`.

        Args:
            input ([n, num_rows, 3072] T; contiguous; aligned to 16 bytes): what is added to the
                residual.
            residual ([n, num_rows, 3072] T; contiguous; or None; aligned to 16 bytes): the residual.
            scale ([n, num_rows, 3072] T; one of 6 parts, side by side; aligned to 16 bytes): the scale
                of each row, a part of a table.
            scale_bias ([3072] float32; contiguous; aligned to 32 bytes): added to `scale`.
            shift ([n, num_rows, 3072] T; one of 6 parts, side by side; aligned to 16 bytes): the shift
                of each row, a part of a table.
            shift_bias ([3072] float32; contiguous; aligned to 32 bytes): added to `shift`.
            residual_out ([n, num_rows, 3072] T; contiguous; written; aligned to 16 bytes): the new
                residual.
            norm_out ([n, num_rows, 3072] T; contiguous; written; aligned to 16 bytes): it normalised.
            input_sf_scale ([1] float32; or None): multiplies `input`.
            epsilon (float = 1e-06, 0.0 or more): added to the variance before the root.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        T is bfloat16. All tensors are on one device. The last axis has stride 1. n is at most
        2147483647. num_rows is at most 2147483647. Offsets stay below 4294967296 elements. Of scale and
        shift there are at most 9223372036854775808 elements. With no rows, nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `fused_dit_layernorm` of module `norm`, FlashInfer >=0.6.11,
        `csrc/flashinfer_norm_binding.cu`.
        """

fused_dit_residual_layernorm_scale_shift: _fused_dit_residual_layernorm_scale_shift

class _fused_dit_gate_residual_layernorm_scale_shift(Op):
    def __call__(
        self,
        input: TensorLike,
        residual: TensorLike,
        gate: TensorLike,
        gate_bias: TensorLike,
        scale: TensorLike,
        scale_bias: TensorLike,
        shift: TensorLike,
        shift_bias: TensorLike,
        residual_out: TensorLike,
        norm_out: TensorLike,
        input_sf_scale: TensorLike | None = None,
        epsilon: float = 1e-06,
        *,
        stream: object = None,
    ) -> None:
        """Layer-normalise `residual_out = input * (gate + gate_bias) + residual`, then `norm_out =
        normalised * (1 + scale + scale_bias) + shift + shift_bias`.

        Args:
            input ([n, num_rows, 3072] T; contiguous; aligned to 16 bytes): what is added to the
                residual.
            residual ([n, num_rows, 3072] T; contiguous; aligned to 16 bytes): the residual.
            gate ([n, num_rows, 3072] T; one of 6 parts, side by side; aligned to 16 bytes): the gate of
                each row, a part of a table.
            gate_bias ([3072] float32; contiguous; aligned to 32 bytes): added to `gate`.
            scale ([n, num_rows, 3072] T; one of 6 parts, side by side; aligned to 16 bytes): the scale
                of each row, a part of a table.
            scale_bias ([3072] float32; contiguous; aligned to 32 bytes): added to `scale`.
            shift ([n, num_rows, 3072] T; one of 6 parts, side by side; aligned to 16 bytes): the shift
                of each row, a part of a table.
            shift_bias ([3072] float32; contiguous; aligned to 32 bytes): added to `shift`.
            residual_out ([n, num_rows, 3072] T; contiguous; written; aligned to 16 bytes): the new
                residual.
            norm_out ([n, num_rows, 3072] T; contiguous; written; aligned to 16 bytes): it normalised.
            input_sf_scale ([1] float32; or None): multiplies `input`.
            epsilon (float = 1e-06, 0.0 or more): added to the variance before the root.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        T is bfloat16. All tensors are on one device. The last axis has stride 1. n is at most
        2147483647. num_rows is at most 2147483647. Offsets stay below 4294967296 elements. Of gate and
        scale and shift there are at most 9223372036854775808 elements. With no rows, nothing is
        launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `fused_dit_layernorm` of module `norm`, FlashInfer >=0.6.11,
        `csrc/flashinfer_norm_binding.cu`.
        """

fused_dit_gate_residual_layernorm_scale_shift: _fused_dit_gate_residual_layernorm_scale_shift

class _silu_and_mul(Op):
    def __call__(
        self,
        out: TensorLike,
        input: TensorLike,
        enable_pdl: bool = False,
        *,
        stream: object = None,
    ) -> None:
        """Gate with SiLU: `out = silu(input[:, :d]) * input[:, d:]`, silu(x) = x / (1 + exp(-x)).

        Args:
            out ([n, d] T; contiguous; written): the product; shares no memory with `input`.
            input ([n, 2*d] T; contiguous): what is activated, and beside it the other factor.
            enable_pdl (bool = False): programmatic dependent launch (SM90 and later): start while the
                previous kernel drains.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        T is float16 or bfloat16. All tensors are on one device. The last axis has stride 1. Tensors
        with d are loaded gcd(16 bytes / the itemsize of T, d) elements at a time: addresses and the
        other strides are multiples of that. d is a multiple of 8. d is at least 1. n is at most
        2147483647. d is at most 1073741823. With no rows, nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `silu_and_mul` of module `silu_and_mul`, FlashInfer >=0.6.3,<0.7.2, `jit/activation.py`.
        """

silu_and_mul: _silu_and_mul

class _gelu_and_mul(Op):
    def __call__(
        self,
        out: TensorLike,
        input: TensorLike,
        enable_pdl: bool = False,
        *,
        stream: object = None,
    ) -> None:
        """Gate with GELU: `out = gelu(input[:, :d]) * input[:, d:]`, gelu(x) = x / 2 * (1 + erf(x /
        sqrt(2))).

        Args:
            out ([n, d] T; contiguous; written): the product; shares no memory with `input`.
            input ([n, 2*d] T; contiguous): what is activated, and beside it the other factor.
            enable_pdl (bool = False): programmatic dependent launch (SM90 and later): start while the
                previous kernel drains.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        T is float16 or bfloat16. All tensors are on one device. The last axis has stride 1. Tensors
        with d are loaded gcd(16 bytes / the itemsize of T, d) elements at a time: addresses and the
        other strides are multiples of that. d is a multiple of 8. d is at least 1. n is at most
        2147483647. d is at most 1073741823. With no rows, nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `gelu_and_mul` of module `gelu_and_mul`, FlashInfer >=0.6.3,<0.7.2, `jit/activation.py`.
        """

gelu_and_mul: _gelu_and_mul

class _gelu_tanh_and_mul(Op):
    def __call__(
        self,
        out: TensorLike,
        input: TensorLike,
        enable_pdl: bool = False,
        *,
        stream: object = None,
    ) -> None:
        """Gate with GELU's approximation by tanh: `out = gelu(input[:, :d]) * input[:, d:]`, gelu(x) = x /
        2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3))).

        Args:
            out ([n, d] T; contiguous; written): the product; shares no memory with `input`.
            input ([n, 2*d] T; contiguous): what is activated, and beside it the other factor.
            enable_pdl (bool = False): programmatic dependent launch (SM90 and later): start while the
                previous kernel drains.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        T is float16 or bfloat16. All tensors are on one device. The last axis has stride 1. Tensors
        with d are loaded gcd(16 bytes / the itemsize of T, d) elements at a time: addresses and the
        other strides are multiples of that. d is a multiple of 8. d is at least 1. n is at most
        2147483647. d is at most 1073741823. With no rows, nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `gelu_tanh_and_mul` of module `gelu_tanh_and_mul`, FlashInfer >=0.6.3,<0.7.2,
        `jit/activation.py`.
        """

gelu_tanh_and_mul: _gelu_tanh_and_mul

class _apply_rope(Op):
    def __call__(
        self,
        q: TensorLike,
        k: TensorLike,
        q_rope: TensorLike,
        k_rope: TensorLike,
        indptr: TensorLike,
        offsets: TensorLike,
        rotary_dim: int | None = None,
        interleave: bool = False,
        rope_scale: float = 1.0,
        rope_theta: float = 10000.0,
        *,
        stream: object = None,
    ) -> None:
        """Rotate q and k by their positions, the angles computed in the kernel; a request's tokens have
        positions one after another.

        Args:
            q ([nnz, num_qo_heads, head_dim] T): queries, also as slices of a fused buffer.
            k ([nnz, num_kv_heads, head_dim] T): keys; of no heads where there is nothing to do.
            q_rope ([nnz, num_qo_heads, head_dim] T; written): q with its positions; may be q itself.
            k_rope ([nnz, num_kv_heads, head_dim] T; written): k with its positions; may be k itself.
            indptr ([b+1] I; contiguous): where each request's tokens start, and the end of the last
                one's; tokens past the end are left out.
            offsets ([b] I; contiguous): the position of each request's first token.
            rotary_dim (int or None = None, 0 or more, up to the size of head_dim): how many of a head's
                elements are rotated, from the first.
            interleave (bool = False): rotate elements 2i and 2i+1 (GPT-J); without it i and i +
                rotary_dim / 2 (GPT-NeoX, Llama).
            rope_scale (float = 1.0, 1e-06 or more): positions are divided by it.
            rope_theta (float = 10000.0, 1e-06 or more): pair i turns by position * theta ** (-2i /
                rotary_dim).
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        T is float16 or bfloat16; I is int32 or int64. All tensors are on one device. The last axis has
        stride 1. Tensors with head_dim are loaded gcd(16 bytes / the itemsize of T, head_dim) elements
        at a time: addresses and the other strides are multiples of that. num_qo_heads is at least 1.
        nnz is at most 2147483647. head_dim is 64 or 128 or 256 or 512. b is at least 1, unless nnz is
        0. b * num_qo_heads is at most 1073741823. b * num_kv_heads is at most 1073741823. rotary_dim is
        a multiple of 8 (of 16 where head_dim is 512) with interleave, and of twice that without. What
        is written shares no memory with other tensors; q_rope and q or k_rope and k may be one. With
        nnz = 0, nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `apply_rope` of module `rope`, FlashInfer >=0.6.3, `csrc/flashinfer_rope_binding.cu`.
        """

apply_rope: _apply_rope

class _apply_llama31_rope(Op):
    def __call__(
        self,
        q: TensorLike,
        k: TensorLike,
        q_rope: TensorLike,
        k_rope: TensorLike,
        indptr: TensorLike,
        offsets: TensorLike,
        rotary_dim: int | None = None,
        interleave: bool = False,
        rope_scale: float = 8.0,
        rope_theta: float = 500000.0,
        low_freq_factor: float = 1.0,
        high_freq_factor: float = 4.0,
        old_context_length: float = 8192.0,
        *,
        stream: object = None,
    ) -> None:
        """Rotate q and k by their positions, the angles computed in the kernel, as Llama 3.1 scales them;
        a request's tokens have positions one after another.

        Args:
            q ([nnz, num_qo_heads, head_dim] T): queries, also as slices of a fused buffer.
            k ([nnz, num_kv_heads, head_dim] T): keys; of no heads where there is nothing to do.
            q_rope ([nnz, num_qo_heads, head_dim] T; written): q with its positions; may be q itself.
            k_rope ([nnz, num_kv_heads, head_dim] T; written): k with its positions; may be k itself.
            indptr ([b+1] I; contiguous): where each request's tokens start, and the end of the last
                one's; tokens past the end are left out.
            offsets ([b] I; contiguous): the position of each request's first token.
            rotary_dim (int or None = None, 0 or more, up to the size of head_dim): how many of a head's
                elements are rotated, from the first.
            interleave (bool = False): rotate elements 2i and 2i+1 (GPT-J); without it i and i +
                rotary_dim / 2 (GPT-NeoX, Llama).
            rope_scale (float = 8.0, 1e-06 or more): positions of long waves are divided by it.
            rope_theta (float = 500000.0, 1e-06 or more): pair i turns by position * theta ** (-2i /
                rotary_dim).
            low_freq_factor (float = 1.0, 0.0 or more): waves longer than old_context_length /
                low_freq_factor are scaled in full.
            high_freq_factor (float = 4.0, 0.0 or more): waves shorter than old_context_length /
                high_freq_factor are not scaled.
            old_context_length (float = 8192.0, 0.0 or more): the context that the model was trained on
                first.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        T is float16 or bfloat16; I is int32 or int64. All tensors are on one device. The last axis has
        stride 1. Tensors with head_dim are loaded gcd(16 bytes / the itemsize of T, head_dim) elements
        at a time: addresses and the other strides are multiples of that. num_qo_heads is at least 1.
        nnz is at most 2147483647. head_dim is 64 or 128 or 256 or 512. b is at least 1, unless nnz is
        0. b * num_qo_heads is at most 1073741823. b * num_kv_heads is at most 1073741823. rotary_dim is
        a multiple of 8 (of 16 where head_dim is 512) with interleave, and of twice that without.
        high_freq_factor is more than low_freq_factor. What is written shares no memory with other
        tensors; q_rope and q or k_rope and k may be one. With nnz = 0, nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `apply_llama31_rope` of module `rope`, FlashInfer >=0.6.3,
        `csrc/flashinfer_rope_binding.cu`.
        """

apply_llama31_rope: _apply_llama31_rope

class _apply_rope_pos_ids(Op):
    def __call__(
        self,
        q: TensorLike,
        k: TensorLike,
        q_rope: TensorLike,
        k_rope: TensorLike,
        pos_ids: TensorLike,
        rotary_dim: int | None = None,
        interleave: bool = False,
        rope_scale: float = 1.0,
        rope_theta: float = 10000.0,
        *,
        stream: object = None,
    ) -> None:
        """Rotate q and k by their positions, the angles computed in the kernel; each token has a position
        of its own.

        Args:
            q ([nnz, num_qo_heads, head_dim] T): queries, also as slices of a fused buffer.
            k ([nnz, num_kv_heads, head_dim] T): keys; of no heads where there is nothing to do.
            q_rope ([nnz, num_qo_heads, head_dim] T; written): q with its positions; may be q itself.
            k_rope ([nnz, num_kv_heads, head_dim] T; written): k with its positions; may be k itself.
            pos_ids ([nnz] I; contiguous): the position of each token.
            rotary_dim (int or None = None, 0 or more, up to the size of head_dim): how many of a head's
                elements are rotated, from the first.
            interleave (bool = False): rotate elements 2i and 2i+1 (GPT-J); without it i and i +
                rotary_dim / 2 (GPT-NeoX, Llama).
            rope_scale (float = 1.0, 1e-06 or more): positions are divided by it.
            rope_theta (float = 10000.0, 1e-06 or more): pair i turns by position * theta ** (-2i /
                rotary_dim).
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        T is float16 or bfloat16; I is int32 or int64. All tensors are on one device. The last axis has
        stride 1. Tensors with head_dim are loaded gcd(16 bytes / the itemsize of T, head_dim) elements
        at a time: addresses and the other strides are multiples of that. num_qo_heads is at least 1.
        nnz is at most 2147483647. head_dim is 64 or 128 or 256 or 512. num_qo_heads is at most 32767.
        num_kv_heads is at most 32767. rotary_dim is a multiple of 8 (of 16 where head_dim is 512) with
        interleave, and of twice that without. What is written shares no memory with other tensors;
        q_rope and q or k_rope and k may be one. With nnz = 0, nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `apply_rope_pos_ids` of module `rope`, FlashInfer >=0.6.3,
        `csrc/flashinfer_rope_binding.cu`.
        """

apply_rope_pos_ids: _apply_rope_pos_ids

class _apply_llama31_rope_pos_ids(Op):
    def __call__(
        self,
        q: TensorLike,
        k: TensorLike,
        q_rope: TensorLike,
        k_rope: TensorLike,
        pos_ids: TensorLike,
        rotary_dim: int | None = None,
        interleave: bool = False,
        rope_scale: float = 8.0,
        rope_theta: float = 500000.0,
        low_freq_factor: float = 1.0,
        high_freq_factor: float = 4.0,
        old_context_length: float = 8192.0,
        *,
        stream: object = None,
    ) -> None:
        """Rotate q and k by their positions, the angles computed in the kernel, as Llama 3.1 scales them;
        each token has a position of its own.

        Args:
            q ([nnz, num_qo_heads, head_dim] T): queries, also as slices of a fused buffer.
            k ([nnz, num_kv_heads, head_dim] T): keys; of no heads where there is nothing to do.
            q_rope ([nnz, num_qo_heads, head_dim] T; written): q with its positions; may be q itself.
            k_rope ([nnz, num_kv_heads, head_dim] T; written): k with its positions; may be k itself.
            pos_ids ([nnz] I; contiguous): the position of each token.
            rotary_dim (int or None = None, 0 or more, up to the size of head_dim): how many of a head's
                elements are rotated, from the first.
            interleave (bool = False): rotate elements 2i and 2i+1 (GPT-J); without it i and i +
                rotary_dim / 2 (GPT-NeoX, Llama).
            rope_scale (float = 8.0, 1e-06 or more): positions of long waves are divided by it.
            rope_theta (float = 500000.0, 1e-06 or more): pair i turns by position * theta ** (-2i /
                rotary_dim).
            low_freq_factor (float = 1.0, 0.0 or more): waves longer than old_context_length /
                low_freq_factor are scaled in full.
            high_freq_factor (float = 4.0, 0.0 or more): waves shorter than old_context_length /
                high_freq_factor are not scaled.
            old_context_length (float = 8192.0, 0.0 or more): the context that the model was trained on
                first.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        T is float16 or bfloat16; I is int32 or int64. All tensors are on one device. The last axis has
        stride 1. Tensors with head_dim are loaded gcd(16 bytes / the itemsize of T, head_dim) elements
        at a time: addresses and the other strides are multiples of that. num_qo_heads is at least 1.
        nnz is at most 2147483647. head_dim is 64 or 128 or 256 or 512. num_qo_heads is at most 32767.
        num_kv_heads is at most 32767. rotary_dim is a multiple of 8 (of 16 where head_dim is 512) with
        interleave, and of twice that without. high_freq_factor is more than low_freq_factor. What is
        written shares no memory with other tensors; q_rope and q or k_rope and k may be one. With nnz =
        0, nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `apply_llama31_rope_pos_ids` of module `rope`, FlashInfer >=0.6.3,
        `csrc/flashinfer_rope_binding.cu`.
        """

apply_llama31_rope_pos_ids: _apply_llama31_rope_pos_ids

class _apply_rope_pos_ids_cos_sin_cache(Op):
    def __call__(
        self,
        q: TensorLike,
        k: TensorLike,
        q_rope: TensorLike,
        k_rope: TensorLike,
        cos_sin_cache: TensorLike,
        pos_ids: TensorLike,
        interleave: bool = False,
        *,
        stream: object = None,
    ) -> None:
        """Rotate q and k by their positions, with cosines and sines from a table.

        Args:
            q ([nnz, num_qo_heads, head_dim] T): queries, also as slices of a fused buffer.
            k ([nnz, num_kv_heads, head_dim] T): keys; of no heads where there is nothing to do.
            q_rope ([nnz, num_qo_heads, head_dim] T; written): q with its positions; may be q itself.
            k_rope ([nnz, num_kv_heads, head_dim] T; written): k with its positions; may be k itself.
            cos_sin_cache ([max_seq_len, rotary_dim] float32; contiguous; aligned to 16 bytes): for each
                position the cosines of all pairs, then their sines; with interleave, up to 32 bytes
                past the row of a position are read, and not used.
            pos_ids ([nnz] I; contiguous): the position of each token.
            interleave (bool = False): rotate elements 2i and 2i+1 (GPT-J); without it i and i +
                rotary_dim / 2 (GPT-NeoX, Llama).
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        T is float16 or bfloat16; I is int32 or int64. All tensors are on one device. The last axis has
        stride 1. Tensors with head_dim are loaded gcd(16 bytes / the itemsize of T, head_dim) elements
        at a time: addresses and the other strides are multiples of that. num_qo_heads is at least 1.
        nnz is at most 2147483647. rotary_dim is at least 1. head_dim is a multiple of 8. head_dim is at
        least rotary_dim. max_seq_len is at least 1, unless nnz is 0. rotary_dim is at most 16384.
        cos_sin_cache is of a rotary_dim that with interleave is a multiple of 16, or of 8 where
        head_dim is 64, 128 or 256; and of twice that without. q is of heads so few that (num_qo_heads +
        num_kv_heads) * (head_dim / rotary_dim, rounded up) is at most 65535. q_rope is memory apart
        from q (and k_rope from k) without interleave, unless head_dim is 64, 128, 256 or 512, or
        rotary_dim 32, 64, 128, 256 or 512: else a warp may overwrite what another has yet to read. Of
        cos_sin_cache there are at most 4294967296 elements. What is written shares no memory with other
        tensors; q_rope and q or k_rope and k may be one. With nnz = 0, nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `apply_rope_pos_ids_cos_sin_cache` of module `rope`, FlashInfer >=0.6.3,
        `csrc/flashinfer_rope_binding.cu`.
        """

apply_rope_pos_ids_cos_sin_cache: _apply_rope_pos_ids_cos_sin_cache

class _rope_quantize(Op):
    def __call__(
        self,
        q_rope_in: TensorLike,
        k_rope_in: TensorLike,
        q_nope_in: TensorLike,
        k_nope_in: TensorLike,
        q_rope_out: TensorLike,
        k_rope_out: TensorLike,
        q_nope_out: TensorLike,
        k_nope_out: TensorLike,
        cos_sin_cache: TensorLike,
        pos_ids: TensorLike,
        quant_scale_q: float = 1.0,
        quant_scale_kv: float = 1.0,
        interleave: bool = False,
        enable_pdl: bool = False,
        *,
        stream: object = None,
    ) -> None:
        """Rotate a part of q and k by their positions, and quantise all of them: `out = fp8(rotated *
        scale)`, clamped to O's range.

        Args:
            q_rope_in ([nnz, num_qo_heads, rope_dim] T): the part of queries to be rotated.
            k_rope_in ([nnz, num_kv_heads, rope_dim] T): the part of keys to be rotated.
            q_nope_in ([nnz, num_qo_heads, no_rope_dim] T): the rest of queries, or no elements.
            k_nope_in ([nnz, num_kv_heads, no_rope_dim] T): the rest of keys, or no elements.
            q_rope_out ([nnz, num_qo_heads, rope_dim] O; written): `q_rope_in`, rotated and quantised.
            k_rope_out ([nnz, num_kv_heads, rope_dim] O; written): `k_rope_in`, rotated and quantised.
            q_nope_out ([nnz, num_qo_heads, no_rope_dim] O; written): `q_nope_in`, quantised.
            k_nope_out ([nnz, num_kv_heads, no_rope_dim] O; written): `k_nope_in`, quantised.
            cos_sin_cache ([max_seq_len, rope_dim] float32; contiguous; aligned to 16 bytes): for each
                position the cosines of all pairs, then their sines; with interleave, up to 32 bytes
                past the row of a position are read, and not used.
            pos_ids ([nnz] I; contiguous): the position of each token.
            quant_scale_q (float = 1.0, 0.0 or more): queries are multiplied by it.
            quant_scale_kv (float = 1.0, 0.0 or more): keys and values are multiplied by it.
            interleave (bool = False): rotate elements 2i and 2i+1 (GPT-J); without it i and i +
                rotary_dim / 2 (GPT-NeoX, Llama).
            enable_pdl (bool = False): programmatic dependent launch (SM90 and later): start while the
                previous kernel drains.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        T is float16 or bfloat16; O is float8_e4m3fn or float8_e5m2; I is int32 or int64. All tensors
        are on one device. The last axis has stride 1. Tensors with rope_dim or no_rope_dim are loaded
        gcd(16 bytes / its own itemsize, rope_dim or no_rope_dim) elements at a time: addresses and the
        other strides are multiples of that. num_qo_heads is at least 1. nnz is at most 2147483647.
        rope_dim is at least 1. rope_dim is a multiple of 16. no_rope_dim is a multiple of 16.
        max_seq_len is at least 1, unless nnz is 0. rope_dim is at most 16384. Strides of q_rope_in and
        k_rope_in and q_nope_in and k_nope_in and q_rope_out and k_rope_out and q_nope_out and
        k_nope_out stay below 4294967296 elements. q_rope_in is of a rope_dim that is a multiple of 32
        without interleave. q_rope_in is of heads so few that (num_qo_heads + num_kv_heads) * (1 +
        no_rope_dim / rope_dim, rounded up) is at most 65535. Of cos_sin_cache there are at most
        4294967296 elements. What is written shares no memory with other tensors. With nnz = 0, nothing
        is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `rope_quantize` of module `rope`, FlashInfer >=0.6.3, `csrc/flashinfer_rope_binding.cu`.
        """

rope_quantize: _rope_quantize

class _rope_quantize_append_paged_kv_cache(Op):
    def __call__(
        self,
        q_rope_in: TensorLike,
        k_rope_in: TensorLike,
        q_nope_in: TensorLike,
        k_nope_in: TensorLike,
        v_in: TensorLike,
        q_rope_out: TensorLike,
        q_nope_out: TensorLike,
        cos_sin_cache: TensorLike,
        pos_ids: TensorLike,
        k_cache: TensorLike,
        v_cache: TensorLike,
        kv_indices: TensorLike,
        kv_indptr: TensorLike,
        batch_indices: TensorLike,
        positions: TensorLike,
        kv_layout: Literal['NHD', 'HND'] = 'NHD',
        page_size: int | None = None,
        quant_scale_q: float = 1.0,
        quant_scale_kv: float = 1.0,
        interleave: bool = False,
        enable_pdl: bool = False,
        *,
        stream: object = None,
    ) -> None:
        """`rope_quantize` of queries, and of keys and values into their places in a paged cache.

        Args:
            q_rope_in ([nnz, num_qo_heads, rope_dim] T): the part of queries to be rotated.
            k_rope_in ([nnz, num_kv_heads, rope_dim] T): the part of keys to be rotated.
            q_nope_in ([nnz, num_qo_heads, no_rope_dim] T): the rest of queries, or no elements.
            k_nope_in ([nnz, num_kv_heads, no_rope_dim] T): the rest of keys, or no elements.
            v_in ([nnz, num_kv_heads, rope_dim+no_rope_dim] T): values, which are quantised.
            q_rope_out ([nnz, num_qo_heads, rope_dim] O; written): `q_rope_in`, rotated and quantised.
            q_nope_out ([nnz, num_qo_heads, no_rope_dim] O; written): `q_nope_in`, quantised.
            cos_sin_cache ([max_seq_len, rope_dim] float32; contiguous; aligned to 16 bytes): for each
                position the cosines of all pairs, then their sines; with interleave, up to 32 bytes
                past the row of a position are read, and not used.
            pos_ids ([nnz] I; contiguous): the position of each token.
            k_cache ([num_pages, page_size, num_kv_heads, rope_dim+no_rope_dim] O; written; here in
                NHD): keys, the rotated part first.
            v_cache ([num_pages, page_size, num_kv_heads, rope_dim+no_rope_dim] O; written; here in
                NHD): values.
            kv_indices ([num_indices] int32; contiguous): the pages of all requests, in order.
            kv_indptr ([b+1] int32; contiguous): where each request's pages start in `kv_indices`.
            batch_indices ([nnz] int32; contiguous): the request of each token; since FlashInfer 0.6.8 a
                token of none (-1) is left out, its queries too.
            positions ([nnz] int32; contiguous): its place in the request, from 0.
            kv_layout (str = 'NHD'): "NHD" (tokens, heads, head_dim) or "HND" (heads, tokens, head_dim).
            page_size (int or None = None, 1 or more, the size of page_size): tokens of a page.
            quant_scale_q (float = 1.0, 0.0 or more): queries are multiplied by it.
            quant_scale_kv (float = 1.0, 0.0 or more): keys and values are multiplied by it.
            interleave (bool = False): rotate elements 2i and 2i+1 (GPT-J); without it i and i +
                rotary_dim / 2 (GPT-NeoX, Llama).
            enable_pdl (bool = False): programmatic dependent launch (SM90 and later): start while the
                previous kernel drains.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        T is float16 or bfloat16; O is float8_e4m3fn or float8_e5m2; I is int32 or int64. All tensors
        are on one device. The last axis has stride 1. Tensors with rope_dim or no_rope_dim are loaded
        gcd(16 bytes / its own itemsize, rope_dim or no_rope_dim) elements at a time: addresses and the
        other strides are multiples of that. num_qo_heads is at least 1. nnz is at most 2147483647.
        rope_dim is at least 1. rope_dim is a multiple of 16. no_rope_dim is a multiple of 16.
        max_seq_len is at least 1, unless nnz is 0. rope_dim is at most 16384. num_kv_heads is at least
        1. page_size is at least 1. num_pages is at least 1, unless nnz is 0. num_indices is at least 1,
        unless nnz is 0. b is at least 1, unless nnz is 0. num_indices * page_size is at most
        4294967296. no_rope_dim is a multiple of rope_dim. Strides of q_rope_in and k_rope_in and
        q_nope_in and k_nope_in and v_in and q_rope_out and q_nope_out and k_cache and v_cache stay
        below 4294967296 elements. k_cache and v_cache have the same strides. q_rope_in is of a rope_dim
        that is a multiple of 32 without interleave. q_rope_in is of heads so few that (num_qo_heads +
        num_kv_heads) * (1 + no_rope_dim / rope_dim, rounded up) + num_kv_heads is at most 65535. Of
        cos_sin_cache there are at most 4294967296 elements. What is written shares no memory with other
        tensors. With nnz = 0, nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `rope_quantize_append_paged_kv_cache` of module `rope`, FlashInfer >=0.6.3,
        `csrc/flashinfer_rope_binding.cu`.
        """

rope_quantize_append_paged_kv_cache: _rope_quantize_append_paged_kv_cache

class _rope_quantize_append_paged_mla_kv_cache(Op):
    def __call__(
        self,
        q_rope_in: TensorLike,
        k_rope_in: TensorLike,
        q_nope_in: TensorLike,
        k_nope_in: TensorLike,
        q_rope_out: TensorLike,
        q_nope_out: TensorLike,
        cos_sin_cache: TensorLike,
        pos_ids: TensorLike,
        ckv_cache: TensorLike,
        kpe_cache: TensorLike,
        kv_indices: TensorLike,
        kv_indptr: TensorLike,
        batch_indices: TensorLike,
        positions: TensorLike,
        page_size: int | None = None,
        quant_scale_q: float = 1.0,
        quant_scale_kv: float = 1.0,
        interleave: bool = False,
        enable_pdl: bool = False,
        *,
        stream: object = None,
    ) -> None:
        """`rope_quantize` of queries, and of compressed keys into their places in a paged MLA cache.

        Args:
            q_rope_in ([nnz, num_qo_heads, rope_dim] T): the part of queries to be rotated.
            k_rope_in ([nnz, 1, rope_dim] T): the part of keys to be rotated.
            q_nope_in ([nnz, num_qo_heads, no_rope_dim] T): the rest of queries, or no elements.
            k_nope_in ([nnz, 1, no_rope_dim] T): the rest of keys, or no elements.
            q_rope_out ([nnz, num_qo_heads, rope_dim] O; written): `q_rope_in`, rotated and quantised.
            q_nope_out ([nnz, num_qo_heads, no_rope_dim] O; written): `q_nope_in`, quantised.
            cos_sin_cache ([max_seq_len, rope_dim] float32; contiguous; aligned to 16 bytes): for each
                position the cosines of all pairs, then their sines; with interleave, up to 32 bytes
                past the row of a position are read, and not used.
            pos_ids ([nnz] I; contiguous): the position of each token.
            ckv_cache ([num_pages, page_size, no_rope_dim] O; written): `k_nope_in`, quantised.
            kpe_cache ([num_pages, page_size, rope_dim] O; written): `k_rope_in`, rotated and quantised.
            kv_indices ([num_indices] int32; contiguous): the pages of all requests, in order.
            kv_indptr ([b+1] int32; contiguous): where each request's pages start in `kv_indices`.
            batch_indices ([nnz] int32; contiguous): the request of each token; since FlashInfer 0.6.8 a
                token of none (-1) is left out, its queries too.
            positions ([nnz] int32; contiguous): its place in the request, from 0.
            page_size (int or None = None, 1 or more, the size of page_size): tokens of a page.
            quant_scale_q (float = 1.0, 0.0 or more): queries are multiplied by it.
            quant_scale_kv (float = 1.0, 0.0 or more): keys and values are multiplied by it.
            interleave (bool = False): rotate elements 2i and 2i+1 (GPT-J); without it i and i +
                rotary_dim / 2 (GPT-NeoX, Llama).
            enable_pdl (bool = False): programmatic dependent launch (SM90 and later): start while the
                previous kernel drains.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        T is float16 or bfloat16; O is float8_e4m3fn or float8_e5m2; I is int32 or int64. All tensors
        are on one device. The last axis has stride 1. Tensors with rope_dim or no_rope_dim are loaded
        gcd(16 bytes / its own itemsize, rope_dim or no_rope_dim) elements at a time: addresses and the
        other strides are multiples of that. num_qo_heads is at least 1. nnz is at most 2147483647.
        rope_dim is at least 1. rope_dim is a multiple of 16. no_rope_dim is a multiple of 16.
        max_seq_len is at least 1, unless nnz is 0. rope_dim is at most 16384. no_rope_dim is at least
        1. page_size is at least 1. num_pages is at least 1, unless nnz is 0. num_indices is at least 1,
        unless nnz is 0. b is at least 1, unless nnz is 0. num_indices * page_size is at most
        4294967296. no_rope_dim is a multiple of rope_dim. Strides of q_rope_in and k_rope_in and
        q_nope_in and k_nope_in and q_rope_out and q_nope_out and ckv_cache and kpe_cache stay below
        4294967296 elements. q_rope_in is of a rope_dim that is a multiple of 32 without interleave.
        q_rope_in is of heads so few that (num_qo_heads + 1) * (1 + no_rope_dim / rope_dim, rounded up)
        is at most 65535. Of cos_sin_cache there are at most 4294967296 elements. What is written shares
        no memory with other tensors. With nnz = 0, nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `rope_quantize_append_paged_kv_cache` of module `rope`, FlashInfer >=0.6.3,
        `csrc/flashinfer_rope_binding.cu`.
        """

rope_quantize_append_paged_mla_kv_cache: _rope_quantize_append_paged_mla_kv_cache

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
        head_dim) elements at a time: addresses and the other strides are multiples of that.
        num_kv_heads is at least 1. head_dim is 64 or 128 or 256 or 512. page_size is at least 1.
        num_pages is at least 1, unless nnz is 0. num_indices is at least 1, unless nnz is 0. b is at
        least 1, unless nnz is 0. nnz is at most 2147482624. num_indices * page_size is at most
        4294967296. num_kv_heads * the threads that share head_dim (one for each 16 bytes, 32 at most)
        is at most 1024. Strides of paged_k_cache and paged_v_cache stay below 4294967296 elements.
        paged_k_cache and paged_v_cache have the same strides. What is written shares no memory with
        other tensors. With nnz = 0, nothing is launched.

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
        are multiples of that. head_dim_ckv is 512. head_dim_kpe is 64. page_size is at least 1.
        num_pages is at least 1, unless nnz is 0. num_indices is at least 1, unless nnz is 0. b is at
        least 1, unless nnz is 0. nnz is at most 2147482624. num_indices * page_size is at most
        4294967296. Strides of ckv_cache and kpe_cache stay below 4294967296 elements. What is written
        shares no memory with other tensors. With nnz = 0, nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `append_paged_mla_kv_cache` of module `page`, FlashInfer >=0.6.3,
        `csrc/flashinfer_page_binding.cu`.
        """

append_paged_mla_kv_cache: _append_paged_mla_kv_cache

class _concat_mla_k(Op):
    def __call__(
        self,
        k: TensorLike,
        k_nope: TensorLike,
        k_rope: TensorLike,
        *,
        stream: object = None,
    ) -> None:
        """Put MLA's keys together: each head's own part, and after it the part that all share.

        Args:
            k ([n, num_heads, nope_dim+rope_dim] T; written): the keys.
            k_nope ([n, num_heads, nope_dim] T): the heads' own parts.
            k_rope ([n, 1, rope_dim] T): the part with the position, which all heads share.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        T is float16 or bfloat16 or float8_e4m3fn or float8_e5m2. All tensors are on one device. The
        last axis has stride 1. Tensors with nope_dim or rope_dim are loaded gcd(8 bytes / its own
        itemsize, nope_dim or rope_dim) elements at a time: addresses and the other strides are
        multiples of that. num_heads is 128. nope_dim is 128. rope_dim is 64. n is at most 16777216.
        Strides of k and k_nope stay below 19173952 elements. With no rows, nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `concat_mla_k` of module `concat_mla`, FlashInfer >=0.6.11, `csrc/concat_mla.cu`.
        """

concat_mla_k: _concat_mla_k

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
        addresses and the other strides are multiples of that. num_q_heads is at least 1. num_k_heads is
        at least 1. num_v_heads is at least 1. head_size is 128. num_sab_heads is a multiple of
        num_k_heads. num_sab_heads is the max of num_q_heads and num_v_heads. num_k_heads is the min of
        num_q_heads and num_v_heads. total_seq_len is at least num_seqs. num_seqs * num_sab_heads is at
        most 2147483647. total_seq_len is at most 2147483647. Of output_state and input_state there are
        at most 2147483648 elements. state_checkpoints, checkpoint_cu_starts, checkpoint_every_n_tokens
        are given together. What is written shares no memory with other tensors; output_state and
        input_state may be one. With num_seqs = 0, nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words,
        `ArchitectureError` on GPUs other than of compute capability 9.x.

        Kernel: `gdn_prefill` of module `gdn_prefill_sm90`, FlashInfer >=0.6.8,<0.6.14,
        `csrc/gdn_prefill_launcher.cu`.
        """

gdn_prefill: _gdn_prefill

class _merge_state(Op):
    def __call__(
        self,
        v_a: TensorLike,
        s_a: TensorLike,
        v_b: TensorLike,
        s_b: TensorLike,
        v_merged: TensorLike,
        s_merged: TensorLike,
        *,
        stream: object = None,
    ) -> None:
        """Merge two attention states, of keys A and keys B, to that of both.

        Args:
            v_a ([n, num_heads, head_dim] T; contiguous): A's output.
            s_a ([n, num_heads] float32; contiguous): A's log-sum-exp, to base 2.
            v_b ([n, num_heads, head_dim] T; contiguous): B's output.
            s_b ([n, num_heads] float32; contiguous): B's log-sum-exp.
            v_merged ([n, num_heads, head_dim] T; contiguous; written): the output of both.
            s_merged ([n, num_heads] float32; contiguous; written): the log-sum-exp of both.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        T is float16 or bfloat16. All tensors are on one device. The last axis has stride 1. Tensors
        with head_dim are loaded gcd(16 bytes / its own itemsize, head_dim) elements at a time:
        addresses and the other strides are multiples of that. head_dim is 64 or 128 or 256 or 512. n is
        at most 2147483647. num_heads * the threads that share head_dim (one for each 16 bytes, 32 at
        most) is at most 1024. Offsets stay below 4294967296 elements. With no rows, nothing is
        launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `merge_state` of module `cascade`, FlashInfer >=0.6.3,<0.7.2,
        `csrc/flashinfer_cascade_binding.cu`.
        """

merge_state: _merge_state

class _merge_state_in_place(Op):
    def __call__(
        self,
        v: TensorLike,
        s: TensorLike,
        v_other: TensorLike,
        s_other: TensorLike,
        mask: TensorLike | None = None,
        *,
        stream: object = None,
    ) -> None:
        """Merge another attention state into one.

        Args:
            v ([n, num_heads, head_dim] T; contiguous; written): the output; becomes that of both.
            s ([n, num_heads] float32; contiguous; written): its log-sum-exp, to base 2; becomes that of
                both.
            v_other ([n, num_heads, head_dim] T; contiguous): the other's output.
            s_other ([n, num_heads] float32; contiguous): the other's log-sum-exp.
            mask ([n] M; contiguous; or None): tokens that stay as they are, where it is 0; none without
                it.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        T is float16 or bfloat16; M is bool or uint8. All tensors are on one device. The last axis has
        stride 1. Tensors with head_dim are loaded gcd(16 bytes / its own itemsize, head_dim) elements
        at a time: addresses and the other strides are multiples of that. head_dim is 64 or 128 or 256
        or 512. n is at most 2147483647. num_heads * the threads that share head_dim (one for each 16
        bytes, 32 at most) is at most 1024. Offsets stay below 4294967296 elements. With no rows,
        nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `merge_state_in_place` of module `cascade`, FlashInfer >=0.6.3,<0.7.2,
        `csrc/flashinfer_cascade_binding.cu`.
        """

merge_state_in_place: _merge_state_in_place

class _merge_states(Op):
    def __call__(
        self,
        v: TensorLike,
        s: TensorLike,
        v_merged: TensorLike,
        s_merged: TensorLike,
        *,
        stream: object = None,
    ) -> None:
        """Merge the attention states of any number of sets of keys; of none the output is 0.

        Args:
            v ([n, num_index_sets, num_heads, head_dim] T; contiguous): each set's output.
            s ([n, num_index_sets, num_heads] float32; contiguous): each set's log-sum-exp, to base 2.
            v_merged ([n, num_heads, head_dim] T; contiguous; written): the output of all.
            s_merged ([n, num_heads] float32; contiguous; written): the log-sum-exp of all.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        T is float16 or bfloat16. All tensors are on one device. The last axis has stride 1. Tensors
        with head_dim are loaded gcd(16 bytes / its own itemsize, head_dim) elements at a time:
        addresses and the other strides are multiples of that. head_dim is 64 or 128 or 256 or 512. n is
        at most 2147483647. num_heads is at most 65535. v is num_index_sets of at least n, or num_heads
        that fit a block of 1024 threads, head_dim / 8 (at most 32) for each. Offsets stay below
        4294967296 elements. With no rows, nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `merge_states` of module `cascade`, FlashInfer >=0.6.3,<0.7.2,
        `csrc/flashinfer_cascade_binding.cu`.
        """

merge_states: _merge_states

class _bmm_fp8(Op):
    def __call__(
        self,
        A: TensorLike,
        B: TensorLike,
        D: TensorLike,
        A_scale: TensorLike,
        B_scale: TensorLike,
        workspace_buffer: TensorLike | None = None,
        cublas_handle: int = 0,
        *,
        stream: object = None,
    ) -> None:
        """Products of fp8 matrices, by cuBLASLt: `D = (A * A_scale) @ (B * B_scale)`.

        Args:
            A ([b, m, k] TA; contiguous; aligned to 16 bytes): left factors.
            B ([b, k, n] TB; contiguous; the last two axes transposed in memory; aligned to 16 bytes):
                right factors, column-major: the transpose of a contiguous (b, n, k).
            D ([b, m, n] T; contiguous; written; aligned to 16 bytes): the products.
            A_scale ([1] float32): A is multiplied by it.
            B_scale ([1] float32): B is multiplied by it.
            workspace_buffer ([workspace_size] uint8; contiguous; written; or None; aligned to 256
                bytes): scratch of 216 KiB for each multiprocessor (32 MiB will do) that no other stream
                uses; without it each stream has its own of fi_ffi's.
            cublas_handle (int = 0, 0 or more): a cublasLtHandle_t or cublasHandle_t; 0 is fi_ffi's own
                of the device.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        TA is float8_e4m3fn or float8_e5m2; TB is float8_e4m3fn or float8_e5m2; T is float16 or
        bfloat16. All tensors are on one device. The last axis has stride 1. k is at least 16. k is a
        multiple of 16. n is a multiple of 16. m is at most 2147483647. n is at most 2147483647. k is at
        most 2147483647. A is of m * k of at most 2147483647 where there are several matrices. B is of k
        * n of at most 2147483647 where there are several matrices. D is of m * n of at most 2147483647
        where there are several matrices. There is no TA of float8_e5m2 with TB of float8_e5m2. What is
        written shares no memory with other tensors. With no rows, nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words,
        `ArchitectureError` on GPUs other than of compute capability 8.x or 9.x or 10.x or 11.x or 12.x.

        Kernel: `bmm_fp8` of module `gemm`, FlashInfer >=0.6.3,<0.7, `csrc/flashinfer_gemm_binding.cu`.
        """

bmm_fp8: _bmm_fp8

class _tinygemm2(Op):
    def __call__(
        self,
        input: TensorLike,
        weight: TensorLike,
        bias: TensorLike,
        output: TensorLike,
        use_pdl: bool = False,
        *,
        stream: object = None,
    ) -> None:
        """A product for few rows (best 8 or fewer): `output = input @ weight.T + bias`, rounded once.

        Args:
            input ([n, k] T; contiguous; aligned to 16 bytes): rows.
            weight ([m, k] T; contiguous; aligned to 16 bytes): a row for each column of the output.
            bias ([m] T; contiguous): added to every row.
            output ([n, m] T; contiguous; written; aligned to 16 bytes): the products.
            use_pdl (bool = False): programmatic dependent launch: start while the previous kernel
                drains.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        T is bfloat16. All tensors are on one device. The last axis has stride 1. k is at least 64. m is
        at least 16. k is a multiple of 64. m is a multiple of 16. n * m is at most 2147483647. n is at
        most 524280. m * k is at most 2147483647. n * k is at most 2147483647. k is at most 1024. What
        is written shares no memory with other tensors. With no rows, nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words,
        `ArchitectureError` on GPUs other than of compute capability 9.x or 10.x or 11.x or 12.x.

        Kernel: `tinygemm2_op` of module `tinygemm2`, FlashInfer >=0.6.5,<0.6.14, `csrc/tinygemm2.cu`.
        """

tinygemm2: _tinygemm2

class _tinygemm2_nobias(Op):
    def __call__(
        self,
        input: TensorLike,
        weight: TensorLike,
        output: TensorLike,
        use_pdl: bool = False,
        *,
        stream: object = None,
    ) -> None:
        """A product for few rows (best 8 or fewer): `output = input @ weight.T`, rounded once.

        Args:
            input ([n, k] T; contiguous; aligned to 16 bytes): rows.
            weight ([m, k] T; contiguous; aligned to 16 bytes): a row for each column of the output.
            output ([n, m] T; contiguous; written; aligned to 16 bytes): the products.
            use_pdl (bool = False): programmatic dependent launch: start while the previous kernel
                drains.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        T is bfloat16. All tensors are on one device. The last axis has stride 1. k is at least 64. m is
        at least 16. k is a multiple of 64. m is a multiple of 16. n * m is at most 2147483647. n is at
        most 524280. m * k is at most 2147483647. n * k is at most 2147483647. k is at most 1024. What
        is written shares no memory with other tensors. With no rows, nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words,
        `ArchitectureError` on GPUs other than of compute capability 9.x or 10.x or 11.x or 12.x.

        Kernel: `tinygemm2_nobias_op` of module `tinygemm2`, FlashInfer >=0.6.9,<0.6.14,
        `csrc/tinygemm2.cu`.
        """

tinygemm2_nobias: _tinygemm2_nobias

class _mm_M1_16_K7168_N256(Op):
    def __call__(
        self,
        mat_a: TensorLike,
        mat_b: TensorLike,
        out: TensorLike,
        launch_with_pdl: bool = True,
        *,
        stream: object = None,
    ) -> None:
        """The router's product for 1 to 16 tokens, of DeepSeek-V3's sizes: `out = mat_a @ mat_b`.

        Args:
            mat_a ([n, 7168] T; contiguous; aligned to 16 bytes): hidden states.
            mat_b ([7168, 256] T; contiguous; the last two axes transposed in memory; aligned to 16
                bytes): the experts' weights, column-major: the transpose of a contiguous (256, 7168).
            out ([n, 256] float32; contiguous; written): scores.
            launch_with_pdl (bool = True): programmatic dependent launch: start while the previous
                kernel drains.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        T is bfloat16. All tensors are on one device. The last axis has stride 1. n is at most 16. What
        is written shares no memory with other tensors. With no rows, nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `dsv3_router_gemm_op` of module `dsv3_router_gemm`, FlashInfer >=0.6.3,
        `csrc/dsv3_router_gemm.cu`.
        """

mm_M1_16_K7168_N256: _mm_M1_16_K7168_N256

class _mm_M1_16_K7168_N128(Op):
    def __call__(
        self,
        mat_a: TensorLike,
        mat_b: TensorLike,
        out: TensorLike,
        launch_with_pdl: bool = True,
        *,
        stream: object = None,
    ) -> None:
        """The router's product for 1 to 16 tokens, of Mistral Large 3's sizes: `out = mat_a @ mat_b`.

        Args:
            mat_a ([n, 7168] T; contiguous; aligned to 16 bytes): hidden states.
            mat_b ([7168, 128] T; contiguous; the last two axes transposed in memory; aligned to 16
                bytes): the experts' weights, column-major: the transpose of a contiguous (128, 7168).
            out ([n, 128] bfloat16; contiguous; written): scores.
            launch_with_pdl (bool = True): programmatic dependent launch: start while the previous
                kernel drains.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        T is bfloat16. All tensors are on one device. The last axis has stride 1. n is at most 16. What
        is written shares no memory with other tensors. With no rows, nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `ml3_router_gemm_op` of module `dsv3_router_gemm`, FlashInfer >=0.6.3,
        `csrc/dsv3_router_gemm.cu`.
        """

mm_M1_16_K7168_N128: _mm_M1_16_K7168_N128

class _mm_M1_16_K6144_N256(Op):
    def __call__(
        self,
        mat_a: TensorLike,
        mat_b: TensorLike,
        out: TensorLike,
        launch_with_pdl: bool = True,
        *,
        stream: object = None,
    ) -> None:
        """The router's product for 1 to 16 tokens, of GLM-MoE-DSA's sizes: `out = mat_a @ mat_b`.

        Args:
            mat_a ([n, 6144] T; contiguous; aligned to 16 bytes): hidden states.
            mat_b ([6144, 256] T; contiguous; the last two axes transposed in memory; aligned to 16
                bytes): the experts' weights, column-major: the transpose of a contiguous (256, 6144).
            out ([n, 256] float32; contiguous; written): scores.
            launch_with_pdl (bool = True): programmatic dependent launch: start while the previous
                kernel drains.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        T is bfloat16. All tensors are on one device. The last axis has stride 1. n is at most 16. What
        is written shares no memory with other tensors. With no rows, nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `glm_dsa_router_gemm_op` of module `dsv3_router_gemm`, FlashInfer >=0.6.12,
        `csrc/dsv3_router_gemm.cu`.
        """

mm_M1_16_K6144_N256: _mm_M1_16_K6144_N256

class _fp8_quantize_1x128(Op):
    def __call__(
        self,
        input: TensorLike,
        outValueE4M3: TensorLike,
        outScaleFP8SF: TensorLike,
        use_ue8m0: bool = False,
        *,
        stream: object = None,
    ) -> None:
        """Quantise rows in pieces of 128 columns: `outValueE4M3 = fp8(input * 448 / largest)`, and in
        `outScaleFP8SF` what undoes it, `largest / 448`, as the products take it. `largest` is of a
        piece; of zeros the scale is 1.

        Args:
            input ([n, 128*k128] T; contiguous; aligned to 16 bytes): rows.
            outValueE4M3 ([n, 128*k128] float8_e4m3fn; contiguous; written; aligned to 16 bytes):
                quantised rows.
            outScaleFP8SF ([k128, n4] float32; contiguous; written; aligned to 16 bytes): what the
                values are multiplied by: a row for each 128 columns, with a number for each row of the
                input, and room up to a multiple of 4, which is not written.
            use_ue8m0 (bool = False): the kernels do not look at it.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        T is bfloat16. All tensors are on one device. The last axis has stride 1. k128 is at least 1. n
        is at most 2147483647. k128 is at most 16777215. outScaleFP8SF is of n rounded up to a multiple
        of 4 in its second axis. What is written shares no memory with other tensors. With no rows,
        nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words,
        `ArchitectureError` on GPUs other than of compute capability 9.x.

        Kernel: `fp8_quantize_1x128` of module `fp8_blockscale_gemm_90`, FlashInfer >=0.6.3,
        `csrc/fp8_blockscale_gemm_sm90_binding.cu`.
        """

fp8_quantize_1x128: _fp8_quantize_1x128

class _packbits(Op):
    def __call__(
        self,
        x: TensorLike,
        bitorder: Literal['big', 'little'] = 'big',
        y: TensorLike = ...,
        *,
        stream: object = None,
    ) -> None:
        """Pack booleans to bits, 8 to a byte; what is left of the last byte is 0.

        Args:
            x ([n] bool; contiguous): bytes of 0 or 1.
            bitorder (str = 'big'): where the first of 8 goes: to the highest bit, as numpy.packbits has
                it, or to the lowest: 'big' or 'little'.
            y ([num_bytes] uint8; contiguous; written): the bits.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        All tensors are on one device. The last axis has stride 1. n is at most 4398046509056. y is
        num_bytes = (n + 7) // 8, a byte for every 8 bits begun. With no rows, nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `packbits` of module `quantization`, FlashInfer >=0.6.3,
        `csrc/flashinfer_quantization_binding.cu`.
        """

packbits: _packbits

class _segment_packbits(Op):
    def __call__(
        self,
        x: TensorLike,
        input_indptr: TensorLike,
        output_indptr: TensorLike,
        bitorder: Literal['big', 'little'] = 'big',
        y: TensorLike = ...,
        *,
        stream: object = None,
    ) -> None:
        """Pack segments of booleans to bits, each of them from a byte of its own on.

        Args:
            x ([n] bool; contiguous): bytes of 0 or 1.
            input_indptr ([b+1] int32; contiguous): where each segment starts in `x`, and the end.
            output_indptr ([b+1] int32; contiguous): where its bits start in `y`: see `packed_indptr`.
            bitorder (str = 'big'): where the first of 8 goes: to the highest bit, as numpy.packbits has
                it, or to the lowest: 'big' or 'little'.
            y ([num_bytes] uint8; contiguous; written): the bits; other bytes of it stay as they are.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        All tensors are on one device. The last axis has stride 1. n is at most 2147483647. b is at most
        2147483647. What is written shares no memory with other tensors. With b = 0, nothing is
        launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `segment_packbits` of module `quantization`, FlashInfer >=0.6.3,
        `csrc/flashinfer_quantization_binding.cu`.
        """

segment_packbits: _segment_packbits

class _nvfp4_kv_dequant(Op):
    def __call__(
        self,
        fp4_data: TensorLike,
        block_scales: TensorLike,
        global_scale: TensorLike,
        output: TensorLike,
        *,
        stream: object = None,
    ) -> None:
        """Numbers of 4 bits to 16, each 16 of a row with a scale: `output = value * scale * global_scale`.

        Args:
            fp4_data ([n, 8*blocks] uint8; contiguous; aligned to 2 bytes): two e2m1 numbers a byte, the
                first in its lower half.
            block_scales ([n, blocks] S; contiguous): scales as float8_e4m3fn has them, or their bytes.
            global_scale ([1] float32): multiplies all.
            output ([n, 16*blocks] T; contiguous; written; aligned to 4 bytes): the numbers.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        T is bfloat16 or float16; S is uint8 or float8_e4m3fn. All tensors are on one device. The last
        axis has stride 1. blocks is at least 1. n is at most 2147483647. blocks is at most 49148.
        Offsets stay below 2147483648 elements. With no rows, nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `nvfp4_kv_dequant` of module `fp4_kv_dequant`, FlashInfer >=0.6.7,
        `csrc/fp4_kv_dequantization.cu`.
        """

nvfp4_kv_dequant: _nvfp4_kv_dequant

class _block_scale_interleave(Op):
    def __call__(
        self,
        blockScale: TensorLike,
        interleavedBlockScale: TensorLike,
        *,
        stream: object = None,
    ) -> None:
        """Put scales into tiles of 128 rows and 4 columns: row i of a tile starts at 16 * (i % 32) + 4 *
        (i // 32); 0 where there are none.

        Args:
            blockScale ([n, rows, cols] T; contiguous): n matrices of scales.
            interleavedBlockScale ([swizzled] T; contiguous; written): tile after tile.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        T is uint8 or bfloat16. All tensors are on one device. The last axis has stride 1.
        interleavedBlockScale is whole tiles of 128 rows and 4 columns of each matrix. Offsets stay
        below 2147483648 elements. With no rows, nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words,
        `ArchitectureError` on GPUs other than of compute capability 9.x.

        Kernel: `block_scale_interleave_sm100` of module `fp4_quantization_90`, FlashInfer >=0.6.3,
        `csrc/nv_internal/tensorrt_llm/thop/fp4Op.cpp`.
        """

block_scale_interleave: _block_scale_interleave

class _block_scale_interleave_reverse(Op):
    def __call__(
        self,
        blockScale: TensorLike,
        reversedBlockScale: TensorLike,
        *,
        stream: object = None,
    ) -> None:
        """Put scales back into rows that `block_scale_interleave` put into tiles.

        Args:
            blockScale ([n, rows, cols] uint8; contiguous): scales in tiles.
            reversedBlockScale ([n, rows, cols] uint8; contiguous; written): in rows.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        All tensors are on one device. The last axis has stride 1. rows is a multiple of 128. cols is a
        multiple of 4. Offsets stay below 2147483648 elements. With no rows, nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words,
        `ArchitectureError` on GPUs other than of compute capability 9.x.

        Kernel: `block_scale_interleave_reverse_sm100` of module `fp4_quantization_90`, FlashInfer
        >=0.6.3, `csrc/nv_internal/tensorrt_llm/thop/fp4Op.cpp`.
        """

block_scale_interleave_reverse: _block_scale_interleave_reverse

class _mxfp8_quantize(Op):
    def __call__(
        self,
        input: TensorLike,
        valMxFP8: TensorLike,
        scaleFP8SF: TensorLike,
        sfSwizzleLayout: int = 0,
        alignment: int = 32,
        enable_pdl: bool = False,
        *,
        stream: object = None,
    ) -> None:
        """Quantise to float8_e4m3fn, with a power of 2 for every 32 elements of a row: the least by which
        they are 448 or less.

        Args:
            input ([n, k] T; contiguous; aligned to 32 bytes): rows to quantise.
            valMxFP8 ([n, padded_k] float8_e4m3fn; contiguous; written; aligned to 16 bytes): the
                elements, over their scale; 0 from k on.
            scaleFP8SF ([num_scales] uint8; contiguous; written): the scales' exponents, and 127; 0
                where there are no elements.
            sfSwizzleLayout (int = 0, 0 or more, 2 or less): the scales' order: 0 for tiles of 128 rows
                and 4 columns, 1 for tiles of 8 and 4, 2 for rows.
            alignment (int = 32, 32 or more, 1048576 or less, a multiple of 32): what padded_k is a
                multiple of.
            enable_pdl (bool = False): programmatic dependent launch: start while the previous kernel
                drains.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        T is float16 or bfloat16. All tensors are on one device. The last axis has stride 1. k is at
        least 1. k is a multiple of 32. n is at most 2147483520. padded_k is at most 2147483520.
        valMxFP8 is padded_k = k, rounded up to a multiple of alignment. scaleFP8SF is a scale for every
        32 elements of padded_k, in whole tiles where they are in tiles. With no rows, nothing is
        launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words,
        `ArchitectureError` on GPUs other than of compute capability 10.x or 11.x or 12.x.

        Kernel: `mxfp8_quantize` of module `mxfp8_quantization_sm100`, FlashInfer >=0.6.7,
        `csrc/nv_internal/tensorrt_llm/thop/fp8Quantize.cpp`.
        """

mxfp8_quantize: _mxfp8_quantize

class _nvfp4_kv_quant(Op):
    def __call__(
        self,
        input: TensorLike,
        global_scale: TensorLike,
        fp4_output: TensorLike,
        block_scales: TensorLike,
        *,
        stream: object = None,
    ) -> None:
        """Numbers of 16 bits to 4, as `nvfp4_kv_dequant` takes them: each 16 of a row with the scale
        `largest / 6 / global_scale`.

        Args:
            input ([n, 16*blocks] T; contiguous; aligned to 4 bytes): the numbers.
            global_scale ([1] float32): divides all.
            fp4_output ([n, 8*blocks] uint8; contiguous; written; aligned to 4 bytes): two e2m1 numbers
                a byte, the first in its lower half.
            block_scales ([n, blocks] uint8; contiguous; written): bytes of float8_e4m3fn.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        T is bfloat16 or float16. All tensors are on one device. The last axis has stride 1. blocks is
        at least 1. n is at most 2147483647. Offsets stay below 2147483648 elements. With no rows,
        nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words,
        `ArchitectureError` on GPUs other than of compute capability 10.x or 11.x or 12.x.

        Kernel: `nvfp4_kv_quant` of module `fp4_kv_quant`, FlashInfer >=0.6.7,
        `csrc/fp4_kv_quantization.cu`.
        """

nvfp4_kv_quant: _nvfp4_kv_quant

class _fp4_quantize(Op):
    def __call__(
        self,
        input: TensorLike,
        globalScale: TensorLike | None = None,
        valueE2M1: TensorLike = ...,
        scaleFP8SF: TensorLike = ...,
        sfVecSize: int = 16,
        sfUseUE8M0: bool = False,
        isSfSwizzledLayout: bool = True,
        isSf8x4Layout: bool = False,
        isGlobalScaleInversed: bool = False,
        enable_pdl: bool = False,
        *,
        stream: object = None,
    ) -> None:
        """Quantise to 4 bits (e2m1), with a scale for every 16 or 32 elements of a row: `globalScale *
        largest / 6` as float8_e4m3fn, or the least power of 2 by which they are 6 or less.

        Args:
            input ([n, 2*half] T; contiguous; aligned to 32 bytes): rows to quantise.
            globalScale ([1] float32; or None): multiplies the scales, and elements are over their scale
                over it; as a rule 448 * 6 / the largest element.
            valueE2M1 ([n, half] uint8; contiguous; written; aligned to 8 bytes): two numbers a byte,
                the first in its lower half.
            scaleFP8SF ([num_scales] uint8; contiguous; written): the scales' bytes, or exponents and
                127; 0 where there are no elements.
            sfVecSize (int = 16, 16 or more, 32 or less, a multiple of 16): elements of a scale.
            sfUseUE8M0 (bool = False): whether scales are powers of 2.
            isSfSwizzledLayout (bool = True): whether scales are in tiles, or in rows.
            isSf8x4Layout (bool = False): whether tiles are of 8 rows, or of 128.
            isGlobalScaleInversed (bool = False): whether to divide by `globalScale`.
            enable_pdl (bool = False): programmatic dependent launch.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        T is float16 or bfloat16. All tensors are on one device. The last axis has stride 1. half is at
        least 1. half is a multiple of 8. n is at most 2147483520. half is at most 1073741696. sfVecSize
        is 32 with sfUseUE8M0, and 16 without. input is rows of whole blocks of sfVecSize elements.
        globalScale is a globalScale where there is no sfUseUE8M0. scaleFP8SF is a scale for every
        sfVecSize elements, in whole tiles where they are in tiles. With no rows, nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words,
        `ArchitectureError` on GPUs other than of compute capability 10.x.

        Kernel: `fp4_quantize` of module `fp4_quantization_100`, FlashInfer >=0.6.11,<0.7.2,
        `csrc/nv_internal/tensorrt_llm/thop/fp4Quantize.cpp`.
        """

fp4_quantize: _fp4_quantize

class _softmax(Op):
    def __call__(
        self,
        workspace_buffer: TensorLike | None = None,
        logits: TensorLike = ...,
        output: TensorLike = ...,
        maybe_temperature_arr: TensorLike | None = None,
        temperature_val: float = 1.0,
        enable_pdl: bool = False,
        *,
        stream: object = None,
    ) -> None:
        """Softmax of each row at a temperature: `output = softmax(logits / temperature)`.  Logits are
        finite or -inf, not all of a row -inf.  A temperature of 0 is no greedy choice: it makes all
        probabilities equal.

        Args:
            workspace_buffer ([workspace_size] uint8; contiguous; written; or None; aligned to 8 bytes):
                scratch of 2^20 bytes (rows of more than 2^23 take more) that no other stream uses; for
                None each stream has its own of fi_ffi's.
            logits ([n, h] float32; contiguous): rows of logits.
            output ([n, h] float32; contiguous; written): probabilities; may be `logits` itself.
            maybe_temperature_arr ([n] float32; contiguous; or None): `temperature_val` of each row.
            temperature_val (float = 1.0, 0.0 or more): what logits are divided by.
            enable_pdl (bool = False): programmatic dependent launch (SM90 and later): start while the
                previous kernel drains.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        All tensors are on one device. The last axis has stride 1. Tensors with h are loaded gcd(16
        bytes / the itemsize of float32, h) elements at a time: addresses and the other strides are
        multiples of that. h is at least 1. h is at most 536862720. n is at most 2147483647. Offsets
        stay below 4294967296 elements. What is written shares no memory with other tensors; output and
        logits may be one. With no rows, nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `softmax` of module `sampling`, FlashInfer >=0.6.3,
        `csrc/flashinfer_sampling_binding.cu`.
        """

softmax: _softmax

class _sampling_from_probs(Op):
    def __call__(
        self,
        probs: TensorLike,
        output: TensorLike,
        valid: TensorLike,
        maybe_indices: TensorLike | None = None,
        deterministic: bool = True,
        maybe_seed_arr: TensorLike | None = None,
        seed_val: int = 0,
        maybe_offset_arr: TensorLike | None = None,
        offset_val: int = 0,
        *,
        stream: object = None,
    ) -> None:
        """Draw a token of each row by its probabilities.

        Args:
            probs ([r, h] float32; contiguous): rows that sum to 1, of nothing below 0.
            output ([n] I; contiguous; written): the tokens; 0 where a row has none.
            valid ([n] bool; contiguous; written): whether a row had a token.
            maybe_indices ([n] I; contiguous; or None): the row that each output is drawn from; without
                it, its own.
            deterministic (bool = True): the same token for the same arguments each time.
            maybe_seed_arr ([1] S; contiguous; or None): the seed, instead of `seed_val`: one element
                for all outputs.
            seed_val (int = 0): the seed, 64 bits of which the sign is one.
            maybe_offset_arr ([1] S; contiguous; or None): the offset, instead of `offset_val`: one
                element for all outputs.
            offset_val (int = 0): the random words to skip, which calls before have used.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        I is int32 or int64; S is int64 or uint64. All tensors are on one device. The last axis has
        stride 1. Tensors with h are loaded gcd(16 bytes / the itemsize of float32, h) elements at a
        time: addresses and the other strides are multiples of that. h is at least 1. r is at least 1,
        unless n is 0. h is at most 2147483647. n is at most 2147483647. output is as long as there are
        rows at most, unless there are `maybe_indices`. Offsets stay below 4294967296 elements. With n =
        0, nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `sampling_from_probs` of module `sampling`, FlashInfer >=0.6.7,<0.7.2,
        `csrc/flashinfer_sampling_binding.cu`.
        """

sampling_from_probs: _sampling_from_probs

class _sampling_from_logits(Op):
    def __call__(
        self,
        logits: TensorLike,
        output: TensorLike,
        maybe_indices: TensorLike | None = None,
        deterministic: bool = True,
        maybe_seed_arr: TensorLike | None = None,
        seed_val: int = 0,
        maybe_offset_arr: TensorLike | None = None,
        offset_val: int = 0,
        *,
        stream: object = None,
    ) -> None:
        """Draw a token of each row by softmax(logits): the greatest of logits and Gumbel noise.  Logits
        are finite or -inf, not all of a row -inf.

        Args:
            logits ([r, h] float32; contiguous): rows of logits.
            output ([n] I; contiguous; written): the tokens.
            maybe_indices ([n] I; contiguous; or None): the row that each output is drawn from; without
                it, its own.
            deterministic (bool = True): no matter: it always is.
            maybe_seed_arr ([1] S; contiguous; or None): the seed, instead of `seed_val`: one element
                for all outputs.
            seed_val (int = 0): the seed, 64 bits of which the sign is one.
            maybe_offset_arr ([1] S; contiguous; or None): the offset, instead of `offset_val`: one
                element for all outputs.
            offset_val (int = 0): the random words to skip, which calls before have used.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        I is int32 or int64; S is int64 or uint64. All tensors are on one device. The last axis has
        stride 1. Tensors with h are loaded gcd(16 bytes / the itemsize of float32, h) elements at a
        time: addresses and the other strides are multiples of that. n * h is at most 4294967296. h is
        at least 1. r is at least 1, unless n is 0. h is at most 2147483647. n is at most 2147483647.
        output is as long as there are rows at most, unless there are `maybe_indices`. Offsets stay
        below 4294967296 elements. With n = 0, nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `sampling_from_logits` of module `sampling`, FlashInfer >=0.6.4,<0.7.2,
        `csrc/flashinfer_sampling_binding.cu`.
        """

sampling_from_logits: _sampling_from_logits

class _top_k_sampling_from_probs(Op):
    def __call__(
        self,
        probs: TensorLike,
        output: TensorLike,
        valid: TensorLike,
        maybe_indices: TensorLike | None = None,
        maybe_top_k_arr: TensorLike | None = None,
        top_k_val: int = 2147483647,
        deterministic: bool = True,
        maybe_seed_arr: TensorLike | None = None,
        seed_val: int = 0,
        maybe_offset_arr: TensorLike | None = None,
        offset_val: int = 0,
        *,
        stream: object = None,
    ) -> None:
        """Draw a token of each row from its `top_k` most probable ones, and those as probable as the last
        of them.

        Args:
            probs ([r, h] float32; contiguous): rows that sum to 1, of nothing below 0.
            output ([n] I; contiguous; written): the tokens; 0 where a row has none.
            valid ([n] bool; contiguous; written): whether a row had a token.
            maybe_indices ([n] I; contiguous; or None): the row that each output is drawn from; without
                it, its own.
            maybe_top_k_arr ([r] I; contiguous; or None): `top_k_val` of each row, of the outputs'
                dtype.
            top_k_val (int = 2147483647, 1 or more, 2147483647 or less): how many of the most probable
                tokens are left.
            deterministic (bool = True): the same token for the same arguments each time.
            maybe_seed_arr ([1] S; contiguous; or None): the seed, instead of `seed_val`: one element
                for all outputs.
            seed_val (int = 0): the seed, 64 bits of which the sign is one.
            maybe_offset_arr ([1] S; contiguous; or None): the offset, instead of `offset_val`: one
                element for all outputs.
            offset_val (int = 0): the random words to skip, which calls before have used.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        I is int32 or int64; S is int64 or uint64. All tensors are on one device. The last axis has
        stride 1. Tensors with h are loaded gcd(16 bytes / the itemsize of float32, h) elements at a
        time: addresses and the other strides are multiples of that. h is at least 1. r is at least 1,
        unless n is 0. h is at most 2147483647. n is at most 2147483647. output is as long as there are
        rows at most, unless there are `maybe_indices`. maybe_top_k_arr is at least as long as `output`,
        by whose elements it is read. Offsets stay below 4294967296 elements. With n = 0, nothing is
        launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `top_k_sampling_from_probs` of module `sampling`, FlashInfer >=0.6.7,<0.7.2,
        `csrc/flashinfer_sampling_binding.cu`.
        """

top_k_sampling_from_probs: _top_k_sampling_from_probs

class _top_p_sampling_from_probs(Op):
    def __call__(
        self,
        probs: TensorLike,
        output: TensorLike,
        valid: TensorLike,
        maybe_indices: TensorLike | None = None,
        maybe_top_p_arr: TensorLike | None = None,
        top_p_val: float = 1.0,
        deterministic: bool = True,
        maybe_seed_arr: TensorLike | None = None,
        seed_val: int = 0,
        maybe_offset_arr: TensorLike | None = None,
        offset_val: int = 0,
        *,
        stream: object = None,
    ) -> None:
        """Draw a token of each row from the most probable ones that sum to `top_p`.

        Args:
            probs ([r, h] float32; contiguous): rows that sum to 1, of nothing below 0.
            output ([n] I; contiguous; written): the tokens; 0 where a row has none.
            valid ([n] bool; contiguous; written): whether a row had a token.
            maybe_indices ([n] I; contiguous; or None): the row that each output is drawn from; without
                it, its own.
            maybe_top_p_arr ([r] float32; contiguous; or None): `top_p_val` of each row.
            top_p_val (float = 1.0, 0.0 or more): what the most probable tokens that are left sum to at
                least; with 0 no row has a token.
            deterministic (bool = True): the same token for the same arguments each time.
            maybe_seed_arr ([1] S; contiguous; or None): the seed, instead of `seed_val`: one element
                for all outputs.
            seed_val (int = 0): the seed, 64 bits of which the sign is one.
            maybe_offset_arr ([1] S; contiguous; or None): the offset, instead of `offset_val`: one
                element for all outputs.
            offset_val (int = 0): the random words to skip, which calls before have used.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        I is int32 or int64; S is int64 or uint64. All tensors are on one device. The last axis has
        stride 1. Tensors with h are loaded gcd(16 bytes / the itemsize of float32, h) elements at a
        time: addresses and the other strides are multiples of that. h is at least 1. r is at least 1,
        unless n is 0. h is at most 2147483647. n is at most 2147483647. output is as long as there are
        rows at most, unless there are `maybe_indices`. Offsets stay below 4294967296 elements. With n =
        0, nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `top_p_sampling_from_probs` of module `sampling`, FlashInfer >=0.6.7,<0.7.2,
        `csrc/flashinfer_sampling_binding.cu`.
        """

top_p_sampling_from_probs: _top_p_sampling_from_probs

class _min_p_sampling_from_probs(Op):
    def __call__(
        self,
        probs: TensorLike,
        output: TensorLike,
        valid: TensorLike,
        maybe_indices: TensorLike | None = None,
        maybe_min_p_arr: TensorLike | None = None,
        min_p_val: float = 0.0,
        deterministic: bool = True,
        maybe_seed_arr: TensorLike | None = None,
        seed_val: int = 0,
        maybe_offset_arr: TensorLike | None = None,
        offset_val: int = 0,
        *,
        stream: object = None,
    ) -> None:
        """Draw a token of each row from those that have `min_p` of the greatest probability at least.

        Args:
            probs ([r, h] float32; contiguous): rows that sum to 1, of nothing below 0.
            output ([n] I; contiguous; written): the tokens; 0 where a row has none.
            valid ([n] bool; contiguous; written): whether a row had a token.
            maybe_indices ([n] I; contiguous; or None): the row that each output is drawn from; without
                it, its own.
            maybe_min_p_arr ([r] float32; contiguous; or None): `min_p_val` of each row.
            min_p_val (float = 0.0, 0.0 or more): of the greatest probability, the part that a token
                must have to be left.
            deterministic (bool = True): the same token for the same arguments each time.
            maybe_seed_arr ([1] S; contiguous; or None): the seed, instead of `seed_val`: one element
                for all outputs.
            seed_val (int = 0): the seed, 64 bits of which the sign is one.
            maybe_offset_arr ([1] S; contiguous; or None): the offset, instead of `offset_val`: one
                element for all outputs.
            offset_val (int = 0): the random words to skip, which calls before have used.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        I is int32 or int64; S is int64 or uint64. All tensors are on one device. The last axis has
        stride 1. Tensors with h are loaded gcd(16 bytes / the itemsize of float32, h) elements at a
        time: addresses and the other strides are multiples of that. h is at least 1. r is at least 1,
        unless n is 0. h is at most 2147483647. n is at most 2147483647. output is as long as there are
        rows at most, unless there are `maybe_indices`. maybe_min_p_arr is at least as long as `output`,
        by whose elements it is read. Offsets stay below 4294967296 elements. With n = 0, nothing is
        launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `min_p_sampling_from_probs` of module `sampling`, FlashInfer >=0.6.7,<0.7.2,
        `csrc/flashinfer_sampling_binding.cu`.
        """

min_p_sampling_from_probs: _min_p_sampling_from_probs

class _top_k_top_p_sampling_from_probs(Op):
    def __call__(
        self,
        probs: TensorLike,
        output: TensorLike,
        valid: TensorLike,
        maybe_indices: TensorLike | None = None,
        maybe_top_k_arr: TensorLike | None = None,
        top_k_val: float = 2147483647.0,
        maybe_top_p_arr: TensorLike | None = None,
        top_p_val: float = 1.0,
        deterministic: bool = True,
        maybe_seed_arr: TensorLike | None = None,
        seed_val: int = 0,
        maybe_offset_arr: TensorLike | None = None,
        offset_val: int = 0,
        *,
        stream: object = None,
    ) -> None:
        """Draw a token of each row from those that both the `top_k` and the `top_p` filter leave, each of
        the whole row (FlashInfer's `joint` order).

        Args:
            probs ([r, h] float32; contiguous): rows that sum to 1, of nothing below 0.
            output ([n] I; contiguous; written): the tokens; 0 where a row has none.
            valid ([n] bool; contiguous; written): whether a row had a token.
            maybe_indices ([n] I; contiguous; or None): the row that each output is drawn from; without
                it, its own.
            maybe_top_k_arr ([r] I; contiguous; or None): `top_k_val` of each row, of the outputs'
                dtype.
            top_k_val (float = 2147483647.0, 1 or more, 2147483647 or less): how many of the most
                probable tokens are left, a whole number.
            maybe_top_p_arr ([r] float32; contiguous; or None): `top_p_val` of each row.
            top_p_val (float = 1.0, 0.0 or more): what the most probable tokens that are left sum to at
                least; with 0 no row has a token.
            deterministic (bool = True): the same token for the same arguments each time.
            maybe_seed_arr ([1] S; contiguous; or None): the seed, instead of `seed_val`: one element
                for all outputs.
            seed_val (int = 0): the seed, 64 bits of which the sign is one.
            maybe_offset_arr ([1] S; contiguous; or None): the offset, instead of `offset_val`: one
                element for all outputs.
            offset_val (int = 0): the random words to skip, which calls before have used.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        I is int32 or int64; S is int64 or uint64. All tensors are on one device. The last axis has
        stride 1. Tensors with h are loaded gcd(16 bytes / the itemsize of float32, h) elements at a
        time: addresses and the other strides are multiples of that. h is at least 1. r is at least 1,
        unless n is 0. h is at most 2147483647. n is at most 2147483647. output is as long as there are
        rows at most, unless there are `maybe_indices`. Offsets stay below 4294967296 elements. With n =
        0, nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `top_k_top_p_sampling_from_probs` of module `sampling`, FlashInfer >=0.6.7,<0.7.2,
        `csrc/flashinfer_sampling_binding.cu`.
        """

top_k_top_p_sampling_from_probs: _top_k_top_p_sampling_from_probs

class _top_p_renorm_probs(Op):
    def __call__(
        self,
        probs: TensorLike,
        renorm_probs: TensorLike,
        maybe_top_p_arr: TensorLike | None = None,
        top_p_val: float = 4.0,
        is_deterministic: bool = True,
        workspace: TensorLike | None = None,
        *,
        stream: object = None,
    ) -> None:
        """Keep the most probable tokens of each row that sum to `top_p`, and those as probable as the last
        of them, and make them sum to 1.

        Args:
            probs ([n, h] float32; contiguous): rows that sum to 1.
            renorm_probs ([n, h] float32; contiguous; written): may be `probs` itself.
            maybe_top_p_arr ([n] float32; contiguous; or None): `top_p_val` of each row.
            top_p_val (float = 4.0, 0.0 or more): what is left sums to so much at least; 4.0 keeps all,
                while 1.0 may lose the least probable.
            is_deterministic (bool = True): the same result each time: sums of rows in 64-bit integers,
                which takes longer.
            workspace ([workspace_size] uint8; contiguous; written; or None; aligned to 128 bytes):
                scratch of `top_p_renorm_workspace_size(n, h)` bytes that no other stream uses; without
                it each stream has its own of fi_ffi's.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        All tensors are on one device. The last axis has stride 1. Tensors with h are loaded gcd(16
        bytes / the itemsize of float32, h) elements at a time: addresses and the other strides are
        multiples of that. h is at least 1. h is at most 2147483647. n is at most 65535. top_p_val is at
        most 1.0, or 4.0 for all of a row. Offsets stay below 2147483648 elements. What is written
        shares no memory with other tensors; renorm_probs and probs may be one. With no rows, nothing is
        launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `top_p_renorm_probs` of module `sampling`, FlashInfer >=0.6.7,
        `csrc/flashinfer_sampling_binding.cu`.
        """

top_p_renorm_probs: _top_p_renorm_probs

class _top_k_renorm_probs(Op):
    def __call__(
        self,
        probs: TensorLike,
        renorm_probs: TensorLike,
        maybe_top_k_arr: TensorLike | None = None,
        top_k_val: int = 2147483647,
        row_states_buffer: TensorLike | None = None,
        *,
        stream: object = None,
    ) -> None:
        """Keep the `top_k` most probable tokens of each row, and make them sum to 1.

        Args:
            probs ([n, h] T; contiguous): rows of nothing below 0.
            renorm_probs ([n, h] T; contiguous; written): may be `probs` itself.
            maybe_top_k_arr ([n] int32; contiguous; or None): `top_k_val` of each row; 0 leaves nothing.
            top_k_val (int = 2147483647, 1 or more, 2147483647 or less): how many are left, and with
                them those equal to the last.
            row_states_buffer ([workspace_size] uint8; contiguous; written; or None; aligned to 8
                bytes): scratch of 2^20 bytes that no other stream uses, zero before its first call;
                without it each stream has its own of fi_ffi's.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        T is float32 or float16 or bfloat16. All tensors are on one device. The last axis has stride 1.
        Tensors with h are loaded gcd(16 bytes / the itemsize of T, h) elements at a time: addresses and
        the other strides are multiples of that. h is at least 1. h is at most 2147483647. n is at most
        2147483647. probs is of rows of 15000 elements for each multiprocessor of the GPU at most: the
        blocks that share one wait for each other. Offsets stay below 4294967296 elements. What is
        written shares no memory with other tensors; renorm_probs and probs may be one. With no rows,
        nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `top_k_renorm_probs` of module `sampling`, FlashInfer >=0.6.3,<0.7.1,
        `csrc/flashinfer_sampling_binding.cu`.
        """

top_k_renorm_probs: _top_k_renorm_probs

class _top_k_mask_logits(Op):
    def __call__(
        self,
        logits: TensorLike,
        mask_logits: TensorLike,
        maybe_top_k_arr: TensorLike | None = None,
        top_k_val: int = 2147483647,
        row_states_buffer: TensorLike | None = None,
        *,
        stream: object = None,
    ) -> None:
        """Keep the `top_k` greatest logits of each row; the others become -inf.

        Args:
            logits ([n, h] T; contiguous): rows of logits, none of them NaN.
            mask_logits ([n, h] T; contiguous; written): may be `logits` itself.
            maybe_top_k_arr ([n] int32; contiguous; or None): `top_k_val` of each row; 0 leaves nothing.
            top_k_val (int = 2147483647, 1 or more, 2147483647 or less): how many are left, and with
                them those equal to the last.
            row_states_buffer ([workspace_size] uint8; contiguous; written; or None; aligned to 8
                bytes): scratch of 2^20 bytes that no other stream uses, zero before its first call;
                without it each stream has its own of fi_ffi's.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        T is float32 or float16 or bfloat16. All tensors are on one device. The last axis has stride 1.
        Tensors with h are loaded gcd(16 bytes / the itemsize of T, h) elements at a time: addresses and
        the other strides are multiples of that. h is at least 1. h is at most 2147483647. n is at most
        2147483647. logits is of rows of 15000 elements for each multiprocessor of the GPU at most: the
        blocks that share one wait for each other. Offsets stay below 4294967296 elements. What is
        written shares no memory with other tensors; mask_logits and logits may be one. With no rows,
        nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `top_k_mask_logits` of module `sampling`, FlashInfer >=0.6.3,
        `csrc/flashinfer_sampling_binding.cu`.
        """

top_k_mask_logits: _top_k_mask_logits

class _chain_speculative_sampling(Op):
    def __call__(
        self,
        draft_probs: TensorLike,
        draft_token_ids: TensorLike,
        target_probs: TensorLike,
        output_token_ids: TensorLike,
        output_accepted_token_num: TensorLike,
        output_emitted_draft_token_num: TensorLike,
        deterministic: bool = True,
        maybe_seed_arr: TensorLike | None = None,
        seed_val: int = 0,
        maybe_offset_arr: TensorLike | None = None,
        offset_val: int = 0,
        *,
        stream: object = None,
    ) -> None:
        """Verify a chain of drafted tokens: each is emitted with probability `min(1, target / draft)` as
        long as those before it were; then one more is drawn, of the rest of the target's distribution.

        Args:
            draft_probs ([n, s, h] float32; contiguous): the draft's distributions.
            draft_token_ids ([n, s] int32; contiguous): the drafted tokens, from 0 to h - 1.
            target_probs ([n, s+1, h] float32; contiguous): the target's distributions.
            output_token_ids ([n, s+1] int32; contiguous; written): the tokens emitted, the one after
                them, and -1.
            output_accepted_token_num ([n] int32; contiguous; written): grows by the drafted tokens that
                would be taken one by one.
            output_emitted_draft_token_num ([n] int32; contiguous; written): grows by the drafted tokens
                emitted.
            deterministic (bool = True): the same token for the same arguments each time.
            maybe_seed_arr ([1] S; contiguous; or None): the seed, instead of `seed_val`: one element
                for all outputs.
            seed_val (int = 0): the seed, 64 bits of which the sign is one.
            maybe_offset_arr ([1] S; contiguous; or None): the offset, instead of `offset_val`: one
                element for all outputs.
            offset_val (int = 0): the random words to skip, which calls before have used.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        S is int64 or uint64. All tensors are on one device. The last axis has stride 1. Tensors with h
        are loaded gcd(16 bytes / the itemsize of float32, h) elements at a time: addresses and the
        other strides are multiples of that. h is at least 1. s is at least 1. h is at most 2147483647.
        n is at most 2147483647. Offsets stay below 4294967296 elements. With no rows, nothing is
        launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `chain_speculative_sampling` of module `sampling`, FlashInfer >=0.6.4,<0.7.2,
        `csrc/flashinfer_sampling_binding.cu`.
        """

chain_speculative_sampling: _chain_speculative_sampling

class _radix_topk(Op):
    def __call__(
        self,
        input: TensorLike,
        output_indices: TensorLike,
        output_values: TensorLike,
        maybe_row_states_buffer: TensorLike | None = None,
        top_k: int | None = None,
        sorted_output: bool = False,
        deterministic: bool = False,
        tie_break: int = 0,
        dsa_graph_safe: bool = False,
        *,
        stream: object = None,
    ) -> None:
        """Choose the `top_k` greatest elements of each row, in any order unless `sorted_output` is set.

        Args:
            input ([n, d] T; contiguous): rows to choose from, none of them NaN.
            output_indices ([n, top_k] int32; contiguous; written): where they are in their rows.
            output_values ([n, top_k] T; contiguous; written): what they are.
            maybe_row_states_buffer ([workspace_size] uint8; contiguous; written; or None; aligned to 8
                bytes): scratch of 2^20 bytes that no other stream uses, zero before its first call;
                without it each stream has its own of fi_ffi's.
            top_k (int or None = None, 0 or more, 2147483647 or less, the size of top_k): how many are
                chosen.
            sorted_output (bool = False): the greatest first; of 2048 at most.
            deterministic (bool = False): the same in the same order each time.
            tie_break (int = 0, 0 or more, 2 or less): which of equal ones share the last places: 0 any,
                1 those of the smallest indices, 2 of the largest, each of 2048 at most; and then it is
                deterministic.
            dsa_graph_safe (bool = False): one kernel whatever the sizes are, for graphs that are
                replayed with others; of 2048 at most.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        T is float32 or float16 or bfloat16. All tensors are on one device. The last axis has stride 1.
        Tensors with d are loaded gcd(16 bytes / the itemsize of T, d) elements at a time: addresses and
        the other strides are multiples of that. d is at least 1. n * top_k is at most 4294967295. d is
        at most 2147483647. n is at most 2147483647. d is at least top_k. input is of rows of 15000
        elements for each multiprocessor of the GPU at most: the blocks that share one wait for each
        other. top_k is 2048 at most with `sorted_output`. top_k is 2048 at most with `tie_break`. top_k
        is 2048 at most with `dsa_graph_safe`. What is written shares no memory with other tensors. With
        no rows, nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `radix_topk` of module `topk`, FlashInfer >=0.6.10,<0.6.18,
        `csrc/flashinfer_topk_binding.cu`.
        """

radix_topk: _radix_topk

class _radix_topk_page_table_transform(Op):
    def __call__(
        self,
        input: TensorLike,
        output_page_table: TensorLike,
        src_page_table: TensorLike,
        maybe_row_to_batch: TensorLike | None = None,
        lengths: TensorLike = ...,
        maybe_row_states_buffer: TensorLike | None = None,
        top_k: int | None = None,
        deterministic: bool = False,
        tie_break: int = 0,
        dsa_graph_safe: bool = False,
        maybe_row_starts: TensorLike | None = None,
        *,
        stream: object = None,
    ) -> None:
        """Choose the `top_k` greatest elements of each row's first `lengths`, and give what a page table
        has in their places: `src_page_table[batch, start + index]`.  Of a row that has no more than
        `top_k`, all are given, in order, and then -1.

        Args:
            input ([n, d] T; contiguous): rows to choose from, none of them NaN.
            output_page_table ([n, top_k] int32; contiguous; written): what the page table has.
            src_page_table ([b, m] int32; contiguous): page tables, at least as long as the rows.
            maybe_row_to_batch ([n] int32; contiguous; or None): the page table of each row; without it,
                its own.
            lengths ([n] int32; contiguous): how many elements of each row there are to choose from.
            maybe_row_states_buffer ([workspace_size] uint8; contiguous; written; or None; aligned to 8
                bytes): scratch of 2^20 bytes that no other stream uses, zero before its first call;
                without it each stream has its own of fi_ffi's.
            top_k (int or None = None, 0 or more, 2147483647 or less, the size of top_k): how many are
                chosen.
            deterministic (bool = False): the same in the same order each time.
            tie_break (int = 0, 0 or more, 2 or less): which of equal ones share the last places: 0 any,
                1 those of the smallest indices, 2 of the largest, each of 2048 at most; and then it is
                deterministic.
            dsa_graph_safe (bool = False): one kernel whatever the sizes are, for graphs that are
                replayed with others; of 2048 at most.
            maybe_row_starts ([n] int32; contiguous; or None): where in each row they start; without it,
                at 0.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        T is float32 or float16 or bfloat16. All tensors are on one device. The last axis has stride 1.
        Tensors with d are loaded gcd(16 bytes / the itemsize of T, d) elements at a time: addresses and
        the other strides are multiples of that. d is at least 1. n * top_k is at most 4294967295. d is
        at most 2147483647. n is at most 2147483647. b is at least 1, unless n is 0. input is of rows of
        15000 elements for each multiprocessor of the GPU at most: the blocks that share one wait for
        each other. top_k is 2048 at most with `tie_break`. top_k is 2048 at most with `dsa_graph_safe`.
        src_page_table is m of at least d. src_page_table is a page table for each row, unless there is
        `maybe_row_to_batch`. deterministic is True for rows that several blocks share: else they race,
        and entries are wrong. What is written shares no memory with other tensors. With n = 0, nothing
        is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `radix_topk_page_table_transform` of module `topk`, FlashInfer >=0.6.10,<0.6.17,
        `csrc/flashinfer_topk_binding.cu`.
        """

radix_topk_page_table_transform: _radix_topk_page_table_transform

class _radix_topk_ragged_transform(Op):
    def __call__(
        self,
        input: TensorLike,
        output_indices: TensorLike,
        offsets: TensorLike,
        lengths: TensorLike,
        maybe_row_states_buffer: TensorLike | None = None,
        top_k: int | None = None,
        deterministic: bool = False,
        tie_break: int = 0,
        dsa_graph_safe: bool = False,
        maybe_row_starts: TensorLike | None = None,
        *,
        stream: object = None,
    ) -> None:
        """Choose the `top_k` greatest elements of each row's first `lengths`, and give their indices there
        plus the row's offset.  Of a row that has no more than `top_k`, all are given, in order, and
        then -1.

        Args:
            input ([n, d] T; contiguous): rows to choose from, none of them NaN.
            output_indices ([n, top_k] int32; contiguous; written): where they are in their rows.
            offsets ([n] int32; contiguous): what is added to each row's indices.
            lengths ([n] int32; contiguous): how many elements of each row there are to choose from.
            maybe_row_states_buffer ([workspace_size] uint8; contiguous; written; or None; aligned to 8
                bytes): scratch of 2^20 bytes that no other stream uses, zero before its first call;
                without it each stream has its own of fi_ffi's.
            top_k (int or None = None, 0 or more, 2147483647 or less, the size of top_k): how many are
                chosen.
            deterministic (bool = False): the same in the same order each time.
            tie_break (int = 0, 0 or more, 2 or less): which of equal ones share the last places: 0 any,
                1 those of the smallest indices, 2 of the largest, each of 2048 at most; and then it is
                deterministic.
            dsa_graph_safe (bool = False): one kernel whatever the sizes are, for graphs that are
                replayed with others; of 2048 at most.
            maybe_row_starts ([n] int32; contiguous; or None): where in each row they start; without it,
                at 0.
            stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope.

        T is float32 or float16 or bfloat16. All tensors are on one device. The last axis has stride 1.
        Tensors with d are loaded gcd(16 bytes / the itemsize of T, d) elements at a time: addresses and
        the other strides are multiples of that. d is at least 1. n * top_k is at most 4294967295. d is
        at most 2147483647. n is at most 2147483647. input is of rows of 15000 elements for each
        multiprocessor of the GPU at most: the blocks that share one wait for each other. top_k is 2048
        at most with `tie_break`. top_k is 2048 at most with `dsa_graph_safe`. What is written shares no
        memory with other tensors. With no rows, nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `radix_topk_ragged_transform` of module `topk`, FlashInfer >=0.6.10,
        `csrc/flashinfer_topk_binding.cu`.
        """

radix_topk_ragged_transform: _radix_topk_ragged_transform
