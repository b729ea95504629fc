"""Kernels in CuTe DSL of other packages, for `fi-ffi build --cute`, which calls these functions.

    fi-ffi build --cute examples/cute_kernels.py:rmsnorm --with quack-kernels==0.6.5

`fi-ffi build` calls them on a machine that needs no GPU, and makes a library of each kernel that
they compile. Tensors say only which dtypes and sizes a kernel is for. docs/building.md explains it.
"""

import importlib
import os
import sys
import types


def rmsnorm():
    """quack's RMSNorm of bfloat16 rows of 4,096: x, weight, out, eps."""
    import torch

    norm = _quack().rmsnorm_fwd
    norm(torch.empty(2, 4096, dtype=torch.bfloat16, device="cuda"),
         torch.empty(4096, dtype=torch.bfloat16, device="cuda"))  # fmt: skip


def rmsnorm_residual():
    """The same of x + residual, which it writes too."""
    import torch

    x = torch.empty(2, 4096, dtype=torch.bfloat16, device="cuda")
    _quack().rmsnorm_fwd(x, x[0].clone(), residual=x.clone())


def attention():
    """FlashAttention 4's forward for sm_90, causal: bfloat16, 32 query heads of 128, 8 of keys."""
    _attention(causal=True)


def attention_paged():
    """The same over pages of 128 tokens, with the lengths of the requests."""
    import torch

    table = torch.empty(2, 4, dtype=torch.int32, device="cuda")
    _attention(causal=True, page_table=table, seqused_k=table[:, 0].contiguous())


def _attention(page_table=None, **options):
    import torch

    _quack()  # FlashAttention 4 uses it
    from flash_attn.cute.interface import _flash_attn_fwd

    q = torch.empty(2, 256, 32, 128, dtype=torch.bfloat16, device="cuda")
    k = torch.empty(*((2, 512) if page_table is None else (8, 128)), 8, 128, dtype=q.dtype,
                    device="cuda")  # fmt: skip
    _flash_attn_fwd(q, k, k.clone(), page_table=page_table, return_lse=True, **options)


def _quack():
    importlib.import_module("torch._dynamo")  # first: it would take the stand-in for Triton
    # What quack keeps on disk would not be compiled again.
    os.environ["QUACK_CACHE_ENABLED"] = "0"
    # Its tuner, which runs kernels, imports Triton: 1 GB that nothing here calls.
    cache = types.SimpleNamespace(FileCacheManager=object)
    sys.modules["triton"] = types.SimpleNamespace(runtime=types.SimpleNamespace(cache=cache))
    import quack

    del sys.modules["triton"]
    return sys.modules[quack.rmsnorm.__module__]  # the function hides the module of its name
