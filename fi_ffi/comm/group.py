"""Groups of ranks; each rank has its own GPU or, on the CPU, uses the reference kernels."""

from __future__ import annotations

import math
import pickle
import time
import weakref
from collections.abc import Iterable
from types import TracebackType
from typing import NoReturn

from fi_ffi.abi.interop import as_desc
from fi_ffi.abi.streams import handle_for
from fi_ffi.abi.tensor import Device, TensorDesc, parse_device, parse_dtype
from fi_ffi.comm import nccl as nccl_module
from fi_ffi.comm.algorithms import ALGORITHMS, Algorithms, Call, Settings
from fi_ffi.comm.attendance import Attendance
from fi_ffi.comm.entries import missing_kernels
from fi_ffi.comm.fusion import RANKS, FusionSize, pattern_of
from fi_ffi.comm.hang import ENDED_S, ENDING_S, Monitor, run_with_deadline
from fi_ffi.comm.memory import copy, place_of
from fi_ffi.comm.presence import Place, check_process, this_process
from fi_ffi.comm.ranks import (
    PATIENCE_S,
    Ranks,
    check_ranks,
    format_ranks,
    hurried,
    patience,
)
from fi_ffi.errors import ArgumentError, ArgumentTypeError, HangError, KernelError, LoaderError
from fi_ffi.loader import machine
from fi_ffi.ops.call import cuda
from fi_ffi.ops.call.arguments import check_choice, check_flag, check_int, check_number

MAX_BYTES = 8 << 20
_DTYPES = ("float32", "float16", "bfloat16")
_VECTOR = 16
# The arguments of fused calls that their entry takes as they are; those that are None stay out.
_PASSED_ON = (
    *("allreduce_out", "residual_in", "residual_out", "norm_out", "quant_out", "scale_out"),
    *("rms_gamma", "scale_factor", "layout_code", "block_quant_group_size"),
    *("fp32_acc", "launch_with_pdl", "trigger_completion_at_end"),
)
_FIRST_PAUSE, _LAST_PAUSE = 2e-5, 2e-3  # polling intervals of a stream that is waited for
_LETTING_GO_S = 30.0  # how much longer than a rank to wait for a stream that shows no progress
_in_use: list[Algorithms] = []  # memory of kernels that have not ended


class Group:
    """One rank of a group.  Every rank makes one with the same arguments and makes the same calls.

    Ranks of one machine reach each other's memory: threads in pools that their GPUs share,
    processes by CUDA IPC, for which every process must see all GPUs.  NCCL
    (`pip install 'fi-ffi[nccl]'`) connects several machines and carries large messages.  On
    `device="cpu"` the same calls run reference kernels over shared memory.

    All ranks make a group's calls in the same order, on one stream at a time.

    Args:
        ranks: this rank, from `threads`, `processes`, `mpi` or `ray`, or your own (`Ranks`).
        device: this rank's GPU, or "cpu".
        max_bytes: the largest message for the algorithm "vllm"; each rank allocates four times as
            much memory for it, without NCCL five times.
        fusion: the largest message of `allreduce_fusion`, "oneshot" and "twoshot". By default it is
            the largest for which "oneshot" is the fastest, in 2 bytes an element, or `max_bytes` if
            that is less; there are none of the three if the ranks' kernels or GPUs lack them.
        nccl: whether to use NCCL on GPUs; None: if every rank has it installed.
        timeout_s: how long to wait for a rank that does not arrive, in a call or while the group
            is made or closed; for one on this machine that has given up, or whose process has
            ended, a second in calls.
            By default 60, and what the ranks were made with while the group is made or closed.
            MPI's ranks and your own (`Ranks`) keep their own time there.
        check: compare the arguments of every call with those of the other ranks first.

    A group belongs to the process that makes it: in a forked child its calls raise
    `ArgumentError`, and `close` does nothing.

    Raises `ArgumentError` and `ArgumentTypeError`, `HangError` if a rank does not arrive or this
    one comes too late, `LoaderError` if NCCL is needed and not installed, or if a rank cannot open
    the others' memory, and `KernelNotFoundError` if a rank lacks all kernels.
    """

    def __init__(
        self,
        ranks: Ranks,
        *,
        device: object = "cuda:0",
        max_bytes: int = MAX_BYTES,
        fusion: FusionSize | None = None,
        nccl: bool | None = None,
        timeout_s: float | None = None,
        check: bool = False,
    ) -> None:
        self._process = this_process()
        self._ranks = ranks = check_ranks("Group", ranks)
        self.rank, self.size = ranks.rank, ranks.size
        self.timeout_s = PATIENCE_S
        if timeout_s is not None:
            self.timeout_s = check_number("Group", "timeout_s", timeout_s, above=0)
            self._ranks = ranks = hurried(ranks, self.timeout_s)
        self.device = _device(device)
        most = check_int("Group", "max_bytes", max_bytes, _VECTOR)
        self.max_bytes = most // _VECTOR * _VECTOR
        self.fusion = _fusion_size(fusion)
        self._checks = check_flag("Group", "check", check)
        wants_nccl = None if nccl is None else check_flag("Group", "nccl", nccl)
        self._hang, self._hung_at, self._calls = "", math.inf, 0
        self._algorithms: Algorithms | None = None
        self._monitor: Monitor | None = None
        # The monitor's thread refers to it, and does not keep the group alive.
        self._attendance = Attendance(self.rank, self.size)
        try:
            places, lacking, has_nccl = self._exchange_settings(wants_nccl)
            if self.size > 1:
                seconds = patience(ranks, self.timeout_s)
                settings = Settings(self.max_bytes, self.fusion, lacking, has_nccl, seconds)
                self._algorithms = Algorithms(ranks, places, self.device, settings)
        except BaseException:
            self._attendance.leave(1)
            raise
        finally:
            self._attendance.close_file()
        if self._algorithms is not None and self.device.is_cuda:
            waiting, on_hang = self._algorithms.waiting(), weakref.WeakMethod(self._tell_hang)
            missing = self._attendance.missing
            self._monitor = Monitor(waiting, self.device, self.timeout_s, on_hang, missing)
        self._is_open = True

    def _exchange_settings(
        self, wants_nccl: bool | None
    ) -> tuple[list[Place], dict[str, str], bool]:
        """Exchange places and settings; return all places, the modules whose kernels some rank
        lacks, with the reason, and whether all ranks have NCCL.

        Raises if the ranks' arguments differ.
        """
        settings = {
            "size": self.size,
            "device": self.device.type,
            "max_bytes": self.max_bytes,
            "fusion": self.fusion,
            "nccl": wants_nccl,
            "check": self._checks,
        }
        has_nccl = self.device.is_cuda and self.size > 1 and wants_nccl is not False
        if has_nccl:
            try:
                nccl_module.imported()
            except LoaderError:
                has_nccl = False
                if wants_nccl:
                    raise
        lacks = missing_kernels(self.device) if self.size > 1 else {}
        here = place_of(self.device), self._attendance.file
        mine = pickle.dumps((*here, lacks, has_nccl, settings))
        of_ranks = [pickle.loads(data) for data in self._ranks.all_gather(mine)]
        for name, expected in of_ranks[0][-1].items():
            for rank, (*_, theirs) in enumerate(of_ranks):
                if theirs[name] != expected:
                    got, words = f"{theirs[name]} on rank {rank}", f"{expected}, as on rank 0"
                    raise ArgumentError("Group", name, got=got, expected=words)
        places, files, lacks_of, collect, _ = zip(*of_ranks, strict=True)
        self._attendance.share(places, files)
        lacking: dict[str, str] = {}
        for rank, each in enumerate(lacks_of):
            for module, why in each.items():
                lacking.setdefault(module, f"rank {rank} without {module}: {why}")
        # NCCL refuses two ranks on one GPU, which tests use.
        is_apart = len({(place.machine, place.bus_id) for place in places}) == self.size
        return [*places], lacking, is_apart and all(collect)

    # ------------------------------------------------------------------------------- calls

    def all_reduce(
        self, x: object, out: object = None, *, algorithm: str = "auto", stream: object = None
    ) -> None:
        """Add up the tensors of all ranks.  Every rank gets the sum.

        Args:
            x: this rank's tensor: float32, float16 or bfloat16, contiguous, with the same dtype and
                number of elements on all ranks.
            out: receives the sum; by default `x` does.
            algorithm: "oneshot" or "twoshot" (FlashInfer's `trtllm_comm`), "vllm" (its
                `vllm_comm`), "nccl", or "auto": what `algorithm_for` returns.
            stream: as for `fi_ffi.stream`; needed on a GPU without an open scope.

        Sums are made in float32, rounded once, and equal in all bits on every rank, except by NCCL.

        Raises `ArgumentError` and `ArgumentTypeError` before anything is written, and `HangError`
        if a rank does not arrive.  On the CPU this call raises it.  On a GPU, waiting kernels end
        after `timeout_s`; then `synchronize` and every later call raise it.
        """
        op = "all_reduce"
        addend, total, handle = self._vectors(op, x, x if out is None else out, stream)
        if (addend.numel, addend.dtype) != (total.numel, total.dtype):
            expected = f"{addend.dtype}, {addend.numel} elements"
            raise ArgumentError(op, "out", got=total.layout, expected=expected)
        _check_apart(op, addend, total, 0)
        check_choice(op, "algorithm", algorithm, ("auto", *ALGORITHMS))
        if self._algorithms is not None:
            if algorithm == "auto":
                algorithm = self._algorithms.choose(addend.span_bytes, addend.dtype.itemsize)
            else:
                self._algorithms.check(algorithm, addend)
        self._agree(op, f"{addend.dtype}[{addend.numel}] by {algorithm!r}")
        call = self._copy if self._algorithms is None else self._algorithms.all_reduce(algorithm)
        self._run(op, call, addend, total, handle)

    def algorithm_for(self, nbytes: int, dtype: object = "bfloat16") -> str:
        """Return the algorithm that "auto" uses for so many bytes; "" for a single rank.

        Raises `ArgumentError` if this group has no algorithm for them.
        """
        if self._algorithms is None:
            return ""
        count = check_int("algorithm_for", "nbytes", nbytes, 0, 1 << 62)
        return self._algorithms.choose(count, parse_dtype(dtype, op="algorithm_for").itemsize)

    def allreduce_fusion(
        self,
        x: object,
        *,
        pattern: object,
        allreduce_out: object = None,
        residual_in: object = None,
        residual_out: object = None,
        norm_out: object = None,
        quant_out: object = None,
        scale_out: object = None,
        rms_gamma: object = None,
        rms_eps: float = 1e-6,
        scale_factor: object = None,
        layout_code: int | None = None,
        block_quant_group_size: int | None = None,
        weight_bias: float = 0.0,
        fp32_acc: bool = True,
        launch_with_pdl: bool = False,
        trigger_completion_at_end: bool = True,
        use_oneshot: bool | None = None,
        stream: object = None,
    ) -> None:
        """Add up the tensors of all ranks, and apply the rest of the pattern in the same kernel.

        The other tensors are those of `trtllm_allreduce_fusion` (and `_fp4`, `_block_fp8`,
        `_dynamic_fp8`); their docstrings say which ones a pattern takes.

        Args:
            x: this rank's tensor, [tokens, hidden_size], within the size that `fusion` gave.
            pattern: an `AllReduceFusionPattern`, or its number or name.
            use_oneshot: True: every rank adds up everything.  False: each rank adds up its own
                tokens; there must be more tokens than ranks.  None: chosen by size and number of
                ranks.
            launch_with_pdl: programmatic dependent launch.  Up to FlashInfer 0.7.0 the kernel reads
                `residual_in` without waiting for the kernel before it.
            trigger_completion_at_end: False lets the next kernel start before this one ends, if it
                is launched programmatically and waits for what it reads.
            stream: as for `all_reduce`.

        Raises the errors of `all_reduce`.
        """
        op, arguments = "allreduce_fusion", locals()
        self._check_open(op)
        fusion = None if self._algorithms is None else self._algorithms.fusion
        if fusion is None:
            got = "a group without trtllm_comm"
            expected = f"its kernels for every rank's GPU, and {RANKS}"
            raise ArgumentError(op, "self", got=got, expected=expected)
        code, desc = pattern_of(op, pattern), self._tensor(op, "x", x)
        if len(desc.shape) != 2:
            raise ArgumentError(op, "x", got=desc.layout, expected="[tokens, hidden_size]")
        fusion.check(op, desc)
        if use_oneshot is not None:
            check_flag(op, "use_oneshot", use_oneshot)
        is_oneshot = fusion.use_oneshot(desc.span_bytes, desc.shape[0], use_oneshot)
        more = {name: arguments[name] for name in _PASSED_ON if arguments[name] is not None}
        if weight_bias:
            more["weight_bias"] = weight_bias
        if code:
            more["rms_eps"] = rms_eps
        handle = handle_for(stream, self.device, op)
        how = "oneshot" if is_oneshot else "twoshot"
        self._agree(op, f"{desc.dtype}{list(desc.shape)}, {code.name} by {how!r}")

        def call(x: TensorDesc, _: TensorDesc, stream: int) -> None:
            fusion.call(x, code, is_oneshot, stream, more)

        self._run(op, call, desc, desc, handle)

    def all_gather(self, x: object, out: object, *, stream: object = None) -> None:
        """Gather the tensors of all ranks on every rank, in rank order.

        Args:
            x: this rank's tensor, contiguous.
            out: `size` times as many elements of the same dtype; `x` may be this rank's part of it.
            stream: as for `all_reduce`.

        On GPUs NCCL does it, or without NCCL copies from the ranks' memory: `LoaderError` on
        several machines.  Every bit arrives as it is.  Raises as `all_reduce` does.
        """
        op = "all_gather"
        source, target, handle = self._vectors(op, x, out, stream)
        if (source.numel * self.size, source.dtype) != (target.numel, target.dtype):
            expected = f"{source.dtype}, {source.numel * self.size} elements"
            raise ArgumentError(op, "out", got=target.layout, expected=expected)
        _check_apart(op, source, target, -self.rank * source.span_bytes)
        self._collect(op, source, target, handle)

    def reduce_scatter(self, x: object, out: object, *, stream: object = None) -> None:
        """Add up the tensors of all ranks, and give each rank its part of the sum.

        Args:
            x: this rank's tensor, contiguous.
            out: part number `rank` of the sum, which has `size` equal parts of the same dtype; it
                may be that part of `x`.
            stream: as for `all_reduce`.

        On GPUs NCCL does it.  Without NCCL, an all-reduce of the whole does: `ArgumentError` above
        its largest message, `LoaderError` on several machines.  Raises as `all_reduce` does.
        """
        op = "reduce_scatter"
        source, target, handle = self._vectors(op, x, out, stream)
        if (source.numel, source.dtype) != (target.numel * self.size, target.dtype):
            expected = f"{source.dtype}, one of {self.size} equal parts of {source.numel} elements"
            raise ArgumentError(op, "out", got=target.layout, expected=expected)
        _check_apart(op, source, target, self.rank * target.span_bytes)
        self._collect(op, source, target, handle)

    def _collect(self, op: str, x: TensorDesc, out: TensorDesc, stream: int) -> None:
        call = self._copy if self._algorithms is None else self._algorithms.collective(op)
        self._agree(op, f"{x.dtype}[{x.numel}]")
        self._run(op, call, x, out, stream)

    def buffer(self, shape: tuple[int, ...], dtype: str) -> TensorDesc:
        """Return a tensor in the memory that peers read, which "vllm" adds up without a copy.

        All these tensors start at the same address.  Calls of "vllm" on other tensors overwrite
        them, graphs that are replayed included.  The sum must go elsewhere.  Raises `ArgumentError`
        above `max_bytes`, and if the ranks have no such memory.
        """
        self._check_open("buffer")
        if self._algorithms is None or self._algorithms.vllm is None:
            got, expected = 'a group without "vllm"', "ranks that reach each other's memory"
            raise ArgumentError("buffer", "self", got=got, expected=expected)
        tensor = self._algorithms.vllm.buffer(shape, dtype)
        if tensor.span_bytes > self.max_bytes:
            got, expected = f"{tensor.span_bytes} bytes", f"at most max_bytes={self.max_bytes}"
            raise ArgumentError("buffer", "shape", got=got, expected=expected)
        return tensor

    def synchronize(self, stream: object = None) -> None:
        """Wait for a stream's work so far, graphs included; `HangError` if a rank is lost.

        On the CPU it returns at once.
        """
        op = "synchronize"
        self._check_open(op)
        handle = handle_for(stream, self.device, op)
        if not self.device.is_cuda:
            return
        with cuda.current(self.device):
            done = cuda.Event()
            done.record(handle)
        pause, begun = _FIRST_PAUSE, time.monotonic()
        while not done.is_done():
            time.sleep(pause)
            pause, now = min(2 * pause, _LAST_PAUSE), time.monotonic()
            if self._hang:
                if self._is_over():
                    break
            # NCCL's kernels, which the monitor does not watch
            elif now - begun > self.timeout_s + _LETTING_GO_S:
                words = f"{op}: rank {self.rank} waited {now - begun:.0f} s for the stream"
                raise self._broken(op, TimeoutError(words))
        self._check_open(op)

    # ------------------------------------------------------------------------------- ending

    @property
    def is_open(self) -> bool:
        """Whether the group is not closed and no rank is known to be missing."""
        if self._hang or not self._is_open or self._process != this_process():
            return False
        return self._monitor is not None or not self._attendance.missing()

    def close(self) -> None:
        """Free everything when this rank's work is done.  All ranks call it, like any call.

        It closes the memory of peers, waits for all ranks, and frees this rank's memory.  After a
        hang it waits for nobody, and on GPUs it keeps memory that another process may still write
        to, and all memory if NCCL's kernels do not end.  A second call does nothing, nor does one
        in a forked child, since the group is its parent's.
        """
        if not self._is_open or self._process != this_process():
            return
        is_broken, self._is_open = not self.is_open, False
        algorithms = self._algorithms
        try:
            is_idle = algorithms is None or self._finish(algorithms)
        finally:
            if self._monitor is not None:
                self._monitor.close()
            self._attendance.close()
            self._algorithms = None  # whose memory is freed on return
        if algorithms is None:
            return
        if is_idle:
            algorithms.close(is_broken=is_broken or bool(self._hang))
        else:
            _in_use.append(algorithms)

    def _finish(self, algorithms: Algorithms) -> bool:
        """Wait for the GPU's work; return False if it does not end after a hang.

        Meanwhile the monitor releases waiting kernels.
        """
        if not self.device.is_cuda:
            return True
        if self._hang:
            algorithms.abort()
        return run_with_deadline(lambda: cuda.synchronize(self.device), self._is_over)

    def _is_over(self) -> bool:
        """Whether kernels that waited for a lost rank have had their time to end."""
        return time.monotonic() > self._hung_at + ENDING_S

    def __enter__(self) -> Group:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if exc is not None and not self._hang:  # the other ranks may never reach their close
            self._give_up(f"rank {self.rank} left its block by {exc_type!r}", self._calls + 1)
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Group is of this process and cannot be pickled: pickle its ranks")

    def __repr__(self) -> str:
        state = "" if self._is_open else ", closed"
        return f"<Group, rank {self.rank} of {self.size} on {self.device}{state}>"

    # ------------------------------------------------------------------------------- inside

    def _check_open(self, op: str) -> None:
        check_process(op, "group", self._process)
        if not self._is_open:
            raise ArgumentError(op, "self", got="a closed group", expected="an open one")
        self._check_attendance(op, self._calls + 1)

    def _check_attendance(self, op: str, call: int) -> None:
        """Raise `HangError` if the group is broken, or if a rank does not make a call."""
        gone = self._attendance.given_up(call)
        if gone and not self._hang:
            self._tell_hang("", gone, 0.0, call)
        if self._hang:
            raise HangError(op, self._hang)

    def _vectors(
        self, op: str, x: object, out: object, stream: object
    ) -> tuple[TensorDesc, TensorDesc, int]:
        """Check a call's arguments; return its tensors as vectors, and its stream."""
        self._check_open(op)
        tensors = self._tensor(op, "x", x), self._tensor(op, "out", out)
        if tensors[1].readonly:
            got = "a tensor that is read-only"
            raise ArgumentError(op, "out", got=got, expected="a writable one")
        source, target = (
            TensorDesc(desc.ptr, (desc.numel,), desc.dtype, device=self.device) for desc in tensors
        )
        return source, target, handle_for(stream, self.device, op)

    def _tensor(self, op: str, name: str, value: object) -> TensorDesc:
        desc = as_desc(value, op, name)
        if desc.device is not self.device:
            raise ArgumentError(op, name, got=desc.device, expected=f"{self.device}, the group's")
        if desc.dtype.name not in _DTYPES:
            raise ArgumentError(op, name, got=desc.dtype, expected=", ".join(_DTYPES))
        if not desc.is_contiguous:
            raise ArgumentError(op, name, got=desc.layout, expected="a contiguous tensor")
        return desc

    def _agree(self, op: str, what: str) -> None:
        """With `check`, raise on every rank if one of them makes another call."""
        self._calls += 1
        if not self._checks:
            return
        mine = f"{what}, call {self._calls}: {op}"
        try:
            calls = [data.decode() for data in self._ranks.all_gather(mine.encode())]
        except TimeoutError as error:
            raise self._broken(op, error) from error
        for rank, theirs in enumerate(calls):
            if theirs != calls[0]:
                got, expected = f"{theirs} on rank {rank}", f"{calls[0]}, as on rank 0"
                raise ArgumentError(op, "x", got=got, expected=expected)

    def _run(self, op: str, call: Call, x: TensorDesc, out: TensorDesc, stream: int) -> None:
        if not x.numel:
            return
        if self.device.is_cuda:
            try:
                with cuda.current(self.device):
                    call(x, out, stream)
            except KernelError as error:  # NCCL's, which may tell of a lost rank first
                gone = self._attendance.missing()
                if gone and not self._hang:
                    self._tell_hang("", gone, 0.0)
                if self._hang:
                    raise HangError(op, self._hang) from error
                raise
            return
        from fi_ffi.reference.peers import waiting_at_most

        def are_missing(ranks: Iterable[int]) -> bool:
            return not self._attendance.missing().isdisjoint(ranks)

        try:
            with waiting_at_most(self.timeout_s, are_missing, ENDED_S):
                call(x, out, stream)
        except TimeoutError as error:
            raise self._broken(op, error) from error
        except KernelError as error:
            if error.kind != TimeoutError.__name__:
                raise
            raise self._broken(op, TimeoutError(error.message)) from error
        self._check_attendance(op, self._calls)

    def _copy(self, x: TensorDesc, out: TensorDesc, stream: int) -> None:
        copy(out.ptr, x.ptr, x.span_bytes, self.device, stream)

    def _tell_hang(
        self, op: str, missing: set[int], seconds: float, call: int | None = None
    ) -> None:
        """Record a hang, and end NCCL's kernels."""
        words = f"rank {self.rank} has lost {format_ranks(missing)}"
        if op:
            words = f"{op}: rank {self.rank} waited {seconds:g} s for {format_ranks(missing)}"
        self._broken(op, TimeoutError(words), call)
        algorithms = self._algorithms
        if algorithms is not None:
            algorithms.abort()

    def _broken(self, op: str, error: TimeoutError, call: int | None = None) -> HangError:
        """Mark the group as unusable after a rank was missing; return the error."""
        ended, given_up = self._attendance.ended(), self._attendance.given_up()
        words = str(error)
        if ended:
            words += f" (the process of {format_ranks(ended)} has ended)"
        if given_up - ended:
            words += f" (given up by {format_ranks(given_up - ended)})"
        self._give_up(f"{words}; the group can only be closed", call or self._calls)
        return HangError(op, self._hang)

    def _give_up(self, why: str, call: int) -> None:
        """Make no call from this one on, and let the other ranks know."""
        self._hang, self._hung_at = why, min(self._hung_at, time.monotonic())
        if self._process == this_process():
            self._attendance.leave(call)


def _check_apart(op: str, x: TensorDesc, out: TensorDesc, ahead: int) -> None:
    """Raise if the tensors overlap, unless `out` begins `ahead` bytes after `x`."""
    start, end = max(x.ptr, out.ptr), min(x.ptr + x.span_bytes, out.ptr + out.span_bytes)
    if start < end and out.ptr - x.ptr != ahead:
        place = f", or {ahead} bytes from its start" if ahead else ", or its own"
        raise ArgumentError(op, "out", got="memory of `x`", expected=f"memory apart from it{place}")


def _device(device: object) -> Device:
    place = parse_device(device, op="Group")
    if not place.is_cuda and place.type != "cpu":
        raise ArgumentError("Group", "device", got=place, expected="cuda or cpu")
    if place.is_cuda:
        machine.capability(place.index)  # raises if there is no such GPU
    return place


def _fusion_size(fusion: object) -> FusionSize | None:
    if fusion is None:
        return None
    if not isinstance(fusion, FusionSize):
        got, expected = type(fusion).__name__, "a fi_ffi.comm.FusionSize, or None"
        raise ArgumentTypeError("Group", "fusion", got=got, expected=expected)
    return fusion.checked()
