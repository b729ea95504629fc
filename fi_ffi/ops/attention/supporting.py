"""`supports` of the attention calls and plans: what is asked is looked up only then."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fi_ffi.ops.capability.judgement import Support


def asked_of(
    op: str,
    sm: Any = None,
    *,
    release: str | None = None,
    cuda: str | None = None,
    kernels: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Support:
    """Whether a call or plan can be made, with these options: see `Op.supports`."""
    from fi_ffi.ops.capability.attention import judge_attention
    from fi_ffi.ops.capability.judgement import Query

    return judge_attention(op, Query.of(sm, release, cuda, None, kernels), options)


class Supporting:
    """What plan classes have of it."""

    @classmethod
    def supports(cls, sm: Any = None, **asked: Any) -> Support:
        """Whether it can be made for a GPU (`sm=90`), with kernels of a `release` and a `cuda`
        tag, with these of the plan's options: see `Op.supports`."""
        return asked_of(cls.__name__, sm, **asked)
