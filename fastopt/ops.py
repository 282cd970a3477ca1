"""The contract between the faces and the kernels: every op's schema, and its shapes under tracing.

The dispatcher is the table of kernels. The C++ library registers its kernels under the CPU key;
the CUDA library, or without it the Triton launchers (fastopt/kernels), under the CUDA key, which
is ROCm's too; plain torch (reference.py) sits at the default key and serves every device without
kernels. backends.py has loaded the libraries and knows who serves. Meaning (what stock accepts,
promotion, errors) is decided in loss.py; memory safety in the launchers.

SGD has no op: its step passes one table of raw addresses, which no kernel could check, so it must
not be callable as torch.ops (see sgd/).
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastopt import backends, layouts, reference
from fastopt.options import NONE, OPTIONS_SCHEMA, Options
from fastopt.statistics import accumulation_type

# logits: (C), (N, C) or (N, C, d1, ...). target: int64 class indices (N, d1, ...), or probabilities
# shaped like logits. weight: (C), in the accumulation type (float32; float64 for float64 logits).
_ARGUMENTS = f"Tensor logits, Tensor target, Tensor? weight, {OPTIONS_SCHEMA}"
SCHEMAS = {
    "cross_entropy_forward": f"({_ARGUMENTS}) -> Tensor loss",
    # grad_logits * unit is the gradient for an upstream gradient of 1 (with reduction none, of each
    # row's loss). unit: 0-dim, float32; 1 but for float16 logits, whose gradient for 1 would lose most
    # of its elements: it waits for the upstream gradient as multiples of a power of two, times what the
    # mean divides by. largest_mass: 0-dim, float32, what neither a row's sum of |target mass| nor the
    # factor of its softmax exceeds (1 where it is not given); of float16 logits only.
    "cross_entropy_forward_backward": f"({_ARGUMENTS}, Tensor? largest_mass=None)"
    " -> (Tensor loss, Tensor grad_logits, Tensor unit)",
    # The same, into memory of the caller's: any layout whose positions step through memory as one, each
    # element there once. On CPU it may be that of logits, which their gradient then takes the place of.
    "cross_entropy_forward_backward_out": f"({_ARGUMENTS}, Tensor? largest_mass,"
    " Tensor(a!) grad_logits) -> (Tensor loss, Tensor unit)",
    # In place, by an upstream gradient that stays on the device: one, where 1 costs nothing noticeable,
    # or (on CPU) one for each row. Where it is inf or NaN, ignored rows are 0 and what has mass is NaN:
    # the true class, or all of them (smoothed, or probabilities).
    "cross_entropy_scale_": "(Tensor(a!) grad_logits, Tensor factor, Tensor target,"
    " SymInt ignore_index, bool smoothed) -> ()",
}

library = torch.library.Library("fastopt", "DEF")
for _name, _schema in SCHEMAS.items():
    library.define(_name + _schema)
# What backward makes of a saved gradient (loss.py), for compilers: opaque, as torch's takes the buffers
# of a graph that is kept for its own and writes over them in place of a product.
library.define(
    "cross_entropy_times(Tensor grad_logits, Tensor grad_loss, Tensor? unit, Tensor target,"
    " SymInt ignore_index, bool smoothed, int reduction) -> Tensor"
)
# The loss of logits that never exist whole, a loop over the ops above for every device. input: (N, H).
# linear_weight: (C, H). linear_bias: (C). Gradients that are not wanted come back empty; the others
# in the accumulation type, but for grad_weight, which is summed in `accumulate`; for an upstream
# gradient of 1, or, with reduction none, for grad_loss: (N). dtype: that of the logits, to which input,
# linear_weight and linear_bias are rounded first, as autocast has it. rows: how many at a time
# (kernels/linear_cross_entropy.py), 0 for our own rule.
library.define(
    "linear_cross_entropy(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target,"
    f" Tensor? weight, Tensor? grad_loss, {OPTIONS_SCHEMA}, ScalarType dtype, ScalarType accumulate,"
    " SymInt rows, bool wants_input, bool wants_weight, bool wants_bias)"
    " -> (Tensor loss, Tensor grad_input, Tensor grad_weight, Tensor grad_bias)"
)
# The same with logits logit_scale times as large, after softcap (0: none), a loss that has a gradient for
# rows' factors in forward (grad_loss, with reduction sum, which they multiply), and what a softmax says of
# rows (statistics.py; zeros, and -1 for predicted, of ignored rows; with `stats`, else without elements).
# grad_entropy: (N), the upstream gradients of entropy.
library.define(
    "linear_cross_entropy_rows(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target,"
    f" Tensor? weight, Tensor? grad_loss, Tensor? grad_entropy, {OPTIONS_SCHEMA}, ScalarType dtype,"
    " ScalarType accumulate, SymInt rows, float logit_scale, float softcap, bool stats,"
    " bool wants_input, bool wants_weight, bool wants_bias)"
    " -> (Tensor loss, Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor lse,"
    " Tensor entropy, Tensor predicted)"
)
# What backward makes of its gradients, in `dtype` (linear_rows.py). target: where rows of this gradient
# may be ignored.
library.define(
    "linear_cross_entropy_times(Tensor grad, Tensor grad_loss, Tensor? target, SymInt ignore_index,"
    " ScalarType dtype) -> Tensor"
)

# Behind how many tensors an op's options stand.
_TENSORS = {
    "cross_entropy_forward": 3,
    "cross_entropy_forward_backward": 3,
    "cross_entropy_forward_backward_out": 3,
    "linear_cross_entropy": 6,
    "linear_cross_entropy_rows": 7,
}


def flat(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """An op's kernel that takes Options, as the dispatcher calls it: with one argument each."""
    if name not in _TENSORS:
        return kernel
    start = _TENSORS[name]
    end = start + len(Options._fields)

    def call(*arguments: Any) -> Any:
        return kernel(*arguments[:start], Options(*arguments[start:end]), *arguments[end:])

    return call


def register(name: str, key: str, kernel: Callable[..., Any]) -> None:
    torch.library.impl(f"fastopt::{name}", key, flat(name, kernel), lib=library)


def launcher(module: str, name: str) -> Callable[..., Any]:
    """Imported by the first call: Triton takes a second, and may be broken; other modules of kernels
    call ops themselves."""

    def launch(*arguments: Any) -> Any:
        kernels = importlib.import_module(f"fastopt.kernels.{module}")
        return getattr(kernels, name)(*arguments)

    return launch


def triton_launcher(name: str) -> Callable[..., Any]:
    return launcher("cross_entropy.launch", name)


for _name in SCHEMAS:
    register(_name, "default", getattr(reference, _name))
    if backends.GPU_FAMILY == "triton":
        register(_name, "CUDA", triton_launcher(_name))
for _name in ("linear_cross_entropy", "linear_cross_entropy_rows"):
    register(_name, "default", getattr(reference, _name))
    if backends.CPU_LIBRARY is not None:
        register(_name, "CPU", launcher("linear_cross_entropy", _name))


def _fake(name: str) -> Callable[..., Any]:
    return lambda shapes: torch.library.register_fake(
        f"fastopt::{name}", flat(name, shapes), lib=library
    )


def empty_linear_gradients(
    input: Tensor,
    linear_weight: Tensor,
    exact: torch.dtype,
    accumulate: torch.dtype,
    wants_input: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised gradients of input, linear_weight and linear_bias; without elements where not
    wanted."""
    return (
        input.new_empty(input.shape if wants_input else 0, dtype=exact),
        input.new_empty(linear_weight.shape if wants_weight else 0, dtype=accumulate),
        input.new_empty(linear_weight.shape[:1] if wants_bias else 0, dtype=exact),
    )


def _empty_loss(logits: Tensor, options: Options) -> Tensor:
    shape = layouts.row_shape(logits.shape) if options.reduction == NONE else ()
    return logits.new_empty(shape, dtype=options.loss_dtype)


@_fake("cross_entropy_forward")
def _(logits, target, weight, options):
    return _empty_loss(logits, options)


@_fake("cross_entropy_forward_backward")
def _(logits, target, weight, options, largest_mass=None):
    unit = logits.new_empty((), dtype=torch.float32)
    return _empty_loss(logits, options), layouts.empty_gradient(logits), unit


@_fake("cross_entropy_forward_backward_out")
def _(logits, target, weight, options, largest_mass, grad_logits):
    return _empty_loss(logits, options), logits.new_empty((), dtype=torch.float32)


@_fake("cross_entropy_scale_")
def _(grad_logits, *others):
    return None


@_fake("cross_entropy_times")
def _(grad_logits, *others):
    return torch.empty_like(grad_logits)


@_fake("linear_cross_entropy")
def _(input, linear_weight, linear_bias, target, weight, grad_loss, options, dtype, *others):
    accumulate, _rows, *wants = others
    shape = input.shape[:1] if options.reduction == NONE else ()
    loss = input.new_empty(shape, dtype=options.loss_dtype)
    exact = accumulation_type(dtype)
    return loss, *empty_linear_gradients(input, linear_weight, exact, accumulate, *wants)


@_fake("linear_cross_entropy_rows")
def _(input, linear_weight, linear_bias, target, weight, grad_loss, grad_entropy, options, *others):
    dtype, accumulate, _rows, _scale, _softcap, stats, *wants = others
    rows = input.shape[:1]
    exact = accumulation_type(dtype)
    return (
        input.new_empty(rows if options.reduction == NONE else (), dtype=options.loss_dtype),
        *empty_linear_gradients(input, linear_weight, exact, accumulate, *wants),
        *(input.new_empty(rows if stats else 0, dtype=d) for d in (exact, exact, torch.int64)),
    )


@_fake("linear_cross_entropy_times")
def _(grad, grad_loss, target, ignore_index, dtype):
    return torch.empty_like(grad, dtype=dtype)


cross_entropy_forward = torch.ops.fastopt.cross_entropy_forward.default
cross_entropy_forward_backward = torch.ops.fastopt.cross_entropy_forward_backward.default
cross_entropy_forward_backward_out = torch.ops.fastopt.cross_entropy_forward_backward_out.default
cross_entropy_scale_ = torch.ops.fastopt.cross_entropy_scale_.default
cross_entropy_times = torch.ops.fastopt.cross_entropy_times.default
linear_cross_entropy = torch.ops.fastopt.linear_cross_entropy.default
linear_cross_entropy_rows = torch.ops.fastopt.linear_cross_entropy_rows.default
linear_cross_entropy_times = torch.ops.fastopt.linear_cross_entropy_times.default
