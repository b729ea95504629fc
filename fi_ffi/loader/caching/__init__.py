"""The parts of the cache; `fi_ffi.loader.cache` is the way in."""
