"""cross_entropy: values and gradients against torch in float64, over shapes, layouts and options;
of all kernels alike (cross_entropy_kernels.py).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import cross_entropy_cases as cases
import fastopt
import fastopt.options
from accuracy import assert_as_accurate, assert_same_bits
from cross_entropy_cases import (
    DTYPES,
    EVERYTHING,
    KERNELS,
    LAYOUTS_2D,
    LAYOUTS_ND,
    OPTIONS,
    REDUCTIONS,
    Options,
    check,
    check_options,
    differentiate,
    dtype_name,
    make_logits,
    make_probabilities,
    make_target,
    make_weight,
    random_upstream,
)
from cross_entropy_kernels import (
    BATCHES,
    CLASS_COUNTS,
    MEMORIES,
    NAMED,
    SMALL,
    each_kernel,
    gradients_far_apart,
    on_chip,
    these_kernels_answer,  # noqa: F401
)
from fastopt import ops, reference
from fastopt.loss import _differentiable, _times

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)

# -- shapes -----------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("shapes", CLASS_COUNTS.values(), ids=CLASS_COUNTS)
def test_numbers_of_classes(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    for shape in shapes:
        logits = make_logits(shape, dtype, seed=shape[0])
        check_options(logits, OPTIONS["plain"], alone=True)
        check_options(logits, EVERYTHING, reduction="none", upstream=random_upstream)


@each_dtype
@pytest.mark.parametrize("name", NAMED)
def test_named_shapes(name: str, dtype: torch.dtype) -> None:
    logits = make_logits(NAMED[name], dtype)
    for reduction in ("mean", "none"):
        options = {"reduction": reduction, "upstream": random_upstream}
        check_options(logits, EVERYTHING, alone=True, **options)
    check_options(logits, OPTIONS["plain"], alone=True)
    weight = make_weight(logits.shape[cases.class_dim(logits)], dtype)
    check(logits, make_probabilities(logits), weight=weight, label_smoothing=0.2)


@pytest.mark.library
@each_dtype
@pytest.mark.parametrize("shape", [(1, 128256), (8, 128256)], ids=dtype_name)
def test_few_rows_of_many_classes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits = make_logits(shape, dtype)
    check_options(logits, OPTIONS["plain"])
    check_options(logits, OPTIONS["smoothing-weight"], reduction="none", upstream=random_upstream)


@pytest.mark.library
@pytest.mark.slow
@pytest.mark.parametrize("shape", [(260, 32768), (4, 64, 64, 513)], ids=dtype_name)
def test_gradients_of_more_than_32_megabytes(shape: tuple[int, ...]) -> None:
    """They come from pages of another size."""
    check_options(make_logits(shape), EVERYTHING, upstream=random_upstream)


@pytest.mark.library
@each_dtype
@pytest.mark.parametrize("classes", [1, 2, 3, 5, 7, 10, 16, 17, 31, 33])
def test_many_rows_of_few_classes(classes: int, dtype: torch.dtype) -> None:
    logits = make_logits((8203, classes), dtype)
    check_options(logits, OPTIONS["plain"])
    check_options(logits, EVERYTHING, reduction="sum", upstream=random_upstream)


@pytest.mark.library
@each_dtype
@pytest.mark.parametrize("positions", [1, 2, 7, 8, 15, 16, 17, 31, 33, 64, 65, 257])
def test_strided_classes(positions: int, dtype: torch.dtype) -> None:
    for classes in (1, 2, 3, 21, 150):
        logits = make_logits((2, classes, positions), dtype)
        check_options(logits, OPTIONS["plain"])
        check_options(logits, EVERYTHING, reduction="none", upstream=random_upstream)


@pytest.mark.library
@each_dtype
@pytest.mark.parametrize(
    "shape", [(2, 21, 129, 127), (1, 1000, 67, 3), (3, 7, 5, 3, 2, 2)], ids=dtype_name
)
def test_images(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_options(make_logits(shape, dtype), EVERYTHING, upstream=random_upstream)


@each_dtype
@each_reduction
@pytest.mark.parametrize(
    "shape", [(0, 5), (2, 5, 0), (2, 5, 0, 3), (0, 5, 2), (0, 1), (0, 1000)], ids=dtype_name
)
def test_empty_batches(shape: tuple[int, ...], reduction: str, dtype: torch.dtype) -> None:
    logits = make_logits(shape, dtype)
    for options in (OPTIONS["plain"], OPTIONS["smoothing-weight"], OPTIONS["ignored-weight"]):
        check_options(logits, options, reduction=reduction)
    check(logits, make_probabilities(logits), reduction=reduction)


@each_reduction
def test_no_classes(reduction: str) -> None:
    logits = torch.empty(3, 0)
    check(logits, torch.full((3,), -100), reduction=reduction)
    check(logits, torch.empty(3, 0), reduction=reduction)


# -- layouts ----------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS_2D, ids=lambda layout: layout.__name__)
def test_layouts_of_rows(layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    shapes = [shape for shape in each_kernel(dtype) if len(shape) == 2]
    if KERNELS == "library":
        shapes += [(37, 19), (3, 1000), (129, 5), (2, 17), (5, 1), (1, 33)]
    if KERNELS == "interpreted":  # where long rows of classes apart take minutes
        shapes = [shape for shape in shapes if shape[1] < 10_000]
    for shape in shapes:
        dense = make_logits(shape, dtype)
        logits = layout(dense)
        check_options(logits, OPTIONS["plain"])
        check_options(logits, EVERYTHING, reduction="none", upstream=random_upstream)
        target = make_probabilities(logits)
        if layout is not cases.expanded_classes:  # equal masses: nothing would be left but rounding
            target = layout(target)
        check(logits, target)
        check(dense, layout(make_probabilities(dense)))
        check(logits, cases.offset(make_probabilities(dense)))


@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS_ND, ids=lambda layout: layout.__name__)
def test_layouts_of_images(layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    shapes = [(3, 21, 9), (2, 5, 7, 11), (2, 33, 1, 5), (2, 150, 6, 1), (2, 3, 2, 3, 5)]
    for shape in shapes if KERNELS == "library" else shapes[DTYPES.index(dtype) :: len(DTYPES)]:
        logits = layout(make_logits(shape, dtype))
        check_options(logits, OPTIONS["plain"])
        check_options(logits, EVERYTHING, reduction="none", upstream=random_upstream)
        target = make_probabilities(logits)
        if layout is not cases.expanded_classes:  # equal masses: nothing would be left but rounding
            target = layout(target)
        check(logits, target)


@pytest.mark.library
@pytest.mark.parametrize("layout", LAYOUTS_ND, ids=lambda layout: layout.__name__)
def test_a_leaf_gets_the_gradient_layout_of_torch(layout: Callable[[Tensor], Tensor]) -> None:
    """(Between two operations torch makes it contiguous, where ours keeps the logits' layout.)"""
    for shape in [(6, 10), (2, 5, 7), (2, 5, 7, 11)]:
        if layout in (cases.classes_last, cases.spatial_swapped) and len(shape) == 2:
            continue
        logits = layout(make_logits(shape))
        for reduction in REDUCTIONS:
            leaves = []
            for function in (fastopt.cross_entropy, F.cross_entropy):
                leaf = logits.detach().requires_grad_()
                target = layout(make_probabilities(logits)).requires_grad_()
                function(leaf, make_target(leaf), reduction=reduction).sum().backward()
                function(logits, target, reduction=reduction).sum().backward()
                leaves.append((leaf, target))
            for ours, stock in zip(*leaves, strict=True):
                cases.assert_same_layout(ours.grad, stock.grad, f"{shape} {reduction}")


def test_target_and_weight_in_any_layout() -> None:
    logits = make_logits((6, 33, 4, 5))
    target = make_target(logits)
    weight = make_weight(33, torch.float32)
    padded = torch.full((6, 5, 9), 10**12)
    padded[:, :, 1::2] = target.transpose(1, 2)
    targets = [
        padded[:, :, 1::2].transpose(1, 2),
        target.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        target[:1].expand(6, 4, 5),
        target[:, :1, :1].expand(6, 4, 5),
    ]
    wide = torch.full((100,), math.nan)
    wide[1:100:3] = weight
    for target in targets:
        for weights in (weight, wide[1:100:3], weight[:1].expand(33)):
            check(logits, target, weight=weights, label_smoothing=0.1)


def test_probabilities_in_another_layout_than_the_logits() -> None:
    for shape in [(6, 33), (2, 5, 7, 11)]:
        for logits_layout in (cases.contiguous, cases.transposed, cases.row_strided):
            for target_layout in (cases.contiguous, cases.transposed, cases.expanded_classes):
                logits = logits_layout(make_logits(shape))
                target = target_layout(make_probabilities(logits))
                check(logits, target, label_smoothing=0.1)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("name", cases.FAR_APART)
def test_offsets_beyond_32_bits(name: str, memory: str) -> None:
    """Elements far apart give the bits of the same elements side by side."""
    shape, strides = cases.FAR_APART[name]
    for dtype in (torch.float32, torch.bfloat16):
        near = make_logits(shape, dtype)
        masses = make_probabilities(near)
        if strides[1] == 1:
            near, masses = cases.classes_last(near), cases.classes_last(masses)
        labels, keywords = EVERYTHING.apply(near, make_target(near))
        del keywords["ignore_index"]
        far, far_masses = (cases.far_apart(x, strides) for x in (near, masses))
        for far_target, target in [(labels, labels), (far_masses, masses)]:
            for reduction in ("mean", "none"):
                keywords["reduction"] = reduction
                with on_chip(memory):
                    expected = differentiate(fastopt.cross_entropy, near, target, **keywords)
                with on_chip(memory), gradients_far_apart(strides):
                    ours = differentiate(fastopt.cross_entropy, far, far_target, **keywords)
                # (The library sums side by side what lies side by side.)
                same = torch.testing.assert_close if KERNELS == "library" else assert_same_bits
                same(ours.loss, expected.loss)
                same(ours.gradients["logits"], expected.gradients["logits"])


# -- options ----------------------------------------------------------------------------------------


EVERY_OPTION = list(itertools.product(OPTIONS, REDUCTIONS, DTYPES))
if KERNELS != "library":  # in one dtype
    EVERY_OPTION = [case for i, case in enumerate(EVERY_OPTION) if i % 4 == i // 4 % 4]


@pytest.mark.parametrize(("name", "reduction", "dtype"), EVERY_OPTION, ids=dtype_name)
def test_options(name: str, reduction: str, dtype: torch.dtype) -> None:
    options = OPTIONS[name]
    upstream = torch.ones_like if reduction == "mean" else random_upstream
    for shape in SMALL:
        check_options(make_logits(shape, dtype), options, reduction=reduction, upstream=upstream)


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 6, 7, -(2**63), 2**63 - 1])
def test_ignore_index_may_be_any_integer(ignore_index: int) -> None:
    options = Options(ignored=0.3, ignore_index=ignore_index, label_smoothing=0.1)
    for shape in [(77, 7), (40, 7, 3), (5, 7)]:
        check_options(make_logits(shape), options)


@pytest.mark.library
@pytest.mark.stock
def test_ignore_index_may_be_a_tensor() -> None:
    logits = make_logits((8, 5))
    target = make_target(logits)
    ours = fastopt.cross_entropy(logits, target, ignore_index=torch.tensor(0))
    assert torch.equal(ours, F.cross_entropy(logits, target, ignore_index=torch.tensor(0)))


@each_dtype
def test_an_infinite_weight_of_a_class_without_rows(dtype: torch.dtype) -> None:
    """1 / bincount has them. 0 * inf must not reach a loss or a gradient."""
    for shape in each_kernel(dtype):
        logits = make_logits(shape, dtype)
        target = make_target(logits).clamp(max=shape[1] - 2)
        weight = torch.linspace(0.5, 2, shape[1]).to(dtype)
        weight[-1] = math.inf
        for reduction in REDUCTIONS:
            ours = check(logits, target, weight=weight, reduction=reduction)
            assert ours.loss.isfinite().all() and ours.gradients["logits"].isfinite().all()
        leaf = logits.clone().requires_grad_()
        loss = fastopt.cross_entropy(leaf, target, weight)
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        (second,) = torch.autograd.grad(gradient.float().square().sum(), leaf)
        assert second.isfinite().all()


@each_reduction
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_infinite_masses(smoothing: float, reduction: str) -> None:
    """An infinite weight or probability of the likeliest class, of another, of each in its row."""
    for shape in each_kernel():
        logits = make_logits(shape) / 4  # confident, log(p) would be 0 in float32
        likeliest = logits.argmax(1)
        weight = torch.linspace(0.5, 2, shape[1])
        weight[likeliest.view(-1)[0]] = math.inf
        keywords = {"reduction": reduction, "label_smoothing": smoothing}
        for target in (likeliest, (likeliest + 1) % shape[1]):
            check(logits, target, weight=weight, **keywords)
            probabilities = make_probabilities(logits)
            check(logits, probabilities.scatter(1, target.unsqueeze(1), math.inf), **keywords)
        check(logits, make_probabilities(logits), weight=weight, **keywords)


@pytest.mark.cpu_kernels
def test_masses_too_large_to_add_up() -> None:
    """Their products with log-probabilities are not: the loss is a number, as torch's. (Kernels of
    GPUs do add them up, in float32.)"""
    for shape in [(33, 7), (40, 7, 3), (5, 300), (2, 40000)]:
        logits = torch.full(shape, -200.0)
        logits[:, :2] = 0
        masses = torch.zeros(shape)
        masses[:, :2] = 2e38
        for loss_function in (F.cross_entropy, fastopt.cross_entropy):
            loss = loss_function(logits, masses, reduction="none")
            torch.testing.assert_close(loss, torch.full_like(loss, 4e38 * math.log(2)))


@pytest.mark.library
@pytest.mark.parametrize("classes", [1000, 20_000, 50_000])
def test_long_sums_of_strided_classes(classes: int) -> None:
    """Thousands of terms a row: rounding each sum in turn would take five digits of float32."""
    logits = make_logits((2, classes, 8))
    target = make_target(logits)
    probabilities = F.one_hot(target, classes).float().transpose(1, 2).contiguous()
    for keywords in ({}, {"label_smoothing": 0.1}):
        for masses in (target, probabilities):
            arguments = {"reduction": "none", **keywords}
            exact = F.cross_entropy(
                logits.double(),
                masses.to(masses.dtype if masses is target else torch.float64),
                **arguments,
            )
            ours = fastopt.cross_entropy(logits, masses, **arguments)
            error = ((ours.double() - exact) / exact).abs().max()
            assert error < 1e-6, (error, keywords)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("upstream", [math.inf, -math.inf, math.nan, 0.0])
def test_upstream_gradients_that_are_no_numbers(upstream: float, reduction: str) -> None:
    """0 in ignored rows; inf - inf where a row has mass, in one class or in all. As torch, bit by bit of
    what is no number."""
    for shape in [(33, 10), (2, 5, 7)]:
        logits = make_logits(shape)
        labels, _ = OPTIONS["ignored"].apply(logits, make_target(logits))
        for target in (labels, make_probabilities(logits)):
            for smoothing in (0.0, 0.1):
                keywords = {"reduction": reduction, "label_smoothing": smoothing}
                gradients = []
                for loss_function in (F.cross_entropy, fastopt.cross_entropy):
                    leaf = logits.clone().requires_grad_()
                    loss = loss_function(leaf, target, **keywords)
                    grad_loss = torch.full_like(loss, upstream)
                    if reduction == "none":
                        grad_loss[::2] = 1
                    gradients += torch.autograd.grad(loss, leaf, grad_loss)
                theirs, ours = gradients
                torch.testing.assert_close(ours, theirs, equal_nan=True)


@each_dtype
@pytest.mark.parametrize("factor", [0.37, 1.0, -0.0, -1.5, math.inf, math.nan])
def test_scaling(factor: float, dtype: torch.dtype) -> None:
    """What backward does to a saved gradient, wherever it begins and however long it is."""
    for shape, layout in [
        ((5,), cases.contiguous),
        ((130, 33), cases.transposed),
        ((2, 3, 5), cases.offset),
        ((3, 3001), cases.offset),
    ]:
        saved = layout(make_logits(shape, dtype))
        labels, _ = OPTIONS["ignored"].apply(saved, make_target(saved))
        saved.masked_fill_((labels == -100).unsqueeze(cases.class_dim(saved)), 0)
        probabilities = make_probabilities(saved)
        for target, smoothed in [(labels, False), (labels, True), (probabilities, False)]:
            arguments = (torch.tensor(factor, dtype=dtype), target, -100, smoothed)
            ours, expected, exactly = layout(saved), saved.clone(), saved.double()
            ops.cross_entropy_scale_(ours, *arguments)
            reference.cross_entropy_scale_(expected, *arguments)
            reference.cross_entropy_scale_(exactly, *arguments)
            assert_as_accurate(ours, expected, exactly)
            if layout is cases.offset:
                around = ours.as_strided((ours.numel() + 2,), (1,), 0)[[0, -1]]
                assert around.isnan().all(), "what lies beside it"


# Labels are looked at before the logits' dtype matters.
WRONG_LABELS = [(wrong, torch.float32) for wrong in (-1, "classes", 2**31, 2**62, -(2**63))]


@pytest.mark.gpu_kernels
@pytest.mark.parametrize(
    ("wrong", "dtype"), [*WRONG_LABELS, *((2**40, d) for d in DTYPES)], ids=dtype_name
)
def test_labels_out_of_range_make_their_row_nan(wrong: int | str, dtype: torch.dtype) -> None:
    """Loss and gradient of that row, and of no other; as an address, 2^40 would not survive. (On a
    CPU they raise.)"""
    for shape in BATCHES:
        logits = make_logits(shape, dtype)
        right = make_target(logits)
        target = right.clone()
        target.view(-1)[1] = shape[1] if wrong == "classes" else int(wrong)
        bad = target != right
        bad_rows = bad.unsqueeze(1).expand_as(logits)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        weight = make_weight(shape[1], wide)
        for options in [(None, -100, 0.0), (weight, -100, 0.1), (weight, -100, 1.0)]:
            rows, of_rows, _ = ops.cross_entropy_forward_backward(
                logits, target, *options, 0, dtype, 0.0
            )
            loss, grad, _ = ops.cross_entropy_forward_backward(
                logits, right, *options, 0, dtype, 0.0
            )
            assert rows[bad].isnan().all() and of_rows[bad_rows].isnan().all()
            assert_same_bits(rows[~bad], loss[~bad])
            assert_same_bits(of_rows[~bad_rows], grad[~bad_rows])
            alone = ops.cross_entropy_forward(logits, target, *options, 0, dtype, 0.0)
            assert torch.equal(alone.isnan(), bad)
            for reduction in (1, 2):
                arguments = (logits, target, *options, reduction, dtype, 0.0)
                loss, grad, _ = ops.cross_entropy_forward_backward(*arguments)
                assert loss.isnan() and ops.cross_entropy_forward(*arguments).isnan()
                assert torch.equal(grad.isnan(), bad_rows) and grad[~bad_rows].isfinite().all()


@pytest.mark.library
@pytest.mark.stock
def test_labels_out_of_range_are_no_addresses_in_backward() -> None:
    """On a GPU their rows are NaN and nothing raises: neither may what backward does with labels."""
    grad = torch.ones(3, 4)
    target = torch.tensor([2**40, -5, 3])
    upstream = torch.tensor([math.inf, 1, 2])
    scaled = _times(grad, upstream, None, target, -100, False, 0, own=False)
    assert scaled[1].eq(1).all() and scaled[2].eq(2).all()
    options = fastopt.options.Options(-100, 0.1, fastopt.options.MEAN, torch.float32)
    again = _differentiable(grad, target, None, None, options, torch.ones(()), grad)
    assert again.shape == grad.shape


@pytest.mark.library
@pytest.mark.parametrize("shape", [(300, 10), (7, 70), (3, 13, 5)], ids=str)
def test_subnormal_halves_are_no_zeros(shape: tuple[int, ...]) -> None:
    """torch.set_flush_denormal tells the CPU to read float32's as 0, and not float16's: in the kernels
    they become normal numbers."""
    logits = torch.zeros(shape, dtype=torch.float16)
    logits[:, 0] = 20
    target = torch.full(shape, 5e-5, dtype=torch.float16)
    target[:, 0] = 1
    results = []
    for flush in (False, True):
        torch.set_flush_denormal(flush)
        try:
            results.append(differentiate(fastopt.cross_entropy, logits, target))
            results.append(differentiate(fastopt.cross_entropy, target, logits))
        finally:
            torch.set_flush_denormal(False)
    for kept, flushed in zip(results[:2], results[2:], strict=True):
        assert_same_bits(flushed.loss, kept.loss)
    assert results[0].loss > 0.5 * F.cross_entropy(logits.double(), target.double())


@pytest.mark.library
def test_float64_weights_that_are_smoothed_keep_their_digits() -> None:
    """The masses of all classes are added up once a call: beside torch's pairwise sums, not one by
    one."""
    numpy = pytest.importorskip("numpy")
    if numpy.finfo(numpy.longdouble).nmant <= 52:
        pytest.skip("no wider type here")
    for classes in (1000, 100_000):
        logits, target = make_logits((3, classes), torch.float64), torch.arange(3)
        weight = torch.full((classes,), 0.1, dtype=torch.float64)
        x, w = (t.cpu().numpy().astype(numpy.longdouble) for t in (logits, weight))
        shifted = x - x.max(1, keepdims=True)
        logs = shifted - numpy.log(numpy.exp(shifted).sum(1, keepdims=True))
        e = numpy.longdouble(0.1)
        exact = -(1 - e) * w[:3] * logs[range(3), range(3)] - e / classes * (w * logs).sum(1)
        errors = []
        for loss_function in (F.cross_entropy, fastopt.cross_entropy):
            loss = loss_function(logits, target, weight, reduction="none", label_smoothing=0.1)
            errors.append(abs((loss.cpu().numpy() - exact) / exact).max())
        assert errors[1] <= 2 * errors[0] + 4e-16, errors


def test_weights_that_sum_to_zero() -> None:
    logits = make_logits((6, 4))
    target = torch.zeros(6, dtype=torch.int64)
    for weight in ([0.0, 1.0, 1.0, 1.0], [0.0] * 4):
        for reduction in REDUCTIONS:
            for smoothing in (0.0, 0.1):
                keywords = {"reduction": reduction, "label_smoothing": smoothing}
                check(logits, target, weight=torch.tensor(weight), **keywords)
    balanced = torch.tensor([0, 0, 0, 1, 1, 1])
    check(logits, balanced, weight=torch.tensor([1.0, -1.0, 0.0, 0.0]))


@pytest.mark.parametrize("first_ignored", [True, False])
def test_ignored_rows_at_the_edges(first_ignored: bool) -> None:
    for shape in each_kernel():
        logits = make_logits(shape)
        target = make_target(logits)
        target.view(-1)[0 if first_ignored else -1] = -100
        check(logits, target, label_smoothing=0.1)


@pytest.mark.library
@pytest.mark.stock
def test_byte_targets() -> None:
    logits = make_logits((16, 10))
    target = make_target(logits).to(torch.uint8)
    for reduction in REDUCTIONS:
        ours = fastopt.cross_entropy(logits, target, reduction=reduction)
        assert torch.equal(ours, F.cross_entropy(logits, target, reduction=reduction))


# -- probability targets ----------------------------------------------------------------------------

# logits, target: the loss has the wider dtype, each gradient its input's.
DTYPE_PAIRS = [(dtype, dtype) for dtype in DTYPES] + [
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float64),
    (torch.float64, torch.float32),
    (torch.float16, torch.bfloat16),
]


@each_reduction
@pytest.mark.parametrize(("dtype", "target_dtype"), DTYPE_PAIRS, ids=dtype_name)
def test_probabilities(dtype: torch.dtype, target_dtype: torch.dtype, reduction: str) -> None:
    for shape in [*each_kernel(dtype), (13,)]:
        logits = make_logits(shape, dtype)
        target = make_probabilities(logits, target_dtype)
        weight = make_weight(shape[cases.class_dim(logits)], dtype, "negative")
        options = {"reduction": reduction, "upstream": random_upstream}
        check(logits, target, **options)
        check(logits, target, wanted=("target",), label_smoothing=0.2, **options)  # torch's
        check(logits, target, label_smoothing=0.2, weight=weight, **options)


def test_probabilities_with_a_wider_weight() -> None:
    logits = make_logits((33, 10))
    for dtype in DTYPES:
        check(logits, make_probabilities(logits), weight=make_weight(10, dtype))


def test_probabilities_need_not_be_probabilities() -> None:
    logits = make_logits((33, 10))
    for target in (torch.randn(33, 10), torch.zeros(33, 10), torch.ones(33, 10) * 1e3):
        for smoothing in (0.0, 0.1, 1.0, -1.0):
            check(logits, target, label_smoothing=smoothing)


def test_one_hot_probabilities_are_class_indices() -> None:
    logits = make_logits((33, 10), torch.float64)
    target = make_target(logits)
    for reduction in REDUCTIONS:
        for smoothing in (0.0, 0.1):
            keywords = {"reduction": reduction, "label_smoothing": smoothing}
            ours = fastopt.cross_entropy(logits, F.one_hot(target, 10).double(), **keywords)
            indexed = fastopt.cross_entropy(logits, target, **keywords)
            assert_as_accurate(ours, indexed, F.cross_entropy(logits, target, **keywords))


# -- numerics ---------------------------------------------------------------------------------------

# Classes of a row, and what stands there.
EVERY, ALL_BUT_0 = slice(None), slice(1, None)
HAZARDS: dict[str, list[tuple[int | slice, float]]] = {
    "minus-inf-elsewhere": [(1, -math.inf)],
    "minus-inf-at-label": [(0, -math.inf)],
    "minus-inf-but-label": [(ALL_BUT_0, -math.inf)],
    "minus-inf-everywhere": [(EVERY, -math.inf)],
    "inf-elsewhere": [(2, math.inf)],
    "inf-at-label": [(0, math.inf)],
    "inf-both-signs": [(1, math.inf), (2, -math.inf)],
    "nan-elsewhere": [(3, math.nan)],
    "nan-at-label": [(0, math.nan)],
    "nan-last": [(-1, math.nan)],
    "inf-last": [(-1, math.inf)],
    "minus-inf-last": [(-1, -math.inf)],
    "huge-spread": [(0, -6e4), (1, 6e4)],
    "equal": [(EVERY, 0.0)],
    "zeros-of-both-signs": [(0, -0.0), (1, 0.0)],
}


def _with_hazards(shape: tuple[int, ...], dtype: torch.dtype, kinds: list[str]) -> Tensor:
    """Logits whose first rows have a hazard each."""
    rows = torch.randn(shape).movedim(1, -1).reshape(-1, shape[1])
    for row, kind in zip(rows, kinds, strict=False):
        for classes, value in HAZARDS[kind]:
            row[classes] = value
    return rows.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1).contiguous().to(dtype)


@each_dtype
@pytest.mark.parametrize("hazard", HAZARDS)
def test_infinities_and_nan(hazard: str, dtype: torch.dtype) -> None:
    below_and_beyond_a_vector = [(3, 7), (3, 40), (1, 7, 3), (1, 40, 3)]
    for shape in below_and_beyond_a_vector if KERNELS == "library" else BATCHES:
        logits = _with_hazards(shape, dtype, [hazard] * 3)
        target = make_target(logits)
        target.view(-1)[:3] = torch.tensor([0, 0, shape[1] - 1])[: target.numel()]
        weight = make_weight(shape[1], dtype, "zeros").roll(1)  # 0 for class 1, not for class 0
        probabilities = F.one_hot(target, shape[1]).movedim(-1, 1).to(dtype)
        for reduction in ("mean", "none") if KERNELS == "library" else ("none",):
            check(logits, target, reduction=reduction)
            check(logits, target, reduction=reduction, label_smoothing=0.1, weight=weight)
            check(logits, probabilities, reduction=reduction, label_smoothing=0.1, weight=weight)
            if KERNELS == "library":
                check(logits, probabilities, reduction=reduction)
                check(logits, target, reduction=reduction, label_smoothing=0.1)


@each_dtype
def test_a_bad_row_spoils_no_other(dtype: torch.dtype) -> None:
    kinds = [kind for hazard in HAZARDS for kind in (hazard, "zeros-of-both-signs")]
    for shape in [(len(kinds), 7), (len(kinds), 40), (2, 7, len(kinds)), (2, 40, len(kinds))]:
        logits = _with_hazards(shape, dtype, kinds)
        target = make_target(logits) * 0
        check(logits, target, reduction="none", upstream=random_upstream)
        weight = make_weight(shape[1], dtype, "zeros").roll(1)
        for masses in (target, make_probabilities(logits)):
            check(logits, masses, reduction="none", weight=weight, label_smoothing=0.1)


def test_minus_infinity_fills_whole_parts_of_a_long_row() -> None:
    for shape in (shape for shape in each_kernel() if len(shape) == 2):
        logits = make_logits(shape)
        logits[0, : shape[1] // 2] = -math.inf
        logits[-1, shape[1] // 3 :] = -math.inf
        target = torch.full(shape[:1], shape[1] // 2)
        for smoothing in (0.0, 0.1):
            check(logits, target, reduction="none", label_smoothing=smoothing)


@each_dtype
@each_reduction
def test_ignored_rows_may_hold_anything(reduction: str, dtype: torch.dtype) -> None:
    anything = ["nan-elsewhere", "equal", "inf-at-label", "nan-at-label", "minus-inf-everywhere"]
    for shape in each_kernel(dtype):
        logits = _with_hazards(shape, dtype, anything)
        target = make_target(logits)
        flat = target.view(-1)
        flat[[row for row in (0, 2, 3, 4) if row < len(flat)]] = -100
        for smoothing in (0.0, 0.1):
            keywords = {"reduction": reduction, "label_smoothing": smoothing}
            check(logits, target, **keywords)
            check(logits, target, weight=make_weight(shape[1], dtype), **keywords)


@pytest.mark.parametrize("common", [1e2, 1e3, 1e5, 1e7, -1e7])
def test_a_common_offset_changes_nothing(common: float) -> None:
    # Whole numbers, so that adding 1e7 to them is exact in float32.
    for shape in each_kernel():
        logits = make_logits(shape).round()
        target = make_target(logits)
        for smoothing in (0.0, 0.1):
            check(logits + common, target, label_smoothing=smoothing)
            shifted = fastopt.cross_entropy(logits + common, target, label_smoothing=smoothing)
            plain = fastopt.cross_entropy(logits, target, label_smoothing=smoothing)
            exact = F.cross_entropy(logits.double(), target, label_smoothing=smoothing)
            assert_as_accurate(shifted, plain, exact)


@each_dtype
def test_outliers(dtype: torch.dtype) -> None:
    for shape in each_kernel(dtype):
        logits = make_logits(shape, dtype) * 20
        for reduction in REDUCTIONS:
            check_options(logits, OPTIONS["smoothing"], reduction=reduction)
            check_options(logits, OPTIONS["plain"], reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
@each_reduction
def test_confident_rows_keep_the_gradient_of_the_true_class(
    reduction: str, dtype: torch.dtype
) -> None:
    """p - 1 cancels: subtracted after rounding, most of its digits are gone in half precision."""
    for shape in [
        (64, 100),
        (64, 1000),
        (64, 10),
        (4, 21, 16),
        *[(2, 33000)] * (reduction != "mean"),
    ]:
        logits = make_logits(shape) / 4
        target = make_target(logits).unsqueeze(1)
        logits = logits.scatter(1, target, logits.amax(1, keepdim=True) + 10).to(dtype)
        result = check(logits, target.squeeze(1), reduction=reduction)
        oracle = cases.exact(cases.differentiate, logits, target.squeeze(1), reduction=reduction)
        ours = result.gradients["logits"].gather(1, target).double()
        exact = oracle.gradients["logits"].gather(1, target)
        # Where |gradient| falls below the normal numbers one rounding is a fixed step. float32
        # arithmetic inside costs its own eps against the 1 of p - 1, whatever the dtype outside.
        info, inside = torch.finfo(dtype), torch.finfo(torch.float32)
        share = 64 if reduction == "mean" else 1
        step = info.smallest_normal * info.eps + 4 * inside.eps / share
        assert ((ours - exact).abs() <= info.eps * exact.abs() + step).all()


@pytest.mark.library
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize(
    "shape", [(70_000, 3), (1, 3, 70_000), (257, 9), (8200, 9)], ids=dtype_name
)
def test_rows_are_counted_exactly_in_half_precision(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    logits = make_logits(shape, dtype)
    for options in (OPTIONS["plain"], OPTIONS["ignored-weight"], OPTIONS["smoothing"]):
        result = check_options(logits, options)
        assert result.loss.isfinite()
        assert result.gradients["logits"].count_nonzero()


@each_dtype
def test_a_loss_too_large_for_its_dtype_is_infinite(dtype: torch.dtype) -> None:
    logits = torch.zeros(3, 5, dtype=dtype)
    logits[:, 1] = torch.finfo(dtype).max
    logits[:, 0] = torch.finfo(dtype).min
    for reduction in REDUCTIONS:
        check(logits, torch.zeros(3, dtype=torch.int64), reduction=reduction)


# -- properties -------------------------------------------------------------------------------------


@each_dtype
def test_gradient_rows_sum_to_zero(dtype: torch.dtype) -> None:
    for shape in each_kernel(dtype):
        logits = make_logits(shape, dtype)
        for options in (OPTIONS["plain"], EVERYTHING):
            gradient = check_options(logits, options, reduction="sum").gradients["logits"].double()
            # One rounding of the dtype for each element; inside, the sum of the exponentials is
            # known to a few roundings of float32, against a row's mass of not much more than 1.
            inside = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
            budget = torch.finfo(dtype).eps * gradient.abs().sum(1) + 16 * inside.eps
            assert (gradient.sum(1).abs() <= budget).all()


@each_dtype
def test_one_class_has_no_gradient(dtype: torch.dtype) -> None:
    """a p - q is 0 exactly, not a rounding error."""
    for shape in [(50, 1), (2, 1, 9)]:
        logits = make_logits(shape, dtype)
        for weight in (None, torch.tensor([0.3], dtype=dtype)):
            for target in (make_target(logits), torch.ones_like(logits)):
                result = check(logits, target, weight=weight, label_smoothing=0.1)
                assert result.gradients["logits"].count_nonzero() == 0


@each_dtype
def test_an_ignored_row_is_an_absent_row(dtype: torch.dtype) -> None:
    logits = make_logits((64, 33), dtype)
    target = make_target(logits)
    absent = torch.rand(64) < 0.4
    ignored = target.masked_fill(absent, -100)
    for reduction in REDUCTIONS:
        for smoothing in (0.0, 0.1):
            for weight in (None, make_weight(33, dtype)):
                keywords = {"reduction": reduction, "label_smoothing": smoothing, "weight": weight}
                ours = check(logits, ignored, **keywords)
                rest = check(logits[~absent], target[~absent], **keywords)
                exact = cases.exact(
                    cases.differentiate, logits[~absent], target[~absent], **keywords
                )
                loss = ours.loss[~absent] if reduction == "none" else ours.loss
                assert_as_accurate(loss, rest.loss, exact.loss)
                gradient = ours.gradients["logits"][~absent]
                assert_as_accurate(gradient, rest.gradients["logits"], exact.gradients["logits"])


@each_dtype
def test_reductions_belong_together(dtype: torch.dtype) -> None:
    for shape in each_kernel(dtype):
        logits = make_logits(shape, dtype)
        target, keywords = OPTIONS["ignored-smoothing"].apply(logits, make_target(logits))
        rows = fastopt.cross_entropy(logits.double(), target, reduction="none", **keywords)
        counted = (target != -100).sum()
        for reduction, exact in [("sum", rows.sum()), ("mean", rows.sum() / counted)]:
            ours = fastopt.cross_entropy(logits, target, reduction=reduction, **keywords)
            stock = F.cross_entropy(logits, target, reduction=reduction, **keywords)
            assert_as_accurate(ours, stock, exact, classes=shape[1])


@st.composite
def _calls(draw: st.DrawFn) -> tuple[Tensor, Tensor, dict[str, object]]:
    """Any call of the supported kind: shape, layout, dtype, options, values."""
    dtype = draw(st.sampled_from(DTYPES))
    classes = draw(st.one_of(st.integers(1, 40), st.sampled_from([64, 127, 257, 1024])))
    spatial = draw(st.lists(st.integers(1, 19), max_size=3))
    batch = draw(st.one_of(st.integers(1, 20), st.sampled_from([64, 131])))
    batch = min(batch, max(1, 30_000 // (classes * math.prod(spatial))))
    shape = (batch, classes, *spatial)
    unbatched = not spatial and draw(st.integers(0, 9)) == 0
    logits = make_logits((classes,) if unbatched else shape, dtype, draw(st.integers(0, 99)))
    logits = logits * draw(st.sampled_from([1.0, 0.0, 1e-3, 30.0]))
    if dtype in (torch.float32, torch.float64):
        logits = logits + draw(st.sampled_from([0.0, 0.0, 1e4, -1e6]))
    if not unbatched:
        layouts = LAYOUTS_2D if len(shape) == 2 else LAYOUTS_ND
        logits = draw(st.sampled_from(layouts))(logits)
    options = Options(
        weight=draw(st.sampled_from([None, "random", "zeros", "negative"])),
        label_smoothing=draw(st.sampled_from([0.0, 0.0, 0.1, 0.9, 1.0])),
        ignored=draw(st.sampled_from([0.0, 0.0, 0.2, 0.9])),
        ignore_index=draw(st.sampled_from([-100, -1, 0, classes - 1, classes])),
    )
    if draw(st.booleans()):
        target, keywords = options.apply(logits, make_target(logits))
        wanted: tuple[str, ...] = ("logits",)
    else:
        target = make_probabilities(logits, draw(st.sampled_from([dtype, torch.float32])))
        keywords = Options(options.weight, options.label_smoothing).apply(logits, target)[1]
        wanted = draw(st.sampled_from([("logits",), ("target",), ("logits", "target")]))
    keywords |= {
        "reduction": draw(st.sampled_from(REDUCTIONS)),
        "upstream": draw(st.sampled_from([torch.ones_like, random_upstream])),
        "wanted": wanted,
    }
    return logits, target, keywords


@pytest.mark.library
@given(_calls())
def test_any_call(call: tuple[Tensor, Tensor, dict[str, object]]) -> None:
    logits, target, keywords = call
    check(logits, target, **keywords)


# -- torch's own databases --------------------------------------------------------------------------


@pytest.mark.library
@pytest.mark.slow
@each_dtype
def test_samples_of_torchs_operator_database(dtype: torch.dtype) -> None:
    from torch.testing._internal.common_methods_invocations import op_db

    (entry,) = [op for op in op_db if op.name == "nn.functional.cross_entropy"]
    samples = list(entry.sample_inputs("cpu", dtype, requires_grad=False))
    assert len(samples) > 10
    for sample in samples:
        (target,), keywords = sample.args, dict(sample.kwargs)
        check(sample.input, target, **keywords)


@pytest.mark.library
@pytest.mark.slow
@each_dtype
def test_samples_of_torchs_module_database(dtype: torch.dtype) -> None:
    from torch.testing._internal.common_modules import module_db

    (entry,) = [info for info in module_db if info.module_cls is torch.nn.CrossEntropyLoss]
    samples = entry.module_inputs_func(entry, "cpu", dtype, requires_grad=False, training=True)
    assert len(samples) > 10
    for sample in samples:
        constructor, call = sample.constructor_input, sample.forward_input
        if "weight" in constructor.kwargs:  # of both signs: their sums cancel, and luck decides
            constructor.kwargs["weight"] = constructor.kwargs["weight"].abs()
        modules = [
            cls(*constructor.args, **constructor.kwargs)
            for cls in (fastopt.CrossEntropyLoss, torch.nn.CrossEntropyLoss)
        ]
        exact_module = torch.nn.CrossEntropyLoss(*constructor.args, **constructor.kwargs).double()
        logits, target = call.args
        ours, stock = (module(logits, target) for module in modules)
        wide = target.double() if target.is_floating_point() else target
        assert_as_accurate(ours, stock, exact_module(logits.double(), wide))
