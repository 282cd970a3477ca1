"""`python -m fastopt`: what was built, which kernel serves which device here, and why the rest
is missing."""

import os
import platform

import torch

import fastopt
from fastopt import loss, ops, optim

# What can be set, and what it means while it is not.
ENVIRONMENT = {
    "FASTOPT_ALWAYS": "calls too small for our kernels to win go to torch's own",
    "FASTOPT_SIMD": "the best SIMD level of this CPU",
    "FASTOPT_BACKEND": "the compiled kernels, where they were built",
    "FASTOPT_LIBRARY": "the library in the package",
}
DEVICES = {"cpu": "CPU", "cuda": "CUDA"}  # and the dispatcher's key of each
OPS = (
    "cross_entropy_forward",
    "cross_entropy_forward_backward",
    "cross_entropy_backward",
    "cross_entropy_backward_target",
)


def library(device: str) -> str:
    if device == "cuda":
        return "not built: fastopt has no CUDA kernels yet"
    if ops.CPU_LIBRARY is None:
        return f"not loaded: {ops.CPU_LIBRARY_ERROR}"
    return f"{ops.CPU_LIBRARY} (SIMD level {ops.simd_level()})"


def op_kernel(op: str, device: str) -> str:
    """What answers torch.ops.fastopt.<op> on this device: the dispatcher knows."""
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"fastopt::{op}", DEVICES[device]):
        return f"C++, {ops.simd_level()}"
    return "reference"


def cross_entropy_kernel(device: str) -> str:
    if device == "cpu" and loss._AVAILABLE:
        return op_kernel("cross_entropy_forward", device)
    return "torch's own"


def sgd_kernel(device: str) -> str:
    if device == "cpu" and optim._kernels_apply():
        return f"C++, {ops.simd_level()}"
    if device == "cpu" and ops.CPU_LIBRARY is not None:
        return "torch's own: this Python's or torch's object layout is unknown"
    return "torch's own"


def table(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(f"  {line}" for line in lines)


def report() -> str:
    libraries = [[device, library(device)] for device in DEVICES]
    kernels = [["", *DEVICES]]
    kernels += [["fastopt.cross_entropy", *map(cross_entropy_kernel, DEVICES)]]
    kernels += [["fastopt.SGD", *map(sgd_kernel, DEVICES)]]
    kernels += [
        [f"torch.ops.fastopt.{op}", *(op_kernel(op, device) for device in DEVICES)] for op in OPS
    ]
    environment = [
        [name, os.environ.get(name, f"not set: {meaning}")] for name, meaning in ENVIRONMENT.items()
    ]
    machine = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    return f"""\
fastopt {fastopt.__version__}, torch {torch.__version__}, {machine}

libraries
{table(libraries)}

kernels
{table(kernels)}
  (reference: fastopt/reference.py, in plain torch)

environment
{table(environment)}"""


if __name__ == "__main__":
    print(report())
