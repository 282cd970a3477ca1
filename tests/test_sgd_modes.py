"""Steps of fastopt.SGD under torch's modes and tracers, as torch.optim.SGD's for-loop takes them: results
bit for bit, exceptions by class."""

from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastopt
from sgd_oracle import (
    DAMPED,
    all_params,
    assert_same,
    class_or_value,
    leaf,
    set_grads,
    train,
    values,
)

pytestmark = pytest.mark.stock


@pytest.mark.parametrize("momentum", [0, 0.9])
@pytest.mark.parametrize("where", ["gradient", "parameter", "buffer"])
def test_forward_mode_tangents(where: str, momentum: float) -> None:
    def run(make: Any) -> Any:
        with fwd.dual_level():
            p, g, b = (values(30, seed=i) for i in range(3))
            if where == "parameter":
                p = fwd.make_dual(p, values(30, seed=3))
            if where == "gradient":
                g = fwd.make_dual(g, values(30, seed=3))
            if where == "buffer":
                b = fwd.make_dual(b, values(30, seed=3))
            optimizer = make([p], lr=0.1, momentum=momentum, weight_decay=0.5)
            p.grad = g
            optimizer.state[p]["momentum_buffer"] = b
            optimizer.step()
            return [fwd.unpack_dual(t).tangent for t in (p, b)], p.clone()

    assert_same(run)


def test_jvp_of_a_function_that_steps() -> None:
    def run(make: Any) -> Any:
        def function(grad: Tensor) -> Tensor:
            p = values(9)
            p.grad = grad
            make([p], lr=0.1).step()
            return p

        return torch.func.jvp(function, (values(9, seed=1),), (values(9, seed=2),))

    assert_same(run)


class Dispatch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Function(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Dispatch, Function])
def test_modes_see_the_update(mode: Any) -> None:
    def run(make: Any) -> Any:
        optimizer = make([leaf(values(9))], **DAMPED)
        set_grads(all_params(optimizer), seed=1)
        with mode() as seen:
            optimizer.step()
        return [name for name in seen.seen if "add" in name], all_params(optimizer)

    assert assert_same(run)[0]


@pytest.mark.parametrize("tracer", ["jit.trace", "make_fx", "make_fx before dispatch"])
def test_tracers_record_the_update_and_no_constant(tracer: str) -> None:
    def run(make: Any) -> Any:
        def function(p: Tensor, grad: Tensor) -> Tensor:
            p = p * 1
            p.retain_grad()
            p.grad = grad
            make([p], lr=0.5, weight_decay=0.1).step()
            return p * 2

        example = leaf(values(9)), values(9, seed=1)
        if tracer == "jit.trace":
            traced = torch.jit.trace(function, example, check_trace=False)
        else:
            traced = make_fx(function, pre_dispatch="before" in tracer)(*example)
        return traced(leaf(values(9, seed=2)), values(9, seed=3)).detach()

    assert isinstance(assert_same(run), Tensor)


def test_a_default_device_is_no_reason_for_torchs_path() -> None:
    from served import sgd

    optimizer = fastopt.SGD([leaf(values(9))], **DAMPED)
    set_grads(all_params(optimizer), seed=1)
    optimizer.step()
    with torch.device("cpu"), sgd.answered(by_torch=False):
        optimizer.step()


@pytest.mark.parametrize("which", ["parameter", "gradient", "buffer"])
def test_tensors_of_inference_mode_in_mid_training(which: str) -> None:
    def run(make: Any) -> Any:
        params = [leaf(values(n, seed=n)) for n in (9, 8, 7)]
        optimizer = make(params, **DAMPED)
        train(optimizer)
        set_grads(params, seed=9)
        with torch.inference_mode():
            tensor = values(8, seed=4).clone()
        if which == "parameter":
            optimizer.param_groups[0]["params"][1] = tensor
            tensor.grad = values(8)
        elif which == "gradient":
            params[1].grad = tensor
        else:
            optimizer.state[params[1]]["momentum_buffer"] = tensor
        result = class_or_value(optimizer.step)
        return result, params, [optimizer.state[p]["momentum_buffer"] for p in params]

    assert (assert_same(run)[0] is None) == (which == "gradient")
