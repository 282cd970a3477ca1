"""torch.ops.fastopt.linear_cross_entropy: its contract, the reference, nonsense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastopt
import fastopt.ops
from accuracy import assert_same_bits
from cross_entropy_cases import DTYPES, dtype_name
from fastopt import reference
from fastopt.options import REDUCTIONS, Options
from linear_cross_entropy_cases import (
    PARAMETERS,
    SHAPES,
    leaves_of,
    make_call,
    small_chunks,  # noqa: F401
)
from test_cross_entropy_ops import ops_reached

pytestmark = pytest.mark.usefixtures("small_chunks")
SHAPE = SHAPES[4]
OP = torch.ops.fastopt.linear_cross_entropy


def arguments(
    shape: tuple[int, int, int] = SHAPE,
    dtype: torch.dtype = torch.float32,
    reduction: str = "mean",
    rows: bool = False,
    **kind: Any,
) -> dict[str, Any]:
    """Valid arguments of the op, by name; with `rows` those of a backward of reduction none."""
    call = make_call(shape, dtype, **kind)
    weight = call.get("weight")
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        **{name: call.get(name) for name in PARAMETERS},
        "target": call["target"],
        "weight": None if weight is None else weight.to(accumulate),
        "grad_loss": torch.linspace(-1, 2, shape[0], dtype=dtype) if rows else None,
        "ignore_index": -100,
        "label_smoothing": call.get("label_smoothing", 0.0),
        "reduction": REDUCTIONS["none" if rows else reduction],
        "loss_dtype": dtype,
        "lse_square_scale": 0.0,
        "dtype": dtype,
        "accumulate": accumulate,
        "rows": 0,
        "wants_input": True,
        "wants_weight": True,
        "wants_bias": True,
    }


KINDS: dict[str, dict[str, Any]] = {
    "mean": {"ignored": 0.3, "weight": "random", "label_smoothing": 0.1},
    "sum": {"reduction": "sum", "bias": False},
    "none": {"reduction": "none", "ignored": 0.3},
    "rows": {"rows": True, "ignored": 0.3},
    "probabilities": {"probabilities": True},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("kind", KINDS)
def test_the_loop_is_the_reference(kind: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        call = arguments(shape, dtype, **KINDS[kind])
        values = list(call.values())
        end = 6 + len(Options._fields)
        options, others = Options(*values[6:end]), values[end:]
        ours, right = OP(**call), reference.linear_cross_entropy(*values[:6], options, *others)
        for a, b in zip(ours, right, strict=True):
            assert a.dtype is b.dtype
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_loop_serves() -> None:
    call, leaves = leaves_of(make_call(SHAPE))
    reached = ops_reached(lambda: fastopt.linear_cross_entropy(**call).backward())
    assert {"linear_cross_entropy", "cross_entropy_forward_backward_out"} <= reached
    for leaf in leaves:
        leaf.requires_grad_(False)
    reached = ops_reached(lambda: fastopt.linear_cross_entropy(**call))
    assert reached == {"linear_cross_entropy", "cross_entropy_forward"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        call = arguments(dtype=dtype, **KINDS[kind])
        torch.library.opcheck(OP.default, tuple(call.values()))
        call.update(wants_input=False, wants_bias=False, accumulate=dtype)
        torch.library.opcheck(OP.default, tuple(call.values()))
    grad, factor = torch.randn(SHAPE[0], 3), torch.tensor(0.25)
    for dtype in (torch.float32, torch.bfloat16):
        target = torch.full((SHAPE[0],), -100)
        torch.library.opcheck(
            torch.ops.fastopt.linear_cross_entropy_times.default,
            (grad, factor, target, -100, dtype),
        )


def test_options_follow_the_tensors_in_their_order() -> None:
    names = [argument.name for argument in OP.default._schema.arguments]
    assert names == list(arguments())
    assert names[6 : 6 + len(Options._fields)] == list(Options._fields)


def test_direct_calls_change_nothing() -> None:
    for kind in KINDS.values():
        call = arguments(**kind)
        before = {name: v.clone() for name, v in call.items() if isinstance(v, Tensor)}
        OP(**call)
        for name, copy in before.items():
            assert_same_bits(call[name], copy, name)


def test_a_batch_without_rows() -> None:
    """Which the face leaves to torch, but a graph with dynamic shapes may hold."""
    call = arguments((0, 8, 7))
    loss, grad_input, grad_weight, grad_bias = OP(**call)
    assert loss.isnan() and grad_input.shape == (0, 8)
    assert not grad_weight.any() and not grad_bias.any()
    assert OP(**{**call, "reduction": REDUCTIONS["none"]})[0].shape == (0,)
    assert OP(**{**call, "reduction": REDUCTIONS["sum"]})[0] == 0


N, H, C = SHAPE
NONSENSE: dict[str, list[object]] = {
    "input": [torch.ones(N, H + 1), torch.ones(N + 1, H), torch.ones(N), torch.ones(N, H, 1)],
    "linear_weight": [torch.ones(C, H + 1), torch.ones(C + 1, H), torch.ones(C), torch.ones(0, H)],
    "linear_bias": [torch.ones(C + 1), torch.ones(1), torch.ones(C, 1), torch.tensor(1.0)],
    "target": [
        torch.zeros(N + 1, dtype=torch.int64),
        torch.zeros(N - 1, dtype=torch.int64),
        torch.zeros(N, 1, dtype=torch.int64),
        torch.zeros(N, dtype=torch.int32),
        torch.zeros(N),
        torch.zeros(N, C + 1),
        torch.full((N,), C),
        torch.full((N,), -1),
        torch.full((N,), 2**62),
    ],
    "weight": [torch.ones(C + 1), torch.ones(1), torch.ones(C, 1), torch.ones(C).half()],
    "grad_loss": [torch.ones(N + 1), torch.ones(1), torch.ones(N, 1), torch.tensor(1.0)],
    "dtype": [torch.int64, torch.complex64],
    "loss_dtype": [torch.complex64],
}


def test_nonsense_raises() -> None:
    valid = arguments(weight="random", rows=True)
    OP(**valid)
    accepted = []
    for name, values in NONSENSE.items():
        for value in values:
            try:
                OP(**{**valid, name: value})
            except Exception:
                continue
            accepted.append((name, value))
    assert not accepted
