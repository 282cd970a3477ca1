"""The Triton kernels of cross_entropy without a GPU: launchers and plan, compiled ahead of time, and
in the interpreter what is theirs alone: their values are test_cross_entropy.py's under
FASTOPT_TEST_KERNELS=interpreted.

Triton decides when a kernel is defined whether it is interpreted, so under TRITON_INTERPRET=1 this
file has TestInterpreted, and the other classes without.
"""

from __future__ import annotations

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
from accuracy import assert_same_bits
from cross_entropy_cases import (
    DTYPES,
    EVERYTHING,
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
from cross_entropy_kernels import these_kernels_answer  # noqa: F401
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


class TestInterpreted:
    __test__ = INTERPRETED

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

    def test_a_label_at_every_place_of_an_edge(self) -> None:
        logits = make_logits((40, 259))
        ends = torch.cat([torch.arange(20), torch.arange(239, 259)])
        check(logits.bfloat16(), ends)
        check(logits, ends.flip(0), label_smoothing=0.1, reduction="sum")

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
