"""fastopt/sgd/quiet.py leaves out what torch puts around a step only while nobody would see it."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch.autograd import profiler
from torch.optim import optimizer as of_torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode

import fastopt
from child import run_python
from fastopt.sgd import quiet
from sgd_oracle import DAMPED, all_params, assert_same, leaf, set_grads, some_params

Optimizer = torch.optim.Optimizer


@contextmanager
def pre_hook(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


class Mode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


# Whoever may look on.
ONLOOKERS: dict[str, Callable[[Optimizer], Any]] = {
    "profiler": lambda _: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
    "itt": lambda _: profiler.emit_itt(),
    "own_hook": lambda o: pre_hook(o.register_step_pre_hook(lambda *_: None)),
    "global_hook": lambda _: pre_hook(register_optimizer_step_pre_hook(lambda *_: None)),
    "mode": lambda _: Mode(),
}


@pytest.mark.stock  # which takes the step under a mode
@pytest.mark.parametrize("onlooker", [None, *ONLOOKERS])
def test_the_range_is_there_for_all_who_look_on(
    onlooker: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []

    class Range(profiler.record_function):
        def __init__(self, name: str, args: str | None = None) -> None:
            names.append(name)
            super().__init__(name, args)

    monkeypatch.setattr(profiler, "record_function", Range)
    monkeypatch.setattr(quiet, "_range", Range)  # as if it were torch's
    optimizer = fastopt.SGD(some_params(), **DAMPED)
    set_grads(all_params(optimizer), seed=1)
    with ExitStack() as stack:
        if onlooker is not None:
            stack.enter_context(ONLOOKERS[onlooker](optimizer))
        optimizer.step()
    assert names == [] if onlooker is None else names == ["Optimizer.step#SGD.step"]


@pytest.mark.stock
def test_a_profiler_of_another_thread_sees_the_step() -> None:
    run_python(
        """
        import threading
        import torch
        import fastopt
        from torch.profiler import ProfilerActivity, profile
        every = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
        param = torch.ones(3, requires_grad=True)
        param.grad = torch.ones(3)
        optimizer = fastopt.SGD([param])
        with profile(activities=[ProfilerActivity.CPU], experimental_config=every) as profiler:
            thread = threading.Thread(target=optimizer.step)
            thread.start()
            thread.join()
        assert "Optimizer.step#SGD.step" in [event.key for event in profiler.key_averages()]
        """
    )


def test_one_more_listener_of_torchs_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quiet, "_more_listeners", {"_listener"})
    monkeypatch.setattr(profiler, "_listener", None, raising=False)
    optimizer = fastopt.SGD(some_params())
    assert quiet._is_quiet(optimizer)
    monkeypatch.setattr(profiler, "_listener", object())
    assert not quiet._is_quiet(optimizer)


def test_without_torchs_answer_somebody_may_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = fastopt.SGD(some_params())
    monkeypatch.setattr(quiet, "_has_listeners", None)
    assert not quiet._is_quiet(optimizer)


def test_what_others_put_in_the_place_of_torchs_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = fastopt.SGD(some_params(), **DAMPED)
    set_grads(all_params(optimizer), seed=1)
    seen: list[str] = []
    monkeypatch.setattr(of_torch, "_global_optimizer_post_hooks", OrderedDict())
    of_torch.register_optimizer_step_post_hook(lambda *_: seen.append("post"))
    optimizer.step()
    monkeypatch.setattr(of_torch, "_global_optimizer_pre_hooks", OrderedDict())
    of_torch.register_optimizer_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.step()
    assert seen == ["post", "pre", "post"]
    assert not quiet._is_quiet(optimizer)
    monkeypatch.setattr(of_torch, "_global_optimizer_pre_hooks", OrderedDict())
    assert quiet._is_quiet(optimizer)
    monkeypatch.setattr(Optimizer, "profile_hook_step", staticmethod(lambda step: step))
    assert not quiet._is_quiet(optimizer)


def test_hooks_that_a_closure_registers_run() -> None:
    def run(make: Any) -> Any:
        param = leaf(torch.ones(5))
        optimizer = make([param], lr=0.1)
        events: list[Any] = []

        def closure() -> float:
            param.grad = torch.ones(5)
            for register in optimizer.register_step_pre_hook, optimizer.register_step_post_hook:
                register(lambda self, args, kwargs: events.append((len(args), len(kwargs))))
            return 2.0

        return [optimizer.step(closure=closure), optimizer.step(), events, param]

    assert_same(run)


def test_a_subclass_has_its_own_range_and_hooks() -> None:
    def run(make: Any) -> Any:
        base = fastopt.SGD if make is fastopt.SGD else torch.optim.SGD
        events: list[str] = []

        class Twice(base):  # type: ignore[misc, valid-type]
            def step(self, closure: Any = None) -> Any:
                super().step(closure)
                return super().step()

        base([leaf(torch.ones(5))])
        param = leaf(torch.ones(5))
        param.grad = torch.ones(5)
        optimizer = Twice([param], lr=0.1)
        optimizer.register_step_pre_hook(lambda *_: events.append("pre"))
        optimizer.register_step_post_hook(lambda *_: events.append("post"))
        optimizer.step()
        return [events, param]

    assert_same(run)
