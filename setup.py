"""Native kernels (csrc/), built where there is a compiler; everything else is declared in pyproject.toml.

They know neither Python's nor torch's binary interface: plain shared libraries, one per instruction set, that
``engine/backends/native.py`` loads. Without a C++20 compiler the installation succeeds without them.
"""

import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

_FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",
    "-fopenmp",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    "-Wno-uninitialized",  # GCC 12 warns of its own AVX-512 headers
    "-Wno-maybe-uninitialized",
]
_AVX2 = ["-mavx2", "-mfma"]
_AVX512 = [*_AVX2, "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mprefer-vector-width=512"]
_AMX = [*_AVX512, "-mamx-tile", "-mamx-bf16"]
_LEVELS = {"baseline": []}
if platform.machine().lower() in {"x86_64", "amd64"}:
    _LEVELS |= {"avx2": _AVX2, "avx512": _AVX512, "amx": _AMX}


class BuildNative(build_ext):
    """Names a library ``_native_<level>.so``; the OpenMP symbols it lacks come from torch's runtime when loaded."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"


setup(
    ext_modules=[
        Extension(
            f"engine.backends._native_{level}",
            ["csrc/kernels.cpp"],
            depends=[str(header) for header in sorted(Path("csrc").glob("*.h"))],
            extra_compile_args=[*_FLAGS, *flags],
            language="c++",
            optional=True,
        )
        for level, flags in _LEVELS.items()
    ],
    cmdclass={"build_ext": BuildNative},
)
