"""Groups of ranks: all-reduce, all-gather and reduce-scatter across GPUs, without torch.

    with fi_ffi.comm.Group(ranks[0], device="cuda:0") as group:
        group.all_reduce(x, stream=stream)

docs/howto/several-gpus.md goes from nothing to a sum on two GPUs.
"""

from fi_ffi.comm.fusion import AllReduceFusionPattern, FusionSize
from fi_ffi.comm.group import Group
from fi_ffi.comm.ranks import Ranks, mpi, processes, ray, threads

__all__ = [
    "AllReduceFusionPattern",
    "FusionSize",
    "Group",
    "Ranks",
    "mpi",
    "processes",
    "ray",
    "threads",
]
