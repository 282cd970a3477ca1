"""Odd options and odd groups, between steps: as torch.optim.SGD's for-loop takes them, results bit for
bit, exceptions by class."""

from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

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


ODD_NUMBERS: dict[str, Callable[[], Any]] = {
    "true": lambda: True,
    "false": lambda: False,
    "0-d tensor": lambda: torch.tensor(0.25),
    "1-d tensor": lambda: torch.tensor([0.25]),
    "2-d tensor": lambda: torch.tensor([[0.25]]),
    "float64 tensor": lambda: torch.tensor(0.3, dtype=torch.float64),
    "bfloat16 tensor": lambda: torch.tensor(0.3, dtype=torch.bfloat16),
    "integer tensor": lambda: torch.tensor(1),
    "bool tensor": lambda: torch.tensor(True),
    "parameter": lambda: nn.Parameter(torch.tensor(0.25), requires_grad=False),
    "negative view": lambda: torch._neg_view(torch.tensor(-0.25)),
    "fraction": lambda: Fraction(1, 10),
    "decimal": lambda: Decimal("0.1"),
    "complex": lambda: 0.5 + 0.5j,
    "string": lambda: "0.1",
    "none": lambda: None,
    "2**53 + 1": lambda: 2**53 + 1,
    "2**63": lambda: 2**63,
    "2**64": lambda: 2**64,
    "10**400": lambda: 10**400,
    "1e300": lambda: 1e300,
    "inf": lambda: float("inf"),
    "nan": lambda: float("nan"),
    "subnormal": lambda: 1e-310,
    **{
        f"np.{kind}": lambda kind=kind: getattr(np, kind)(0.3)
        for kind in ("float16", "float32", "float64", "longdouble", "bool_")
    },
    **{
        f"np.{kind}": lambda kind=kind: getattr(np, kind)(1)
        for kind in ("int8", "uint8", "int16", "int32", "int64", "uint64")
    },
    "np.array": lambda: np.array(0.5),
    "np.array float32": lambda: np.array(0.5, dtype=np.float32),
    "np.array 1-d": lambda: np.array([0.5]),
}


class Doubled(float):
    """A float with an opinion."""

    def __neg__(self) -> float:
        return -2 * float(self)

    def __rsub__(self, other: Any) -> float:
        return float(other) - 2 * float(self)


ODD_NUMBERS["float subclass"] = lambda: Doubled(0.25)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["lr", "momentum", "dampening", "weight_decay"])
@pytest.mark.parametrize("kind", ODD_NUMBERS)
def test_odd_options(kind: str, name: str) -> None:
    for nesterov in (False, True):
        for dtype in (torch.float32, torch.float64):

            def run(make: Any, dtype: torch.dtype = dtype, nesterov: bool = nesterov) -> Any:
                param = leaf(values(7, dtype))
                optimizer = make([param], lr=0.1, momentum=0.9)
                optimizer.param_groups[0].update({name: ODD_NUMBERS[kind](), "nesterov": nesterov})
                for step in range(3):
                    param.grad = values(7, dtype, seed=step)
                    optimizer.step()
                return param

            assert_same(run, f"{dtype} {nesterov}")


@pytest.mark.parametrize("flag", [0, 1, "", "yes", None, np.bool_(True), torch.tensor(True), [0]])
@pytest.mark.parametrize("name", ["nesterov", "maximize"])
def test_odd_flags(name: str, flag: Any) -> None:
    def run(make: Any) -> Any:
        optimizer = make([leaf(values(7))], lr=0.1, momentum=0.9)
        optimizer.param_groups[0][name] = flag
        train(optimizer, by_torch=None)
        return all_params(optimizer)

    assert_same(run)


@pytest.mark.parametrize("key", ["lr", "momentum", "foreach", "fused", "nesterov", "params"])
def test_groups_without_a_key(key: str) -> None:
    def run(make: Any) -> Any:
        params = [leaf(values(7)), leaf(values(9))]
        optimizer = make([{"params": [p]} for p in params], **DAMPED)
        set_grads(params, seed=1)
        del optimizer.param_groups[1][key]
        return class_or_value(optimizer.step), params

    assert assert_same(run)[0] is KeyError


def as_generator(group: Any) -> None:
    params = group["params"]
    group["params"] = (p for p in params)


CONTAINERS: dict[str, Callable[[Any], Any]] = {
    "generator": as_generator,
    "tuple": lambda group: group.update(params=tuple(group["params"])),
    "dict": lambda group: group.update(params=dict.fromkeys(group["params"])),
    "tensor": lambda group: group.update(params=leaf(values((3, 4)))),
    "number": lambda group: group.update(params=3),
    "numbers": lambda group: group.update(params=[3]),
    "none inside": lambda group: group["params"].insert(1, None),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("container", CONTAINERS)
def test_params_in_any_container(container: str) -> None:
    def run(make: Any) -> Any:
        params = [leaf(values(n)) for n in (5, 6, 7)]
        optimizer = make(params, **DAMPED)
        set_grads(params, seed=1)
        CONTAINERS[container](optimizer.param_groups[0])
        results = [class_or_value(optimizer.step) for _ in range(2)]
        return results, params, len(optimizer.state)

    assert_same(run)
