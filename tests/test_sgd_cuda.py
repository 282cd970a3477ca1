"""fastopt.SGD on GPU without one: the whole path, from step() to the CUDA kernel's own source, which
g++ compiles against tests/emulation."""

import ctypes
import functools
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastopt
import sgd_device_cases
import sgd_device_state_cases
from child import run_python
from compiling import compiled
from fastopt.sgd import devices, gather
from fastopt.sgd.table import Launch, SgdLaunch
from sgd_device import Device
from sgd_device_cases import check_alignment, check_options, check_refusals
from sgd_oracle import (
    DAMPED,
    DTYPES,
    OPTIONS,
    Snapshot,
    all_params,
    assert_same_history,
    for_loop,
    leaf,
    set_grads,
    train,
    values,
)

ROOT = Path(__file__).parents[1]
SANITIZED = os.environ.get("FASTOPT_SANITIZE") == "1"
CASES = [*sgd_device_cases.CASES, *sgd_device_state_cases.CASES]


@functools.cache
def library() -> ctypes.CDLL:
    """tests/emulation/sgd.cpp, built once per version of what it includes."""
    source = ROOT / "tests/emulation/sgd.cpp"
    sanitized = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    path = compiled(
        ROOT / "build/emulation" / ("libsgd_sanitized.so" if SANITIZED else "libsgd.so"),
        [source, *(ROOT / "csrc").rglob("*.h"), ROOT / "tests/emulation/emulation.h"],
        [
            *(
                "g++",
                "-std=c++17",
                *(sanitized if SANITIZED else ["-O2"]),
                "-g1",
                "-fPIC",
                "-shared",
            ),
            *("-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
            *("-Icsrc", "-Itests/emulation", source),
        ],
    )
    loaded = ctypes.CDLL(str(path))
    run = loaded.fastopt_sgd_run_emulated
    run.argtypes = [
        ctypes.POINTER(SgdLaunch), ctypes.c_bool, ctypes.POINTER(ctypes.c_int64)
    ]  # fmt: skip
    run.restype = ctypes.c_char_p
    return loaded


@pytest.fixture(scope="session")
def emulation() -> ctypes.CDLL:
    return library()


@pytest.fixture(params=["ascending", "descending", "without_compiled_gather"])
def device(request: Any, emulation: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Device:
    if request.param == "without_compiled_gather":
        monkeypatch.setattr(devices, "READER", gather.PythonGather)
    return emulated(emulation, descending=request.param == "descending")


def emulated(
    emulation: ctypes.CDLL, descending: bool = False, launches: Any = None, processors: int = 1
) -> Device:
    launches = ctypes.c_int64() if launches is None else launches

    def run(launch: Launch) -> None:
        step = launch.as_struct(processors)
        error = emulation.fastopt_sgd_run_emulated(step, descending, launches)
        assert error is None, error.decode()
        assert launch.started[-1] == 0, "the count of blocks is left at 0"

    return Device(run)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options(emulation: ctypes.CDLL, dtype: torch.dtype, option: str) -> None:
    check_options(emulated(emulation), dtype, option)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alignment(device: Device, dtype: torch.dtype) -> None:
    check_alignment(device, dtype)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__.removeprefix("check_"))
def test_case(
    device: Device, case: Callable[[Device], None], request: pytest.FixtureRequest
) -> None:
    if case is check_refusals:
        request.applymarker(pytest.mark.stock)
    case(device)


def test_launches(emulation: ctypes.CDLL) -> None:
    """870 parameters and 32 groups share a launch; launches follow one another beyond."""

    def launches(group_sizes: list[int]) -> int:
        count = ctypes.c_int64()
        params = [[leaf(values(2, seed=i)) for i in range(size)] for size in group_sizes]
        with emulated(emulation, launches=count).in_place():
            optimizer = fastopt.SGD([{"params": p} for p in params], **DAMPED)
            set_grads(all_params(optimizer), seed=0)
            optimizer.step()
        return count.value

    assert launches([161]) == launches([870]) == launches([27] * 32) == 1
    assert launches([871]) == launches([1] * 33) == launches([27] * 33) == 2
    assert launches([1741]) == 3


def test_blocks_share_the_work(emulation: ctypes.CDLL) -> None:
    """The grid follows the number of processors; results do not."""

    def run(make: Any) -> list[Snapshot]:
        return train(make([leaf(values(n, seed=n)) for n in (70_000, 3, 4096, 4097)], **DAMPED))

    histories = [emulated(emulation, processors=n).history(run) for n in (1, 3, 100)]
    for history in histories:
        assert_same_history(history, run(for_loop))


# --- compiled for GPUs ---------------------------------------------------------------------------

NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


@pytest.mark.slow  # nvcc does not run under the sanitizers' preloaded libraries
@pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
def test_it_compiles_without_spills_and_with_wide_accesses(tmp_path: Path) -> None:
    library = tmp_path / "sgd.so"
    targets = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in (80, 90, 100)]
    done = subprocess.run(
        [NVCC, "-std=c++17", "-O3", "-Icsrc", "-Xcompiler", "-fPIC,-Wall,-Wextra"]
        + ["-Werror", "all-warnings", "-Xptxas", "-v", *targets]
        + ["-shared", "csrc/cuda/sgd.cu", "-o", str(library)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (
        re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill", done.stderr) == [("0", "0")] * 6
    )  # for few parameters and for many
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", done.stderr)]
    assert len(registers) == 6 and max(registers) <= 64, "four blocks of 256 threads"

    triton = pytest.importorskip("triton", reason="its wheel carries cuobjdump")
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    for sm in (80, 90, 100):
        sass = subprocess.run(
            [str(tools / "cuobjdump"), "--dump-sass", "-arch", f"sm_{sm}", str(library)],
            env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        # Each of 4 dtypes reads 2, 2 and 3 arrays and writes 1, 2 and 2.
        loads, stores = (len(re.findall(rf"{op}\.E\S*\.128", sass)) for op in ("LDG", "STG"))
        assert loads >= 2 * 28 and stores >= 2 * 20, (sm, loads, stores)


@pytest.mark.stock
def test_parameters_without_memory(device: Device) -> None:
    """Fake ones, as tools that trace a training make them: nothing is taken from a device."""
    with device.in_place():
        mode = FakeTensorMode()
        with mode:
            param = torch.nn.Parameter(torch.empty(3))
            fastopt.SGD([param], lr=0.1, momentum=0.9)
        optimizer = fastopt.SGD([param], lr=0.1, momentum=0.9)
        with mode:
            param.grad = torch.empty(3)
            optimizer.step()
    assert not device.launched


def test_importing_fastopt_touches_neither_triton_nor_cuda() -> None:
    run_python(
        """
        import sys, torch
        before = set(sys.modules)
        import fastopt
        assert not [m for m in set(sys.modules) - before if m.split(".")[0] == "triton"]
        assert not torch.cuda.is_initialized()
        """
    )
