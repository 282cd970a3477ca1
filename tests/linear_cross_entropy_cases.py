"""What the tests of linear cross-entropy share: inputs, the composition that defines it, the check."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastopt
import fastopt.kernels.linear_cross_entropy as loop
import served
from accuracy import assert_as_accurate, assert_same_bits
from cross_entropy_cases import make_weight

ROWS = 8  # of a chunk, in these tests
SLICE = 256  # classes that half precision converts at a time
# (N, H, C). Rows: one, on both sides of one chunk, several chunks and a tail. Classes: one, below one
# vector, several slices; H: one, a vector, a vector and a tail.
SHAPES = [
    *((n, 8, 7) for n in (1, ROWS - 1, ROWS, ROWS + 1, 3 * ROWS + 5)),
    (3 * ROWS + 5, 1, 1),
    (3 * ROWS + 5, 33, 1000),
]
PARAMETERS = ("input", "linear_weight", "linear_bias")


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of ROWS rows, slices of SLICE classes."""
    monkeypatch.setattr(loop, "ROWS", ROWS)
    monkeypatch.setattr(loop, "SLICE", SLICE)


def composition(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    **keywords: Any,
) -> Tensor:
    """What the loss is, in torch's own functions."""
    if keywords.get("ignore_index", 0) is None:
        del keywords["ignore_index"]
    return F.cross_entropy(F.linear(input, linear_weight, linear_bias), target, **keywords)


def make_call(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = True,
    ignored: float = 0.0,
    weight: str | None = None,
    probabilities: bool = False,
    seed: int = 0,
    **keywords: Any,
) -> dict[str, Any]:
    """The keyword arguments of a call: rows of which some are sure of their class."""
    rows, features, classes = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=generator)
    w = torch.randn(classes, features, generator=generator) / features**0.5
    labels = torch.randint(classes, (rows,), generator=generator)
    x[::3] += 4 * w[labels[::3]]
    call: dict[str, Any] = {"input": x.to(dtype), "linear_weight": w.to(dtype)}
    if bias:
        call["linear_bias"] = torch.randn(classes, generator=generator).to(dtype)
    if probabilities:
        scores = torch.randn(rows, classes, generator=generator)
        call["target"] = (2 * scores).softmax(1).to(dtype)
    else:
        drop = torch.rand(rows, generator=generator) < ignored
        call["target"] = labels.masked_fill(drop, keywords.get("ignore_index", -100))
    if weight is not None:
        call["weight"] = make_weight(classes, dtype, weight)
    return {**call, **keywords}


def leaves_of(call: dict[str, Any]) -> tuple[dict[str, Any], list[Tensor]]:
    """The call with new leaves that require grad, and the leaves."""
    leaves = {n: call[n].detach().clone().requires_grad_() for n in PARAMETERS if n in call}
    return {**call, **leaves}, list(leaves.values())


def upstream_of(loss: Tensor) -> Tensor:
    """A different factor for every row, the same in every dtype."""
    generator = torch.Generator().manual_seed(5)
    return (torch.randint(-16, 17, loss.shape, generator=generator) / 8).to(loss.dtype)


def differentiate(
    function: Callable[..., Tensor],
    call: dict[str, Any],
    wanted: Sequence[str] = PARAMETERS,
    upstream: Callable[[Tensor], Tensor] = upstream_of,
) -> dict[str, Tensor]:
    """The loss and the gradients of those of `wanted` that the call has, by name."""
    call = dict(call)
    leaves = {name: call[name].detach().requires_grad_() for name in wanted if name in call}
    call.update(leaves)
    loss = function(**call)
    gradients = torch.autograd.grad(loss, list(leaves.values()), upstream(loss))
    return {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}


def exact(call: dict[str, Any], **others: Any) -> dict[str, Tensor]:
    """The same in float64, of the rows that are not ignored: a row that is might as well be absent."""
    call = {
        name: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for name, v in call.items()
    }
    target, count = call["target"], len(call["input"])
    live = torch.ones(count, dtype=torch.bool)
    if not target.is_floating_point():
        live = target != call.get("ignore_index", -100)
    of_all = differentiate(composition, {**call, "input": call["input"].nan_to_num()}, **others)
    if live.all() or not live.any():
        found = of_all
        if not live.any():
            found.update({name: torch.zeros_like(v) for name, v in found.items() if name != "loss"})
        return found
    upstream = others.pop("upstream", upstream_of)
    rows = upstream(of_all["loss"])
    some = {**call, "input": call["input"][live], "target": target[live]}
    found = differentiate(
        composition, some, **others, upstream=lambda loss: rows[live] if loss.dim() else rows
    )
    for name in ("input", "loss"):
        if name in found and found[name].dim():
            found[name] = torch.zeros_like(of_all[name]).index_put((live,), found[name])
    return found


def check(
    call: dict[str, Any], wanted: Sequence[str] = PARAMETERS, **others: Any
) -> dict[str, Tensor]:
    """Compare a call with torch's: the loss with gradients and without, dtypes, inputs untouched,
    answered by ours. Returns our result."""
    before = {name: v.clone() for name, v in call.items() if isinstance(v, Tensor)}
    with served.linear_cross_entropy.answered():
        ours = differentiate(fastopt.linear_cross_entropy, call, wanted, **others)
        alone = fastopt.linear_cross_entropy(**call)
    for name, copy in before.items():
        assert_same_bits(call[name], copy, f"{name} after the call")
    finite = {**call, "input": call["input"].nan_to_num()}
    plain = {name: v for name, v in finite.items() if name != "options"}
    stock = differentiate(composition, plain, wanted, **others)
    right = exact(
        {name: v for name, v in call.items() if name != "options"}, wanted=wanted, **others
    )
    assert_all_as_accurate(ours, stock, right, call)
    assert_all_as_accurate({"loss": alone}, stock, right, call)
    return ours


def assert_all_as_accurate(
    ours: dict[str, Tensor],
    stock: dict[str, Tensor],
    right: dict[str, Tensor],
    call: dict[str, Any],
) -> None:
    (rows, features), classes = call["input"].shape, call["linear_weight"].shape[0]
    summed = {"loss": features, "input": classes, "linear_weight": rows, "linear_bias": rows}
    for name, value in ours.items():
        assert_as_accurate(value, stock[name], right[name], name, classes, summed[name])
