"""linear_cross_entropy: values and gradients against float64, whatever the chunks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fastopt
import fastopt.kernels.linear_cross_entropy as loop
import served
from accuracy import assert_same_bits
from cross_entropy_cases import DTYPES, REDUCTIONS, dtype_name
from linear_cross_entropy_cases import (
    PARAMETERS,
    ROWS,
    SHAPES,
    assert_all_as_accurate,
    check,
    composition,
    differentiate,
    exact,
    make_call,
    small_chunks,  # noqa: F401
)

pytestmark = pytest.mark.usefixtures("small_chunks")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
SHAPE = SHAPES[4]  # several chunks and a tail

CALLS: dict[str, dict[str, Any]] = {
    "plain": {"bias": False},
    "bias": {},
    "ignored": {"ignored": 0.3},
    "ignored-class-0": {"ignored": 0.2, "ignore_index": 0},
    "weight-zeros": {"weight": "zeros", "ignored": 0.3},
    "smoothing": {"label_smoothing": 0.1, "bias": False},
    "everything": {"label_smoothing": 0.2, "weight": "random", "ignored": 0.3},
    "probabilities": {"probabilities": True},
    "probabilities-smoothing-weight": {
        "probabilities": True,
        "label_smoothing": 0.1,
        "weight": "random",
    },
}


@each_dtype
@each_reduction
@pytest.mark.parametrize("shape", SHAPES, ids=dtype_name)
def test_values(shape: tuple[int, int, int], reduction: str, dtype: torch.dtype) -> None:
    for kind in CALLS.values():
        check(make_call(shape, dtype, **kind, reduction=reduction))


@each_dtype
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99, 2.0])
@each_reduction
def test_an_ignored_row_is_an_absent_row(reduction: str, share: float, dtype: torch.dtype) -> None:
    """Also where its activations are NaN or infinite; with none left, gradients are 0."""
    for label_smoothing in (0.0, 0.1):
        call = make_call(
            SHAPE, dtype, ignored=share, label_smoothing=label_smoothing, reduction=reduction
        )
        ignored = (call["target"] == -100).nonzero().squeeze(1)
        call["input"][ignored[::2]] = float("nan")
        call["input"][ignored[1::2]] = float("inf")
        ours = check(call)
        assert not ours["input"][ignored].any()


@pytest.mark.parametrize("rows", [1, 7, 64, 10**6])
@each_reduction
def test_the_chunk_does_not_change_the_result(
    rows: int, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "ROWS", rows)
    for dtype in (torch.float32, torch.bfloat16):
        call = make_call((67, 33, 300), dtype, ignored=0.2, weight="random", reduction=reduction)
        check(call)


def test_the_weights_gradient_is_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64 chunks in bfloat16: within one rounding of float64."""
    monkeypatch.setattr(loop, "ROWS", 8)
    call = make_call((512, 33, 100), torch.bfloat16, bias=False)
    right = exact(call)["linear_weight"]
    ours = differentiate(fastopt.linear_cross_entropy, call)["linear_weight"]
    error = (ours.double() - right).abs()
    # Half a step of bfloat16 wherever a result lies, and what float32 sums are off.
    assert (error <= right.abs() * 2.0**-8 + 1e-6 * right.abs().max()).all()


@pytest.mark.parametrize("offset", [1e3, 1e6])
def test_a_large_common_offset(offset: float) -> None:
    """By the bias: the maximum and the logarithm of the sum stay apart."""
    call = make_call(SHAPE, ignored=0.3)
    call["linear_bias"] = torch.full_like(call["linear_bias"], offset)
    check(call)


@pytest.mark.parametrize("upstream", [1.0, 0.37, 0.0, -3.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_scalar_upstream(reduction: str, upstream: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        call = make_call(SHAPE, dtype, ignored=0.3, reduction=reduction)
        check(call, upstream=lambda loss: torch.full_like(loss, upstream))


@each_reduction
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_an_upstream_that_is_not_finite(value: float, reduction: str) -> None:
    """Nothing of it reaches ignored rows; elsewhere the input's gradient is torch's NaN."""
    call = make_call(SHAPE, ignored=0.3, reduction=reduction)
    ignored = call["target"] == -100
    for function in (fastopt.linear_cross_entropy, composition):
        found = differentiate(function, call, upstream=lambda loss: torch.full_like(loss, value))
        assert not found["input"][ignored].any()
        assert found["input"][~ignored].isnan().all()
        assert not found["linear_weight"].isfinite().any()


def test_half_gradients_survive_a_scaler() -> None:
    """Below float16's range they meet the scale before they are rounded."""
    call = make_call((512, 33, 64), torch.float16)
    call["input"] /= 1024
    check(call, upstream=lambda loss: torch.full_like(loss, 2.0**14))


# -- what is not wanted is not computed -------------------------------------------------------------


def gemms(run: Callable[[], object]) -> int:
    """How many matrix products run."""
    with profile(activities=[ProfilerActivity.CPU]) as events:
        run()
    products = ("aten::mm", "aten::addmm", "aten::addmm_")
    return sum(event.name in products for event in events.events())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_subset_of_parameters(reduction: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        call = make_call(SHAPE, dtype, ignored=0.3, reduction=reduction)
        for count in (1, 2, 3):
            for wanted in itertools.combinations(PARAMETERS, count):
                check(call, wanted=wanted)


@pytest.mark.parametrize("wanted", [(), ("input",), ("linear_weight",), ("input", "linear_weight")])
def test_the_products_that_are_done(wanted: Sequence[str]) -> None:
    """One a chunk for the loss, one for each gradient that is wanted, none in backward."""
    call = make_call((4 * ROWS, 8, 7), bias=False)
    leaves = {name: call[name].requires_grad_() for name in wanted}
    loss = None

    def forward() -> None:
        nonlocal loss
        loss = fastopt.linear_cross_entropy(**call)

    assert gemms(forward) == 4 * (1 + len(wanted))
    with torch.no_grad():
        assert gemms(forward) == 4
    forward()
    if leaves:
        assert gemms(lambda: torch.autograd.grad(loss, list(leaves.values()))) == 0


# -- memory layouts ---------------------------------------------------------------------------------


def _every_second(x: Tensor) -> Tensor:
    between = float("nan") if x.is_floating_point() else -1
    wide = torch.full([2 * size for size in x.shape], between, dtype=x.dtype)
    wide[tuple(slice(None, None, 2) for _ in x.shape)] = x
    return wide[tuple(slice(None, None, 2) for _ in x.shape)]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.t().contiguous().t(),
    "every-second": _every_second,
    "one-row-repeated": lambda x: x[:1].expand(x.shape),
    "rows-of-a-wider-buffer": lambda x: F.pad(x, (1, 2), value=float("nan"))[..., 1:-2],
    "negated": lambda x: torch.complex(x, -x).conj().imag,
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", ["input", "linear_weight"])
def test_layouts(name: str, layout: Callable[[Tensor], Tensor]) -> None:
    for reduction in ("mean", "none"):
        call = make_call(SHAPE, ignored=0.3, reduction=reduction)
        call[name] = layout(call[name])
        check(call)
    call = make_call(SHAPE, ignored=0.3, weight="random")
    for other in ("target", "linear_bias", "weight"):
        call[other] = _every_second(call[other])
    check(call)


# -- dtypes ----------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("reduced", [torch.bfloat16, torch.float16], ids=dtype_name)
@each_reduction
def test_autocast(reduction: str, reduced: torch.dtype, dtype: torch.dtype) -> None:
    """Operands rounded as torch's autocast rounds them, the loss in float32, gradients in the
    parameters' own dtypes."""
    for kind in (CALLS["everything"], CALLS["probabilities"]):
        call = make_call(SHAPE, dtype, **kind, reduction=reduction)
        if dtype.itemsize == 2 and call["target"].is_floating_point():
            call["target"] = call["target"].float()  # torch takes no mixture of the two half types
        others = {name: v for name, v in call.items() if name not in PARAMETERS}
        if dtype is torch.float64:
            rounded = call
        else:
            others = {
                name: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v
                for name, v in others.items()
            }
            rounded = {name: call[name].to(reduced).float() for name in PARAMETERS} | others

        def in_autocast(reduced: torch.dtype = reduced, **call: Any) -> Tensor:
            with torch.autocast("cpu", reduced):
                return fastopt.linear_cross_entropy(**call)

        with served.linear_cross_entropy.answered():
            ours = differentiate(in_autocast, call)
        right, stock = exact(rounded), differentiate(composition, rounded)
        assert ours["loss"].dtype == (dtype if dtype is torch.float64 else torch.float32)
        stock.update({name: stock[name].to(dtype) for name in PARAMETERS})
        assert_all_as_accurate(ours, stock, right, call)


def test_autocast_leaves_of_several_dtypes() -> None:
    call = make_call(SHAPE)
    call["input"] = call["input"].bfloat16()
    with torch.autocast("cpu", torch.bfloat16), served.linear_cross_entropy.answered():
        ours = differentiate(fastopt.linear_cross_entropy, call)
        stock = differentiate(composition, call)
    for name, value in ours.items():
        assert value.dtype is stock[name].dtype
        torch.testing.assert_close(value, stock[name], rtol=2e-2, atol=2e-2)


@each_reduction
def test_products_in_bfloat16(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU that has instructions for them: logits and their gradients in bfloat16, as torch's,
    the weight's gradient summed in float32."""
    monkeypatch.setattr(loop, "multiplies", lambda dtype: dtype is torch.bfloat16)
    call = make_call((67, 33, 300), torch.bfloat16, ignored=0.3, reduction=reduction)
    ours = differentiate(fastopt.linear_cross_entropy, call)
    stock, right = differentiate(composition, call), exact(call)
    for name, value in ours.items():
        assert value.dtype is torch.bfloat16
        error, allowed = ((v[name].double() - right[name]).norm() for v in (ours, stock))
        assert error <= 1.1 * allowed + 2.0**-8 * right[name].norm(), name


def test_which_cpus_multiply_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not loop.multiplies(torch.float32) and not loop.multiplies(torch.float16)
    for machine, has in itertools.product(("x86_64", "aarch64"), (False, True)):
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)

        def asked(has: bool = has) -> bool:
            return has

        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", asked, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", asked)
        assert loop.multiplies.__wrapped__(torch.bfloat16) is has


# -- options ----------------------------------------------------------------------------------------

needs_options = pytest.mark.skipif(
    not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="options came with torch 2.13"
)


def test_many_classes() -> None:
    """Whose exponentials no scratch memory keeps, while their gradient takes the logits' place."""
    check(make_call((11, 4, 65_600), label_smoothing=0.1))
    check(make_call((11, 4, 65_600)))


def rows_used(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> list[int]:
    """The rows of every chunk."""
    op, seen = loop.ops.cross_entropy_forward_backward_out, []

    def recorded(logits: Tensor, *others: Any) -> Any:
        seen.append(len(logits))
        return op(logits, *others)

    monkeypatch.setattr(loop.ops, "cross_entropy_forward_backward_out", recorded)
    run()
    monkeypatch.setattr(loop.ops, "cross_entropy_forward_backward_out", op)
    return seen


@needs_options
@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({}, [8, 8, 8, 5]),
        ({"batch_chunk_size": 13}, [13, 13, 3]),
        ({"batch_chunk_size": 13, "chunking_method": None}, [13, 13, 3]),
        ({"batch_chunk_size": 100}, [29]),
        ({"chunking_method": None}, [29]),
        ({"chunking_method": "aspect_ratio"}, [16, 13]),  # 2^4 >= 29 / ceil(16 / 8)
        ({"chunking_method": "aspect_ratio:4"}, [4] * 7 + [1]),
        ({"chunking_method": "aspect_ratio:64"}, [1] * 29),
    ],
)
def test_options_choose_the_rows(
    choice: dict[str, Any], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = torch.nn.LinearCrossEntropyOptions(**choice)
    call = make_call((29, 8, 16), options=options)
    assert rows_used(monkeypatch, lambda: check(call)) == expected


@needs_options
@pytest.mark.parametrize("choice", [{"acc_policy": "compact"}, {"acc_dtype": torch.bfloat16}])
def test_options_choose_where_the_weights_gradient_is_summed(choice: dict[str, Any]) -> None:
    """In half precision it loses digits with every chunk, and takes half the memory."""
    errors = []
    for others in ({}, choice):
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=4, **others)
        call = make_call((256, 33, 100), torch.bfloat16, options=options)
        ours = differentiate(fastopt.linear_cross_entropy, call)
        right = exact({name: v for name, v in call.items() if name != "options"})
        errors.append((ours["linear_weight"].double() - right["linear_weight"]).norm())
        torch.testing.assert_close(
            ours["linear_weight"].double(), right["linear_weight"], rtol=0.2, atol=1e-3
        )
    assert errors[1] > 2 * errors[0]


@needs_options
@each_reduction
def test_options_and_all_else(reduction: str) -> None:
    """Smoothing and probabilities, which stock's chunks refuse or make whole; no warning; two
    backwards; second derivatives."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=4)
    for kind in CALLS.values():
        check(make_call(SHAPE, **kind, reduction=reduction, options=options))


def test_our_own_rule_divides_evenly() -> None:
    for total, expected in [(1, 8), (8, 8), (9, 8), (17, 8), (29, 8)]:
        assert loop.rows_at_a_time(total, 0, 7, 8) == expected
    loop.ROWS = 512  # the fixture puts it back
    for total, expected in [(0, 8), (512, 512), (513, 264), (1024, 512), (4096, 512), (1300, 440)]:
        assert loop.rows_at_a_time(total, 0, 7, 8) == expected


def test_the_same_bits_from_run_to_run() -> None:
    call = make_call((67, 33, 300), ignored=0.2)
    first, second = (differentiate(fastopt.linear_cross_entropy, call) for _ in range(2))
    for name in first:
        assert_same_bits(first[name], second[name], name)
