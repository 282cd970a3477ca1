"""`python -m fastopt`: what was built, which kernel serves which device here, and why the rest
is missing. The exit status is 1 where kernels are missing that could serve here."""

import os
import platform
import sys

import torch

import fastopt
from fastopt import backends, loss, ops
from fastopt.sgd import gather, step

# What can be set, and what it means while it is not.
ENVIRONMENT = {
    "FASTOPT_ALWAYS": "calls too small for our kernels to win go to torch's own",
    "FASTOPT_SIMD": "the best SIMD level of this CPU",
    "FASTOPT_BACKEND": "the compiled kernels where they were built, else Triton's (GPU)",
    "FASTOPT_LIBRARY": "the library in the package",
    "FASTOPT_DEBUG": "on a GPU, labels out of range make the loss NaN, and nothing waits for it",
}
DEVICES = {"cpu": "CPU", "cuda": "CUDA"}  # and the dispatcher's key of each
GPU_KERNELS = {"cuda": "CUDA C++", "triton": "Triton"}


def libraries() -> list[list[str]]:
    cpu = f"{backends.CPU_LIBRARY} (SIMD level {backends.simd_level()})"
    return [
        ["cpu", cpu if backends.CPU_LIBRARY else f"not loaded: {backends.CPU_LIBRARY_ERROR}"],
        ["cuda", str(backends.CUDA_LIBRARY or f"not loaded: {backends.CUDA_LIBRARY_ERROR}")],
        [
            "triton",
            f"not used: {backends.TRITON_ERROR}" if backends.TRITON_ERROR else "serves GPUs",
        ],
    ]


def gpus() -> list[list[str]]:
    """Every GPU that torch sees, and whether our kernels run there."""
    return [
        [
            f"cuda:{i}",
            torch.cuda.get_device_name(i),
            f"torch's own: {reason}" if reason else "served",
        ]
        for i in range(torch.cuda.device_count())
        for reason in [backends.why_not_gpu(i)]
    ]


def op_kernel(op: str, device: str) -> str:
    """What answers torch.ops.fastopt.<op> on this device: the dispatcher knows."""
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"fastopt::{op}", DEVICES[device]):
        return (
            GPU_KERNELS[backends.GPU_FAMILY or ""]
            if device == "cuda"
            else f"C++, {backends.simd_level()}"
        )
    return "reference"


def cross_entropy_kernel(device: str) -> str:
    if loss._ON_GPU if device == "cuda" else loss._ON_CPU:
        return op_kernel("cross_entropy_forward", device)
    return "torch's own"


def sgd_kernel(device: str) -> str:
    if device == "cpu" and step.cpu_kernels_apply():
        return f"C++, {backends.simd_level()}"
    if device == "cuda" and backends.GPU_FAMILY is not None:
        return GPU_KERNELS[backends.GPU_FAMILY]
    if device == "cpu" and backends.CPU_LIBRARY is not None:
        if gather.OTHER_SOURCES:
            return "torch's own: _C.so was built from other sources"
        return "torch's own: this Python's or torch's object layout is unknown"
    return "torch's own"


def table(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(f"  {line}" for line in lines)


def report() -> str:
    kernels = [["", *DEVICES]]
    kernels += [["fastopt.cross_entropy", *map(cross_entropy_kernel, DEVICES)]]
    kernels += [["fastopt.SGD", *map(sgd_kernel, DEVICES)]]
    kernels += [
        [f"torch.ops.fastopt.{op}", *(op_kernel(op, device) for device in DEVICES)]
        for op in ops.SCHEMAS
    ]
    environment = [
        [name, os.environ.get(name, f"not set: {meaning}")] for name, meaning in ENVIRONMENT.items()
    ]
    machine = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    return f"""\
fastopt {fastopt.__version__}, torch {torch.__version__}, {machine}

libraries
{table(libraries())}

kernels
{table(kernels)}
  (reference: fastopt/reference.py, in plain torch)

GPUs
{table(gpus() or [["none that torch sees"]])}

environment
{table(environment)}"""


def exit_status() -> int:
    if backends.UNWANTED:
        return 0
    cpu = platform.system() == "Linux" and bool(backends.problems)
    gpu = any(map(backends.why_not_gpu, range(torch.cuda.device_count())))
    return int(cpu or gpu)


if __name__ == "__main__":
    try:
        print(report(), flush=True)
    except BrokenPipeError:  # `| head -1` has seen enough; Python would try again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(exit_status())
