"""One step of SGD, top to bottom:

    update       can the kernels be used at all here?
    _whole_step  csrc/cpu/sgd.cpp or devices.py updates all parameters at once. If one of them is not
                 theirs, or has yet to get a momentum buffer, nothing has happened:
    by_group     torch's own step, group by group and in its order, with our kernels for those
                 parameters that they take

From step to step an optimizer keeps numbers (_Plan), no tensor. Threads share nothing else: what a
step uses, it holds.
"""

import ctypes
import functools
from collections.abc import Sequence
from itertools import chain, compress
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version
from torch.optim.sgd import sgd
from torch.utils._device import DeviceContext

from fastopt.sgd import gather, launch, shards
from fastopt.sgd.devices import Devices, buffers_of, capturing, gpu_of, places, serves
from fastopt.sgd.gather import Gather, grads_of, momentum_buffers_of
from fastopt.sgd.table import NAMES, NEEDS_BUFFER, NO_GRADIENT, READY, TORCH, Groups

_get_params = itemgetter("params")
_get_options = itemgetter(*NAMES)
# torch.compile, once it was used in a process, has put a wrapper around it.
_WRAPPED = "_torchdynamo_orig_callable"
_init_group = getattr(torch.optim.SGD._init_group, _WRAPPED, torch.optim.SGD._init_group)

# What torch's dispatcher asks in every call while no mode, tracer or transform wants to see it.
_key = torch._C.DispatchKey
_EAGER = torch._C.DispatchKeySet(_key.BackendSelect).add(_key.ADInplaceOrView).raw_repr()


def is_plain_call() -> bool:
    """Whether an update that torch cannot see is the same as one that it can."""
    return (
        torch._C._dispatch_tls_local_include_set().raw_repr() == _EAGER
        and forward_ad._current_level < 0  # beyond, tensors may have tangents
        and (not (modes := torch._C._len_torch_function_stack()) or _only_set_devices(modes))
    )


def _only_set_devices(modes: int) -> bool:
    """Whether this is all that the modes of __torch_function__ do, as torch.set_default_device."""
    return all(type(torch._C._get_function_stack_at(i)) is DeviceContext for i in range(modes))


def cpu_kernels_apply() -> bool:
    return gather.LAYOUT is not None and is_plain_call()


class Scale:
    """What a GradScaler asks of a step: as it came, for kernels on a GPU, and as numbers, for which
    the device is waited for, once."""

    def __init__(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        self.grad_scale, self.found_inf = grad_scale, found_inf
        self.given = grad_scale is not None or found_inf is not None
        if not isinstance(found_inf, Tensor):  # the sum over no gradient at all
            self.overflowed, self.found_inf = bool(found_inf), None

    @functools.cached_property
    def overflowed(self) -> bool:
        return overflowed(self.found_inf)

    @functools.cached_property
    def inv_scale(self) -> float | None:
        if self.grad_scale is None:
            return None
        return self.grad_scale.double().reciprocal().float().item()

    @functools.cached_property
    def address(self) -> int | None:
        """For C: where inv_scale is."""
        if self.inv_scale is None:
            return None
        self._number = ctypes.c_double(self.inv_scale)
        return ctypes.addressof(self._number)


def overflowed(found_inf: Any) -> bool:
    """Waits for the device."""
    if isinstance(found_inf, Tensor):
        return found_inf.item() != 0  # the sum over devices: not only 1
    return bool(found_inf)  # the sum over no gradient at all


_NO_SCALE = Scale(None, None)


def update(optimizer: Any, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    """A step of the optimizer, whose closure has run."""
    given = grad_scale is not None or found_inf is not None
    scale = Scale(grad_scale, found_inf) if given else _NO_SCALE
    if (
        (gather.LAYOUT is not None or launch.family() is not None)
        and not torch.compiler.is_compiling()
        and is_plain_call()
        and not optimizer.defaults["differentiable"]
    ):
        kernel_step(optimizer, scale)
    else:
        by_group(optimizer, scale, by_kernels=False)


def kernel_step(optimizer: Any, scale: Scale) -> None:
    if not _whole_step(optimizer, scale):
        by_group(optimizer, scale, by_kernels=True)


class _Plan:
    """What lasts from step to step: numbers that follow from the groups' sizes and options. It is
    never changed, so that threads may share it."""

    def __init__(
        self,
        sizes: list[int],
        options: tuple[Any, ...],
        params: Sequence[Any],
        last: "_Plan | None",
    ) -> None:
        self.sizes, self.count = sizes, len(params)
        # Those of GPUs, if all are there: where parameters were; gather finds what has moved.
        self.devices: dict[torch.device, list[int]] | None = None
        self.gather: Gather | None = None
        self.shards = shards.Shards()
        self.group_of: tuple[int, ...]
        self.groups: Groups
        if last is not None and last.sizes == sizes:
            self.devices, self.group_of, self.gather = last.devices, last.group_of, last.gather
            self.shards = last.shards
            self.groups = last.groups.replaced(options)
        else:
            on_gpus = places(params) if launch.family() else {}
            if sum(map(len, on_gpus.values())) == self.count > 0:
                self.devices = on_gpus
            of_each = [[index] * size for index, size in enumerate(sizes)]
            self.group_of = tuple(chain.from_iterable(of_each))
            if self.devices is None and gather.LAYOUT is not None:
                self.gather = Gather(self.count, self.group_of)
            self.groups = Groups(options)


def _whole_step(optimizer: Any, scale: Scale) -> bool:
    """The step, if the kernels take all of it; else nothing, and False."""
    try:
        # Of all that another thread may edit meanwhile one copy, from which all that follows is taken:
        # sizes, parameters and options have to fit each other, as no kernel asks again.
        groups, plan = tuple(optimizer.param_groups), optimizer._fastopt_plan
        lists = [*map(list.copy, map(_get_params, groups))]
        sizes = [*map(len, lists)]
        params = tuple(*lists) if len(lists) == 1 else tuple(chain.from_iterable(lists))
        options = tuple(chain.from_iterable(map(_get_options, groups)))
        if plan is None or plan.sizes != sizes or not plan.groups.holds(options):
            plan = optimizer._fastopt_plan = _Plan(sizes, options, params, plan)
        own = getattr(optimizer._init_group, "__func__", None)
        if own is not _init_group and getattr(own, _WRAPPED, None) is not _init_group:
            return False
        grads = grads_of(params)
        buffers: tuple[Any, ...] = ()
        # On a GPU perhaps only the device knows.
        if plan.groups.any_momentum or plan.devices is not None:
            buffers = momentum_buffers_of(optimizer.state, params)
    except Exception:  # noqa: BLE001 (torch's step has to raise it, at its time)
        return False
    if len(params) != plan.count or (scale.given and not all(map(_is_fused, groups))):
        return False
    if plan.devices is not None:
        return _whole_gpu_step(optimizer, plan.devices, options, (params, grads, buffers), scale)
    if plan.gather is None:
        return False
    inv_scale = None
    if scale.given:
        if scale.overflowed:
            return True
        inv_scale = scale.address
    packed = plan.groups
    seen = plan.gather.step(packed, params, grads, buffers, inv_scale)
    if seen & TORCH and shards.any_dtensor(params):
        local = plan.shards.of(params, grads, buffers)
        seen = plan.gather.step(packed, *local, inv_scale)
    if seen & ~(READY | NO_GRADIENT):
        return False
    some_momentum = buffers and not packed.all_momentum
    if some_momentum:
        momenta = map(packed.momenta.__getitem__, plan.group_of)
        buffers = tuple(
            b if momentum else None for b, momentum in zip(buffers, momenta, strict=True)
        )
    if seen != READY:
        ready = [grad is not None for grad in grads]
        params, grads, buffers = (tuple(compress(t, ready)) for t in (params, grads, buffers))
    if some_momentum:
        buffers = tuple(buffer for buffer in buffers if buffer is not None)
    increment_version(params + buffers)
    if inv_scale is not None:
        increment_version(grads)
    return True


def _whole_gpu_step(
    optimizer: Any,
    of_devices: dict[torch.device, list[int]],
    options: tuple[Any, ...],
    tensors: tuple[tuple[Any, ...], ...],
    scale: Scale,
) -> bool:
    devices = Devices.of(optimizer)
    ready = []
    with devices.lock:
        for device, own in of_devices.items():
            its = tensors
            if len(own) != len(tensors[0]):
                its = tuple(tuple(t[i] for i in own) for t in tensors)
            step = devices.step(optimizer, device, tensors[0], own)
            step.rearrange(its[2])
            gathered = step.gather(options, its, scale.grad_scale, scale.found_inf)
            if gathered.left:
                return False
            ready.append((step, gathered))
        for step, gathered in ready:
            step.launch(gathered)
            for i in gathered.created:
                optimizer.state[gathered.params[i]]["momentum_buffer"] = gathered.buffers[i]
    return True


def _is_fused(group: dict[str, Any]) -> bool:
    """Whether torch's step would be that of its fused kernels, which alone take a scale."""
    return bool(group["fused"]) and not group["foreach"]


def by_group(optimizer: Any, scale: Scale, by_kernels: bool) -> None:
    """torch's step, with kernels for what they take."""
    for group in optimizer.param_groups:
        params: list[Any] = []
        grads: list[Any] = []
        buffers: list[Any] = []
        has_sparse_grad = optimizer._init_group(group, params, grads, buffers)
        options = {name: group[name] for name in NAMES}
        if scale.given and not _is_fused(options):
            raise AssertionError("Expected grad_scale and found_inf to be None")
        if by_kernels:
            _Run(optimizer, options, (params, grads, buffers), has_sparse_grad, scale).go()
        elif torch.compiler.is_compiling():
            torch_update(options, params, grads, buffers, has_sparse_grad, scale)
        elif not scale.overflowed:
            _drop_unstarted(optimizer, buffers)
            torch_update(options, params, grads, buffers, has_sparse_grad, scale)
        if group["momentum"] != 0:
            for param, buffer in zip(params, buffers, strict=True):
                if buffer is not None:  # skipped on overflow
                    optimizer.state[param]["momentum_buffer"] = buffer


class _Run:
    """The update of one group, in the order of its parameters: whoever computes it, memory that they
    share holds what torch's loop leaves there, and what Python does meanwhile, it does to all that
    comes after. Addresses are read when everything before is over."""

    def __init__(
        self,
        optimizer: Any,
        options: dict[str, Any],
        tensors: tuple[list[Any], list[Any], list[Any]],
        has_sparse_grad: bool,
        scale: Scale,
    ) -> None:
        self.optimizer, self.options, self.scale = optimizer, options, scale
        self.params, self.grads, self.buffers = tensors
        self.has_sparse_grad = has_sparse_grad
        self.groups = Groups(tuple(options.values()))
        self.first_step = bytearray(len(self.params))  # whose buffer nobody has written to yet
        self.table = Gather(len(self.params)) if gather.LAYOUT is not None else None

    def go(self) -> None:
        at = 0 if self._is_for_kernels() else self._by_torch(0, len(self.params))
        while at < len(self.params):
            device = gpu_of(self.params[at])
            at = self._on_cpu(at) if device is None else self._on_gpu(device, at)

    def _is_for_kernels(self) -> bool:
        if self.options["fused"] and (
            self.has_sparse_grad or not all(map(Tensor.is_floating_point, self.params))
        ):
            return False  # torch refuses such a group as a whole
        buffers = len(self.buffers) if self.options["momentum"] != 0 else len(self.params)
        return len(self.params) == len(self.grads) == buffers  # _init_group may be anybody's

    def _by_torch(self, begin: int, end: int) -> int:
        if self.scale.given and self.scale.overflowed:
            return end
        part = slice(begin, end)
        for i in range(begin, end):
            if self.first_step[i]:
                self.buffers[i] = None
        buffers = self.buffers[part]
        _drop_unstarted(self.optimizer, buffers)
        torch_update(
            *(self.options, self.params[part], self.grads[part], buffers),
            *(self.has_sparse_grad, self.scale),
        )
        self.buffers[part] = buffers
        return end

    def _on_cpu(self, begin: int) -> int:
        """Update some parameters from `begin` on. Returns where the next begin."""
        if self.scale.given and self.scale.overflowed:
            return begin + 1
        end, verdict = len(self.params), TORCH
        tensors = tuple(self.params), tuple(self.grads), tuple(self.buffers)
        if self.table is not None and self.table.fits(*tensors):
            inv_scale, first_step = self.scale.address, bytes(self.first_step)
            end, verdict = self.table.run(begin, self.groups, tensors, inv_scale, first_step)
            if verdict == TORCH and shards.any_dtensor(tensors[0][begin:end]):
                local = self._local(begin, end, tensors)
                end, verdict = self.table.run(begin, self.groups, local, inv_scale, first_step)
        if verdict == NEEDS_BUFFER:  # the kernel fills them
            for i in range(begin, end):
                self.buffers[i] = torch.empty_like(self.grads[i])
                self.first_step[i] = True
            return begin
        if verdict == READY:
            params, grads, buffers = (t[begin:end] for t in tensors)
            new = self.first_step[begin:end]
            increment_version(
                params + tuple(b for b, n in zip(buffers, new, strict=False) if not n)
            )
            if inv_scale is not None:
                increment_version(grads)
            self.first_step[begin:end] = bytes(end - begin)
            return end
        gpus = (i for i in range(begin, end) if gpu_of(self.params[i]) is not None)
        return self._by_torch(begin, next(gpus, end))

    @staticmethod
    def _local(begin: int, end: int, tensors: tuple[Any, ...]) -> Any:
        """The same, but in [begin, end) the memory of DTensors."""
        parts = shards.locals_of(*(t[begin:end] for t in tensors if t))
        own = iter(parts)
        return tuple(t and t[:begin] + next(own) + t[end:] for t in tensors)

    def _on_gpu(self, device: torch.device, begin: int) -> int:
        """As on CPU."""
        all_params = list(chain.from_iterable(map(_get_params, self.optimizer.param_groups)))
        own = places(all_params).get(device, [])
        place_of = {id(all_params[i]): place for place, i in enumerate(own)}
        end = begin
        run: list[int] = []  # the places of parameters from `begin` on
        while end < len(self.params) and gpu_of(self.params[end]) == device:
            place = place_of.get(id(self.params[end]))
            if place is None or place in run:  # _init_group's own, or twice in a group
                break
            run.append(place)
            end += 1
        if not run:
            return self._by_torch(begin, begin + 1)
        devices = Devices.of(self.optimizer)
        with devices.lock:
            step = devices.step(self.optimizer, device, all_params, own)
            options = tuple(self.options.values()) * len(self.optimizer.param_groups)
            while run:
                params, grads, buffers = ([None] * step.count for _ in range(3))
                known = self.buffers[begin:] or buffers_of(self.optimizer, self.params[begin:])
                for i, place in enumerate(run):
                    params[place], grads[place] = self.params[begin + i], self.grads[begin + i]
                    buffers[place] = known[i]
                tensors = tuple(params), tuple(grads), tuple(buffers)
                scale = self.scale.grad_scale, self.scale.found_inf
                gathered = step.gather(options, tensors, *scale)
                if not gathered.left:
                    step.launch(gathered)
                    for i, place in enumerate(run, begin):
                        if self.buffers:
                            self.buffers[i] = gathered.buffers[place]
                        elif place in gathered.created:  # momentum is 0, which only the device knew
                            state = self.optimizer.state[self.params[i]]
                            state["momentum_buffer"] = gathered.buffers[place]
                    return begin + len(run)
                left = [place in gathered.left for place in run]
                if left[0]:
                    break
                run = run[: left.index(True)]
        end = self._by_torch(begin, begin + [*left, False].index(False))
        step.forget(run[: end - begin])
        return end


def _drop_unstarted(optimizer: Any, buffers: list[Any]) -> None:
    """Before torch's path takes these buffers."""
    devices = optimizer._fastopt_devices
    unstarted = devices.unstarted() if devices is not None else ()
    for i, buffer in enumerate(buffers):
        if unstarted and id(buffer) in unstarted:
            buffers[i] = None


def prepare(optimizer: Any) -> None:
    """Room for what devices have to remember from step to step, and what they have to know of
    momentum buffers that are there. A CUDA graph that captures the next step could do neither.
    """
    devices = Devices.of(optimizer)
    if launch.family() is None or not is_plain_call():
        return
    params = list(chain.from_iterable(map(_get_params, optimizer.param_groups)))
    for device, own in places(params).items():
        if not capturing(device):
            with devices.lock:
                step = devices.step(optimizer, device, params, own)
                step.expect(buffers_of(optimizer, [params[i] for i in own]))


def torch_update(
    options: dict[str, Any],
    params: list[Any],
    grads: list[Any],
    buffers: list[Any],
    has_sparse_grad: bool,
    scale: Scale,
) -> None:
    """torch's update of some parameters of a group."""
    foreach, fused = options["foreach"], options["fused"]
    of_fused: dict[str, Any] = {"grad_scale": None, "found_inf": None}
    on_cpu = all(param.device.type == "cpu" for param in params)
    compiling = torch.compiler.is_compiling()
    on_gpu_of_ours = not (compiling or on_cpu) and any(map(serves, {p.device for p in params}))
    if compiling:
        of_fused = {"grad_scale": scale.grad_scale, "found_inf": scale.found_inf}
    elif scale.inv_scale is not None:
        if on_cpu or not on_gpu_of_ours:
            for grad in grads:
                grad.mul_(scale.inv_scale)
        else:
            grads = [grad * scale.inv_scale for grad in grads]
    if not compiling and (on_cpu or on_gpu_of_ours):
        # torch's foreach writes into gradients (nesterov) and, on CPU, rounds momentum to half
        # precision: on GPU it runs where it was asked for. Its fused kernels ignore version
        # counters and, on CPU, strides, shapes and half parameters: only their errors are kept.
        foreach = bool(foreach) and not on_cpu
        fused = fused and (has_sparse_grad or not all(map(Tensor.is_floating_point, params)))
    chosen = {**options, "foreach": foreach, "fused": fused, **of_fused}
    sgd(params, grads, buffers, has_sparse_grad=has_sparse_grad, **chosen)
