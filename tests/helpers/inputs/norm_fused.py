"""Random videos' tokens, and the numbers that say where their patches are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.helpers.inputs.family import Call, Inputs

_CHANNELS = ("num_frame_channels", "num_height_channels", "num_width_channels")


def make(call: Call) -> None:
    """Patches and channels in three directions, no two of which are the same."""
    pair = call.sizes["head_dim"] // 2
    height, width = pair // 3, pair // 3 + 1
    numbers = {"ppf": 2, "pph": 3, "ppw": 5} | call.scalars
    channels = dict(zip(_CHANNELS, (pair - height - width, height, width), strict=True))
    call.scalars = {
        "seq_len": numbers["ppf"] * numbers["pph"] * numbers["ppw"],
        **{name: 2 * count for name, count in channels.items()}, **numbers,
    }  # fmt: skip


def of_dtypes(dtypes: Mapping[str, str]) -> dict[str, Any]:
    return {"output_fp8": dtypes["O"] == "float8_e4m3fn"}


def _layernorm(*without: str) -> Inputs:
    variants = {f"no {name}": {"without": (name,)} for name in without}
    return Inputs({"n": 2, "num_rows": 3}, {"n": 2, "num_rows": 64}, variants=variants)


# By module, or by op.
INPUTS: dict[str, Inputs] = {
    "fused_qk_rmsnorm_rope": Inputs(
        small={"n": 7, "num_heads_q": 3, "num_heads_k": 2, "num_heads_v": 1, "head_dim": 64},
        usual={"n": 60, "num_heads_q": 24, "num_heads_k": 24, "num_heads_v": 24, "head_dim": 128},
        make=make,
        of_dtypes=of_dtypes,
    ),
    "fused_dit_gate_residual_layernorm_gamma_beta": _layernorm("input_sf_scale", "gate_bias"),
    "fused_dit_residual_layernorm_scale_shift": _layernorm(
        "residual", "input_sf_scale", "scale_bias", "shift_bias"
    ),
    "fused_dit_gate_residual_layernorm_scale_shift": _layernorm(
        "input_sf_scale", "gate_bias", "scale_bias", "shift_bias"
    ),
}
