"""A small inference engine on fi_ffi: Llama 3, Qwen3, and a hybrid like Qwen3-Next."""

from .config import Config
from .device import Cpu, Gpu, default
from .engine import Engine, Request
from .model import Model
from .sampling import Sampling
from .weights import Weights

__all__ = ["Config", "Engine", "Request", "Sampling", "load", "load_model"]


def load(path, device=None, num_pages=1024, page_size=16, max_batch=64, max_tokens=512,
         use_graphs=True):  # fmt: skip
    """An engine for the checkpoint in a folder (the hub's layout).

    Args:
        path: a folder with config.json and safetensors.
        device: "cuda:0", or "cpu" for the reference kernels; what there is by default.
        num_pages, page_size: the cache: `num_pages` times `page_size` tokens.
        max_batch: requests at a time.
        max_tokens: the most in one step; longer prompts take several.
        use_graphs: record decoding as CUDA graphs.
    """
    config = Config.read(path)
    return load_model(config, Weights(path), device, num_pages, page_size, max_batch, max_tokens,
                      use_graphs)  # fmt: skip


def load_model(config, weights, device, num_pages, page_size, max_batch, max_tokens, use_graphs):
    """The same from a Config, and anything that gives weights by name."""
    where = {"cpu": Cpu, "cuda:0": Gpu}[device or default()](config.dtype)
    max_tokens = max(max_tokens, max_batch)
    with where.scope():
        model = Model(where, config, weights, num_pages, page_size, max_batch, max_tokens)
    return Engine(model, num_pages, page_size, use_graphs)
