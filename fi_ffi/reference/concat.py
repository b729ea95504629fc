"""The `concat_mla` module in numpy."""

from __future__ import annotations

from collections.abc import Callable

from fi_ffi.reference.arrays import Array


def concat_mla_k(k: Array, k_nope: Array, k_rope: Array) -> None:
    own = k_nope.shape[-1]
    # As numbers: a dtype of numpy's extensions may change a NaN's bits when it is copied.
    bits = f"u{k.itemsize}"
    k.view(bits)[..., :own] = k_nope.view(bits)
    k.view(bits)[..., own:] = k_rope.view(bits)


KERNELS: dict[str, dict[str, Callable[..., None]]] = {"concat_mla": {"concat_mla_k": concat_mla_k}}
