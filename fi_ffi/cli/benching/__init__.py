"""What `fi-ffi bench` measures, and how."""
