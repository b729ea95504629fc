"""The kernels of one mode on one device: the object that `init` makes, found on first use."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

from fi_ffi.abi.function import Entry, array_values
from fi_ffi.abi.tensor import DTYPES, Device
from fi_ffi.errors import ArchitectureError, KernelNotFoundError
from fi_ffi.loader import machine
from fi_ffi.loader.distributions import is_in
from fi_ffi.loader.methods import AttestedObject
from fi_ffi.ops.call import cuda
from fi_ffi.ops.call.arguments import Refusal
from fi_ffi.ops.call.releases import entry_for
from fi_ffi.ops.call.row import Row
from fi_ffi.ops.moe.activations import GATED, activation_numbers
from fi_ffi.ops.moe.interface import FLAGS, MODULE, MODULES, Interface, of_release
from fi_ffi.ops.moe.modes import Mode
from fi_ffi.ops.moe.rows import row_of

_CAPABILITIES = ((9, 0), *MODULES)
_FOR_SHAPE = "get_valid_tactics_for_shape"
# Of activations, weights and results.
Dtypes = tuple[str, str, str]


class Tactics(NamedTuple):
    """The number of tactics for each of the two multiplications."""

    gemm1: int
    gemm2: int


class Runner(AttestedObject):
    """A `FusedMoeRunner` of C++, whose methods must be those of its interface.

    Raises `AbiError` if they are not, before it calls any.
    """

    def __init__(
        self,
        made: object,
        interface: Interface,
        where: str,
        release: str | None = None,
        module: str = MODULE,
    ) -> None:
        super().__init__(made, module, interface.releases, where)
        self.interface, self.release_in_use = interface, release
        self._serving: dict[tuple[int, int, int], frozenset[int]] = {}
        for function in interface.methods.values():
            self.entry(function.signature)

    def has(self, method: str) -> bool:
        return method in self.interface.methods

    def ask(self, method: str, **values: int) -> int:
        """Call a method that takes numbers; return its int."""
        function = self.interface.methods[method]
        return int(self.entry(function.signature)(*function.values(values)))

    def counts(self) -> Tactics:
        """Return the numbers of tactics of GEMM1 and of GEMM2."""
        return Tactics(self.ask("get_gemm1_tactic_count"), self.ask("get_gemm2_tactic_count"))

    def serves(self, gemm: int, tactic: int, rows: int, columns: int) -> bool:
        """Whether the tiles of a tactic, numbered as in the profiler, divide a weight's rows and
        columns; true if the release does not report tiles, where any tactic works."""
        if not self.has(_FOR_SHAPE):
            return True
        key = (gemm, rows, columns)
        if key not in self._serving:
            entry = self.entry(self.interface.methods[_FOR_SHAPE].signature)
            self._serving[key] = frozenset(array_values(entry(*key)))
        return tactic in self._serving[key]


class Kernels:
    """The kernels of one mode on one device, looked for on first use.

    On the CPU the reference takes their place, with the interface of the default release. Errors
    name `op`.
    """

    def __init__(self, op: str, mode: Mode, dtypes: Dtypes, device: Device) -> None:
        if device.type not in ("cpu", "cuda"):
            raise Refusal(op)("device", device, "cpu or a CUDA device")
        self.op, self.mode, self.dtypes, self.device = op, mode, dtypes, device
        # The numbers of activations, once one was asked for.
        self.numbers: dict[str, int] = {}
        self._lock = threading.Lock()
        self._runner: Runner | None = None
        self._tactics: Tactics | None = None

    def make_runner(self) -> Runner:
        """Make a new kernel object, with allocations of its own: see `_make_runner`."""
        return _make_runner(self.op, self.mode, self.dtypes, self.device)

    @property
    def runner(self) -> Runner:
        """The kernel object, made on first use."""
        if self._runner is None:
            with self._lock:
                if self._runner is None:
                    self._runner = self.make_runner()
        return self._runner

    @property
    def are_used(self) -> bool:
        """Whether calls run kernels rather than the CPU's reference."""
        return self.device.is_cuda or self._runner is not None

    @property
    def interface(self) -> Interface:
        """The interface of the kernels in use; on the CPU, that of the default release."""
        return self.runner.interface if self.are_used else of_release(None)

    @property
    def tactics(self) -> Tactics:
        """The numbers of tactics; (1, 1) on the CPU."""
        if self._tactics is None:
            self._tactics = self.runner.counts() if self.are_used else Tactics(1, 1)
        return self._tactics

    def number_of(self, op: str, activation: str) -> int:
        """Return the number of an activation in the release of the kernels."""
        if not self.numbers:
            release = self.runner.release_in_use if self.are_used else None
            has_gateless = release is None or is_in(release, self.mode.gateless)
            self.numbers = {
                name: number
                for name, number in activation_numbers(release).items()
                if has_gateless or name in GATED
            }
        if activation not in self.numbers:
            release = self.runner.release_in_use
            with_ = f" with {self.mode.about}" if self.mode.gateless else ""
            raise KernelNotFoundError(
                f"{op}: {MODULE} of FlashInfer {release} has no {activation}{with_}"
            )
        return self.numbers[activation]

    def row(self, method: str, is_gated: bool, shapes: tuple[int, ...] = ()) -> Row:
        """Return the row of a method, with scales of these shapes."""
        return row_of(self.interface, method, self.mode, self.dtypes, is_gated, shapes)

    def find_entry(self, row: Row, device: Device) -> Entry:
        """Return the entry of a row: a method of the kernel object, or the reference."""
        return self.runner.entry(row.signature) if self.are_used else entry_for(row, device)


def _make_runner(op: str, mode: Mode, dtypes: Dtypes, device: Device) -> Runner:
    """Make a runner on a GPU.

    Raises `ArchitectureError` for a GPU without kernels for the mode, `KernelNotFoundError` if
    there are no kernels or the release lacks the mode, and `AbiError` if the kernels have another
    interface.
    """
    from fi_ffi.loader import runtime, search  # imported late: most processes have no experts

    module = _module_on(op, mode, device)
    release = search.release()
    interface = of_release(release)
    if release is not None and not is_in(release, mode.releases):
        raise KernelNotFoundError(
            f"{op}: {mode.name} ({mode.about}) is laid out here as FlashInfer {mode.releases} has "
            f"it; the kernels in use are of {release}"
        )
    entry = runtime.kernel_entry(module, interface.init.signature, interface.releases, device.index)
    words = ("activation_dtype", "weight_dtype", "output_dtype")
    values: dict[str, Any] = {word: DTYPES[name] for word, name in zip(words, dtypes, strict=True)}
    values |= {flag: flag in mode.flags for flag in FLAGS}
    with cuda.current(device):  # `init` queries the current device's architecture
        runner = entry(*interface.init.values(values))
    where = str(runtime.load(module, device.index).file.path)
    return Runner(runner, interface, where, release, module)


def _module_on(op: str, mode: Mode, device: Device) -> str:
    """Return the module for a GPU; raise `ArchitectureError` if none has the mode for it."""
    capability = machine.capability(device.index)
    if capability in _CAPABILITIES and capability[0] in mode.capabilities:
        return MODULES.get(capability, MODULE)
    able = (one for one in _CAPABILITIES if one[0] in mode.capabilities)
    raise ArchitectureError(
        f"{op}: {device} has compute capability {_dotted(capability)}; {mode.name} ({mode.about}) "
        f"is for {', '.join(map(_dotted, able))} (docs/moe.md)"
    )


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
