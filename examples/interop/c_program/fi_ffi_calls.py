"""The Python half of main.c: addresses in, a code and a message out.

main.c owns the memory and the stream.  Here they are only described, for as long as a call lasts.
"""

import fi_ffi

# What C can switch on; everything else is a fault of this file's, and a traceback.
CODES = (
    (fi_ffi.ArgumentError, 1),  # a wrong call: nothing was launched
    (fi_ffi.DeviceError, 3),  # the GPU is lost, and this process with it
    (fi_ffi.KernelError, 2),  # the kernel's own refusal
    (fi_ffi.FiFfiError, 4),  # no kernels for this GPU, a file that is damaged, ...
)


def fused_add_rmsnorm(device, x, residual, weight, rows, hidden, stream):
    """`residual += x; x = residual / rms(residual) * weight`, in place, on float16."""
    try:
        fi_ffi.fused_add_rmsnorm(
            fi_ffi.TensorDesc(x, (rows, hidden), "float16", device=device),
            fi_ffi.TensorDesc(residual, (rows, hidden), "float16", device=device),
            fi_ffi.TensorDesc(weight, (hidden,), "float16", device=device),
            stream=stream,
        )
    except fi_ffi.FiFfiError as error:
        return next(code for kind, code in CODES if isinstance(error, kind)), str(error)
    return 0, ""
