"""What benchmarks/host.py measures, a module for each part, and what attention.py shares."""

from __future__ import annotations


class Wrong(Exception):
    """A result that is not what the numpy reference says: there is no figure for it."""


class Missing(Exception):
    """What a figure cannot be taken without; says what."""
