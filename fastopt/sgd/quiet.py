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
from torch.optim.optimizer import (
    Optimizer,
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
    _use_grad_for_differentiable,
)

from fastopt.sgd import step as _step

# at::hasCallbacks(): whether anybody, in whatever thread, listens to ranges. None where torch does not
# export it: somebody might.
_has_listeners: Any = getattr(ctypes.PyDLL(torch._C.__file__), "_ZN2at12hasCallbacksEv", None)
if _has_listeners is not None:
    _has_listeners.restype = ctypes.c_bool

# Some versions of torch tell a range to one more listener, whom a variable of theirs holds; 2.13
# has a module for it, imported by whoever wants to listen.
_CUPTI = "torch.profiler._cupti_monitor"
_range = profiler.record_function
_more_listeners = {
    name
    for function in (_range.__enter__, _range.__exit__)
    for name in function.__code__.co_names
    if name in vars(profiler)
} - {"torch", "_maybe_cupti_monitor"}


def _is_quiet(optimizer: Any) -> bool:
    """Whether nobody would see that torch's own wrapper does nothing but call the step."""
    return (
        not torch.compiler.is_compiling()
        and _has_listeners is not None
        and not _has_listeners()
        and not _global_optimizer_pre_hooks
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
            optimizer._optimizer_step_post_hooks.values(), _global_optimizer_post_hooks.values()
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
