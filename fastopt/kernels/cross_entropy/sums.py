"""Sums over all rows, in float64: what the mean divides by, and the loss."""

# Kernels annotate their compile-time parameters only; Triton has no type stubs.
# mypy: disallow-incomplete-defs=False, disable-error-code="import-untyped,import-not-found"

import triton
import triton.language as tl


@triton.jit
def mean_divisor(total, uniform):
    """What the mean divides by: weights that add up to 0 make label smoothing's part NaN."""
    return tl.where((total == 0) & (uniform > 0), float("nan"), total)


@triton.jit
def total_weight(parts_ptr, parts, rows, LABELS: tl.constexpr, PARTS: tl.constexpr):
    if LABELS:
        i = tl.arange(0, PARTS)
        total = tl.sum(tl.load(parts_ptr + i, mask=i < parts, other=0.0), 0)
    else:
        total = rows.to(tl.float64)
    return total


@triton.jit(do_not_specialize=["rows", "rows_per_part", "classes", "ignore_index"])
def total_weight_kernel(
    target_ptr,  # (rows) int64
    weight_ptr,  # (classes) or None
    parts_ptr,  # (programs) float64
    rows,
    rows_per_part,
    classes,
    ignore_index: tl.int64,
    WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One part of the sum of the labels' weights (of 1 each without weights) per program."""
    part = tl.program_id(0).to(tl.int64)
    begin = part * rows_per_part
    end = tl.minimum(begin + rows_per_part, rows)
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(begin, end, BLOCK):
        row = first + tl.arange(0, BLOCK)
        label = tl.load(target_ptr + row, mask=row < end, other=-1)
        valid = (row < end) & (label != ignore_index) & (label >= 0) & (label < classes)
        if WEIGHT:
            at = tl.where(valid, label, 0)
            total += tl.load(weight_ptr + at, mask=valid, other=0.0).to(tl.float64)
        else:
            total += valid.to(tl.float64)
    tl.store(parts_ptr + part, tl.sum(total, 0))


@triton.jit(do_not_specialize=["count", "parts", "rows"])
def reduce_kernel(
    loss_parts_ptr,  # (count) float64
    parts_ptr,  # (parts) float64, or None
    loss_ptr,  # 0-dim
    count,
    parts,
    rows,
    uniform: tl.float64,
    LABELS: tl.constexpr,
    REDUCTION: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One program: what the forward kernel's programs left, added up in a fixed order."""
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, count, BLOCK):
        i = first + tl.arange(0, BLOCK)
        total += tl.load(loss_parts_ptr + i, mask=i < count, other=0.0)
    loss = tl.sum(total, 0)
    if REDUCTION == 1:
        loss /= mean_divisor(total_weight(parts_ptr, parts, rows, LABELS, PARTS), uniform)
    if loss_ptr.dtype.element_ty != tl.float64:
        loss = loss.to(tl.float32)  # no target converts float64 to bfloat16 itself
    tl.store(loss_ptr, loss.to(loss_ptr.dtype.element_ty))
