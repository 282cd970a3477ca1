"""Scripts that know nothing of fastopt, served by it: patch(), unpatch(), `with patched():`.

Functions of torch get other code, in place: torch.nn.functional.cross_entropy, which
torch.nn.CrossEntropyLoss calls, linear_cross_entropy likewise, and torch.optim.SGD.step. No name and no class becomes another
object. So whoever holds one is served, wherever that is: modules that imported it before or will,
registries, default arguments, closures, subclasses of users, instances that exist, an lr_scheduler
that wrapped a step. `type(x) is`, isinstance, pickles, torch.save and tables of functions
(torch.overrides, torch.fx, a tensor subclass's own) mean what they meant, and unpatch() has nothing
to look for.

Out of reach are callers that run no Python: what torch.jit.script compiles, and C++.
"""

import contextlib
import importlib
import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastopt import linear_loss, loss, optim
from fastopt.sgd import launch

_fastopt_cross_entropy = loss.cross_entropy
_fastopt_linear_cross_entropy = linear_loss.linear_cross_entropy
_stock_step = inspect.unwrap(torch.optim.SGD.step)
_our_step = inspect.unwrap(optim.SGD.step)


def _fastopt_sgd_step(optimizer: Any, closure: Callable[[], Any] | None = None) -> Any:
    """fastopt.SGD's step for an optimizer that is torch's."""
    if torch.compiler.is_compiling() or (launch.family() is not None and _is_unsure(optimizer)):
        return _stock_step(optimizer, closure)
    if "_fastopt_plan" not in optimizer.__dict__:
        optimizer._fastopt_plan = optimizer._fastopt_devices = None
        optimizer._fastopt_skipped = False
    return _our_step(optimizer, closure)


def _is_unsure(optimizer: Any) -> bool:
    """Whether a GPU alone may know that a momentum buffer holds a value yet. fastopt.SGD leaves those
    that do not out of its checkpoints; torch's class would write them down."""
    options = (option for group in optimizer.param_groups for option in group.values())
    return (
        getattr(optimizer, "found_inf", None) is not None
        or any(isinstance(option, Tensor) for option in options)
        or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
    )


# What torch's functions run instead of their own code. It looks up names where theirs does, so that
# the one it needs is put there. (torch.jit.script reads the source, with its annotations.)


def _call_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    return _fastopt_cross_entropy(
        input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
    )


def _call_linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
) -> Tensor:
    return _fastopt_linear_cross_entropy(
        input,
        linear_weight,
        target,
        linear_bias=linear_bias,
        weight=weight,
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        options=options,
    )


def _call_sgd_step(self, closure=None):
    return _fastopt_sgd_step(self, closure)


class _Function(NamedTuple):
    """A function of torch that can be patched."""

    what: str  # the word for it in patch()
    module: str
    name: str
    code: CodeType  # to be run in its place
    ours: str  # the name in this module that the code calls
    stock: tuple[Any, str]  # where ours looks for torch's function
    users: tuple[str, ...]  # torch's names for what calls it


FUNCTIONS = [
    _Function(
        *("loss", "torch.nn.functional", "cross_entropy", _call_cross_entropy.__code__),
        *("_fastopt_cross_entropy", (loss, "_stock"), ("torch.nn.CrossEntropyLoss",)),
    ),
    _Function(
        *("sgd", "torch.optim.sgd", "SGD.step", _call_sgd_step.__code__),
        *("_fastopt_sgd_step", (sys.modules[__name__], "_stock_step"), ("torch.optim.SGD",)),
    ),
]
if hasattr(torch.nn.functional, "linear_cross_entropy"):  # from torch 2.13 on
    FUNCTIONS.append(
        _Function(
            *("loss", "torch.nn.functional", "linear_cross_entropy"),
            *(_call_linear_cross_entropy.__code__, "_fastopt_linear_cross_entropy"),
            *((linear_loss, "_stock"), ("torch.nn.LinearCrossEntropyLoss",)),
        )
    )
WHAT = tuple(dict.fromkeys(function.what for function in FUNCTIONS))


class _Patch:
    """A function whose code is ours now."""

    def __init__(self, of: _Function, function: FunctionType) -> None:
        rules = _dynamo_rules()  # first: it may fail, and be interrupted
        self.function, self.place, self.code = function, of.stock, function.__code__
        self.held = getattr(*of.stock)
        stock = _copy(function)
        # In this order, and never taken back: another thread may be in the middle of a call.
        function.__globals__[of.ours] = globals()[of.ours]
        setattr(*of.stock, stock)
        function.__code__ = of.code
        # Dynamo puts torch's functions into a graph as they are, unless it does not know them.
        self.rule = rules.pop(function, None)

    def undo(self) -> None:
        self.function.__code__ = self.code
        setattr(*self.place, self.held)
        if self.rule is not None:
            _dynamo_rules()[self.function] = self.rule


def _copy(function: FunctionType) -> FunctionType:
    """torch's function with torch's code."""
    copy = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__
    )
    copy.__kwdefaults__, copy.__module__ = function.__kwdefaults__, function.__module__
    copy.__qualname__, copy.__annotations__ = function.__qualname__, function.__annotations__
    return copy


def _dynamo_rules() -> dict[Any, Any]:
    # Which the first step of any of torch's optimizers imports, too. The package before its module, as
    # there: another thread may be at it, and locks in another order would leave both without.
    importlib.import_module("torch._dynamo")
    trace_rules = importlib.import_module("torch._dynamo.trace_rules")
    rules: dict[Any, Any] = getattr(trace_rules, "get_torch_obj_rule_map", dict)()
    return rules


_lock = threading.RLock()
_wanted = dict.fromkeys(WHAT, False)  # by patch()
_inside = dict.fromkeys(WHAT, 0)  # how many `with patched()` are open, in all threads
_patches: dict[_Function, _Patch] = {}


def patch(*what: str, quiet: bool = False) -> None:
    """Let fastopt serve what torch's own names are called for, in the whole process.

    Existing modules, optimizers and references to torch.nn.functional.cross_entropy are served as
    new ones are. Calls that our kernels do not cover run torch's code, as they do in fastopt's own
    faces; on GPUs so do steps of torch.optim.SGD under a GradScaler with fused=True, with options
    that are tensors, or captured in a CUDA graph (fastopt.SGD takes them). Calling this again changes
    nothing.

    Args:
        what: "loss" (torch.nn.CrossEntropyLoss and torch.nn.functional.cross_entropy; from torch 2.13
            on LinearCrossEntropyLoss and linear_cross_entropy, too), "sgd" (torch.optim.SGD).
            Default: all.
        quiet: do not say on standard error what was patched. FASTOPT_QUIET=1 does so for all calls.

    Raises:
        ValueError: what is not one of these words.
    """
    names = _checked(what)
    with _lock:
        _wanted.update(dict.fromkeys(names, True))
        _settle(quiet)


def unpatch(*what: str) -> None:
    """Undo patch(). Takes the same words. What `with patched()` holds, it holds to its end."""
    names = _checked(what)
    with _lock:
        _wanted.update(dict.fromkeys(names, False))
        _settle(quiet=True)


@contextlib.contextmanager
def patched(*what: str, quiet: bool = False) -> Iterator[None]:
    """patch() for the time of a with statement: for the whole process, until the last of those that
    overlap, in this thread or another, has ended."""
    names = _checked(what)
    with _lock:
        for name in names:
            _inside[name] += 1
    try:
        with _lock:
            _settle(quiet)
        yield
    finally:
        with _lock:
            for name in names:
                _inside[name] -= 1
            _settle(quiet=True)


def _checked(what: tuple[str, ...]) -> tuple[str, ...]:
    for name in what:
        if name not in WHAT:
            raise ValueError(f"what to patch must be one of {', '.join(WHAT)}, got {name!r}")
    return what or WHAT


def _settle(quiet: bool) -> None:
    """Make torch's functions what is wanted of them."""
    news, left = [], []
    for of in FUNCTIONS:
        wanted = _wanted[of.what] or _inside[of.what] > 0
        if wanted and of not in _patches:
            function = _find(of)
            if isinstance(function, str):
                left.append(function)
            else:
                _patches[of] = _Patch(of, function)
                news.append(of)
        elif not wanted and of in _patches:
            _patches.pop(of).undo()
    if (news or left) and not quiet and os.environ.get("FASTOPT_QUIET") != "1":
        say(_said(news, left))


def _find(of: _Function) -> FunctionType | str:
    """torch's function, below what torch itself wraps around it; or why it is left alone."""
    where = f"{of.module}.{of.name}"
    found: Any = importlib.import_module(of.module)
    for name in of.name.split("."):
        found = getattr(found, name, None)
    if found is None:
        return f"{where} (torch {torch.__version__} has none)"
    function = inspect.unwrap(found)
    if (
        not isinstance(function, FunctionType)
        or function.__globals__ is not vars(sys.modules[of.module])
        or function.__code__.co_filename != sys.modules[of.module].__file__
        or function.__code__.co_freevars
        or [*inspect.signature(function).parameters]
        != [*of.code.co_varnames[: of.code.co_argcount + of.code.co_kwonlyargcount]]
    ):
        return f"{where} (it is {getattr(function, '__module__', 'somebody')}'s)"
    return function


def say(what: object) -> None:
    """On standard error, where there is one: not on standard output in its place."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):  # it may be closed
            print(what, file=sys.stderr, flush=True)


def _said(news: list[_Function], left: list[str]) -> str:
    parts = []
    if news:
        names = [name for of in news for name in (f"{of.module}.{of.name}", *of.users)]
        parts.append(f"serves {', '.join(names)}, wherever they are used")
        if modules := _modules_that_hold(names):
            some = ", ".join(modules[:3]) + ", ..." * (len(modules) > 3)
            parts[-1] += f" ({len(modules)} modules have imported them: {some})"
        parts.append("not in TorchScript and C++")
    if left:
        parts.append(f"left alone: {', '.join(left)}")
    return f"fastopt: {'; '.join(parts)}"


def _modules_that_hold(names: list[str]) -> list[str]:
    """Modules, other than torch's and ours, that have one of these under a name of their own."""
    held = set()
    for name in names:
        module, _, attribute = name.rpartition(".")
        held.add(id(getattr(sys.modules.get(module), attribute, None)))
    held.discard(id(None))
    return [
        name
        for name, module in sorted(sys.modules.items())
        if name.partition(".")[0] not in ("torch", "fastopt", "__mp_main__")
        and any(id(value) in held for value in list(getattr(module, "__dict__", {}).values()))
    ]
