"""Every SIMD level of the SGD kernels, each in a process of its own: the level is chosen at import.

avx512 and avx2 have fused multiply-add and give the bits of torch on such machines. baseline has
none and gives those of torch's own kernels without (ATEN_CPU_CAPABILITY=default): the same
operations in the same order, each rounded by itself.
"""

import platform

import pytest
import torch

from child import run_python

pytestmark = pytest.mark.xdist_group("sgd_levels")

# In falling order, as torch names what this machine can do.
CAPABILITIES = {"AVX512": "avx512", "AVX2": "avx2", "DEFAULT": "baseline"}
LEVELS = list(CAPABILITIES.values())
TORCH = {"avx512": "avx512", "avx2": "avx2", "baseline": "default"}

PROGRAM = """
    import torch
    import fastopt
    import fastopt.backends
    from sgd_oracle import *

    print(fastopt.backends.simd_level())
    sizes = (*SMALL_SIZES, 9_001)
    for name, options in OPTIONS.items():
        for dtype in EXACT_DTYPES:
            ours, theirs = (
                make([leaf(values(n, dtype, seed=n)) for n in sizes], **options)
                for make in (fastopt.SGD, for_loop)
            )
            assert_same_history(train(ours, steps=2), train(theirs, steps=2), f"{name} {dtype}")
        for dtype in HALF_DTYPES:
            for p in train(fastopt.SGD([leaf(values(n, dtype)) for n in sizes], **options))[-1].params:
                print(name, dtype, p.numel(), hash(p.view(torch.int16).numpy().tobytes()))
"""


def machine_level() -> str:
    return CAPABILITIES.get(torch.backends.cpu.get_cpu_capability(), "baseline")


@pytest.fixture(scope="module")
def printed() -> dict[str, list[str]]:
    """What the program prints at each level. (A fixture keeps a failure too: no second try.)"""
    return {
        level: run_python(
            PROGRAM,
            FASTOPT_SIMD=level,
            ATEN_CPU_CAPABILITY=TORCH[level],
            PYTHONHASHSEED="0",
        ).splitlines()
        for level in LEVELS
    }


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other machines have one level only")
@pytest.mark.parametrize("level", LEVELS)
def test_each_level_gives_the_bits_of_torch_at_that_level(
    level: str, printed: dict[str, list[str]]
) -> None:
    served, *_ = printed[level]
    assert served == max(level, machine_level(), key=LEVELS.index)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other machines have one level only")
def test_half_dtypes_have_the_same_bits_at_the_levels_with_fused_multiply_add(
    printed: dict[str, list[str]],
) -> None:
    _, *wide = printed["avx512"]
    _, *narrow = printed["avx2"]
    assert wide == narrow


def test_an_unknown_level_is_refused_or_ignored_but_never_obeyed() -> None:
    served, *_ = run_python(
        "import fastopt.backends; print(fastopt.backends.simd_level())", FASTOPT_SIMD=""
    ).splitlines()
    assert served in LEVELS
