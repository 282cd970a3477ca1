"""Build fastopt: a Python package, its CPU kernels (fastopt/_C.so), its CUDA kernels
(fastopt/_CUDA.so) where torch is one for CUDA and nvcc is found, and a record of what was built
(fastopt/_build.json), which fastopt/backends.py reads.

The kernels touch torch only through its stable C ABI. So one library serves every torch >= 2.10
and every Python, and building it takes torch's headers, a few -l flags and nothing else: the
compilers are called directly, in parallel, for what changed. Environment:

    CXX                 compiler, g++ unless set (clang++ works too); a cross compiler for another
                        Linux gives libraries for that
    CUDA_HOME           CUDA toolkit, /usr/local/cuda unless set
    FASTOPT_CUDA_ARCHS  GPUs to compile for, "80 90 100" unless set; the newest also as PTX, from
                        which the driver compiles for newer ones
    FASTOPT_BUILD       cpu: the CPU kernels alone; cuda: both, whatever torch is for; in both
                        cases warnings of the compilers are errors. none: no kernels, torch's own
                        do the work.
                        unset: on Linux the CPU kernels, and CUDA's where there is something to
                        build them with and for; elsewhere none.
                        What has to be built and cannot be ends the build, with one paragraph
                        about what is missing and what mends it.
    FORCE_CUDA          1: FASTOPT_BUILD=cuda, as other libraries for torch have it
    FASTOPT_SANITIZE    1: build build/sanitize/_C.so instead, with address and undefined-behaviour
                        sanitizers (`make sanitize`; FASTOPT_LIBRARY=PATH loads it); with
                        FASTOPT_SIMD, the kernels of that level alone
"""

import filecmp
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# That of pyproject.toml, for builds that are not isolated. Those of Python 3.10's and 3.11's venv
# know neither its license nor bdist_wheel. torch 2.11 wants one below 82.
SETUPTOOLS = "setuptools>=77,<82"
if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"fastopt: setuptools {setuptools.__version__} is too old to build it;"
        f' upgrade it by: pip install "{SETUPTOOLS}"'
    )
from setuptools.command.bdist_wheel import bdist_wheel

os.chdir(Path(__file__).resolve().parent)  # so that sources are named the same wherever we start

VERSION = re.findall(
    r'^__version__ = "(.+)"', Path("fastopt/__init__.py").read_text(), re.MULTILINE
)[0]
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
    f'-DFASTOPT_VERSION="{VERSION}"',
]
# -O3 unrolls and copies loops that are vectors already: twice the time to compile, the same speed.
OPTIMIZE = ["-O2"]
SANITIZE = [
    "-O1",
    "-g1",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
]
# Nothing is exported but what Python calls, and libstdc++ stands before torch's libraries: those
# export some of its functions without a version, and ours would be bound to them.
LINK = ["-shared", "-Wl,--version-script=csrc/exports.map"]
LIBRARIES = ["-lstdc++", "-Wl,--no-as-needed", "-ltorch_cpu", "-Wl,--as-needed"]

NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-DUSE_CUDA",  # else torch's headers hide the current stream
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    f'-DFASTOPT_VERSION="{VERSION}"',
]
# libtorch alone is linked: it exists in every torch, and in one for CUDA it brings the libraries
# that hold the CUDA part of the stable ABI.
CUDA_LIBRARIES = ["-lstdc++", "-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"]
CUDA_LIBRARIES += ["-lrt", "-ldl", "-lpthread"]

# Every unit that names FASTOPT_LEVEL is compiled once per level; csrc/cpu/levels.cpp picks one at
# run time.
BASELINE = {"baseline": []}
X86_LEVELS = BASELINE | {"avx2": ["-march=x86-64-v3"], "avx512": ["-march=x86-64-v4"]}

# The glibc of torch's own wheels (manylinux_2_28), and so the newest that ours may ask for.
GLIBC = (2, 28)


# An isolated build sees no torch but pip's, so what has to be there is installed first.
AGAIN = "`pip install --no-build-isolation .`"
WITH_TORCH = (
    f'`pip install "torch>={".".join(map(str, MINIMUM_TORCH))}" "{SETUPTOOLS}"`, then {AGAIN}'
    " (with uv: `uv pip install` for both)"
)


class CannotBuild(Exception):
    """Why the kernels cannot be built here, in words for the user, what mends it, and what a
    compiler has to say about it."""

    def __init__(self, reason: str, mend: str, output: str = "") -> None:
        super().__init__(reason)
        self.mend = mend
        self.output = output


class NoCuda(CannotBuild):
    """There is nothing to build CUDA kernels with or for: an error only if they were asked for."""


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


def torch_folders() -> Iterator[Path]:
    spec = importlib.util.find_spec("torch")
    if spec and spec.origin:
        yield Path(spec.origin).parent
    # pip's isolated build hides the environment's torch by way of PYTHONPATH. Its headers are all
    # we need, and this interpreter, started without such variables, knows where they are.
    ask = "from importlib.util import find_spec; print(find_spec('torch').origin)"
    answer = subprocess.run(
        [sys.executable, "-E", "-c", ask], check=False, capture_output=True, text=True
    )
    if answer.returncode == 0:
        yield Path(answer.stdout.strip()).parent


def find_torch() -> Torch:
    wanted = ".".join(map(str, MINIMUM_TORCH))
    reason = f"no torch >= {wanted} was found by {sys.executable} (nor seen from an isolated build)"
    for folder in torch_folders():
        if not (folder / "version.py").exists():
            continue
        text = (folder / "version.py").read_text()
        version = re.search(r"__version__ = '(.+?)'", text)
        cuda = re.search(r"^cuda.* = '(.+?)'", text, re.MULTILINE)
        if not version or tuple(map(int, version[1].split(".")[:2])) < MINIMUM_TORCH:
            reason = f"{folder} holds torch {version and version[1]}, and {wanted} is the oldest"
        elif not (folder / "include/torch/csrc/stable/library.h").exists():
            reason = f"torch {version[1]} in {folder} has no C++ headers"
        else:
            return Torch(folder, version[1], cuda[1] if cuda else None)
    raise CannotBuild(reason, WITH_TORCH)


def find_compiler() -> list[str]:
    named = os.environ.get("CXX")
    for command in [named] if named else ["g++", "c++", "clang++"]:
        words = shlex.split(command)
        if shutil.which(words[0]):
            return words
    raise CannotBuild(
        f"no C++ compiler was found ({named or 'g++'} is not on PATH)",
        f"`apt install g++` (Debian, Ubuntu) or `dnf install gcc-c++` (Fedora), then {AGAIN};"
        " CXX names another compiler",
    )


def target_machine(compiler: list[str]) -> str:
    """The machine that a compiler compiles for, as platform.machine() names it."""
    asked = subprocess.run(
        [*compiler, "-dumpmachine"], check=False, stdout=subprocess.PIPE, text=True
    )
    return asked.stdout.strip().partition("-")[0] or platform.machine()


def find_cuda() -> Path:
    """The folder of the CUDA toolkit. Not by way of PATH: nvcc there may be a script."""
    named = os.environ.get("CUDA_HOME")
    toolkit = Path(named or "/usr/local/cuda")
    if (toolkit / "bin/nvcc").exists() and (toolkit / "include/cuda_runtime.h").exists():
        return toolkit
    raise NoCuda(
        f"no CUDA toolkit was found in {toolkit}", f"`CUDA_HOME=/path/to/cuda` before {AGAIN}"
    )


def cuda_major(toolkit: Path) -> int:
    version = re.search(r"#define CUDA_VERSION (\d+)", (toolkit / "include/cuda.h").read_text())
    return int(version[1]) // 1000 if version else 0


# (source, name of its object, flags) of one compiler call.
Unit = tuple[Path, str, list[str]]


def sources(folder: str, suffix: str) -> Iterator[tuple[Path, str]]:
    """Every source below a folder of csrc/, and a name for its objects."""
    for source in sorted(Path("csrc", folder).rglob(f"*{suffix}")):
        yield source, "_".join(source.with_suffix("").parts[2:])


def host_units() -> list[Unit]:
    """What the CPU and the CUDA library have in common."""
    return [(source, f"{name}.o", []) for source, name in sources("host", ".cpp")]


def cpu_units(machine: str, only: str | None = None) -> Iterator[Unit]:
    levels = X86_LEVELS if machine == "x86_64" else BASELINE
    yield from host_units()
    for source, name in sources("cpu", ".cpp"):
        if "FASTOPT_LEVEL" in source.read_text():
            for level, flags in levels.items():
                if only in (level, None):
                    yield source, f"{name}.{level}.o", [f"-DFASTOPT_LEVEL={level}", *flags]
        else:
            yield source, f"{name}.o", []


def cuda_units() -> list[Unit]:
    return [(source, f"{name}.o", []) for source, name in sources("cuda", ".cu")]


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
        raise CannotBuild(
            f"this command failed, with the output above: {shlex.join(command)}",
            "another compiler may do (g++ 11 or clang 14 and later):"
            " `CXX=clang++ pip install --no-build-isolation .`",
            result.stdout,
        )
    if result.stdout:
        print(result.stdout, file=sys.stderr)  # warnings
    os.utime(unfinished, (start, start))
    os.replace(unfinished, output)


def build_cpu_library(strict: bool) -> Path:
    return _build_cpu_library([*OPTIMIZE, "-Werror"] if strict else OPTIMIZE, Path("build/cpu"))


def build_sanitized_library() -> Path:
    # Of every level's kernels it takes minutes, and one level is what the tests run.
    level = os.environ.get("FASTOPT_SIMD")
    flags = [*SANITIZE, f"-DFASTOPT_ONE_LEVEL={level}"] if level else SANITIZE
    return _build_cpu_library(flags, Path("build/sanitize"), level or None)


def _build_cpu_library(flags: list[str], folder: Path, level: str | None = None) -> Path:
    torch = find_torch()
    compiler = [*find_compiler(), *FLAGS, *flags]
    machine = target_machine(compiler)
    foreign = machine != platform.machine()
    libraries = stand_in(compiler, folder / machine) if foreign else torch.folder / "lib"
    link = [*compiler, *LINK, f"-L{libraries}"]
    compiler += torch.include
    return build(
        torch, compiler, list(cpu_units(machine, level)), link, LIBRARIES, folder / "_C.so"
    )


def stand_in(compiler: list[str], folder: Path) -> Path:
    """A folder with an empty library in the place of torch's, which is not for the machine that is
    compiled for: its name is all that the linker needs to write down."""
    folder.mkdir(parents=True, exist_ok=True)
    library = "libtorch_cpu.so"
    run([*compiler, "-shared", f"-Wl,-soname,{library}", "-x", "c++", os.devnull], folder / library)
    return folder


def build_cuda_library(strict: bool) -> Path:
    torch = find_torch()
    if torch.cuda is None and not strict:
        raise NoCuda(f"torch {torch.version} is not one for CUDA", WITH_TORCH)
    toolkit = find_cuda()
    if torch.cuda is not None and cuda_major(toolkit) > int(torch.cuda.split(".")[0]):
        # We link a runtime of this toolkit; a driver that is new enough for torch may refuse it.
        raise NoCuda(
            f"the CUDA toolkit in {toolkit} is of a later major version than torch's CUDA"
            f" {torch.cuda}",
            f"`CUDA_HOME=/path/to/another` before {AGAIN}",
        )
    archs = os.environ.get("FASTOPT_CUDA_ARCHS", "80 90 100").split()
    if not archs or not all(map(str.isdecimal, archs)):
        raise SystemExit(f'FASTOPT_CUDA_ARCHS must be numbers, as "80 90", not {" ".join(archs)!r}')
    archs.sort(key=int)
    compiler = cuda_compiler(torch, toolkit, archs, strict)
    units = [*cuda_units(), *host_units()]
    link = [*find_compiler(), *LINK, f"-L{torch.folder / 'lib'}"]
    runtime = old_glibc(toolkit / "lib64/libcudart_static.a", Path("build/cuda"))
    libraries = [str(runtime), *CUDA_LIBRARIES]
    return build(torch, compiler, units, link, libraries, Path("build/cuda/_CUDA.so"))


def old_glibc(archive: Path, folder: Path) -> Path:
    """A copy of a static library that asks for no glibc newer than GLIBC where that had the function
    too. (glibc 2.34 gave all of pthread and dl a new version when it took them in.)"""
    compiler = find_compiler()
    ask = [*compiler, "-print-file-name=libc.so.6"]
    libc = subprocess.run(ask, check=False, stdout=subprocess.PIPE, text=True).stdout.strip()
    names = ["nm", "-D", "--defined-only", "--with-symbol-versions", "--format=just-symbols", libc]
    listed = subprocess.run(names, check=False, stdout=subprocess.PIPE, text=True).stdout
    new: set[str] = set()
    old: dict[str, tuple[tuple[int, ...], str]] = {}
    for name, at, version in re.findall(r"^(\w+)(@@?)GLIBC_([\d.]+)$", listed, re.MULTILINE):
        number = tuple(map(int, version.split(".")))
        if number <= GLIBC:
            old[name] = max(old.get(name, ((), "")), (number, f"{name}@GLIBC_{version}"))
        elif at == "@@":
            new.add(name)
    folder.mkdir(parents=True, exist_ok=True)
    renames = folder / "old_glibc.txt"
    renames.write_text("".join(f"{name} {old[name][1]}\n" for name in sorted(new & old.keys())))
    copy = folder / archive.name
    shutil.copyfile(archive, copy)
    subprocess.run(["objcopy", f"--redefine-syms={renames}", copy], check=True)
    return copy


def build(
    torch: Torch,
    compiler: list[str],
    units: list[Unit],
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

    shared = max(
        map(modified, [Path("setup.py"), Path("csrc/exports.map"), *Path("csrc").rglob("*.h")])
    )
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


BUILDERS = {"fastopt._C": build_cpu_library, "fastopt._CUDA": build_cuda_library}
# What to do without the kernels that cannot be built.
WITHOUT = {
    "fastopt._C": "`FASTOPT_BUILD=none pip install .` installs fastopt for torch's own kernels only",
    "fastopt._CUDA": "`FASTOPT_BUILD=cpu pip install .` builds the CPU kernels alone,"
    " `FASTOPT_BUILD=none pip install .` none at all",
}
RECORD = Path("fastopt/_build.json")


def asked_for() -> str:
    """What FASTOPT_BUILD says: none, cpu, cuda or nothing."""
    asked = os.environ.get("FASTOPT_BUILD", "")
    if asked not in ("", "none", "cpu", "cuda"):
        raise SystemExit(f"FASTOPT_BUILD must be none, cpu, cuda or unset, got {asked!r}")
    return "cuda" if not asked and os.environ.get("FORCE_CUDA") == "1" else asked


def left_out(name: str, asked: str) -> str | None:
    """Why this library is not even tried."""
    if asked == "none" or (asked == "cpu" and name == "fastopt._CUDA"):
        return f"FASTOPT_BUILD={asked}"
    if not asked and platform.system() != "Linux":
        return f"fastopt has no kernels for {platform.system()} yet"
    return None


class BuildLibraries(build_ext):
    """Builds each library of the package that can be built here, or says why it has to be and
    cannot. setuptools' own compilers have no part in it."""

    def run(self) -> None:
        if os.environ.get("FASTOPT_SANITIZE") == "1":
            place(build_sanitized_library(), Path("build/sanitize/_C.so"))
            return
        asked = asked_for()
        names = [ext.name for ext in self.extensions]
        reasons = {}
        for name in BUILDERS:  # a wheel comes here twice, then without what was left out before
            target = Path(self.build_lib, self.get_ext_filename(name))
            reason = self.build_library(name, asked, target)
            if reason is not None:
                reasons[name] = reason
                target.unlink(missing_ok=True)  # never ship what an earlier build left there
                if name in names and reason != f"FASTOPT_BUILD={asked}":  # who asked knows it
                    print(f"fastopt: without {target.name}: {reason}", file=sys.stderr)
        self.extensions = [ext for ext in self.extensions if ext.name not in reasons]
        self.distribution.ext_modules = self.extensions

        built = [ext.name for ext in self.extensions]
        kernels = "cuda" if "fastopt._CUDA" in built else "cpu" if built else "none"
        record = {"version": VERSION, "asked": asked, "kernels": kernels, "left_out": reasons}
        target = Path(self.build_lib, RECORD)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(record, indent=1) + "\n")
        if self.inplace:
            self.copy_extensions_to_source()

    def build_library(self, name: str, asked: str, target: Path) -> str | None:
        """Builds it, or returns why the package does without it."""
        reason = left_out(name, asked)
        if reason is not None:
            return reason
        try:
            place(BUILDERS[name](strict=asked != ""), target)
        except CannotBuild as error:
            if not asked and isinstance(error, NoCuda):
                return str(error)
            raise SystemExit(
                f"{error.output}\nfastopt: {target.name} cannot be built: {error}.\n"
                f"To mend that: {error.mend}.\nTo do without: {WITHOUT[name]}."
            ) from None
        return None

    def get_ext_filename(self, fullname: str) -> str:
        # Not a Python module: no interpreter's suffix.
        return os.path.join(*fullname.split(".")) + ".so"

    def copy_extensions_to_source(self) -> None:  # --inplace and editable installs
        for target in (*map(Path, map(self.get_ext_filename, BUILDERS)), RECORD):
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


if __name__ == "__main__":  # tools/ and packaging/cuda13/setup.py import what stands above
    setup(
        ext_modules=[
            Extension("fastopt._C", [str(source) for source in Path("csrc").rglob("*.cpp")]),
            Extension("fastopt._CUDA", [str(source) for source in Path("csrc").rglob("*.cu")]),
        ],
        cmdclass={"build_ext": BuildLibraries, "bdist_wheel": Wheel},
    )
