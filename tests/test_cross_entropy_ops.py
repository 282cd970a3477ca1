"""torch.ops.fastopt.cross_entropy_*: who is served by them, their contract, and nonsense."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

import fastopt
import fastopt.backends
import fastopt.ops
from accuracy import assert_same_bits
from cross_entropy_cases import (
    DTYPES,
    LAYOUTS_ND,
    REDUCTIONS,
    contiguous,
    differentiate,
    dtype_name,
    make_logits,
    make_probabilities,
    make_target,
    make_weight,
)
from fastopt import reference
from fastopt.options import Options

OPS = ["cross_entropy_forward", "cross_entropy_forward_backward"]
# One for each kernel: rows, rows that keep no exponentials in scratch, few long rows, few classes,
# classes apart.
INTO_SHAPES = [(5, 1000), (9, 65537), (2, 40000), (300, 10), (2, 21, 9, 7)]
REDUCTION_NUMBERS = {"none": 0, "mean": 1, "sum": 2}


def ops_reached(call: Callable[[], object]) -> set[str]:
    """The names of our ops that run during the call, as the profiler saw them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    prefix = "fastopt::"
    names = {event.name for event in profile.events()}
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}


# -- who is served ----------------------------------------------------------------------------------


def test_kernels_serve() -> None:
    """Without this, the suite could pass by comparing torch with itself."""
    assert fastopt.backends.CPU_LIBRARY is not None, fastopt.backends.CPU_LIBRARY_ERROR
    assert fastopt.backends.ALWAYS, "run the suite with FASTOPT_ALWAYS=1"
    logits = make_logits((4, 10)).requires_grad_()
    target = make_target(logits)
    assert ops_reached(lambda: fastopt.cross_entropy(logits, target).backward())
    assert not ops_reached(lambda: F.cross_entropy(logits, target).backward())


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_the_whole_grid_is_served(kind: str, reduction: str, dtype: torch.dtype) -> None:
    for shape in [(10,), (1, 1), (4, 10), (3, 65), (2, 5, 7), (2, 5, 3, 2), (2, 5, 2, 2, 2)]:
        for layout in LAYOUTS_ND if len(shape) == 4 else LAYOUTS_ND[:1]:
            logits = layout(make_logits(shape, dtype))
            target = make_target(logits) if kind == "indices" else make_probabilities(logits)
            weight = make_weight(logits.shape[0 if len(shape) == 1 else 1], dtype)
            for options in ({}, {"weight": weight, "label_smoothing": 0.1}):
                options["reduction"] = reduction
                evaluate = functools.partial(fastopt.cross_entropy, logits, target, **options)
                train = functools.partial(
                    differentiate, fastopt.cross_entropy, logits, target, **options
                )
                evaluation, training = ops_reached(evaluate), ops_reached(train)
                assert evaluation == {"cross_entropy_forward"}, (shape, layout.__name__)
                assert "cross_entropy_forward_backward" in training, (shape, layout.__name__)


@pytest.mark.stock
def test_what_is_not_ours_goes_to_torch() -> None:
    logits = make_logits((4, 10))
    target = make_target(logits)

    class Subclass(Tensor):
        pass

    def forward_mode() -> None:
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(logits, torch.ones_like(logits))
            fastopt.cross_entropy(dual, target)

    for name, call in {
        "subclass": lambda: fastopt.cross_entropy(logits.as_subclass(Subclass), target),
        "byte target": lambda: fastopt.cross_entropy(logits, target.byte()),
        "meta": lambda: fastopt.cross_entropy(logits.to("meta"), target.to("meta")),
        "functorch": lambda: torch.func.grad(lambda x: fastopt.cross_entropy(x, target))(logits),
        "vmap": lambda: torch.func.vmap(fastopt.cross_entropy)(logits[None], target[None]),
        "forward mode": forward_mode,
    }.items():
        assert not ops_reached(call), name


# -- the contract -----------------------------------------------------------------------------------


def arguments(
    logits: Tensor,
    target: Tensor,
    reduction: str = "mean",
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> dict[str, object]:
    """Valid arguments of both ops, by name."""
    if weight is not None:
        weight = weight.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    return {
        "logits": logits,
        "target": target,
        "weight": weight,
        "ignore_index": -100,
        "label_smoothing": label_smoothing,
        "reduction": REDUCTION_NUMBERS[reduction],
        "loss_dtype": logits.dtype,
        "lse_square_scale": 0.0,
    }


def call_op(op: str, keywords: dict[str, object]) -> object:
    return getattr(torch.ops.fastopt, op)(**keywords)


def test_these_are_all_the_ops() -> None:
    names = torch._C._dispatch_get_all_op_names()
    registered = {name.removeprefix("fastopt::") for name in names if name.startswith("fastopt::")}
    times = {"cross_entropy_times", "linear_cross_entropy_times"}
    linear = {"linear_cross_entropy", "linear_cross_entropy_rows"}
    others = {"cross_entropy_forward_backward_out", "cross_entropy_scale_"}
    assert registered == {*OPS, *others, *linear, *times}
    assert registered == {*fastopt.ops.SCHEMAS, *linear, *times}
    for op in (*fastopt.ops.SCHEMAS, *linear):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastopt::{op}", "CPU")


@pytest.mark.parametrize("op", OPS)
def test_options_follow_the_tensors_in_their_order(op: str) -> None:
    names = [argument.name for argument in getattr(torch.ops.fastopt, op).default._schema.arguments]
    assert names[3 : 3 + len(Options._fields)] == list(Options._fields)


@pytest.mark.parametrize("value", [0.25, math.inf, -math.inf, math.nan])
def test_scaling_a_gradient_in_place(value: float) -> None:
    """By one factor or one for each row; inf and NaN as the definition has them."""
    op = torch.ops.fastopt.cross_entropy_scale_
    for shape in [(10,), (33, 10), (3, 2000), (4, 7, 9)]:
        for dtype in DTYPES:
            grad = make_logits(shape, dtype)
            labels = make_target(grad)
            labels.view(-1)[-1] = -100
            grad.masked_fill_((labels == -100).unsqueeze(min(grad.dim() - 1, 1)), 0)
            for target, smoothed in [(labels, False), (labels, True), (grad.clone(), False)]:
                accumulate = torch.float64 if dtype == torch.float64 else torch.float32
                rows = torch.full(labels.shape, 0.5, dtype=accumulate)
                rows.view(-1)[::2] = value
                for factor in (torch.tensor(value, dtype=accumulate), rows):
                    ours, expected = grad.clone(), grad.clone()
                    assert op(ours, factor, target, -100, smoothed) is None
                    reference.cross_entropy_scale_(expected, factor, target, -100, smoothed)
                    torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)
    grad, factor = torch.randn(3, 5), torch.tensor(0.25)
    arguments = (grad, factor, torch.tensor([0, 4, -100]), -100, False)
    torch.library.opcheck(op.default, arguments)


def test_nonsense_in_scaling_raises() -> None:
    op = torch.ops.fastopt.cross_entropy_scale_
    grad, factor, target = torch.ones(4, 10), torch.tensor(2.0), torch.zeros(4, dtype=torch.int64)
    for wrong in [
        (grad[:, ::2], factor, target),
        (torch.ones(1).expand(4, 10), factor, target),
        (grad.long(), factor, target),
        (grad, torch.ones(3), target),
        (grad, torch.ones(0), target),
        (grad, factor, target[:3]),
        (grad, factor, torch.ones(4, 9)),
        (torch.tensor(1.0), factor, torch.tensor(0)),
    ]:
        with pytest.raises(RuntimeError):
            op(*wrong, -100, False)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str, dtype: torch.dtype) -> None:
    for shape in [(2, 5, 7), (5,), (0, 5)]:
        logits = make_logits(shape, dtype)
        probabilities = make_probabilities(logits)
        weight = make_weight(shape[0 if len(shape) == 1 else 1], dtype)
        scalar = "sum" if 0 in shape else "mean"  # opcheck takes NaN for a difference
        for target in (make_target(logits), probabilities):
            for reduction in (scalar, "none"):
                keywords = arguments(logits, target, reduction, weight, 0.1)
                overload = getattr(torch.ops.fastopt, op).default
                torch.library.opcheck(overload, tuple(keywords.values()))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", LAYOUTS_ND, ids=lambda layout: layout.__name__)
def test_fakes_promise_the_layout_that_kernels_give(
    layout: Callable[[Tensor], Tensor], op: str
) -> None:
    """opcheck on views: inductor trusts the strides of the fakes."""
    for shape in [(4, 10, 3), (2, 5, 7, 3)]:
        plain = make_logits(shape), make_probabilities(make_logits(shape))
        for logits, target in [
            (layout(plain[0]), layout(plain[1])),
            (layout(plain[0]), plain[1]),
            (plain[0], layout(plain[1])),
        ]:
            keywords = arguments(logits, target, "none")
            overload = getattr(torch.ops.fastopt, op).default
            torch.library.opcheck(overload, tuple(keywords.values()), test_utils="test_faketensor")


@pytest.mark.parametrize("op", OPS)
def test_strided_arguments_are_read_where_they_are(op: str) -> None:
    logits = make_logits((6, 10, 4))
    target = make_probabilities(logits)
    weight = make_weight(10, torch.float32)
    plain = arguments(logits, target, "none", weight)
    expected = call_op(op, plain)
    for name, value in plain.items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            continue
        buffer = torch.full([2 * size + 1 for size in value.shape], float("nan"))
        window = buffer[tuple(slice(1, None, 2) for _ in value.shape)]
        window.copy_(value)
        results = call_op(op, {**plain, name: window})
        for ours, same in zip(_tuple(results), _tuple(expected), strict=True):
            torch.testing.assert_close(ours, same, msg=lambda text, name=name: f"{name}: {text}")


def _tuple(result: object) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)  # type: ignore[arg-type]


# -- nonsense ---------------------------------------------------------------------------------------

# Whatever is wrong with an argument of a direct call, it has to raise, never to read elsewhere.
# (Meta tensors are not here: they hold nothing to read, and the fakes answer for them.)
NONSENSE: dict[str, list[object]] = {
    "logits": [
        torch.tensor(1.0),
        torch.ones(4, 10, dtype=torch.int64),
        torch.ones(4, 10, dtype=torch.complex64),
        torch.ones(4, 10, dtype=torch.bool),
        torch.ones(4, 10).to_sparse(),
        torch.ones(5, 10),
        torch.ones(3, 10),
        torch.ones(4, 10, 2),
        torch.ones(4, 10, 0),
        torch.ones(10),
        torch.ones(40),
        torch.ones(4, 3),
        torch.ones(4, 0),
        torch.ones(0, 10),
    ],
    "target": [
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(5, dtype=torch.int64),
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(4, 1, dtype=torch.int64),
        torch.zeros(4, 10, dtype=torch.int64),
        torch.tensor(0),
        torch.zeros(4, dtype=torch.int32),
        torch.zeros(4, dtype=torch.uint8),
        torch.zeros(4, dtype=torch.bool),
        torch.zeros(4),
        torch.zeros(4, 9),
        torch.zeros(5, 10),
        torch.zeros(3, 10),
        torch.zeros(1, 10),
        torch.zeros(4, 10, 1),
        torch.zeros(4, 10, dtype=torch.complex64),
        torch.tensor([0, 1, 2, 10]),
        torch.tensor([-1, 1, 2, 3]),
        torch.tensor([0, 1, 2**62, 3]),
        torch.tensor([0, 1, -(2**62), 3]),
        torch.tensor([0, 2**32, 2, 3]),
    ],
    "weight": [
        torch.ones(9),
        torch.ones(11),
        torch.ones(0),
        torch.ones(1),
        torch.tensor(1.0),
        torch.ones(1, 10),
        torch.ones(10, 1),
        torch.ones(10, dtype=torch.float64),
        torch.ones(10, dtype=torch.float16),
        torch.ones(10, dtype=torch.int64),
    ],
    "reduction": [3, -1, 2**40],
    "loss_dtype": [torch.int64, torch.complex64, torch.bool],
}


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("op", OPS)
def test_nonsense_raises(op: str, kind: str) -> None:
    logits = make_logits((4, 10))
    target = make_target(logits) if kind == "indices" else make_probabilities(logits)
    valid = arguments(logits, target, "mean", torch.ones(10))
    call_op(op, valid)
    accepted = []
    for name, values in NONSENSE.items():
        for value in values:
            try:
                call_op(op, {**valid, name: value})
            except Exception:
                continue
            accepted.append((name, value))
    assert not accepted


@pytest.mark.parametrize("label", [10, -1, 2**31, 2**32, 2**62, -(2**63)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("op", OPS)
def test_labels_out_of_range_are_index_errors(op: str, reduction: str, label: int) -> None:
    for shape in [(4, 10), (2, 10, 5), (10,), (3000, 10)]:
        logits = make_logits(shape)
        target = make_target(logits)
        keywords = arguments(logits, target, reduction)
        bad = target.clone()
        bad.view(-1)[-1] = label
        with pytest.raises(IndexError, match=f"Target {label} is out of bounds"):
            call_op(op, {**keywords, "target": bad})


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_gradients_of_rows_in_units(dtype: torch.dtype) -> None:
    """What the op returns, whatever the face makes of it."""
    logits = make_logits((4, 10), dtype)
    target = make_target(logits)
    keywords = arguments(logits, target)
    for reduction in (0, 1, 2):
        loss, grad, unit = call_op(
            "cross_entropy_forward_backward", {**keywords, "reduction": reduction}
        )
        assert unit.dtype == torch.float32 and unit.dim() == 0
        divisor = 4 if reduction == 1 else 1
        assert unit.item() == (pytest.approx(2.0**-13 / divisor) if dtype == torch.float16 else 1)
        x = logits.to(torch.float64, copy=True).requires_grad_()
        exact = F.cross_entropy(x, target, reduction=("none", "mean", "sum")[reduction])
        exact.sum().backward()
        off = (grad.double() * unit.double() - x.grad).abs().max() / x.grad.abs().max()
        assert off < 2 * torch.finfo(dtype).eps
        assert (loss - exact).abs().max() < 4 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", INTO_SHAPES, ids=dtype_name)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_go_where_the_caller_wants_them(
    reduction: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Also over the logits themselves."""
    for layout in [contiguous, *(LAYOUTS_ND if len(shape) == 4 else [])]:
        logits = layout(make_logits(shape, dtype))
        weight = make_weight(shape[1], dtype)
        for target in (make_target(logits), make_probabilities(logits)):
            keywords = arguments(logits, target, reduction, weight, 0.1)
            loss, grad, unit = torch.ops.fastopt.cross_entropy_forward_backward(**keywords)
            over = torch.empty_strided(shape, grad.stride(), dtype=dtype).copy_(logits)
            apart = torch.full((*shape, 3), math.nan, dtype=dtype)[..., 1]
            for out in (torch.full_like(grad, math.nan), apart, over):
                if out is over:
                    keywords["logits"] = over
                others = torch.ops.fastopt.cross_entropy_forward_backward_out(
                    **keywords, largest_mass=None, grad_logits=out
                )
                # In another layout another kernel may serve; very long rows over the logits compute
                # their exponentials twice.
                same = out.stride() == grad.stride() and not (out is over and shape[1] > 1 << 16)
                compare = assert_same_bits if same else assert_close
                for ours, other in ((others[0], loss), (others[1], unit), (out, grad)):
                    compare(ours, other)
            assert apart._base is not None and apart._base[..., ::2].isnan().all()


def test_gradients_go_to_no_memory_that_is_not_theirs() -> None:
    memory = make_logits((2, 2, 5, 3, 4)).view(-1)
    logits = memory[:120].view(2, 5, 3, 4)
    keywords = arguments(logits, make_target(logits))
    wrong = {
        "shape": torch.empty(2, 5, 4, 3),
        "fewer": torch.empty(2, 5, 12),
        "dtype": torch.empty(2, 5, 3, 4, dtype=torch.float64),
        "expanded": torch.empty(2, 5, 1, 1).expand(2, 5, 3, 4),
        "overlapping": torch.empty(500).as_strided((2, 5, 3, 4), (60, 12, 3, 1)),
        "positions that are no run": torch.empty(2, 5, 3, 8)[..., :4],
        "logits in another layout": logits.view(2, 5, 4, 3).transpose(2, 3),
        "a part of logits": memory[60:180].view(2, 5, 3, 4),
    }
    for name, out in wrong.items():
        with pytest.raises(RuntimeError):
            torch.ops.fastopt.cross_entropy_forward_backward_out(
                **keywords, largest_mass=None, grad_logits=out
            )
            pytest.fail(name)
    probabilities = make_probabilities(logits)
    with pytest.raises(RuntimeError, match="share no memory"):
        torch.ops.fastopt.cross_entropy_forward_backward_out(
            **arguments(logits, probabilities), largest_mass=None, grad_logits=probabilities
        )


def test_direct_calls_change_nothing() -> None:
    logits = make_logits((4, 10))
    for target in (make_target(logits), make_probabilities(logits)):
        for op in OPS:
            keywords = arguments(logits, target, "mean", torch.rand(10), 0.1)
            before = {
                name: value.clone() for name, value in keywords.items() if isinstance(value, Tensor)
            }
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                call_op(op, keywords)
            for name, copy in before.items():
                assert_same_bits(keywords[name], copy, name)  # type: ignore[arg-type]
