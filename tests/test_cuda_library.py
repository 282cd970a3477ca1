"""Whether a GPU is served by the CUDA library: a driver that cannot run it says so once, and torch
serves. The library is a stand-in that knows of itself what the real one does (csrc/cuda/library.cu).
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import fastopt.__main__
from fastopt import backends, loss
from fastopt.sgd import launch

TOO_OLD = "CUDA driver version is insufficient for CUDA runtime version"
LIBRARY = """
static int asked;
const char* fastopt_cuda_archs(void) { return "80 90"; }
int times_asked(void) { return asked; }
const char* fastopt_cuda_why_not(int device) { ++asked; return device == 0 ? ANSWER : (const char*)0; }
"""

Plant = Callable[[str], None]


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Plant]:
    """plant(answer): the loaded library answers so about cuda:0, and all is well with the others."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")

    def build(answer: str) -> None:
        source, library = tmp_path / "library.c", tmp_path / "_CUDA.so"
        source.write_text(LIBRARY)
        define = f"-DANSWER={answer}"
        command = [compiler, "-shared", "-fPIC", define, str(source), "-o", str(library)]
        subprocess.run(command, check=True)
        monkeypatch.setattr(backends, "CUDA_LIBRARY", library)
        monkeypatch.setattr(backends, "GPU_FAMILY", "cuda")
        monkeypatch.setattr(loss, "_ON_GPU", True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))

    backends.why_not_gpu.cache_clear()
    yield build
    backends.why_not_gpu.cache_clear()


def served(index: int) -> tuple[bool, bool]:
    """Whether each face would use our kernels there. Tensors that have a GPU but no memory."""
    with FakeTensorMode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "_TENSOR_TYPES", (FakeTensor,))
        patch.setattr(loss, "_is_watched", lambda: False)  # by the fake mode of these tensors
        logits = torch.empty(4096, 1000, device=f"cuda:{index}")
        target = torch.empty(4096, dtype=torch.int64, device=f"cuda:{index}")
        return (
            loss._serves(logits, target, None, -100, "mean", 0.0),
            launch.serves(torch.device(launch.DEVICE_TYPE, index)),
        )


def test_a_library_that_runs_serves(plant: Plant) -> None:
    plant("(const char*)0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert served(0) == served(1) == (True, True)


def test_torch_serves_where_the_driver_refuses_and_one_warning_says_why(plant: Plant) -> None:
    plant(f'"{TOO_OLD}"')
    with pytest.warns(backends.MissingKernelsWarning) as caught:
        answers = [served(0), served(0), served(1)]
    assert answers == [(False, False), (False, False), (True, True)]
    assert len(caught) == 1
    assert TOO_OLD in str(caught[0].message) and "cuda:0" in str(caught[0].message)


@pytest.mark.stock
def test_a_gpu_older_than_the_code_is_not_asked_about(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant("(const char*)0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    with pytest.warns(backends.MissingKernelsWarning, match="no code for sm_75, only for 80 90"):
        assert served(0) == (False, False)
    assert ctypes.CDLL(str(backends.CUDA_LIBRARY)).times_asked() == 0


def test_the_report_names_the_reason(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(f'"{TOO_OLD}"')
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU number {index}")
    with pytest.warns(backends.MissingKernelsWarning):
        rows = fastopt.__main__.gpus()
    assert rows[0][:2] == ["cuda:0", "GPU number 0"] and TOO_OLD in rows[0][2]
    assert rows[1] == ["cuda:1", "GPU number 1", "served"]


def test_the_question_is_a_constant_to_dynamo(plant: Plant) -> None:
    plant(f'"{TOO_OLD}"')

    def double_if_served(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if backends.serves_gpu(0) else x

    compiled = torch.compile(double_if_served, fullgraph=True, backend="eager")
    with pytest.warns(backends.MissingKernelsWarning):
        assert torch.equal(compiled(torch.ones(3)), torch.ones(3))


def test_importing_fastopt_initialises_no_gpu() -> None:
    program = """
import torch
def refuse(): raise AssertionError("CUDA is initialised")
torch.cuda._lazy_init = refuse
import fastopt
"""
    subprocess.run([sys.executable, "-c", program], check=True)
