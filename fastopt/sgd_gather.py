"""SGD's gather: the C++ function that reads the tensors of a step, and the memory it needs from one
step to the next. csrc/cpu/sgd.cpp tells what it does and why it is not Python."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fastopt import ops

# The verdicts on a parameter (the last two: on the whole step).
READY, NO_GRADIENT, NEEDS_BUFFER, TORCH, OVERLAPPING, DONE = 1, 2, 4, 8, 16, 32

# Sizes in words of 8 bytes, asserted in csrc/cpu/sgd.cpp.
ROW_WORDS = 6  # SgdRow
SPAN_WORDS = 2  # Span
GROUP_WORDS = 7  # SgdGroup

# torch's numbers of the types of devices.
_DEVICES = {"cpu": 0, "cuda": 1}


class _Table(ctypes.Structure):
    """csrc/cpu/sgd.cpp: SgdTable."""

    _fields_ = [
        ("params", ctypes.c_void_p),
        ("grads", ctypes.c_void_p),
        ("momentum_buffers", ctypes.c_void_p),
        ("group_of", ctypes.c_void_p),
        ("groups", ctypes.c_void_p),
        ("first_step", ctypes.c_char_p),
        ("rows", ctypes.c_void_p),
        ("verdicts", ctypes.c_void_p),
        ("spans", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("type_offset", ctypes.c_int64),
        ("tensor_offset", ctypes.c_int64),
        ("tensor_type", ctypes.c_void_p),
        ("parameter_type", ctypes.c_void_p),
        ("none", ctypes.c_void_p),
        ("inv_scale", ctypes.c_double),
        ("unscale", ctypes.c_int64),
        ("span_count", ctypes.c_int64),
        ("device_type", ctypes.c_int32),
        ("device_index", ctypes.c_int32),
        ("gather_only", ctypes.c_int64),
    ]


# Where CPython keeps an object's type (last in its header) and the items of a tuple.
_HEADER = object.__basicsize__
_WORD = ctypes.sizeof(ctypes.c_void_p)


def items(objects: tuple[Any, ...]) -> int:
    """The address of a tuple's items."""
    return id(objects) + tuple.__basicsize__


def _find_tensor_offset() -> int | None:
    """Where a tensor object holds its C++ tensor: behind its header, in older torch behind a flag
    as well. None if this Python or this torch lays its objects out in yet another way."""

    def word(address: int) -> int | None:
        return ctypes.c_void_p.from_address(address).value

    tensors = (torch.empty(1), Parameter(torch.empty(1)), torch.empty(0))
    for i, tensor in enumerate(tensors):
        if word(items(tensors) + i * _WORD) != id(tensor):
            return None
        if word(id(tensor) + _HEADER - _WORD) != id(type(tensor)):
            return None
    for offset in (_HEADER, _HEADER + _WORD):
        if all(word(id(tensor) + offset) == tensor._cdata for tensor in tensors):
            return offset
    return None


def _library_knows_the_table() -> bool:
    """False for a library that other sources were built into, as after an update without a build."""
    table_bytes = getattr(ctypes.CDLL(str(ops.CPU_LIBRARY)), "fastopt_sgd_table_bytes", None)
    return table_bytes is not None and table_bytes() == ctypes.sizeof(_Table)


OTHER_SOURCES = ops.CPU_LIBRARY is not None and not _library_knows_the_table()
if OTHER_SOURCES:
    ops.problems.append(
        "_C.so was built from other sources; SGD works through torch until it is rebuilt"
    )
TENSOR_OFFSET = None
if ops.CPU_LIBRARY is not None and not OTHER_SOURCES:
    TENSOR_OFFSET = _find_tensor_offset()
if TENSOR_OFFSET is not None:
    # gather reads Python's objects and keeps Python's lock; run lets go of it.
    _gather = ctypes.PyDLL(str(ops.CPU_LIBRARY)).fastopt_sgd_gather_cpu
    run = ctypes.CDLL(str(ops.CPU_LIBRARY)).fastopt_sgd_run_cpu
    for _function in (_gather, run):
        _function.argtypes = [ctypes.c_void_p]
        _function.restype = ctypes.c_int64


class Gather:
    """The rows of a step, read from the tensors of some parameters on one device.

    Args:
        params: the parameters.
        group_of: the group of each, by its place in the groups that `table.groups` points to.
        device: the device of the kernels; of GPUs, the one that this is about.
        gather_only: do not update a small step at once.
    """

    def __init__(
        self,
        params: tuple[Any, ...],
        group_of: Sequence[int],
        device: torch.device,
        gather_only: bool = False,
    ) -> None:
        count = len(params)
        self.params = params
        self.group_of = (ctypes.c_int32 * count)(*group_of)
        self.verdicts = (ctypes.c_uint8 * count)()
        self.rows = (ctypes.c_int64 * (count * ROW_WORDS))()
        self.spans = (ctypes.c_int64 * (count * 2 * SPAN_WORDS))()
        self.table = _Table(
            params=items(params),
            group_of=ctypes.addressof(self.group_of),
            rows=ctypes.addressof(self.rows),
            verdicts=ctypes.addressof(self.verdicts),
            spans=ctypes.addressof(self.spans),
            count=count,
            type_offset=_HEADER - _WORD,
            tensor_offset=TENSOR_OFFSET or 0,
            tensor_type=id(Tensor),
            parameter_type=id(Parameter),
            none=id(None),
            device_type=_DEVICES[device.type],
            device_index=-1 if device.index is None else device.index,
            gather_only=gather_only,
        )
        self.address = ctypes.addressof(self.table)

    def read(
        self, grads: tuple[Any, ...], buffers: tuple[Any, ...], first_step: bytes = b""
    ) -> int:
        """Fill rows and verdicts. Returns the union of the verdicts.

        Args:
            grads: the gradients; None where there is none.
            buffers: the momentum buffers, or () where no group has momentum.
            first_step: which buffers are new, or b"".
        """
        table = self.table
        table.grads = items(grads)
        table.momentum_buffers = items(buffers) if buffers else None
        if not first_step:
            return int(_gather(self.address))
        table.first_step = first_step
        seen = int(_gather(self.address))
        table.first_step = None
        return seen
