"""Random calls of `gdn_decode`, and what they must give."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

import fi_ffi
from fi_ffi.abi.tensor import DTYPES
from fi_ffi.cli.cases import bound, case_of
from fi_ffi.ops.states.gdn import GdnKernel, least_states, row_of

from tests.helpers.calls import called, of_bound, padded
from tests.helpers.gates import with_edges

SIZE = 128
PAD = -1
BF16 = np.dtype(ml_dtypes.bfloat16)
# Requests of which the definition is computed: as many as take seconds.
MOST = 24
_OF_REQUESTS = ("q", "k", "v", "a", "b", "output", "initial_state_indices", "output_state_indices",
                "intermediate_states_buffer")  # fmt: skip


def module_of(kernel: GdnKernel) -> str:
    """The module of a kernel on an H100."""
    return kernel.names((9, 0), 132)[0]


class DecodeCall:
    """A call's arrays and options."""

    def __init__(
        self, rng: np.random.Generator, b: int = 3, t: int = 1, *, h: int = 2, hv: int = 4,
        state_dtype: str = "bfloat16", dt_bias_dtype: str = "float32", index_dtype: str = "int32",
        gate_dtype: str = "bfloat16", is_indexed: bool = True, slots: int | None = None,
        scale: float | None = None, use_qk_l2norm: bool = True, state_layout: str = "VK",
    ) -> None:  # fmt: skip
        self.rng, self.index = rng, np.dtype(index_dtype)
        of_state, of_bias, of_gate = (
            DTYPES[name].numpy for name in (state_dtype, dt_bias_dtype, gate_dtype)
        )
        slots = b if not is_indexed else 2 * b + 9 if slots is None else slots
        normal = rng.standard_normal
        self.arrays: dict[str, np.ndarray] = {
            "q": normal((b, t, h, SIZE)).astype(BF16),
            "k": normal((b, t, h, SIZE)).astype(BF16),
            "v": normal((b, t, hv, SIZE)).astype(BF16),
            "state": normal((slots, hv, SIZE, SIZE), np.float32).astype(of_state),
            "A_log": rng.uniform(-4, 2, hv).astype(np.float32),
            "a": with_edges(rng, normal((b, t, hv))).astype(of_gate),
            "dt_bias": rng.uniform(-3, 3, hv).astype(of_bias),
            "b": normal((b, t, hv)).astype(of_gate),
            "output": np.full((b, t, hv, SIZE), np.nan, BF16),
        }
        if not use_qk_l2norm:  # keys of length 1, for longer ones make states grow
            for name in ("q", "k"):
                x = self.arrays[name].astype(np.float32)
                x /= np.sqrt((x * x).sum(-1, keepdims=True))
                self.arrays[name] = x.astype(BF16)
        self.options: dict[str, Any] = {
            "scale": scale, "use_qk_l2norm": use_qk_l2norm, "state_layout": state_layout,
            "disable_state_update": False,
        }  # fmt: skip
        if is_indexed:
            self.arrays["initial_state_indices"] = self._places(1)

    def _places(self, first: int, but: Any = ()) -> np.ndarray:
        """Slots in any order, each once; the first ones are nobody's."""
        slots = np.setdiff1d(np.arange(first, len(self.arrays["state"])), but)
        b = len(self.arrays["q"])
        assert len(slots) >= b, "too few slots for each to be another"
        return self.rng.permutation(slots)[:b].astype(self.index)

    def pad(self, *requests: int) -> None:
        """No state for these requests."""
        for name in ("initial_state_indices", "output_state_indices"):
            if name in self.arrays:
                self.arrays[name][list(requests)] = PAD

    def write_elsewhere(self) -> None:
        """Write states where none is read."""
        read = self.arrays["initial_state_indices"]
        self.arrays["output_state_indices"] = self._places(1, read)

    def move_apart(self, pad: int) -> None:
        """Leave this many elements of poison between states."""
        state = self.arrays["state"]
        wide = padded(state.reshape(len(state), -1), pad)
        strides = (wide.strides[0], *state.strides[1:])
        self.arrays["state"] = np.lib.stride_tricks.as_strided(wide, state.shape, strides)

    def keep_each(self) -> None:
        """Keep the state after each token."""
        b, t, hv, _ = self.arrays["v"].shape
        shape = (b, t, hv, SIZE, SIZE)
        self.arrays["intermediate_states_buffer"] = np.full(
            shape, np.nan, self.arrays["state"].dtype
        )

    @property
    def kernel(self) -> GdnKernel:
        arrays, options = self.arrays, self.options
        b, t, h, _ = arrays["q"].shape
        hv = arrays["v"].shape[2]
        index = arrays.get("initial_state_indices")
        names = {name: fi_ffi.as_desc(array).dtype.name for name, array in arrays.items()}
        return GdnKernel(
            h, hv, t, least_states(b, hv, 132, options["state_layout"]), names["state"],
            names["dt_bias"], (names["a"], names["b"]),
            "int32" if index is None else names["initial_state_indices"],
            options["state_layout"], index is not None, "output_state_indices" not in arrays,
            "intermediate_states_buffer" in arrays, options["disable_state_update"],
            options["use_qk_l2norm"], options["scale"] or SIZE**-0.5, *self._apart(),
        )  # fmt: skip

    def _apart(self) -> tuple[int, int]:
        """The slots of bfloat16, and their distance; 0, 0 where they are one after another."""
        state = self.arrays["state"]
        is_apart = len(state) > 1 and not state.flags.c_contiguous and state.dtype == BF16
        return (len(state), state.strides[0] // state.itemsize) if is_apart else (0, 0)

    def module(self) -> str:
        """The module that serves it on an H100."""
        return module_of(self.kernel)

    def expected(self, requests: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """What these requests must give: by the definition, of their states alone."""
        arrays = {
            name: array[requests] if name in _OF_REQUESTS else array
            for name, array in self.arrays.items()
        }
        slots, indices = np.arange(len(requests)), arrays.get("initial_state_indices")
        if indices is not None:
            targets = arrays.get("output_state_indices", indices)
            slots = np.unique(np.concatenate([[0], indices[indices >= 0], targets[targets >= 0]]))
            for name, of in (("initial_state_indices", indices), ("output_state_indices", targets)):
                if name in arrays:
                    found = np.searchsorted(slots, np.maximum(of, 0))
                    arrays[name] = np.where(of < 0, of, found).astype(of.dtype)
        else:
            slots = requests
        arrays["state"] = self.arrays["state"][slots]
        kernel = self.kernel
        shaped = dict(arrays)
        for name in ("state", "intermediate_states_buffer"):  # as the entry has them
            view = {arg.name: arg.view for arg in row_of(kernel).tensors}.get(name)
            if name in arrays and view:
                shape = arrays[name].shape
                sizes = [int(np.prod([shape[axis] for axis in axes])) for axes in view]
                shaped[name] = arrays[name].reshape(sizes)
        constants = {
            "scale": kernel.scale, "use_qk_l2norm": kernel.use_qk_l2norm,
            "disable_state_update": kernel.disable_state_update,
        }  # fmt: skip
        case = case_of(row_of(kernel), shaped, constants)
        found_of = {}
        for name, expected in case.expected.items():
            assert isinstance(expected, tuple) and expected[1] is not None
            value, magnitude = expected
            found_of[name] = (
                value.reshape(arrays[name].shape),
                magnitude.reshape(arrays[name].shape),
            )
        self.slots = slots
        return found_of

    def run(self, machine: Any) -> dict[str, np.ndarray]:
        written = [name for name in ("state", "output", "intermediate_states_buffer")
                   if name in self.arrays]  # fmt: skip
        return called(fi_ffi.gdn_decode, self.arrays, machine.place, written, **self.options,
                      stream=machine.stream)  # fmt: skip

    def _is_padded(self, requests: np.ndarray) -> np.ndarray:
        """Which requests have no state: their results may be undefined, as slot 0 may."""
        indices = self.arrays.get("initial_state_indices")
        return np.zeros(len(requests), bool) if indices is None else indices[requests] < 0

    def worst(self, machine: Any) -> float:
        """The worst error as a fraction of its bound, of some requests where there are many; what
        is not written must be as it was."""
        if machine.is_gpu:
            machine.need(self.module())
        b = len(self.arrays["q"])
        chosen = np.arange(b)
        if b > MOST:
            chosen = self.rng.permutation(b)[:MOST]
            for name in ("initial_state_indices", "output_state_indices"):
                if name in self.arrays:  # for one that is padded a slot may stand that is shared
                    chosen = np.union1d(chosen, np.flatnonzero(self.arrays[name] < 0))
        expected, got = self.expected(chosen), self.run(machine)
        worst = 0.0
        for name, (value, magnitude) in expected.items():
            rows = self.slots if name == "state" else chosen
            found, before = got[name][rows], self.arrays[name][rows]
            judged = np.isfinite(magnitude)
            of_none = rows == 0 if name == "state" else self._is_padded(chosen)
            assert judged[~of_none].all(), f"{name} is judged by nothing"
            changed = (magnitude > 0) | (name == "output") & (value == 0)
            kept = judged & ~changed
            assert found[kept].tobytes() == before[kept].tobytes(), (
                f"{name} was written where nothing goes"
            )
            judged &= changed
            allowed = bound(value, magnitude, found.dtype)
            worst = max(worst, of_bound(found[judged], value[judged], allowed[judged]))
        self._check_rest(got)
        return worst

    def _check_rest(self, got: dict[str, np.ndarray]) -> None:
        """States of nobody stay as they are."""
        index = self.arrays.get("initial_state_indices")
        if index is None:
            return
        targets = self.arrays.get("output_state_indices", index)
        others = np.ones(len(self.arrays["state"]), bool)
        others[np.maximum(targets, 0)] = False
        same = got["state"][others].tobytes() == self.arrays["state"][others].tobytes()
        assert same, "a state of no request was written"
