"""What a test asks of attention: one value that both a plan and the formula are made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Spec:
    """What is asked for.  Lengths are `lengths` (queries and keys), or drawn: `batches.draw`."""

    family: str = "batch_prefill"
    backend: str = "fa2"
    lengths: tuple[tuple[int, int], ...] = ()
    batch: int = 7
    queries: int = 40
    keys: int = 300
    heads: int = 4
    kv_heads: int = 2
    dim: int = 128
    dim_vo: int = 0
    dtype: str = "float16"
    kv_dtype: str = ""
    o_dtype: str = ""
    page_size: int = 0  # 0: ragged
    layout: str = "NHD"
    together: bool = False  # keys and values in one tensor
    pad: int = 0  # elements between rows, of every tensor; of o not without `pad_o`
    pad_o: bool = False
    causal: bool = False
    window_left: int = -1
    cap: float = 0.0
    mode: str = "NONE"
    rope: tuple[float, float] | None = None
    sm_scale: float | None = None
    mask: bool = False
    sink: bool = False
    items: bool = False
    scales: str = ""  # of which of q, k and v, and "numbers" or "heads": "qk numbers"
    no_keys: bool = True  # whether some requests have none
    indices_at_run: bool = False
    pdl: bool = False
    lse: bool = True
    base_e: bool = False
    plan: Mapping[str, Any] = field(default_factory=dict)

    @property
    def value_dim(self) -> int:
        return self.dim_vo or self.dim

    @property
    def kv(self) -> str:
        return self.kv_dtype or self.dtype

    @property
    def o(self) -> str:
        return self.o_dtype or ("float16" if self.dtype.startswith("float8") else self.dtype)

    @property
    def whole_requests(self) -> bool:
        """Whether what a row must be depends on where it is: not to be told from a few rows."""
        places = self.window_left >= 0 or self.mode == "ROPE_LLAMA"
        return self.mode == "ALIBI" or (places and not self.causal)

    def options(self) -> dict[str, Any]:
        """The plan's options."""
        same = {"page_size": self.page_size or None, "q_data_type": self.dtype}
        same |= {"kv_data_type": self.kv_dtype or None} | dict(self.plan)
        if self.family == "batch_mla":
            return same | {
                "num_heads": self.heads, "causal": self.causal, "backend": self.backend
            }  # fmt: skip
        same |= {
            "num_qo_heads": self.heads, "num_kv_heads": self.kv_heads,
            "o_data_type": self.o_dtype or None, "window_left": self.window_left,
            "logits_soft_cap": self.cap, "pos_encoding_mode": self.mode,
        }  # fmt: skip
        if self.family == "batch_decode":
            return same | {"head_dim": self.dim}
        return same | {
            "head_dim_qk": self.dim, "head_dim_vo": self.value_dim, "causal": self.causal,
            "backend": self.backend, "use_custom_mask": self.mask,
            "use_multi_item_scoring": self.items, "use_attention_sink": self.sink,
        }  # fmt: skip
