"""Which blocks Triton's kernels of cross_entropy work in (kernels/cross_entropy/plan.py)."""

from __future__ import annotations

import itertools

import pytest

from fastopt import layouts
from fastopt.kernels.cross_entropy import plan

# A class count counts only by the power of two above it: these are all the cases up to 2^20.
CLASS_COUNTS = sorted({n for k in range(21) for n in (2**k, 2**k + 1, 2**k - 1) if 1 <= n <= 2**20})


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("class_axis", [0, 1])
def test_configurations_are_legal(class_axis: int, itemsize: int) -> None:
    for dense, edges in itertools.product((False, True), repeat=2):
        for classes in CLASS_COUNTS:
            case = (classes, class_axis, itemsize, dense, edges)
            config = plan.config(*case)
            for size in (config.rows, config.block, config.warps):
                assert size & (size - 1) == 0 < size, case
            assert config.loop == (config.block < classes), case
            assert config.warps <= 32, case
            # 64 Ki registers an SM: the elements that a thread holds take at most half.
            registers = (2 if itemsize == 8 else 1) * (2 if dense else 1)
            held = config.rows * config.block * registers // (32 * config.warps)
            assert held <= min(255, 65536 // (32 * config.warps)) // 2, case


def test_no_recompilation_per_class_count() -> None:
    found = {plan.config(classes, axis, 2, False) for classes in CLASS_COUNTS for axis in (0, 1)}
    assert len(found) <= 24


def test_unit_divides_what_vectors_step_over() -> None:
    strides = layouts.Strides
    contiguous = [strides(0, 1, 1000), strides(0, 0, 0), strides(0, 1, 1000)]
    assert plan.unit(1000, 77, contiguous, 1) == 8
    assert plan.unit(50257, 77, [strides(0, 1, 50257)], 1) == 1
    assert plan.unit(1000, 77, [strides(0, 1, 1003)], 1) == 1
    assert plan.unit(1000, 77, [strides(0, 1, 1004)], 1) == 4
    assert plan.unit(21, 196, [strides(21 * 196, 196, 1)], 0) == 4
    assert plan.unit(21, 49, [strides(21 * 49, 49, 1)], 0) == 1


def test_edges_only_where_rows_share_their_place_in_a_word() -> None:
    strides = layouts.Strides
    odd, padded = strides(0, 1, 50257), strides(0, 1, 50264)
    assert plan.edge(50257, [odd, odd], 1, itemsize=2, unit=1) == 8
    assert plan.edge(50257, [odd, odd], 1, itemsize=4, unit=1) == 4
    assert plan.edge(50257, [odd, odd], 1, itemsize=8, unit=1) == 2
    assert plan.edge(50257, [odd, padded], 1, itemsize=2, unit=1) == 1
    assert plan.edge(50257, [padded, padded], 1, itemsize=2, unit=1) == 8
    assert plan.edge(50257, [odd, strides(0, 2, 50257)], 1, itemsize=2, unit=1) == 1
    assert plan.edge(50257, [odd, odd], 0, itemsize=2, unit=1) == 1
    assert plan.edge(50256, [strides(0, 1, 50256)], 1, itemsize=2, unit=8) == 1
    assert plan.edge(33, [strides(0, 1, 33)], 1, itemsize=2, unit=1) == 1
