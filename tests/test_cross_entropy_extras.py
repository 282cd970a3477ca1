"""cross_entropy and linear_cross_entropy with what torch's have not: each pair of extras against
autograd of the formula in float64; statistics; inplace; what is refused."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import fastopt
import fastopt.loss
import served
from accuracy import assert_as_accurate, assert_same_bits
from cross_entropy_cases import (
    DTYPES,
    REDUCTIONS,
    classes_last,
    dtype_name,
    every_second_class,
    expanded_rows,
    make_logits,
    make_probabilities,
    make_target,
    random_upstream,
    transposed,
)
from extras_cases import ALL, EXTRAS, PAIRS, composed, keywords_of, of_every_target, result_of
from fastopt import ops, reference, statistics
from linear_cross_entropy_cases import SHAPES, leaves_of, make_call, small_chunks  # noqa: F401
from test_linear_cross_entropy_ops import arguments

pytestmark = pytest.mark.library
SHAPE, IMAGE = (9, 7), (2, 5, 3, 2)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "PIECE", 24)


def grads(loss: Tensor, leaves: list[Tensor], twice: bool) -> list[Tensor]:
    """First derivatives, and those of the sum of their squares."""
    first = torch.autograd.grad(loss, leaves, random_upstream(loss), create_graph=twice)
    if not twice:
        return [*first]
    return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)]


def assert_all_close(ours: list[Tensor], right: list[Tensor], **tolerance: float) -> None:
    for one, other in zip(ours, right, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def check(
    names: tuple[str, ...], shape: tuple[int, ...], twice: bool = True, **others: Any
) -> None:
    logits = make_logits(shape, torch.float64)
    rows = torch.Size([*shape[:1], *shape[2:]])
    for target, kind in of_every_target(shape):
        for reduction in ("mean",) if "denominator" in names else REDUCTIONS:
            keywords = {**keywords_of(names, rows), **kind, **others, "reduction": reduction}
            x, y = (logits.clone().requires_grad_() for _ in range(2))
            loss = result_of(fastopt.cross_entropy(x * 1, target, **keywords))
            right = composed(y, target, **keywords)
            assert loss.dtype is torch.float64
            assert_all_close([loss, *grads(loss, [x], twice)], [right, *grads(right, [y], twice)])
            with torch.no_grad():
                alone = result_of(fastopt.cross_entropy(logits, target, **keywords))
            torch.testing.assert_close(alone, right.detach())


@pytest.mark.parametrize("names", [*PAIRS, ALL], ids="-".join)
def test_pairs(names: tuple[str, ...]) -> None:
    with served.cross_entropy.answered():
        check(names, SHAPE)


@pytest.mark.parametrize("name", EXTRAS)
def test_inplace_with_another(name: str) -> None:
    with served.cross_entropy.answered():
        check((name,), SHAPE, twice=name != "lse_square_scale", inplace=True)


def test_images() -> None:
    for names in (ALL, ("token_weight", "softcap")):
        check(names, IMAGE)
    check(ALL, IMAGE, twice=False, inplace=True)


@pytest.mark.stock
@pytest.mark.parametrize("names", [*PAIRS[::4], ALL], ids="-".join)
def test_calls_that_are_not_ours(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastopt.loss, "_is_watched", lambda: True)
    check(names, SHAPE, inplace=True)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("names", [*PAIRS, ALL], ids="-".join)
def test_pairs_of_linear(names: tuple[str, ...]) -> None:
    call = make_call(SHAPES[4], torch.float64)
    (n, _), c = call["input"].shape, call["linear_weight"].shape[0]
    for target, kind in of_every_target((n, c)):
        for reduction in ("mean",) if "denominator" in names else REDUCTIONS:
            keywords = {**keywords_of(names, torch.Size([n])), **kind, "reduction": reduction}
            ours, leaves = leaves_of({**call, "target": target})
            with served.linear_cross_entropy.answered():
                loss = result_of(fastopt.linear_cross_entropy(**ours, **keywords))
                with torch.no_grad():
                    alone = result_of(fastopt.linear_cross_entropy(**ours, **keywords))
            theirs, others = leaves_of(call)
            logits = F.linear(theirs["input"], theirs["linear_weight"], theirs["linear_bias"])
            right = composed(logits, target, **keywords)
            assert_all_close(
                [loss, alone, *grads(loss, leaves, twice=True)],
                [right, right, *grads(right, others, twice=True)],
            )


@pytest.mark.stock
def test_linear_calls_that_are_not_ours() -> None:
    """In K dimensions, of one row, and small ones."""
    x, w = torch.randn(6, 4, dtype=torch.float64), torch.randn(5, 3, 4, dtype=torch.float64)
    target = torch.randint(5, (6, 3))
    weights = torch.rand(6, 3)
    keywords = {"softcap": 2.0, "token_weight": weights, "lse_square_scale": 0.1}
    logits = F.linear(x, w.reshape(-1, 4)).reshape(6, 5, 3)
    right = composed(logits, target, **keywords)
    torch.testing.assert_close(fastopt.linear_cross_entropy(x, w, target, **keywords), right)
    one = fastopt.linear_cross_entropy(x[0], w[:, 0], target[0, 0], softcap=2.0)
    torch.testing.assert_close(one, composed(x[0] @ w[:, 0].t(), target[0, 0], softcap=2.0))


def cast(keywords: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in keywords.items()
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_every_dtype(dtype: torch.dtype) -> None:
    """As accurate as the formula in float32, rounded."""
    for names in [(name,) for name in EXTRAS if name != "loss_dtype"] + [ALL]:
        logits = make_logits((9, 65), dtype)
        for target, kind in of_every_target((9, 65), dtype):
            keywords = {**keywords_of(names, torch.Size([9])), **kind}

            def differentiate(
                f: Callable[..., Any],
                to: torch.dtype,
                target: Tensor = target,
                keywords: dict[str, Any] = keywords,
                logits: Tensor = logits,
            ) -> tuple[Tensor, Tensor]:
                x = logits.to(to).requires_grad_()
                goal = target.to(to) if target.is_floating_point() else target
                loss = result_of(f(x, goal, **cast(keywords, to)))
                return loss.detach(), torch.autograd.grad(loss, x)[0]

            ours = differentiate(fastopt.cross_entropy, dtype)
            wide = torch.promote_types(dtype, torch.float32)
            result = torch.float64 if "loss_dtype" in names else dtype
            stock = differentiate(composed, wide)
            exact = differentiate(composed, torch.float64)
            if "loss_dtype" not in names:
                assert_as_accurate(ours[0], stock[0].to(result), exact[0], "loss", 65)
            else:
                torch.testing.assert_close(ours[0], exact[0], rtol=1e-5, atol=1e-5)
            assert_as_accurate(ours[1], stock[1].to(dtype), exact[1], "gradient", 65)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_every_dtype_of_linear(dtype: torch.dtype) -> None:
    call = make_call(SHAPES[6], dtype, ignored=0.3)
    keywords = keywords_of(ALL, call["target"].shape)
    keywords.update(loss_dtype=torch.float32, softcap=20.0)
    ours, leaves = leaves_of(call)
    loss, stats = fastopt.linear_cross_entropy(**ours, **keywords)
    assert loss.dtype is torch.float32 and stats.lse.dtype is statistics.accumulation_type(dtype)
    theirs, others = leaves_of(cast(call, torch.float64))
    logits = F.linear(theirs["input"], theirs["linear_weight"], theirs["linear_bias"])
    right = composed(logits, call["target"], **keywords)
    assert_close = torch.testing.assert_close
    assert_close(loss, right.float(), rtol=1e-5, atol=1e-5)
    for grad, exact in zip(grads(loss, leaves, False), grads(right, others, False), strict=True):
        eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
        assert grad.dtype is dtype
        assert_close(grad.double(), exact, rtol=eps, atol=16 * eps * exact.abs().max().item())


def test_extras_of_one_change_no_bit() -> None:
    logits, target = make_logits(SHAPE), make_target(make_logits(SHAPE))
    right = fastopt.cross_entropy(logits, target)
    for neutral in (
        {"softcap": None},
        {"logit_scale": 1},
        {"loss_dtype": torch.float32},
        {"return_stats": True},
        {"inplace": True},
    ):
        assert_same_bits(result_of(fastopt.cross_entropy(logits, target, **neutral)), right)


@pytest.mark.parametrize("kind", ["number", "float", "tensor", "half", "integers"])
def test_denominators(kind: str) -> None:
    by = {
        "number": 7,
        "float": 7.0,
        "tensor": torch.tensor(7.0),
        "half": torch.tensor(7.0).half(),
        "integers": torch.tensor(7),
    }[kind]
    logits, target = make_logits(SHAPE), make_target(make_logits(SHAPE))
    right = fastopt.cross_entropy(logits, target, reduction="sum") / 7
    assert_same_bits(fastopt.cross_entropy(logits, target, denominator=by), right)


def test_ignored_rows_are_not_read() -> None:
    logits, target = make_logits((9, 7)), make_target(make_logits((9, 7)))
    logits[0] = math.nan
    target[0] = -100
    keywords = keywords_of(ALL, torch.Size([9]))
    keywords["token_weight"][0] = math.inf
    x = logits.clone().requires_grad_()
    loss, stats = fastopt.cross_entropy(x, target, **keywords)
    grad = torch.autograd.grad(loss, x)[0]
    assert loss.isfinite() and stats.z_loss.isfinite() and grad[0].count_nonzero() == 0
    assert grad.isfinite().all() and stats.lse[0] == 0 and stats.predicted[0] == -1
    target.fill_(-100)
    for denominator, right in ((None, math.nan), (3.0, 0.0)):
        keywords["denominator"] = denominator
        loss, stats = fastopt.cross_entropy(x, target, **keywords)
        torch.testing.assert_close(loss.item(), right, equal_nan=True)
        assert torch.autograd.grad(loss, x)[0].count_nonzero() == 0
        assert not stats.correct.any() and not stats.entropy.any()


@pytest.mark.usefixtures("small_chunks")
def test_a_denominator_of_0() -> None:
    """Is inf, also where rows are ignored: they are multiplied by nothing."""
    call, leaves = leaves_of(make_call(SHAPES[4], ignored=0.4))
    for weights in ({}, {"token_weight": torch.ones(len(call["target"]))}):
        keywords = {"denominator": 0, **weights}
        x = F.linear(call["input"], call["linear_weight"], call["linear_bias"])
        assert fastopt.cross_entropy(x, call["target"], **keywords) == math.inf
        loss = fastopt.linear_cross_entropy(**call, **keywords)
        assert loss == math.inf
        assert not torch.autograd.grad(loss, leaves)[0][call["target"] == -100].any()
    ours = arguments(dtype=torch.float64, ignored=0.4)
    wants = [ours.pop(name) for name in ("wants_input", "wants_weight", "wants_bias")]
    factor = torch.full((len(ours["target"]),), math.inf, dtype=torch.float64)
    ours.update(grad_loss=factor, grad_entropy=None, reduction=2)
    of_op = (*(ours[name] for name in OF_OP), ours["dtype"], ours["accumulate"], 8)
    of_op = (*of_op, 1.0, 0.0, False, *wants)
    for op in (ops.linear_cross_entropy_rows, reference.linear_cross_entropy_rows):
        op = (
            op if op is ops.linear_cross_entropy_rows else ops.flat("linear_cross_entropy_rows", op)
        )
        assert op(*of_op)[0] == math.inf


@pytest.mark.usefixtures("small_chunks")
def test_ignored_rows_of_linear_are_absent() -> None:
    call = make_call(SHAPES[4], ignored=0.4)
    call["input"][call["target"] == -100] = math.nan
    keywords = keywords_of(ALL, call["target"].shape)
    ours, leaves = leaves_of(call)
    loss, stats = fastopt.linear_cross_entropy(**ours, **keywords)
    some = call["target"] != -100
    present = {**call, "input": call["input"][some], "target": call["target"][some]}
    theirs, others = leaves_of(present)
    keywords["token_weight"] = keywords["token_weight"][some]
    right, right_stats = fastopt.linear_cross_entropy(**theirs, **keywords)
    torch.testing.assert_close(loss, right)
    found = torch.autograd.grad(loss, leaves)
    wanted = torch.autograd.grad(right, others)
    assert not found[0][~some].any()
    assert_all_close([found[0][some], *found[1:]], [*wanted])
    for mine, theirs_too in zip(stats, right_stats, strict=True):
        torch.testing.assert_close(mine[some] if mine.dim() else mine, theirs_too)


# -- statistics -------------------------------------------------------------------------------------


def check_stats(stats: fastopt.LossStats, logits: Tensor, target: Tensor, dim: int = 1) -> None:
    exact = logits.double()
    log_p = exact.log_softmax(dim)
    labels = target.argmax(dim) if target.is_floating_point() else target
    live = torch.ones_like(labels, dtype=torch.bool) & (labels != -100)
    predicted = torch.where(live, exact.argmax(dim), -1)
    torch.testing.assert_close(stats.predicted, predicted)
    torch.testing.assert_close(stats.correct, live & (predicted == labels))
    for mine, right in (
        (stats.lse, exact.logsumexp(dim)),
        (stats.entropy, -(log_p.exp() * log_p).sum(dim)),
    ):
        assert mine.dtype is torch.promote_types(logits.dtype, torch.float32)
        right = torch.where(live, right, 0).to(mine.dtype)
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)
    assert not any(x.requires_grad for x in stats)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_statistics(dtype: torch.dtype) -> None:
    for shape in [(9, 7), (5, 1), IMAGE, (3, 261)]:
        logits = make_logits(shape, dtype)
        logits.view(-1)[:2] = 9  # the first of several largest
        for target, kind in of_every_target(shape, dtype):
            for reduction in REDUCTIONS:
                x = logits.clone().requires_grad_()
                _, stats = fastopt.cross_entropy(
                    x, target, reduction=reduction, return_stats=True, **kind
                )
                check_stats(stats, logits, target)
                assert stats.z_loss == 0
    logits = make_logits((13,), dtype)
    _, stats = fastopt.cross_entropy(logits, torch.tensor(3), return_stats=True)
    check_stats(stats, logits, torch.tensor(3), dim=0)


@pytest.mark.usefixtures("small_chunks")
def test_statistics_of_linear() -> None:
    for reduction in REDUCTIONS:
        call, _ = leaves_of(make_call(SHAPES[4], torch.float64, ignored=0.3, reduction=reduction))
        logits = F.linear(call["input"], call["linear_weight"], call["linear_bias"]).detach()
        _, stats = fastopt.linear_cross_entropy(**call, return_stats=True)
        check_stats(stats, logits, call["target"])


def test_z_loss_and_the_rest_are_the_loss() -> None:
    logits = make_logits(SHAPE, torch.float64)
    target, kind = of_every_target(SHAPE)[1]
    for others in ({}, {"token_weight": keywords_of(ALL, torch.Size([9]))["token_weight"]}):
        for reduction in ("mean", "sum"):
            call = {**others, **kind, "reduction": reduction, "return_stats": True}
            loss, stats = fastopt.cross_entropy(logits, target, lse_square_scale=0.1, **call)
            rest, _ = fastopt.cross_entropy(logits, target, **call)
            torch.testing.assert_close(stats.z_loss + rest, loss)


# -- inplace ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_inplace_has_the_same_bits(dtype: torch.dtype, reduction: str) -> None:
    for shape in [(9, 7), (77, 3), (3, 2049), (2, 65539), (2, 21, 17), (1, 150, 33, 7)]:
        leaf = make_logits(shape, dtype).requires_grad_()
        for target in (make_target(leaf), make_probabilities(leaf.detach())):
            results = []
            for inplace in (False, True):
                logits = leaf * 1
                before = logits._version
                keywords = {"reduction": reduction, "label_smoothing": 0.1}
                loss = fastopt.cross_entropy(logits, target, inplace=inplace, **keywords)
                assert logits._version - before == inplace
                upstream = random_upstream(loss) if reduction == "none" else torch.ones_like(loss)
                grad = torch.autograd.grad(loss, logits, upstream)[0]
                assert (grad.data_ptr() == logits.data_ptr()) == inplace
                results.append((loss, grad))
            for one, other in zip(*results, strict=True):
                assert_same_bits(one, other)


@pytest.mark.parametrize(
    "layout",
    [transposed, classes_last, every_second_class, expanded_rows],
    ids=lambda layout: layout.__name__,
)
def test_inplace_in_every_layout(layout: Callable[[Tensor], Tensor]) -> None:
    leaf = make_logits((9, 7)).requires_grad_()
    logits = layout(leaf * 1)
    if layout is every_second_class:
        logits = layout(make_logits((9, 7)).mul_(1)).detach().requires_grad_().view_as(leaf)
        leaf = logits
        with pytest.raises(RuntimeError, match="a view of a leaf"):
            fastopt.cross_entropy(logits, make_target(leaf), inplace=True)
        return
    right = F.cross_entropy(layout(leaf), make_target(leaf))
    loss = fastopt.cross_entropy(logits, make_target(leaf), inplace=True)
    torch.testing.assert_close(loss, right)
    assert_all_close(grads(loss, [leaf], False), grads(right, [leaf], False))


def test_inplace_of_a_sliced_vocabulary() -> None:
    """Which is not dense: also for factors of rows, and for one that is not finite."""
    wide = make_logits((9, 12)).requires_grad_()
    target = make_target(make_logits(SHAPE))
    weights = keywords_of(ALL, torch.Size([9]))["token_weight"]
    for keywords in ({"reduction": "none"}, {"token_weight": weights}, {}):
        for factor in (1.0, 2.0, math.inf, math.nan):
            found = []
            for inplace in (True, False):
                logits = (wide * 1)[:, :7]
                loss = fastopt.cross_entropy(logits, target, inplace=inplace, **keywords).sum()
                found.append(torch.autograd.grad(loss, wide, torch.tensor(factor))[0])
            torch.testing.assert_close(*found, equal_nan=True)


def test_inplace_keeps_what_shares_the_logits_memory() -> None:
    wide = make_logits((9, 8)).abs().requires_grad_()
    target = make_target(make_logits(SHAPE))
    for of_wide in (
        lambda x: {"token_weight": x[:, 7].detach()},
        lambda x: {"token_weight": x[:, 0].detach()},
        lambda x: {"denominator": x[3, 2].detach()},
        lambda x: {"weight": x[4, :7].detach()},
        lambda x: {"target": x[:, :7].detach()},
    ):
        found = []
        for inplace in (True, False):
            logits = wide * 1
            call = {"target": target, **of_wide(logits)}
            loss = fastopt.cross_entropy(logits[:, :7], inplace=inplace, **call)
            found.append([loss, *grads(loss, [wide], False)])
        assert_all_close(*found)


def test_inplace_refuses_leaves() -> None:
    target = make_target(make_logits(SHAPE))
    leaf = make_logits(SHAPE).requires_grad_()
    with pytest.raises(RuntimeError) as torchs:
        leaf.mul_(2)
    for logits in (leaf, leaf.view(9, 7), leaf[1:]):
        with pytest.raises(type(torchs.value), match="leaf"):
            fastopt.cross_entropy(logits, target[-len(logits) :], inplace=True)
    before = leaf.detach().clone()
    with torch.no_grad():  # where there is no gradient
        fastopt.cross_entropy(leaf, target, inplace=True)
    fastopt.cross_entropy(leaf.detach(), target, inplace=True)
    assert_same_bits(leaf.detach(), before)


def test_who_saved_overwritten_logits_is_told() -> None:
    leaf = make_logits(SHAPE).requires_grad_()
    logits = leaf.exp()  # saves its result
    loss = fastopt.cross_entropy(logits, make_target(leaf), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    logits = leaf * 1
    loss = fastopt.cross_entropy(logits, make_target(leaf), inplace=True)
    logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaf)


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_inplace_twice(factor: float) -> None:
    """A graph that is kept keeps its gradient; none is left for one that has ended."""
    leaf = make_logits(SHAPE).requires_grad_()
    target = make_target(leaf)
    right = torch.autograd.grad(F.cross_entropy(leaf, target) * factor, leaf)[0]
    loss = fastopt.cross_entropy(leaf * 1, target, inplace=True) * factor
    for kept in (True, True, False):
        grad = torch.autograd.grad(loss, leaf, retain_graph=kept)[0]
        torch.testing.assert_close(grad, right)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaf)


def test_inplace_has_no_second_derivatives_of_z_loss() -> None:
    leaf = make_logits(SHAPE).requires_grad_()
    loss = fastopt.cross_entropy(leaf * 1, make_target(leaf), inplace=True, lse_square_scale=0.1)
    with pytest.raises(RuntimeError, match="overwritten"):
        torch.autograd.grad(loss, leaf, create_graph=True)


# -- modes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("softcap", "return_stats"), ALL], ids="-".join)
def test_compiled(names: tuple[str, ...]) -> None:
    logits = make_logits(SHAPE)
    target, kind = of_every_target(SHAPE, torch.float32)[1]
    keywords = {**keywords_of(names, torch.Size([9])), **kind}
    found = []
    for f in (
        torch.compile(fastopt.cross_entropy, fullgraph=True, backend="aot_eager"),
        fastopt.cross_entropy,
    ):
        x = logits.clone().requires_grad_()
        loss, stats = f(x, target, **keywords)
        found.append([loss, *grads(loss, [x], False), *stats])
    assert_all_close(*found)


@pytest.mark.usefixtures("small_chunks")
def test_compiled_linear() -> None:
    call = make_call(SHAPES[4], ignored=0.3)
    keywords = keywords_of(ALL, call["target"].shape)
    compiled = torch.compile(fastopt.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    found = []
    for f in (compiled, fastopt.linear_cross_entropy):
        mine, leaves = leaves_of(call)
        loss, stats = f(**mine, **keywords)
        found.append([loss, *grads(loss, leaves, False), *stats])
    for one, other in zip(*found, strict=True):
        assert_same_bits(one, other)


@pytest.mark.stock
def test_transforms() -> None:
    logits, target = make_logits(SHAPE, torch.float64), make_target(make_logits(SHAPE))
    keywords = {"softcap": 2.0, "lse_square_scale": 0.1, "logit_scale": 0.5}
    for f in (lambda x: torch.func.grad(x), lambda x: torch.func.hessian(x)):
        found = [
            f(lambda x, ce=ce: result_of(ce(x, target, denominator=5, **keywords)))(logits)
            for ce in (fastopt.cross_entropy, composed)
        ]
        torch.testing.assert_close(*found)
    found = [
        torch.func.vmap(lambda x, t, ce=ce: ce(x, t, **keywords))(logits, target)
        for ce in (fastopt.cross_entropy, composed)
    ]
    torch.testing.assert_close(*found)


OF_OP = [
    *("input", "linear_weight", "linear_bias", "target", "weight", "grad_loss", "grad_entropy"),
    *("ignore_index", "label_smoothing", "reduction", "loss_dtype", "lse_square_scale"),
]


def test_traced_by_fx() -> None:
    """What is given to the graph decides, as it does without one."""
    logits, target = make_logits(SHAPE), make_target(make_logits(SHAPE))
    weights = keywords_of(ALL, torch.Size([9]))["token_weight"]
    for module in (fastopt.CrossEntropyLoss(softcap=2.0), fastopt.CrossEntropyLoss()):
        graph = torch.fx.symbolic_trace(module)
        for others in ((), (weights,), (weights, 5)):
            assert_same_bits(graph(logits, target, *others), module(logits, target, *others))
    linear = fastopt.LinearCrossEntropyLoss(7, 5)
    graph = torch.fx.symbolic_trace(linear)
    for others in ((), (weights, 5)):
        found = (f(logits, target % 5, *others) for f in (graph, linear))
        assert_same_bits(*found)


@pytest.mark.stock
def test_labels_of_uint8() -> None:
    """Of which 156 is no -100."""
    logits, target = make_logits((3, 200)), torch.tensor([156, 7, 199])
    found = fastopt.cross_entropy(logits, target.to(torch.uint8), denominator=3)
    torch.testing.assert_close(found, F.cross_entropy(logits, target))


def test_inplace_under_hooks_of_saved_tensors() -> None:
    leaf = make_logits(SHAPE).requires_grad_()
    right = torch.autograd.grad(3 * F.cross_entropy(leaf, make_target(leaf)), leaf)[0]
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda x: x):
        loss = 3 * fastopt.cross_entropy(leaf * 1, make_target(leaf), inplace=True)
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], right)


def hooked(f: Callable[[Tensor], Any], x: Tensor) -> Any:
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved):
        return f(x)


def checkpointed(f: Callable[[Tensor], Any], x: Tensor) -> Any:
    return checkpoint(f, x, use_reentrant=False)


OF_HOOKS = [
    *(("softcap",), ("logit_scale",), ("token_weight",), ("denominator",), ("return_stats",)),
    *(("inplace",), ("inplace", "token_weight"), ("inplace", "return_stats"), ALL),
]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("run", [hooked, checkpointed], ids=lambda run: run.__name__)
@pytest.mark.parametrize("names", OF_HOOKS, ids="-".join)
def test_saved_tensors_are_unpacked_once(
    names: tuple[str, ...], run: Callable[[Callable[[Tensor], Any], Tensor], Any]
) -> None:
    """checkpoint lets nobody unpack them a second time."""
    call, (x, *parameters) = leaves_of(make_call(SHAPES[4], torch.float64, ignored=0.3))
    keywords = keywords_of(names, call["target"].shape)
    w, b = call["linear_weight"], call["linear_bias"]

    def loss(x: Tensor) -> Tensor:
        logits = F.linear(x, w, b)
        inplace = {"inplace": True} if "inplace" in names else {}
        return result_of(
            fastopt.cross_entropy(logits, call["target"], **keywords, **inplace)
        ) + result_of(fastopt.linear_cross_entropy(**{**call, "input": x}, **keywords))

    leaves = [x, *parameters]
    for factor in (1.0, 3.0):
        found = torch.autograd.grad(factor * run(loss, x), leaves)
        right = torch.autograd.grad(
            factor * 2 * composed(F.linear(x, w, b), call["target"], **keywords), leaves
        )
        assert_all_close([*found], [*right])


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("run", [hooked, checkpointed], ids=lambda run: run.__name__)
def test_logprobs_are_unpacked_once(run: Callable[..., Any]) -> None:
    call, leaves = leaves_of(make_call(SHAPES[4], torch.float64, ignored=0.3))

    def both(x: Tensor) -> Tensor:
        found = fastopt.linear_logprobs(
            *(x, call["linear_weight"], call["target"]),
            linear_bias=call["linear_bias"],
            entropy=True,
        )
        return (found.logprobs + found.entropy).sum()

    found = torch.autograd.grad(run(both, leaves[0]), leaves)
    right = torch.autograd.grad(both(leaves[0]), leaves)
    assert_all_close([*found], [*right])


@pytest.mark.parametrize("name", ["softcap", "logit_scale", "inplace"])
def test_no_logits_are_held(name: str) -> None:
    """Beyond what autograd has saved: neither where checkpoint took that away, nor after backward."""
    x, target = make_logits(SHAPE).requires_grad_(), make_target(make_logits(SHAPE))
    logits: list[StorageWeakRef] = []
    overwriting = fastopt.loss._OverwritingLoss.forward

    def forward(ctx: Any, x: Tensor, *others: Any) -> Any:
        logits.append(StorageWeakRef(x.untyped_storage()))
        return overwriting(ctx, x, *others)

    def loss(x: Tensor) -> Tensor:
        found: Tensor = fastopt.cross_entropy(x * 1, target, **{name: OF_MODULES.get(name, True)})
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastopt.loss._OverwritingLoss, "forward", forward)
        direct = loss(x)
        assert not logits[0].expired()
        direct.backward()
        assert logits[0].expired()
        later = checkpointed(loss, x)
        assert logits[1].expired()
        later.backward()
        assert logits[2].expired() and len(logits) == 3


def test_the_ops_in_both_definitions() -> None:
    """opcheck, and the reference against the loop."""
    for dtype in (torch.float64, torch.bfloat16):
        for rows in (False, True):
            call = arguments(rows=rows, dtype=dtype, ignored=0.3)
            wants = [call.pop(name) for name in ("wants_input", "wants_weight", "wants_bias")]
            factor = torch.linspace(0, 1, len(call["target"]), dtype=dtype)
            call["grad_entropy"] = factor if rows else None
            call["grad_loss"], call["reduction"] = factor, 0 if rows else 2
            tail = (call["dtype"], call["accumulate"], 8, 0.5, 3.0, True, *wants)
            of_op = (*(call[name] for name in OF_OP), *tail)
            torch.library.opcheck(ops.linear_cross_entropy_rows, of_op)
            ours = ops.linear_cross_entropy_rows(*of_op)
            right = ops.flat("linear_cross_entropy_rows", reference.linear_cross_entropy_rows)(
                *of_op
            )
            near = {} if dtype is torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
            assert_all_close([*ours[1:]], [*right[1:]], **near)
            assert_all_close([ours[0].double()], [right[0].double()], rtol=1e-2, atol=1e-2)


def test_nonsense_raises() -> None:
    """Of what the op has beyond linear_cross_entropy, whose checks are its own, too."""
    call = arguments(rows=True)
    n = len(call["target"])
    right = {
        **call,
        "grad_entropy": torch.ones(n),
        "logit_scale": 1.0,
        "softcap": 2.0,
        "stats": True,
    }
    ops.linear_cross_entropy_rows(**right)
    for name, values in {
        "grad_entropy": [torch.ones(n + 1), torch.ones(n, 1), torch.tensor(1.0)],
        "logit_scale": [0.0, -1.0, math.nan, math.inf],
        "softcap": [-1.0, math.nan, math.inf],
        "grad_loss": [torch.ones(n + 1), torch.ones(n, 1)],
        "target": [torch.full((n,), 2**62), torch.zeros(n - 1, dtype=torch.int64)],
    }.items():
        for value in values:
            with pytest.raises((RuntimeError, IndexError)):
                ops.linear_cross_entropy_rows(**{**right, name: value})


@pytest.mark.usefixtures("small_chunks", "filled_empties")
def test_every_element_is_written() -> None:
    """Where fresh memory holds NaN."""
    for ignored in (0.0, 0.4, 2.0):
        call = make_call(SHAPES[4], ignored=ignored)
        for reduction in ("sum", "none"):
            keywords = {**keywords_of(ALL, call["target"].shape), "reduction": reduction}
            del keywords["denominator"]
            mine, leaves = leaves_of(call)
            loss, stats = fastopt.linear_cross_entropy(**mine, **keywords)
            found = [loss, *stats, *grads(loss, leaves, False)]
            assert all(x.isfinite().all() for x in found)


def test_reports_count_them() -> None:
    leaf = make_logits(SHAPE).requires_grad_()
    with fastopt.reporting() as report:
        for keywords in ({"inplace": True}, {"softcap": 2.0}, {"denominator": 3}):
            fastopt.cross_entropy(leaf * 1, make_target(leaf), **keywords)
    found = [(row["served_by"], row["count"]) for row in report.as_dict()["rows"]]
    assert found == [("fastopt", 3)]


# -- modules and errors -----------------------------------------------------------------------------

OF_MODULES = {
    "lse_square_scale": 0.1,
    "softcap": 3.0,
    "logit_scale": 0.5,
    "loss_dtype": torch.float64,
    "return_stats": True,
}


@pytest.mark.parametrize("name", OF_MODULES)
def test_modules(name: str) -> None:
    logits, target = make_logits(SHAPE), make_target(make_logits(SHAPE))
    weights = keywords_of(ALL, torch.Size([9]))["token_weight"]
    of_call = {"token_weight": weights, "denominator": 5}
    mine = {name: OF_MODULES[name]}
    module = fastopt.CrossEntropyLoss(label_smoothing=0.1, **mine)
    for twin in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        loss = result_of(twin(logits, target, **of_call))
        right = fastopt.cross_entropy(logits, target, label_smoothing=0.1, **mine, **of_call)
        assert_same_bits(loss, result_of(right))
    assert not module.state_dict()
    linear = fastopt.LinearCrossEntropyLoss(7, 5, bias=True, **mine)
    for twin in (linear, copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        loss = result_of(twin(logits, target % 5, **of_call))
        head = (linear.linear.weight, target % 5)
        right = fastopt.linear_cross_entropy(
            logits, *head, linear_bias=linear.linear.bias, **mine, **of_call
        )
        assert_same_bits(loss, result_of(right))
    assert list(linear.state_dict()) == ["linear.weight", "linear.bias"]


def test_torchs_objects_have_none() -> None:
    logits, target = make_logits(SHAPE), make_target(make_logits(SHAPE))
    older = torch.nn.CrossEntropyLoss()
    older.__class__ = fastopt.CrossEntropyLoss
    assert_same_bits(older(logits, target), fastopt.cross_entropy(logits, target))


@pytest.mark.stock
@pytest.mark.parametrize("name", [*OF_MODULES, "inplace"])
def test_torchscript_refuses_them(name: str) -> None:
    logits, target = make_logits(SHAPE), make_target(make_logits(SHAPE))
    module = fastopt.CrossEntropyLoss(**{name: {**OF_MODULES, "inplace": True}[name]})
    with pytest.raises(Exception, match=r"not for torch\.jit\.script"):
        torch.jit.script(module)(logits, target)


ONES = torch.ones(9)
WRONG: list[tuple[dict[str, Any], type[Exception]]] = [
    *(({name: value}, ValueError) for name in ("softcap", "logit_scale") for value in (0, -1.0)),
    *(({name: math.inf}, ValueError) for name in ("softcap", "logit_scale")),
    *(({name: math.nan}, ValueError) for name in ("softcap", "logit_scale")),
    *(({name: "1"}, TypeError) for name in ("softcap", "logit_scale", "denominator")),
    ({"lse_square_scale": "1", "softcap": 1.0}, TypeError),
    ({"logit_scale": None}, TypeError),
    ({"logit_scale": torch.tensor(1.0)}, TypeError),
    ({"logit_scale": torch.nn.Parameter(torch.ones(()))}, TypeError),
    ({"softcap": torch.tensor(1.0)}, TypeError),
    ({"token_weight": 2.0}, TypeError),
    ({"token_weight": ONES[1:]}, ValueError),
    ({"token_weight": ONES.unsqueeze(1)}, ValueError),
    ({"token_weight": torch.tensor(1.0)}, ValueError),
    ({"token_weight": ONES.clone().requires_grad_()}, RuntimeError),
    ({"token_weight": ONES.to("meta")}, RuntimeError),
    ({"token_weight": ONES.to(torch.complex64)}, TypeError),
    ({"denominator": ONES}, ValueError),
    ({"denominator": 3, "reduction": "sum"}, ValueError),
    ({"denominator": 3, "reduction": "none"}, ValueError),
    ({"denominator": torch.tensor(3.0, requires_grad=True)}, RuntimeError),
    ({"denominator": torch.tensor(3.0, device="meta")}, RuntimeError),
    ({"loss_dtype": "float32"}, TypeError),
    ({"loss_dtype": torch.int64}, ValueError),
    ({"loss_dtype": torch.complex64}, ValueError),
    ({"return_stats": 1}, TypeError),
    ({"return_stats": None}, TypeError),
    ({"softcap": 2.0, "reduction": "avg"}, ValueError),
]


@pytest.mark.stock
@pytest.mark.parametrize(("keywords", "error"), WRONG, ids=lambda x: str(x)[:40])
def test_errors(keywords: dict[str, Any], error: type[Exception]) -> None:
    logits, target = make_logits(SHAPE), make_target(make_logits(SHAPE))
    with pytest.raises(error):
        fastopt.cross_entropy(logits, target, **keywords)
    with pytest.raises(error):
        fastopt.linear_cross_entropy(logits, torch.ones(7, 7), target, **keywords)


@pytest.mark.stock
def test_modules_refuse_a_learned_scale() -> None:
    scale = torch.ones((), requires_grad=True)
    logits, target = make_logits(SHAPE), make_target(make_logits(SHAPE))
    for module in (fastopt.CrossEntropyLoss(), fastopt.LinearCrossEntropyLoss(7, 7)):
        module.logit_scale = 1
        module(logits, target)
        module.logit_scale = scale
        with pytest.raises(TypeError, match="logit_scale"):
            module(logits, target)


@pytest.mark.stock
def test_errors_that_are_stocks() -> None:
    logits, target = make_logits(SHAPE), make_target(make_logits(SHAPE))
    for wrong in (target.int(), target[1:], target.unsqueeze(1)):
        with pytest.raises(Exception) as stock:
            F.cross_entropy(logits, wrong)
        with pytest.raises(stock.type):
            fastopt.cross_entropy(logits, wrong, softcap=1.0)
    target[3] = 7

    def linear(x: Tensor, t: Tensor, **keywords: Any) -> Any:
        return fastopt.linear_cross_entropy(x, torch.ones(7, 7), t, **keywords)

    for loss in (fastopt.cross_entropy, linear):
        for keywords in ({"softcap": 1.0}, {"denominator": 2}, {"return_stats": True}):
            with pytest.raises(IndexError):
                loss(logits, target, **keywords)
    with pytest.raises(TypeError):
        fastopt.cross_entropy(logits, target, inplace=1)
