"""Linear cross-entropy in chunks of rows: torch's GEMMs around the row ops of cross-entropy.

    logits            = input[rows] W^T + b         (rows, C), in one buffer that all chunks share
    loss[rows], grad  = cross_entropy of the rows   written over the logits
    grad_input[rows]  = factor grad W
    grad_weight      += factor grad^T input[rows]   starts by a store, not from zeros
    grad_bias        += factor sum of grad's rows

3 GEMMs, and 1 for the loss alone. The mean's divisor is known before the first chunk, so `factor`,
by which a GEMM multiplies anyway, costs nothing. Ignored rows are left out before the first GEMM:
what does not count is not computed, and a NaN in it is multiplied by nothing.

Held at once: the logits of one chunk, whose gradient takes their place.

Gradients are summed in float32 (float64 of float64), whatever the number of chunks, and returned so:
who multiplies them by an upstream gradient rounds them, once. Half precision is multiplied in float32
where the CPU has no instructions for it, a slice of W at a time. (bfloat16, 512 x 256 x 32000, AVX2,
2 threads, a busy machine: torch's own GEMMs took 2.7, 81 and 9.5 s, in float32 0.38, 0.34 and 0.44 s.)
"""

import functools
import math
import platform

import torch
from torch import Tensor

from fastopt import ops, reference, statistics
from fastopt.options import MEAN, NONE, Options

# Of 4096 x 256 x 32000 float32, seconds of one thread for forward and backward, with a row op that
# writes in place: 128 rows 5.4 to 5.6, 256 5.1 to 5.2, 512 4.9 to 5.1, 1024 4.6 to 4.8; the three
# GEMMs alone 4.1 (AVX2, a busy machine).
ROWS = 512
# Classes of W that are converted at a time: with H = 256 4 MB in float32.
SLICE = 4096


def linear_cross_entropy_rows(
    input: Tensor,  # (N, H)
    linear_weight: Tensor,  # (C, H)
    linear_bias: Tensor | None,  # (C)
    target: Tensor,  # int64 (N), or floating point (N, C)
    weight: Tensor | None,  # (C), float32, or float64 where dtype is
    grad_loss: Tensor | None,  # (N), of reduction none; of sum the rows' factors
    grad_entropy: Tensor | None,  # (N)
    options: Options,
    dtype: torch.dtype,
    accumulate: torch.dtype,
    rows: int,
    logit_scale: float,
    softcap: float,  # 0: none
    stats: bool,
    wants_input: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[Tensor, ...]:
    _check(input, linear_weight, linear_bias, target, grad_loss, options, dtype)
    _check_extras(input, grad_entropy, logit_scale, softcap)
    count, (classes, features) = input.shape[0], linear_weight.shape
    exact = statistics.accumulation_type(dtype)
    work = dtype if dtype is exact or multiplies(dtype) else exact
    live = _live_rows(target, classes, options.ignore_index)
    divisor = _divisor(target, live, weight, options)
    factor = 1 / divisor if divisor else math.inf

    input, linear_weight = _for_gemm(input), _for_gemm(linear_weight)
    grads = ops.empty_linear_gradients(
        input, linear_weight, exact, accumulate, wants_input, wants_weight, wants_bias
    )
    grad_input, grad_weight, grad_bias = grads
    total = count if live is None else len(live)
    if total < count:
        grad_input.zero_()
    if total == 0:
        grad_weight.zero_()
        grad_bias.zero_()
    losses = input.new_zeros(count, dtype=exact)
    step = rows_at_a_time(total, rows, classes, features)
    buffer = input.new_empty((min(step, total), classes), dtype=work)
    size = classes if linear_weight.dtype is work is dtype else SLICE
    slices = [slice(start, start + size) for start in range(0, classes, size)]
    row_options = options._replace(reduction=NONE, loss_dtype=exact)
    wants_any = wants_input or wants_weight or wants_bias
    has_extras = softcap != 0.0 or stats or grad_entropy is not None
    lse, entropy = (input.new_zeros(count if stats else 0, dtype=exact) for _ in range(2))
    predicted = input.new_full((count if stats else 0,), -1, dtype=torch.int64)
    factor *= logit_scale

    for start in range(0, total, step):
        end = min(start + step, total)
        at = slice(start, end) if live is None else live[start:end]
        x, goal, logits = input[at].to(dtype).to(work), target[at], buffer[: end - start]
        if goal.is_floating_point() and goal.dtype is not exact:
            goal = goal.to(work)
        for part in slices:
            w = linear_weight[part].to(dtype).to(work)
            if linear_bias is None:
                logits[:, part].addmm_(x, w.t(), beta=0, alpha=logit_scale)
            else:
                b = linear_bias[part].to(dtype).to(work)
                scales = {"beta": logit_scale, "alpha": logit_scale}
                torch.addmm(b, x, w.t(), **scales, out=logits[:, part])
        upstream = None if grad_loss is None else grad_loss[at].to(exact).unsqueeze(1)
        if has_extras:
            of_entropy = None if grad_entropy is None else grad_entropy[at]
            row_call = (goal, weight, row_options, softcap, upstream, of_entropy, wants_any, stats)
            losses[at], *found = _with_extras(logits, *row_call)
            if stats:
                lse[at], entropy[at], predicted[at] = found
        elif wants_any:
            losses[at], _ = ops.cross_entropy_forward_backward_out(
                logits, goal, weight, *row_options, None, logits
            )
            _multiply_rows(logits, upstream)
        else:
            losses[at] = ops.cross_entropy_forward(logits, goal, weight, *row_options)
        grad = logits
        if wants_input:
            direct = live is None and work is exact
            product = grad_input[at] if direct else torch.empty_like(x)
            for part in slices:
                w = linear_weight[part].to(dtype).to(work)
                _add_product(product, grad[:, part], w, factor, part.start == 0)
            if not direct:
                grad_input[at] = product.to(exact)
        if wants_weight:
            for part in slices:
                _add_product(grad_weight[part], grad[:, part].t(), x, factor, start == 0)
        if wants_bias:
            sums = grad.sum(0, dtype=exact).mul_(factor)
            grad_bias.add_(sums) if start else grad_bias.copy_(sums)

    loss = losses
    if options.reduction != NONE:
        if grad_loss is not None:
            # Rows that are ignored may have an infinite factor: no 0 * inf.
            counted = slice(None) if live is None else live
            loss = losses[counted] * grad_loss[counted].to(torch.float64)
        loss = loss.sum(dtype=torch.float64) / divisor
    return loss.to(options.loss_dtype), *grads, lse, entropy, predicted


linear_cross_entropy = reference.without_extras(linear_cross_entropy_rows)


def _with_extras(
    logits: Tensor,  # of a chunk; where wanted, their gradient takes their place
    target: Tensor,
    weight: Tensor | None,
    options: Options,
    softcap: float,
    upstream: Tensor | None,  # (rows, 1)
    grad_entropy: Tensor | None,  # (rows)
    wants_any: bool,
    stats: bool,
) -> tuple[Tensor, ...]:
    """A few rows at a time, so that what is held beside the chunk is a piece of it."""
    size = statistics.entries_at_a_time(logits)
    results = []
    for start in range(0, len(logits), size):
        at = slice(start, start + size)
        x, added, slope = logits[at], None, None
        if softcap:
            x.mul_(1 / softcap).tanh_()
            slope = 1 - x.square() if wants_any else None
            x.mul_(softcap)
        found = statistics.of_rows(x, 1) if stats or grad_entropy is not None else ()
        if found and grad_entropy is not None:
            added = statistics.entropy_gradient(x, found[0], found[1], grad_entropy[at])
        if wants_any:
            loss, _ = ops.cross_entropy_forward_backward_out(
                x, target[at], weight, *options, None, x
            )
            _multiply_rows(x, None if upstream is None else upstream[at])
        else:
            loss = ops.cross_entropy_forward(x, target[at], weight, *options)
        if added is not None:
            x.add_(added)
        if slope is not None:
            x.mul_(slope)
        results.append((loss, *found))
    return tuple(torch.cat(parts) for parts in zip(*results, strict=True))


def _multiply_rows(grad: Tensor, upstream: Tensor | None) -> None:
    if upstream is not None:
        grad.mul_(upstream + (upstream - upstream))  # infinity is NaN, as in the sums of torch


def _check(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    grad_loss: Tensor | None,
    options: Options,
    dtype: torch.dtype,
) -> None:
    """torch.ops is callable by anyone. What is no shape for a GEMM or a row op they refuse themselves."""
    count, classes = input.shape[0], linear_weight.shape[0]
    shape = (count, classes) if target.is_floating_point() else (count,)
    right = (
        input.dim() == linear_weight.dim() == 2
        and tuple(target.shape) == shape
        and (linear_bias is None or tuple(linear_bias.shape) == (classes,))
        and (grad_loss is None or tuple(grad_loss.shape) == (count,))
    )
    if not right:
        raise RuntimeError("fastopt::linear_cross_entropy: the shapes do not fit each other")
    if not (dtype.is_floating_point and options.loss_dtype.is_floating_point):
        raise RuntimeError("fastopt::linear_cross_entropy: dtypes must be floating point")


def _check_extras(
    input: Tensor, grad_entropy: Tensor | None, logit_scale: float, softcap: float
) -> None:
    if not (grad_entropy is None or tuple(grad_entropy.shape) == (input.shape[0],)):
        raise RuntimeError("fastopt::linear_cross_entropy_rows: the shapes do not fit each other")
    if not (0 < logit_scale < math.inf and 0 <= softcap < math.inf):
        raise RuntimeError("fastopt::linear_cross_entropy_rows: scale and softcap must be finite")


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions that multiply half precision. Of float16 it is not asked: the
    gradient of one row would have to wait in units, as torch.ops.fastopt returns it."""
    if dtype is not torch.bfloat16:
        return False
    if platform.machine() == "aarch64":
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    asks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, ask, lambda: False)() for ask in asks)


def _live_rows(target: Tensor, classes: int, ignore_index: int) -> Tensor | None:
    """The numbers of the rows that are not ignored; None for all."""
    if target.is_floating_point():
        return None
    live = target != ignore_index
    wrong = live & ((target < 0) | (target >= classes))
    if wrong.any():
        raise IndexError(f"Target {target[wrong][0].item()} is out of bounds.")
    return None if live.all() else live.nonzero().squeeze(1)


def _divisor(target: Tensor, live: Tensor | None, weight: Tensor | None, options: Options) -> float:
    if options.reduction != MEAN:
        return 1.0
    if target.is_floating_point():
        return float(target.shape[0])
    labels = target if live is None else target[live]
    if weight is None:
        return float(labels.numel())
    divisor = weight[labels].sum(dtype=torch.float64).item()
    # Weights that add up to 0 make the part of label smoothing NaN.
    return math.nan if divisor == 0 and options.smoothed else divisor


def rows_at_a_time(total: int, rows: int, classes: int, features: int) -> int:
    """The rows of a chunk. `rows` is what was asked for: a number; 0 for our own rule; -f for torch's
    "aspect_ratio:f", whose logits weigh 1 / f of the input."""
    if rows < 0:
        ratio = -(-classes // max(features, 1))
        target = -(-total // max(ratio, 1))
        rows = (1 << max(target - 1, 0).bit_length()) // -rows
        return max(rows, 1)
    if rows > 0:
        return rows
    # Evenly, so that no small last chunk wastes a GEMM; in whole vectors of rows.
    chunks = max(-(-total // ROWS), 1)
    return max(-(-total // chunks // 8) * 8, 8)


def _for_gemm(x: Tensor) -> Tensor:
    """With rows or columns that BLAS can step through: else torch would copy it for every product."""
    x = x.resolve_neg()
    (a, b), (rows, columns) = x.stride(), x.shape
    return x if (b == 1 and a >= columns) or (a == 1 and b >= rows) else x.contiguous()


def _add_product(out: Tensor, a: Tensor, b: Tensor, factor: float, first: bool) -> None:
    """out (+)= factor a b. Where out has another dtype, the product is rounded before it is added."""
    if out.dtype is a.dtype:
        out.addmm_(a, b, beta=0 if first else 1, alpha=factor)
        return
    # Into memory of a's dtype: autocast, which may be on, would take another.
    product = torch.mm(a, b, out=a.new_empty(out.shape))
    if first:
        out.copy_(product.mul_(factor))
    else:
        out.add_(product, alpha=factor)
