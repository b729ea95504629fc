"""The matrix: every op, for every GPU, of a release and a CUDA tag."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fi_ffi.ops import attention as public
from fi_ffi.ops.functions import OPS
from fi_ffi.ops.moe import interface as moe
from fi_ffi.ops.row import Row
from fi_ffi.ops.support.answer import Support
from fi_ffi.ops.support.attention import SAMPLES, answer
from fi_ffi.ops.support.judge import Interface, judge
from fi_ffi.ops.support.packages import forms_of_packages
from fi_ffi.ops.support.question import Question

# Those that FlashInfer's wheels are made for, and a Jetson: ten times the capability.
SMS = (75, 80, 87, 89, 90, 100, 103, 110, 120, 121)


@dataclass(frozen=True)
class Line:
    """An op, or one way to ask for it; `options` says which."""

    op: str
    options: str
    family: str
    ask: Callable[[Question], Support]

    @property
    def name(self) -> str:
        return f"{self.op} ({self.options})" if self.options else self.op


def lines() -> Iterator[Line]:
    """Every op of the table, and what is called by packages of their own."""
    for name, op in OPS.items():

        def ask(question: Question, name: str = name) -> Support:
            return judge(name, OPS[name].rows, question)

        yield Line(name, "", op.row.module, ask)
    for package, name, forms in forms_of_packages():

        def of_forms(
            question: Question, name: str = name, forms: tuple[Row, ...] = forms
        ) -> Support:
            return judge(name, forms, question)

        yield Line(name, "", package, of_forms)
    yield Line("cutlass_fused_moe", "", moe.MODULE, _fused_moe)
    for name in public.__all__:
        if not hasattr(getattr(public, name), "supports"):
            continue
        for label, options in SAMPLES.get(name, {"": {}}).items():

            def of_options(
                question: Question, name: str = name, options: Mapping[str, Any] = options
            ) -> Support:
                return answer(name, question, options)

            yield Line(name, label, "attention", of_options)


def _fused_moe(question: Question) -> Support:
    forms = [Interface(one.releases, moe.MODULE, "run_moe", (9,)) for one in moe.INTERFACES]
    return judge("cutlass_fused_moe", forms, question)


def matrix(
    release: str | None = None,
    cuda: str | None = None,
    kernels: str | None = None,
    sms: tuple[int, ...] = SMS,
    cpu: str = "",
) -> dict[str, dict[int, Support]]:
    """The answer for each line and each SM."""
    questions = {sm: Question.of(sm, release, cuda, None, kernels) for sm in sms}
    if cpu:
        questions = {sm: replace(question, cpu=cpu) for sm, question in questions.items()}
    return {
        line.name: {sm: line.ask(question) for sm, question in questions.items()}
        for line in lines()
    }
