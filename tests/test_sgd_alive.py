"""What fastopt.SGD keeps alive: what torch.optim.SGD does."""

import gc
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastopt
from sgd_oracle import DAMPED, all_params, assert_same, leaf, train, values

pytestmark = pytest.mark.stock


def replace_parameter(optimizer: Any) -> None:
    optimizer.param_groups[0]["params"][0] = leaf(values(30, seed=8))
    optimizer.state.clear()


RELEASES: dict[str, Callable[[Any], Any]] = {
    "state.clear": lambda o: o.state.clear(),
    "state replaced": lambda o: setattr(o, "state", defaultdict(dict)),
    "state popped": lambda o: o.state.pop(all_params(o)[0]),
    "entry replaced": lambda o: o.state.update({all_params(o)[0]: {}}),
    "buffer moved": lambda o: o.state[all_params(o)[0]].update(
        momentum_buffer=o.state[all_params(o)[0]]["momentum_buffer"].clone()
    ),
    "state loaded": lambda o: o.load_state_dict({**o.state_dict(), "state": {}}),
    "zero_grad": lambda o: o.zero_grad(),
    "gradient replaced": lambda o: setattr(all_params(o)[0], "grad", values(30)),
    "group added": lambda o: o.add_param_group({"params": [leaf(values(3))]}),
    "parameter replaced": replace_parameter,
    "parameter removed": lambda o: (o.state.clear(), o.param_groups[0]["params"].pop(0)),
    "groups removed": lambda o: (o.state.clear(), o.param_groups.clear()),
}


@pytest.mark.parametrize("odd", [False, True], ids=["served", "beside torch's path"])
@pytest.mark.parametrize("release", RELEASES)
def test_memory_falls_at_once(release: str, odd: bool) -> None:
    def run(make: Any) -> Any:
        params = [leaf(values(30)), leaf(values(40))]
        if odd:
            params.append(values((4, 6))[:, ::2].requires_grad_())
        optimizer = make(params, **DAMPED)
        for step in range(2):
            for i, p in enumerate(params):
                p.grad = values(p.shape, seed=step + i)
            optimizer.step()
        kept = [
            params[0],
            params[0].grad,
            optimizer.state[params[0]]["momentum_buffer"],
        ]
        alive = [weakref.ref(tensor) for tensor in kept]
        del kept, params, p
        gc.collect()
        gc.disable()
        RELEASES[release](optimizer)
        gc.enable()
        return [reference() is None for reference in alive]

    freed = assert_same(run)
    assert any(freed) or release == "group added"


def test_state_follows_its_parameters_by_loading_it_into_itself() -> None:
    net = nn.Linear(4, 3)
    optimizer = fastopt.SGD(net.parameters(), **DAMPED)
    train(optimizer)
    net.double()
    optimizer.load_state_dict(optimizer.state_dict())
    for p in net.parameters():
        assert optimizer.state[p]["momentum_buffer"].dtype is torch.float64
    net.zero_grad()
    train(optimizer)
