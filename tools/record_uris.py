"""Records what FlashInfer's own generators call modules: tests/loader/data/uris.json.

    python tools/record_uris.py

makes the build environment of every supported release (as `fi-ffi build` does: the
package index, nvcc of CUDA 13, a C++ compiler; no GPU), asks the generators of each for
the names of the cases below and for FlashInfer's own list of modules, and writes the file.
The cases name generators and parameters by hand, so that the file does not depend on
`fi_ffi/loader/data/names.json`, which is tested against it.  Allow some minutes.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fi_ffi.loader.building.build import available  # noqa: E402
from fi_ffi.loader.building.names import DEFAULT_RELEASE  # noqa: E402
from fi_ffi.loader.uris import DTYPES  # noqa: E402
from tools.generators import generated_names  # noqa: E402

RELEASES = ("0.6.3", "0.6.12", "0.6.13", "0.6.18", "0.7.2.post1")
NEW = RELEASES[-1:]
OLD = RELEASES[:-1]
FP4 = RELEASES[1:]
ARCH = "9.0a"
EVERY_ARCH = "7.5 8.0 8.9 9.0a 10.0a 10.3a 11.0a 12.0a 12.1a"
DATA = ROOT / "tests" / "loader" / "data" / "uris.json"

HEADER = (
    "Made by tools/record_uris.py: what the generators inside flashinfer-python of each release "
    "call a module. `cases`: family and parameters of fi_ffi.loader.uris, the generator and what "
    "it was called with where that is not the same, and the releases by the name they gave "
    "('' where they have no such generator). `listed`: FlashInfer's list of what it builds ahead "
    "of time for 9.0a, by the releases that have the names; `listed_for_every_arch`: what the "
    "default release lists beyond that for architectures from 7.5 to 12.1a."
)

MODULES = "flashinfer.jit.attention.modules:"
XQA = "flashinfer.jit.xqa:"
MAMBA = "flashinfer.jit.mamba."


def case(
    family: str,
    generator: str,
    params: dict[str, Any],
    releases: tuple[str, ...] = RELEASES,
    **arguments: Any,
) -> dict[str, Any]:
    found = {"family": family, "params": params, "generator": generator, "arguments": arguments}
    return {**found, "releases": releases}


def _dims(qk: int, vo: int) -> dict[str, int]:
    return {"head_dim_qk": qk, "head_dim_vo": vo}


def _types(q: str, kv: str, o: str) -> dict[str, str]:
    return {"dtype_q": q, "dtype_kv": kv, "dtype_o": o}


def _flags(swa: bool, cap: bool) -> dict[str, bool]:
    return {"use_sliding_window": swa, "use_logits_soft_cap": cap}


def attention() -> list[dict[str, Any]]:
    found = []
    plain, swa, both = _flags(False, False), _flags(True, False), _flags(True, True)
    fa2 = [
        {**_types("f16", "f16", "f16"), **_dims(128, 128), "pos_encoding_mode": 0, **plain},
        {**_types("bf16", "bf16", "bf16"), **_dims(64, 64), "pos_encoding_mode": 1, **swa},
        {**_types("f16", "e4m3", "f16"), **_dims(256, 256), "pos_encoding_mode": 2, **both},
        {**_types("bf16", "e5m2", "bf16"), **_dims(192, 128), "pos_encoding_mode": 0, **plain},
    ]
    fa3 = [*fa2[:2], {**fa2[0], **_dims(192, 128)}]
    for params in fa2:
        found.append(case("single_decode", MODULES + "gen_single_decode_module", params))
        for idx in ("i32", "i64"):
            with_idx = {**params, "dtype_idx": idx}
            found.append(case("batch_decode", MODULES + "gen_batch_decode_module", with_idx))
    for backend, every in (("fa2", fa2), ("fa3", fa3)):
        for params, f16qk in itertools.product(every, (False, True)):
            more = {**params, "backend": backend, "use_fp16_qk_reduction": f16qk}
            found.append(case("single_prefill", MODULES + "gen_single_prefill_module", more))
            found += batch_prefill({**more, "dtype_idx": "i32"})
    # fp8 queries: tensor cores of SM90 only.
    for q, o, size in itertools.product(("e4m3", "e5m2"), ("f16", "bf16"), (128, 256)):
        params = {
            **_types(q, q, o), **_dims(size, size), "pos_encoding_mode": 0, **plain,
            "backend": "fa3", "use_fp16_qk_reduction": False,
        }  # fmt: skip
        found += batch_prefill({**params, "dtype_idx": "i32"})
    return found


def batch_prefill(params: dict[str, Any]) -> list[dict[str, Any]]:
    public = MODULES + "gen_batch_prefill_module"
    found = [
        case("batch_prefill", public, params, OLD),
        case("batch_prefill", public, {**params, "paged_kv_stride_mode": "runtime"}, NEW),
    ]
    if params["backend"] == "fa2":
        made = (("equal", "full", "primary"), ("independent", "full", "independent_full"),
                ("independent", "paged", "independent_paged"))  # fmt: skip
        for mode, surface, name in made:
            more = {**params, "paged_kv_stride_mode": mode, "module_surface": surface}
            found.append(
                case("batch_prefill", f"{MODULES}_gen_batch_prefill_{name}_module", more, NEW)
            )
    return found


def nvfp4() -> list[dict[str, Any]]:
    """NVFP4 keys and values, kept as uint8 or as torch's own type."""
    found = []
    for torch, short in (("uint8", "u8"), ("float4_e2m1fn_x2", "fp4_e2m1")):
        for releases, name in ((FP4[:2], short), (FP4[2:], "fp4x2_e2m1")):
            params = {
                **_types("bf16", name, "bf16"), "dtype_idx": "i32", **_dims(128, 128),
                "pos_encoding_mode": 0, **_flags(False, False),
            }  # fmt: skip
            found.append(
                case("batch_decode", MODULES + "gen_batch_decode_module", params, releases,
                     dtype_kv=f"torch.{torch}")
            )  # fmt: skip
    return found


def more_attention() -> list[dict[str, Any]]:
    found = []
    for dtype, size, swa in itertools.product(("f16", "bf16"), (64, 128), (False, True)):
        for backend in ("fa2", "fa3"):
            params = {
                "backend": backend, **_types(dtype, dtype, dtype), "dtype_idx": "i32",
                **_dims(size, size), "use_sliding_window": swa,
            }  # fmt: skip
            generator = MODULES + "gen_batch_prefill_attention_sink_module"
            found.append(
                case("batch_prefill_with_attention_sink", generator, params, pos_encoding_mode=0)
            )
    for dtype, backend, profiler in itertools.product(
        ("f16", "bf16"), ("fa2", "fa3"), (False, True)
    ):
        params = {
            "backend": backend, **_types(dtype, dtype, dtype), "dtype_idx": "i32",
            "head_dim_ckv": 512, "head_dim_kpe": 64, "use_profiler": profiler,
        }  # fmt: skip
        found.append(case("batch_mla", MODULES + "gen_batch_mla_module", params))
    for arc, swa in (("sm80", False), ("cuda_core", True)):
        params = {
            **_types("f16", "f16", "f16"), "dtype_idx": "i32", "head_dim_ckv": 512,
            "use_sliding_window": swa, "use_logits_soft_cap": False, "arc": arc,
        }  # fmt: skip
        found.append(case("batch_decode_mla", MODULES + "get_batch_decode_mla_uri", params))
    for dtype, swa in (("f16", False), ("bf16", True)):
        params = {
            **_types(dtype, dtype, dtype), "head_dim": 128, "use_fp16_qk_reduction": False,
            "dtype_idx": "i32", "pos_encoding_mode_p": 0, "use_sliding_window_p": swa,
            "use_logits_soft_cap_p": False, "pos_encoding_mode_d": 1,
            "use_sliding_window_d": False, "use_logits_soft_cap_d": swa,
        }  # fmt: skip
        found.append(case("pod", MODULES + "gen_pod_module", params))
        found.append(case("batch_pod", MODULES + "gen_batch_pod_module", params))
        params = {**_types(dtype, dtype, dtype), "dtype_idx": "i32", **_dims(64, 64)}
        found.append(
            case("batch_prefill_with_bidirectional_ranges",
                 MODULES + "gen_batch_prefill_bidirectional_ranges_module", params)
        )  # fmt: skip
    return found + batch_attention() + fmha_v2()


def batch_attention() -> list[dict[str, Any]]:
    found = []
    for kv, cap, profiler in (("f16", False, False), ("e4m3", True, False), ("f16", True, True)):
        params = {
            **_types("f16", kv, "f16"), "dtype_idx": "i32", **_dims(128, 128),
            "pos_encoding_mode": 0, "use_logits_soft_cap": cap, "use_profiler": profiler,
        }  # fmt: skip
        public = MODULES + "gen_batch_attention_module"
        found.append(case("batch_attention", public, params, OLD))
        for mode, generator in (
            ("runtime", public),
            ("equal", MODULES + "_gen_batch_attention_primary_module"),
            ("independent", MODULES + "_gen_batch_attention_independent_module"),
        ):
            more = {**params, "paged_kv_stride_mode": mode}
            found.append(case("batch_attention", generator, more, NEW))
    return found


def fmha_v2() -> list[dict[str, Any]]:
    layouts = ("packed_qkv", "q_paged_kv_nhd", "q_paged_kv_hnd", "contiguous_q_kv")
    types = (("bf16", "bf16"), ("f16", "f16"), ("e4m3", "bf16"))
    return [
        case("fmha_v2", MODULES + "gen_fmha_v2_module",
             {"input_layout": layout, "input_dtype": given, "output_dtype": output})
        for layout, (given, output) in zip(layouts, itertools.cycle(types), strict=False)
    ]  # fmt: skip


def xqa() -> list[dict[str, Any]]:
    found = []
    for kv, page, swa, length in (
        ("bf16", 16, False, 1),
        ("e4m3", 64, True, 1),
        ("bf16", 32, False, 4),
    ):
        params = {
            "input_dtype": "bf16", "kv_cache_dtype": kv, "output_dtype": "bf16", "page_size": page,
            "head_dim": 128, "head_group_ratio": 8, "use_sliding_window": swa, "q_seq_len": length,
        }  # fmt: skip
        found.append(case("xqa", XQA + "gen_xqa_module", params))
    ragged = {**params, "use_ragged_q": True}
    found.append(case("xqa", XQA + "gen_xqa_module", ragged, RELEASES[3:]))
    params = {
        "input_dtype": "e4m3", "kv_cache_dtype": "e4m3", "page_size": 64, "head_dim": 576,
        "head_group_ratio": 128, "use_sliding_window": False,
    }  # fmt: skip
    return [*found, case("xqa_mla", XQA + "gen_xqa_module_mla", params)]


def others() -> list[dict[str, Any]]:
    found = []
    for arch in ("89", "90", "100", "103", "120"):
        generator = f"flashinfer.jit.fused_moe:gen_cutlass_fused_moe_sm{arch}_module"
        found.append(case("fused_moe", generator, {"arch": arch}))
    for arch in ("90", "100", "103", "107", "110", "120", "120f", "121"):
        generator = f"flashinfer.jit.fp4_quantization:gen_fp4_quantization_sm{arch}_module"
        found.append(case("fp4_quantization", generator, {"arch": arch}))
    plain = {
        "dsv3_optimizations": ("concat_mla", "dsv3_router_gemm", "dsv3_fused_routing"),
        "tinygemm2": ("tinygemm2",),
        "mamba.seq_chunk_cumsum": ("seq_chunk_cumsum",),
        "gdn": ("gdn_prefill_sm90",),
        **{name: (name,) for name in ("norm", "page", "rope", "sampling", "topk", "cascade")},
    }
    for module, names in plain.items():
        for name in names:
            family = "mamba_seq_chunk_cumsum" if name == "seq_chunk_cumsum" else name
            found.append(case(family, f"flashinfer.jit.{module}:gen_{name}_module", {}))
    for act in ("silu", "gelu", "gelu_tanh"):
        generator = "flashinfer.jit.activation:gen_act_and_mul_module"
        found.append(case(f"{act}_and_mul", generator, {}, act_func_name=act))
    silu = {
        "C": 1024, "output_dtype": "bf16", "warps_m": 4, "ctas_per_row": 1, "bytes_per_ldg": 16,
        "kernel_cfg": 0, "occupancy": 3,
    }  # fmt: skip
    found.append(case("rmsnorm_silu", "flashinfer.jit.rmsnorm_silu:gen_rmsnorm_silu_module", silu))
    return found + mamba()


def mamba() -> list[dict[str, Any]]:
    found = []
    state = {
        "state_dtype": "bf16", "input_dtype": "bf16", "weight_dtype": "bf16",
        "matrixA_dtype": "f32", "stateIndex_dtype": "i64", "state_scale_dtype": None,
        "dim": 64, "dstate": 128,
    }  # fmt: skip
    ssu = {
        **state, "ntokens_mtp": 4, "cu_seqlens_dtype": "i32", "num_accepted_tokens_dtype": "i64",
        "philox_rounds": 0,
    }  # fmt: skip
    scaled = {**ssu, "state_dtype": "i16", "state_scale_dtype": "f32", "philox_rounds": 5}
    for params, arch in itertools.product((ssu, scaled), ("", "sm90", "sm100")):
        name = f"gen_selective_state_update_{arch}_module".replace("__", "_")
        generator = f"{MAMBA}selective_state_update:{name}"
        more = {**params, "ssu_arch": arch}
        found.append(case("selective_state_update", generator, more, RELEASES[1:]))
    steps = {
        **state, "dt_dtype": "f32", "npredicted": 4, "max_window": 8, "heads_per_group": 8,
        "philox_rounds": 0, "enable_pdl": True,
    }  # fmt: skip
    generator = MAMBA + "checkpointing_ssu:gen_checkpointing_ssu_module"
    found.append(case("checkpointing_ssu", generator, steps, OLD))
    found.append(case("checkpointing_ssu", generator, {**steps, "num_groups": 2}, NEW))
    return found


def _argument(name: str, value: Any, family: str) -> Any:
    is_text = family == "rmsnorm_silu" or not isinstance(value, str) or "dtype" not in name
    return value if is_text else f"torch.{DTYPES[value]}"


def as_request(number: int, entry: dict[str, Any]) -> dict[str, Any]:
    """A case as the driver in the build environment takes it."""
    called = {k: _argument(k, v, entry["family"]) for k, v in entry["params"].items()}
    called |= entry["arguments"]
    return {"text": str(number), "generator": entry["generator"], "arguments": called}


def ask(release: str, cases: list[dict[str, Any]], folder: Path) -> list[str | None]:
    """The names a release gives: "" where it has no such generator, None if not asked."""
    requests = [
        as_request(number, entry)
        for number, entry in enumerate(cases)
        if release in entry.get("releases", RELEASES)
    ]
    names, failed = generated_names(requests, release=release, arch=EVERY_ARCH, build_dir=folder)
    for number, reason in failed.items():
        absent = ("has no attribute", "No module named")
        if not any(text in reason for text in absent):
            raise SystemExit(f"{release}: {cases[int(number)]}: {reason}")
        names[number] = ""
    return [names.get(str(number)) for number in range(len(cases))]


def listed(release: str, arch: str, folder: Path) -> list[str]:
    entries = available(release=release, arch=arch, build_dir=folder)
    return sorted(entry.name for entry in entries if entry.kind == "module")


def _grouped(lists: dict[str, list[str]]) -> dict[str, list[str]]:
    """Names by the releases that have them: most are in all."""
    found: dict[str, list[str]] = {}
    for name in sorted(set(itertools.chain.from_iterable(lists.values()))):
        key = " ".join(release for release, names in lists.items() if name in names)
        found.setdefault(key, []).append(name)
    return found


def main() -> None:
    cases = [*attention(), *nvfp4(), *more_attention(), *xqa(), *others()]
    lists: dict[str, list[str]] = {}
    for entry in cases:
        entry["names"] = {}
    for release in RELEASES:
        print(release, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            for entry, name in zip(cases, ask(release, cases, Path(folder)), strict=True):
                if name is not None:
                    entry["names"].setdefault(name, []).append(release)
            lists[release] = listed(release, ARCH, Path(folder))
            if release == DEFAULT_RELEASE:
                every = listed(release, EVERY_ARCH, Path(folder) / "every")
    for entry in cases:
        del entry["releases"]
    beyond = sorted(set(every) - set(lists[DEFAULT_RELEASE]))
    head = {
        "about": HEADER, "releases": RELEASES, "default": DEFAULT_RELEASE, "arch": ARCH,
        "listed": _grouped(lists), "listed_for_every_arch": beyond,
    }  # fmt: skip
    text = json.dumps(head, indent=0)[:-2]
    lines = ",\n".join(json.dumps(entry, separators=(",", ":")) for entry in cases)
    DATA.parent.mkdir(parents=True, exist_ok=True)
    DATA.write_text(f'{text},\n"cases": [\n{lines}\n]\n}}\n')
    print(f"{len(cases)} cases, {sum(map(len, head['listed'].values()))} names: {DATA}")


if __name__ == "__main__":
    main()
