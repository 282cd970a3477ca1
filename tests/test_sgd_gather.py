"""fastopt/sgd/gather.py trusts a layout of Python's and torch's objects only where it has seen it."""

import sys
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from child import run_python
from fastopt.sgd import gather
from sgd_oracle import DTYPES

pytestmark = pytest.mark.stock


@pytest.mark.parametrize("kind", ["tuples", "types", "tensors", "keys", "none"])
def test_an_unknown_layout_is_left_to_torch(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gather.find_layout() == gather.LAYOUT is not None
    some = torch.empty(1)

    def word(address: int) -> int | None:
        value = gather._read_word(address)
        # As if words of that kind lay elsewhere.
        if kind == "tensors" and value == some._cdata:
            return 0
        if kind == "types" and value == id(nn.Parameter):
            return id(Tensor)
        if kind == "none" and value == id(type(None)):
            return 0
        if kind == "tuples" and value == id(None):
            return 0
        if kind == "keys" and value == gather.dispatch_keys(torch._neg_view(some)):
            return gather.dispatch_keys(some)
        return value

    monkeypatch.setattr(torch, "empty", lambda *a, _empty=torch.empty, **k: (
        some if a == (1,) and not k else _empty(*a, **k)
    ))  # fmt: skip
    assert gather.find_layout(word) is None


def test_python_without_a_lock_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather.sysconfig, "get_config_var", lambda name: int("GIL" in name))
    assert gather.find_layout() is None


def test_steps_under_an_unknown_layout() -> None:
    run_python(
        """
        import sys, types
        import torch
        real = torch._C._dispatch_keys
        torch._C._dispatch_keys = lambda tensor: types.SimpleNamespace(raw_repr=lambda: 12345)
        import fastopt
        from fastopt import __main__ as report
        from fastopt.sgd import gather
        torch._C._dispatch_keys = real
        assert gather.LAYOUT is None
        assert "layout is unknown" in report.sgd_kernel("cpu")
        from sgd_oracle import DAMPED, assert_same_history, for_loop, leaf, train, values
        ours, theirs = (
            train(make([leaf(values(n)) for n in (5, 40)], **DAMPED), by_torch=None)
            for make in (fastopt.SGD, for_loop)
        )
        assert_same_history(ours, theirs)
        """
    )


def test_every_dtype_is_among_the_layouts_cases() -> None:
    # Whatever its dtype, a plain tensor has the keys that gather asks for.
    keys = {gather.dispatch_keys(torch.empty(2, dtype=dtype)) for dtype in DTYPES}
    assert keys == {gather._plain_keys(torch.device("cpu"))}


class Entry(dict[str, Any]):
    pass


class NoGradient:
    @property
    def grad(self) -> Any:
        raise ZeroDivisionError


def test_gradients_and_buffers_are_those_of_the_parameters_and_no_reference_stays() -> None:
    params = tuple(torch.ones(n, requires_grad=True) for n in range(1, 6))
    for param in params[1:]:
        param.grad = torch.ones_like(param)
    buffers: list[Any] = [torch.ones(n) for n in range(1, 6)]
    buffers[2] = None
    in_order = defaultdict(
        dict, {p: {"momentum_buffer": b} for p, b in zip(params, buffers, strict=True)}
    )
    del in_order[params[2]]["momentum_buffer"]
    states = [
        in_order,
        defaultdict(dict, reversed(in_order.items())),
        defaultdict(dict, {**in_order, "more": 3}),
        defaultdict(dict, {p: Entry(entry) for p, entry in in_order.items()}),
        defaultdict(dict, {p: entry for p, entry in in_order.items() if p is not params[2]}),
    ]
    objects = [*params, *buffers, *states, *in_order.values(), "grad", "momentum_buffer"]
    del param
    references = [*map(sys.getrefcount, objects)]
    for _ in range(500):
        grads = gather.grads_of(params)
        assert len(grads) == len(params)
        assert all(grad is param.grad for grad, param in zip(grads, params, strict=True))
        for state in states:
            found = gather.momentum_buffers_of(state, params)
            assert len(found) == len(params)
            assert all(map(lambda a, b: a is b, found, buffers))
        with pytest.raises(ZeroDivisionError):
            gather.grads_of((*params, NoGradient()))
        with pytest.raises(TypeError):  # no dict: torch's step has to raise its own
            gather.momentum_buffers_of(defaultdict(dict, {**in_order, params[3]: 3}), params)
    del grads, found, state
    # Of None and of names there come and go some, whatever runs, but not one in each round.
    left = [*map(sys.getrefcount, objects)]
    for thing, before, after in zip(objects, references, left, strict=True):
        allowed = 250 if thing is None or isinstance(thing, str) else 0
        assert abs(after - before) <= allowed, thing


def test_a_key_that_runs_python_while_a_buffer_is_looked_up() -> None:
    params = tuple(torch.ones(2) for _ in range(3))
    state: Any = defaultdict(dict)

    class Key:
        def __hash__(self) -> int:
            return hash("momentum_buffer")

        def __eq__(self, other: object) -> bool:
            state.clear()
            return False

    for param in params:
        state[param] = {Key(): 1, "momentum_buffer": torch.ones(2)}
    assert len(gather.momentum_buffers_of(state, params)) == len(params)
    assert not state
