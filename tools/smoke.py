"""Every GPU kernel of both ops, small, against float64 from the CPU: a few seconds a group.

    python tools/smoke.py GROUP... [--device cuda|cpu]

The oracle and the error budget are the tests' (tests/accuracy.py), computed on the CPU, so that
nothing is trusted to the GPU. Each group is meant for a process of its own: after an illegal access
every later call of a process fails. On the CPU our C++ kernels are checked instead, which shows
that this script is right. Needs torch only.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
# Before fastopt is imported: torch must serve neither small calls nor where kernels are wrong.
os.environ |= {"FASTOPT_ALWAYS": "1", "FASTOPT_CHECK": "0"}

import torch
import torch.nn.functional as F
from torch import Tensor

import fastopt
from accuracy import assert_as_accurate
from cross_entropy_cases import (
    DTYPES,
    EVERYTHING,
    OPTIONS,
    Options,
    differentiate,
    exact,
    make_logits,
    make_probabilities,
    make_target,
    offset,
    random_upstream,
)
from fastopt import loss, reference
from fastopt.sgd import launch, step

# A name and what raises where the result is wrong.
Check = tuple[str, Callable[[], None]]

# The shapes of each group, for the limits of an H100 (tests/test_lease.py asks the plan whether they
# take the kernels that they are named after).
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "packed": [(257, 10), (1003, 33), (5, 1), (4099, 3)],
    "rows": [(9, 1000), (3, 50257)],  # without a gradient in forward: nothing to hold
    "held": [(9, 1000), (5, 4096), (301, 777), (20011, 301)],
    "clusters": [(3, 50257), (2, 131072), (5, 128256)],
    "loop": [(2, 2**20)],
    "strided": [(2, 21, 33), (1, 1000, 67), (2, 21, 129, 127), (5, 5, 256, 256)],
}
REDUCTIONS = {"rows": ("none",)}


# -- cross_entropy ----------------------------------------------------------------------------------


def check_loss(device: str, logits: Tensor, target: Tensor, **keywords: object) -> None:
    """One call and its gradients; `keywords` as `differentiate` takes them."""
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in keywords.items()}
    # Copies element by element would lose the layout.
    inputs = [
        x.to(device)
        if x.is_contiguous() and x.data_ptr() % 16 == 0
        else offset(x.to(device).contiguous())
        for x in (logits, target)
    ]
    options = (moved.get("weight"), moved.get("ignore_index", -100))
    assert loss._serves(*inputs, *options, keywords.get("reduction", "mean"), 0.0), (
        "torch would serve this call"
    )
    ours = differentiate(fastopt.cross_entropy, *inputs, **moved).cpu()
    stock = differentiate(F.cross_entropy, logits, target, **keywords)
    oracle = exact(differentiate, logits, target, **keywords)
    assert_as_accurate(ours.loss, stock.loss, oracle.loss, "loss")
    for name, gradient in ours.gradients.items():
        what = f"gradient of {name}"
        assert_as_accurate(gradient, stock.gradients[name], oracle.gradients[name], what)


def labels_case(device: str, logits: Tensor, options: Options, **keywords: object) -> None:
    target, more = options.apply(logits, make_target(logits))
    check_loss(device, logits, target, **more, **keywords)


def times_three_eighths(result: Tensor) -> Tensor:
    return torch.full_like(result, 0.375)


def loss_checks(group: str, device: str) -> Iterator[Check]:
    for shape in SHAPES[group]:
        for dtype in DTYPES:
            logits = make_logits(shape, dtype)
            name = f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
            for reduction in REDUCTIONS.get(group, ("mean", "sum", "none")):
                upstream = random_upstream if reduction == "none" else times_three_eighths
                yield (
                    f"{name} {reduction}, everything",
                    lambda x=logits, r=reduction, u=upstream: labels_case(
                        device, x, EVERYTHING, reduction=r, upstream=u
                    ),
                )
            reduction = REDUCTIONS.get(group, ("mean",))[0]
            yield (
                f"{name} {reduction}, plain",
                lambda x=logits, r=reduction: labels_case(device, x, OPTIONS["plain"], reduction=r),
            )
            if math.prod(shape) < 2**20:
                yield (
                    f"{name} {reduction}, off by one element",
                    lambda x=logits, r=reduction: labels_case(
                        device, offset(x), OPTIONS["weight"], reduction=r
                    ),
                )
            # The budget of float64 knows nothing of how many masses were added up.
            if math.prod(shape) < 2**20 and (shape[1] <= 4096 or dtype != torch.float64):
                yield (
                    f"{name} {reduction}, probabilities",
                    lambda x=logits, r=reduction: check_loss(
                        device, x, make_probabilities(x), reduction=r, label_smoothing=0.1
                    ),
                )


def scale_checks(device: str) -> Iterator[Check]:
    def scale(count: int, dtype: torch.dtype, factor: float, start: int) -> None:
        values = torch.linspace(-3, 3, count + 2, dtype=torch.float64).to(dtype)
        whole = values.to(device, copy=True)
        expected = values.clone()
        part, same = (x[start : start + count].view(1, count) for x in (whole, expected))
        label = torch.tensor([count // 2])
        scale = torch.tensor(factor)
        arguments = (scale.to(device), label.to(device), -100, False)
        fastopt.ops.cross_entropy_scale_(part, *arguments)
        reference.cross_entropy_scale_(same, scale, label, -100, False)
        torch.testing.assert_close(whole.cpu(), expected, rtol=0, atol=0, equal_nan=True)

    for dtype in DTYPES:
        for count in (1, 7, 1000, 100_003):
            for factor, start in ((1.0, 0), (0.5, 0), (0.375, 1), (math.inf, 1)):
                yield (
                    f"scale {count} {dtype} by {factor} from {start}",
                    lambda a=(count, dtype, factor, start): scale(*a),
                )


def label_checks(device: str) -> Iterator[Check]:
    def out_of_range(shape: tuple[int, ...], label: int) -> None:
        logits = make_logits(shape).to(device)
        target = make_target(logits)
        target[0] = label
        result = differentiate(fastopt.cross_entropy, logits, target, reduction="none")
        wrong = (target == label).cpu()
        assert torch.equal(result.loss.isnan().cpu(), wrong), "the wrong rows' loss is NaN"
        rows = wrong.unsqueeze(1).expand(shape)
        assert torch.equal(result.gradients["logits"].isnan().cpu(), rows), "so is their gradient"

    def ignored_nan(shape: tuple[int, ...]) -> None:
        logits = make_logits(shape)
        target = make_target(logits)
        clean = differentiate(fastopt.cross_entropy, logits.to(device), target.to(device))
        logits = torch.cat([logits, torch.full_like(logits[:1], math.nan)])
        target = torch.cat([target, torch.full_like(target[:1], -100)])
        ours = differentiate(fastopt.cross_entropy, logits.to(device), target.to(device))
        torch.testing.assert_close(ours.loss, clean.loss, rtol=1e-6, atol=0)
        assert ours.gradients["logits"][-1].count_nonzero() == 0, "an ignored row has a gradient"

    for shape in ((40, 7), (5, 70000), (2, 7, 11, 3)):
        yield f"ignored NaN {shape}", lambda s=shape: ignored_nan(s)
        if device != "cpu":  # where the CPU's kernels raise IndexError
            for label in (-1, shape[1], 2**40, -(2**62)):
                yield f"label {label} of {shape}", lambda a=(shape, label): out_of_range(*a)


# -- SGD --------------------------------------------------------------------------------------------

SIZES = (1, 3, 7, 8, 9, 33, 1000, 9001, 100_003)
SGD_OPTIONS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "dampened": {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
}


class Twins:
    """The same parameters three times: ours on the device, torch's in the same dtype and in float64
    on the CPU."""

    def __init__(self, device: str, dtype: torch.dtype, start: int = 0, **options: object) -> None:
        torch.manual_seed(0)
        content = [torch.randn(size, dtype=torch.float64).to(dtype) for size in SIZES]
        self.start = start
        self.ours = [self.place(x.to(device)).requires_grad_() for x in content]
        self.stock = [x.clone().requires_grad_() for x in content]
        self.goal = [x.double().requires_grad_() for x in content]
        options = {"lr": 0.05, **options}
        on_cpu = {k: v.item() if isinstance(v, Tensor) else v for k, v in options.items()}
        on_cpu.pop("fused", None)
        self.optimizer = fastopt.SGD(self.ours, **options)
        self.twins = [torch.optim.SGD(x, **on_cpu, foreach=False) for x in (self.stock, self.goal)]
        kernels = launch.serves(self.ours[0].device) or step.cpu_kernels_apply()
        assert kernels, "torch would take this step"

    def place(self, x: Tensor) -> Tensor:
        """`start` elements off the allocation's alignment."""
        whole = torch.empty(x.numel() + self.start, dtype=x.dtype, device=x.device)
        return whole[self.start :].copy_(x)

    def bring_gradients(self, seed: int) -> None:
        torch.manual_seed(seed)
        for mine, theirs, right in zip(self.ours, self.stock, self.goal, strict=True):
            gradient = torch.randn(mine.shape, dtype=torch.float64).to(mine.dtype)
            mine.grad = self.place(gradient.to(mine.device)) if seed % 2 else gradient.to(mine)
            theirs.grad, right.grad = gradient.clone(), gradient.double()

    def step(self, seed: int, twins: bool = True) -> None:
        self.bring_gradients(seed)
        self.optimizer.step()
        if twins:
            for twin in self.twins:
                twin.step()

    def check(self) -> None:
        for mine, theirs, right in zip(self.ours, self.stock, self.goal, strict=True):
            what = f"parameter of {mine.numel()}"
            assert_as_accurate(mine.detach().cpu(), theirs, right, what)


def sgd_checks(device: str, start: int) -> Iterator[Check]:
    def train(dtype: torch.dtype, options: dict[str, object]) -> None:
        twins = Twins(device, dtype, start, **options)
        for seed in range(4):  # the first creates the momentum buffers
            twins.step(seed)
        twins.check()

    for dtype in DTYPES:
        for name, options in SGD_OPTIONS.items():
            yield f"sgd {name} {dtype} from {start}", lambda a=(dtype, options): train(*a)


def sgd_tensor_checks(device: str) -> Iterator[Check]:
    def train(dtype: torch.dtype, kind: torch.dtype) -> None:
        lr = torch.tensor(0.0625, dtype=kind, device=device)
        twins = Twins(device, dtype, lr=lr, momentum=0.9)
        for seed in range(3):
            lr.fill_(0.0625 / 2**seed)
            for twin in twins.twins:
                twin.param_groups[0]["lr"] = lr.item()
            twins.step(seed)
        twins.check()

    for dtype in DTYPES:
        for kind in (torch.float32, torch.float64):
            yield f"sgd {dtype} with an lr in {kind}", lambda a=(dtype, kind): train(*a)


def sgd_skipped_checks(device: str) -> Iterator[Check]:
    """A GradScaler's scale, and steps that it wants skipped: also a parameter's first."""

    def train(dtype: torch.dtype, skipped: int) -> None:
        twins = Twins(device, dtype, momentum=0.9, dampening=0.5, fused=True)
        twins.optimizer.grad_scale = torch.tensor(1.0, device=device)
        for seed in range(4):
            overflowed = float(seed == skipped)
            twins.optimizer.found_inf = torch.tensor(overflowed, device=device)
            twins.step(seed, twins=seed != skipped)
        twins.check()

    for dtype in DTYPES:
        for skipped in (0, 2):
            yield f"sgd {dtype}, step {skipped} skipped", lambda a=(dtype, skipped): train(*a)


GROUPS: dict[str, Callable[[str], Iterator[Check]]] = {
    **{group: lambda device, group=group: loss_checks(group, device) for group in SHAPES},
    "scale": scale_checks,
    "labels": label_checks,
    "sgd": lambda device: sgd_checks(device, 0),
    "sgd-unaligned": lambda device: sgd_checks(device, 1),
    "sgd-tensors": sgd_tensor_checks,
    "sgd-skipped": sgd_skipped_checks,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("groups", nargs="+", choices=GROUPS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    done = failed = 0
    for group in options.groups:
        for name, check in GROUPS[group](options.device):
            done += 1
            try:
                check()
                if options.device == "cuda":
                    torch.cuda.synchronize()
            except AssertionError as error:
                failed += 1
                print(f"FAIL {group}: {name}: {error}")
            except (
                RuntimeError
            ) as error:  # perhaps the end of all that this process can do on a GPU
                print(
                    f"FAIL {group}: {name}: {type(error).__name__}: {error}; the rest did not run"
                )
                return 1
    print(f"{done} cases, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
