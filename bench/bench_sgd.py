"""SGD: a step of fastopt and of every implementation that torch has, on the same tensors.

Momentum 0.9, weight decay 1e-4. A call is one `optimizer.step()`. As in training, where
`zero_grad` drops the gradients and `backward` brings new ones, each step finds other gradient
tensors than the step before; they are put in place outside the timing. The variants are timed in
turns within one process; conftest.py says how and why.

    python -m pytest bench/bench_sgd.py [--quick] [--device=cuda]
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

import fastopt

VARIANTS = ("fastopt", "for-loop", "foreach", "fused", "compile")
STEPS_COMPARED = 5

Call = Callable[[], object]


def resnet50() -> list[tuple[int, ...]]:
    """The shapes of ResNet-50's 161 parameter tensors: 25,557,032 elements."""

    def conv_bn(out: int, into: int, kernel: int) -> list[tuple[int, ...]]:
        return [(out, into, kernel, kernel), (out,), (out,)]

    shapes = conv_bn(64, 3, 7)
    into = 64
    for width, blocks in (64, 3), (128, 4), (256, 6), (512, 3):
        for block in range(blocks):
            shapes += conv_bn(width, into, 1) + conv_bn(width, width, 3)
            shapes += conv_bn(4 * width, width, 1)
            if block == 0:
                shapes += conv_bn(4 * width, into, 1)
            into = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def transformer(
    width: int, blocks: int, embeddings: list[tuple[int, ...]]
) -> list[tuple[int, ...]]:
    """Embeddings, then blocks of attention and a four times wider MLP, each with its LayerNorm."""
    block = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
    block += [(width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [*embeddings, *(block * blocks), (width,), (width,)]


GPT2 = transformer(768, 12, [(50257, 768), (1024, 768)])  # 124,439,808 elements
VIT_B16 = transformer(768, 12, [(1, 1, 768), (1, 197, 768), (768, 3, 16, 16), (768,)])
VIT_B16 += [(1000, 768), (1000,)]  # 86,567,656 elements

LENET = [
    *[(6, 1, 5, 5), (6,), (16, 6, 5, 5), (16,)],
    *[(120, 400), (120,), (84, 120), (84,), (10, 84), (10,)],
]


@dataclass(frozen=True)
class Case:
    name: str
    shapes: list[tuple[int, ...]]
    dtype: torch.dtype = torch.float32
    compile: bool = True

    def __str__(self) -> str:
        return self.name


quick = pytest.mark.quick
cpu, cuda = pytest.mark.on("cpu"), pytest.mark.on("cuda")

CASES = [
    pytest.param(Case("float32 25M", [(25_000_000,)]), marks=cpu),
    pytest.param(Case("float32 8 x 12.5M", [(12_500_000,)] * 8), marks=cpu),
    pytest.param(Case("bfloat16 25M", [(25_000_000,)], torch.bfloat16), marks=cpu),
    pytest.param(Case("float32 100M", [(100_000_000,)]), marks=cuda),
    pytest.param(Case("bfloat16 100M", [(100_000_000,)], torch.bfloat16), marks=cuda),
    pytest.param(Case("float32 GPT-2 124M, 148 tensors", GPT2), marks=cuda),
    pytest.param(Case("bfloat16 GPT-2 124M, 148 tensors", GPT2, torch.bfloat16), marks=cuda),
    pytest.param(Case("float32 ViT-B/16, 152 tensors", VIT_B16), marks=cuda),
    Case("float32 ResNet-50, 161 tensors", resnet50()),
    # Compiling a step over a thousand tensors takes minutes.
    Case("float32 1000 x 64", [(64,)] * 1000, compile=False),
    pytest.param(Case("float32 161 x 64", [(64,)] * 161, compile=False), marks=quick),
    pytest.param(Case("float32 LeNet, 10 tensors", LENET), marks=quick),
]


def make_optimizer(variant: str, params: list[torch.Tensor]) -> torch.optim.Optimizer:
    options = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4}
    if variant == "fastopt":
        return fastopt.SGD(params, **options)
    if variant in ("foreach", "fused"):
        return torch.optim.SGD(params, **options, **{variant: True})
    # On GPUs torch's own choice would be foreach.
    return torch.optim.SGD(params, **options, foreach=None if variant == "compile" else False)


class Training:
    """Parameters of their own, an optimizer over them, and gradients that change with each step."""

    def __init__(self, variant: str, params: list[torch.Tensor], grads: list[list[torch.Tensor]]):
        self.params = [param.clone().requires_grad_() for param in params]
        optimizer = make_optimizer(variant, self.params)
        self.step = torch.compile(optimizer.step) if variant == "compile" else optimizer.step
        self._grads = itertools.cycle(grads)

    def bring_gradients(self) -> None:
        for param, grad in zip(self.params, next(self._grads), strict=True):
            param.grad = grad


def make_tensors(case: Case, seed: int, device: str) -> list[torch.Tensor]:
    random = torch.Generator(device).manual_seed(seed)
    return [
        torch.randn(shape, generator=random, device=device).to(case.dtype) for shape in case.shapes
    ]


def exact_params(case: Case, params: list[torch.Tensor], grads: list[list[torch.Tensor]]):
    """The parameters after STEPS_COMPARED steps of torch's for-loop in float64."""
    widened = [[grad.double() for grad in these] for these in grads]
    exact = Training("for-loop", [param.double() for param in params], widened)
    for _ in range(STEPS_COMPARED):
        exact.bring_gradients()
        exact.step()
    return [param.detach() for param in exact.params]


@pytest.fixture(scope="module", params=CASES, ids=str)
def measured(
    request, device, left_out, interleave, peak_memory, launches, host_time
) -> tuple[Case, dict[str, dict]]:
    """All that `record` wants to know of each variant of one case."""
    case = request.param
    torch.compiler.reset()
    params = make_tensors(case, 0, device)
    grads = [make_tensors(case, seed, device) for seed in (1, 2)]
    left_out = left_out if case.compile else ("compile",)
    variants = [variant for variant in VARIANTS if variant not in left_out]

    trainings = {variant: Training(variant, params, grads) for variant in variants}
    for training in trainings.values():
        for _ in range(STEPS_COMPARED):
            training.bring_gradients()
            training.step()
    error, same = compare(trainings, exact_params(case, params, grads))

    durations = interleave(
        {variant: training.step for variant, training in trainings.items()},
        before={variant: training.bring_gradients for variant, training in trainings.items()},
    )
    # Read parameter, gradient and momentum buffer; write parameter and buffer.
    elements = sum(math.prod(shape) for shape in case.shapes)
    bytes_moved = 5 * case.dtype.itemsize * elements
    return case, {
        variant: {
            "durations": durations[variant],
            "bytes_moved": bytes_moved,
            "peak_mb": peak_memory(training.step),
            "result_mb": 0.0,
            "param_error": error[variant],
            "same_bits_as_for_loop": same[variant],
            **launches(training.step),
            **host_time(training.step),
        }
        for variant, training in trainings.items()
    }


def compare(
    trainings: dict[str, Training], exact: list[torch.Tensor]
) -> tuple[dict[str, float], dict[str, bool]]:
    """Largest |parameter - exact| / largest |exact|; and whether the bits are the for-loop's."""
    largest = max(param.abs().max().item() for param in exact)
    stock = trainings["for-loop"].params
    error, same = {}, {}
    for variant, training in trainings.items():
        off = [
            (ours.double() - right).abs().max().item()
            for ours, right in zip(training.params, exact, strict=True)
        ]
        error[variant] = max(off) / largest
        same[variant] = all(map(torch.equal, training.params, stock))
    return error, same


@pytest.mark.parametrize("variant", VARIANTS)
def test_sgd(measured, variant, record) -> None:
    case, found = measured
    if variant not in found:
        pytest.skip("compiling a step over so many tensors takes minutes")
    record(
        case.name,
        op="sgd",
        variant=variant,
        dtype=str(case.dtype).removeprefix("torch."),
        **found[variant],
    )
