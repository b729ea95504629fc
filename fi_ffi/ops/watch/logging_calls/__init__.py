"""What `fi_ffi.call_log` is made of: told calls, their words, statistics, and dumps."""
