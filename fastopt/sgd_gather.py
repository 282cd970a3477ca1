"""SGD's way into csrc/cpu/sgd.cpp, which reads the tensors of a step where CPython and torch keep
them, and says there why it is not Python."""

import ctypes
import sysconfig
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from fastopt import backends

# The verdicts on a parameter (the last: on the whole step).
READY, NO_GRADIENT, NEEDS_BUFFER, TORCH, OVERLAPPING = 1, 2, 4, 8, 16

# Sizes in words of 8 bytes, asserted in csrc/cpu/sgd.cpp.
ROW_WORDS = 6  # SgdRow
SPAN_WORDS = 2  # Span
GROUP_WORDS = 7  # SgdGroup


class _Table(ctypes.Structure):
    """csrc/cpu/sgd.cpp: SgdTable."""

    _fields_ = [
        ("group_of", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("verdicts", ctypes.c_void_p),
        ("spans", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("type_offset", ctypes.c_int64),
        ("tensor_offset", ctypes.c_int64),
        ("keys_offset", ctypes.c_int64),
        ("tensor_type", ctypes.c_void_p),
        ("parameter_type", ctypes.c_void_p),
        ("none", ctypes.c_void_p),
        ("keys", ctypes.c_uint64),
        ("device_index", ctypes.c_int64),
        ("save_thread", ctypes.c_void_p),
        ("restore_thread", ctypes.c_void_p),
        ("span_count", ctypes.c_int64),
        ("busy", ctypes.c_int64),
    ]


class Layout(NamedTuple):
    """What is relied on to read a tensor without asking Python, and no more: an object begins with
    its header, whose last word is its type; a tuple's items follow its header; behind its own, a
    tensor holds the address of its C++ tensor (in older torch behind a flag), and somewhere in that
    is its set of dispatch keys."""

    type: int
    tensor: int
    keys: int


_WORD = ctypes.sizeof(ctypes.c_void_p)
_ITEMS = tuple.__basicsize__
_REFUSED = "fastopt.SGD: torch could not run the update in parallel"
_TENSOR_BYTES = 208  # torch asserts that a C++ tensor is not larger


def items(objects: tuple[Any, ...]) -> int:
    """The address of a tuple's items."""
    return id(objects) + _ITEMS


def dispatch_keys(tensor: Tensor) -> int:
    return int(torch._C._dispatch_keys(tensor).raw_repr())


def _read_word(address: int) -> int | None:
    return ctypes.c_uint64.from_address(address).value


def find_layout(word: Callable[[int], int | None] = _read_word) -> Layout | None:
    """The layout of this Python's and this torch's objects, checked on every kind that is read.
    None where they are laid out in yet another way, and where Python has no lock that would keep
    them as they are while they are read."""
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return None
    with torch.inference_mode(False):
        tensors = [torch.empty(1), Parameter(torch.empty(1)), torch.empty(0), torch.empty(2, 3).t()]
        tensors += [torch.empty(1, dtype=dtype) for dtype in (torch.float64, torch.bfloat16)]
        tensors += [torch._neg_view(tensors[0]), torch.empty(1, device="meta")]
        tensors += [torch.empty(1, requires_grad=True) * 2, torch.empty(3).to_sparse()]
    with torch.inference_mode():
        tensors.append(torch.empty(1))
    header = object.__basicsize__
    objects = (*tensors, None)
    for i, thing in enumerate(objects):
        if word(items(objects) + i * _WORD) != id(thing):
            return None
        if word(id(thing) + header - _WORD) != id(type(thing)):
            return None
    for offset in (header, header + _WORD):
        if all(word(id(tensor) + offset) == tensor._cdata for tensor in tensors):
            break
    else:
        return None
    keys = [*map(dispatch_keys, tensors)]
    for place in range(_WORD, _TENSOR_BYTES, _WORD):
        if all(word(t._cdata + place) == own for t, own in zip(tensors, keys, strict=True)):
            return Layout(header - _WORD, offset, place)
    return None


def _library_knows_the_table() -> bool:
    """False for a library that other sources were built into, as after an update without a build."""
    table_bytes = getattr(ctypes.CDLL(str(backends.CPU_LIBRARY)), "fastopt_sgd_table_bytes", None)
    return table_bytes is not None and table_bytes() == ctypes.sizeof(_Table)


OTHER_SOURCES = backends.CPU_LIBRARY is not None and not _library_knows_the_table()
if OTHER_SOURCES:
    backends.problems.append(
        "_C.so was built from other sources; SGD works through torch until it is rebuilt"
    )
LAYOUT = None if backends.CPU_LIBRARY is None or OTHER_SOURCES else find_layout()
if LAYOUT is not None:
    # They read Python's objects, so they are called with its lock held; a large step lets go of it
    # when all addresses are known.
    _library = ctypes.PyDLL(str(backends.CPU_LIBRARY))
    _gather, _step, _run = (
        getattr(_library, f"fastopt_sgd_{name}_cpu") for name in ("gather", "step", "run")
    )
    _address = ctypes.c_void_p
    _gather.argtypes = [_address] * 5
    _step.argtypes = [_address] * 6
    _run.argtypes = [*[_address] * 6, ctypes.c_char_p, ctypes.c_int64]
    for _function in (_gather, _step, _run):
        _function.restype = ctypes.c_int64
    _SAVE_THREAD, _RESTORE_THREAD = (
        ctypes.cast(function, ctypes.c_void_p).value
        for function in (ctypes.pythonapi.PyEval_SaveThread, ctypes.pythonapi.PyEval_RestoreThread)
    )


_CPU = torch.device("cpu")


@cache
def _plain_keys(device: torch.device) -> int:
    return dispatch_keys(torch.empty(0, device=device))


class Gather:
    """Memory in which a step's tensors are gathered, for parameters on one device. It refers to
    none of them.

    Args:
        count: how many parameters there are.
        group_of: the group of each; None if there is only one.
        device: the device of the kernels; of GPUs, the one that this is about.
    """

    def __init__(
        self, count: int, group_of: Sequence[int] | None = None, device: torch.device = _CPU
    ) -> None:
        assert LAYOUT is not None
        self.group_of = None if group_of is None else (ctypes.c_int32 * count)(*group_of)
        self.verdicts = (ctypes.c_uint8 * count)()
        self.rows = (ctypes.c_int64 * (count * ROW_WORDS))()
        self.spans = (ctypes.c_int64 * (count * 2 * SPAN_WORDS))()
        self.table = _Table(
            group_of=None if self.group_of is None else ctypes.addressof(self.group_of),
            rows=ctypes.addressof(self.rows),
            verdicts=ctypes.addressof(self.verdicts),
            spans=ctypes.addressof(self.spans),
            count=count,
            type_offset=LAYOUT.type,
            tensor_offset=LAYOUT.tensor,
            keys_offset=LAYOUT.keys,
            tensor_type=id(Tensor),
            parameter_type=id(Parameter),
            none=id(None),
            keys=_plain_keys(device),
            device_index=-1 if device.index is None else device.index,
            save_thread=_SAVE_THREAD,
            restore_thread=_RESTORE_THREAD,
        )
        self.address = ctypes.addressof(self.table)

    # In all three: `grads` are None where there is none, `buffers` is () where no group has
    # momentum, and `groups` is the address of one SgdGroup (csrc/cpu/sgd.h) for each group.

    def read(
        self, groups: int, params: tuple[Any, ...], grads: tuple[Any, ...], buffers: tuple[Any, ...]
    ) -> int:
        """Fill rows and verdicts. Returns the union of the verdicts."""
        momentum_buffers = items(buffers) if buffers else None
        return int(_gather(self.address, items(params), items(grads), momentum_buffers, groups))

    def step(
        self,
        params: tuple[Any, ...],
        grads: tuple[Any, ...],
        buffers: tuple[Any, ...],
        groups: int,
        inv_scale: int | None,
    ) -> int:
        """Update all parameters that have a gradient, or none if the kernels cannot take one.
        Returns the union of the verdicts that were found."""
        seen = _step(
            self.address,
            id(params) + _ITEMS,
            id(grads) + _ITEMS,
            id(buffers) + _ITEMS if buffers else None,
            groups,
            inv_scale,
        )
        if seen < 0:
            raise RuntimeError(_REFUSED)
        return int(seen)

    def run(
        self,
        begin: int,
        tensors: tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]],
        groups: int,
        inv_scale: int | None,
        first_step: bytes,
    ) -> tuple[int, int]:
        """Update parameters from `begin` on, as far as one verdict goes. Returns where that is and
        the verdict; only for READY there was an update."""
        params, grads, buffers = tensors
        momentum_buffers = items(buffers) if buffers else None
        found = _run(
            *(self.address, items(params), items(grads), momentum_buffers),
            *(groups, inv_scale, first_step, begin),
        )
        if found < 0:
            raise RuntimeError(_REFUSED)
        return divmod(found, 2 * OVERLAPPING)
