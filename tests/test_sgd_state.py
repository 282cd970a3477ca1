"""fastopt.SGD's state, state dicts and copies, side by side with the installed torch.optim.SGD."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastopt
from sgd_oracle import (
    DAMPED,
    DTYPES,
    FLAGS,
    FULL,
    all_params,
    assert_same_bits,
    assert_same_history,
    assert_same_state,
    for_loop,
    leaf,
    outcome,
    snapshot,
    some_params,
    train,
    values,
)


def test_state_is_empty_before_the_first_step_and_without_momentum() -> None:
    optimizer = fastopt.SGD(some_params(), lr=0.1, momentum=0.9)
    assert optimizer.state == {} and optimizer.state_dict()["state"] == {}
    plain = fastopt.SGD(some_params(), lr=0.1)
    train(plain)
    assert all(plain.state.get(p, {}) == {} for p in all_params(plain))
    assert plain.state_dict()["state"] == train_and_dump(torch.optim.SGD, lr=0.1)["state"]


def train_and_dump(make: Any, **options: Any) -> Any:
    optimizer = make(some_params(), **options)
    train(optimizer)
    return optimizer.state_dict()


@pytest.mark.parametrize("flag", FLAGS)
def test_state_dict_has_stocks_format(flag: str) -> None:
    ours = train_and_dump(fastopt.SGD, **DAMPED, **FLAGS[flag])
    theirs = train_and_dump(torch.optim.SGD, **DAMPED, **FLAGS["for_loop"])
    assert list(ours) == list(theirs) == ["state", "param_groups"]
    for mine, stock in zip(ours["param_groups"], theirs["param_groups"], strict=True):
        assert list(mine) == list(stock)  # the order too: it is what a saved file shows
        flags = {"foreach", "fused"}
        assert {k: v for k, v in mine.items() if k not in flags} == {
            k: v for k, v in stock.items() if k not in flags
        }
        assert (mine["foreach"], mine["fused"]) == tuple(
            FLAGS[flag].get(name) for name in ("foreach", "fused")
        )
    assert list(ours["state"]) == list(theirs["state"])
    for mine, stock in zip(ours["state"].values(), theirs["state"].values(), strict=True):
        assert list(mine) == list(stock) == ["momentum_buffer"]
        assert type(mine["momentum_buffer"]) is Tensor
        assert not mine["momentum_buffer"].requires_grad
        assert_same_bits(mine["momentum_buffer"], stock["momentum_buffer"])


def test_state_keys_have_gaps_where_no_gradient_came() -> None:
    params = some_params()
    optimizer = fastopt.SGD(params, **DAMPED)
    params[0].grad, params[3].grad = torch.ones_like(params[0]), torch.ones_like(params[3])
    optimizer.step()
    assert list(optimizer.state_dict()["state"]) == [0, 3]
    assert list(optimizer.state) == [params[0], params[3]]


def test_state_dict_shares_the_live_buffers() -> None:
    optimizer = fastopt.SGD(some_params(), **DAMPED)
    train(optimizer, steps=1)
    buffers = [s["momentum_buffer"] for s in optimizer.state_dict()["state"].values()]
    train(optimizer, steps=1)
    for p, buffer in zip(all_params(optimizer), buffers, strict=True):
        assert optimizer.state[p]["momentum_buffer"] is buffer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_first_buffer_is_the_undamped_gradient_in_its_own_memory(dtype: torch.dtype) -> None:
    # p = 2, g = 1, weight decay 0.125: -1 + 0.25, exact in every dtype; then the damped step.
    param = leaf(torch.full((20,), 2.0, dtype=dtype))
    optimizer = fastopt.SGD(
        [param], lr=0.0, momentum=0.5, dampening=0.25, weight_decay=0.125, maximize=True
    )
    for expected in (-0.75, -0.9375):
        param.grad = torch.ones(20, dtype=dtype)
        optimizer.step()
        buffer = optimizer.state[param]["momentum_buffer"]
        assert (buffer == expected).all() and (param.grad == 1).all()
        assert buffer.data_ptr() not in (param.data_ptr(), param.grad.data_ptr())


def test_buffers_take_the_strides_that_stock_gives_them() -> None:
    def strides(make: Any) -> list[Any]:
        params, grads = [], []
        for i, grad in enumerate(
            (
                values((2, 3, 4, 5)).to(memory_format=torch.channels_last),
                values((6, 4)).t(),
                values((4, 12))[:, ::2],
                values((1, 6)).expand(4, 6),
                values((4, 1)),
            )
        ):
            params.append(leaf(values(grad.shape, seed=i)))
            grads.append(grad)
        optimizer = make(params, **DAMPED)
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        optimizer.step()
        return [optimizer.state[p]["momentum_buffer"].stride() for p in params]

    assert strides(fastopt.SGD) == strides(for_loop)


IMPLEMENTATIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "for_loop": (torch.optim.SGD, FLAGS["for_loop"]),
    "foreach": (torch.optim.SGD, FLAGS["foreach"]),
    "fused": (torch.optim.SGD, FLAGS["fused"]),
    "fastopt": (fastopt.SGD, {}),
    "fastopt_fused": (fastopt.SGD, FLAGS["fused"]),
}


@pytest.mark.parametrize("target", IMPLEMENTATIONS)
@pytest.mark.parametrize("source", IMPLEMENTATIONS)
def test_state_dicts_continue_a_training_exactly(source: str, target: str) -> None:
    # Stock's fused kernel has other bits than its for-loop in the tail, and a state dict carries the
    # flag: whole vectors only where it may run.
    sizes = (64, 160) if "fused" in source + target else (64, 160, 37, 1)

    def build(name: str) -> Any:
        make, flags = IMPLEMENTATIONS[name]
        return make([leaf(values(n, seed=n)) for n in sizes], **DAMPED, **flags)

    whole = train(build("for_loop"), steps=6)
    first = build(source)
    train(first, steps=3)
    file = io.BytesIO()
    torch.save({"params": all_params(first), "optimizer": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    second = build(target)
    with torch.no_grad():
        for p, value in zip(all_params(second), saved["params"], strict=True):
            p.copy_(value)
    second.load_state_dict(saved["optimizer"])
    assert_same_history(train(second, steps=3, first_seed=4), whole[3:], f"{source} to {target}")
    # And back again, from the optimizer that itself continued.
    third = build(source)
    with torch.no_grad():
        for p, q in zip(all_params(third), all_params(second), strict=True):
            p.copy_(q)
    third.load_state_dict(copy.deepcopy(second.state_dict()))
    more = for_loop([leaf(p) for p in whole[-1].params], **DAMPED)
    for p, buffer in zip(all_params(more), whole[-1].buffers, strict=True):
        more.state[p]["momentum_buffer"] = buffer.clone()
    assert_same_history(train(third, steps=2), train(more, steps=2), f"{target} to {source}")


def buffer(edit: Callable[[Tensor], Any]) -> Callable[[dict[str, Any]], None]:
    """An edit of the first parameter's buffer in a state dict."""

    def apply(state: dict[str, Any]) -> None:
        entry = state["state"][0]
        entry["momentum_buffer"] = edit(entry["momentum_buffer"])

    return apply


STATE_EDITS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "untouched": lambda state: None,
    "buffer_none": buffer(lambda b: None),
    "buffer_missing": lambda state: state["state"][0].pop("momentum_buffer"),
    "entry_missing": lambda state: state["state"].pop(1),
    "state_empty": lambda state: state["state"].clear(),
    "extra_key": lambda state: state["state"][0].update(mine=7, step=torch.tensor(3)),
    "unknown_parameter": lambda state: state["state"].update({99: {"x": 1}}),
    "buffer_float64": buffer(lambda b: b.double()),
    "buffer_bfloat16": buffer(lambda b: b.bfloat16()),
    "buffer_int": buffer(lambda b: b.long()),
    "buffer_not_contiguous": buffer(lambda b: torch.stack([b, b], -1)[..., 0]),
    "buffer_misaligned": buffer(lambda b: torch.cat([b[:1], b])[1:]),
    "buffer_expanded": buffer(lambda b: b[:1].expand(b.shape)),
    "buffer_needs_grad": buffer(lambda b: b.requires_grad_()),
    "buffer_too_long": buffer(lambda b: torch.cat([b, b])),
    "buffer_too_short": buffer(lambda b: b[:-1]),
    "buffer_other_shape": buffer(lambda b: b[None]),
    "buffer_scalar": buffer(lambda b: b[0]),
    "buffer_a_number": buffer(lambda b: 1.5),
    "buffer_sparse": buffer(lambda b: b.to_sparse()),
    "group_missing": lambda state: state["param_groups"].clear(),
    "group_too_many": lambda state: state["param_groups"].append(state["param_groups"][0]),
    "group_wrong_size": lambda state: state["param_groups"][0]["params"].pop(),
    "old_without_flags": lambda state: [
        state["param_groups"][0].pop(k)
        for k in ("nesterov", "maximize", "foreach", "differentiable", "fused")
    ],
    "options_changed": lambda state: state["param_groups"][0].update(lr=0.5, momentum=0.3),
    "options_missing": lambda state: state["param_groups"][0].pop("weight_decay"),
    "lr_tensor": lambda state: state["param_groups"][0].update(lr=torch.tensor(0.25)),
}


@pytest.mark.stock
@pytest.mark.parametrize("edit", STATE_EDITS)
def test_loading_odd_states_does_what_stock_does(edit: str) -> None:
    def attempt(make: Any) -> Any:
        saved = train_and_dump(for_loop, **DAMPED)
        STATE_EDITS[edit](saved)
        optimizer = make(some_params(), **FULL)
        error = outcome(lambda: optimizer.load_state_dict(saved))
        if error is not None:
            return error
        history = outcome(lambda: train(optimizer, by_torch=None))
        if isinstance(history, tuple):
            return history
        keys = [sorted(map(str, optimizer.state[p])) for p in all_params(optimizer)]
        return history, keys, [list(group) for group in optimizer.param_groups]

    ours, theirs = attempt(fastopt.SGD), attempt(for_loop)
    if isinstance(theirs[0], list):
        assert_same_history(ours[0], theirs[0], edit)
        assert ours[1:] == theirs[1:]
    else:
        assert ours == theirs


@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
@pytest.mark.parametrize("flag", FLAGS)
def test_copies_continue_like_the_original(flag: str, copied: str) -> None:
    optimizer = fastopt.SGD(some_params(), **DAMPED, **FLAGS[flag])
    train(optimizer)
    twin = (
        copy.deepcopy(optimizer) if copied == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    )
    assert type(twin) is fastopt.SGD and repr(twin) == repr(optimizer)
    assert {p.data_ptr() for p in all_params(twin)}.isdisjoint(
        p.data_ptr() for p in all_params(optimizer)
    )
    before = snapshot(optimizer)
    continued = train(twin, first_seed=7)
    assert_same_state(optimizer, before, "the original, after steps of its copy")
    assert_same_history(continued, train(optimizer, first_seed=7))
    # Under a GradScaler too: a copy of stock's fused SGD forgets that it can be scaled.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    twin.zero_grad()
    scaler.scale(sum(p.sum() for p in all_params(twin))).backward()
    scaler.step(twin)


def test_deepcopy_before_the_first_step() -> None:
    twin = copy.deepcopy(fastopt.SGD(some_params(), **FULL))
    assert_same_history(train(twin), train(for_loop(some_params(), **FULL)))
