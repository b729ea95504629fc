"""Judges what can be called where: op by op, for a GPU, a FlashInfer release and a CUDA tag.

    answer = fi_ffi.rmsnorm.supports(sm=90)
    if not answer: print(answer.reason, answer.build)

The answer follows from the op's rows and from an artifact: the kernels in use, or the record of
what FlashInfer builds into its wheels. The record is used if a release or a CUDA tag is named, or
if there are no kernels. Nothing is fetched.
"""
