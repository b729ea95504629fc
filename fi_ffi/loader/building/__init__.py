"""Making kernel wheels from FlashInfer's sources; `build.py` has the way in."""
