"""Fetching what is not on this machine: pinned wheels, device code, HTTP, resumed downloads."""
