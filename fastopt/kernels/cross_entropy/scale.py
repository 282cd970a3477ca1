"""A gradient times one factor, in place."""

# Kernels annotate their compile-time parameters only; Triton has no type stubs.
# mypy: disallow-incomplete-defs=False, disable-error-code="import-untyped,import-not-found"

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count", "ignore_index"])
def scale_kernel(
    grad_ptr,  # (count), dense
    factor_ptr,  # 0-dim
    target_ptr,  # int64 (rows), or None
    count,
    classes,
    positions,
    grad_batch,
    grad_class,
    grad_position,
    ignore_index: tl.int64,
    SMOOTHED: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A fixed number of programs, so that a factor of 1 costs an empty launch, whatever the size."""
    factor = tl.load(factor_ptr).to(ACC)
    program = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    if factor - factor != 0.0:
        # Inf or NaN (csrc/rules/cross_entropy.h), so seldom that it may take its time.
        for first in range(program * BLOCK, count, step):
            i = first + lane
            inside = i < count
            row = i // classes
            at = grad_ptr + row // positions * grad_batch + row % positions * grad_position
            at += i % classes * grad_class
            g = factor * tl.load(at, mask=inside, other=0.0).to(ACC)
            if target_ptr is None:
                g += factor - factor
            else:
                label = tl.load(target_ptr + row, mask=inside, other=0)
                if SMOOTHED:
                    g += factor - factor
                else:
                    g = tl.where(label == i % classes, g + (factor - factor), g)
                g = tl.where(label == ignore_index, 0.0, g)
            tl.store(at, g.to(grad_ptr.dtype.element_ty), mask=inside)
    elif factor != 1.0:
        whole = count // BLOCK * BLOCK
        for first in range(program * BLOCK, whole, step):
            at = grad_ptr + first + lane  # without a mask, so in vectors whatever the count
            tl.store(at, (factor * tl.load(at).to(ACC)).to(grad_ptr.dtype.element_ty))
        if program == 0:
            at = grad_ptr + whole + lane
            rest = tl.load(at, mask=lane < count - whole, other=0.0).to(ACC)
            rest = (factor * rest).to(grad_ptr.dtype.element_ty)
            tl.store(at, rest, mask=lane < count - whole)
