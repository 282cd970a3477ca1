"""What the forward kernel does with one block of rows and classes.

AXIS is the axis of the classes in a block; rows have the other one.
"""

# Kernels annotate their compile-time parameters only; Triton has no type stubs.
# mypy: disallow-incomplete-defs=False, disable-error-code="import-untyped,import-not-found"

import triton
import triton.language as tl


@triton.jit
def known_multiple(n, UNIT: tl.constexpr):
    """n, a multiple of UNIT, which the compiler has to see to use vectors under a mask."""
    return n // UNIT * UNIT


@triton.jit
def rows_of_program(
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
            positions = known_multiple(positions, UNIT)
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
def row_starts(
    entry, position, batch_stride, position_stride, UNIT: tl.constexpr, AXIS: tl.constexpr
):
    if AXIS == 1:
        position_stride = known_multiple(position_stride, UNIT)
    return entry * known_multiple(batch_stride, UNIT) + position * position_stride


@triton.jit
def block_classes(first, BLOCK: tl.constexpr, AXIS: tl.constexpr):
    return tl.expand_dims(first + tl.arange(0, BLOCK), 1 - AXIS)


@triton.jit
def _offsets(start, c, class_stride, UNIT: tl.constexpr, AXIS: tl.constexpr):
    """start: of the rows. In 64 bits where classes are strided: C * stride may pass 2^31."""
    if AXIS == 0:
        c = c.to(tl.int64) * known_multiple(class_stride, UNIT)
    return tl.expand_dims(start, AXIS) + c


@triton.jit
def load_labels(
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
def word_start(start, EDGE: tl.constexpr):
    return known_multiple(start + (EDGE - 1), EDGE)


@triton.jit
def row_edges(start, classes, EDGE: tl.constexpr):
    """What of rows lies in whole words of EDGE elements, and what does not.

    Returns the classes of a block (rows, 2 EDGE) that holds both edges, which of them exist, the
    class that the first whole word begins with, and the number of classes in whole words.
    """
    start = tl.expand_dims(start, 1)
    first = word_start(start, EDGE)
    last = known_multiple(start + classes, EDGE)
    i = tl.expand_dims(tl.arange(0, 2 * EDGE), 0)
    c = tl.where(i < EDGE, i, last - start + (i - EDGE)).to(tl.int32)
    exists = tl.where(i < EDGE, i < first - start, c < classes)
    return c, exists, (first - start).to(tl.int32), (last - first).to(tl.int32)


@triton.jit
def load_mass(
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
        if not LABELS:
            at = _offsets(target_start, c, target_class, UNIT, AXIS)
            q += tl.full([1, 1], keep, ACC) * tl.load(target_ptr + at, mask=mask, other=0.0).to(ACC)
        if WEIGHT:  # last: an infinite one of no mass alone is NaN
            q *= tl.load(weight_ptr + c, mask=c < classes, other=0.0)
        q = tl.where(mask, q, 0.0)
    return q


@triton.jit
def load_logits(
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
def store_gradient(
    grad_ptr, start, class_stride, c, g, mask, UNIT: tl.constexpr, AXIS: tl.constexpr
):
    """Streaming: gradients must not push logits out of L2 that are still to be read."""
    at = _offsets(start, c, class_stride, UNIT, AXIS)
    tl.store(grad_ptr + at, g.to(grad_ptr.dtype.element_ty), mask=mask, cache_modifier=".cs")


@triton.jit
def add_block(
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
def block_gradient(
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
def softmax_scale(mass, row_sum, AXIS: tl.constexpr):
    """a / sum of rows, as a block. (Divided before they are expanded, Triton 3.6 fails to compile
    the backward kernel where 32 classes or fewer share a block.)"""
    return tl.expand_dims(mass, AXIS) / tl.expand_dims(row_sum, AXIS)
