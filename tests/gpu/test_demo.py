"""`fi-ffi demo` on a GPU: what there are kernels for is right, the rest says why it is not run."""

from __future__ import annotations

import json

from click.testing import CliRunner

from fi_ffi.cli import demo_calls, main
from fi_ffi.loader import search


def test_the_demo_is_right():
    done = CliRunner().invoke(main, ["demo", "--device", "cuda:0", "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    found = {each["op"]: each for each in document["results"]}
    assert len(found) + len(document["not_run"]) == demo_calls.COUNT
    assert all(
        "kernels" in each["reason"] or "module" in each["reason"] for each in document["not_run"]
    )
    for each in found.values():
        assert each["status"] == "ok" and each["provider"] == f"FlashInfer {search.release()}"
        assert 0 < each["microseconds"] < 1e5
    if "BatchDecodePlan" in found:  # of 2,048 keys a request; no memory of today reads more
        assert 50 < found["BatchDecodePlan"]["gigabytes_per_second"] < 20_000
    assert {"rmsnorm", "fused_add_rmsnorm"} <= {*found}


def test_a_person_reads_microseconds_and_the_rate():
    done = CliRunner().invoke(main, ["demo", "--device", "cuda:0"])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    right = [line for line in lines if line.startswith("  ok ")]
    assert right and all(line.endswith(" us") and len(line) <= 80 for line in right)
    if any(" BatchDecodePlan " in line for line in right):
        assert any("its keys and values at" in line and "GB/s" in line for line in lines)
