"""Dumped calls: what is in their files, and what `fi-ffi replay` makes of them."""

from __future__ import annotations

import json
import os
import struct
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner, Result

import fi_ffi
from fi_ffi import reference
from fi_ffi.abi.tensor import DTYPES, parse_device
from fi_ffi.cli import main
from fi_ffi.cli.replay import Placed as Replaced
from fi_ffi.cli.replay import _eps, load
from fi_ffi.ops.functions import OPS
from fi_ffi.reference import norm as kernels
from fi_ffi.watch import safetensors, tensor_bytes, watching
from fi_ffi.watch.dump import AFTER, BEFORE

from tests.helpers.cases import default_dtypes, make_case
from tests.helpers.children import done
from tests.helpers.inputs import inputs_of
from tests.helpers.plan_calls import KINDS, Case
from tests.helpers.prepared_calls import EVERY_OP, Placed, draw, placed


@pytest.fixture(autouse=True)
def _nothing_is_left():
    yield
    assert watching.inboxes == watching.logs == ()


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "dumps"


def dumped(folder: Path, call: Callable[[], object], **options: Any) -> list[Path]:
    """The files of the calls that are made, before each of them."""
    with fi_ffi.call_log(0, dump=folder, **options):
        call()
    return sorted(folder.glob(f"*{BEFORE}"))


def replay(path: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["replay", str(path), *options])


def replayed(path: Path, *options: str) -> dict[str, Any]:
    """What is printed of a call that replays as it was."""
    done = replay(path, "--json", *options)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["ok"]
    return found


def header(path: Path) -> tuple[dict[str, Any], bytes]:
    """A safetensors file, read by what its format says."""
    data = path.read_bytes()
    (count,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + count]), data[8 + count :]


def rewrite(path: Path, document: dict[str, Any], body: bytes) -> None:
    text = json.dumps(document).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def edit(path: Path, change: Callable[[dict[str, Any]], object], to: Path | None = None) -> None:
    """Rewrite what a file says of its call."""
    document, body = header(path)
    call = json.loads(document["__metadata__"]["call"])
    change(call)
    document["__metadata__"]["call"] = json.dumps(call)
    rewrite(to or path, document, body)


def after_of(path: Path) -> Path:
    return Path(str(path).replace(BEFORE, AFTER))


def norm(folder: Path, rows: int = 3, dtype: str = "bfloat16") -> tuple[Path, dict[str, Any]]:
    """A dumped rmsnorm, and its arrays after it."""
    row = OPS["rmsnorm"].row
    case = make_case(row, {"n": rows, "h": 64}, {"T": dtype}, np.random.default_rng())
    (path,) = dumped(folder, lambda: fi_ffi.rmsnorm(**case.arrays, eps=0.25))
    return path, case.arrays


# ---------------------------------------------------------------- files


def test_what_is_in_the_files(folder):
    path, arrays = norm(folder)
    assert path.name.startswith(f"{os.getpid()}-") and path.name.endswith(f"-rmsnorm{BEFORE}")
    after = after_of(path)
    assert {*folder.iterdir()} == {path, after}
    for file in (path, after):
        assert file.stat().st_mode & 0o777 == 0o600
    document, body = header(path)
    words = document.pop("__metadata__")
    assert words["format"] == "fi_ffi call 1"
    assert document.keys() == {"out", "input", "weight"}
    for name in ("input", "weight"):
        entry = document[name]
        assert entry["dtype"] == "BF16" and entry["shape"] == list(arrays[name].shape)
        assert body[slice(*entry["data_offsets"])] == arrays[name].tobytes()
    call = json.loads(words["call"])
    assert call["op"] == "rmsnorm" and call["device"] == "cpu" and call["stream"] is None
    assert call["row"]["signature"] == str(OPS["rmsnorm"].row.signature)
    named = {of.pop("name"): of for of in call["arguments"]}
    assert named["eps"] == {"value": 0.25}
    assert named["out"] == {
        "dtype": "bfloat16", "shape": [3, 64], "strides": [64, 1], "device": "cpu",
        "address": arrays["out"].ctypes.data, "reads": False, "writes": True, "scratch": False,
    }  # fmt: skip
    document, body = header(after)
    assert json.loads(document.pop("__metadata__")["result"]) is None
    assert document.keys() == {"out"}
    assert body == arrays["out"].tobytes()


@pytest.mark.parametrize("dtype", [*fi_ffi.DTYPES])
def test_every_dtype_is_kept(folder, dtype):
    """Bit by bit, rows apart or not."""
    rng = np.random.default_rng()
    size = fi_ffi.DTYPES[dtype].itemsize
    whole = rng.integers(0, 256, (3, 4, 6 * size), np.uint8)
    for strides, part in (
        ((24, 6, 1), whole),
        ((24, 6, 1), whole[:2]),
        ((24, 12, 1), whole[:, ::2]),
    ):
        shape = (*part.shape[:2], 6)
        if fi_ffi.DTYPES[dtype].shares_bytes:
            strides, shape, part = (48, 12, 1), (*shape[:1], 4, 12), whole[: len(part)]
        desc = fi_ffi.TensorDesc(whole.ctypes.data, shape, dtype, strides=strides, device="cpu")
        got = tensor_bytes.read(desc, None)
        assert got == part.tobytes()
        path = folder.with_suffix(f".{len(got)}")
        safetensors.write(path, {"x": safetensors.StoredTensor(desc.dtype, shape, got)}, {"a": "b"})
        found, words = safetensors.read(path)
        assert bytes(found["x"]) == got and words == {"a": "b"}


def test_axes_in_any_order():
    array = np.random.default_rng().integers(0, 2**15, (3, 4, 5, 6), np.int16)
    for axes in ((0, 1, 2, 3), (3, 2, 1, 0), (1, 0, 3, 2), (0, 2, 1, 3)):
        for part in (array, array[1:, :, ::2], array[:, 2:3], array[..., 1:2], array[::-1]):
            view = part.transpose(axes)
            strides = [step // 2 for step in view.strides]
            where = view.ctypes.data
            desc = fi_ffi.TensorDesc(where, view.shape, "int16", strides=strides, device="cpu")
            assert tensor_bytes.read(desc.at(where), None) == view.tobytes()


def test_limits(folder):
    x = np.ones((4, 16), np.float16)

    def calls():
        for _ in range(3):
            fi_ffi.rmsnorm(np.zeros_like(x), x, x[0])

    log = folder.parent / "log"
    with fi_ffi.call_log(1, log, dump=folder, max_dump_calls=2):
        calls()
    assert len([*folder.iterdir()]) == 4
    assert log.read_text().count("not dumped: 2 calls were") == 1
    # Two tensors of 128 bytes and one of 32 before a call, one of 128 after.
    each = 2 * 128 + 32 + 128
    for most, kept in ((each - 129, 0), (each - 1, 1), (each, 2), (2 * each - 1, 3)):
        other = folder / str(most)
        dumped(other, calls, max_dump_bytes=most)
        assert len([*other.iterdir()]) == kept


def test_only_the_ops_that_are_named(folder):
    x = np.ones((4, 16), np.float16)
    case = Case("decode")

    def calls():
        fi_ffi.rmsnorm(np.zeros_like(x), x, x[0])
        fi_ffi.fused_add_rmsnorm(x, x.copy(), x[0].copy())
        case.run(case.plan())

    paths = dumped(folder, calls, dump_ops="*add_rmsnorm, BatchDecodePlan.*")
    names = [path.name.split("-")[2] for path in paths]
    assert names == [f"fused_add_rmsnorm{BEFORE}", f"BatchDecodePlan.run{BEFORE}"]
    for path in paths:
        replayed(path, "--bits")


def test_a_full_disk_is_told_and_the_call_is_made(folder, monkeypatch):
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors, "write", fail)
    x, out = np.ones((4, 16), np.float16), np.zeros((4, 16), np.float16)
    log = folder.parent / "log"
    with fi_ffi.call_log(1, log, dump=folder):
        fi_ffi.rmsnorm(out, x, x[0])
    assert (out > 0.9).all()
    assert "not dumped: OSError: [Errno 28]" in log.read_text()


# ---------------------------------------------------------------- replays


# A router's weight is transposed, and is read number by number: one of the three will do.
ONCE = [one for one in EVERY_OP if not one.id.startswith("mm_M1_16_K7168")]


@pytest.mark.parametrize(("op", "dtypes", "more"), ONCE)
def test_every_op(folder, op, dtypes, more):
    (made,) = placed(draw(op.row, dtypes, more), more, 1)
    (path,) = dumped(folder, lambda: op(**made.values))
    found = replayed(path, "--bits")
    names = [of["name"] for of in found["compared"] if of["to"] == "the dump"]
    written = {arg.name for arg in op.row.tensors if arg.writes and arg.name in made.arrays}
    scratch = {arg.name for arg in op.row.tensors if arg.is_scratch}
    assert {*names} == written - scratch
    assert any(of["to"] == "the definition in float64" for of in found["compared"])


@pytest.mark.parametrize("kind", KINDS)
def test_plans_and_runs(folder, kind):
    case = Case(kind)
    paths = dumped(folder, lambda: case.run(case.plan()))
    case.check()
    plan, run = (replayed(path, "--bits") for path in paths)
    assert [of["name"] for of in plan["compared"]] == ["(result)"]
    assert {of["name"] for of in run["compared"]} == {"o", "maybe_lse"}
    assert all(of["is_same"] for of in run["compared"])


def test_a_run_that_leaves_rows_as_they_are(folder):
    """With CUDA graphs there may be more rows than the batch has."""
    case = Case("paged", enable_cuda_graph=True, max_total_num_rows=32, max_num_indices=20)
    case.memory["o"][...] = 77
    _, path = dumped(folder, lambda: case.run(case.plan()))
    assert (case.memory["o"][9:] == 77).all() and len(case.memory["o"]) == 32
    replayed(path, "--bits")
    # An element more that was written is seen.
    after = after_of(path)
    document, body = header(after)
    start, _ = document["o"]["data_offsets"]
    at = start + 2 * 20 * 4 * 64
    rewrite(after, document, body[:at] + b"\1\2" + body[at + 2 :])
    assert replay(path).exit_code == 1


def test_single_requests(folder):
    rng = np.random.default_rng()
    q, k, v = (rng.standard_normal(shape).astype(np.float16)
               for shape in ((6, 4, 64), (9, 2, 64), (9, 2, 64)))  # fmt: skip
    tmp, out = np.zeros(64, np.uint8), np.full((6, 4, 64), np.nan, np.float16)
    lse = np.full((6, 4), np.nan, np.float32)

    def calls():
        fi_ffi.single_prefill(q, k, v, tmp, out, lse, causal=True)
        hnd = (x.transpose(1, 0, 2).copy() for x in (k, v))
        fi_ffi.single_decode(q[0], *hnd, tmp, out[0], kv_layout="HND", q_scale=0.5)
        fi_ffi.single_prefill(
            q, k, v, tmp, out, pos_encoding_mode="ROPE_LLAMA", logits_soft_cap=0.0, window_left=3
        )

    for path in dumped(folder, calls):
        assert len(replayed(path, "--bits")["compared"]) in (1, 2)


def test_tensors_that_share_memory(folder):
    """Heads of a fused tensor, in place, and keys and values in one cache."""
    rng = np.random.default_rng()
    fused = rng.standard_normal((5, 3, 64)).astype(np.float16)
    q, k = fused[:, :2], fused[:, 2:]
    weight = np.ones(64, np.float16)
    op = OPS["append_paged_kv_cache"]
    case = make_case(op.row, inputs_of(op.row).small, default_dtypes(op.row), rng)
    both = np.stack([case.arrays.pop(f"paged_{of}_cache") for of in "kv"], axis=1)

    def calls():
        fi_ffi.qk_rmsnorm(q, q, weight)
        fi_ffi.rmsnorm(k[:, 0], k[:, 0], weight)
        caches = dict(zip(("paged_k_cache", "paged_v_cache"),
                          fi_ffi.split_paged_kv_cache(both), strict=True))  # fmt: skip
        op(**case.arrays, **caches)

    paths = dumped(folder, calls)
    for path in paths:
        replayed(path, "--bits")
    recorded = load(paths[2])
    k_cache, v_cache = (recorded.tensors[f"paged_{of}_cache"] for of in "kv")
    assert k_cache.address < v_cache.address < k_cache.address + k_cache.span
    again = Replaced(recorded.tensors.values(), parse_device("cpu"))
    k, v = (again.desc(f"paged_{of}_cache") for of in "kv")
    assert v.ptr - k.ptr == v_cache.address - k_cache.address


def test_prepared_calls_and_views_of_larger_tensors(folder):
    """A column of a matrix, of which few bytes are in the file."""
    whole = np.ones((64, 8192), np.float16)
    x, out, weight = whole[:, 64:192], np.empty((64, 128), np.float16), np.ones(128, np.float16)
    (path,) = dumped(folder, fi_ffi.rmsnorm.prepare(out, x, weight))
    replayed(path, "--bits")


def test_a_call_that_came_to_no_end(folder):
    path, _ = norm(folder)
    after_of(path).unlink()
    found = replayed(path, "--bits")
    assert not found["came_to_its_end"]
    assert [of["to"] for of in found["compared"]] == ["the definition in float64"]
    assert "the call did not return" in replay(path).output


def test_either_file_or_what_their_names_have_in_common(folder):
    path, _ = norm(folder)
    for name in (path, str(path).replace(BEFORE, AFTER), str(path).removesuffix(BEFORE)):
        assert replay(Path(name)).exit_code == 0


def test_results_that_differ(folder):
    """One step in one element is told with --bits, and a larger error without."""
    path, arrays = norm(folder, rows=5)
    after = after_of(path)
    document, body = header(after)
    out = np.frombuffer(body, ml_dtypes.bfloat16).reshape(5, 64).copy()
    assert (out == arrays["out"]).all()
    largest = np.unravel_index(np.abs(out.astype(np.float32)).argmax(), out.shape)
    out.view(np.uint16)[largest] += 1
    rewrite(after, document, out.tobytes())
    assert replay(path).exit_code == 0
    done = replay(path, "--bits")
    assert done.exit_code == 1
    assert "out differs from the dump" in done.output
    out.view(np.uint16)[largest] += 16
    rewrite(after, document, out.tobytes())
    assert replay(path).exit_code == 1
    out[...] = arrays["out"]
    out[2, 3] = np.nan
    rewrite(after, document, out.tobytes())
    assert replay(path).exit_code == 1


def test_each_row_of_a_result_has_its_own_bound(folder):
    """By its largest element: of one small row, a few steps are an error."""
    rng = np.random.default_rng()
    x = rng.standard_normal((2, 64)) * np.float64([[100.0], [1e-2]])
    arrays = {"out": np.zeros((2, 32)), "input": x}
    arrays = {name: array.astype(ml_dtypes.bfloat16) for name, array in arrays.items()}
    (path,) = dumped(folder, lambda: fi_ffi.silu_and_mul(**arrays))
    after = after_of(path)
    document, body = header(after)
    sizes = np.abs(arrays["out"].astype(np.float64))
    step = float(ml_dtypes.finfo(ml_dtypes.bfloat16).eps)
    for row, element, off, code in (
        (1, sizes[1].argmax(), 30 * step * sizes[1].max(), 1),
        (1, sizes[1].argmin(), 30 * step * sizes[1].max(), 1),
        (0, sizes[0].argmin(), step * sizes[0].max(), 0),
    ):
        out = arrays["out"].copy()
        out[row, element] += np.asarray(off, out.dtype)
        assert len(body) == out.nbytes and out.tobytes() != arrays["out"].tobytes()
        rewrite(after, document, out.tobytes())
        told = replay(path, "--json")
        (of,) = (of for of in json.loads(told.stdout)["compared"] if of["to"] == "the dump")
        assert (told.exit_code, of["status"]) == (code, ["ok", "fail"][code])
        assert of["max_error"] == pytest.approx(off, rel=0.1)


def test_a_kernel_that_is_wrong_is_seen(folder, monkeypatch):
    """By the definition, where the dump has the same error."""
    right = reference.from_formula("rmsnorm", [arg.name for arg in fi_ffi.rmsnorm.row.args])

    def wrong(out, *others):
        right(out, *others)
        out[1] *= np.asarray(1.05, out.dtype)

    monkeypatch.setitem(kernels.KERNELS["norm"], "rmsnorm", wrong)
    monkeypatch.setattr(reference, "_entries", {})
    fi_ffi.rmsnorm.forget()
    try:
        path, _ = norm(folder)
        done = replay(path, "--json")
        verdicts = {of["to"]: of["status"] for of in json.loads(done.stdout)["compared"]}
        assert verdicts == {"the dump": "ok", "the definition in float64": "fail"}
        assert done.exit_code == 1
    finally:
        fi_ffi.rmsnorm.forget()


# ---------------------------------------------------------------- what cannot be replayed


def refused(path: Path, *options: str) -> str:
    done = replay(path, *options)
    assert done.exit_code == 2, done.output
    assert isinstance(done.exception, SystemExit)
    assert "cannot be replayed: " in done.output
    return done.output


def test_a_run_whose_plan_was_made_before(folder):
    case = Case("decode")
    plan = case.plan()
    (path,) = dumped(folder, lambda: case.run(plan))
    assert "planned before the log was open" in refused(path)


def dumped_entry(folder: Path, name: str) -> Path:
    """A call of a function that no row describes."""
    desc = fi_ffi.as_desc(np.ones(4, np.float16))
    call = lambda: watching.called(name, lambda: None, (desc, 2), [("0", desc)], None)  # noqa: E731
    (path,) = dumped(folder, call)
    return path


def test_a_function_that_no_row_describes(folder):
    path = dumped_entry(folder, "some/entry")
    assert "some_entry" in path.name
    assert "no row describes some/entry" in refused(path)
    assert load(path).tensors["0"].elements.tolist() == [1] * 4


def test_names_of_calls_are_plain_and_short_in_names_of_files(folder):
    """Also those of functions, which are whatever a library exports."""
    path = dumped_entry(folder, "../" + "\x1b\u00e9/" * 400)
    assert path.parent == folder and len(path.name) < 150
    assert path.name.isascii() and path.name.isprintable()


def test_a_row_that_there_is_no_more(folder):
    path, _ = norm(folder)
    signature = str(OPS["rmsnorm"].row.signature).replace("float", "int")
    edit(path, lambda call: call["row"].update(signature=signature))
    assert "has no row rmsnorm" in refused(path)


def test_no_such_file_device_or_kernels(folder):
    path, _ = norm(folder)
    refused(folder / "nothing")
    refused(path, "--device", "gpu:0")
    refused(path, "--kernels", str(folder / "nothing"))


def test_arguments_that_the_op_refuses(folder):
    """What a file says is checked as what a caller says."""
    path, _ = norm(folder)
    edit(path, lambda call: call["arguments"][3].update(value=-1.0))
    assert "eps" in refused(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["input"].update(data_offsets=[0, 1 << 40]),
        lambda d: d["input"].update(data_offsets=[-8, 376]),
        lambda d: d["input"].update(shape=[1 << 62, 4]),
        lambda d: d["input"].update(shape=[3.0, 64]),
        lambda d: d["input"].update(dtype="F12"),
        lambda d: d.update(input=[1, 2]),
        lambda d: d["__metadata__"].update(format="fi_ffi call 2"),
        lambda d: d["__metadata__"].update(call="[]"),
        lambda d: d["__metadata__"].update(call="{"),
        lambda d: d["__metadata__"].update(call=json.dumps({"arguments": [{"name": "x"}, 3]})),
        lambda d: d["__metadata__"].pop("call"),
        lambda d: d.update(__metadata__={"format": 3}),
    ],
)
def test_headers_that_are_wrong(folder, change):
    path, _ = norm(folder)
    document, body = header(path)
    change(document)
    rewrite(path, document, body)
    refused(path)


MEASURED = """
import resource, sys
from click.testing import CliRunner
from fi_ffi.cli import main

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

CliRunner().invoke(main, ["replay", sys.argv[1], "--device", "cpu"])
before = peak()
done = CliRunner().invoke(main, ["replay", sys.argv[2], "--device", "cpu"])
print(done.exit_code, peak() - before, done.output)
"""


@pytest.mark.parametrize("of", ["strides", "scratch"])
def test_memory_is_bounded_by_what_the_files_hold(folder, of):
    """A small file with a tensor, or a workspace, of gigabytes."""
    if of == "strides":
        path, _ = norm(folder)
    else:
        case = Case("decode")
        path = dumped(folder, lambda: case.run(case.plan()))[-1]

    def change(call: dict[str, Any]) -> None:
        for arg in [*call["arguments"], *call.get("plan", {}).get("arguments", [])]:
            if of == "strides" and arg["name"] == "input":
                arg["strides"][0] = 2**30
            elif of == "scratch" and arg.get("scratch"):
                arg["shape"], arg["strides"] = [2**31], [1]

    wrong = folder / f"wrong{BEFORE}"
    edit(path, change, wrong)
    assert wrong.stat().st_size < 40_000
    status, out, err = done(MEASURED, str(path), str(wrong), seconds=300)
    assert status == 0, err
    code, megabytes, text = out.split(maxsplit=2)
    assert int(megabytes) < 200
    assert int(code) == 2
    expected = "input 4294967424 of them" if of == "strides" else "and 1073741824 is the most"
    assert expected in text


def test_what_a_dump_says_reaches_no_terminal(folder):
    """Names of arguments and of what was called, in tables and in errors."""
    path, _ = norm(folder)
    hostile, escaped = "\x1b[2J\x07\u202e", r"\x1b[2J\x07\u202e"
    edit(path, lambda call: call.update(op=hostile))
    in_a_table = replay(path).output
    edit(path, lambda call: call["arguments"][0].update(name=hostile))
    for text in (in_a_table, refused(path)):
        assert escaped in text
        assert not [c for c in text if not c.isprintable() and c != "\n"]


def test_placed_arrays_are_as_aligned_as_they_were(folder):
    """What a kernel loads at a time must be where it was."""
    case = draw(OPS["rmsnorm"].row, {"T": "float16"}, {})
    made = Placed(case)
    (path,) = dumped(folder, lambda: fi_ffi.rmsnorm(**made.values))
    recorded = load(path)
    again = Replaced(recorded.tensors.values(), parse_device("cpu"))
    for name, address in made.addresses.items():
        desc = again.desc(name)
        assert desc.ptr % 256 == address % 256 and desc.ptr != address
        assert desc.layout == made.descs[name].layout


@pytest.mark.parametrize(("of_result", "eps"), [("bfloat16", 2.0**-7), ("float32", 2.0**-10)])
def test_steps_are_those_of_the_coarsest_dtype(of_result, eps):
    """Of what is read and of the result itself, which a call may not read."""
    dtypes = {"x": ("float16", True), "out": (of_result, False), "other": ("float8_e4m3fn", False),
              "ids": ("int32", True)}  # fmt: skip
    tensors = {name: types.SimpleNamespace(dtype=DTYPES[dtype], reads=reads, is_scratch=False)
               for name, (dtype, reads) in dtypes.items()}  # fmt: skip
    assert _eps(tensors, "out") == eps
