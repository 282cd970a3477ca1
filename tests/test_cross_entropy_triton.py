"""The Triton kernels of cross_entropy without a GPU: in the interpreter, and compiled ahead of time.

Triton decides when a kernel is defined whether it is interpreted, so the interpreter's tests run
in a process of their own, this file again under TRITON_INTERPRET=1: TestInterpreted there, the
other classes here.
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
import re
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cross_entropy_cases as cases
import fastopt
import fastopt.ops
from accuracy import assert_as_accurate, assert_same_bits
from child import run_pytest
from cross_entropy_cases import (
    DTYPES,
    EVERYTHING,
    LAYOUTS_2D,
    LAYOUTS_ND,
    OPTIONS,
    REDUCTIONS,
    check,
    check_options,
    dtype_name,
    make_logits,
    make_probabilities,
    make_target,
    make_weight,
    random_upstream,
)
from fastopt import layouts, reference
from fastopt.kernels.cross_entropy import launch as kernels
from fastopt.kernels.cross_entropy import plan
from fastopt.options import MEAN, NONE, SUM, Options
from triton_support import (
    GFX942,
    NVIDIA_TARGETS,
    SM90,
    Launch,
    recorded,
    target_name,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


# -- in the interpreter -----------------------------------------------------------------------------
# bfloat16 stores truncate there instead of rounding to nearest: half a unit in the last place
# more, which the budget's "twice" has room for.

# One for every branch: rows share a program, exactly a block, one class more, class counts that
# vectors divide or not, sweeps over the row; positions in tiles of one batch entry or across
# entries, with and without a remainder, classes in one block or in several.
BRANCHES = {
    "no-batch": (19,),
    "one-class": (5, 1),
    "rows-share-a-program": (67, 3),
    "exactly-a-block": (3, 2048),
    "a-block-and-one": (3, 2049),
    "multiple-of-8-only": (5, 1000),
    "odd-classes": (3, 1003),
    "one-position": (3, 5, 1),
    "entries-share-a-tile": (9, 5, 3),
    "tile-inside-an-entry": (2, 21, 64),
    "tiles-with-remainder": (2, 21, 67),
    "strided-classes-in-blocks": (1, 301, 9),
    "image": (2, 21, 13, 5),
    "volume": (2, 5, 3, 4, 7),
}
LONG_ROWS = {"sweeps": (2, 33000), "odd-sweeps": (2, 50257), "whole-blocks": (1, 65536)}
DENSE_SWEEPS = (1, 16389)


# Each row is a hazard of its own.
HAZARDS = {
    "minus-inf-elsewhere": {1: float("-inf")},
    "minus-inf-at-label": {0: float("-inf")},
    "minus-inf-everywhere": dict.fromkeys(range(40), float("-inf")),
    "inf-elsewhere": {2: float("inf")},
    "inf-at-label": {0: float("inf")},
    "inf-both-signs": {1: float("inf"), 2: float("-inf")},
    "nan-elsewhere": {3: float("nan")},
    "nan-last": {-1: float("nan")},
    "huge-spread": {0: -6e4, 1: 6e4},
}


class TestInterpreted:
    __test__ = INTERPRETED

    @pytest.fixture(autouse=True)
    def _triton_serves(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Under the face as on a GPU, where they are registered for the dispatcher."""
        for name in ("cross_entropy_forward", "cross_entropy_forward_backward"):
            launcher = fastopt.ops.flat(name, getattr(kernels, name))
            monkeypatch.setattr(fastopt.ops, name, launcher)

    @each_dtype
    @pytest.mark.parametrize("shape", BRANCHES.values(), ids=BRANCHES)
    def test_branches(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        logits = make_logits(shape, dtype)
        check_options(logits, OPTIONS["plain"])
        check_options(logits, EVERYTHING, reduction="mean")
        check_options(logits, EVERYTHING, reduction="none", upstream=random_upstream)
        weight = make_weight(shape[cases.class_dim(logits)], dtype)
        target = make_probabilities(logits)
        check(logits, target, weight=weight, reduction="sum")
        check(logits, target, weight=weight, label_smoothing=0.2)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
    @pytest.mark.parametrize("shape", LONG_ROWS.values(), ids=LONG_ROWS)
    def test_long_rows(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        logits = make_logits(shape, dtype)
        check_options(logits, OPTIONS["plain"])
        check_options(logits, OPTIONS["smoothing-weight"])
        check_options(logits, OPTIONS["plain"], reduction="none", upstream=random_upstream)

    @each_dtype
    def test_long_rows_of_probabilities(self, dtype: torch.dtype) -> None:
        logits = make_logits(DENSE_SWEEPS, dtype)
        weight = make_weight(logits.shape[1], dtype)
        check(logits, make_probabilities(logits), weight=weight)

    @each_reduction
    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
    def test_options(self, options: cases.Options, reduction: str) -> None:
        for shape, dtype in [
            ((33, 10), torch.float32),
            ((2, 7, 9), torch.float16),
            ((13,), torch.float64),
        ]:
            upstream = torch.ones_like if reduction == "mean" else random_upstream
            logits = make_logits(shape, dtype)
            check_options(logits, options, reduction=reduction, upstream=upstream)

    @pytest.mark.parametrize("layout", LAYOUTS_ND, ids=lambda layout: layout.__name__)
    def test_layouts(self, layout: Callable[[Tensor], Tensor]) -> None:
        """What lies between the values is NaN: a load that strays shows."""
        shapes: list[tuple[int, ...]] = [(2, 21, 9), (2, 5, 3, 4)]
        if layout in LAYOUTS_2D:
            # (numpy adds up along axis 0 one by one, a GPU in a tree: no more classes than these.)
            shapes += [(37, 19), (3, 65)]
        for shape in shapes:
            logits = layout(make_logits(shape))
            check_options(logits, OPTIONS["plain"])
            check_options(logits, EVERYTHING, reduction="none", upstream=random_upstream)
            target = make_probabilities(logits)
            if layout is not cases.expanded_classes:  # equal masses: only rounding would be left
                target = layout(target)
            check(logits, target)

    @each_dtype
    def test_edges_of_rows(self, dtype: torch.dtype) -> None:
        """Class counts that are no whole words of 16 bytes, wherever the rows begin."""
        layouts = (cases.contiguous, cases.offset, cases.row_strided, cases.every_second_row)
        for classes, layout in [*((263, layout) for layout in layouts), (2049, cases.contiguous)]:
            logits = layout(make_logits((3, classes), dtype))
            check_options(logits, OPTIONS["ignored"])
            check_options(logits, EVERYTHING, reduction="sum", upstream=random_upstream)
            weight = make_weight(classes, dtype)
            check(logits, layout(make_probabilities(logits)), weight=weight)
        logits = make_logits((5, 259), dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        check(logits, make_probabilities(logits, wide))
        check_options(cases.classes_last(make_logits((2, 259, 3), dtype)), EVERYTHING)

    @pytest.mark.parametrize("name", cases.FAR_APART)
    def test_offsets_beyond_32_bits(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Elements far apart give the bits of the same elements side by side."""
        shape, strides = cases.FAR_APART[name]
        near = make_logits(shape)
        masses = make_probabilities(near)
        if strides[1] == 1:
            near, masses = cases.classes_last(near), cases.classes_last(masses)
        labels = make_target(near)
        far, far_masses = (cases.far_apart(x, strides) for x in (near, masses))

        def run(logits: Tensor, target: Tensor) -> list[Tensor]:
            arguments = (logits, target, make_weight(shape[1], logits.dtype))
            options = Options(-100, 0.1, NONE, logits.dtype)
            results = [kernels.cross_entropy_forward(*arguments, options)]
            for reduction in (NONE, MEAN):
                options = options._replace(reduction=reduction)
                results += kernels.cross_entropy_forward_backward(*arguments, options)
            return results

        expected = [run(near, target) for target in (labels, masses)]
        monkeypatch.setattr(
            layouts,
            "empty_gradient",
            lambda like: cases.far_apart(torch.full_like(like, float("nan")), strides),
        )
        ours = [run(far, target) for target in (labels, far_masses)]
        for mine, right in zip(itertools.chain(*ours), itertools.chain(*expected), strict=True):
            assert_same_bits(mine, right)

    def test_a_label_at_every_place_of_an_edge(self) -> None:
        logits = make_logits((40, 259))
        ends = torch.cat([torch.arange(20), torch.arange(239, 259)])
        check(logits.bfloat16(), ends)
        check(logits, ends.flip(0), label_smoothing=0.1, reduction="sum")

    def test_target_in_another_layout_than_the_logits(self) -> None:
        for shape in [(6, 33), (2, 5, 7, 3)]:
            for target_layout in (cases.transposed, cases.every_second_class):
                logits = make_logits(shape)
                target = target_layout(make_probabilities(logits))
                check(logits, target, label_smoothing=0.1)
        labels = make_target(make_logits((6, 33, 5)))
        labels = labels.t().contiguous().t()
        weight = make_weight(66, torch.float32)[::2]
        check(make_logits((6, 33, 5)), labels, weight=weight)

    @pytest.mark.parametrize("ignore_index", [-1, 0, 6, -(2**63), 2**63 - 1])
    def test_ignore_index_may_be_any_integer(self, ignore_index: int) -> None:
        options = cases.Options(ignored=0.3, ignore_index=ignore_index, label_smoothing=0.1)
        for shape in [(77, 7), (5, 7, 3), (5, 7)]:
            check_options(make_logits(shape), options)

    def test_weights_that_sum_to_zero(self) -> None:
        logits = make_logits((6, 4))
        target = torch.zeros(6, dtype=torch.int64)
        for weight in ([0.0, 1.0, 1.0, 1.0], [0.0] * 4):
            for reduction in REDUCTIONS:
                for smoothing in (0.0, 0.1):
                    keywords = {"reduction": reduction, "label_smoothing": smoothing}
                    check(logits, target, weight=torch.tensor(weight), **keywords)
        balanced = torch.tensor([0, 0, 0, 1, 1, 1])
        check(logits, balanced, weight=torch.tensor([1.0, -1.0, 0.0, 0.0]))

    @each_dtype
    def test_infinities_and_nan(self, dtype: torch.dtype) -> None:
        rows = torch.randn(2 * len(HAZARDS), 40)  # every second one is harmless
        for row, hazard in zip(rows[::2], HAZARDS.values(), strict=True):
            for column, value in hazard.items():
                row[column] = value
        rows = rows.to(dtype)
        labels = torch.zeros(len(rows), dtype=torch.int64)
        weight = make_weight(40, dtype, "zeros").roll(1)
        # Rows with contiguous classes, and the same rows as positions with strided classes.
        for logits, target in [(rows, labels), (rows.t().contiguous()[None], labels[None])]:
            probabilities = F.one_hot(target, 40).movedim(-1, 1).to(dtype)
            for smoothing in (0.0, 0.1):
                keywords = {"reduction": "none", "label_smoothing": smoothing}
                check(logits, target, upstream=random_upstream, **keywords)
                check(logits, target, weight=weight, **keywords)
                check(logits, probabilities, weight=weight, **keywords)
            check(logits[:, :, ::2] if logits.dim() == 3 else logits[::2], target[..., ::2])

    def test_infinite_masses(self) -> None:
        """An infinite weight or probability of the likeliest class, of an early or a late block."""
        for shape in [(9, 7), (2, 7, 5), (2, 50257)]:
            logits = make_logits(shape) / 4  # confident, log(p) would be 0 in float32
            likeliest = logits.argmax(1)
            weight = torch.linspace(0.5, 2, shape[1])
            weight[likeliest.view(-1)[0]] = math.inf
            masses = make_probabilities(logits).scatter(1, likeliest.unsqueeze(1), math.inf)
            for smoothing in (0.0, 0.1):
                check(logits, likeliest, weight=weight, label_smoothing=smoothing)
                check(logits, masses, label_smoothing=smoothing)

    def test_minus_infinity_fills_whole_blocks_of_a_long_row(self) -> None:
        logits = make_logits((2, 50257))
        logits[0, :20000] = -float("inf")
        logits[1, 17000:] = -float("inf")
        target = torch.tensor([30000, 5])
        for smoothing in (0.0, 0.1):
            check(logits, target, reduction="none", label_smoothing=smoothing)

    @each_reduction
    def test_ignored_rows_may_hold_anything(self, reduction: str) -> None:
        """`check` asserts that their gradients are exactly zero."""
        for classes in (7, 300):
            rows = torch.randn(9, classes)
            rows[::2] = float("nan")
            rows[2, 0] = float("inf")
            rows[4] = -float("inf")
            target = torch.arange(9).remainder(classes)
            target[::2] = -100
            for logits, labels in [(rows, target), (rows.t().contiguous()[None], target[None])]:
                for smoothing in (0.0, 0.1):
                    check(logits, labels, reduction=reduction, label_smoothing=smoothing)

    @pytest.mark.parametrize("common", [1e3, 1e7, -1e7])
    def test_a_common_offset_changes_nothing(self, common: float) -> None:
        # Whole numbers, so that adding 1e7 to them is exact in float32.
        for shape in [(33, 10), (2, 21, 17), (1, 33000)]:
            logits = make_logits(shape).round()
            for options in (OPTIONS["plain"], OPTIONS["smoothing"]):
                check_options(logits + common, options)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
    def test_confident_rows_keep_the_gradient_of_the_true_class(self, dtype: torch.dtype) -> None:
        """p - 1 cancels: subtracted after rounding, most of its digits would be gone."""
        for shape in [(16, 100), (2, 21, 16), (2, 33000)]:
            logits = make_logits(shape) / 4
            target = make_target(logits).unsqueeze(1)
            logits = logits.scatter(1, target, logits.amax(1, keepdim=True) + 10).to(dtype)
            for reduction in ("sum", "none"):
                check(logits, target.squeeze(1), reduction=reduction)

    def test_gradients_of_a_row_sum_to_zero(self) -> None:
        for shape in [(33, 10), (3, 1003), (2, 21, 17), (1, 33000)]:
            logits = make_logits(shape)
            target = make_target(logits)
            weight = make_weight(shape[1], torch.float32)
            for w, smoothing in [(None, 0.0), (weight, 0.1)]:
                options = Options(-100, smoothing, SUM, torch.float32)
                _, grad, _ = kernels.cross_entropy_forward_backward(logits, target, w, options)
                sums = grad.double().sum(1)
                # Of numbers around 1, whatever is left of them where p and q are close.
                scale = grad.double().abs().sum(1).clamp(min=1.0)
                eps = torch.finfo(torch.float32).eps
                assert (sums.abs() <= 8 * eps * scale).all(), (shape, smoothing)

    @each_dtype
    @pytest.mark.parametrize("wrong", [-1, 7, 2**40, -(2**63)])
    def test_labels_out_of_range_make_their_row_nan(self, wrong: int, dtype: torch.dtype) -> None:
        """Their row and no other; as an address, 2^40 would not survive even here."""
        for shape in [(9, 7), (2, 7, 5)]:
            for smoothing, weight in [(0.0, None), (0.1, make_weight(7, dtype))]:
                if weight is not None and dtype != torch.float64:
                    weight = weight.float()
                logits = make_logits(shape, dtype)
                target = make_target(logits)
                right = target.clone()
                target.view(-1)[3] = wrong
                options = Options(-100, smoothing, NONE, dtype)
                run = kernels.cross_entropy_forward_backward
                loss, grad, _ = run(logits, target, weight, options)
                expected_loss, expected, _ = run(logits, right, weight, options)
                bad = (target != right).view_as(loss)
                assert loss[bad].isnan().all()
                assert_same_bits(loss[~bad], expected_loss[~bad])
                bad = bad.unsqueeze(1).expand_as(grad)
                assert grad[bad].isnan().all()
                assert_same_bits(grad[~bad], expected[~bad])
                for reduction in (MEAN, SUM):
                    options = options._replace(reduction=reduction)
                    loss, grad, _ = run(logits, target, weight, options)
                    assert loss.isnan() and grad[bad].isnan().all()
                    assert grad[~bad].isfinite().all()

    @pytest.fixture
    def guarded(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Outputs lie in wider buffers of NaN: (buffer, output) of every one."""
        outputs: list[tuple[Tensor, Tensor]] = []

        def inside(like: Tensor) -> Tensor:
            buffer = torch.full((like.numel() + 64,), float("nan"), dtype=like.dtype)
            output = buffer[32:-32].as_strided(like.shape, like.stride(), 32)
            outputs.append((buffer, output))
            return output

        original = layouts.empty_gradient
        monkeypatch.setattr(layouts, "empty_gradient", lambda like: inside(original(like)))
        rows_tensor = kernels._Call.rows_tensor
        monkeypatch.setattr(
            kernels._Call, "rows_tensor", lambda call, dtype: inside(rows_tensor(call, dtype))
        )
        scalar = kernels._Call.scalar
        monkeypatch.setattr(
            kernels._Call, "scalar", lambda call, dtype: inside(scalar(call, dtype))
        )
        return outputs

    def test_every_output_is_written_and_nothing_else(
        self, guarded: list[tuple[Tensor, Tensor]]
    ) -> None:
        dtype = torch.float16
        for shape in [(19,), (33, 3), (2, 1003), (9, 5, 3), (1, 21, 67), (1, 301, 9), (1, 33003)]:
            logits = make_logits(shape, dtype)
            target, _ = OPTIONS["ignored"].apply(logits, make_target(logits))
            target.view(-1)[0] = 0
            for labels in (target, make_probabilities(logits)):
                arguments = (logits, labels, None)
                for reduction in (NONE, MEAN):
                    options = Options(-100, 0.1, reduction, dtype)
                    kernels.cross_entropy_forward(*arguments, options)
                for reduction in (NONE, SUM):
                    options = Options(-100, 0.1, reduction, dtype)
                    kernels.cross_entropy_forward_backward(*arguments, options)
            for buffer, output in guarded:
                assert output.isfinite().all(), shape
                assert int(buffer.isnan().sum()) == 64, shape
            guarded.clear()

    @each_dtype
    def test_the_same_bits_every_time(self, dtype: torch.dtype) -> None:
        logits = make_logits((130, 10), dtype)
        arguments = (logits, make_target(logits), None, Options(-100, 0.1, MEAN, dtype))
        first = kernels.cross_entropy_forward_backward(*arguments)
        second = kernels.cross_entropy_forward_backward(*arguments)
        for ours, again in zip(first, second, strict=True):
            assert_same_bits(ours, again)

    def test_total_weight_in_several_parts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Parts of several blocks each, as millions of labels have."""
        monkeypatch.setattr(plan, "PARTS", 4)
        monkeypatch.setattr(plan, "LABELS_PER_PART", 16)
        for rows in (1, 16, 17, 64, 65, 333):
            logits = make_logits((rows, 3))
            for name in ("plain", "ignored-weight", "smoothing-weight"):
                check_options(logits, OPTIONS[name])

    @each_dtype
    @pytest.mark.parametrize("factor", [0.0, -1.5, 3.0, float("nan"), float("inf")])
    def test_scaling(self, factor: float, dtype: torch.dtype) -> None:
        for shape in [(5,), (130, 33), (2, 3, 5)]:
            for layout in (cases.contiguous, cases.transposed, cases.offset):
                if layout is cases.transposed and len(shape) == 1:
                    continue
                grad = layout(make_logits(shape, dtype)).clone(memory_format=torch.preserve_format)
                labels, _ = OPTIONS["ignored"].apply(grad, make_target(grad))
                dim = cases.class_dim(grad)
                grad.masked_fill_((labels == -100).unsqueeze(dim), 0)
                targets = [(labels, False), (labels, True), (make_probabilities(grad), False)]
                for target, smoothed in targets:
                    arguments = (torch.tensor(factor, dtype=dtype), target, -100, smoothed)
                    ours, expected, exactly = grad.clone(), grad.clone(), grad.double()
                    kernels.cross_entropy_scale_(ours, *arguments)
                    reference.cross_entropy_scale_(expected, *arguments)
                    reference.cross_entropy_scale_(exactly, *arguments)
                    assert_as_accurate(ours, expected, exactly)

    def test_scaling_by_one_touches_no_memory(self) -> None:
        pages = mmap.mmap(-1, 4 * 100_000, prot=mmap.PROT_READ)  # a store would end the process
        with warnings.catch_warnings(action="ignore"):
            grad = torch.frombuffer(pages, dtype=torch.float32).view(100, 1000)
        target = torch.zeros(100, dtype=torch.int64)
        kernels.cross_entropy_scale_(grad, torch.ones(()), target, -100, False)
        assert grad.count_nonzero() == 0

    def test_scaling_in_several_steps(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(plan, "SCALE_BLOCK", 64)
        monkeypatch.setattr(plan, "SCALE_PROGRAMS", 3)
        grad, target = torch.randn(17, 59), torch.arange(17)
        expected = grad * 2
        kernels.cross_entropy_scale_(grad, torch.tensor(2.0), target, -100, False)
        assert_same_bits(grad, expected)
        kernels.cross_entropy_scale_(grad, torch.tensor(math.inf), target, 3, False)
        reference.cross_entropy_scale_(expected, torch.tensor(math.inf), target, 3, False)
        torch.testing.assert_close(grad, expected, rtol=0, atol=0, equal_nan=True)


class TestInTheInterpreter:
    """Every test above, in a process that has Triton's interpreter; each apart, for those of
    pytest-xdist share the work.
    """

    __test__ = not INTERPRETED

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "name", [name for name in vars(TestInterpreted) if name.startswith("test_")]
    )
    def test_in_a_process_of_its_own(self, name: str) -> None:
        child = run_pytest(
            f"{__file__}::TestInterpreted::{name}",
            TRITON_INTERPRET="1",
            OMP_NUM_THREADS="1",  # the interpreter is numpy; tensors here are small
            # numpy warns of every infinity that a hazard's row computes with.
            PYTHONWARNINGS="ignore::RuntimeWarning",
        )
        assert child.returncode == 0, child.stdout[-8000:] + child.stderr[-2000:]


# -- checks of the launchers ------------------------------------------------------------------------


def arguments_of(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    loss_dtype: torch.dtype = torch.float32,
    **changed: object,
) -> tuple[Tensor, Tensor, Tensor | None, Options]:
    options = Options(-100, 0.0, MEAN, loss_dtype)
    return logits, target, weight, options._replace(**changed)


def reference_rows(logits: Tensor) -> torch.Size:
    return logits.shape[:0] if logits.dim() == 1 else logits.shape[:1] + logits.shape[2:]


LOGITS, TARGET = make_logits((4, 10)), torch.zeros(4, dtype=torch.int64)
NONSENSE = {
    "integer logits": {"logits": torch.zeros(4, 10, dtype=torch.int64)},
    "no class dimension": {"logits": torch.zeros(()), "target": torch.tensor(0)},
    "target of another shape": {"target": torch.zeros(5, dtype=torch.int64)},
    "target of another type": {"target": torch.zeros(4, dtype=torch.int32)},
    "target elsewhere": {"target": torch.zeros(4, dtype=torch.int64, device="meta")},
    "probabilities of another shape": {"target": torch.zeros(4, 11)},
    "probabilities of another type": {"target": torch.zeros(4, 10, dtype=torch.float64)},
    "weight of another shape": {"weight": torch.ones(9)},
    "weight of another type": {"weight": torch.ones(10, dtype=torch.float64)},
    "weight elsewhere": {"weight": torch.ones(10, device="meta")},
    "smoothing above 1": {"label_smoothing": 1.5},
    "reduction 3": {"reduction": 3},
}


class TestLaunchers:
    __test__ = not INTERPRETED

    @pytest.mark.parametrize("changed", NONSENSE.values(), ids=NONSENSE)
    def test_nonsense_is_refused_before_a_launch(self, changed: dict[str, object]) -> None:
        arguments = arguments_of(**{"logits": LOGITS, "target": TARGET} | changed)
        with recorded(kernels) as launches:
            for launcher in (
                kernels.cross_entropy_forward,
                kernels.cross_entropy_forward_backward,
            ):
                with pytest.raises(RuntimeError, match="fastopt::cross_entropy: "):
                    launcher(*arguments)
        assert not launches

    def test_other_refusals(self) -> None:
        arguments = arguments_of(LOGITS, TARGET, loss_dtype=torch.int64)
        with pytest.raises(RuntimeError, match="the loss must be"):
            kernels.cross_entropy_forward(*arguments)
        scalar = torch.ones(())
        for grad, factor, target in [
            (torch.ones(4, 10)[:, ::2], scalar, TARGET),
            (torch.ones(1).expand(4, 10), scalar, TARGET),
            (torch.ones(4, 10, dtype=torch.int64), scalar, TARGET),
            (torch.ones(4, 10), torch.ones(2), TARGET),
            (torch.ones(4, 10), scalar.to("meta"), TARGET),
            (torch.ones(4, 10), scalar, TARGET[:3]),
        ]:
            with pytest.raises(RuntimeError, match="fastopt::cross_entropy: "):
                kernels.cross_entropy_scale_(grad, factor, target, -100, False)

    @each_reduction
    @pytest.mark.parametrize("shape", [(0, 5), (2, 5, 0), (0, 5, 2)], ids=dtype_name)
    def test_empty_batches_launch_nothing(self, shape: tuple[int, ...], reduction: str) -> None:
        number = {"none": NONE, "mean": MEAN, "sum": SUM}[reduction]
        logits = make_logits(shape)
        arguments = arguments_of(logits, make_target(logits), reduction=number)
        with recorded(kernels) as launches:
            loss = kernels.cross_entropy_forward(*arguments)
            _, grad, _ = kernels.cross_entropy_forward_backward(*arguments)
            kernels.cross_entropy_scale_(grad, torch.tensor(2.0), make_target(logits), -100, False)
        assert not launches
        stock = F.cross_entropy(logits, make_target(logits), reduction=reduction)
        assert torch.equal(loss.isnan(), stock.isnan()) and grad.shape == shape
        assert torch.equal(loss.nan_to_num(), stock.nan_to_num())

    @pytest.mark.parametrize("layout", LAYOUTS_ND, ids=lambda layout: layout.__name__)
    def test_gradients_have_the_layout_of_the_fakes(
        self, layout: Callable[[Tensor], Tensor]
    ) -> None:
        logits = layout(make_logits((2, 5, 3, 4)))
        arguments = arguments_of(logits, torch.zeros(2, 3, 4, dtype=torch.int64))
        with recorded(kernels):
            _, grad, _ = kernels.cross_entropy_forward_backward(*arguments)
        assert grad.stride() == layouts.empty_gradient(logits).stride()


# -- compiled ahead of time -------------------------------------------------------------------------


def launches_of(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    op: str = "forward_backward",
    reduction: int = MEAN,
    probabilities: bool = False,
    weighted: bool = False,
    label_smoothing: float = 0.0,
) -> dict[str, Launch]:
    """What an op would launch for inputs that need no memory, by the name of the kernel."""
    logits = torch.empty(shape, dtype=dtype, device="meta")
    rows = reference_rows(logits)
    target = logits if probabilities else torch.empty(rows, dtype=torch.int64, device="meta")
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.empty(shape[1], dtype=accumulate, device="meta")
    arguments = arguments_of(
        logits,
        target,
        weight if weighted else None,
        dtype,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    with recorded(kernels) as launches:
        getattr(kernels, f"cross_entropy_{op}")(*arguments)
    return {launch.name: launch for launch in launches}


HALF, FLOAT, DOUBLE = torch.bfloat16, torch.float32, torch.float64
# What is compiled, and how many programs an SM is meant to hold at once.
COMPILED: dict[str, tuple[dict[str, object], int]] = {
    "rows-share-a-program": ({"shape": (4096, 16), "dtype": FLOAT}, 3),
    "odd-rows-share-a-program": ({"shape": (4096, 1003), "dtype": HALF}, 4),
    "imagenet": ({"shape": (4096, 1000), "dtype": HALF}, 8),
    "block": ({"shape": (8192, 4096), "dtype": HALF}, 4),
    "largest-block": ({"shape": (8192, 32000), "dtype": HALF}, 1),
    "largest-block-float32": ({"shape": (8192, 32000), "dtype": FLOAT}, 1),
    "sweeps": ({"shape": (8192, 128256), "dtype": HALF}, 1),
    "odd-block": ({"shape": (8192, 16383), "dtype": HALF}, 1),
    "odd-sweeps": ({"shape": (8192, 50257), "dtype": HALF}, 1),
    "sweeps-float32": ({"shape": (8192, 151936), "dtype": FLOAT}, 1),
    "sweeps-of-the-loss": ({"shape": (8192, 128256), "dtype": HALF, "op": "forward"}, 1),
    "largest-block-float64": ({"shape": (64, 16384), "dtype": DOUBLE}, 1),
    "smoothing-weight": (
        {"shape": (8192, 16384), "dtype": HALF, "weighted": True, "label_smoothing": 0.1},
        1,
    ),
    "probabilities": ({"shape": (8192, 16384), "dtype": HALF, "probabilities": True}, 1),
    "image": ({"shape": (8, 21, 512, 512), "dtype": HALF}, 4),
    "image-float32": ({"shape": (8, 150, 512, 512), "dtype": FLOAT}, 2),
    "image-in-blocks": ({"shape": (8, 1000, 64, 64), "dtype": HALF}, 2),
}


SMALL_SHAPES = [(64, 1), (64, 10), (64, 32), (64, 257), (64, 5000), (2, 10, 64)]


def main_launch(case: str) -> Launch:
    arguments, _ = COMPILED[case]
    return launches_of(**arguments)["forward_kernel"]


class TestCompiled:
    __test__ = not INTERPRETED

    @pytest.mark.parametrize("target", NVIDIA_TARGETS, ids=target_name)
    @pytest.mark.parametrize("case", COMPILED)
    def test_wide_accesses_no_spills_and_occupancy(self, case: str, target: object) -> None:
        launch = main_launch(case)
        compiled = launch.compile(target)
        # Logits are read with eviction hints and gradients written past the caches, 16 bytes a
        # thread; single elements only at the edges of rows that are no whole words.
        edges = {8 * HALF.itemsize} if launch.arguments.get("EDGE", 1) > 1 else set()
        assert compiled.accesses(r"ld\.global\.L1::evict") == {128} | edges
        if launch.arguments["grad_ptr"] is not None:
            assert compiled.accesses(r"st\.global\.cs") == {128} | edges
        resources = compiled.resources()
        assert resources["STACK"] == resources["LOCAL"] == 0, "spills"
        programs = COMPILED[case][1]
        assert resources["REG"] <= 65536 // (32 * launch.warps * programs), resources
        assert launch.warps * programs <= 64
        arguments = launch.arguments
        if arguments.get("LOOP") and arguments["AXIS"] == 1 and arguments["grad_ptr"] is not None:
            # A second row on the SM would push the first one's logits out of L2.
            assert resources["REG"] > 65536 // (2 * 32 * launch.warps), resources

    @pytest.mark.parametrize("dtype", [FLOAT, HALF, DOUBLE], ids=dtype_name)
    @pytest.mark.parametrize("shape", SMALL_SHAPES, ids=dtype_name)
    def test_every_kind_of_call(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Compiles at all. Versions of Triton fail at different combinations."""
        for options in (
            {"op": "forward", "reduction": NONE},
            {"weighted": True, "label_smoothing": 0.1},
            {"probabilities": True, "weighted": True},
        ):
            for launch in launches_of(shape, dtype, **options).values():
                assert launch.compile(SM90).kernel.asm["cubin"], launch.name

    @pytest.mark.parametrize("case", COMPILED)
    def test_amd(self, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.version, "hip", "7.0")
        launch = main_launch(case)
        assert 64 * launch.warps <= 1024, "what a program of gfx942 may have"
        assembly = launch.compile(GFX942).kernel.asm["amdgcn"]
        assert "global_load_dwordx4" in assembly or "buffer_load_dwordx4" in assembly
        spills = re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", assembly)
        assert spills and set(spills) == {"0"}

    @pytest.mark.parametrize("target", [*NVIDIA_TARGETS, GFX942], ids=target_name)
    def test_small_kernels(self, target: object) -> None:
        launches = launches_of((8192, 50257), FLOAT, weighted=True)
        with recorded(kernels) as scale:
            grad = torch.empty(8191, 50257, dtype=HALF, device="meta")
            labels = torch.empty(8191, dtype=torch.int64, device="meta")
            factor = torch.empty((), device="meta")
            kernels.cross_entropy_scale_(grad, factor, labels, -100, False)
        for launch in (
            launches["total_weight_kernel"],
            launches["reduce_kernel"],
            launches["forward_kernel"],
            *scale,
        ):
            compiled = launch.compile(target)
            if target is not GFX942:
                resources = compiled.resources()
                assert resources["STACK"] == resources["LOCAL"] == 0, launch.name
                if launch in scale:  # an odd count: whole vectors, and the rest of one block
                    assert compiled.accesses(r"st\.global") == {128, 16}

    def test_what_a_step_launches(self) -> None:
        """Label counts, rows, sum; fewer where there is nothing to count or to add up."""
        counted = ["total_weight_kernel", "forward_kernel", "reduce_kernel"]
        shape = (64, 1000)
        assert list(launches_of(shape, HALF)) == counted
        assert list(launches_of(shape, HALF, reduction=SUM)) == counted[1:]
        assert list(launches_of(shape, HALF, probabilities=True)) == counted[1:]
        assert list(launches_of(shape, HALF, "forward", NONE)) == counted[1:2]
