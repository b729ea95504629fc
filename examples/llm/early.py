"""CUDA's context, which takes as long to make as everything else takes to be imported."""

import contextlib
import threading


def begin(index=0):
    """Make a GPU's context in a thread, which needs Python for nothing but to begin."""
    threading.Thread(target=_begun, args=(index,), daemon=True).start()


def _begun(index):
    with contextlib.suppress(ImportError, RuntimeError):  # no driver: what follows says so
        from cuda.bindings import runtime

        runtime.cudaSetDevice(index)
        runtime.cudaFree(0)
