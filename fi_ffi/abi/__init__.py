"""TVM-FFI's C interface, packed by hand over cffi."""
