"""The one error budget of this suite: as accurate as torch in the same dtype, measured in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The longest chain of roundings in torch's own float64, but for sums over classes: a few operations
# on each element, and the sum over rows, which torch makes in 8 levels of (for 65,536 rows) 4
# additions each.
_FLOAT64_ROUNDINGS = 8 + 8 * 4


def assert_as_accurate(
    ours: Tensor,
    stock: Tensor,
    exact: Tensor,
    what: str = "result",
    classes: int = 0,
    products: int = 0,
) -> None:
    """Check |ours - exact| <= 2 * (|stock - exact| + one rounding) for every element.

    Args:
        ours: what fastopt computed.
        stock: what torch computed from the same inputs in the same dtype.
        exact: what torch computed from the same inputs converted to float64.
        what: the name to report.
        classes: over how many classes torch had to sum, which it does one by one.
        products: over how many products a matrix product of torch's had to sum, on either side, in an
            order that depends on its size: their roundings add up as a random walk.

    One rounding is eps(dtype) * max|exact|, or the dtype's smallest step where that is larger.
    In half precision |stock - exact| is the element's own: computed in float32 and rounded once,
    ours needs no more. In float32 and float64 it depends on luck which element suffers from a
    sequence of roundings, so it is the largest of the tensor, and at least one rounding. float64
    results are checked against torch's own float64, whose error cannot be seen: it is what the
    roundings of its longest chain can add up to, half an eps each, of a number around 1 where the
    result itself is smaller. (Against 80-bit arithmetic, gradients of 10,000 smoothed classes were
    677 eps off in torch, and 2.4 eps in our kernels for AVX2 and baseline.)

    NaN and infinity have to stand where `exact`, rounded to the dtype, has them and nowhere else:
    where stock overflows but the exact value fits, ours has to fit.
    """
    assert ours.dtype == stock.dtype, f"{what}: dtype {ours.dtype}, torch has {stock.dtype}"
    assert ours.shape == stock.shape, f"{what}: shape {ours.shape}, torch has {stock.shape}"
    assert ours.device == stock.device, f"{what}: device {ours.device}, torch has {stock.device}"
    assert exact.dtype == torch.float64 and exact.shape == ours.shape
    ours, stock, exact = ours.detach(), stock.detach(), exact.detach()

    rounded = exact.to(ours.dtype)
    finite = rounded.isfinite()
    misplaced = ~torch.where(finite, ours.isfinite(), _same(ours, rounded))
    assert not misplaced.any(), _report(what, misplaced, ours, stock, exact)
    if not finite.any():
        return

    info = torch.finfo(ours.dtype)
    scale = exact[finite].abs().max().item()
    rounding = max(info.eps * scale, info.smallest_normal * info.eps)
    error = torch.where(finite, (ours.double() - exact).abs(), 0.0)
    stock_error = torch.where(finite & stock.isfinite(), (stock.double() - exact).abs(), 0.0)
    if ours.dtype == torch.float32:
        stock_error = stock_error.max().clamp(min=rounding) + math.sqrt(products) * rounding / 2
    elif ours.dtype == torch.float64:
        # What went in is around 1 even where the result is tiny: log(1 + e), p - 1.
        roundings = _FLOAT64_ROUNDINGS + classes
        stock_error = stock_error.max() + roundings * info.eps / 2 * max(scale, 1.0)
    too_far = error > 2 * (stock_error + rounding)
    assert not too_far.any(), _report(what, too_far, ours, stock, exact)


def _same(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | (a.isnan() & b.isnan())


def _report(what: str, wrong: Tensor, ours: Tensor, stock: Tensor, exact: Tensor) -> str:
    """Where the first wrong element stands and what each side has there."""
    at = tuple(wrong.nonzero()[0].tolist())
    return (
        f"{what} {tuple(ours.shape)} {ours.dtype}: {int(wrong.sum())} of {wrong.numel()} elements "
        f"outside the budget, the first at {at}: ours {ours[at].item()!r}, "
        f"torch {stock[at].item()!r}, exact {exact[at].item()!r}"
    )


def assert_same_bits(ours: Tensor, other: Tensor, what: str = "result") -> None:
    """Check that two tensors agree in every bit: dtype, shape, signed zeros and NaN included."""
    assert ours.dtype == other.dtype, f"{what}: {ours.dtype} and {other.dtype}"
    assert ours.shape == other.shape, f"{what}: {ours.shape} and {other.shape}"
    same = _bytes(ours) == _bytes(other)
    assert same.all(), f"{what}: {int((~same).sum())} of {same.numel()} bytes differ"


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
