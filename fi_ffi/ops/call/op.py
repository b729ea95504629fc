"""Ops: the typed functions, made from rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fi_ffi.ops.call.checks import parameters
from fi_ffi.ops.call.compiled import CompiledRow
from fi_ffi.ops.call.prepared import Prepared, prepare_call
from fi_ffi.ops.docs import docstring
from fi_ffi.ops.providers import release_in_use
from fi_ffi.ops.releases import fits
from fi_ffi.ops.row import Row

if TYPE_CHECKING:
    import inspect
    import os

    from fi_ffi.ops.capability.judgement import Support


class Op:
    """A typed kernel function; call it like a Python function.

    An op whose arguments changed between FlashInfer's releases has a row for each form. The row in
    force is that of the release of the kernels in use, or of the lock's default release until
    kernels are found.

    `stream=` is required for CUDA tensors unless a `fi_ffi.stream(...)` scope is open. CPU tensors
    need none.
    """

    def __init__(self, *rows: Row, op: str = "", names: Mapping[str, str] | None = None) -> None:
        self.rows = rows
        self.__name__ = self.__qualname__ = rows[0].name
        self._compiled = [CompiledRow(row, op=op, names=names) for row in rows]
        self.compiled, self._has_release = self._compiled[0], False
        # A class for each op, so that its `__call__` can be the function compiled from its row.
        self.__class__ = type(f"_{rows[0].name}", (Op,), {"__doc__": Op.__dict__["__doc__"]})

    @property
    def row(self) -> Row:
        """The row in force."""
        return self.compiled.row

    @property
    def __doc__(self) -> str:  # type: ignore[override]
        return docstring(self.row)

    @property
    def __signature__(self) -> inspect.Signature:
        import inspect

        return inspect.signature(self.compiled.bind)

    def __repr__(self) -> str:
        return f"<fi_ffi op {self.__name__}({parameters(self.row)})>"

    def __reduce__(self) -> str:
        raise TypeError(f"{self!r} has frames of its own and cannot be pickled or copied")

    def __copy__(self) -> Op:
        return self

    def __deepcopy__(self, memo: object) -> Op:
        return self

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Call the op while the row in force is unknown; afterwards `CompiledRow.call` replaces
        this method."""
        return self._in_force(args, kwargs).call(self, *args, **kwargs)

    def prepare(self, /, *args: Any, stream: object = None, **kwargs: Any) -> Prepared:
        """Check and pack a call with these arguments, for any number of launches.

        It launches on `stream` or, without one, on the stream of the open scope.  Raises what the
        call itself would raise.
        """
        compiled = self._in_force(args, kwargs)
        return prepare_call(compiled, compiled.bind(*args, **kwargs)[0], stream)

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
        from fi_ffi.ops.capability.judgement import Query, judge

        return judge(self.__name__, self.rows, Query.of(sm, release, cuda, dtypes, kernels))

    def _in_force(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> CompiledRow:
        """Return the row for a call with these arguments; a first call on a GPU selects it."""
        if not self._has_release:
            values, _ = self.compiled.bind(*args, **kwargs)
            if self.compiled.is_on_cuda(values):
                self.select_release(release_in_use())
        return self.compiled

    @property
    def has_release(self) -> bool:
        """Whether kernels have determined the row in force."""
        return self._has_release

    def select_release(self, release: str | None) -> None:
        """Put the row of this release in force; the first row if none has this release."""
        fitting = [one for one in self._compiled if release and fits(one.row, release)]
        self.compiled = (fitting or self._compiled)[0]
        self._has_release = release is not None
        type(self).__call__ = self.compiled.call if release is not None else Op.__call__  # type: ignore[method-assign]

    def forget(self) -> None:
        """Drop what earlier calls cached, after the source of kernels changed."""
        type(self).__call__ = Op.__call__  # type: ignore[method-assign]
        self._has_release = False
        for one in self._compiled:
            one.forget()
