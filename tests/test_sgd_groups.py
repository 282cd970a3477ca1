"""Edits of parameter groups, by hand and by learning-rate schedulers, side by side with the installed
torch.optim.SGD."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler

import fastopt
from sgd_oracle import (
    DAMPED,
    FULL,
    assert_same_history,
    for_loop,
    leaf,
    outcome,
    some_params,
    train,
    values,
)


def set_group(**options: Any) -> Callable[[Any], None]:
    return lambda optimizer: optimizer.param_groups[0].update(options)


def add_group(optimizer: Any) -> None:
    optimizer.add_param_group({"params": [leaf(values(33, seed=5))], "lr": 0.02, "nesterov": True})


def drop_group(optimizer: Any) -> None:
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": [leaf(values(9))]})
    del optimizer.param_groups[0]


def replace_params(optimizer: Any) -> None:
    group = optimizer.param_groups[0]
    group["params"] = [leaf(values(12, seed=3)), *group["params"][1:3]]


def replace_options_dict(optimizer: Any) -> None:
    optimizer.param_groups = [{**g, "lr": 0.3, "momentum": 0.5} for g in optimizer.param_groups]


GROUP_EDITS: dict[str, tuple[Callable[[Any], Any], ...]] = {
    "lr": (set_group(lr=0.5), set_group(lr=0.0), set_group(lr=1)),
    "lr_to_tensor": (set_group(lr=torch.tensor(0.5)), set_group(lr=0.1)),
    "lr_tensor_in_place": (
        set_group(lr=torch.tensor(0.5)),
        lambda o: o.param_groups[0]["lr"].fill_(0.01),
        lambda o: o.param_groups[0]["lr"].data.fill_(0.02),
    ),
    "lr_of_group_deleted": (lambda o: o.param_groups[0].pop("lr"),),
    "momentum_on": (set_group(momentum=0), set_group(momentum=0.9)),
    "momentum_off": (set_group(momentum=0.9), set_group(momentum=0), set_group(momentum=0.5)),
    "dampening": (set_group(dampening=0.5, nesterov=False), set_group(dampening=0)),
    "weight_decay": (set_group(weight_decay=0), set_group(weight_decay=0.5)),
    "nesterov": (set_group(nesterov=False), set_group(nesterov=True)),
    "nesterov_with_dampening": (set_group(nesterov=True, dampening=0.5),),
    "nesterov_without_momentum": (set_group(nesterov=True, momentum=0),),
    "maximize": (set_group(maximize=False), set_group(maximize=True)),
    "negative_lr": (set_group(lr=-0.1),),
    "negative_momentum": (set_group(momentum=-0.5),),
    "foreach": (set_group(foreach=True), set_group(foreach=False)),
    "group_added": (add_group, lambda o: None),
    "group_dropped": (drop_group, lambda o: None),
    "params_replaced": (replace_params, lambda o: None),
    "params_reversed": (lambda o: o.param_groups[0]["params"].reverse(), lambda o: None),
    "params_appended": (
        lambda o: o.param_groups[0]["params"].append(leaf(values(70))),
        lambda o: None,
    ),
    "params_removed": (lambda o: o.param_groups[0]["params"].pop(1), lambda o: None),
    "params_cleared": (lambda o: o.param_groups[0]["params"].clear(), lambda o: None),
    "groups_replaced": (replace_options_dict, lambda o: None),
}


@pytest.mark.parametrize("edit", GROUP_EDITS)
def test_edits_of_groups_between_steps_take_effect(edit: str) -> None:
    def run(make: Any) -> Any:
        optimizer = make(some_params(), **FULL)
        history = train(optimizer, steps=2)
        for i, apply in enumerate(GROUP_EDITS[edit]):
            apply(optimizer)
            group = optimizer.param_groups[0]
            if isinstance(group.get("lr"), Tensor):
                group["lr"] = group["lr"].clone()  # the table's tensor is both sides'
            history += train(optimizer, steps=2, first_seed=10 * (i + 1))
        return history

    ours, theirs = outcome(lambda: run(fastopt.SGD)), outcome(lambda: run(for_loop))
    if isinstance(theirs, list):
        assert_same_history(ours, theirs, edit)
    else:
        assert ours == theirs


def test_fused_switched_on_between_steps() -> None:
    ours = fastopt.SGD(some_params(), **DAMPED)
    theirs = for_loop(some_params(), **DAMPED)
    train(ours), train(theirs)
    ours.param_groups[0]["fused"] = True
    assert_same_history(train(ours), train(theirs))


def test_named_parameters() -> None:
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 4)
    ours, theirs = (
        make(copy.deepcopy(net).named_parameters(), **DAMPED) for make in (fastopt.SGD, for_loop)
    )
    assert_same_history(train(ours), train(theirs))
    assert ours.param_groups[0]["param_names"] == ["weight", "bias"]
    assert list(ours.param_groups[0]) == list(theirs.param_groups[0])
    assert list(ours.state_dict()["param_groups"][0]) == list(
        theirs.state_dict()["param_groups"][0]
    )


# --- learning-rate schedulers --------------------------------------------------------------------

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=3, gamma=0.3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, milestones=[2, 5, 9], gamma=0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.2, total_iters=4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, start_factor=0.2, total_iters=6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.8),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[4]
    ),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=10, power=2),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=10),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.2, step_size_up=4),
    "CyclicLR_lr_only": lambda o: lr_scheduler.CyclicLR(
        o, base_lr=0.01, max_lr=0.2, step_size_up=4, cycle_momentum=False
    ),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=5),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=25),
    "OneCycleLR_lr_only": lambda o: lr_scheduler.OneCycleLR(
        o, max_lr=0.2, total_steps=25, cycle_momentum=False
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.5, anneal_epochs=5),
}


def test_every_scheduler_is_in_the_table() -> None:
    assert set(lr_scheduler.__all__) - {"LRScheduler"} <= set(SCHEDULERS)


@pytest.mark.parametrize("momentum", [0, 0.9])
@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_drive_it_as_stock(name: str, tensor_lr: bool, momentum: float) -> None:
    # OneCycleLR and CyclicLR also cycle the momentum, and switch it on where it was 0.
    def run(make: Any) -> Any:
        lr = torch.tensor(0.1) if tensor_lr else 0.1
        optimizer = make(some_params(), lr=lr, momentum=momentum, weight_decay=0.01)
        scheduler = SCHEDULERS[name](optimizer)
        history, rates = [], []
        for step in range(20):
            history += train(optimizer, steps=1, first_seed=step + 1)
            plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
            scheduler.step(*([1.0] if plateau else []))
            rates.append([float(g["lr"]) for g in optimizer.param_groups])
        return history, rates, list(optimizer.param_groups[0])

    def recorded(make: Any) -> Any:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = outcome(lambda: run(make))
        return result, [(w.category, str(w.message)) for w in caught]

    (ours, our_warnings), (theirs, their_warnings) = recorded(fastopt.SGD), recorded(for_loop)
    assert our_warnings == their_warnings
    if isinstance(theirs[0], list):
        assert_same_history(ours[0], theirs[0], name)
        assert ours[1:] == theirs[1:]
    else:
        assert ours == theirs
