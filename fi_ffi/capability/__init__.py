"""Judges what can be called where: op by op, for a GPU, a FlashInfer release and a CUDA tag.

    answer = fi_ffi.rmsnorm.supports(sm=90)
    if not answer: print(answer.reason, answer.build)

The answer follows from the op's rows and from the kernels that a call would find: the same search
is asked (`loader.search.ask`). If a release or a CUDA tag is named, and for a pinned wheel that is
not here, the record of what FlashInfer builds into its wheels counts. Nothing is fetched.
"""
