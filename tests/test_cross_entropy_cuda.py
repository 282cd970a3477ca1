"""The CUDA kernels of cross-entropy without a GPU: which of them a call takes, and what nvcc makes of
them for three architectures. Their values, in an emulation of a GPU, are test_cross_entropy.py's
under FASTOPT_TEST_KERNELS=emulated.
"""

from __future__ import annotations

import ctypes
import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import emulated
from compiling import compiled
from cross_entropy_cases import (
    DTYPES,
    dtype_name,
    make_logits,
    make_probabilities,
    make_target,
    offset,
)
from emulated import (
    BRANCHES,
    DEVICES,
    ELEMENTS,
    FEW_SMS,
    H200,
    PACKED,
    ROWS,
    STRIDED,
    Device,
    Plan,
    library,
    set_device,
)

ROOT = Path(__file__).parents[1]

# -- every branch -----------------------------------------------------------------------------------


def run(
    logits: Tensor,
    device: Device = H200,
    target: Tensor | None = None,
    reduction: int = 1,
) -> tuple[Plan, Tensor, Tensor]:
    """The plan of the gradient in forward, the loss and the gradient."""
    target = make_target(logits) if target is None else target
    set_device(device)
    loss, grad, _ = torch.ops.fastopt_emulated.cross_entropy_forward_backward(
        logits, target, None, -100, 0.0, reduction, torch.float32, 0.0
    )
    return emulated.plan_of_the_last_call(), loss, grad


@pytest.mark.parametrize("name", BRANCHES)
def test_every_branch_has_its_shape(name: str) -> None:
    branch = BRANCHES[name]
    plan, _, _ = run(make_logits(branch.shape), branch.device)
    assert {key: getattr(plan, key) for key in branch.plan} == branch.plan


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_many_vectors_a_lane(dtype: torch.dtype) -> None:
    """Rows enough to fill the device: few lanes take a row, with several vectors under way."""
    plan, _, _ = run(make_logits(BRANCHES["vectors-a-lane"].shape, dtype), FEW_SMS)
    assert (plan.kernel, plan.held, plan.cluster) == (ROWS, 1, 1)
    assert 4 * plan.lanes * (16 // dtype.itemsize) <= 1999


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_pairs_of_rows(dtype: torch.dtype) -> None:
    """One access for two of them, where they lie side by side and are aligned to it."""
    logits = make_logits(BRANCHES["positions-in-pairs"].shape, dtype)
    probabilities = make_probabilities(logits)
    for target in (make_target(logits), probabilities):
        assert run(logits, FEW_SMS, target)[0].adjacent == 2
    apart = {
        "an odd address": offset(logits),
        "an odd number": make_logits((3, 11, 23, 33), dtype),
        "odd classes": make_logits((3, 11, 22 * 34 + 1), dtype)[..., :-1],
        "every other": make_logits((3, 11, 22, 68), dtype)[..., ::2],
    }
    for name, other in apart.items():
        plan, _, _ = run(other, FEW_SMS)
        assert plan.kernel == STRIDED and plan.adjacent == 1, name


@pytest.mark.parametrize("shape", [(0, 10), (2, 10, 0), (2, 0)], ids=dtype_name)
def test_nothing_to_do(shape: tuple[int, ...]) -> None:
    logits = torch.empty(shape)
    target = torch.full(shape[:1] + shape[2:], -100)
    for reduction, value in [(1, math.nan), (2, 0.0)]:
        _, loss, grad = run(logits, H200, target, reduction)
        assert grad.shape == shape
        torch.testing.assert_close(loss, torch.tensor(value), equal_nan=True)


# -- the plan ---------------------------------------------------------------------------------------


def class_counts() -> Iterator[int]:
    yield from range(1, 2100)
    yield from range(2100, 2**20, 997)
    for power in range(11, 21):
        yield from (2**power - 1, 2**power, 2**power + 1)
    yield from (32000, 50257, 128256, 151936, 262144)


def plan_of(
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
    library().fastopt_plan(*numbers, gradient, ctypes.byref(plan))
    return plan


@pytest.mark.parametrize("device", DEVICES)
def test_plans_are_legal(device: str) -> None:
    limits = DEVICES[device]
    set_device(limits)
    full, double, half, float16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
    sizes = ((full, 1), (double, 4096), (half, 4096), (half, 10**6), (float16, 77))
    for classes in class_counts():
        for dtype, rows in sizes:
            for target, gradient in ((None, False), (None, True), (dtype, True)):
                plan = plan_of(rows, classes, dtype, target, gradient)
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
def test_bf16_vocabularies_stay_on_chip(classes: int, cluster: int) -> None:
    """One read and one write per logit on an H200, with two blocks or more on every SM."""
    set_device(H200)
    plan = plan_of(8192, classes, torch.bfloat16)
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
