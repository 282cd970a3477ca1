"""Which kernels serve here, and why not: environment variables, the libraries that were built, the
SIMD level of the CPU, the family of kernels for GPUs.

Importing this loads the libraries, whose kernels then wait in the dispatcher for the schemas of
ops.py.
"""

import ctypes
import functools
import importlib.util
import json
import os
import platform
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch

# All read once: changing the environment later changes nothing.
ALWAYS = os.environ.get("FASTOPT_ALWAYS") == "1"
DEBUG = os.environ.get("FASTOPT_DEBUG") == "1"
VERBOSE = os.environ.get("FASTOPT_VERBOSE") == "1"
CHECK = os.environ.get("FASTOPT_CHECK") != "0"
BACKEND = os.environ.get("FASTOPT_BACKEND") or None
if BACKEND not in (None, "cuda", "triton", "reference"):
    raise ValueError(f"FASTOPT_BACKEND must be cuda, triton, reference or unset, got {BACKEND!r}")


class MissingKernelsWarning(UserWarning):
    """Kernels of fastopt that this machine could use are missing; torch's own do their work."""


# What setup.py wrote about its build of this package; nothing where it never ran.
_BUILD_JSON = Path(__file__).with_name("_build.json")
_BUILD: dict[str, Any] = json.loads(_BUILD_JSON.read_text()) if _BUILD_JSON.exists() else {}
# Whether somebody chose to do without kernels, so that there is nothing to warn of.
UNWANTED = BACKEND == "reference" or "none" in (
    _BUILD.get("asked"),
    os.environ.get("FASTOPT_BUILD"),
)
# What the user should hear of at import.
problems: list[str] = []


def warn_of_missing_kernels() -> None:
    """Once, at the import of the package, on the line that imports it."""
    if problems and not UNWANTED:
        warnings.warn(
            f"fastopt works without some of its kernels: {'; '.join(problems)}.\n"
            "`python -m fastopt` tells what serves instead; FASTOPT_BUILD=none silences this.",
            MissingKernelsWarning,
            stacklevel=3,
        )


_OLDEST_TORCH, _NEWEST_TESTED_TORCH = (2, 10), (2, 15)
# The machines of the ELF header, so that a library of another one is called that. Within one, every
# CPU runs the baseline kernels.
_MACHINES = {62: "x86_64", 183: "aarch64"}


def _load_cpu_library() -> tuple[Path | None, str | None]:
    if BACKEND == "reference":
        return None, "FASTOPT_BACKEND=reference"
    named = os.environ.get("FASTOPT_LIBRARY")
    path = Path(named or Path(__file__).with_name("_C.so"))
    if path.exists():
        return _load(path)
    reason = f"FASTOPT_LIBRARY={path} does not exist" if named else _why_not_built("_C")
    problems.append(reason)
    return None, reason


def _load_cuda_library() -> tuple[Path | None, str | None]:
    if BACKEND not in (None, "cuda"):
        return None, f"FASTOPT_BACKEND={BACKEND}"
    if torch.version.cuda is None:
        return None, f"torch {torch.__version__} is not one for CUDA"
    path = _cuda_library_path()
    if path.exists():
        return _load(path)
    return None, f"{_why_not_built('_CUDA')}; for CUDA 13, pip install fastopt[cuda13] brings it"


def _cuda_library_path() -> Path:
    """Where a build from source puts the CUDA library; else that of the package fastopt-cuda13."""
    own = Path(__file__).with_name("_CUDA.so")
    spec = None if own.exists() else importlib.util.find_spec("fastopt_cuda13")
    return own if spec is None or spec.origin is None else Path(spec.origin).with_name(own.name)


def _why_not_built(name: str) -> str:
    reason = _BUILD.get("left_out", {}).get(f"fastopt.{name}")
    if reason is not None:
        return f"{name}.so was not built ({reason})"
    if _BUILD:
        return f"{name}.so was built, and is gone; install fastopt again"
    return f"{name}.so was not built; in a checkout: python setup.py build_ext --inplace"


def _load(path: Path) -> tuple[Path | None, str | None]:
    reason = _why_not_to_load(path)
    if reason is None:
        try:
            torch.ops.load_library(path)
            return path, None
        except OSError as error:
            reason = f"{path.name} does not load: {error.__cause__ or error}"  # torch hides why
            if torch_version() > _NEWEST_TESTED_TORCH:
                newest = "{}.{}".format(*_NEWEST_TESTED_TORCH)
                reason += f" (torch {newest} is the newest that it was tested with)"
    problems.append(reason)
    return None, reason


def torch_version() -> tuple[int, ...]:
    return tuple(map(int, torch.__version__.split(".")[:2]))


def _why_not_to_load(path: Path) -> str | None:
    """What can be said about a library before it is loaded, which would register its kernels."""
    from fastopt import __version__  # the package imports this module

    content = path.read_bytes()
    version = re.search(rb"fastopt_version=([^\0]*)", content)
    machine = _MACHINES.get(int.from_bytes(content[18:20], "little"))
    if content[:4] == b"\x7fELF" and machine not in (None, platform.machine()):
        return f"{path.name} was built for {machine}, and this is {platform.machine()}"
    if version is None or version[1].decode() != __version__:
        of = "another version" if version is None else f"version {version[1].decode()}"
        return f"{path.name} is one of fastopt's {of}, not {__version__}; build or install it again"
    if torch_version() < _OLDEST_TORCH:
        oldest = "{}.{}".format(*_OLDEST_TORCH)
        return f"torch {torch.__version__} is too old for {path.name}; {oldest} is the oldest"
    return None


CPU_LIBRARY, CPU_LIBRARY_ERROR = _load_cpu_library()
CUDA_LIBRARY, CUDA_LIBRARY_ERROR = _load_cuda_library()


def simd_level() -> str | None:
    """The SIMD level of the CPU kernels in use: avx512, avx2 or baseline; None without them."""
    if CPU_LIBRARY is None:
        return None
    level = ctypes.CDLL(str(CPU_LIBRARY)).fastopt_simd_level
    level.restype = ctypes.c_char_p
    return level().decode()


def _why_not_triton() -> str | None:
    """Why the Triton kernels do not serve GPUs; None where they do."""
    if CUDA_LIBRARY is not None:
        return "the CUDA library serves"
    if BACKEND not in (None, "triton"):
        return f"FASTOPT_BACKEND={BACKEND}"
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is not one for GPUs"
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return "the package triton is not installed"
    if _compiles_launchers(Path(spec.origin).read_text()) and not any(
        map(shutil.which, [os.environ.get("CC", "cc"), "gcc", "clang"])
    ):
        return "this version of triton needs a C compiler, and none was found"
    return None


def _compiles_launchers(source: str) -> bool:
    """Whether a Triton whose __init__.py this is compiles C when its kernels are first launched, as
    all did before 3.9."""
    version = re.search(r"__version__ = ['\"](\d+)\.(\d+)", source)
    return version is None or tuple(map(int, version.groups())) < (3, 9)


TRITON_ERROR = _why_not_triton()
# The family of kernels that serves GPUs: cuda, triton, or None.
GPU_FAMILY = "cuda" if CUDA_LIBRARY is not None else "triton" if TRITON_ERROR is None else None


def has_code_for(capability: tuple[int, int], archs: list[int]) -> bool:
    """Whether a library compiled for `archs` (80, 90, ...) runs on a GPU of this compute capability:
    code runs on later minor versions, PTX (that of the last arch) on everything later.
    """
    major, minor = capability
    own = 10 * major + minor
    return own >= archs[-1] or any(arch // 10 == major and arch <= own for arch in archs)


@functools.cache
def why_not_gpu(index: int) -> str | None:
    """Why our kernels do not run on this GPU; None where they do. Asked once for each: a library
    that the driver refuses would otherwise raise in every call that it took from torch."""
    if CUDA_LIBRARY is None:
        return None if GPU_FAMILY is not None or BACKEND == "reference" else "no kernels for GPUs"
    reason = _why_not_cuda_library(index, torch.cuda.get_device_capability(index))
    if reason is not None:
        warnings.warn(
            f"fastopt: torch's own kernels serve on cuda:{index}: {CUDA_LIBRARY.name} {reason}",
            MissingKernelsWarning,
            stacklevel=2,
        )
    return reason


def _why_not_cuda_library(index: int, capability: tuple[int, int]) -> str | None:
    library = ctypes.CDLL(str(CUDA_LIBRARY))
    archs, why_not = library.fastopt_cuda_archs, library.fastopt_cuda_why_not
    archs.restype = why_not.restype = ctypes.c_char_p
    why_not.argtypes = [ctypes.c_int]
    compiled_for = archs().decode()
    if not has_code_for(capability, list(map(int, compiled_for.split()))):
        own = "{}{}".format(*capability)
        return f"has no code for sm_{own}, only for {compiled_for} (FASTOPT_CUDA_ARCHS)"
    error = why_not(index)
    return None if error is None else f"cannot run here, says CUDA: {error.decode()}"


def serves_gpu(index: int) -> bool:
    """Whether our kernels run on this GPU."""
    return why_not_gpu(index) is None


# A constant under torch.compile. torch.compiler.assume_constant_result does this and no more, but
# imports Dynamo, and Triton with it.
serves_gpu._dynamo_marked_constant = True  # type: ignore[attr-defined]
