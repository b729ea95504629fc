"""Makes Python functions compile kernels of CuTe DSL; runs in the build environment only.

Like `driver.py`, this is a plain script: `python -I cute_driver.py ANSWER` reads a question as JSON
from standard input and writes the answer as JSON to the file ANSWER.

It calls functions of FlashInfer, or of others, with CPU tensors that claim to be on a GPU. Kernels
that they compile are intercepted, exported as objects, and linked into modules; launches do
nothing. So each kernel is the one that the function would choose and compile for such a call.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import math
import os
import re
import subprocess
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_KERNELS = "nvidia_cutlass_dsl"
_CUDA = 2  # kDLCUDA of dlpack.h
_DEVICE_AT = 8  # offset in a DLTensor, after the address
_ALIGNMENT = 256
# By compute capability: name, multiprocessors, and shared memory of a block, for the GPU that a
# kernel is chosen for.
_GPUS = {
    (8, 0): ("A100", 108, 166912),
    (8, 9): ("L40S", 142, 101376),
    (9, 0): ("H100", 132, 232448),
    (10, 0): ("B200", 148, 232448),
    (12, 0): ("RTX PRO 6000", 188, 101376),
}
_LONGEST = 200  # a name that leaves space for the suffix .so and a cache's additions


def _sibling(name: str) -> Any:
    """Import the plain script `name` beside this one."""
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"fi_ffi_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def module_name(directory: str, kernel: str) -> str:
    """Return FlashInfer's cache directory and file name, joined into one module name."""
    import hashlib

    name = re.sub(r"\W", "_", f"{directory}_{kernel}", flags=re.ASCII)
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 18]}_h{digest}"


class Maker:
    """Compiles intercepted kernels into modules in a folder, and records their names."""

    def __init__(self, question: dict[str, Any]) -> None:
        self.arch, self.folder = question["arch"], Path(question["folder"])
        self.cxx, self.runtime = question["cxx"].split(), Path(question["runtime"])
        self.request: dict[str, Any] = {}
        self.names: list[str] = []
        self._unnamed: list[str] = []  # kernels of the current call that FlashInfer does not name
        # Whether FlashInfer has named the kernel that is being compiled.
        self._is_named = False

    def cached(
        self, module_name: str, kernel_name: str, compile_fn: Any, *_: Any, **__: Any
    ) -> Any:
        """Replace FlashInfer's `build_and_load_cute_dsl_kernel`."""
        self._is_named = True
        try:
            return self._make(module_name, kernel_name, compile_fn)
        finally:
            self._is_named = False

    def compiled(self, compile_fn: Callable[..., Any], function: Any, *args: Any) -> Any:
        """Replace CuTe's own compilation; `compile_fn` is the original."""
        if self._is_named:
            return compile_fn()
        name = getattr(function, "__name__", None) or type(function).__name__
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.strip("_")).lower()
        kernel = "_".join(filter(None, [words, self.request["name"]]))
        again = sum(kernel == before for before in self._unnamed)
        self._unnamed.append(kernel)
        return self._make(
            self.request["module"], f"{kernel}_{again + 1}" if again else kernel, compile_fn
        )

    def begin(self, request: dict[str, Any]) -> None:
        self.request, self.names, self._unnamed = request, [], []

    def _make(self, module: str, kernel: str, compile_fn: Callable[[], Any]) -> Any:
        sanitized = re.sub(r"\W", "_", kernel, flags=re.ASCII)
        name = module_name(f"{module}_{self.arch.replace('_', '')}_cute_dsl", sanitized)
        target = self.folder / name / f"{name}.so"
        if not target.exists():
            print(f"compiling {name}", flush=True)
            compiled = compile_fn()
            target.parent.mkdir(parents=True, exist_ok=True)
            object_file = target.with_suffix(".o")
            compiled.export_to_c(str(object_file), function_name=f"{module}_{sanitized}")
            self._link(object_file, target)
            object_file.unlink()

        def launched(*_: Any, **__: Any) -> None:
            """Record the name again: FlashInfer keeps the kernel for requests to come."""
            if name not in self.names:
                self.names.append(name)

        launched()
        return launched

    def _link(self, object_file: Path, target: Path) -> None:
        part = target.with_suffix(".part")
        command = [*self.cxx, "-shared", "-o", str(part), str(object_file), f"-L{self.runtime}"]
        command += ["-lcute_dsl_runtime", "-Wl,-z,now"]
        subprocess.run(command, check=True)
        os.replace(part, target)


# CPU tensors that claim to be on a GPU


class _AsCuda:
    """A tensor for CuTe to read through DLPack, with a GPU as its device."""

    def __init__(self, tensor: Any) -> None:
        self._tensor = tensor

    def __dlpack_device__(self) -> tuple[int, int]:
        return _CUDA, 0

    def __dlpack__(self, **_: object) -> Any:
        torch, ctypes = importlib.import_module("torch"), importlib.import_module("ctypes")
        with torch._C.DisableTorchFunction():
            capsule = torch.Tensor.__dlpack__(self._tensor.detach())
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        made = pointer(capsule, b"dltensor")
        ctypes.cast(made + _DEVICE_AT, ctypes.POINTER(ctypes.c_int32))[0] = _CUDA
        if not self._tensor.storage_offset():
            # Aligned as CUDA's allocations are; the memory is never read.
            ctypes.cast(made, ctypes.POINTER(ctypes.c_int64))[0] &= -_ALIGNMENT
        return capsule


def _pretend(capability: tuple[int, int]) -> Any:
    """Return the torch mode in which torch has a GPU of this capability and tensors are on it."""
    torch = importlib.import_module("torch")
    overrides = importlib.import_module("torch.overrides")
    near = min(_GPUS, key=lambda known: (known[0] != capability[0], abs(known[1] - capability[1])))
    name, multiprocessors, shared_memory = _GPUS[near]
    properties = types.SimpleNamespace(
        name=f"NVIDIA {name}",
        major=capability[0],
        minor=capability[1],
        multi_processor_count=multiprocessors,
        shared_memory_per_block_optin=shared_memory,
    )
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.current_device = lambda: 0
    torch.cuda.current_stream = lambda *_, **__: types.SimpleNamespace(cuda_stream=0)
    torch.cuda.get_device_capability = lambda *_, **__: capability
    torch.cuda.get_device_properties = lambda *_, **__: properties
    torch.cuda.get_device_name = lambda *_, **__: properties.name
    torch.version.cuda = torch.version.cuda or "13.0"
    device = torch.device("cuda:0")

    def placed(value: Any) -> Any:
        is_device = isinstance(value, torch.device) or (
            isinstance(value, str) and value.startswith("cuda")
        )
        return "cpu" if is_device else value

    class OnCuda(overrides.TorchFunctionMode):  # type: ignore[name-defined,misc]
        def __torch_function__(
            self, function: Any, _: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if function == torch.Tensor.device.__get__:
                return device
            if function == torch.Tensor.is_cuda.__get__:
                return True
            if function == torch.Tensor.cuda:
                return args[0]
            if function is torch.device:
                return function(*args, **(kwargs or {}))
            kwargs = {key: placed(value) for key, value in (kwargs or {}).items()}
            return function(*map(placed, args), **kwargs)

    return OnCuda()


@contextmanager
def _caught(maker: Maker) -> Iterator[None]:
    """Redirect CuTe's compilation to `maker`."""
    torch = importlib.import_module("torch")
    runtime = importlib.import_module("cutlass.cute.runtime")
    compiler = importlib.import_module("cutlass.base_dsl.compiler")
    driver = importlib.import_module("cuda.bindings.driver")
    cache: Any = types.SimpleNamespace()  # for releases that do not cache kernels
    if "flashinfer" in sys.modules:
        with suppress(ModuleNotFoundError):
            cache = importlib.import_module("flashinfer.jit.cute_dsl_core")
    begin, compile_fn = runtime._Tensor.__init__, compiler.CompileCallable._compile

    def from_tensor(self: Any, tensor: Any, *args: Any, **kwargs: Any) -> None:
        begin(
            self, _AsCuda(tensor) if isinstance(tensor, torch.Tensor) else tensor, *args, **kwargs
        )

    def streamed(value: Any) -> Any:
        """Replace a stream argument by TVM-FFI's current stream, which all other modules use."""
        if isinstance(value, (driver.CUstream, type(runtime.make_fake_stream()))):
            return runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
        return value

    def compiled(self: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        args = tuple(map(streamed, args))
        kwargs = {key: streamed(value) for key, value in kwargs.items()}
        return maker.compiled(lambda: compile_fn(self, function, *args, **kwargs), function)

    runtime._Tensor.__init__ = from_tensor
    compiler.CompileCallable._compile = compiled
    cache.build_and_load_cute_dsl_kernel = maker.cached
    yield


def _value(value: Any, capability: tuple[int, int]) -> Any:
    """Return an argument of the call.

    A dictionary stands for a tensor (dtype, shape, and the stride of the first axis unless it is
    the usual one), "torch.bfloat16" for a dtype, and "sm" for the GPU's number.
    """
    torch = importlib.import_module("torch")
    if isinstance(value, str) and value.startswith("torch."):
        return getattr(torch, value.removeprefix("torch."))
    if isinstance(value, dict):
        shape, dtype = value["shape"], getattr(torch, value["tensor"])
        if "stride" not in value:
            return torch.zeros(shape, dtype=dtype)
        inner = [math.prod(shape[i + 1 :]) for i in range(1, len(shape))]
        return torch.empty_strided(shape, (value["stride"], *inner), dtype=dtype)
    return 10 * capability[0] + capability[1] if value == "sm" else value


def _taken(called: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments without those that the release lacks and that have no effect."""
    known = inspect.signature(inspect.unwrap(called)).parameters
    return {
        name: value
        for name, value in arguments.items()
        if name in known or not (value in (None, False) or name == "backend")
    }


def _plain(text: str) -> str:
    """Return text without terminal colours."""
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def _function(text: str, bare: list[str], plain: Any) -> Any:
    """Import the function of `package.module:name` or `file.py:name`, without running the
    `__init__` of packages of `bare`."""
    home, _, name = text.rpartition(":")
    if home.endswith(".py"):
        sys.path.insert(0, str(Path(home).parent))
        spec = importlib.util.spec_from_file_location(Path(home).stem, home)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module.__name__] = module
        spec.loader.exec_module(module)
        return getattr(module, name)
    parents = home.split(".")
    for end in range(2, len(parents)) if parents[0] in bare else ():
        if ".".join(parents[:end]) not in sys.modules:
            plain._load_bare_package(".".join(parents[:end]))
    return getattr(importlib.import_module(home), name)


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """Make the modules of every request; failed requests get a reason."""
    packages, whose = Path(question["packages"]), question["whose"]
    sys.path[:0] = [str(packages / _KERNELS / "dsl_packages"), str(packages)]
    sys.path += filter(None, [question["torch"], question["others"]])
    os.environ["CUTE_DSL_ARCH"] = question["arch"]
    plain, capability = _sibling("driver"), tuple(question["capability"])
    for name in question["bare"]:
        plain._load_bare_package(name)
    maker = Maker(question)
    failed: dict[str, str] = {}
    result: dict[str, Any] = {"modules": [], "failed": failed}
    with _caught(maker), _pretend(capability):
        for request in question["requests"]:
            maker.begin(request)
            try:
                called = _function(request["function"], question["bare"], plain)
                arguments = _taken(called, request["arguments"])
                called(**{key: _value(value, capability) for key, value in arguments.items()})
            except Exception as error:
                traceback.print_exc(file=sys.stdout)
                failed[request["text"]] = (
                    f"{whose} or CuTe DSL refused it: {_plain(plain.reason(error))}"
                )
                continue
            if not maker.names:
                failed[request["text"]] = f"{whose} compiled nothing for it with CuTe DSL"
            result["modules"] += [
                {
                    "request": request["text"],
                    "name": name,
                    "library": str(maker.folder / name / f"{name}.so"),
                }
                for name in maker.names
            ]
    return result


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(answer(json.load(sys.stdin))))
