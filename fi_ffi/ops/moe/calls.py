"""A call of a mode's kernels: describe, check, and launch, or compute with numpy on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fi_ffi.abi.device import Device
from fi_ffi.abi.frame import Frame
from fi_ffi.abi.interop import as_desc
from fi_ffi.abi.streams import launching
from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.errors import ArgumentError, ArgumentTypeError
from fi_ffi.ops.moe import options
from fi_ffi.ops.moe.arrays import pair
from fi_ffi.ops.moe.check import (
    Want,
    check_apart,
    check_device,
    check_limits,
    scale_wants,
    sizes_of,
    tensor_wants,
)
from fi_ffi.ops.moe.modes import Sizes
from fi_ffi.ops.moe.options import Parallel
from fi_ffi.ops.moe.runner import Given, Runner, launch, told_of

if TYPE_CHECKING:
    from fi_ffi.ops.moe.fused import FusedMoe

_CACHE_LIMIT = 1024
SWIGLU = ("swiglu_alpha", "swiglu_beta", "swiglu_limit")
_OPTIONAL = frozenset({"token_final_scales", "fc1_expert_biases", "fc2_expert_biases", *SWIGLU})


class Settled:
    """A combination of layouts and options that fits: what is left to check, and frames."""

    __slots__ = ("frames", "sizes", "wants")

    def __init__(self, sizes: Sizes, wants: list[Want]) -> None:
        self.sizes, self.wants = sizes, wants
        # Free ones without and with `profile_ids`; list.pop and append are atomic, so concurrent
        # calls get their own.
        self.frames: tuple[list[Frame], list[Frame]] = ([], [])


class Asked(NamedTuple):
    """What a call is asked for besides tensors and tactics."""

    parallel: Parallel
    enable_alltoall: bool
    activation: str
    enable_pdl: bool

    @classmethod
    def checked(
        cls, op: str, parallel: Mapping[str, object], alltoall: object, activation: object,
        pdl: object, limits: tuple[str, ...] = (),
    ) -> Asked:  # fmt: skip
        """`limits` are the `swiglu_` tensors that are given."""
        return cls(
            Parallel.checked(op, **parallel),
            options.flag(op, "enable_alltoall", alltoall),
            options.with_limits(op, options.activation(op, activation), limits),
            options.flag(op, "enable_pdl", pdl),
        )

    def given(self, op: str, device: Device) -> dict[str, Any]:
        """By the names that methods have for them."""
        number = options.activation_number(op, self.activation, release_of(device))
        return {
            **vars(self.parallel), "enable_alltoall": self.enable_alltoall,
            "enable_pdl": self.enable_pdl, "base_activation_type": number,
            "activation_type": number,
        }  # fmt: skip


def release_of(device: Device) -> str | None:
    """The release of the kernels that a device's calls are of; of the default one's the CPU's."""
    if not device.is_cuda:
        return None
    from fi_ffi.loader import search  # as late as can be: most processes have none

    return search.release()


def described(op: str, tensors: Mapping[str, object]) -> dict[str, TensorDesc]:
    """The tensors, without those that are optional and not there."""
    return {
        name: as_desc(value, op, name)
        for name, value in tensors.items()
        if value is not None or name not in _OPTIONAL
    }


def described_scales(op: str, scales: object) -> list[TensorDesc]:
    if scales is None:
        return []
    if not isinstance(scales, (list, tuple)):
        got, expected = type(scales).__name__, "a list or tuple of tensors, or None"
        raise ArgumentTypeError(op, "quant_scales", got=got, expected=expected)
    return [as_desc(scale, op, f"quant_scales[{i}]") for i, scale in enumerate(scales)]


def settle(
    moe: FusedMoe,
    op: str,
    descs: Mapping[str, TensorDesc],
    scales: Sequence[TensorDesc] | None,
    asked: Asked,
) -> Settled:
    """Raise unless the layouts fit; worked out once for each combination of them.

    `scales` None: they are not asked for.
    """
    layouts = tuple((name, desc.layout) for name, desc in descs.items())
    of_scales = None if scales is None else tuple(desc.layout for desc in scales)
    key = (layouts, of_scales, asked)
    found = moe.settled.get(key)
    if found is None:
        activation, _, output = moe.dtypes
        sizes = sizes_of(op, moe.mode, descs, options.is_gated(asked.activation))
        wants = [*tensor_wants(op, moe.mode, sizes, descs, output).values()]
        if scales is not None:
            wants += scale_wants(op, moe.mode, sizes, activation, scales)
        check_device(op, moe.device, wants, [*descs.values(), *(scales or ())])
        check_limits(op, sizes, asked.parallel)
        found = Settled(sizes, wants)
        if len(moe.settled) >= _CACHE_LIMIT:
            moe.settled.clear()
        moe.settled[key] = found
    return found


def call(
    moe: FusedMoe,
    op: str,
    descs: dict[str, TensorDesc],
    scales: list[TensorDesc],
    asked: Asked,
    profile_ids: object,
    stream: object,
) -> None:
    """Check everything, and compute unless there are no tokens."""
    settled = settle(moe, op, descs, scales, asked)
    everything = [*descs.values(), *scales]
    for want, desc in zip(settled.wants, everything, strict=True):
        want.check_address(op, desc)
    check_apart(op, descs["output"], settled.wants, everything)
    tactics = None
    if profile_ids is not None:
        tactics = options.profile_ids(op, profile_ids, moe.tactics)
    if not settled.sizes.tokens:
        return
    if moe.device.is_cuda:
        _launch(moe, op, settled, descs, scales, asked, tactics, stream)
    else:
        _compute(moe, op, settled, descs, scales, asked)


def _launch(
    moe: FusedMoe,
    op: str,
    settled: Settled,
    descs: dict[str, TensorDesc],
    scales: list[TensorDesc],
    asked: Asked,
    tactics: tuple[int, int] | None,
    stream: object,
) -> None:
    on_stream = launching(stream, moe.device, op)  # a missing one is told first
    runner = moe.runner
    given: dict[str, Any] = {name: desc.ptr for name, desc in descs.items()}
    given |= asked.given(op, moe.device)
    told: dict[str, Any] = {**given, **descs}
    layouts: Given = {name: desc.layout for name, desc in descs.items()}
    if scales:
        made = moe.arrays.of(scales)
        layouts["quant_scales"] = True
        given["quant_scales"], told["quant_scales"] = made.address, scales
    if tactics is not None:
        told["profile_ids"] = ids = ids_of(runner, moe.tactics[0], *tactics)
        given["profile_ids"] = pair(*ids)[1]
        layouts["profile_ids"] = True
    frames = settled.frames[tactics is not None]
    try:
        frame = frames.pop()
    except IndexError:
        frame = runner.frame("run_moe", layouts)
    try:
        values = runner.values("run_moe", given, 0)
        launch(frame, runner.entry("run_moe"), values, moe.device, on_stream,
               lambda: told_of(runner.interface.methods["run_moe"], told))  # fmt: skip
    finally:
        frames.append(frame)


def ids_of(runner: Runner, gemm1_count: int, first: int, second: int) -> tuple[int, int]:
    """Tactics as the release numbers them.

    Before 0.6.15 a number of GEMM2's that its own count does not exceed is taken as counted from
    0, even where it was meant to follow GEMM1's; later all follow GEMM1's.
    """
    if second >= 0 and runner.interface.absolute_ids:
        second += gemm1_count
    return first, second


def _compute(
    moe: FusedMoe,
    op: str,
    settled: Settled,
    descs: dict[str, TensorDesc],
    scales: list[TensorDesc],
    asked: Asked,
) -> None:
    # Here, not above: numpy takes longer to import than all of fi_ffi.
    from fi_ffi.reference.arrays import as_array
    from fi_ffi.reference.moe import run

    arrays = {name: as_array(desc) for name, desc in descs.items()}
    first = settled.sizes.experts * asked.parallel.ep_rank
    experts = arrays["token_selected_experts"]
    check_distinct(op, experts, first, settled.sizes.experts)
    run(
        moe.mode.name, arrays, [as_array(scale) for scale in scales], asked.activation, first,
        has_second_bias=asked.parallel.is_first_of_tp,
    )  # fmt: skip


def check_distinct(op: str, experts: Any, first: int, count: int) -> None:
    """Raise where a token has one of this rank's experts twice.

    What the kernels do then depends on the number of tokens; on a GPU nobody can look.
    """
    ordered = experts.copy()
    ordered.sort(axis=1)
    before, after = ordered[:, :-1], ordered[:, 1:]
    twice = (before == after) & (before >= first) & (before < first + count)
    if twice.any():
        row = int(twice.any(axis=1).argmax())
        got, expected = f"an expert twice for token {row}", "distinct experts for each token"
        raise ArgumentError(op, "token_selected_experts", got=got, expected=expected)
