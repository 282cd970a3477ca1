"""`python -m fastopt`: what was built, which kernel serves which device here, and why the rest
is missing. The exit status is 1 where kernels are missing that could serve here.

`python -m fastopt check`: whether the kernels of each GPU give right values there; what was found
is kept for all later processes. The exit status is 1 where one does not.

`python -m fastopt run script.py`: see running.py."""

import json
import os
import platform
import subprocess
import sys
from typing import NoReturn

import torch

import fastopt
from fastopt import backends, loss, ops, selfcheck
from fastopt.sgd import gather, launch, step

# What can be set, and what it means while it is not.
ENVIRONMENT = {
    "FASTOPT_ALWAYS": "calls too small for our kernels to win go to torch's own",
    "FASTOPT_SIMD": "the best SIMD level of this CPU",
    "FASTOPT_BACKEND": "the compiled kernels where they were built, else Triton's (GPU)",
    "FASTOPT_CHECK": "kernels of a GPU serve once they gave right values there (0: trust them)",
    "FASTOPT_LIBRARY": "the library in the package",
    "FASTOPT_DEBUG": "on a GPU, labels out of range make the loss NaN, and nothing waits for it",
    "FASTOPT_VERBOSE": "nothing is said of calls that torch serves",
    "FASTOPT_QUIET": "patch() and `python -m fastopt run` say what they patch",
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


def verdicts() -> list[list[str]]:
    """What is known of the kernels on every GPU that they could serve."""
    if launch.family() is None:
        return []
    rows = []
    for i in filter(backends.serves_gpu, range(torch.cuda.device_count())):
        for op, dtype in selfcheck.EVERY:
            verdict = selfcheck.known(op, dtype, i)
            words = "not checked yet" if verdict is None else verdict or "right"
            if not backends.CHECK:
                words = "trusted: FASTOPT_CHECK=0"
            rows.append([f"cuda:{i}", selfcheck.name(op, dtype), words])
    return rows


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

what they gave on them (`python -m fastopt check` runs them)
{table(verdicts() or [["nothing to check"]])}

environment
{table(environment)}"""


def exit_status() -> int:
    if backends.UNWANTED:
        return 0
    cpu = platform.system() == "Linux" and bool(backends.problems)
    gpu = any(map(backends.why_not_gpu, range(torch.cuda.device_count())))
    return int(cpu or gpu)


CHILD = [sys.executable, "-m", "fastopt", "check"]
CHILD_LIMIT_S = 180.0  # to start, and to be silent for as long as a check lets it


def check() -> int:
    """Every verdict anew, each from a child: a wrong address leaves no context to go on with, and
    what hangs is to be killed."""
    rows = verdicts()
    if not rows:
        print("there are no kernels on a GPU to check")
    failed = False
    for gpu, kernels, _ in rows:
        index, (op, dtype) = int(gpu[5:]), BY_NAME[kernels]
        command = [*CHILD, gpu[5:], kernels]
        verdict = "the process that checked it "
        try:
            child = subprocess.run(
                command, stdout=subprocess.PIPE, text=True, check=False, timeout=CHILD_LIMIT_S
            )
            verdict = json.loads(child.stdout.splitlines()[-1])
        except subprocess.TimeoutExpired:
            verdict += f"gave no answer within {CHILD_LIMIT_S:g} s"
            selfcheck.remember(op, dtype, index, verdict)
        except (LookupError, ValueError):
            verdict += f"ended with status {child.returncode}"
            selfcheck.remember(op, dtype, index, verdict)
        print(f"  {gpu}  {kernels:25}  {verdict or 'right'}", flush=True)
        failed |= verdict != ""
    return int(failed)


BY_NAME = {selfcheck.name(*of): of for of in selfcheck.EVERY}


def check_one(index: str, kernels: str) -> NoReturn:
    """A child of check(). What hangs in a thread of its own must not keep it from ending."""
    print(json.dumps(selfcheck.examine(*BY_NAME[kernels], int(index))), flush=True)
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1:] == ["check"]:
        sys.exit(check())
    if sys.argv[1:2] == ["check"]:
        check_one(*sys.argv[2:])
    if sys.argv[1:2] == ["run"]:
        from fastopt import running

        running.main(sys.argv[2:])
        sys.exit()
    try:
        print(report(), flush=True)
    except BrokenPipeError:  # `| head -1` has seen enough; Python would try again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(exit_status())
