"""`supports` of the attention calls and plans: what is asked is looked up only then."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, cast

if TYPE_CHECKING:
    from fi_ffi.ops.support.answer import Support

_P = ParamSpec("_P")
_R = TypeVar("_R", covariant=True)


class Supported(Protocol[_P, _R]):
    """A function that can be asked where it can be called."""

    __name__: str
    supports: Callable[..., Support]

    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> _R: ...


def _asked(
    op: str,
    sm: Any = None,
    *,
    release: str | None = None,
    cuda: str | None = None,
    kernels: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Support:
    from fi_ffi.ops.support.attention import answer
    from fi_ffi.ops.support.question import Question

    return answer(op, Question.of(sm, release, cuda, None, kernels), options)


def supported(function: Callable[_P, _R]) -> Supported[_P, _R]:
    """Give a function its `supports`; it stays the same function."""

    def supports(sm: Any = None, **asked: Any) -> Support:
        """Whether it can be called on a GPU (`sm=90`), with kernels of a `release` and a
        `cuda` tag, with these dtypes, head size and options (`q_data_type`, `kv_data_type`,
        `o_data_type`, `head_dim`, `head_dim_vo`, and the call's own): see `Op.supports`."""
        return _asked(function.__name__, sm, **asked)

    made = cast("Supported[_P, _R]", function)
    made.supports = supports
    return made


class Supporting:
    """What plan classes have of it."""

    @classmethod
    def supports(cls, sm: Any = None, **asked: Any) -> Support:
        """Whether it can be made for a GPU (`sm=90`), with kernels of a `release` and a `cuda`
        tag, with these of the plan's options: see `Op.supports`."""
        return _asked(cls.__name__, sm, **asked)
