"""Kinds of model: what config.json has, a layer's tensors, and how the kernels want them."""

from . import gemma3, gpt_oss, llama, mixtral, qwen3_next  # noqa: F401
