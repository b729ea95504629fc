"""The reduction algorithms available to a group, and the choice among them by message size."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fi_ffi.abi.tensor import Device, TensorDesc
from fi_ffi.comm import fusion as fusion_module
from fi_ffi.comm import vllm as vllm_module
from fi_ffi.comm.fusion import Fusion, FusionSize
from fi_ffi.comm.hang import Waiting
from fi_ffi.comm.memory import PeerMemory, copy, peer_topology
from fi_ffi.comm.nccl import Nccl
from fi_ffi.comm.presence import Place
from fi_ffi.comm.ranks import Ranks
from fi_ffi.comm.vllm import VllmAllReduce
from fi_ffi.errors import ArgumentError, KernelNotFoundError, LoaderError
from fi_ffi.ops.call import cuda

ALGORITHMS = ("oneshot", "twoshot", "vllm", "nccl")
Call = Callable[[TensorDesc, TensorDesc, int], None]
_VECTOR = 16
_ANY = 1 << 62
# For each number of ranks: algorithms in order of preference, each with the largest message in
# bytes that it is the fastest for: of two ranks by benchmarks/comm.py on two H100s with NVLink; the
# others are estimates.
TABLE: dict[int, tuple[tuple[str, int], ...]] = {
    2: (("oneshot", 4 << 20), ("vllm", 8 << 20), ("nccl", _ANY)),
    4: (("oneshot", 512 << 10), ("vllm", 4 << 20), ("nccl", _ANY)),
    8: (("oneshot", 256 << 10), ("vllm", 4 << 20), ("nccl", _ANY)),
}


@dataclass(frozen=True)
class Settings:
    """What the ranks of a group have agreed on."""

    max_bytes: int
    fusion: FusionSize | None
    # The modules whose kernels some rank lacks, with the reason.
    lacking: dict[str, str]
    has_nccl: bool  # whether all ranks have NCCL
    timeout_s: float  # how long to wait for the others while the algorithms are made


class Algorithms:
    """The algorithms of one rank; every rank creates them at the same time with equal arguments."""

    def __init__(
        self, ranks: Ranks, places: Sequence[Place], device: Device, settings: Settings
    ) -> None:
        self._ranks, self._rank, self._size = ranks, ranks.rank, ranks.size
        self._device, self._max_bytes = device, settings.max_bytes
        table = min((size for size in TABLE if size >= self._size), default=max(TABLE))
        self._by_size = TABLE[table]
        self.vllm: VllmAllReduce | None = None
        self.fusion: Fusion | None = None
        # NCCL, or its replacement on the CPU.
        self._collectives: Any = None
        self._memory: PeerMemory | None = None
        reach, linked, self._why_not = _peers(ranks, places, device)
        fusion, max_bytes = settings.fusion, settings.max_bytes
        parts: dict[str, int] = {}
        if self._has_vllm(reach, linked, settings.lacking):
            parts["vllm"] = VllmAllReduce.nbytes(max_bytes, device)
        can_fuse = reach and self._size in fusion_module.SIZES
        if can_fuse:
            why_no_fusion = settings.lacking.get("trtllm_comm", "")
        else:
            why_no_fusion = self._why_not or f"{self._size} ranks"
        if fusion is not None and why_no_fusion:
            expected = f"None, or {fusion_module.RANKS}"
            got = f"a size, and {why_no_fusion}"
            raise ArgumentError("Group", "fusion", got=got, expected=expected)
        if fusion is None and not why_no_fusion:
            most = min(dict(self._by_size)["oneshot"], max_bytes)
            fusion = FusionSize(1, most // 2, "bfloat16")
        if fusion is not None:
            parts["fusion"] = Fusion.nbytes(fusion, ranks.size)
        if can_fuse and settings.lacking and not parts and not settings.has_nccl:
            raise KernelNotFoundError("; ".join(settings.lacking.values()))
        if parts and not settings.has_nccl:
            parts["gathered"] = max_bytes
        try:
            self._make(places, parts, linked, replace(settings, fusion=fusion))
        except BaseException:  # a rank did not come, or NCCL did not: another group may be made
            self.close(is_broken=True)
            raise

    def _make(
        self, places: Sequence[Place], parts: dict[str, int], linked: bool, settings: Settings
    ) -> None:
        """Allocate the parts of the memory, and make the algorithms that use them."""
        ranks, device, max_bytes = self._ranks, self._device, self._max_bytes
        fusion = settings.fusion
        if not device.is_cuda:
            from fi_ffi.reference import on_host

            parts["host"] = on_host.HEADER + max_bytes
        if parts:
            self._memory = PeerMemory(ranks, places, sum(parts.values()), device)
            # Two staging buffers, for the addend and the sum of a message that is not whole
            # vectors.
            most = max(max_bytes, fusion.message_bytes if fusion else 0)
            self._spare, self._room = cuda.allocate(2 * most, device), most
        starts = self._starts(parts)
        self._gathered = starts.get("gathered", [])
        if "vllm" in parts:
            self.vllm = VllmAllReduce(ranks.rank, starts["vllm"], max_bytes, device, linked)
        if fusion is not None:
            self.fusion = Fusion(ranks.rank, starts["fusion"], fusion, device)
        if not device.is_cuda:
            self._collectives = on_host.HostCollectives(ranks.rank, starts["host"], max_bytes)
        elif settings.has_nccl:
            self._collectives = Nccl(ranks, device, settings.timeout_s)
        ranks.barrier()  # no rank may call before all are ready

    def _has_vllm(self, reach: bool, linked: bool, lacking: dict[str, str]) -> bool:
        """Return whether vllm's kernels support these ranks; for others they launch nothing."""
        if self._size not in vllm_module.SIZES:
            self._why_not = self._why_not or f"{self._size} ranks"
        elif reach and not linked and self._size > 2:
            self._why_not = f"{self._size} GPUs that are not all connected by NVLink"
        self._why_not = self._why_not or lacking.get("vllm_comm", "")
        return not self._why_not

    def _starts(self, parts: dict[str, int]) -> dict[str, list[int]]:
        """Return the address of each part in every rank's memory."""
        starts, start = {}, 0
        for name, count in parts.items():
            assert self._memory is not None
            starts[name] = [address + start for address in self._memory.addresses]
            start += count
        return starts

    # ------------------------------------------------------------------------------ choice

    def limit(self, name: str) -> int:
        """Return the most bytes that an algorithm accepts; -1 if it is unavailable."""
        if name == "vllm" and self.vllm is not None:
            return self._max_bytes
        if name == "nccl" and self._collectives is not None:
            return _ANY
        if name == "oneshot" and self.fusion is not None:
            return self.fusion.max_bytes
        if name == "twoshot" and self.fusion is not None:
            return self.fusion.fusion.message_bytes
        return -1

    def choose(self, nbytes: int, itemsize: int) -> str:
        """Return the algorithm for a message, by `TABLE`; `ArgumentError` if none accepts it."""
        by_size = [name for name, most in self._by_size if nbytes <= most]
        for name in (*by_size, "vllm", "oneshot"):
            if self.limit(name) >= nbytes and self._fits(name, nbytes, itemsize):
                return name
        here = [f"{name} up to {self.limit(name)}" for name in ALGORITHMS if self.limit(name) >= 0]
        have = ", ".join(here) or f"none, with {self._why_not}"
        got = f"{nbytes} bytes"
        expected = (
            f"what this group has algorithms for ({have}); pip install 'fi-ffi[nccl]' for any"
        )
        raise ArgumentError("all_reduce", "x", got=got, expected=expected)

    def _fits(self, name: str, nbytes: int, itemsize: int) -> bool:
        if name not in ("oneshot", "twoshot"):
            return True
        assert self.fusion is not None
        is_even = fusion_module.is_even(-(-nbytes // _VECTOR) * _VECTOR)
        return itemsize == self.fusion.fusion.itemsize and is_even

    def check(self, name: str, x: TensorDesc) -> None:
        """Raise `ArgumentError` for a message that the algorithm does not accept."""
        op, limit = "all_reduce", self.limit(name)
        if limit < 0:
            here = ", ".join(["auto", *(each for each in ALGORITHMS if self.limit(each) >= 0)])
            got = f"{name!r}" + (f", with {self._why_not}" if self._why_not else "")
            expected = f"what this group has: {here}"
            raise ArgumentError(op, "algorithm", got=got, expected=expected)
        if x.span_bytes > limit:
            got, expected = f"{x.span_bytes} bytes", f"at most {limit} for {name!r}"
            raise ArgumentError(op, "x", got=got, expected=expected)
        if name in ("oneshot", "twoshot"):
            assert self.fusion is not None
            self.fusion.check(op, x)
            vectors = -(-x.span_bytes // _VECTOR)
            if name == "twoshot" and not fusion_module.has_two_shots(vectors, self._size):
                expected = (
                    f"more than {self._size} rows of at least {self._size} vectors of 16 bytes"
                )
                raise ArgumentError(op, "x", got=f"{x.span_bytes} bytes", expected=expected)

    # ------------------------------------------------------------------------------- calls

    def all_reduce(self, name: str) -> Call:
        """Return an algorithm's function, which takes two vectors and a stream."""
        if name == "nccl":
            return self.collective("all_reduce")
        if name == "vllm":
            assert self.vllm is not None
            return self._in_vectors(self.vllm.all_reduce)
        assert self.fusion is not None
        reduce, is_oneshot = self.fusion.all_reduce, name == "oneshot"
        return self._in_vectors(lambda x, out, stream: reduce(x, out, stream, is_oneshot))

    def collective(self, op: str) -> Call:
        """Return NCCL's function, or one that uses the ranks' memory.

        Raises `LoaderError` if neither is available.
        """
        if self._collectives is not None:
            call: Call = getattr(self._collectives, op)
            return call
        if self._memory is None:
            words = f"{op} of {self._why_not} needs NCCL on every rank: pip install 'fi-ffi[nccl]'"
            raise LoaderError(words)
        return self._gather if op == "all_gather" else self._scatter

    def _gather(self, x: TensorDesc, out: TensorDesc, stream: int) -> None:
        """Gather by copies from memory that all ranks read, which keeps every bit.

        Sums with zeros would not: the kernels' float32 arithmetic turns subnormals into zeros.
        """
        count, device, own = x.span_bytes, self._device, self._gathered[self._rank]
        for start in range(0, count, self._max_bytes):
            size = min(self._max_bytes, count - start)
            self._stream_barrier(stream)  # no rank reads the part before any more
            copy(own, x.ptr + start, size, device, stream)
            self._stream_barrier(stream)
            for rank, address in enumerate(self._gathered):
                copy(out.ptr + rank * count + start, address, size, device, stream)

    def _stream_barrier(self, stream: int) -> None:
        """Make the stream wait until every rank's stream is here: a sum that nobody reads."""
        start, device = self._spare.desc.ptr, self._device
        if self.vllm is not None:
            out = TensorDesc(start, (_VECTOR // 2,), "float16", device=device)
            self.vllm.all_reduce(self.vllm.buffer(out.shape, "float16"), out, stream)
            return
        assert self.fusion is not None
        size = self.fusion.fusion  # a workspace takes dtypes of one size
        x = TensorDesc(start, (_VECTOR // size.itemsize,), size.dtype, device=device)
        self.fusion.all_reduce(x, x.at(start + self._room), stream, is_oneshot=True)

    def _scatter(self, x: TensorDesc, out: TensorDesc, stream: int) -> None:
        """Reduce the whole tensor, then copy this rank's part of the sum."""
        reduce = self.all_reduce(self.choose(x.span_bytes, x.dtype.itemsize))
        whole = x.at(self._spare.desc.ptr + self._room)
        reduce(x, whole, stream)
        part = whole.ptr + self._rank * out.span_bytes
        copy(out.ptr, part, out.span_bytes, self._device, stream)

    def _in_vectors(self, call: Call) -> Call:
        """Wrap a function that takes whole vectors of 16 bytes, so that it accepts any message.

        A message that is not whole vectors is staged in the group's memory, with padding behind it.
        A sum that overlaps the memory that peers read is staged too, and so is an addend that lies
        in this memory but not at its start.
        """

        def any_size(x: TensorDesc, out: TensorDesc, stream: int) -> None:
            nbytes, device = x.span_bytes, self._device
            count = -(-nbytes // _VECTOR) * _VECTOR // x.dtype.itemsize
            spare = self._spare.desc.ptr
            addend, total, vllm = x, out, self.vllm
            is_whole = nbytes % _VECTOR == 0
            is_read = vllm is not None and vllm.overlaps(out)
            is_inside = vllm is not None and vllm.overlaps(x) and not vllm.starts_with(x)
            if not is_whole or x.ptr % _VECTOR or is_inside:
                addend = TensorDesc(spare, (count,), x.dtype, device=device)
                copy(spare, x.ptr, nbytes, device, stream)
            if not is_whole or out.ptr % _VECTOR or is_read:
                total = TensorDesc(spare + self._room, (count,), x.dtype, device=device)
            call(addend, total, stream)
            if total.ptr != out.ptr:
                copy(out.ptr, total.ptr, nbytes, device, stream)

        return any_size

    # ------------------------------------------------------------------------------ ending

    def waiting(self) -> list[Waiting]:
        """Return the kernels that wait for other ranks in this rank's memory."""
        return [kernels for kernels in (self.vllm, self.fusion) if kernels is not None]

    def abort(self) -> None:
        """Abort NCCL's queued work after a rank was lost."""
        if isinstance(self._collectives, Nccl):
            self._collectives.abort()

    def close(self, is_broken: bool) -> None:
        """Release everything after this rank's work; if broken, do not wait for peers."""
        if isinstance(self._collectives, Nccl):
            self._collectives.close(is_broken)
        if self.vllm is not None:
            self.vllm.close()
        if self._memory is not None:
            self._memory.close(is_broken)
        elif not is_broken:
            self._ranks.barrier()  # no process may end while others watch it


def _peers(ranks: Ranks, places: Sequence[Place], device: Device) -> tuple[bool, bool, str]:
    """Return whether ranks reach each other's memory, whether all use NVLink, and why not if not.

    The answers are combined over all ranks, because ranks may see different GPUs.
    """
    if len({place.machine for place in places}) > 1:
        if not device.is_cuda:
            got, expected = "ranks of several machines", "ranks of one machine, on the CPU"
            raise ArgumentError("Group", "ranks", got=got, expected=expected)
        return False, False, "ranks of several machines"
    if not device.is_cuda:
        return True, True, ""
    mine = pickle.dumps(peer_topology(places))
    topologies = [pickle.loads(data) for data in ranks.all_gather(mine)]
    reach, linked = (all(each) for each in zip(*topologies, strict=True))
    return reach, linked, "" if reach else "GPUs without access to each other's memory"
