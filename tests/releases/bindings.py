"""The releases that rows are held against.

`RELEASES` are all that are known here; `--all` takes each.  Without it only `SOME` are read:
those of which the lock pins kernels, and the newest.
"""

from __future__ import annotations

from fi_ffi.catalogue.ahead_of_time import known_releases
from fi_ffi.loader.fetch.wheels_lock import the_lock

RELEASES = known_releases()
SOME = {file.release for file in the_lock().kernels} | {RELEASES[-1]}
