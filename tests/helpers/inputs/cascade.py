"""Random attention states, and masks."""

from __future__ import annotations

from tests.helpers.inputs.family import Call, Inputs


def make(call: Call) -> None:
    """A mask of 0 and others."""
    if "mask" not in call.without:
        call.default(mask=call.rng.integers(0, 3, call.sizes["n"]))


_SMALL = {"n": 4, "num_index_sets": 3, "num_heads": 2, "head_dim": 64}
_USUAL = {"n": 32, "num_index_sets": 4, "num_heads": 32, "head_dim": 128}
# By module, or by op.
INPUTS: dict[str, Inputs] = {
    "cascade": Inputs(_SMALL, _USUAL),
    "merge_state_in_place": Inputs(
        _SMALL, _USUAL, make=make, variants={"no mask": {"without": ("mask",)}}
    ),
}
