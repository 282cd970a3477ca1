"""What SGD's kernels are given: the structs of csrc/host/sgd_table.h, under the same names, and how a
step's options become one of them.
"""

import ctypes
import functools
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress, count
from operator import is_, is_not
from typing import Any

import torch
from torch import Tensor

# What a step reads of a parameter group, in torch's order. The first four are numbers.
NAMES = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize", "foreach", "fused")
OPTIONS = NAMES[:4]  # SgdOption
ELEMENTS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # SgdElement
SOURCES = {torch.float32: 1, torch.float64: 2, torch.bfloat16: 3, torch.float16: 4}  # SgdSource
NOT_SERVED, FLOAT64_SERVED, SERVED = 0, 1, 2  # SgdServed
READY, NO_GRADIENT, NEEDS_BUFFER, TORCH, OVERLAPPING = 1, 2, 4, 8, 16  # SgdVerdict


class _Option(ctypes.Union):
    _fields_ = [("value", ctypes.c_double), ("address", ctypes.c_void_p)]


class SgdGroup(ctypes.Structure):
    _fields_ = [
        ("options", _Option * len(OPTIONS)),
        ("source", ctypes.c_uint8 * len(OPTIONS)),
        ("nesterov", ctypes.c_bool),
        ("maximize", ctypes.c_bool),
        ("has_momentum", ctypes.c_bool),
        ("served", ctypes.c_uint8),
    ]


class SgdRow(ctypes.Structure):
    _fields_ = [
        ("param", ctypes.c_void_p),
        ("grad", ctypes.c_void_p),
        ("momentum_buffer", ctypes.c_void_p),
        ("numel", ctypes.c_int64),
        ("first_block", ctypes.c_int64),
        ("group", ctypes.c_int32),
        ("element", ctypes.c_int8),
        ("first_step", ctypes.c_bool),
    ]


class SgdSpan(ctypes.Structure):
    _fields_ = [("begin", ctypes.c_size_t), ("end", ctypes.c_size_t)]


class SgdTable(ctypes.Structure):
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


PYTHON = (
    *("PyObject_GetAttr", "PyDict_Next", "PyDict_GetItemWithError", "PyErr_Occurred"),
    *("PyTuple_New", "PyTuple_SetItem", "Py_IncRef", "Py_DecRef"),
)


class SgdPython(ctypes.Structure):
    _fields_ = [
        *((function, ctypes.c_void_p) for function in PYTHON),
        ("grad", ctypes.c_void_p),
        ("momentum_buffer", ctypes.c_void_p),
        ("none", ctypes.c_void_p),
        ("dict", ctypes.c_void_p),
        ("type_offset", ctypes.c_int64),
    ]


class SgdLaunch(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("groups", ctypes.c_void_p),
        ("group_count", ctypes.c_int64),
        ("started", ctypes.c_void_p),
        ("arrived", ctypes.c_void_p),
        ("grad_scale", ctypes.c_void_p),
        ("found_inf", ctypes.c_void_p),
        ("processors", ctypes.c_int64),
    ]


class Groups:
    """The options of all parameter groups, as kernels read them. It is never changed.

    Args:
        options: the NAMES of each group, one group after the other.
        device: of the kernels; None for the CPU's, which read no tensor.
    """

    def __init__(self, options: tuple[Any, ...], device: torch.device | None = None) -> None:
        self.kept: list[Tensor] = []  # what kernels will read
        of_each = zip(*[iter(options)] * len(NAMES), strict=True)
        groups = [_pack(own, device, self.kept) for own in of_each]
        self.count = len(groups)
        self.packed = array("B", b"".join(groups))  # SgdGroup for each
        self.address = self.packed.buffer_info()[0]
        self.momenta = [group[SgdGroup.has_momentum.offset] != 0 for group in groups]
        self.any_momentum, self.all_momentum = any(self.momenta), all(self.momenta)
        # A tensor, unlike a number, can change and stay the same object.
        self.options = options if _NUMBERS.issuperset(map(type, options)) else None

    def holds(self, options: tuple[Any, ...]) -> bool:
        return (
            self.options is not None
            and len(self.options) == len(options)
            and all(map(is_, options, self.options))
        )

    def replaced(self, options: tuple[Any, ...]) -> "Groups":
        """Groups(options) for the CPU, in half the time where only numbers have become others, as
        they do in every step under a scheduler."""
        if self.options is None or len(self.options) != len(options):
            return Groups(options)
        packed = self.packed[:]
        for i in compress(count(), map(is_not, options, self.options)):
            group, place = divmod(i, len(NAMES))
            # What else a group's struct says does not depend on which numbers they are.
            if place >= len(OPTIONS) or not (_is_usual(options[i]) and _is_usual(self.options[i])):
                return Groups(options)
            _VALUE.pack_into(packed, group * _GROUP.size + place * _VALUE.size, options[i])
        groups = object.__new__(Groups)
        own = {"packed": packed, "address": packed.buffer_info()[0], "options": options}
        vars(groups).update(vars(self) | own)
        vars(groups).pop("structs", None)
        return groups

    @functools.cached_property
    def structs(self) -> "ctypes.Array[SgdGroup]":
        return (SgdGroup * self.count).from_buffer_copy(self.packed)


_NUMBERS = {float, int, bool, type(None)}
_INT_MAX = 2**53  # beyond, torch's integers and our doubles round differently
_FLOAT_MAX = torch.finfo(torch.float32).max
_MOMENTUM = OPTIONS.index("momentum")
_INF = float("inf")
_GROUP = struct.Struct("=4d8B")  # SgdGroup
_VALUE = struct.Struct("=d")
_NOT_SERVED = bytes(_GROUP.size)


def _pack(options: tuple[Any, ...], device: torch.device | None, kept: list[Tensor]) -> bytes:
    """One group's SgdGroup: all zero, which is NOT_SERVED, where an option is more than a number."""
    nesterov, maximize = options[4:6]
    if type(nesterov) not in _NUMBERS or type(maximize) not in _NUMBERS:
        return _NOT_SERVED
    values: list[float] = []  # 0 where only the device knows
    sources = [0] * len(OPTIONS)
    addresses: dict[int, int] = {}
    for place, option in enumerate(options[: len(OPTIONS)]):
        value = option if type(option) is float else _number(option)
        if value is None:
            if not isinstance(option, Tensor) or not _is_number(OPTIONS[place], option, device):
                return _NOT_SERVED
            if device is None or (option.device.type == "cpu" != device.type):
                value = float(option.item())
            else:
                option = option.to(device, non_blocking=True)
                kept.append(option)
                sources[place], addresses[place] = SOURCES[option.dtype], option.data_ptr()
                value = 0.0
        values.append(value)
    lr, momentum, dampening, weight_decay = values
    fits = all(not _FLOAT_MAX < abs(v) < _INF for v in (lr, momentum, 1 - dampening, weight_decay))
    flags = bool(nesterov), bool(maximize), momentum != 0 or _MOMENTUM in addresses
    packed = _GROUP.pack(*values, *sources, *flags, SERVED if fits else FLOAT64_SERVED)
    if not addresses:
        return packed
    words = bytearray(packed)
    for place, address in addresses.items():
        struct.pack_into("=Q", words, 8 * place, address)
    return bytes(words)


def _is_usual(option: Any) -> bool:
    return type(option) is float and 0 < abs(option) <= _FLOAT_MAX


def _number(option: Any) -> float | None:
    """The number that torch's for-loop uses. None where it has arithmetic of its own, and where
    torch refuses its type."""
    kind = type(option)
    if kind is float or (kind is int and -_INT_MAX <= option <= _INT_MAX):
        return float(option)
    if isinstance(option, float) and kind.__module__ == "numpy":  # float64, that is
        return float(option)
    return None


def _is_number(name: str, option: Tensor, device: torch.device | None) -> bool:
    """Whether there is no more to a tensor than its number, as a gradient or a device to wait for."""
    if (
        type(option) is not Tensor
        or option.numel() != 1
        or option.dtype not in SOURCES
        or option.requires_grad
    ):
        return False
    if device is not None:
        return option.device.type in ("cpu", device.type)
    # On CPU torch takes an lr of any shape, and refuses such a weight decay.
    shapes = name == "lr" or (name == "weight_decay" and option.dim() == 0)
    return option.device.type == "cpu" and shapes


@dataclass
class Launch:
    """One step on a GPU."""

    rows: "ctypes.Array[SgdRow]"
    groups: Groups
    started: Tensor  # int32, one per row, and the count of blocks that are done
    grad_scale: Tensor | None
    found_inf: Tensor | None
    device: torch.device
    capturing: bool  # what is enqueued becomes part of a CUDA graph
    kept: list[Any]  # what must not be freed before the kernels have run; of a graph, ever

    def as_struct(self, processors: int) -> SgdLaunch:
        started, count = self.started.data_ptr(), len(self.rows)
        return SgdLaunch(
            rows=ctypes.addressof(self.rows),
            count=count,
            groups=self.groups.address,
            group_count=self.groups.count,
            started=started,
            arrived=started + 4 * count,
            grad_scale=None if self.grad_scale is None else self.grad_scale.data_ptr(),
            found_inf=None if self.found_inf is None else self.found_inf.data_ptr(),
            processors=processors,
        )


def struct_bytes() -> Sequence[int]:
    return [*map(ctypes.sizeof, (SgdGroup, SgdRow, SgdSpan, SgdTable, SgdPython))]
