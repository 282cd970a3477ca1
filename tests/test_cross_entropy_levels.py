"""cross_entropy at every SIMD level: one binary, chosen at run time, the same budget."""

from __future__ import annotations

import pytest
import torch

import fastopt.backends
from child import run_python

LEVELS = ["baseline", "avx2", "avx512"]

NAMED_SHAPES_SCRIPT = """
import cross_entropy_cases
import fastopt.backends
cross_entropy_cases.check_named_shapes()
print(fastopt.backends.simd_level())
"""


def highest_level() -> str:
    """What this machine can run, by torch's own account of it."""
    capability = torch.backends.cpu.get_cpu_capability()
    return {"AVX512": "avx512", "AVX2": "avx2"}.get(capability, "baseline")


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_named_shapes_at(level: str) -> None:
    """A level above the machine's is capped: then the machine's own runs."""
    serves = run_python(NAMED_SHAPES_SCRIPT, FASTOPT_SIMD=level, FASTOPT_ALWAYS="1").strip()
    assert serves == min(level, highest_level(), key=LEVELS.index)


def test_the_level_in_use_is_one_of_them() -> None:
    assert fastopt.backends.simd_level() in LEVELS
