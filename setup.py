"""Builds `csrc/` into `vllm_dwdp/device/libdwdp.so`: plain C++17, no torch, no CUDA toolkit.

One shared library with a C ABI serves every Python and every torch, so the wheel is `py3-none`.
"""

import os
import shlex
import subprocess
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

COMPILE_FLAGS = [
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-shared",
    "-pthread",
    "-Wall",
    "-Wextra",
    "-fvisibility=hidden",
]


class BuildNative(build_ext):
    """Compiles with $CXX (default g++) instead of setuptools' C compiler."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Build beside the target and rename: a running server keeps the library it has mapped.
        scratch = target.with_suffix(f".{os.getpid()}.tmp")
        compiler = os.environ.get("CXX", "g++")
        command = [
            *shlex.split(compiler),
            *COMPILE_FLAGS,
            "-o",
            str(scratch),
            *extension.sources,
            "-ldl",
        ]
        try:
            subprocess.run(command, check=True)
        except FileNotFoundError as error:
            raise SystemExit(
                f"vllm-dwdp needs a C++17 compiler to build its copy engine, and {compiler!r} is "
                "not installed. Install g++ (Debian: apt-get install g++) or set CXX."
            ) from error
        scratch.replace(target)


class UniversalWheel(bdist_wheel):
    """The library uses no Python API: one wheel per platform, for every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    ext_modules=[Extension("vllm_dwdp.device.libdwdp", sources=sorted(glob("csrc/*.cpp")))],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": UniversalWheel},
)
