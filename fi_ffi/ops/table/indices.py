"""Tensors of integers that name places: what attention's rows have in common.

The names with parentheses in their conditions are what a run's plan says of its requests
(`fi_ffi.reference.attention.planned`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fi_ffi.ops.call.row import Tensor


def index(name: str, axes: str, doc: str, *places: str, **more: Any) -> Tensor:
    """Describe an array of positions or pages, with the places that they may name."""
    return Tensor(name, axes, "int32", doc, contiguous=True, index=places, **more)


def starts(name: str, axes: str, doc: str, end: str) -> Tensor:
    """Describe where each request's part of something starts, and the last one's end."""
    return index(name, axes, doc, f"0 <= {name}", f"0 <= steps({name})", f"{name} <= {end}")


def pages(name: str, doc: str, half: str = "") -> Tensor:
    """Describe a list of pages; a plan says which elements its requests have."""
    place = f"0 <= {name} < num_pages{half} where listed({name})"
    return index(name, f"num_indices{half}", doc, place)


def last_pages(name: str, axes: str, indptr: str) -> Tensor:
    """Describe how many tokens each request's last page has, if it has any by `indptr`."""
    place = f"1 <= {name} <= page_size where steps({indptr}) > 0"
    return index(name, axes, "tokens in each request's last page", place)


def on_host(arg: Tensor) -> Tensor:
    """Return a run's array as its planner reads it, which has no end of what runs alone have."""
    return replace(arg, host=True, index=arg.index[:2])


# Of each request in a run: the bytes of its custom mask lie in the mask, and the positions after
# its prefix among those that it has.
MASKS = ("0 <= maybe_mask_indptr[:-1] <= mask_bytes - bytes_of_masks()",)
PREFIXES = ("tokens() - maybe_prefix_len_ptr <= token_pos_in_items_len",)
