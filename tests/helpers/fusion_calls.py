"""Calls of `trtllm_comm`'s entries: a rank's workspace, inputs, and what results have to be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from fi_ffi.ops.table.comm import PATTERNS

from tests.helpers.rounding import half_step

Array = np.ndarray[Any, Any]
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
DTYPES = tuple(map(np.dtype, (np.float32, np.float16, ml_dtypes.bfloat16)))
SLOTS = 256  # of flags, for each rank
NORM_OUT = (1, 4, 5, 9, 11)


@dataclass(frozen=True)
class Sizes:
    """What a workspace is made for."""

    ranks: int
    tokens: int
    hidden: int
    itemsize: int = 2

    @property
    def third(self) -> int:
        """Bytes of one of three Lamport buffers."""
        return self.ranks * self.tokens * self.hidden * self.itemsize

    @property
    def parts(self) -> tuple[int, int, int, int]:
        """Bytes of a rank's buffer, flags and Lamport buffers, and of its own numbers."""
        return self.third, self.ranks * SLOTS * 4, 3 * self.third, 128

    def offsets(self) -> list[int]:
        return [0, *np.cumsum(self.parts).tolist()]

    @property
    def nbytes(self) -> int:
        return sum(self.parts)

    def pointers(self, addresses: list[int], rank: int) -> Array:
        """What a rank is given, of all ranks' memory."""
        starts = self.offsets()
        found = [address + starts[i] for i in range(3) for address in addresses]
        return np.array([*found, addresses[rank] + starts[3]], np.int64)

    def contents(self) -> Array:
        """A rank's memory as it must be before the first call."""
        whole, starts = np.full(self.nbytes, 0xCD, np.uint8), self.offsets()
        whole[starts[1] : starts[2]] = 0
        lamport = whole[starts[2] : starts[3]].view(f"u{self.itemsize}")
        lamport[:] = 1 << 8 * self.itemsize - 1
        whole[starts[3] : starts[3] + 20].view(np.int32)[:] = 0, 0, 0, self.third, 0
        return whole


@dataclass(frozen=True)
class Call:
    """One all-reduce; `seed` is of its inputs."""

    seed: int
    pattern: int
    tokens: int
    hidden: int
    dtype: int
    use_oneshot: bool = True
    fp32_acc: bool = True
    weight_bias: float = 0.0
    layout: int = 0
    group: int = 128
    in_place: bool = False

    @property
    def kind(self) -> str:
        return next(kind for kind, codes in PATTERNS.items() if self.pattern in codes)

    @property
    def op(self) -> str:
        return f"trtllm_allreduce_fusion{self.kind}"

    @property
    def same(self) -> tuple[str, str]:
        """An output and an input that are one tensor where the call is in place."""
        return (
            ("residual_out", "residual_in") if self.pattern else ("allreduce_out", "allreduce_in")
        )

    def inputs(self, rank: int) -> dict[str, Array]:
        dtype = DTYPES[self.dtype]
        own = np.random.default_rng([self.seed, rank])
        same = np.random.default_rng([self.seed, 1000])
        x = own.standard_normal((self.tokens, self.hidden))
        x[own.random(x.shape) < 0.05] = -0.0
        found = {"allreduce_in": x.astype(dtype)}
        if self.pattern:
            residual = 3 * same.standard_normal((self.tokens, self.hidden))
            found["residual_in"] = residual.astype(dtype)
            found["rms_gamma"] = (1 + same.standard_normal(self.hidden) / 4).astype(dtype)
        if self.pattern in (2, 3, 4, 5):
            scale = 0.01 if self.pattern in (2, 4) else 40.0
            found["scale_factor"] = np.array([scale], np.float32)
        return found

    def outputs(self) -> dict[str, Array]:
        """Poisoned."""
        shape, dtype = (self.tokens, self.hidden), DTYPES[self.dtype]
        if not self.pattern:
            return {"allreduce_out": np.full(shape, np.nan, dtype)}
        found = {"residual_out": np.full(shape, np.nan, dtype)}
        if self.pattern in NORM_OUT:
            found["norm_out"] = np.full(shape, np.nan, dtype)
        if self.kind == "_fp4":
            found["quant_out"] = np.full((self.tokens, self.hidden // 2), 0xA5, np.uint8)
            rows = -(-self.tokens // 128) * 128, -(-self.hidden // 64) * 4
            count = rows[0] * rows[1] if self.layout == 0 else self.tokens * self.hidden // 16
            found["scale_out"] = np.full(count, 0xA5, np.uint8)
        elif self.pattern > 1:
            found["quant_out"] = np.full(shape, np.nan, E4M3)
        if self.kind == "_block_fp8":
            columns = -(-self.hidden // (4 * self.group))
            count = self.tokens + (columns - 1) * (-(-self.tokens // 4) * 4)
            found["scale_out"] = np.full(count, -1, np.int32)
        if self.kind == "_dynamic_fp8":
            found["scale_out"] = np.full(self.tokens, np.nan, np.float32)
        return found

    def numbers(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "use_oneshot": self.use_oneshot, "trigger_completion_at_end": True,
            "fp32_acc": self.fp32_acc, "pattern_code": self.pattern, "rms_eps": 1e-5,
            "launch_with_pdl": False, "weight_bias": self.weight_bias, "token_num": None,
            "hidden_size": None,
        }  # fmt: skip
        if self.kind == "_fp4":
            found["layout_code"] = self.layout
        if self.kind == "_block_fp8":
            found["block_quant_group_size"] = self.group
        return found

    def judge(self, outs: dict[str, Array], ranks: int) -> None:
        """Hold a rank's results against float64; what is stored is what the next starts from."""
        dtype = DTYPES[self.dtype]
        given = [self.inputs(rank) for rank in range(ranks)]
        addends = np.array([each["allreduce_in"].astype(np.float64) for each in given])
        total, magnitude = addends.sum(axis=0), np.abs(addends).sum(axis=0)
        # Rounded once where they are added in float32, and at each addition where not.
        times = 1 if self.fp32_acc or not self.dtype else ranks - 1
        allowed = times * half_step(magnitude, dtype) + ranks * 2.0**-23 * magnitude
        if not self.pattern:
            close(outs["allreduce_out"], total, allowed)
            return
        residual = total + given[0]["residual_in"].astype(np.float64)
        allowed = allowed + half_step(np.abs(residual) + allowed, dtype)
        close(outs["residual_out"], residual, allowed)
        stored = outs["residual_out"].astype(np.float64)
        weight = self.weight_bias + given[0]["rms_gamma"].astype(np.float64)
        norm = stored / np.sqrt((stored**2).mean(axis=1, keepdims=True) + 1e-5) * weight
        of_norm = half_step(norm, dtype) + 2.0**-20 * np.abs(norm)
        if "norm_out" in outs:
            close(outs["norm_out"], norm, of_norm)
            norm = outs["norm_out"].astype(np.float64)
            of_norm = np.zeros_like(norm)
        if self.pattern > 1:
            self._judge_quantised(outs, norm, of_norm, given[0])

    def _judge_quantised(
        self, outs: dict[str, Array], norm: Array, of_norm: Array, given: dict[str, Array]
    ) -> None:
        if self.kind == "":
            scale: Any = float(given["scale_factor"][0])
        elif self.kind == "_dynamic_fp8":
            scale = outs["scale_out"].astype(np.float64)[:, None]
            largest = np.abs(norm).max(axis=1, keepdims=True)
            close(scale, largest / 448, 2.0**-22 * largest + of_norm.max(axis=1, keepdims=True))
        elif self.kind == "_block_fp8":
            scale = self._judge_groups(outs["scale_out"], norm, of_norm)
        else:
            self._judge_fp4(outs, norm, float(given["scale_factor"][0]))
            return
        wanted = np.clip(norm / scale, -448, 448)
        step = np.maximum(np.abs(wanted) * 2.0**-4, 2.0**-10) * 1.001
        close(outs["quant_out"], wanted, step + 1.1 * of_norm / scale)

    def _judge_groups(self, packed: Array, norm: Array, of_norm: Array) -> Array:
        column, groups = -(-self.tokens // 4) * 4, self.hidden // self.group
        found = packed.view(np.uint8).reshape(-1, 4)
        codes = np.array([
            [found[g // 4 * column + token, g % 4] for g in range(groups)]
            for token in range(self.tokens)
        ]).reshape(self.tokens, groups)  # fmt: skip
        for rest in range(groups, -(-groups // 4) * 4):
            at = rest // 4 * column + np.arange(self.tokens)
            assert (found[at, rest % 4] == 0).all()
        scale = 2.0 ** (codes - 127.0)
        largest = np.abs(norm).reshape(self.tokens, groups, self.group).max(axis=2) / 448
        room = of_norm.reshape(self.tokens, groups, self.group).max(axis=2) / 448 + 2.0**-30
        assert (scale >= largest - room).all()
        assert (scale < 2 * (largest + room)).all()
        return scale.repeat(self.group, axis=1)

    def _judge_fp4(self, outs: dict[str, Array], norm: Array, of_all: float) -> None:
        blocks, scales = self.hidden // 16, outs["scale_out"].view(E4M3)
        row, col = np.meshgrid(np.arange(self.tokens), np.arange(blocks), indexing="ij")
        if self.layout == 2:
            at = row * blocks + col
        else:
            tile = (row // 128) * -(-blocks // 4) + col // 4
            at = tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + col % 4
        scale = scales[at].astype(np.float64)
        others = np.setdiff1d(np.arange(scales.size), at)
        assert (outs["scale_out"][others] == 0xA5).all()
        largest = np.abs(norm).reshape(self.tokens, blocks, 16).max(axis=2)
        close(scale, of_all * largest / 6, 0.07 * of_all * largest / 6 + 2.0**-9)
        halves = np.stack([outs["quant_out"] % 16, outs["quant_out"] // 16], axis=-1)
        values = halves.astype(np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
        values = values.reshape(self.tokens, blocks, 16) * (scale / of_all)[..., None]
        wanted = norm.reshape(values.shape)
        # Half of the widest gap of e2m1, from 4 to 6; the scale's rounding may clip its largest.
        close(values, wanted, (1.01 * scale / of_all + 0.08 * largest)[..., None])


@dataclass(frozen=True)
class MoeCall:
    """One all-reduce of what experts made: `finalize` of rows that are chosen, or of all of
    several experts'."""

    seed: int
    finalize: bool
    tokens: int
    hidden: int
    dtype: int
    experts: int = 3
    top_k: int = 2
    # Whether there are what a call may leave out.
    has_all: bool = True
    weight_bias: float = 0.0

    @property
    def op(self) -> str:
        return f"trtllm_moe_{'finalize_' * self.finalize}allreduce_fusion"

    same = ("residual_out", "residual_in")
    in_place = False

    def inputs(self, rank: int) -> dict[str, Array]:
        dtype, shape = DTYPES[self.dtype], (self.tokens, self.hidden)
        own = np.random.default_rng([self.seed, rank])
        same = np.random.default_rng([self.seed, 1000])
        found = {"residual_in": (2 * same.standard_normal(shape)).astype(dtype)}
        gamma = (1 + same.standard_normal(self.hidden) / 4).astype(dtype)
        rest = own.standard_normal(shape).astype(dtype)
        if not self.finalize:
            scales = own.standard_normal((self.experts, self.tokens)).astype(np.float32)
            rows = own.standard_normal((self.experts, *shape)).astype(dtype)
            return found | {
                "rms_gamma": gamma, "moe_reduction_scale_input": scales,
                "moe_reduction_active_experts_token_input": rows,
                "moe_reduction_token_input": rest,
            }  # fmt: skip
        made = self.experts * self.tokens
        indices = own.integers(-1, made, (self.tokens, self.top_k)).astype(np.int32)
        found |= {
            "norm_weight": gamma, "expanded_idx_to_permuted_idx": indices,
            "allreduce_in": own.standard_normal((made, self.hidden)).astype(dtype),
        }  # fmt: skip
        if self.has_all:
            weights = own.standard_normal(indices.shape).astype(dtype)
            found |= {"expert_scale_factor": weights, "shared_expert_output": rest}
        return found

    def outputs(self) -> dict[str, Array]:
        names = ["norm_out", "residual_out"]
        if not self.finalize and self.has_all:
            names.append("moe_allreduce_out")
        shape = self.tokens, self.hidden
        return {name: np.full(shape, np.nan, DTYPES[self.dtype]) for name in names}

    def numbers(self) -> dict[str, Any]:
        if self.finalize:
            routed = {"routed_scaling_factor": 2.5} if self.has_all else {}
            return {"eps": 1e-5, "weight_bias": self.weight_bias} | routed
        return {
            "rms_eps": 1e-5, "weight_bias": self.weight_bias, "token_num": None,
            "hidden_size": None, "moe_reduction_device_num_experts": None,
        }  # fmt: skip

    def addends(self, rank: int) -> tuple[Array, Array]:
        """What a rank adds, and the sum of its terms' magnitudes."""
        given = {name: of.astype(np.float64) for name, of in self.inputs(rank).items()}
        if not self.finalize:
            scales = given["moe_reduction_scale_input"][..., None]
            terms = [*(given["moe_reduction_active_experts_token_input"] * scales),
                     given["moe_reduction_token_input"]]  # fmt: skip
            return sum(terms), sum(map(np.abs, terms))
        indices = given["expanded_idx_to_permuted_idx"].astype(int)
        rows = np.where(indices[..., None] < 0, 0, given["allreduce_in"][indices])
        factor = 1.0
        if self.has_all:
            rows, factor = rows * given["expert_scale_factor"][..., None], 2.5
        rest = given.get("shared_expert_output", np.zeros(rows.shape[::2]))
        return (
            factor * rows.sum(axis=1) + rest, factor * np.abs(rows).sum(axis=1) + np.abs(rest)
        )  # fmt: skip

    def judge(self, outs: dict[str, Array], ranks: int) -> None:
        """Every step is rounded to the tensors' dtype."""
        dtype = DTYPES[self.dtype]
        each = [self.addends(rank) for rank in range(ranks)]
        total, magnitude = (sum(parts) for parts in zip(*each, strict=True))
        steps = 2 * max(self.experts, self.top_k) + ranks + 2
        allowed = 1.02 * steps * half_step(magnitude, dtype)
        if "moe_allreduce_out" in outs:
            close(outs["moe_allreduce_out"], total, allowed)
        given = {name: of.astype(np.float64) for name, of in self.inputs(0).items()}
        residual = total + given["residual_in"]
        last = 1.02 * half_step(np.abs(residual) + allowed, dtype)
        close(outs["residual_out"], residual, allowed + last)
        stored = outs["residual_out"].astype(np.float64)
        weight = self.weight_bias + given["norm_weight" if self.finalize else "rms_gamma"]
        norm = stored / np.sqrt((stored**2).mean(axis=1, keepdims=True) + 1e-5) * weight
        close(outs["norm_out"], norm, half_step(norm, dtype) + 2.0**-20 * np.abs(norm))


def close(found: Array, wanted: Array, allowed: Any) -> None:
    error = np.abs(found.astype(np.float64) - wanted)
    assert error.shape == wanted.shape
    assert (error <= allowed).all(), f"{np.nanmax(error / np.maximum(allowed, 1e-300))} of allowed"
