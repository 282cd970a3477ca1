"""Whole training steps, with both lines of the script swapped and with neither.

A step is zero_grad, forward, loss, backward and the optimizer's step. On the same data, from the same
parameters, in turns within one process (conftest.py says how and why):

    fastopt        fastopt.CrossEntropyLoss, fastopt.SGD
    eager          torch.nn.CrossEntropyLoss, torch.optim.SGD, as people write them
    fastopt alone  the loss, forward and backward to the logits, and the optimizer's step: what of a
    eager alone    step the two lines are

    python -m pytest bench/bench_training.py [--quick]
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastopt
from timing import Call

VARIANTS = ("fastopt", "eager", "fastopt alone", "eager alone")
LINES: dict[str, tuple[Any, Any]] = {
    "fastopt": (fastopt.CrossEntropyLoss, fastopt.SGD),
    "eager": (nn.CrossEntropyLoss, torch.optim.SGD),
}
STEPS_COMPARED = 5
FEWEST_ROUNDS = 9  # a step may take a second

# -- models -----------------------------------------------------------------------------------------


def convolution(before: int, after: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()
    )


class Residual(nn.Module):
    """Two convolutions, added to what comes in; where they halve the image, to every other pixel of
    it, with channels of zeros behind."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.stride = 1 if before == after else 2
        self.more = after - before
        self.first = convolution(before, after, self.stride)
        self.second = nn.Sequential(
            nn.Conv2d(after, after, 3, padding=1, bias=False), nn.BatchNorm2d(after)
        )

    def forward(self, x: Tensor) -> Tensor:
        same = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))
        return F.relu(self.second(self.first(x)) + same)


def resnet20() -> nn.Module:
    """That of He et al. for CIFAR-10: 0.27 million parameters."""
    widths = [16] * 4 + [32] * 3 + [64] * 3
    blocks = [Residual(*pair) for pair in itertools.pairwise(widths)]
    return nn.Sequential(
        convolution(3, 16), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
    )


class LanguageModel(nn.Module):
    """Two transformer blocks of width 256 below a head of 32,000 classes."""

    def __init__(self, classes: int = 32000, width: int = 256, length: int = 256) -> None:
        super().__init__()
        self.tokens = nn.Embedding(classes, width)
        self.positions = nn.Parameter(torch.randn(length, width) * 0.02)
        block = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        x = self.blocks(self.tokens(tokens) + self.positions, mask=causal, is_causal=True)
        return self.head(x).flatten(0, 1)


class UNet(nn.Module):
    """Down by 4 and up again, the image's own resolution joined at each size."""

    def __init__(self, classes: int = 21, width: int = 16) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            [
                convolution(3, width),
                convolution(width, 2 * width),
                convolution(2 * width, 4 * width),
            ]
        )
        self.up = nn.ModuleList([convolution(6 * width, 2 * width), convolution(3 * width, width)])
        self.last = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for level in self.down:
            x = level(x if not kept else F.max_pool2d(x, 2))
            kept.append(x)
        for level, before in zip(self.up, kept[-2::-1], strict=True):
            x = level(torch.cat([F.interpolate(x, scale_factor=2.0), before], 1))
        return self.last(x)


# -- cases ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    name: str
    model: Callable[[], nn.Module]
    data: Callable[[torch.Generator], tuple[Tensor, Tensor]]  # input, target

    def __str__(self) -> str:
        return self.name


def photos(random: torch.Generator) -> tuple[Tensor, Tensor]:
    shape = (128, 3, 32, 32)
    return torch.randn(shape, generator=random), torch.randint(10, (128,), generator=random)


def text(random: torch.Generator) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(32000, (8, 257), generator=random)
    return tokens[:, :-1], tokens[:, 1:].flatten()


def scenes(random: torch.Generator) -> tuple[Tensor, Tensor]:
    target = torch.randint(21, (8, 128, 128), generator=random)
    return torch.randn(8, 3, 128, 128, generator=random), target


CASES = [
    pytest.param(Case("ResNet-20, CIFAR, batch 128", resnet20, photos), marks=pytest.mark.quick),
    Case("transformer, 32000 classes, 8 x 256 tokens", LanguageModel, text),
    Case("U-Net, 21 classes, 8 x 128 x 128", UNet, scenes),
]


class Training:
    """A model of its own with one of the two pairs of lines."""

    def __init__(self, case: Case, lines: str) -> None:
        torch.manual_seed(0)
        self.model = case.model()
        loss, optimizer = LINES[lines]
        self.criterion = loss()
        self.optimizer = optimizer(
            self.model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4
        )
        self.input, self.target = case.data(torch.Generator().manual_seed(1))

    def step(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.criterion(self.model(self.input), self.target)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def lines_alone(self) -> Call:
        """On logits and gradients that are there. A view's gradient goes to what it is a view of, as
        a model's logits' goes on to the layer before."""
        logits = self.model(self.input).detach()
        leaf = logits.requires_grad_()

        def run() -> None:
            self.criterion(leaf.view_as(leaf), self.target).backward()
            self.optimizer.step()
            leaf.grad = None

        return run


@pytest.fixture(scope="module", params=CASES, ids=str)
def measured(request, interleave, peak_memory) -> tuple[Case, dict[str, dict]]:
    """All that `record` wants to know of each variant of one case."""
    case = request.param
    trainings = {lines: Training(case, lines) for lines in LINES}
    curves = {
        lines: torch.stack([training.step() for _ in range(STEPS_COMPARED)])
        for lines, training in trainings.items()
    }
    # Both round, each in its own way: far more than that would be another loss.
    apart = ((curves["fastopt"] - curves["eager"]).abs() / curves["eager"]).max().item()
    steps: dict[str, Call] = {lines: training.step for lines, training in trainings.items()}
    alone = {f"{lines} alone": t.lines_alone() for lines, t in trainings.items()}
    # Apart: a turn is as long as the shortest call wants it.
    durations = interleave(steps, fewest=FEWEST_ROUNDS) | interleave(alone)
    return case, {
        variant: {
            "durations": durations[variant],
            "peak_mb": peak_memory(call),
            "curves_apart": apart,
        }
        for variant, call in (steps | alone).items()
    }


@pytest.mark.on("cpu")
@pytest.mark.parametrize("variant", VARIANTS)
def test_training(measured, variant, record) -> None:
    case, found = measured
    record(case.name, op="training", variant=variant, dtype="float32", **found[variant])
