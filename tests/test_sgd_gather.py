"""fastopt/sgd/gather.py trusts a layout of Python's and torch's objects only where it has seen it."""

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
