"""Build fastopt-cuda13: fastopt's CUDA library in a wheel of its own, by the setup.py of fastopt, two
folders up, whose docstring names what can be set."""

import importlib.util
import os
import re
from pathlib import Path

from setuptools import Extension, setup

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

spec = importlib.util.spec_from_file_location("fastopt_setup", ROOT / "setup.py")
fastopt = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fastopt)  # goes to the root, as it does for its own build
os.chdir(HERE)


class BuildLibrary(fastopt.BuildLibraries):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        os.chdir(ROOT)
        try:
            major = fastopt.cuda_major(fastopt.find_cuda())
            if major != 13:
                raise fastopt.CannotBuild(f"the CUDA toolkit is of version {major}, not 13")
            fastopt.place(fastopt.build_cuda_library(strict=True), target)
        except fastopt.CannotBuild as reason:
            raise SystemExit(f"fastopt-cuda13: {target.name} was not built: {reason}") from None
        finally:
            os.chdir(HERE)


version = re.search(r'__version__ = "(.+)"', (ROOT / "fastopt/__init__.py").read_text())[1]
setup(
    version=version,
    install_requires=[
        f"fastopt=={version}"
    ],  # the kernels are called by the Python of that version
    ext_modules=[Extension("fastopt_cuda13._CUDA", [])],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": fastopt.Wheel},
)
