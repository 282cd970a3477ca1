"""SGD on GPUs: the parameters of one device, gathered into one table for its kernels.

    DeviceStep          what lasts from step to step on one device: no reference to a tensor of it
    DeviceStep.gather   reads the tensors; says which are left to torch's path
    DeviceStep.launch   hands the table to the kernels

Nothing here waits for the device: options that are tensors there, GradScaler's scale and flag and
the question whether a momentum buffer holds a value already are left for the kernels to read.
"""

import ctypes
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import is_
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastopt import selfcheck
from fastopt.sgd import gather, launch, shards
from fastopt.sgd.gather import PLAIN
from fastopt.sgd.table import NEEDS_BUFFER, OVERLAPPING, READY, TORCH, Groups, Launch, SgdRow

READER: Any = gather.PythonGather if gather.LAYOUT is None else gather.Gather


def capturing(device: torch.device) -> bool:
    """Whether what is enqueued now becomes part of a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


# What captured graphs read and write by address, and may replay after their optimizer is gone.
captured: list[Any] = []


def gpu_of(param: Any) -> torch.device | None:
    """The GPU whose DeviceStep has room for it. Whether kernels then update it, gather decides."""
    if launch.family() is None or shards.local(param) is None or not serves(param.device):
        return None
    device: torch.device = param.device
    return device


def serves(device: torch.device) -> bool:
    return launch.serves(device) and selfcheck.serves("sgd", None, device.index)


def places(params: Iterable[Any]) -> dict[torch.device, list[int]]:
    """Where the parameters of each GPU are among all."""
    found: dict[torch.device, list[int]] = {}
    for i, device in enumerate(map(gpu_of, params)):
        if device is not None:
            found.setdefault(device, []).append(i)
    return found


def buffers_of(optimizer: Any, params: Iterable[Any]) -> list[Any]:
    """The momentum buffers that are in the optimizer's state."""
    states = map(optimizer.state.get, params)
    return [s.get("momentum_buffer") if isinstance(s, dict) else None for s in states]


class Devices:
    """The DeviceSteps of an optimizer, and a lock for whoever uses one: no Python but ours and
    torch's runs under it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.steps: dict[torch.device, DeviceStep] = {}

    @staticmethod
    def of(optimizer: Any) -> "Devices":
        if optimizer._fastopt_devices is None:
            optimizer._fastopt_devices = Devices()
        devices: Devices = optimizer._fastopt_devices
        return devices

    def step(
        self, optimizer: Any, device: torch.device, params: Sequence[Any], own: list[int]
    ) -> "DeviceStep":
        """That of the parameters which are at `own` among those of all groups."""
        sizes = [len(group["params"]) for group in optimizer.param_groups]
        all_groups = list(chain.from_iterable([i] * size for i, size in enumerate(sizes)))
        group_of = tuple(all_groups[i] for i in own)
        step = self.steps.get(device)
        if step is None or step.group_of != group_of:
            old, step = step, DeviceStep(device, group_of)
            if old is not None:
                step.adopt(old, buffers_of(optimizer, [params[i] for i in own]))
            self.steps[device] = step
        return step

    def unstarted(self) -> set[int]:
        """The ids of momentum buffers that hold no value yet, because every step so far overflowed.
        torch would take them for some that do."""
        with self.lock:
            return {id(buffer) for step in self.steps.values() for buffer in step.unstarted()}


@dataclass
class Gathered:
    """The tensors of one step on one device."""

    params: tuple[Any, ...]
    buffers: tuple[Any, ...]
    rows: "ctypes.Array[SgdRow]"
    ready: Sequence[int]  # the places of those that the kernels take
    left: list[int]  # and of those that torch's path must take
    created: Sequence[int] = ()  # whose buffers are new
    scale: Tensor | None = None
    inf: Tensor | None = None


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
        self.groups = Groups((), device)
        self.reader = READER(self.count, group_of, device)
        self.shards = shards.Shards()

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
        options: tuple[Any, ...],
        tensors: tuple[tuple[Any, ...], ...],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> Gathered:
        """Read the options of all groups and the tensors of a step: the addresses last, when nothing
        else is left to do before the launch."""
        if not self.groups.holds(options):
            self.groups = Groups(options, self.device)
        scale, inf = (
            None if t is None else t.to(self.device, torch.float32, non_blocking=True)
            for t in (grad_scale, found_inf)
        )
        params, grads, buffers = tensors
        found = self._read(params, grads, buffers)
        made = [i for i in found.ready if found.buffers[i] is not buffers[i]]
        if not found.left and self._settle(found, made):
            found = self._read(params, grads, found.buffers)
        found.created, found.scale, found.inf = made, scale, inf
        return found

    def _read(
        self, params: tuple[Any, ...], grads: tuple[Any, ...], buffers: tuple[Any, ...]
    ) -> Gathered:
        reader = self.reader
        local: tuple[tuple[Any, ...], ...] = params, grads, buffers
        seen = reader.read(self.groups, *local)
        sharded = bool(seen & TORCH) and shards.any_dtensor(params)
        if sharded:
            local = self.shards.of(params, grads, buffers)
            seen = reader.read(self.groups, *local)
        if seen & NEEDS_BUFFER and not seen & OVERLAPPING:
            buffers = tuple(
                self._new_buffer(grad) if verdict == NEEDS_BUFFER else buffer
                for grad, buffer, verdict in zip(grads, buffers, reader.verdicts, strict=True)
            )
            local = *local[:2], buffers
            if sharded:
                local = self.shards.of(params, grads, buffers)
            seen = reader.read(self.groups, *local)
        ready: Sequence[int] = range(self.count)
        left = []
        if seen & OVERLAPPING:
            ready, left = (), [i for i, grad in enumerate(grads) if grad is not None]
        elif seen != READY:
            ready = [i for i, verdict in enumerate(reader.verdicts) if verdict == READY]
            left = [i for i, verdict in enumerate(reader.verdicts) if verdict == TORCH]
        return Gathered(params, buffers, reader.rows, ready, left)

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

    def launch(self, gathered: Gathered) -> None:
        """Enqueue the update of what is ready."""
        if not gathered.ready:
            return
        groups, scale, inf = self.groups, gathered.scale, gathered.inf
        captures = capturing(self.device)
        if self.device.type == "cuda" and not captures:
            handle = torch._C._cuda_getCurrentRawStream(self.device.index)
            if self.stream is None or handle != self.stream.cuda_stream:
                self.follow_last_step()  # which wrote `started`
                self.stream = torch.cuda.current_stream(self.device)
                self.started.record_stream(self.stream)  # freed memory waits for it
        kept: list[Any] = [*groups.kept]
        launch.enqueue(
            Launch(gathered.rows, groups, self.started, scale, inf, self.device, captures, kept)
        )
        if captures:
            captured.append((self.started, kept, scale, inf))
        if gathered.created and (inf is not None or groups.kept or captures):
            self.unsure = True
        params, buffers = gathered.params, gathered.buffers
        changed = [*params, *buffers]
        if len(gathered.ready) != len(params):
            changed = [tensors[i] for tensors in (params, buffers) for i in gathered.ready]
        if not groups.all_momentum:
            changed = [tensor for tensor in changed if tensor is not None]
        changed += [t._local_tensor for t in changed if type(t) not in PLAIN]
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
