"""Build fastopt: a Python package, its CPU kernels (fastopt/_C.so) where torch and a C++ compiler
are found, and its CUDA kernels (fastopt/_CUDA.so) where torch is one for CUDA and nvcc is found.

The kernels touch torch only through its stable C ABI. So one library serves every torch >= 2.10
and every Python, and building it takes torch's headers, a few -l flags and nothing else: the
compilers are called directly, in parallel, for what changed. Environment:

    CXX                 compiler, g++ unless set (clang++ works too)
    CUDA_HOME           CUDA toolkit, /usr/local/cuda unless set
    FASTOPT_CUDA_ARCHS  GPUs to compile for, "80 90 100" unless set; the newest also as PTX, from
                        which the driver compiles for newer ones
    FASTOPT_BUILD       cpu: the CPU kernels must build, no CUDA kernels; cuda: both must build,
                        whatever torch is for. Warnings are then errors.
                        unset: say what cannot be built and why, and go on without it;
                        the package then works through torch's own kernels
    FASTOPT_SANITIZE    1: build build/sanitize/_C.so instead, with address and undefined-behaviour
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
from typing import NamedTuple

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

NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-DUSE_CUDA",  # else torch's headers hide the current stream
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]
# libtorch alone is linked: it exists in every torch, and in one for CUDA it brings the libraries
# that hold the CUDA part of the stable ABI.
CUDA_LIBRARIES = ["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"]
CUDA_LIBRARIES += ["-lcudart_static", "-lrt", "-ldl", "-lpthread"]

# Every *_kernels.cpp is compiled once per level; csrc/cpu/levels.cpp picks one at run time.
SIMD_LEVELS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    SIMD_LEVELS |= {"avx2": ["-march=x86-64-v3"], "avx512": ["-march=x86-64-v4"]}


class CannotBuild(Exception):
    """Why the kernels cannot be built here, in words for the user."""


class Torch(NamedTuple):
    """The torch whose headers we build with."""

    folder: Path
    version: str
    cuda: str | None  # the CUDA version that it is for

    @property
    def include(self) -> list[str]:
        # -isystem: warnings in torch's headers are not ours to mend.
        headers = self.folder / "include"
        paths = [headers, headers / "torch/csrc/api/include"]
        return ["-Icsrc", *(word for path in paths for word in ("-isystem", str(path)))]


def find_torch() -> Torch:
    spec = importlib.util.find_spec("torch")
    folders = [Path(spec.origin).parent] if spec and spec.origin else []
    # pip's isolated build hides the environment's torch from sys.path. Its headers are all we
    # need, and they stay in the interpreter's own site-packages.
    folders += [Path(sysconfig.get_path(name), "torch") for name in ("platlib", "purelib")]
    for folder in folders:
        if not (folder / "include/torch/csrc/stable/library.h").exists():
            continue
        text = (folder / "version.py").read_text()
        version = re.search(r"__version__ = '(.+?)'", text)
        cuda = re.search(r"^cuda.* = '(.+?)'", text, re.MULTILINE)
        if version and tuple(map(int, version[1].split(".")[:2])) >= MINIMUM_TORCH:
            return Torch(folder, version[1], cuda[1] if cuda else None)
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


def find_cuda() -> Path:
    """The folder of the CUDA toolkit. Not by way of PATH: nvcc there may be a script."""
    named = os.environ.get("CUDA_HOME")
    toolkit = Path(named or "/usr/local/cuda")
    if (toolkit / "bin/nvcc").exists() and (toolkit / "include/cuda_runtime.h").exists():
        return toolkit
    raise CannotBuild(f"no CUDA toolkit was found in {toolkit}; CUDA_HOME names another place")


def cuda_major(toolkit: Path) -> int:
    version = re.search(r"#define CUDA_VERSION (\d+)", (toolkit / "include/cuda.h").read_text())
    return int(version[1]) // 1000 if version else 0


def cpu_units() -> Iterator[tuple[Path, str, list[str]]]:
    """(source, name of its object, flags) of every compiler call for the CPU library."""
    for source in sorted(Path("csrc/cpu").glob("*.cpp")):
        if source.stem.endswith("_kernels"):
            for level, flags in SIMD_LEVELS.items():
                yield source, f"{source.stem}.{level}.o", [f"-DFASTOPT_LEVEL={level}", *flags]
        else:
            yield source, f"{source.stem}.o", []


def cuda_units() -> Iterator[tuple[Path, str, list[str]]]:
    """The same for the CUDA library."""
    for source in sorted(Path("csrc/cuda").glob("*.cu")):
        yield source, f"{source.stem}.o", []


def cuda_compiler(torch: Torch, toolkit: Path, archs: list[str], strict: bool) -> list[str]:
    compiler = [str(toolkit / "bin/nvcc"), *NVCC_FLAGS, *torch.include]
    compiler += [f'-DFASTOPT_CUDA_ARCHS="{" ".join(archs)}"', f"-DFASTOPT_PTX_ARCH={archs[-1]}"]
    compiler += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    compiler += [f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]
    compiler += ["-Werror=all-warnings"] if strict else []
    return compiler


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


def build_cpu_library(strict: bool) -> Path:
    return _build_cpu_library([*OPTIMIZE, "-Werror"] if strict else OPTIMIZE, Path("build/cpu"))


def build_sanitized_library() -> Path:
    return _build_cpu_library(SANITIZE, Path("build/sanitize"))


def _build_cpu_library(flags: list[str], folder: Path) -> Path:
    torch = find_torch()
    compiler = [*find_compiler(), *FLAGS, *flags]
    link = [*compiler, "-shared", f"-L{torch.folder / 'lib'}"]
    compiler += torch.include
    return build(torch, compiler, list(cpu_units()), link, LIBRARIES, folder / "_C.so")


def build_cuda_library(strict: bool) -> Path:
    torch = find_torch()
    if torch.cuda is None and not strict:
        raise CannotBuild(f"torch {torch.version} is not one for CUDA")
    toolkit = find_cuda()
    if torch.cuda is not None and cuda_major(toolkit) > int(torch.cuda.split(".")[0]):
        # We link a runtime of this toolkit; a driver that is new enough for torch may refuse it.
        raise CannotBuild(
            f"the CUDA toolkit in {toolkit} is of a later major version than torch's CUDA"
            f" {torch.cuda}; CUDA_HOME names another"
        )
    archs = os.environ.get("FASTOPT_CUDA_ARCHS", "80 90 100").split()
    if not archs or not all(map(str.isdecimal, archs)):
        raise CannotBuild(
            f'FASTOPT_CUDA_ARCHS must be numbers, as "80 90", not {" ".join(archs)!r}'
        )
    archs.sort(key=int)
    compiler = cuda_compiler(torch, toolkit, archs, strict)
    link = [*find_compiler(), "-shared", f"-L{torch.folder / 'lib'}", f"-L{toolkit / 'lib64'}"]
    return build(
        torch, compiler, list(cuda_units()), link, CUDA_LIBRARIES, Path("build/cuda/_CUDA.so")
    )


def build(
    torch: Torch,
    compiler: list[str],
    units: list[tuple[Path, str, list[str]]],
    link: list[str],
    libraries: list[str],
    target: Path,
) -> Path:
    """Compile what changed of `units`, link it, and return the library, somewhere beside `target`.

    Objects of other flags, another torch or another set of sources are never mixed in.
    """
    key = repr((compiler, torch.version, units, link, libraries))
    folder = target.parent / hashlib.sha256(key.encode()).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / target.name

    def modified(path: Path) -> float:
        return path.stat().st_mtime if path.exists() else 0.0

    shared = max(map(modified, [Path("setup.py"), *Path("csrc").rglob("*.h")]))
    stale = [
        ([*compiler, *extra, "-c", str(source)], folder / name)
        for source, name, extra in units
        if modified(folder / name) < max(shared, modified(source))
    ]
    start = time.monotonic()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda call: run(*call), stale))

    objects = [folder / name for _, name, _ in units]
    if modified(library) < max(map(modified, objects)):
        run([*link, *map(str, objects), *libraries], library)
        print(
            f"fastopt: {target.name}: {len(stale)} of {len(units)} compiler calls and a link,"
            f" {time.monotonic() - start:.0f} s (torch {torch.version})",
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


# What is built, and under which FASTOPT_BUILD it has to be.
BUILDERS = {
    "fastopt._C": (build_cpu_library, ("cpu", "cuda")),
    "fastopt._CUDA": (build_cuda_library, ("cuda",)),
}


class BuildLibraries(build_ext):
    """Builds each library of the package that can be built here."""

    def run(self) -> None:
        if os.environ.get("FASTOPT_SANITIZE") == "1":
            place(build_sanitized_library(), Path("build/sanitize/_C.so"))
        else:
            super().run()

    def build_extension(self, ext: Extension) -> None:
        asked = os.environ.get("FASTOPT_BUILD", "")
        if asked not in ("", "cpu", "cuda"):
            raise SystemExit(f"FASTOPT_BUILD must be cpu, cuda or unset, got {asked!r}")
        builder, needed_for = BUILDERS[ext.name]
        strict = asked in needed_for
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            if asked and not strict:
                raise CannotBuild(f"FASTOPT_BUILD={asked}")
            place(builder(strict), target)
        except CannotBuild as reason:
            if strict:
                raise SystemExit(f"fastopt: {target.name} was not built: {reason}") from None
            if ext.name == "fastopt._C":
                print(
                    f"\nfastopt: BUILDING WITHOUT THE CPU KERNELS: {reason}\n"
                    "The package works all the same, with torch's own kernels.\n",
                    file=sys.stderr,
                )
            elif not asked:
                print(f"fastopt: no CUDA kernels: {reason}", file=sys.stderr)
            target.unlink(missing_ok=True)  # never ship what an earlier build left there
            self.distribution.ext_modules = [
                other for other in self.distribution.ext_modules if other is not ext
            ]

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


if __name__ == "__main__":  # tools/ imports what stands above
    setup(
        ext_modules=[
            Extension("fastopt._C", [str(source) for source, _, _ in cpu_units()]),
            Extension("fastopt._CUDA", [str(source) for source, _, _ in cuda_units()]),
        ],
        cmdclass={"build_ext": BuildLibraries, "bdist_wheel": Wheel},
    )
