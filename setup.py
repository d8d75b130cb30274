"""Builds the extension module by calling CMake and ninja; everything else is in pyproject.toml and CMakeLists.txt."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """One CMake build for the one extension. The build tree stays in build/, so a rebuild compiles what changed."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        if importlib.util.find_spec("torch") is None:
            raise SystemExit(
                "transferops: torch must be installed before building.\n"
                f"Run:  {sys.executable} -m pip install torch\n"
                f"then: {sys.executable} -m pip install --no-build-isolation .\n"
                "(Without --no-build-isolation, pip builds in an environment of its own that has no torch.)"
            )
        if not any(shutil.which(name) for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name):
            raise SystemExit(
                "transferops: no C++ compiler found. Install one (for example: apt-get install g++) or set CXX."
            )
        build = ROOT / "build" / f"{sys.implementation.cache_tag}-{self.plat_name}"
        arguments = [
            "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            "-DTRANSFEROPS_PYTHON=ON",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_INSTALL_PREFIX={target.parent}",
        ]  # fmt: skip
        for name in (
            "TRANSFEROPS_CUDA",
            "TRANSFEROPS_CUDA_ARCHITECTURES",
            "TRANSFEROPS_WERROR",
            "TRANSFEROPS_SANITIZE",
        ):
            # Not what the build tree keeps from the last time that it was set.
            arguments.append(f"-D{name}={os.environ[name]}" if name in os.environ else f"-U{name}")
        # cmake and ninja from this Python's environment first, whether or not it is activated.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        cmake = shutil.which("cmake", path=path) or "cmake"
        for command in (
            [cmake, "-S", str(ROOT), "-B", str(build), *arguments],
            [cmake, "--build", str(build)],
            [cmake, "--install", str(build)],
        ):
            try:
                subprocess.run(command, check=True, env={**os.environ, "PATH": path})
            except FileNotFoundError:
                raise SystemExit(
                    f"transferops: cmake is missing. Run: {sys.executable} -m pip install cmake ninja"
                ) from None
            except subprocess.CalledProcessError as error:
                raise SystemExit(
                    f"transferops: the build failed (exit {error.returncode}); the reason is above."
                ) from None


setup(ext_modules=[Extension("transferops._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
