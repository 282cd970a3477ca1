"""Where classes, rows and positions of logits are, and how tensors lie in memory.

Logits are (C), (N, C) or (N, C, d1, ...): batch entries, classes, positions. A row is what one loss
is of, so that rows are shaped (), (N) or (N, d1, ...). The compiled kernels have the same in
csrc/host/cross_entropy.h.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


def class_dim(shape: torch.Size) -> int:
    return 0 if len(shape) == 1 else 1


def row_shape(shape: torch.Size) -> torch.Size:
    return shape[:1] + shape[2:] if len(shape) > 1 else shape[:0]


def along_classes(weight: Tensor | None, like: Tensor) -> Tensor:
    """weight, of shape (C), or None for ones, to be broadcast against `like`."""
    if weight is None:
        return like.new_ones(())
    dim = class_dim(like.shape)
    return weight.reshape([-1 if i == dim else 1 for i in range(like.dim())])


def has_no_overlap(x: Tensor, dense: bool = False) -> bool:
    """Whether each element is there once, in any order of the dimensions; and, of dense ones, x
    covers one run of memory.
    """
    step = 1
    if x.numel() == 0:
        return True
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1:
            if stride != step if dense else stride < step:
                return False
            step = stride * size
    return True


def is_dense(x: Tensor) -> bool:
    """Whether x covers one run of memory, each element once, in any order of its dimensions."""
    return x.is_contiguous() or has_no_overlap(x, dense=True)


class Strides(NamedTuple):
    batch: int
    cls: int
    position: int


def viewed(x: Tensor) -> tuple[Tensor, Strides]:
    """As (batch, class, position): a copy where d1, ... do not step through memory as one."""
    if x.dim() == 1:
        return x, Strides(0, x.stride(0), 0)
    if not positions_are_even(x):
        x = x.contiguous()
    wide = [step for size, step in zip(x.shape[2:], x.stride()[2:], strict=True) if size != 1]
    return x, Strides(x.stride(0), x.stride(1), wide[-1] if wide else 0)


def empty_gradient(like: Tensor) -> Tensor:
    """Uninitialised; in the layout of `like` where that is dense and the dimensions behind the
    classes step through memory as one, else contiguous.
    """
    grad = torch.empty_like(like)
    if grad.stride() == like.stride() and positions_are_even(like):
        return grad
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def gradient_strides(like: Tensor) -> tuple[int, ...]:
    """Those of empty_gradient(like)."""
    if is_dense(like) and positions_are_even(like):
        return like.stride()
    strides, step = [], 1
    for size in reversed(like.shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def positions_are_even(x: Tensor) -> bool:
    positions = [(s, step) for s, step in zip(x.shape, x.stride(), strict=True)][2:]
    positions = [(size, step) for size, step in positions if size != 1]
    return all(outer == size * step for (_, outer), (size, step) in pairwise(positions))
