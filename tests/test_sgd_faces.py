"""Everything of fastopt.SGD but the arithmetic, side by side with the installed torch.optim.SGD:
constructor, state dicts, copies, hooks, closures, schedulers, edits of groups, loss scaling."""

import copy
import inspect
import io
import math
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.testing._internal.common_optimizers import optim_db

import fastopt
from accuracy import assert_as_accurate
from sgd_oracle import (
    DAMPED,
    DTYPES,
    EXACT_DTYPES,
    FLAGS,
    FULL,
    OPTIONS,
    all_params,
    assert_same_bits,
    assert_same_history,
    assert_same_state,
    for_loop,
    leaf,
    outcome,
    set_grads,
    snapshot,
    train,
    values,
)

SHAPES: list[tuple[int, ...]] = [(5,), (4, 8), (67,), (), (2, 3, 3)]


def some_params() -> list[Tensor]:
    return [leaf(values(shape, seed=i)) for i, shape in enumerate(SHAPES)]


def leaf_of_ones() -> Tensor:
    return torch.ones(2, requires_grad=True)


# --- constructor ---------------------------------------------------------------------------------


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


# --- state ---------------------------------------------------------------------------------------


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


# --- closures, hooks, profiler -------------------------------------------------------------------


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


# --- groups --------------------------------------------------------------------------------------


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


# --- loss scaling --------------------------------------------------------------------------------

OVERFLOWS = {"never": (), "first": (0,), "later": (3,), "twice": (2, 3), "first_two": (0, 1)}


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("overflow", OVERFLOWS)
@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("option", ["plain", "damped_decay", "nesterov_decay_max"])
def test_grad_scaler_steps_skips_and_unscales(
    option: str, flag: str, overflow: str, clip: bool
) -> None:
    def run(make: Any, **flags: Any) -> Any:
        params = some_params()
        optimizer = make(params, **{**OPTIONS[option], **flags})
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        history, seen = [], []
        for step in range(6):
            optimizer.zero_grad()
            loss = sum((p * values(p.shape, seed=9 * step + i)).sum() for i, p in enumerate(params))
            if step in OVERFLOWS[overflow]:
                loss = loss + params[1].sum() * math.inf
            scaler.scale(loss).backward()
            if clip:
                scaler.unscale_(optimizer)
                seen.append(torch.nn.utils.clip_grad_norm_(params, 0.5))
            assert scaler.step(optimizer) is None
            if step not in OVERFLOWS[overflow]:
                seen += [p.grad.clone() for p in params]  # unscaled, for whoever logs them
            scaler.update()
            seen.append(torch.tensor(scaler.get_scale()))
            history.append(snapshot(optimizer))
        assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")
        return history, seen

    ours, theirs = run(fastopt.SGD, **FLAGS[flag]), run(torch.optim.SGD, **FLAGS["for_loop"])
    assert_same_history(ours[0], theirs[0])
    for mine, stock in zip(ours[1], theirs[1], strict=True):
        assert_same_bits(mine, stock)


@pytest.mark.parametrize("flag", FLAGS)
def test_grad_scaler_with_float16_gradients(flag: str) -> None:
    # Only fused=True may see float16 gradients; the others are refused by the scaler.
    def run(make: Any, dtype: torch.dtype, **flags: Any) -> Any:
        param = leaf(values(70, torch.float16).to(dtype))
        optimizer = make([param], **DAMPED, **flags)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for step in range(3):
            optimizer.zero_grad()
            scaler.scale((param * values(70, torch.float16, seed=step).to(dtype)).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        return snapshot(optimizer)

    ours = outcome(lambda: run(fastopt.SGD, torch.float16, **FLAGS[flag]))
    if flag != "fused":
        assert ours == outcome(lambda: run(torch.optim.SGD, torch.float16, **FLAGS[flag]))
        assert ours[0] is ValueError
        return
    exact = run(torch.optim.SGD, torch.float64, **FLAGS["for_loop"])
    stock = for_loop([leaf(values(70, torch.float16))], **DAMPED)
    for step in range(3):
        all_params(stock)[0].grad = values(70, torch.float16, seed=step)
        stock.step()
    theirs = snapshot(stock)
    assert_as_accurate(ours.params[0], theirs.params[0], exact.params[0], "param")
    assert_as_accurate(ours.buffers[0], theirs.buffers[0], exact.buffers[0], "buffer")


def test_disabled_grad_scaler() -> None:
    def run(make: Any) -> Any:
        optimizer = make(some_params(), **FULL)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        set_grads(all_params(optimizer), seed=1)
        scaler.step(optimizer)
        scaler.update()
        return optimizer

    assert_same_state(run(fastopt.SGD), run(for_loop))


def test_two_optimizers_under_one_grad_scaler() -> None:
    def run(make: Any, **flags: Any) -> Any:
        params = some_params()
        optimizers = [make(params[:2], **DAMPED, **flags), make(params[2:], **DAMPED, **flags)]
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for step in range(4):
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = sum((p * values(p.shape, seed=step)).sum() for p in params)
            if step == 1:  # the first optimizer's gradients overflow, the second's do not
                loss = loss + params[0].sum() * math.inf
            scaler.scale(loss).backward()
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
        return optimizers

    for flag in FLAGS.values():
        for mine, stock in zip(
            run(fastopt.SGD, **flag), run(torch.optim.SGD, **FLAGS["for_loop"]), strict=True
        ):
            assert_same_state(mine, stock)
