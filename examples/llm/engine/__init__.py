"""A small inference engine on fi_ffi."""

from . import threads, kinds  # noqa: F401, I001  (threads before numpy)
from .config import KINDS, Config
from .engine import Engine, Request, Requests
from .ranks import Job, alone, device_count, end_process, spawned, start, watch
from .sampling import Sampling
from .weights import Weights, verify

__all__ = [
    "KINDS", "Config", "Engine", "Request", "Requests", "Sampling", "Weights", "alone",
    "end_process", "load", "load_model", "spawned", "verify", "watch",
]  # fmt: skip


def load(path, device=None, num_pages=None, **options):
    """An engine for a folder in the hub's layout; what follows `path` is as in `load_model`."""
    config, weights = Config.read(path), Weights(path)
    verify(config, weights)
    return load_model(config, weights, device, num_pages, **options)


def load_model(config, weights, device=None, num_pages=None, page_size=16, max_batch=64,
               max_tokens=512, use_graphs=True, tp=1, way="processes", gpus=None):  # fmt: skip
    """An engine from a Config, and anything that gives weights by name.

    Args:
        device: "cuda:0", or "cpu" for the reference kernels; what there is by default.
        num_pages, page_size: the cache: `num_pages` times `page_size` tokens; by default as many
            pages as the GPU has memory for, and 1,024 on the CPU.
        max_batch: requests at a time.
        max_tokens: the most in one step; longer prompts take several.
        use_graphs: record decoding as CUDA graphs.
        tp: GPUs (ranks) that the model is split over.
        way: what ranks are: "processes" or "threads" of this machine, from `device` on, or
            actors that "ray" places.
        gpus: how many GPUs of this machine ranks take in turn; by default each has its own.
            Processes may share one, which is for tests: their kernels run by turns.
    """
    device = device or ("cuda:0" if device_count() else "cpu")
    job = Job(config, weights, device, num_pages, page_size, max_batch,
              max(max_tokens, max_batch), use_graphs, gpus or tp)  # fmt: skip
    return Engine(start(job, tp, way))
