"""`python -m fi_ffi`: the `fi-ffi` command."""

from fi_ffi.cli import main

main(prog_name="fi-ffi")
