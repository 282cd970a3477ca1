"""Linear cross-entropy: fastopt, torch's in its three ways, and the matrix products alone.

A call is what one training step asks of the last layer and its loss: forward, backward to fresh
gradients of the input and the weight, and the release of both. `forward alone` is without gradients.
On the same tensors, in turns within one process (conftest.py says how and why):

    fastopt      fastopt.linear_cross_entropy
    eager        torch's, which makes the logits whole (before torch 2.13: linear, cross_entropy)
    compile      the same under torch.compile
    composed     F.linear and fastopt.cross_entropy
    chunked      torch's with LinearCrossEntropyOptions(), its own rule for the rows of a chunk
    chunked 512  the same with as many rows as ours
    products     the three matrix products of a training step, or the one of a forward, and nothing
                 else; of half precision in float32 where this CPU has no instructions for it

    python -m pytest bench/bench_linear_cross_entropy.py [--quick]
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

import fastopt
from fastopt.kernels.linear_cross_entropy import ROWS, multiplies
from fastopt.linear_loss import _stock
from timing import Call

Loss = Callable[..., torch.Tensor]

VARIANTS = ("fastopt", "eager", "compile", "composed", "chunked", "chunked 512", "products")
CHUNKED: dict[str, dict[str, object]] = {"chunked": {}, "chunked 512": {"batch_chunk_size": ROWS}}
FEWEST_ROUNDS = 5  # a call may take seconds
EXACT_ROWS = 256  # at a time in float64


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, int, int]  # N, H, C
    dtype: torch.dtype = torch.float32
    mode: str = "full"  # or forward
    reduction: str = "mean"
    ignored: float = 0.0

    def __str__(self) -> str:
        return self.name


bf16 = torch.bfloat16
quick = pytest.mark.quick
LARGE = (4096, 256, 32000)
CASES = [
    Case("float32 4096 x 256 x 32000", LARGE),
    Case("float32 4096 x 256 x 32000, forward alone", LARGE, mode="forward"),
    Case("float32 4096 x 256 x 32000, 75 % ignored", LARGE, ignored=0.75),
    Case("float32 4096 x 256 x 32000, none", LARGE, reduction="none"),
    Case("float32 1024 x 512 x 128256", (1024, 512, 128256)),
    Case("bfloat16 4096 x 256 x 32000", LARGE, bf16),
    pytest.param(Case("float32 2048 x 64 x 8192", (2048, 64, 8192)), marks=quick),
    # Where the composition serves.
    pytest.param(Case("float32 4 x 8 x 10", (4, 8, 10)), marks=quick),
    Case("float32 32 x 64 x 10", (32, 64, 10)),
    Case("float32 512 x 64 x 1000", (512, 64, 1000)),
]


def variants_of(case: Case) -> list[str]:
    """Torch's products in half precision take minutes on a CPU without instructions for them; its
    chunks multiply in float32."""
    slow = () if case.dtype is not bf16 or multiplies(bf16) else ("eager", "compile", "composed")
    missing = () if hasattr(torch.nn, "LinearCrossEntropyOptions") else tuple(CHUNKED)
    return [variant for variant in VARIANTS if variant not in (*slow, *missing)]


def make_inputs(case: Case) -> dict[str, torch.Tensor]:
    """Rows of a partly trained model: half of them are sure of their class, half are not."""
    rows, features, classes = case.shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, features, generator=generator)
    w = torch.randn(classes, features, generator=generator).div_(features**0.5)
    target = torch.randint(classes, (rows,), generator=generator)
    x[::2] += 8 * w[target[::2]]
    target[torch.rand(rows, generator=generator) < case.ignored] = -100
    return {"input": x.to(case.dtype), "linear_weight": w.to(case.dtype), "target": target}


def make_loss(case: Case, variant: str) -> Loss:
    if variant == "fastopt":
        return fastopt.linear_cross_entropy
    if variant == "composed":
        return lambda input, linear_weight, target, **others: fastopt.cross_entropy(
            F.linear(input, linear_weight), target, **others
        )
    if variant in CHUNKED:
        options = torch.nn.LinearCrossEntropyOptions(**CHUNKED[variant])
        return lambda **call: _stock(**call, options=options)

    def stock(**call: object) -> torch.Tensor:
        return _stock(**call)

    return torch.compile(stock, dynamic=False) if variant == "compile" else stock


def make_call(case: Case, variant: str, inputs: dict[str, torch.Tensor]) -> Call:
    if variant == "products":
        return make_products(case, inputs)
    loss_of = make_loss(case, variant)
    training = case.mode == "full"
    x, w = (inputs[n].detach().requires_grad_(training) for n in ("input", "linear_weight"))

    def run() -> None:
        with torch.set_grad_enabled(training):
            loss = loss_of(
                input=x, linear_weight=w, target=inputs["target"], reduction=case.reduction
            )
            if training:
                loss.sum().backward()
        x.grad = w.grad = None

    return run


def make_products(case: Case, inputs: dict[str, torch.Tensor]) -> Call:
    """On the rows that count, in chunks, as cold as in a training step."""
    x, w = inputs["input"][inputs["target"] != -100], inputs["linear_weight"]
    if not multiplies(case.dtype):
        x, w = x.float(), w.float()
    logits = x.new_empty(min(ROWS, len(x)), len(w))

    def run() -> None:
        grad_weight = torch.empty_like(w)
        for part in x.split(ROWS):
            some = torch.mm(part, w.t(), out=logits[: len(part)])
            if case.mode == "full":
                torch.mm(some, w)
                grad_weight.addmm_(some.t(), part, beta=0)

    return run


def errors(
    case: Case, inputs: dict[str, torch.Tensor], results: dict[str, tuple]
) -> dict[str, dict[str, float]]:
    """How far each variant's loss and input gradient are from torch in float64.

    loss_error       |loss - exact| / |exact|
    grad_error       largest |gradient - exact| / largest |exact|, over the first rows
    """
    x, w, target = (v.double() if v.is_floating_point() else v for v in inputs.values())
    live = int((target != -100).sum()) if case.reduction == "mean" else 1

    def part_of(at: slice, wants_gradient: bool) -> tuple[float, torch.Tensor | None]:
        leaf = x[at].requires_grad_(wants_gradient)
        loss = F.cross_entropy(F.linear(leaf, w), target[at], reduction="sum") / live
        grad = torch.autograd.grad(loss, leaf)[0] if wants_gradient else None
        return loss.item(), grad

    parts = [slice(i, i + EXACT_ROWS) for i in range(0, len(x), EXACT_ROWS)]
    exact, right = part_of(parts[0], case.mode == "full")
    exact += sum(part_of(part, False)[0] for part in parts[1:])
    found = {}
    for variant, (loss, grad) in results.items():
        found[variant] = {"loss_error": abs(loss.double().sum().item() - exact) / exact}
        if right is not None:
            off = (grad[parts[0]].double() - right).abs().max() / right.abs().max()
            found[variant]["grad_error"] = off.item()
    return found


@pytest.fixture(scope="module", params=CASES, ids=str)
def measured(request, left_out, interleave, peak_memory) -> tuple[Case, dict[str, dict]]:
    """All that `record` wants to know of each variant of one case."""
    case = request.param
    torch.compiler.reset()
    inputs = make_inputs(case)
    variants = [variant for variant in variants_of(case) if variant not in left_out]
    results = {}
    for variant in variants:
        if variant != "products":
            x = inputs["input"].detach().requires_grad_(case.mode == "full")
            w = inputs["linear_weight"].detach().requires_grad_(case.mode == "full")
            call = {"input": x, "linear_weight": w, "target": inputs["target"]}
            loss = make_loss(case, variant)(**call, reduction=case.reduction)
            if case.mode == "full":
                loss.sum().backward()
            results[variant] = loss.detach(), x.grad
    error = errors(case, inputs, results)
    results.clear()

    calls = {variant: make_call(case, variant, inputs) for variant in variants}
    durations = interleave(calls, fewest=FEWEST_ROUNDS)
    rows, _, classes = case.shape
    gradients = inputs["input"].nbytes + inputs["linear_weight"].nbytes
    found = {}
    for variant in variants:
        found[variant] = {
            "durations": durations[variant],
            "bytes_moved": gradients * (2 if case.mode == "full" else 1),
            "peak_mb": peak_memory(calls[variant]),
            "result_mb": gradients / 2**20 if case.mode == "full" else 0.0,
            "allowed_mb": 1 + min(ROWS, rows) * classes * 4 / 2**20,
            **error.get(variant, {}),
        }
    return case, found


@pytest.mark.on("cpu")
@pytest.mark.parametrize("variant", VARIANTS)
def test_linear_cross_entropy(measured, variant, record) -> None:
    case, found = measured
    if variant not in found:
        pytest.skip("not of this torch, or not in this dtype on this CPU")
    record(
        case.name,
        op="linear_cross_entropy",
        variant=variant,
        dtype=str(case.dtype).removeprefix("torch."),
        mode=case.mode,
        classes=case.shape[2],
        **found[variant],
    )
