"""What `selective_state_update` is to give, by its definition, apart from the formula."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.helpers.state_calls import PAD, StateCall


class Defined:
    """What a call gives, one number of one token after the other, and the sums of magnitudes: terms
    may cancel, and what is off is so of these."""

    def __init__(self, call: StateCall) -> None:
        self.a = {name: array.astype(np.float64) for name, array in call.arrays.items()}
        self.call = call
        kept = "intermediate_states_buffer"
        self.name = kept if kept in call.arrays else "state"
        self.states, self.sizes = self.a[self.name].copy(), np.abs(self.a[self.name])
        self.is_written = np.zeros(len(self.states), bool)
        if self.name == kept:
            self.is_written = np.zeros(self.states.shape[:2], bool)
        self.out, self.out_sizes = np.empty_like(self.a["out"]), np.empty_like(self.a["out"])
        for i in range(call.b):
            self._request(i)

    def _tokens(self, i: int) -> list[Any]:
        if self.call.kind == "sequences":
            starts = self.call.arrays["cu_seqlens"]
            return [*range(starts[i], starts[i + 1])]
        return [i] if self.call.kind == "one" else [(i, step) for step in range(self.call.steps)]

    def _place(self, name: str, i: int, step: int) -> int:
        places = self.call.arrays[name]
        return int(places[i] if places.ndim == 1 else places[i, step])

    def _target(self, i: int, step: int, source: int, is_last: bool) -> Any:
        if source == PAD:
            return None
        if self.name != "state":
            return int(self.call.arrays["intermediate_state_indices"][i]), step
        if self.call.options.get("disable_state_update"):
            return None
        if "dst_state_batch_indices" in self.call.arrays:
            place = self._place("dst_state_batch_indices", i, step)
            return None if place == PAD else place
        return source if is_last else None

    def _request(self, i: int) -> None:
        a, source = self.a, i
        if "state_batch_indices" in a:
            accepted = self.call.arrays.get("num_accepted_tokens")
            first = 0 if accepted is None else max(int(accepted[i]) - 1, 0)
            source = self._place("state_batch_indices", i, first)
        state = np.zeros(a["state"].shape[1:]) if source == PAD else a["state"][source].copy()
        if source != PAD and "state_scale" in a:
            state = state * a["state_scale"][source][..., None]
        size, tokens = np.abs(state), self._tokens(i)
        for step, token in enumerate(tokens):
            for head, d in np.ndindex(state.shape[:2]):
                self._step(token, head, d, state[head, d], size[head, d])
            target = self._target(i, step, source, step == len(tokens) - 1)
            if target is not None:
                self.states[target], self.sizes[target] = state, size
                self.is_written[target] = True

    def _step(self, token: Any, head: int, d: int, state: np.ndarray, size: np.ndarray) -> None:
        a = self.a
        group = head // (a["state"].shape[1] // a["B"].shape[-2])
        dt = a["dt"][token][head] + (a["dt_bias"][head] if "dt_bias" in a else 0.0)
        if self.call.options["dt_softplus"]:
            dt = np.log1p(np.exp(dt))
        x = a["x"][token][head, d]
        added = dt * a["B"][token][group] * x
        state[:] = state * np.exp(a["A"][head] * dt) + added
        size[:] = size * np.exp(a["A"][head] * dt) + np.abs(added)
        c, skipped = a["C"][token][group], a["D"][head] * x
        gate = 1.0
        if "z" in a:
            z = a["z"][token][head, d]
            gate = z / (1 + np.exp(-z))
        self.out[token][head, d] = (state @ c + skipped) * gate
        self.out_sizes[token][head, d] = (size @ np.abs(c) + abs(skipped)) * abs(gate)

    def check(self) -> None:
        """The formula's values; of int16, that what the definition gives is right by it, and what
        is two steps off is not."""
        case = self.call.case()
        assert (np.abs(case.expected["out"][0] - self.out) <= 1e-8 * self.out_sizes).all()
        states, at = self.states[self.is_written], self.is_written
        if not self.call.is_int16:
            found, off = case.expected[self.name]
            assert (np.abs(found[at] - states) <= 1e-8 * self.sizes[at]).all()
            assert not off[~at].any(), "a state may be written where none is"
            return
        scales = np.abs(states).max(-1) / 32767
        got = self.call.arrays[self.name].copy()
        got[at] = np.rint(states / scales[..., None])
        assert case.error(self.name, got)[1] <= 1
        for where in (at, ~at):
            wrong = got.copy()
            wrong[where] += np.int16(2)
            assert case.error(self.name, wrong)[1] > 1 or not where.any()
        of_each = "state_scale" if self.name == "state" else "intermediate_state_scales"
        found = case.expected[of_each][0]
        assert np.abs(found[at[: len(found)]] / scales - 1).max(initial=0.0) < 1e-8
