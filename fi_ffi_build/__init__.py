"""Building kernel wheels from FlashInfer's sources; the entry point is `build.py`."""
