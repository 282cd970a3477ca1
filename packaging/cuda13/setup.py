"""Build fastopt-cuda13: fastopt's CUDA library in a wheel of its own, by the setup.py of fastopt, two
folders up, whose docstring names what can be set."""

import importlib.util
import os
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

spec = importlib.util.spec_from_file_location("fastopt_setup", ROOT / "setup.py")
fastopt = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fastopt)  # goes to the root, as it does for its own build
os.chdir(HERE)


class BuildLibrary(build_ext):
    def run(self) -> None:
        target = Path(self.build_lib, "fastopt_cuda13/_CUDA.so").resolve()
        os.chdir(ROOT)
        try:
            major = fastopt.cuda_major(fastopt.find_cuda())
            if major != 13:
                raise SystemExit(f"fastopt-cuda13: the CUDA toolkit is of version {major}, not 13")
            fastopt.place(fastopt.build_cuda_library(strict=True), target)
        except fastopt.CannotBuild as error:
            raise SystemExit(
                f"{error.output}\nfastopt-cuda13: {target.name} cannot be built: {error}.\n"
                f"To mend that: {error.mend}."
            ) from None
        finally:
            os.chdir(HERE)


setup(
    version=fastopt.VERSION,
    install_requires=[f"fastopt=={fastopt.VERSION}"],  # whose Python calls the kernels
    ext_modules=[Extension("fastopt_cuda13._CUDA", [])],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": fastopt.Wheel},
)
