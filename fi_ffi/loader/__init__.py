"""Kernel files: pinning, fetching, verifying, caching, finding, loading and building."""
