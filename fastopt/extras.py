"""What cross_entropy and linear_cross_entropy take beyond torch's arguments: checks, and what each of
them means, in plain torch.

    x     = logit_scale logits, and then softcap tanh(x / softcap)
    loss  = (cross_entropy of the row + lse_square_scale lse(x)^2) token_weight
    sum   = the sum of them; mean is sum / denominator, or by the mean's own divisor

None of it waits for a device.
"""

import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastopt import layouts, reference, statistics
from fastopt.options import REDUCTIONS, Options

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class LossStats(NamedTuple):
    """What return_stats=True returns beside the loss: without gradients, and, but for z_loss, shaped
    like the loss of reduction none."""

    lse: Tensor
    """log(sum(exp(logits))), after scale and softcap; float32, or float64 of float64; 0 in ignored rows"""
    z_loss: Tensor
    """0-dim: the part of the loss that is lse_square_scale's (of reduction none, of its rows' sum)"""
    entropy: Tensor
    """of the softmax, like lse; 0 in ignored rows"""
    predicted: Tensor
    """int64: the largest logit's class, the first of several; -1 in ignored rows"""
    correct: Tensor
    """bool: whether it is the target, or the target's most probable class; False in ignored rows"""


class Extras(NamedTuple):
    softcap: float | None
    logit_scale: float
    token_weight: Tensor | None
    denominator: Any  # a number, a 0-dim Tensor or None
    loss_dtype: torch.dtype | None
    return_stats: bool

    @property
    def scales(self) -> bool:
        return self.softcap is not None or self.logit_scale != 1.0


def traced(function: Callable[..., Any], call: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """Of torch.fx's symbolic tracer, one node for a whole call: its way depends on what is given, which
    a graph's placeholders do not tell. call[0] is a Proxy."""
    return call[0].tracer.create_proxy("call_function", function, call, keywords)


def real(name: str, value: Any) -> float:
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a real number, got {value!r}")
    return float(value)


def positive(name: str, value: Any) -> float:
    value = real(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")
    return value


def boolean(name: str, value: Any) -> None:
    if type(value) is not bool:
        raise TypeError(f"{name} must be a bool, got {value!r}")


def checked(
    reduction: str,
    softcap: Any,
    logit_scale: Any,
    token_weight: Any,
    denominator: Any,
    loss_dtype: Any,
    return_stats: Any,
) -> Extras:
    """The arguments as they are used; or what is wrong with them, as an exception. token_weight's
    shape is for check_rows."""
    if softcap is not None:
        softcap = positive("softcap", softcap)
    logit_scale = positive("logit_scale", logit_scale)
    if token_weight is not None:
        if not isinstance(token_weight, Tensor):
            raise TypeError(f"token_weight must be a Tensor, got {token_weight!r}")
        _check_constant("token_weight", token_weight)
    if denominator is not None:
        if reduction != "mean":
            raise ValueError(f"denominator is for reduction 'mean', got {reduction!r}")
        if not isinstance(denominator, Tensor):
            denominator = real("denominator", denominator)
        elif denominator.dim():
            raise ValueError(
                f"denominator must be a number or 0-dim, got shape {tuple(denominator.shape)}"
            )
        else:
            _check_constant("denominator", denominator)
    if loss_dtype is not None and type(loss_dtype) is not torch.dtype:
        raise TypeError(f"loss_dtype must be a torch.dtype, got {loss_dtype!r}")
    if loss_dtype is not None and loss_dtype not in _DTYPES:
        raise ValueError(f"loss_dtype must be one of {_DTYPES}, got {loss_dtype}")
    boolean("return_stats", return_stats)
    return Extras(softcap, logit_scale, token_weight, denominator, loss_dtype, return_stats)


def _check_constant(name: str, x: Tensor) -> None:
    if x.requires_grad:
        raise RuntimeError(f"{name} must not require grad: the loss is not differentiated by it")
    if x.is_complex():
        raise TypeError(f"{name} must be real, got {x.dtype}")


def check_rows(extras: Extras, shape: torch.Size, device: torch.device) -> None:
    """token_weight is shaped like the loss of reduction none, and nothing has to be moved."""
    w, d = extras.token_weight, extras.denominator
    if w is not None and w.shape != shape:
        raise ValueError(
            f"token_weight must have shape {tuple(shape)}, as the loss of reduction none,"
            f" got {tuple(w.shape)}"
        )
    if w is not None and w.device != device:
        raise RuntimeError(f"token_weight must be on {device}, got {w.device}")
    if isinstance(d, Tensor) and d.device != device and d.device.type != "cpu":
        raise RuntimeError(f"denominator must be on {device}, got {d.device}")


def scaled(logits: Tensor, extras: Extras, ignored: Tensor | None = None) -> Tensor:
    """Logits after scale and softcap, in the accumulation type; the logits, where there is neither.
    ignored: to be broadcast against logits, whose gradient is 0 there, even where they are NaN."""
    if not extras.scales:
        return logits
    if ignored is not None and extras.softcap is not None:
        logits = torch.where(ignored, 0, logits)
    x = logits.to(statistics.accumulation_type(logits.dtype))
    if extras.softcap is None:
        return x * extras.logit_scale
    return (x * (extras.logit_scale / extras.softcap)).tanh() * extras.softcap


def row_weights(target: Tensor, ignore_index: int, extras: Extras, dtype: torch.dtype) -> Tensor:
    """token_weight, where rows count."""
    assert extras.token_weight is not None
    w = extras.token_weight.to(dtype)
    return w if target.is_floating_point() else torch.where(target == ignore_index, 0, w)


def divisor(
    shape: torch.Size,  # of the logits
    target: Tensor,
    weight: Tensor | None,  # (C)
    options: Options,
    extras: Extras,
) -> Any:
    """What the mean divides by: denominator, or stock's count."""
    if extras.denominator is not None:
        return extras.denominator
    if target.is_floating_point():
        rows = layouts.row_shape(target.shape)
        return torch.ones(rows, dtype=torch.float64, device=target.device).sum()
    live = target != options.ignore_index
    classes = shape[layouts.class_dim(shape)]
    if weight is None:
        label_weight = live
    else:
        label = reference.labels_in_range(target, ~live, classes)
        label_weight = torch.where(live, weight[label], 0)
    total = label_weight.sum(dtype=torch.float64)
    return torch.where(total == 0, math.nan, total) if options.smoothed else total


def reduced(
    rows: Tensor,  # the losses of rows
    weights: Tensor | None,  # row_weights
    reduction: str,
    by: Any,  # what the mean divides by
) -> Tensor:
    rows = rows if weights is None else rows * weights
    if reduction == "none":
        return rows
    total = rows.sum(dtype=torch.float64)
    return total / by if reduction == "mean" else total


def kernel_reduction(reduction: str, extras: Extras) -> int:
    """What is asked of a kernel whose result is to become a loss with extras."""
    if extras.token_weight is not None:
        return REDUCTIONS["none"]
    return REDUCTIONS["sum" if extras.denominator is not None else reduction]


def loss_stats(
    found: statistics.Statistics,
    target: Tensor,
    dim: int,  # of the classes
    options: Options,
    weights: Tensor | None,
    reduction: str,
    by: Any,
) -> LossStats:
    lse, entropy, predicted = found
    if target.is_floating_point():
        correct = predicted == target.detach().argmax(dim)
    else:
        live = target != options.ignore_index
        lse, entropy = torch.where(live, lse, 0), torch.where(live, entropy, 0)
        predicted = torch.where(live, predicted, -1)
        correct = live & (predicted == target)
    z_loss = lse.new_zeros(())
    if options.lse_square_scale != 0.0:
        rows = options.lse_square_scale * lse.square()
        z_loss = reduced(rows, weights, reduction, by).sum().to(lse.dtype)
    return LossStats(lse, z_loss, entropy, predicted, correct)
