"""Generated from the op table by tools/generate_stubs.py."""

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

        T is float16 or bfloat16. All tensors are on one device. The last axis has stride 1. Rows are
        loaded gcd(16 bytes / itemsize of T, h) elements at a time: addresses and the other strides are
        multiples of that. Offsets stay below 4294967296 elements. With no rows, nothing is launched.

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

        T is float16 or bfloat16. All tensors are on one device. The last axis has stride 1. Rows are
        loaded gcd(16 bytes / itemsize of T, h) elements at a time: addresses and the other strides are
        multiples of that. Offsets stay below 4294967296 elements. With no rows, nothing is launched.

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

        T is float16 or bfloat16. All tensors are on one device. The last axis has stride 1. Rows are
        loaded gcd(16 bytes / itemsize of T, h) elements at a time: addresses and the other strides are
        multiples of that. Offsets stay below 4294967296 elements. With no rows, nothing is launched.

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

        T is float16 or bfloat16. All tensors are on one device. The last axis has stride 1. Rows are
        loaded gcd(16 bytes / itemsize of T, h) elements at a time: addresses and the other strides are
        multiples of that. Offsets stay below 4294967296 elements. With no rows, nothing is launched.

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

        T is float16 or bfloat16. All tensors are on one device. The last axis has stride 1. Rows are
        loaded gcd(16 bytes / itemsize of T, h) elements at a time: addresses and the other strides are
        multiples of that. Offsets stay below 4294967296 elements. With no rows, nothing is launched.

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
        last axis has stride 1. Rows are loaded gcd(16 bytes / itemsize of T, h) elements at a time:
        addresses and the other strides are multiples of that. Offsets stay below 4294967296 elements.
        With no rows, nothing is launched.

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
        last axis has stride 1. Rows are loaded gcd(16 bytes / itemsize of T, h) elements at a time:
        addresses and the other strides are multiples of that. Offsets stay below 4294967296 elements.
        With no rows, nothing is launched.

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

        T is bfloat16. All tensors are on one device. The last axis has stride 1. Rows are loaded gcd(4
        bytes / itemsize of T, h) elements at a time: addresses and the other strides are multiples of
        that. Offsets stay below 2147483648 elements. With no rows, nothing is launched.

        Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` where the
        kernel file has another interface, `KernelError` with the kernel's own words.

        Kernel: `layernorm` of module `norm`, FlashInfer >=0.6.3, `csrc/flashinfer_norm_binding.cu`.
        """

layernorm: _layernorm
