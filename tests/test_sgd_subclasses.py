"""Modules that have not run, states that torch did not make, subclasses of the optimizer: as with
torch.optim.SGD's for-loop, results bit for bit, exceptions by class."""

from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastopt
from sgd_oracle import (
    FULL,
    all_params,
    assert_same,
    assert_same_history,
    class_or_value,
    leaf,
    set_grads,
    train,
    values,
)

pytestmark = pytest.mark.stock


@pytest.mark.parametrize("momentum", [0, 0.9])
@pytest.mark.parametrize("used", [True, False])
def test_lazy_modules_that_have_not_run(used: bool, momentum: float) -> None:
    def run(make: Any) -> Any:
        torch.manual_seed(0)
        net = nn.ModuleDict({"later": nn.LazyLinear(3), "used": nn.Linear(4, 3)})
        optimizer = make(net.parameters(), lr=0.1, momentum=momentum)
        history = []
        for step in range(4):
            optimizer.zero_grad()
            if used:
                net["used"](values((2, 4), seed=step)).sum().backward()
            if step >= 2:
                torch.manual_seed(1)
                net["later"](values((2, 4), seed=step)).sum().backward()
            optimizer.step()
            history.append([p.detach().clone() for p in net["used"].parameters()])
        return history, list(net["later"].parameters())

    assert isinstance(assert_same(run)[0][0][0], Tensor)


class Forgetful(dict[str, Any]):
    def __missing__(self, key: str) -> Any:
        return None


STATES: dict[str, Callable[[Any], Any]] = {
    "list": lambda o: o.state.update({all_params(o)[1]: [1, 2]}),
    "none": lambda o: o.state.update({all_params(o)[1]: None}),
    "user dict": lambda o: o.state.update({all_params(o)[1]: UserDict()}),
    "ordered": lambda o: o.state.update({all_params(o)[1]: OrderedDict(o.state[all_params(o)[1]])}),
    "with missing": lambda o: o.state.update({all_params(o)[1]: Forgetful()}),
    "plain dict": lambda o: setattr(o, "state", dict(o.state)),
    "empty plain dict": lambda o: setattr(o, "state", {}),
    "other factory": lambda o: setattr(
        o, "state", defaultdict(lambda: {"momentum_buffer": torch.ones(6)})
    ),
    "no factory": lambda o: setattr(o, "state", defaultdict(None)),
    "strange keys": lambda o: o.state.update({"mine": {"x": 1}, 3: 4}),
    "another's": lambda o: o.state.update({leaf(values(3)): {"momentum_buffer": values(3)}}),
    "moved to the end": lambda o: o.state.update({(p := all_params(o)[0]): o.state.pop(p)}),
    "popped": lambda o: o.state.pop(all_params(o)[0]),
}


@pytest.mark.parametrize("momentum", [0.5, 0])
@pytest.mark.parametrize("kind", STATES)
def test_states_that_torch_did_not_make(kind: str, momentum: float) -> None:
    def run(make: Any) -> Any:
        params = [leaf(values(6, seed=i)) for i in range(3)]
        optimizer = make(params, lr=0.1, momentum=0.9)
        train(optimizer)
        STATES[kind](optimizer)
        optimizer.param_groups[0]["momentum"] = momentum
        results = []
        for step in range(3):
            set_grads(params, seed=step)
            results.append(class_or_value(optimizer.step))
        entries = [optimizer.state.get(p) for p in params]
        buffers = [e.get("momentum_buffer") if isinstance(e, dict) else None for e in entries]
        return results, params, buffers, [len(optimizer.state), type(optimizer.state)]

    assert_same(run)


def halved(base: Any) -> Any:
    class Halved(base):
        def _init_group(self, group: Any, params: Any, grads: Any, buffers: Any) -> Any:
            sparse = super()._init_group(group, params, grads, buffers)
            grads[:] = [g / 2 for g in grads]
            return sparse

    return Halved


def only_first(base: Any) -> Any:
    class OnlyFirst(base):
        def _init_group(self, group: Any, params: Any, grads: Any, buffers: Any) -> Any:
            sparse = super()._init_group(group, params, grads, buffers)
            del params[1:], grads[1:], buffers[1:]
            return sparse

    return OnlyFirst


def named(base: Any) -> Any:
    class Named(base):
        def __init__(self, params: Any, **options: Any) -> None:
            super().__init__(params, **options)
            for name in ("_plan", "_devices", "_prepare", "_scale", "_kernel_step", "_torch_step"):
                setattr(self, name, "mine")

    return Named


def slotted(base: Any) -> Any:
    class Slotted(base):
        __slots__ = ("extra",)

        def __init__(self, params: Any, **options: Any) -> None:
            self.extra = 1
            super().__init__(params, **options)

    return Slotted


def mixed(base: Any) -> Any:
    class Mixin:
        def step(self, closure: Any = None) -> Any:
            self.calls = getattr(self, "calls", 0) + 1
            return super().step(closure)

    return type("Mixed", (Mixin, base), {})


def wrapped(base: Any) -> Any:
    """As Horovod's DistributedOptimizer: a class over the optimizer's, with another's __dict__."""

    class _Wrapper(torch.optim.Optimizer):
        def __init__(self, params: Any, **options: Any) -> None:
            super(self.__class__, self).__init__(params, **options)

        def step(self, closure: Any = None) -> Any:
            return super(self.__class__, self).step(closure)

    return type(base.__name__, (base,), dict(_Wrapper.__dict__))


def without_init(base: Any) -> Any:
    """As wrappers that take over an optimizer's attributes."""

    class Taking(base):
        def __init__(self, params: Any, **options: Any) -> None:
            self.__dict__ = base(params, **options).__dict__

    return Taking


SUBCLASSES = [halved, only_first, named, slotted, mixed, wrapped, without_init]


@pytest.mark.parametrize("subclass", SUBCLASSES)
def test_subclasses(subclass: Any) -> None:
    histories = []
    for base in (fastopt.SGD, torch.optim.SGD):
        optimizer = subclass(base)([leaf(values(n, seed=n)) for n in (5, 6, 7)], **FULL)
        history = train(optimizer, by_torch=None)
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.add_param_group({"params": [leaf(values(8))]})
        histories.append(history + train(optimizer, by_torch=None))
    assert_same_history(*histories)


def test_an_init_group_of_the_instance() -> None:
    def run(make: Any) -> Any:
        optimizer = make([leaf(values(5))], lr=0.1)
        train(optimizer)
        calls = []
        original = optimizer._init_group
        optimizer._init_group = lambda *a: (calls.append(1), original(*a))[1]
        set_grads(all_params(optimizer), seed=7)
        optimizer.step()
        return len(calls), all_params(optimizer)

    assert assert_same(run)[0] == 1
