"""What an editor and `help()` show: names that are meant, options with their defaults, `repr`s."""

from __future__ import annotations

import inspect
import pydoc
import re

import numpy as np
import pytest

import fi_ffi

PLANS = [name for name in fi_ffi.__all__ if name.endswith("Plan")]
# What a plan of any class may have, and no class has all of it.
OF_PLANS = {
    "backend", "backend_reason", "device", "levels", "module", "op", "options", "paged_run",
    "plan_info", "ragged_run", "replan", "run", "size", "supports", "workspace", "workspace_size",
}  # fmt: skip


def names_of(thing: object) -> set[str]:
    return {name for name in dir(thing) if not name.startswith("_")}


def plan_of(requests: int, **options: object) -> fi_ffi.BatchDecodePlan:
    counts = np.ones(requests, np.int32)
    return fi_ffi.BatchDecodePlan(
        np.arange(requests + 1, dtype=np.int32), np.arange(requests, dtype=np.int32), counts,
        num_qo_heads=4, num_kv_heads=2, head_dim=64, page_size=16, device="cpu", **options,
    )  # fmt: skip


def test_the_package_shows_its_interface():
    assert names_of(fi_ffi) == {*fi_ffi.__all__}
    assert all(hasattr(fi_ffi, name) for name in dir(fi_ffi))


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_shows_what_is_meant(name):
    assert names_of(getattr(fi_ffi, name)) <= OF_PLANS
    assert "replan" in names_of(getattr(fi_ffi, name))


def test_a_made_plan_and_its_workspace_show_what_is_meant():
    plan = plan_of(2)
    assert names_of(plan) <= OF_PLANS
    assert names_of(plan.workspace) == {
        "allocate", "device", "float_buffer", "float_bytes", "int_buffer", "int_bytes",
        "set_replayed",
    }  # fmt: skip


@pytest.mark.parametrize("name", PLANS)
def test_options_are_in_the_signature(name):
    """Those without a default are wanted by the class, and the rest are what the table says."""
    plan = getattr(fi_ffi, name)
    found = inspect.signature(plan).parameters
    assert "options" not in found and "self" not in found
    assert any(re.match("num_(qo_)?heads", option) for option in found)
    sizes = {n for n, p in found.items() if n.startswith("num_") and p.default is p.empty}
    assert sizes & {"num_qo_heads", "num_heads"}
    with pytest.raises(TypeError, match="missing"):
        plan()


def test_help_has_options_and_defaults():
    text = pydoc.plain(pydoc.render_doc(fi_ffi.BatchPrefillPlan))
    assert re.search(r"\bhead_dim_qk: int,", text)
    for told in ("window_left: int = -1", "causal: bool = False", "backend: str = 'auto'"):
        assert told in re.sub(r"\s+", " ", text), told
    assert "_choose_rows" not in text


def test_a_plan_says_what_it_is():
    workspace = fi_ffi.Workspace.allocate("cpu", 1 << 20, 1 << 16)
    first = plan_of(3, window_left=7, workspace=workspace)
    assert repr(first) == (
        "<BatchDecodePlan of 3 requests on cpu, cuda cores: num_qo_heads=4, num_kv_heads=2, "
        "kv_data_type='float16', o_data_type='float16', window_left=7, head_dim=64, page_size=16>"
    )
    assert repr(workspace) == "<Workspace on cpu: float_bytes=1048576, int_bytes=65536>"
    second = plan_of(1, workspace=workspace)
    assert "of 3 requests on cpu, cuda cores, stale:" in repr(first)
    assert "of 1 request on cpu, cuda cores:" in repr(second)


def test_a_cascade_says_what_it_is():
    zero = np.array([0, 1], np.int32)
    levels = ([zero] * 2, [zero] * 2, [zero[:1]] * 2, [zero[1:]] * 2)
    plan = fi_ffi.MultiLevelCascadePlan(
        *levels, num_qo_heads=2, num_kv_heads=1, head_dim_qk=64, page_size=1, device="cpu"
    )
    assert repr(plan).count("<BatchPrefillPlan of 1 request on cpu") == 2
    assert repr(plan).startswith("<MultiLevelCascadePlan of 2 levels: <")
