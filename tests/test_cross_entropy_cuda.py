"""The CUDA kernels of cross-entropy without a GPU: their own source runs on the CPU (g++ and
tests/emulation/emulation.h) and is compared with float64; nvcc compiles it for three architectures
and the result is looked at.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from accuracy import assert_as_accurate, assert_same_bits
from compiling import compiled
from cross_entropy_cases import (
    DTYPES,
    EVERYTHING,
    FAR_APART,
    LAYOUTS_2D,
    LAYOUTS_ND,
    OPTIONS,
    Options,
    class_dim,
    classes_last,
    differentiate,
    dtype_name,
    exact,
    far_apart,
    make_logits,
    make_probabilities,
    make_target,
    offset,
)
from fastopt import layouts, ops, reference
from fastopt.loss import _largest_mass

ROOT = Path(__file__).parents[1]
SANITIZE = os.environ.get("FASTOPT_SANITIZE") == "1"
ELEMENTS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

# -- the library ------------------------------------------------------------------------------------


class Plan(ctypes.Structure):
    """Mirrors PlanOut in tests/emulation/cross_entropy.cpp."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("kernel", "held", "threads", "lanes", "adjacent", "cluster", "slice", "shared_bytes"),
            "blocks",
        )
    ]


PACKED, ROWS, STRIDED = range(3)


@pytest.fixture(scope="session")
def emulation() -> ctypes.CDLL:
    """The CUDA launcher and its kernels compiled for the CPU, as torch.ops.fastopt_emulated; under
    FASTOPT_SANITIZE=1 with sanitizers."""
    source = ROOT / "tests/emulation/cross_entropy.cpp"
    name = "cross_entropy_sanitize.so" if SANITIZE else "cross_entropy.so"
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"] if SANITIZE else []
    include = Path(torch.__file__).parent / "include"
    library = compiled(
        ROOT / "build/emulation" / name,
        [source, *(ROOT / "tests/emulation").glob("*.h"), *(ROOT / "csrc").rglob("*.h")],
        [
            *("g++", "-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", *flags),
            *("-fPIC", "-shared", "-fvisibility=hidden", "-U_FORTIFY_SOURCE"),
            *("-DFASTOPT_EMULATED", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
            *("-Icsrc", "-Itests/emulation", "-isystem", include),
            *("-isystem", include / "torch/csrc/api/include", source),
            *(f"-L{include.parent / 'lib'}", "-ltorch_cpu"),
        ],
    )
    for name, schema in ops.SCHEMAS.items():
        DEFINITIONS.define(name + schema)
    torch.ops.load_library(library)
    return ctypes.CDLL(str(library))


DEFINITIONS = torch.library.Library("fastopt_emulated", "DEF")


# -- devices ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """What the plan knows of a device. Some are invented: small rows then enter every branch."""

    sm_count: int
    shared_per_block: int
    shared_per_sm: int
    clusters: bool


H200 = Device(132, 227 << 10, 228 << 10, True)
A100 = Device(108, 163 << 10, 164 << 10, False)
RTX_5090 = Device(170, 99 << 10, 100 << 10, True)
DEVICES = {"H200": H200, "A100": A100, "RTX-5090": RTX_5090}


def tiny(shared: int, clusters: bool = True) -> Device:
    """A device with `shared` bytes for each of two blocks."""
    return Device(4, shared, 2 * (shared + 1024), clusters)


# -- calls ------------------------------------------------------------------------------------------


class Guarded:
    """A gradient between bytes that nobody may write. The sanitizers guard all other outputs."""

    MARGIN, PATTERN = 64, 0xA5

    def __init__(self, like: Tensor):
        layout = layouts.empty_gradient(like)
        strides = zip(layout.shape, layout.stride(), strict=True)
        last = sum((size - 1) * stride for size, stride in strides)
        self.bytes = (last + 1 if layout.numel() else 0) * layout.element_size()
        self.buffer = torch.full((self.bytes + 2 * self.MARGIN,), self.PATTERN, dtype=torch.uint8)
        inside = self.buffer[self.MARGIN : self.MARGIN + self.bytes]
        inside.fill_(0xFF)  # NaN: what is not written shows
        self.tensor = inside.view(like.dtype).as_strided(layout.shape, layout.stride())

    def check(self) -> Tensor:
        guards = [self.buffer[: self.MARGIN], self.buffer[self.MARGIN + self.bytes :]]
        assert all((guard == self.PATTERN).all() for guard in guards), "a store out of bounds"
        return self.tensor


@dataclass
class FarGradient:
    """Elements far apart, in place of a Guarded."""

    tensor: Tensor

    def check(self) -> Tensor:
        return self.tensor


def view_strides(tensor: Tensor) -> tuple[int, int, int]:
    """(batch, class, position), where the positions step through memory as one."""
    if tensor.dim() == 1:
        return 0, tensor.stride(0), 0
    wide = [axis for axis in range(2, tensor.dim()) if tensor.shape[axis] != 1]
    return tensor.stride(0), tensor.stride(1), tensor.stride(wide[-1]) if wide else 0


@dataclass
class Emulation:
    """Calls the ops on an invented or a real device."""

    library: ctypes.CDLL
    device: Device
    descending: bool = False
    plans: list[Plan] = field(default_factory=list)

    def _call(
        self,
        op: str,
        logits: Tensor,
        target: Tensor,
        loss_dtype: torch.dtype,
        reduction: str,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        **more: Tensor | None,
    ) -> object:
        self.use()
        result = getattr(torch.ops.fastopt_emulated, op)(
            *(logits, target, weight, ignore_index, label_smoothing),
            *(("none", "mean", "sum").index(reduction), loss_dtype),
            **more,
        )
        self.plans.append(Plan())
        self.library.fastopt_last_plan(ctypes.byref(self.plans[-1]))
        return result

    def use(self) -> None:
        set_device(self.library, self.device, self.descending)

    def forward(
        self, logits: Tensor, target: Tensor, loss_dtype: torch.dtype, **options: object
    ) -> Tensor:
        return self._call("cross_entropy_forward", logits, target, loss_dtype, **options)

    def forward_backward(
        self,
        logits: Tensor,
        target: Tensor,
        loss_dtype: torch.dtype,
        grad: Guarded | FarGradient | None = None,
        **options: object,
    ) -> tuple[Tensor, Tensor]:
        """The loss, and its gradient for an upstream gradient of 1, out of its units."""
        grad = grad or Guarded(logits)
        strides = map(ctypes.c_int64, view_strides(grad.tensor))
        self.library.fastopt_set_gradient(ctypes.c_void_p(grad.tensor.data_ptr()), *strides)
        largest_mass = _largest_mass(logits, target, options.get("weight"))
        loss, own, unit = self._call(
            *("cross_entropy_forward_backward", logits, target, loss_dtype),
            **options,
            largest_mass=largest_mass,
        )
        assert own.stride() == layouts.empty_gradient(logits).stride()
        plain = grad.check()
        if logits.dtype == torch.float16:
            plain = (plain.float() * unit).half()
        else:
            assert unit == 1
        return loss, plain


def set_device(library: ctypes.CDLL, device: Device, descending: bool = False) -> None:
    limits = (device.sm_count, device.shared_per_block, device.shared_per_sm)
    library.fastopt_set_device(*map(ctypes.c_int64, limits), device.clusters, descending)


def accumulate_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


# -- the check --------------------------------------------------------------------------------------


# Both orders of the threads touch the same memory: one is enough for the sanitizers.
ORDERS = (False,) if SANITIZE else (False, True)


def check(
    library: ctypes.CDLL, device: Device, logits: Tensor, target: Tensor, **keywords: object
) -> list[Plan]:
    """Every op and reduction against float64, in both orders of the threads.

    Returns the plans of the loss alone, of the loss with its gradient, and so on.
    """
    weight = keywords.get("weight")
    options = {
        **keywords,
        "weight": weight.to(accumulate_dtype(logits)) if isinstance(weight, Tensor) else None,
    }
    results, plans = [], []
    for descending in ORDERS:
        emulation = Emulation(library, device, descending)
        results.append(run_all(emulation, logits, target, options))
        plans = emulation.plans
    for name, ours in results[0].items():
        assert_same_bits(ours, results[-1][name], f"{name} in the other order of threads")
    compare(results[0], logits, target, keywords)
    return plans


def run_all(
    emulation: Emulation,
    logits: Tensor,
    target: Tensor,
    options: dict[str, object],
    new_gradient: Callable[[Tensor], Guarded | FarGradient] = Guarded,
) -> dict[str, Tensor]:
    loss_dtype = torch.promote_types(logits.dtype, target.dtype)
    results: dict[str, Tensor] = {}
    for reduction in ("mean", "sum", "none"):
        options = {**options, "reduction": reduction}
        results[f"{reduction} loss"] = emulation.forward(logits, target, loss_dtype, **options)
        grad = new_gradient(logits)
        both = emulation.forward_backward(logits, target, loss_dtype, grad, **options)
        results[f"{reduction} loss with gradient"] = both[0]
        results[f"{reduction} gradient"] = both[1]
    return results


def compare(
    ours: dict[str, Tensor], logits: Tensor, target: Tensor, keywords: dict[str, object]
) -> None:
    classes = logits.shape[class_dim(logits)]
    for reduction in ("mean", "sum", "none"):
        arguments = {**keywords, "reduction": reduction}
        stock = differentiate(F.cross_entropy, logits, target, **arguments)
        oracle = exact(differentiate, logits, target, **arguments)
        if not target.is_floating_point():
            ignored = target == keywords.get("ignore_index", -100)
            oracle.gradients["logits"].masked_fill_(ignored.unsqueeze(class_dim(logits)), 0.0)
        for what, theirs, exactly in [
            ("loss", stock.loss, oracle.loss),
            ("loss with gradient", stock.loss, oracle.loss),
            ("gradient", stock.gradients["logits"], oracle.gradients["logits"]),
        ]:
            what = f"{reduction} {what}"
            assert_as_accurate(ours[what], theirs, exactly, what, classes)


def check_indices(
    library: ctypes.CDLL, device: Device, logits: Tensor, options: Options
) -> list[Plan]:
    target, keywords = options.apply(logits, make_target(logits))
    return check(library, device, logits, target, **keywords)


# -- every branch -----------------------------------------------------------------------------------
# name: shape, device, and what the plan of the gradient in forward has to be, so that no branch is
# left without its case when a constant changes.

FEW_SMS = Device(1, 227 << 10, 228 << 10, True)

BRANCHES: dict[str, tuple[tuple[int, int], Device, dict[str, int]]] = {
    "packed-rows-side-by-side": ((700, 3), H200, {"kernel": PACKED, "threads": 32}),
    "packed-rows-of-words": ((301, 32), H200, {"kernel": PACKED, "threads": 32}),
    "packed-many-rows-a-thread": ((701, 3), FEW_SMS, {"kernel": PACKED, "slice": 128 * 5}),
    "packed-long-rows": ((70, 127), H200, {"kernel": PACKED, "threads": 32}),
    "few-lanes-a-row": ((140, 131), FEW_SMS, {"kernel": ROWS, "held": 1, "lanes": 8}),
    "half-a-warp-a-row": ((11, 131), H200, {"kernel": ROWS, "held": 1, "lanes": 16}),
    "warp-a-row": ((11, 263), H200, {"kernel": ROWS, "held": 1, "lanes": 32, "cluster": 1}),
    "block-a-row": ((3, 3001), H200, {"kernel": ROWS, "held": 1, "cluster": 1}),
    "cluster-of-2": ((3, 1501), tiny(4800), {"kernel": ROWS, "held": 1, "cluster": 2}),
    "cluster-of-4": ((2, 1501), tiny(2500), {"kernel": ROWS, "held": 1, "cluster": 4}),
    "cluster-of-8": ((2, 1501), tiny(1600), {"kernel": ROWS, "held": 1, "cluster": 8}),
    "few-lanes-read-twice": ((70, 131), tiny(900, False), {"kernel": ROWS, "held": 0, "lanes": 16}),
    "warps-read-twice": ((11, 263), tiny(900, False), {"kernel": ROWS, "held": 0, "lanes": 32}),
    "cluster-reads-twice": ((3, 3001), tiny(1200), {"kernel": ROWS, "held": 0, "cluster": 8}),
    "block-reads-twice": ((3, 3001), tiny(900, False), {"kernel": ROWS, "held": 0, "cluster": 1}),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_every_branch(emulation: ctypes.CDLL, name: str) -> None:
    shape, device, expected = BRANCHES[name]
    logits = make_logits(shape)
    plans = check_indices(emulation, device, logits, EVERYTHING)
    gradient_in_forward = plans[1]
    for key, value in expected.items():
        assert getattr(gradient_in_forward, key) == value, (key, value)
    check_indices(emulation, device, logits, OPTIONS["plain"])


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_many_vectors_a_lane(emulation: ctypes.CDLL, dtype: torch.dtype) -> None:
    """Rows enough to fill the device: few lanes take a row, with several vectors under way."""
    logits = make_logits((40, 1999), dtype)
    loss, gradient, *_ = check_indices(emulation, FEW_SMS, logits, OPTIONS["plain"])
    for plan, held in ((loss, 0), (gradient, 1)):
        assert (plan.kernel, plan.held, plan.cluster) == (ROWS, held, 1)
        assert 4 * plan.lanes * (16 // dtype.itemsize) <= 1999
    check_indices(emulation, FEW_SMS, logits, EVERYTHING)
    check(emulation, FEW_SMS, logits, make_probabilities(logits))


SPREAD = Device(64, 227 << 10, 228 << 10, True)


def test_few_long_rows_are_spread_over_a_cluster(emulation: ctypes.CDLL) -> None:
    """They would fit one block, which would leave the device idle."""
    logits = make_logits((1, 16385))
    loss, gradient, *_ = check_indices(emulation, SPREAD, logits, EVERYTHING)
    assert (loss.kernel, loss.held, loss.cluster) == (ROWS, 0, 4)
    assert (gradient.kernel, gradient.held, gradient.cluster) == (ROWS, 1, 4)


# Rows side by side: as many as a block has threads, and fewer, with the classes divided. Tiles end
# within a batch entry, at its end and behind it.
STRIDED_SHAPES: dict[str, tuple[tuple[int, ...], Device, int]] = {
    "wide": ((2, 3, 13, 23), H200, 256),
    "pairs": ((3, 15, 22, 34), FEW_SMS, 256),
    "classes-in-2": ((1, 7, 190), H200, 128),
    "classes-in-4": ((2, 9, 7, 9), H200, 64),
    "classes-in-8": ((2, 67, 37), H200, 32),
    "one-position": ((40, 33, 1), H200, 32),
}


@pytest.mark.parametrize("name", STRIDED_SHAPES)
def test_strided_classes(emulation: ctypes.CDLL, name: str) -> None:
    shape, device, lanes = STRIDED_SHAPES[name]
    logits = make_logits(shape)
    if name == "one-position":
        logits = logits.transpose(0, 1).contiguous().transpose(0, 1)
    plans = check_indices(emulation, device, logits, EVERYTHING)
    assert (plans[1].kernel, plans[1].lanes) == (STRIDED, lanes)
    assert plans[1].adjacent == (2 if name == "pairs" else 1)
    check(emulation, device, logits, make_probabilities(logits), label_smoothing=0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_pairs_of_rows(emulation: ctypes.CDLL, dtype: torch.dtype) -> None:
    """One access for two of them, where they lie side by side and are aligned to it."""
    logits = make_logits((3, 11, 22, 34), dtype)
    for options in OPTIONS.values():
        plans = check_indices(emulation, FEW_SMS, logits, options)
        assert [plan.adjacent for plan in plans] == [2] * len(plans)
    check(emulation, FEW_SMS, logits, make_probabilities(logits), label_smoothing=0.1)
    apart = {
        "an odd address": offset(logits),
        "an odd number": make_logits((3, 11, 23, 33), dtype),
        "odd classes": make_logits((3, 11, 22 * 34 + 1), dtype)[..., :-1],
        "every other": make_logits((3, 11, 22, 68), dtype)[..., ::2],
    }
    for name, other in apart.items():
        plans = check_indices(emulation, FEW_SMS, other, EVERYTHING)
        assert plans[0].kernel == STRIDED and plans[0].adjacent == 1, name


# -- dtypes, targets, options -----------------------------------------------------------------------
# One shape for each kernel; rows of an odd number of classes start at every alignment.

KERNELS: dict[str, tuple[tuple[int, ...], Device]] = {
    "packed": ((37, 10), H200),
    "packed-words": ((37, 16), FEW_SMS),
    "few-lanes": ((140, 133), FEW_SMS),
    "warp": ((11, 263), H200),
    "block": ((3, 2345), H200),
    "cluster": ((3, 709), tiny(2600)),
    "loop": ((3, 709), tiny(900, False)),
    "strided": ((2, 19, 3, 11), H200),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("name", KERNELS)
def test_dtypes(emulation: ctypes.CDLL, name: str, dtype: torch.dtype) -> None:
    shape, device = KERNELS[name]
    logits = make_logits(shape, dtype)
    check_indices(emulation, device, logits, EVERYTHING)
    check_indices(emulation, device, logits, OPTIONS["plain"])
    for target_dtype in {dtype, accumulate_dtype(logits)}:
        probabilities = make_probabilities(logits, target_dtype)
        check(emulation, device, logits, probabilities)
        _, keywords = EVERYTHING.apply(logits, probabilities)
        if target_dtype == dtype:  # stock wants one dtype
            check(emulation, device, logits, probabilities, **keywords)


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_options(emulation: ctypes.CDLL, option: str) -> None:
    for shape, device in KERNELS.values():
        check_indices(emulation, device, make_logits(shape), OPTIONS[option])


# -- layouts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS_2D, ids=lambda layout: layout.__name__)
def test_layouts(emulation: ctypes.CDLL, layout: Callable[[Tensor], Tensor]) -> None:
    """Logits, and probabilities of another layout beside them; their gradients are dense."""
    for shape, device, dtype in [
        ((19, 21), H200, torch.float32),
        ((301, 21), FEW_SMS, torch.bfloat16),
        ((37, 24), FEW_SMS, torch.bfloat16),
        ((11, 263), H200, torch.bfloat16),
        ((3, 709), tiny(3800), torch.bfloat16),
        ((3, 709), tiny(900, False), torch.bfloat16),
    ]:
        dense = make_logits(shape, dtype)
        logits = layout(dense)
        check_indices(emulation, device, logits, EVERYTHING)
        probabilities = make_probabilities(dense)
        check(emulation, device, dense, layout(probabilities))
        if logits.stride(1) == 1:
            check(emulation, device, logits, offset(probabilities))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS_ND, ids=lambda layout: layout.__name__)
def test_layouts_with_positions(emulation: ctypes.CDLL, layout: Callable[[Tensor], Tensor]) -> None:
    logits = layout(make_logits((2, 19, 3, 5)))
    logits, _ = layouts.viewed(logits)  # as the launcher does
    check_indices(emulation, H200, logits, EVERYTHING)
    long = layout(make_logits((2, 137, 1, 5)))
    check_indices(emulation, H200, long, OPTIONS["plain"])


@pytest.mark.parametrize("device", [H200, tiny(900, False)], ids=["H200", "reads-twice"])
@pytest.mark.parametrize("name", FAR_APART)
def test_offsets_beyond_32_bits(emulation: ctypes.CDLL, name: str, device: Device) -> None:
    """Elements far apart give the bits of the same elements side by side."""
    shape, strides = FAR_APART[name]
    for dtype in (torch.float32, torch.bfloat16):
        near = make_logits(shape, dtype)
        probabilities = make_probabilities(near)
        if strides[1] == 1:
            near, probabilities = classes_last(near), classes_last(probabilities)
        target, keywords = EVERYTHING.apply(near, make_target(near))
        options = {**keywords, "weight": keywords["weight"].float()}
        cases = [(target, target), (probabilities, far_apart(probabilities, strides))]
        for near_target, far_target in cases:
            expected = run_all(Emulation(emulation, device), near, near_target, options)
            far = far_apart(near, strides)
            ours = run_all(
                *(Emulation(emulation, device), far, far_target, options),
                lambda like: FarGradient(far_apart(torch.full_like(like, math.nan), strides)),
            )
            for what, value in expected.items():
                assert_same_bits(ours[what], value, f"{what}, {dtype_name(dtype)}")


def test_no_batch(emulation: ctypes.CDLL) -> None:
    for classes in (1, 7, 128, 1000):
        logits = make_logits((classes,))
        check_indices(emulation, H200, logits, OPTIONS["smoothing-weight"])
        check(emulation, H200, logits, make_probabilities(logits))


@pytest.mark.slow
@pytest.mark.parametrize("classes", range(1, 41))
def test_every_small_number_of_classes(emulation: ctypes.CDLL, classes: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        logits = make_logits((9, classes), dtype)
        check_indices(emulation, H200, logits, EVERYTHING)
        strided = logits.t().contiguous().t()
        check_indices(emulation, H200, strided, OPTIONS["plain"])


# Under the sanitizers one dtype will do, that with the longest vectors: they all take 15 s there.
TAIL_DTYPES = [
    dtype if dtype == torch.float16 else pytest.param(dtype, marks=pytest.mark.slow)
    for dtype in DTYPES
]


@pytest.mark.parametrize("dtype", TAIL_DTYPES, ids=dtype_name)
def test_every_tail(emulation: ctypes.CDLL, dtype: torch.dtype) -> None:
    """Every remainder of a vector, at the start and at the end of a row and of a slice."""
    for classes in range(129, 146):
        logits = make_logits((9, classes), dtype)
        for device in (H200, tiny(900), tiny(900, False))[:: 2 - classes % 2]:
            check_indices(emulation, device, logits, OPTIONS["plain"])


# -- hazards ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KERNELS)
def test_hazards(emulation: ctypes.CDLL, name: str) -> None:
    shape, device = KERNELS[name]
    infinity = math.inf
    for dtype in (torch.float32, torch.bfloat16):
        for case in ("offset", "masked", "row-of-minus-infinity", "infinity", "nan"):
            logits = make_logits(shape, dtype)
            row = logits.movedim(1, -1).reshape(-1, shape[1])  # a copy where positions follow
            if case == "offset":
                row += 1e7 if dtype == torch.float32 else 300
            elif case == "masked":  # as attention masks do: all but a few classes
                row[1, : shape[1] - 1] = -infinity
                row[0, 1:] = -infinity
            elif case == "row-of-minus-infinity":
                row[1] = -infinity
            elif case == "infinity":
                row[1, shape[1] // 2] = infinity
            else:
                row[1, shape[1] - 2] = math.nan
            logits = row.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1).contiguous()
            target = make_target(logits)
            target.view(-1)[:2] = torch.tensor([0, shape[1] - 1])
            check(emulation, device, logits, target)
            if case == "offset":
                check(emulation, device, logits, make_probabilities(logits))


@pytest.mark.parametrize("name", KERNELS)
def test_infinite_masses(emulation: ctypes.CDLL, name: str) -> None:
    """An infinite weight, an infinite probability of the likeliest class: inf, and no NaN."""
    shape, device = KERNELS[name]
    logits = make_logits(shape) / 4  # confident, log(p) would be 0 in float32
    likeliest = logits.argmax(1)
    weight = torch.linspace(0.5, 2, shape[1])
    weight[likeliest.view(-1)[0]] = math.inf
    probabilities = make_probabilities(logits).scatter(1, likeliest.unsqueeze(1), math.inf)
    for smoothing in (0.0, 0.1):
        check(emulation, device, logits, likeliest, weight=weight, label_smoothing=smoothing)
        check(emulation, device, logits, probabilities, label_smoothing=smoothing)


@pytest.mark.parametrize("name", KERNELS)
def test_ignored_rows_are_zero_where_logits_are_nan(emulation: ctypes.CDLL, name: str) -> None:
    shape, device = KERNELS[name]
    logits = make_logits(shape)
    target = make_target(logits)
    target.view(-1)[::2] = -100
    poisoned = logits.masked_fill((target == -100).unsqueeze(1), math.nan)
    for smoothing in (0.0, 0.1):
        options = {"label_smoothing": smoothing, "weight": None}
        expected = run_all(Emulation(emulation, device), logits, target, options)
        ours = run_all(Emulation(emulation, device), poisoned, target, options)
        for what, value in expected.items():
            assert_same_bits(ours[what], value, what)


@pytest.mark.parametrize("label", [-1, 2**31, 2**62, -(2**63), "classes"])
@pytest.mark.parametrize("name", KERNELS)
def test_labels_out_of_range_are_nan(emulation: ctypes.CDLL, name: str, label: int | str) -> None:
    """Loss and gradient of that row, and of no other."""
    shape, device = KERNELS[name]
    logits = make_logits(shape)
    target = make_target(logits)
    bad = target.clone()
    bad.view(-1)[1] = shape[1] if label == "classes" else int(label)
    weight = torch.rand(shape[1]) + 0.5
    for options in (
        {"weight": None},
        {"weight": weight, "label_smoothing": 0.1},
        {"weight": weight, "label_smoothing": 1.0},
    ):
        right = run_all(Emulation(emulation, device), logits, target, options)
        ours = run_all(Emulation(emulation, device), logits, bad, options)
        row_loss = ours["none loss"].view(-1)
        assert row_loss[1].isnan() and not row_loss[2:].isnan().any()
        assert_same_bits(row_loss[2:], right["none loss"].view(-1)[2:])
        for what, value in ours.items():
            if what.split()[1] == "gradient":
                rows = value.movedim(1, -1).reshape(-1, shape[1])
                assert rows[1].isnan().all(), what
                assert rows[0].isfinite().all() and rows[2:].isfinite().all(), what
            elif not what.startswith("none"):
                assert value.isnan(), what


def test_one_class_has_no_gradient(emulation: ctypes.CDLL) -> None:
    """a p - q is 0 exactly, not a rounding error."""
    logits = make_logits((50, 1))
    for weight in (None, torch.tensor([0.3])):
        options = {"weight": weight, "label_smoothing": 0.1, "reduction": "sum"}
        _, grad = Emulation(emulation, H200).forward_backward(
            logits, make_target(logits), torch.float32, **options
        )
        assert_same_bits(grad, torch.zeros_like(grad).copysign(grad))


def test_nothing_to_do(emulation: ctypes.CDLL) -> None:
    for shape in [(0, 10), (2, 10, 0), (2, 0)]:
        logits = torch.empty(shape)
        target = torch.full(shape[:1] + shape[2:], -100)
        for reduction, value in [("mean", math.nan), ("sum", 0.0)]:
            options = {"reduction": reduction, "label_smoothing": 0.1}
            device = Emulation(emulation, H200)
            loss, _ = device.forward_backward(logits, target, torch.float32, **options)
            torch.testing.assert_close(loss, torch.tensor(value), equal_nan=True)


# -- the gradient times the upstream gradient -------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_scale(emulation: ctypes.CDLL, dtype: torch.dtype) -> None:
    for shape, start in [((1,), 0), ((3, 3001), 1), ((3, 5, 7), 3), ((3, 9001), 1)]:
        labels = torch.arange(math.prod(shape[:1] + shape[2:])).remainder(
            shape[min(len(shape) - 1, 1)]
        )
        target = labels.view(shape[:1] + shape[2:]) if len(shape) > 1 else torch.tensor(0)
        for factor, smoothed in itertools.product((0.37, 1.0, -0.0, math.inf, math.nan), (0, 1)):
            whole = torch.randn(math.prod(shape) + start).to(dtype)
            before = whole.clone()
            grad, expected = (x[start:].view(shape) for x in (whole, before.clone()))
            arguments = (torch.tensor(factor, dtype=dtype), target, 2, bool(smoothed))
            if math.isfinite(factor):
                expected *= arguments[0]
            else:
                reference.cross_entropy_scale_(expected, *arguments)
            set_device(emulation, tiny(4800))
            torch.ops.fastopt_emulated.cross_entropy_scale_(grad, *arguments)
            assert_same_bits(whole[:start], before[:start])
            torch.testing.assert_close(grad, expected, rtol=0, atol=0, equal_nan=True)


# -- the plan ---------------------------------------------------------------------------------------


def class_counts() -> Iterator[int]:
    yield from range(1, 2100)
    yield from range(2100, 2**20, 997)
    for power in range(11, 21):
        yield from (2**power - 1, 2**power, 2**power + 1)
    yield from (32000, 50257, 128256, 151936, 262144)


def plan_of(
    library: ctypes.CDLL,
    rows: int,
    classes: int,
    dtype: torch.dtype,
    target: torch.dtype | None = None,
    gradient: bool = True,
) -> Plan:
    """For contiguous classes, on the device that was set last."""
    plan = Plan()
    types = (ELEMENTS[dtype], -1 if target is None else ELEMENTS[target])
    numbers = map(ctypes.c_int64, (rows, classes, *types))
    library.fastopt_plan(*numbers, gradient, ctypes.byref(plan))
    return plan


@pytest.mark.parametrize("device", DEVICES)
def test_plans_are_legal(emulation: ctypes.CDLL, device: str) -> None:
    limits = DEVICES[device]
    set_device(emulation, limits)
    full, double, half, float16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
    sizes = ((full, 1), (double, 4096), (half, 4096), (half, 10**6), (float16, 77))
    for classes in class_counts():
        for dtype, rows in sizes:
            for target, gradient in ((None, False), (None, True), (dtype, True)):
                plan = plan_of(emulation, rows, classes, dtype, target, gradient)
                what = (classes, dtype, rows, target, gradient)
                assert plan.threads % 32 == 0 and 32 <= plan.threads <= 512, what
                assert plan.shared_bytes <= limits.shared_per_block, what
                assert plan.cluster in ((1, 2, 4, 8) if limits.clusters else (1,)), what
                assert plan.blocks % plan.cluster == 0 and 0 < plan.blocks < 2**31, what
                assert plan.threads % plan.lanes == 0, what
                if plan.kernel == ROWS:
                    assert plan.slice * plan.cluster >= classes, what
                    assert plan.lanes in (8, 16, 32) or plan.lanes == plan.threads, what
                    assert plan.cluster == 1 or plan.lanes > 32, what
                else:
                    assert plan.kernel == PACKED and plan.slice % plan.threads == 0, what


@pytest.mark.parametrize(
    ("classes", "cluster"),
    [(4096, 1), (32000, 1), (50257, 1), (128256, 4), (151936, 4), (262144, 8)],
)
def test_bf16_vocabularies_stay_on_chip(emulation: ctypes.CDLL, classes: int, cluster: int) -> None:
    """One read and one write per logit on an H200, with two blocks or more on every SM."""
    set_device(emulation, H200)
    plan = plan_of(emulation, 8192, classes, torch.bfloat16)
    assert (plan.kernel, plan.held, plan.cluster) == (ROWS, 1, cluster)
    assert 2 * (plan.shared_bytes + 1024) <= H200.shared_per_sm


# -- what nvcc makes of it --------------------------------------------------------------------------

NVCC = shutil.which("nvcc")
# Compiled by different workers of pytest-xdist, each once.
ARCHITECTURES = [
    pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in ("sm_80", "sm_90", "sm_100")
]


@pytest.fixture(scope="session", params=ARCHITECTURES)
def cubin(request: pytest.FixtureRequest) -> Path:
    """The kernels for one architecture, with the compiler's report beside them."""
    include = Path(torch.__file__).parent / "include"
    source = ROOT / "csrc/cuda/cross_entropy/launch.cu"
    return compiled(
        ROOT / f"build/emulation/cross_entropy.{request.param}.cubin",
        [source, *(ROOT / "csrc").rglob("*.h")],
        [
            *(NVCC, "-std=c++17", "-O3", f"-arch={request.param}", "-cubin", "-Icsrc"),
            *("-DUSE_CUDA", "-DFASTOPT_PTX_ARCH=100", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
            *("-isystem", include, "-isystem", include / "torch/csrc/api/include"),
            *("-Werror", "all-warnings", "-Xptxas", "-v", source),
        ],
    )


def demangled(text: str) -> str:
    return (
        subprocess.run(["c++filt"], input=text, check=True, capture_output=True, text=True)
        .stdout.replace("fastopt::gpu::", "")
        .replace("fastopt::", "")
    )


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
def test_resources(cubin: Path) -> None:
    """No spills, no local arrays, and the occupancy that the plan counts on."""
    report = demangled(cubin.with_suffix(".report").read_text())
    kernels = re.findall(
        r"entry function '(?:void )?(\w+)(?:<(.*?)>)?\("
        r".*?(\d+) bytes stack frame, (\d+) bytes spill stores"
        r".*?Used (\d+) registers",
        report,
        re.DOTALL,
    )
    assert len(kernels) == 14 * 5 + 2 + 1 + 4  # 14 combinations of types and masses
    for name, types, *numbers in kernels:
        frame, spilled, registers = map(int, numbers)
        what = (name, types, frame, spilled, registers)
        assert spilled == frame == 0, what
        if not types.startswith("double") and name != "cross_entropy_finish":
            assert registers <= 64, what  # 1024 threads on an SM


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
def test_memory_is_touched_in_words(cubin: Path) -> None:
    """128 bits in every load and store of the kernels for contiguous classes."""
    triton = pytest.importorskip("triton")
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    code = subprocess.run(
        [str(cuobjdump), "-sass", str(cubin)], check=True, capture_output=True, text=True
    ).stdout
    functions = dict(
        re.findall(
            r"Function : (?:void )?(.*?)\(.*?\n(.*?)(?=Function : |\Z)", demangled(code), re.DOTALL
        )
    )
    rows = {name: body for name, body in functions.items() if name.startswith("cross_entropy_rows")}
    assert len(rows) == 14 * 2
    for name, body in rows.items():
        held = name.endswith("true>")
        load = r"LDGSTS\S*\.128" if held else r"LDG\.E\S*\.128"
        assert re.search(load, body), (name, "loads")
        assert re.search(r"STG\.E\S*\.128", body), (name, "stores")
        if held:
            assert re.search(r"LDS\S*\.128", body), (name, "loads from shared memory")
    packed = [body for name, body in functions.items() if name.startswith("cross_entropy_packed")]
    assert len(packed) == 14
    for body in packed:  # a tile's way through shared memory
        for step in ("LDGSTS", "LDS", "STS", r"STG\.E"):
            assert re.search(rf"{step}\S*\.128", body), step
    for name, body in functions.items():
        if name.startswith("cross_entropy_scale"):
            assert re.search(r"LDG\.E\S*\.128", body) and re.search(r"STG\.E\S*\.128", body), name
        unknown = len(re.findall(r"\b(?:LD|ST)\.E\S*\.128", body))
        # But for the statistics of up to 8 other blocks, four numbers each.
        of_cluster = 8 * 4 * (8 if "<double" in name else 4) // 16
        allowed = of_cluster if name in rows and "sm_80" not in cubin.name else 0
        assert unknown <= allowed, (name, "words of unknown memory")
