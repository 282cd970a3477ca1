"""How a step's tensors are found (csrc/cpu/sgd_fetch.cpp) and become rows of addresses:
csrc/cpu/sgd.cpp reads them where CPython and torch keep them, and says there why it is not Python.
For GPUs, Python does where that was not built.
"""

import ctypes
import functools
import sysconfig
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import repeat
from operator import attrgetter, gt, or_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from fastopt import backends, layouts
from fastopt.sgd.table import (
    ELEMENTS,
    FLOAT64_SERVED,
    NEEDS_BUFFER,
    NO_GRADIENT,
    NOT_SERVED,
    OVERLAPPING,
    PYTHON,
    READY,
    TORCH,
    Groups,
    SgdPython,
    SgdRow,
    SgdSpan,
    SgdTable,
    struct_bytes,
)


class Layout(NamedTuple):
    """What is relied on to read a tensor without asking Python, and no more: an object begins with
    its header, whose last word is its type; a tuple's items follow its header; behind its own, a
    tensor holds the address of its C++ tensor (in older torch behind a flag), and somewhere in that
    is its set of dispatch keys."""

    type: int
    tensor: int
    keys: int


PLAIN = {Tensor, Parameter}
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
    objects: tuple[Any, ...] = (*tensors, None, {})
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


def _library_knows_the_structs() -> bool:
    """False for a library that other sources were built into, as after an update without a build."""
    library = ctypes.CDLL(str(backends.CPU_LIBRARY))
    sizes = getattr(library, "fastopt_sgd_struct_bytes", None)
    ours = struct_bytes()
    if sizes is not None:
        sizes.restype = ctypes.POINTER(ctypes.c_int64)
    known = hasattr(library, "fastopt_sgd_grads")  # else there are fewer sizes, too
    return sizes is not None and known and sizes()[: len(ours)] == ours


OTHER_SOURCES = backends.CPU_LIBRARY is not None and not _library_knows_the_structs()
if OTHER_SOURCES:
    backends.problems.append(
        "_C.so was built from other sources; SGD works through torch until it is rebuilt"
    )


def _address_of(name: str) -> int | None:
    return ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value


LAYOUT = None if backends.CPU_LIBRARY is None or OTHER_SOURCES else find_layout()
_SAVE_THREAD, _RESTORE_THREAD = map(_address_of, ("PyEval_SaveThread", "PyEval_RestoreThread"))
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
    _OF_PYTHON = "grad", "momentum_buffer", None, dict
    _python = SgdPython(*map(_address_of, PYTHON), *map(id, _OF_PYTHON), type_offset=LAYOUT.type)
    _grads, _momentum_buffers = _library.fastopt_sgd_grads, _library.fastopt_sgd_momentum_buffers
    _grads.argtypes = [_address, _address, ctypes.c_int64]
    _momentum_buffers.argtypes = [*_grads.argtypes, ctypes.py_object]
    _grads.restype = _momentum_buffers.restype = ctypes.py_object
    _PYTHON = ctypes.addressof(_python)


def attributes_of(name: str) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """What gets this attribute of each object of a tuple, and raises what reading one raises."""
    get = attrgetter(name)
    if LAYOUT is None:
        return lambda objects: tuple(map(get, objects))
    python = SgdPython.from_buffer_copy(_python)
    python.grad = id(name)
    _alive.append((python, name))
    address = ctypes.addressof(python)
    return lambda objects: _grads(address, id(objects) + _ITEMS, len(objects))


_alive: list[Any] = []  # what C++ is told the addresses of
grads_of = attributes_of("grad")  # None where a parameter has none


_NO_STATE: dict[str, Any] = {}


def momentum_buffers_of(state: Any, params: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of each parameter, None where there is none. Raises where state is not as torch makes it."""
    if type(state) is not defaultdict:
        raise TypeError
    if not state:
        return (None,) * len(params)
    if LAYOUT is not None and len(state) == len(params):
        buffers = _momentum_buffers(_PYTHON, id(params) + _ITEMS, len(params), state)
        if buffers is not None:
            return buffers
    # Some parameters have no state yet, or it is in another order: by their hash, which costs more.
    states = map(state.get, params, repeat(_NO_STATE))
    return tuple(map(dict.get, states, repeat("momentum_buffer")))


_CPU = torch.device("cpu")


@functools.cache
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
        self.rows = (SgdRow * count)()
        self.spans = (SgdSpan * (2 * count))()
        self.table = SgdTable(
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

    def fits(
        self, params: tuple[Any, ...], grads: tuple[Any, ...], buffers: tuple[Any, ...]
    ) -> bool:
        """Whether there are as many as the kernels will read."""
        count = self.table.count
        return len(params) == len(grads) == count and len(buffers) in (0, count)

    # In all three: `grads` are None where there is none, and `buffers` is () where no group has
    # momentum. They have to fit.

    def read(
        self,
        groups: Groups,
        params: tuple[Any, ...],
        grads: tuple[Any, ...],
        buffers: tuple[Any, ...],
    ) -> int:
        """Fill rows and verdicts. Returns the union of the verdicts."""
        of_buffers = items(buffers) if buffers else None
        return int(_gather(self.address, items(params), items(grads), of_buffers, groups.address))

    def step(
        self,
        groups: Groups,
        params: tuple[Any, ...],
        grads: tuple[Any, ...],
        buffers: tuple[Any, ...],
        inv_scale: int | None,
    ) -> int:
        """Update all parameters that have a gradient, or none if the kernels cannot take one.
        Returns the union of the verdicts that were found."""
        seen = _step(
            self.address,
            id(params) + _ITEMS,
            id(grads) + _ITEMS,
            id(buffers) + _ITEMS if buffers else None,
            groups.address,
            inv_scale,
        )
        if seen < 0:
            raise RuntimeError(_REFUSED)
        return int(seen)

    def run(
        self,
        begin: int,
        groups: Groups,
        tensors: tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]],
        inv_scale: int | None,
        first_step: bytes,
    ) -> tuple[int, int]:
        """Update parameters from `begin` on, as far as one verdict goes. Returns where that is and
        the verdict; only for READY there was an update."""
        params, grads, buffers = tensors
        of_buffers = items(buffers) if buffers else None
        found = _run(
            *(self.address, items(params), items(grads), of_buffers),
            *(groups.address, inv_scale, first_step, begin),
        )
        if found < 0:
            raise RuntimeError(_REFUSED)
        return divmod(found, 2 * OVERLAPPING)


class PythonGather:
    """Gather.read in Python."""

    def __init__(self, count: int, group_of: Sequence[int], device: torch.device) -> None:
        self.group_of, self.device = group_of, device
        self.verdicts = [NO_GRADIENT] * count
        self.rows = (SgdRow * count)()

    def read(
        self,
        groups: Groups,
        params: tuple[Any, ...],
        grads: tuple[Any, ...],
        buffers: tuple[Any, ...],
    ) -> int:
        for i, tensors in enumerate(zip(params, grads, buffers, strict=True)):
            self.verdicts[i], self.rows[i] = self._row(groups, self.group_of[i], *tensors)
        seen = functools.reduce(or_, self.verdicts, 0)
        return seen | OVERLAPPING if _overlap(self.rows) else seen

    def _row(
        self, groups: Groups, index: int, param: Any, grad: Any, buffer: Any
    ) -> tuple[int, SgdRow]:
        group = groups.structs[index]
        if grad is None:
            return NO_GRADIENT, SgdRow()
        if (
            group.served == NOT_SERVED
            or not self._is_plain(param)
            or not layouts.is_dense(param)
            or not self._matches(param, grad)
            or (group.served == FLOAT64_SERVED and param.dtype is not torch.float64)
        ):
            return TORCH, SgdRow()
        address = None
        if group.has_momentum:
            if buffer is None:
                return NEEDS_BUFFER, SgdRow()
            if not self._matches(param, buffer):
                return TORCH, SgdRow()
            address = buffer.data_ptr()
        element = ELEMENTS[param.dtype]
        row = SgdRow(
            param.data_ptr(), grad.data_ptr(), address, param.numel(), 0, index, element, False
        )
        return READY, row

    def _is_plain(self, tensor: Any) -> bool:
        """Whether the memory of a dense tensor on the kernels' device holds its values."""
        return (
            type(tensor) in PLAIN
            and tensor.device == self.device
            and tensor.dtype in ELEMENTS
            and dispatch_keys(tensor) == _plain_keys(self.device)
            and (tensor.data_ptr() != 0 or tensor.numel() == 0)
            and tensor.data_ptr() % tensor.element_size() == 0
        )

    def _matches(self, param: Tensor, other: Any) -> bool:
        """Same shape, dtype and device and, element by element, the same order in memory."""
        return (
            self._is_plain(other)
            and other.dtype is param.dtype
            and other.shape == param.shape
            and all(
                size <= 1 or a == b
                for size, a, b in zip(param.shape, param.stride(), other.stride(), strict=True)
            )
        )


def _overlap(rows: "ctypes.Array[SgdRow]") -> bool:
    """Whether memory is shared between rows: torch updates those one by one. A gradient may be its
    own parameter: every element is read before it is written."""
    sizes = {element: dtype.itemsize for dtype, element in ELEMENTS.items()}
    written, read = [], []
    for row in rows:
        if row.numel:
            size = row.numel * sizes[row.element]
            written.append((row.param, row.param + size))
            if row.momentum_buffer:
                written.append((row.momentum_buffer, row.momentum_buffer + size))
            if row.grad != row.param:
                read.append((row.grad, row.grad + size))
    written.sort()
    begins, ends = ([span[side] for span in written] for side in (0, 1))
    if any(map(gt, ends, begins[1:])):
        return True
    for begin, end in read:
        at = bisect_right(ends, begin)
        if at < len(begins) and begins[at] < end:
            return True
    return False
