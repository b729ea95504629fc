"""CUDA's errors by number: those after which a process has lost its GPU, and those of others.

The numbers are the runtime's and the driver's alike (driver_types.h, cuda.h).
"""

from __future__ import annotations

from fi_ffi.errors import DeviceError

# Of which CUDA says that further work returns the same error, until the process ends.
STICKY = {
    214: "cudaErrorECCUncorrectable",
    220: "cudaErrorNvlinkUncorrectable",
    226: "cudaErrorContained",
    700: "cudaErrorIllegalAddress",
    702: "cudaErrorLaunchTimeout",
    709: "cudaErrorContextIsDestroyed",
    710: "cudaErrorAssert",
    714: "cudaErrorHardwareStackError",
    715: "cudaErrorIllegalInstruction",
    716: "cudaErrorMisalignedAddress",
    717: "cudaErrorInvalidAddressSpace",
    718: "cudaErrorInvalidPc",
    719: "cudaErrorLaunchFailure",
    721: "cudaErrorTensorMemoryLeak",
    911: "cudaErrorExternalDevice",
}

# What a thread may have been left with by another call, and no launch ends in.
LEFTOVERS = {
    3: "cudaErrorInitializationError",
    35: "cudaErrorInsufficientDriver",
    100: "cudaErrorNoDevice",
    101: "cudaErrorInvalidDevice",
    600: "cudaErrorNotReady",
    704: "cudaErrorPeerAccessAlreadyEnabled",
    705: "cudaErrorPeerAccessNotEnabled",
    712: "cudaErrorHostMemoryAlreadyRegistered",
    713: "cudaErrorHostMemoryNotRegistered",
    910: "cudaErrorGraphExecUpdateFailure",
}

_WHAT_TO_DO = (
    "Work that was queued earlier, by this or any other call of this process, failed on the GPU; "
    "{op} only noticed. The process has lost its CUDA context: every later call fails alike, what "
    "is in GPU memory cannot be trusted, and only a new process can go on. To find the call at "
    "fault: run it with CUDA_LAUNCH_BLOCKING=1, in fi_ffi.call_log(5, ...), or under "
    "compute-sanitizer"
)


def lost(op: str, code: int, words: str = "") -> DeviceError:
    """The error of a GPU that is lost to this process, for a code of `STICKY`."""
    told = f"CUDA error {code} ({words or STICKY[code]})"
    return DeviceError(op, STICKY[code], f"{told}. {_WHAT_TO_DO.format(op=op)}", code)
