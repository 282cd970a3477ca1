"""SGD: torch.optim.SGD with every parameter of every group updated in one pass of one kernel.

What a step does, top to bottom:

    SGD.step         the closure, the GradScaler; can the kernels be used at all here?
    _whole_step      csrc/cpu/sgd.cpp or gpu_step.py updates all parameters at once. If one of them
                     is not theirs, or has yet to get a momentum buffer, nothing has happened:
    _step_by_group   torch's own step, group by group and in its order, with our kernels for those
                     parameters that they take

From step to step an optimizer keeps numbers (_Plan), no tensor. Threads share nothing else: what a
step uses, it holds. A subclass may use any name but those that begin with _fastopt.
"""

import ctypes
import functools
import importlib.abc
import importlib.machinery
import sys
from array import array
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import chain, compress, repeat
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version
from torch.optim.optimizer import _use_grad_for_differentiable
from torch.optim.sgd import sgd
from torch.utils._device import DeviceContext

from fastopt import backends, gpu_step, sgd_gather
from fastopt.gpu_step import Devices, DeviceStep, Launch
from fastopt.sgd_gather import GROUP_WORDS, NEEDS_BUFFER, NO_GRADIENT, READY, Gather

_MOMENTUM = 2  # where it is in a SgdGroup
_OPTIONS = "lr", "weight_decay", "momentum", "dampening", "nesterov", "maximize", "foreach", "fused"

_get_grad = attrgetter("grad")
_get_params = itemgetter("params")
_get_options = itemgetter(*_OPTIONS)
_init_group = torch.optim.SGD._init_group
_INT_MAX = 2**53  # beyond, torch's integers and our doubles round differently


def _gpu_family() -> str | None:
    """Which kernels serve GPUs: cuda, triton, or None where torch's own do."""
    return backends.GPU_FAMILY


_LAUNCHERS: dict[Any, Callable[[Launch], None]] = {
    "cuda": gpu_step.launch_cuda,
    "triton": gpu_step.launch_triton,
}

# What torch's dispatcher asks in every call while no mode, tracer or transform wants to see it.
_key = torch._C.DispatchKey
_EAGER = torch._C.DispatchKeySet(_key.BackendSelect).add(_key.ADInplaceOrView).raw_repr()


def _is_plain_call() -> bool:
    """Whether an update that torch cannot see is the same as one that it can."""
    return (
        torch._C._dispatch_tls_local_include_set().raw_repr() == _EAGER
        and forward_ad._current_level < 0  # beyond, tensors may have tangents
        and (not (modes := torch._C._len_torch_function_stack()) or _only_set_devices(modes))
    )


def _only_set_devices(modes: int) -> bool:
    """Whether this is all that the modes of __torch_function__ do, as torch.set_default_device."""
    return all(type(torch._C._get_function_stack_at(i)) is DeviceContext for i in range(modes))


def _kernels_apply() -> bool:
    """Whether the CPU kernels can be used."""
    return sgd_gather.LAYOUT is not None and _is_plain_call()


_NUMBERS = {float, int, bool, type(None)}
_NOT_SERVED = array("d", bytes(8 * GROUP_WORDS))


def _group_row(options: tuple[Any, ...]) -> "array[float]":
    """A group's SgdGroup. The last number says whether the kernels serve its parameters."""
    lr, weight_decay, momentum, dampening, nesterov, maximize, *_ = options
    scalar = not isinstance(weight_decay, Tensor) or weight_decay.dim() == 0
    numbers = [
        _number(lr),  # of any shape, which torch's loop refuses of a weight decay
        _number(weight_decay) if scalar else None,
        *(None if isinstance(o, Tensor) else _number(o) for o in (momentum, dampening)),
    ]
    known = [number for number in numbers if number is not None]
    if len(known) < len(numbers) or not _NUMBERS.issuperset((type(nesterov), type(maximize))):
        return _NOT_SERVED
    return array("d", (*known, bool(nesterov), bool(maximize), True))


def _number(option: Any) -> float | None:
    """The number that torch's for-loop uses. None if there is more to it: a gradient, a device to
    wait for, arithmetic of its own, a type that torch refuses."""
    kind = type(option)
    if kind is float or (kind is int and -_INT_MAX <= option <= _INT_MAX):
        return float(option)
    if isinstance(option, float) and kind.__module__ == "numpy":  # float64, that is
        return float(option)
    if (
        kind is Tensor
        and option.numel() == 1
        and option.is_floating_point()
        and option.device.type == "cpu"
        and not option.requires_grad
    ):
        return float(option.item())
    return None


def _is_served_gpu(device: torch.device) -> bool:
    return (
        device.type == gpu_step.DEVICE_TYPE
        and _gpu_family() is not None
        and backends.serves_gpu(device.index)
    )


def _gpu_of(param: Any) -> torch.device | None:
    """The GPU whose DeviceStep has room for it. Whether kernels then update it, gather decides."""
    if _gpu_family() is None or gpu_step.local(param) is None or not _is_served_gpu(param.device):
        return None
    device: torch.device = param.device
    return device


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
        self.group_of: tuple[int, ...]
        if last is not None and last.sizes == sizes:
            self.devices, self.group_of, self.gather = last.devices, last.group_of, last.gather
        else:
            places = gpu_step.places(map(_gpu_of, params)) if _gpu_family() else {}
            if sum(map(len, places.values())) == self.count > 0:
                self.devices = places
            of_each = [[index] * size for index, size in enumerate(sizes)]
            self.group_of = tuple(chain.from_iterable(of_each))
            if self.devices is None and sgd_gather.LAYOUT is not None:
                self.gather = Gather(self.count, self.group_of)
        rows = map(_group_row, zip(*[iter(options)] * len(_OPTIONS), strict=True))
        self.groups = array("d", chain.from_iterable(rows))
        self.groups_at = self.groups.buffer_info()[0]
        self.momenta = self.groups[_MOMENTUM::GROUP_WORDS]
        self.any_momentum, self.all_momentum = any(self.momenta), all(self.momenta)
        # A tensor, unlike a number, can change and stay the same object.
        self.options = options if _NUMBERS.issuperset(map(type, options)) else None

    def holds(self, sizes: list[int], options: tuple[Any, ...]) -> bool:
        return (
            self.options is not None
            and self.sizes == sizes
            and len(self.options) == len(options)
            and all(map(is_, options, self.options))
        )


_NO_STATE: dict[str, Any] = {}


def _momentum_buffers(state: Any, params: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of each parameter, None where there is none. Raises where state is not as torch makes it."""
    if type(state) is not defaultdict:
        raise TypeError
    if not state:
        return (None,) * len(params)
    buffers = tuple(map(dict.get, state.values(), repeat("momentum_buffer")))
    if len(buffers) == len(params) and all(map(is_, params, state)):
        return buffers
    # Some parameters have no state yet, or it is in another order: by their hash, which costs more.
    states = map(state.get, params, repeat(_NO_STATE))
    return tuple(map(dict.get, states, repeat("momentum_buffer")))


def _overflowed(found_inf: Tensor | None) -> bool:
    """Waits for the device."""
    if isinstance(found_inf, Tensor):
        return found_inf.item() != 0  # the sum over devices: not only 1
    return bool(found_inf)  # the sum over no gradient at all


def _inv_scale(grad_scale: Tensor | None) -> float | None:
    return None if grad_scale is None else grad_scale.double().reciprocal().float().item()


def _drop_buffer(state: dict[Any, dict[str, Any]], key: Any) -> None:
    """Leave a momentum buffer out of a copy of the state."""
    state[key] = {name: value for name, value in state[key].items() if name != "momentum_buffer"}
    if not state[key]:
        del state[key]


class SGD(torch.optim.SGD):
    r"""Stochastic gradient descent with momentum, as :class:`torch.optim.SGD`, in one pass.

    One kernel reads and writes each parameter and its momentum buffer once, for all parameters of
    all groups together, without temporaries. With g the gradient, negated when maximizing, plus
    ``weight_decay * param``:

    .. math::
        b \leftarrow \begin{cases} g & \text{first step} \\
            \text{momentum} \cdot b + (1 - \text{dampening}) \cdot g & \text{later} \end{cases}
        \qquad \text{param} \leftarrow \text{param} - \text{lr} \cdot \begin{cases}
            g & \text{no momentum} \\ b & \text{momentum} \\
            g + \text{momentum} \cdot b & \text{nesterov} \end{cases}

    Options are read from ``param_groups`` in every step. State is torch's
    (``{"momentum_buffer": Tensor}`` per parameter), and state dicts can be exchanged with
    torch.optim.SGD in mid-training.

    Args:
        params: parameters to optimize, named parameters, or dicts that define groups.
        lr (float or Tensor of one element): learning rate. Default: 1e-3
        momentum (float): momentum factor. Default: 0
        dampening (float): dampening for momentum, not applied in the first step. Default: 0
        weight_decay (float or Tensor of one element): L2 penalty, coupled. Default: 0
        nesterov (bool): Nesterov momentum; needs momentum and no dampening. Default: False
        maximize (bool): ascend instead of descend. Default: False
        foreach, fused (bool, optional): accepted for torch's sake. They change no result of the
            kernels; ``fused=True`` keeps torch's contract with GradScaler (the step unscales the
            gradients itself and is skipped on overflow) and its refusal of sparse and complex
            parameters. Default: None
        differentiable (bool): let autograd see the step, which torch then computes. Default: False

    Served by our kernels: dense parameters on CPU and, where a family of GPU kernels is available,
    on CUDA and ROCm, of any shape in float32, float64, bfloat16 and float16, mixed at will, whose
    gradient and momentum buffer have their dtype and memory order; on GPU also DTensors, by their
    local shards. All else (other devices, sparse, complex, overlapping memory, tensor subclasses,
    tensors with a gradient as options) takes torch's path, parameter by parameter.

    What follows about GPUs was tested on CPUs only so far (bench/results/LEDGER.md). On GPU a step
    never waits for the device. lr, momentum, dampening and weight_decay may be tensors there, which
    the kernels read: a captured CUDA graph follows a scheduler that writes into them (with Triton's
    kernels after one step outside a capture, which compiles them). Any ``found_inf`` but 0 leaves
    parameters and state untouched; a parameter's first step is the first that was not skipped, and
    checkpoints hold its buffer only from then on. (A step does wait where torch's path takes a
    parameter under a GradScaler with ``fused=True``.)

    ``last_step_skipped`` says whether the last step left everything as it was, as it does after an
    overflow under a GradScaler with ``fused=True``.

    Threads may step one optimizer, and read or edit it meanwhile, as far as torch's lets them: each
    of their updates is whole or lost, and a parameter, gradient or buffer that is replaced during a
    step stays alive until that is over. Whose update counts, nobody can say: to lose none, let one
    thread step at a time. (Free-threaded Python: torch's own step on CPU.)

    There is no ``to(device)``: the parameters are the module's to move, after which
    ``optimizer.load_state_dict(optimizer.state_dict())`` brings the state to them.

    Differences from torch.optim.SGD:
        - float32 and float64: none, bit for bit those of torch's for-loop on CPU (``foreach=False,
          fused=False``) where both use the machine's fused multiply-add. The GPU kernels always
          do, in the same places.
        - bfloat16 and float16: computed in float32 and rounded once per stored value, where torch
          rounds after every operation.
        - on GPU, a GradScaler's step with ``fused=True`` leaves the gradients scaled in memory,
          where torch's leaves them unscaled.
        - on GPU, momentum given as a tensor creates buffers even while it is 0.
        - parameters that torch's path takes are updated by its for-loop, whatever ``fused`` says;
          on GPU by its foreach implementation if ``foreach=True`` asks for it.

    Raises:
        ValueError, TypeError, RuntimeError: as torch.optim.SGD.

    Example::

        >>> optimizer = fastopt.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        >>> optimizer.zero_grad()
        >>> loss_fn(model(input), target).backward()
        >>> optimizer.step()

    Source: torch.optim.SGD; Sutskever et al., `On the importance of initialization and momentum in
    deep learning <http://www.cs.toronto.edu/%7Ehinton/absps/momentum.pdf>`_, 2013.
    """

    # Not part of __getstate__: copies make their own.
    _fastopt_plan: _Plan | None = None
    _fastopt_devices: Devices | None = None
    _fastopt_skipped: Any = False

    @functools.wraps(torch.optim.SGD.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if "_step_supports_amp_scaling" in self.__dict__:
            self.__dict__["_step_supports_amp_scaling"] = _AS_THE_GROUPS
        _prepare(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        # Not for each group of torch's constructor.
        if self._fastopt_devices is not None:
            _prepare(self)

    add_param_group.__doc__ = torch.optim.SGD.add_param_group.__doc__

    @property
    def _step_supports_amp_scaling(self) -> Any:
        # GradScaler's question whether step() unscales by itself. torch's constructor answers it, and
        # anybody may after that; its own answer would be wrong once a state dict with other options
        # has been loaded, so that the groups are asked as they are.
        try:
            flag = self.__dict__["_step_supports_amp_scaling"]
        except KeyError:
            raise AttributeError("_step_supports_amp_scaling") from None
        if flag is _AS_THE_GROUPS:
            return all(group.get("fused") for group in self.param_groups)
        return flag

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: Any) -> None:
        self.__dict__["_step_supports_amp_scaling"] = value

    @_step_supports_amp_scaling.deleter
    def _step_supports_amp_scaling(self) -> None:
        if self.__dict__.pop("_step_supports_amp_scaling", None) is None:
            raise AttributeError("_step_supports_amp_scaling")

    @property
    def last_step_skipped(self) -> "bool | Tensor":
        """Whether the last step left everything as it was, because ``found_inf`` told it to: a bool,
        or on GPU a bool Tensor of one element there, so that nobody waits. GradScaler sets
        ``found_inf`` where ``fused=True``; otherwise it does not call ``step`` after an overflow."""
        if isinstance(self._fastopt_skipped, Tensor):
            return self._fastopt_skipped != 0
        return bool(self._fastopt_skipped)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "defaults" in state and all(group["fused"] for group in self.param_groups):
            # A copy can be scaled like its original. (load_state_dict comes here without defaults.)
            self.__dict__["_step_supports_amp_scaling"] = _AS_THE_GROUPS
        self._fastopt_devices = None
        _prepare(self)

    def __getstate__(self) -> dict[str, Any]:
        kept: dict[str, Any] = super().__getstate__()
        unstarted = _unstarted(self)
        if unstarted:
            state = kept["state"] = kept["state"].copy()
            for param in unstarted:
                _drop_buffer(state, param)
        return kept

    def state_dict(self) -> dict[str, Any]:
        packed: dict[str, Any] = super().state_dict()
        unstarted = set(map(id, _unstarted(self)))
        if unstarted:
            params = chain.from_iterable(map(_get_params, self.param_groups))
            for i, param in enumerate(params):
                if id(param) in unstarted and i in packed["state"]:
                    _drop_buffer(packed["state"], i)
        return packed

    state_dict.__doc__ = torch.optim.SGD.state_dict.__doc__

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure (callable, optional): computes the loss anew and returns it.

        Returns:
            What ``closure`` returned, else None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        # Both are attributes that GradScaler sets for the time of the call.
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if torch.compiler.is_compiling():
            for group in self.param_groups:
                params, grads, buffers, has_sparse_grad = _read_group(self, group)
                _torch_update(
                    {name: group[name] for name in _OPTIONS},
                    *(params, grads, buffers, has_sparse_grad),
                    grad_scale=grad_scale,
                    found_inf=found_inf,
                )
                _write_group(self, group, params, buffers)
            return loss

        if found_inf is not None or self._fastopt_skipped is not False:
            self._fastopt_skipped = found_inf
            if not isinstance(found_inf, Tensor) or found_inf.device.type == "cpu":
                self._fastopt_skipped = _overflowed(found_inf)
        built = sgd_gather.LAYOUT is not None or _gpu_family() is not None
        if built and _is_plain_call() and not self.defaults["differentiable"]:
            _kernel_step(self, grad_scale, found_inf)
        else:
            _step_by_group(self, _Scale(grad_scale, found_inf), by_kernels=False)
        return loss


_AS_THE_GROUPS = object()


class _Scale:
    """What a GradScaler asks of a step: as it came, for kernels on a GPU, and as numbers, for which
    the device is waited for, once."""

    def __init__(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        self.grad_scale, self.found_inf = grad_scale, found_inf
        self.given = grad_scale is not None or found_inf is not None
        if not isinstance(found_inf, Tensor):  # the sum over no gradient at all
            self.overflowed, self.found_inf = bool(found_inf), None

    @functools.cached_property
    def overflowed(self) -> bool:
        return _overflowed(self.found_inf)

    @functools.cached_property
    def inv_scale(self) -> float | None:
        return _inv_scale(self.grad_scale)

    @functools.cached_property
    def pointer(self) -> Any:
        """For C: where inv_scale is."""
        return None if self.inv_scale is None else ctypes.pointer(ctypes.c_double(self.inv_scale))

    @property
    def address(self) -> int | None:
        return None if self.pointer is None else ctypes.addressof(self.pointer.contents)


def _kernel_step(optimizer: SGD, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    scale = None
    if grad_scale is not None or found_inf is not None:
        scale = _Scale(grad_scale, found_inf)
    if not _whole_step(optimizer, scale):
        _step_by_group(optimizer, scale or _Scale(None, None), by_kernels=True)


def _whole_step(optimizer: SGD, scale: "_Scale | None") -> bool:
    """The step, if the kernels take all of it; else nothing, and False."""
    try:
        groups, plan = optimizer.param_groups, optimizer._fastopt_plan
        lists = [*map(_get_params, groups)]
        sizes = [*map(len, lists)]
        params = tuple(chain.from_iterable(lists))
        options = tuple(chain.from_iterable(map(_get_options, groups)))
        if plan is None or not plan.holds(sizes, options):
            plan = optimizer._fastopt_plan = _Plan(sizes, options, params, plan)
        if getattr(optimizer._init_group, "__func__", None) is not _init_group:
            return False
        grads = tuple(map(_get_grad, params))
        buffers: tuple[Any, ...] = ()
        if plan.any_momentum or plan.devices is not None:  # or perhaps: only the device knows
            buffers = _momentum_buffers(optimizer.state, params)
    except Exception:  # noqa: BLE001 (torch's step has to raise it, at its time)
        return False
    if len(params) != plan.count or (scale is not None and not all(map(_is_fused, groups))):
        return False
    if plan.devices is not None:
        return _whole_gpu_step(optimizer, plan.devices, params, grads, buffers, scale)
    if plan.gather is None:
        return False
    inv_scale = None
    if scale is not None:
        if scale.overflowed:
            return True
        inv_scale = scale.address
    seen = plan.gather.step(params, grads, buffers, plan.groups_at, inv_scale)
    if seen & ~(READY | NO_GRADIENT):
        return False
    if buffers and not plan.all_momentum:
        momenta = map(plan.momenta.__getitem__, plan.group_of)
        buffers = tuple(
            b if momentum else None for b, momentum in zip(buffers, momenta, strict=True)
        )
    if seen != READY:
        ready = [grad is not None for grad in grads]
        params, grads, buffers = (tuple(compress(t, ready)) for t in (params, grads, buffers))
    if buffers and not plan.all_momentum:
        buffers = tuple(buffer for buffer in buffers if buffer is not None)
    increment_version(params + buffers)
    if inv_scale is not None:
        increment_version(grads)
    return True


def _is_fused(group: dict[str, Any]) -> bool:
    """Whether torch's step would be that of its fused kernels, which alone take a scale."""
    return bool(group["fused"]) and not group["foreach"]


def _read_group(optimizer: SGD, group: dict[str, Any]) -> Any:
    """What torch's step reads of a group."""
    params: list[Any] = []
    grads: list[Any] = []
    buffers: list[Any] = []
    has_sparse_grad = optimizer._init_group(group, params, grads, buffers)
    return params, grads, buffers, has_sparse_grad


def _write_group(
    optimizer: SGD, group: dict[str, Any], params: list[Any], buffers: list[Any]
) -> None:
    if group["momentum"] != 0:
        for param, buffer in zip(params, buffers, strict=True):
            if buffer is not None:  # skipped on overflow
                optimizer.state[param]["momentum_buffer"] = buffer


def _step_by_group(optimizer: SGD, scale: _Scale, by_kernels: bool) -> None:
    """torch's step, with kernels for what they take."""
    for group in optimizer.param_groups:
        params, grads, buffers, has_sparse_grad = _read_group(optimizer, group)
        options = {name: group[name] for name in _OPTIONS}
        if scale.given and not _is_fused(options):
            raise AssertionError("Expected grad_scale and found_inf to be None")
        if by_kernels:
            _Run(optimizer, options, (params, grads, buffers), has_sparse_grad, scale).go()
        elif not scale.overflowed:
            _drop_unstarted(optimizer, buffers)
            _torch_update(
                *(options, params, grads, buffers, has_sparse_grad), inv_scale=scale.inv_scale
            )
        _write_group(optimizer, group, params, buffers)


class _Run:
    """The update of one group, in the order of its parameters: whoever computes it, memory that they
    share holds what torch's loop leaves there, and what Python does meanwhile, it does to all that
    comes after. Addresses are read when everything before is over."""

    def __init__(
        self,
        optimizer: SGD,
        options: dict[str, Any],
        tensors: tuple[list[Any], list[Any], list[Any]],
        has_sparse_grad: bool,
        scale: _Scale,
    ) -> None:
        self.optimizer, self.options, self.scale = optimizer, options, scale
        self.params, self.grads, self.buffers = tensors
        self.has_sparse_grad = has_sparse_grad
        self.group = _group_row(tuple(options.values()))
        self.first_step = bytearray(len(self.params))  # whose buffer nobody has written to yet
        self.table = Gather(len(self.params)) if sgd_gather.LAYOUT is not None else None

    def go(self) -> None:
        at = 0 if self._is_for_kernels() else self._by_torch(0, len(self.params))
        while at < len(self.params):
            device = _gpu_of(self.params[at])
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
        _torch_update(
            *(self.options, self.params[part], self.grads[part], buffers, self.has_sparse_grad),
            inv_scale=self.scale.inv_scale,
        )
        self.buffers[part] = buffers
        return end

    def _on_cpu(self, begin: int) -> int:
        """Update some parameters from `begin` on. Returns where the next begin."""
        if self.scale.given and self.scale.overflowed:
            return begin + 1
        end, verdict = len(self.params), sgd_gather.TORCH
        tensors = tuple(self.params), tuple(self.grads), tuple(self.buffers)
        if self.table is not None:
            groups, inv_scale = self.group.buffer_info()[0], self.scale.address
            end, verdict = self.table.run(begin, tensors, groups, inv_scale, bytes(self.first_step))
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
        gpus = (i for i in range(begin, end) if _gpu_of(self.params[i]) is not None)
        return self._by_torch(begin, next(gpus, end))

    def _on_gpu(self, device: torch.device, begin: int) -> int:
        """As on CPU."""
        all_params = list(chain.from_iterable(map(_get_params, self.optimizer.param_groups)))
        places = gpu_step.places(map(_gpu_of, all_params))
        place_of = {id(all_params[i]): place for place, i in enumerate(places.get(device, ()))}
        end = begin
        run: list[int] = []  # the places of parameters from `begin` on
        while end < len(self.params) and _gpu_of(self.params[end]) == device:
            place = place_of.get(id(self.params[end]))
            if place is None or place in run:  # _init_group's own, or twice in a group
                break
            run.append(place)
            end += 1
        if not run:
            return self._by_torch(begin, begin + 1)
        devices = _devices(self.optimizer)
        with devices.lock:
            step = _device_step(self.optimizer, devices, device, all_params, places[device])
            groups = [self.options] * len(self.optimizer.param_groups)
            while run:
                params, grads, buffers = ([None] * step.count for _ in range(3))
                own = self.buffers[begin:] or _buffers_of(self.optimizer, self.params[begin:])
                for i, place in enumerate(run):
                    params[place], grads[place] = self.params[begin + i], self.grads[begin + i]
                    buffers[place] = own[i]
                tensors = tuple(params), tuple(grads), tuple(buffers)
                gathered = step.gather(groups, tensors, self.scale.grad_scale, self.scale.found_inf)
                if not gathered.left:
                    step.launch(_LAUNCHERS[_gpu_family()], gathered)
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


def _devices(optimizer: SGD) -> Devices:
    if optimizer._fastopt_devices is None:
        optimizer._fastopt_devices = Devices()
    return optimizer._fastopt_devices


def _device_step(
    optimizer: SGD, devices: Devices, device: torch.device, params: Sequence[Any], own: list[int]
) -> DeviceStep:
    """Of the parameters that are at `own` among those of all groups."""
    sizes = map(len, map(_get_params, optimizer.param_groups))
    group_of = list(chain.from_iterable([i] * size for i, size in enumerate(sizes)))
    return devices.step(
        device,
        tuple(group_of[i] for i in own),
        lambda: _buffers_of(optimizer, [params[i] for i in own]),
    )


def _buffers_of(optimizer: SGD, params: list[Any]) -> list[Any]:
    states = (optimizer.state.get(param) for param in params)
    return [s.get("momentum_buffer") if isinstance(s, dict) else None for s in states]


def _prepare(optimizer: SGD) -> None:
    """Room for what devices have to remember from step to step, and what they have to know of
    momentum buffers that are there. A CUDA graph that captures the next step could do neither.
    """
    devices = _devices(optimizer)
    if _gpu_family() is None or not _is_plain_call():
        return
    params = list(chain.from_iterable(map(_get_params, optimizer.param_groups)))
    for device, own in gpu_step.places(map(_gpu_of, params)).items():
        if not gpu_step.capturing(device):
            with devices.lock:
                step = _device_step(optimizer, devices, device, params, own)
                step.expect(_buffers_of(optimizer, [params[i] for i in own]))


def _unstarted(optimizer: SGD) -> list[Tensor]:
    """Parameters on GPUs whose buffer holds no value yet, because every step so far overflowed.
    torch would take it for one that does."""
    devices = optimizer._fastopt_devices
    buffers = devices.unstarted() if devices is not None else []
    if not buffers:
        return []
    of = set(map(id, buffers))
    return [
        param
        for param, state in optimizer.state.items()
        if isinstance(state, dict) and id(state.get("momentum_buffer")) in of
    ]


def _drop_unstarted(optimizer: SGD, buffers: list[Any]) -> None:
    """Before torch's path takes these buffers."""
    devices = optimizer._fastopt_devices
    unstarted = set(map(id, devices.unstarted())) if devices is not None else ()
    for i, buffer in enumerate(buffers):
        if unstarted and id(buffer) in unstarted:
            buffers[i] = None


def _whole_gpu_step(
    optimizer: SGD,
    places: dict[torch.device, list[int]],
    params: tuple[Any, ...],
    grads: tuple[Any, ...],
    buffers: tuple[Any, ...],
    scale: _Scale | None,
) -> bool:
    devices = _devices(optimizer)
    ready = []
    with devices.lock:
        for device, own in places.items():
            tensors: tuple[tuple[Any, ...], ...] = params, grads, buffers
            if len(own) != len(params):
                tensors = tuple(tuple(t[i] for i in own) for t in tensors)
            step = _device_step(optimizer, devices, device, params, own)
            step.rearrange(tensors[2])
            given = (scale.grad_scale, scale.found_inf) if scale is not None else (None, None)
            gathered = step.gather(optimizer.param_groups, tensors, *given)
            if gathered.left:
                return False
            ready.append((step, gathered))
        for step, gathered in ready:
            step.launch(_LAUNCHERS[_gpu_family()], gathered)
            for i in gathered.created:
                optimizer.state[gathered.params[i]]["momentum_buffer"] = gathered.buffers[i]
    return True


def _torch_update(
    options: dict[str, Any],
    params: list[Any],
    grads: list[Any],
    buffers: list[Any],
    has_sparse_grad: bool,
    *,
    inv_scale: float | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """torch's update of some parameters of a group."""
    foreach, fused = options["foreach"], options["fused"]
    on_cpu = all(param.device.type == "cpu" for param in params)
    if inv_scale is not None:
        if on_cpu or _gpu_family() is None:
            for grad in grads:
                grad.mul_(inv_scale)
        else:
            grads = [grad * inv_scale for grad in grads]
    if not torch.compiler.is_compiling() and (on_cpu or _gpu_family() is not None):
        # torch's foreach writes into gradients (nesterov) and, on CPU, rounds momentum to half
        # precision: on GPU it runs where it was asked for. Its fused kernels ignore version
        # counters and, on CPU, strides, shapes and half parameters: only their errors are kept.
        foreach = bool(foreach) and not on_cpu
        fused = fused and (has_sparse_grad or not all(map(Tensor.is_floating_point, params)))
    sgd(
        params,
        grads,
        buffers,
        has_sparse_grad=has_sparse_grad,
        foreach=foreach,
        fused=fused,
        grad_scale=grad_scale,
        found_inf=found_inf,
        weight_decay=options["weight_decay"],
        momentum=options["momentum"],
        lr=options["lr"],
        dampening=options["dampening"],
        nesterov=options["nesterov"],
        maximize=options["maximize"],
    )


# --- torch.distributed -------------------------------------------------------------------------

_FUNCTIONAL = "torch.distributed.optim.utils"


def _register_functional(module: Any) -> None:
    """Let torch.distributed use its functional SGD wherever it would for torch.optim.SGD."""
    functional = module.functional_optim_map.get(torch.optim.SGD)
    if functional is not None:
        module.register_functional_optim(SGD, functional)


class _WhenImported(importlib.abc.MetaPathFinder):
    """Registers SGD when torch's registry is imported: fastopt itself needs no torch.distributed."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != _FUNCTIONAL:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: Any) -> None:
                execute(module)
                _register_functional(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if _FUNCTIONAL in sys.modules:
    _register_functional(sys.modules[_FUNCTIONAL])
else:
    sys.meta_path.insert(0, _WhenImported())
