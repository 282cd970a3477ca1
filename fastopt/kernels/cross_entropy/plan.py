"""Which blocks the kernels work in: pure functions of shapes and strides."""

import math
from typing import NamedTuple

import torch

from fastopt.layouts import Strides


class Config(NamedTuple):
    rows: int  # of a block
    block: int  # classes of a block
    warps: int
    loop: bool  # several blocks a row


_MIN_BLOCK = 16  # classes: fewer are masked, so that few shapes are compiled
PARTS = 256  # of the total weight: all SMs count, and every program adds up 2 KB
LABELS_PER_PART = 1024
SCALE_PROGRAMS = 2048
SCALE_BLOCK = 4096


def config(
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
    block = max(1 << (classes - 1).bit_length(), _MIN_BLOCK)
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


def unit(classes: int, positions: int, strides: list[Strides], class_axis: int) -> int:
    """Elements that always stand or fall together, up to 16 bytes of half precision: the largest
    power of two that divides every step across the lanes' axis and the end of that axis.
    """
    across = [s.position if class_axis == 1 else s.cls for s in strides]
    batch = [s.batch for s in strides]
    return math.gcd(8, classes if class_axis == 1 else positions, *across, *batch)


_MIN_EDGE_CLASSES = 256  # where edges of up to 16 elements are little beside the row


def edge(classes: int, strides: list[Strides], class_axis: int, itemsize: int, unit: int) -> int:
    """Elements of the 16-byte words that rows begin and end between, in the same place of a word
    in every tensor; 1 where rows are whole words anyway, or cannot be read as such.
    """
    word = 16 // itemsize
    if class_axis == 0 or unit >= word or classes < _MIN_EDGE_CLASSES:
        return 1
    places = {(s.batch % word, s.position % word) for s in strides}
    return word if len(places) == 1 and all(s.cls == 1 for s in strides) else 1
