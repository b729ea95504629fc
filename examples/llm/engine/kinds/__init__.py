"""Kinds of model: what config.json has, a layer's tensors, and how the kernels want them."""

from ..config import KINDS
from .gemma3 import Gemma3
from .gpt_oss import GptOss
from .llama import Llama, Mistral, Qwen2, Qwen3
from .mixtral import Mixtral, Qwen3Moe
from .qwen3_next import Qwen3Next

KINDS |= {
    "gemma3_text": Gemma3, "gpt_oss": GptOss, "llama": Llama, "mistral": Mistral,
    "mixtral": Mixtral, "qwen2": Qwen2, "qwen3": Qwen3, "qwen3_moe": Qwen3Moe,
    "qwen3_next": Qwen3Next,
}  # fmt: skip
