"""`supports`: the answer, its reason and its advice, from rows and artifacts."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest

import fi_ffi
from fi_ffi.capability import judgement
from fi_ffi.capability.attention import SAMPLES
from fi_ffi.capability.judgement import Query, capability_of, entry_row, judge
from fi_ffi.capability.known_issues import KNOWN_ISSUES
from fi_ffi.capability.matrix import SMS, lines
from fi_ffi.catalogue.ahead_of_time import compiles_for, in_wheel, is_recorded, listed_in
from fi_ffi.errors import ArgumentError, KernelNotFoundError, LoaderError
from fi_ffi.loader import machine, search
from fi_ffi.loader.fetch.pinned_wheels import PinnedKernels
from fi_ffi.loader.fetch.wheels_lock import the_lock
from fi_ffi.module_names import parse
from fi_ffi.ops.call.releases import fits, span_of
from fi_ffi.ops.call.support import WORDS
from fi_ffi.ops.functions import OPS
from fi_ffi.ops.plans.rows import ROWS as ATTENTION
from fi_ffi.ops.table import ROWS
from tools.entries import entries_of

DEFAULT = the_lock().default_release
RECORDED = judgement.gpu_runs.__wrapped__  # reads the record each time


@pytest.fixture(autouse=True)
def nothing_was_called(monkeypatch):
    """What was called on GPUs is no part of these; nor is what this machine has."""
    monkeypatch.setattr(judgement, "gpu_runs", lambda: ())
    monkeypatch.setattr(machine, "device_count", lambda: 0)


@pytest.mark.parametrize(("ways", "capability"), [
    ((90, "90", "9.0", 9.0, (9, 0), "sm90", "sm_90a", "90a", "9.0a"), (9, 0)),
    ((75, "sm_75"), (7, 5)),
    ((103,), (10, 3)), (("12.1",), (12, 1)), (("sm_120f",), (12, 0)), ((50,), (5, 0)),
    ((199,), (19, 9)),
])  # fmt: skip
def test_ways_to_say_a_gpu(ways, capability):
    assert {capability_of(sm) for sm in ways} == {capability}


# What is asked of which op, the status, the reason, and the command that builds it.
ANSWERS = [
    ("rmsnorm", {"sm": 90, "release": DEFAULT}, "built",
     f"norm is in FlashInfer {DEFAULT}'s cu130 wheels; not run here on such a GPU", None),
    ("rmsnorm", {"release": DEFAULT}, "built", "norm is in FlashInfer", None),
    ("gdn_prefill", {"release": DEFAULT}, "built", "gdn_prefill_sm90 is in FlashInfer", None),
    ("gdn_prefill", {"sm": 90, "release": DEFAULT}, "built", "gdn_prefill_sm90 is in", None),
    # Nothing would help.
    ("gdn_prefill", {"sm": 100, "release": DEFAULT}, "refused",
     "it is written for GPUs of compute capability 9.x", None),
    ("fp4_quantize", {"sm": 90, "release": DEFAULT}, "refused",
     "it is written for GPUs of compute capability 10.x or 11.x or 12.x (for other GPUs "
     "fp4_quantization_90 has an empty kernel, which would write nothing)", None),
    ("nvfp4_kv_quant", {"sm": 90, "release": DEFAULT}, "refused",
     "(for other GPUs the kernel writes zeros)", None),
    ("mxfp8_quantize", {"sm": 80, "release": DEFAULT}, "refused",
     "(for other GPUs mxfp8_quantization_sm100 has an empty kernel", None),
    # A GPU has a module of its own.
    *(("fp4_quantize", {"sm": sm, "release": DEFAULT}, "built", f"fp4_quantization_{name} is in",
       None) for sm, name in ((100, "100"), (103, "103"), (120, "120f"), (121, "120f"))),
    ("block_scale_interleave", {"sm": 120, "release": DEFAULT}, "built",
     "fp4_quantization_120f is in", None),
    # Or is called in a form of its own.
    *((f"{name}gemm_fp8_nt_groupwise", {"sm": sm, "release": DEFAULT}, "built",
       f"gemm_sm{of} is in", None) for sm, of in ((100, 100), (103, 100), (120, 120), (121, 120))
      for name in ("", "group_")),
    ("gemm_fp8_nt_groupwise", {"sm": 90, "release": DEFAULT}, "refused",
     "it is written for GPUs of compute capability 10.x or 12.x", None),
    ("gdn_prefill", {"sm": 90, "release": "0.6.18"}, "missing",
     "does not build gdn_prefill_sm90_sm90a_cute_dsl_fully_fused",
     "fi-ffi build --release 0.6.18 --arch 9.0a gdn_prefill"),
    ("BatchMlaPlan", {"sm": 90, "release": "0.7.2.post1"}, "built", "_planabi2_sm90 is in", None),
    ("rmsnorm", {"sm": 90, "release": "0.6.8"}, "unknown", "",
     "fi-ffi build --release 0.6.8 --arch 9.0a norm"),
    # Built for it; what was called on a GPU was of CUDA 13.
    *(("rmsnorm", {"sm": 90, "cuda": cuda}, "built",
       f"norm is in FlashInfer {DEFAULT}'s {cuda} wheels, of which wheels.lock pins none; "
       "not run here on such a GPU", None) for cuda in ("cu128", "cu129")),
    ("rmsnorm", {"sm": 90, "cuda": "cu118"}, "refused",
     "libcudart.so.11, and fi_ffi serves those of cu12x and cu13x",
     f"fi-ffi build --release {DEFAULT} --arch 9.0a norm"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "asked", "status", "reason", "build"), ANSWERS)
def test_answers(name, asked, status, reason, build):
    answer = getattr(fi_ffi, name).supports(**asked)
    assert (answer.status, bool(answer)) == (status, status == "built")
    assert reason in answer.reason
    assert answer.build == build
    assert str(answer).startswith(f"{name}: {WORDS[status]}: {answer.reason}.")


@pytest.mark.parametrize(("asked", "words"), [
    *(({"sm": sm}, "argument `sm`")
      for sm in ("ninety", 9, -90, True, (9,), 49, 200, 1000, [9, 0])),
    ({"sm": 90, "cuda": "13.0"}, "argument `cuda`: got '13.0'"),
])  # fmt: skip
def test_what_is_no_gpu_and_no_cuda_tag(asked, words):
    with pytest.raises(ArgumentError, match=words):
        fi_ffi.rmsnorm.supports(**asked)


CALLED = {"device": "a GPU", "capability": [9, 0], "release": DEFAULT,
          "entries": {"norm": ["rmsnorm"]}}  # fmt: skip
FA3 = {"entries": {"batch_prefill:fa3": ["ragged_run", "paged_run"]}}
# What else a record says, and the op and what is asked of it, which was called there or not.
CALLS = [
    *(({}, name, {"sm": 90}, is_run) for name, is_run in (
        ("rmsnorm", True), ("qk_rmsnorm", True),  # another op of the same entry
        ("layernorm", False), ("append_paged_kv_cache", False),
    )),
    *(({}, "rmsnorm", {"sm": sm}, False) for sm in (80, 89, 100, 103, 120)),
    *(({"capability": capability}, "rmsnorm", {"sm": 90}, False)
      for capability in ([8, 0], [8, 9], [9, 1], [10, 0])),
    ({"release": "0.6.18"}, "rmsnorm", {"sm": 90}, False),
    ({}, "rmsnorm", {"sm": 90, "release": "0.6.18"}, False),
    ({"release": "0.6.18"}, "rmsnorm", {"sm": 90, "release": "0.6.18"}, True),
    ({"entries": {"page": ["rmsnorm"]}}, "rmsnorm", {"sm": 90}, False),
    # A record without a CUDA is of 13; within it the minor version is no matter.
    *(({} if of is None else {"cuda": of}, "rmsnorm", {"sm": 90, "cuda": cuda},
       int(cuda[2:4]) == (of or 13))
      for of in (None, 12, 13) for cuda in ("cu128", "cu129", "cu130")),
    *((FA3, "BatchPrefillPlan", {"sm": 90, "backend": backend, "head_dim_qk": 128},
       backend == "fa3") for backend in ("fa2", "fa3")),
    # Of no GPU in particular, nothing is told of calls.
    ({}, "rmsnorm", {}, None), ({"cuda": 12}, "rmsnorm", {"cuda": "cu128"}, None),
]  # fmt: skip


@pytest.mark.parametrize(("more", "name", "asked", "is_run"), CALLS, ids=str)
def test_what_was_called_is_told(more, name, asked, is_run, tmp_path, monkeypatch):
    """On that GPU, of that release and CUDA, and that entry: on no other."""
    record = tmp_path / "called.json"
    record.write_text(json.dumps({"runs": [CALLED | more]}))
    monkeypatch.setattr(judgement, "GPU_RUNS", record)
    monkeypatch.setattr(judgement, "gpu_runs", RECORDED)
    answer = getattr(fi_ffi, name).supports(**{"release": DEFAULT} | asked)
    assert answer.status == ("run" if is_run else "built"), answer
    ends = {True: "; called on a GPU", False: "; not run here on such a GPU"}
    for ending, text in ends.items():
        assert answer.reason.endswith(text) == (is_run is ending), answer
    record.unlink()
    assert RECORDED() == ()


def test_dtypes():
    ask = fi_ffi.rmsnorm_quant.supports
    assert ask(sm=90, release=DEFAULT, dtypes={"T": "float16", "O": "float8_e4m3fn"})
    assert ask(sm=90, release=DEFAULT, dtypes=["bfloat16", np.dtype("float32")])
    wrong = ask(sm=90, release=DEFAULT, dtypes={"T": "float32"})
    assert wrong.reason == "T is float16 or bfloat16, not float32"
    assert "its tensors are " in ask(sm=90, release=DEFAULT, dtypes="int8").reason
    unknown = ask(sm=90, release=DEFAULT, dtypes={"X": "int8"})
    assert unknown.reason == "it has no dtype called X, only T, O"


def test_the_gpu_that_there_is(monkeypatch):
    """The first of them; one that cannot be asked is none in particular."""
    gpus = [(12, 0), (9, 0)]
    monkeypatch.setattr(machine, "device_count", lambda: len(gpus))
    monkeypatch.setattr(machine, "capability", lambda device: gpus[device])
    assert fi_ffi.gdn_prefill.supports(release=DEFAULT).status == "refused"
    assert fi_ffi.gdn_prefill.supports(sm=90, release=DEFAULT)
    gpus.reverse()
    assert fi_ffi.gdn_prefill.supports(release=DEFAULT)

    def fail(device=0):
        raise LoaderError("the driver says no")

    monkeypatch.setattr(machine, "capability", fail)
    assert Query.of(release=DEFAULT).capability is None
    monkeypatch.setattr(machine, "device_count", fail)
    assert Query.of(release=DEFAULT).capability is None


def test_kernels_at_hand(built_wheel):
    answer = fi_ffi.rmsnorm.supports(sm=90, kernels=built_wheel)
    assert answer
    assert "is compiled for sm_90a" in answer.reason
    other = fi_ffi.rmsnorm.supports(sm=100, kernels=built_wheel)
    assert (other.status, bool(other)) == ("missing", False)
    assert "is compiled for sm_90a only" in other.reason
    assert other.build == f"fi-ffi build --release {DEFAULT} --arch 10.0a norm"
    lacks = fi_ffi.merge_state.supports(sm=90, kernels=built_wheel)
    assert lacks.status == "missing"
    assert lacks.reason.endswith("has no module cascade")
    assert lacks.build.endswith(" cascade")
    with pytest.raises(KernelNotFoundError):
        fi_ffi.rmsnorm.supports(sm=90, kernels="/nowhere")


FETCHED = ", and nothing is here yet: it is fetched when it is first called, from the pinned wheel "
LOOKS = "; a call fetches the pinned wheel {file}, and looks"
# The row, the GPU, the pin's release, CUDA and SM; the status, what the reason ends with, and
# whether a command makes it.
PINNED = [
    ("norm", (9, 0), DEFAULT, "cu130", None, "built",
     f"norm is in FlashInfer {DEFAULT}'s cu130 wheels{FETCHED}{{file}}; not run here on such a GPU",
     False),
    ("norm", None, DEFAULT, "cu130", None, "built", FETCHED + "{file}", False),
    ("norm", (9, 0), DEFAULT, "cu130", "sm90a", "built",
     FETCHED + "{file}; not run here on such a GPU", False),
    ("norm", (9, 0), DEFAULT, "cu129", None, "built",
     f"norm is in FlashInfer {DEFAULT}'s cu129 wheels{FETCHED}{{file}}; not run here on such a GPU",
     False),
    ("norm", (9, 0), "0.6.8", "cu130", None, "unknown", LOOKS, True),
    ("norm", (10, 7), "0.7.2.post1", "cu134", None, "unknown", "for on sm_107" + LOOKS, True),
    # What is known of it, a call need not look for.
    ("norm", (8, 7), DEFAULT, "cu130", None, "missing", "the cu130 wheels lack code for this GPU",
     True),
    ("norm", (9, 0), DEFAULT, "cu130", "sm100a", "missing", "{file} is for another GPU", True),
    ("norm", (9, 0), DEFAULT, "cu134", None, "missing",
     f"FlashInfer {DEFAULT} publishes no cu134 wheels", True),
    ("gemm_sm90", (10, 0), DEFAULT, "cu130", None, "refused",
     "FlashInfer compiles gemm_sm90 for sm_90a only", False),
]  # fmt: skip


@pytest.mark.parametrize("case", PINNED, ids=str)
def test_a_pinned_wheel_that_is_not_here(case, tmp_path, monkeypatch):
    """By the record of its own release and CUDA, whatever others the query is about."""
    module, sm, release, cuda, only, status, reason, is_built = case
    monkeypatch.setenv("FI_FFI_CACHE_DIR", str(tmp_path))
    pin = replace(the_lock().kernels[0], release=release, cuda=cuda, sm=only, file="pinned.whl")
    pin = replace(pin, url="https://wheels.invalid/pinned.whl", sha256="0" * 64)
    place = search.Candidate("remote", PinnedKernels(pin), sm=pin.sm)
    query = Query(sm, release, "cu130", (place,), {}, "x86_64")
    answer = judge("x", [entry_row(module, "run")], query)
    assert answer.status == status
    assert answer.reason.endswith(reason.format(file="pinned.whl")), answer
    assert (answer.build is not None, answer.is_here) == (is_built, False)
    assert answer.place == ("remote" if status == "built" else "")


def test_a_place_without_anything_is_not_spoken_of():
    """One whose kernels are not used is."""
    places = [
        search.Candidate("installed", None, "no package", is_empty=True),
        search.Candidate("jit", None, "a folder of another release"),
    ]
    query = Query((9, 0), DEFAULT, "cu130", (*places,), {}, "x86_64")
    answer = judge("x", [entry_row("norm", "run")], query)
    remote = f"{search.SOURCES} leaves out `remote`, from which it could be fetched"
    assert answer.status == "missing"
    assert answer.reason == f"a folder of another release; {remote}"


def test_kernels_in_use_come_first(monkeypatch, built_wheel):
    monkeypatch.setenv("FI_FFI_KERNELS", str(built_wheel))
    search.use_source(None)
    try:
        assert fi_ffi.merge_state.supports(sm=90).status == "missing"
        # Where a release is named, they are not what is asked about.
        assert fi_ffi.merge_state.supports(sm=90, release=DEFAULT).status == "built"
    finally:
        search.use_source(None)


def test_what_building_would_not_help_is_refused(built_wheel):
    query = Query.of(100, kernels=built_wheel)
    answer = judge("x", [entry_row("gemm_sm90", "run")], query)
    assert answer.status == "refused"
    assert answer.reason == "FlashInfer compiles gemm_sm90 for sm_90a only"


def test_spans_have_no_seams():
    spans = [">=0.6.8,<0.6.14", ">=0.6.3,<0.6.8"]
    assert span_of([entry_row("m", "s", s) for s in spans]) == ">=0.6.3,<0.6.14"
    spans = [">=0.6.3,<0.6.8", ">=0.6.9"]
    assert span_of([entry_row("m", "s", s) for s in spans]) == ">=0.6.3,<0.6.8 or >=0.6.9"
    spans = ["==0.6.17.*", ">=0.7"]
    assert span_of([entry_row("m", "s", s) for s in spans]) == "==0.6.17.* or >=0.7"


def test_attention_by_its_options():
    ask = fi_ffi.BatchPrefillPlan.supports
    auto = ask(sm=90, release=DEFAULT)
    assert auto
    assert auto.module.endswith("_sm90")
    assert not ask(sm=100, release=DEFAULT).module.endswith("_sm90")
    fa3 = ask(sm=89, release=DEFAULT, backend="fa3")
    assert fa3.status == "refused"
    assert "fa3 is for SM90, and the GPU is SM89" in fa3.reason
    odd = ask(sm=90, release=DEFAULT, head_dim_qk=96)
    assert odd.status == "missing"
    assert "head_dim_qk_96" in odd.build
    assert odd.build.startswith(f"fi-ffi build --release {DEFAULT} --arch 9.0a batch_prefill_with")
    window = {"sm": 90, "q_data_type": "float8_e4m3fn", "window_left": 5}
    fp8 = ask(release=DEFAULT, **window)
    assert fp8.status == "refused"
    assert "fa3 has window_left for fp8 queries in FlashInfer >=0.6.15, not in" in fp8.reason
    assert ask(release="0.6.18", **window).status != "refused"
    for release, group, status in (
        ("0.6.13", 6, "refused"), ("0.6.18", 6, "built"), ("0.6.18", 16, "refused"),
        ("0.7.2.post1", 16, "built"), ("0.7.2.post1", 5, "refused"),
    ):  # fmt: skip
        found = fi_ffi.BatchDecodePlan.supports(
            sm=90, release=release, num_qo_heads=group, num_kv_heads=1
        )
        assert found.status == status, found
    with pytest.raises(TypeError, match="unexpected keyword argument 'heads'"):
        ask(sm=90, release=DEFAULT, heads=3)


def test_where_another_backend_would_do_it_is_said():
    answer = fi_ffi.single_prefill.supports(sm=90, release=DEFAULT)
    assert answer.status == "missing"  # FlashInfer builds single_prefill ahead for fa2 only
    assert "with backend='fa2' it can be called" in answer.reason
    assert fi_ffi.single_prefill.supports(sm=90, release=DEFAULT, backend="fa2")
    assert fi_ffi.single_prefill.supports(sm=80, release=DEFAULT)
    with pytest.raises(TypeError, match=r"single_decode.supports\(\) got an unexpected"):
        fi_ffi.single_decode.supports(sm=90, release=DEFAULT, backend="fa2")


def test_every_op_and_attention_family_is_in_the_matrix():
    every = list(lines())
    assert {*OPS} <= {line.op for line in every}
    assert {*SAMPLES} <= {line.op for line in every}
    asked = {line.ask(Query.of(90, DEFAULT)).module for line in every}
    for family in {row.module for row in ATTENTION}:
        assert any(module.startswith(family) for module in asked), family


def test_the_matrix_agrees_with_the_list():
    """What the table says of a plain module is what the generators listed for the wheels."""
    asked = {line.name: line.ask for line in lines()}
    listed = listed_in(DEFAULT)
    for name, op in OPS.items():
        for sm in SMS:
            codes = listed.codes(op.row.module_on(capability_of(sm)))
            answer = asked[name](replace(Query.of(sm, DEFAULT, "cu130"), cpu="x86_64"))
            assert answer.reason
            capability = capability_of(sm)
            if op.row.capabilities and capability[0] not in op.row.capabilities:
                assert answer.status == "refused"
            elif not any(fits(row, DEFAULT) for row in op.rows):
                assert answer.status == "refused" and f"not in {DEFAULT}" in answer.reason
            elif op.row.distribution:  # whatever FlashInfer publishes
                assert answer and answer.build is None and op.row.distribution in answer.reason
            elif codes is None:
                assert answer.status == "missing"
                assert answer.build
            else:
                has = any(
                    code.runs_on(capability) for code in in_wheel(codes, DEFAULT, "cu130", "x86_64")
                )
                assert bool(answer) == has, (name, sm, answer)


def test_cases_are_of_entries_that_there_are():
    record = entries_of(DEFAULT)
    assert len({issue.name for issue in KNOWN_ISSUES}) == len(KNOWN_ISSUES) == 4
    for issue in KNOWN_ISSUES:
        assert len(issue.cause) > 100
        assert len(issue.advice) > 50
        for text in issue.entries:
            module, _, symbol = text.partition(".")
            assert symbol in record.of(module).entries, text
        for sm in (90, 100, 120):
            assert all(answer.reason for answer in issue.found(Query.of(sm, DEFAULT)))


def test_cases_say_what_the_list_says():
    def answers(name: str, sm: int) -> dict[str, str]:
        (issue,) = (issue for issue in KNOWN_ISSUES if issue.name == name)
        return {a.op: a.status for a in issue.found(Query.of(sm, DEFAULT))}

    fusion = "trtllm_comm.trtllm_allreduce_fusion"
    assert answers("all-reduce-fusion", 90)[fusion] == "built"
    assert answers("all-reduce-fusion", 120)[fusion] == "refused"
    interleave = "fused_moe_90.interleave_moe_weights_for_sm90_mixed_gemm"
    assert answers("mxfp4-moe", 90)[interleave] == "built"
    assert answers("mxfp4-moe", 100)[interleave] == "refused"


def test_the_record_of_what_was_called_names_real_entries():
    data = json.loads(judgement.GPU_RUNS.read_text())
    for run in data["runs"]:
        record = entries_of(run["release"])
        for family, symbols in run["entries"].items():
            if "/" in family:  # of another distribution: NAME VERSION/LIBRARY
                module = re.sub(" .*/", "/", family)
                assert {*symbols} <= {row.symbol for row in ROWS if row.module == module}, family
                continue
            groups = record.of_family(family.partition(":")[0]) if record else []
            methods = {m for g in groups for kind in g.objects.values() for m in kind}
            names = methods | {name for group in groups for name in group.entries}
            assert not record or {*symbols} <= names, family


# A GPU, a release and a CUDA tag; the status, a part of the reason, and whether building helps.
GPUS = [
    # In no list of 0.6.13; from 0.6.16 on FlashInfer's list of modules has cases for it.
    (
        107,
        DEFAULT,
        "cu130",
        "missing",
        "no record that FlashInfer 0.6.13 compiles for sm_107",
        False,
    ),
    (107, "0.7.2.post1", "cu130", "missing", "the cu130 wheels lack code for this GPU", True),
    (107, "0.7.2.post1", "cu134", "unknown", "compiles norm for on sm_107", True),
    (107, "0.6.18", "cu130", "missing", "the cu130 wheels lack code for this GPU", True),
    (87, DEFAULT, "cu130", "missing", "the cu130 wheels lack code for this GPU", True),
    (110, DEFAULT, "cu130", "missing", "only the aarch64 wheel has norm for it", True),
    (121, DEFAULT, "cu130", "built", "norm is in FlashInfer 0.6.13's cu130 wheels", False),
    ("12.0", DEFAULT, "cu130", "built", "norm is in FlashInfer 0.6.13's cu130 wheels", False),
    (75, DEFAULT, "cu130", "built", "norm is in FlashInfer 0.6.13's cu130 wheels", False),
    (75, "0.6.18", "cu130", "missing", "the cu130 wheels lack code for this GPU", True),
    (86, DEFAULT, "cu130", "built", "norm is in FlashInfer 0.6.13's cu130 wheels", False),
    (103, "0.6.3", "cu129", "missing", "the cu129 wheels lack code for this GPU", True),
    (90, DEFAULT, "cu134", "missing", "FlashInfer 0.6.13 publishes no cu134 wheels", True),
    # Of no GPU in particular: there are wheels, or there are none.
    (None, DEFAULT, "cu134", "missing", "FlashInfer 0.6.13 publishes no cu134 wheels", True),
    (None, DEFAULT, "cu130", "built", "norm is in FlashInfer 0.6.13's cu130 wheels", False),
    (None, "0.7.2.post1", "cu134", "built", "norm is in FlashInfer 0.7.2.post1's cu134", False),
    (None, "0.7.2.post1", "cu126", "missing", "publishes no cu126 wheels", True),
    (
        130,
        DEFAULT,
        "cu130",
        "missing",
        "no record that FlashInfer 0.6.13 compiles for sm_130",
        False,
    ),
]


@pytest.mark.parametrize(("sm", "release", "cuda", "status", "reason", "is_built"), GPUS)
def test_of_a_gpu_only_what_a_record_says(sm, release, cuda, status, reason, is_built):
    query = replace(Query.of(sm, release, cuda), cpu="x86_64")
    answer = judge("rmsnorm", fi_ffi.rmsnorm.rows, query)
    assert answer.status == status and reason in answer.reason, answer
    assert (answer.build is not None) == is_built, answer
    # A list that was never made for the GPU is not quoted.
    assert " only" not in answer.reason.replace("only the aarch64", "")


@pytest.mark.parametrize("sm", [107, 87, 110, 121, "12.0"])
@pytest.mark.parametrize("release", [DEFAULT, "0.6.18", "0.7.2.post1"])
def test_no_answer_contradicts_itself(sm, release, built_wheel):
    """What is refused is built by no command, and what is built is not ruled out."""
    queries = [Query.of(sm, release, cuda) for cuda in ("cu130", "cu134")]
    for query in [*queries, Query.of(sm, kernels=built_wheel)]:
        for line in lines():
            answer = line.ask(query)
            if answer.status == "refused":
                assert answer.build is None, answer
            if "compiles" in answer.reason and answer.reason.endswith(" only"):
                codes = listed_in(query.release)
                assert codes is not None and answer.status == "refused"
                assert is_recorded(query.release, query.capability), answer
            if answer.build is not None:
                assert "no record that" not in answer.reason, answer
                assert compiles_for(query.release, query.capability), answer


@pytest.mark.parametrize("plan", [fi_ffi.PodPlan, fi_ffi.BatchPodPlan])
def test_what_builds_the_module_of_a_prefill_beside_a_decode(plan):
    """The command has the name of the module that a plan of these options calls."""
    answer = plan.supports(90, release="0.6.13", q_data_type="bfloat16", head_dim=64)
    assert not answer and answer.build is not None
    name = answer.build.rpartition(" ")[2]
    family = "batch_pod" if plan is fi_ffi.BatchPodPlan else "pod"
    parsed = parse(name, "0.6.13")
    assert parsed is not None and (parsed.family, answer.module) == (family, name)
    params = dict(parsed.params)
    assert [params[f"dtype_{of}"] for of in ("q", "kv", "o")] == ["bf16"] * 3
    assert params["head_dim"] == 64
