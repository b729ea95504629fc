"""Writing of a wheel of kernel modules in the layout of `flashinfer-jit-cache`.

Equal modules give equal bytes: members are sorted and have a fixed time. The wheel appears under
its name only when it is complete.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import tempfile
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = "flashinfer_jit_cache"
# The tag of FlashInfer's own wheels. No library in them depends on Python.
PYTHON_TAG = "cp39-abi3"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that zip can store


@dataclass(frozen=True)
class WheelContents:
    """The contents of one wheel.

    `modules` maps a module's name to its .so; `architectures` are names such as "sm90a"; `cuda` is
    the compiler's release, such as "13.0"; `licenses` maps file names to files.
    """

    release: str
    cuda: str
    architectures: tuple[str, ...]
    platform: str
    modules: Mapping[str, Path]
    git_version: str = "unknown"
    licenses: Mapping[str, Path] = field(default_factory=dict)

    @property
    def version(self) -> str:
        """`0.6.13+cu130.sm90a`: wheels for different GPUs need different names."""
        return f"{self.release}+" + ".".join(
            ["cu" + self.cuda.replace(".", ""), *self.architectures]
        )

    @property
    def filename(self) -> str:
        return f"{PACKAGE}-{self.version}-{PYTHON_TAG}-{self.platform}.whl"

    @property
    def dist_info(self) -> str:
        return f"{PACKAGE}-{self.version}.dist-info"


_INIT = '''\
"""Kernels of FlashInfer {release} for {gpus}, compiled with CUDA {cuda}."""

from collections import namedtuple
from pathlib import Path

from ._build_meta import __git_version__, __version__, architectures, modules

_Provider = namedtuple(
    "_Provider", "provider_id distribution version jit_cache_dir cuda_architectures modules"
)


def get_jit_cache_dir():
    """Folder that has `<module>/<module>.so`; asked for by FlashInfer up to 0.7.0."""
    return str(Path(__file__).parent / "jit_cache")


def get_jit_cache_providers():
    """The same folder in the form that FlashInfer asks for from 0.7.0.post1 on."""
    return (
        _Provider(
            provider_id="local",
            distribution="flashinfer-jit-cache",
            version=__version__,
            jit_cache_dir=get_jit_cache_dir(),
            cuda_architectures=architectures,
            modules=modules,
        ),
    )
'''

_BUILD_META = '''\
"""What this wheel holds and how it was compiled."""

__version__ = {version!r}
__git_version__ = {git_version!r}
cuda = {cuda!r}
architectures = {architectures!r}
modules = {modules!r}
'''

_METADATA = """\
Metadata-Version: 2.1
Name: flashinfer-jit-cache
Version: {version}
Summary: Kernels of FlashInfer {release} for {gpus}, compiled with CUDA {cuda}
License: Apache-2.0
Keywords: {keywords}
Requires-Python: >=3.9
Description-Content-Type: text/plain

Compiled from the flashinfer-python {release} release by `fi-ffi build`; not a wheel
published by FlashInfer. Modules:
{listed}
"""

_WHEEL = """\
Wheel-Version: 1.0
Generator: fi-ffi
Root-Is-Purelib: false
Tag: {tag}
"""


def _texts(wheel: WheelContents) -> dict[str, str]:
    """Return the generated members, without RECORD."""
    names = tuple(sorted(wheel.modules))
    values = {
        "release": wheel.release,
        "version": wheel.version,
        "git_version": wheel.git_version,
        "cuda": wheel.cuda,
        "architectures": wheel.architectures,
        "modules": names,
        "gpus": ", ".join(wheel.architectures),
        "keywords": ",".join(["flashinfer", "cuda", *wheel.architectures]),
        "listed": "\n".join(f"- {name}" for name in names),
        "tag": f"{PYTHON_TAG}-{wheel.platform}",
    }
    templates = {
        f"{PACKAGE}/__init__.py": _INIT,
        f"{PACKAGE}/_build_meta.py": _BUILD_META,
        f"{wheel.dist_info}/METADATA": _METADATA,
        f"{wheel.dist_info}/WHEEL": _WHEEL,
    }
    return {name: template.format_map(values) for name, template in templates.items()}


def _sources(wheel: WheelContents) -> dict[str, bytes | Path]:
    """Return every member but RECORD, in the archive's order: dist-info last."""
    members: dict[str, bytes | Path] = {
        f"{PACKAGE}/jit_cache/{name}/{name}.so": path for name, path in wheel.modules.items()
    }
    members.update((name, text.encode()) for name, text in _texts(wheel).items())
    members.update(
        (f"{wheel.dist_info}/licenses/{name}", path) for name, path in wheel.licenses.items()
    )
    return dict(sorted(members.items(), key=lambda item: (".dist-info/" in item[0], item[0])))


def _write_members(archive: zipfile.ZipFile, wheel: WheelContents) -> None:
    record: list[tuple[str, str, int | str]] = []

    def write(name: str, content: bytes) -> None:
        info = zipfile.ZipInfo(name, date_time=_EPOCH)
        info.compress_type = zipfile.ZIP_DEFLATED
        info.create_system = 3  # Unix: the upper half of external_attr is a file mode
        info.external_attr = (0o100755 if name.endswith(".so") else 0o100644) << 16
        archive.writestr(info, content)
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=")
        record.append((name, f"sha256={digest.decode()}", len(content)))

    for name, source in _sources(wheel).items():
        write(name, source.read_bytes() if isinstance(source, Path) else source)
    own_name = f"{wheel.dist_info}/RECORD"
    lines = io.StringIO()
    csv.writer(lines, lineterminator="\n").writerows([*record, (own_name, "", "")])
    write(own_name, lines.getvalue().encode())


def write_wheel(wheel: WheelContents, output: Path) -> Path:
    """Write `wheel` into the folder `output`, replacing an older one; return its path."""
    output.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=output, prefix=f".{PACKAGE}-", suffix=".part")
    try:
        with os.fdopen(handle, "w+b") as file, zipfile.ZipFile(file, "w") as archive:
            _write_members(archive, wheel)
        os.chmod(temporary, 0o644)  # mkstemp's mode would hide the wheel from other users
        os.replace(temporary, output / wheel.filename)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
    return output / wheel.filename
