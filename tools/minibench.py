"""A first look at speed, in a minute: ours beside torch eager, and the share of a device copy.

    python tools/minibench.py cross_entropy|sgd|host|profile [--device cuda|cpu]

Inputs, counted bytes and the stopwatch are those of bench/, which measures for publication; here
nothing is compiled and a case takes a second. `host` times what an SGD step costs the host;
`profile` runs six kernels once each between the marks of a profiler (ncu --profile-from-start off).
On the CPU a few small cases show that this script is right.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
os.environ["FASTOPT_CHECK"] = "0"  # before fastopt is imported: torch's kernels must not be timed

import torch

import bench_cross_entropy
import bench_sgd
from timing import Call, Stopwatch, host_microseconds, make_stopwatch, measure_copy

f32, bf16 = torch.float32, torch.bfloat16
SECONDS = {"cuda": 0.5, "cpu": 0.05}  # of a case
ROUNDS = 100  # at most

LossCase, StepCase = bench_cross_entropy.Case, bench_sgd.Case
GIGABYTE = {bf16: 2**29, f32: 2**28}  # in logits


def loss_cases(device: str) -> list[LossCase]:
    if device == "cpu":
        return [LossCase("", (2048, 100), f32), LossCase("", (2, 21, 32, 32), bf16)]
    shapes = [(min(GIGABYTE[bf16] // c, 2**20), c, bf16) for c in (10, 1000, 4096, 32000, 50257)]
    shapes += [(GIGABYTE[bf16] // c, c, bf16) for c in (128256, 151936, 262144)]
    shapes += [(GIGABYTE[f32] // c, c, f32) for c in (1000, 32000, 50257, 128256, 262144)]
    cases = [LossCase("", (n, c), dtype) for n, c, dtype in shapes]
    cases += [LossCase("", (n, c), bf16, mode="forward") for n, c, dtype in shapes if dtype == bf16]
    cases += [LossCase("", (32, 21, 512, 512), dtype) for dtype in (bf16, f32)]
    cases += [LossCase("", (8, 150, 512, 512), bf16)]
    return [*cases, LossCase("", (16777, 32000), bf16, label_smoothing=0.1)]


def step_cases(device: str) -> list[StepCase]:
    small = [StepCase("161 x 64", [(64,)] * 161), StepCase("LeNet", bench_sgd.LENET)]
    if device == "cpu":
        return small
    large = [StepCase("100M", [(100_000_000,)], dtype) for dtype in (f32, bf16)]
    return [*large, StepCase("ResNet-50", bench_sgd.resnet50()), *small]


def interleaved(
    device: str, stopwatch: Stopwatch, calls: dict[str, Call], prepare: dict[str, Call]
) -> dict[str, list[float]]:
    """Seconds of each variant, in turns, each round in a new order."""

    def turn(variant: str) -> float:
        if variant in prepare:
            prepare[variant]()
        return stopwatch(calls[variant])

    for variant in list(calls) * 2:
        turn(variant)
    order, dice = list(calls), random.Random(0)
    seconds: dict[str, list[float]] = {variant: [] for variant in calls}
    end = time.perf_counter() + SECONDS[device]
    for done in range(ROUNDS):
        if done > 2 and time.perf_counter() > end:
            break
        dice.shuffle(order)
        for variant in order:
            seconds[variant].append(turn(variant))
    return seconds


def say(name: str, moved: int, seconds: dict[str, list[float]], copy: float) -> None:
    ours, theirs = (statistics.median(values) for values in seconds.values())
    low, *_, high = sorted(next(iter(seconds.values())))
    print(
        f"say: {name:38} {1e3 * ours:9.3f} ms ({1e3 * low:.3f} to {1e3 * high:.3f})"
        f" {100 * moved / ours / copy:5.1f} % of copy, torch {1e3 * theirs:9.3f} ms"
        f" {theirs / ours:6.2f} x"
    )


def bench_losses(device: str, stopwatch: Stopwatch, copy: float) -> None:
    for case in loss_cases(device):
        logits, target = bench_cross_entropy.make_inputs(case, device)
        calls: dict[str, Call] = {
            variant: bench_cross_entropy.make_call(case, variant, logits, target)[0]
            for variant in ("fastopt", "eager")
        }
        name = f"{str(case.dtype).removeprefix('torch.')} {' x '.join(map(str, case.shape))}"
        name += (case.mode != "full") * f" {case.mode}" + (case.label_smoothing > 0) * " smoothing"
        moved = bench_cross_entropy.bytes_moved(case, logits, target)
        say(name, moved, interleaved(device, stopwatch, calls, {}), copy)


def make_trainings(
    case: StepCase, device: str, variants: tuple[str, ...]
) -> dict[str, bench_sgd.Training]:
    params = bench_sgd.make_tensors(case, 0, device)
    grads = [bench_sgd.make_tensors(case, seed, device) for seed in (1, 2)]
    return {variant: bench_sgd.Training(variant, params, grads) for variant in variants}


def bench_steps(device: str, stopwatch: Stopwatch, copy: float) -> None:
    for case in step_cases(device):
        trainings = make_trainings(case, device, ("fastopt", "fused"))
        calls: dict[str, Call] = {name: training.step for name, training in trainings.items()}
        before: dict[str, Call] = {
            name: training.bring_gradients for name, training in trainings.items()
        }
        elements = sum(p.numel() for p in trainings["fastopt"].params)
        name = f"{str(case.dtype).removeprefix('torch.')} {case.name}"
        moved = 5 * case.dtype.itemsize * elements
        say(name, moved, interleaved(device, stopwatch, calls, before), copy)


def bench_host(device: str) -> None:
    """Microseconds until step() returns, while the device may still work."""
    cases = [*step_cases("cpu"), StepCase("1000 x 64", [(64,)] * 1000)]
    if device == "cuda":
        cases.append(StepCase("ResNet-50", bench_sgd.resnet50()))
    for case in cases:
        trainings = make_trainings(case, device, ("fastopt", "fused", "foreach"))
        for training in trainings.values():
            for _ in range(3):
                training.bring_gradients()
                training.step()
        times = {
            variant: host_microseconds(training.step, training.bring_gradients)
            for variant, training in trainings.items()
        }
        print(f"say: {case.name:12} " + ", ".join(f"{k} {v:.0f} us" for k, v in times.items()))


# One call for each kernel that moves the bytes: in shared memory by a block and by a cluster, read
# twice, a thread a row, classes apart, and the step.
PROFILED = [
    LossCase("", (16777, 32000), bf16),
    LossCase("", (4185, 128256), bf16),
    LossCase("", (256, 2**20), f32),
    LossCase("", (2**20, 10), bf16),
    LossCase("", (32, 21, 512, 512), bf16),
]


def profile(device: str) -> None:
    cases = PROFILED if device == "cuda" else loss_cases(device)
    calls: list[Call] = []
    for case in cases:
        logits, target = bench_cross_entropy.make_inputs(case, device)
        calls.append(bench_cross_entropy.make_call(case, "fastopt", logits, target)[0])
    (training,) = make_trainings(step_cases(device)[0], device, ("fastopt",)).values()
    training.bring_gradients()
    calls.append(training.step)
    for call in calls:
        call()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    for call in calls:
        call()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("cross_entropy", "sgd", "host", "profile"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    device = options.device
    if options.what == "profile":
        profile(device)
    elif options.what == "host":
        bench_host(device)
    else:
        stopwatch = make_stopwatch(device)
        copy = measure_copy(device, stopwatch, 31 if device == "cuda" else 3)
        print(f"say: copy {copy / 1e9:.1f} GB/s, read and write counted")
        (bench_losses if options.what == "cross_entropy" else bench_steps)(device, stopwatch, copy)


if __name__ == "__main__":
    main()
