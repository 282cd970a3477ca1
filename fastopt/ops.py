"""The contract between the faces and the kernels: every op's schema, its shapes under tracing,
and which kernel serves which device.

The dispatcher is the table of kernels. The C++ library registers its kernels under the CPU key;
plain torch (reference.py) sits at the default key and serves every device without kernels.
Schemas are defined here, before any graph is captured. Meaning (what stock accepts, promotion,
errors) is decided in loss.py; memory safety in the C++ launchers.

SGD has no op: its step passes one table of raw addresses, which no kernel could check, so it must
not be callable as torch.ops (see optim.py).
"""

import ctypes
import os
import warnings
from pathlib import Path

import torch
from torch import Tensor

from fastopt import reference

# All read once: changing the environment later changes nothing.
ALWAYS = os.environ.get("FASTOPT_ALWAYS") == "1"
BACKEND = os.environ.get("FASTOPT_BACKEND") or None
if BACKEND not in (None, "reference"):
    raise ValueError(f"FASTOPT_BACKEND must be reference or unset, got {BACKEND!r}")

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
for _name in (
    "cross_entropy_forward",
    "cross_entropy_forward_backward",
    "cross_entropy_backward",
    "cross_entropy_backward_target",
):
    torch.library.impl(f"fastopt::{_name}", "default", getattr(reference, _name), lib=_library)


def _load_cpu_library() -> tuple[Path | None, str | None]:
    if BACKEND == "reference":
        return None, "FASTOPT_BACKEND=reference"
    path = Path(os.environ.get("FASTOPT_LIBRARY") or Path(__file__).with_name("_C.so"))
    if not path.exists():
        if "FASTOPT_LIBRARY" in os.environ:
            return None, f"FASTOPT_LIBRARY={path} does not exist"
        return None, f"{path.name} was not built (torch or a C++ compiler was missing)"
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
CUDA_LIBRARY: Path | None = None


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


cross_entropy_forward = torch.ops.fastopt.cross_entropy_forward.default
cross_entropy_forward_backward = torch.ops.fastopt.cross_entropy_forward_backward.default
cross_entropy_backward = torch.ops.fastopt.cross_entropy_backward.default
cross_entropy_backward_target = torch.ops.fastopt.cross_entropy_backward_target.default
