"""`python -m fastopt` says what is there, what serves, and why the rest is missing."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

import fastopt

KERNELS = (
    "fastopt.cross_entropy",
    "fastopt.SGD",
    "torch.ops.fastopt.cross_entropy_forward",
    "torch.ops.fastopt.cross_entropy_forward_backward",
    "torch.ops.fastopt.cross_entropy_backward",
    "torch.ops.fastopt.cross_entropy_backward_target",
)
LEVELS = ("baseline", "avx2", "avx512")


def report(**variables: str) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FASTOPT_")}
    return subprocess.run(
        [sys.executable, "-m", "fastopt"],
        env=kept | variables,
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def row(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if line.split()[:1] == [name])


def level_in_use(text: str) -> str:
    (level,) = re.findall(r"fastopt/_C\.so \(SIMD level (\w+)\)", row(text, "cpu"))
    return level


@pytest.fixture(scope="module")
def plain_report() -> str:
    return report()


def test_report_names_versions_library_and_kernels(plain_report: str) -> None:
    assert f"fastopt {fastopt.__version__}, torch {torch.__version__}" in plain_report
    for name in KERNELS:
        assert f"C++, {level_in_use(plain_report)}" in row(plain_report, name)
    assert ("not loaded: " in row(plain_report, "cuda")) == (fastopt.ops.CUDA_LIBRARY is None)
    assert ("not used: " in row(plain_report, "triton")) == (fastopt.ops.GPU_FAMILY != "triton")
    assert "not set" in row(plain_report, "FASTOPT_ALWAYS")


@pytest.mark.parametrize("cap", LEVELS)
def test_report_shows_the_level_in_use(plain_report: str, cap: str) -> None:
    text = report(FASTOPT_SIMD=cap)
    assert level_in_use(text) == min(cap, level_in_use(plain_report), key=LEVELS.index)
    assert row(text, "FASTOPT_SIMD").split() == ["FASTOPT_SIMD", cap]


def test_report_says_why_the_kernels_are_missing() -> None:
    text = report(FASTOPT_LIBRARY="/missing/_C.so")
    assert "not loaded: FASTOPT_LIBRARY=/missing/_C.so does not exist" in row(text, "cpu")
    assert "C++, " not in text
    assert "torch's own" in row(text, "fastopt.cross_entropy")
    assert "torch's own" in row(text, "fastopt.SGD")
    assert "reference" in row(text, "torch.ops.fastopt.cross_entropy_forward")


def test_report_shows_that_the_reference_was_asked_for() -> None:
    text = report(FASTOPT_BACKEND="reference")
    assert "not loaded: FASTOPT_BACKEND=reference" in row(text, "cpu")
    assert "reference" in row(text, "fastopt.cross_entropy")
    assert "torch's own" in row(text, "fastopt.SGD")
