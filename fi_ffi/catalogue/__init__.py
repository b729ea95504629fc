"""What FlashInfer's artifacts and releases have, by name, for listings, advice and the judge.

Loading a kernel needs none of it: `fi_ffi` puts `catalogue.advice` into the slot of
`fi_ffi.loader.services`, which words what is missing.
"""
