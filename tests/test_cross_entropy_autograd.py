"""cross_entropy under everything that torch does with gradients, graphs and transforms."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastopt
import served
from accuracy import assert_as_accurate, assert_same_bits
from cross_entropy_cases import (
    DTYPES,
    EVERYTHING,
    OPTIONS,
    REDUCTIONS,
    Options,
    check,
    check_options,
    dtype_name,
    make_logits,
    make_probabilities,
    make_target,
    make_weight,
)
from fastopt.loss import _COMPILES_GRADIENTS
from test_cross_entropy_ops import ops_reached

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)

LossFunction = Callable[..., Tensor]


def compare(
    compute: Callable[[LossFunction, Tensor], Tensor | tuple[Tensor, ...]],
    logits: Tensor,
    by_torch: bool = False,
) -> None:
    """Run `compute(loss function, logits)` with ours and with torch's, and that in float64. Every
    call of ours has to be answered by our kernels, or, where transforms are at work, by torch.
    """
    with served.cross_entropy.answered(by_torch):
        results = [compute(fastopt.cross_entropy, logits)]
    results += [compute(F.cross_entropy, values) for values in (logits, logits.double())]
    tuples = [result if isinstance(result, tuple) else (result,) for result in results]
    for index, (ours, stock, exact) in enumerate(zip(*tuples, strict=True)):
        assert_as_accurate(ours, stock, exact.double(), f"result {index}")


def gradient(logits: Tensor, loss_of: Callable[[Tensor], Tensor]) -> Tensor:
    """The .grad that loss_of(leaf).backward() leaves behind."""
    leaf = logits.detach().requires_grad_()
    loss_of(leaf).backward()
    assert leaf.grad is not None
    return leaf.grad


# -- upstream gradients -----------------------------------------------------------------------------

# No infinity: p - 1 may cancel to 0 in float32 alone, and 0 * inf is NaN.
SCALAR_UPSTREAMS = [1.0, 1.75, -3.0, 0.0, 1e-3, 2.0**14, float("nan")]


@each_dtype
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("value", SCALAR_UPSTREAMS)
def test_scalar_upstream(value: float, reduction: str, dtype: torch.dtype) -> None:
    def upstream(loss: Tensor) -> Tensor:
        return torch.full_like(loss, value)

    for shape in [(33, 10), (5, 1000), (2, 21, 17)]:
        logits = make_logits(shape, dtype)
        check_options(logits, OPTIONS["smoothing"], reduction=reduction, upstream=upstream)
        probabilities = make_probabilities(logits)
        check(logits, probabilities, reduction=reduction, upstream=upstream)


@each_dtype
@pytest.mark.parametrize(
    "upstream",
    [
        lambda loss: torch.tensor(-0.5, dtype=loss.dtype).expand(loss.shape),
        lambda loss: torch.arange(loss.shape[0], dtype=loss.dtype).view(-1, 1).expand(loss.shape),
        lambda loss: torch.arange(2 * loss.numel(), dtype=loss.dtype)[::2].view(loss.shape) / 64,
        lambda loss: torch.arange(loss.numel(), dtype=loss.dtype).view(loss.shape[::-1]).t() / 64,
        lambda loss: torch.zeros_like(loss),
    ],
    ids=["one-value-expanded", "expanded-over-positions", "sliced", "transposed", "zeros"],
)
def test_upstream_per_row(upstream: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    for shape in [(3, 21, 17), (2, 300, 1), (1, 5, 33)]:
        logits = make_logits(shape, dtype)
        check_options(logits, EVERYTHING, reduction="none", upstream=upstream)
        probabilities = make_probabilities(logits)
        check(logits, probabilities, reduction="none", upstream=upstream)


def test_half_gradients_survive_a_scaler() -> None:
    """A gradient below float16's range has to meet the scale before it is rounded."""
    logits = (make_logits((4096, 64)) / 2).half()
    target = make_target(logits)
    scaled = gradient(logits, lambda leaf: 2.0**12 * fastopt.cross_entropy(leaf, target))
    stock = gradient(logits, lambda leaf: 2.0**12 * F.cross_entropy(leaf, target))
    exact = gradient(logits.double(), lambda leaf: 2.0**12 * F.cross_entropy(leaf, target))
    assert_as_accurate(scaled, stock, exact)


@each_reduction
def test_the_loss_in_the_middle_of_a_graph(reduction: str) -> None:
    weights = make_logits((33, 10)) / 8
    target = make_target(make_logits((64, 10)))

    def training_step(loss_function: LossFunction, inputs: Tensor) -> tuple[Tensor, ...]:
        layer = weights.to(inputs.dtype).requires_grad_()
        inputs = inputs.detach().requires_grad_()
        loss = loss_function((inputs @ layer).tanh(), target, reduction=reduction)
        objective = (loss**2).sum() + 0.1 * loss.mean()
        return (loss, *torch.autograd.grad(objective, [inputs, layer]))

    compare(training_step, make_logits((64, 33)))


# -- one graph, used more than once -----------------------------------------------------------------


@each_dtype
@each_reduction
def test_several_backwards_of_one_graph(reduction: str, dtype: torch.dtype) -> None:
    """The first backward must leave nothing behind that changes the second, whatever its factor."""
    logits = make_logits((33, 10), dtype)
    target = make_target(logits)

    def three_backwards(loss_function: LossFunction, logits: Tensor) -> tuple[Tensor, ...]:
        leaf = logits.detach().requires_grad_()
        loss = loss_function(leaf, target, reduction=reduction)
        return tuple(
            torch.autograd.grad(loss, leaf, torch.full_like(loss, factor), retain_graph=True)[0]
            for factor in (1.0, -2.0, 0.5, 1.0)
        )

    compare(three_backwards, logits)


@each_dtype
@each_reduction
def test_gradients_accumulate(reduction: str, dtype: torch.dtype) -> None:
    logits = make_logits((33, 10), dtype)
    target = make_target(logits)

    def accumulate(loss_function: LossFunction, logits: Tensor) -> Tensor:
        leaf = logits.detach().requires_grad_()
        for factor in (1.0, 0.5):
            (loss_function(leaf, target, reduction=reduction).sum() * factor).backward()
        loss = loss_function(leaf, target, reduction=reduction).sum()
        loss.backward(retain_graph=True)
        loss.backward()
        assert leaf.grad is not None
        return leaf.grad

    compare(accumulate, logits)


def test_changing_grad_in_place_does_not_change_the_graph() -> None:
    """Optimizers and clipping write into .grad: it must not be what a kept graph still needs."""
    logits = make_logits((33, 10))
    target = make_target(logits)
    for reduction in ("mean", "sum"):
        leaf = logits.detach().requires_grad_()
        loss = fastopt.cross_entropy(leaf, target, reduction=reduction)
        loss.backward(retain_graph=True)
        first = leaf.grad.clone()
        leaf.grad.zero_()
        loss.backward()
        assert_same_bits(leaf.grad, first)

        leaf = logits.detach().requires_grad_()
        loss = fastopt.cross_entropy(leaf, target, reduction=reduction)
        loss.backward(torch.tensor(3.0), retain_graph=True)
        leaf.grad = None
        (again,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        again.zero_()
        (again,) = torch.autograd.grad(loss, leaf)
        assert_same_bits(again, first)


@each_reduction
def test_a_second_backward_without_retain_graph_raises(reduction: str) -> None:
    logits = make_logits((33, 10)).requires_grad_()
    loss = fastopt.cross_entropy(logits, make_target(logits), reduction=reduction).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@each_dtype
def test_several_losses_on_the_same_logits(dtype: torch.dtype) -> None:
    logits = make_logits((33, 10), dtype)
    target = make_target(logits)
    other = make_target(logits, seed=9)

    def two_heads(loss_function: LossFunction, logits: Tensor) -> tuple[Tensor, ...]:
        leaf = logits.detach().requires_grad_()
        inner = leaf * 1
        first = loss_function(inner, target)
        second = loss_function(inner, other, reduction="sum", label_smoothing=0.1)
        third = loss_function(inner, target, reduction="none").mean()
        probabilities = inner.softmax(1).square().sum()
        first.backward(retain_graph=True)
        alone = leaf.grad.clone()
        (second + third + probabilities).backward()
        return alone, leaf.grad

    compare(two_heads, logits)


# -- inputs changed after forward -------------------------------------------------------------------


@pytest.mark.parametrize("upstream", [1.0, 2.5])
@pytest.mark.parametrize("changed", ["logits", "target", "weight"])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@each_reduction
def test_inputs_changed_after_forward(
    reduction: str, kind: str, changed: str, upstream: float
) -> None:
    """The gradient is that of the values at the time of the call, or torch's error."""
    leaf = make_logits((33, 10)).requires_grad_()
    inputs = {"logits": leaf * 1, "weight": make_weight(10, torch.float32)}
    inputs["target"] = make_target(leaf) if kind == "indices" else make_probabilities(leaf.detach())
    loss = fastopt.cross_entropy(
        inputs["logits"], inputs["target"], weight=inputs["weight"], reduction=reduction
    )
    stock = F.cross_entropy(
        leaf, inputs["target"].clone(), weight=inputs["weight"].clone(), reduction=reduction
    )
    with torch.no_grad():
        inputs[changed].zero_()
    try:
        (ours,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, upstream))
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        (expected,) = torch.autograd.grad(stock, leaf, torch.full_like(stock, upstream))
        torch.testing.assert_close(ours, expected)


def test_softmax_before_the_loss_keeps_its_own_saved_output() -> None:
    """A loss that wrote its gradient over the logits would corrupt what softmax saved."""
    target = make_target(make_logits((33, 10)))

    def softmax_then_loss(loss_function: LossFunction, logits: Tensor) -> Tensor:
        return gradient(logits, lambda leaf: loss_function(leaf.softmax(1), target))

    compare(softmax_then_loss, make_logits((33, 10)))


# -- modes ------------------------------------------------------------------------------------------


@each_dtype
@each_reduction
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("is_leaf", [True, False], ids=["leaf", "plain"])
def test_without_gradients(
    is_leaf: bool, mode: Callable[[], object], reduction: str, dtype: torch.dtype
) -> None:
    logits = make_logits((33, 10), dtype).requires_grad_(is_leaf)
    before = logits.detach().clone()
    target = make_target(logits)
    with mode():
        ours = fastopt.cross_entropy(logits, target, reduction=reduction)
        stock = F.cross_entropy(logits, target, reduction=reduction)
    assert not ours.requires_grad and ours.grad_fn is None
    assert ours.is_inference() == stock.is_inference()
    exact = F.cross_entropy(logits.detach().double(), target, reduction=reduction)
    assert_as_accurate(ours, stock, exact)
    assert_same_bits(logits, before)


def test_inference_tensors_in_training() -> None:
    with torch.inference_mode():
        logits = make_logits((33, 10))
    target = make_target(logits)
    assert torch.allclose(fastopt.cross_entropy(logits, target), F.cross_entropy(logits, target))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_name)
@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
@each_reduction
def test_autocast(reduction: str, autocast_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """torch computes the whole loss in float32 there; the gradient keeps the logits' dtype."""
    logits = make_logits((33, 10), dtype)
    for target in (make_target(logits), make_probabilities(logits)):
        for weight in (None, make_weight(10, torch.float32)):

            def autocast_loss(
                loss_function: LossFunction,
                logits: Tensor,
                target: Tensor = target,
                weight: Tensor | None = weight,
            ) -> tuple[Tensor, Tensor]:
                leaf = logits.detach().requires_grad_()
                if leaf.dtype == torch.float64:  # autocast would round the oracle's input
                    target = target.double() if target.is_floating_point() else target
                    weight = None if weight is None else weight.double()
                with torch.autocast("cpu", autocast_dtype, enabled=leaf.dtype != torch.float64):
                    loss = loss_function(leaf, target, weight=weight, reduction=reduction)
                (grad,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, 1.5))
                return loss, grad

            compare(autocast_loss, logits)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@each_reduction
def test_checkpoint(reduction: str, use_reentrant: bool) -> None:
    layer = make_logits((33, 10)) / 8
    target = make_target(make_logits((64, 10)))

    def checkpointed(loss_function: LossFunction, inputs: Tensor) -> Tensor:
        def segment(inputs: Tensor) -> Tensor:
            hidden = inputs @ layer.to(inputs.dtype)
            return loss_function(hidden, target, reduction=reduction, label_smoothing=0.1)

        return gradient(
            inputs, lambda leaf: checkpoint(segment, leaf, use_reentrant=use_reentrant).sum()
        )

    compare(checkpointed, make_logits((64, 33)))


def test_saved_tensor_hooks_are_respected() -> None:
    """Offloading tools replace what a graph saves: the gradient has to come out of what they give."""
    logits = make_logits((33, 10))
    target = make_target(logits)
    for reduction in REDUCTIONS:
        packed = []

        def pack(tensor: Tensor, packed: list[Tensor] = packed) -> Tensor:
            packed.append(tensor)
            return tensor.clone()

        leaf = logits.detach().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = fastopt.cross_entropy(leaf, target, reduction=reduction)
        assert packed
        (ours,) = torch.autograd.grad(loss.sum(), leaf)
        leaf = logits.detach().requires_grad_()
        plain = fastopt.cross_entropy(leaf, target, reduction=reduction)
        (expected,) = torch.autograd.grad(plain.sum(), leaf)
        assert_same_bits(ours, expected)


def test_a_tensor_hook_on_the_logits_sees_the_gradient() -> None:
    logits = make_logits((33, 10)).requires_grad_()
    inner = logits * 1
    seen = []
    inner.register_hook(seen.append)
    fastopt.cross_entropy(inner, make_target(logits)).backward()
    assert len(seen) == 1
    assert_same_bits(seen[0], logits.grad)


# -- higher derivatives and transforms --------------------------------------------------------------

SMALL = (4, 3)


def _double_call(options: Options, reduction: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    logits = make_logits(SMALL, torch.float64) / 4
    target, keywords = options.apply(logits, make_target(logits))

    def loss_of(logits: Tensor) -> Tensor:
        return fastopt.cross_entropy(logits, target, reduction=reduction, **keywords)

    return loss_of, logits.requires_grad_()


@each_reduction
@pytest.mark.parametrize("options", ["plain", "weight", "smoothing", "ignored-smoothing-weight"])
def test_gradcheck_and_gradgradcheck(options: str, reduction: str) -> None:
    loss_of, logits = _double_call(OPTIONS[options], reduction)
    assert torch.autograd.gradcheck(loss_of, logits, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss_of, logits)


@pytest.mark.stock
@each_reduction
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 2)], ids=dtype_name)
def test_gradgradcheck_of_probabilities(shape: tuple[int, ...], reduction: str) -> None:
    logits = (make_logits(shape, torch.float64) / 4).requires_grad_()
    target = make_probabilities(logits.detach()).requires_grad_()
    weight = make_weight(shape[0 if len(shape) == 1 else 1], torch.float64).requires_grad_()

    def loss_of(*inputs: Tensor) -> Tensor:
        return fastopt.cross_entropy(*inputs, reduction=reduction, label_smoothing=0.1)

    def unweighted(*inputs: Tensor) -> Tensor:
        return fastopt.cross_entropy(*inputs, reduction=reduction)

    assert torch.autograd.gradcheck(loss_of, (logits, target, weight))
    assert torch.autograd.gradgradcheck(loss_of, (logits, target, weight))
    assert torch.autograd.gradcheck(unweighted, (logits, target), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(unweighted, (logits, target))


@each_dtype
@each_reduction
def test_a_gradient_penalty(reduction: str, dtype: torch.dtype) -> None:
    """create_graph=True, then a loss of the gradient; also after a first, ordinary backward."""
    target = make_target(make_logits((33, 10)))

    def penalty(loss_function: LossFunction, logits: Tensor) -> tuple[Tensor, ...]:
        leaf = logits.detach().requires_grad_()
        loss = loss_function(leaf, target, reduction=reduction, label_smoothing=0.1).sum()
        (plain,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
        return plain, grad, torch.autograd.grad(grad.square().sum() + loss, leaf)[0]

    compare(penalty, make_logits((33, 10), dtype) / 4)


@each_reduction
def test_the_second_derivative_of_rows_that_are_all_ignored(reduction: str) -> None:
    """0, also where the mean divides 0 by 0."""
    x = make_logits((33, 10)).requires_grad_()
    for options in (OPTIONS["all-ignored"], OPTIONS["all-ignored-smoothing-weight"]):
        target, keywords = options.apply(x.detach(), make_target(x.detach()))
        loss = fastopt.cross_entropy(x, target, reduction=reduction, **keywords).sum()
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), x)
        assert_same_bits(second.abs(), torch.zeros_like(x))


def test_gradient_of_the_upstream_gradient() -> None:
    """backward is linear in its upstream gradient, and differentiable in it."""
    target = make_target(make_logits((33, 10)))
    for reduction in REDUCTIONS:

        def through(
            loss_function: LossFunction, logits: Tensor, reduction: str = reduction
        ) -> Tensor:
            leaf = logits.detach().requires_grad_()
            loss = loss_function(leaf, target, reduction=reduction)
            upstream = torch.ones_like(loss).requires_grad_()
            (grad,) = torch.autograd.grad(loss, leaf, upstream, create_graph=True)
            return torch.autograd.grad(grad.square().sum(), upstream)[0]

        compare(through, make_logits((33, 10)))


@each_reduction
def test_torch_func(reduction: str) -> None:
    target = make_target(make_logits((7, 5)))

    def transforms(loss_function: LossFunction, logits: Tensor) -> tuple[Tensor, ...]:
        def loss_of(logits: Tensor, target: Tensor = target) -> Tensor:
            return loss_function(logits, target, reduction=reduction).sum()

        tangent = torch.ones_like(logits)
        per_sample = torch.func.vmap(torch.func.grad(lambda row, label: loss_of(row, label)))
        loss, derivative = torch.func.jvp(loss_of, (logits,), (tangent,))
        _, pullback = torch.func.vjp(loss_of, logits)
        return (
            torch.func.grad(loss_of)(logits),
            torch.func.grad(lambda x: torch.func.grad(loss_of)(x).square().sum())(logits),
            per_sample(logits, target),
            torch.func.vmap(lambda x: loss_of(x))(torch.stack([logits, logits * 2])),
            loss,
            derivative,
            pullback(torch.tensor(2.0, dtype=logits.dtype))[0],
            torch.func.hessian(loss_of)(logits),
            torch.func.jacrev(loss_of)(logits),
            torch.func.jacfwd(loss_of)(logits),
        )

    compare(transforms, make_logits((7, 5)), by_torch=True)


@each_reduction
def test_forward_mode(reduction: str) -> None:
    target = make_target(make_logits((7, 5)))

    def tangents(loss_function: LossFunction, logits: Tensor) -> tuple[Tensor, ...]:
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(logits, torch.ones_like(logits).cumsum(1))
            loss = loss_function(dual, target, reduction=reduction, label_smoothing=0.1)
            primal, tangent = torch.autograd.forward_ad.unpack_dual(loss)
            assert tangent is not None
            probabilities = torch.autograd.forward_ad.make_dual(
                logits.softmax(1), torch.ones_like(logits).cumsum(0)
            )
            through_target = loss_function(logits, probabilities, reduction=reduction)
            other = torch.autograd.forward_ad.unpack_dual(through_target).tangent
            assert other is not None
            return primal.clone(), tangent.clone(), other.clone()

    compare(tangents, make_logits((7, 5)), by_torch=True)


def test_functional_jacobian_and_hessian() -> None:
    target = make_target(make_logits((4, 5)))

    def matrices(loss_function: LossFunction, logits: Tensor) -> tuple[Tensor, ...]:
        def rows(logits: Tensor) -> Tensor:
            return loss_function(logits, target, reduction="none")

        def mean(logits: Tensor) -> Tensor:
            return loss_function(logits, target)

        return (
            torch.autograd.functional.jacobian(rows, logits),
            torch.autograd.functional.jacobian(rows, logits, vectorize=True),
            torch.autograd.functional.hessian(mean, logits),
        )

    compare(matrices, make_logits((4, 5)))


@each_reduction
def test_batched_upstream_gradients(reduction: str) -> None:
    target = make_target(make_logits((7, 5)))

    def batched(loss_function: LossFunction, logits: Tensor) -> Tensor:
        leaf = logits.detach().requires_grad_()
        loss = loss_function(leaf, target, reduction=reduction)
        upstreams = torch.stack([torch.full_like(loss, factor) for factor in (1.0, -2.0, 0.25)])
        return torch.autograd.grad(loss, leaf, upstreams, is_grads_batched=True)[0]

    compare(batched, make_logits((7, 5)))


# -- compilers --------------------------------------------------------------------------------------


def _compiled_step(
    loss_function: LossFunction, backend: str, dynamic: bool | None = None
) -> Callable[..., tuple[Tensor, Tensor]]:
    torch._dynamo.reset()

    def loss_of(logits: Tensor, target: Tensor, **keywords: object) -> Tensor:
        return loss_function(logits * 1, target, **keywords)

    compiled = torch.compile(loss_of, fullgraph=True, backend=backend, dynamic=dynamic)

    def step(logits: Tensor, target: Tensor, **keywords: object) -> tuple[Tensor, Tensor]:
        leaf = logits.detach().requires_grad_()
        loss = compiled(leaf, target, **keywords)
        return loss, torch.autograd.grad(loss, leaf, torch.full_like(loss, 1.5))[0]

    return step


def _check_step(
    step: Callable[..., tuple[Tensor, Tensor]], logits: Tensor, target: Tensor, **keywords: object
) -> None:
    eager = []
    for values in (logits, logits.double()):
        leaf = values.detach().requires_grad_()
        others = {
            name: value.to(values.dtype) if isinstance(value, Tensor) else value
            for name, value in keywords.items()
        }
        labels = target.to(values.dtype) if target.is_floating_point() else target
        loss = F.cross_entropy(leaf, labels, **others)
        eager.append((loss, torch.autograd.grad(loss, leaf, torch.full_like(loss, 1.5))[0]))
    for ours, stock, exact in zip(step(logits, target, **keywords), *eager, strict=True):
        assert_as_accurate(ours, stock, exact)
    assert bool(ops_reached(lambda: step(logits, target, **keywords))) == _COMPILES_GRADIENTS


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@each_reduction
def test_compile_aot_eager(reduction: str, dtype: torch.dtype) -> None:
    for shape in [(33, 10), (2, 21, 5, 7)]:
        logits = make_logits(shape, dtype)
        target, keywords = EVERYTHING.apply(logits, make_target(logits))
        step = _compiled_step(fastopt.cross_entropy, "aot_eager")
        _check_step(step, logits, target, reduction=reduction, **keywords)
        _check_step(step, logits, make_probabilities(logits), reduction=reduction)


@pytest.mark.slow
def test_compile_dynamic_shapes() -> None:
    step = _compiled_step(fastopt.cross_entropy, "aot_eager", dynamic=True)
    for rows, classes in [(33, 10), (5, 1000), (64, 17)]:
        logits = make_logits((rows, classes))
        _check_step(step, logits, make_target(logits), label_smoothing=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_inductor(reduction: str) -> None:
    logits = make_logits((33, 10))
    target, keywords = EVERYTHING.apply(logits, make_target(logits))
    step = _compiled_step(fastopt.cross_entropy, "inductor")
    _check_step(step, logits, target, reduction=reduction, **keywords)
    transposed = logits.t().contiguous().t()
    _check_step(step, transposed, make_probabilities(logits), reduction=reduction)


@pytest.mark.slow
def test_compile_module_without_gradients() -> None:
    torch._dynamo.reset()
    logits = make_logits((33, 10))
    target = make_target(logits)
    module = fastopt.CrossEntropyLoss(weight=make_weight(10, torch.float32))
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="inductor")
    with torch.no_grad():
        assert_same_bits(compiled(logits, target), module(logits, target))


@pytest.mark.slow
def test_export() -> None:
    logits = make_logits((33, 10))
    target = make_target(logits)
    exported = torch.export.export(fastopt.CrossEntropyLoss(), (logits, target)).module()
    torch.testing.assert_close(exported(logits, target), F.cross_entropy(logits, target))


def test_a_default_device_changes_nothing() -> None:
    # It is a torch function mode, and users set it in the first line of their scripts.
    logits = make_logits((64, 100), torch.bfloat16)
    target = make_target(logits)
    with torch.device("cpu"):
        loss = fastopt.cross_entropy(logits.requires_grad_(), target)
    assert torch.equal(loss, fastopt.cross_entropy(logits, target))
    assert "_LossBackward" in type(loss.grad_fn).__name__


@pytest.mark.stock
def test_other_function_modes_see_the_call() -> None:
    calls = []

    class Recorder(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            calls.append(function)
            return function(*args, **(kwargs or {}))

    logits = make_logits((64, 100))
    with Recorder():
        fastopt.cross_entropy(logits, make_target(logits))
    assert F.cross_entropy in calls
