"""SGD in Triton: what csrc/cuda/sgd.h computes, where no CUDA library was built, and on ROCm.

One pass over parameter, gradient and momentum buffer: 20 bytes per float32 parameter with momentum
(reads three, writes two), 12 without. The table of addresses lies in device memory. Rows are cut
into chunks of BLOCK elements and each program takes a run of neighbouring chunks, so that it looks
up its first row once. Float32 arithmetic for half precision and float32, float64 for float64, one
rounding per stored value; the rule is csrc/rules/sgd.h's, multiply-add for multiply-add.
"""

# mypy: disable-error-code="no-untyped-def, import-not-found, import-untyped"
from array import array

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastopt.sgd.table import Launch

# Words of the table, csrc/host/sgd_table.h: SgdRow and SgdGroup, SgdOption.
_ROW_WORDS = tl.constexpr(6)
_GROUP_WORDS = tl.constexpr(5)
_NUMEL, _FIRST_CHUNK = 3, 4  # the latter is called first_block there
_LR, _MOMENTUM, _DAMPENING, _WEIGHT_DECAY = map(tl.constexpr, range(4))


@triton.jit
def _option(group_ptr, OPTION: tl.constexpr):
    """An option of a group, float64: the word itself, or what lies where it points."""
    word = tl.load(group_ptr + OPTION)
    source = (tl.load(group_ptr + 4) >> (8 * OPTION)) & 0xFF
    value = word.to(tl.float64, bitcast=True)
    single = tl.load(word.to(tl.pointer_type(tl.float32)), mask=source == 1, other=0)
    double = tl.load(word.to(tl.pointer_type(tl.float64)), mask=source == 2, other=0)
    bfloat = tl.load(word.to(tl.pointer_type(tl.bfloat16)), mask=source == 3, other=0)
    half = tl.load(word.to(tl.pointer_type(tl.float16)), mask=source == 4, other=0)
    value = tl.where(source == 1, single.to(tl.float64), value)
    value = tl.where(source == 2, double, value)
    value = tl.where(source == 3, bfloat.to(tl.float64), value)
    return tl.where(source == 4, half.to(tl.float64), value)


@triton.jit
def _update(
    param_ptr,
    grad_ptr,
    buffer_ptr,
    offsets,
    limit,  # elements at or beyond it are not there
    options,
    UNSCALE: tl.constexpr,
):
    """csrc/rules/sgd.h: sgd_element."""
    negative_lr, momentum, undamped, weight_decay, inv_scale = options[:5]
    decay, nesterov, maximize, has_buffer, running = options[5:]
    ACC: tl.constexpr = negative_lr.dtype
    mask = offsets < limit
    param = tl.load(param_ptr + offsets, mask=mask, other=0)
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0, eviction_policy="evict_first")
    buffer = tl.load(buffer_ptr + offsets, mask=offsets < tl.where(running, limit, 0), other=0)
    p = param.to(ACC)
    g = grad.to(ACC)
    b = buffer.to(ACC)
    if UNSCALE:
        g *= inv_scale
    g = tl.where(maximize, -g, g)
    g = tl.where(decay, tl.fma(tl.zeros_like(p) + weight_decay, p, g), g)
    updated = tl.fma(tl.zeros_like(p) + undamped, g, momentum * b)
    b = tl.where(running, updated, g)
    ahead = tl.where(nesterov, tl.fma(tl.zeros_like(p) + momentum, b, g), b)
    g = tl.where(has_buffer, ahead, g)
    p = tl.fma(tl.zeros_like(p) + negative_lr, g, p)
    tl.store(
        buffer_ptr + offsets, b.to(buffer.dtype), mask=offsets < tl.where(has_buffer, limit, 0)
    )
    tl.store(param_ptr + offsets, p.to(param.dtype), mask=mask)


@triton.jit
def _update_row(
    row_ptr,
    group_ptr,
    started,
    begin,
    end,
    scale_ptr,
    T: tl.constexpr,
    ACC: tl.constexpr,
    STEP: tl.constexpr,
):
    """Elements [begin, end) of a row, both multiples of STEP. That is each dtype's own: with one for
    all of them, Triton gives the threads of float32 two neighbouring words each, and takes every
    result through shared memory."""
    param = tl.load(row_ptr)
    grad = tl.load(row_ptr + 1)
    buffer = tl.load(row_ptr + 2)
    numel = tl.load(row_ptr + 3)
    momentum = _option(group_ptr, _MOMENTUM)
    weight_decay = _option(group_ptr, _WEIGHT_DECAY)
    flags = tl.load(group_ptr + 4) >> 32
    has_buffer = (buffer != 0) & (momentum != 0)
    running = has_buffer & (started != 0)
    UNSCALE: tl.constexpr = scale_ptr is not None
    inv_scale = tl.full((), 1, ACC)
    if UNSCALE:  # as GradScaler does: by the reciprocal, rounded to float32
        inv_scale = (1 / tl.load(scale_ptr).to(tl.float64)).to(tl.float32).to(ACC)
    options = (
        (-_option(group_ptr, _LR)).to(ACC),
        momentum.to(ACC),
        (1 - _option(group_ptr, _DAMPENING)).to(ACC),
        weight_decay.to(ACC),
        inv_scale,
        weight_decay != 0,  # before rounding, as torch decides it
        (flags & 0xFF) != 0,
        ((flags >> 8) & 0xFF) != 0,
        has_buffer,
        running,
    )
    param_ptr = param.to(tl.pointer_type(T))
    grad_ptr = grad.to(tl.pointer_type(T))
    buffer_ptr = buffer.to(tl.pointer_type(T))
    if (param | grad | buffer) % 16 == 0:
        # The compiler makes 16-byte accesses of these if it knows that the pointers are aligned
        # and that the mask never cuts a vector.
        whole = numel // 16 * 16
        if (whole < numel) & (end >= numel):
            rest = whole + tl.arange(0, 16)
            _update(param_ptr, grad_ptr, buffer_ptr, rest, numel, options, UNSCALE)
        param_ptr = tl.multiple_of(param_ptr, 16)
        grad_ptr = tl.multiple_of(grad_ptr, 16)
        buffer_ptr = tl.multiple_of(buffer_ptr, 16)
        while begin < end:
            offsets = tl.multiple_of(begin, 16) + tl.arange(0, STEP)
            _update(param_ptr, grad_ptr, buffer_ptr, offsets, whole, options, UNSCALE)
            begin += STEP
    else:
        while begin < end:
            offsets = begin + tl.arange(0, STEP)
            _update(param_ptr, grad_ptr, buffer_ptr, offsets, numel, options, UNSCALE)
            begin += STEP


@triton.jit(do_not_specialize=["count", "chunks"])
def _sgd_kernel(
    table_ptr,  # (count * 6 + groups * 5,) int64
    started_ptr,  # (count + 1,) int32; the last counts the programs that are done
    scale_ptr,  # (1,) float32, or None
    inf_ptr,  # (1,) float32, or None
    count,
    chunks,
    BLOCK: tl.constexpr,
):
    groups_ptr = table_ptr + count * _ROW_WORDS
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0).to(tl.int64)
    steps = count
    if inf_ptr is not None:
        skipped = tl.load(inf_ptr) != 0  # NaN too
        chunks = tl.where(skipped, 0, chunks)
        steps = tl.where(skipped, 0, count)
    chunk = program * chunks // programs
    end = (program + 1) * chunks // programs

    # The last row that begins at or before the chunk. Rows without chunks begin where the next does.
    row = count * 0
    high = count
    while high - row > 1:
        middle = (row + high) // 2
        before = tl.load(table_ptr + middle * _ROW_WORDS + 4) <= chunk
        row = tl.where(before, middle, row)
        high = tl.where(before, high, middle)

    while chunk < end:
        row_ptr = table_ptr + row * _ROW_WORDS
        first = tl.load(row_ptr + 4)
        after = tl.load(row_ptr + _ROW_WORDS + 4, mask=row + 1 < count, other=chunks)
        stop = tl.minimum(after, end)
        if chunk < stop:  # else the row has no chunks
            packed = tl.load(row_ptr + 5)
            group_ptr = groups_ptr + (packed & 0xFFFFFFFF) * _GROUP_WORDS
            started = tl.load(started_ptr + row)
            from_ = (chunk - first) * BLOCK
            to = (stop - first) * BLOCK
            element = (packed >> 32) & 0xFF
            # fmt: off
            if element == 0:
                _update_row(row_ptr, group_ptr, started, from_, to, scale_ptr,
                            tl.float32, tl.float32, BLOCK // 2)
            elif element == 1:
                _update_row(row_ptr, group_ptr, started, from_, to, scale_ptr,
                            tl.float64, tl.float64, BLOCK // 4)
            elif element == 2:
                _update_row(row_ptr, group_ptr, started, from_, to, scale_ptr,
                            tl.bfloat16, tl.float32, BLOCK)
            else:
                _update_row(row_ptr, group_ptr, started, from_, to, scale_ptr,
                            tl.float16, tl.float32, BLOCK)
            # fmt: on
            chunk = stop
        row += 1

    # A row's programs must all have seen that this was its first step before it is said to be over.
    tl.debug_barrier()
    if tl.atomic_add(started_ptr + count, 1) == programs - 1:
        tl.store(started_ptr + count, 0)
        first = count * 0
        while first < steps:
            rows = first + tl.arange(0, 128)
            mask = rows < steps
            row_ptr = table_ptr + rows * _ROW_WORDS
            packed = tl.load(row_ptr + 5, mask=mask, other=0)
            momentum = _option(groups_ptr + (packed & 0xFFFFFFFF) * _GROUP_WORDS, _MOMENTUM)
            has_buffer = tl.load(row_ptr + 2, mask=mask, other=0) != 0
            has_elements = tl.load(row_ptr + 3, mask=mask, other=0) != 0
            holds = mask & has_elements & has_buffer & (momentum != 0)
            tl.store(started_ptr + rows, 1, mask=holds)
            first += 128


# Elements of a chunk, threads of a program, programs per multiprocessor: two 16-byte accesses of
# each array a thread and step, in every dtype. Reckoned like csrc/cuda/sgd.h's (96 bytes of loads a
# thread, 48 KB a multiprocessor), not measured.
BLOCK, THREADS, PROGRAMS = 2048, 128, 4
WARPS = THREADS // (64 if torch.version.hip else 32)


def _config(rows: "array[int]", processors: int) -> tuple[int, int]:
    """Write into each row where its chunks begin. Returns the number of chunks and the grid."""
    chunks = 0
    for at in range(0, len(rows), _ROW_WORDS.value):
        rows[at + _FIRST_CHUNK] = chunks
        chunks += -(-rows[at + _NUMEL] // BLOCK)
    return chunks, min(chunks, processors * PROGRAMS)


def _to_device(words: "array[int]", launch: Launch) -> Tensor:
    """A table on the device, without waiting for it: torch keeps the pinned copy until it is read.
    A CUDA graph reads it again in every replay, so what was captured is kept for good."""
    table = torch.frombuffer(words, dtype=torch.int64)
    if launch.device.type != "cuda":
        return table
    if launch.capturing:
        pinned = _pinned.pop() if _pinned and len(_pinned[0]) >= len(table) else table.pin_memory()
        pinned = pinned[: len(table)].copy_(table)
        launch.kept.append(pinned)
    else:
        pinned = table.pin_memory()
        if not _pinned or len(_pinned[0]) < len(table):
            _pinned[:] = [torch.empty_like(table, pin_memory=True)]
    return pinned.to(launch.device, non_blocking=True)


# Memory for the table of a step that is captured, where torch 2.10 cannot pin any: one tensor.
_pinned: list[Tensor] = []


def run(launch: Launch, processors: int) -> None:
    """Enqueue a step on the current stream of the current device, which is the launch's."""
    words = array("q", bytes(launch.rows))
    chunks, grid = _config(words, processors)
    if grid == 0:
        return
    words.frombytes(launch.groups.packed)
    table = _to_device(words, launch)
    _sgd_kernel[(grid,)](
        table,
        launch.started,
        launch.grad_scale,
        launch.found_inf,
        len(launch.rows),
        chunks,
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=False,  # the product that the rule wants rounded stays so
    )
