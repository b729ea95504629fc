"""Files: what is pinned, fetched, verified, cached, found, loaded and built."""
