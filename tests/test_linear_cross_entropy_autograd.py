"""linear_cross_entropy under everything that torch does with gradients, graphs and transforms."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastopt
import served
from accuracy import assert_same_bits
from cross_entropy_cases import REDUCTIONS
from fastopt.loss import _COMPILES_GRADIENTS
from linear_cross_entropy_cases import (
    PARAMETERS,
    SHAPES,
    composition,
    leaves_of,
    make_call,
    small_chunks,  # noqa: F401
)
from test_cross_entropy_ops import ops_reached

pytestmark = pytest.mark.usefixtures("small_chunks")
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
SHAPE = SHAPES[4]  # several chunks and a tail

Loss = Callable[..., Tensor]


def compare(
    compute: Callable[[Loss, dict[str, Any], list[Tensor]], Any],
    call: dict[str, Any],
    by_torch: bool = False,
) -> None:
    """Run `compute(loss function, call, leaves)` with ours and with the composition in float64."""
    with served.linear_cross_entropy.answered(by_torch):
        ours = compute(fastopt.linear_cross_entropy, *leaves_of(call))
    doubled = {
        n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for n, v in call.items()
    }
    exact = compute(composition, *leaves_of(doubled))
    assert len(ours) == len(exact)
    for a, b in zip(ours, exact, strict=True):
        scale = b.abs().max().item() + 1e-30
        torch.testing.assert_close(a.double(), b, rtol=0, atol=4e-6 * scale)


@each_reduction
def test_the_loss_in_the_middle_of_a_graph(reduction: str) -> None:
    def step(loss_of: Loss, call: dict[str, Any], leaves: list[Tensor]) -> list[Tensor]:
        loss = loss_of(**{**call, "input": call["input"].tanh()})
        objective = (loss**2).sum() + 0.1 * loss.mean() + call["linear_weight"].square().sum()
        return [loss, *torch.autograd.grad(objective, leaves)]

    compare(step, make_call(SHAPE, ignored=0.3, reduction=reduction))


@each_reduction
def test_several_backwards_of_one_graph(reduction: str) -> None:
    """What is done to a gradient changes neither the graph nor the next gradient."""

    def backwards(loss_of: Loss, call: dict[str, Any], leaves: list[Tensor]) -> list[Tensor]:
        loss = loss_of(**call)
        found = []
        for factor in (1.0, -2.0, 1.0):
            up = torch.full_like(loss, factor)
            grads = torch.autograd.grad(loss, leaves, up, retain_graph=factor != 0)
            found += [grad.clone() for grad in grads]
            for grad in grads:
                grad.zero_()
        return [*found, *torch.autograd.grad(loss, leaves, torch.ones_like(loss))]

    compare(backwards, make_call(SHAPE, ignored=0.3, reduction=reduction))


@each_reduction
def test_gradients_accumulate(reduction: str) -> None:
    def accumulate(loss_of: Loss, call: dict[str, Any], leaves: list[Tensor]) -> list[Any]:
        for factor in (1.0, 0.5, 1.0):
            (loss_of(**call).sum() * factor).backward()
        return [leaf.grad for leaf in leaves]

    compare(accumulate, make_call(SHAPE, ignored=0.3, reduction=reduction))


@each_reduction
def test_some_of_the_inputs(reduction: str) -> None:
    def some(loss_of: Loss, call: dict[str, Any], leaves: list[Tensor]) -> list[Tensor]:
        found = []
        for leaf in leaves:
            found += torch.autograd.grad(loss_of(**call).sum(), leaf)
        return found

    compare(some, make_call(SHAPE, reduction=reduction))


def test_a_second_backward_without_retain_graph_raises() -> None:
    for reduction in REDUCTIONS:
        call, _ = leaves_of(make_call(SHAPE, reduction=reduction))
        loss = fastopt.linear_cross_entropy(**call).sum()
        loss.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()


@each_reduction
@pytest.mark.parametrize("changed", ["input", "linear_weight", "target"])
def test_what_a_graph_needs_may_not_change(changed: str, reduction: str) -> None:
    """As in torch: an optimizer's step between forward and backward is an error."""
    call, leaves = leaves_of(make_call(SHAPE, reduction=reduction))
    loss = fastopt.linear_cross_entropy(**call).sum()
    with torch.no_grad():
        call[changed].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaves)


def test_weights_tied_with_an_embedding() -> None:
    """First and second derivatives: of the head and of the rows that come out of it."""

    def tied(loss_of: Loss, call: dict[str, Any], leaves: list[Tensor]) -> list[Tensor]:
        table = leaves[1]
        found: list[Tensor] = []
        for reduction in REDUCTIONS:
            x = table[call["target"].flip(0)]
            loss = loss_of(x, table, call["target"], reduction=reduction).sum()
            found += torch.autograd.grad(loss, table, retain_graph=True)
            (grad,) = torch.autograd.grad(loss, table, create_graph=True)
            found += [grad, *torch.autograd.grad(grad.square().sum(), table)]
        return found

    compare(tied, make_call(SHAPE))


@each_reduction
@pytest.mark.parametrize("kind", ["labels", "probabilities"])
def test_a_gradient_penalty(kind: str, reduction: str) -> None:
    """create_graph=True, then a loss of the gradients; also after a first, ordinary backward."""

    def penalty(loss_of: Loss, call: dict[str, Any], leaves: list[Tensor]) -> list[Tensor]:
        loss = loss_of(**call)
        up = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
        up.requires_grad_()
        plain = torch.autograd.grad(loss, leaves, up, retain_graph=True)
        grads = torch.autograd.grad(loss, leaves, up, create_graph=True)
        total = sum(grad.square().sum() for grad in grads) + loss.sum()
        return [*plain, *grads, *torch.autograd.grad(total, [*leaves, up])]

    call = make_call(
        SHAPE,
        ignored=0.3,
        probabilities=kind == "probabilities",
        weight="random",
        label_smoothing=0.1,
        reduction=reduction,
    )
    compare(penalty, call)


def test_second_derivatives_under_autocast() -> None:
    call, leaves = leaves_of(make_call(SHAPE, ignored=0.3))
    rounded = {n: v.bfloat16().float() if n in PARAMETERS else v for n, v in call.items()}
    exact, exact_leaves = leaves_of(rounded)
    with torch.autocast("cpu", torch.bfloat16):
        loss = fastopt.linear_cross_entropy(**call)
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
    expected = torch.autograd.grad(composition(**exact), exact_leaves, create_graph=True)
    for ours, right in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-5)


def test_gradcheck() -> None:
    call = make_call((5, 3, 4), torch.float64, weight="random", label_smoothing=0.1, ignored=0.3)
    for reduction in REDUCTIONS:

        def loss_of(*leaves: Tensor, reduction: str = reduction) -> Tensor:
            parameters = dict(zip(PARAMETERS, leaves, strict=True))
            return fastopt.linear_cross_entropy(**{**call, **parameters, "reduction": reduction})

        leaves = [call[name].clone().requires_grad_() for name in PARAMETERS]
        assert torch.autograd.gradcheck(loss_of, leaves, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(loss_of, leaves)


@each_reduction
def test_transforms_of_torch(reduction: str) -> None:
    def transforms(loss_of: Loss, call: dict[str, Any], leaves: list[Tensor]) -> list[Tensor]:
        x, w = (leaf.detach() for leaf in leaves[:2])

        def f(w: Tensor) -> Tensor:
            return loss_of(x, w, call["target"], reduction=reduction).sum()

        return [
            torch.func.grad(f)(w),
            torch.func.jvp(f, (w,), (w.cos(),))[1],
            torch.func.vmap(f)(torch.stack([w, 2 * w])),
        ]

    compare(transforms, make_call(SHAPE), by_torch=True)


@each_reduction
def test_batched_upstream_gradients(reduction: str) -> None:
    def batched(loss_of: Loss, call: dict[str, Any], leaves: list[Tensor]) -> list[Tensor]:
        loss = loss_of(**call)
        ups = torch.linspace(-1, 1, 3 * loss.numel(), dtype=loss.dtype).view(3, *loss.shape)
        return list(torch.autograd.grad(loss, leaves, ups, is_grads_batched=True))

    compare(batched, make_call(SHAPE, ignored=0.3, reduction=reduction))


@each_reduction
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Callable[[], Any], reduction: str) -> None:
    call, _ = leaves_of(make_call(SHAPE, ignored=0.3, reduction=reduction))
    with mode():
        ours = fastopt.linear_cross_entropy(**call)
        assert ours.is_inference() == composition(**call).is_inference()
    assert not ours.requires_grad
    torch.testing.assert_close(ours, composition(**call).detach())


def test_inference_tensors_in_training_raise_as_in_torch() -> None:
    call, _ = leaves_of(make_call(SHAPE))
    with torch.inference_mode():
        call["input"] = call["input"] * 1
    for loss_of in (composition, fastopt.linear_cross_entropy):
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
            loss_of(**call)


@each_reduction
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpoint(use_reentrant: bool, reduction: str) -> None:
    call, leaves = leaves_of(make_call(SHAPE, reduction=reduction))

    def segment(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        rest = {n: v for n, v in call.items() if n not in PARAMETERS}
        return fastopt.linear_cross_entropy(x.sin(), w, linear_bias=b, **rest)

    expected = torch.autograd.grad(segment(*leaves).sum(), leaves)
    checkpoint(segment, *leaves, use_reentrant=use_reentrant).sum().backward()
    for leaf, right in zip(leaves, expected, strict=True):
        assert_same_bits(leaf.grad, right)


@each_reduction
def test_saved_tensor_hooks_are_respected(reduction: str) -> None:
    """The gradients come out of what the hooks give, and what they keep stays as it is."""
    call, leaves = leaves_of(make_call(SHAPE, ignored=0.3, reduction=reduction))
    plain = fastopt.linear_cross_entropy(**call)
    expected = torch.autograd.grad(plain, leaves, torch.full_like(plain, 3.0))
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append((tensor, tensor.detach().clone()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = fastopt.linear_cross_entropy(**call)
    grads = torch.autograd.grad(loss, leaves, torch.full_like(loss, 3.0))
    with torch.autograd.graph.save_on_cpu():
        loss = fastopt.linear_cross_entropy(**call)
    again = torch.autograd.grad(loss, leaves, torch.full_like(loss, 3.0))
    assert kept
    for tensor, copy in kept:
        assert_same_bits(tensor, copy)
    for ours, others, right in zip(grads, again, expected, strict=True):
        assert_same_bits(ours, right)
        assert_same_bits(others, right)


def test_hooks_on_tensors() -> None:
    call, leaves = leaves_of(make_call(SHAPE))
    seen = []
    inner = [leaf * 1 for leaf in leaves]
    for tensor in inner:
        tensor.register_hook(seen.append)
    parameters = dict(zip(PARAMETERS, inner, strict=True))
    fastopt.linear_cross_entropy(**{**call, **parameters}).backward()
    assert len(seen) == 3
    for leaf in leaves:
        assert any(torch.equal(leaf.grad, grad) for grad in seen)


@each_reduction
def test_a_graph_that_nobody_wants_is_freed(reduction: str) -> None:
    call, leaves = leaves_of(make_call(SHAPE, reduction=reduction))
    inner = leaves[0] * 1
    gone = weakref.ref(inner)
    loss = fastopt.linear_cross_entropy(**{**call, "input": inner})
    del inner
    gc.disable()  # no cycle may need it
    try:
        del loss
        assert gone() is None
    finally:
        gc.enable()


def test_a_loss_that_is_kept_holds_nothing_after_its_backward() -> None:
    """As in a list of losses. torch's would hold no input of a frozen head at all."""
    for frozen in ((), ("linear_weight", "linear_bias")):
        call, _ = leaves_of(make_call(SHAPE))
        for name in frozen:
            call[name].requires_grad_(False)
        inner = call["input"] * 1
        gone = weakref.ref(inner)
        loss = fastopt.linear_cross_entropy(**{**call, "input": inner})
        del inner
        loss.backward(retain_graph=True)
        loss.backward()
        gc.collect()
        assert gone() is None


def test_a_default_device_changes_nothing() -> None:
    call, _ = leaves_of(make_call(SHAPE))
    with torch.device("cpu"):
        loss = fastopt.linear_cross_entropy(**call)
    assert "_LinearLossBackward" in type(loss.grad_fn).__name__


@pytest.mark.stock
def test_function_modes_see_the_call() -> None:
    names = []

    class Recorder(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            names.append(function.__name__)
            return function(*args, **(kwargs or {}))

    with Recorder():
        fastopt.linear_cross_entropy(**make_call(SHAPE))
    assert "linear_cross_entropy" in names or "linear" in names  # before torch 2.13


# -- compilers --------------------------------------------------------------------------------------


def _eager_and_compiled(
    call: dict[str, Any], backend: str, **options: Any
) -> list[tuple[Tensor, list[Tensor]]]:
    torch._dynamo.reset()

    def loss_of(call: dict[str, Any]) -> Tensor:
        return fastopt.linear_cross_entropy(**{**call, "input": call["input"] * 1})

    compiled = torch.compile(loss_of, fullgraph=True, backend=backend, **options)
    results = []
    for function in (loss_of, compiled):
        with_leaves, leaves = leaves_of(call)
        loss = function(with_leaves)
        up = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
        results.append((loss, list(torch.autograd.grad(loss, leaves, up))))
    return results


EVERYTHING: dict[str, Any] = {"ignored": 0.3, "weight": "random", "label_smoothing": 0.1}
COMPILED: dict[str, dict[str, Any]] = {
    "mean": EVERYTHING,
    "none": {**EVERYTHING, "reduction": "none"},
    "probabilities": {"probabilities": True},
    "bfloat16": {**EVERYTHING, "dtype": torch.bfloat16},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", COMPILED)
def test_compiled_is_eager_bit_for_bit(kind: str) -> None:
    call = make_call(SHAPE, **COMPILED[kind])
    results = []
    reached = ops_reached(lambda: results.extend(_eager_and_compiled(call, "aot_eager")))
    (loss, grads), (compiled_loss, compiled_grads) = results
    if _COMPILES_GRADIENTS:
        assert_same_bits(compiled_loss, loss)
        for ours, right in zip(compiled_grads, grads, strict=True):
            assert_same_bits(ours, right)
    else:
        torch.testing.assert_close(compiled_loss, loss)
    assert "linear_cross_entropy" in reached


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "reduction"), [("inductor", "mean"), ("aot_eager", "none")])
def test_compile_dynamic_shapes(backend: str, reduction: str) -> None:
    torch._dynamo.reset()
    step = torch.compile(
        lambda x, w, t: fastopt.linear_cross_entropy(x * 1, w, t, reduction=reduction),
        backend=backend,
        fullgraph=True,
        dynamic=True,
    )
    for rows in (29, 28, 9):
        call, leaves = leaves_of(make_call((rows, 8, 7), bias=False, ignored=0.3))
        arguments = call["input"], call["linear_weight"], call["target"]
        ours, right = step(*arguments), composition(*arguments, reduction=reduction)
        torch.testing.assert_close(ours, right)
        for a, b in zip(
            torch.autograd.grad(ours.sum() * 3, leaves),
            torch.autograd.grad(right.sum() * 3, leaves),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_compile_a_module_under_autocast_without_gradients() -> None:
    torch._dynamo.reset()
    module = fastopt.LinearCrossEntropyLoss(8, 7, bias=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    call = make_call(SHAPE)
    for reduced in (None, torch.bfloat16):
        with torch.no_grad(), torch.autocast("cpu", reduced, enabled=reduced is not None):
            ours = compiled(call["input"], call["target"])
            assert_same_bits(ours, module(call["input"], call["target"]))


@pytest.mark.slow
def test_a_kept_compiled_graph_gives_its_gradients_twice() -> None:
    torch._dynamo.reset()
    call, leaves = leaves_of(make_call(SHAPE))
    for reduction in ("mean", "none"):
        compiled = torch.compile(lambda call: fastopt.linear_cross_entropy(**call))
        loss = compiled({**call, "reduction": reduction}).sum()
        first = torch.autograd.grad(3 * loss, leaves, retain_graph=True)
        second = torch.autograd.grad(loss, leaves)
        for a, b in zip(first, second, strict=True):
            torch.testing.assert_close(a, 3 * b)


CHANGED = {
    "weight of a frozen input": ("input", "linear_weight"),
    "bias": ("", "linear_bias"),
    "input of a frozen head": ("linear_weight linear_bias", "input"),
}


@pytest.mark.parametrize("change", CHANGED)
def test_what_torchs_graph_does_not_hold_may_change(change: str) -> None:
    """As in a linear probe, whose head steps between the loss and its gradient."""
    frozen, changed = CHANGED[change]
    grads = []
    for loss_function in (fastopt.linear_cross_entropy, composition):
        call, _ = leaves_of(make_call(SHAPE))
        for name in frozen.split():
            call[name].requires_grad_(False)
        if changed == "input":
            call["input"] = call["input"] * 1
            call["input"].retain_grad()
        loss = loss_function(**call)
        with torch.no_grad():
            call[changed].mul_(0.5)
        loss.backward()
        grads.append(
            {name: x.grad for name, x in call.items() if isinstance(x, Tensor) and x.requires_grad}
        )
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name])


def test_a_second_derivative_notices_what_changed() -> None:
    call, _ = leaves_of(make_call(SHAPE))
    call["input"].requires_grad_(False)
    loss = fastopt.linear_cross_entropy(**call)
    with torch.no_grad():
        call["linear_bias"].mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, call["linear_weight"], create_graph=True)
