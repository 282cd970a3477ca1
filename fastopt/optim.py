"""SGD: torch.optim.SGD with every parameter of every group updated in one pass of one kernel.

This is the face: the constructor, the state and what a user reads. fastopt/sgd takes the steps.
A subclass may use any name but those that begin with _fastopt.
"""

import functools
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Iterable
from itertools import chain
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from fastopt.sgd import quiet
from fastopt.sgd.devices import Devices
from fastopt.sgd.step import overflowed, prepare, update

_get_params = itemgetter("params")


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
        lr (float or Tensor): learning rate; a Tensor has one element. Default: 1e-3
        momentum (float): momentum factor. Default: 0
        dampening (float): dampening for momentum, not applied in the first step. Default: 0
        weight_decay (float or Tensor): L2 penalty, coupled; a Tensor has one element. Default: 0
        nesterov (bool): Nesterov momentum; needs momentum and no dampening. Default: False
        maximize (bool): ascend instead of descend. Default: False
        foreach, fused (bool, optional): accepted for torch's sake. They change no result of the
            kernels; ``fused=True`` keeps torch's contract with GradScaler (the step unscales the
            gradients itself and is skipped on overflow) and its refusal of sparse and complex
            parameters. Default: None
        differentiable (bool): let autograd see the step, which torch then computes. Default: False

    Served by our kernels: dense parameters on CPU and, where a family of GPU kernels is available
    and gave right values on that GPU, on CUDA and ROCm, of any shape in float32, float64, bfloat16
    and float16, mixed at will, whose gradient and momentum buffer have their dtype and memory
    order; DTensors (FSDP2, tensor parallelism) by their local shards, where gradient and buffer are
    sharded as their parameter is. All else (other devices, sparse, complex, overlapping memory,
    other tensor subclasses, tensors with a gradient as options) takes torch's path, parameter by
    parameter.

    What follows about GPUs is tested on CPUs (what ran where: bench/results/LEDGER.md). On GPU a step
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

        >>> import fastopt, torch
        >>> model, target = torch.nn.Linear(8, 4), torch.tensor([1, 3])
        >>> optimizer = fastopt.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        >>> optimizer.zero_grad()
        >>> fastopt.cross_entropy(model(torch.randn(2, 8)), target).backward()
        >>> optimizer.step()

    Source: torch.optim.SGD; Sutskever et al., `On the importance of initialization and momentum in
    deep learning <http://www.cs.toronto.edu/%7Ehinton/absps/momentum.pdf>`_, 2013.
    """

    # Not part of __getstate__: copies make their own.
    _fastopt_plan: Any = None
    _fastopt_devices: Devices | None = None
    _fastopt_skipped: Any = False

    @functools.wraps(torch.optim.SGD.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if "_step_supports_amp_scaling" in self.__dict__:
            self.__dict__["_step_supports_amp_scaling"] = _AS_THE_GROUPS
        prepare(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        # Not for each group of torch's constructor.
        if self._fastopt_devices is not None:
            prepare(self)

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
        prepare(self)

    def __getstate__(self) -> dict[str, Any]:
        kept: dict[str, Any] = super().__getstate__()
        if unstarted := _unstarted(self):
            kept["state"] = kept["state"].copy()
            _drop_buffers(kept["state"], unstarted)
        return kept

    def state_dict(self) -> dict[str, Any]:
        packed: dict[str, Any] = super().state_dict()
        if unstarted := set(map(id, _unstarted(self))):
            params = chain.from_iterable(map(_get_params, self.param_groups))
            _drop_buffers(packed["state"], [i for i, p in enumerate(params) if id(p) in unstarted])
        return packed

    state_dict.__doc__ = torch.optim.SGD.state_dict.__doc__

    # torch's constructor puts it around the step of each class.
    profile_hook_step: Any = staticmethod(quiet.profile_hook_step)

    @quiet.use_grad_for_differentiable
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
        if (
            found_inf is not None or self._fastopt_skipped is not False
        ) and not torch.compiler.is_compiling():
            self._fastopt_skipped = found_inf
            if not isinstance(found_inf, Tensor) or found_inf.device.type == "cpu":
                self._fastopt_skipped = overflowed(found_inf)
        update(self, grad_scale, found_inf)
        return loss


_AS_THE_GROUPS = object()


def _unstarted(optimizer: SGD) -> list[Tensor]:
    """Parameters on GPUs whose buffer holds no value yet."""
    devices = optimizer._fastopt_devices
    unstarted = devices.unstarted() if devices is not None else ()
    if not unstarted:
        return []
    return [
        param
        for param, state in optimizer.state.items()
        if isinstance(state, dict) and id(state.get("momentum_buffer")) in unstarted
    ]


def _drop_buffers(state: dict[Any, dict[str, Any]], keys: Iterable[Any]) -> None:
    """Leave momentum buffers out of a copy of the state."""
    for key in keys:
        rest = {k: value for k, value in state.get(key, {}).items() if k != "momentum_buffer"}
        if rest:
            state[key] = rest
        else:
            state.pop(key, None)


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
