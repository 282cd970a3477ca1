"""linear_cross_entropy: bad inputs raise what torch 2.13 raises, and the faces look like torch's."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastopt
import served
from cross_entropy_cases import REDUCTIONS
from fastopt import linear_loss
from linear_cross_entropy_cases import (
    composition,
    differentiate,
    leaves_of,
    make_call,
    small_chunks,  # noqa: F401
)

pytestmark = pytest.mark.usefixtures("small_chunks")
HAS_STOCK = hasattr(F, "linear_cross_entropy")
needs_stock = pytest.mark.skipif(not HAS_STOCK, reason="torch has this loss from 2.13 on")
N, H, C = SHAPE = (6, 8, 11)
CALL = make_call(SHAPE)
LABELS = CALL["target"]
PROBABILITIES = make_call(SHAPE, probabilities=True)["target"]


def with_label(label: int) -> Tensor:
    return torch.tensor([0, label, 1, 2, 3, 4])


# name: (what differs from CALL, the exception of torch 2.13 with options=None, and with options;
# None: it works). From 2.13 on torch is asked; before, these are what ours has to raise.
E = Exception
BAD_CALLS: dict[str, tuple[dict[str, Any], type[E] | None, type[E] | None]] = {
    # shapes
    "input-3d": ({"input": torch.randn(2, 3, H)}, RuntimeError, RuntimeError),
    "input-scalar": ({"input": torch.tensor(1.0)}, RuntimeError, RuntimeError),
    "input-other-features": ({"input": torch.randn(N, H + 1)}, RuntimeError, RuntimeError),
    "linear-weight-1d": ({"linear_weight": torch.randn(H)}, RuntimeError, RuntimeError),
    "bias-of-another-shape": ({"linear_bias": torch.randn(C + 1)}, RuntimeError, RuntimeError),
    "bias-scalar": ({"linear_bias": torch.tensor(1.0)}, RuntimeError, RuntimeError),
    "unbatched-k-dim": (
        {"input": torch.randn(H), "linear_weight": torch.randn(C, 2, H), "linear_bias": None},
        RuntimeError,
        RuntimeError,
    ),
    "target-column": ({"target": LABELS[:, None]}, RuntimeError, RuntimeError),
    "five-labels-for-six-rows": ({"target": LABELS[:5]}, ValueError, RuntimeError),
    "probabilities-of-another-shape": ({"target": PROBABILITIES[:, :5]}, None, None),
    "weight-short": ({"weight": torch.ones(C - 1)}, RuntimeError, None),
    # labels
    "label-past-the-classes": ({"target": with_label(C)}, IndexError, RuntimeError),
    "label-minus-one": ({"target": with_label(-1)}, IndexError, RuntimeError),
    "label-huge": ({"target": with_label(2**40)}, IndexError, RuntimeError),
    "label-default-ignore-replaced": (
        {"target": with_label(-100), "ignore_index": -1},
        IndexError,
        RuntimeError,
    ),
    # dtypes
    "target-int32": ({"target": LABELS.int()}, RuntimeError, RuntimeError),
    "target-float-labels": ({"target": LABELS.float()}, RuntimeError, RuntimeError),
    "input-integer": ({"input": torch.ones(N, H, dtype=torch.int64)}, RuntimeError, None),
    "input-bfloat16": ({"input": CALL["input"].bfloat16()}, RuntimeError, None),
    "bias-double": ({"linear_bias": CALL["linear_bias"].double()}, RuntimeError, None),
    "weight-double": ({"weight": torch.ones(C).double()}, RuntimeError, None),
    # options
    "reduction-unknown": ({"reduction": "avg"}, ValueError, ValueError),
    "smoothing-above-one": ({"label_smoothing": 1.5}, RuntimeError, RuntimeError),
    "ignore-index-of-probabilities": (
        {"target": PROBABILITIES, "ignore_index": -100},
        RuntimeError,
        RuntimeError,
    ),
    "ignore-index-float": ({"ignore_index": 1.5}, TypeError, None),
    "weight-wants-a-gradient": ({"weight": torch.ones(C).requires_grad_()}, RuntimeError, None),
    # not tensors
    "target-list": ({"target": [0, 1, 2, 3, 4, 5]}, None, None),
    "target-none": ({"target": None}, None, None),
    "input-none": ({"input": None}, None, None),
    "linear-weight-none": ({"linear_weight": None}, None, None),
}


def outcome(function: Callable[..., Any], call: dict[str, Any]) -> tuple[type[E] | None, str]:
    """How a call ends, with gradients wanted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = function(**call)
            if isinstance(result, Tensor) and result.requires_grad:
                result.sum().backward()
        except Exception as error:
            return type(error), (str(error).splitlines() or [""])[0]
    return None, ""


@pytest.mark.stock
@pytest.mark.parametrize("call", BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_bad_call_ends_as_in_torch(call: tuple[dict[str, Any], Any, Any]) -> None:
    different, expected, _ = call
    call_of_ours = {**CALL, **different}
    ended, message = outcome(fastopt.linear_cross_entropy, call_of_ours)
    if HAS_STOCK:
        assert (ended, message) == outcome(F.linear_cross_entropy, call_of_ours)
    if expected is not None:
        assert ended is expected


@needs_stock
@pytest.mark.stock
@pytest.mark.parametrize("call", BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_bad_call_with_options_ends_as_in_torch(call: tuple[dict[str, Any], Any, Any]) -> None:
    different, _, expected = call
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=4)
    call_of_ours = {**CALL, **different, "options": options}
    ended, _ = outcome(fastopt.linear_cross_entropy, call_of_ours)
    assert ended is outcome(F.linear_cross_entropy, call_of_ours)[0]
    if expected is not None:
        assert ended is expected


@needs_stock
@pytest.mark.stock
def test_what_only_torch_serves_works_as_in_torch() -> None:
    """K-dimensional weights, one row, mixed types with options, probabilities with a gradient."""
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=4)
    plain = {name: v for name, v in CALL.items() if name != "linear_bias"}
    grown = {"linear_weight": torch.randn(C, 2, 3, H), "target": torch.randint(C, (N, 2, 3))}
    for different in (
        grown,
        {**grown, "target": torch.randn(N, C, 2, 3).softmax(1)},
        {"input": CALL["input"][0], "target": LABELS[0]},
        {"target": LABELS.byte()},
        {"input": CALL["input"].bfloat16(), "options": options},
        {"target": PROBABILITIES.clone().requires_grad_()},
        {"label_smoothing": float("nan")},
    ):
        call = {**plain, **different}
        found = []
        for function in (F.linear_cross_entropy, fastopt.linear_cross_entropy):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found.append(differentiate(function, call, ("input", "linear_weight")))
        for name, value in found[0].items():
            assert torch.equal(found[1][name], value)


@needs_stock
def test_options_without_a_warning_and_with_two_backwards() -> None:
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=4)
    for kind in ({}, {"label_smoothing": 0.1}, {"probabilities": True}):
        call, leaves = leaves_of(make_call(SHAPE, **kind, options=options))
        with warnings.catch_warnings(), served.linear_cross_entropy.answered():
            warnings.simplefilter("error")
            loss = fastopt.linear_cross_entropy(**call)
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        again = torch.autograd.grad(loss, leaves, create_graph=True)
        for a, b in zip(first, again, strict=True):
            torch.testing.assert_close(a, b.detach())
        torch.autograd.grad(sum(grad.square().sum() for grad in again), leaves)


def test_all_rows_ignored() -> None:
    """The mean is NaN as in torch, the gradients are 0 (with options torch has NaN)."""
    choices = [None]
    if HAS_STOCK:
        choices.append(nn.LinearCrossEntropyOptions())
    for options in choices:
        for reduction in REDUCTIONS:
            call = make_call(SHAPE, ignored=2.0, reduction=reduction, options=options)
            found = differentiate(fastopt.linear_cross_entropy, call)
            loss = found.pop("loss")
            assert loss.isnan() if reduction == "mean" else not loss.any()
            assert not any(grad.any() for grad in found.values())


@pytest.mark.stock
def test_an_empty_batch() -> None:
    for reduction in REDUCTIONS:
        call = make_call((0, H, C), reduction=reduction)
        ours, stock = (differentiate(f, call) for f in (fastopt.linear_cross_entropy, composition))
        for name, value in stock.items():
            assert torch.equal(ours[name].nan_to_num(7.0), value.nan_to_num(7.0))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_label_out_of_range_is_found_in_every_chunk(reduction: str) -> None:
    for at in (0, 13, 28):
        call = make_call((29, H, C), reduction=reduction)
        call["target"][at] = C
        for wanted in ((), ("input",)):
            leaves = {name: call[name].clone().requires_grad_() for name in wanted}
            with pytest.raises(IndexError, match=f"Target {C} is out of bounds"):
                fastopt.linear_cross_entropy(**{**call, **leaves})


def test_subclasses_keep_their_type() -> None:
    class Wrapped(Tensor):
        pass

    call = {**CALL, "input": CALL["input"].as_subclass(Wrapped)}
    with served.linear_cross_entropy.answered(by_torch=True):
        ours = fastopt.linear_cross_entropy(**call)
    assert type(ours) is Wrapped
    torch.testing.assert_close(ours.as_subclass(Tensor), fastopt.linear_cross_entropy(**CALL))


# -- before torch 2.13 ------------------------------------------------------------------------------


@pytest.mark.stock
@pytest.mark.parametrize("call", BAD_CALLS.values(), ids=BAD_CALLS)
def test_torch_before_2_13_has_the_same_errors(call: tuple[dict[str, Any], Any, Any]) -> None:
    different, expected, _ = call
    ended, _ = outcome(linear_loss._before_2_13, {**CALL, **different})
    assert expected is None or ended is expected
    if HAS_STOCK:
        stock, _ = outcome(F.linear_cross_entropy, {**CALL, **different})
        assert ended is stock


@pytest.mark.stock
def test_torch_before_2_13_has_the_same_values() -> None:
    grown = {"linear_weight": torch.randn(C, 2, 3, H), "target": torch.randint(C, (N, 2, 3))}
    for different in (
        {},
        {"target": PROBABILITIES, "label_smoothing": 0.1},
        {**grown, "linear_bias": torch.randn(C, 2, 3), "reduction": "none"},
        {"input": CALL["input"][0], "target": LABELS[0]},
    ):
        call = {**CALL, **different}
        x, w, b = call["input"], call["linear_weight"], call["linear_bias"]
        logits = (x[..., None, :] @ w.flatten(0, -2).t()).squeeze(-2).unflatten(-1, b.shape) + b
        keywords = {n: call[n] for n in ("label_smoothing", "reduction") if n in call}
        right = F.cross_entropy(logits, call["target"], **keywords)
        torch.testing.assert_close(linear_loss._before_2_13(**call), right)
    with pytest.raises(TypeError, match="2.13"):
        linear_loss._before_2_13(**CALL, options=1)


class Before213(linear_loss._LossBefore213):
    forward = fastopt.LinearCrossEntropyLoss.forward
    lse_square_scale, softcap, logit_scale = 0.0, None, 1.0
    loss_dtype, return_stats = None, False


# -- modules ----------------------------------------------------------------------------------------

MODULES = [fastopt.LinearCrossEntropyLoss, Before213]


@pytest.mark.parametrize("module", MODULES)
def test_a_module_has_torchs_state(module: type[nn.Module]) -> None:
    for bias in (False, True):
        for weight in (None, torch.rand(C)):
            ours = module(H, C, bias=bias, weight=weight, label_smoothing=0.1)
            keys = ["weight"] * (weight is not None) + ["linear.weight"] + ["linear.bias"] * bias
            assert list(ours.state_dict()) == keys
            assert isinstance(ours.linear, nn.Linear)
            if HAS_STOCK:
                stock = nn.LinearCrossEntropyLoss(
                    H, C, bias=bias, weight=weight, label_smoothing=0.1
                )
                assert list(stock.state_dict()) == keys
                assert str(ours).partition("(")[2] == str(stock).partition("(")[2]
                ours.load_state_dict(stock.state_dict())
                stock.load_state_dict(ours.state_dict())
                x, t = CALL["input"], LABELS
                torch.testing.assert_close(ours(x, t), stock(x, t))
                assert isinstance(ours, nn.LinearCrossEntropyLoss) or module is Before213


@pytest.mark.parametrize("module", MODULES)
def test_the_constructor_checks_what_torch_checks(module: type[nn.Module]) -> None:
    for keywords in (
        {"weight": torch.ones(C + 1)},
        {"label_smoothing": -0.1},
        {"label_smoothing": 1.1},
        {"nonsense": 1},
        {"in_features": -1},
    ):
        call = {"in_features": H, "num_classes": C, **keywords}
        ended, _ = outcome(module, call)
        assert ended is not None
        if HAS_STOCK:
            assert ended is outcome(nn.LinearCrossEntropyLoss, call)[0]


@pytest.mark.parametrize("module", MODULES)
def test_a_module_computes_its_loss(module: type[nn.Module]) -> None:
    for keywords in ({}, {"reduction": "none"}, {"label_smoothing": 0.1, "ignore_index": 2}):
        ours = module(H, C, bias=True, weight=torch.rand(C), dtype=torch.float64, **keywords)
        ours.weight = ours.weight.double()
        x = CALL["input"].double()
        right = composition(
            x,
            ours.linear.weight,
            LABELS,
            linear_bias=ours.linear.bias,
            weight=ours.weight,
            **keywords,
        )
        loss = ours(x, LABELS)
        torch.testing.assert_close(loss, right)
        for a, b in zip(
            torch.autograd.grad(loss.sum(), list(ours.parameters())),
            torch.autograd.grad(right.sum(), list(ours.parameters())),
            strict=True,
        ):
            torch.testing.assert_close(a, b)
    grown = module(H, C, out_features=(2, 3), bias=True)
    assert grown(CALL["input"], torch.randint(C, (N, 2, 3))).dim() == 0


def test_modules_are_copied_and_stored() -> None:
    module = fastopt.LinearCrossEntropyLoss(H, C, bias=True, weight=torch.rand(C))
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(buffer, weights_only=False),
    ):
        assert type(twin) is fastopt.LinearCrossEntropyLoss
        assert torch.equal(twin(CALL["input"], LABELS), module(CALL["input"], LABELS))


@needs_stock
def test_signatures_are_torchs() -> None:
    """And behind them what is ours alone, by keyword."""
    for ours, stock in (
        (fastopt.linear_cross_entropy, F.linear_cross_entropy),
        (fastopt.LinearCrossEntropyLoss, nn.LinearCrossEntropyLoss),
        (Before213, nn.LinearCrossEntropyLoss),
    ):
        found, expected = (inspect.signature(f).parameters for f in (ours, stock))
        assert list(found)[: len(expected)] == list(expected)
        extras = list(found.values())[len(expected) :]
        assert all(extra.kind == inspect.Parameter.KEYWORD_ONLY for extra in extras)
        assert bool(extras) == (ours is not Before213)
        for name, parameter in expected.items():
            assert found[name].kind == parameter.kind
            assert found[name].default == parameter.default


def test_torch_may_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever patches torch with ours calls torch's own through it."""
    monkeypatch.setattr(F, "linear_cross_entropy", fastopt.linear_cross_entropy, raising=False)
    right = composition(**CALL)
    torch.testing.assert_close(F.linear_cross_entropy(**CALL), right)
    one = {**CALL, "input": CALL["input"][0], "target": LABELS[0]}
    torch.testing.assert_close(F.linear_cross_entropy(**one), composition(**one))
