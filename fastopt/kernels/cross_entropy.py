"""Softmax cross-entropy in Triton: loss and gradient.

    loss = a log(sum_c exp(x_c - m)) - sum_c q_c (x_c - m)      d loss/d x_c = up (a p_c - q_c)

with q the target mass, a = sum_c q_c, m = max_c x_c (csrc/rules/softmax.h has the variants).

Memory sees one read and one write per logit. A block holds whole rows while they fit in registers;
longer rows are swept twice, the second time backwards, while they are in L2 (one program a row,
at most one an SM). Blocks are 2-D, rows and classes: lanes run over classes where they are
contiguous, else over positions, so that one text serves (N, C), channels_last and (N, C, d1, ...).

Arithmetic in float32 (float64 for float64), rounded once, at the store; row losses and total
weight are added up in float64. No atomics: the same bits every run. No value is read on the host.
A label out of range is no address: its row becomes NaN.

Order: what blocks share | total weight | loss, with its gradient | loss of all rows | scaling |
plan | launchers.
"""

# Kernels annotate their compile-time parameters only; Triton has no type stubs.
# mypy: disallow-incomplete-defs=False, disable-error-code="import-untyped,import-not-found"

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastopt import layouts, reference
from fastopt.layouts import Strides, viewed
from fastopt.options import MEAN, NONE, REDUCTIONS, Options

# -- what blocks share ------------------------------------------------------------------------------
# AXIS is the axis of the classes in a block; rows have the other one.


@triton.jit
def _known_multiple(n, UNIT: tl.constexpr):
    """n, a multiple of UNIT, which the compiler has to see to use vectors under a mask."""
    return n // UNIT * UNIT


@triton.jit
def _rows_of_program(
    rows,
    positions,
    ROWS: tl.constexpr,
    IN_ENTRY: tl.constexpr,
    UNIT: tl.constexpr,
    AXIS: tl.constexpr,
):
    """The rows of this program, where each lies (batch entry, position), and which exist.

    IN_ENTRY: tiles stay inside a batch entry, so that their positions are one run of memory.
    """
    tile = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, ROWS)
    if IN_ENTRY:
        if AXIS == 0:
            positions = _known_multiple(positions, UNIT)
        tiles = (positions + tl.full((), ROWS - 1, tl.int64)) // ROWS  # 2^31 rows do not wrap it
        entry = tile // tiles
        position = tile % tiles * ROWS + lane
        row = entry * positions + position
        inside = position < positions
    else:
        row = tile * ROWS + lane
        entry = row // positions
        position = row % positions
        inside = row < rows
    return row, entry, position, inside


@triton.jit
def _starts(entry, position, batch_stride, position_stride, UNIT: tl.constexpr, AXIS: tl.constexpr):
    if AXIS == 1:
        position_stride = _known_multiple(position_stride, UNIT)
    return entry * _known_multiple(batch_stride, UNIT) + position * position_stride


@triton.jit
def _block_classes(first, BLOCK: tl.constexpr, AXIS: tl.constexpr):
    return tl.expand_dims(first + tl.arange(0, BLOCK), 1 - AXIS)


@triton.jit
def _offsets(start, c, class_stride, UNIT: tl.constexpr, AXIS: tl.constexpr):
    """start: of the rows. In 64 bits where classes are strided: C * stride may pass 2^31."""
    if AXIS == 0:
        c = c.to(tl.int64) * _known_multiple(class_stride, UNIT)
    return tl.expand_dims(start, AXIS) + c


@triton.jit
def _load_labels(
    target_ptr,
    weight_ptr,
    row,
    inside,
    classes,
    ignore_index,
    keep,
    WEIGHT: tl.constexpr,
    ACC: tl.constexpr,
):
    """(label or -1, row is not ignored, the true class's own mass (1 - e) w_y) of rows.

    The mass of a label out of range is NaN, and so become its row's loss and gradient.
    """
    label = tl.load(target_ptr + row, mask=inside, other=0)
    live = inside & (label != ignore_index)
    valid = live & (label >= 0) & (label < classes)
    label = tl.where(valid, label, -1)  # (in 32 bits, ptxas spills in the largest blocks)
    true_mass = tl.full(label.shape, keep, ACC)
    if WEIGHT:
        true_mass *= tl.load(weight_ptr + tl.where(valid, label, 0), mask=valid, other=0.0)
    return label, live, tl.where(valid, true_mass, float("nan"))


@triton.jit
def _word_start(start, EDGE: tl.constexpr):
    return _known_multiple(start + (EDGE - 1), EDGE)


@triton.jit
def _edges(start, classes, EDGE: tl.constexpr):
    """What of rows lies in whole words of EDGE elements, and what does not.

    Returns the classes of a block (rows, 2 EDGE) that holds both edges, which of them exist, the
    class that the first whole word begins with, and the number of classes in whole words.
    """
    start = tl.expand_dims(start, 1)
    first = _word_start(start, EDGE)
    last = _known_multiple(start + classes, EDGE)
    i = tl.expand_dims(tl.arange(0, 2 * EDGE), 0)
    c = tl.where(i < EDGE, i, last - start + (i - EDGE)).to(tl.int32)
    exists = tl.where(i < EDGE, i < first - start, c < classes)
    return c, exists, (first - start).to(tl.int32), (last - first).to(tl.int32)


@triton.jit
def _load_mass(
    target_ptr,
    target_start,
    target_class,
    weight_ptr,
    c,
    mask,
    classes,
    keep,
    uniform,
    LABELS: tl.constexpr,
    WEIGHT: tl.constexpr,
    SMOOTHING: tl.constexpr,
    ACC: tl.constexpr,
    UNIT: tl.constexpr,
    AXIS: tl.constexpr,
):
    """q_c of a block, without the true class's own mass where targets are labels."""
    if LABELS and not SMOOTHING:
        q = tl.zeros([1, 1], ACC)
    else:
        q = tl.full(mask.shape, uniform, ACC)
        own = tl.full([1, 1], keep, ACC)
        if WEIGHT:
            w = tl.load(weight_ptr + c, mask=c < classes, other=0.0)
            q *= w
            own = own * w
        if not LABELS:
            at = _offsets(target_start, c, target_class, UNIT, AXIS)
            q += own * tl.load(target_ptr + at, mask=mask, other=0.0).to(ACC)
        q = tl.where(mask, q, 0.0)
    return q


@triton.jit
def _load_logits(
    logits_ptr,
    start,
    class_stride,
    c,
    mask,
    EVICT: tl.constexpr,
    ACC: tl.constexpr,
    UNIT: tl.constexpr,
    AXIS: tl.constexpr,
):
    at = _offsets(start, c, class_stride, UNIT, AXIS)
    return tl.load(logits_ptr + at, mask=mask, other=-float("inf"), eviction_policy=EVICT).to(ACC)


@triton.jit
def _store_gradient(
    grad_ptr, start, class_stride, c, g, mask, UNIT: tl.constexpr, AXIS: tl.constexpr
):
    """Streaming: gradients must not push logits out of L2 that are still to be read."""
    at = _offsets(start, c, class_stride, UNIT, AXIS)
    tl.store(grad_ptr + at, g.to(grad_ptr.dtype.element_ty), mask=mask, cache_modifier=".cs")


@triton.jit
def _add_block(
    row_max,
    row_sum,
    dot,
    mass,
    x,
    q,
    mask,
    MASS: tl.constexpr,
    AXIS: tl.constexpr,
):
    """The statistics of rows with one more block; also exp(x - base), and the base."""
    new_max = tl.maximum(row_max, tl.max(x, AXIS))
    # exp(x - max) would be NaN in a part of a row that holds nothing but -inf.
    old_base = tl.where(row_max == -float("inf"), 0.0, row_max)
    base = tl.where(new_max == -float("inf"), 0.0, new_max)
    d = x - tl.expand_dims(base, AXIS)
    e = tl.exp(d)
    row_sum = row_sum * tl.exp(row_max - base) + tl.sum(e, AXIS)
    if MASS:
        # An infinite mass's inf * 0 is no NaN.
        moved = tl.where(old_base == base, 0.0, mass * (old_base - base))
        dot += moved + tl.sum(tl.where(mask & (d != 0.0), q * d, 0.0), AXIS)
        mass += tl.sum(q, AXIS)
    return new_max, row_sum, dot, mass, e


@triton.jit
def _gradient(
    e, q, c, label, true_mass, factor, up, live, LABELS: tl.constexpr, AXIS: tl.constexpr
):
    """up (a p_c - q_c), subtracted before it is rounded to the logits' type."""
    up = tl.expand_dims(up, AXIS)
    if LABELS:
        # An infinite factor makes the true class NaN, where torch has inf - inf.
        own = tl.expand_dims(true_mass, AXIS) + (up - up)
        q = tl.where(c == tl.expand_dims(label, AXIS), q + own, q)
    g = up * (factor * e - q)
    return tl.where(tl.expand_dims(live, AXIS), g, 0.0)


@triton.jit
def _factor(mass, row_sum, AXIS: tl.constexpr):
    """a / sum of rows, as a block. (Divided before they are expanded, Triton 3.6 fails to compile
    the backward kernel where 32 classes or fewer share a block.)"""
    return tl.expand_dims(mass, AXIS) / tl.expand_dims(row_sum, AXIS)


@triton.jit
def _divisor(total_weight, uniform):
    """What the mean divides by: weights that add up to 0 make label smoothing's part NaN."""
    return tl.where((total_weight == 0) & (uniform > 0), float("nan"), total_weight)


@triton.jit
def _total_weight(parts_ptr, parts, rows, LABELS: tl.constexpr, PARTS: tl.constexpr):
    if LABELS:
        i = tl.arange(0, PARTS)
        total = tl.sum(tl.load(parts_ptr + i, mask=i < parts, other=0.0), 0)
    else:
        total = rows.to(tl.float64)
    return total


# -- total weight -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "rows_per_part", "classes", "ignore_index"])
def _total_weight_kernel(
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


# -- loss, with its gradient ------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "parts", "ignore_index"])
def _forward_kernel(
    logits_ptr,
    target_ptr,  # int64 (rows), or probabilities
    weight_ptr,  # (classes) or None
    parts_ptr,  # (parts) float64, of the total weight; or None
    loss_ptr,  # reduction none: (rows); else (programs) float64
    grad_ptr,  # None without GRADIENT, as is what follows
    unit_ptr,  # 0-dim float32
    scale_ptr,  # 0-dim, reference.half_gradient_scale; None: the gradient is not held in units
    rows,
    classes,
    positions,
    parts,
    logits_batch,
    logits_class,
    logits_position,
    target_batch,
    target_class,
    target_position,
    grad_batch,
    grad_class,
    grad_position,
    ignore_index: tl.int64,
    keep: tl.float64,  # 1 - e
    uniform: tl.float64,  # e / C
    LABELS: tl.constexpr,
    WEIGHT: tl.constexpr,
    SMOOTHING: tl.constexpr,
    REDUCTION: tl.constexpr,
    GRADIENT: tl.constexpr,
    ACC: tl.constexpr,
    UNIT: tl.constexpr,
    AXIS: tl.constexpr,
    IN_ENTRY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LOOP: tl.constexpr,
    EDGE: tl.constexpr,
    PARTS: tl.constexpr,
):
    MASS: tl.constexpr = SMOOTHING or not LABELS
    # The second sweep wants the lines of the first again.
    EVICT: tl.constexpr = "evict_last" if GRADIENT and LOOP else "evict_first"
    if AXIS == 1:
        classes = _known_multiple(classes, UNIT)
    row, entry, position, inside = _rows_of_program(rows, positions, ROWS, IN_ENTRY, UNIT, AXIS)
    logits_start = _starts(entry, position, logits_batch, logits_position, UNIT, AXIS)
    target_start = _starts(entry, position, target_batch, target_position, UNIT, AXIS)
    grad_start = _starts(entry, position, grad_batch, grad_position, UNIT, AXIS)
    live = inside
    label = tl.zeros([ROWS], tl.int64)
    true_mass = tl.zeros([ROWS], ACC)
    if LABELS:
        label, live, true_mass = _load_labels(
            target_ptr, weight_ptr, row, inside, classes, ignore_index, keep, WEIGHT, ACC
        )
        true_at = logits_start + tl.where(label >= 0, label, 0).to(tl.int64) * logits_class
        true_logit = tl.load(logits_ptr + true_at, mask=label >= 0, other=0.0).to(ACC)

    row_max = tl.full([ROWS], -float("inf"), ACC)
    row_sum = tl.zeros([ROWS], ACC)
    dot = tl.zeros([ROWS], ACC)
    mass = tl.zeros([ROWS], ACC)
    # Long rows that are ignored are not read. Short ones are: they would wait for their label first,
    # and among positions they would break up the vectors.
    read = tl.expand_dims(live if AXIS == 1 and LOOP else inside, AXIS)
    length = classes
    if EDGE > 1:
        # Rows of, say, 50257 classes begin anywhere between 16-byte words: their edges make a
        # small block, and what follows sees the whole words as the row.
        edge_c, edge, head, length = _edges(logits_start, classes, EDGE)
        edge_mask = edge & read
        edge_x = _load_logits(
            logits_ptr, logits_start, logits_class, edge_c, edge_mask, EVICT, ACC, UNIT, AXIS
        )
        edge_q = _load_mass(
            target_ptr, target_start, target_class, weight_ptr, edge_c, edge_mask, classes, keep, uniform,
            LABELS, WEIGHT, SMOOTHING, ACC, UNIT, AXIS,
        )  # fmt: skip
        row_max, row_sum, dot, mass, edge_e = _add_block(
            row_max, row_sum, dot, mass, edge_x, edge_q, edge_mask, MASS, AXIS
        )
        edge_label, edge_grad_start = label, grad_start
        logits_start = _word_start(logits_start, EDGE)
        grad_start = _word_start(grad_start, EDGE)
        label -= tl.reshape(head, [ROWS])
        if not LABELS:
            target_start = _word_start(target_start, EDGE)
        if WEIGHT:
            weight_ptr += head
    if LOOP:
        for first in range(0, classes, BLOCK):
            c = _block_classes(first, BLOCK, AXIS)
            mask = (c < length) & read
            x = _load_logits(
                logits_ptr, logits_start, logits_class, c, mask, EVICT, ACC, UNIT, AXIS
            )
            q = _load_mass(
                target_ptr, target_start, target_class, weight_ptr, c, mask, length, keep, uniform,
                LABELS, WEIGHT, SMOOTHING, ACC, UNIT, AXIS,
            )  # fmt: skip
            row_max, row_sum, dot, mass, e = _add_block(
                row_max, row_sum, dot, mass, x, q, mask, MASS, AXIS
            )
    else:
        c = _block_classes(0, BLOCK, AXIS)
        mask = (c < length) & read
        x = _load_logits(
            logits_ptr, logits_start, logits_class, c, mask, "evict_first", ACC, UNIT, AXIS
        )
        q = _load_mass(
            target_ptr, target_start, target_class, weight_ptr, c, mask, length, keep, uniform,
            LABELS, WEIGHT, SMOOTHING, ACC, UNIT, AXIS,
        )  # fmt: skip
        row_max, row_sum, dot, mass, e = _add_block(
            row_max, row_sum, dot, mass, x, q, mask, MASS, AXIS
        )

    # A whole row of -inf has no softmax: NaN, as in torch.
    row_sum = tl.where(row_max == -float("inf"), float("nan"), row_sum)
    if LABELS:
        d = true_logit - row_max
        dot += tl.where(d == 0.0, 0.0, true_mass * d)
        mass += true_mass
    loss = tl.where(live, mass * tl.log(row_sum) - dot, 0.0)
    if REDUCTION == 0:
        tl.store(loss_ptr + row, loss.to(loss_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(loss_ptr + tl.program_id(0), tl.sum(loss.to(tl.float64), 0))
    if GRADIENT:
        upstream = tl.full((), 1.0, tl.float64)
        unit = upstream
        if REDUCTION == 1:
            upstream /= _divisor(_total_weight(parts_ptr, parts, rows, LABELS, PARTS), uniform)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr).to(tl.float64)
            waits = upstream - upstream == 0  # not where the divisor makes it inf or NaN
            unit = tl.where(waits, upstream / scale, unit)
            upstream = tl.where(waits, scale, upstream)
        # Under a mask: a branch here would part what the registers are given to, and spill on sm_80.
        tl.store(unit_ptr, unit.to(tl.float32), mask=tl.program_id(0) == 0)
        up = tl.full([ROWS], upstream.to(ACC), ACC)
        factor = _factor(mass, row_sum, AXIS)
        if EDGE > 1:
            edge_e = tl.exp(edge_x - tl.expand_dims(row_max, AXIS))
            edge_g = _gradient(
                edge_e, edge_q, edge_c, edge_label, true_mass, factor, up, live, LABELS, AXIS
            )
            edge_mask = edge & tl.expand_dims(inside, AXIS)
            _store_gradient(
                grad_ptr, edge_grad_start, grad_class, edge_c, edge_g, edge_mask, UNIT, AXIS
            )
        if LOOP:
            blocks = tl.cdiv(classes, BLOCK)
            for i in range(blocks):
                # Backwards: what was read last is the surest to be in cache.
                c = _block_classes((blocks - 1 - i) * BLOCK, BLOCK, AXIS)
                mask = (c < length) & read
                x = _load_logits(
                    logits_ptr, logits_start, logits_class, c, mask, "evict_first", ACC, UNIT, AXIS
                )
                q = _load_mass(
                    target_ptr, target_start, target_class, weight_ptr, c, mask, length, keep, uniform,
                    LABELS, WEIGHT, SMOOTHING, ACC, UNIT, AXIS,
                )  # fmt: skip
                e = tl.exp(x - tl.expand_dims(row_max, AXIS))
                g = _gradient(e, q, c, label, true_mass, factor, up, live, LABELS, AXIS)
                mask = (c < length) & tl.expand_dims(inside, AXIS)
                _store_gradient(grad_ptr, grad_start, grad_class, c, g, mask, UNIT, AXIS)
        else:
            g = _gradient(e, q, c, label, true_mass, factor, up, live, LABELS, AXIS)
            mask = (c < length) & tl.expand_dims(inside, AXIS)
            _store_gradient(grad_ptr, grad_start, grad_class, c, g, mask, UNIT, AXIS)


# -- loss of all rows -------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["count", "parts", "rows"])
def _reduce_kernel(
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
        loss /= _divisor(_total_weight(parts_ptr, parts, rows, LABELS, PARTS), uniform)
    if loss_ptr.dtype.element_ty != tl.float64:
        loss = loss.to(tl.float32)  # no target converts float64 to bfloat16 itself
    tl.store(loss_ptr, loss.to(loss_ptr.dtype.element_ty))


# -- scaling ----------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["count", "ignore_index"])
def _scale_kernel(
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


# -- plan -------------------------------------------------------------------------------------------


class Config(NamedTuple):
    rows: int  # of a block
    block: int  # classes of a block
    warps: int
    loop: bool  # several blocks a row


_MIN_BLOCK = 16  # classes: fewer are masked, so that few shapes are compiled
_PARTS = 256  # of the total weight: all SMs count, and every program adds up 2 KB
_LABELS_PER_PART = 1024
_SCALE_PROGRAMS = 2048
_SCALE_BLOCK = 4096


def _config(
    classes: int, class_axis: int, itemsize: int, dense: bool, edges: bool = False
) -> Config:
    """Block and warps of the forward kernel. No hardware has timed these.

    Args:
        classes: C.
        class_axis: of a block: 1 where classes are contiguous, so that lanes run over them.
        itemsize: bytes of a logit.
        dense: every class carries target mass, so a block holds q next to x.
        edges: rows do not begin and end with 16-byte words, which takes registers.
    """
    registers = (2 if itemsize == 8 else 1) * (2 if dense else 1)  # of one element
    block = max(triton.next_power_of_2(classes), _MIN_BLOCK)
    if class_axis == 0:
        # 128 bytes of positions, a whole line, up to 256 classes; more are swept twice.
        rows = 128 // itemsize
        limit = 256 // registers
        if block > limit:
            return Config(rows, 64 // registers, 8, True)
        rows = max(rows, min(2048 // block, 128))
        return Config(rows, block, _warps(rows * block, 32 if block > 64 else 16), False)
    # One program of 16 warps fills an SM: 128 registers a thread, 64 of them the row.
    limit = 32768 // registers // (2 if edges else 1)
    if block > limit:
        # More than 32 registers a thread in 32 warps, so that one row an SM is in flight: 132 rows
        # of 128k bfloat16 are 34 MB, and the second sweep finds them in L2. (A program of 64-wide
        # wavefronts cannot have more than 16.)
        return Config(1, limit, 16 if torch.version.hip else 32, True)
    # Short rows share a program, which adds up 2 KB of label counts whatever it holds.
    rows = max(1, (4096 if block < 128 else 2048) // block)
    return Config(rows, block, _warps(rows * block, 16 if rows * block <= 8192 else 32), False)


def _warps(elements: int, per_thread: int) -> int:
    return min(max(elements // (32 * per_thread), 4), 16)


def _unit(classes: int, positions: int, strides: list[Strides], class_axis: int) -> int:
    """Elements that always stand or fall together, up to 16 bytes of half precision: the largest
    power of two that divides every step across the lanes' axis and the end of that axis.
    """
    across = [s.position if class_axis == 1 else s.cls for s in strides]
    batch = [s.batch for s in strides]
    return math.gcd(8, classes if class_axis == 1 else positions, *across, *batch)


_MIN_EDGE_CLASSES = 256  # where edges of up to 16 elements are little beside the row


def _edge(classes: int, strides: list[Strides], class_axis: int, itemsize: int, unit: int) -> int:
    """Elements of the 16-byte words that rows begin and end between, in the same place of a word
    in every tensor; 1 where rows are whole words anyway, or cannot be read as such.
    """
    word = 16 // itemsize
    if class_axis == 0 or unit >= word or classes < _MIN_EDGE_CLASSES:
        return 1
    places = {(s.batch % word, s.position % word) for s in strides}
    return word if len(places) == 1 and all(s.cls == 1 for s in strides) else 1


# -- launchers --------------------------------------------------------------------------------------


class _Tensors:
    """Logits, or their gradient, and targets: checked, and as the kernels see them."""

    def __init__(self, logits: Tensor, target: Tensor) -> None:
        _check(logits.dtype in _DTYPES, "logits must be float32, float64, bfloat16 or float16")
        _check(logits.dim() >= 1, "logits must have a class dimension")
        self.shape = logits.shape
        self.accumulate = torch.float64 if logits.dtype == torch.float64 else torch.float32
        self.row_shape = layouts.row_shape(self.shape)
        self.classes = self.shape[layouts.class_dim(self.shape)]
        self.positions = self.shape[2:].numel()
        self.rows = self.row_shape.numel()
        _check(self.classes <= 2**30, "logits may have at most 2^30 classes")
        self.labels = target.dtype == torch.int64
        if self.labels:
            _check(target.shape == self.row_shape, "target must have the shape of the loss")
        else:
            _check(target.shape == self.shape, "probabilities must have the shape of logits")
            _check(
                target.dtype in (logits.dtype, self.accumulate),
                "probabilities must have the type of logits, or float32 with half precision logits",
            )
        _check(target.device == logits.device, "target must be on the device of logits")
        self.logits, self.logits_strides = viewed(logits)
        self.target_strides = Strides(0, 0, 0)
        if self.labels:
            self.target = target.contiguous()
        else:
            self.target, self.target_strides = viewed(target)


class _Call(_Tensors):
    """The arguments that both losses share, checked, and what the kernels take of them."""

    def __init__(
        self, logits: Tensor, target: Tensor, weight: Tensor | None, options: Options
    ) -> None:
        super().__init__(logits, target)
        _check(options.reduction in REDUCTIONS.values(), "reduction must be 0, 1 or 2")
        _check(not options.label_smoothing > 1.0, "label_smoothing must be at most 1")
        _check(
            options.loss_dtype in _DTYPES, "the loss must be float32, float64, bfloat16 or float16"
        )
        if weight is not None:
            _check(weight.shape == (self.classes,), "weight must have shape (C)")
            _check(
                weight.dtype == self.accumulate,
                "weight must be float32, or float64 where logits are",
            )
            _check(weight.device == logits.device, "weight must be on the device of logits")
            weight = weight.contiguous()
        self.weight = weight
        self.options = options
        self.uniform = options.smoothing / max(self.classes, 1)

    def rows_tensor(self, dtype: torch.dtype) -> Tensor:
        return torch.empty(self.row_shape, dtype=dtype, device=self.logits.device)

    def scalar(self, dtype: torch.dtype) -> Tensor:
        return torch.empty((), dtype=dtype, device=self.logits.device)

    def plan(self, grad: Tensor | None) -> tuple[Config, int, int, dict[str, object]]:
        """The configuration, `_edge`, the number of programs, and the arguments that follow."""
        strides = [self.logits_strides, self.target_strides]
        strides.append(Strides(0, 0, 0) if grad is None else viewed(grad)[1])
        positions = self.positions
        if positions == 1 or all(s.batch == s.position * positions for s in strides):
            # Rows evenly spaced in every tensor are the positions of one batch entry.
            step = "batch" if positions == 1 else "position"
            strides = [s._replace(batch=0, position=getattr(s, step)) for s in strides]
            positions = self.rows
        itemsize = self.logits.dtype.itemsize
        tensors = [self.logits, None if self.labels else self.target, grad]
        used = [(t, s) for t, s in zip(tensors, strides, strict=True) if t is not None]
        class_axis = int(self.classes == 1 or all(s.cls == 1 for _, s in used))
        unit = _unit(self.classes, positions, strides, class_axis)
        edge = 1
        if all(t.data_ptr() % 16 == 0 for t, _ in used):
            edge = _edge(self.classes, [s for _, s in used], class_axis, itemsize, unit)
        dense = self.options.smoothed or not self.labels
        config = _config(self.classes, class_axis, itemsize, dense, edge > 1)
        in_entry = positions >= config.rows or positions == self.rows
        if in_entry:
            programs = self.rows // positions * triton.cdiv(positions, config.rows)
        else:
            programs = triton.cdiv(self.rows, config.rows)
        arguments: dict[str, object] = {
            "rows": self.rows,
            "classes": self.classes,
            "positions": positions,
            "ignore_index": self.options.ignore_index,
            "keep": 1.0 - self.options.smoothing,
            "uniform": self.uniform,
            "LABELS": self.labels,
            "WEIGHT": self.weight is not None,
            "SMOOTHING": self.options.smoothed,
            "REDUCTION": self.options.reduction,
            "ACC": _TRITON[self.accumulate],
            "UNIT": unit,
            "AXIS": class_axis,
            "IN_ENTRY": in_entry,
            "ROWS": config.rows,
            "BLOCK": config.block,
            "num_warps": config.warps,
            "enable_fp_fusion": False,
        }
        for name, s in zip(("logits", "target", "grad"), strides, strict=True):
            arguments |= {f"{name}_batch": s.batch, f"{name}_class": s.cls}
            arguments[f"{name}_position"] = s.position
        return config, edge, programs, arguments

    def total_weight_parts(self) -> Tensor | None:
        """What the mean divides by, in parts; None where that is the number of rows."""
        if not self.labels or self.options.reduction != MEAN:
            return None
        parts = min(triton.cdiv(self.rows, _LABELS_PER_PART), _PARTS)
        result = torch.empty(parts, dtype=torch.float64, device=self.logits.device)
        _total_weight_kernel[(parts,)](
            self.target,
            self.weight,
            result,
            self.rows,
            triton.cdiv(self.rows, parts),
            self.classes,
            self.options.ignore_index,
            WEIGHT=self.weight is not None,
            BLOCK=_LABELS_PER_PART,
            num_warps=4,
            enable_fp_fusion=False,
        )
        return result

    def reduce(self, loss_parts: Tensor, parts: Tensor | None, loss: Tensor) -> None:
        _reduce_kernel[(1,)](
            loss_parts,
            parts,
            loss,
            loss_parts.numel(),
            0 if parts is None else parts.numel(),
            self.rows,
            self.uniform,
            LABELS=self.labels,
            REDUCTION=self.options.reduction,
            BLOCK=2048,
            PARTS=_PARTS,
            num_warps=8,
            enable_fp_fusion=False,
        )


_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_TRITON = {torch.float32: tl.float32, torch.float64: tl.float64}


def _check(ok: bool, what: str) -> None:
    """torch.ops is callable by anyone: what memory depends on is checked before a launch."""
    if not ok:
        raise RuntimeError(f"fastopt::cross_entropy: {what}")


def cross_entropy_forward(
    logits: Tensor,  # (C), (N, C) or (N, C, d1, ...)
    target: Tensor,  # int64 (N, d1, ...), or floating point like logits
    weight: Tensor | None,  # (C)
    options: Options,
) -> Tensor:
    call = _Call(logits, target, weight, options)
    if logits.numel() == 0:
        return reference.cross_entropy_forward(logits, target, weight, options)
    return _forward(call)


def cross_entropy_forward_backward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: Options,
    largest_mass: Tensor | None = None,  # 0-dim, of float16 logits
) -> tuple[Tensor, Tensor, Tensor]:
    call = _Call(logits, target, weight, options)
    if logits.numel() == 0:
        return reference.cross_entropy_forward_backward(logits, target, weight, options)
    grad_logits = layouts.empty_gradient(logits)
    unit = call.scalar(torch.float32)
    scale = None
    if logits.dtype == torch.float16:
        if largest_mass is None:
            largest_mass = torch.ones_like(unit)
        _check(
            largest_mass.numel() == 1 and largest_mass.device == logits.device,
            "largest_mass must be one number on the device of logits",
        )
        scale = reference.half_gradient_scale(largest_mass)
    return _forward(call, grad_logits, unit, scale), grad_logits, unit


def _forward(
    call: _Call,
    grad_logits: Tensor | None = None,
    unit: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    config, edge, programs, arguments = call.plan(grad_logits)
    with torch.cuda.device_of(call.logits):
        parts = call.total_weight_parts()
        if call.options.reduction == NONE:
            loss = loss_parts = call.rows_tensor(call.options.loss_dtype)
        else:
            loss = call.scalar(call.options.loss_dtype)
            loss_parts = torch.empty(programs, dtype=torch.float64, device=loss.device)
        _forward_kernel[(programs,)](
            call.logits,
            call.target,
            call.weight,
            parts,
            loss_parts,
            grad_logits,
            unit,
            scale,
            parts=0 if parts is None else parts.numel(),
            GRADIENT=grad_logits is not None,
            LOOP=config.loop,
            EDGE=edge,
            PARTS=_PARTS,
            **arguments,
        )
        if call.options.reduction != NONE:
            call.reduce(loss_parts, parts, loss)
    return loss


def cross_entropy_scale_(
    grad_logits: Tensor,  # dense, in any order of its dimensions
    factor: Tensor,  # 0-dim, or one for each row; on the device of grad_logits
    target: Tensor,
    ignore_index: int,
    smoothed: bool,
) -> None:
    """Multiplies in place; a factor of 1 touches no memory."""
    call = _Tensors(grad_logits, target)
    _check(factor.dtype in _DTYPES, "factor must be floating point")
    _check(factor.device == grad_logits.device, "every tensor must be on one device")
    if factor.numel() != 1:
        _check(factor.shape == call.row_shape, "factor must be one number, or one for each row")
        # One pass, as ours would be.
        reference.cross_entropy_scale_(grad_logits, factor, target, ignore_index, smoothed)
        return
    count = grad_logits.numel()
    if count == 0:
        return
    _check(
        layouts.is_dense(grad_logits) and call.logits is grad_logits,
        "grad_logits must be dense, in a layout of the ops' own",
    )
    with torch.cuda.device_of(grad_logits):
        _scale_kernel[(min(triton.cdiv(count, _SCALE_BLOCK), _SCALE_PROGRAMS),)](
            grad_logits,
            factor,
            call.target if call.labels else None,
            count,
            call.classes,
            call.positions,
            *call.logits_strides,
            ignore_index,
            SMOOTHED=smoothed,
            ACC=_TRITON[call.accumulate],
            BLOCK=_SCALE_BLOCK,
            num_warps=8,
            enable_fp_fusion=False,
        )
