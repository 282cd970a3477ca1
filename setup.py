"""Build fastopt: a Python package and, where torch and a C++ compiler are found, its CPU kernels.

The kernels touch torch only through its stable C ABI. So one `fastopt/_C.so` serves every
torch >= 2.10 and every Python, and building it takes torch's headers, three -l flags and nothing
else: the compiler is called directly, in parallel, for what changed. Environment:

    CXX               compiler, g++ unless set (clang++ works too)
    FASTOPT_BUILD     cpu: the kernels must build, and warnings are errors.
                      unset: without torch or a compiler, say so and go on without kernels;
                      the package then works through torch's own
    FASTOPT_SANITIZE  1: build build/sanitize/_C.so instead, with address and undefined-behaviour
                      sanitizers (`make sanitize`; FASTOPT_LIBRARY=PATH loads it)
"""

import filecmp
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

os.chdir(Path(__file__).resolve().parent)  # so that sources are named the same wherever we start

MINIMUM_TORCH = (2, 10)
FLAGS = [
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-fopenmp-simd",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]
OPTIMIZE = ["-O3"]
SANITIZE = [
    "-O1",
    "-g1",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
]
LIBRARIES = ["-ltorch", "-ltorch_cpu", "-lc10"]

# Every *_kernels.cpp is compiled once per level; csrc/cpu/levels.cpp picks one at run time.
SIMD_LEVELS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    SIMD_LEVELS |= {"avx2": ["-march=x86-64-v3"], "avx512": ["-march=x86-64-v4"]}


class CannotBuild(Exception):
    """Why the kernels cannot be built here, in words for the user."""


def find_torch() -> tuple[Path, str]:
    """The folder and version of the torch whose headers we build with."""
    spec = importlib.util.find_spec("torch")
    folders = [Path(spec.origin).parent] if spec and spec.origin else []
    # pip's isolated build hides the environment's torch from sys.path. Its headers are all we
    # need, and they stay in the interpreter's own site-packages.
    folders += [Path(sysconfig.get_path(name), "torch") for name in ("platlib", "purelib")]
    for folder in folders:
        if not (folder / "include/torch/csrc/stable/library.h").exists():
            continue
        version = re.search(r"__version__ = '(.+?)'", (folder / "version.py").read_text())
        if version and tuple(map(int, version[1].split(".")[:2])) >= MINIMUM_TORCH:
            return folder, version[1]
    raise CannotBuild(
        f"torch >= {'.'.join(map(str, MINIMUM_TORCH))} was not found by {sys.executable};"
        " install it first, and build with `pip install --no-build-isolation .`"
    )


def find_compiler() -> list[str]:
    named = os.environ.get("CXX")
    for command in [named] if named else ["g++", "c++", "clang++"]:
        words = shlex.split(command)
        if shutil.which(words[0]):
            return words
    raise CannotBuild(
        f"no C++ compiler was found ({named or 'g++'} is not on PATH);"
        " on Debian and Ubuntu: apt install g++"
    )


def cpu_units() -> Iterator[tuple[Path, str, list[str]]]:
    """(source, name of its object, flags) of every compiler call for the CPU library."""
    for source in sorted(Path("csrc/cpu").glob("*.cpp")):
        if source.stem.endswith("_kernels"):
            for level, flags in SIMD_LEVELS.items():
                yield source, f"{source.stem}.{level}.o", [f"-DFASTOPT_LEVEL={level}", *flags]
        else:
            yield source, f"{source.stem}.o", []


def run(command: list[str], output: Path) -> None:
    """Run a compiler or linker call. Its output appears whole, dated to the start of the call: an
    interrupted build, a second build beside it or an edit in mid-compilation does no harm."""
    start = time.time()
    unfinished = output.with_suffix(f".{os.getpid()}.tmp")
    command = [*command, "-o", str(unfinished)]
    result = subprocess.run(
        command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if result.returncode:
        raise CannotBuild(f"this command failed:\n{shlex.join(command)}\n{result.stdout}")
    if result.stdout:
        print(result.stdout, file=sys.stderr)  # warnings
    os.utime(unfinished, (start, start))
    os.replace(unfinished, output)


def build_cpu_library(flags: list[str], folder: Path) -> Path:
    """Compile csrc/cpu as far as it changed, link it, and return the library under `folder`."""
    torch, torch_version = find_torch()
    compiler = [*find_compiler(), *FLAGS, *flags]
    # -isystem: warnings in torch's headers are not ours to mend.
    include = ["-Icsrc", f"-isystem{torch / 'include'}"]
    include.append(f"-isystem{torch / 'include/torch/csrc/api/include'}")
    units = list(cpu_units())

    # Objects of other flags, another torch or another set of sources are never mixed in.
    key = repr((compiler, torch_version, include, units))
    folder /= hashlib.sha256(key.encode()).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "_C.so"

    def modified(path: Path) -> float:
        return path.stat().st_mtime if path.exists() else 0.0

    shared = max(map(modified, [Path("setup.py"), *Path("csrc").rglob("*.h")]))
    stale = [
        ([*compiler, *include, *extra, "-c", str(source)], folder / name)
        for source, name, extra in units
        if modified(folder / name) < max(shared, modified(source))
    ]
    start = time.monotonic()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda call: run(*call), stale))

    objects = [folder / name for _, name, _ in units]
    if modified(library) < max(map(modified, objects)):
        link = [*compiler, "-shared", *map(str, objects), f"-L{torch / 'lib'}", *LIBRARIES]
        run(link, library)
        print(
            f"fastopt: {len(stale)} of {len(units)} compiler calls and a link,"
            f" {time.monotonic() - start:.0f} s (torch {torch_version})",
            file=sys.stderr,
        )
    return library


def place(library: Path, target: Path) -> None:
    """Put `library` at `target` in one step: a process may have the old file mapped."""
    if target.exists() and filecmp.cmp(library, target, shallow=False):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_suffix(f".{os.getpid()}.tmp")
    shutil.copyfile(library, fresh)
    os.replace(fresh, target)


class BuildLibraries(build_ext):
    """Builds each library of the package. A CUDA library is one more Extension with its own
    `build_..._library`, and one more line in `build_extension`."""

    def run(self) -> None:
        if os.environ.get("FASTOPT_SANITIZE") == "1":
            place(build_cpu_library(SANITIZE, Path("build/sanitize")), Path("build/sanitize/_C.so"))
        else:
            super().run()

    def build_extension(self, ext: Extension) -> None:
        strict = os.environ.get("FASTOPT_BUILD", "")
        if strict not in ("", "cpu"):
            raise SystemExit(f"FASTOPT_BUILD must be cpu or unset, got {strict!r}")
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            flags = [*OPTIMIZE, "-Werror"] if strict else OPTIMIZE
            place(build_cpu_library(flags, Path("build/cpu")), target)
        except CannotBuild as reason:
            if strict:
                raise SystemExit(f"fastopt: the CPU kernels were not built: {reason}") from None
            print(
                f"\nfastopt: BUILDING WITHOUT THE CPU KERNELS: {reason}\n"
                "The package works all the same, with torch's own kernels.\n",
                file=sys.stderr,
            )
            target.unlink(missing_ok=True)  # never ship what an earlier build left there
            self.distribution.ext_modules = []

    def get_ext_filename(self, fullname: str) -> str:
        # Not a Python module: no interpreter's suffix.
        return os.path.join(*fullname.split(".")) + ".so"

    def copy_extensions_to_source(self) -> None:  # --inplace and editable installs
        for ext in self.extensions:
            target = Path(self.get_ext_filename(ext.name))
            built = Path(self.build_lib, target)
            if built.exists():
                place(built, target)
            else:
                target.unlink(missing_ok=True)


class Wheel(bdist_wheel):
    """Tags the wheel by what is in it: the library is bound to the platform, not to a Python."""

    def run(self) -> None:
        self.run_command("build")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        if self.root_is_pure:
            return "py3", "none", "any"
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("fastopt._C", [str(source) for source, _, _ in cpu_units()])],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": Wheel},
)
