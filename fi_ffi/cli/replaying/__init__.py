"""What `fi-ffi replay` is made of: dumps read, calls made again, results compared."""
