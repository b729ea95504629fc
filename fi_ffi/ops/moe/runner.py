"""The object that `fused_moe_90`'s `init` makes, attested, and calls of its methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fi_ffi.abi.device import Device
from fi_ffi.abi.dtypes import DTYPES
from fi_ffi.abi.frame import ArraySlot, Frame, Slot, TensorSlot
from fi_ffi.abi.function import Entry, module_function, probe
from fi_ffi.abi.objects import Module
from fi_ffi.abi.streams import launching
from fi_ffi.abi.tensor import Layout, TensorDesc
from fi_ffi.errors import AbiError, ArchitectureError, KernelNotFoundError
from fi_ffi.loader import machine
from fi_ffi.ops import cuda, watching
from fi_ffi.ops.moe.interface import MODULE, W4_RELEASES, Function, Interface, is_in, of_release
from fi_ffi.ops.moe.modes import FLAGS, Mode

_CAPABILITY = (9, 0)

# What a method or `init` takes and no caller of these kernels chooses.
_DEFAULTS: dict[str, Any] = {
    "use_fused_finalize": True, "use_wfp4afp8_humming": False, "swizzled_input_sf": True,
    "cluster_size": 1, "cluster_rank": 0, "min_latency_mode": False,
}  # fmt: skip

# Of a tensor its layout; of an array whether there is one.
Given = dict[str, "Layout | bool | None"]
# Arguments, and the tensors among them by the numbers of these.
Told = tuple[list[Any], list[tuple[str, TensorDesc]]]


class Runner:
    """A `FusedMoeRunner` of C++, whose methods are what its interface declares.

    Raises `AbiError` where they are not, and calls none of them.
    """

    def __init__(self, made: Any, interface: Interface, where: str) -> None:
        self.interface = interface
        if not isinstance(made, Module):
            raise AbiError(f"{where}: `init` made {type(made).__name__}, not a module object")
        self._made = made
        self._entries = {
            name: _attested(made, name, function, where, interface.releases)
            for name, function in interface.methods.items()
        }

    def has(self, method: str) -> bool:
        return method in self._entries

    def entry(self, method: str) -> Entry:
        return self._entries[method]

    def ask(self, method: str, **values: object) -> int:
        """What a method that takes numbers only says."""
        return int(self._entries[method](*self.values(method, values, None)))

    def counts(self) -> tuple[int, int]:
        """The tactics of GEMM1 and of GEMM2."""
        return self.ask("get_gemm1_tactic_count"), self.ask("get_gemm2_tactic_count")

    def frame(self, method: str, given: Given) -> Frame:
        """A frame for a method's arguments with these tensors."""
        return Frame(slots(self.interface.methods[method], given)).bind(self._entries[method])

    def values(self, method: str, given: dict[str, Any], missing: Any) -> list[Any]:
        """A method's arguments in its order, of values by name."""
        return [_of(name, given, missing) for name in self.interface.methods[method].names]

    def release(self) -> None:
        """Give the object back, and what memory it holds."""
        self._made.release()


def _of(name: str, given: dict[str, Any], missing: Any) -> Any:
    """A value by its name, or what stands for one that is not there."""
    return given[name] if name in given else _DEFAULTS.get(name, missing)


def slots(function: Function, given: Given) -> list[Slot]:
    """How a frame packs a function's arguments."""
    return [
        _slot(kind, given.get(name))
        for name, kind in zip(function.names, function.signature.params, strict=True)
    ]


def _slot(kind: str, value: Layout | bool | None) -> Slot:
    if kind in ("int", "bool"):
        return int if kind == "int" else bool
    if isinstance(value, Layout):
        return TensorSlot(value, False)
    return ArraySlot() if value else None


def _attested(made: Module, name: str, function: Function, where: str, releases: str) -> Entry:
    method = module_function(made, name)
    method.name = f"{MODULE}.{name}"
    found = probe(method)
    if not found.same_types(function.signature):
        raise AbiError(
            f"{method.name}: the binary's method does not have the declared interface\n"
            f"  declared (FlashInfer {releases}): {function.signature}\n"
            f"  binary: {found}\n"
            f"  file: {where}"
        )
    return method


def make_runner(op: str, mode: Mode, dtypes: Sequence[str], device: Device) -> Runner:
    """A runner for the dtypes of activations, weights and results, on a GPU.

    Raises `ArchitectureError` for other GPUs than Hopper, `KernelNotFoundError` where there are
    no kernels, `AbiError` where they have another interface.
    """
    from fi_ffi.loader import runtime, search  # as late as can be: most processes have none

    capability = machine.capability(device.index)
    if capability != _CAPABILITY:
        got = ".".join(map(str, capability))
        raise ArchitectureError(
            f"{op}: {MODULE} is for GPUs of compute capability 9.0; {device} has {got}"
        )
    release = search.release()
    interface = of_release(release)
    if mode.is_w4:
        check_w4_release(op, release)
    entry = runtime.kernel_entry(MODULE, interface.init.signature, interface.releases, device.index)
    given: dict[str, Any] = {flag: flag in mode.flags for flag in FLAGS}
    words = ("activation_dtype", "weight_dtype", "output_dtype")
    given |= {word: DTYPES[name] for word, name in zip(words, dtypes, strict=True)}
    with cuda.current(device):  # the object asks for the device's architecture
        made = entry(*(_of(name, given, None) for name in interface.init.names))
    return Runner(made, interface, str(runtime.load(MODULE, device.index).file.path))


def check_w4_release(op: str, release: str | None) -> None:
    """Raise where a release lays 4-bit weights out in another way."""
    if release is not None and not is_in(release, W4_RELEASES):
        raise KernelNotFoundError(
            f"{op}: 4-bit weights are laid out here as FlashInfer {W4_RELEASES} has them; the "
            f"kernels in use are of {release}"
        )


def launch(
    frame: Frame,
    entry: Entry,
    values: list[Any],
    device: Device,
    on_stream: launching,
    told: Callable[[], Told],
) -> None:
    """Call on a stream, with memory for the kernel's own workspace.

    `told` says what open watchdogs and call logs are told of the arguments.
    """
    with cuda.current(device), on_stream, cuda.kernel_memory().installed():
        if watching.inboxes:
            watching.called(entry.name, lambda: frame.call(entry, values), *told(), device)
        else:
            frame.call(entry, values)


def told_of(function: Function, given: dict[str, Any]) -> Told:
    """Arguments by name as call logs are told them; a list is an array of tensors."""
    values = [_of(name, given, None) for name in function.names]
    tensors: list[tuple[str, TensorDesc]] = []
    for i, value in enumerate(values):
        if isinstance(value, TensorDesc):
            tensors.append((str(i), value))
        elif isinstance(value, list):
            tensors += [(f"{i}:{n}", desc) for n, desc in enumerate(value)]
    return values, tensors
