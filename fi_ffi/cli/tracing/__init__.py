"""What `fi-ffi trace` is made of: FlashInfer-Bench definitions of calls."""
