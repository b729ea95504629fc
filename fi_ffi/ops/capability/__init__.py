"""What can be called where: op by op, for a GPU, a release of FlashInfer and a CUDA tag.

    answer = fi_ffi.rmsnorm.supports(sm=90)
    if not answer:
        print(answer.reason, answer.build)

The answer follows from the op's rows and from an artifact: the kernels in use, or where a
release or a CUDA tag is named (or there are no kernels), the record of what FlashInfer
builds into its wheels.  Nothing is fetched for it.
"""
