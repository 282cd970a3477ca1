"""The constructor of fastopt.SGD, and torch's own inputs for tests of optimizers, side by side with the
installed torch.optim.SGD."""

import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler
from torch.testing._internal.common_optimizers import optim_db

import fastopt
from sgd_oracle import (
    EXACT_DTYPES,
    FLAGS,
    assert_same_history,
    for_loop,
    leaf,
    leaf_of_ones,
    outcome,
    some_params,
    train,
)


def test_it_is_a_torch_sgd() -> None:
    assert issubclass(fastopt.SGD, torch.optim.SGD)
    assert fastopt.SGD.__name__ == fastopt.SGD.__qualname__ == "SGD"
    for method in ("__init__", "step", "zero_grad", "add_param_group", "load_state_dict"):
        ours, theirs = (
            [(p.name, p.kind, p.default) for p in inspect.signature(m).parameters.values()]
            for m in (getattr(fastopt.SGD, method), getattr(torch.optim.SGD, method))
        )
        assert ours == theirs, method


CONSTRUCTIONS: dict[str, Callable[[Any], Any]] = {
    "defaults": lambda SGD: SGD([leaf_of_ones()]),
    "all_positional": lambda SGD: SGD([leaf_of_ones()], 0.1, 0.9, 0, 0.01, True),
    "too_many_positional": lambda SGD: SGD([leaf_of_ones()], 0.1, 0.9, 0, 0.01, True, False),
    "no_params": lambda SGD: SGD(),
    "unknown_keyword": lambda SGD: SGD([leaf_of_ones()], capturable=True),
    "generator": lambda SGD: SGD(p for p in [leaf_of_ones(), leaf_of_ones()]),
    "params_a_tensor": lambda SGD: SGD(leaf_of_ones()),
    "params_a_parameter": lambda SGD: SGD(torch.nn.Parameter(torch.ones(2))),
    "params_empty": lambda SGD: SGD([]),
    "params_empty_iterator": lambda SGD: SGD(iter(())),
    "params_an_int": lambda SGD: SGD([1]),
    "params_none": lambda SGD: SGD(None),
    "params_a_dict": lambda SGD: SGD({"params": [leaf_of_ones()]}),
    "params_mixed_with_an_int": lambda SGD: SGD([leaf_of_ones(), 1]),
    "group_without_params": lambda SGD: SGD([{}]),
    "group_with_no_params": lambda SGD: SGD([{"params": []}]),
    "group_of_one_tensor": lambda SGD: SGD([{"params": leaf_of_ones()}]),
    "group_with_a_set": lambda SGD: SGD([{"params": {leaf_of_ones()}}]),
    "group_extra_key": lambda SGD: SGD([{"params": [leaf_of_ones()], "mine": 3}]),
    "non_leaf": lambda SGD: SGD([leaf_of_ones() * 2]),
    "non_leaf_differentiable": lambda SGD: SGD([leaf_of_ones() * 2], differentiable=True),
    "no_grad_needed": lambda SGD: SGD([torch.ones(2)]),
    "duplicate_in_group": lambda SGD: SGD([leaf_of_ones()] * 2),
    "duplicate_across_groups": lambda SGD: SGD([{"params": [t]} for t in [leaf_of_ones()] * 2]),
    "named": lambda SGD: SGD([("a", leaf_of_ones()), ("b", leaf_of_ones())]),
    "named_partly": lambda SGD: SGD([("a", leaf_of_ones()), leaf_of_ones()]),
    "named_groups": lambda SGD: SGD([{"params": [("a", leaf_of_ones())]}]),
    "lr_negative": lambda SGD: SGD([leaf_of_ones()], lr=-1),
    "lr_negative_tensor": lambda SGD: SGD([leaf_of_ones()], lr=torch.tensor(-1.0)),
    "lr_negative_matrix": lambda SGD: SGD([leaf_of_ones()], lr=torch.tensor([[-1.0]])),
    "lr_none": lambda SGD: SGD([leaf_of_ones()], lr=None),
    "lr_string": lambda SGD: SGD([leaf_of_ones()], lr="0.1"),
    "lr_two_elements": lambda SGD: SGD([leaf_of_ones()], lr=torch.tensor([0.1, 0.1])),
    "lr_no_elements": lambda SGD: SGD([leaf_of_ones()], lr=torch.ones(0)),
    "lr_one_element": lambda SGD: SGD([leaf_of_ones()], lr=torch.tensor([0.1])),
    "lr_int_tensor": lambda SGD: SGD([leaf_of_ones()], lr=torch.tensor(1)),
    "lr_nan": lambda SGD: SGD([leaf_of_ones()], lr=math.nan),
    "lr_inf": lambda SGD: SGD([leaf_of_ones()], lr=math.inf),
    "lr_zero": lambda SGD: SGD([leaf_of_ones()], lr=0),
    "lr_true": lambda SGD: SGD([leaf_of_ones()], lr=True),
    "momentum_negative": lambda SGD: SGD([leaf_of_ones()], momentum=-0.5),
    "momentum_above_one": lambda SGD: SGD([leaf_of_ones()], momentum=1.5),
    "momentum_nan": lambda SGD: SGD([leaf_of_ones()], momentum=math.nan),
    "momentum_tensor": lambda SGD: SGD([leaf_of_ones()], momentum=torch.tensor(0.9)),
    "momentum_none": lambda SGD: SGD([leaf_of_ones()], momentum=None),
    "weight_decay_negative": lambda SGD: SGD([leaf_of_ones()], weight_decay=-1),
    "weight_decay_two": lambda SGD: SGD([leaf_of_ones()], weight_decay=torch.ones(2)),
    "weight_decay_tensor": lambda SGD: SGD([leaf_of_ones()], weight_decay=torch.tensor(0.1)),
    "dampening_large": lambda SGD: SGD([leaf_of_ones()], dampening=2),
    "dampening_negative": lambda SGD: SGD([leaf_of_ones()], dampening=-3),
    "nesterov_no_momentum": lambda SGD: SGD([leaf_of_ones()], nesterov=True),
    "nesterov_dampened": lambda SGD: SGD(
        [leaf_of_ones()], momentum=0.9, dampening=0.1, nesterov=True
    ),
    "nesterov": lambda SGD: SGD([leaf_of_ones()], momentum=0.9, nesterov=True),
    "fused": lambda SGD: SGD([leaf_of_ones()], fused=True),
    "foreach": lambda SGD: SGD([leaf_of_ones()], foreach=True),
    "fused_differentiable": lambda SGD: SGD([leaf_of_ones()], fused=True, differentiable=True),
    "fused_foreach": lambda SGD: SGD([leaf_of_ones()], fused=True, foreach=True),
    "foreach_differentiable": lambda SGD: SGD([leaf_of_ones()], foreach=True, differentiable=True),
    "fused_complex": lambda SGD: SGD([torch.ones(2, dtype=torch.complex64)], fused=True),
    "fused_meta": lambda SGD: SGD([torch.ones(2, device="meta")], fused=True),
    "fused_int": lambda SGD: SGD([torch.ones(2, dtype=torch.int64)], fused=True),
    "group_lr_negative": lambda SGD: SGD([{"params": [leaf_of_ones()], "lr": -1}]),
    "group_momentum_negative": lambda SGD: SGD([{"params": [leaf_of_ones()], "momentum": -1}]),
    "group_nesterov": lambda SGD: SGD([{"params": [leaf_of_ones()], "nesterov": True}]),
    "group_fused": lambda SGD: SGD([{"params": [leaf_of_ones()], "fused": True}], foreach=True),
    # Which check comes first shows when two of them fail.
    "order_lr_size_momentum": lambda SGD: SGD([], lr=torch.ones(2), momentum=-1),
    "order_lr_momentum": lambda SGD: SGD([], lr=-1, momentum=-1),
    "order_momentum_decay": lambda SGD: SGD([], momentum=-1, weight_decay=-1),
    "order_decay_nesterov": lambda SGD: SGD([], weight_decay=-1, nesterov=True),
    "order_nesterov_params": lambda SGD: SGD([], nesterov=True),
    "order_params_fused": lambda SGD: SGD([], fused=True, foreach=True),
    "order_differentiable_foreach": lambda SGD: SGD(
        [leaf_of_ones()], fused=True, foreach=True, differentiable=True
    ),
}


def described(construct: Callable[[], Any]) -> Any:
    """The optimizer as far as it can be seen, or the error; and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = outcome(construct)
    if isinstance(result, torch.optim.SGD):
        result = (
            repr(result),
            repr(result.defaults),
            [list(group) for group in result.param_groups],
            len(result.state),
        )
    return result, [(w.category, str(w.message)) for w in caught]


@pytest.mark.parametrize("case", CONSTRUCTIONS)
def test_constructor_does_what_stock_does(case: str) -> None:
    ours = described(lambda: CONSTRUCTIONS[case](fastopt.SGD))
    assert ours == described(lambda: CONSTRUCTIONS[case](torch.optim.SGD))


@pytest.mark.stock
@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64], ids=str)
def test_fused_refuses_what_stock_fused_refuses(dtype: torch.dtype) -> None:
    def attempt(make: Any) -> Any:
        param = torch.ones(2, dtype=dtype)
        param.grad = torch.ones(2, dtype=dtype)
        return outcome(make([param], fused=True).step)

    assert attempt(fastopt.SGD) == attempt(torch.optim.SGD)


# --- torch's own inputs --------------------------------------------------------------------------

SGD_INFO = next(info for info in optim_db if info.optim_cls is torch.optim.SGD)


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("case", SGD_INFO.optim_inputs_func(device="cpu"), ids=lambda c: c.desc)
def test_torchs_own_optimizer_inputs(case: Any, flag: str) -> None:
    for dtype in EXACT_DTYPES:
        ours, theirs = (
            make([leaf(p.to(dtype)) for p in some_params()], **case.kwargs, **flags)
            for make, flags in ((fastopt.SGD, FLAGS[flag]), (for_loop, {}))
        )
        assert_same_history(train(ours), train(theirs), case.desc)


@pytest.mark.parametrize(
    "case",
    SGD_INFO.optim_error_inputs_func(device="cpu", dtype=torch.float32),
    ids=lambda c: c.optimizer_error_input.desc,
)
def test_torchs_own_optimizer_error_inputs(case: Any) -> None:
    given = case.optimizer_error_input
    params = [leaf_of_ones()] if given.params is None else given.params
    with warnings.catch_warnings():
        if issubclass(case.error_type, Warning):
            warnings.simplefilter("error", case.error_type)
        with pytest.raises(case.error_type, match=case.error_regex):
            fastopt.SGD(params, **given.kwargs)


@pytest.mark.parametrize("schedulers", range(len(SGD_INFO.scheduler_inputs)))
def test_torchs_own_scheduler_inputs(schedulers: int) -> None:
    histories = []
    for make in (fastopt.SGD, for_loop):
        optimizer = make(some_params(), lr=0.05, momentum=0.9)
        chain = [build(optimizer) for build in SGD_INFO.scheduler_inputs[schedulers]]
        history = []
        for step in range(8):
            history += train(optimizer, steps=1, first_seed=step + 1)
            for scheduler in chain:
                args = (1.0,) if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else ()
                scheduler.step(*args)
        histories.append(history)
    assert_same_history(*histories)
