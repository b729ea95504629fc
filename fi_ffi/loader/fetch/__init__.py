"""Fetching what is not on this machine: HTTP, ranges of wheels, resumed downloads, progress."""
