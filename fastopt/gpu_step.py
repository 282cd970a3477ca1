"""SGD's step on GPU, below optim.py: the parameters of one device, gathered into one table for the
kernels of csrc/cuda/sgd.h or kernels/sgd.py.

    DeviceStep          what lasts from step to step on one device: no reference to a tensor of it
    DeviceStep.gather   reads the tensors; says which are left to torch's path
    DeviceStep.launch   hands the table to the kernels

Nothing here waits for the device: options that are tensors there, GradScaler's scale and flag and
the question whether a momentum buffer holds a value already are left for the kernels to read.
"""

import contextlib
import ctypes
import functools
import math
import struct
import sys
import threading
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import gt, is_, itemgetter
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn import Parameter

from fastopt import backends, layouts
from fastopt.sgd_gather import (
    GROUP_WORDS,
    LAYOUT,
    NEEDS_BUFFER,
    OVERLAPPING,
    READY,
    ROW_WORDS,
    TORCH,
    Gather,
)

DEVICE_TYPE = "cuda"  # ROCm's name as well

# csrc/cpu/sgd.h: SgdElement. csrc/cuda/sgd.h: SgdSource, where 0 means a value in the table.
_ELEMENTS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_SOURCES = {torch.float32: 1, torch.float64: 2, torch.bfloat16: 3, torch.float16: 4}
_SIZES = (4, 8, 2, 2)
_NO_ROW = (0,) * ROW_WORDS
_GROUP_WORDS = 5  # SgdDeviceGroup
_PLAIN = {Tensor, Parameter}
_NUMBERS = {float, int, bool}
_get_options = itemgetter("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
_FLOAT_MAX = torch.finfo(torch.float32).max


@dataclass
class Launch:
    """What the kernels are given. The words are those of csrc/cuda/sgd.h: SgdStep."""

    rows: "ctypes.Array[ctypes.c_int64]"  # ROW_WORDS per parameter
    groups: bytes  # _GROUP_WORDS per parameter group
    started: Tensor  # int32, one per parameter, and the count of blocks that are done
    grad_scale: Tensor | None
    found_inf: Tensor | None
    device: torch.device
    kept: Sequence[Any]  # what must not be freed before the kernels are enqueued

    @property
    def count(self) -> int:
        return len(self.rows) // ROW_WORDS


class _Step(ctypes.Structure):
    """csrc/cuda/sgd.h: SgdStep."""

    _fields_ = [
        ("rows", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("groups", ctypes.c_char_p),
        ("group_count", ctypes.c_int64),
        ("started", ctypes.c_void_p),
        ("arrived", ctypes.c_void_p),
        ("grad_scale", ctypes.c_void_p),
        ("found_inf", ctypes.c_void_p),
        ("processors", ctypes.c_int64),
    ]


def c_step(launch: Launch, processors: int) -> _Step:
    started = launch.started.data_ptr()
    return _Step(
        rows=ctypes.addressof(launch.rows),
        count=launch.count,
        groups=launch.groups,
        group_count=len(launch.groups) // (8 * _GROUP_WORDS),
        started=started,
        arrived=started + 4 * launch.count,
        grad_scale=None if launch.grad_scale is None else launch.grad_scale.data_ptr(),
        found_inf=None if launch.found_inf is None else launch.found_inf.data_ptr(),
        processors=processors,
    )


@functools.cache
def _cuda_run() -> Any:
    run = ctypes.CDLL(str(backends.CUDA_LIBRARY)).fastopt_sgd_run_cuda
    run.argtypes = [ctypes.POINTER(_Step), ctypes.c_int, ctypes.c_void_p]
    run.restype = ctypes.c_char_p
    return run


@functools.cache
def _processors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def launch_cuda(launch: Launch) -> None:
    """Enqueue the CUDA kernels on the current stream of the launch's device."""
    index = launch.device.index
    # torch.cuda.device and current_stream cost more than the launch: small steps would notice.
    elsewhere = torch._C._cuda_getDevice() != index
    with torch.cuda.device(index) if elsewhere else contextlib.nullcontext():
        stream = torch._C._cuda_getCurrentRawStream(index)
        error = _cuda_run()(c_step(launch, _processors(index)), index, stream)
    if error is not None:
        raise RuntimeError(f"fastopt.SGD: CUDA refused the update: {error.decode()}")


def launch_triton(launch: Launch) -> None:
    """Enqueue the Triton kernel on the current stream of the launch's device."""
    from fastopt.kernels.sgd import run  # imports triton

    with torch.cuda.device(launch.device):
        run(launch, _processors(launch.device.index))


def capturing(device: torch.device) -> bool:
    """Whether what is enqueued now becomes part of a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


# What captured graphs read and write by address, and may replay after their optimizer is gone.
captured: list[Any] = []


def _dtensor(tensor: Any) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # not imported: there is no DTensor
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Tensor | None:
    """The memory of a tensor: itself, or the local shard of a DTensor. None if there is more to
    it: other subclasses, shards that have yet to arrive."""
    if type(tensor) in _PLAIN:
        return tensor
    if _dtensor(tensor):
        shard = tensor.to_local()
        if type(shard) in _PLAIN:
            return shard
    return None


def _is_served(param: Tensor) -> bool:
    """Dense memory in some order of the dimensions, of a dtype that the kernels know."""
    return (
        param.layout is torch.strided
        and param.dtype in _ELEMENTS
        and _has_memory(param)
        and layouts.is_dense(param)
    )


def _has_memory(tensor: Tensor) -> bool:
    """Whether the memory holds the tensor's values: not those of a tensor of zeros without memory
    or of torch.imag(z.conj()), which holds their negative."""
    address = tensor.data_ptr()
    return (
        (address != 0 or tensor.numel() == 0)
        and address % tensor.element_size() == 0
        and not tensor.is_neg()
    )


def _matches(param: Tensor, other: Tensor) -> bool:
    """Same shape, dtype and device and, element by element, the same order in memory."""
    if (
        other.dtype is not param.dtype
        or other.shape != param.shape
        or other.device != param.device
        or other.layout is not torch.strided
        or not _has_memory(other)
    ):
        return False
    strides, others = param.stride(), other.stride()
    return strides == others or all(
        size <= 1 or a == b for size, a, b in zip(param.shape, strides, others, strict=True)
    )


def _same_sharding(param: Any, other: Any) -> bool:
    if type(param) in _PLAIN or type(other) in _PLAIN:
        return type(param) in _PLAIN and type(other) in _PLAIN
    return (
        param.shape == other.shape
        and param.placements == other.placements
        and param.device_mesh == other.device_mesh
    )


def _shard(param: Any, tensor: Any) -> Any:
    """The memory of a tensor that goes with a parameter. None for None; something that gather does
    not take for a tensor if the kernels cannot take it."""
    if tensor is None:
        return None
    shard = local(tensor)
    if shard is None or local(param) is None or not _same_sharding(param, tensor):
        return ...
    return shard


@dataclass
class _Group:
    """A parameter group as the kernels see it."""

    packed: bytes = bytes(8 * _GROUP_WORDS)  # SgdDeviceGroup
    numbers: tuple[float, ...] = (0.0,) * GROUP_WORDS  # SgdGroup, for gather's questions
    served: bool = False
    momentum: bool = False  # or perhaps: only the device knows
    fits_float: bool = False  # torch raises where a finite option exceeds float32


def _pack_group(group: dict[str, Any], device: torch.device, kept: list[Tensor]) -> _Group:
    names = "lr", "momentum", "dampening", "weight_decay"  # csrc/cuda/sgd.h: SgdOption
    options = [group[name] for name in names]
    flags = group["nesterov"], group["maximize"]
    if any(isinstance(flag, Tensor) for flag in flags):
        return _Group()
    words, sources = [], []
    values = dict.fromkeys(names, 0.0)  # of those that are known here
    for name, option in zip(names, options, strict=True):
        source = 0
        if isinstance(option, Tensor):
            if (
                type(option) is not Tensor
                or option.numel() != 1
                or option.dtype not in _SOURCES
                or option.requires_grad
                or option.device.type not in ("cpu", device.type)
            ):
                return _Group()
            if option.device == device:
                source = _SOURCES[option.dtype]
                words.append(struct.pack("=Q", option.data_ptr()))
            elif option.device.type == "cpu":
                option = option.item()
            else:
                option = option.to(device, non_blocking=True)
                source = _SOURCES[option.dtype]
                words.append(struct.pack("=Q", option.data_ptr()))
            if source:
                kept.append(option)
        if not source:
            try:
                words.append(struct.pack("=d", option))
            except (TypeError, struct.error, OverflowError):  # torch knows what to say
                return _Group()
            values[name] = float(option)
        sources.append(source)
    return _Group(
        packed=b"".join(words) + bytes(sources) + bytes(map(bool, flags)) + b"\0\0",
        served=True,
        numbers=(
            values["lr"],
            values["weight_decay"],
            1.0 if sources[1] else values["momentum"],
            values["dampening"],
            *map(bool, flags),
            1.0,
        ),
        momentum=bool(sources[1]) or options[1] != 0,
        fits_float=not any(
            math.isfinite(v) and abs(v) > _FLOAT_MAX
            for v in (*values.values(), 1 - values["dampening"])
        ),
    )


def places(devices: Iterable[torch.device | None]) -> dict[Any, list[int]]:
    """Where the parameters of each GPU are among all, given the GPU of each, if it is on one."""
    found: dict[Any, list[int]] = {}
    for i, device in enumerate(devices):
        if device is not None:
            found.setdefault(device, []).append(i)
    return found


class Devices:
    """The DeviceSteps of an optimizer, and a lock for whoever uses one: no Python but ours and
    torch's runs under it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.steps: dict[torch.device, DeviceStep] = {}

    def step(
        self,
        device: torch.device,
        group_of: tuple[int, ...],
        read_buffers: Callable[[], list[Any]],
    ) -> "DeviceStep":
        step = self.steps.get(device)
        if step is None or step.group_of != group_of:
            old, step = step, DeviceStep(device, group_of)
            if old is not None:
                step.adopt(old, read_buffers())
            self.steps[device] = step
        return step

    def unstarted(self) -> list[Tensor]:
        with self.lock:
            return [buffer for step in self.steps.values() for buffer in step.unstarted()]


@dataclass
class Gathered:
    """The tensors of one step on one device."""

    params: tuple[Any, ...]
    buffers: tuple[Any, ...]
    rows: Any  # ROW_WORDS per parameter
    ready: Sequence[int]  # the places of those that the kernels take
    left: list[int]  # and of those that torch's path must take
    created: list[int]  # whose buffers are new
    scale: Tensor | None
    inf: Tensor | None


def _other() -> None:
    """Instead of a reference to a buffer: whatever is there was made by others."""


class DeviceStep:
    """The parameters of an optimizer that are on one device, by their places.

    Momentum buffers are torch's: created in the first step, one per parameter, in the optimizer's
    state. Whether one holds a value already is known on the device only (a step that overflowed has
    left it alone), in `started`: it speaks of the buffers in `known`, if they are alive; any other
    buffer was loaded or made by torch, and holds a value.
    """

    def __init__(self, device: torch.device, group_of: tuple[int, ...]) -> None:
        self.device = device
        self.group_of = group_of
        self.count = len(group_of)
        self.known: list[Callable[[], Any] | None] = [None] * self.count
        with torch.inference_mode(False):  # it is written in every mode
            self.started = torch.zeros(self.count + 1, dtype=torch.int32, device=device)
        self.stream: torch.cuda.Stream | None = None  # of the last step
        self.unsure = False  # whether `known` may hold buffers that have not started
        self.options: tuple[Any, ...] = ()
        self.reader: Gather | None = None
        if LAYOUT is not None:
            self.reader = Gather(self.count, group_of, device)

    def adopt(self, other: "DeviceStep", buffers: Sequence[Any]) -> None:
        """Take over what another, or it itself before, knows of these buffers."""
        other.follow_last_step()
        place_of = {id(buffer): i for i, buffer in enumerate(other._alive()) if buffer is not None}
        moves = [(i, i - place_of[id(b)]) for i, b in enumerate(buffers) if id(b) in place_of]
        known, started = list(other.known), other.started
        if other is self:
            started = started.clone()
        for begin, end, shift in _runs(moves):
            self.started[begin:end].copy_(started[begin - shift : end - shift])
            self.known[begin:end] = known[begin - shift : end - shift]
        self.unsure = other.unsure

    def rearrange(self, buffers: Sequence[Any]) -> None:
        """Parameters may have changed places since the last step."""
        if self.unsure:
            known = self._alive()
            alive = {id(buffer) for buffer in known if buffer is not None}
            if any(id(b) in alive and b is not k for b, k in zip(buffers, known, strict=True)):
                self.adopt(self, buffers)

    def _alive(self) -> list[Any]:
        return [None if known is None else known() for known in self.known]

    def follow_last_step(self) -> None:
        """What is enqueued from now on comes after the last step, whatever stream that was on."""
        if self.stream is not None and not capturing(self.device):
            torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def unstarted(self) -> list[Tensor]:
        """The known buffers that hold no value yet. Waits for the device if need be."""
        if not self.unsure:
            return []
        self.follow_last_step()
        started = self.started.tolist()
        left = [
            buffer
            for buffer, flag in zip(self._alive(), started, strict=False)
            if buffer is not None and not flag
        ]
        self.unsure = bool(left)
        return left

    def expect(self, buffers: Sequence[Any]) -> None:
        """Make `started` speak of buffers that are there already. In a step it would be too late if
        a graph captures that: nothing of it runs before the first replay."""
        loaded = []
        for place, (buffer, known) in enumerate(zip(buffers, self._alive(), strict=True)):
            if buffer is not None and buffer is not known:
                loaded.append((place, 1))
                self.known[place] = ref(buffer) if isinstance(buffer, Tensor) else _other
        for begin, end, value in _runs(loaded):
            self.started[begin:end].fill_(value)

    def forget(self, left: Iterable[int]) -> None:
        """torch's path updates these: their buffers are torch's now."""
        for place in left:
            self.known[place] = _other

    def gather(
        self,
        groups: list[dict[str, Any]],
        tensors: tuple[tuple[Any, ...], ...],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> Gathered:
        """Read the tensors of a step: the addresses last, when nothing else is left to do before
        the launch."""
        self._read_options(groups)
        scale, inf = (
            None if t is None else t.to(self.device, torch.float32, non_blocking=True)
            for t in (grad_scale, found_inf)
        )
        read = self._read_in_python if self.reader is None else self._read_in_cpp
        params, grads, buffers = tensors
        found = read(params, grads, buffers)
        made = [i for i in found.ready if found.buffers[i] is not buffers[i]]
        if not found.left and self._settle(found, made):
            found = read(params, grads, found.buffers)
        found.created, found.scale, found.inf = made, scale, inf
        return found

    def _read_in_cpp(
        self, params: tuple[Any, ...], grads: tuple[Any, ...], buffers: tuple[Any, ...]
    ) -> Gathered:
        reader, numbers = self.reader, self.numbers.buffer_info()[0]
        assert reader is not None
        shards = [params, grads, buffers]
        seen = reader.read(numbers, *shards)
        sharded = bool(seen & TORCH) and any(map(_dtensor, params))
        if sharded:
            shards = [tuple(map(_shard, params, tensors)) for tensors in shards]
            seen = reader.read(numbers, *shards)
        if seen & NEEDS_BUFFER and not seen & OVERLAPPING:
            buffers = tuple(
                self._new_buffer(grad) if verdict == NEEDS_BUFFER else buffer
                for grad, buffer, verdict in zip(grads, buffers, reader.verdicts, strict=True)
            )
            shards[2] = tuple(map(_shard, params, buffers)) if sharded else buffers
            seen = reader.read(numbers, *shards)
        ready: Sequence[int] = range(self.count)
        left = []
        if seen & OVERLAPPING:
            ready, left = (), [i for i, grad in enumerate(grads) if grad is not None]
        elif seen != READY:
            ready = [i for i, verdict in enumerate(reader.verdicts) if verdict == READY]
            left = [i for i, verdict in enumerate(reader.verdicts) if verdict == TORCH]
        return Gathered(params, buffers, reader.rows, ready, left, [], None, None)

    def _read_options(self, groups: list[dict[str, Any]]) -> None:
        options = tuple(chain.from_iterable(map(_get_options, groups)))
        if len(self.options) == len(options) > 0 and all(map(is_, options, self.options)):
            return
        self.kept: list[Tensor] = []
        self.packed = [_pack_group(group, self.device, self.kept) for group in groups]
        self.all_momentum = all(group.momentum for group in self.packed)  # all have buffers
        self.groups = b"".join(group.packed for group in self.packed)
        self.numbers = array("d", chain.from_iterable(group.numbers for group in self.packed))
        # A tensor, unlike a number, can change and stay the same object.
        self.options = options if _NUMBERS.issuperset(map(type, options)) else ()

    def _new_buffer(self, grad: Any) -> Any:
        if not capturing(self.device):
            return torch.zeros_like(grad)
        # A graph would write zeros anew in every replay, or the NaN of torch's deterministic mode.
        # Nobody reads them: a first step only writes.
        deterministic: Any = torch.utils.deterministic
        fill = deterministic.fill_uninitialized_memory
        deterministic.fill_uninitialized_memory = False
        try:
            return torch.empty_like(grad)
        finally:
            deterministic.fill_uninitialized_memory = fill

    def _read_in_python(
        self, params: tuple[Any, ...], grads: tuple[Any, ...], buffers: tuple[Any, ...]
    ) -> Gathered:
        """As csrc/cpu/sgd.cpp, where it was not built."""
        held = list(buffers)
        ready: list[int] = []
        rows = [_NO_ROW] * self.count
        left = []
        for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
            if grad is None:
                continue
            row = self._row(i, param, grad, held, self.group_of[i])
            if row is None:
                left.append(i)
            else:
                rows[i] = row
                ready.append(i)
        if _overlap(rows):
            left, ready = sorted(left + ready), []
        words = (ctypes.c_int64 * (ROW_WORDS * len(rows)))(*chain.from_iterable(rows))
        return Gathered(params, tuple(held), words, ready, left, [], None, None)

    def _row(
        self, i: int, param: Any, grad: Any, buffers: list[Any], index: int
    ) -> tuple[int, ...] | None:
        """A parameter's SgdRow; None if the kernels do not serve it."""
        group = self.packed[index]
        own, gradient = local(param), local(grad)
        if (
            not group.served
            or own is None
            or gradient is None
            or not _same_sharding(param, grad)
            or own.device != self.device
            or not _is_served(own)
            or not _matches(own, gradient)
            or not (group.fits_float or own.dtype is torch.float64)
        ):
            return None
        address = 0
        if group.momentum:
            if buffers[i] is None:
                buffers[i] = self._new_buffer(grad)
            buffer = buffers[i]
            momentum = local(buffer)
            if momentum is None or not _same_sharding(param, buffer) or not _matches(own, momentum):
                return None
            address = momentum.data_ptr()
        element = _ELEMENTS[own.dtype]
        return (
            own.data_ptr(), gradient.data_ptr(), address, own.numel(), 0, index | element << 32
        )  # fmt: skip

    def launch(self, run: Callable[[Launch], None], gathered: Gathered) -> None:
        """Enqueue the update of what is ready."""
        if not gathered.ready:
            return
        scale, inf = gathered.scale, gathered.inf
        if self.device.type == "cuda" and not capturing(self.device):
            handle = torch._C._cuda_getCurrentRawStream(self.device.index)
            if self.stream is None or handle != self.stream.cuda_stream:
                self.follow_last_step()  # which wrote `started`
                self.stream = torch.cuda.current_stream(self.device)
                self.started.record_stream(self.stream)  # freed memory waits for it
        run(Launch(gathered.rows, self.groups, self.started, scale, inf, self.device, self.kept))
        if capturing(self.device):
            captured.append((self.started, self.kept, scale, inf))
        if gathered.created and (inf is not None or self.kept or capturing(self.device)):
            self.unsure = True
        params, buffers = gathered.params, gathered.buffers
        changed = [*params, *buffers]
        if len(gathered.ready) != len(params):
            changed = [tensors[i] for tensors in (params, buffers) for i in gathered.ready]
        if not self.all_momentum:
            changed = [tensor for tensor in changed if tensor is not None]
        changed += [t.to_local() for t in changed if type(t) not in _PLAIN]
        increment_version(changed)

    def _settle(self, gathered: Gathered, made: list[int]) -> bool:
        """Make `started` speak of this step's buffers. Returns whether there was something to do."""
        buffers = gathered.buffers
        known = self._alive()
        if all(map(is_, buffers, known)):
            return False
        new = set(made)
        settled = []  # (place, value)
        for i in gathered.ready:
            buffer = buffers[i]
            if buffer is None or buffer is known[i]:
                continue
            # The kernels have nothing to write into an empty buffer, and never mark it.
            holds = i not in new or buffer.numel() == 0
            if holds or self.known[i] is not None:  # else `started` is 0 already
                settled.append((i, int(holds)))
            if i in new or not capturing(self.device):  # captured: not marked before a replay
                self.known[i] = ref(buffer)
        for begin, end, value in _runs(settled):
            self.started[begin:end].fill_(value)
        return bool(new or settled)


def _overlap(rows: list[tuple[int, ...]]) -> bool:
    """Whether memory is shared between rows: torch updates those one by one. A gradient may be its
    own parameter: every element is read before it is written."""
    written, read = [], []
    for param, grad, buffer, numel, _, packed in rows:
        if numel:
            size = numel * _SIZES[packed >> 32]
            written.append((param, param + size))
            if buffer:
                written.append((buffer, buffer + size))
            if grad != param:
                read.append((grad, grad + size))
    written.sort()
    begins, ends = ([span[side] for span in written] for side in (0, 1))
    if any(map(gt, ends, begins[1:])):
        return True
    for begin, end in read:
        at = bisect_right(ends, begin)
        if at < len(begins) and begins[at] < end:
            return True
    return False


def _runs(settled: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """(first place, place after the last, value) of neighbours with one value."""
    begin = end = value = -1
    for place, own in settled:
        if place != end or own != value:
            if end > begin:
                yield begin, end, value
            begin, value = place, own
        end = place + 1
    if end > begin:
        yield begin, end, value
