"""The contract between the faces and the kernels: every op's schema, and its shapes under tracing.

The dispatcher is the table of kernels. The C++ library registers its kernels under the CPU key;
the CUDA library, or without it the Triton launchers (fastopt/kernels), under the CUDA key, which
is ROCm's too; plain torch (reference.py) sits at the default key and serves every device without
kernels. backends.py has loaded the libraries and knows who serves. Meaning (what stock accepts,
promotion, errors) is decided in loss.py; memory safety in the launchers.

SGD has no op: its step passes one table of raw addresses, which no kernel could check, so it must
not be callable as torch.ops (see optim.py).
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastopt import backends, layouts, reference

# SymInt: torch.compile would compile anew for every other int.
_OPTIONS = "Tensor? weight, SymInt ignore_index, float label_smoothing, int reduction"

# logits: (C), (N, C) or (N, C, d1, ...). target: int64 class indices (N, d1, ...), or probabilities
# shaped like logits. weight: (C), in the accumulation type (float32; float64 for float64 logits).
# reduction: 0 none, 1 mean, 2 sum.
SCHEMAS = {
    "cross_entropy_forward": f"(Tensor logits, Tensor target, {_OPTIONS}, ScalarType loss_dtype)"
    " -> Tensor loss",
    # grad_logits * unit is the gradient for an upstream gradient of 1 (with reduction none, of each
    # row's loss). unit: 0-dim, float32; 1 but for float16 logits, whose gradient for 1 would lose most
    # of its elements: it waits for the upstream gradient as multiples of a power of two, times what the
    # mean divides by. largest_mass: 0-dim, float32, what no row's sum of |target mass| exceeds (1 where
    # it is not given); of float16 logits only.
    "cross_entropy_forward_backward": f"(Tensor logits, Tensor target, {_OPTIONS},"
    " ScalarType loss_dtype, Tensor? largest_mass=None)"
    " -> (Tensor loss, Tensor grad_logits, Tensor unit)",
    # In place, by an upstream gradient that stays on the device: one, where 1 costs nothing noticeable,
    # or (on CPU) one for each row. Where it is inf or NaN, ignored rows are 0 and what has mass is NaN:
    # the true class, or all of them (smoothed, or probabilities).
    "cross_entropy_scale_": "(Tensor(a!) grad_logits, Tensor factor, Tensor target,"
    " SymInt ignore_index, bool smoothed) -> ()",
}

library = torch.library.Library("fastopt", "DEF")
for _name, _schema in SCHEMAS.items():
    library.define(_name + _schema)
    torch.library.impl(f"fastopt::{_name}", "default", getattr(reference, _name), lib=library)
# What backward makes of a saved gradient (loss.py), for compilers: opaque, as torch's takes the buffers
# of a graph that is kept for its own and writes over them in place of a product.
library.define(
    "cross_entropy_times(Tensor grad_logits, Tensor grad_loss, Tensor? unit, Tensor target,"
    " SymInt ignore_index, bool smoothed, int reduction) -> Tensor"
)


def _triton_launcher(name: str) -> Callable[..., Any]:
    """Triton is imported by the first call: it takes a second, and may be broken."""

    def launch(*arguments: Any) -> Any:
        return getattr(importlib.import_module("fastopt.kernels.cross_entropy"), name)(*arguments)

    return launch


if backends.GPU_FAMILY == "triton":
    for _name in SCHEMAS:
        torch.library.impl(f"fastopt::{_name}", "CUDA", _triton_launcher(_name), lib=library)


def _empty_loss(logits: Tensor, reduction: int, loss_dtype: torch.dtype) -> Tensor:
    shape = layouts.row_shape(logits.shape) if reduction == 0 else ()
    return logits.new_empty(shape, dtype=loss_dtype)


@torch.library.register_fake("fastopt::cross_entropy_forward", lib=library)
def _(logits, target, weight, ignore_index, label_smoothing, reduction, loss_dtype):
    return _empty_loss(logits, reduction, loss_dtype)


@torch.library.register_fake("fastopt::cross_entropy_forward_backward", lib=library)
def _(
    logits, target, weight, ignore_index, label_smoothing, reduction, loss_dtype, largest_mass=None
):
    loss = _empty_loss(logits, reduction, loss_dtype)
    unit = logits.new_empty((), dtype=torch.float32)
    return loss, layouts.empty_gradient(logits), unit


@torch.library.register_fake("fastopt::cross_entropy_scale_", lib=library)
def _(grad_logits, *others):
    return None


@torch.library.register_fake("fastopt::cross_entropy_times", lib=library)
def _(grad_logits, grad_loss, *others):
    return torch.empty_like(grad_logits)


cross_entropy_forward = torch.ops.fastopt.cross_entropy_forward.default
cross_entropy_forward_backward = torch.ops.fastopt.cross_entropy_forward_backward.default
cross_entropy_scale_ = torch.ops.fastopt.cross_entropy_scale_.default
cross_entropy_times = torch.ops.fastopt.cross_entropy_times.default
