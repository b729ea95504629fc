"""Ops: the typed functions, made from rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fi_ffi.ops.docs import docstring
from fi_ffi.ops.form import Form, parameters
from fi_ffi.ops.providers import fits, release_in_use
from fi_ffi.ops.row import Row

if TYPE_CHECKING:
    import inspect


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
        self._form = self._forms[0]
        self._settled = False

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

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        form = self._form
        values, stream = form.bind(*args, **kwargs)
        if not self._settled and form.is_on_cuda(values):
            self.settle(release_in_use())
            if self._form is not form:
                form = self._form
                values, stream = form.bind(*args, **kwargs)
        form(values, stream)

    def settle(self, release: str | None) -> None:
        """Put the row of this release in force; the first one if none is of it."""
        fitting = [form for form in self._forms if release and fits(form.row, release)]
        self._form = (fitting or self._forms)[0]
        self._settled = release is not None

    def forget(self) -> None:
        """Drop what was learnt from earlier calls, after the source of kernels changed."""
        self._settled = False
        for form in self._forms:
            form.forget()
