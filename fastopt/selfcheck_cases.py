"""What selfcheck.py runs on a GPU: small cases of both ops, straight through the launchers, and what
is right about them: reference.py, and the rule of csrc/rules/sgd.h, on the CPU in float64.
"""

from collections.abc import Callable, Iterator
from itertools import chain, product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastopt import layouts, ops, reference
from fastopt.options import MEAN, NONE, SUM, Options
from fastopt.sgd import launch
from fastopt.sgd.table import ELEMENTS, Groups, Launch, SgdRow

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Wrong(Exception):
    """A value that is not the right one."""


# Roundings that may add up between a result and the largest numbers that went into it: partial sums
# over classes, exp, the options. A kernel that is wrong is off by more.
_ROUNDINGS = 256


def _compare(
    what: str, ours: Tensor, exact: Tensor, size: Tensor | float, unit: float = 1.0
) -> None:
    """Check ours * unit against exact: rounded to its dtype once, and computed from numbers of this
    size in the accumulation type."""
    info = torch.finfo(ours.dtype)
    eps = info.eps if ours.dtype == torch.float64 else torch.finfo(torch.float32).eps
    budget = info.eps * (exact.abs() + info.smallest_normal * unit) + _ROUNDINGS * eps * size
    value = ours.cpu().double() * unit
    wrong = ~((value - exact).abs() <= budget)  # NaN too
    if wrong.any():
        first = tuple(wrong.nonzero()[0].tolist())
        count = f"{int(wrong.sum())} of {wrong.numel()} values wrong"
        raise Wrong(f"{what}: {count}: {value[first].item():.6g}, not {exact[first].item():.6g}")


def _pattern(*shape: int) -> Tensor:
    """Numbers in [0, 1) without an order, float64, and without torch's random generators."""
    i = torch.arange(torch.Size(shape).numel(), dtype=torch.float64, device="cpu")
    return ((i + 1).mul(12.9898).sin() * 43758.5453).frac().abs().view(shape)


class _Case(NamedTuple):
    shape: tuple[int, ...]
    reduction: int
    weighted: bool = False
    smoothing: float = 0.0
    probabilities: bool = False


# Of Triton's kernels, each specialisation of which takes a second to compile: a block holds a row,
# takes several sweeps, is of positions.
_TRITON_CASES = [
    _Case((9, 1000), MEAN, weighted=True, smoothing=0.1),
    _Case((3, 50257), MEAN),
    _Case((2, 21, 33), MEAN),
]
# Of the CUDA library's: packed, rows that one block or a cluster holds, strided.
_CASES = [
    *_TRITON_CASES,
    _Case((33, 10), MEAN),
    _Case((33, 10), SUM, weighted=True, smoothing=0.1),
    _Case((33, 10), MEAN, probabilities=True),
    _Case((9, 1000), NONE),
    _Case((9, 1000), SUM, weighted=True, smoothing=0.1, probabilities=True),
    _Case((2, 131072), SUM, weighted=True, smoothing=0.1),
    _Case((2, 21, 33), NONE, weighted=True, smoothing=0.1),
    _Case((2, 21, 33), SUM, probabilities=True),
]


def _check_cross_entropy(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    for case in _TRITON_CASES if launch.family() == "triton" else _CASES:
        _check_loss(case, device, dtype)
        yield


def _check_loss(case: _Case, device: torch.device, dtype: torch.dtype) -> None:
    what = f"{'x'.join(map(str, case.shape))}, {case[1:]}"
    options = Options(-100, case.smoothing, case.reduction, dtype, 0.01 * case.weighted)
    logits, target, weight = _inputs(case, dtype, options.ignore_index)

    inputs = logits.double(), target, None if weight is None else weight.double()
    if case.probabilities:
        inputs = inputs[0], target.double(), inputs[2]
    in_float64 = options._replace(loss_dtype=torch.float64)
    exact_loss, exact_grad, _ = reference.cross_entropy_forward_backward(*inputs, in_float64)
    problem = reference._problem(*inputs, in_float64)
    mass = torch.where(problem.live, problem.q, 0).abs()
    size_of_grad = exact_grad.abs() + 2 * mass / (
        problem.total_weight if case.reduction == MEAN else 1
    )
    # |x| and the log of a sum; of all rows, if it is one.
    size_of_loss = 20.0 * (mass.numel() // mass.shape[problem.dim] if case.reduction == SUM else 1)

    logits, target = logits.to(device), target.to(device)
    weight = None if weight is None else weight.to(device)
    largest = torch.tensor(2.0, dtype=torch.float32, device=device)  # no row's mass is larger
    loss = ops.cross_entropy_forward(logits, target, weight, *options)
    _compare(f"loss alone of {what}", loss, exact_loss, size_of_loss)
    loss, grad, unit = ops.cross_entropy_forward_backward(
        logits, target, weight, *options, largest if dtype == torch.float16 else None
    )
    _compare(f"loss of {what}", loss, exact_loss, size_of_loss)
    _compare(f"gradient of {what}", grad, exact_grad, size_of_grad, unit.item())
    if case.reduction != NONE:
        right = 0.375 * grad.to("cpu", torch.float64)
        factor = (largest * 0.1875).to(_accumulated(dtype))
        ops.cross_entropy_scale_(grad, factor, target, options.ignore_index, options.smoothed)
        _compare(f"scaled gradient of {what}", grad, right, right.abs())


def _inputs(
    case: _Case, dtype: torch.dtype, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits, target and weight, on the CPU."""
    shape = torch.Size(case.shape)
    dim = layouts.class_dim(shape)
    classes, rows = shape[dim], layouts.row_shape(shape)
    logits = (_pattern(*shape) * 12 - 6).to(dtype)
    weight = (_pattern(classes) + 0.25).to(_accumulated(dtype)) if case.weighted else None
    if case.probabilities:
        return logits, (_pattern(*shape) * 4).softmax(dim).to(dtype), weight
    target = (torch.arange(rows.numel(), device="cpu") * 7919 + classes - 1) % classes
    if len(target) > 2:
        target[1::4] = ignore_index
    return logits, target.view(rows), weight


def _accumulated(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# lr, momentum, dampening, weight_decay, nesterov, maximize, foreach, fused
_GROUPS = [
    (0.1, 0, 0, 0, False, False, None, None),
    (0.1, 0.9, 0.5, 0.01, False, False, None, None),
    (0.1, 0.9, 0, 0.01, True, True, None, None),
    (0.3, 0.9, 0, 0, False, False, None, None),  # this lr lies on the device
]
# grad_scale and found_inf of each step: the first one, of which momentum buffers hold nothing yet, a
# later one, one that overflowed, one that is scaled.
_STEPS = [(None, None), (None, None), (4.0, 1.0), (4.0, 0.0)]


def _check_sgd(device: torch.device, dtype: None) -> Iterator[None]:
    """Parameters of every dtype under all options, of several blocks and off their alignment."""
    lr = torch.tensor(_GROUPS[-1][0], dtype=torch.float64, device=device)
    groups = Groups((*chain(*_GROUPS[:-1]), lr, *_GROUPS[-1][1:]), device)
    cases = [*product(DTYPES, range(len(_GROUPS)), [(9001, 0), (33, 1)])]
    tensors = [[((_pattern(size + start) * 2 - 1) * k).to(device, of)[start:] for k in (1, 0.5, 0)]
               for of, _, (size, start) in cases]  # fmt: skip
    started = torch.zeros(len(cases) + 1, dtype=torch.int32, device=device)
    rows = (SgdRow * len(cases))()
    for row, (of, group, _), (param, grad, buffer) in zip(rows, cases, tensors, strict=True):
        row.param, row.grad, row.numel = param.data_ptr(), grad.data_ptr(), param.numel()
        row.momentum_buffer = buffer.data_ptr() if _GROUPS[group][1] else None
        row.group, row.element = group, ELEMENTS[of]
    for step, numbers in enumerate(_STEPS):
        scale, inf = (
            None if x is None else torch.tensor([x], dtype=torch.float32, device=device)
            for x in numbers
        )
        before = [[x.to("cpu", torch.float64, copy=True) for x in row] for row in tensors]
        kept: list[Any] = [*groups.kept]
        launch.enqueue(Launch(rows, groups, started, scale, inf, device, False, kept))
        for case, after, old in zip(cases, tensors, before, strict=True):
            exact, size = old, 0.0
            if not numbers[1]:
                exact, size = _exact_step(_GROUPS[case[1]], old, numbers[0] or 1.0, step == 0)
            for part, ours, right in zip(("param", "buffer"), after[::2], exact[::2], strict=True):
                what = f"{part} of {case[2][0]} {case[0]}, options {case[1]}, step {step}"
                _compare(what, ours, right, size)
        yield


def _exact_step(
    group: Any, tensors: list[Tensor], scale: float, first: bool
) -> tuple[list[Tensor], Any]:
    """What csrc/rules/sgd.h says, and the size of the numbers that it adds up."""
    lr, momentum, dampening, weight_decay, nesterov, maximize = map(float, group[:6])
    param, grad, buffer = tensors
    size = param.abs() + grad.abs() + buffer.abs()
    g = (-grad if maximize else grad) / scale + weight_decay * param
    if momentum:
        buffer = g if first else momentum * buffer + (1 - dampening) * g
        g = g + momentum * buffer if nesterov else buffer
    return [param - lr * g, grad, buffer], size


CHECKS: dict[str, Callable[..., Iterator[None]]] = {
    "cross_entropy": _check_cross_entropy,
    "sgd": _check_sgd,
}
