"""The CUDA kernels of cross-entropy without a GPU: their own source runs on the CPU (g++ and
tests/emulation/emulation.h) and is compared with float64; nvcc compiles it for three architectures
and the result is looked at.
"""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from accuracy import assert_as_accurate, assert_same_bits
from cross_entropy_cases import (
    DTYPES,
    EVERYTHING,
    LAYOUTS_2D,
    LAYOUTS_ND,
    OPTIONS,
    Options,
    class_dim,
    classes_last,
    differentiate,
    dtype_name,
    exact,
    make_logits,
    make_probabilities,
    make_target,
    offset,
    random_upstream,
    row_strided,
)
from fastopt import reference

ROOT = Path(__file__).parents[1]
ELEMENTS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

# -- the library ------------------------------------------------------------------------------------


class EmulatedCall(ctypes.Structure):
    """Mirrors the struct of the same name in tests/emulation/cross_entropy.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "classes", "positions")),
        *((f"{name}_strides", ctypes.c_int64 * 3) for name in ("logits", "target", "grad")),
        *((f"{name}_type", ctypes.c_int64) for name in ("logits", "target", "loss", "grad_loss")),
        ("ignore_index", ctypes.c_int64),
        ("smoothing", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("mean", "target_gradient", "recompute")),
        *(
            (name, ctypes.c_int64)
            for name in ("sm_count", "shared_per_block", "shared_per_sm", "clusters", "descending")
        ),
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("logits", "probabilities", "weight", "row_upstream", "grad_loss", "kept_weight"),
                *("labels", "row_loss", "row_max", "row_sum", "grad", "loss", "total_weight"),
                "workspace",
            )
        ),
    ]


class EmulatedPlan(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("kernel", "held", "threads", "lanes", "cluster", "slice", "shared_bytes", "blocks"),
            "workspace_doubles",
        )
    ]


PACKED, ROWS, STRIDED = range(3)


@pytest.fixture(scope="session")
def emulation() -> ctypes.CDLL:
    """The kernels compiled for the CPU; under FASTOPT_SANITIZE=1 with sanitizers."""
    sanitize = os.environ.get("FASTOPT_SANITIZE") == "1"
    source = ROOT / "tests/emulation/cross_entropy.cpp"
    name = "cross_entropy_sanitize.so" if sanitize else "cross_entropy.so"
    library = ROOT / "build/emulation" / name
    sources = [source, *(ROOT / "tests/emulation").glob("*.h"), *(ROOT / "csrc").rglob("*.h")]
    newest = max(path.stat().st_mtime for path in sources)
    if not library.exists() or library.stat().st_mtime < newest:
        library.parent.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}.tmp")
        flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"] if sanitize else []
        subprocess.run(
            [
                *("g++", "-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", *flags),
                *("-fPIC", "-shared", "-DFASTOPT_EMULATED", "-Icsrc", "-Itests/emulation"),
                *(str(source), "-o", str(unfinished)),
            ],
            cwd=ROOT,
            check=True,
        )
        os.replace(unfinished, library)
    loaded = ctypes.CDLL(str(library))
    loaded.fastopt_failure.restype = ctypes.c_char_p
    return loaded


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
    """A tensor between bytes that nobody may write."""

    MARGIN, PATTERN = 64, 0xA5

    def __init__(self, sizes: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype):
        last = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        self.bytes = (last + 1 if math.prod(sizes) else 0) * dtype.itemsize
        self.buffer = torch.full((self.bytes + 2 * self.MARGIN,), self.PATTERN, dtype=torch.uint8)
        inside = self.buffer[self.MARGIN : self.MARGIN + self.bytes]
        inside.fill_(0xFF)  # NaN: what is not written shows
        self.tensor = inside.view(dtype).as_strided(sizes, strides)

    def check(self) -> Tensor:
        guards = [self.buffer[: self.MARGIN], self.buffer[self.MARGIN + self.bytes :]]
        assert all((guard == self.PATTERN).all() for guard in guards), "a store out of bounds"
        return self.tensor


def contiguous_guarded(shape: tuple[int, ...], dtype: torch.dtype) -> Guarded:
    return Guarded(shape, torch.empty(shape, device="meta").stride(), dtype)


def view_strides(tensor: Tensor) -> tuple[int, int, int]:
    """(batch, class, position), where the positions step through memory as one."""
    if tensor.dim() == 1:
        return 0, tensor.stride(0), 0
    wide = [axis for axis in range(2, tensor.dim()) if tensor.shape[axis] != 1]
    return tensor.stride(0), tensor.stride(1), tensor.stride(wide[-1]) if wide else 0


@dataclass
class Emulation:
    """Calls the kernels as the launcher does, on an invented or a real device."""

    library: ctypes.CDLL
    device: Device
    descending: bool = False
    plans: list[EmulatedPlan] = field(default_factory=list)

    def _call(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        **fields: object,
    ) -> EmulatedCall:
        dim = class_dim(logits)
        call = EmulatedCall()
        call.batch = 1 if logits.dim() == 1 else logits.shape[0]
        call.classes = logits.shape[dim]
        call.positions = math.prod(logits.shape[2:])
        call.logits, call.logits_type = logits.data_ptr(), ELEMENTS[logits.dtype]
        call.logits_strides[:] = view_strides(logits)
        if target.is_floating_point():
            call.probabilities, call.target_type = target.data_ptr(), ELEMENTS[target.dtype]
            call.target_strides[:] = view_strides(target)
        else:
            assert target.is_contiguous()
            call.labels = target.data_ptr()
        call.weight = None if weight is None else weight.data_ptr()
        call.ignore_index = ignore_index
        call.smoothing = max(label_smoothing, 0.0) if label_smoothing == label_smoothing else 0.0
        call.mean = reduction == "mean"
        call.descending = self.descending
        for name in ("sm_count", "shared_per_block", "shared_per_sm", "clusters"):
            setattr(call, name, getattr(self.device, name))
        for name, value in fields.items():
            setattr(call, name, value)
        return call

    def _run(self, call: EmulatedCall) -> None:
        plan = EmulatedPlan()
        assert self.library.fastopt_plan(ctypes.byref(call), ctypes.byref(plan)) == 0
        self.plans.append(plan)
        workspace = contiguous_guarded((plan.workspace_doubles,), torch.float64)
        call.workspace = workspace.tensor.data_ptr()
        failed = self.library.fastopt_cross_entropy(ctypes.byref(call))
        assert not failed, self.library.fastopt_failure().decode()
        workspace.check()

    def forward(
        self, logits: Tensor, target: Tensor, loss_dtype: torch.dtype, **options: object
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = logits.shape[:0] if logits.dim() == 1 else logits.shape[:1] + logits.shape[2:]
        accumulate = accumulate_dtype(logits)
        by_row = options.get("reduction") == "none"
        loss = contiguous_guarded(rows if by_row else (), accumulate if by_row else loss_dtype)
        kept = [contiguous_guarded(shape, accumulate) for shape in (rows, rows, ())]
        call = self._call(logits, target, **options)
        if by_row:
            call.row_loss = loss.tensor.data_ptr()
        else:
            call.loss, call.loss_type = loss.tensor.data_ptr(), ELEMENTS[loss_dtype]
        call.row_max, call.row_sum, call.total_weight = (k.tensor.data_ptr() for k in kept)
        self._run(call)
        return loss.check().to(loss_dtype), *(k.check() for k in kept)

    def forward_backward(
        self, logits: Tensor, target: Tensor, loss_dtype: torch.dtype, **options: object
    ) -> tuple[Tensor, Tensor]:
        loss, grad = contiguous_guarded((), loss_dtype), guarded_gradient(logits)
        call = self._call(logits, target, **options)
        call.loss, call.loss_type = loss.tensor.data_ptr(), ELEMENTS[loss_dtype]
        call.grad = grad.tensor.data_ptr()
        call.grad_strides[:] = view_strides(grad.tensor)
        self._run(call)
        return loss.check(), grad.check()

    def backward(
        self,
        grad_loss: Tensor,
        logits: Tensor,
        target: Tensor,
        row_max: Tensor,
        row_sum: Tensor,
        total_weight: Tensor,
        target_gradient: bool = False,
        **options: object,
    ) -> Tensor:
        grad = guarded_gradient(target if target_gradient else logits)
        call = self._call(logits, target, target_gradient=target_gradient, **options)
        call.recompute = True
        call.row_max, call.row_sum = row_max.data_ptr(), row_sum.data_ptr()
        call.kept_weight = total_weight.data_ptr()
        if options.get("reduction") == "none":
            grad_loss = grad_loss.to(row_max.dtype)
            call.row_upstream = grad_loss.data_ptr()
        else:
            call.grad_loss, call.grad_loss_type = grad_loss.data_ptr(), ELEMENTS[grad_loss.dtype]
        call.grad = grad.tensor.data_ptr()
        call.grad_strides[:] = view_strides(grad.tensor)
        self._run(call)
        return grad.check()


def accumulate_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def guarded_gradient(like: Tensor) -> Guarded:
    layout = reference.empty_gradient(like)
    return Guarded(tuple(layout.shape), layout.stride(), layout.dtype)


# -- the check --------------------------------------------------------------------------------------


def check(
    library: ctypes.CDLL, device: Device, logits: Tensor, target: Tensor, **keywords: object
) -> list[EmulatedPlan]:
    """Every op and reduction against float64, in both orders of the threads.

    Returns the plans of the forward pass with and the one without gradient, of the backward pass,
    and so on.
    """
    weight = keywords.get("weight")
    options = {
        **keywords,
        "weight": weight.to(accumulate_dtype(logits)) if isinstance(weight, Tensor) else None,
    }
    results, plans = [], []
    for descending in (False, True):
        emulation = Emulation(library, device, descending)
        results.append(run_all(emulation, logits, target, options))
        plans = emulation.plans
    for name, ours in results[0].items():
        assert_same_bits(ours, results[1][name], f"{name} in the other order of threads")
    compare(results[0], logits, target, keywords)
    return plans


def run_all(
    emulation: Emulation, logits: Tensor, target: Tensor, options: dict[str, object]
) -> dict[str, Tensor]:
    loss_dtype = torch.promote_types(logits.dtype, target.dtype)
    results: dict[str, Tensor] = {}
    for reduction in ("mean", "sum", "none"):
        options = {**options, "reduction": reduction}
        loss, *kept = emulation.forward(logits, target, loss_dtype, **options)
        results[f"{reduction} loss"] = loss
        if reduction != "none":
            both = emulation.forward_backward(logits, target, loss_dtype, **options)
            results[f"{reduction} loss with gradient"] = both[0]
            results[f"{reduction} gradient of logits"] = both[1]
        upstream = random_upstream(loss)
        if reduction == "sum":
            continue
        backward = (upstream, logits, target, *kept)
        name = f"{reduction} scaled gradient of"
        results[f"{name} logits"] = emulation.backward(*backward, **options)
        if target.is_floating_point():
            results[f"{name} target"] = emulation.backward(
                *backward, target_gradient=True, **options
            )
    return results


def compare(
    ours: dict[str, Tensor], logits: Tensor, target: Tensor, keywords: dict[str, object]
) -> None:
    wanted = ("logits", "target") if target.is_floating_point() else ("logits",)
    for reduction in ("mean", "sum", "none"):
        for scaled in (False, True):
            arguments = {
                **keywords,
                "reduction": reduction,
                "upstream": random_upstream if scaled else torch.ones_like,
                "wanted": wanted,
            }
            stock = differentiate(F.cross_entropy, logits, target, **arguments)
            oracle = exact(differentiate, logits, target, **arguments)
            if not target.is_floating_point():
                ignored = target == keywords.get("ignore_index", -100)
                ignored = ignored.unsqueeze(class_dim(logits))
                oracle.gradients["logits"].masked_fill_(ignored, 0.0)
            expected = {
                "loss": (stock.loss, oracle.loss),
                "loss with gradient": (stock.loss, oracle.loss),
            }
            for name in wanted:
                label = f"scaled gradient of {name}" if scaled else f"gradient of {name}"
                expected[label] = (stock.gradients[name], oracle.gradients[name])
            for label, (theirs, exactly) in expected.items():
                what = f"{reduction} {label}"
                if what in ours:
                    assert_as_accurate(ours[what], theirs, exactly, what)


def check_indices(
    library: ctypes.CDLL, device: Device, logits: Tensor, options: Options
) -> list[EmulatedPlan]:
    target, keywords = options.apply(logits, make_target(logits))
    return check(library, device, logits, target, **keywords)


# -- every branch -----------------------------------------------------------------------------------
# name: shape, device, and what the plan of the gradient in forward has to be, so that no branch is
# left without its case when a constant changes.

BRANCHES: dict[str, tuple[tuple[int, int], Device, dict[str, int]]] = {
    "packed-1-lane": ((700, 3), H200, {"kernel": PACKED, "lanes": 1}),
    "packed-2-lanes": ((131, 5), H200, {"kernel": PACKED, "lanes": 2}),
    "packed-4-lanes": ((67, 10), H200, {"kernel": PACKED, "lanes": 4}),
    "packed-8-lanes": ((33, 32), H200, {"kernel": PACKED, "lanes": 8}),
    "packed-16-lanes": ((17, 33), H200, {"kernel": PACKED, "lanes": 16}),
    "packed-32-lanes": ((9, 127), H200, {"kernel": PACKED, "lanes": 32}),
    "warp-a-row": ((11, 131), H200, {"kernel": ROWS, "held": 1, "lanes": 32, "cluster": 1}),
    "block-a-row": ((3, 3001), H200, {"kernel": ROWS, "held": 1, "cluster": 1}),
    "cluster-of-2": ((3, 1501), tiny(4800), {"kernel": ROWS, "held": 1, "cluster": 2}),
    "cluster-of-4": ((2, 1501), tiny(2500), {"kernel": ROWS, "held": 1, "cluster": 4}),
    "cluster-of-8": ((2, 1501), tiny(1600), {"kernel": ROWS, "held": 1, "cluster": 8}),
    "warps-read-twice": ((11, 131), tiny(900, False), {"kernel": ROWS, "held": 0, "lanes": 32}),
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
