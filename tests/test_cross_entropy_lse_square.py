"""cross_entropy with lse_square_scale (z-loss): values and gradients of all kernels
(cross_entropy_kernels.py) and of calls that are not for them, against autograd in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastopt
import fastopt.backends
import served
from accuracy import assert_as_accurate, assert_same_bits
from cross_entropy_cases import (
    DTYPES,
    EVERYTHING,
    KERNELS,
    OPTIONS,
    REDUCTIONS,
    class_dim,
    classes_last,
    differentiate,
    dtype_name,
    every_second_class,
    every_second_position,
    make_logits,
    make_probabilities,
    make_target,
    make_weight,
    random_upstream,
    transposed,
)
from cross_entropy_kernels import (
    NAMED,
    each_kernel,
    these_kernels_answer,  # noqa: F401
)
from extras_cases import composed
from fastopt import ops, reference
from fastopt.options import MEAN, NONE, SUM, Options

SCALE = 0.03125


def check(logits: Tensor, target: Tensor, ours: bool = True, **keywords: object) -> None:
    keywords.setdefault("lse_square_scale", SCALE)
    with served.cross_entropy.answered(not ours):
        result = differentiate(fastopt.cross_entropy, logits, target, **keywords)
        of_the_call = {k: v for k, v in keywords.items() if k != "upstream"}
        alone = fastopt.cross_entropy(logits.detach(), target, **of_the_call)

    def of(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        cast = {
            name: value.to(dtype) if isinstance(value, Tensor) else value
            for name, value in keywords.items()
        }
        mass = target.to(dtype) if target.is_floating_point() else target
        other = differentiate(composed, logits.to(dtype), mass, **cast)
        return other.loss, other.gradients["logits"]

    wide = torch.promote_types(logits.dtype, torch.float32)
    stock = [value.to(logits.dtype) for value in of(wide)]
    exact = of(torch.float64)
    masses = target.is_floating_point() or keywords.get("label_smoothing")
    summed = logits.shape[class_dim(logits)] if masses else 0
    assert_as_accurate(result.loss, stock[0], exact[0], "loss", summed)
    assert_as_accurate(alone, stock[0], exact[0], "loss alone", summed)
    assert_as_accurate(result.gradients["logits"], stock[1], exact[1], "gradient", summed)


def check_all(logits: Tensor, ours: bool = True) -> None:
    target, keywords = EVERYTHING.apply(logits, make_target(logits))
    check(logits, target, ours, upstream=random_upstream, **keywords)
    check(logits, target, ours, upstream=random_upstream, reduction="none", **keywords)
    target, keywords = OPTIONS["ignored"].apply(logits, make_target(logits))
    check(logits, target, ours, reduction="sum", **keywords)
    weight = make_weight(logits.shape[class_dim(logits)], logits.dtype)
    probabilities = make_probabilities(logits)
    check(logits, probabilities, ours, weight=weight, label_smoothing=0.2)


@pytest.mark.parametrize("name", NAMED)
def test_every_branch(name: str) -> None:
    check_all(make_logits(NAMED[name]))


# The interpreter takes seconds a case.
NAMES = ["weight-negative", "ignored-smoothing-weight"]
if KERNELS != "interpreted":
    NAMES = [name for name in OPTIONS if "nan" not in name]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_options(name: str, reduction: str) -> None:
    for shape in [(9, 7), (3, 261), (2, 7, 5)]:
        logits = make_logits(shape)
        target, keywords = OPTIONS[name].apply(logits, make_target(logits))
        check(logits, target, reduction=reduction, **keywords)
        if "ignored" not in name:
            _, keywords = OPTIONS[name].apply(logits, make_probabilities(logits))
            check(logits, make_probabilities(logits), reduction=reduction, **keywords)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_every_dtype(dtype: torch.dtype) -> None:
    for shape in each_kernel(dtype):
        check_all(make_logits(shape, dtype))


@pytest.mark.parametrize(
    "layout",
    [transposed, classes_last, every_second_class, every_second_position],
    ids=lambda layout: layout.__name__,
)
def test_layouts(layout: Callable[[Tensor], Tensor]) -> None:
    check_all(layout(make_logits((2, 21, 5, 7))))


@pytest.mark.parametrize("scale", [-0.5, 1e-4, 3.0, 1])
def test_scales(scale: float) -> None:
    for shape in [(9, 7), (3, 261)]:
        logits = make_logits(shape)
        check(logits, make_target(logits), lse_square_scale=scale)
        check(logits, make_target(logits), lse_square_scale=scale, reduction="none")


def test_large_logits_of_float16() -> None:
    """The gradient's unit leaves room for lse."""

    def small(loss: Tensor) -> Tensor:
        return torch.full_like(loss, 2.0**-12)

    for shape in [(9, 7), (3, 261)]:
        logits = (make_logits(shape) * 2000).clamp(-60000, 60000).half()
        target = make_target(logits)
        check(logits, target, lse_square_scale=1.0, reduction="sum", upstream=small)


def test_ignored_rows_are_not_read() -> None:
    for shape in [(9, 7), (3, 261), (2, 7, 5)]:
        logits = make_logits(shape)
        target = make_target(logits)
        target[0] = -100
        logits[0] = math.nan
        result = differentiate(fastopt.cross_entropy, logits, target, lse_square_scale=SCALE)
        assert result.loss.isfinite() and result.gradients["logits"][0].count_nonzero() == 0
        target.fill_(-100)
        result = differentiate(fastopt.cross_entropy, logits, target, lse_square_scale=SCALE)
        assert result.loss.isnan() and result.gradients["logits"].count_nonzero() == 0


def test_infinite_masses_keep_it() -> None:
    """Where the loss is added up class by class."""
    for shape in [(9, 7), (3, 261)]:
        logits = make_logits(shape)
        weight = torch.full(shape[1:], 2e38)
        loss = fastopt.cross_entropy(
            logits, make_target(logits), weight, reduction="none", lse_square_scale=1e30
        )
        rows = 1e30 * logits.double().logsumexp(1).square()
        rows += F.cross_entropy(
            logits.double(), make_target(logits), weight.double(), reduction="none"
        )
        torch.testing.assert_close(loss, rows.float(), rtol=1e-5, atol=0)


@pytest.mark.library
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_second_derivatives(reduction: str) -> None:
    for shape in [(5, 7), (2, 70), (2, 3, 4)]:
        logits = make_logits(shape, torch.float64).requires_grad_()
        target, keywords = EVERYTHING.apply(logits, make_target(logits))
        kinds = [
            (target, keywords),
            (make_target(logits), {}),
            (make_probabilities(logits.detach()), {"label_smoothing": 0.1}),
        ]
        for labels, others in kinds:

            def loss(x: Tensor, labels: Tensor = labels, others: dict = others) -> Tensor:
                return fastopt.cross_entropy(
                    x, labels, reduction=reduction, lse_square_scale=0.1, **others
                )

            assert torch.autograd.gradcheck(loss, logits)
            assert torch.autograd.gradgradcheck(loss, logits)


@pytest.mark.library
def test_second_derivatives_where_the_softmax_has_no_mass() -> None:
    """a + 2 z lse = 0: the gradient is -q and says nothing of the softmax."""
    logits = torch.tensor([[0.3, -0.2, 0.9]], dtype=torch.float64)
    scale = -0.5 / logits.logsumexp(1).item()
    target = torch.tensor([1])

    def loss(x: Tensor) -> Tensor:
        return fastopt.cross_entropy(x, target, lse_square_scale=scale)

    logits.requires_grad_()
    assert torch.autograd.gradgradcheck(loss, logits)


@pytest.mark.library
def test_the_gradient_as_an_output_is_not_differentiable() -> None:
    logits = make_logits((9, 7)).requires_grad_()
    arguments = (logits, make_target(logits), None, -100, 0.0, MEAN, torch.float32, SCALE, None)
    loss, grad, _ = ops.cross_entropy_forward_backward(*arguments)
    assert loss.requires_grad and not grad.requires_grad


@pytest.mark.stock
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
@pytest.mark.library
def test_calls_that_are_not_ours(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastopt.loss, "_is_watched", lambda: True)
    for shape in [(9, 7), (3, 261), (2, 21, 5, 7)]:
        check_all(make_logits(shape, dtype), ours=False)
    logits = make_logits((13,), dtype)
    check(logits, make_target(logits), ours=False)


@pytest.mark.stock
@pytest.mark.library
def test_transforms() -> None:
    logits, target = make_logits((9, 7)), make_target(make_logits((9, 7)))

    def loss(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, t: f(x, t, lse_square_scale=SCALE)

    for transformed in (
        lambda f: torch.func.grad(f)(logits, target),
        lambda f: torch.func.vmap(f)(logits, target),
        lambda f: torch.func.hessian(f)(logits, target),
        lambda f: torch.func.jvp(lambda x: f(x, target), (logits,), (logits.cos(),))[1],
    ):
        torch.testing.assert_close(
            transformed(loss(fastopt.cross_entropy)), transformed(loss(composed))
        )


@pytest.mark.library
@pytest.mark.stock
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_traced() -> None:
    logits = make_logits((9, 7))
    labels = make_target(logits)
    for target in (labels, make_probabilities(logits)):
        for keywords in ({}, {"label_smoothing": 0.1, "weight": make_weight(7, logits.dtype)}):
            keywords["lse_square_scale"] = SCALE

            def loss(x: Tensor, target: Tensor = target, keywords: dict = keywords) -> Tensor:
                return fastopt.cross_entropy(x, target, **keywords)

            traced = torch.jit.trace(loss, (logits.clone(),))
            torch.testing.assert_close(traced(logits + 1), loss(logits + 1))


@pytest.mark.library
@pytest.mark.stock
def test_nobody_reads_meta_tensors() -> None:
    logits = torch.empty(9, 7, dtype=torch.float16, device="meta")
    target = torch.empty(9, dtype=torch.int64, device="meta")
    loss = fastopt.cross_entropy(logits, target, reduction="none", lse_square_scale=SCALE)
    assert loss.shape == (9,) and loss.dtype == torch.float16 and loss.is_meta


@pytest.mark.library
@pytest.mark.parametrize("shape", [(9, 7), (64, 1000)], ids=dtype_name)
def test_compiled(shape: tuple[int, ...]) -> None:
    logits = make_logits(shape)
    target, keywords = EVERYTHING.apply(logits, make_target(logits))
    keywords["lse_square_scale"] = SCALE
    compiled = torch.compile(fastopt.cross_entropy, fullgraph=True, backend="aot_eager")
    ours = differentiate(compiled, logits, target, **keywords)
    eager = differentiate(fastopt.cross_entropy, logits, target, **keywords)
    torch.testing.assert_close(ours.loss, eager.loss)
    torch.testing.assert_close(ours.gradients["logits"], eager.gradients["logits"])


@pytest.mark.library
def test_opcheck() -> None:
    for dtype in (torch.float32, torch.float16):
        logits = make_logits((9, 7), dtype)
        options = (-100, 0.1, MEAN, dtype, SCALE)
        largest = torch.tensor(2000.0) if dtype is torch.float16 else None
        arguments = (logits, make_target(logits), None, *options)
        torch.library.opcheck(ops.cross_entropy_forward, arguments)
        torch.library.opcheck(ops.cross_entropy_forward_backward, (*arguments, largest))


@pytest.mark.library
@pytest.mark.parametrize("reduction", [NONE, MEAN, SUM])
@pytest.mark.stock
def test_the_reference(reduction: int) -> None:
    name = ("none", "mean", "sum")[reduction]
    for shape in [(9, 7), (3, 261), (2, 21, 5, 7), (13,)]:
        logits = make_logits(shape, torch.float64)
        target, keywords = EVERYTHING.apply(logits, make_target(logits))
        weight = keywords["weight"]
        assert isinstance(weight, Tensor)
        options = Options(-100, 0.1, reduction, torch.float64, SCALE)
        if len(shape) == 1:
            target = make_target(logits)
        loss, grad, _ = reference.cross_entropy_forward_backward(logits, target, weight, options)
        right = differentiate(
            composed, logits, target, reduction=name, lse_square_scale=SCALE, **keywords
        )
        torch.testing.assert_close(loss, right.loss)
        torch.testing.assert_close(grad, right.gradients["logits"])


def test_0_changes_no_bit() -> None:
    for shape in [(9, 7), (3, 261)]:
        logits = make_logits(shape)
        with_it = differentiate(
            fastopt.cross_entropy, logits, make_target(logits), lse_square_scale=0.0
        )
        without = differentiate(fastopt.cross_entropy, logits, make_target(logits))
        assert_same_bits(with_it.loss, without.loss)
        assert_same_bits(with_it.gradients["logits"], without.gradients["logits"])


@pytest.mark.library
def test_the_module() -> None:
    logits, target = make_logits((9, 7)), make_target(make_logits((9, 7)))
    loss = fastopt.CrossEntropyLoss(label_smoothing=0.1, lse_square_scale=SCALE)
    right = composed(logits, target, label_smoothing=0.1, lse_square_scale=SCALE)
    torch.testing.assert_close(loss(logits, target), right)
    older = torch.nn.CrossEntropyLoss()
    older.__class__ = fastopt.CrossEntropyLoss
    assert_same_bits(older(logits, target), fastopt.cross_entropy(logits, target))


@pytest.mark.library
@pytest.mark.stock
def test_torchscript_refuses_it() -> None:
    logits, target = make_logits((9, 7)), make_target(make_logits((9, 7)))

    def with_it(x: Tensor, t: Tensor) -> Tensor:
        return fastopt.cross_entropy(x, t, lse_square_scale=0.1)

    def without(x: Tensor, t: Tensor) -> Tensor:
        return fastopt.cross_entropy(x, t, label_smoothing=0.1)

    loss = fastopt.CrossEntropyLoss(lse_square_scale=SCALE)
    with pytest.raises(Exception, match="lse_square_scale"):
        torch.jit.script(loss)(logits, target)
    with pytest.raises(Exception, match="lse_square_scale"):
        torch.jit.script(with_it)
    right = F.cross_entropy(logits, target, label_smoothing=0.1)
    assert_same_bits(torch.jit.script(without)(logits, target), right)
    module = torch.jit.script(fastopt.CrossEntropyLoss(label_smoothing=0.1))
    assert_same_bits(module(logits, target), right)


@pytest.mark.library
@pytest.mark.stock
@pytest.mark.parametrize("wrong", [None, "0.1", [0.1]])
def test_it_is_a_number(wrong: object) -> None:
    for shape in [(9, 7), (64, 1000)]:
        logits = make_logits(shape)
        with pytest.raises(TypeError):
            fastopt.cross_entropy(logits, make_target(logits), lse_square_scale=wrong)


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_the_result(scale: float) -> None:
    for shape in [(9, 7), (3, 261)]:
        logits = make_logits(shape)
        for reduction in ("mean", "sum"):
            loss = fastopt.cross_entropy(
                logits, make_target(logits), reduction=reduction, lse_square_scale=scale
            )
            torch.testing.assert_close(loss, torch.tensor(scale), equal_nan=True)
