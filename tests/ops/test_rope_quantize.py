"""Quantising rotary embeddings against float64: on the CPU, and (tests/gpu) on a GPU."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

import fi_ffi
from fi_ffi.ops.functions import OPS

from tests.helpers.calls import bits, edges, padded
from tests.helpers.cases import make_case
from tests.helpers.every_op import check_on, check_replayed
from tests.helpers.inputs.page import page_tables
from tests.helpers.rope_calls import CALLS_QUANTISE, QUANTISE, judged, part

APPENDING = QUANTISE[1:]
KV, MLA = APPENDING
SIZES = {
    "nnz": 23, "b": 4, "page_size": 5, "num_qo_heads": 4, "num_kv_heads": 2, "rope_dim": 64,
    "no_rope_dim": 64, "max_seq_len": 70,
}  # fmt: skip
E4M3 = {"T": "bfloat16", "O": "float8_e4m3fn", "I": "int32"}
LAYOUTS = {"rope_quantize": [{}], KV: [{}, {"kv_layout": "HND"}], MLA: [{}]}
both = pytest.mark.parametrize("interleave", [False, True], ids=["halves", "interleaved"])


def a_case(name, dtypes, rng, tables=None, **more):
    row = OPS[name].row
    sizes = {axis: more.pop(axis, size) for axis, size in SIZES.items()}
    return make_case(row, sizes, dtypes, rng, tables, **more)


def placed(machine, case):
    machine.need("rope")
    return {name: machine.place(array) for name, array in case.arrays.items()}


def call(machine, case, tensors):
    OPS[case.row.name](
        **{name: tensor.desc() for name, tensor in tensors.items()}, **case.scalars,
        stream=machine.stream,
    )  # fmt: skip
    return {name: tensor.get() for name, tensor in tensors.items()}


@both
@pytest.mark.parametrize(("op", "dtypes"), CALLS_QUANTISE)
def test_sizes(op, dtypes, interleave, machine, rng):
    name = op.row.name
    parts = [(64, 64), (64, 512), (32, 96), (192, 192)]
    parts += [(128, 0)] if name != MLA else []
    parts += [(16, 48)] if interleave else []
    parts += [(128, 64), (64, 80), (32, 16)] if name == "rope_quantize" else []
    for rope_dim, no_rope_dim in parts:
        for q_heads, kv_heads in ((1, 1), (8, 2), (3, 5)):
            for more in LAYOUTS[name]:
                case = a_case(name, dtypes, rng, rope_dim=rope_dim, no_rope_dim=no_rope_dim,
                              num_qo_heads=q_heads, num_kv_heads=kv_heads, interleave=interleave,
                              quant_scale_q=0.5, quant_scale_kv=3.0, **more)  # fmt: skip
                assert check_on(machine, case) <= 1


@pytest.mark.parametrize(("op", "dtypes"), CALLS_QUANTISE)
def test_tokens_and_pages(op, dtypes, machine, rng):
    name = op.row.name
    for nnz in (1, 130, 5000) if machine.is_gpu else (1, 60):
        for page_size in (1, 3, 16, 64) if nnz > 1 else (4,):
            for more in LAYOUTS[name]:
                case = a_case(name, dtypes, rng, nnz=nnz, page_size=page_size, **more)
                assert check_on(machine, case) <= 1


@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("name", APPENDING)
def test_empty_requests_and_last_pages(name, page_size, machine, rng):
    tables = page_tables(*edges(page_size), page_size, rng)
    sizes = {"page_size": page_size, "nnz": len(tables["positions"]), "b": 8}
    for more in LAYOUTS[name]:
        assert check_on(machine, a_case(name, E4M3, rng, tables, **sizes, **more)) <= 1


def random_bytes(array, rng):
    array.view(np.uint8)[...] = rng.integers(0, 256, array.shape, np.uint8)


def touched(case, cache):
    """Which elements of a cache the call writes."""
    marked = np.zeros(cache.shape, bool)
    tokens = marked.swapaxes(1, 2) if case.scalars.get("kv_layout") == "HND" else marked
    size = tokens.shape[1]
    a = case.arrays
    for request, position in zip(a["batch_indices"], a["positions"], strict=True):
        if request >= 0:
            tokens[a["kv_indices"][a["kv_indptr"][request] + position // size], position % size] = 1
    return marked


@pytest.mark.parametrize("name", APPENDING)
def test_what_is_in_the_cache_stays(name, machine, rng):
    """Every bit of other entries, NaN among them; tokens of no request are left out whole."""
    for more in LAYOUTS[name]:
        case = a_case(name, E4M3, rng, **more)
        caches = [n for n in case.arrays if n.endswith("_cache") and n != "cos_sin_cache"]
        for cache in caches:
            random_bytes(case.arrays[cache], rng)
        left_out = rng.permutation(23)[:5]
        case.arrays["batch_indices"][left_out] = -1
        for out in ("q_rope_out", "q_nope_out"):
            random_bytes(case.arrays[out], rng)
        got = call(machine, case, placed(machine, case))
        for cache in caches:
            where = touched(case, case.arrays[cache])
            assert 0 < where.sum() < where.size
            now, before = bits(got[cache]), bits(case.arrays[cache])
            assert (now[~where] == before[~where]).all()
            assert (now[where] != before[where]).mean() > 0.5
        for out in ("q_rope_out", "q_nope_out"):
            now, before = bits(got[out]), bits(case.arrays[out])
            assert (now[left_out] == before[left_out]).all()
            value, magnitude = case.expected[out]
            kept = np.setdiff1d(np.arange(23), left_out)
            cut = replace(case, expected={out: (value[kept], magnitude[kept])})
            assert cut.error(out, got[out][kept])[1] <= 1


@pytest.mark.parametrize(("op", "dtypes"), CALLS_QUANTISE)
def test_rows_apart(op, dtypes, machine, rng):
    for more in LAYOUTS[op.row.name]:
        case = a_case(op.row.name, dtypes, rng, **more)
        fixed = {arg.name for arg in op.row.tensors if arg.contiguous}
        apart = {n: a if n in fixed else padded(a, 16) for n, a in case.arrays.items()}
        assert check_on(machine, replace(case, arrays=apart)) <= 1


@both
def test_parts_of_one_buffer(interleave, machine, rng):
    """Heads whose rotated part comes first, of inputs and of outputs."""
    machine.need("rope")
    case = a_case("rope_quantize", E4M3, rng, interleave=interleave)
    descs, wholes = {}, {}
    for x in ("q", "k"):
        for end in ("in", "out"):
            pair = [case.arrays[f"{x}_{which}_{end}"] for which in ("rope", "nope")]
            whole = np.concatenate(pair, axis=-1)
            buffer = wholes[x, end] = machine.place(whole)
            for which, view in (("rope", whole[..., :64]), ("nope", whole[..., 64:])):
                descs[f"{x}_{which}_{end}"] = part(machine, buffer, whole, view)
    tables = {n: machine.place(case.arrays[n]) for n in ("cos_sin_cache", "pos_ids")}
    descs |= {n: tensor.desc() for n, tensor in tables.items()}
    fi_ffi.rope_quantize(**descs, **case.scalars, stream=machine.stream)
    got = {}
    for x in ("q", "k"):
        after = wholes[x, "out"].get()
        got |= {f"{x}_rope_out": after[..., :64], f"{x}_nope_out": after[..., 64:]}
    assert judged(case, got) <= 1
    assert all(whole.intact() for whole in wholes.values())


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
def test_keys_and_values_in_one_tensor(kv_layout, machine, rng):
    machine.need("rope")
    case = a_case(KV, E4M3, rng, kv_layout=kv_layout)
    names = ("k_cache", "v_cache")
    whole = machine.place(np.stack([case.arrays[name] for name in names], axis=1))
    tensors = placed(machine, replace(case, arrays={
        n: a for n, a in case.arrays.items() if n not in names}))  # fmt: skip
    descs = {n: tensor.desc() for n, tensor in tensors.items()}
    descs |= zip(names, fi_ffi.split_paged_kv_cache(whole.desc()), strict=True)
    OPS[KV](**descs, **case.scalars, stream=machine.stream)
    after = whole.get()
    got = {n: tensor.get() for n, tensor in tensors.items()}
    assert judged(case, got | {name: after[:, i] for i, name in enumerate(names)}) <= 1
    assert whole.intact()


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("name", QUANTISE)
def test_beyond_the_range(name, dtype, machine, rng):
    """The largest number that there is, also for infinity; NaN stays."""
    case = a_case(name, E4M3 | {"O": dtype}, rng, quant_scale_q=1e4, quant_scale_kv=0.0)
    x = case.arrays["q_nope_in"]
    x[0, 0, :4] = np.inf, -np.inf, np.nan, 1e4
    largest = float(ml_dtypes.finfo(fi_ffi.DTYPES[dtype].numpy).max)
    got = call(machine, case, placed(machine, case))
    q = got["q_nope_out"].astype(np.float64)
    assert q[0, 0, [0, 1, 3]].tolist() == [largest, -largest, largest] and np.isnan(q[0, 0, 2])
    keys = got.get("k_nope_out", got.get("ckv_cache", got.get("k_cache")))
    if name == "rope_quantize":
        assert not keys.astype(np.float64).any()
    assert np.abs(got["q_rope_out"].astype(np.float64)).max() == largest


@pytest.mark.parametrize("name", QUANTISE)
def test_dependent_launch_and_page_size(name, machine, rng):
    case = a_case(name, E4M3, rng, enable_pdl=True)
    if name != "rope_quantize":
        case = replace(case, scalars=case.scalars | {"page_size": SIZES["page_size"]})
    assert check_on(machine, case) <= 1


@pytest.mark.parametrize("name", QUANTISE)
def test_recorded_and_replayed(name, machine, rng):
    if name == "rope_quantize":
        assert check_replayed(machine, a_case(name, E4M3, rng)) <= 1
        return
    # A replay finds its cache as the launch before has left it.
    case = a_case(name, E4M3, rng)
    tensors = placed(machine, case)
    descs = {n: tensor.desc() for n, tensor in tensors.items()}

    def launch():
        OPS[name](**descs, **case.scalars, stream=machine.stream)

    launch()
    machine.synchronize()
    replay = machine.capture(launch)
    for out in ("q_rope_out", "q_nope_out"):
        machine.poison(tensors[out], machine.stream)
    replay()
    machine.synchronize()
    assert judged(case, {n: tensor.get() for n, tensor in tensors.items()}) <= 1


@pytest.mark.parametrize("name", QUANTISE)
def test_prepared_and_updated(name, machine, rng):
    cases = [a_case(name, E4M3, rng)]
    tables = {n: cases[0].arrays[n] for n in cases[0].arrays if cases[0].arrays[n].dtype == "int32"}
    tables |= {"kv_last_page_len": np.ones(4)}
    cases += [a_case(name, E4M3, rng, tables) for _ in range(2)]
    sets = [placed(machine, case) for case in cases]
    ready = OPS[name].prepare(
        **{n: tensor.desc() for n, tensor in sets[0].items()}, stream=machine.stream
    )
    ready()
    for tensors in sets[1:]:
        ready.update(**{n: tensor.desc().ptr for n, tensor in tensors.items()})
        ready()
    for case, tensors in zip(cases, sets, strict=True):
        assert judged(case, {n: tensor.get() for n, tensor in tensors.items()}) <= 1


@pytest.mark.parametrize("name", QUANTISE)
def test_what_is_wrong_is_seen(name, rng):
    """Another way of pairing, another scale, the next position, and an entry further on."""
    case = a_case(name, E4M3, rng)
    for other in ({"interleave": True}, {"quant_scale_q": 1.1}, {"quant_scale_kv": 1.1}):
        got = {n: a.copy() for n, a in case.arrays.items()}
        OPS[name](**got, **case.scalars | other)
        assert judged(case, got) > 1, other
    got = {n: a.copy() for n, a in case.arrays.items()}
    got["pos_ids"][3] = (got["pos_ids"][3] + 1) % 70
    OPS[name](**got, **case.scalars)
    assert judged(case, got) > 1
    if "positions" in case.arrays:
        got = {n: a.copy() for n, a in case.arrays.items()}
        got["positions"][3] -= 1 if got["positions"][3] else -1
        OPS[name](**got, **case.scalars)
        assert judged(case, got) > 1
