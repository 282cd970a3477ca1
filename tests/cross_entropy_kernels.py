"""Whose kernels of cross-entropy the tests of values are about, and shapes that enter all of their
branches.

FASTOPT_TEST_KERNELS names them:

    library      the default: what serves here. The C++ library at the level FASTOPT_SIMD, a GPU's
                 under FASTOPT_TEST_DEVICE, plain torch under FASTOPT_BACKEND=reference
    emulated     the CUDA kernels with their launcher, compiled for the CPU (emulated.py)
    interpreted  the Triton kernels with theirs; TRITON_INTERPRET=1 has to be set

The last two take seconds for what the library does in milliseconds. So they have one shape for each
branch, and some tests leave combinations out: where they go through all dtypes, the interpreter takes
each kernel in one of them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from cross_entropy_cases import DTYPES, KERNELS, NAMED_SHAPES, far_apart
from fastopt import layouts, ops

Shape = tuple[int, ...]
ON_GPUS = KERNELS != "library" or os.environ.get("FASTOPT_TEST_DEVICE", "cpu") != "cpu"
# Tests under these marks are left out.
LEFT_OUT = ["cpu_kernels" if ON_GPUS else "gpu_kernels"] + ["library"] * (KERNELS != "library")

OPS = tuple(ops.SCHEMAS)

if KERNELS == "library":
    NAMED = NAMED_SHAPES
    EACH: dict[str, Shape] = {
        "tiles": (77, 7),
        "tiles-and-tail": (258, 10),
        "tiles-of-vectors": (77, 33),
        "rows": (5, 1025),
        "rows-in-chunks": (2, 8195),
        "segments": (1, 32771),
        "positions": (2, 21, 17),
        "positions-in-vectors": (2, 64, 35),
        "image": (2, 21, 5, 7),
        "positions-of-few-classes": (40, 7, 3),
    }
    # Around every vector length and unrolled block, then vocabularies; row counts that no tile
    # divides.
    class_counts = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 127, 128, 129]
    class_counts += [507, 1000, 1025, 2049, 32000, 50257]
    CLASS_COUNTS: dict[str, list[Shape]] = {
        str(n): [(rows, n) for rows in (1, 3, 77, 257) if rows * n <= 100_000 or rows == 1]
        for n in class_counts
    }
elif KERNELS == "emulated":
    import emulated

    NAMED = {name: branch.shape for name, branch in emulated.BRANCHES.items()} | {"no-batch": (19,)}
    EACH = {name: NAMED[name] for name in emulated.EACH}
    # Every small number, and every remainder of a vector at the start and the end of a row.
    CLASS_COUNTS = {
        "few-classes": [(9, n) for n in range(1, 41)],
        "few-strided-classes": [(1, n, 9) for n in range(1, 41)],
        "tails": list(emulated.TAILS),
    }
elif KERNELS == "interpreted":
    # Rows share a program, exactly a block, one class more, class counts that vectors divide or
    # not, sweeps over the row; positions in tiles of one batch entry or across entries, with and
    # without a remainder, classes in one block or in several.
    NAMED = {
        "no-batch": (19,),
        "one-class": (5, 1),
        "rows-share-a-program": (67, 5),
        "exactly-a-block": (3, 2048),
        "a-block-and-one": (3, 2049),
        "multiple-of-8-only": (5, 1000),
        "odd-classes": (3, 1003),
        "sweeps": (2, 33000),
        "odd-sweeps": (2, 50257),
        "sweeps-of-masses": (2, 16389),
        "whole-blocks": (1, 65536),
        "one-position": (3, 5, 1),
        "entries-share-a-tile": (9, 5, 3),
        "tile-inside-an-entry": (2, 21, 64),
        "tiles-with-remainder": (2, 21, 67),
        "strided-classes-in-blocks": (1, 301, 9),
        "image": (2, 21, 13, 5),
        "volume": (2, 5, 3, 4, 7),
    }
    each = (
        *("rows-share-a-program", "odd-classes", "odd-sweeps", "sweeps-of-masses"),
        "entries-share-a-tile",
    )
    EACH = {name: NAMED[name] for name in each}
    # Whole 16-byte words and not.
    CLASS_COUNTS = {"tails": [(3, n) for n in (1, 2, 8, 10, 33, 257, 259, 263, 264)]}
else:
    raise ValueError(f"FASTOPT_TEST_KERNELS={KERNELS}: library, emulated or interpreted")


# For tests with hundreds of cases: each kernel, or in the interpreter two that do not take long.
BATCHES = [(9, 7), (2, 7, 5)] if KERNELS == "interpreted" else list(EACH.values())
SMALL = [*BATCHES, (13,)]


def each_kernel(dtype: torch.dtype | None = None) -> list[Shape]:
    """A shape for each kernel; for a dtype of a test of all of them, its share in the interpreter."""
    shapes = list(EACH.values())
    if dtype is None or KERNELS != "interpreted":
        return shapes
    return shapes[DTYPES.index(dtype) :: len(DTYPES)]


@pytest.fixture(autouse=True)
def these_kernels_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the face as on a GPU, where they are registered for the dispatcher."""
    if KERNELS == "emulated":
        emulated.library()
        for name in OPS:
            monkeypatch.setattr(ops, name, getattr(emulated, name))
    elif KERNELS == "interpreted":
        from fastopt.kernels.cross_entropy import launch

        for name in OPS:
            monkeypatch.setattr(ops, name, ops.flat(name, getattr(launch, name)))


# Rows that fit on a chip are read once, others twice.
MEMORIES = ["ample", "scarce"] if KERNELS == "emulated" else ["ample"]


@contextmanager
def on_chip(memory: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if memory == "scarce":
            patch.setattr(emulated, "default_device", emulated.tiny(900, False))
        yield


@contextmanager
def gradients_far_apart(strides: tuple[int, ...]) -> Iterator[None]:
    """Gradients of slow kernels have these strides; the library's lie side by side."""

    def make(like: Tensor) -> Tensor:
        return far_apart(torch.full_like(like, math.nan), strides)

    with pytest.MonkeyPatch.context() as patch:
        if KERNELS == "emulated":
            patch.setattr(emulated, "new_gradient", make)
        elif KERNELS == "interpreted":
            patch.setattr(layouts, "empty_gradient", make)
        yield
