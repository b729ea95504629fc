"""Formulas against their definitions (helpers/definitions.py, sampled.py).

A formula judges a GPU's results, and rounded once it is what serves calls on the CPU: tests of
these calls see how they are packed, and here is seen whether the formula is right.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import fi_ffi
from fi_ffi import reference
from fi_ffi.ops.table import ROWS
from fi_ffi.reference import EXACT, MOVES, kernels, sampling
from fi_ffi.reference.attention.formula import Options, exact
from fi_ffi.reference.formula import as_inputs

from tests.helpers.cases import default_dtypes, make_case
from tests.helpers.inputs import inputs_of
from tests.helpers.tokenspeed import DEFINITIONS

OF_FORMULAS = {row.formula: row for row in reversed(ROWS)}


def test_arguments_of_one_signature_are_known_by_their_names():
    """Two rows may call the same symbol's arguments otherwise: each has an entry of its own."""
    row = next(row for row in ROWS if row.name == "silu_and_mul")
    names = [arg.name for arg in row.args]
    x = np.random.default_rng().standard_normal((4, 16)).astype(np.float16)
    expected = x[:, :8] / (1 + np.exp(-x[:, :8].astype(np.float64))) * x[:, 8:]
    for out_first in (True, False):
        order = names if out_first else [names[1], names[0], *names[2:]]
        found = reference.entry(row.module, row.signature, row.reference, (), row.formula, order)
        out = np.full((4, 8), np.nan, np.float16)
        given = {names[0]: out, names[1]: x}
        rest = [False] * (len(names) - 2)
        found(*(fi_ffi.as_desc(given[name]) for name in order[:2]), *rest)
        np.testing.assert_allclose(out, expected, rtol=1e-2, atol=1e-3)


# Inputs at which numpy would warn of what is right: formulas are called by judges as well.
_LEAST = np.full((1, 4), -np.inf)
_WORDS = {"output": np.zeros(1, np.int32), "seed_val": 3, "offset_val": 5}
SILENT = {
    "a row at temperature 0": lambda: EXACT["softmax"](
        {"logits": np.array([[-np.inf, 0.0, 1.0]]), "temperature_val": 0.0}),
    "an activation of much below 0": lambda: EXACT["silu_and_mul"](
        {"input": np.array([[-1000.0, 1.0, 2.0, 3.0]])}),
    "states without keys": lambda: EXACT["merge_state_of_empty_ones"](
        {f"{of}_{part}": np.zeros((1, 1, 4)) if of == "v" else _LEAST[:, :1]
         for of in "vs" for part in "ab"}),
    "attention without keys": lambda: exact(
        np.ones((1, 1, 4)), np.ones((0, 1, 4)), np.ones((0, 1, 4)), Options(1.0)),
    "logits that are no number": lambda: sampling._with_one_number(_WORDS | {"logits": _LEAST}),
    "a number as small as its error": lambda: sampling._from_logits(
        _WORDS, np.zeros(4), 0, 0, 2.0**22),
}  # fmt: skip


def norm_of_infinities() -> np.ndarray:
    out = np.empty((1, 8), np.float16)
    fi_ffi.rmsnorm(out, np.full((1, 8), np.inf, np.float16), np.ones(8, np.float16))
    assert np.isnan(out).all()
    return out


SILENT["a call on the CPU"] = norm_of_infinities


@pytest.mark.parametrize("what", SILENT)
def test_formulas_warn_of_nothing(what):
    with np.errstate(all="warn"), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert SILENT[what]() is not None


# Options that are not at their neutral defaults, and sizes at which they matter.
_QUANT = {"tables": {"scale": np.array([2.0**-9])}}
_SCALES = {"quant_scale_q": 2.5, "quant_scale_kv": 30000.0}
OPTIONS: dict[str, dict] = {
    "packbits": {"bitorder": "big"}, "segment_packbits": {"bitorder": "big"},
    "fused_qk_rmsnorm_rope": {
        "n": 35, "factor": 4.0, "low": 3.0, "high": 9.5, "attention_factor": 1.2,
        "output_quant_scale": 200.0, "v_quant_scale": 300.0, "interleave": False,
    },
    **{name: {"n": 60, "r": 60, "h": 150} for name in DEFINITIONS if "sampling_from" in name},
    "radix_topk": {"tie_break": 2}, "radix_topk_ragged_transform": {"tie_break": 2},
    "mxfp8_quantize": {"sfSwizzleLayout": 1, "alignment": 128, "n": 9},
    "fp4_quantize": {
        "isSf8x4Layout": True, "isGlobalScaleInversed": True, "n": 9,
        "tables": {"globalScale": np.array([2.0**-6])},
    },
    "merge_states": {"n": 2}, "merge_states_of_empty_ones": {"n": 2},
    **dict.fromkeys((name for name in DEFINITIONS if "norm_quant" in name), _QUANT),
    **dict.fromkeys((name for name in DEFINITIONS if name.startswith("rope_quantize")), _SCALES),
}  # fmt: skip


def calls():
    """Formulas in the shapes that their ops' calls come in, and with other dtypes and options."""
    for formula, row in OF_FORMULAS.items():
        if formula not in DEFINITIONS:
            continue
        first = default_dtypes(row)
        last = {variable: names[-1] for variable, names in row.dtypes.items()}
        yield pytest.param(row, first, {}, id=formula)
        yield pytest.param(row, last, OPTIONS.get(formula, {}), id=f"{formula} options")
        for name, more in (inputs_of(row).variants or {}).items():
            yield pytest.param(row, first, more, id=f"{formula} {name}")


def test_every_formula_is_checked_by_something_else():
    """By its definition here, or by a kernel of its own that calls on the CPU are served by."""
    others = {
        f for f, row in OF_FORMULAS.items() if row.reference not in kernels().get(row.module, ())
    }
    assert others <= DEFINITIONS.keys() <= OF_FORMULAS.keys()


@pytest.mark.parametrize(("row", "dtypes", "more"), [*calls()])
def test_a_formula_is_its_definition(row, dtypes, more, rng):
    small = inputs_of(row).small
    sizes = {axis: more.get(axis, size) for axis, size in small.items()}
    more = {name: value for name, value in more.items() if name not in small}
    case = make_case(row, sizes, dtypes, rng, **more)
    given = {**case.arrays, **case.scalars}
    moves = row.formula in MOVES
    wanted = DEFINITIONS[row.formula](given if moves else as_inputs(given))
    assert wanted.keys() == case.expected.keys()
    for name, value in wanted.items():
        found = case.expected[name]
        found = found[0] if isinstance(found, tuple) else found.value()
        if moves:
            assert found.tobytes() == value.tobytes(), name
        else:  # Angles are of up to 10^7, whose sines float64 has to 10^-9.
            np.testing.assert_allclose(found, value, rtol=1e-6, atol=1e-6, err_msg=name)
