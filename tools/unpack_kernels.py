"""Put the modules of wheels side by side in a folder, which FI_FFI_KERNELS can name.

python tools/unpack_kernels.py FOLDER WHEEL...
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path


def unpack(folder: Path, wheels: list[Path]) -> int:
    """Write `folder/NAME/NAME.so` for each module; how many the folder has then."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if member.endswith(".so"):
                    name = Path(member).name
                    place = folder / Path(name).stem
                    place.mkdir(mode=0o700, exist_ok=True)
                    (place / name).write_bytes(archive.read(member))
    return len(list(folder.iterdir()))


if __name__ == "__main__":
    print(f"{unpack(Path(sys.argv[1]), [*map(Path, sys.argv[2:])])} modules in {sys.argv[1]}")
