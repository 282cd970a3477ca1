"""SGD: torch.optim.SGD with every parameter of every group updated in one pass of one kernel.

What a step does, top to bottom:

    SGD.step         the closure, the GradScaler; can the kernels be used at all here?
    _Plan            what lasts from step to step: the parameters, their groups and their state
    gather           csrc/cpu/sgd.cpp reads the tensors and gives each parameter a verdict
    SGD._torch_step  torch's own update, for the parameters that the kernels do not take
    run              csrc/cpu/sgd.cpp updates the others

Parameters on a GPU go to gpu_step.py instead of gather and run.
"""

import functools
from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, compress
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.optimizer import _use_grad_for_differentiable
from torch.optim.sgd import sgd

from fastopt import gpu_step, ops, sgd_gather
from fastopt.gpu_step import DeviceStep, Launch
from fastopt.sgd_gather import (
    DONE,
    GROUP_WORDS,
    NEEDS_BUFFER,
    OVERLAPPING,
    READY,
    TENSOR_OFFSET,
    TORCH,
    Gather,
)

_MOMENTUM = 2  # where it is in a SgdGroup

_get_grad = attrgetter("grad")
_get_params = itemgetter("params")
_get_momentum_buffer = itemgetter("momentum_buffer")


def _gpu_family() -> str | None:
    """Which kernels serve GPUs: cuda, triton, or None where torch's own do."""
    return ops.GPU_FAMILY


_LAUNCHERS: dict[Any, Callable[[Launch], None]] = {
    "cuda": gpu_step.launch_cuda,
    "triton": gpu_step.launch_triton,
}


def _is_plain_call() -> bool:
    """Whether an update that torch cannot see is the same as one that it can."""
    return (
        not torch.is_inference_mode_enabled()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _kernels_apply() -> bool:
    """Whether the CPU kernels can be used."""
    return TENSOR_OFFSET is not None and _is_plain_call()


_get_options = itemgetter("lr", "weight_decay", "momentum", "dampening", "nesterov", "maximize")
_NUMBERS = {float, int, bool}
_NOT_SERVED = array("d", bytes(8 * GROUP_WORDS))


def _group_row(group: dict[str, Any]) -> "array[float]":
    """A group's SgdGroup. The last number says whether the kernels serve its parameters."""
    lr, weight_decay, *others = _get_options(group)
    if any(isinstance(option, Tensor) for option in others):
        return _NOT_SERVED
    try:
        return array("d", (_plain_number(lr), _plain_number(weight_decay), *others, True))
    except (TypeError, OverflowError):  # torch knows what to say
        return _NOT_SERVED


def _plain_number(option: Any) -> Any:
    """The number that torch's for-loop uses where an option is a tensor. None if there is more to
    it: a gradient, a device to wait for, arithmetic in integers."""
    if not isinstance(option, Tensor):
        return option
    if (
        type(option) is Tensor
        and option.numel() == 1
        and option.is_floating_point()
        and option.device.type == "cpu"
        and not option.requires_grad
    ):
        return option.item()
    return None


def _is_served_gpu(device: torch.device) -> bool:
    return (
        device.type == gpu_step.DEVICE_TYPE
        and _gpu_family() is not None
        and ops.serves_gpu(device.index)
    )


def _has_device_step(param: Tensor) -> bool:
    """Whether a DeviceStep has room for it. Whether kernels then update it, gather decides."""
    return _is_served_gpu(param.device) and gpu_step.local(param) is not None


def _is_on_gpu(param: Tensor) -> bool:
    return param.device.type == gpu_step.DEVICE_TYPE


class _Plan:
    """What lasts from step to step: the parameters, their groups and their state, as objects. What
    is in the tensors, their memory included, is read afresh in every step."""

    def __init__(self, groups: list[dict[str, Any]], state: dict[Tensor, dict[str, Any]]) -> None:
        self.sizes = list(map(len, map(_get_params, groups)))
        self.params = tuple(chain.from_iterable(map(_get_params, groups)))
        self.states = [state.get(param, {}) for param in self.params]
        self.state_count = len(state)
        self.objects = (*self.params, *state, *state.values())
        # torch refuses to change tensors of inference mode outside it.
        self.inference = any(
            isinstance(tensor, Tensor) and tensor.is_inference()
            for tensor in chain(self.params, self.momentum_buffers())
        )

        # If so, gather has nothing to do: asked once, because it only ever saves time.
        self.on_gpu = all(_is_served_gpu(param.device) for param in self.params)
        self.gpu_steps: list[tuple[DeviceStep, list[int]]] | None = None  # then, once made

        group_of = chain.from_iterable([i] * size for i, size in enumerate(self.sizes))
        self.gather = Gather(self.params, list(group_of), torch.device("cpu"))
        self.group_of = self.gather.group_of
        self.verdicts = self.gather.verdicts
        self.options: tuple[Any, ...] = ()

    def read_options(self, groups: list[dict[str, Any]]) -> None:
        options = tuple(chain.from_iterable(map(_get_options, groups)))
        if self.options and all(map(is_, options, self.options)):
            return
        self.group_rows = array("d", chain.from_iterable(map(_group_row, groups)))
        self.gather.table.groups = self.group_rows.buffer_info()[0]
        momenta = self.group_rows[_MOMENTUM::GROUP_WORDS]
        self.any_momentum, self.all_momentum = any(momenta), all(momenta)
        # A tensor, unlike a number, can change and stay the same object.
        self.options = options if _NUMBERS.issuperset(map(type, options)) else ()

    def holds(self, groups: list[dict[str, Any]], state: dict[Tensor, dict[str, Any]]) -> bool:
        params = tuple(map(_get_params, groups))
        return (
            self.sizes == list(map(len, params))
            and self.state_count == len(state)
            and all(map(is_, self.objects, chain(*params, state, state.values())))
        )

    def momentum_buffers(self) -> tuple[Tensor | None, ...]:
        try:
            return tuple(map(_get_momentum_buffer, self.states))
        except KeyError:  # some parameter has yet to take its first step with momentum
            return tuple(state.get("momentum_buffer") for state in self.states)


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
    _plan: _Plan | None = None
    _devices: dict[torch.device, DeviceStep] | None = None

    @functools.wraps(torch.optim.SGD.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prepare()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if self._devices is not None:  # torch's constructor comes here for each of its groups
            self._prepare()

    add_param_group.__doc__ = torch.optim.SGD.add_param_group.__doc__

    def _prepare(self) -> None:
        """Room for what devices have to remember from step to step, and what they have to know of
        momentum buffers that are there. A CUDA graph that captures the next step could do neither.
        """
        if self._devices is None:
            self._devices = {}
        by_device: dict[torch.device, tuple[list[Tensor], list[int]]] = {}
        for index, group in enumerate(self.param_groups if _is_plain_call() else ()):
            for param in group["params"]:
                if _has_device_step(param):
                    params, group_of = by_device.setdefault(param.device, ([], []))
                    params.append(param)
                    group_of.append(index)
        for device, (params, group_of) in by_device.items():
            if not gpu_step.capturing(device):
                buffers = [self.state.get(p, {}).get("momentum_buffer") for p in params]
                self._device_step(device, params, group_of).expect(buffers)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # GradScaler's question whether step() unscales by itself. Asked of the groups as they are:
        # a flag kept beside them is wrong once a state dict with other options has been loaded.
        return all(group.get("fused") for group in self.param_groups)

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """torch's constructor keeps such a flag."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plan = None  # load_state_dict comes here: let go of the old momentum buffers
        self._devices = None
        self._prepare()

    def __getstate__(self) -> dict[str, Any]:
        kept: dict[str, Any] = super().__getstate__()
        unstarted = self._unstarted()
        if unstarted:
            state = kept["state"] = kept["state"].copy()
            for param in unstarted:
                _drop_buffer(state, param)
        return kept

    def state_dict(self) -> dict[str, Any]:
        packed: dict[str, Any] = super().state_dict()
        unstarted = set(map(id, self._unstarted()))
        if unstarted:
            params = chain.from_iterable(map(_get_params, self.param_groups))
            for i, param in enumerate(params):
                if id(param) in unstarted and i in packed["state"]:
                    _drop_buffer(packed["state"], i)
        return packed

    state_dict.__doc__ = torch.optim.SGD.state_dict.__doc__

    def _unstarted(self) -> list[Tensor]:
        """Parameters on GPUs whose buffer holds no value yet, because every step so far overflowed.
        torch would take it for one that does."""
        return [
            param
            for device in (self._devices or {}).values()
            for param, buffer in device.unstarted()
            if self.state.get(param, {}).get("momentum_buffer") is buffer
        ]

    def _drop_unstarted(self, params: Iterable[Tensor]) -> None:
        """Before torch's path takes these parameters."""
        unstarted = self._unstarted()
        taken = set(map(id, params)) if unstarted else set()
        for param in unstarted:
            if id(param) in taken:
                del self.state[param]["momentum_buffer"]

    def _device_step(
        self, device: torch.device, params: Sequence[Tensor], group_of: Sequence[int]
    ) -> DeviceStep:
        if self._devices is None:
            self._devices = {}
        step = self._devices.get(device)
        if step is None or not step.holds(params, group_of):
            old, step = step, DeviceStep(device, params, group_of)
            if old is not None:
                step.adopt(old)
            self._devices[device] = step
        return step

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
                self._torch_step(group, group["params"], grad_scale=grad_scale, found_inf=found_inf)
            return loss

        built = TENSOR_OFFSET is not None or _gpu_family() is not None
        if built and _is_plain_call() and not self.defaults["differentiable"]:
            self._kernel_step(grad_scale, found_inf)
        elif not _overflowed(found_inf):
            self._drop_unstarted(chain.from_iterable(map(_get_params, self.param_groups)))
            inv_scale = _inv_scale(grad_scale)
            for group in self.param_groups:
                self._torch_step(group, group["params"], inv_scale=inv_scale)
        return loss

    def _kernel_step(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        groups, plan = self.param_groups, self._plan
        if plan is None or not plan.holds(groups, self.state):
            plan = self._plan = _Plan(groups, self.state)
        if plan.on_gpu and plan.params or TENSOR_OFFSET is None:
            self._gpu_step(plan, range(len(plan.params)), grad_scale, found_inf)
            return
        if _overflowed(found_inf):
            return
        inv_scale = _inv_scale(grad_scale)
        plan.read_options(groups)
        params, gather = plan.params, plan.gather
        grads = tuple(map(_get_grad, params))
        buffers: tuple[Any, ...] = plan.momentum_buffers() if plan.any_momentum else ()

        gather.table.inv_scale = 1.0 if inv_scale is None else inv_scale
        gather.table.unscale = inv_scale is not None
        seen = OVERLAPPING if plan.inference else gather.read(grads, buffers)

        first_step = b""
        if seen & NEEDS_BUFFER and not seen & OVERLAPPING:
            # The kernel fills the new buffers. The state learns of them when it has.
            first_step = bytes(verdict == NEEDS_BUFFER for verdict in plan.verdicts)
            buffers = tuple(
                torch.empty_like(grad) if first else buffer
                for grad, buffer, first in zip(grads, buffers, first_step, strict=True)
            )
            seen = gather.read(grads, buffers, first_step)

        if seen & OVERLAPPING:
            self._drop_unstarted(params)
            for group in groups:
                self._torch_step(group, group["params"], inv_scale=inv_scale)
            return
        if seen & TORCH:
            left = [
                i
                for i, (param, verdict) in enumerate(zip(params, plan.verdicts, strict=True))
                if verdict == TORCH or _is_on_gpu(param)
            ]
            self._gpu_step(plan, left, grad_scale, None)

        if seen != DONE and sgd_gather.run(gather.address) != 0:
            raise RuntimeError("fastopt.SGD: torch could not run the update in parallel")
        if seen not in (READY, DONE):
            ready = [verdict == READY for verdict in plan.verdicts]
            params, grads, buffers = (tuple(compress(t, ready)) for t in (params, grads, buffers))
            first_step = bytes(compress(first_step, ready))
        for param, buffer, first in zip(params, buffers, first_step, strict=False):
            if first:
                self.state[param]["momentum_buffer"] = buffer
        if not plan.all_momentum:
            buffers = tuple(buffer for buffer in buffers if buffer is not None)
        increment_version(params + buffers)
        if inv_scale is not None:
            increment_version(grads)

    def _gpu_step(
        self,
        plan: _Plan,
        places: Iterable[int],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Update some of the parameters: those on GPUs by the kernels there, all others by torch."""
        family = None if plan.inference else _gpu_family()
        left: list[int] = []
        steps = plan.gpu_steps  # where the parameters were; gather leaves what has moved to torch
        if steps is None or family is None:
            by_device: dict[torch.device, list[int]] = {}
            for i in places:
                param = plan.params[i]
                if family is not None and _has_device_step(param):
                    by_device.setdefault(param.device, []).append(i)
                else:
                    left.append(i)
            steps = [
                (
                    self._device_step(
                        device, [plan.params[i] for i in own], [plan.group_of[i] for i in own]
                    ),
                    own,
                )
                for device, own in by_device.items()
            ]
            if plan.on_gpu and not left:
                plan.gpu_steps = steps
        grads = tuple(map(_get_grad, plan.params))
        buffers = plan.momentum_buffers()
        for step, own in steps:
            own_grads, own_buffers = grads, buffers
            if len(own) != len(grads):
                own_grads, own_buffers = (tuple(t[i] for i in own) for t in (grads, buffers))
            left += [own[i] for i in step.gather(self.param_groups, own_grads, own_buffers)]
        if left and not _overflowed(found_inf):
            self._drop_unstarted(plan.params[i] for i in left)
            inv_scale = _inv_scale(grad_scale)
            by_group: dict[int, list[Tensor]] = {}
            for i in left:
                by_group.setdefault(plan.group_of[i], []).append(plan.params[i])
            for index, members in by_group.items():
                self._torch_step(self.param_groups[index], members, inv_scale=inv_scale)
            for step, _ in steps:
                step.forget()
        for step, _ in steps:
            step.launch(_LAUNCHERS[family], self.state, grad_scale, found_inf)

    def _torch_step(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        *,
        inv_scale: float | None = None,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """torch's update of some parameters of a group."""
        if params is not group["params"]:
            group = {**group, "params": params}
        selected: list[Tensor] = []
        grads: list[Tensor] = []
        buffers: list[Tensor | None] = []
        has_sparse_grad = self._init_group(group, selected, grads, buffers)
        foreach, fused = group["foreach"], group["fused"]
        on_cpu = all(param.device.type == "cpu" for param in selected)
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
            fused = fused and (has_sparse_grad or not all(map(Tensor.is_floating_point, selected)))
        sgd(
            selected,
            grads,
            buffers,
            has_sparse_grad=has_sparse_grad,
            foreach=foreach,
            fused=fused,
            grad_scale=grad_scale,
            found_inf=found_inf,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )
        if group["momentum"] != 0:
            for param, buffer in zip(selected, buffers, strict=True):
                self.state[param]["momentum_buffer"] = buffer
