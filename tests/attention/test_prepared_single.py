"""`single_prefill` and `single_decode`, prepared."""

from __future__ import annotations

import numpy as np
import pytest

import fi_ffi

from tests.attention.arrays import bytes_of
from tests.attention.bodies import One
from tests.attention.machines import Cpu
from tests.attention.options import as_arguments
from tests.attention.tables import SINGLE_DECODE, SINGLE_PREFILL
from tests.helpers.prepared_calls import frame_of

SINGLES = {
    name: spec
    for table in (SINGLE_PREFILL, SINGLE_DECODE)
    for name, spec in table.items()
    if spec.lengths[0][1] < 600 and spec.lengths[0][0] < 60
}


@pytest.mark.parametrize("spec", SINGLES.values(), ids=SINGLES)
def test_single(spec, rng):
    one = One(spec, Cpu(), rng)
    written, _ = one.run()
    call, mine = prepared_single(one)
    call()
    assert bytes_of(mine[0].get()) == bytes_of(written.o.get())
    if mine[1] is not None:
        assert bytes_of(mine[1].get()) == bytes_of(written.lse.get())
    again = HostOut(mine[0].get())
    for given in (again.desc, again.desc.ptr):
        call.update(o=given)
        call()
        assert bytes_of(again.array) == bytes_of(written.o.get())
        again.array[...] = np.nan


class HostOut:
    def __init__(self, like):
        self.array = np.full_like(like, np.nan)
        self.desc = fi_ffi.as_desc(self.array)


def prepared_single(one):
    """The call of `One.run`, prepared; and what it writes."""
    spec, place = one.spec, one.machine.place
    decode = spec.family == "single_decode"
    shape = (len(one.q), spec.heads, spec.value_dim)
    o = np.full(shape, np.nan, fi_ffi.DTYPES[spec.o].numpy)
    lse = np.full(shape[:2], np.nan, np.float32)
    q, out = (x[0] if decode else x for x in (one.q, o))
    outputs = place(out), place(lse[0] if decode else lse) if spec.lse else None
    options = as_arguments(spec, one.extras, one.machine) | {
        "pos_encoding_mode": spec.mode, "window_left": spec.window_left,
        "logits_soft_cap": spec.cap,
    }  # fmt: skip
    if not decode:
        options |= {"causal": spec.causal, "backend": spec.backend}
    function = fi_ffi.single_decode if decode else fi_ffi.single_prefill
    tensors = (place(q), one.stored(one.k), one.stored(one.v), one.scratch(), outputs[0])
    descs = [tensor.desc() for tensor in tensors]
    lse_desc = None if outputs[1] is None else outputs[1].desc()
    made = fi_ffi.prepare(function, *descs, lse_desc, **options)
    made_of.append(tensors)
    return made, outputs


made_of: list = []  # what prepared calls are given by address stays for the module's tests


@pytest.mark.parametrize("op", ["single_prefill", "single_decode"])
def test_updates_of_single_calls(op, rng):
    table = SINGLE_PREFILL if op == "single_prefill" else SINGLE_DECODE
    spec = next(s for s in table.values() if s.lengths[0][1] <= 100 and s.lse)
    call, outputs = prepared_single(One(spec, Cpu(), rng))
    before = frame_of(call)
    for name in ("sm_scale", "window_left", "mask_mode_code", "maybe_lse", "temperature"):
        with pytest.raises(fi_ffi.ArgumentError, match="prepare another call") as caught:
            call.update(**{name: 1})
        assert caught.value.op == op
    for name in ("q", "k", "v", "o", "lse"):
        for wrong in (-1, 1, 0, "tensor", None, np.zeros((1, 1))):
            with pytest.raises(fi_ffi.ArgumentError) as caught:
                call.update(**{name: wrong})
            assert (caught.value.op, caught.value.argument) == (op, name)
    held = call.take()
    with pytest.raises(fi_ffi.ArgumentError, match=f"^{op}: argument `self`"):
        call()
    call.give(held)
    assert frame_of(call) == before
    call.update(lse=outputs[1].desc(), o=outputs[0].desc())
    call()
    assert np.isfinite(outputs[0].get().astype(float)).all()
