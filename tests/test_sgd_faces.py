"""A call of fastopt.SGD.step and what surrounds it, side by side with the installed torch.optim.SGD:
closures, hooks, the profiler, backward."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import fastopt
from sgd_oracle import (
    DAMPED,
    FULL,
    all_params,
    assert_same_bits,
    assert_same_state,
    for_loop,
    leaf,
    leaf_of_ones,
    outcome,
    set_grads,
    snapshot,
    some_params,
    train,
    values,
)


def test_closure_runs_once_with_gradients_enabled_and_its_value_comes_back() -> None:
    def run(make: Any) -> Any:
        param = leaf(values(20))
        optimizer = make([param], **FULL)
        calls = []

        def closure() -> Tensor:
            calls.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            loss = (param * param).sum()
            loss.backward()
            return loss

        with torch.no_grad():
            losses = [optimizer.step(closure) for _ in range(3)]
            losses.append(optimizer.step(closure=closure))
            assert not torch.is_grad_enabled()
        return optimizer, calls, losses

    ours, theirs = run(fastopt.SGD), run(for_loop)
    assert_same_state(ours[0], theirs[0])
    assert ours[1:] == theirs[1:] == ([True] * 4, ours[2])
    assert fastopt.SGD([leaf_of_ones()]).step() is None


def test_an_error_in_the_closure_passes_through() -> None:
    optimizer = fastopt.SGD([leaf_of_ones()])

    def closure() -> float:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        optimizer.step(closure)
    assert torch.is_grad_enabled()


def test_hooks_run_in_stocks_order() -> None:
    def run(make: Any) -> Any:
        events: list[Any] = []
        param = leaf(torch.ones(5))
        optimizer = make([param], lr=0.1, momentum=0.9)

        def hook(name: str) -> Callable[..., None]:
            def record(self: Any, args: Any, kwargs: Any) -> None:
                events.append((name, self is optimizer, args, kwargs, param.tolist()))

            return record

        def closure() -> float:
            events.append("closure")
            param.grad = torch.ones(5)
            return 3.0

        handles = [
            optimizer.register_step_post_hook(hook("own post")),
            optimizer.register_step_pre_hook(hook("own pre")),
            register_optimizer_step_pre_hook(hook("global pre")),
            register_optimizer_step_post_hook(hook("global post")),
        ]
        # A pre hook may replace the arguments.
        handles.append(
            optimizer.register_step_pre_hook(lambda self, args, kwargs: ((self, closure), {}))
        )
        try:
            assert optimizer.step() == 3.0
        finally:
            for handle in handles:
                handle.remove()
        return [(e[0], e[1], len(e[2]), e[3], e[4]) if isinstance(e, tuple) else e for e in events]

    ours = run(fastopt.SGD)
    assert ours == run(for_loop)
    assert [e if isinstance(e, str) else e[0] for e in ours] == [
        "global pre",
        "own pre",
        "closure",
        "own post",
        "global post",
    ]


def test_a_bad_hook_is_refused_in_stocks_words() -> None:
    def attempt(make: Any) -> Any:
        optimizer = make([leaf_of_ones()])
        optimizer.register_step_pre_hook(lambda *_: 3)
        kind, words = outcome(optimizer.step)
        return kind, re.sub(r"<.*>", "", words)

    assert attempt(fastopt.SGD) == attempt(for_loop)


def test_state_dict_hooks_run() -> None:
    optimizer = fastopt.SGD(some_params(), **DAMPED)
    events: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda *_: events.append("state pre"))
    optimizer.register_state_dict_post_hook(lambda *_: events.append("state post"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: events.append("load pre"))
    optimizer.register_load_state_dict_post_hook(lambda *_: events.append("load post"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert events == ["state pre", "state post", "load pre", "load post"]


def test_the_profiler_sees_stocks_names() -> None:
    optimizer = fastopt.SGD(some_params(), **DAMPED)
    set_grads(all_params(optimizer), seed=1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        optimizer.step()
        optimizer.zero_grad()
    names = [event.key for event in profiler.key_averages()]
    assert "Optimizer.step#SGD.step" in names
    assert "Optimizer.zero_grad#SGD.zero_grad" in names


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool) -> None:
    optimizer = fastopt.SGD(some_params(), **DAMPED)
    train(optimizer, steps=1)
    optimizer.zero_grad(set_to_none=set_to_none)
    for p in all_params(optimizer):
        assert p.grad is None if set_to_none else (p.grad == 0).all()


def test_accumulated_gradients_without_zero_grad() -> None:
    def run(make: Any) -> Any:
        params = some_params()
        optimizer = make(params, lr=0.01, momentum=0.9, nesterov=True, foreach=True)
        for _ in range(3):
            sum((p * p).sum() for p in params).backward()
            optimizer.step()
        return optimizer

    assert_same_state(run(fastopt.SGD), run(for_loop))


@pytest.mark.filterwarnings("ignore:Using backward.* with create_graph=True")
def test_gradients_that_need_gradients() -> None:
    param = leaf(values(20))
    optimizer = fastopt.SGD([param], **FULL)
    (param**3).sum().backward(create_graph=True)
    assert param.grad.requires_grad
    optimizer.step()
    assert param.is_leaf and not optimizer.state[param]["momentum_buffer"].requires_grad
    stock = leaf(values(20))
    reference = for_loop([stock], **FULL)
    stock.grad = param.grad.detach().clone()
    reference.step()
    assert_same_state(optimizer, reference)


def test_step_inside_backward() -> None:
    def run(make: Any) -> list[Tensor]:
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(7, 9), torch.nn.Tanh(), torch.nn.Linear(9, 3))
        optimizers = {p: make([p], **FULL) for p in net.parameters()}

        def step(p: Tensor) -> None:
            optimizers[p].step()
            optimizers[p].zero_grad()

        for p in net.parameters():
            p.register_post_accumulate_grad_hook(step)
        for i in range(4):
            net(values((5, 7), seed=i)).square().sum().backward()
        assert all(p.grad is None for p in net.parameters())
        return list(net.parameters())

    for mine, stock in zip(run(fastopt.SGD), run(for_loop), strict=True):
        assert_same_bits(mine, stock)


def test_no_gradients_is_a_step_that_does_nothing() -> None:
    optimizer = fastopt.SGD(some_params(), **FULL)
    before = snapshot(optimizer)
    optimizer.step()
    assert_same_state(optimizer, before)
    assert len(optimizer.state) == 0
    assert fastopt.SGD([{"params": []}]).step() is None
