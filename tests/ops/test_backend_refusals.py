"""What no kernel does, or not the backend that was asked for; and workspaces that will not do."""

from __future__ import annotations

import numpy as np
import pytest

import fi_ffi
from fi_ffi.loader import machine

from tests.helpers.plan_calls import KINDS, KV_HEADS, Case, aligned, changed, refused

E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"
PREFILL = ("ragged", "paged")


@pytest.mark.parametrize("kind", ["ragged", "paged", "decode"])
@pytest.mark.parametrize(("qo", "kv"), [(4, 3), (2, 4), (5, 2), (1, 2)])
def test_heads_that_do_not_divide(kind, qo, kv):
    case = Case(kind)
    words = f"got {qo}, expected a multiple of num_kv_heads = {kv}"
    given = {"num_qo_heads": qo, "num_kv_heads": kv}
    refused(case, "num_qo_heads", words, case.plan, **given)


@pytest.mark.parametrize("group", [5, 6, 7, 9, 12, 16, 64])
def test_decode_groups(group):
    case = Case("decode")
    given = {"num_qo_heads": group * KV_HEADS}
    words = f"got {group} for each of num_kv_heads, expected 1, 2, 3, 4, 8 .*BatchPrefillPlan"
    refused(case, "num_qo_heads", words, case.plan, **given)


# Options that do not go together: the argument that is refused, and what is said of it.
_SINK = {"use_attention_sink": True}
_MASKS = ("causal", "use_custom_mask", "use_multi_item_scoring")
TOGETHER = [
    *(("paged", {a: True, b: True}, b, f"False with {a}")
      for a, b in (_MASKS[:2], _MASKS[1:], _MASKS[::2])),
    ("paged", {"fixed_split_size": 1, "disable_split_kv": True}, "disable_split_kv", "fixed_split"),
    ("ragged", {"use_multi_item_scoring": True}, "use_multi_item_scoring", "without page_size"),
    *(("paged", _SINK | {name: value}, name, "attention sinks have nothing else")
      for name, value in (("pos_encoding_mode", "ALIBI"), ("logits_soft_cap", 30.0),
                          ("use_fp16_qk_reduction", True), ("use_custom_mask", True),
                          ("use_multi_item_scoring", True), ("kv_data_type", E4M3))),
    *((kind, {"pos_encoding_mode": "ALIBI", "logits_soft_cap": 1.0}, "logits_soft_cap", "ALIBI")
      for kind in ("ragged", "paged", "decode")),
    ("decode", {"q_data_type": E4M3}, "q_data_type", "BatchPrefillPlan"),
    *((kind, {"q_data_type": "bfloat16", "o_data_type": "float16"}, "o_data_type", "bfloat16")
      for kind in ("ragged", "paged", "decode")),
    *(("mla", {"kv_data_type": dtype}, "kv_data_type", "float16") for dtype in ("bfloat16", E4M3)),
    ("mla", {"q_data_type": E4M3}, "q_data_type", "float16 or bfloat16"),
    ("mla", {"head_dim_ckv": 256}, "head_dim_ckv", "got 256, expected 512"),
    ("mla", {"head_dim_kpe": 128}, "head_dim_kpe", "got 128, expected 64"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "given", "argument", "words"), TOGETHER, ids=str)
def test_options_that_do_not_go_together(kind, given, argument, words):
    case = Case(kind)
    refused(case, argument, words, case.plan, **given)


# What fa3 lacks and fa2 has, and the reverse.
FA3_LACKS = [
    ({"use_custom_mask": True}, "custom masks"),
    ({"pos_encoding_mode": "ALIBI"}, "pos_encoding_mode 'ALIBI'"),
    ({"pos_encoding_mode": "ROPE_LLAMA"}, "pos_encoding_mode 'ROPE_LLAMA'"),
    ({"use_fp16_qk_reduction": True}, "use_fp16_qk_reduction"),
    ({"kv_data_type": E4M3}, "keys of that dtype only"),
    ({"head_dim_qk": 96}, "64/64, .* not 96/96"),
    ({"head_dim_vo": 128}, "64/64, .* not 64/128"),
]
NOBODY_HAS = [
    {"q_data_type": E4M3, "head_dim_qk": 128, "logits_soft_cap": 1.0},
    {"q_data_type": E4M3, "head_dim_qk": 128, "window_left": 3},
    {"q_data_type": E5M2, "head_dim_qk": 64},
    {"q_data_type": E4M3, "kv_data_type": E5M2, "head_dim_qk": 128},
    {"q_data_type": E4M3, "kv_data_type": "float16", "head_dim_qk": 128},
    {"kv_data_type": "bfloat16"},
    {"q_data_type": "bfloat16", "use_fp16_qk_reduction": True},
    {"kv_data_type": E4M3, "pos_encoding_mode": "ROPE_LLAMA"},
]


@pytest.mark.parametrize("kind", PREFILL)
@pytest.mark.parametrize(("given", "words"), FA3_LACKS, ids=str)
def test_what_fa3_lacks(kind, given, words):
    case = Case(kind, qo_lens=(3, 1, 0, 5), kv_lens=(7, 5, 2, 9))
    words = f"got 'fa3', expected 'fa2': fa3 .*{words}"
    refused(case, "backend", words, case.plan, backend="fa3", **given)
    assert case.plan(**given).backend == "fa2"


@pytest.mark.parametrize("kind", PREFILL)
def test_what_fa2_lacks(kind):
    case = Case(kind)
    given = {"q_data_type": E4M3, "head_dim_qk": 128}
    words = f"got 'fa2', expected 'fa3': fa2 has no {E4M3} queries"
    refused(case, "backend", words, case.plan, backend="fa2", **given)
    assert case.plan(**given).backend == "fa3"


@pytest.mark.parametrize("kind", PREFILL)
@pytest.mark.parametrize("given", NOBODY_HAS, ids=str)
def test_what_no_backend_has(kind, given):
    case = Case(kind)
    for asked in ("auto", "fa2", "fa3"):
        # Nobody is sent from one to the other: both reasons are given.
        words = f"got '{asked}', expected what a backend has: fa2 .*; fa3 "
        refused(case, "backend", words, case.plan, backend=asked, **given)


@pytest.mark.parametrize("kind", PREFILL)
@pytest.mark.parametrize(("name", "value"), [("fixed_split_size", 1), ("disable_split_kv", True)])
def test_how_fa3_splits(kind, name, value):
    case = Case(kind)
    words = f"got {value}, .*backend='fa2': fa3 never splits"
    refused(case, name, words, case.plan, backend="fa3", **{name: value})
    case.run(case.plan(**{name: value}))
    case.check()


def test_multi_item_scoring_of_fp8_queries():
    case = Case("paged")
    given = {"q_data_type": E4M3, "head_dim_qk": 128, "use_multi_item_scoring": True}
    refused(case, "use_multi_item_scoring", "fp8 queries lack it", case.plan, **given)


@pytest.mark.parametrize("kind", ["ragged", "paged", "mla"])
@pytest.mark.parametrize("capability", [(8, 0), (9, 2), (10, 0), (12, 0)])
def test_fa3_on_other_gpus(kind, capability, monkeypatch):
    monkeypatch.setattr(machine, "capability", lambda index: capability)
    case = Case(kind)
    given = {"backend": "fa3", "device": "cuda:1", "workspace": None}
    words = "got 'fa3', expected 'fa2': fa3 is for SM90, and cuda:1 is SM{}{}".format(*capability)
    refused(case, "backend", words, case.plan, **given)


def _workspace(case: Case, **buffers: object) -> fi_ffi.Workspace:
    given = case.memory | buffers
    return fi_ffi.Workspace(given["float"], given["int"], given["staging"])


def _of_workspaces() -> Case:
    case = Case("decode")
    case.op = "Workspace"
    return case


@pytest.mark.parametrize("kind", KINDS)
def test_workspaces_that_are_too_small(kind):
    case = Case(kind, enable_cuda_graph=True)
    need = case.cls.workspace_size(**case.arrays, **case.options, device="cpu")
    assert min(need) > 0
    for name, at in (("float", 0), ("int", 1)):
        for have in (need[at] - 1, 16, 0):
            small = _workspace(case, **{name: case.memory[name][:have]}, staging=None)
            words = rf"got {have} bytes, expected {need[at]} bytes"
            refused(case, f"{name}_workspace_buffer", words, case.plan, workspace=small)
    enough = {n: case.memory[n][:size] for n, size in zip(("float", "int"), need, strict=True)}
    case.run(case.plan(workspace=_workspace(case, **enough)))
    case.check()
    assert (case.memory["float"][need[0] :] == 0xA5).all()
    assert (case.memory["int"][need[1] :] == 0xA5).all()


@pytest.mark.parametrize("kind", KINDS)
def test_workspaces_that_are_none(kind):
    case = Case(kind)
    for value in (case.memory["int"], 2**20, "cpu", fi_ffi.Workspace, [1]):
        error = refused(case, "workspace", "a Workspace", case.plan, workspace=value)
        assert isinstance(error, fi_ffi.ArgumentTypeError)


@pytest.mark.parametrize("kind", KINDS)
def test_workspaces_of_another_device(kind):
    case = Case(kind)
    there = {n: changed(case.memory[n], device="cuda:1") for n in ("float", "int")}
    elsewhere = _workspace(case, **there, staging=None)
    words = "got one on cuda:1, expected one on cpu"
    refused(case, "workspace", words, case.plan, workspace=elsewhere)
    refused(case, "workspace", "cuda:0", case.plan, device="cuda:0", workspace=elsewhere)
    here = case.workspace()
    refused(case, "workspace", "one on cpu", case.plan, device="cuda:0", workspace=here)


@pytest.mark.parametrize("kind", KINDS)
def test_a_workspace_that_no_machine_has(kind):
    case = Case(kind, enable_cuda_graph=True)
    sizes = ("num_qo_heads", "head_dim_qk", "head_dim", "page_size", "num_heads", "num_kv_heads")
    given = {name: 2**20 for name in sizes if name in case.options and name != "page_size"}
    if kind == "mla":
        given = {"num_heads": 2**31 - 1, "max_total_num_rows": 2**31 - 1}
        refused(case, "qo_indptr", "work items", case.plan, workspace=None, **given)
        return
    given |= {} if kind == "decode" else {"max_total_num_rows": 2**31 - 1}
    words = r"got None, expected \d+ and \d+ bytes, which could not be allocated"
    refused(case, "workspace", words, case.plan, workspace=None, **given)


def _read_only() -> np.ndarray:
    array = aligned(2**12)
    array.flags.writeable = False
    return array


BUFFERS = {
    "text": (lambda: "buffer", "got builtins.str"),
    "None": (lambda: None, "NoneType"),
    "strided": (lambda: aligned(2**12)[::2], r"strides=\(2,\).*contiguous memory"),
    "read-only": (_read_only, "that can be written"),
    "misaligned": (lambda: aligned(2**12)[8:], "multiple of 16 bytes"),
    "null": (lambda: fi_ffi.TensorDesc(0, (2**12,), "uint8", device="cpu"), "not null"),
}


@pytest.mark.parametrize("wrong", BUFFERS)
@pytest.mark.parametrize("name", ["float", "int", "staging"])
def test_buffers_of_a_workspace(name, wrong):
    case, (make, words) = _of_workspaces(), BUFFERS[wrong]
    if (name, wrong) == ("staging", "None"):
        assert _workspace(case, staging=None).int_bytes  # its stages are then allocated
        return
    buffer = make()
    argument = f"{'page_locked_int' if name == 'staging' else name}_workspace_buffer"
    refused(case, argument, words, _workspace, case, **{name: buffer})


def test_where_the_buffers_of_a_workspace_are():
    case = _of_workspaces()
    memory = case.memory

    def wrong(argument: str, words: str, **buffers: object) -> None:
        refused(case, argument, words, _workspace, case, **buffers)

    there = {n: changed(memory[n], device="cuda:0") for n in ("float", "int", "staging")}
    wrong("int_workspace_buffer", "got cuda:0, expected cpu", int=there["int"])
    wrong("int_workspace_buffer", "got cpu, expected cuda:0", float=there["float"])
    locked = "page_locked_int_workspace_buffer"
    wrong(locked, "got cuda:0, expected memory on the host", **there)
    wrong(locked, "got 16 bytes, expected 1048576 bytes or more", staging=memory["staging"][:16])
    managed = {n: changed(memory[n], device="cuda_managed:0") for n in ("float", "int")}
    wrong("float_workspace_buffer", "cuda_managed:0, expected cpu or cuda", **managed)
    both = memory["float"]
    wrong("int_workspace_buffer", "overlap", int=both[2**20 :])
    wrong("int_workspace_buffer", "overlap", int=both[:16], float=both)
    wrong(locked, "overlap", staging=memory["int"])
    wrong(locked, "overlap", staging=both)
    _workspace(case, int=both[2**20 :], float=both[: 2**20])


@pytest.mark.parametrize("value", [-1, 1.5, "1", None, True, 2**63, 10**400])
@pytest.mark.parametrize("name", ["float_bytes", "int_bytes"])
def test_bytes_to_allocate(name, value):
    case = _of_workspaces()
    given = {"device": "cpu", "float_bytes": 16, "int_bytes": 16} | {name: value}
    refused(case, name, "int", fi_ffi.Workspace.allocate, **given)


def test_where_to_allocate():
    case = _of_workspaces()
    for device in ("cuda_host", "cuda_managed:0", "tpu", 3, None):
        refused(case, "device", "", fi_ffi.Workspace.allocate, device)
