"""Every op in plain torch: the definition.

Serves devices without kernels, and everything under FASTOPT_BACKEND=reference. The formulas are
those of csrc/rules/softmax.h, with q the target mass, a = sum_c q_c, m = max_c x_c:

    loss = a log(sum_c exp(x_c - m)) - sum_c q_c (x_c - m)      dloss/dx_c = a softmax(x)_c - q_c

z-loss adds lse_square_scale lse^2 to the loss, lse = log(sum_c exp(x_c)), and 2 lse_square_scale lse
to a in the gradient.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastopt import layouts, statistics
from fastopt.options import MEAN, NONE, Options


class _Problem(NamedTuple):
    x: Tensor  # logits in the accumulation type
    q: Tensor  # target mass, shaped like logits
    counted: Tensor  # bool, broadcast against logits: this class has mass
    live: Tensor  # bool, broadcast against logits: the row is not ignored
    total_weight: Tensor  # 0-dim: what the mean divides by
    dim: int  # of the classes


def _problem(logits: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> _Problem:
    dim = layouts.class_dim(logits.shape)
    classes = logits.shape[dim]
    x = logits.to(statistics.accumulation_type(logits.dtype))
    ignore_index, smoothing = options.ignore_index, options.smoothing
    uniform = smoothing / max(classes, 1)
    w = layouts.along_classes(weight, x).to(x.dtype)
    everything = torch.ones((), dtype=torch.bool, device=x.device)
    if target.is_floating_point():
        q = w * ((1 - smoothing) * target.to(x.dtype) + uniform)
        rows = x.new_full((), x.numel() / max(classes, 1))
        return _Problem(x, q, everything, everything, rows, dim)
    label = target.unsqueeze(dim).long()
    live = label != ignore_index
    one_hot = torch.zeros_like(x).scatter(dim, torch.where(live, label, 0), 1.0) * live
    counted = live if options.smoothed else one_hot > 0
    # An infinite weight of a class without mass is no 0 * inf.
    q = torch.where(counted, w * ((1 - smoothing) * one_hot + uniform), 0)
    return _Problem(x, q, counted, live, torch.where(one_hot > 0, w, 0).sum(), dim)


def check_labels(logits: Tensor, target: Tensor, ignore_index: int) -> None:
    classes = logits.shape[layouts.class_dim(logits.shape)]
    wrong = target[((target < 0) | (target >= classes)) & (target != ignore_index)]
    if wrong.numel():
        raise IndexError(f"Target {wrong[0].item()} is out of bounds.")


def cross_entropy(
    logits: Tensor,  # (C), (N, C) or (N, C, d1, ...)
    target: Tensor,  # in range: int64 (N, d1, ...), or floating point like logits
    weight: Tensor | None,  # (C)
    options: Options,
) -> Tensor:
    """The loss, in terms that autograd, transforms and compilers know."""
    p = _problem(logits, target, weight, options)
    # Class by class: infinite masses, or such as are too large to add up, make no inf - inf.
    terms = torch.where(p.counted, p.q * -p.x.log_softmax(p.dim), 0)
    loss = terms.sum(p.dim, keepdim=True)
    if options.lse_square_scale != 0.0:
        loss = loss + options.lse_square_scale * p.x.logsumexp(p.dim, keepdim=True).square()
    loss = torch.where(p.live, loss, 0).squeeze(p.dim)
    if options.reduction != NONE:
        loss = loss.sum(dtype=torch.float64)
    if options.reduction == MEAN:
        loss = loss / _divisor(p.total_weight, options)
    return loss.to(options.loss_dtype)


def cross_entropy_forward(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: Options
) -> Tensor:
    # Elsewhere scatter would assert; no values are read on the host.
    if logits.device.type == "cpu" and not target.is_floating_point():
        check_labels(logits, target, options.ignore_index)
    return cross_entropy(logits, target, weight, options)


def allocating(out: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Any]:
    """cross_entropy_forward_backward of a back end, from its cross_entropy_forward_backward_out."""

    def forward_backward(
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: Options,
        largest_mass: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad_logits = layouts.empty_gradient(logits)
        loss, unit = out(logits, target, weight, options, largest_mass, grad_logits)
        return loss, grad_logits, unit

    return forward_backward


def without_extras(of_rows: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
    """linear_cross_entropy of a back end, from its linear_cross_entropy_rows."""

    def linear_cross_entropy(*call: Any) -> tuple[Tensor, ...]:
        tensors, plan, wants = call[:6], call[6:10], call[10:]
        return of_rows(*tensors, None, *plan, 1.0, 0.0, False, *wants)[:4]

    return linear_cross_entropy


def cross_entropy_forward_backward_out(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: Options,
    largest_mass: Tensor | None,  # 0-dim
    grad_logits: Tensor,  # like logits, or logits themselves
) -> tuple[Tensor, Tensor]:
    loss = cross_entropy_forward(logits, target, weight, options)
    p = _problem(logits, target, weight, options)
    upstream = p.x.new_ones(())
    if options.reduction == MEAN:
        upstream = 1 / _divisor(p.total_weight, options)
    unit = p.x.new_ones((), dtype=torch.float32)
    if logits.dtype == torch.float16:
        scale = half_gradient_scale(unit if largest_mass is None else largest_mass)
        waits = upstream.isfinite()  # else the mean divides by nothing: the gradient is inf or NaN
        unit = torch.where(waits, upstream / scale, 1.0).to(torch.float32)
        upstream = torch.where(waits, scale, upstream)
    mass = p.q.sum(p.dim, keepdim=True)
    if options.lse_square_scale != 0.0:
        mass = mass + 2 * options.lse_square_scale * p.x.logsumexp(p.dim, keepdim=True)
    grad = upstream * (mass * p.x.softmax(p.dim) - p.q)
    if not target.is_floating_point():
        # An infinite factor makes the true class NaN, where torch has inf - inf.
        ignored = target == options.ignore_index
        label = labels_in_range(target, ignored, logits.shape[p.dim]).unsqueeze(p.dim)
        odd = (upstream - upstream).to(grad.dtype).expand(label.shape)
        grad = grad.scatter_add(p.dim, label, odd)
    grad_logits.copy_(torch.where(p.live, grad, 0))
    return loss, unit


cross_entropy_forward_backward = allocating(cross_entropy_forward_backward_out)


def linear_cross_entropy_rows(
    input: Tensor,  # (N, H)
    linear_weight: Tensor,  # (C, H)
    linear_bias: Tensor | None,  # (C)
    target: Tensor,
    weight: Tensor | None,
    grad_loss: Tensor | None,  # (N), of reduction none; of sum the rows' factors
    grad_entropy: Tensor | None,  # (N)
    options: Options,
    dtype: torch.dtype,
    accumulate: torch.dtype,
    rows: int,
    logit_scale: float,
    softcap: float,
    stats: bool,
    wants_input: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[Tensor, ...]:
    exact = statistics.accumulation_type(dtype)
    x, w = input.to(dtype).to(exact), linear_weight.to(dtype).to(exact)
    b = None if linear_bias is None else linear_bias.to(dtype).to(exact)
    if target.is_floating_point():
        target = target.to(exact)
    else:  # what is ignored is multiplied by nothing, and may be NaN
        x = torch.where((target == options.ignore_index).unsqueeze(1), 0, x)
    with torch.autocast(input.device.type, enabled=False):
        logits = logit_scale * torch.nn.functional.linear(x, w, b)
    if softcap:
        bent = (logits / softcap).tanh()
        logits = softcap * bent
    found = statistics.of_rows(logits, 1)
    if target.is_floating_point():
        live = torch.ones_like(found.predicted, dtype=torch.bool)
    else:
        live = target != options.ignore_index
    loss, grad, _ = cross_entropy_forward_backward(logits, target, weight, options)
    if grad_loss is not None:
        if options.reduction != NONE:
            each = cross_entropy(
                logits, target, weight, options._replace(reduction=NONE, loss_dtype=exact)
            )
            each = torch.where(live, each * grad_loss, 0)
            loss = each.sum(dtype=torch.float64).to(options.loss_dtype)
        upstream = torch.where(live, grad_loss.to(exact), 0)
        grad = grad * (upstream + (upstream - upstream)).unsqueeze(1)
    if grad_entropy is not None:
        of_entropy = statistics.entropy_gradient(logits, found.lse, found.entropy, grad_entropy)
        grad = grad + torch.where(live.unsqueeze(1), of_entropy, 0)
    if softcap:
        grad = grad * (1 - bent.square())
    grad = grad * logit_scale
    with torch.autocast(input.device.type, enabled=False):
        return (
            loss,
            grad @ w if wants_input else w.new_empty(0),
            (grad.t() @ x if wants_weight else w.new_empty(0)).to(accumulate),
            grad.sum(0) if wants_bias else w.new_empty(0),
            *_where_live(found, live, stats),
        )


linear_cross_entropy = without_extras(linear_cross_entropy_rows)


def _where_live(found: statistics.Statistics, live: Tensor, stats: bool) -> tuple[Tensor, ...]:
    if not stats:
        return found.lse.new_empty(0), found.lse.new_empty(0), found.predicted.new_empty(0)
    lse, entropy, predicted = found
    return (
        torch.where(live, lse, 0),
        torch.where(live, entropy, 0),
        torch.where(live, predicted, -1),
    )


def half_gradient_scale(largest: Tensor) -> Tensor:
    """csrc/rules/cross_entropy.h: the power of two that takes `largest` to [2^13, 2^14)."""
    _, exponent = torch.frexp(largest)  # 1 for [1, 2)
    scale = torch.ldexp(torch.ones_like(largest), (14 - exponent).clamp(-126, 127))
    return torch.where((largest > 0) & largest.isfinite(), scale, 1.0)


def cross_entropy_scale_(
    grad_logits: Tensor,
    factor: Tensor,  # 0-dim, or one for each row
    target: Tensor,
    ignore_index: int,
    smoothed: bool,
) -> None:
    dim = layouts.class_dim(grad_logits.shape)
    odd = factor - factor  # 0, or NaN
    labels = not target.is_floating_point()
    hard = labels and not smoothed
    if not hard:
        factor = factor + odd
    if labels:
        ignored = target == ignore_index
        factor = torch.where(ignored, 0, factor)
        odd = torch.where(ignored, 0, odd)
    if factor.dim():
        factor = factor.unsqueeze(dim)
    torch.mul(grad_logits, factor, out=grad_logits)
    if hard:
        label = labels_in_range(target, ignored, grad_logits.shape[dim]).unsqueeze(dim)
        grad_logits.scatter_add_(dim, label, odd.unsqueeze(dim).to(grad_logits.dtype))


def labels_in_range(target: Tensor, ignored: Tensor, classes: int) -> Tensor:
    """Class indices that may serve as addresses: another class's in the place of those that may not,
    whose rows are ignored, or NaN already (on GPUs, where a label out of range is no error)."""
    return torch.where(ignored, 0, target).clamp(0, classes - 1)


def _divisor(total_weight: Tensor, options: Options) -> Tensor:
    """What the mean divides by: weights that add up to 0 make label smoothing's part NaN."""
    if not options.smoothed:
        return total_weight
    return torch.where(total_weight == 0, torch.nan, total_weight)
