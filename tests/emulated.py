"""The CUDA kernels of cross-entropy with their launcher on the CPU (g++ and tests/emulation), as
torch.ops.fastopt_emulated; and as what answers the face, on the device that a shape asks for.

Under FASTOPT_SANITIZE=1 they are built with sanitizers.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from accuracy import assert_same_bits
from compiling import compiled
from fastopt import layouts, ops, reference
from fastopt.options import Options

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
DEFINITIONS = torch.library.Library("fastopt_emulated", "DEF")


def build() -> Path:
    """The library's file, built once for all workers."""
    source = ROOT / "tests/emulation/cross_entropy.cpp"
    name = "cross_entropy_sanitize.so" if SANITIZE else "cross_entropy.so"
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"] if SANITIZE else []
    include = Path(torch.__file__).parent / "include"
    return compiled(
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


@functools.cache
def library() -> ctypes.CDLL:
    path = build()
    for name, schema in ops.SCHEMAS.items():
        DEFINITIONS.define(name + schema)
    torch.ops.load_library(path)
    return ctypes.CDLL(str(path))


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
FEW_SMS = Device(1, 227 << 10, 228 << 10, True)


def tiny(shared: int, clusters: bool = True) -> Device:
    """A device with `shared` bytes for each of two blocks."""
    return Device(4, shared, 2 * (shared + 1024), clusters)


@dataclass(frozen=True)
class Branch:
    """A shape that enters it on this device, and what the plan of its gradient has to be, so that no
    branch is left without its case when a constant changes."""

    shape: tuple[int, ...]
    device: Device
    plan: dict[str, int]


# Rows side by side: packed, or lanes, warps, blocks and clusters of them. Positions side by side: as
# many as a block has threads, and fewer, with the classes divided; tiles end within a batch entry,
# at its end and behind it.
BRANCHES = {
    "packed": Branch((37, 10), H200, {"kernel": PACKED}),
    "packed-rows-side-by-side": Branch((700, 3), H200, {"kernel": PACKED, "threads": 32}),
    "packed-rows-of-words": Branch((301, 32), H200, {"kernel": PACKED, "threads": 32}),
    "packed-many-rows-a-thread": Branch((701, 3), FEW_SMS, {"kernel": PACKED, "slice": 128 * 5}),
    "packed-long-rows": Branch((70, 127), H200, {"kernel": PACKED, "threads": 32}),
    "packed-words": Branch((37, 16), FEW_SMS, {"kernel": PACKED}),
    "few-lanes": Branch((140, 133), FEW_SMS, {"kernel": ROWS, "held": 1, "lanes": 8}),
    "half-a-warp": Branch((11, 131), H200, {"kernel": ROWS, "held": 1, "lanes": 16}),
    "warp": Branch((11, 263), H200, {"kernel": ROWS, "held": 1, "lanes": 32, "cluster": 1}),
    "block": Branch((3, 2345), H200, {"kernel": ROWS, "held": 1, "cluster": 1}),
    "vectors-a-lane": Branch((40, 1999), FEW_SMS, {"kernel": ROWS, "held": 1, "cluster": 1}),
    "cluster-of-2": Branch((3, 1503), tiny(4800), {"kernel": ROWS, "held": 1, "cluster": 2}),
    "cluster-of-4": Branch((2, 1505), tiny(2500), {"kernel": ROWS, "held": 1, "cluster": 4}),
    "cluster-of-8": Branch((2, 1501), tiny(1600), {"kernel": ROWS, "held": 1, "cluster": 8}),
    "cluster": Branch((3, 709), tiny(2600), {"kernel": ROWS, "held": 1}),
    "few-lanes-read-twice": Branch(
        (70, 131), tiny(900, False), {"kernel": ROWS, "held": 0, "lanes": 16}
    ),
    "warps-read-twice": Branch(
        (11, 261), tiny(900, False), {"kernel": ROWS, "held": 0, "lanes": 32}
    ),
    "cluster-reads-twice": Branch((3, 3001), tiny(1200), {"kernel": ROWS, "held": 0, "cluster": 8}),
    "block-reads-twice": Branch(
        (3, 3003), tiny(900, False), {"kernel": ROWS, "held": 0, "cluster": 1}
    ),
    "read-twice": Branch((3, 711), tiny(900, False), {"kernel": ROWS, "held": 0}),
    "few-long-rows": Branch(
        (1, 16385),
        Device(64, 227 << 10, 228 << 10, True),
        {"kernel": ROWS, "held": 1, "cluster": 4},
    ),
    "positions": Branch((2, 19, 3, 11), H200, {"kernel": STRIDED}),
    "positions-wide": Branch(
        (2, 3, 13, 23), H200, {"kernel": STRIDED, "lanes": 256, "adjacent": 1}
    ),
    "positions-in-pairs": Branch(
        (3, 11, 22, 34), FEW_SMS, {"kernel": STRIDED, "lanes": 256, "adjacent": 2}
    ),
    "classes-in-2": Branch((1, 7, 190), H200, {"kernel": STRIDED, "lanes": 128}),
    "classes-in-4": Branch((2, 9, 7, 9), H200, {"kernel": STRIDED, "lanes": 64}),
    "classes-in-8": Branch((2, 67, 37), H200, {"kernel": STRIDED, "lanes": 32}),
}
# One for each kernel; rows of an odd number of classes start at every alignment.
EACH = (
    "packed",
    "packed-words",
    "few-lanes",
    "vectors-a-lane",
    "warp",
    "block",
    "cluster",
    "read-twice",
    "positions",
    "positions-in-pairs",
)


def set_device(device: Device, descending: bool = False) -> None:
    """What later calls run on, and the order of its threads."""
    limits = (device.sm_count, device.shared_per_block, device.shared_per_sm)
    library().fastopt_set_device(*map(ctypes.c_int64, limits), device.clusters, descending)


def plan_of_the_last_call() -> Plan:
    plan = Plan()
    library().fastopt_last_plan(ctypes.byref(plan))
    return plan


# -- calls ------------------------------------------------------------------------------------------

# Rows and slices that end at every remainder of a vector.
TAILS = {
    (rows, classes): device
    for rows, device in ((9, H200), (10, tiny(900)), (11, tiny(900, False)))
    for classes in range(129, 146)
}
# By the shape of its logits a call is emulated on one of them; all others on the default device.
_DEVICES = {branch.shape: branch.device for branch in BRANCHES.values()} | TAILS
default_device = H200
# Where the next gradients lie, made from a gradient as the launcher would have it.
new_gradient: Callable[[Tensor], Tensor] | None = None


class _Guarded:
    """A gradient between bytes that nobody may write. The sanitizers guard all other outputs."""

    MARGIN, PATTERN = 64, 0xA5

    def __init__(self, like: Tensor) -> None:
        strides = zip(like.shape, like.stride(), strict=True)
        last = sum((size - 1) * stride for size, stride in strides)
        self.bytes = (last + 1 if like.numel() else 0) * like.element_size()
        self.buffer = torch.full((self.bytes + 2 * self.MARGIN,), self.PATTERN, dtype=torch.uint8)
        inside = self.buffer[self.MARGIN : self.MARGIN + self.bytes]
        inside.fill_(0xFF)  # NaN: what is not written shows
        self.tensor = inside.view(like.dtype).as_strided(like.shape, like.stride())

    def check(self) -> None:
        guards = [self.buffer[: self.MARGIN], self.buffer[self.MARGIN + self.bytes :]]
        assert all((guard == self.PATTERN).all() for guard in guards), "a store out of bounds"


def device_of(logits: Tensor) -> Device:
    return _DEVICES.get(tuple(logits.shape), default_device)


# Both orders of the threads touch the same memory: one is enough for the sanitizers.
_ORDERS = (False,) if SANITIZE else (False, True)


def cross_entropy_forward(logits: Tensor, *others: object) -> Tensor:
    losses = []
    for descending in _ORDERS:
        set_device(device_of(logits), descending)
        losses.append(torch.ops.fastopt_emulated.cross_entropy_forward(logits, *others))
    assert_same_bits(losses[0], losses[-1], "loss in the other order of threads")
    return losses[0]


def cross_entropy_forward_backward(logits: Tensor, *others: object) -> tuple[Tensor, ...]:
    if len(others) == 2 + len(Options._fields):
        others = (*others, None)  # largest_mass
    results = []
    for descending in _ORDERS:
        set_device(device_of(logits), descending)
        like = layouts.empty_gradient(logits)
        guarded = _Guarded(like)
        grad = new_gradient(like) if new_gradient else guarded.tensor
        op = torch.ops.fastopt_emulated.cross_entropy_forward_backward_out
        loss, unit = op(logits, *others, grad)
        assert logits.dtype == torch.float16 or unit == 1
        guarded.check()
        results.append((loss, grad, unit))
    for ours, other in zip(results[0], results[-1], strict=True):
        assert_same_bits(ours, other, "in the other order of threads")
    return results[0]


def cross_entropy_forward_backward_out(logits: Tensor, *others: object) -> tuple[Tensor, ...]:
    set_device(device_of(logits), False)
    result: tuple[Tensor, ...] = torch.ops.fastopt_emulated.cross_entropy_forward_backward_out(
        logits, *others
    )
    return result


def cross_entropy_scale_(grad: Tensor, factor: Tensor, *others: object) -> None:
    """One factor for each row is not for GPUs: the launcher refuses it."""
    on_device = reference if factor.dim() else torch.ops.fastopt_emulated
    on_device.cross_entropy_scale_(grad, factor, *others)
