"""The contract between the faces and the kernels: every op's schema, its shapes under tracing,
and which kernel serves which device.

The dispatcher is the table of kernels. The C++ library registers its kernels under the CPU key;
the CUDA library, or without it the Triton launchers (fastopt/kernels), under the CUDA key, which
is ROCm's too; plain torch (reference.py) sits at the default key and serves every device without
kernels. Schemas are defined here, before any graph is captured. Meaning (what stock accepts,
promotion, errors) is decided in loss.py; memory safety in the launchers.

SGD has no op: its step passes one table of raw addresses, which no kernel could check, so it must
not be callable as torch.ops (see optim.py).
"""

import ctypes
import functools
import importlib
import importlib.util
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastopt import reference

# All read once: changing the environment later changes nothing.
ALWAYS = os.environ.get("FASTOPT_ALWAYS") == "1"
DEBUG = os.environ.get("FASTOPT_DEBUG") == "1"
BACKEND = os.environ.get("FASTOPT_BACKEND") or None
if BACKEND not in (None, "cuda", "triton", "reference"):
    raise ValueError(f"FASTOPT_BACKEND must be cuda, triton, reference or unset, got {BACKEND!r}")

_OPTIONS = "Tensor? weight, int ignore_index, float label_smoothing, int reduction"
_KEPT = "Tensor row_max, Tensor row_sum, Tensor total_weight"

_library = torch.library.Library("fastopt", "DEF")
# logits: (C), (N, C) or (N, C, d1, ...). target: int64 class indices (N, d1, ...), or probabilities
# shaped like logits. weight: (C), in the accumulation type (float32; float64 for float64 logits).
# reduction: 0 none, 1 mean, 2 sum. row_max, row_sum: shaped like the unreduced loss, accumulation
# type; row_sum = sum_c exp(logits_c - row_max). total_weight: 0-dim, what the mean divides by.
_library.define(
    f"cross_entropy_forward(Tensor logits, Tensor target, {_OPTIONS}, ScalarType loss_dtype)"
    " -> (Tensor loss, Tensor row_max, Tensor row_sum, Tensor total_weight)"
)
# mean and sum only: the gradient is for an upstream gradient of 1.
_library.define(
    f"cross_entropy_forward_backward(Tensor logits, Tensor target, {_OPTIONS},"
    " ScalarType loss_dtype) -> (Tensor loss, Tensor grad_logits)"
)
_library.define(
    f"cross_entropy_backward(Tensor grad_loss, Tensor logits, Tensor target, {_OPTIONS}, {_KEPT})"
    " -> Tensor grad_logits"
)
_library.define(
    "cross_entropy_backward_target(Tensor grad_loss, Tensor logits, Tensor target,"
    f" {_OPTIONS}, {_KEPT}) -> Tensor grad_target"
)
# In place, by a 0-dim upstream gradient that stays on the device; 1 costs nothing noticeable.
_library.define("cross_entropy_scale_(Tensor(a!) grad_logits, Tensor grad_loss) -> ()")

OPS = (
    "cross_entropy_forward",
    "cross_entropy_forward_backward",
    "cross_entropy_backward",
    "cross_entropy_backward_target",
    "cross_entropy_scale_",
)
for _name in OPS:
    torch.library.impl(f"fastopt::{_name}", "default", getattr(reference, _name), lib=_library)


def _load_cpu_library() -> tuple[Path | None, str | None]:
    if BACKEND == "reference":
        return None, "FASTOPT_BACKEND=reference"
    path = Path(os.environ.get("FASTOPT_LIBRARY") or Path(__file__).with_name("_C.so"))
    if "FASTOPT_LIBRARY" in os.environ and not path.exists():
        return None, f"FASTOPT_LIBRARY={path} does not exist"
    return _load(path, "torch or a C++ compiler was missing")


def _load_cuda_library() -> tuple[Path | None, str | None]:
    if BACKEND not in (None, "cuda"):
        return None, f"FASTOPT_BACKEND={BACKEND}"
    if torch.version.cuda is None:
        return None, f"torch {torch.__version__} is not one for CUDA"
    path = Path(__file__).with_name("_CUDA.so")
    return _load(path, "torch for CUDA, a CUDA toolkit or a C++ compiler was missing")


def _load(path: Path, missing: str) -> tuple[Path | None, str | None]:
    if not path.exists():
        return None, f"{path.name} was not built ({missing})"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        warnings.warn(
            f"fastopt: {path.name} does not load, torch's own kernels serve instead: {error}",
            stacklevel=2,
        )
        return None, str(error)
    return path, None


CPU_LIBRARY, CPU_LIBRARY_ERROR = _load_cpu_library()
CUDA_LIBRARY, CUDA_LIBRARY_ERROR = _load_cuda_library()


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
def _runs_on(index: int) -> bool:
    if CUDA_LIBRARY is None:
        return GPU_FAMILY is not None or BACKEND == "reference"
    archs = ctypes.CDLL(str(CUDA_LIBRARY)).fastopt_cuda_archs
    archs.restype = ctypes.c_char_p
    return has_code_for(torch.cuda.get_device_capability(index), list(map(int, archs().split())))


def serves_gpu(index: int) -> bool:
    """Whether our kernels run on this GPU."""
    return _runs_on(index)


# A constant under torch.compile. torch.compiler.assume_constant_result does this and no more, but
# imports Dynamo, and Triton with it.
serves_gpu._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _triton_launcher(name: str) -> Callable[..., Any]:
    """Triton is imported by the first call: it takes a second, and may be broken."""

    def launch(*arguments: Any) -> Any:
        return getattr(importlib.import_module("fastopt.kernels.cross_entropy"), name)(*arguments)

    return launch


if GPU_FAMILY == "triton":
    for _name in OPS:
        torch.library.impl(f"fastopt::{_name}", "CUDA", _triton_launcher(_name), lib=_library)


def simd_level() -> str | None:
    """The SIMD level of the CPU kernels in use: avx512, avx2 or baseline; None without them."""
    if CPU_LIBRARY is None:
        return None
    level = ctypes.CDLL(str(CPU_LIBRARY)).fastopt_simd_level
    level.restype = ctypes.c_char_p
    return level().decode()


def _accumulate_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _row_shape(logits: Tensor) -> torch.Size:
    return logits.shape[:0] if logits.dim() == 1 else logits.shape[:1] + logits.shape[2:]


@torch.library.register_fake("fastopt::cross_entropy_forward", lib=_library)
def _(logits, target, weight, ignore_index, label_smoothing, reduction, loss_dtype):
    accumulate = _accumulate_dtype(logits)
    rows = _row_shape(logits)
    loss = logits.new_empty(rows if reduction == 0 else (), dtype=loss_dtype)
    row_max = logits.new_empty(rows, dtype=accumulate)
    return loss, row_max, torch.empty_like(row_max), logits.new_empty((), dtype=accumulate)


@torch.library.register_fake("fastopt::cross_entropy_forward_backward", lib=_library)
def _(logits, target, weight, ignore_index, label_smoothing, reduction, loss_dtype):
    return logits.new_empty((), dtype=loss_dtype), reference.empty_gradient(logits)


@torch.library.register_fake("fastopt::cross_entropy_backward", lib=_library)
def _(grad_loss, logits, target, *options_and_kept):
    return reference.empty_gradient(logits)


@torch.library.register_fake("fastopt::cross_entropy_backward_target", lib=_library)
def _(grad_loss, logits, target, *options_and_kept):
    return reference.empty_gradient(target)


@torch.library.register_fake("fastopt::cross_entropy_scale_", lib=_library)
def _(grad_logits, grad_loss):
    return None


cross_entropy_forward = torch.ops.fastopt.cross_entropy_forward.default
cross_entropy_forward_backward = torch.ops.fastopt.cross_entropy_forward_backward.default
cross_entropy_backward = torch.ops.fastopt.cross_entropy_backward.default
cross_entropy_backward_target = torch.ops.fastopt.cross_entropy_backward_target.default
cross_entropy_scale_ = torch.ops.fastopt.cross_entropy_scale_.default
