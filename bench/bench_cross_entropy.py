"""Cross-entropy: fastopt, torch eager and torch.compile on the same tensors; on a GPU also the
public peers that are installed there.

A call is what one training step asks of the loss: forward, backward to a fresh gradient of the
logits, and the release of that gradient. Other modes: `forward` alone, without gradients;
`backward` alone, after a forward outside the timing; `scaled`, a call whose loss is multiplied by
0.37 before backward, as in gradient accumulation.
The variants are timed in turns within one process; conftest.py says how and why.

    python -m pytest bench/bench_cross_entropy.py [--quick] [--device=cuda]
"""

import contextlib
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from _pytest.mark import ParameterSet

import fastopt

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, ...]  # logits: (N, C) or (N, C, d1, ...)
    dtype: torch.dtype
    label_smoothing: float = 0.0
    probabilities: bool = False
    mode: str = "full"  # or forward, backward, scaled

    def __str__(self) -> str:
        return self.name


# name: (module, its cross-entropy of contiguous (N, C) logits and class indices, mean). Liger's
# overwrites the logits with their gradient, so it gets logits that nobody else needs.
PEERS: dict[str, tuple[str, Callable[[ModuleType], Loss]]] = {
    "liger": (
        "liger_kernel.transformers.functional",
        lambda module: module.liger_cross_entropy,
    ),
    "quack": (
        "quack.cross_entropy",
        lambda module: (
            lambda logits, target: module.cross_entropy(logits, target, reduction="mean")
        ),
    ),
    "flash-attn": (
        "flash_attn.ops.triton.cross_entropy",
        lambda module: lambda logits, target: module.cross_entropy_loss(logits, target)[0].mean(),
    ),
}


def find_peers() -> dict[str, Loss]:
    found = {}
    for name, (module, take) in PEERS.items():
        with contextlib.suppress(ImportError):
            found[name] = take(importlib.import_module(module))
    return found


VARIANTS = ("fastopt", "eager", "compile", *PEERS)

f64, f32, bf16, f16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
quick = pytest.mark.quick

CPU_CASES = [
    # A language model's head: rows that fit the second-level cache, and rows that hardly do.
    Case("float32 4096 x 32000", (4096, 32000), f32),
    Case("float32 1024 x 128256", (1024, 128256), f32),
    Case("bfloat16 4096 x 32000", (4096, 32000), bf16),
    Case("float16 1024 x 32000", (1024, 32000), f16),
    Case("float64 1024 x 32000", (1024, 32000), f64),
    Case("float32 4096 x 32000, forward alone", (4096, 32000), f32, mode="forward"),
    # A classifier, and the variants of its target.
    pytest.param(Case("float32 8192 x 1000", (8192, 1000), f32), marks=quick),
    Case("float32 8192 x 1000, smoothing", (8192, 1000), f32, label_smoothing=0.1),
    Case("float32 8192 x 1000, probabilities", (8192, 1000), f32, probabilities=True),
    pytest.param(Case("bfloat16 8192 x 1000", (8192, 1000), bf16), marks=quick),
    # Very many rows of few classes, few rows of very many, more rows than float16 can count.
    Case("float32 65536 x 10", (65536, 10), f32),
    Case("float32 8 x 128256", (8, 128256), f32),
    pytest.param(Case("float16 131072 x 10", (131072, 10), f16), marks=quick),
    # Segmentation: the classes of a pixel lie d1 * d2 elements apart.
    pytest.param(Case("float32 8 x 21 x 256 x 256", (8, 21, 256, 256), f32), marks=quick),
    Case("float32 2 x 150 x 256 x 256", (2, 150, 256, 256), f32),
    # So little work that the calls themselves are the cost.
    pytest.param(Case("float32 4 x 10", (4, 10), f32), marks=quick),
    Case("float32 16 x 10", (16, 10), f32),
    Case("float32 32 x 10", (32, 10), f32),
    pytest.param(Case("float32 128 x 10", (128, 10), f32), marks=quick),
]


def gpu_cases() -> list[Case | ParameterSet]:
    """A gigabyte of logits where that is not too many rows: memory, not launches, is the limit."""
    cases: list[Case | ParameterSet] = []
    for classes in (10, 1000, 4096, 32000, 50257, 128256, 151936, 262144):
        for dtype in (bf16, f32):
            name = str(dtype).removeprefix("torch.")
            rows = min(2**30 // dtype.itemsize // classes, 2**20)
            case = Case(f"{name} {rows} x {classes}", (rows, classes), dtype)
            is_quick = dtype == bf16 and classes in (1000, 128256)
            cases.append(pytest.param(case, marks=quick) if is_quick else case)
            if dtype == bf16 and classes in (4096, 32000, 128256, 262144):
                for mode in ("forward", "backward", "scaled"):
                    cases.append(replace(case, name=f"{case.name}, {mode}", mode=mode))
    return [
        *cases,
        Case("bfloat16 16384 x 32000, smoothing", (16384, 32000), bf16, label_smoothing=0.1),
        Case("float32 8192 x 1000, probabilities", (8192, 1000), f32, probabilities=True),
        Case("float16 16384 x 32000", (16384, 32000), f16),
        Case("float32 32 x 21 x 512 x 512", (32, 21, 512, 512), f32),
        Case("bfloat16 8 x 150 x 512 x 512", (8, 150, 512, 512), bf16),
        Case("bfloat16 16 x 128256", (16, 128256), bf16),
        Case("float32 128 x 10", (128, 10), f32),
        Case("float32 128 x 1000", (128, 1000), f32),
        Case("bfloat16 256 x 32000", (256, 32000), bf16),
    ]


def only_on(device: str, cases: list[Case | ParameterSet]) -> list[ParameterSet]:
    found = [case if isinstance(case, ParameterSet) else pytest.param(case) for case in cases]
    return [
        pytest.param(*case.values, marks=[*case.marks, pytest.mark.on(device)]) for case in found
    ]


CASES = only_on("cpu", CPU_CASES) + only_on("cuda", gpu_cases())


def make_inputs(case: Case, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a partly trained model: half of the rows are sure of their class, half are not."""
    on = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    logits = torch.randn(case.shape, **on).mul_(3)
    rows = (case.shape[0], *case.shape[2:])
    target = torch.randint(case.shape[1], rows, **on)
    sure = torch.rand(rows, **on).gt_(0.5).mul_(15)
    logits.scatter_add_(1, target.unsqueeze(1), sure.unsqueeze(1))
    if case.probabilities:
        target = torch.randn(case.shape, **on).mul_(2).softmax(1).to(case.dtype)
    return logits.to(case.dtype), target


def bytes_moved(case: Case, logits: torch.Tensor, target: torch.Tensor) -> int:
    """Each logit and target read once; with a backward, each gradient written once."""
    return logits.nbytes * (1 if case.mode == "forward" else 2) + target.nbytes


def make_criterion(case: Case, variant: str) -> Loss:
    if variant in PEERS:
        return find_peers()[variant]
    if variant == "fastopt":
        return fastopt.CrossEntropyLoss(label_smoothing=case.label_smoothing)
    if variant == "eager":
        return torch.nn.CrossEntropyLoss(label_smoothing=case.label_smoothing)

    def stock(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, target, label_smoothing=case.label_smoothing)

    return torch.compile(stock, dynamic=False)


def make_call(case: Case, variant: str, logits: torch.Tensor, target: torch.Tensor):
    """The call to be timed, and what has to run before it outside the timing (or None)."""
    criterion = make_criterion(case, variant)
    if case.mode == "forward":

        def forward() -> None:
            with torch.no_grad():
                criterion(logits, target)

        return forward, None

    leaf = logits.detach()
    leaf = (leaf.clone() if variant == "liger" else leaf).requires_grad_()
    factor = 0.37 if case.mode == "scaled" else 1

    # Some layer made the logits, as in training. Where the view's own 2 us would show, a leaf will do.
    output = leaf.view_as if leaf.nbytes > 1 << 20 else lambda leaf: leaf

    def forward_backward() -> None:
        loss = criterion(output(leaf), target)
        (loss * factor if factor != 1 else loss).backward()
        leaf.grad = None

    if case.mode != "backward":
        return forward_backward, None

    losses: list[torch.Tensor] = []

    def backward() -> None:
        losses.pop().backward()
        leaf.grad = None

    return backward, lambda: losses.append(criterion(output(leaf), target))


def errors(
    case: Case, logits: torch.Tensor, target: torch.Tensor, results: dict[str, tuple]
) -> dict[str, dict[str, float]]:
    """How far each variant's (loss, gradient) is from torch in float64 on the same inputs.

    loss_error       |loss - exact| / |exact|
    grad_error       largest |gradient - exact| / largest |exact|
    element_error    median of |gradient - exact| / |exact| over the elements that the dtype holds
                     at full precision (not below its smallest normal number); absent if none are

    The gradients are compared over the first rows: float64 on all of them would take longer than
    the timing, and the rows are alike.
    """
    rows = math.prod(case.shape) // case.shape[1]
    at_a_time = max(1, 2**24 // math.prod(case.shape[1:]))  # float64 copies of 128 MB each
    parts = [slice(start, start + at_a_time) for start in range(0, case.shape[0], at_a_time)]

    def exact_loss(part: slice, part_logits: torch.Tensor) -> torch.Tensor:
        part_target = target[part].double() if case.probabilities else target[part]
        smoothing = case.label_smoothing
        loss = F.cross_entropy(part_logits, part_target, label_smoothing=smoothing, reduction="sum")
        return loss / rows

    exact = sum(exact_loss(part, logits[part].double()).item() for part in parts)
    found = {
        variant: {"loss_error": abs(loss.double().item() - exact) / exact}
        for variant, (loss, _) in results.items()
    }
    if case.mode != "forward":
        leaf = logits[parts[0]].double().requires_grad_()
        exact_loss(parts[0], leaf).backward()
        size = leaf.grad.abs()
        normal = size >= torch.finfo(case.dtype).tiny
        for variant, (_, grad) in results.items():
            off = (grad[parts[0]].double() - leaf.grad).abs_()
            found[variant]["grad_error"] = (off.max() / size.max()).item()
            if normal.any():
                found[variant]["element_error"] = (off / size)[normal].median().item()
    return found


@pytest.fixture(scope="module", params=CASES, ids=str)
def measured(
    request, device, left_out, interleave, peak_memory, launches, host_time
) -> tuple[Case, dict[str, dict]]:
    """All that `record` wants to know of each variant of one case."""
    case = request.param
    torch.compiler.reset()  # else the ninth shape would silently run uncompiled
    logits, target = make_inputs(case, device)
    plain = len(case.shape) == 2 and not case.probabilities and not case.label_smoothing
    peers = list(find_peers()) if device == "cuda" and plain else []
    variants = [variant for variant in VARIANTS if variant not in PEERS or variant in peers]
    variants = [variant for variant in variants if variant not in left_out]

    results = {}
    for variant in variants:
        leaf = logits.clone() if variant == "liger" else logits.detach()
        leaf.requires_grad_(case.mode != "forward")
        loss = make_criterion(case, variant)(leaf, target)
        if case.mode != "forward":
            loss.backward()
        results[variant] = loss.detach(), leaf.grad
        del leaf
    error = errors(case, logits, target, results)
    results.clear()

    calls, before = {}, {}
    for variant in variants:
        calls[variant], prepare = make_call(case, variant, logits, target)
        if prepare:
            before[variant] = prepare
    durations = interleave(calls, before)
    found = {}
    for variant in variants:
        prepare = before.get(variant, lambda: None)
        prepare()
        peak = peak_memory(calls[variant])
        prepare()
        found[variant] = {
            "durations": durations[variant],
            "bytes_moved": bytes_moved(case, logits, target),
            "peak_mb": peak,
            "result_mb": 0.0 if case.mode == "forward" else logits.nbytes / 2**20,
            **launches(calls[variant]),
            **host_time(calls[variant], before.get(variant)),
            **error[variant],
        }
    return case, found


@pytest.mark.parametrize(
    "variant",
    [pytest.param(v, marks=pytest.mark.on("cuda")) if v in PEERS else v for v in VARIANTS],
)
def test_cross_entropy(measured, variant, record) -> None:
    case, found = measured
    if variant not in found:
        pytest.skip("not installed, or not made for this case")
    record(
        case.name,
        op="cross_entropy",
        variant=variant,
        dtype=str(case.dtype).removeprefix("torch."),
        mode=case.mode,
        classes=case.shape[1],
        **found[variant],
    )
