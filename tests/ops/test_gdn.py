"""The gated delta rule on the CPU: the reference against another formula, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fi_ffi
from fi_ffi.abi.tensor import parse_device
from fi_ffi.cli.cases import Case, bound
from fi_ffi.ops.call import memory
from fi_ffi.ops.functions import OPS

from tests.helpers.cases import make_case

OP = OPS["gdn_prefill"]
CHECKPOINTS = ("state_checkpoints", "checkpoint_cu_starts")
HEADS = [(1, 1), (2, 2), (4, 2), (6, 2), (2, 4), (1, 3)]


def case(tokens=130, seqs=3, q_heads=2, v_heads=4, dtype="float16", **more) -> Case:
    sizes = {"total_seq_len": tokens, "num_seqs": seqs, "num_q_heads": q_heads}
    sizes |= {"num_v_heads": v_heads, "head_size": 128, "workspace_size": 128}
    return make_case(OP.row, sizes, {"T": dtype}, np.random.default_rng(), **more)


def check(made: Case) -> None:
    """Run it: the reference is in float64 too, so that only the last rounding is left."""
    OP(**made.arrays, **made.scalars)
    for name, (value, magnitude) in made.expected.items():
        got = made.arrays[name].astype(np.float64)
        allowed = bound(value, magnitude, made.arrays[name].dtype, slack=1e-7)
        assert (np.abs(got - value) <= allowed).all(), name


@pytest.mark.parametrize("dtype", OP.row.dtypes["T"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_heads_and_checkpoints(heads, dtype):
    for every in (64, 128, 192):
        check(case(300, 3, *heads, dtype, checkpoint_every_n_tokens=every))


@pytest.mark.parametrize("length", [1, 63, 64, 65, 128, 129, 257])
def test_lengths(length):
    check(case(length + 5, tables={"cu_seqlens": np.array([0, 4, length + 4, length + 5])}))


def test_gates_of_nothing():
    made = case(70, 1)
    for gate in ("alpha", "beta"):
        made.arrays[gate][::3] = 0
    made = case(70, 1, tables={name: made.arrays[name] for name in ("alpha", "beta")})
    check(made)


def test_a_state_carried_on():
    """Two calls with the state handed on are one call."""
    whole = case(200, 1, without=CHECKPOINTS)
    OP(**whole.arrays, **whole.scalars)
    state = whole.arrays["input_state"].copy()
    got = np.full_like(whole.arrays["output"], np.nan)
    for span in (slice(0, 77), slice(77, 200)):
        part = {name: whole.arrays[name][span] for name in ("q", "k", "v", "alpha", "beta")}
        part |= {"cu_seqlens": fi_ffi.cu_seqlens([span.stop - span.start]), "output": got[span]}
        OP(**part, output_state=state, input_state=state)
    assert np.allclose(state, whole.arrays["output_state"], rtol=1e-5, atol=1e-6)
    assert np.allclose(
        got.astype(float), whole.arrays["output"].astype(float), rtol=2e-3, atol=1e-6
    )


def test_workspaces_of_fi_ffis_own():
    """One for each device and stream, kept."""
    cpu, (arg,) = parse_device("cpu"), [a for a in OP.row.tensors if a.bytes_per_multiprocessor]
    need = memory.scratch_bytes(arg, cpu)
    assert need == fi_ffi.gdn_prefill_workspace_size("cpu") == 128
    first, again = (
        memory.scratch_for(OP.compiled.refuse, arg, cpu, need, None, False) for _ in range(2)
    )
    assert first.ptr == again.ptr
    assert first.numel >= 128
    own = memory.scratch_for(OP.compiled.refuse, arg, cpu, need, None, True)
    assert own.ptr != first.ptr and own.owner is not None
    assert first.ptr % arg.alignment == 0


@pytest.mark.parametrize("starts", [[0, 5, 5, 130], [0, 5, 4, 130], [1, 5, 6, 130], [0, 5, 9, 131]])
def test_sequences_that_the_reference_refuses(starts):
    made = case(without=CHECKPOINTS)
    with pytest.raises(fi_ffi.ArgumentError, match="argument `cu_seqlens`: got "):
        OP(**made.arrays | {"cu_seqlens": np.array(starts)})


def test_nothing_to_do():
    made = case(5, 1, without=(*CHECKPOINTS, "input_state"))
    none = np.zeros((0, 4, 128, 128), np.float32)
    OP(**made.arrays | {"cu_seqlens": np.zeros(1, np.int64), "output_state": none})
    assert np.isnan(made.arrays["output"].astype(float)).all()


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 1000), max_size=20), tiles=st.integers(1, 6))
def test_starts(lengths, tiles):
    starts = fi_ffi.cu_seqlens(lengths)
    assert starts.dtype == np.int64 and starts[0] == 0 and np.diff(starts).tolist() == lengths
    kept = fi_ffi.checkpoint_cu_starts(starts, 64 * tiles)
    for count, length in zip(np.diff(kept), lengths, strict=True):
        # One after every so many tiles, the last of which need not be full.
        assert count == sum((tile + 1) % tiles == 0 for tile in range((length + 63) // 64))
    assert kept.dtype == np.int64 and kept[0] == 0


@pytest.mark.parametrize("lengths", [[2**31 - 1], [2**30, 2**30 - 1], [1] * 5 + [2**31 - 6]])
def test_as_many_tokens_as_int32_counts(lengths):
    assert fi_ffi.cu_seqlens(lengths)[-1] == 2**31 - 1
    with pytest.raises(fi_ffi.ArgumentError, match="`seq_lens`: got .*2147483647 tokens in all"):
        fi_ffi.cu_seqlens([*lengths, 1])


_WRONG = [
    *((fi_ffi.cu_seqlens, (lengths,), "seq_lens")
      for lengths in ([1, 0], [0], [-1], [2**31], [2**30] * 2, 3, "1", [1.0], [True])),
    *((fi_ffi.checkpoint_cu_starts, (starts, 64), "cu_seqlens")
      for starts in ([], [1, 2], [0, 2, 2], [0, 2, 1], [[0, 1]], None)),
    *((fi_ffi.checkpoint_cu_starts, ([0, 5], every), "checkpoint_every_n_tokens")
      for every in (0, -64, 63, 65, 64.0, True, None, "64")),
    *((fi_ffi.gdn_prefill_workspace_size, (device,), "device") for device in ("gpu", None, 3.5)),
]  # fmt: skip


@pytest.mark.parametrize(("function", "args", "argument"), _WRONG)
def test_what_is_refused_on_the_host(function, args, argument):
    with pytest.raises(fi_ffi.FiFfiError, match=f"argument `{argument}`"):
        function(*args)


def test_a_gpu_that_is_not_there_has_no_workspace():
    with pytest.raises(fi_ffi.LoaderError, match="there is no cuda:99"):
        fi_ffi.gdn_prefill_workspace_size("cuda:99")


def test_a_state_that_is_partly_the_same_memory():
    made, room = case(70, 2, without=CHECKPOINTS), np.full((3, 4, 128, 128), np.nan, np.float32)
    for one, other in ((room[:2], room[1:]), (room[1:], room[:2])):
        with pytest.raises(fi_ffi.ArgumentError, match="the very same memory, or memory apart"):
            OP(**made.arrays | {"input_state": one, "output_state": other}, **made.scalars)
    assert np.isnan(room).all()
