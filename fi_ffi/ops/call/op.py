"""Ops: the typed functions, made from rows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fi_ffi.loader import generation
from fi_ffi.ops.call.checks import parameters
from fi_ffi.ops.call.compiled import CompiledRow
from fi_ffi.ops.call.prepared import Prepared, prepare_call
from fi_ffi.ops.call.releases import fits, release_in_force
from fi_ffi.ops.call.row import Row
from fi_ffi.ops.call.support import Support, docstring, supports

if TYPE_CHECKING:
    import inspect
    import os


# A `partial`, because Python makes a tuple and a dict of the arguments to call an object with a
# `__call__` of its own, which takes longer than to check them.
class Op(functools.partial[Any]):
    """A typed kernel function; call it like a Python function.

    An op whose arguments changed between FlashInfer's releases has a row for each form. The row in
    force, on every device, is that of the release of the kernels in use; without kernels, of the
    one that FI_FFI_RELEASE names, or of the lock's default.

    `stream=` is required for CUDA tensors unless a `fi_ffi.stream(...)` scope is open. CPU tensors
    need none.
    """

    def __new__(cls, *rows: Row, op: str = "") -> Op:
        return super().__new__(cls, cls._call_first)

    def __init__(self, *rows: Row, op: str = "") -> None:
        self.rows = rows
        self.__name__ = self.__qualname__ = rows[0].name
        self._compiled = [CompiledRow(row, op=op, follows=False) for row in rows]
        self._in_force: CompiledRow | None = None
        self.forget()
        generation.follow(self)

    @property
    def compiled(self) -> CompiledRow:
        """The row in force, compiled; the first use selects it."""
        return self._in_force or self.select_release(release_in_force())

    @property
    def row(self) -> Row:
        """The row in force."""
        return self.compiled.row

    @property
    def __doc__(self) -> str:  # type: ignore[override]
        return docstring.get()(self.row)

    @property
    def __signature__(self) -> inspect.Signature:
        import inspect

        return inspect.signature(self.compiled.arguments)

    def __repr__(self) -> str:
        return f"<fi_ffi op {self.__name__}({parameters(self.row)})>"

    def __reduce__(self) -> str:
        raise TypeError(f"{self!r} has frames of its own and cannot be pickled or copied")

    def __copy__(self) -> Op:
        return self

    def __deepcopy__(self, memo: object) -> Op:
        return self

    def _call_first(self, /, *args: Any, **kwargs: Any) -> Any:
        """Call the op while the row in force is unknown; later calls are `CompiledRow.call`."""
        return self.compiled.call(self, *args, **kwargs)

    def _become(self, function: Callable[..., Any], first: object) -> None:
        """Have calls of this object be calls of a function, with this argument before others."""
        self.__setstate__((function, (first,), {}, vars(self)))  # type: ignore[attr-defined]

    def prepare(self, /, *args: Any, stream: object = None, **kwargs: Any) -> Prepared:
        """Check and pack a call with these arguments, for any number of launches.

        It launches on `stream` or, without one, on the stream of the open scope.  Raises what the
        call itself would raise.
        """
        compiled = self.compiled
        return prepare_call(compiled, compiled.arguments(*args, **kwargs)[0], stream)

    def supports(
        self,
        sm: int | float | str | tuple[int, int] | None = None,
        *,
        release: str | None = None,
        cuda: str | None = None,
        dtypes: object = None,
        kernels: str | os.PathLike[str] | None = None,
    ) -> Support:
        """Say whether the op works on a GPU: on `sm=90`, or by default on this machine's first GPU.

        The answer is true or false, with a `reason` and, if building helps, a `build` command.  It
        is about the kernels that a call would find, or those at `kernels`.  If you name a `release`
        or a `cuda` tag such as "cu130", it is about what FlashInfer publishes.
        `dtypes` are names, or a dict by the type variables of the docstring.
        """
        asked = {"sm": sm, "release": release, "cuda": cuda, "dtypes": dtypes, "kernels": kernels}
        return supports(self.__name__, self.rows, **asked)

    def select_release(self, release: str) -> CompiledRow:
        """Put the row of this release in force; the first row if none has this release."""
        fitting = (one for one in self._compiled if fits(one.row, release))
        in_force = self._in_force = next(fitting, self._compiled[0])
        self._become(in_force.call, None)
        return in_force

    def forget(self) -> None:
        """Drop what earlier calls cached, after the source of kernels changed."""
        self._in_force = None
        self._become(Op._call_first, self)
        for one in self._compiled:
            one.forget()
