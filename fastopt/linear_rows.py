"""Rows of linear cross-entropy, and their entropy, from logits that never exist whole: autograd.

    scalar      the rows' factors are known: 3 GEMMs in forward, and backward only multiplies
    rows        1 GEMM in forward, and 4 in backward, which has the rows' upstream gradients

The extras of linear_cross_entropy (linear_loss.py) and log-probabilities (logprobs.py) are made of
these. The op is the chunk loop of fastopt/kernels/linear_cross_entropy.py.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastopt import extras, loss, ops, reference, statistics
from fastopt.options import NONE, Options


class Plan(NamedTuple):
    """As the op takes it."""

    dtype: torch.dtype
    accumulate: torch.dtype
    rows: int
    logit_scale: float
    softcap: float  # 0: none
    stats: bool


def linear_rows(
    input: Tensor,  # (N, H)
    linear_weight: Tensor,  # (C, H)
    linear_bias: Tensor | None,  # (C)
    target: Tensor,
    weight: Tensor | None,
    factor: Tensor | None,  # (N), of reduction sum
    options: Options,  # reduction none or sum
    plan: Plan,
) -> tuple[Tensor, statistics.Statistics]:
    """The loss, and what statistics.py says of the rows where the plan has it. Of reduction none its
    entropy has a gradient, too."""
    parameters = (input, linear_weight, linear_bias)
    trains = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in parameters)
    call = (*parameters, target, weight, factor)
    if trains and not torch.compiler.is_compiling():
        found = _LinearRows.apply(*call, options, plan)
    else:
        wants = [False] * 3
        if trains and options.reduction != NONE:
            wants = [x is not None and x.requires_grad for x in parameters]
        found = ops.linear_cross_entropy_rows(*call, None, *options, *plan, *wants)
    return found[0], statistics.Statistics(*found[4:])


class _LinearRows(torch.autograd.Function):
    """(input, linear_weight, linear_bias) -> (loss, their gradients for an upstream gradient of 1, lse,
    entropy, predicted). Gradients that are to be differentiated again make the logits whole."""

    @staticmethod
    def forward(ctx, input, linear_weight, linear_bias, target, weight, factor, options, plan):
        wants = [False] * 3 if options.reduction == NONE else ctx.needs_input_grad[:3]
        call = (input, linear_weight, linear_bias, target, weight, factor)
        with loss._below_autograd():
            result, *others = ops.linear_cross_entropy_rows(*call, None, *options, *plan, *wants)
        *grads, lse, entropy, predicted = others
        ctx.set_materialize_grads(False)
        constants = (*grads, lse, predicted)
        differentiable = options.reduction == NONE and plan.stats
        ctx.mark_non_differentiable(*constants, *(() if differentiable else (entropy,)))
        ctx.save_for_backward(*call, *(grads if any(wants) else ()))
        ctx.options, ctx.plan = options, plan
        return result, *others

    @staticmethod
    def backward(ctx, grad_loss, *others):
        grad_entropy = others[4]
        if grad_loss is None and grad_entropy is None:
            return (None,) * 8
        input, linear_weight, linear_bias, target, weight, factor, *grads = ctx.saved_tensors
        parameters, rest = [input, linear_weight, linear_bias], (target, weight)
        wants, options, plan = ctx.needs_input_grad[:3], ctx.options, ctx.plan
        dtypes: list[Any] = [None if x is None else x.dtype for x in parameters]
        if torch.is_grad_enabled():
            upstream = (grad_loss, grad_entropy)
            grads = _differentiable(parameters, wants, (*rest, factor, options, plan), upstream)
            return *grads, *(None,) * 5
        if options.reduction == NONE:
            if grad_loss is None:
                grad_loss = torch.zeros_like(grad_entropy)
            again = plan._replace(stats=False)
            _, *grads, _, _, _ = ops.linear_cross_entropy_rows(
                *parameters, *rest, grad_loss, grad_entropy, *options, *again, *wants
            )
            grads = [g.to(d) if w else None for g, d, w in zip(grads, dtypes, wants, strict=True)]
            return *grads, *(None,) * 5
        del input, linear_weight, linear_bias, parameters
        return *multiplied(ctx, grads, grad_loss, target, dtypes), *(None,) * 5


def _differentiable(
    parameters: list[Any],
    wants: list[bool],
    others: tuple[Any, ...],  # what composed takes behind parameters
    upstream: tuple[Tensor | None, Tensor | None],  # of the loss, of the entropy
) -> list[Tensor | None]:
    """The gradients in terms that can be differentiated again. Of views, so that only the way through
    this call counts where one parameter depends on another (tied weights)."""
    with torch.enable_grad():
        x, w, b = (None if x is None else x.view_as(x) for x in parameters)
        assert x is not None and w is not None
        found = composed(x, w, b, *others)
        pairs = [(y, g) for y, g in zip(found, upstream, strict=True) if g is not None]
        results = [y for y, _ in pairs]
        wanted = [v for v, wanted in zip((x, w, b), wants, strict=True) if wanted and v is not None]
        grads = [g.to(y.dtype) for y, g in pairs]
        again = iter(torch.autograd.grad(results, wanted, grads, create_graph=True))
        return [next(again) if wanted else None for wanted in wants]


def composed(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    factor: Tensor | None,
    options: Options,
    plan: Plan,
) -> tuple[Tensor, Tensor]:
    """Loss and entropy with whole logits, multiplied in the accumulation type, as the loop does."""
    exact = statistics.accumulation_type(plan.dtype)
    with torch.autocast(input.device.type, enabled=False):
        x, w = rounded(input, plan.dtype, exact), rounded(linear_weight, plan.dtype, exact)
        b = None if linear_bias is None else rounded(linear_bias, plan.dtype, exact)
        live = torch.ones_like(x[:, 0], dtype=torch.bool)
        if not target.is_floating_point():  # what is ignored may be NaN
            live = target != options.ignore_index
            x = torch.where(live.unsqueeze(1), x, 0)
        scale = extras.Extras(plan.softcap or None, plan.logit_scale, None, None, None, False)
        logits = extras.scaled(F.linear(x, w, b), scale)
    of_rows = options._replace(reduction=NONE, loss_dtype=exact)
    result = reference.cross_entropy(logits, target, weight, of_rows)
    if factor is not None:
        result = torch.where(live, result * factor, 0).sum(dtype=torch.float64)
    entropy = torch.where(live, statistics.entropy(logits, 1), 0)
    return result.to(options.loss_dtype), entropy


def multiplied(
    ctx: Any,
    grads: list[Tensor],  # as they were saved: emptied of them
    grad_loss: Tensor,
    target: Tensor,
    dtypes: list[Any],  # of input, linear_weight, linear_bias
) -> list[Tensor | None]:
    """What a backward returns for these three where forward has computed their gradients. Of what else
    was saved its caller holds nothing that is large."""
    plain = loss._is_plain(grad_loss)
    if plain:
        grads[:] = [grad.detach() for grad in grads]
        ctx.maybe_clear_saved_tensors()  # unless the graph is kept
    labels = target if target.dtype is torch.int64 else None
    result: list[Tensor | None] = [None] * 3
    for i, rows_of in enumerate((labels, None, None)):  # only the input's gradient has rows
        if not ctx.needs_input_grad[i]:
            continue
        scale = (grads[i], grad_loss, rows_of, ctx.options.ignore_index, dtypes[i])
        if plain:
            # As in loss.py: whoever alone holds the memory may write to it.
            own = loss._uses(grads[i].untyped_storage()._cdata) <= 2
            result[i] = times(*scale, own)
        else:
            result[i] = ops.linear_cross_entropy_times(*scale)
    return result


def times(
    grad: Tensor,
    grad_loss: Tensor,  # 0-dim
    target: Tensor | None,
    ignore_index: int,
    dtype: torch.dtype,
    own: bool = False,
) -> Tensor:
    """grad * grad_loss, rounded to dtype; in grad's memory where that is its caller's own."""
    value = grad_loss.item()
    value += value - value  # infinity is NaN, as in the sums of torch
    if not own:
        grad = grad * value
    elif value != 1:
        grad.mul_(value)
    if target is not None and math.isnan(value):
        grad[target == ignore_index] = 0
    return grad.to(dtype)


def rounded(x: Tensor, dtype: torch.dtype, exact: torch.dtype) -> Tensor:
    """x in the type `exact`, with the digits that `dtype` has; its gradient keeps all of its own."""
    y = x.to(exact)
    return y if x.dtype is dtype else y + (y.to(dtype).to(exact) - y).detach()


def _op_autograd(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    grad_loss: Tensor | None,
    grad_entropy: Tensor | None,
    options: Options,
    *others: Any,
) -> Any:
    call = (input, linear_weight, linear_bias, target, weight, grad_loss)
    parameters = (input, linear_weight, linear_bias)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in parameters):
        return _LinearRows.apply(*call, options, Plan(*others[: len(Plan._fields)]))
    with loss._below_autograd():
        return ops.linear_cross_entropy_rows(*call, grad_entropy, *options, *others)


ops.register("linear_cross_entropy_rows", "Autograd", _op_autograd)
ops.library.impl("linear_cross_entropy_times", times, "CompositeExplicitAutograd")
