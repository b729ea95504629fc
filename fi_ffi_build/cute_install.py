"""CuTe DSL and torch, in folders of their own beside the environments of a build.

FlashInfer, and others, compile kernels of CuTe DSL for the tensors of a call, which takes torch.
FlashInfer's other generators do without both.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from packaging.specifiers import SpecifierSet

from fi_ffi.loader.machine import CUDA_MAJORS
from fi_ffi_build.environment import Environment, Say, install, make_once

NAME = "nvidia-cutlass-dsl"
CUTE_TORCH = "torch==2.13.0"
# The compiler of CuTe DSL and its parts. Its other requirements run or disassemble kernels.
CUTE_DSL = "4.7.1"
_CUTE_PARTS = ("", "-libs-base", "-libs-core", f"-libs-cu{CUDA_MAJORS[0]}")
_CUTE_NEEDS = ("cuda-bindings>=13,<14", "cuda-pathfinder", "numpy", "typing-extensions")


@dataclass(frozen=True)
class CuteDsl:
    """CuTe DSL in its own folder: its packages, and the folder of its runtime library."""

    packages: Path

    @property
    def runtime(self) -> Path:
        return self.packages / "nvidia_cutlass_dsl" / f"cu{CUDA_MAJORS[0]}" / "lib"


def install_cute_dsl(environment: Environment, accepted: SpecifierSet, say: Say) -> CuteDsl:
    """Install a version of CuTe DSL that is accepted, the tested one if possible."""
    wanted = f"=={CUTE_DSL}" if accepted.contains(CUTE_DSL, prereleases=True) else str(accepted)
    folder = environment.root.with_name(f"cute-dsl{re.sub(r'[^0-9a-z.]+', '-', wanted)}")
    parts = [f"{NAME}{part}{wanted}" for part in _CUTE_PARTS]

    def make() -> None:
        say(f"installing {NAME}{wanted}")
        shutil.rmtree(folder, ignore_errors=True)
        # Without dependencies, which are a second compiler, for CUDA 12, and a disassembler.
        install(environment, "--no-deps", "--target", str(folder), *parts, *_CUTE_NEEDS)

    content = {"parts": " ".join(parts), "needs": " ".join(_CUTE_NEEDS)}
    make_once(folder, folder, content | {"python": environment.site_packages.parent.name}, make)
    return CuteDsl(folder)


def install_torch(environment: Environment, say: Say) -> Path:
    """Install torch into a folder beside the environments, which share it; return the folder."""
    python = environment.site_packages.parent.name
    folder = environment.root.with_name(f"torch-{CUTE_TORCH.partition('==')[2]}-{python}")

    def make() -> None:
        say(f"installing {CUTE_TORCH}, which CuTe DSL needs")
        shutil.rmtree(folder, ignore_errors=True)
        install(environment, "--target", str(folder), CUTE_TORCH)

    make_once(folder, folder, {"requirement": CUTE_TORCH}, make)
    return folder
