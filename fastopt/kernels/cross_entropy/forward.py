"""The loss of every row, with its gradient."""

# Kernels annotate their compile-time parameters only; Triton has no type stubs.
# mypy: disallow-incomplete-defs=False, disable-error-code="import-untyped,import-not-found"

import triton
import triton.language as tl

from fastopt.kernels.cross_entropy.blocks import (
    add_block,
    block_classes,
    block_gradient,
    known_multiple,
    load_labels,
    load_logits,
    load_mass,
    row_edges,
    row_starts,
    rows_of_program,
    softmax_scale,
    store_gradient,
    word_start,
)
from fastopt.kernels.cross_entropy.sums import mean_divisor, total_weight


@triton.jit(do_not_specialize=["rows", "parts", "ignore_index"])
def forward_kernel(
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
    lse_square_scale: tl.float64,
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
        classes = known_multiple(classes, UNIT)
    row, entry, position, inside = rows_of_program(rows, positions, ROWS, IN_ENTRY, UNIT, AXIS)
    logits_start = row_starts(entry, position, logits_batch, logits_position, UNIT, AXIS)
    target_start = row_starts(entry, position, target_batch, target_position, UNIT, AXIS)
    grad_start = row_starts(entry, position, grad_batch, grad_position, UNIT, AXIS)
    live = inside
    label = tl.zeros([ROWS], tl.int64)
    true_mass = tl.zeros([ROWS], ACC)
    if LABELS:
        label, live, true_mass = load_labels(
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
        edge_c, edge, head, length = row_edges(logits_start, classes, EDGE)
        edge_mask = edge & read
        edge_x = load_logits(
            logits_ptr, logits_start, logits_class, edge_c, edge_mask, EVICT, ACC, UNIT, AXIS
        )
        edge_q = load_mass(
            target_ptr, target_start, target_class, weight_ptr, edge_c, edge_mask, classes, keep, uniform,
            LABELS, WEIGHT, SMOOTHING, ACC, UNIT, AXIS,
        )  # fmt: skip
        row_max, row_sum, dot, mass, edge_e = add_block(
            row_max, row_sum, dot, mass, edge_x, edge_q, edge_mask, MASS, AXIS
        )
        edge_label, edge_grad_start = label, grad_start
        logits_start = word_start(logits_start, EDGE)
        grad_start = word_start(grad_start, EDGE)
        label -= tl.reshape(head, [ROWS])
        if not LABELS:
            target_start = word_start(target_start, EDGE)
        if WEIGHT:
            weight_ptr += head
    if LOOP:
        for first in range(0, classes, BLOCK):
            c = block_classes(first, BLOCK, AXIS)
            mask = (c < length) & read
            x = load_logits(logits_ptr, logits_start, logits_class, c, mask, EVICT, ACC, UNIT, AXIS)
            q = load_mass(
                target_ptr, target_start, target_class, weight_ptr, c, mask, length, keep, uniform,
                LABELS, WEIGHT, SMOOTHING, ACC, UNIT, AXIS,
            )  # fmt: skip
            row_max, row_sum, dot, mass, e = add_block(
                row_max, row_sum, dot, mass, x, q, mask, MASS, AXIS
            )
    else:
        c = block_classes(0, BLOCK, AXIS)
        mask = (c < length) & read
        x = load_logits(
            logits_ptr, logits_start, logits_class, c, mask, "evict_first", ACC, UNIT, AXIS
        )
        q = load_mass(
            target_ptr, target_start, target_class, weight_ptr, c, mask, length, keep, uniform,
            LABELS, WEIGHT, SMOOTHING, ACC, UNIT, AXIS,
        )  # fmt: skip
        row_max, row_sum, dot, mass, e = add_block(
            row_max, row_sum, dot, mass, x, q, mask, MASS, AXIS
        )

    # A whole row of -inf has no softmax: NaN, as in torch.
    row_sum = tl.where(row_max == -float("inf"), float("nan"), row_sum)
    if LABELS:
        d = true_logit - row_max
        dot += tl.where(d == 0.0, 0.0, true_mass * d)
        mass += true_mass
    log_sum = tl.log(row_sum)
    lse = row_max + log_sum
    z = tl.full((), lse_square_scale, ACC)
    loss = mass * log_sum - dot
    loss = tl.where(z == 0.0, loss, loss + z * lse * lse)  # a loss of -0.0 keeps its sign
    loss = tl.where(live, loss, 0.0)
    if REDUCTION == 0:
        tl.store(loss_ptr + row, loss.to(loss_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(loss_ptr + tl.program_id(0), tl.sum(loss.to(tl.float64), 0))
    if GRADIENT:
        upstream = tl.full((), 1.0, tl.float64)
        unit = upstream
        if REDUCTION == 1:
            upstream /= mean_divisor(total_weight(parts_ptr, parts, rows, LABELS, PARTS), uniform)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr).to(tl.float64)
            waits = upstream - upstream == 0  # not where the divisor makes it inf or NaN
            unit = tl.where(waits, upstream / scale, unit)
            upstream = tl.where(waits, scale, upstream)
        # Under a mask: a branch here would part what the registers are given to, and spill on sm_80.
        tl.store(unit_ptr, unit.to(tl.float32), mask=tl.program_id(0) == 0)
        up = tl.full([ROWS], upstream.to(ACC), ACC)
        factor = softmax_scale(mass + 2 * z * lse, row_sum, AXIS)
        if EDGE > 1:
            edge_e = tl.exp(edge_x - tl.expand_dims(row_max, AXIS))
            edge_g = block_gradient(
                edge_e, edge_q, edge_c, edge_label, true_mass, factor, up, live, LABELS, AXIS
            )
            edge_mask = edge & tl.expand_dims(inside, AXIS)
            store_gradient(
                grad_ptr, edge_grad_start, grad_class, edge_c, edge_g, edge_mask, UNIT, AXIS
            )
        if LOOP:
            blocks = tl.cdiv(classes, BLOCK)
            for i in range(blocks):
                # Backwards: what was read last is the surest to be in cache.
                c = block_classes((blocks - 1 - i) * BLOCK, BLOCK, AXIS)
                mask = (c < length) & read
                x = load_logits(
                    logits_ptr, logits_start, logits_class, c, mask, "evict_first", ACC, UNIT, AXIS
                )
                q = load_mass(
                    target_ptr, target_start, target_class, weight_ptr, c, mask, length, keep, uniform,
                    LABELS, WEIGHT, SMOOTHING, ACC, UNIT, AXIS,
                )  # fmt: skip
                e = tl.exp(x - tl.expand_dims(row_max, AXIS))
                g = block_gradient(e, q, c, label, true_mass, factor, up, live, LABELS, AXIS)
                mask = (c < length) & tl.expand_dims(inside, AXIS)
                store_gradient(grad_ptr, grad_start, grad_class, c, g, mask, UNIT, AXIS)
        else:
            g = block_gradient(e, q, c, label, true_mass, factor, up, live, LABELS, AXIS)
            mask = (c < length) & tl.expand_dims(inside, AXIS)
            store_gradient(grad_ptr, grad_start, grad_class, c, g, mask, UNIT, AXIS)
