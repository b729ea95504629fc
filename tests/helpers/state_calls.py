"""Random calls of `selective_state_update`, and what they must give."""

from __future__ import annotations

from typing import Any

import numpy as np

import fi_ffi
from fi_ffi.abi.tensor import DTYPES
from fi_ffi.cli.cases import Case, bound, case_of
from fi_ffi.ops.states.mamba import ALGORITHMS, INT16, RANDOM, module_of, row_of

from tests.helpers.calls import called, of_bound
from tests.helpers.gates import with_edges

PAD = -1
_PER_HEAD = {"dt": 1, "A": 2, "D": 1, "dt_bias": 1}


class StateCall:
    """A call's arrays, of the shapes that a caller has them in, and its options."""

    def __init__(
        self, rng: np.random.Generator, kind: str = "one", b: int = 3, steps: int = 1, *,
        heads: int = 8, groups: int = 2, dim: int = 64, dstate: int = 128,
        dtypes: str = "float32 bfloat16 bfloat16 float32", indices: str = "int64",
        gated: bool = True, biased: bool = True, slots: int | None = None,
    ) -> None:  # fmt: skip
        of_state, of_input, of_weight, of_a = (DTYPES[name].numpy for name in dtypes.split())
        self.kind, self.b, self.steps, self.rng = kind, b, steps, rng
        self.index = np.dtype(indices)
        slots = b + 9 if slots is None else slots
        self.options: dict[str, Any] = {"dt_softplus": True, "algorithm": "auto"}
        shape: tuple[int, ...] = (b,)
        self.arrays: dict[str, np.ndarray] = {}
        if kind == "steps":
            shape = (b, steps)
        elif kind == "sequences":
            lengths = rng.integers(0, steps + 1, b)
            lengths[0] = steps
            starts = np.concatenate([[0], np.cumsum(lengths)])
            shape = (int(starts[-1]),)
            self.arrays["cu_seqlens"] = starts.astype(np.int32)
            self.options["cache_steps"] = steps

        def normal(*sizes: int) -> np.ndarray:
            return rng.standard_normal(sizes)

        state = normal(slots, heads, dim, dstate)
        if of_state == np.int16:
            scale = rng.uniform(0.5, 1.5, (slots, heads, dim)) / 10000
            self.arrays["state_scale"] = scale.astype(np.float32)
            state = np.clip(10000 * state, -32767, 32767)
        self.arrays |= {
            "state": state.astype(of_state),
            "x": normal(*shape, heads, dim).astype(of_input),
            "dt": with_edges(rng, rng.uniform(0.05, 1, (*shape, heads))).astype(of_weight),
            "A": -rng.uniform(0.1, 3, heads).astype(of_a),
            "B": normal(*shape, groups, dstate).astype(of_input),
            "C": normal(*shape, groups, dstate).astype(of_input),
            "D": normal(heads).astype(of_weight),
            "out": np.full((*shape, heads, dim), np.nan, of_input),
        }
        if gated:
            self.arrays["z"] = normal(*shape, heads, dim).astype(of_input)
        if biased:
            self.arrays["dt_bias"] = rng.uniform(0, 0.5, heads).astype(of_weight)

    def read_from(self, *padded: int, width: int = 0) -> None:
        """Read states in any order, and none for those requests."""
        self.arrays["state_batch_indices"] = self._places(width, padded)

    def write_to(self, *padded: int, width: int = 0) -> None:
        """Write states where none is read: requests are not in order on a GPU."""
        read = self.arrays.get("state_batch_indices", np.arange(self.b))
        self.arrays["dst_state_batch_indices"] = self._places(width, padded, read)

    def _places(self, width: int, padded: tuple[int, ...], but: Any = ()) -> np.ndarray:
        slots = np.setdiff1d(np.arange(len(self.arrays["state"])), but)
        count = self.b * max(width, 1)
        places = self.rng.permutation(slots)[:count].astype(self.index)
        assert len(places) == count, "too few slots for each to be another"
        places = places.reshape(self.b, width) if width else places
        places[list(padded)] = PAD
        return places

    def keep_each(self, cache_steps: int, entries: int = 0) -> None:
        """Keep the state after each token."""
        entries = entries or self.b + 2
        shape = (entries, cache_steps, *self.arrays["state"].shape[1:])
        dtype = self.arrays["state"].dtype
        poison = -12345 if dtype == np.int16 else np.nan
        self.arrays["intermediate_states_buffer"] = np.full(shape, poison, dtype)
        if dtype == np.int16:
            entries = self.b  # that there are scales for
            of_each = (self.b, *shape[1:4])
            self.arrays["intermediate_state_scales"] = np.full(of_each, np.nan, np.float32)
        order = self.rng.permutation(entries)[: self.b]
        self.arrays["intermediate_state_indices"] = order.astype(self.index)
        self.options["cache_steps"] = cache_steps

    def at_random(self, seed: int) -> None:
        """Round float16 states at random."""
        self.arrays["rand_seed"] = np.array([seed], np.int64)

    @property
    def is_int16(self) -> bool:
        return "state_scale" in self.arrays

    def case(self) -> Case:
        """What it must give: arrays as the entry has them."""
        arrays = dict(self.arrays)
        _, _, dim, dstate = arrays["state"].shape
        for name, count in _PER_HEAD.items():
            if name in arrays:
                more = (dim, dstate)[:count]
                wide = arrays[name].reshape(*arrays[name].shape, *[1] * count)
                arrays[name] = np.broadcast_to(wide, (*arrays[name].shape, *more))
        kind, names = self.kind, ("state_batch_indices", "dst_state_batch_indices")
        ranks = [arrays[name].ndim if name in arrays else 1 for name in names]
        scalars = {
            "pad_slot_id": PAD, "disable_state_update": False, "cache_steps": 0, **self.options
        }  # fmt: skip
        scalars["algorithm"] = ALGORITHMS[scalars["algorithm"]]
        states = INT16 if self.is_int16 else RANDOM if "rand_seed" in arrays else ""
        return case_of(row_of(kind, *ranks, states), arrays, scalars)

    def module(self, device: str = "cuda:0") -> str:
        """The module that serves it."""
        arrays = self.arrays
        names = {"state": "state", "x": "input", "dt": "weight", "A": "matrixA"}
        dtypes = {f"{of}_dtype": fi_ffi.as_desc(arrays[name]).dtype.name
                  for name, of in names.items()}  # fmt: skip
        index = next((a for n, a in arrays.items() if n.endswith("_indices")), None)
        if index is not None:
            dtypes["stateIndex_dtype"] = index.dtype.name
        _, _, dim, dstate = arrays["state"].shape
        more: dict[str, Any] = {"state_scale_dtype": "float32"} if self.is_int16 else {}
        if "rand_seed" in arrays:
            more = {"philox_rounds": self.options.get("philox_rounds", 10)}
        tokens = 1 if self.kind == "one" else self.steps
        return module_of(fi_ffi.parse_device(device), dim=dim, dstate=dstate, ntokens_mtp=tokens,
                         **dtypes, **more)  # fmt: skip

    def run(self, machine: Any) -> dict[str, np.ndarray]:
        every = ("state", "out", "intermediate_states_buffer", "state_scale",
                 "intermediate_state_scales")  # fmt: skip
        written = [name for name in every if name in self.arrays]
        return called(fi_ffi.selective_state_update, self.arrays, machine.place, written,
                      **self.options, stream=machine.stream)  # fmt: skip

    def worst(self, machine: Any) -> float:
        """The worst error as a fraction of its bound; what is not written must be as it was."""
        if machine.is_gpu:
            machine.need(self.module())
        case, got = self.case(), self.run(machine)
        worst = 0.0
        for name, each in case.expected.items():
            if not isinstance(each, tuple) or each[1] is None:
                worst = max(worst, case.error(name, got[name])[1])
                continue
            value, magnitude = each
            changed = (magnitude > 0) | (name == "out")
            kept = got[name][~changed].tobytes() == self.arrays[name][~changed].tobytes()
            assert kept, f"{name} was written where nothing goes"
            allowed = bound(value, magnitude, got[name].dtype)[changed]
            worst = max(worst, of_bound(got[name][changed], value[changed], allowed))
        return worst
