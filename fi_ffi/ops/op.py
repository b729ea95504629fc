"""Ops: the typed functions, made from rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fi_ffi.ops.docs import docstring
from fi_ffi.ops.form import Form
from fi_ffi.ops.launch import Preparing
from fi_ffi.ops.prepared import Prepared
from fi_ffi.ops.providers import fits, release_in_use
from fi_ffi.ops.quick import parameters
from fi_ffi.ops.row import Row

if TYPE_CHECKING:
    import inspect
    import os

    from fi_ffi.ops.support import Support


class Op:
    """A typed kernel function; call it like one.

    An op whose arguments changed between FlashInfer's releases has a row for each
    form of it.  The one in force is that of the release the kernels are of, and that
    of the lock's default release until there are any.

    `stream=` is required for CUDA tensors unless a `fi_ffi.stream(...)` scope is
    open; CPU tensors need none.
    """

    def __init__(self, *rows: Row) -> None:
        self.rows = rows
        self.__name__ = self.__qualname__ = rows[0].name
        self._forms = [Form(row) for row in rows]
        self._form, self._is_settled = self._forms[0], False
        # Of its own, so that calling it can be calling the function compiled from its row.
        self.__class__ = type(f"_{rows[0].name}", (Op,), {"__doc__": Op.__dict__["__doc__"]})

    @property
    def row(self) -> Row:
        """The row in force."""
        return self._form.row

    @property
    def __doc__(self) -> str:  # type: ignore[override]
        return docstring(self.row)

    @property
    def __signature__(self) -> inspect.Signature:
        import inspect

        return inspect.signature(self._form.bind)

    def __repr__(self) -> str:
        return f"<fi_ffi op {self.__name__}({parameters(self.row)})>"

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """A call while it is open which row is in force; afterwards `Form.quick` is called."""
        return self._in_force(args, kwargs).quick(self, *args, **kwargs)

    def prepare(self, /, *args: Any, stream: object = None, **kwargs: Any) -> Prepared:
        """A call with these arguments that is packed once, to be launched many times.

        It is launched on `stream`, or without one on that of the scope that is open then.
        Raises what the call itself would.
        """
        form = self._in_force(args, kwargs)
        made: Prepared = form(form.bind(*args, **kwargs)[0], Preparing(stream))
        return made

    def supports(
        self,
        sm: int | float | str | tuple[int, int] | None = None,
        *,
        release: str | None = None,
        cuda: str | None = None,
        dtypes: object = None,
        kernels: str | os.PathLike[str] | None = None,
    ) -> Support:
        """Whether the op can be called on a GPU (`sm=90`; without it, on the first there is).

        The answer is true or false, and has a `reason`, and a `build` command where one would
        help.  It is of the kernels in use, or of those at `kernels`; where a `release` or a
        `cuda` tag such as "cu130" is named, or there are no kernels on this machine, of what
        FlashInfer publishes.  `dtypes` are names, or names by the variables of the docstring.
        """
        from fi_ffi.ops.support import Question, judge

        question = Question.of(sm, release, cuda, dtypes, kernels)
        return judge(self.__name__, self.rows, question)

    def _in_force(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Form:
        """The form for a call with these arguments, which may settle what is in force."""
        if not self._is_settled:
            values, _ = self._form.bind(*args, **kwargs)
            if self._form.is_on_cuda(values):
                self.settle(release_in_use())
        return self._form

    @property
    def is_settled(self) -> bool:
        """Whether kernels have told which row is in force."""
        return self._is_settled

    def settle(self, release: str | None) -> None:
        """Put the row of this release in force; the first one if none is of it."""
        fitting = [form for form in self._forms if release and fits(form.row, release)]
        self._form = (fitting or self._forms)[0]
        self._is_settled = release is not None
        type(self).__call__ = self._form.quick if release is not None else Op.__call__  # type: ignore[method-assign]

    def forget(self) -> None:
        """Drop what was learnt from earlier calls, after the source of kernels changed."""
        type(self).__call__ = Op.__call__  # type: ignore[method-assign]
        self._is_settled = False
        for form in self._forms:
            form.forget()
