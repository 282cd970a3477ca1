"""What torch puts around an optimizer's step: a range for profilers, hooks, and a step without
gradients. Of a step over 10 tensors they are a third (25 of 69 us), so that what nobody would see
is left out.
"""

import ctypes
import functools
import sys
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch.autograd import profiler
from torch.optim import optimizer as of_torch
from torch.optim.optimizer import Optimizer, _use_grad_for_differentiable

from fastopt.sgd import step as _step

# What torch looks up in each step: somebody may have put another in its place.
_range, _around_step = profiler.record_function, Optimizer.profile_hook_step


def _find_listeners() -> tuple[Any, set[str]]:
    """at::hasCallbacks(): whether anybody, in whatever thread, listens to ranges. And the names of more
    listeners that a range asks for, in some versions of torch."""
    has_listeners = ctypes.PyDLL(torch._C.__file__)._ZN2at12hasCallbacksEv
    has_listeners.restype = ctypes.c_bool
    asked = (_range.__enter__.__code__.co_names, _range.__exit__.__code__.co_names)
    return has_listeners, set(chain(*asked)) & vars(profiler).keys()


# 2.13 has a module for one of them, imported by whoever wants to listen.
_CUPTI = "torch.profiler._cupti_monitor"
try:
    _has_listeners, _more_listeners = _find_listeners()
    _more_listeners -= {"torch", "_maybe_cupti_monitor"}
except (AttributeError, OSError):  # torch does not export it, or its range is not its own
    _has_listeners, _more_listeners = None, set()


def _is_quiet(optimizer: Any) -> bool:
    """Whether nobody would see that torch's own wrapper does nothing but call the step."""
    return (
        not torch.compiler.is_compiling()
        and _has_listeners is not None
        and not _has_listeners()
        and profiler.record_function is _range
        and Optimizer.profile_hook_step is _around_step
        and not of_torch._global_optimizer_pre_hooks
        and not optimizer._optimizer_step_pre_hooks
        and _step.is_plain_call()
        and all(vars(profiler)[name] is None for name in _more_listeners)
        and getattr(sys.modules.get(_CUPTI), "_monitor_singleton", None) is None
    )


def profile_hook_step(function: Callable[..., Any]) -> Callable[..., Any]:
    """As torch.optim.Optimizer.profile_hook_step, which it calls when anybody looks on."""
    hooked: Callable[..., Any] = Optimizer.profile_hook_step(function)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not args or not _is_quiet(args[0]):
            return hooked(*args, **kwargs)
        optimizer = args[0]
        out = function(*args, **kwargs)
        optimizer._optimizer_step_code()
        # The closure may have registered one.
        for hook in chain(
            optimizer._optimizer_step_post_hooks.values(),
            of_torch._global_optimizer_post_hooks.values(),
        ):
            hook(optimizer, args, kwargs)
        return out

    return wrapper


def use_grad_for_differentiable(function: Callable[..., Any]) -> Callable[..., Any]:
    """As torch's, without its import of Dynamo and without objects that switch gradients."""
    compiled = _use_grad_for_differentiable(function)

    @functools.wraps(function)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return compiled(self, *args, **kwargs)
        before = torch.is_grad_enabled()
        try:
            torch._C._set_grad_enabled(self.defaults["differentiable"])
            return function(self, *args, **kwargs)
        finally:
            torch._C._set_grad_enabled(before)

    return wrapper
