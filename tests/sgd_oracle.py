"""What the SGD tests share: the option grid, the sizes, and runs of an optimizer that can be compared bit by bit.

The oracle is torch's for-loop (foreach=False, fused=False): the only one of torch's three CPU
implementations without a known defect. Half dtypes are held against the same loop in float64.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

import fastopt
import served

EXACT_DTYPES = (torch.float32, torch.float64)
HALF_DTYPES = (torch.bfloat16, torch.float16)
DTYPES = EXACT_DTYPES + HALF_DTYPES
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# Around every vector width (4 to 64 elements, unrolled or not) every tail occurs: 0 and 1, one below,
# at and one above 8, 16, 32, 64; then sizes of several vectors.
SMALL_SIZES = (0, 1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 1000)
# One below, at and one above what is worth a second thread.
LARGE_SIZES = (65535, 65536, 65537)

FLAGS: dict[str, dict[str, bool | None]] = {
    "default": {},
    "for_loop": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


def _option_grid() -> dict[str, dict[str, Any]]:
    grid = {}
    for rule, momentum in {
        "plain": {},
        "momentum": {"momentum": 0.9},
        "damped": {"momentum": 0.9, "dampening": 0.3},
        "nesterov": {"momentum": 0.9, "nesterov": True},
    }.items():
        for weight_decay in (0, 0.01):
            for maximize in (False, True):
                name = rule + ("_decay" if weight_decay else "") + ("_max" if maximize else "")
                grid[name] = {
                    "lr": 0.1,
                    **momentum,
                    "weight_decay": weight_decay,
                    "maximize": maximize,
                }
    return grid


OPTIONS = _option_grid()
# The branch that uses every operand: what a test takes that cannot afford the grid.
FULL = OPTIONS["nesterov_decay_max"]
DAMPED = OPTIONS["damped_decay"]


@lru_cache(maxsize=2048)  # both sides of every comparison, and most tests, ask for the same ones
def _normal(numel: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(numel, generator=generator, dtype=torch.float64)


def values(shape: int | Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal values in float64, rounded once to `dtype`: the same for every dtype and every call."""
    size = (shape,) if isinstance(shape, int) else tuple(shape)
    return _normal(math.prod(size), seed).to(dtype, copy=True).view(size)


def leaf(value: Tensor) -> Tensor:
    return value.detach().clone().requires_grad_()


class Meddling(Tensor):
    """A subclass that does nothing, but that its update by torch runs `act`, once: any Python."""

    act: Any = None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        if cls.act is not None and func is Tensor.add_:
            act, cls.act = cls.act, None
            act()
        return result


SHAPES: list[tuple[int, ...]] = [(5,), (4, 8), (67,), (), (2, 3, 3)]


def some_params() -> list[Tensor]:
    return [leaf(values(shape, seed=i)) for i, shape in enumerate(SHAPES)]


def leaf_of_ones() -> Tensor:
    return torch.ones(2, requires_grad=True)


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(BITS[tensor.element_size()])


def assert_same_bits(ours: Tensor, theirs: Tensor, what: str = "") -> None:
    """Equal dtype, shape and bits; only the payload of a NaN is free."""
    assert type(ours) is type(theirs), what
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), what
    ours, theirs = ours.detach(), theirs.detach()
    if ours.is_complex():
        ours, theirs = torch.view_as_real(ours), torch.view_as_real(theirs)
    if torch.equal(bits(ours), bits(theirs)):
        return
    differ = (bits(ours) != bits(theirs)) & ~(ours.isnan() & theirs.isnan()).contiguous()
    if differ.any():
        first = differ.nonzero()[0].tolist()
        raise AssertionError(
            f"{what}: {int(differ.sum())} of {ours.numel()} elements differ, first at {first}: "
            f"{ours[tuple(first)].item()!r} instead of {theirs[tuple(first)].item()!r}"
        )


def for_loop(params: Iterable[Any], **options: Any) -> torch.optim.SGD:
    """torch's for-loop, whatever implementation the options ask for."""
    return torch.optim.SGD(params, **{**options, "foreach": False, "fused": False})


@dataclass
class Snapshot:
    """Every parameter and momentum buffer of an optimizer (None where there is no buffer)."""

    params: list[Tensor]
    buffers: list[Tensor | None]


def all_params(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def snapshot(optimizer: torch.optim.Optimizer) -> Snapshot:
    params = all_params(optimizer)
    buffers = [optimizer.state.get(p, {}).get("momentum_buffer") for p in params]
    return Snapshot(
        [p.detach().clone() for p in params],
        [None if b is None else b.detach().clone() for b in buffers],
    )


def assert_same_state(
    ours: torch.optim.Optimizer | Snapshot,
    theirs: torch.optim.Optimizer | Snapshot,
    what: str = "",
) -> None:
    ours = ours if isinstance(ours, Snapshot) else snapshot(ours)
    theirs = theirs if isinstance(theirs, Snapshot) else snapshot(theirs)
    assert len(ours.params) == len(theirs.params), what
    for i, (p, q) in enumerate(zip(ours.params, theirs.params, strict=True)):
        assert_same_bits(p, q, f"{what} param {i}")
    for i, (b, c) in enumerate(zip(ours.buffers, theirs.buffers, strict=True)):
        assert (b is None) == (c is None), f"{what} buffer {i}: {b} instead of {c}"
        if b is not None and c is not None:
            assert_same_bits(b, c, f"{what} buffer {i}")


def set_grads(params: Sequence[Tensor], seed: int) -> None:
    """Fresh gradients in each parameter's own layout, the same for the same seed."""
    for i, p in enumerate(params):
        grad = torch.empty_like(p.detach())
        p.grad = grad.copy_(values(p.shape, p.dtype, seed=1000 * seed + i + 1))


def train(
    optimizer: torch.optim.Optimizer,
    steps: int = 3,
    before_step: Callable[[int], None] | None = None,
    first_seed: int = 1,
    by_torch: bool | None = False,
) -> list[Snapshot]:
    """`steps` steps on gradients that depend only on the step and the parameter's position.

    Those of fastopt.SGD have to be our kernels' alone, unless torch is meant to take some parameters;
    None: whoever does.
    """
    history = []
    for step in range(steps):
        set_grads(all_params(optimizer), seed=first_seed + step)
        if before_step is not None:
            before_step(step)
        is_ours = isinstance(optimizer, fastopt.SGD)
        with served.sgd.answered(by_torch) if is_ours else nullcontext():
            optimizer.step()
        history.append(snapshot(optimizer))
    return history


def train_on_some(make: Any, **options: Any) -> list[Snapshot]:
    """Ten steps in which each parameter has a gradient now and then: the first and the last begin
    late."""
    generator = torch.Generator().manual_seed(1)
    present = torch.rand(10, 12, generator=generator) < 0.4
    present[:5, 11] = present[:5, 0] = False
    optimizer = make([leaf(values(20 + n, seed=n)) for n in range(12)], **options)

    def mask(step: int) -> None:
        for p, has_grad in zip(all_params(optimizer), present[step], strict=True):
            p.grad = p.grad if has_grad else None

    return train(optimizer, steps=10, before_step=mask)


def train_distributed(make: Any, mesh: Any, **options: Any) -> list[Tensor]:
    """Three steps of a plain parameter beside DTensors of every placement: all parameters, then
    their momentum buffers, whole."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    params = [leaf(values(21))] + [
        torch.nn.Parameter(distribute_tensor(values((4, 6), seed=k), mesh, [placement]))
        for k, placement in enumerate((Shard(0), Shard(1), Replicate()))
    ]
    optimizer = make(params, **options)
    for step in range(3):
        for p in params:
            grad = values(p.shape, seed=step)
            p.grad = grad if p is params[0] else distribute_tensor(grad, mesh, p.placements)
        versions = [p._version for p in params]
        optimizer.step()
        assert [p._version for p in params] == [v + 1 for v in versions]
    buffers = [optimizer.state[p]["momentum_buffer"] for p in params]
    assert type(buffers[0]) is Tensor
    for param, buffer in zip(params[1:], buffers[1:], strict=True):
        assert type(buffer) is DTensor and buffer.placements == param.placements
    whole = (t.full_tensor() if isinstance(t, DTensor) else t for t in params + buffers)
    return [t.detach() for t in whole]


def assert_same_history(ours: list[Snapshot], theirs: list[Snapshot], what: str = "") -> None:
    assert len(ours) == len(theirs)
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert_same_state(a, b, f"{what} step {step}")


def outcome(call: Callable[[], Any]) -> Any:
    """What a call returns, or the class and words of what it raises: to compare two libraries."""
    try:
        return call()
    except Exception as error:
        return type(error), str(error)


def class_or_value(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        return type(error)


def assert_same(run: Callable[[Any], Any], what: str = "") -> Any:
    """`run` of an optimizer's class returns tensors, in lists, or whatever else can be compared."""
    ours, theirs = class_or_value(lambda: run(fastopt.SGD)), class_or_value(lambda: run(for_loop))
    _compare(ours, theirs, what)
    return theirs


def _compare(ours: Any, theirs: Any, what: str) -> None:
    if isinstance(theirs, (list, tuple)):
        assert type(ours) is type(theirs) and len(ours) == len(theirs), what
        for i, (mine, stock) in enumerate(zip(ours, theirs, strict=True)):
            _compare(mine, stock, f"{what} {i}")
    elif isinstance(theirs, Tensor):
        assert isinstance(ours, Tensor), (what, ours)
        assert_same_bits(ours.detach().resolve_neg(), theirs.detach().resolve_neg(), what)
    else:
        assert ours == theirs, what
